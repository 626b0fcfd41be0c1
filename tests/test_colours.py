"""Pictures with an ICC profile become sRGB, once, wherever they are decoded. The profiles are made here, field by field, and the right values too."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_pipelines import colours
from data_pipelines.curation import encode
from data_pipelines.transforms import decode_image, load_picture

D50 = (0.9642, 1.0, 0.8249)
# Columns: XYZ of red, green and blue, adapted to D50.
P3 = ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407))
ADOBE = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))
SRGB = ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))


def number(value: float) -> bytes:
  return struct.pack(">i", round(value * 65536))


def xyz(values) -> bytes:
  return b"XYZ \0\0\0\0" + b"".join(map(number, values))


def curve(gamma: float | None) -> bytes:
  """A power, or that of sRGB."""
  if gamma is None:
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + b"".join(map(number, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
  return b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + number(gamma)


def icc(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
  """A profile, see ICC.1:2010."""
  text = "made".encode("utf-16-be")
  tags = {b"desc": b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text, b"wtpt": xyz(D50)} | tags
  place, table, body = 128 + 4 + 12 * len(tags), b"", b""
  for name, data in tags.items():
    data += bytes(-len(data) % 4)
    table += name + struct.pack(">II", place + len(body), len(data))
    body += data
  head = (bytes(8) + b"\x04\x20\0\0" + kind + space + connection + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(24)
          + struct.pack(">I", 1) + b"".join(map(number, D50)) + bytes(48))
  whole = head + struct.pack(">I", len(tags)) + table + body
  return struct.pack(">I", len(whole)) + whole[4:]


def matrix(columns, gamma: float | None) -> bytes:
  tags = {name + b"XYZ": xyz([row[i] for row in columns]) for i, name in enumerate((b"r", b"g", b"b"))}
  return icc(b"RGB ", tags | {name + b"TRC": curve(gamma) for name in (b"r", b"g", b"b")})


def ink() -> bytes:
  """Cyan alone has a lightness of 50 %, black none; colour is not known to it."""
  corners = [(100 * (1 - k) * (1 - c / 2)) for c in (0, 1) for _ in range(4) for k in (0, 1)]
  grid = b"".join(bytes((round(2.55 * light), 128, 128)) for light in corners)
  identity = b"".join(map(number, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
  data = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + bytes(range(256)) * 4 + grid + bytes(range(256)) * 3
  return icc(b"CMYK", {b"A2B0": data, b"A2B1": data}, b"Lab ", b"prtr")


def to_srgb(colour, columns, gamma: float | None) -> np.ndarray:
  """By the definition: to light, to XYZ, to the light of sRGB, to its levels."""
  value = np.array(colour) / 255
  light = value**gamma if gamma else np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
  light = np.clip(np.linalg.solve(np.array(SRGB), np.array(columns) @ light), 0, 1)
  return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def picture(mode: str, colour, profile: bytes | None, kind: str = "PNG") -> bytes:
  buffer = io.BytesIO()
  Image.new(mode, (96, 64), colour).save(buffer, kind, icc_profile=profile, **{"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {}))
  return buffer.getvalue()


def both(data: bytes) -> np.ndarray:
  """The colour of a picture, by each of the ways that decode it."""
  whole, fitted = decode_image(data), load_picture(data, 16, 24)
  assert (whole == whole[0, 0]).all() and (fitted == whole[0, 0]).all()
  return whole[0, 0].astype(int)


@pytest.mark.parametrize("columns, gamma", [(P3, None), (ADOBE, 2.19921875)], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_wide_colours_become_those_of_srgb(columns, gamma, kind):
  for colour in ((97, 197, 81), (120, 120, 120), (200, 60, 40), (255, 255, 255), (30, 40, 180)):
    lossless = decode_image(picture("RGB", colour, None, kind))[0, 0]
    assert np.abs(both(picture("RGB", colour, matrix(columns, gamma), kind)) - to_srgb(lossless, columns, gamma)).max() <= 1.5


def test_a_green_that_was_stored_as_display_p3_comes_back():
  assert np.abs(both(picture("RGB", (97, 197, 81), matrix(P3, None))) - (40, 200, 60)).max() <= 1
  assert both(picture("RGB", (97, 197, 81), None)).tolist() == [97, 197, 81]


def test_profiles_of_srgb_change_no_bit():
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
  for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), matrix(SRGB, None)):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=profile)
    assert (decode_image(buffer.getvalue()) == np.asarray(image)).all()


def test_ink_and_grey_have_profiles_of_their_own():
  assert np.abs(both(picture("CMYK", (255, 0, 0, 0), ink(), "TIFF")) - 119).max() <= 2  # L* 50
  assert both(picture("CMYK", (0, 0, 0, 0), ink(), "TIFF")).tolist() == [255] * 3
  assert both(picture("CMYK", (255, 0, 0, 0), None, "TIFF")).tolist() == [0, 255, 255]
  linear = icc(b"GRAY", {b"kTRC": curve(1.0)})
  for kind, mode, colour in (("PNG", "L", 55), ("PNG", "LA", (55, 255)), ("TIFF", "I;16", 55 * 257)):
    assert np.abs(both(picture(mode, colour, linear, kind)) - to_srgb([55] * 3, SRGB, 1.0)).max() <= 1.5
  expected = to_srgb([55] * 3, SRGB, 1.0)
  assert np.abs(both(picture("L", 55, matrix(SRGB, 1.0))) - expected).max() <= 1.5  # a grey picture may have a profile of colours


def test_transparency_and_palettes_keep_theirs():
  expected = to_srgb((97, 197, 81), P3, None)
  data = picture("RGBA", (97, 197, 81, 128), matrix(P3, None))
  assert np.abs(decode_image(data, keep_alpha=True)[0, 0] - [*expected, 128]).max() <= 1.5
  assert np.abs(both(data) - (expected * 128 / 255 + 127)).max() <= 2  # on white paper
  palette = Image.new("RGB", (48, 32), (97, 197, 81)).convert("P", palette=Image.Palette.ADAPTIVE)
  buffer = io.BytesIO()
  palette.save(buffer, "PNG", icc_profile=matrix(P3, None))
  assert np.abs(both(buffer.getvalue()) - expected).max() <= 1.5


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2, 3.0])
@pytest.mark.parametrize("alpha", [False, True])
def test_every_grey_is_converted_by_the_definition(gamma, alpha):
  levels = np.arange(256, dtype=np.uint8)
  image = Image.fromarray(np.tile(levels, (4, 1)))
  if alpha:
    image.putalpha(Image.fromarray(np.full((4, 256), 77, np.uint8)))
  expected = np.stack([to_srgb([level] * 3, SRGB, gamma) for level in levels])
  for profile in (icc(b"GRAY", {b"kTRC": curve(gamma)}), matrix(SRGB, gamma)):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=profile)
    pixels = decode_image(buffer.getvalue(), keep_alpha=alpha)
    assert np.abs(pixels[0, :, :3] - expected).max() <= 0.7  # half a level is rounding
    assert (pixels[..., 3:] == 77).all()


@pytest.mark.parametrize("profile", [icc(b"GRAY", {b"kTRC": curve(None)}), matrix(SRGB, None)], ids=["grey", "colours"])
def test_greys_with_the_curve_of_srgb_change_no_bit(profile):
  levels = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
  buffer = io.BytesIO()
  Image.fromarray(levels).save(buffer, "PNG", icc_profile=profile)
  assert (decode_image(buffer.getvalue()) == levels[..., None]).all()


def damaged() -> bytes:
  """A PNG whose profile cannot be decompressed."""
  data = picture("RGB", (97, 197, 81), None)
  chunk = b"iCCP" + b"made\0\0" + b"no zlib stream"
  return data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


@pytest.mark.parametrize("data, words", [
    (picture("RGB", (97, 197, 81), b"no profile" * 20), "a profile of 200 bytes cannot be used"),
    (picture("RGB", (97, 197, 81), ink()), "of CMYK colours, and the picture of RGB"),
    (picture("RGB", (97, 197, 81), icc(b"GRAY", {b"kTRC": curve(1.0)})), "of GRAY colours, and the picture of RGB"), (damaged(), "is damaged")],
    ids=["no profile", "of ink", "of grey", "damaged"])
@pytest.mark.parametrize("max_bytes", [colours.MAX_KEPT_BYTES, 10], ids=["kept", "too large to be kept"])
def test_a_profile_that_cannot_be_used_is_named_once_with_its_first_picture(data, words, max_bytes, caplog, monkeypatch):
  monkeypatch.setattr(colours, "_told", set())
  monkeypatch.setattr(colours, "MAX_KEPT_BYTES", max_bytes)
  for name in ("first.png", "second.png"):
    assert decode_image(data, name)[0, 0].tolist() == load_picture(data, 16, 24, name)[0, 0].tolist() == [97, 197, 81]
  assert len(caplog.messages) == 1
  assert words in caplog.messages[0] and "first.png" in caplog.messages[0] and "count as sRGB" in caplog.messages[0]


def test_only_small_profiles_are_kept(monkeypatch):
  colours._kept.cache_clear()
  profile, large = matrix(P3, None), matrix(P3, None) + bytes(1000)
  monkeypatch.setattr(colours, "MAX_KEPT_BYTES", len(profile))
  first = [both(picture("RGB", (97, 197, 81), one, "TIFF")).tolist() for one in (profile, large)]
  assert first[0] == first[1] != [97, 197, 81]
  info = colours._kept.cache_info()
  assert info.currsize == 1 and info.maxsize == colours.MAX_KEPT == 16


@pytest.mark.parametrize("max_px", [32, 1024], ids=["encoded anew", "kept to the byte"])
def test_curation_converts_once(max_px):
  data = picture("RGB", (97, 197, 81), matrix(P3, None))
  stored, (height, width) = encode.shrink(data, decode_image(data), max_px, "png", 90)
  assert (stored == data) == (max_px == 1024) and decode_image(stored).shape[:2] == (height, width)
  assert np.abs(both(stored) - (40, 200, 60)).max() <= 1
