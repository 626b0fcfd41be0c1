"""Paper and ink: the pixels of texts that have been set.

With the coverage m of a text (0 to 1 per pixel), its colour c and the picture p behind it, a picture is p + m (c - p). Outlines are filled by
HarfBuzz, without hinting, at fractions of pixels.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
import uharfbuzz as hb
from PIL import Image

from data_pipelines.text_rendering.colours import GRAIN_PX, contrast, draw_paper, grain
from data_pipelines.text_rendering.layout import Setting

TEXTURES = ("plain", "grainy", "shaded")
_GRAIN = (4.0, 13.0)  # levels by which grainy paper differs from its colour at most
_SHADE = 13.0  # the same of shaded paper
_STEPS = 127  # levels of a texture on either side of the middle


@dataclasses.dataclass(frozen=True)
class Paper:
  """What texts are set on: the name of its colour, its levels, its texture, and the picture of it.

  `extremes` are the darkest and the lightest colour on it.
  """
  name: str
  rgb: tuple[int, int, int]
  texture: str
  picture: Image.Image
  extremes: tuple[tuple[float, ...], ...]


def make_paper(rng: np.random.Generator, height: int, width: int) -> Paper:
  """Returns paper of height x width px."""
  (name, rgb), texture = draw_paper(rng), TEXTURES[bisect.bisect_right((0.5, 0.8), rng.random())]
  if texture == "plain":
    return Paper(name, rgb, texture, Image.new("RGB", (width, height), rgb), (rgb,))
  most = float(rng.uniform(*_GRAIN)) if texture == "grainy" else _SHADE
  relief = _grain(rng, height, width) if texture == "grainy" else _slope(rng, height, width)
  change = most / _STEPS * np.arange(-_STEPS - 1, _STEPS + 1)
  tables = np.clip(np.rint(np.array(rgb)[:, None] + change), 0, 255).astype(int).tolist()
  picture = Image.fromarray(relief)
  extremes = tuple(tuple(min(255.0, max(0.0, level + end)) for level in rgb) for end in (-most, most))
  return Paper(name, rgb, texture, Image.merge("RGB", [picture.point(table) for table in tables]), extremes)


def _grain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """A part of the tile of noise, which repeats; 128 is its middle."""
  top, left = rng.integers(GRAIN_PX, size=2).tolist()
  tile = grain()
  if max(top + height, left + width) > GRAIN_PX:
    tile = np.tile(tile, (-(-(top + height) // GRAIN_PX), -(-(left + width) // GRAIN_PX)))
  return np.ascontiguousarray(tile[top:top + height, left:left + width])


def _slope(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """A plane that falls from one corner or edge to the opposite one; 128 is its middle."""
  down, right = rng.uniform(-1, 1, 2).astype(np.float32)
  plane = down * np.linspace(-1, 1, height, dtype=np.float32)[:, None] + right * np.linspace(-1, 1, width, dtype=np.float32)
  return (128.5 + plane * (_STEPS / (abs(down) + abs(right)))).astype(np.uint8)


def coverage(setting: Setting, box: tuple[int, int, int, int]) -> np.ndarray:
  """Returns how far each pixel of a box (left, top, right, bottom) is covered by a text, uint8; 255 is wholly."""
  left, top, right, bottom = box
  raster, size = hb.RasterDraw(), setting.size
  raster.extents = hb.RasterExtents(0, 0, right - left, bottom - top, 0)
  for line, x, y, _ in setting.placed:
    for face, number, across, up, _ in line.glyphs:
      scale = size / face.em
      raster.transform = (scale, 0, 0, scale, x - left + across * size, bottom - y + up * size)
      raster.draw_glyph(face.font, number)
  image = raster.render()
  return np.frombuffer(image.buffer, np.uint8).reshape(bottom - top, image.extents.stride)[::-1, :right - left]


def draw_on(picture: Image.Image, setting: Setting, rgb: Sequence[int]) -> None:
  """Draws a text in a colour on a picture."""
  left, top, right, bottom = setting.ink
  box = max(0, int(left) - 1), max(0, int(top) - 1), min(picture.width, int(right) + 2), min(picture.height, int(bottom) + 2)
  picture.paste(tuple(rgb), box, Image.fromarray(coverage(setting, box)))


def worst_contrast(rgb: Sequence[int], paper: Paper) -> float:
  """Contrast ratio of a colour and the part of a paper that is nearest to it."""
  return min(contrast(rgb, one) for one in paper.extremes)
