"""Decoding whatever comes, cropping around the centre, and clear words for broken files."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.transforms import decode_image, encode_png, resize_crop


def encode(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def test_png_is_lossless():
  image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
  assert (decode_image(encode_png(image)) == image).all()


def test_every_mode_becomes_rgb():
  for mode in ("L", "P", "1", "CMYK", "RGBA", "LA", "I;16"):
    image = Image.new(mode, (5, 7)) if mode == "I;16" else Image.new("RGB", (5, 7), "red").convert(mode)
    decoded = decode_image(encode(image, "TIFF"))
    assert decoded.shape == (7, 5, 3) and decoded.dtype == np.uint8


def test_transparency_is_white():
  assert (decode_image(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG")) == 255).all()


def test_rotation_of_cameras_is_applied():
  exif = Image.Exif()
  exif[0x0112] = 6
  assert decode_image(encode(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).shape == (20, 10, 3)


def test_broken_files_are_named():
  data = encode_png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
  for broken in (data[:len(data) // 2], data[:20], b"", b"not an image", b"\x89PNG" + data[4:40]):
    with pytest.raises(ValueError, match=f"Cannot decode cat.png .{len(broken)} bytes"):
      decode_image(broken, "cat.png")


def test_crop_keeps_the_centre():
  image = np.zeros((40, 80, 3), np.uint8)
  image[:, 20:60] = 200
  assert (resize_crop(image, 40, 40) == 200).all()
  assert (resize_crop(image.transpose(1, 0, 2), 40, 40) == 200).all()


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (96, 32), (300, 200), (3, 2)])
def test_crop_has_the_asked_size_and_keeps_flat_colour(size):
  image = np.full((96, 128, 3), (10, 200, 90), np.uint8)
  cut = resize_crop(image, *size)
  assert cut.shape == (*size, 3) and (cut == image[0, 0]).all()


def test_large_reduction_agrees_with_the_exact_one():
  ramp = np.linspace(0, 255, 1024).astype(np.uint8)
  image = np.broadcast_to(ramp[None, :, None], (1024, 1024, 3)).copy()
  exact = np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
  assert np.abs(resize_crop(image, 64, 64) - exact).max() <= 2
