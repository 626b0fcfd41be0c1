"""Damaged pictures of every format: each is either decoded or refused in one sentence that names it, soon and in bounded memory."""

import faulthandler
import io
import itertools
import re
import resource
import signal
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, features

from data_pipelines.transforms import load_picture

NUM_DAMAGED = 5000
SECONDS_EACH = 10  # of the processor
REFUSAL = re.compile(r"Cannot decode picture \d+ \(\d+ bytes\): [^\n]+; replace it or leave it out\.")


class TookTooLong(BaseException):
  """No Exception, which the code under test would take for a decoder's."""


def encode(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def photograph(seed):
  """48 x 40 px of smooth colour with some noise."""
  random = np.random.default_rng(seed)
  coarse = Image.fromarray(random.integers(0, 256, (6, 5, 3), np.uint8)).resize((48, 40), Image.Resampling.BICUBIC)
  return Image.fromarray(np.clip(np.asarray(coarse) + random.normal(0, 6, (40, 48, 3)), 0, 255).astype(np.uint8))


def whole_files():
  """Small files of all formats by name."""
  image, frames = photograph(0), [photograph(seed) for seed in range(1, 4)]
  clear = image.copy()
  clear.putalpha(photograph(9).convert("L"))
  deep = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (40, 48), np.uint16))
  floats = Image.fromarray(np.linspace(0, 1, 1920, dtype=np.float32).reshape(40, 48))
  exif = Image.Exif()
  exif.update({0x0112: 6, 0x010F: "maker " * 9})
  moving = {"save_all": True, "append_images": frames, "duration": 50}
  files = {
      "png": encode(image, "PNG"), "png alpha": encode(clear, "PNG", exif=exif), "png grey 16": encode(deep, "PNG"),
      "png palette": encode(image.quantize(17), "PNG", transparency=3), "png bits": encode(image.convert("1"), "PNG"),
      "png moving": encode(image, "PNG", **moving), "png grey alpha": encode(clear.convert("LA"), "PNG", icc_profile=bytes(range(256))),
      "jpeg": encode(image, "JPEG"), "jpeg progressive": encode(image, "JPEG", progressive=True, subsampling=0),
      "jpeg cmyk": encode(image.convert("CMYK"), "JPEG"), "jpeg turned": encode(image, "JPEG", exif=exif),
      "jpeg grey": encode(image.convert("L"), "JPEG"),
      "jpeg large": encode(image.resize((480, 400)), "JPEG", restart_marker_rows=1), "mpo": encode(image, "MPO", **moving),
      "webp": encode(image, "WEBP", exif=exif), "webp lossless": encode(clear, "WEBP", lossless=True), "webp moving": encode(image, "WEBP", **moving),
      "gif": encode(image, "GIF"), "gif moving": encode(image.quantize(9), "GIF", **moving), "bmp": encode(image, "BMP"),
      "bmp palette": encode(image.quantize(16), "BMP"), "ppm": encode(image, "PPM"), "pgm 16": encode(deep.convert("I"), "PPM"),
      "pbm plain": b"P1 4 2\n0110\n1001\n", "ppm plain": b"P3\n# two\n2 1\n255\n255 0 0  0 255 0\n", "tiff float": encode(floats, "TIFF"),
  }
  for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
    files[f"tiff {compression}"] = encode(image, "TIFF", compression=compression, exif=exif)
  files |= {"tiff 16": encode(deep, "TIFF"), "tiff cmyk": encode(image.convert("CMYK"), "TIFF", compression="tiff_lzw")}
  files["png interlaced"] = interlaced(image)
  if features.check("avif"):
    files |= {"avif": encode(image, "AVIF", speed=10), "avif alpha": encode(clear, "AVIF", speed=10, exif=exif)}
  return files


def interlaced(image):
  """Pillow reads Adam7 files but cannot write them."""
  def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

  pixels, passes = np.asarray(image), ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
  lines = b"".join(b"\0" + row.tobytes() for top, left, down, across in passes for row in pixels[top::down, left::across])
  header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def mended(data):
  """A PNG file with right checksums, so that what was changed reaches the decoder; other files as they are."""
  place, parts = 8, [data[:8]]
  while data.startswith(b"\x89PNG") and place < len(data):
    size = int.from_bytes(data[place:place + 4], "big")
    body = data[place + 4:place + 8 + size]
    parts.append(data[place:place + 4] + body + struct.pack(">I", zlib.crc32(body)))
    place += 12 + size
  return b"".join(parts) if len(parts) > 1 else data


def damaged(files, number):
  """The damaged file of a number, always the same one."""
  random = np.random.default_rng((7, number))
  data, other = (bytearray(files[random.integers(len(files))]) for _ in range(2))
  kind = number % 6
  if kind == 0:
    return bytes(data[:random.integers(len(data))])
  if kind in (1, 2):  # in the second case near the front, where the headers are
    places = random.integers(0, len(data) if kind == 1 else min(len(data), 300), int(50**random.random()) + 1)
    for place in places:
      data[place] ^= 1 << int(random.integers(8))
    return mended(bytes(data))
  first, last = sorted(random.integers(0, len(data), 2))
  if kind == 3:
    return random.bytes(int(random.integers(200)))
  if kind == 4:
    start = int(random.integers(len(other)))
    return bytes(data[:first] + other[start:start + int(random.integers(200))] + data[last:])
  keep = int(random.integers(4, min(len(data), 120)))
  return bytes(data[:keep]) + random.bytes(len(data) - keep)


def peak_bytes():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check(data, number, size):
  """Whether the picture was decoded; fails on anything but a picture of the right shape or a refusal."""
  # Where C code does not come back, no signal handler runs.
  faulthandler.dump_traceback_later(60 * SECONDS_EACH, exit=True, file=sys.__stderr__)
  signal.setitimer(signal.ITIMER_PROF, SECONDS_EACH)
  try:
    picture = load_picture(data, *size, f"picture {number}")
    assert picture.shape == (*size, 3) and picture.dtype == np.uint8
    return True
  except ValueError as error:
    assert REFUSAL.fullmatch(str(error)) and ". " not in str(error), str(error)
    return False
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def alarmed():
  """A signal handler that ends a decoder which hangs."""

  def stop(*_):
    raise TookTooLong

  before = signal.signal(signal.SIGPROF, stop)
  yield
  signal.signal(signal.SIGPROF, before)


def test_whole_files_are_decoded(alarmed):
  for name, data in whole_files().items():
    assert check(data, 0, (20, 24)), name


@pytest.mark.slow
def test_damaged_files_are_decoded_or_refused(alarmed, capsys, recwarn):
  files, sizes, before = list(whole_files().values()), itertools.cycle([(20, 24), (64, 16), (48, 48)]), peak_bytes()
  decoded = sum(check(damaged(files, number), number, next(sizes)) for number in range(NUM_DAMAGED))
  # Both ends are reached: neither is every file refused nor does nothing ever break.
  assert NUM_DAMAGED // 20 < decoded < NUM_DAMAGED // 2
  assert peak_bytes() - before < 1.5e9
  # From Python nothing is printed; libtiff, in C, writes a line to file 2 for some broken TIFFs.
  assert capsys.readouterr() == ("", "") and not recwarn.list
