"""Pixels in and out: decode, fit to a bucket, encode.

An image is a uint8 array H W 3 in RGB everywhere in this package. Left out on purpose: flips and colour jitter, which
would make captions such as "in the left corner" or "a red ball" wrong.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

# What Pillow raises for bytes it cannot read, from an unknown format to a file cut short.
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def decode_image(data: bytes, name: str = "image", keep_alpha: bool = False) -> np.ndarray:
  """Returns the pixels of an encoded image, uint8 H W 3; H W 4 if it has transparency and `keep_alpha` asks for it.

  The EXIF rotation is applied, and transparency is otherwise composited on white. A broken or cut file is a
  `ValueError` that names `name`.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      image = Image.open(io.BytesIO(data))
      ImageOps.exif_transpose(image, in_place=True)
      if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
      pixels = np.array(image.convert("RGBA"))
  except _BROKEN as error:
    raise ValueError(
        f"Cannot decode {name} ({len(data)} bytes): {error}; replace the file or remove the record.") from error
  return pixels if keep_alpha else composite_on_white(pixels)


def composite_on_white(pixels: np.ndarray) -> np.ndarray:
  """Returns uint8 H W 4 pixels laid on white paper, uint8 H W 3."""
  image = Image.fromarray(pixels)
  return np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def resize_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Returns the image scaled to cover height x width px and cut around its centre, uint8 height width 3.

  One Lanczos resize reads the kept part alone, at fractional source coordinates, so that no pixel is resampled twice.
  """
  rows, columns = image.shape[:2]
  if (rows, columns) == (height, width):
    return image
  scale = min(rows / height, columns / width)
  left, top = (columns - width * scale) / 2, (rows - height * scale) / 2
  box = (left, top, left + width * scale, top + height * scale)
  # Above a fourfold reduction a box prefilter saves most of the time and cannot be seen.
  gap = 2.0 if scale > 4 else None
  return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=gap))


def encode_png(image: np.ndarray) -> bytes:
  """Returns the PNG file of a uint8 H W 3 image. Lossless: `decode_image` gives the same pixels back."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG", compress_level=6)
  return buffer.getvalue()
