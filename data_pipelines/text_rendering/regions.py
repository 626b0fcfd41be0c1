"""Regions of a page: each knows how high it is at a width, and puts its texts and shapes into a frame.

Measures are in ems of running text, of which a page has one size; a *role* such as "title" or "cell" says how much larger its letters are, and all
texts of a role are equally large. Frames of neighbours are apart, so nothing overlaps. On right-to-left pages columns follow each other from the
right.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from data_pipelines.text_rendering import shapes
from data_pipelines.text_rendering.fonts import Typeface
from data_pipelines.text_rendering.languages import Language
from data_pipelines.text_rendering.layout import Setting, Style, count_lines, lay, length_of
from data_pipelines.text_rendering.pages import Block
from data_pipelines.text_rendering.schemes import Ground, Scheme
from data_pipelines.text_rendering.shaping import set_line

Frame = tuple[float, float, float, float]  # left, top, right, bottom in px
_SHRINK = 0.9  # by which the letters of a role are made smaller where a text of it does not fit
_SMALLEST = 0.8  # to which labels and the like are made smaller, as a share of running text
_SAMPLE = 12  # words whose ink says how high a line is
_ENOUGH = 2.5  # a gap is stretched to at most so many times itself where there is room


class Misfit(Exception):
  """A text of a role does not fit."""

  def __init__(self, role: str, factor: float = 1.0):
    super().__init__(role)
    self.role, self.factor = role, factor


@dataclasses.dataclass
class Sizes:
  """Sizes of letters in px: of running text, and the least; `scales` makes those of a role smaller; `exact` sets texts to measure them."""
  em: float
  least: float
  scales: dict[str, float] = dataclasses.field(default_factory=dict)
  exact: bool = False

  def of(self, role: str, factor: float) -> float:
    """The size of letters of a role."""
    return max(self.least, self.em * factor * self.scales.get(role, 1.0))

  def shrink(self, role: str, factor: float) -> bool:
    """Makes the letters of a role smaller; False where they are the least already, those of headings no larger than running text."""
    limit = max(self.least, (1.0 if factor > 1 else _SMALLEST) * self.em)
    if self.of(role, factor) <= limit * 1.001:
      return False
    self.scales[role] = max(self.scales.get(role, 1.0) * _SHRINK, limit / (self.em * factor))
    return True


@dataclasses.dataclass
class Sheet:
  """What has been placed: shapes in the order in which they are drawn, texts in the order in which they are read, and tables, charts, code and
  formulas with their truth. `is_rtl` mirrors columns."""
  scheme: Scheme
  is_rtl: bool
  shapes: list[Callable[[Image.Image], None]] = dataclasses.field(default_factory=list)
  blocks: list[Block] = dataclasses.field(default_factory=list)
  structures: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def draw(self, shape: Callable[..., None], *args: Any, **options: Any) -> None:
    """Adds a shape of `shapes`."""
    self.shapes.append(lambda picture: shape(picture, *args, **options))

  def start(self, frame: Frame, width: float) -> Frame:
    """The part of a frame where lines begin, `width` px wide."""
    left, top, right, bottom = frame
    return (right - width, top, right, bottom) if self.is_rtl else (left, top, left + width, bottom)

  def after(self, frame: Frame, width: float) -> Frame:
    """What `start` leaves."""
    left, top, right, bottom = frame
    return (left, top, right - width, bottom) if self.is_rtl else (left + width, top, right, bottom)


class Region:
  """A part of a page. `grow` is its share of the height left over in rows; `share` and `wide` its width in columns, in shares of what is left and in
  ems."""
  grow = 0.0
  share = 1.0
  wide = 0.0
  spread = "top"

  def height(self, width: float, sizes: Sizes) -> float:
    """Returns its height in px, at a width in px.

    Raises:
      Misfit: a text does not fit.
    """
    raise NotImplementedError

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    """Puts it into a frame that is high enough."""
    raise NotImplementedError

  def texts(self) -> "list[Text]":
    """All texts, in the order in which they are read."""
    return []


@functools.cache
def extent(typeface: Typeface, language: Language) -> tuple[float, float]:
  """How far letters reach above and below their base line as a rule, in ems."""
  _, below, _, above = set_line(" ".join(language.words[:_SAMPLE]), typeface, language.code, language.is_rtl).ink
  return above, -below


@dataclasses.dataclass
class Text(Region):
  """Letters of a role: how much larger than running text, in at most how many lines."""
  paragraphs: list[str]
  style: Style
  role: str
  factor: float = 1.0
  most_lines: int = 99
  what: str = ""
  accent: bool = False  # whether its colour may be that of the page's accents
  structure: int | None = None  # of the sheet, to which it belongs
  is_fixed: bool = False  # whether a shape shows what it says

  def __post_init__(self):
    self._set: dict[tuple[float, float], Setting | None] = {}

  def size(self, sizes: Sizes) -> float:
    """Its letters, in px."""
    return sizes.of(self.role, self.factor)

  def length(self, sizes: Sizes) -> float:
    """Its width in one line, in px."""
    return max(length_of(one, self.style) for one in self.paragraphs) * self.size(sizes)

  def reach(self, width: float, sizes: Sizes) -> tuple[float, float]:
    """How far it reaches above its first base line, and below, in px."""
    above, below = extent(self.style.typeface, self.style.language)
    size = self.size(sizes)
    if not sizes.exact:
      return above * size, ((self._lines(width, sizes) - 1) * self.style.leading + below) * size
    setting = self._setting(width, sizes)
    _, top, _, bottom = setting.ink
    first, last = setting.placed[0].y, setting.placed[-1].y
    return max(above * size, first - top), max(last + below * size, bottom) - first

  def height(self, width: float, sizes: Sizes) -> float:
    return sum(self.reach(width, sizes))

  def _lines(self, width: float, sizes: Sizes) -> int:
    num = count_lines(self.paragraphs, self.style, width, self.size(sizes))
    if num is None or num > self.most_lines:
      raise Misfit(self.role, self.factor)
    return num

  def _setting(self, width: float, sizes: Sizes) -> Setting:
    key = (width, self.size(sizes))
    if key not in self._set:
      self._lines(width, sizes)
      setting = lay(self.paragraphs, self.style, width, key[1])
      if setting is not None and setting.is_torn:
        setting = lay(self.paragraphs, dataclasses.replace(self.style, align="start", breaks="anywhere"), width, key[1])
      self._set[key] = setting
    if self._set[key] is None:
      raise Misfit(self.role, self.factor)
    return self._set[key]

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground, above: float | None = None) -> None:
    """As `Region.place`; the first base line is `above` px below the frame's top, or where the text's reach puts it."""
    left, top, right, bottom = frame
    before, after = self.reach(right - left, sizes)
    if above is None:
      above = before + (0.5 * max(0.0, bottom - top - before - after) if self.spread == "middle" else 0.0)
    setting = self._setting(right - left, sizes)
    block = Block(self.paragraphs, setting.moved(left, top + above - setting.placed[0].y), self.what or self.role)
    block.ink = sheet.scheme.ink(self.role, ground, self.accent)
    block.structure, block.ground, block.frame, block.is_fixed = self.structure, ground, frame, self.is_fixed
    sheet.blocks.append(block)

  def texts(self) -> "list[Text]":
    return [self]


@dataclasses.dataclass
class Rows(Region):
  """Regions below each other, `gap` ems apart. What is left over goes to those that grow; else to the gaps where it is spread "even", and above
  where it is spread in the "middle"."""
  parts: Sequence[Region]
  gap: float = 0.8

  def height(self, width: float, sizes: Sizes) -> float:
    return sum(one.height(width, sizes) for one in self.parts) + (len(self.parts) - 1) * self.gap * sizes.em

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    left, top, right, bottom = frame
    heights, gap = [one.height(right - left, sizes) for one in self.parts], self.gap * sizes.em
    slack = max(0.0, bottom - top - sum(heights) - gap * (len(heights) - 1))
    growing = sum(one.grow for one in self.parts)
    if growing:
      heights = [height + slack * one.grow / growing for height, one in zip(heights, self.parts)]
    elif self.spread == "even" and len(heights) > 1:
      more = min(slack / (len(heights) - 1), (_ENOUGH - 1) * gap)
      gap, top = gap + more, top + 0.5 * (slack - more * (len(heights) - 1))
    elif self.spread == "middle":
      top += 0.5 * slack
    for height, one in zip(heights, self.parts):
      one.place((left, top, right, top + height), sizes, sheet, ground)
      top += height + gap

  def texts(self) -> list[Text]:
    return [text for one in self.parts for text in one.texts()]


@dataclasses.dataclass
class Columns(Region):
  """Regions beside each other, `gap` ems apart, all as high as the highest."""
  parts: Sequence[Region]
  gap: float = 1.5

  def _widths(self, width: float, sizes: Sizes) -> list[float]:
    left = width - (len(self.parts) - 1) * self.gap * sizes.em - sum(one.wide for one in self.parts) * sizes.em
    shares = sum(one.share for one in self.parts if not one.wide)
    if left <= 0:
      raise Misfit("")
    return [one.wide * sizes.em if one.wide else left * one.share / shares for one in self.parts]

  def height(self, width: float, sizes: Sizes) -> float:
    return max(one.height(own, sizes) for one, own in zip(self.parts, self._widths(width, sizes)))

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    for one, width in zip(self.parts, self._widths(frame[2] - frame[0], sizes)):
      one.place(sheet.start(frame, width), sizes, sheet, ground)
      frame = sheet.after(frame, width + self.gap * sizes.em)

  def texts(self) -> list[Text]:
    return [text for one in self.parts for text in one.texts()]


@dataclasses.dataclass
class Box(Region):
  """A region on a ground of its own: `fill` is "panel", "accent" or "" for none; with a line around it, a bar where lines begin, round corners in
  ems, and ems of room between its sides and the region."""
  inner: Region
  fill: str = "panel"
  line: bool = False
  bar: bool = False
  round: float = 0.0
  pad: float = 0.9

  def height(self, width: float, sizes: Sizes) -> float:
    return self.inner.height(width - 2 * self.pad * sizes.em, sizes) + 2 * self.pad * sizes.em

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    em, own = sizes.em, sheet.scheme.ground(self.fill, ground)
    if self.fill:
      sheet.draw(shapes.fill_box, frame, own.rgb, self.round * em)
    if self.bar:
      sheet.draw(shapes.fill_box, sheet.start(frame, 0.35 * em), sheet.scheme.graphic(own))
    if self.line:
      sheet.draw(shapes.stroke_box, frame, sheet.scheme.graphic(own), 0.1 * em, self.round * em)
    left, top, right, bottom = frame
    pad = self.pad * em
    self.inner.place((left + pad, top + pad, right - pad, bottom - pad), sizes, sheet, own)

  def texts(self) -> list[Text]:
    return self.inner.texts()
