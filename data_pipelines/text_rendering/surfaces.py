"""What texts stand on in the compositional kind: signs, boards, paper, screens, labels. Each is a picture of its own, which is then put into space.

A surface is drawn flat: its colour, a texture, a frame and what holds it, with the corners cut round. Letters may fill what is inside the frame.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from data_pipelines.text_rendering.colours import GRAIN_PX, RGB, grain

CHALK, SLATE = ("white", "cream", "yellow"), ("green", "black", "grey")
CAN = 1.4  # half the angle of a can that is seen, in radians
PAINTS = ("white", "cream", "navy", "green", "red", "black", "yellow", "blue", "brown", "purple")


@dataclasses.dataclass(frozen=True)
class Surface:
  """A sort of surface.

  Attributes:
    ratios: least and most width to height.
    colours: names of its own ones, in `colours.RGB`.
    material: "wood", "paper", "paint", "slate", "screen" or "can".
    border: breadth of its frame, as a share of the shorter side; 0 for none.
    rounding: radius of its corners, likewise.
    turns: how far it is turned at most: yaw, pitch and roll in degrees.
    angle: half the angle in radians by which it is bent at most.
    verb: how it is there, in a caption.
    article: of its name.
  """
  ratios: tuple[float, float]
  colours: Sequence[str]
  material: str
  border: float
  rounding: float
  turns: tuple[float, float, float]
  angle: float
  verb: str
  article: str = "a"


SURFACES = {
    "wooden sign": Surface((1.2, 3.2), ("brown", "cream", "orange"), "wood", 0.0, 0.06, (28, 8, 5), 0.0, "hangs"),
    "metal sign": Surface((0.9, 2.6), PAINTS, "paint", 0.035, 0.12, (28, 10, 4), 0.0, "hangs"),
    "shop sign": Surface((2.2, 4.5), PAINTS, "paint", 0.07, 0.02, (26, 8, 0), 0.0, "hangs"),
    "chalkboard": Surface((0.8, 1.9), SLATE, "slate", 0.06, 0.01, (24, 9, 5), 0.0, "hangs"),
    "whiteboard": Surface((1.1, 2.0), ("white",), "paint", 0.04, 0.03, (24, 8, 2), 0.0, "hangs"),
    "poster": Surface((0.62, 0.95), (*PAINTS, "pink", "orange"), "paper", 0.0, 0.0, (24, 8, 3), 0.25, "hangs"),
    "sheet of paper": Surface((0.68, 1.45), ("white", "cream", "white", "yellow", "pink"), "paper", 0.0, 0.0, (18, 14, 9), 0.4, "hangs"),
    "screen": Surface((1.3, 1.9), ("black", "navy", "white", "blue", "grey", "cream"), "screen", 0.05, 0.05, (26, 9, 0), 0.0, "hangs"),
    "label": Surface((0.8, 1.35), PAINTS, "can", 0.0, 0.0, (0, 0, 2), CAN, "stands")}
_FRAMES = {"wood": "brown", "slate": "brown", "screen": "black"}
_LABEL = (0.16, 0.84)  # of a can's height, where its label is
_SEEN = 0.23  # of a can's width, on either side, where letters would be too narrow


@dataclasses.dataclass(frozen=True)
class Face:
  """A surface that was drawn.

  Attributes:
    pixels: H W 4 uint8, the last of them how far it covers what is behind, by which colours are multiplied.
    frame: where letters may be, (left, top, right, bottom).
    colour: name of what they stand on.
    is_lit: whether it shines by itself: no shadow falls on it.
  """
  pixels: np.ndarray
  frame: tuple[float, float, float, float]
  colour: str
  is_lit: bool


def draw_face(rng: np.random.Generator, surface: Surface, height: int, width: int) -> Face:
  """Returns a surface of height x width units."""
  short, colour = min(height, width), surface.colours[rng.integers(len(surface.colours))]
  rgb = np.clip(np.array(RGB[colour]) + rng.integers(-9, 10, 3), 0, 255)
  border = surface.border * short * float(rng.uniform(0.8, 1.3))
  pixels = _MATERIALS[surface.material](rng, rgb.astype(np.float32), height, width)
  margin = border + short * float(rng.uniform(0.06, 0.1))
  frame = (margin, margin, width - margin, height - margin)
  if surface.material == "can":
    frame = (_SEEN * width, (_LABEL[0] + 0.06) * height, (1 - _SEEN) * width, (_LABEL[1] - 0.06) * height)
  if border:
    _draw_border(rng, pixels, surface, rgb, border)
  _fix(rng, pixels, surface, margin - border)
  cover = _cover(height, width, surface.rounding * short)
  if surface.rounding:
    pixels = cv2.multiply(pixels, cv2.merge([cover] * 3), scale=1 / 255)
  return Face(cv2.merge([*cv2.split(pixels), cover]), frame, colour, surface.material == "screen")


def _cover(height: int, width: int, radius: float) -> np.ndarray:
  cover = np.full((height, width), 255, np.uint8)
  if radius >= 1:
    cover[:] = 0
    r = round(radius)
    cover[r:height - r], cover[:, r:width - r] = 255, 255
    for y in (r, height - 1 - r):
      for x in (r, width - 1 - r):
        cv2.circle(cover, (x, y), r, 255, -1, cv2.LINE_AA)
  return cover


def _draw_border(rng: np.random.Generator, pixels: np.ndarray, surface: Surface, rgb: np.ndarray, border: float) -> None:
  """A frame of wood or of a dark case around it, or a painted line within it."""
  height, width = pixels.shape[:2]
  thick = max(1, round(border))
  if surface.material in _FRAMES:
    colour = np.array(RGB[_FRAMES[surface.material]])
    inner = pixels[thick:height - thick, thick:width - thick].copy()
    pixels[:] = np.clip(colour + rng.integers(-8, 9), 0, 255)
    pixels[thick:height - thick, thick:width - thick] = inner
    light, dark = (np.clip(colour * share, 0, 255).tolist() for share in (1.35, 0.6))
    line = max(1, thick // 6)
    cv2.rectangle(pixels, (0, 0), (width - 1, height - 1), light, line)
    cv2.rectangle(pixels, (thick, thick), (width - 1 - thick, height - 1 - thick), dark, line)
  else:
    is_light = rgb.mean() > 128
    colour = np.clip(rgb * 0.45 if is_light else rgb + 0.75 * (255 - rgb), 0, 255).tolist()
    line = max(1, round(0.35 * border))
    near, radius = round(0.55 * border), round(surface.rounding * min(height, width) * 0.8)
    _round_line(pixels, (near, near, width - 1 - near, height - 1 - near), radius, colour, line)


def _round_line(pixels: np.ndarray, box: Sequence[int], radius: int, colour: Sequence[float], line: int) -> None:
  left, top, right, bottom = box
  r = max(0, radius)
  for begin, end in (((left + r, top), (right - r, top)), ((left + r, bottom), (right - r, bottom)), ((left, top + r), (left, bottom - r)),
                     ((right, top + r), (right, bottom - r))):
    cv2.line(pixels, begin, end, colour, line, cv2.LINE_AA)
  for middle, start in (((left + r, top + r), 180), ((right - r, top + r), 270), ((right - r, bottom - r), 0), ((left + r, bottom - r), 90)):
    cv2.ellipse(pixels, middle, (r, r), 0, start, start + 90, colour, line, cv2.LINE_AA)


def _fix(rng: np.random.Generator, pixels: np.ndarray, surface: Surface, room: float) -> None:
  """Nails, bolts, pins or tape at its edge, outside of where letters may be."""
  height, width = pixels.shape[:2]
  radius = max(1, round(0.2 * room))
  inset = round(0.5 * room) if surface.border == 0 else round(surface.border * min(height, width) * 1.25 + 1.5 * radius)
  if surface.material == "wood" or surface.material == "paint" and surface.border < 0.04:
    for x in (inset, width - 1 - inset):
      for y in (inset, height - 1 - inset) if surface.material == "paint" else (height // 2,):
        cv2.circle(pixels, (x, y), radius, (70, 68, 66), -1, cv2.LINE_AA)
        cv2.circle(pixels, (x - radius // 3, y - radius // 3), max(1, radius // 3), (190, 190, 188), -1, cv2.LINE_AA)
  elif surface.material == "paper":
    colour = ((196, 40, 40), (40, 90, 190), (60, 150, 70))[rng.integers(3)]
    for x in (inset, width - 1 - inset):
      cv2.circle(pixels, (x, inset), radius + 1, colour, -1, cv2.LINE_AA)


# ---- materials ----------------------------------------------------------------------------------------


def tinted(rgb: Sequence[float], relief: np.ndarray) -> np.ndarray:
  """Returns a colour [3] made lighter and darker by a relief [H, W] int16 of levels about 0, uint8."""
  levels = np.arange(-128, 128)
  tables = np.clip(np.asarray(rgb)[:, None] + levels, 0, 255).astype(np.uint8)
  places = np.clip(relief + 128, 0, 255).astype(np.uint8)
  return cv2.merge([cv2.LUT(places, table) for table in tables])


def noise(rng: np.random.Generator, height: int, width: int, along: float = 1.0, down: float = 1.0) -> np.ndarray:
  """Returns smooth noise [H, W] int16 in -127..127, stretched by factors of at least 1 along rows and down columns."""
  rows, columns = max(2, int(np.ceil(height / down))), max(2, int(np.ceil(width / along)))
  top, left = rng.integers(GRAIN_PX, size=2).tolist()
  part = np.roll(grain(), (-top, -left), (0, 1))
  part = np.tile(part, (-(-rows // GRAIN_PX), -(-columns // GRAIN_PX)))[:rows, :columns]
  return cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.int16) - 128


def _wood(rng: np.random.Generator, rgb: np.ndarray, height: int, width: int) -> np.ndarray:
  num = int(rng.integers(1, 4))
  relief = noise(rng, height, width, 28.0, 1.5) // 9
  for board in range(1, num):
    y = round(board * height / num)
    relief[max(0, y - max(1, height // 160)):y + max(1, height // 160)] -= 45
  return tinted(rgb, relief)


def _paint(rng: np.random.Generator, rgb: np.ndarray, height: int, width: int) -> np.ndarray:
  down, along = rng.uniform(0.3, 1), rng.uniform(-1, 1)
  slope = np.linspace(6 * down, -6 * down, height, dtype=np.float32)[:, None] + np.linspace(-5 * along, 5 * along, width, dtype=np.float32)
  return tinted(rgb, slope.astype(np.int16))


def _paper(rng: np.random.Generator, rgb: np.ndarray, height: int, width: int) -> np.ndarray:
  relief = noise(rng, height, width) // 40
  if rng.random() < 0.4:  # a fold
    x = round(width * rng.uniform(0.35, 0.65))
    edge = max(1, width // 90)
    relief[:, x - edge:x] -= 9
    relief[:, x:x + edge] += 6
  return tinted(rgb, relief)


def _slate(rng: np.random.Generator, rgb: np.ndarray, height: int, width: int) -> np.ndarray:
  return tinted(rgb * 0.8, noise(rng, height, width, 6.0, 2.0) // 18 + 4)


def _screen(rng: np.random.Generator, rgb: np.ndarray, height: int, width: int) -> np.ndarray:
  slope = np.linspace(9, -9, height, dtype=np.float32)[:, None] + np.linspace(-6, 6, width, dtype=np.float32)
  return tinted(rgb, slope.astype(np.int16))


def _can(rng: np.random.Generator, rgb: np.ndarray, height: int, width: int) -> np.ndarray:
  """Metal with a label around it; light comes from one side."""
  pixels = np.empty((height, width, 3), np.uint8)
  pixels[:] = (188, 192, 196)
  top, bottom = (round(share * height) for share in _LABEL)
  pixels[top:bottom] = tinted(rgb, noise(rng, bottom - top, width) // 50)
  line = max(1, height // 70)
  band = np.clip(rgb * 0.5 if rgb.mean() > 128 else rgb + 0.7 * (255 - rgb), 0, 255)
  pixels[top + line:top + 2 * line], pixels[bottom - 2 * line:bottom - line] = band, band
  for y in (top // 3, 2 * top // 3, (height + bottom) // 2):
    pixels[y:y + line] = (150, 154, 158)
  theta = np.linspace(-CAN, CAN, width, dtype=np.float32)
  light = 0.42 + 0.62 * np.clip(np.cos(theta - np.float32(rng.uniform(-0.45, 0.45))), 0, 1)
  return np.clip(pixels * light[:, None], 0, 255).astype(np.uint8)


_MATERIALS = {"wood": _wood, "paint": _paint, "paper": _paper, "slate": _slate, "screen": _screen, "can": _can}
