"""Formulas: Matplotlib's mathtext finds places and sizes of glyphs and bars, HarfBuzz measures and fills them like all other letters.

A formula is written in TeX, which is its truth. Its glyphs are those of STIX, which Matplotlib brings; it is laid out once, at `_PX`, and scaled.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from PIL import Image

from data_pipelines.text_rendering import shapes
from data_pipelines.text_rendering.drawing import draw_on
from data_pipelines.text_rendering.fonts import Face, Typeface
from data_pipelines.text_rendering.languages import load
from data_pipelines.text_rendering.layout import Placed, Setting, Style
from data_pipelines.text_rendering.pages import Block
from data_pipelines.text_rendering.regions import Frame, Misfit, Region, Sheet, Sizes
from data_pipelines.text_rendering.schemes import Ground
from data_pipelines.text_rendering.shaping import Glyph, Line

_PX = 100.0
_FACTOR = 1.5  # of formulas, to running text
_LETTERS, _GREEK = "abcdkmnpqrstuvwxyz", (r"\alpha", r"\beta", r"\lambda", r"\mu", r"\sigma", r"\theta", r"\varphi", r"\omega")
_PATTERNS = (
    r"\dfrac{A + B}{C} = D", r"A^{2} + B^{2} = C^{2}", r"A = \dfrac{-B \pm \sqrt{B^{2} - 4 C D}}{2 C}", r"\sum_{k=1}^{n} k = \dfrac{n (n + 1)}{2}",
    r"\int_{0}^{1} A^{N} \, dA = \dfrac{1}{N + 1}", r"A_{1} = \dfrac{B_{1} - C}{G}", r"e^{i G} = \cos G + i \sin G",
    r"\lim_{n \to \infty} \dfrac{A_{n}}{n} = 0",
    r"A(B) = \dfrac{1}{1 + e^{-B}}", r"\sqrt{\dfrac{A}{B}} < N", r"G = \dfrac{\partial A}{\partial B}", r"(A + B)^{2} = A^{2} + 2 A B + B^{2}",
    r"\dfrac{A}{B} \cdot \dfrac{C}{D} = \dfrac{A C}{B D}", r"A_{n + 1} = A_{n} + N", r"\log_{2} N A = G")


def draw_formula(rng: np.random.Generator) -> str:
  """Returns a formula in TeX, without dollar signs."""
  text = _PATTERNS[rng.integers(len(_PATTERNS))]
  letters = iter(rng.permutation([one for one in _LETTERS if one not in "kn"]).tolist())
  named = {name: next(letters) for name in "ABCD"} | {"G": _GREEK[rng.integers(len(_GREEK))], "N": str(rng.integers(2, 10))}
  return "".join(named.get(c, c) for c in text)


class _Laid(NamedTuple):
  """Parts whose letters have one size in px, as (size, line); bars as boxes, y upwards; the ink box (left, bottom, right, top)."""
  parts: tuple[tuple[float, Line], ...]
  bars: tuple[Frame, ...]
  ink: Frame


@functools.lru_cache(maxsize=256)
def _laid(formula: str) -> _Laid:
  """A formula at `_PX`, from the left end of its base line, y upwards."""
  found = _parser().parse(f"${formula}$", 72, FontProperties(size=_PX, math_fontfamily="stix"))
  sizes: dict[float, list[Glyph]] = {}
  for font, size, character, *_, x, y in found.glyphs:
    face = _face(font.fname)
    sizes.setdefault(size, []).append(Glyph(face, face.font.get_nominal_glyph(character), x / size, y / size, False))
  bars = tuple((x, y, x + width, y + height) for x, y, width, height in found.rects)
  boxes = list(bars)
  parts = []
  for size, glyphs in sizes.items():
    inks = [(one, one.face.ink(one.number)) for one in glyphs]
    box = tuple(end(size * ((one.x, one.y)[i % 2] + ink[i]) for one, ink in inks if ink[2] > ink[0]) for i, end in enumerate((min, min, max, max)))
    parts.append((size, Line(formula, tuple(glyphs), 0.0, tuple(side / size for side in box))))
    boxes.append(box)
  left, bottom, right, top = zip(*boxes)
  return _Laid(tuple(parts), bars, (min(left), min(bottom), max(right), max(top)))


@functools.cache
def _parser() -> MathTextParser:
  return MathTextParser("path")


def typeface() -> Typeface:
  """What letters of formulas are set in."""
  return Typeface((_face(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf")),))


@functools.cache
def _face(path: str) -> Face:
  return Face(path, 0, "STIX", "Regular", "")


@dataclasses.dataclass(frozen=True)
class FormulaSetting:
  """A formula in its place, with what the truth asks of a `layout.Setting`; x and y are the left end of its base line in px."""
  formula: str
  size: float
  x: float
  y: float
  style: Style

  @property
  def ink(self) -> Frame:
    """Ink box of all of it, in px."""
    return self._box(_laid(self.formula).ink)

  def _box(self, box: Sequence[float]) -> Frame:
    scale = self.size / _PX
    return self.x + box[0] * scale, self.y - box[3] * scale, self.x + box[2] * scale, self.y - box[1] * scale

  @property
  def placed(self) -> tuple[Placed, ...]:
    """The formula, as the only line."""
    return (Placed(Line(self.formula, (), 0.0, _laid(self.formula).ink), self.x, self.y, 0),)

  def box(self, one: Placed) -> Frame:
    """Ink box of the line."""
    return self.ink

  def draw(self, picture: Image.Image, rgb: Sequence[int]) -> None:
    """Draws it in a colour."""
    for size, line in _laid(self.formula).parts:
      draw_on(picture, Setting(self.style, self.size * size / _PX, (Placed(line, self.x, self.y, 0),)), rgb)
    for bar in _laid(self.formula).bars:
      left, top, right, bottom = self._box(bar)
      shapes.fill_box(picture, (left, top, right, max(bottom, top + 1)), rgb)


@dataclasses.dataclass
class Formula(Region):
  """A formula in the middle of its frame."""
  formula: str

  def _size(self, sizes: Sizes) -> float:
    return sizes.of("formula", _FACTOR)

  def height(self, width: float, sizes: Sizes) -> float:
    left, bottom, right, top = (side * self._size(sizes) / _PX for side in _laid(self.formula).ink)
    if right - left > width:
      raise Misfit("formula", _FACTOR)
    return top - bottom

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    size = self._size(sizes)
    left, bottom, right, top = (side * size / _PX for side in _laid(self.formula).ink)
    x = (frame[0] + frame[2] - right - left) / 2
    y = (frame[1] + frame[3] + top + bottom) / 2
    style = Style(Typeface((_face(""),)), load("en"), 1.0, "middle")
    block = Block([self.formula], FormulaSetting(self.formula, size, x, y, style), "formula")
    block.ink, block.structure, block.ground = sheet.scheme.ink("formula", ground), len(sheet.structures), ground
    sheet.blocks.append(block)
    sheet.structures.append({"type": "formula", "box": list(block.setting.ink), "tex": self.formula})
