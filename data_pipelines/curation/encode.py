"""Samples to records: pictures no larger than training wants, in a compact format."""

import functools
import io
import json

import numpy as np
from PIL import ExifTags, Image

from data_pipelines import buckets
from data_pipelines.curation.sample import Sample
from data_pipelines.transforms import load_picture

FORMATS = {"webp": "WEBP", "jpeg": "JPEG", "png": "PNG"}


def check(settings: dict) -> None:
  """Raises `ValueError` for settings of the section `encode` that cannot be."""
  for key in ("format", "synthetic_format"):
    if settings[key] not in FORMATS:
      raise ValueError(f"config.encode.{key} is {settings[key]!r}: choose one of {', '.join(FORMATS)}.")
  if not 1 <= settings["quality"] <= 100:
    raise ValueError(f"config.encode.quality is {settings['quality']}: choose 1 to 100.")
  if settings["alpha"] and "jpeg" in (settings["format"], settings["synthetic_format"]):
    raise ValueError("config.encode.alpha keeps transparency, which a JPEG has not: choose webp or png for config.encode.format and "
                     "config.encode.synthetic_format.")
  if settings["max_px"] < 32:
    raise ValueError(f"config.encode.max_px is {settings['max_px']}: choose the largest resolution to train at, such as 1024.")


def record(sample: Sample, settings: dict, stage: int) -> dict:
  """The record of a sample, without its sample_id, see `data_pipelines.records`."""
  file_format = settings["synthetic_format" if sample.attributes.get("synthetic") else "format"]
  small = functools.partial(shrink, max_px=settings["max_px"], file_format=file_format, quality=settings["quality"], alpha=settings["alpha"])
  image, (height, width) = small(sample.image, sample.pixels)
  rejected = small(sample.rejected, sample.rejected_pixels)[0] if sample.rejected else b""
  sources = [small(data, pixels) for data, pixels in zip(sample.sources, sample.source_pixels)]
  return {
      "image": image, "rejected": rejected, "height": height, "width": width, "quality": float(sample.quality), "stage": stage,
      "has_text": bool(sample.tags.get("has_text", False)), "captions": [caption.text for caption in sample.captions],
      "languages": [caption.language for caption in sample.captions], "kinds": [caption.kind for caption in sample.captions],
      "attributes": json.dumps(_attributes(sample), ensure_ascii=False, sort_keys=True),
      "sources": [data for data, _ in sources], "source_height": [size[0] for _, size in sources], "source_width": [size[1] for _, size in sources]}


def _attributes(sample: Sample) -> dict:
  """What the source says, with the sample's name there and what curation found out: `key` and `tags`; or where the source has keys of these names of
  its own, `curation` with both."""
  ours, name = {"key": sample.key, "tags": sample.tags}, "curation"
  if not ours.keys() & sample.attributes.keys():
    return sample.attributes | ours
  while name in sample.attributes:
    name += "_"
  return sample.attributes | {name: ours}


def shrink(data: bytes, pixels: np.ndarray, max_px: int, file_format: str, quality: int, alpha: bool = False) -> tuple[bytes, tuple[int, int]]:
  """(encoded picture, (height, width) in px): as large as its bucket at `max_px` needs, and no larger.

  A picture that is not too large and has a format of ours the right way up is kept to the byte: encoding it again could only lose. One that is
  encoded anew is on white paper, as `pixels` are; with `alpha` it keeps its transparency, and is scaled premultiplied.
  """
  height, width = pixels.shape[:2]
  scale = _wanted_scale(height, width, max_px)
  if scale >= 1 and _is_fit(data):
    return data, (height, width)
  size = (max(1, round(width * scale)), max(1, round(height * scale))) if scale < 1 else (width, height)
  clear = load_picture(data, size[1], size[0], alpha=True) if alpha else None
  if clear is not None and clear[..., 3].min() < 255:
    image = Image.fromarray(clear)
  else:
    image = Image.fromarray(pixels)
    image = image.resize(size, Image.Resampling.LANCZOS) if scale < 1 else image
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
