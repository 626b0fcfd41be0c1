"""Objects and ink on the pixels of a picture: shadow, light, how letters lie on what is behind them, and whether they can be read there.

With coverage m, ink c, the picture p and its luma l, letters lie on it in one of three ways:

  alpha       p + o m (c - p), with opacity o
  multiply    p + m (p c / 255 - p), as ink soaks into paper
  luminance   p + m (c (l / l_mean)^0.6 - p): light and texture of the ground show in paint

Whichever way, contrast is measured on the pixels behind and around the letters: the ink as it comes out against what was there, both at their worst.
Where it is below 4.5, plain ink is taken; where that does not reach it either, nothing is drawn.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from data_pipelines.text_rendering import drawing, surfaces
from data_pipelines.text_rendering.colours import CONTRAST, contrast, draw_ink
from data_pipelines.text_rendering.pages import Block, outwards
from data_pipelines.text_rendering.settings import draw_key
from data_pipelines.text_rendering.surfaces import Face
from data_pipelines.text_rendering.warping import FINE, Warp, bounds

WAYS = {"alpha": 0.4, "multiply": 0.25, "luminance": 0.35}  # and how often
_LIGHT_SHADOW = 0.35  # how much darker it is in a shadow of raised letters; of an object it is half as light
_MOST_BLUR, _SOFTEST = 0.55, 0.025  # of letters, in px and in ems
_LEAST_NOISE, _MOST_NOISE = 0.7, 5.0  # levels
_MARGIN = 3  # px around the ink of a text within which its soft edge and its shadow are


@dataclasses.dataclass(frozen=True)
class Part:
  """An object in the picture: its name, how it lies there, its texts, set in units of its plane, and how it and they are drawn."""
  name: str
  face: Face | None
  warp: Warp
  blocks: Sequence[Block]
  look: "Look | None" = None

  def reach(self, box: Sequence[float], picture: np.ndarray) -> tuple[int, int, int, int]:
    """The box in px outside of which nothing of a text with the ink box `box` is drawn."""
    return _inside(self.warp.hull(box), picture, _MARGIN)


@dataclasses.dataclass(frozen=True)
class Look:
  """How letters lie on an object: in which way, with which opacity, how soft, and whether they are raised; where shadows fall, rightwards and
  downwards; the pixels of what is under a can."""
  way: str
  opacity: float
  blur: float
  raised: bool
  light: Sequence[float]
  shelf: np.ndarray | None


def paint(rng: np.random.Generator, picture: np.ndarray, part: Part, light: Sequence[float]) -> Part | None:
  """Draws an object and its texts into a picture [H, W, 3] uint8, and gives the texts their ink. Returns the object with its look; None where a text
  cannot be read on it.

  `light` is where shadows fall, rightwards and downwards.
  """
  shelf = _draw_shelf(rng, picture, part.warp) if part.face and part.name == "label" else None
  way = draw_key(rng, WAYS) if not (part.face and part.face.is_lit) else "alpha"
  opacity, blur = float(rng.uniform(0.93, 1.0)), float(rng.uniform(0.0, _MOST_BLUR)) * FINE
  look = Look(way, opacity, blur, part.face is not None and rng.random() < 0.25, light, shelf)
  part = dataclasses.replace(part, look=look)
  paint_object(picture, part)
  ink, shared = None, rng.random() < 0.75
  for block in part.blocks:
    box, mask, near = _seen(picture, part, block)
    ink = ink if ink and shared else draw_ink(rng, extremes(_view(picture, box), near))
    block.ink = _lay(picture, box, mask, near, ink, look)
    if block.ink is None:
      return None
  return part


def paint_object(picture: np.ndarray, part: Part) -> None:
  """Draws an object without its texts."""
  if part.look.shelf is not None:
    _put_shelf(picture, part.warp, part.look.shelf)
  if part.face:
    _paste(picture, part.face, part.warp, part.look.light)


def paint_text(picture: np.ndarray, part: Part, block: Block) -> bool:
  """Draws a text in its ink on an object that is there already, and writes down with which contrast; False where it cannot be read."""
  found = _lay(picture, *_seen(picture, part, block), block.ink, part.look)
  block.ink = found or block.ink
  return found is not None


def _seen(picture: np.ndarray, part: Part, block: Block) -> tuple[tuple[int, int, int, int], np.ndarray, np.ndarray]:
  """Returns (the box of a picture in which a text is drawn, how far it covers each pixel there, which pixels it covers or is near to)."""
  setting, warp = block.setting, part.warp
  plane = np.zeros((warp.height, warp.width), np.uint8)
  left, top, right, bottom = outwards(setting.ink)
  own = max(0, left - 1), max(0, top - 1), min(warp.width, right + 1), min(warp.height, bottom + 1)
  plane[own[1]:own[3], own[0]:own[2]] = drawing.coverage(setting, own)
  soft = min(part.look.blur, _SOFTEST * setting.size)
  if soft > 0.3:
    plane = cv2.GaussianBlur(plane, (0, 0), soft)
  box = part.reach(setting.ink, picture)
  mask = warp.read(plane, box)
  return box, mask, cv2.dilate(mask, np.ones((5, 5), np.uint8)) > 0


def _lay(picture: np.ndarray, box: Sequence[int], mask: np.ndarray, near: np.ndarray, ink: tuple, look: Look) -> tuple | None:
  """Draws a text with coverage `mask` into a box of the picture. Returns the ink with its contrast as it came out; None where it is too low."""
  behind = _view(picture, box)
  for one, share in ((look.way, look.opacity), ("alpha", 1.0)):
    full = _inked(behind, ink[1], one, share)
    ratio = _worst(extremes(full, near), extremes(behind, near))
    if ratio >= CONTRAST:
      break
  else:
    return None
  m = mask[..., None].astype(np.uint16)
  if look.raised and np.mean(ink[1]) > 150:
    shift = np.float32([[1, 0, 1.5 * look.light[0]], [0, 1, 1.5 * look.light[1]]])
    dark = cv2.warpAffine(mask, shift, mask.shape[::-1])[..., None].astype(np.float32) / 255
    behind = (behind * (1 - _LIGHT_SHADOW * dark)).astype(np.uint8)
  left, top, right, bottom = box
  picture[top:bottom, left:right] = ((behind * (255 - m) + full * m + 127) // 255).astype(np.uint8)
  return ink[0], ink[1], ratio


def _inked(behind: np.ndarray, rgb: Sequence[int], way: str, opacity: float) -> np.ndarray:
  """The picture if all of it were covered by ink."""
  pixels, colour = behind.astype(np.float32), np.array(rgb, np.float32)
  if way == "multiply":
    full = pixels * colour / 255
  elif way == "luminance":
    luma = pixels @ np.float32((0.299, 0.587, 0.114)) + 1
    full = colour * np.clip((luma / luma.mean()) ** 0.6, 0.75, 1.2)[..., None]
  else:
    full = pixels + opacity * (colour - pixels)
  return np.clip(full, 0, 255).astype(np.uint8)


def extremes(pixels: np.ndarray, near: np.ndarray) -> list[np.ndarray]:
  """Returns the darkest and the lightest colour of the pixels where `near` holds, each a mean of nine."""
  smooth = cv2.blur(pixels, (3, 3), borderType=cv2.BORDER_REPLICATE)
  luma = cv2.cvtColor(smooth, cv2.COLOR_RGB2GRAY)[near]
  colours = smooth[near]
  return [colours[luma.argmin()].astype(float), colours[luma.argmax()].astype(float)]


def _worst(inks: Sequence[np.ndarray], grounds: Sequence[np.ndarray]) -> float:
  """The least contrast of some inks with some grounds: 1 where one is lighter than a ground and another darker."""
  lighter = {inked.sum() > ground.sum() for inked in inks for ground in grounds}
  return min(contrast(inked, ground) for inked in inks for ground in grounds) if len(lighter) == 1 else 1.0


def _paste(picture: np.ndarray, face: Face, warp: Warp, light: Sequence[float]) -> None:
  """Draws an object with its shadow."""
  size = float(np.ptp(warp.corners, axis=0).min())
  box = _inside(warp.hull((0, 0, warp.width, warp.height)), picture, 2 + round(0.2 * size))
  seen, part = warp.read(face.pixels, box), _view(picture, box)
  *colours, alpha = cv2.split(seen)
  if not face.is_lit:
    part = _darker(part, _shadow(alpha, 0.05 * size * np.asarray(light), 0.025 * size))
  left, top, right, bottom = box
  picture[top:bottom, left:right] = cv2.add(_darker(part, alpha), cv2.merge(colours))


def _shadow(alpha: np.ndarray, move: np.ndarray, blur: float) -> np.ndarray:
  """How dark the shadow of something is, [H, W] uint8: moved and blurred, by px."""
  fine = max(1.0, blur / 2)  # what is so soft needs no more pixels
  small = cv2.resize(alpha, None, fx=1 / fine, fy=1 / fine, interpolation=cv2.INTER_AREA)
  shadow = cv2.warpAffine(small, np.float32([[1, 0, move[0] / fine], [0, 1, move[1] / fine]]), small.shape[::-1])
  return cv2.resize(cv2.GaussianBlur(shadow, (0, 0), max(0.8, blur / fine)), alpha.shape[::-1]) // 2


def _darker(pixels: np.ndarray, by: np.ndarray) -> np.ndarray:
  """Pixels [H, W, 3] uint8 of which only 1 - by / 255 is left."""
  return cv2.multiply(pixels, cv2.merge([255 - by] * 3), scale=1 / 255)


def _draw_shelf(rng: np.random.Generator, picture: np.ndarray, warp: Warp) -> np.ndarray:
  """The board under a can, [h, W, 3] uint8, which reaches to the picture's bottom."""
  y = min(picture.shape[0] - 1, round(float(warp.corners[2:, 1].min()) - 0.02 * picture.shape[0]))
  rest = picture.shape[0] - y
  shelf = surfaces.tinted(np.array((150, 108, 72)) * rng.uniform(0.6, 1.2), surfaces.noise(rng, rest, picture.shape[1], 30.0, 2.0) // 9)
  shelf[:max(1, rest // 12)] //= 2
  return shelf


def _put_shelf(picture: np.ndarray, warp: Warp, shelf: np.ndarray) -> None:
  """Draws the board under a can, and the can's lid."""
  picture[-len(shelf):], wide = shelf, warp.width / 2
  turn = np.linspace(0, 2 * np.pi, 60)
  for share, grey in ((1.0, 150), (0.9, 205)):
    points = np.stack([wide + share * wide / np.sin(warp.angle) * np.sin(turn), warp.bow * (share * np.cos(turn) - np.cos(warp.angle))], -1)
    cv2.fillPoly(picture, [np.rint(warp.project(points) * 16).astype(np.int32)], (grey, grey + 2, grey + 4), cv2.LINE_AA, 4)


def draw_grain(rng: np.random.Generator, height: int, width: int, sigma: float) -> np.ndarray | None:
  """Noise of a standard deviation in levels, [H, W] float32; None where it would not be seen."""
  return None if sigma < _LEAST_NOISE else surfaces.noise(rng, height, width).astype(np.float32) * (min(sigma, _MOST_NOISE) / 50)


def add_grain(grain: np.ndarray | None, picture: np.ndarray, warps: Sequence[Warp] | None) -> None:
  """Adds noise, if there is any, to a picture, or only to where some planes lie."""
  if grain is None:
    return
  boxes = [(0, 0, picture.shape[1], picture.shape[0])] if warps is None else [_inside(bounds(warp.corners), picture, 0) for warp in warps]
  for left, top, right, bottom in boxes:
    picture[top:bottom, left:right] = np.clip(picture[top:bottom, left:right] + grain[top:bottom, left:right, None], 0, 255)


def _inside(box: Sequence[float], picture: np.ndarray, margin: int) -> tuple[int, int, int, int]:
  """A box in whole px with a margin, as far as it lies in the picture."""
  left, top, right, bottom = outwards(box)
  return max(0, left - margin), max(0, top - margin), min(picture.shape[1], right + margin), min(picture.shape[0], bottom + margin)


def _view(picture: np.ndarray, box: Sequence[int]) -> np.ndarray:
  return picture[box[1]:box[3], box[0]:box[2]]
