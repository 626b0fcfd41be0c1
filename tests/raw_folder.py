"""Folders of small pictures, some of them of no use in ten different ways."""

import collections
import io
import os
import pathlib
import zlib

import numpy as np
from PIL import Image


def picture(seed: int, height: int = 72, width: int = 96) -> Image.Image:
  """A picture of coloured blocks that no other seed's is near to."""
  blocks = np.random.default_rng((7, seed)).integers(0, 256, (6, 8, 3), np.uint8)
  return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, file_format: str = "JPEG", **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def bomb() -> bytes:
  """A PNG of a few bytes that says it has a billion pixels."""
  data = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
  data[16:24] = (32000).to_bytes(4, "big") * 2
  data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
  return bytes(data)


def dot(seed: int) -> Image.Image:
  """Plain paper with a dot, at a place that only seeds in the same 200 have."""
  image, (y, x) = Image.new("RGB", (90, 70), "white"), divmod(seed // 200, 5)
  image.paste("black", (8 + 16 * x, 14 + 36 * y, 10 + 16 * x, 16 + 36 * y))
  return image


GOOD = b"a caption"
# Ten ways to be of no use: (file name's end, picture, caption, the step that finds it, its reason).
WAYS = (
    (".jpg", lambda i: b"", GOOD, "broken", "unreadable"),
    (".jpg", lambda i: encoded(picture(i))[:500], GOOD, "broken", "undecodable"),
    (".png", lambda i: np.random.default_rng(i).bytes(3000), GOOD, "broken", "undecodable"),
    (".png", lambda i: bomb(), GOOD, "broken", "undecodable"),
    (".jpg", lambda i: encoded(picture(i)), None, "broken", "unreadable"),
    (".jpg", lambda i: encoded(picture(i)), b"caf\xe9 \xff", "broken", "unreadable"),
    (".png", lambda i: encoded(picture(i, 20, 24), "PNG"), GOOD, "min_resolution", "too_small"),
    (".jpg", lambda i: encoded(picture(0)), GOOD, "duplicate", "exact_duplicate"),
    (".png", lambda i: encoded(picture(1).resize((100 + i % 97, 90)), "PNG"), GOOD, "duplicate", "near_duplicate"),
    (".png", lambda i: encoded(dot(i), "PNG"), GOOD, "entropy", "too_plain"),
)

HELD = """
import pathlib, time
from data_pipelines.curation import funnel

curate = funnel.curate

def curate_two(job, *item):
  if len(list(pathlib.Path(job.work, "curated").glob("*.json"))) >= 2:
    time.sleep(600)
  return curate(job, *item)

funnel.curate = curate_two
"""


def held_after_two(folder: pathlib.Path) -> str:
  """A PYTHONPATH under which a worker curates no unit once two are done, so that a kill after the second finds some left."""
  folder.mkdir()
  (folder / "sitecustomize.py").write_text(HELD)  # which Python imports when it begins
  return os.pathsep.join((str(folder), str(pathlib.Path(__file__).parent.parent)))


def make_folder(folder: pathlib.Path, num: int, num_broken: int) -> collections.Counter:
  """Writes pictures with captions, `num_broken` of them broken in all ways in turn; returns the expected (step, reason) counts."""
  expected = collections.Counter()
  (folder / "more").mkdir(parents=True)
  every = num // num_broken if num_broken else num + 1
  for i in range(num):
    place = folder / ("more" if i % 3 == 2 else ".") / f"p{i:05d}"
    end, data, caption = ".jpg", encoded(picture(i)), f"picture {i}\nanother text of {i}".encode()
    if i >= 2 and i % every == every - 1 and sum(expected.values()) < num_broken:
      end, make, caption, step, reason = WAYS[sum(expected.values()) % len(WAYS)]
      data = make(i)
      expected[step, reason] += 1
    place.with_suffix(end).write_bytes(data)
    if caption is not None:
      place.with_suffix(".txt").write_bytes(caption)
  return expected
