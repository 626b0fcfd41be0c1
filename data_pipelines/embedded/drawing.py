"""Coverage masks of letters, digits and shapes, anti-aliased, from fonts that pip brings.

Everything is drawn four times larger and reduced by a box filter. A glyph fills a square box of the asked side by its
larger dimension and is centred by what is drawn, so that "in the corner" means the same for I and for W.
"""

import functools
import importlib.util
import math
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SCALE = 4
_MARGIN = 0.06  # of the canvas' shorter side
_REFERENCE_PX = 400
_FONT = "DejaVuSans-Bold.ttf"


def _star() -> list[tuple[float, float]]:
  points = []
  for i in range(10):
    radius, angle = (1.0, 0.42)[i % 2], math.pi * i / 5
    points.append((radius * math.sin(angle), -radius * math.cos(angle)))
  return points


def _heart() -> list[tuple[float, float]]:
  points = []
  for i in range(120):
    t = 2 * math.pi * i / 120
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    points.append((math.sin(t) ** 3, -(y + 2.5) / 16))
  return points


def _round(radius: float = 1.0) -> list[tuple[float, float]]:
  angles = [2 * math.pi * i / 180 for i in range(180)]
  return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


_ARM = 0.33

# Outlines in the square [-1, 1]^2, x right and y down: (filled polygon, polygon cut out of it).
SHAPES = {
    "circle": (_round(), ()),
    "square": ([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)], ()),
    "triangle": ([(0, -0.9), (1, 0.9), (-1, 0.9)], ()),
    "star": (_star(), ()),
    "heart": (_heart(), ()),
    "ring": (_round(), _round(0.55)),
    "cross": ([(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM), (_ARM, 1), (-_ARM, 1),
               (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)], ()),
    "diamond": ([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)], ()),
}


def draw_mask(glyph: str, side_px: float, down: int, right: int, height: int, width: int) -> np.ndarray:
  """Returns the coverage of a glyph on a canvas, uint8 height width; 255 is fully covered.

  `down` and `right` are -1, 0 or 1: against the top or left margin, centred, or against the bottom or right one.
  """
  image = Image.new("L", (width * _SCALE, height * _SCALE))
  canvas = np.array([width, height])
  free = canvas - side_px - 2 * _MARGIN * min(height, width)
  center = (canvas + free * (right, down)) / 2 * _SCALE
  if glyph in SHAPES:
    _draw_shape(ImageDraw.Draw(image), glyph, center, side_px * _SCALE)
  else:
    _draw_letter(ImageDraw.Draw(image), glyph, center, side_px * _SCALE)
  return np.array(image.reduce(_SCALE))


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, center: np.ndarray, side: float) -> None:
  for points, fill in zip(SHAPES[shape], (255, 0)):
    if points:
      draw.polygon([tuple(center + np.array(point) * side / 2) for point in points], fill=fill)


def _draw_letter(draw: ImageDraw.ImageDraw, letter: str, center: np.ndarray, side: float) -> None:
  left, top, right, bottom = _load_font(_REFERENCE_PX).getbbox(letter, anchor="ls")
  font = _load_font(_REFERENCE_PX * side / max(right - left, bottom - top))
  left, top, right, bottom = font.getbbox(letter, anchor="ls")
  place = center - np.array([left + right, top + bottom]) / 2
  draw.text(tuple(np.rint(place)), letter, font=font, fill=255, anchor="ls")


@functools.lru_cache(maxsize=256)
def _load_font(size_px: float) -> ImageFont.FreeTypeFont:
  # Basic layout: the optional shaping library is not on every machine and would move pixels.
  return ImageFont.truetype(_font_path(_FONT), size_px, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _font_path(name: str) -> str:
  # Importing matplotlib takes half a second; its files are all that is needed.
  spec = importlib.util.find_spec("matplotlib")
  path = spec and os.path.join(os.path.dirname(spec.origin), "mpl-data", "fonts", "ttf", name)
  if not path or not os.path.isfile(path):
    raise ValueError(f"The font {name} is missing: install matplotlib, which brings it (pip install matplotlib).")
  return path
