"""What flows through curation: one picture with its captions, or one edit with its condition images."""

import dataclasses
import functools
from typing import Any

import numpy as np

from data_pipelines.transforms import decode_image


@dataclasses.dataclass(frozen=True)
class Caption:
  """A text that describes the picture, or the instruction of an edit. Kept to the letter: quoted text must be drawn verbatim."""
  text: str
  language: str = "en"
  kind: str = "general"


@dataclasses.dataclass(frozen=True)
class Drop:
  """Why an operator drops a sample: `reason` is one of a few words that are counted, `detail` one sentence about this sample."""
  reason: str
  detail: str = ""


@dataclasses.dataclass
class Sample:
  """A picture as it was found.

  Attributes:
    key: its name in the source, unique and stable, such as "cats/0001.jpg" or "part-3.csv:17".
    image: the encoded target picture.
    captions: at least one, unless `error` says otherwise, or the user keeps pictures without.
    sources: encoded condition images of an edit, in prompt order; empty for text-to-image.
    rejected: of a pair, the encoded picture of the same prompt that is worse than `image`; else empty.
    attributes: everything else that the source says; JSON-serialisable.
    quality: 0 to 1; 1 is clean.
    error: why the sample cannot be used at all (a missing file, captions that are not UTF-8), one sentence; "" if it can.
    tags: what operators found out, JSON-serialisable, such as {"has_text": True}; saved with the record.
  """
  key: str
  image: bytes = b""
  captions: list[Caption] = dataclasses.field(default_factory=list)
  sources: list[bytes] = dataclasses.field(default_factory=list)
  attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
  quality: float = 1.0
  error: str = ""
  tags: dict[str, Any] = dataclasses.field(default_factory=dict)
  rejected: bytes = b""

  @functools.cached_property
  def pixels(self) -> np.ndarray:
    """The target, uint8 H W 3, upright and on white; `ValueError` if it cannot be decoded."""
    return decode_image(self.image, self.key)

  @functools.cached_property
  def source_pixels(self) -> list[np.ndarray]:
    """The condition images, uint8 h w 3 each; `ValueError` if one cannot be decoded."""
    return [decode_image(data, f"condition image {i + 1} of {self.key}") for i, data in enumerate(self.sources)]

  @functools.cached_property
  def rejected_pixels(self) -> np.ndarray | None:
    """The rejected picture, uint8 H W 3, None where there is none; `ValueError` if it cannot be decoded, or has another shape than the target.

    Both are fitted to one bucket. Their aspect ratios may differ by what rounding a side to a pixel does, and not more: else what is cut off would
    tell them apart.
    """
    if not self.rejected:
      return None
    pixels = decode_image(self.rejected, f"the rejected picture of {self.key}")
    (height, width), (own_height, own_width) = self.pixels.shape[:2], pixels.shape[:2]
    if abs(height * own_width - width * own_height) > max(height, width, own_height, own_width):
      raise ValueError(f"The pictures of the pair {self.key} are {height} x {width} and {own_height} x {own_width} px: give both one aspect ratio.")
    return pixels

  @functools.cached_property
  def gray(self) -> np.ndarray:
    """The target's luma (ITU-R BT.601), uint8 H W."""
    return np.rint(self.pixels @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.uint8)
