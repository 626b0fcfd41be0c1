"""Sheets of pictures with captions, as arrays and PNG files."""

import pathlib
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN_PX = 6
LINE_PX = 13


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
  wrapped = [textwrap.wrap(caption, max(8, cell_w // 6)) for caption in captions]
  text_px = LINE_PX * max(map(len, wrapped), default=0)
  rows = -(-len(images) // columns)
  sheet = Image.new("RGB", (columns * (cell_w + MARGIN_PX) + MARGIN_PX, rows * (cell_h + text_px + MARGIN_PX) + MARGIN_PX), "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
  for number, image in enumerate(images):
    x, y = MARGIN_PX + number % columns * (cell_w + MARGIN_PX), MARGIN_PX + number // columns * (cell_h + text_px + MARGIN_PX)
    picture = Image.fromarray(image)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    sheet.paste(picture, (x, y), picture if picture.mode == "RGBA" else None)
    for line, text in enumerate(wrapped[number] if captions else ()):
      draw.text((x, y + picture.height + 1 + line * LINE_PX), text, "black", font)
  return np.asarray(sheet)


def save_png(image: np.ndarray, path: str | pathlib.Path) -> None:
  """Writes an [H, W, 3 or 4] uint8 picture; folders are made."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix(".part")
  Image.fromarray(image).save(part, "PNG", optimize=True)
  part.replace(path)
