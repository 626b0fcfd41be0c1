"""From a line of text to glyphs with their places, in ems: which way runs go (UAX 9), which face sets what, and HarfBuzz for the rest.

Nothing here knows a size in pixels. Outlines are drawn unhinted, so all measures scale with the size, and ink boxes are those of the outlines.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import uharfbuzz as hb
from bidi import algorithm as bidi
from fontTools.unicodedata import script as script_of

from data_pipelines.text_rendering.fonts import Face, Typeface, is_blank

script_of = functools.lru_cache(maxsize=2**16)(script_of)
_NEUTRAL = ("Zyyy", "Zinh", "Zzzz")
_RTL = ("R", "AL", "AN")
_REMOVED = ("BN", "RLE", "LRE", "RLO", "LRO", "PDF")
_STRETCHED, _FIRST_WIDE = ("Hani", "Hira", "Kana"), 0x2E80  # scripts whose letters and signs, but for narrow ones, are moved apart in justified lines


class Glyph(NamedTuple):
  """A glyph of a face with its origin, in ems, y upwards; `gap` says whether a justified line may be stretched behind it."""
  face: Face
  number: int
  x: float
  y: float
  gap: bool


@dataclasses.dataclass(frozen=True)
class Line:
  """A line in the order in which it is seen, from its origin: the left end of the base line, or the top of the middle of a column.

  Attributes:
    text: what is written, in the order in which it is read.
    glyphs: all of them, also those without ink.
    advance: its length, in ems.
    ink: box (left, bottom, right, top) of what is drawn, in ems; all 0 where that is nothing.
    vertical: whether it is a column.
  """
  text: str
  glyphs: tuple[Glyph, ...]
  advance: float
  ink: tuple[float, float, float, float]
  vertical: bool = False

  @property
  def num_gaps(self) -> int:
    """How many places there are to stretch it."""
    return sum(glyph.gap for glyph in self.glyphs)

  def stretched(self, extra: float) -> "Line":
    """The line with `extra` ems more at each of its gaps."""
    moved, before = [], 0.0
    for face, number, x, y, gap in self.glyphs:
      moved.append(Glyph(face, number, x, y - before, gap) if self.vertical else Glyph(face, number, x + before, y, gap))
      before += extra * gap
    return Line(self.text, tuple(moved), self.advance + before, _ink(moved), self.vertical)


def levels(text: str, is_rtl: bool) -> list[int]:
  """Embedding levels of the characters of a paragraph by the Unicode bidirectional algorithm: odd ones run from right to left."""
  if not is_rtl and (text.isascii() or not any(unicodedata.bidirectional(c) in _RTL for c in text)):
    return [0] * len(text)
  return list(_levels(text, is_rtl))


@functools.lru_cache(maxsize=4096)
def _levels(text: str, is_rtl: bool) -> tuple[int, ...]:
  storage = bidi.get_empty_storage()
  storage["base_level"], storage["base_dir"] = int(is_rtl), "LR"[is_rtl]
  bidi.get_embedding_levels(text, storage)
  for step in (bidi.explicit_embed_and_overrides, bidi.resolve_weak_types, bidi.resolve_neutral_types, bidi.resolve_implicit_levels):
    step(storage, False)
  found, resolved = [], iter(storage["chars"])
  for c in text:  # joiners and the like are removed by rule X9, and go with what is before them
    found.append((found[-1] if found else int(is_rtl)) if unicodedata.bidirectional(c) in _REMOVED else next(resolved)["level"])
  return tuple(found)


def set_line(text: str, typeface: Typeface, language: str, is_rtl: bool = False, vertical: bool = False, of: Sequence[int] | None = None) -> Line:
  """Returns a line of text, whose characters have the embedding levels `of`, or those of a paragraph of its own.

  Raises:
    ValueError: no face of the typeface has one of the characters.
  """
  found, pen = [], 0.0
  for run in _visual(_runs(text, typeface, [0] * len(text) if vertical else of or levels(text, is_rtl)), int(is_rtl)):
    glyphs, pen = _shape(run, typeface.faces[run.face], language, vertical, pen)
    found += glyphs
  if found and found[-1].gap:  # nothing is stretched behind the last one
    found[-1] = found[-1]._replace(gap=False)
  return Line(text, tuple(found), pen, _ink(found), vertical)


@functools.lru_cache(maxsize=2**16)
def measure(text: str, typeface: Typeface, language: str, is_rtl: bool, vertical: bool) -> float:
  """Length of a piece of a line, in ems."""
  return abs(set_line(text, typeface, language, is_rtl, vertical).advance)


# ---- runs ---------------------------------------------------------------------------------------------


class _Run(NamedTuple):
  text: str
  level: int
  face: int
  script: str


def _runs(text: str, typeface: Typeface, of: Sequence[int]) -> list[_Run]:
  """The text in pieces of one level, face and script, in the order in which it is read."""
  if text.isascii() and not any(of) and all(c == " " or typeface.choose(c) == 0 for c in set(text)):
    return [_Run(text, 0, 0, "Latn")]
  runs, begin, now = [], 0, None
  for i, (face, script, level) in enumerate(zip(*_faces_and_scripts(text, typeface), of, strict=True)):
    if (face, script, level) != now:
      if now:
        runs.append(_Run(text[begin:i], now[2], now[0], now[1]))
      begin, now = i, (face, script, level)
  return [*runs, _Run(text[begin:], now[2], now[0], now[1])] if now else []


def _faces_and_scripts(text: str, typeface: Typeface) -> tuple[list[int], list[str]]:
  """Of each character its face and its script; marks, joiners and spaces go with what is before them, signs too where its face has them."""
  faces, scripts = [], []
  first = next((script_of(c) for c in text if script_of(c) not in _NEUTRAL), "Latn")
  for c in text:
    before = (faces[-1], scripts[-1]) if faces else (0, first)
    script = script_of(c) if script_of(c) not in _NEUTRAL else before[1]
    if faces and (is_blank(c) or unicodedata.combining(c)) and (is_blank(c) or ord(c) in typeface.faces[before[0]].coverage):
      face = before[0]
    else:
      face = 0 if is_blank(c) else typeface.choose(c)
    if face is None:
      raise ValueError(f"No face of {typeface.main.name} has the character U+{ord(c):04X}: choose another typeface, or leave the text out.")
    faces.append(face)
    scripts.append(script)
  return faces, scripts


def _visual(runs: list[_Run], base: int) -> list[_Run]:
  """The runs as they are seen from left to right: rule L2 of UAX 9."""
  for level in range(max((run.level for run in runs), default=0), 0, -1):
    i = 0
    while i < len(runs):
      j = i
      while j < len(runs) and runs[j].level >= level:
        j += 1
      runs[i:j] = runs[i:j][::-1]
      i = j + 1
  return runs


# ---- HarfBuzz -----------------------------------------------------------------------------------------


def _shape(run: _Run, face: Face, language: str, vertical: bool, pen: float) -> tuple[list[Glyph], float]:
  """Returns (the glyphs of a run from the place `pen` on, the place behind them)."""
  buffer = hb.Buffer()
  buffer.add_str(run.text)
  buffer.direction = "ttb" if vertical else "rtl" if run.level % 2 else "ltr"
  buffer.script, buffer.language = run.script, language
  hb.shape(face.font, buffer)
  em, glyphs, infos = face.em, [], buffer.glyph_infos
  for i, (info, place) in enumerate(zip(infos, buffer.glyph_positions)):
    x, y = (place.x_offset / em, pen + place.y_offset / em) if vertical else (pen + place.x_offset / em, place.y_offset / em)
    pen += (place.y_advance if vertical else place.x_advance) / em
    last_of_cluster = i + 1 == len(infos) or infos[i + 1].cluster != info.cluster
    glyphs.append(Glyph(face, info.codepoint, x, y, last_of_cluster and _may_stretch(run.text[info.cluster], run.script)))
  return glyphs, pen


@functools.lru_cache(maxsize=2**16)
def _may_stretch(character: str, script: str) -> bool:
  return character in " \u3000" or script in _STRETCHED and ord(character) >= _FIRST_WIDE


def _ink(glyphs: Sequence[Glyph]) -> tuple[float, float, float, float]:
  left = bottom = 1e9
  right = top = -1e9
  for face, number, x, y, _ in glyphs:
    x0, y0, x1, y1 = face.ink(number)
    if x1 > x0:
      left, right = min(left, x + x0), max(right, x + x1)
      bottom, top = min(bottom, y + y0), max(top, y + y1)
  return (left, bottom, right, top) if right > left else (0.0, 0.0, 0.0, 0.0)
