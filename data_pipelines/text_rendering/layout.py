"""Text in a frame: lines broken, a size found that fills it, everything placed by measured ink.

Sizes are found by search: widths scale with the size, so lines are broken in ems. Two lines are as far apart as the leading says, and further where
the ink of one would come near that of the next, so none overlap. What does not fit at the least size is not set: `fit` says so by None.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.text_rendering.breaking import HYPHEN, Piece, pieces
from data_pipelines.text_rendering.fonts import Typeface
from data_pipelines.text_rendering.languages import Language
from data_pipelines.text_rendering.shaping import Line, levels, measure, set_line

_SHARES = {"start": 0.0, "justified": 0.0, "middle": 0.5, "end": 1.0}  # of the room left in a line that is before it
ALIGNMENTS = tuple(_SHARES)
_CLEARANCE = 0.06  # between the ink of two lines, in ems
OVERHANG = 0.25  # of letters that reach out of a line's length, such as slanted ones, in ems
_MOST_STRETCH, _MOST_SPACING = 0.45, 0.12  # of a gap between words, or between characters, in ems; beyond it a justified line looks torn
_STEPS = 9  # of the search for a size
_SMALLER, _TRIES = 0.96, 8  # by which a size is made smaller where the ink does not fit, and how often
_NARROWEST, _OF_PHRASES = 0.8, 0.5  # share of the length of a line that ragged lines have at least, to be equally long; the same of headings
_USUAL_INK = 0.95  # height of a line's ink, in ems
_COLUMN_GAP = 1.6  # in ems


@dataclasses.dataclass(frozen=True)
class Style:
  """How a text is set.

  Attributes:
    typeface, language: with what, and by whose rules.
    leading: from line to line, in ems.
    align: one of `ALIGNMENTS`; start is where lines of the language begin.
    columns: number of columns beside each other.
    indent: of the first lines of paragraphs, in ems.
    breaks: where lines may end, one of `breaking.BREAKS`.
    vertical: lines are columns from top to bottom, which follow each other from right to left.
  """
  typeface: Typeface
  language: Language
  leading: float
  align: str = "start"
  columns: int = 1
  indent: float = 0.0
  breaks: str = "anywhere"
  vertical: bool = False


class Placed(NamedTuple):
  """A line in a picture: its origin in px, x rightwards and y downwards, and the number of its paragraph."""
  line: Line
  x: float
  y: float
  paragraph: int


@dataclasses.dataclass(frozen=True)
class Setting:
  """A text that has been set: its lines in the order in which they are read, its size in px, and how far the gaps of justified lines were
  stretched at most, in ems."""
  style: Style
  size: float
  placed: tuple[Placed, ...]
  stretch: float = 0.0

  def box(self, one: Placed) -> tuple[float, float, float, float]:
    """Ink box of a line, (left, top, right, bottom) in px."""
    left, bottom, right, top = one.line.ink
    return one.x + left * self.size, one.y - top * self.size, one.x + right * self.size, one.y - bottom * self.size

  @property
  def ink(self) -> tuple[float, float, float, float]:
    """Ink box of all lines."""
    left, top, right, bottom = zip(*map(self.box, self.placed))
    return min(left), min(top), max(right), max(bottom)

  @property
  def is_torn(self) -> bool:
    """Whether justified lines are stretched so far that it shows."""
    return self.stretch > (_MOST_SPACING if self.style.language.breaking == "cjk" else _MOST_STRETCH)

  def moved(self, right: float, down: float) -> "Setting":
    """The same text elsewhere."""
    return dataclasses.replace(self, placed=tuple(one._replace(x=one.x + right, y=one.y + down) for one in self.placed))


def fit(paragraphs: Sequence[str], style: Style, width: float, height: float, sizes: tuple[float, float]) -> Setting | None:
  """Returns a text set as large as fits in a frame of width x height px, with the frame's corner at (0, 0) and the text at its top.

  Args: paragraphs, at least one, none empty; style; sides of the frame; least and greatest size in px.

  Returns None where not even the least size fits.

  Raises:
    ValueError: a paragraph is empty, or no face of the typeface has one of its characters.
  """
  if not paragraphs or not all(map(str.strip, paragraphs)):
    raise ValueError("A text has no paragraph, or an empty one: leave it out.")
  text = _Text(tuple(paragraphs), style)
  low, high = sizes
  if not text.fits(width, height, low):
    return None
  for _ in range(_STEPS):
    size = (low * high) ** 0.5
    low, high = (size, high) if text.fits(width, height, size) else (low, size)
  # Ink may reach further than the leading says, and letters may be further apart than those of measured pieces.
  for size in (low * _SMALLER**i for i in range(_TRIES)):
    found = _set(text, style, width, height, size) if size >= sizes[0] else None
    if found:
      return found
  return _set(text, style, width, height, sizes[0])


def reset_line(setting: Setting, row: int, text: str) -> Setting | None:
  """Returns a text with other words in one of its lines, all other lines as they are; None where the line would be longer than the longest one, or if
  justified torn, or where what stands there now cannot be told from that text alone.

  Args: the text; number of the line; what it should say. A line that stands alone may become as long as it likes.
  """
  style, one = setting.style, setting.placed[row]
  new, old = (set_line(some, style.typeface, style.language.code, style.language.is_rtl, style.vertical) for some in (text, one.line.text))
  length, longest = abs(one.line.advance), max(abs(some.line.advance) for some in setting.placed)
  if [glyph[:2] for glyph in old.glyphs] != [glyph[:2] for glyph in one.line.glyphs]:
    return None
  if length > abs(old.advance) + 1e-6:
    if not new.num_gaps or abs(new.advance) > length:
      return None
    stretch = (length - abs(new.advance)) / new.num_gaps
    new, setting = new.stretched(stretch), dataclasses.replace(setting, stretch=max(setting.stretch, stretch))
    if setting.is_torn:
      return None
  elif len(setting.placed) > 1 and abs(new.advance) > longest:
    return None
  share = _SHARES[style.align]
  shift = (length - abs(new.advance)) * setting.size * (1 - share if style.language.is_rtl and not style.vertical else share)
  moved = Placed(new, one.x, one.y + shift, one.paragraph) if style.vertical else Placed(new, one.x + shift, one.y, one.paragraph)
  return dataclasses.replace(setting, placed=(*setting.placed[:row], moved, *setting.placed[row + 1:]))


def lay(paragraphs: Sequence[str], style: Style, width: float, size: float) -> Setting | None:
  """Returns a text set at a size in px in lines of at most `width` px, from the corner (0, 0) down; None where a piece is longer."""
  return _set(_Text(tuple(paragraphs), style), style, width, math.inf, size)


def count_lines(paragraphs: Sequence[str], style: Style, width: float, size: float) -> int | None:
  """How many lines `lay` makes, without setting them; None where a piece is longer than one."""
  broken = [_measured(text, style.typeface, style.language, style.breaks, style.vertical).broken(width / size, style.indent) for text in paragraphs]
  return None if None in broken else sum(map(len, broken))


def length_of(text: str, style: Style) -> float:
  """Length of a text in one line, in ems."""
  return measure(text, style.typeface, style.language.code, style.language.is_rtl, style.vertical)


class _Text:
  """Paragraphs with their pieces measured."""

  def __init__(self, paragraphs: tuple[str, ...], style: Style):
    self.paragraphs, self.style = paragraphs, style
    self._measured = [_measured(text, style.typeface, style.language, style.breaks, style.vertical) for text in paragraphs]
    self.levels = [levels(text, style.language.is_rtl) for text in paragraphs]

  def fits(self, width: float, height: float, size: float) -> bool:
    """Whether lines of the usual leading fit, and each piece in a line."""
    length, room = _frame(self.style, width, height, size)
    broken = [one.broken(length, self.style.indent) for one in self._measured]
    if length <= 0 or None in broken:
      return False
    return (-(-sum(map(len, broken)) // self.style.columns) - 1) * self.style.leading + _USUAL_INK <= room

  def broken(self, length: float) -> list[list[tuple[int, int, bool]]] | None:
    """For each paragraph the (begin, end, hyphen) of its lines of at most `length` ems; None where a piece is longer."""
    found = [one.broken(length, self.style.indent) for one in self._measured]
    if length <= 0 or None in found:
      return None
    if self.style.align == "justified" or self.style.columns > 1 or self.style.language.breaking == "cjk" and self.style.breaks == "anywhere":
      return found
    narrowest = _OF_PHRASES if self.style.breaks == "phrases" else _NARROWEST
    return [one.balanced(length, self.style.indent, len(lines), narrowest) for one, lines in zip(self._measured, found)]


class _Measured:
  """The pieces of a paragraph, and how far each begins and ends from its beginning if all were in one line, in ems."""

  def __init__(self, text: str, found: tuple[Piece, ...], typeface: Typeface, language: Language, vertical: bool):
    of = lambda part: measure(part, typeface, language.code, language.is_rtl, vertical) if part else 0.0
    self._pieces, hyphen = found, of(HYPHEN)
    self._begins, self._ends, place = [], [], 0.0
    for one in found:
      self._begins.append(place)
      place += of(text[one.begin:one.end])
      self._ends.append(place + hyphen * one.hyphen)
      place += of(text[one.end:one.next])

  def broken(self, length: float, indent: float) -> list[tuple[int, int, bool]] | None:
    """Lines as full as they can be."""
    lines, first = [], 0
    while first < len(self._pieces):
      room = self._begins[first] + length - (0.0 if lines else indent)
      last = bisect.bisect_right(self._ends, room + 1e-9, first) - 1
      while last >= first and self._ends[last] > room + 1e-9:  # ends are not quite in order where hyphens are
        last -= 1
      if last < first:
        return None
      lines.append((self._pieces[first].begin, self._pieces[last].end, self._pieces[last].hyphen))
      first = last + 1
    return lines

  def balanced(self, length: float, indent: float, num_lines: int, narrowest: float) -> list[tuple[int, int, bool]]:
    """As many lines, as equally long as they can be, so that no word stands alone in the last one."""
    low, high, best = narrowest * length, length, self.broken(length, indent)
    for _ in range(6):
      middle = (low + high) / 2
      lines = self.broken(middle, indent)
      low, high, best = (low, middle, lines) if lines and len(lines) == num_lines else (middle, high, best)
    return best


@functools.lru_cache(maxsize=1024)
def _measured(text: str, typeface: Typeface, language: Language, breaks: str, vertical: bool) -> _Measured:
  return _Measured(text, pieces(text, language, breaks), typeface, language, vertical)


def _frame(style: Style, width: float, height: float, size: float) -> tuple[float, float]:
  """Returns (the length of a line, the room for lines behind each other), in ems."""
  along, across = (height, width) if style.vertical else (width, height)
  return (along / size - _COLUMN_GAP * (style.columns - 1)) / style.columns, across / size


def _set(text: _Text, style: Style, width: float, height: float, size: float) -> Setting | None:
  """Returns the text set at a size; None where it does not fit."""
  length, room = _frame(style, width, height, size)
  broken = text.broken(length)
  if broken is None:
    return None
  lines = [line for number in range(len(broken)) for line in _lines(text, number, broken[number], style, length)]
  per_column = -(-len(lines) // style.columns)
  places = _stack([one.line for one in lines], per_column, style.leading)
  if max(place + _behind(one.line) for one, place in zip(lines, places)) > room + 1e-6:
    return None
  placed = tuple(_place(one, place, i // per_column, style, length, width, size) for i, (one, place) in enumerate(zip(lines, places)))
  found = Setting(style, size, placed, max(one.stretch for one in lines))
  left, top, right, bottom = found.ink
  slack = OVERHANG * size
  return found if left >= -slack and top >= -slack and right <= width + slack and bottom <= height + slack else None


class _Set(NamedTuple):
  """A line, its indent in ems, its paragraph, and by how much it was stretched at each gap, in ems."""
  line: Line
  indent: float
  paragraph: int
  stretch: float


def _lines(text: _Text, number: int, broken: Sequence[tuple[int, int, bool]], style: Style, length: float) -> list[_Set]:
  """Returns the lines of a paragraph, stretched where they are justified."""
  paragraph, of, language = text.paragraphs[number], text.levels[number], style.language
  found = []
  for i, (begin, end, hyphen) in enumerate(broken):
    own = [*of[begin:end], of[end - 1]] if hyphen else of[begin:end]
    line = set_line(paragraph[begin:end] + HYPHEN * hyphen, style.typeface, language.code, language.is_rtl, style.vertical, own)
    indent, stretch = style.indent if i == 0 else 0.0, 0.0
    if style.align == "justified" and i + 1 < len(broken) and line.num_gaps:
      stretch = (length - indent - abs(line.advance)) / line.num_gaps
      line = line.stretched(stretch)
    found.append(_Set(line, indent, number, stretch))
  return found


def _behind(line: Line) -> float:
  """How far ink reaches behind the base line, in ems: below it, or to the left of a column's middle."""
  return -line.ink[0] if line.vertical else -line.ink[1]


def _before(line: Line) -> float:
  return line.ink[2] if line.vertical else line.ink[3]


def _stack(lines: Sequence[Line], per_column: int, leading: float) -> list[float]:
  """How far behind the frame's edge the base line of each line lies, in ems: in equal steps, the same in all columns, so that no ink comes near that
  of another line."""
  inside = [(a, b) for i, (a, b) in enumerate(itertools.pairwise(lines), 1) if i % per_column]
  step = max([leading, *[_behind(a) + _before(b) + _CLEARANCE for a, b in inside]])
  first = max(_before(line) for line in lines[::per_column])
  return [first + i % per_column * step for i in range(len(lines))]


def _place(one: _Set, place: float, column: int, style: Style, length: float, width: float, size: float) -> Placed:
  """Puts a line into its column, at `place` ems from the edge of the frame."""
  line = one.line
  slack = max(0.0, length - abs(line.advance) - one.indent)
  along = column * (length + _COLUMN_GAP) + one.indent + _SHARES[style.align] * slack
  if style.vertical:
    return Placed(line, width - place * size, along * size, one.paragraph)
  x = width - (along + line.advance) * size if style.language.is_rtl else along * size
  return Placed(line, x, place * size, one.paragraph)
