"""Where text stands in a picture, and how large, with the two operators that ask: RapidOCR (PP-OCRv6 small), whose wheel brings its models.

A box counts once its words were read with a score of 0.6: the detector alone takes fur, coins and railings for text. A single sign needs 0.9,
because discs are read as O, 8 or ● with less. Scripts other than Latin, Greek, Chinese and Japanese are therefore missed, and so is text below some
eight pixels.
"""

import dataclasses
import functools
import importlib.util

import cv2
import numpy as np

from data_pipelines.curation.sample import Drop, Sample

MIN_SCORE = 0.6
MIN_SIGN_SCORE = 0.9
_KEY = "_text_boxes"


@dataclasses.dataclass(frozen=True)
class TextBox:
  """A line of text. `char_px` is the shorter side of its box, so that vertical text counts too: the font size and up to 8 px more."""
  text: str
  char_px: float
  area_px: float


@dataclasses.dataclass(frozen=True)
class SmallText:
  """Drops pictures where more than max_share of the lines of text are lower than min_char_px once the area is reduced to base_px^2.

  Pictures with fewer than min_lines lines are kept: a number plate or a label does not make a page of small print.
  """
  min_char_px: float = 12.0
  base_px: int = 1024
  max_share: float = 0.5
  min_lines: int = 3

  def __post_init__(self):
    check_installed()

  def __call__(self, sample: Sample) -> Drop | None:
    height, width = sample.pixels.shape[:2]
    scale = min(1.0, self.base_px / (height * width) ** 0.5)
    heights = [box.char_px * scale for box in text_boxes(sample)]
    small = sum(one < self.min_char_px for one in heights)
    if len(heights) < max(1, self.min_lines) or small <= self.max_share * len(heights):
      return None
    return Drop("small_text", f"{small} of {len(heights)} lines, a share above {self.max_share}, are lower than {self.min_char_px} px "
                              f"at {self.base_px}^2: the lowest has {min(heights):.1f} px.")


@dataclasses.dataclass(frozen=True)
class TextRich:
  """Never drops. Tags: has_text, num_text_boxes, text_share (of the area, 0 to 1), smallest_text_px (in the file; 0 without text)."""

  def __post_init__(self):
    check_installed()

  def __call__(self, sample: Sample) -> Drop | None:
    boxes, area = text_boxes(sample), sample.pixels.shape[0] * sample.pixels.shape[1]
    sample.tags.update(has_text=bool(boxes), num_text_boxes=len(boxes), text_share=round(min(1.0, sum(box.area_px for box in boxes) / area), 4),
                       smallest_text_px=round(min((box.char_px for box in boxes), default=0.0), 1))
    return None


def text_boxes(sample: Sample) -> list[TextBox]:
  """Returns the lines of text in the target; read once per sample and kept beside its cached pixels, outside what is saved."""
  if _KEY not in vars(sample):
    vars(sample)[_KEY] = read_text(sample.pixels)
  return vars(sample)[_KEY]


def read_text(pixels: np.ndarray) -> list[TextBox]:
  """Returns the lines of text in a uint8 H W 3 picture, top to bottom; longer sides are reduced to 2000 px before reading."""
  # RapidOCR takes OpenCV's channel order.
  found = _engine()(np.ascontiguousarray(pixels[..., ::-1]))
  if found.txts is None:
    return []
  return [_text_box(corners, text) for corners, text, score in zip(found.boxes, found.txts, found.scores)
          if len(text.strip()) > 1 and any(map(str.isalnum, text)) or score >= MIN_SIGN_SCORE and text.strip().isalnum()]


def check_installed() -> None:
  """Raises `ValueError` if the OCR library is missing."""
  if importlib.util.find_spec("rapidocr") is None:
    raise ValueError("wants OCR: pip install rapidocr, or take the operator out of the list.")


def _text_box(corners: list, text: str) -> TextBox:
  points = np.array(corners, np.float32)
  sides = np.linalg.norm(points - np.roll(points, -1, axis=0), axis=1)
  return TextBox(text, float(min(sides[0] + sides[2], sides[1] + sides[3]) / 2), float(cv2.contourArea(points)))


@functools.cache
def _engine():
  # Imported at the first picture: lists without OCR need not have it installed. One thread: curation runs one process per core.
  from rapidocr import RapidOCR
  cv2.setNumThreads(1)
  threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
  return RapidOCR(params={**threads, "Global.use_cls": False, "Global.text_score": MIN_SCORE, "Global.log_level": "error"})
