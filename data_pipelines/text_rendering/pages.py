"""What all kinds of pictures share: the page to be filled, texts in their places, how they are set, and the truth about them.

A *kind* is a module named in `settings.KINDS` with two functions. `render(rng, page)` returns (the picture H W 3 uint8, its truth), the truth as
`truth_of` returns it, with whatever more the kind has to say. `captions(rng, truth, language)` returns what is said of it, see `captions.captions`.
Kinds of which there are edits have a third, `compose(rng, page)`, which returns a `Composition`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.text_rendering import shapes
from data_pipelines.text_rendering.captions import place_of
from data_pipelines.text_rendering.drawing import Paper, draw_on
from data_pipelines.text_rendering.fonts import Typeface
from data_pipelines.text_rendering.layout import Setting, Style
from data_pipelines.text_rendering.schemes import Ground
from data_pipelines.text_rendering.settings import Settings
from data_pipelines.text_rendering.words import Corpus

TRIES = 12  # for a text that is not yet on the page
_TIGHTER = 0.88  # leading of headings, as a share of the least of running text
_MARGINS = (0.05, 0.11)  # of the shorter side
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class Page:
  """What is set.

  Attributes:
    corpus, typefaces: a language's texts, and what sets them.
    height, width: sides in px.
    settings: of the data set.
    num_characters: the most that there may be.
    others: language -> typefaces of all languages of the data set, this one too.
    is_simple: whether to draw what surely has a short caption, because others were too long.
  """
  corpus: Corpus
  typefaces: Sequence[Typeface]
  height: int
  width: int
  settings: Settings
  num_characters: int
  others: Mapping[str, Sequence[Typeface]] = dataclasses.field(default_factory=dict)
  is_simple: bool = False

  @property
  def least_px(self) -> float:
    """The least size of letters."""
    return self.settings.min_px * self.corpus.language.min_em


@dataclasses.dataclass
class Block:
  """A text in its place.

  Attributes:
    paragraphs, setting: what it says, and where.
    what: a word, heading, line, paragraph or list, or the role of a region of a template.
    ink: of `colours.draw_ink`.
    ground: what it stands on, where that is not the paper.
    structure: number of the table, chart, code or formula of the page to which it belongs.
    frame: where it may be set anew; None for wherever there is room.
    is_fixed: whether it must say what it says, because something drawn shows the same.
    leader: dots from it to the text beside it, which follow its ink.
    part: number of the object on which it stands.
  """
  paragraphs: list[str]
  setting: Setting
  what: str
  ink: tuple[str, tuple[int, int, int], float] | None = None
  ground: Ground | None = None
  structure: int | None = None
  frame: Box | None = None
  is_fixed: bool = False
  leader: "Leader | None" = None
  part: int = 0


@dataclasses.dataclass(frozen=True)
class Leader:
  """Dots on a base line at y between the ink of a text and a box beside it, each a square of `dot` px, `step` px apart."""
  to: Box
  y: float
  step: float
  dot: float
  rgb: tuple[int, int, int]

  def box(self, ink: Box) -> Box:
    """What lies between the ink and the box."""
    return min(ink[2], self.to[2]), self.y - self.dot, max(ink[0], self.to[0]), self.y

  def draw(self, picture: Image.Image, ink: Box) -> None:
    """Draws the dots, at multiples of their distance, so that those of rows stand below each other."""
    begin, _, end, _ = self.box(ink)
    number = int(begin / self.step) + 2
    while number * self.step < end - self.step:
      shapes.fill_box(picture, (number * self.step, self.y - self.dot, number * self.step + self.dot, self.y), self.rgb)
      number += 1


@dataclasses.dataclass(frozen=True)
class Composition:
  """Texts in their places on what is behind them; here paper, in other kinds more. `edits` gives its methods other texts than its own.

  Attributes:
    page, layout: what was composed.
    paper: what is behind.
    blocks: the texts in the order in which they are read.
  """
  page: Page
  layout: str
  paper: Paper
  blocks: list[Block]

  def picture(self, blocks: Sequence[Block]) -> np.ndarray | None:
    """Returns the picture H W 3 uint8 with these texts; None where one cannot be read."""
    picture = self.paper.picture.copy()
    for block in blocks:
      draw_on(picture, block.setting, block.ink[1])
    return np.asarray(picture)

  def truth(self, kind: str, blocks: Sequence[Block]) -> dict[str, Any]:
    """Returns the truth of that picture, of which `truth_of` is a part."""
    return truth_of(kind, self.layout, blocks, self.paper, self.page)

  def extremes(self, block: Block) -> Sequence[Sequence[float]]:
    """Returns the darkest and the lightest colour behind a text."""
    return self.paper.extremes

  def reach(self, block: Block, box: Box | None = None) -> Box:
    """Returns the box in px outside of which nothing of a text is drawn, or of the part of it that is in a box of its setting."""
    return box or block.setting.ink

  def scale(self, block: Block) -> float:
    """Returns how many px a unit of a text's setting has at least."""
    return 1.0


def draw_new(draw: Callable[[np.random.Generator], str], rng: np.random.Generator, known: Sequence[str]) -> str:
  """A text that is not among the known ones, in capitals neither."""
  for _ in range(TRIES):
    text = draw(rng)
    if text.lower() not in map(str.lower, known):
      break
  return text


def margins(rng: np.random.Generator, page: Page) -> tuple[float, float, float, float]:
  """The frame inside the margins, (left, top, right, bottom) in px."""
  margin = rng.uniform(*_MARGINS) * min(page.height, page.width)
  return margin, margin, page.width - margin, page.height - margin


def is_vertical(rng: np.random.Generator, page: Page) -> bool:
  """Whether a text runs from top to bottom."""
  return rng.random() * 10 < page.corpus.language.vertical


def draw_style(rng: np.random.Generator, page: Page, align: str, columns: int = 1, vertical: bool = False) -> Style:
  """A typeface and a leading of the language, for running text."""
  language = page.corpus.language
  breaks = "hyphenated" if align == "justified" and language.hyphenation else "anywhere"
  return Style(draw_typeface(rng, page), language, rng.uniform(*language.leading), align, columns, 0.0, breaks, vertical)


def short_style(style: Style, align: str, text: str) -> Style:
  """The style of a heading or of another short text; words stay whole."""
  leading, is_word = _TIGHTER * style.language.leading[0], text.lower() in map(str.lower, style.language.words)
  return dataclasses.replace(style, align=align, leading=leading, columns=1, indent=0.0, breaks="never" if is_word else "phrases")


def draw_typeface(rng: np.random.Generator, page: Page) -> Typeface:
  """A family, all alike, then one of its faces."""
  families = sorted({one.main.family for one in page.typefaces})
  family = families[rng.integers(len(families))]
  some = [one for one in page.typefaces if one.main.family == family]
  return some[rng.integers(len(some))]


def put(setting: Setting, frame: Sequence[float], across: float | None, down: float) -> Setting:
  """Moves a text into a frame (left, top, right, bottom) in px: `across` and `down` are the shares of what is left over that lie before its ink; None
  for `across` keeps where its lines begin."""
  left, top, right, bottom = setting.ink
  x = frame[0] if across is None else frame[0] - left + across * max(0.0, frame[2] - frame[0] - (right - left))
  return setting.moved(float(x), float(frame[1] - top + down * max(0.0, frame[3] - frame[1] - (bottom - top))))


def truth_of(kind: str, layout: str, blocks: Sequence[Block], paper: Paper, page: Page) -> dict[str, Any]:
  """Returns what a picture shows, plain JSON.

  kind; layout; language; texts: the strings in the order in which they are read; paper: colour, rgb, texture; blocks in the same order, each with
  text (its paragraphs, joined by a space, or by line breaks in code), paragraphs, what, box, lines of text and box, place, font, size_px, colour,
  rgb, contrast, weight, slanted, letters, align, direction, and of those that have one ground (a colour) and structure (its place in `structures`).
  Boxes are (left, top, right, bottom) of ink in px, rounded outwards, and lie in the picture.
  """
  language = page.corpus.language
  found = [describe(block, page) for block in blocks]
  return {"kind": kind, "layout": layout, "language": language.code, "texts": [block["text"] for block in found],
          "paper": {"colour": paper.name, "rgb": list(paper.rgb), "texture": paper.texture}, "blocks": found}


def joined(block: Block) -> str:
  """What a block says: its paragraphs, with a space between them where the language has spaces; lines of code are lines."""
  between = "\n" if block.what == "code" else " " if block.setting.style.language.breaking != "cjk" or block.what == "list" else ""
  return between.join(block.paragraphs)


def describe(block: Block, page: Page) -> dict[str, Any]:
  """What is said of a block in the truth, see `truth_of`."""
  setting, face = block.setting, block.setting.style.typeface.main
  whole, (colour, rgb, contrast) = outwards(setting.ink), block.ink
  more = {name: value for name, value in (("ground", block.ground and block.ground.name), ("structure", block.structure)) if value is not None}
  return {"text": joined(block), "paragraphs": block.paragraphs,
          "what": block.what, "box": whole,
          "lines": [{"text": one.line.text, "box": outwards(setting.box(one))} for one in setting.placed],
          "place": place_of(whole, page.height, page.width), "font": face.name, "size_px": round(setting.size, 2), "colour": colour,
          "rgb": list(rgb), "contrast": round(contrast, 2), "weight": "bold" if face.is_bold else "regular",
          "slanted": face.is_italic, "letters": face.kind, "align": setting.style.align,
          "direction": "ttb" if setting.style.vertical else "rtl" if setting.style.language.is_rtl else "ltr", **more}


def outwards(box: Sequence[float]) -> list[int]:
  """A box in whole px that holds a box (left, top, right, bottom)."""
  left, top, right, bottom = box
  return [int(np.floor(left)), int(np.floor(top)), int(np.ceil(right)), int(np.ceil(bottom))]
