"""Signs and menus set in type, and edits of them whose right result is known: another word, number or colour, or a line that is taken away.

A sign is one line in a frame; a menu a title over four lines, each a dish with its price. Lines keep their places and all of an edit's pages the size
of their letters, so that source and result differ in the edited line alone. What the words may be stands in prompts/edits.json, which was written for
this project. The font is that of `qimg2.evaluation.text_rendering`.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qimg2.evaluation.text_rendering import LEADING, MARGIN, find_font

LANGUAGES, KINDS, CHANGES = ("en", "de", "zh"), ("sign", "menu"), ("word", "number", "colour", "removal")
NUM_ROWS, NUM_OTHERS = 4, 4  # lines of a menu below its title; pages beside source and result that an edit may be taken for
INKS = {"black": (20, 20, 20), "red": (200, 20, 20), "blue": (20, 40, 200), "green": (0, 110, 40), "purple": (130, 20, 140)}
PAPERS = {"white": (255, 255, 255), "cream": (250, 240, 215), "sky": (215, 235, 250), "mint": (220, 245, 225)}
_REFERENCE_PX = 100  # size of the letters that widths are measured at


class Line(NamedTuple):
  """A line of a page; an empty text keeps its place."""
  text: str
  ink: str = "black"


@dataclasses.dataclass(frozen=True)
class Page:
  """Lines from top to bottom on a paper, in a frame where it is a sign."""
  lines: tuple[Line, ...]
  paper: str = "white"
  is_framed: bool = False

  @property
  def texts(self) -> list[str]:
    """What can be read."""
    return [line.text for line in self.lines if line.text]

  def with_line(self, number: int, line: Line) -> "Page":
    """The page with another line in the place of one."""
    return dataclasses.replace(self, lines=(*self.lines[:number], line, *self.lines[number + 1:]))


@dataclasses.dataclass(frozen=True)
class Edit:
  """An instruction and what it makes of a page.

  Attributes:
    instruction: in the language of the page.
    language, kind, change: of `LANGUAGES`, `KINDS` and `CHANGES`.
    source, target: the page before and after.
    others: at most `NUM_OTHERS` pages that another edit of the same kind would have made.
  """
  instruction: str
  language: str
  kind: str
  change: str
  source: Page
  target: Page
  others: tuple[Page, ...]

  @property
  def pages(self) -> tuple[Page, ...]:
    """Target, source, then the others."""
    return (self.target, self.source, *self.others)


def render(edit: Edit, pages: Sequence[Page], height: int, width: int, fonts: str = "") -> list[np.ndarray]:
  """Pictures [height, width, 3] uint8 of pages of an edit, all with letters of one size: the largest at which each of its pages fits.

  Args: an edit; which of its pages; size in px; a folder with more fonts.

  Raises:
    ValueError: no font has all characters, or the picture is too small for a letter.
  """
  texts = [line.text for page in edit.pages for line in page.lines]
  path, margin = find_font("".join(texts), fonts), round(2 * MARGIN * min(height, width))
  widest = max(map(ImageFont.truetype(path, _REFERENCE_PX).getlength, texts)) / _REFERENCE_PX
  pitch = (height - 2 * margin) // len(edit.source.lines)  # px from line to line
  size = int(min(pitch / LEADING, (width - 2 * margin) / widest))
  if size < 1:
    raise ValueError(f"A picture of {width} x {height} px holds no line of {widest:.0f} letters: give a larger one.")
  font = ImageFont.truetype(path, size)
  return [_drawn(page, font, pitch, margin, height, width) for page in pages]


def _drawn(page: Page, font: ImageFont.FreeTypeFont, pitch: int, margin: int, height: int, width: int) -> np.ndarray:
  image = Image.new("RGB", (width, height), PAPERS[page.paper])
  draw = ImageDraw.Draw(image)
  if page.is_framed:
    draw.rectangle((margin // 3, margin // 3, width - 1 - margin // 3, height - 1 - margin // 3), outline=INKS["black"], width=max(1, margin // 8))
  for row, line in enumerate(page.lines):
    draw.text((margin, margin + pitch * (row + 0.5)), line.text, font=font, fill=INKS[line.ink], anchor="lm")
  return np.asarray(image)


# What is edited.


class _Row(NamedTuple):
  """A line whose parts can be changed: a pattern with {} for each, their pools (words, "number" or a pattern of a price), and what they are."""
  pattern: str
  pools: tuple[Any, ...]
  parts: tuple[str, ...]

  @property
  def text(self) -> str:
    return self.pattern.format(*self.parts)

  def with_part(self, place: int, part: str) -> str:
    return self.pattern.format(*self.parts[:place], part, *self.parts[place + 1:])


def make_edit(language: str, kind: str, change: str, rng: np.random.Generator) -> Edit:
  """An edit, a function of its arguments and of what `rng` gives.

  Raises:
    ValueError: an unknown language, kind or change.
  """
  for name, value, known in (("language", language, LANGUAGES), ("kind", kind, KINDS), ("change", change, CHANGES)):
    if value not in known:
      raise ValueError(f"Edits of text have no {name} {value!r}: choose among {', '.join(known)}.")
  words = wordings()[language]
  rows = (_sign if kind == "sign" else _menu)(words, change, rng)
  inks = [str(ink) for ink in rng.permutation(list(INKS))]
  source = Page(tuple(Line(row.text, inks[0]) for row in rows), str(rng.choice(list(PAPERS))), kind == "sign")
  changed, values = _CHANGES[change](rows, source, words, inks, rng)
  template = words["instructions"][change][rng.integers(len(words["instructions"][change]))]
  return Edit(template.format(**values), language, kind, change, source, changed[0], tuple(changed[1:1 + NUM_OTHERS]))


@functools.cache
def wordings() -> Mapping[str, Any]:
  """{language: its words, wordings of instructions and names of colours}."""
  return json.loads((pathlib.Path(__file__).parent / "prompts" / "edits.json").read_text(encoding="utf-8"))


def letters(language: str) -> str:
  """All that pages of a language may have letters of, as one text."""
  words = wordings()[language]
  pools = [pool for form in words["signs"] for pool in form["pools"] if pool != "number"]
  texts = [form["text"] for form in words["signs"]] + [words["price"], "0123456789"]
  return "".join(sum([*pools, words["titles"], words["items"]], texts)).replace("{}", "")


def _sign(words: Mapping[str, Any], change: str, rng: np.random.Generator) -> list[_Row]:
  has = {"word": lambda pool: pool != "number", "number": lambda pool: pool == "number"}.get(change, lambda pool: True)
  forms = [form for form in words["signs"] if any(map(has, form["pools"]))]
  form = forms[rng.integers(len(forms))]
  return [_Row(form["text"], tuple(form["pools"]), tuple(_drawn_part(pool, rng) for pool in form["pools"]))]


def _menu(words: Mapping[str, Any], change: str, rng: np.random.Generator) -> list[_Row]:
  del change  # every menu has words and numbers
  items = rng.permutation(words["items"])[:NUM_ROWS]
  prices = [words["price"].format(first, rng.integers(10)) for first in rng.permutation(np.arange(1, 10))[:NUM_ROWS]]
  title = str(rng.choice(words["titles"]))
  pools = (words["items"], words["price"])
  return [_Row("{}", (words["titles"],), (title,)), *(_Row("{}  {}", pools, (str(item), price)) for item, price in zip(items, prices))]


def _drawn_part(pool: Any, rng: np.random.Generator) -> str:
  return str(rng.integers(10, 100)) if pool == "number" else str(rng.choice(pool))


def _parts(rows: Sequence[_Row], is_word: bool) -> list[tuple[int, int]]:
  """(row, place in it) of the words, or of the numbers."""
  return [(row, place) for row, one in enumerate(rows) for place, pool in enumerate(one.pools) if isinstance(pool, list) == is_word]


Changed = tuple[list[Page], dict[str, str]]  # (the result, then others; what the instruction says)


def _part_changed(is_word: bool) -> Callable[..., Changed]:
  def changed(rows: Sequence[_Row], source: Page, words: Mapping[str, Any], inks: Sequence[str], rng: np.random.Generator) -> Changed:
    del words, inks
    places = _parts(rows, is_word)
    row, place = places[rng.integers(len(places))]
    old, taken = rows[row].parts[place], {part for one in rows for part in one.parts}
    new = [value for value in _alternatives(rows[row].pools[place], old, rng) if value not in taken]
    pages = [source.with_line(row, source.lines[row]._replace(text=rows[row].with_part(place, value))) for value in new]
    return pages, {"old": old, "new": new[0]}
  return changed


def _alternatives(pool: Any, old: str, rng: np.random.Generator) -> list[str]:
  """Other words of a pool; of a number those that differ in one digit, without a 0 in front and with the last of a price as it is."""
  if isinstance(pool, list):
    return [str(word) for word in rng.permutation(pool) if word != old]
  places = [place for place, sign in enumerate(old) if sign.isdigit()][:2]
  values = [old[:place] + digit + old[place + 1:] for place in places for digit in "1234567890" if digit != old[place] and (place or digit != "0")]
  return [str(value) for value in rng.permutation(values)]


def _colour_changed(rows: Sequence[_Row], source: Page, words: Mapping[str, Any], inks: Sequence[str], rng: np.random.Generator) -> Changed:
  row = int(rng.integers(len(rows)))
  pages = [source.with_line(row, source.lines[row]._replace(ink=ink)) for ink in inks[1:]]
  return pages, {"line": " ".join(rows[row].text.split()), "ink": words["inks"][inks[1]]}


def _line_removed(rows: Sequence[_Row], source: Page, words: Mapping[str, Any], inks: Sequence[str], rng: np.random.Generator) -> Changed:
  del words, inks
  order = [int(row) for row in rng.permutation(len(rows))]
  pages = [source.with_line(row, source.lines[row]._replace(text="")) for row in order]
  return pages, {"line": " ".join(rows[order[0]].text.split())}


_CHANGES: dict[str, Callable[..., Changed]] = {
    "word": _part_changed(True), "number": _part_changed(False), "colour": _colour_changed, "removal": _line_removed}
