"""Decoding whatever comes, cropping around the centre, and clear words for broken files."""

import concurrent.futures
import functools
import io
import itertools
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines import transforms
from data_pipelines.transforms import decode_image, encode_png, load_picture, resize_crop


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


@pytest.mark.parametrize("sides", [(49, 17), (47, 61), (1001, 1499)])
def test_rounding_never_leaves_the_picture(sides):
  image = np.full((*sides, 3), 90, np.uint8)
  for scale in (1.3, 2.01, 3.99, 7.9, 11):
    size = max(1, int(sides[0] / scale)), max(1, int(sides[1] / scale * 0.8))
    assert (resize_crop(image, *size) == 90).all()


# ---- one step from file to bucket ---------------------------------------------------------------


def photograph(height, width, seed=0):
  """Octaves of smooth noise with discs: detail of all sizes and hard edges."""
  random, pixels = np.random.default_rng(seed), np.full((height, width, 3), 128.0)
  for octave in range(1, 8):
    for channel in range(3):
      coarse = Image.fromarray(random.normal(size=(2**octave + 1, 2**octave + 1)).astype(np.float32))
      pixels[..., channel] += 60 * 1.5**-octave * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
  y, x = np.mgrid[:height, :width]
  for _ in range(8):
    radius = height / 20 + random.random() * height / 5
    pixels[np.hypot(y - random.random() * height, x - random.random() * width) < radius] += random.normal(size=3) * 40
  return np.clip(pixels, 0, 255).astype(np.uint8)


def jpeg(pixels, orientation=1, **options):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encode(Image.fromarray(pixels), "JPEG", **{"quality": 90, "subsampling": "4:2:0", "exif": exif} | options)


def slow_way(data, height, width):
  return resize_crop(decode_image(data), height, width)


def psnr(first, second):
  return 10 * np.log10(255**2 / max(1e-9, ((first.astype(float) - second) ** 2).mean()))


def shift_px(first, second):
  """How far the first picture lies down and right of the second, by least squares on the gradient."""
  slopes = np.stack([slope.ravel() for slope in np.gradient(second.astype(float), axis=(0, 1))], 1)
  return -np.linalg.lstsq(slopes, (first.astype(float) - second).ravel(), rcond=None)[0]


@pytest.fixture(scope="module")
def photo():
  return photograph(701, 1003)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1, 1.3, 2, 2.7, 4.1, 8.1, 10])
def test_one_step_equals_two(photo, scale, orientation):
  data = jpeg(photo, orientation)
  size = int(701 / scale), int(1003 / scale * 0.8)
  size = size[::-1] if orientation > 4 else size
  fast, slow = load_picture(data, *size), slow_way(data, *size)
  assert fast.shape == (*size, 3) and fast.dtype == np.uint8
  assert psnr(fast, slow) > (45 if scale < 2 else 40)
  assert np.abs(shift_px(fast, slow)).max() < 0.05
  assert np.abs(fast.mean((0, 1)) - slow.mean((0, 1))).max() < 0.2


def test_the_measure_of_shift_sees_a_tenth_of_a_pixel(photo):
  image = Image.fromarray(photo)
  moved, still = (np.array(image.resize((250, 170), Image.Resampling.LANCZOS, box=(8 - by, 8, 1003 - 8 - by, 693))) for by in (0.4, 0))
  assert shift_px(moved, still)[1] == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(("size", "drawn"), [((700, 1000), (1003, 701)), ((350, 501), (502, 351)), ((351, 501), (1003, 701)),
                                             ((175, 200), (251, 176)), ((20, 20), (126, 88))])
def test_a_jpeg_is_decoded_no_larger_than_needed_and_never_too_small(photo, monkeypatch, size, drawn):
  seen, fit = [], transforms._fit
  monkeypatch.setattr(transforms, "_fit", lambda image, *rest: seen.append(image.size) or fit(image, *rest))
  load_picture(jpeg(photo), *size)
  load_picture(jpeg(photo, orientation=6), *size[::-1])
  assert seen == [drawn, drawn]


def in_mode(pixels, mode):
  return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)


def writable():
  """The (format, mode) pairs that Pillow can write: not every format has every mode."""
  for kind, mode in itertools.product(("PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP", "PPM", "AVIF"),
                                      ("L", "P", "1", "CMYK", "RGBA", "LA", "I;16", "RGB")):
    try:
      encode(in_mode(np.zeros((4, 4, 3), np.uint8), mode), kind)
    except (OSError, ValueError):
      continue
    yield kind, mode


def test_most_pairs_can_be_written():
  assert len(list(writable())) > 48


@pytest.mark.parametrize(("kind", "mode"), writable())
def test_all_formats_and_modes_come_out_alike(photo, kind, mode):
  data = encode(in_mode(photo[:40, :56], mode), kind)
  assert np.abs(load_picture(data, 30, 30).astype(int) - slow_way(data, 30, 30)).max() <= 1


def test_cmyk_of_adobe_is_not_inverted():
  data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
  assert b"Adobe" in data
  assert np.abs(load_picture(data, 8, 8).astype(int) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_not_clipped(kind):
  ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(1, 64).repeat(4, 0)
  image = Image.fromarray(ramp.astype(np.int32) if kind == "PPM" else ramp)
  expected = np.round(ramp / 257)[..., None]
  assert np.abs(decode_image(encode(image, kind)) - expected).max() <= 0.51
  assert np.abs(load_picture(encode(image, kind), 4, 64) - expected).max() <= 0.51


def test_a_clear_grey_level_of_16_bits_is_white():
  image = Image.fromarray(np.array([[0, 1000, 65535]], np.uint16))
  data = encode(image, "PNG", transparency=1000)
  assert decode_image(data)[0, :, 0].tolist() == [0, 255, 255]
  assert decode_image(data, keep_alpha=True)[0, :, 3].tolist() == [255, 0, 255]


@pytest.mark.parametrize(("values", "good"), [((0, 0.5, 1), True), ((0, 0.5, 1.5), False), ((-1, 0, 1), False), ((0, np.nan, 1), False)])
def test_floats_count_from_0_to_1(values, good):
  data = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
  if good:
    assert decode_image(data)[0, :, 0].tolist() == [0, 128, 255]
  else:
    with pytest.raises(ValueError, match="Cannot decode a.tif .*: its grey levels do not lie between 0 and 1.0; replace it"):
      load_picture(data, 1, 3, "a.tif")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_rotation_is_applied_in_every_format(kind):
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera's top lies right
  image = Image.new("RGB", (32, 16), "white")
  image.paste("black", (0, 0, 16, 16))
  data = encode(image, kind, exif=exif)
  for pixels in (decode_image(data), load_picture(data, 32, 16)):
    assert pixels.shape == (32, 16, 3) and pixels[:14].max() < 40 and pixels[18:].min() > 215


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
  data = encode(Image.new("RGB", (16, 16), "red"), kind, save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")], duration=40)
  assert np.abs(load_picture(data, 8, 8).astype(int) - (255, 0, 0)).max() < 6


def test_clear_colours_are_white():
  palette = Image.new("P", (8, 8), 1)
  palette.putpalette([0, 0, 0, 255, 0, 0])
  for data in (encode(palette, "PNG", transparency=1), encode(palette, "GIF", transparency=1), encode(Image.new("LA", (8, 8), (0, 0)), "PNG")):
    assert (load_picture(data, 4, 4) == 255).all() and (decode_image(data) == 255).all()


# ---- refusals ------------------------------------------------------------------------------------


def chunk(kind, body):
  return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *chunks):
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + b"".join(chunks) + chunk(b"IEND", b"")


@functools.cache
def zeros(num):
  return zlib.compress(bytes(num), 9)


def bomb(kind):
  """A file of some kilobytes that wants much memory or time."""
  if kind == "text":
    return png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros(200_000_000)))
  if kind == "many texts":
    return png(8, 8, *[chunk(b"zTXt", b"a%d\0\0" % i + zeros(1_000_000)) for i in range(200)])
  if kind == "sides":
    return png(60000, 60000, chunk(b"IDAT", zeros(200_000_000)))
  if kind == "above the limit":
    return png(10000, 9000, chunk(b"IDAT", zeros(200_000_000)))
  if kind == "webp":
    return b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x07\x10\x07\x10\x11\x11\x88\x88\xfe\x07\0"
  data = encode(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
  last = data.rindex(b"\xff\xda")
  return data[:last] + data[last:-2] * 5000 + data[-2:]


@pytest.mark.parametrize(("kind", "reason"), [("text", "data too large"), ("many texts", "Too much memory"), ("sides", "Image size .* exceeds limit"),
                                              ("above the limit", "its 10000 x 9000 px are more"), ("webp", "its 16384 x 8192 px are more"),
                                              ("scans", "it has more than 256 scans")])
def test_bombs_are_refused_soon_and_in_little_memory(kind, reason):
  data = bomb(kind)
  before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
  for decode in (lambda: decode_image(data, "bomb"), lambda: load_picture(data, 64, 64, "bomb")):
    with pytest.raises(ValueError, match=rf"Cannot decode bomb \(\d+ bytes\): .*{reason}.*; replace it or leave it out\.$"):
      decode()
  assert time.process_time() - start < 3
  unit = 1 if sys.platform == "darwin" else 1024
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 300e6


def test_files_without_pixels_or_of_other_kinds_are_refused():
  script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
  gif = b"GIF89a\0\0\0\0\x80\0\0" + bytes(6) + b";"
  cases = {b"": "the file is empty", png(0, 5): "no readable header", gif: "no readable header", script: "no readable header of JPEG, PNG"}
  for data, reason in cases.items():
    with pytest.raises(ValueError, match=f"Cannot decode x .*{reason}.*; replace"):
      load_picture(data, 4, 4, "x")


def test_sides_must_be_positive():
  for size in ((0, 4), (4, -1)):
    with pytest.raises(ValueError, match=f"Cannot fit x to {size[0]} x {size[1]} px: give sides of at least 1"):
      load_picture(encode_png(np.zeros((4, 4, 3), np.uint8)), *size, "x")


@pytest.mark.parametrize("error", [struct.error("short"), KeyError("tag"), AssertionError(), MemoryError(), OverflowError("big"), zlib.error("bad")])
def test_whatever_a_decoder_raises_is_one_sentence(monkeypatch, error):

  def fail(*_, **__):
    raise error

  monkeypatch.setattr(Image, "open", fail)
  with pytest.raises(ValueError, match=rf"Cannot decode x \(1 bytes\): {type(error).__name__}.*; replace"):
    load_picture(b"x", 4, 4, "x")


def test_an_interrupt_is_not_a_broken_file(monkeypatch):

  def interrupt(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(Image, "open", interrupt)
  with pytest.raises(KeyboardInterrupt):
    decode_image(b"x")


def broken_exif():
  """A JPEG whose EXIF makes Pillow warn."""
  data = encode(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\0\0\0\xff\0\0\0")
  with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    Image.open(io.BytesIO(data)).getexif()
  assert seen, "this Pillow does not warn"
  return data


def test_pillow_prints_nothing():
  code = "import sys; from data_pipelines.transforms import load_picture; print(load_picture(sys.stdin.buffer.read(), 4, 4).shape)"
  done = subprocess.run([sys.executable, "-W", "always", "-c", code], input=broken_exif(), capture_output=True, check=True)
  assert done.stdout.strip() == b"(4, 4, 3)" and b"PIL" not in done.stderr and b"EXIF" not in done.stderr


def test_threads_do_not_disturb_each_other(photo):
  files = [jpeg(photo), jpeg(photo, orientation=6), encode(Image.fromarray(photo[:99, :99]), "PNG")] * 8
  decode_image(files[0])
  before = list(warnings.filters)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    pictures = list(pool.map(lambda data: load_picture(data, 64, 64), files))
  assert all((picture == load_picture(data, 64, 64)).all() for picture, data in zip(pictures, files))
  assert warnings.filters == before
