"""Colours of a picture's ICC profile to those of sRGB.

Intent and black point are those that Adobe's programs use by default: relative colorimetric, with black point compensation. Colours that sRGB does
not have become its nearest. A profile that differs from sRGB by one level of 255 at most changes no bit. One that cannot be used is named in the
log, with the first picture that has it, and its pictures count as sRGB, which is what browsers make of them.
"""

import functools
import hashlib
import io

import numpy as np
from absl import logging
from PIL import Image, ImageCms

# A profile that is kept costs its own bytes and some tables of its size. One of a camera or screen has a few KB, one of a printer up to 2 MB.
MAX_KEPT = 16
MAX_KEPT_BYTES = 4 << 20

_MODES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}
_PROBES = 9  # levels of each channel at which a profile of colours is compared with sRGB
_told: set[bytes] = set()  # digests of the profiles that were named in the log


def to_srgb(image: Image.Image, profile: bytes | None, kind: str, name: str) -> Image.Image:
  """Returns the image with the colours of a profile converted, in mode RGB, or RGBA if it was; unchanged where nothing needs to be converted.

  `image` is in mode L, RGB, RGBA or CMYK; `kind` is the colour space of its file (GRAY, "RGB " or CMYK, as profiles write it), `name` stands for it
  in the log. `profile` None is one that the decoder could not read. Safe to call from several threads.
  """
  if profile is None:
    _tell_once(b"", "a profile", "the file's part that holds it is damaged", name)
    return image
  make = _kept if len(profile) <= MAX_KEPT_BYTES else _conversion
  try:
    convert = make(profile, kind)
  except ValueError as error:
    _tell_once(profile, f"a profile of {len(profile)} bytes", str(error), name)
    return image
  if convert is None:
    return image
  # Greys are told from colours by the file, since transparency has made RGBA of both.
  takes = "L" if isinstance(convert, np.ndarray) else convert.input_mode
  plain = image.convert("RGB") if image.mode == "RGBA" else image
  plain = plain if plain.mode == takes else plain.convert(takes)
  if isinstance(convert, np.ndarray):
    converted = Image.merge("RGB", [plain.point(levels) for levels in convert.T.tolist()])
  else:
    converted = ImageCms.applyTransform(plain, convert)
  if image.mode == "RGBA":
    converted.putalpha(image.getchannel("A"))
  return converted


def _conversion(profile: bytes, kind: str) -> ImageCms.ImageCmsTransform | np.ndarray | None:
  """Returns what converts a profile's colours to sRGB, None where nothing needs to be converted: for grey pictures a table, 256 3 uint8.

  The tables by which the library speeds up a conversion err by up to ten levels for greys with a linear curve, so a grey is looked up among all 256.

  Raises:
    ValueError: the profile cannot be used; the same for the same profile.
  """
  try:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space
    if space != kind and (space, kind) != ("RGB ", "GRAY"):
      raise ValueError(f"it is of {space.strip()} colours, and the picture of {kind.strip()}")
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE | (ImageCms.Flags.NOOPTIMIZE if kind == "GRAY" else 0)
    convert = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), _MODES[space], "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags)
  except (ImageCms.PyCMSError, OSError) as error:
    raise ValueError(str(error)) from error
  if space == "CMYK":
    return convert
  levels = np.arange(256, dtype=np.uint8) if kind == "GRAY" else np.linspace(0, 255, _PROBES).round().astype(np.uint8)
  probe = np.stack([levels] * 3 if kind == "GRAY" else np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
  converted = np.asarray(ImageCms.applyTransform(Image.fromarray(probe).convert(_MODES[space]), convert))
  if np.abs(converted.astype(int) - probe).max() <= 1:
    return None  # it is sRGB, or as good as that
  return converted[0] if kind == "GRAY" else convert


_kept = functools.lru_cache(maxsize=MAX_KEPT)(_conversion)


def _tell_once(profile: bytes, what: str, why: str, name: str) -> None:
  """Says in the log that the profile cannot be used, and which picture was the first to have it, once per process."""
  digest = hashlib.sha256(profile).digest()
  if digest not in _told:
    _told.add(digest)
    logging.warning("Of %s, %s cannot be used: %s. Pictures that have it count as sRGB.", name, what, why)
