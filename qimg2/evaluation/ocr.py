"""The text in a picture, by RapidOCR: PP-OCRv6 small detects and recognises; its two models are in the package's wheel, nothing is downloaded.

What it can read is what its recogniser has a character for: Latin with the accents of Western, Northern and Central Europe, Greek, Chinese
(simplified and traditional) and Japanese. Cyrillic, Arabic, Hebrew, Devanagari, Hangul and Thai are not among them; `unreadable` says so for a text,
so that a prompt in such a script is left out and not scored 0. `model` names another recogniser; the detector stays. It is an ONNX file with its
characters in the metadata, as those that RapidOCR publishes for PP-OCRv5 (`eslav`, `arabic`, `devanagari`, `korean`, `th`), or with PaddleOCR's
dictionary beside it, a character a line: FILE.txt beside FILE.onnx. Of several the first that has all characters of a text reads it
(`recogniser_for`).

A line counts if it has a letter or digit and a confidence of 0.5, as in PaddleOCR; a letter or digit alone needs 0.9, because discs and rings are
read as O or 8 with up to 0.83. Text that stands on its head is not turned first: a picture should not be paid for it.
Pictures whose shorter side is below 736 px are enlarged to it for the detector, longer sides above 2,000 px reduced. One thread: suites run one
process per core.

Reading order: boxes whose heights overlap by half of the lower one share a row, rows go from top to bottom and within them boxes from left to right;
but where at least two rows in succession leave a common vertical strip empty, with two boxes or more on each side, these are columns: each is read
whole, the left one first. So a table with two rows or more is read by columns.
"""

import functools
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qimg2.evaluation.prompt_files import read_text
from qimg2.evaluation.text import normalise

MIN_CONFIDENCE = 0.5
MIN_CONFIDENCE_ALONE = 0.9  # of a letter or digit that is a line
MAX_RATIO = 32  # of the sides: the detector enlarges the shorter one to 736 px, and the longer one with it
BUNDLED = "bundled"  # names the recogniser that comes with the package among others
DETECTOR, RECOGNISER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"
_INSTALL = "pip install -r requirements.txt, or take the suites that read text out of the list"


class Line(NamedTuple):
  """A line of text: what it says, its corners ((x, y), ...) in px clockwise from the upper left one, and the recogniser's confidence in 0..1."""
  text: str
  corners: tuple[tuple[float, float], ...]
  confidence: float

  @property
  def sides(self) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the upright box around it, in px."""
    return (*np.min(self.corners, 0).tolist(), *np.max(self.corners, 0).tolist())


def read(picture: np.ndarray, model: str = "") -> list[Line]:
  """The lines of text of a picture [H, W, 3] uint8, in reading order; none where there is no text.

  Raises:
    ValueError: the package or a model is missing, or the picture is of another kind, or a strip that the detector would enlarge beyond any memory.
  """
  if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
    raise ValueError(f"OCR reads a picture [H, W, 3] of uint8, not {list(picture.shape)} of {picture.dtype}.")
  if min(picture.shape[:2]) * MAX_RATIO < max(picture.shape[:2]):
    raise ValueError(f"OCR cannot read a strip of {picture.shape[0]} x {picture.shape[1]} px: one side may be at most {MAX_RATIO} times the other.")
  found = _engine(model)(np.ascontiguousarray(picture[..., ::-1]))  # OpenCV's channel order
  if found.txts is None:
    return []
  return in_reading_order([Line(text, tuple(map(tuple, corners.tolist())), float(confidence))
                           for text, corners, confidence in zip(found.txts, found.boxes, found.scores) if _counts(text, confidence)])


def _counts(text: str, confidence: float) -> bool:
  """Whether a line is text rather than something round or striped that was taken for it."""
  return any(map(str.isalnum, text)) and (len(text.strip()) > 1 or confidence >= MIN_CONFIDENCE_ALONE)


def recogniser_for(text: str, models: str = "") -> tuple[str, str]:
  """(recogniser, the characters of a text that it lacks): the first that lacks none, else the first that lacks fewest.

  Args: the text; paths of recognisers with + between, `BUNDLED` among them for that of the package; "" for that alone.

  Raises:
    ValueError: the package or a model is missing.
  """
  found = [(model, unreadable(text, model)) for model in recognisers(models)]
  return min(found, key=lambda one: len(one[1]))


def recognisers(models: str) -> list[str]:
  """The recognisers that a setting names, each as `read` takes it.

  Raises:
    ValueError: a name between two + is empty.
  """
  names = [name.strip() for name in models.split("+")] if models else [BUNDLED]
  if "" in names:
    raise ValueError(f"The recognisers {models!r} of the OCR have an empty name: give paths with + between, such as {BUNDLED}+FILE.onnx.")
  return ["" if name == BUNDLED else name for name in names]


def unreadable(text: str, model: str = "") -> str:
  """The letters, marks and digits of a text that the recogniser has no character for, each once, in order; "" if it can read all.

  Punctuation does not count: a recogniser without German quotes reads German. Nor does case, because no score looks at it.

  Raises:
    ValueError: the package or a model is missing.
  """
  known = alphabet(model)
  return "".join(dict.fromkeys(c for c in normalise(text) if unicodedata.category(c)[0] in "LMN" and c not in known))


@functools.cache
def alphabet(model: str = "") -> frozenset[str]:
  """The characters that the recogniser can give, and their normalised forms."""
  runtime = _imported("onnxruntime")
  path = _recogniser(model)
  try:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
  except Exception as error:  # onnxruntime has one class per cause and no parent of them all
    raise ValueError(f"The OCR model {path} cannot be loaded ({error}): give an ONNX file that is whole.") from error
  characters = _characters(session.get_modelmeta().custom_metadata_map, path)
  num = session.get_outputs()[0].shape[-1]
  if isinstance(num, int) and num != len(characters) + 2:  # a blank before them and a space behind
    raise ValueError(f"The OCR model {path} tells {num - 2} characters from each other, but {len(characters)} are named: give it its own dictionary.")
  return frozenset(characters) | {part for one in characters for part in normalise(one)}


def _characters(metadata: Mapping[str, str], path: pathlib.Path) -> list[str]:
  """The characters of a recogniser in the order of its outputs."""
  if "character" in metadata:
    return metadata["character"].splitlines()
  beside = dictionary(path)
  if not beside:
    raise ValueError(f"The OCR model {path} names no characters in its metadata: give a recogniser of RapidOCR, with the entry 'character', or put "
                     f"PaddleOCR's dictionary beside it, a character a line, as {path.with_suffix('.txt').name}.")
  return [line.strip("\r") for line in read_text(beside, "the dictionary of the recogniser").removesuffix("\n").split("\n")]


def dictionary(path: pathlib.Path) -> str:
  """Path of the file of characters beside a recogniser, "" where there is none."""
  beside = path.with_suffix(".txt")
  return str(beside) if beside.is_file() else ""


@functools.cache
def _engine(model: str) -> Any:
  alphabet(model)  # says what is wrong with a model that cannot be used
  _imported("cv2").setNumThreads(1)
  threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
  return _imported("rapidocr").RapidOCR(params={
      **threads, "Global.use_cls": False, "Global.text_score": MIN_CONFIDENCE, "Global.log_level": "error",
      "Det.model_path": str(_bundled(DETECTOR)), "Rec.model_path": str(_recogniser(model)),
      "Rec.rec_keys_path": dictionary(_recogniser(model)) or None})


def _recogniser(model: str) -> pathlib.Path:
  if not model:
    return _bundled(RECOGNISER)
  if not pathlib.Path(model).is_file():
    raise ValueError(f"The OCR model {model} is no file: give the path of a recogniser in ONNX, or none for the one that comes with rapidocr.")
  return pathlib.Path(model)


def _bundled(name: str) -> pathlib.Path:
  path = pathlib.Path(_imported("rapidocr").__file__).parent / "models" / name
  if not path.is_file():
    raise ValueError(f"The OCR model {name} is missing in {path.parent}: pip install --force-reinstall 'rapidocr>=3.10,<3.11' brings it.")
  return path


def _imported(name: str) -> Any:
  """A package that OCR needs, imported at the first picture: who scores no text waits for none of it."""
  try:
    return __import__(name)
  except ImportError as error:
    raise ValueError(f"OCR needs the package {name}, which cannot be imported ({error}): {_INSTALL}.") from error


# Reading order.


def in_reading_order(lines: Sequence[Line]) -> list[Line]:
  """Lines sorted by rows and columns, as this module's docstring defines it."""
  rows, ordered, first = _rows(lines), [], 0
  while first < len(rows):
    last = max((end for end in range(first + 2, len(rows) + 1) if _columns(sum(rows[first:end], []))), default=0)
    if last:
      ordered += [line for column in _columns(sum(rows[first:last], [])) for line in in_reading_order(column)]
    else:
      ordered += rows[first]
    first = last or first + 1
  return ordered


def _rows(lines: Sequence[Line]) -> list[list[Line]]:
  """Lines in rows from top to bottom, each from left to right; a line joins a row if it overlaps its first line by half of the lower one's height."""
  rows: list[list[Line]] = []
  for line in sorted(lines, key=lambda one: (one.sides[1] + one.sides[3], one.sides[0])):
    _, top, _, bottom = line.sides
    _, row_top, _, row_bottom = rows[-1][0].sides if rows else (0, 0, 0, 0)
    if rows and min(bottom, row_bottom) - max(top, row_top) >= min(bottom - top, row_bottom - row_top) / 2:
      rows[-1].append(line)
    else:
      rows.append([line])
  return [sorted(row, key=lambda one: one.sides[0]) for row in rows]


def _columns(lines: Sequence[Line]) -> list[list[Line]]:
  """Left and right part where an empty strip as wide as a line is high parts at least two lines from two others; else none."""
  by_left = sorted(lines, key=lambda one: one.sides[0])
  height = float(np.median([one.sides[3] - one.sides[1] for one in lines]))
  for split in range(2, len(by_left) - 1):
    left, right = by_left[:split], by_left[split:]
    if right[0].sides[0] - max(one.sides[2] for one in left) >= height and len(_rows(left)) > 1 < len(_rows(right)):
      return [left, right]
  return []
