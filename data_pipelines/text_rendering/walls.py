"""Pictures to put signs into where a user gives none: walls of brick, plaster, concrete, planks and tiles, and rooms out of focus.

Simple, not silly: each has its texture, light that falls off to one side, and the edges and joints that such a wall has.
"""

import cv2
import numpy as np

from data_pipelines.text_rendering.surfaces import noise, tinted

_BRICKS = ((150, 84, 66), (172, 120, 96), (196, 186, 172), (104, 72, 64))
_PLASTERS = ((222, 212, 192), (206, 196, 150), (178, 196, 206), (214, 176, 150), (236, 234, 228), (120, 132, 120))
_CONCRETES = ((150, 150, 148), (120, 122, 126), (178, 174, 168))
_WOODS = ((140, 98, 62), (182, 150, 110), (96, 70, 52), (120, 132, 136))
_TILES = ((228, 232, 232), (90, 140, 150), (196, 206, 190), (60, 84, 120))


def draw_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str]:
  """Returns (a picture H W 3 uint8, its name in English)."""
  name = list(_SCENES)[rng.integers(len(_SCENES))]
  return _lit(rng, _SCENES[name](rng, height, width)), name


def _lit(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
  """Light that falls off linearly to one side, and towards the corners."""
  y, x = np.linspace(-1, 1, 9, dtype=np.float32)[:, None], np.linspace(-1, 1, 9, dtype=np.float32)
  down, along = rng.uniform(-0.2, 0.2, 2)
  light = (0.97 + along * x + down * y - 0.12 * (x * x + y * y)) * rng.uniform(0.8, 1.08)
  light = cv2.resize(np.rint(128 * light).clip(0, 255).astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_CUBIC)
  return cv2.multiply(picture, cv2.merge([light] * 3), scale=1 / 128)


def _some(rng: np.random.Generator, colours: tuple) -> np.ndarray:
  return np.array(colours[rng.integers(len(colours))]) + rng.integers(-10, 11, 3)


def _plaster(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  grown = max(1.0, height / 256)
  return tinted(_some(rng, _PLASTERS), noise(rng, height, width, grown, grown) // 14 + noise(rng, height, width, 24 * grown, 24 * grown) // 14)


def _concrete(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  grown = max(1.0, height / 256)
  relief = noise(rng, height, width, grown, grown) // 12 + noise(rng, height, width, 12 * grown, 12 * grown) // 9
  joint = max(1, height // 200)
  for x in range(round(width * rng.uniform(0.1, 0.6)), width, max(8, round(width * 0.55))):
    relief[:, x:x + joint] -= 40
  y = round(height * rng.uniform(0.2, 0.9))
  relief[y:y + joint] -= 40
  return tinted(_some(rng, _CONCRETES), relief)


def _brick(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  course = max(6, round(height * rng.uniform(0.05, 0.09)))
  long, joint = 3 * course, max(1, course // 9)
  y, x = np.arange(height), np.arange(width)
  row = y // course
  shifted = x[None] + (row % 2 * (long // 2))[:, None]
  mortar = (y % course < joint)[:, None] | (shifted % long < joint)
  shades = rng.integers(-22, 23, (row[-1] + 1, shifted.max() // long + 1)).astype(np.int16)
  relief = shades[row[:, None], shifted // long] + noise(rng, height, width) // 10
  picture = tinted(_some(rng, _BRICKS), relief)
  picture[mortar] = tinted(np.array((176, 170, 160)) * rng.uniform(0.75, 1.1), noise(rng, height, width) // 14)[mortar]
  return picture


def _planks(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  board = max(8, round(width * rng.uniform(0.1, 0.2)))
  x = np.arange(width)
  shades = rng.integers(-14, 15, x[-1] // board + 1).astype(np.int16)[x // board]
  relief = noise(rng, height, width, 1.5, 30.0) // 8 + shades
  relief[:, x % board < max(1, board // 30)] -= 60
  return tinted(_some(rng, _WOODS), relief)


def _tiles(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  side = max(10, round(height * rng.uniform(0.1, 0.2)))
  y, x = np.arange(height), np.arange(width)
  shades = rng.integers(-8, 9, (y[-1] // side + 1, x[-1] // side + 1)).astype(np.int16)
  relief = shades[y[:, None] // side, x // side] + (8 - 16 * (y % side)[:, None] // side).astype(np.int16)
  joint = max(1, side // 24)
  relief[y % side < joint], relief[:, x % side < joint] = -38, -38
  return tinted(_some(rng, _TILES), relief)


def _room(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """Soft discs of light before a wall and a floor, all out of focus."""
  small = np.empty((64, max(8, round(64 * width / height)), 3), np.uint8)
  floor = int(rng.integers(40, 56))
  small[:floor], small[floor:] = _some(rng, _PLASTERS) * 0.6, _some(rng, _WOODS) * 0.7
  for _ in range(int(rng.integers(6, 16))):
    middle = int(rng.integers(small.shape[1])), int(rng.integers(floor))
    cv2.circle(small, middle, int(rng.integers(2, 9)), rng.integers(70, 250, 3).tolist(), -1)
  return cv2.resize(cv2.GaussianBlur(small, (0, 0), 2.4), (width, height), interpolation=cv2.INTER_CUBIC)


_SCENES = {"plaster wall": _plaster, "concrete wall": _concrete, "brick wall": _brick, "wooden wall": _planks, "tiled wall": _tiles,
           "blurred room": _room}
