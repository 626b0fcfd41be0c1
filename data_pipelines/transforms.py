"""Pixels in and out: decode, fit to a bucket, encode.

An image is a uint8 array H W 3 in RGB everywhere in this package, and H W 4 where alpha is kept. Left out on purpose: flips and colour jitter, which
would make captions such as "in the left corner" or "a red ball" wrong.

What a file becomes: colours are sRGB, into which those of a picture with another ICC profile are converted (data_pipelines.colours); transparency is
laid on white paper unless it is kept, the camera's rotation (EXIF) is applied, an animation gives its first frame, CMYK without a profile is taken as
Adobe writes it, integers above 8 bits count from 0 (black) to 65535 (white), floats from 0 to 1.
"""

import contextlib
import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator

# The loader has a thread or process per core already; libvips reads this when it is loaded.
os.environ.setdefault("VIPS_CONCURRENCY", "1")

import numpy as np
import pyvips
from PIL import ExifTags, Image, UnidentifiedImageError

from data_pipelines.buckets import shown_whole
from data_pipelines.colours import to_srgb

pyvips.cache_set_max(0)

DECODING = 1  # version of what a file becomes; caches without one are older than the conversion of profiles
MAX_PIXELS = 89_478_485  # Pillow's own limit; such a picture takes 0.4 GB decoded and up to 1.2 GB where it is transparent
MAX_JPEG_SCANS = 256  # honest progressive files have about ten; each scan of a few bytes can cost a pass over all pixels

# The others that Pillow knows are rare, and some start programs (EPS) or read further files.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_KINDS = {"1": "GRAY", "L": "GRAY", "LA": "GRAY", "La": "GRAY", "CMYK": "CMYK"} | dict.fromkeys(_DEEP, "GRAY")  # colour spaces; of others RGB
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
_SIDEWAYS = (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
_MAX_VIPS = 3  # libvips works with 8 bits between its passes: its pictures darken with the scale, here by less than 0.2 of 255
_NO_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

# A file is either decoded or refused with a ValueError: nothing is left for Pillow to tell.
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def decode_image(data: bytes, name: str = "image", keep_alpha: bool = False) -> np.ndarray:
  """Returns the pixels of an encoded image, uint8 H W 3; H W 4 if it has transparency and `keep_alpha` asks for it.

  JPEG, PNG, WebP, GIF, BMP, TIFF, PPM and AVIF up to `MAX_PIXELS`; see the module docstring for rotation, transparency and depth. A broken
  or cut file, or one of another kind, is a `ValueError` that names `name`. Safe to call from several threads.
  """
  with _one_sentence(data, name):
    image = _open(data)
    image.load()
    return _pixels(_turned(_plain(image, name, keep_alpha), _turn(image)))


def load_picture(data: bytes, height: int, width: int, name: str = "image", alpha: bool = False) -> np.ndarray:
  """Returns an encoded image scaled to cover height x width px and cut around its centre, uint8 height width 3.

  With `alpha` it is height width 4: transparency is kept, and a picture without any is opaque. Colours are not premultiplied; they are while the
  picture is scaled, so that those of clear pixels do not show at edges. A pixel with alpha 0 is white, whatever colour the file gives it.

  What `resize_crop(decode_image(data, name), height, width)` gives, but sooner: a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its
  sides that still covers the target, so that pixels differ slightly there (above 40 dB on photographs). Errors as in `decode_image`.
  """
  if height < 1 or width < 1:
    raise ValueError(f"Cannot fit {name} to {height} x {width} px: give sides of at least 1.")
  with _one_sentence(data, name):
    image = _open(data)
    # Only the small picture is turned, so the file's own rows and columns are fitted to the sides as the camera held them.
    sides = (width, height) if _turn(image) in _SIDEWAYS else (height, width)
    reduced = image.draft(None, sides[::-1])
    image.load()
    turn = _turn(image)  # a TIFF is turned by now
    sides = (width, height) if turn in _SIDEWAYS else (height, width)
    # The last pixels of a reduced file may lie partly outside of the picture.
    extent = reduced[1][2:] if reduced else image.size
    return _pixels(_turned(_fit(_plain(image, name, alpha), extent, *sides), turn), alpha)


def composite_on_white(pixels: np.ndarray) -> np.ndarray:
  """Returns uint8 H W 4 pixels laid on white paper, uint8 H W 3."""
  return np.array(_on_white(Image.fromarray(pixels)))


def resize_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Returns the image scaled to cover height x width px and cut around its centre, uint8 height width 3.

  One Lanczos resize reads the kept part alone, at fractional source coordinates, so that no pixel is resampled twice.
  """
  rows, columns = image.shape[:2]
  if (rows, columns) == (height, width):
    return image
  return np.array(_fit(Image.fromarray(image), (columns, rows), height, width))


def fit_source(load: Callable[[int, int], np.ndarray], sides: tuple[int, int], size: tuple[int, int], max_crop: float) -> np.ndarray:
  """Returns a condition image of the given sides as it goes into a batch, uint8 of `size` (height, width) x 3 or 4: `load(height, width)` fills that,
  or is laid on white, opaque paper whole where filling would cut more than `max_crop` off."""
  whole = shown_whole(*sides, size, max_crop)
  if whole is None:
    return load(*size)
  picture, (top, left) = load(*whole), ((one - part) // 2 for one, part in zip(size, whole))
  paper = np.full((*size, picture.shape[-1]), 255, np.uint8)
  paper[top:top + whole[0], left:left + whole[1]] = picture
  return paper


def encode_png(image: np.ndarray) -> bytes:
  """Returns the PNG file of a uint8 H W 3 image. Lossless: `decode_image` gives the same pixels back."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG", compress_level=6)
  return buffer.getvalue()


# ---- bytes to Pillow's images -------------------------------------------------------------------


@contextlib.contextmanager
def _one_sentence(data: bytes, name: str) -> Iterator[None]:
  """Turns every error of a decoder into a ValueError that names the picture."""
  try:
    yield
  except Exception as error:  # hostile bytes make Pillow raise nearly anything: struct.error, KeyError, AssertionError, MemoryError ...
    raise ValueError(f"Cannot decode {name} ({len(data)} bytes): {_reason(error)}; replace it or leave it out.") from error


def _reason(error: Exception) -> str:
  if isinstance(error, UnidentifiedImageError):
    return f"it has no readable header of {', '.join(_formats()[:-1])} or {_formats()[-1]}"
  text = " ".join(str(error).split()).rstrip(".")
  tells_enough = text and isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError))
  return text if tells_enough else f"{type(error).__name__} {text}".strip()


def _open(data: bytes) -> Image.Image:
  """Returns the image with its header read and its size checked."""
  # Not warnings.catch_warnings, which is not safe in threads; the filter is put back where somebody else's block has dropped it.
  if _NO_WARNINGS not in warnings.filters:
    warnings.filters.insert(0, _NO_WARNINGS)
  if not data:
    raise ValueError("the file is empty")
  if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
    raise ValueError(f"it has more than {MAX_JPEG_SCANS} scans")
  image = Image.open(io.BytesIO(data), formats=_formats())
  if image.width * image.height > MAX_PIXELS:
    raise ValueError(f"its {image.width} x {image.height} px are more than {MAX_PIXELS}")
  return image


@functools.cache
def _formats() -> tuple[str, ...]:
  """The formats we want of those that this Pillow can read."""
  Image.init()
  if avif := sys.modules.get("PIL.AvifImagePlugin"):
    avif.DEFAULT_MAX_THREADS = 1  # the loader has a thread or process per core already
  return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def _turn(image: Image.Image) -> Image.Transpose | None:
  """The transposition that sets the picture upright."""
  return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))


# ---- Pillow's images to pixels ------------------------------------------------------------------


def _plain(image: Image.Image, name: str, keep_alpha: bool = False) -> Image.Image:
  """Returns the image in mode RGB or, where that is as good, L; RGBA if it has transparency to keep."""
  info, kind = image.info, _KINDS.get(image.mode, "RGB ")
  if image.mode in _DEEP:
    image = _to_8_bits(image)
  if image.has_transparency_data:
    image = image if image.mode == "RGBA" else image.convert("RGBA")
  elif image.mode == "1":
    return image.convert("L")
  if info.get("icc_profile", b"") != b"":
    image = to_srgb(image, info["icc_profile"], kind, name)
  if image.mode == "RGBA":
    return image if keep_alpha else _on_white(image)
  return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
  """Returns grey levels of 16 bits or floats in mode L; LA if one of them stands for transparency."""
  values, white = np.asarray(image), 1.0 if image.mode == "F" else 65535
  if not (values.min() >= 0 and values.max() <= white):  # NaN fails, too
    raise ValueError(f"its grey levels do not lie between 0 and {white}")
  levels = Image.fromarray((values * np.float32(255 / white) + np.float32(0.5)).astype(np.uint8))
  clear = image.info.get("transparency")
  if clear is not None:
    levels.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
  return levels


def _on_white(image: Image.Image) -> Image.Image:
  return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _fit(image: Image.Image, extent: tuple[float, float], height: int, width: int) -> Image.Image:
  """Scales and cuts an image whose picture takes the first `extent` (columns, rows) of it, which may be fractions."""
  columns, rows = extent
  scale = min(rows / height, columns / width)
  across, down = min(columns, width * scale), min(rows, height * scale)  # rounding must not carry the box over the edge
  left, top = (columns - across) / 2, (rows - down) / 2
  if 1 < scale <= _MAX_VIPS and image.mode != "RGBA" and (columns, rows) == image.size:
    return _shrink(image, left, top, across / width, down / height, height, width)
  # Pillow premultiplies RGBA for this. From a fourfold reduction on, a box prefilter saves most of the time and cannot be seen.
  return image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + across, top + down), reducing_gap=2.0)


def _shrink(image: Image.Image, left: float, top: float, across: float, down: float, height: int, width: int) -> Image.Image:
  """Scales down by the factors `across` and `down` with libvips, whose Lanczos filter is four times faster than Pillow's.

  Its box is whole pixels around the centre, and what is left over is shared by both sides, so that the picture stays where it is.
  """
  x, y = round(left), round(top)
  part = pyvips.Image.new_from_memory(image.tobytes(), *image.size, len(image.getbands()), "uchar")
  part = part.crop(x, y, image.width - 2 * x, image.height - 2 * y)
  # Where the whole pixels make one row or column of the target too many, they are scaled a little more: by less than one pixel over the side.
  if round(part.height / down) != height:
    down = part.height / height
  if round(part.width / across) != width:
    across = part.width / width
  small = part.reducev(down, kernel="lanczos3", gap=2.0).reduceh(across, kernel="lanczos3", gap=2.0)
  return Image.frombuffer(image.mode, (width, height), small.write_to_memory(), "raw", image.mode, 0, 1)


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
  return image if turn is None else image.transpose(turn)


def _pixels(image: Image.Image, alpha: bool = False) -> np.ndarray:
  """The pixels in RGB, or RGBA if the image or `alpha` says so; with `alpha` clear ones are white."""
  if not alpha:
    return np.array(image.convert("RGB") if image.mode == "L" else image)
  pixels = np.array(image.convert("RGBA"))
  pixels[pixels[..., 3] == 0, :3] = 255
  return pixels
