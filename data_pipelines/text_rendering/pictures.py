"""A user's pictures as grounds for text: a folder of files or a prepared data set, and where in a picture there is room.

A part of a picture is even if the grey levels I(x, y) in a window are those of a plane, but for a remainder: with x and y about the window's middle,

  s^2 = var(I) - cov(I, x)^2 / var(x) - cov(I, y)^2 / var(y)                                                                      (1)

All sums are those of integral images, so that every window of a size costs the same few additions.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import cv2
import numpy as np

from data_pipelines.transforms import load_picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif", ".ppm")
_ENDS = 4096  # bytes at either end of a file that are looked at to tell it from others
_SURVEYED = 400  # pictures that are looked at before any is drawn on
_SIDE = 128  # longer side in px of what regions are looked for in
_SHARES = (0.95, 0.8, 0.65, 0.5, 0.38, 0.28, 0.2)  # of a picture's sides, of the windows that are tried
_EVEN = 13.0  # greatest s in levels
_GAP = 3  # px of the small picture between two regions
_PARTS = 3  # of a window's sides: each ninth of it must be as even as the whole


class Pictures:
  """The pictures below a folder, ordered by name."""

  def __init__(self, folder: str):
    """Args: a folder of pictures, each with a caption in a .txt file beside it if it has one, or one that launch.prepare_data wrote, whose edits are
    left out.

    Raises:
      ValueError: there is no such folder, or no picture in it.
    """
    self._folder = pathlib.Path(folder).expanduser()
    if not self._folder.is_dir():
      raise ValueError(f"pictures={folder} is no folder: give one of pictures, or one that launch.prepare_data wrote.")
    self._records, self._files = None, []
    if (self._folder / "dataset.json").exists():
      from data_pipelines import records  # which needs TFDS
      self._records, index = records.open_split(self._folder.resolve().parent, self._folder.resolve().name, "train")
      self._rows = np.flatnonzero(~index["source_sizes"].any(axis=(1, 2))).tolist()  # captions of edits are instructions
    else:
      self._files = sorted(path for path in self._folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not len(self):
      raise ValueError(f"pictures={folder} has no picture: give a folder with files of {', '.join(SUFFIXES)}.")

  @staticmethod
  @functools.cache
  def open(folder: str) -> "Pictures":
    """The same pictures for all who ask in this process."""
    return Pictures(folder)

  def __len__(self) -> int:
    return len(self._files) if self._records is None else len(self._rows)

  @functools.cached_property
  def digest(self) -> str:
    """Sixteen hexadecimal digits that differ where the pictures or their captions do: of a data set what identifies it, of files their names, sizes,
    beginnings and ends. Where the folder lies does not matter."""
    if self._records is not None:
      from data_pipelines import identity
      said = identity.identify(self._folder.resolve().parent, self._folder.resolve().name)
    else:
      said = [[str(path.relative_to(self._folder)), path.stat().st_size, _ends(path), _caption_of(path)] for path in self._files]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

  def name(self, number: int) -> str:
    """File of a picture in the folder, or its number in the data set."""
    return str(self._files[number].relative_to(self._folder)) if self._records is None else f"record {self._rows[number]}"

  def load(self, number: int, height: int, width: int) -> np.ndarray | None:
    """Returns a picture [height, width, 3] uint8, scaled and cut around its middle; None where its file is broken."""
    try:
      data = self._files[number].read_bytes() if self._records is None else self._records[self._rows[number]]["image"]
      return load_picture(data, height, width, self.name(number))
    except (OSError, ValueError):  # it is passed over, and counted by who asks
      return None

  def captions(self, number: int) -> dict[str, str]:
    """Language -> the first caption of a picture in it. Those of files are taken to be English."""
    if self._records is None:
      text = _caption_of(self._files[number])
      return {"en": text} if text else {}
    record = self._records[self._rows[number]]
    found: dict[str, str] = {}
    for text, language in zip(record["captions"], record["languages"]):
      found.setdefault(language.decode(), text.decode())
    return {language: text for language, text in found.items() if text.strip()}


def survey(pictures: Pictures, height: int, width: int, least: tuple[float, float]) -> dict[str, int]:
  """Returns how many pictures there are, and of at most `_SURVEYED` of them, all over the folder, how many are broken and how many have no room.

  Args: the pictures; sides in px at which they are drawn; least width and height in px of a part with room.

  Raises:
    ValueError: none of them has room; names one that is broken, if one is.
  """
  numbers = np.unique(np.linspace(0, len(pictures) - 1, _SURVEYED).astype(int)).tolist()
  broken, full = [], 0
  for number in numbers:
    pixels = pictures.load(number, height, width)
    if pixels is None:
      broken.append(pictures.name(number))
    elif not find_regions(np.random.default_rng(0), cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), *least, 1):
      full += 1
  if len(broken) + full == len(numbers):
    raise ValueError(f"Of {len(numbers)} pictures {full} have no even part of {least[0]:.0f}x{least[1]:.0f} px and {len(broken)} are broken"
                     f"{f', such as {broken[0]}' if broken else ''}: give others, or smaller letters.")
  return {"pictures": len(pictures), "pictures_looked_at": len(numbers), "pictures_broken": len(broken), "pictures_without_room": full}


def _ends(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    head = file.read(_ENDS)
    file.seek(max(0, path.stat().st_size - _ENDS))
    return hashlib.sha256(head + file.read()).hexdigest()[:16]


def _caption_of(path: pathlib.Path) -> str:
  beside = path.with_suffix(".txt")
  return " ".join(beside.read_text(encoding="utf-8", errors="replace").split()) if beside.exists() else ""


# ---- where there is room ------------------------------------------------------------------------------


def find_regions(rng: np.random.Generator, gray: np.ndarray, width: float, height: float, most: int) -> list[tuple[float, float, float, float]]:
  """Returns at most `most` even parts of a picture that do not overlap, as (left, top, right, bottom) in px; larger ones are likelier.

  Args: generator; luma [H, W] uint8; least sides of a part in px; how many.
  """
  scale = min(1.0, _SIDE / max(gray.shape))
  small = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else gray
  sums, found, sizes = _Sums(small), [], []
  for down in _SHARES:
    for along in _SHARES:
      window = int(down * small.shape[0]), int(along * small.shape[1])
      if window[0] < max(_PARTS * 2, height * scale) or window[1] < max(_PARTS * 2, width * scale):
        continue
      rows, columns = np.nonzero(sums.unevenness(*window) <= _EVEN)
      if len(rows):
        chosen = int(rng.integers(len(rows)))
        found.append((columns[chosen], rows[chosen], columns[chosen] + window[1], rows[chosen] + window[0]))
        sizes.append(window[0] * window[1])
  kept: list[tuple[int, ...]] = []
  while found and len(kept) < most:
    shares = np.square(np.array(sizes, float))
    chosen = found[rng.choice(len(found), p=shares / shares.sum())]
    kept.append(chosen)
    free = [i for i, one in enumerate(found) if _apart(one, chosen)]
    found, sizes = [found[i] for i in free], [sizes[i] for i in free]
  return [tuple(float(side / scale) for side in one) for one in kept]


def _apart(first: Sequence[int], second: Sequence[int]) -> bool:
  return (first[2] + _GAP <= second[0] or second[2] + _GAP <= first[0] or first[3] + _GAP <= second[1] or second[3] + _GAP <= first[1])


class _Sums:
  """Integral images of a picture I, of I^2, and of I times row and column."""

  def __init__(self, gray: np.ndarray):
    values = gray.astype(np.float64)
    rows, columns = np.arange(gray.shape[0])[:, None], np.arange(gray.shape[1])
    self._tables = [np.pad(part.cumsum(0).cumsum(1), ((1, 0), (1, 0))) for part in (values, values**2, values * rows, values * columns)]

  def unevenness(self, height: int, width: int) -> np.ndarray:
    """The s of (1) of every window of height x width px, by its top left corner; of each of its ninths it is at most so much."""
    whole = self._remainder(height, width)
    h, w = height // _PARTS, width // _PARTS
    ninths = self._remainder(h, w)
    for i in range(_PARTS):
      for j in range(_PARTS):
        part = ninths[i * h:i * h + whole.shape[0], j * w:j * w + whole.shape[1]]
        whole = np.maximum(whole, part)
    return np.sqrt(whole)

  def _remainder(self, height: int, width: int) -> np.ndarray:
    total, squares, by_row, by_column = (table[height:, width:] - table[:-height, width:] - table[height:, :-width] + table[:-height, :-width]
                                         for table in self._tables)
    num, mean = height * width, total / (height * width)
    rows, columns = np.arange(total.shape[0])[:, None] + (height - 1) / 2, np.arange(total.shape[1]) + (width - 1) / 2
    found = squares / num - mean**2
    for moment, middle, side in ((by_row, rows, height), (by_column, columns, width)):
      if side > 1:
        found = found - (moment / num - mean * middle) ** 2 / ((side**2 - 1) / 12)
    return np.maximum(found, 0)
