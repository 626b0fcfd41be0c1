"""Samples to records: pictures no larger than training wants, in a compact format."""

import io
import json

import numpy as np
from PIL import ExifTags, Image

from data_pipelines import buckets
from data_pipelines.curation.sample import Sample

FORMATS = {"webp": "WEBP", "jpeg": "JPEG", "png": "PNG"}


def check(settings: dict) -> None:
  """Raises `ValueError` for settings of the section `encode` that cannot be."""
  for key in ("format", "synthetic_format"):
    if settings[key] not in FORMATS:
      raise ValueError(f"config.encode.{key} is {settings[key]!r}: choose one of {', '.join(FORMATS)}.")
  if not 1 <= settings["quality"] <= 100:
    raise ValueError(f"config.encode.quality is {settings['quality']}: choose 1 to 100.")
  if settings["max_px"] < 32:
    raise ValueError(f"config.encode.max_px is {settings['max_px']}: choose the largest resolution to train at, such as 1024.")


def record(sample: Sample, settings: dict, stage: int) -> dict:
  """The record of a sample, without its sample_id, see `data_pipelines.records`."""
  file_format = settings["synthetic_format" if sample.attributes.get("synthetic") else "format"]
  image, (height, width) = shrink(sample.image, sample.pixels, settings["max_px"], file_format, settings["quality"])
  sources = [shrink(data, pixels, settings["max_px"], file_format, settings["quality"])
             for data, pixels in zip(sample.sources, sample.source_pixels)]
  return {
      "image": image, "height": height, "width": width, "quality": float(sample.quality), "stage": stage,
      "has_text": bool(sample.tags.get("has_text", False)), "captions": [caption.text for caption in sample.captions],
      "languages": [caption.language for caption in sample.captions], "kinds": [caption.kind for caption in sample.captions],
      "attributes": json.dumps({**sample.attributes, "key": sample.key, "tags": sample.tags}, ensure_ascii=False, sort_keys=True),
      "sources": [data for data, _ in sources], "source_height": [size[0] for _, size in sources], "source_width": [size[1] for _, size in sources]}


def shrink(data: bytes, pixels: np.ndarray, max_px: int, file_format: str, quality: int) -> tuple[bytes, tuple[int, int]]:
  """(encoded picture, (height, width) in px): as large as its bucket at `max_px` needs, and no larger.

  A picture that is not too large and has a format of ours the right way up is kept to the byte: encoding it again could only lose.
  """
  height, width = pixels.shape[:2]
  scale = _wanted_scale(height, width, max_px)
  if scale >= 1 and _is_fit(data):
    return data, (height, width)
  image = Image.fromarray(pixels)
  if scale < 1:
    image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  options = {"png": {"compress_level": 6}, "jpeg": {"quality": quality, "subsampling": 0 if quality >= 95 else 2},
             "webp": {"quality": quality, "method": 4}}
  image.save(buffer, FORMATS[file_format], **options[file_format])
  return buffer.getvalue(), (image.height, image.width)


def _wanted_scale(height: int, width: int, max_px: int) -> float:
  """How much a picture can shrink and still cover the bucket that it goes to at the resolution `max_px`."""
  choice = buckets.make_buckets("t2i", max_px, buckets.RATIOS, 0, 1)
  bucket = choice[int(buckets.nearest_bucket(height, width, choice))]
  return max(bucket.height / height, bucket.width / width)


def _is_fit(data: bytes) -> bool:
  image = Image.open(io.BytesIO(data))
  return image.format in FORMATS.values() and not getattr(image, "is_animated", False) and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
