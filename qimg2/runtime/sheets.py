"""Sheets of pictures with captions, as arrays, and files of pictures."""

import functools
import importlib.util
import io
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.transforms import composite_on_white
from qimg2.places import Place, write_file

_JPEG = {"format": "JPEG", "quality": 95}
FORMATS = {".png": {"format": "PNG", "optimize": True}, ".jpg": _JPEG, ".jpeg": _JPEG, ".webp": {"format": "WEBP", "lossless": True}}
MARGIN_PX = 6
TILE_GAP_PX = 18  # wider than the margin, so that the pictures of a tile belong together
LINE_PX = 13
TEXT_PX = 10
MAX_LINES = 12  # of a caption; what is longer ends in an ellipsis
FONT = "DejaVuSans.ttf"  # comes with matplotlib and has Latin, Greek, Cyrillic, Arabic, Hebrew, Georgian and more, but no Chinese


def grid(images: Sequence[np.ndarray], columns: int, captions: Sequence[str] = (), scale: int = 1) -> np.ndarray:
  """A sheet [H, W, 3] uint8 of pictures [h, w, 3 or 4] uint8, row by row, each above its caption; alpha is laid on white.

  Args:
    images: pictures, sizes may differ.
    columns: pictures per row.
    captions: one per picture, or none.
    scale: how many times larger to draw each picture.
  """
  cell_h = max(image.shape[0] for image in images) * scale
  cell_w = max(image.shape[1] for image in images) * scale
  wrapped = [wrap(caption, cell_w) for caption in captions]
  text_px = LINE_PX * max(map(len, wrapped), default=0)
  rows = -(-len(images) // columns)
  sheet = Image.new("RGB", (columns * (cell_w + MARGIN_PX) + MARGIN_PX, rows * (cell_h + text_px + MARGIN_PX) + MARGIN_PX), "white")
  for number, image in enumerate(images):
    x, y = MARGIN_PX + number % columns * (cell_w + MARGIN_PX), MARGIN_PX + number // columns * (cell_h + text_px + MARGIN_PX)
    picture = Image.fromarray(image)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    sheet.paste(picture, (x, y), picture if picture.mode == "RGBA" else None)
    write_lines(sheet, x, y + picture.height + 1, wrapped[number] if captions else ())
  return np.asarray(sheet)


def strips(rows: Sequence[tuple[str, Sequence[tuple[Sequence[np.ndarray], str]]]], side_px: int = 128) -> np.ndarray:
  """A sheet [H, W, 3] uint8: per row a heading above its tiles; a tile is pictures [h, w, 3] uint8 side by side above their caption.

  Args:
    rows: (heading, tiles of (pictures, caption)).
    side_px: longest side that a picture is drawn with: a larger one is shrunk, a smaller one is drawn a whole number of times larger.
  """
  parts = [part for heading, tiles in rows for part in (_heading(heading), *_strip(tiles, side_px))]
  sheet = Image.new("RGB", (max(part.width for part in parts) + 2 * MARGIN_PX, sum(part.height + MARGIN_PX for part in parts) + MARGIN_PX), "white")
  y = MARGIN_PX
  for part in parts:
    sheet.paste(part, (MARGIN_PX, y))
    y += part.height + MARGIN_PX
  return np.asarray(sheet)


def _heading(text: str) -> Image.Image:
  image = Image.new("RGB", (int(font().getlength(text)) + 2 * MARGIN_PX, LINE_PX + 4), "#dde6f0")
  write_lines(image, MARGIN_PX, 2, [text])
  return image


def _strip(tiles: Sequence[tuple[Sequence[np.ndarray], str]], side_px: int) -> list[Image.Image]:
  """The tiles beside each other, as a list of one picture, or of none where there are no tiles."""
  drawn = [_tile([_framed(_fit(picture, side_px)) for picture in pictures], caption, side_px) for pictures, caption in tiles]
  if not drawn:
    return []
  strip = Image.new("RGB", (sum(tile.width + TILE_GAP_PX for tile in drawn), max(tile.height for tile in drawn)), "white")
  for x, tile in zip(itertools.accumulate((tile.width + TILE_GAP_PX for tile in drawn), initial=0), drawn):
    strip.paste(tile, (x, 0))
  return [strip]


def _tile(pictures: Sequence[Image.Image], caption: str, least_px: int) -> Image.Image:
  width, height = max(least_px, sum(picture.width + MARGIN_PX for picture in pictures) - MARGIN_PX), max(picture.height for picture in pictures)
  lines = wrap(caption, width)
  tile, x = Image.new("RGB", (width, height + 2 + LINE_PX * len(lines)), "white"), 0
  for picture in pictures:
    tile.paste(picture, (x, 0))
    x += picture.width + MARGIN_PX
  write_lines(tile, 0, height + 1, lines)
  return tile


def _fit(picture: np.ndarray, side_px: int) -> Image.Image:
  image, longest = Image.fromarray(picture), max(picture.shape[:2])
  if longest > side_px:
    return image.resize(tuple(max(1, side * side_px // longest) for side in image.size), Image.Resampling.LANCZOS)
  scale = side_px // longest
  return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _framed(image: Image.Image) -> Image.Image:
  """With a grey line around it: white paper would end nowhere."""
  framed = Image.new("RGB", (image.width + 2, image.height + 2), "#999999")
  framed.paste(image, (1, 1))
  return framed


# Text in any script.


@functools.cache
def font() -> ImageFont.FreeTypeFont:
  """The font of captions; characters that it lacks are drawn as boxes."""
  spec = importlib.util.find_spec("matplotlib")
  path = spec and os.path.join(os.path.dirname(spec.origin), "mpl-data", "fonts", "ttf", FONT)
  return ImageFont.truetype(path, TEXT_PX) if path and os.path.isfile(path) else ImageFont.load_default(TEXT_PX)


def wrap(text: str, width_px: int, most: int = MAX_LINES) -> list[str]:
  """`text` as at most `most` lines no wider than `width_px`, cut at spaces where there are some; a single character may be wider.

  White space and control characters become single spaces.
  """
  text = "".join(" " if unicodedata.category(character) in ("Cc", "Cs") else character for character in text)
  lines, line = [], ""
  for word in text.split():
    longer = f"{line} {word}" if line else word
    if _width(longer) <= width_px:
      line = longer
      continue
    lines += [line] if line else []
    while _width(word) > width_px and len(word) > 1 and len(lines) <= most:
      cut = _longest_start(word, width_px)
      lines, word = [*lines, word[:cut]], word[cut:]
    line = word
    if len(lines) > most:
      break
  lines += [line] if line else []
  return lines if len(lines) <= most else [*lines[:most - 1], lines[most - 1][:-2] + "…"]


def _longest_start(word: str, width_px: int) -> int:
  """How many characters of `word` fit, at least one."""
  low, high = 1, len(word)
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if _width(word[:middle]) <= width_px else (low, middle - 1)
  return low


def _width(text: str) -> float:
  return font().getlength(text)


def write_lines(image: Image.Image, x: int, y: int, lines: Sequence[str]) -> None:
  """Writes lines of text into a picture, black, from (x, y) px down."""
  draw = ImageDraw.Draw(image)
  for number, line in enumerate(lines):
    draw.text((x, y + number * LINE_PX), line, "black", font())


def picture_format(path: str | Place) -> dict[str, Any]:
  """Pillow's arguments for a picture in a file of this name.

  Raises:
    ValueError: the name does not end in a format that is written.
  """
  suffix = pathlib.PurePosixPath(str(path)).suffix.lower()
  if suffix not in FORMATS:
    raise ValueError(f"{path} does not say what kind of picture it is: let it end in {', '.join(FORMATS)}.")
  return FORMATS[suffix]


def save_picture(image: np.ndarray, path: str | Place) -> None:
  """Writes an [H, W, 3 or 4] uint8 picture in the format that the name ends in; folders are made. JPEG has no transparency: it is laid on white."""
  settings, content = picture_format(path), io.BytesIO()
  image = composite_on_white(image) if settings["format"] == "JPEG" and image.shape[-1] == 4 else image
  Image.fromarray(image).save(content, **settings)
  write_file(path, content.getvalue())
