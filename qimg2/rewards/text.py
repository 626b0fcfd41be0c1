"""Text in pictures, read by OCR (`qimg2.evaluation.ocr`) and scored from both sides (`qimg2.evaluation.text`).

The OCR rewards in use count what is found: a picture that says a word five times, or fills its borders with more of them, loses nothing, and runs
have been seen to give up everything else for text (docs/rewards.md). This one divides by what was asked for and by what was drawn,

  R = 2 matched / (asked + drawn),                                                                                        (1)

so that what was not asked for costs as much as what is missing.
"""

import dataclasses
import functools
import pathlib
import re

import numpy as np

from qimg2.evaluation import ocr
from qimg2.evaluation.text import arrange, character_match, word_match
from qimg2.rewards import Reward, Task

UNITS = {"characters": character_match, "words": word_match}
# Of what stands between two marks; an apostrophe within a word is none.
_DOUBLE = re.compile(r"\"([^\"]+)\"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」|『([^』]+)』|《([^》]+)》")
_SINGLE = re.compile(r"(?<!\w)['‘]([^'’]+(?:['’]\w[^'’]*)*)['’](?!\w)")


def read_text(units: str = "characters", model: str = "") -> Reward:
  """How well a picture says the texts that its prompt asks for and nothing else, 0 to 1, by equation (1).

  The texts are the field "text" of the truth, one or a list of them; without it what the prompt has in quotes, double ones before single ones.

  Args:
    units: what is counted: "characters" in the order of the texts, where a part gives a part; or "words" in any order, where it gives nothing.
    model: path of another recogniser, "" for the one that comes with the OCR.

  Raises:
    ValueError: other units.
  """
  if units not in UNITS:
    raise ValueError(f"units is {units!r}: choose one of {', '.join(UNITS)}.")
  return Reward(_Score(units, model), check=_Check(model), check_machine=_Check(model).check_machine,
                files=functools.partial(_files, model))


def _files(model: str) -> tuple[str, ...]:
  """The recogniser's, where it is not the one that comes with the OCR: the network, and its characters where they have a file of their own."""
  return tuple(filter(None, (model, ocr.dictionary(pathlib.Path(model))))) if model else ()


@dataclasses.dataclass(frozen=True)
class _Score:
  units: str
  model: str

  def setup(self) -> None:
    """Loads the OCR, so that no picture waits for it."""
    ocr.read(np.full((32, 32, 3), 255, np.uint8), self.model)

  def __call__(self, picture: np.ndarray, task: Task) -> float:
    asked = _Check(self.model).texts(task)
    lines = [line.text for line in ocr.read(np.ascontiguousarray(picture[..., :3]), self.model)]
    return UNITS[self.units](" ".join(asked), arrange(asked, lines)).score


@dataclasses.dataclass(frozen=True)
class _Check:
  model: str

  def __call__(self, task: Task) -> None:
    self.texts(task)

  def check_machine(self) -> None:
    """Raises `ValueError` where the OCR is missing."""
    ocr.alphabet(self.model)

  def texts(self, task: Task) -> list[str]:
    """The texts of a task; `ValueError` where there are none, or some that the recogniser has no characters for."""
    asked = texts_of(task)
    if unknown := ocr.unreadable(" ".join(asked), self.model):
      raise ValueError(f"the OCR cannot read the characters {unknown[:10]!r} that its prompt asks for (give a recogniser of this script as `model`)")
    return asked


def texts_of(task: Task) -> list[str]:
  """The texts that the picture of a task should say.

  Raises:
    ValueError: there are none, or the truth's "text" is no text.
  """
  if "text" in task:
    given = task["text"]
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not "".join(texts).strip():
      raise ValueError(f"its record's text is {given!r}, and must be a text or a list of some")
    return texts
  for marks in (_DOUBLE, _SINGLE):
    if found := ["".join(groups).strip() for groups in marks.findall(task["prompt"])]:
      return [text for text in found if text] or _none(task)
  return _none(task)


def _none(task: Task) -> list[str]:
  raise ValueError(f"its record has no field text and its prompt {task['prompt']!r} no text in quotes")
