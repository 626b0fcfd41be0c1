"""What a judge is asked, as data: a TOML file for each rubric, beside this module or anywhere.

  description = "for people; the judge does not see it"
  system = "the system turn; none where the field is missing"
  user = "the user turn, with marks where pictures and texts stand: {picture} ... {prompt}"
  answers = ["1", "2", "3", "4", "5"]

`answers` may be left out where it is these five. A score is the mean of the answers under their probabilities, so that they are whole numbers, and
each is one token of the judge. Marks that stand for pictures: {picture}, what is judged; {sources}, all condition images in their order; {first} and
{second}, two pictures to compare. Marks that stand for texts: {prompt} and {question}. Pictures reach the judge in the order of their marks.
"""

import dataclasses
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

FOLDER = pathlib.Path(__file__).parent
SCALE = ("1", "2", "3", "4", "5")
PICTURES, TEXTS = ("picture", "sources", "first", "second"), ("prompt", "question")
FIELDS = {"description": str, "system": str, "user": str, "answers": list}
POINTWISE, PAIRWISE, QUESTION = "pointwise", "pairwise", "question"
# What a rubric must show the judge to be of a kind.
NEEDS = {POINTWISE: {"picture"}, PAIRWISE: {"first", "second"}, QUESTION: {"picture", "question"}}
_MARK = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Rubric:
  """One question to a judge.

  Attributes:
    name: of the file, and of the metric.
    user: the user turn, with marks.
    system: the system turn; "" for none.
    answers: what the reply may begin with.
    description: for people.
  """
  name: str
  user: str
  system: str = ""
  answers: tuple[str, ...] = SCALE
  description: str = ""

  @property
  def marks(self) -> tuple[str, ...]:
    """The marks of the user turn, in order."""
    return tuple(_MARK.findall(self.user))

  @property
  def values(self) -> tuple[int, ...]:
    """What each answer is worth."""
    return tuple(int(answer) for answer in self.answers)

  def fill(self, texts: Mapping[str, str], pictures: Mapping[str, Sequence[Any]]) -> tuple[Any, ...]:
    """The user turn in parts: texts, and what stands for pictures.

    Args: mark -> its text; mark -> what stands for its pictures, in order. Braces inside a text are text.
    """
    parts: list[Any] = []
    for place, part in enumerate(_MARK.split(self.user)):
      parts += [part] if place % 2 == 0 else pictures[part] if part in PICTURES else [texts[part]]
    return tuple(parts)


def rubric_file(name: str) -> pathlib.Path:
  """The file of the rubric of a name, or that `name` is, if it ends in .toml."""
  return pathlib.Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"


def find_rubric(name: str, kind: str = POINTWISE) -> Rubric:
  """The rubric of that name beside this module, or of the file `name` if it ends in .toml.

  Args: name or path; what the rubric is for: `POINTWISE`, `PAIRWISE` or `QUESTION`.

  Raises:
    ValueError: no such rubric, a file that is no TOML, or one of another form than this module's docstring says.
  """
  path = rubric_file(name)
  if not path.is_file():
    known = ", ".join(sorted(one.stem for one in FOLDER.glob("*.toml")))
    raise ValueError(f"There is no rubric {name!r}: choose one of {known}, or name a .toml file.")
  try:
    fields = tomllib.loads(path.read_text(encoding="utf-8"))
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"The rubric {path} is no TOML file ({error}): mend it.") from error
  odd = [key for key, value in fields.items() if not isinstance(value, FIELDS.get(key, ()))]
  if odd or "user" not in fields:
    what = f"the field {odd[0]!r}, unknown or of the wrong type" if odd else "no field 'user'"
    raise ValueError(f"The rubric {path} has {what}: a rubric is a text 'user', and may have texts 'system' and 'description' and a list 'answers'.")
  rubric = Rubric(path.stem, **{**fields, "answers": tuple(fields.get("answers", SCALE))})
  _check(rubric, path, kind)
  return rubric


def _check(rubric: Rubric, path: pathlib.Path, kind: str) -> None:
  marks = rubric.marks
  unknown = sorted(set(marks) - {*PICTURES, *TEXTS})
  if unknown:
    raise ValueError(f"The rubric {path} has the unknown mark {{{unknown[0]}}}: the marks are {', '.join(f'{{{one}}}' for one in PICTURES + TEXTS)}.")
  others = set().union(*NEEDS.values()) - NEEDS[kind]
  missing, odd = sorted(NEEDS[kind] - set(marks)), sorted(others & set(marks))
  twice = [mark for mark in PICTURES if marks.count(mark) > 1]
  if missing or odd or twice:
    what = f"lacks the mark {{{missing[0]}}}" if missing else f"has the mark {{{odd[0]}}}" if odd else f"shows {{{twice[0]}}} twice"
    raise ValueError(f"The rubric {path} {what}: a {kind} rubric has {' and '.join(f'{{{one}}}' for one in sorted(NEEDS[kind]))}, once, and no other "
                     "picture but {sources}.")
  digits = all(isinstance(answer, str) and re.fullmatch("[0-9]+", answer) for answer in rubric.answers)
  if kind != QUESTION and (not digits or len({*rubric.answers}) != len(rubric.answers) or len(rubric.answers) < 2):
    raise ValueError(f"The rubric {path} has the answers {list(rubric.answers)}: they must be two or more different whole numbers, written as texts.")
