"""Shapes a batch can have.

A jitted step is compiled once per shape, so every image is fitted to one of a few sizes of nearly equal area. For an
area A = base_px^2 and a ratio r = width / height the sides are (diffusers 0.42.1, the Qwen-Image-2.1 pipeline):

  width = round(sqrt(A r) / m) m,   height = round(sqrt(A r) / r / m) m                                             (1)

with m = 32 px, one slot of the vision encoder. Small experiments without source images can take m = 16, one latent
cell.
"""

import dataclasses
import math
from typing import Any

import numpy as np

_LANDSCAPE = ("3:2", "4:3", "5:4", "16:9", "2:1", "21:9", "3:1")

_TIE = 1e-9

# Width to height, the list of the prompt enhancer with its transposes.
RATIOS = ("1:1",) + _LANDSCAPE + tuple(":".join(reversed(ratio.split(":"))) for ratio in _LANDSCAPE)


@dataclasses.dataclass(frozen=True)
class Bucket:
  """One static batch shape: sides in px, M prompt tokens, the number of rows of the global batch, and what stands in place of pixels: None, or
  the `data_pipelines.cache.Cache` that the records hold. With `alpha` pixels have four channels, with `pairs` rows have a rejected picture
  beside their target, and with `weighted` each has a weight of its loss."""

  task: str
  height: int
  width: int
  source_sizes: tuple[tuple[int, int], ...] = ()
  cache: Any = None
  alpha: bool = dataclasses.field(default=False, kw_only=True, repr=False)  # no part of the repr, of which the order of batches is a digest
  pairs: bool = dataclasses.field(default=False, kw_only=True, repr=False)
  weighted: bool = dataclasses.field(default=False, kw_only=True, repr=False)
  num_tokens: int = dataclasses.field(kw_only=True)
  batch_size: int = dataclasses.field(kw_only=True)

  @property
  def image_channels(self) -> int:
    """Channels of the pixels: 3 for RGB, 4 for RGBA."""
    return 4 if self.alpha else 3


def parse_ratio(ratio: float | str) -> float:
  """Returns width / height of "w:h" or of a number; `ValueError` for anything else or if it is not positive."""
  try:
    width, height = ratio.split(":") if isinstance(ratio, str) else (ratio, 1)
    value = float(width) / float(height)
  except (TypeError, ValueError, ZeroDivisionError) as error:
    raise ValueError(f"Ratio {ratio!r} is not understood: write it as 'width:height' or as a number.") from error
  if not 0 < value < math.inf:
    raise ValueError(f"Ratio {ratio!r} must be positive and finite.")
  return value


def bucket_size(base_px: int, ratio: float | str, multiple: int = 32) -> tuple[int, int]:
  """Returns (height, width) in px for the area base_px^2 by equation (1); `ValueError` if a side rounds to nothing."""
  value = parse_ratio(ratio)
  side = math.sqrt(base_px * base_px * value)
  height, width = round(side / value / multiple) * multiple, round(side / multiple) * multiple
  if not height or not width:
    raise ValueError(f"Ratio {ratio!r} at {base_px} px has a side below half of {multiple} px: use a larger base_px.")
  return height, width


def make_buckets(task: str, base_px: int, ratios: tuple, num_tokens: int, batch_size: int, multiple: int = 32,
                 source_sizes: tuple = ()) -> tuple[Bucket, ...]:
  """Returns one bucket per distinct size; at small areas several ratios round to one size, which is kept once."""
  sizes = dict.fromkeys(bucket_size(base_px, ratio, multiple) for ratio in ratios)
  return tuple(Bucket(task, *size, source_sizes=source_sizes, num_tokens=num_tokens, batch_size=batch_size) for size in sizes)


def nearest_bucket(height, width, buckets: tuple[Bucket, ...]) -> np.ndarray:
  """Returns the index of the bucket nearest in log aspect ratio, the first one of equals.

  `height` and `width` are numbers or arrays of one shape, which is the shape of the answer.
  """
  ratios, first = np.unique([bucket.width / bucket.height for bucket in buckets], return_index=True)
  # Halfway in the logarithm. Mirror-image distances are true ties, which must not hang on the last bit of a quotient.
  halfway = np.sqrt(ratios[:-1] * ratios[1:]) * np.where(first[:-1] < first[1:], 1 + _TIE, 1 - _TIE)
  return first[np.searchsorted(halfway, np.asarray(width, np.float64) / np.asarray(height, np.float64))]


def crop_fraction(height, width, bucket_height: int, bucket_width: int) -> np.ndarray:
  """Returns the share of the picture's area, 0 to 1, that a cover-and-crop to the bucket cuts off."""
  change = np.asarray(width, np.float64) * bucket_height / (np.asarray(height, np.float64) * bucket_width)
  return 1 - np.minimum(change, 1 / change)


def shown_whole(height: int, width: int, size: tuple[int, int], max_crop: float) -> tuple[int, int] | None:
  """Returns the sides (height, width) at which a condition image of these sides is laid on white paper of the given size, because filling that would
  cut more than `max_crop` off; None where it does not."""
  if crop_fraction(height, width, *size) <= max_crop:
    return None
  scale = min(size[0] / height, size[1] / width)
  return max(1, min(size[0], round(height * scale))), max(1, min(size[1], round(width * scale)))
