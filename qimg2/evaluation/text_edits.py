"""An evaluation suite of edits of rendered text: the source is a sign or a menu set in type, and the right result is known (`text_pages`).

Whether the instruction was carried out is asked twice:

  by rendering   among the clean result, the clean source and what other edits of the kind would have made of it, the result is the nearest by squared
                 distance of pixels. It needs no OCR, knows colours, and a guess among k pages is right in 1 / k of the cases, which is stated
  by OCR         each word that the edit changes in number is read as often as it stands in the result: the new one is there, the old one is gone.
                 Where nothing new is to be read, one of the words that stay must be, if there are any: a page on which nothing can be read has
                 had no line removed. Of colours an OCR says nothing: they are not in this figure

What should stay: of the words that stand in source and result the share that is read (each as often as it stands there), and PSNR, SSIM and drift
(`editing`) outside of the box around the edited letters. What is drawn at another size is compared with pages set in type at that size.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np

from qimg2.evaluation import Figure, Suite, Task, editing, ocr, text_pages
from qimg2.evaluation.text import words
from qimg2.evaluation.text_pages import CHANGES, KINDS, Edit
from qimg2.evaluation.text_suites import listed, size_of_ratio

RATIOS = {"sign": (1, 1), "menu": (3, 4)}  # width and height
FIGURES = {
    "right by rendering": Figure("nearest"), "right by rendering, chance": Figure("nearest by chance"),
    "right by OCR": Figure("read as asked", "can be read"), "other words read": Figure("other words read", "other words"), **editing.FIGURES}


class Source(Sequence[np.ndarray]):
  """The condition image of an edit, set in type when it is looked at: many edits need no memory."""

  def __init__(self, edit: Edit, size: tuple[int, int], fonts: str):
    self._edit, self._size, self._fonts = edit, size, fonts

  def __len__(self) -> int:
    return 1

  @overload
  def __getitem__(self, place: int) -> np.ndarray: ...

  @overload
  def __getitem__(self, place: slice) -> list[np.ndarray]: ...

  def __getitem__(self, place):
    if isinstance(place, slice):
      return [self[number] for number in range(*place.indices(1))]
    if place not in (0, -1):
      raise IndexError(f"An edit of text has one condition image, not number {place}.")
    return text_pages.render(self._edit, [self._edit.source], *self._size, self._fonts)[0]


def text_edits_suite(languages: str = "en,de", changes: str = ",".join(CHANGES), model: str = "", side_px: int = 1024, by: str = "change",
                     fonts: str = "") -> Suite:
  """Edits of signs and menus; as many as are asked for, languages, changes and kinds of page in turn.

  Args: languages and changes of `text_pages`, separated by commas; recognisers, see `ocr.recogniser_for`; side of a
  square of a picture's area; whether categories are those of "change", "language" or "kind"; folder with more fonts.

  Raises:
    ValueError: an unknown language, change or category, no OCR, one that cannot read a language, or no font for it.
  """
  chosen = {"language": listed(languages), "change": listed(changes)}
  for (name, some), known in zip(chosen.items(), (text_pages.LANGUAGES, CHANGES)):
    if odd := [one for one in some if one not in known]:
      raise ValueError(f"Edits of text have no {name} {odd[0]!r}: choose among {', '.join(known)}.")
    if not some:
      raise ValueError(f"No {name} of edits of text is chosen: choose among {', '.join(known)}.")
  if by not in ("change", "language", "kind"):
    raise ValueError(f"The figures of edits of text are given by change, language or kind, not by {by!r}.")
  for language in chosen["language"]:
    _check(language, model, fonts)
  tasks = functools.partial(_tasks, chosen["language"], chosen["change"], side_px, by, fonts)
  return Suite(tasks, functools.partial(score_edit, model=model, fonts=fonts), _show, FIGURES, is_slow=True)


def _check(language: str, model: str, fonts: str) -> None:
  """Whether there is a font with all letters of a language's pages and a recogniser for them: said before anything is drawn."""
  letters = text_pages.letters(language)
  if missing := ocr.recogniser_for(letters, model)[1]:
    raise ValueError(f"The OCR cannot read the characters {missing[:10]} of edits in {language}: give a recogniser for them as `model`, or leave the "
                     "language out.")
  text_pages.find_font(letters, fonts)


def _tasks(languages: Sequence[str], changes: Sequence[str], side_px: int, by: str, fonts: str, num: int, seed: int) -> list[Task]:
  made = []
  for number in range(num):
    change, rest = changes[number % len(changes)], number // len(changes)
    language, kind = languages[rest % len(languages)], KINDS[rest // len(languages) % len(KINDS)]
    edit = text_pages.make_edit(language, kind, change, np.random.default_rng((seed, number)))
    size = size_of_ratio(side_px, *RATIOS[kind])
    made.append(Task(edit.instruction, size, Source(edit, size, fonts), edit, f"{number:05d}-{language}-{kind}-{change}", getattr(edit, by)))
  return made


def score_edit(task: Task, picture: np.ndarray, model: str = "", fonts: str = "") -> dict[str, Any]:
  """What the module says of an edited picture [H, W, 3] uint8, and beside it the "recognised" lines and what was "expected".

  "kept_psnr" and its like are missing where the box leaves no window of 11 px.
  """
  edit = task.truth
  clean = text_pages.render(edit, edit.pages, *picture.shape[:2], fonts)
  recogniser, _ = ocr.recogniser_for(" ".join(sum((page.texts for page in edit.pages), [])), model)
  lines = [line.text for line in ocr.read(picture, recogniser)]
  return {"nearest": float(editing.nearest(picture, clean) == 0), "nearest by chance": 1 / len(clean), **_read(edit, lines),
          **editing.scores_where_kept(picture, clean[1], clean[0], editing.outside_of_box), "expected": edit.target.texts, "recognised": lines}


def _read(edit: Edit, lines: Sequence[str]) -> dict[str, float]:
  """Of the words of source, result and picture the two figures of the OCR, each as numerator and denominator."""
  before, after, drawn = (collections.Counter(words(" ".join(some))) for some in (edit.source.texts, edit.target.texts, lines))
  changed, stays = {word for word in before | after if before[word] != after[word]}, before & after
  is_seen = any(after[word] for word in changed) or not stays or bool(stays & drawn)
  right = bool(changed) and is_seen and all(drawn[word] == after[word] for word in changed)
  return {"read as asked": float(right), "can be read": float(bool(changed)), "other words read": (stays & drawn).total(),
          "other words": stays.total()}


def _show(task: Task, picture: np.ndarray, scores: Mapping[str, Any]) -> list[tuple[np.ndarray, str]]:
  """Source and picture, with what is wrong."""
  wrong = ["rendering"] * (not scores["nearest"]) + ["OCR"] * (not scores["read as asked"] and scores["can be read"] > 0)
  return [(task.sources[0], "(source)"), (picture, task.prompt + (f" [wrong by {' and '.join(wrong)}]" if wrong else ""))]
