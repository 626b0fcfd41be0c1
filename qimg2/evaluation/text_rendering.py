"""Texts set in type on white, as large as fits: pictures of which every score of text should be near 1, for as far as the OCR reads.

The font is the first that has all characters: DejaVu Sans of matplotlib (Latin, Greek, Cyrillic, Arabic), those of a folder that is given, those of
the system, Noto before others. DejaVu has no Chinese and no Devanagari: on Debian, fonts-noto-cjk and fonts-noto-core (or fonts-lohit-deva) do.
"""

import functools
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont, features

SIZES_PX = (96, 80, 64, 52, 44, 36, 30, 26, 22, 18, 16)  # of the font, the first that fits
MARGIN = 0.06  # of the shorter side
LEADING = 1.4  # from line to line, in sizes of the font; half a line more between texts
_UNIT = re.compile(r"\s+|[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")  # what a line can be broken after
_SHAPED = ("ARABIC", "DEVANAGARI", "HEBREW")  # scripts that need more than a glyph for each character


def render(texts: Sequence[str], height: int, width: int, fonts: str = "") -> np.ndarray:
  """The texts below each other, black on white, [height, width, 3] uint8; `fonts` is a folder with more of them.

  Raises:
    ValueError: no font has all characters, Pillow cannot shape the script, or the texts do not fit.
  """
  path = find_font("".join(texts), fonts)
  if _needs_shaping("".join(texts)) and not features.check("raqm"):
    raise ValueError("Arabic, Hebrew and Devanagari need Pillow with raqm to be drawn: install Pillow's wheel.")
  margin = round(MARGIN * min(height, width))
  for size in SIZES_PX:
    font = ImageFont.truetype(path, size)
    blocks = [_broken(text, font, width - 2 * margin) for text in texts]
    if blocks and None not in blocks and _height(blocks, size) <= height - 2 * margin:
      return _drawn(blocks, font, size, height, width, margin)
  raise ValueError(f"{len(' '.join(texts))} characters do not fit on {height} x {width} px at {SIZES_PX[-1]} px: give a larger picture.")


def find_font(text: str, fonts: str = "") -> str:
  """Path of the first font with all characters of a text.

  Raises:
    ValueError: there is none; says what the best one lacks.
  """
  needed = {c for c in text if not c.isspace() and unicodedata.category(c) != "Cf"}
  lacking = needed
  for path in _candidates(fonts):
    missing = needed - _characters(path)
    if not missing:
      return path
    lacking = min(lacking, missing, key=len)
  some = "".join(sorted(lacking)[:10])
  raise ValueError(f"No font has the characters {some}: give a folder of fonts, or install one, such as Debian's fonts-noto-cjk or fonts-noto-core.")


@functools.cache
def _candidates(fonts: str) -> tuple[str, ...]:
  own = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
  given = sorted(str(path) for path in pathlib.Path(fonts).rglob("*.[ot]t[fc]")) if fonts else []
  system = sorted(font_manager.findSystemFonts(), key=lambda path: ("noto" not in path.lower(), path))
  return (str(own), *given, *[path for path in system if "emoji" not in path.lower()])


@functools.cache
def _characters(path: str) -> frozenset[str]:
  try:
    return frozenset(map(chr, TTFont(path, fontNumber=0, lazy=True).getBestCmap() or ()))
  except (TTLibError, OSError):
    return frozenset()  # no font after all: another is taken, or `find_font` says what is lacking


def _needs_shaping(text: str) -> bool:
  return any(unicodedata.name(c, "").startswith(_SHAPED) for c in text)


def _broken(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str] | None:
  """A text in lines of at most `width` px; None where a word is wider."""
  lines = []
  for paragraph in text.split("\n"):
    lines.append("")
    for unit in _UNIT.findall(paragraph):
      if font.getlength(lines[-1] + unit.rstrip()) > width:
        lines[-1] = lines[-1].rstrip()
        lines.append("")
      lines[-1] += unit if lines[-1] else unit.lstrip()
  return lines if max(map(font.getlength, lines)) <= width else None


def _height(blocks: Iterable[Sequence[str]], size: int) -> float:
  return sum((len(lines) + 0.5) * LEADING * size for lines in blocks)


def _drawn(blocks: Iterable[Sequence[str]], font: ImageFont.FreeTypeFont, size: int, height: int, width: int, margin: int) -> np.ndarray:
  image = Image.new("RGB", (width, height), "white")
  draw, y = ImageDraw.Draw(image), float(margin)
  for lines in blocks:
    for line in lines:
      draw.text((margin, y), line, font=font, fill="black")
      y += LEADING * size
    y += LEADING * size / 2
  return np.asarray(image)
