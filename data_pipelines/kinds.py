"""The records of a data set in kinds: records that no resolution of a stage tells apart. Of a hundred million pictures there are a few thousand.

Which size is nearest to a picture, and whether filling a size would cut too much off, depends on the ratio of its width to its height alone, and
changes at few ratios. So each record is looked at once, for all resolutions together: its ratio, rounded to one of `_CELLS` cells, is looked up in a
table. The few cells in which something changes say so, and their pictures are worked out one by one.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from data_pipelines import buckets as sizes
from data_pipelines.buckets import Bucket
from data_pipelines.pieces import pieces
from data_pipelines.specs import SLOT_PX, DatasetSpec, Resolution

FEW = 2**16  # records of which each is worked out
_SAMPLE = 10**6  # records that are enough to know how far their aspect ratios spread
_MOST_CODES = 2**20  # that are counted in a table
_OCTAVES, _BITS = 7, 12  # ratios from 2^-7 to 2^7 are in 2^12 cells for each factor of two: the first bits of a float32 are the number of its cell
_CELLS = 2 * _OCTAVES << _BITS
_FIRST = 127 - _OCTAVES << _BITS
_UNSURE = 2**16 - 1
_MARGIN = 1e-6  # of a ratio, by which it may have been rounded into the next cell


class Classes:
  """Puts ratios that a function cannot tell apart into one class."""

  def __init__(self, signature: Callable[[np.ndarray, np.ndarray], np.ndarray], num: int):
    """Args: gives a row of bytes for each (height, width), [n, D] uint8, none of which comes again once the ratio has left it; how many will be asked
    for."""
    self._signature, self._numbers = signature, {}
    self._table: np.ndarray | None = None
    if num > FEW:
      ends = np.arange(_CELLS + 1) + _FIRST
      ends = (ends << 23 - _BITS).astype(np.uint32).view(np.float32).astype(np.float64)
      low, high = (self._number(signature(np.ones(_CELLS), some)) for some in (ends[:-1] * (1 - _MARGIN), ends[1:] * (1 + _MARGIN)))
      self._table = np.where(low == high, low, _UNSURE).astype(np.uint16)
      self._table[[0, -1]] = _UNSURE  # and all that is beyond

  def __call__(self, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Returns the class of each picture, a place in `rows`."""
    if self._table is None:
      return self._number(self._signature(height, width))
    cells = (width.astype(np.float32) / height.astype(np.float32)).view(np.uint32) >> np.uint32(23 - _BITS)
    found = self._table[np.clip(cells, _FIRST, _FIRST + _CELLS - 1) - np.uint32(_FIRST)]
    unsure = np.flatnonzero(found == _UNSURE)
    found[unsure] = self._number(self._signature(height[unsure], width[unsure]))
    return found

  def _number(self, rows: np.ndarray) -> np.ndarray:
    distinct, place = np.unique(np.ascontiguousarray(rows).view(f"V{rows.shape[1]}").ravel(), return_inverse=True)
    numbers = [self._numbers.setdefault(one.tobytes(), len(self._numbers)) for one in distinct]
    if len(self._numbers) > _UNSURE:
      raise ValueError(f"The resolutions of a stage tell more than {_UNSURE} shapes of pictures apart: leave out ratios or resolutions.")
    return np.array(numbers, np.uint16)[place]

  @property
  def rows(self) -> np.ndarray:
    """What the function gives for each class, [number of classes, D] uint8."""
    return np.array([np.frombuffer(one, np.uint8) for one in self._numbers])


class Kinds:
  """The kinds of the records of a data set, K of them, at some resolutions.

  Attributes:
    counts: [K], how many records each has.
    reason, prompt: [K], as `looks` gives them.
    is_edit: [K], whether there are condition images.
    targets, slots: for each resolution the sizes of targets and of condition images.
    sample: (kind, logarithm of width to height) of records from all over.
  """

  def __init__(self, spec: DatasetSpec, resolutions: Sequence[Resolution], index: Mapping[str, np.ndarray], max_crop: float,
               looks: Iterable[tuple[slice, np.ndarray, np.ndarray]]):
    """Args: data set; resolutions; its index; largest share of a target that may be cut off; for each of `pieces` (which records, why they cannot be
    used, their prompt class)."""
    self._spec, self._index, self._num = spec, index, len(index["height"])
    self.targets = [sizes.make_buckets(spec.task, one.base_px, one.ratios, 0, one.batch_size, one.multiple) for one in resolutions]
    self.slots = [sizes.make_buckets(spec.task, one.base_px, sizes.RATIOS, 0, 1, SLOT_PX) if spec.task == "ti2i" else () for one in resolutions]
    self._base_px = [one.base_px for one in resolutions]
    self.sides = sorted({one.base_px for one in resolutions})
    self._own = "own_" * ("own_height" in index)
    self._ratios = Classes(lambda *sides: _looks(*sides, self.targets, max_crop), self._num)
    self._own_ratios = Classes(lambda *sides: _nearest(*sides, self.targets), self._num if self._own else 0)
    self._source_ratios = Classes(lambda *sides: _nearest(*sides, self.slots), self._num if spec.task == "ti2i" else 0)
    parts = [self._look(*look) for look in looks]
    self._join(parts)

  # ---- records to kinds ------------------------------------------------------------------------------

  def _look(self, piece: slice, reason: np.ndarray, prompt: np.ndarray) -> list[np.ndarray]:
    """Returns what some records are told apart by."""
    height, width = self._sides(piece)
    sources = np.array(self._index["source_sizes"][piece])
    none = np.broadcast_to(np.False_, len(height))  # takes no memory
    columns = [reason, prompt, self._ratios(height, width), sources.any(axis=(1, 2)) if sources.shape[1] else none, none]
    if "base_px" in self._index:  # a latent cache holds pictures of one size each
      columns[-1] = np.select([self._index["base_px"][piece] == side for side in self.sides], range(1, 1 + len(self.sides)), 0).astype(np.uint8)
    own = self._sides(piece, self._own) if self._own or self._spec.max_enlarge else ()
    columns.append(self._own_ratios(*own) if self._own else none)
    columns.append(self._enlarged(*own) if self._spec.max_enlarge else none)
    for slot in range(sources.shape[1] if self._spec.task == "ti2i" else 0):
      there, column = np.flatnonzero(sources[:, slot, 0] > 0), np.zeros(len(height), np.uint16)
      column[there] = 1 + self._source_ratios(sources[there, slot, 0], sources[there, slot, 1])
      columns.append(column)
    return columns

  def _sides(self, piece: slice, own: str = "") -> tuple[np.ndarray, ...]:
    return tuple(np.maximum(1, np.array(self._index[f"{own}{side}"][piece])) for side in ("height", "width"))

  def _enlarged(self, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Returns at which resolutions some pictures, or those that latents were made of, would be scaled up too much to cover the target sizes nearest
    to them: a bit for each."""
    bits = np.zeros(len(height), np.uint32)
    for r, targets in enumerate(self.targets):
      nearest = sizes.nearest_bucket(height, width, targets)
      tall, wide = (np.array([getattr(bucket, side) for bucket in targets])[nearest] for side in ("height", "width"))
      bits |= (np.maximum(tall / height, wide / width) > self._spec.max_enlarge).astype(np.uint32) << np.uint32(r)
    return bits

  def _join(self, parts: list[list[np.ndarray]]) -> None:
    """Numbers the kinds that there are, and counts them."""
    ranges = [1 + max((int(part[i].max(initial=0)) for part in parts), default=0) for i in range(len(parts[0]) if parts else 7)]
    total = math.prod(ranges)
    if total >= 2**62:
      raise ValueError(f"A record has {len(ranges) - 7} condition images: so many cannot be sorted.")
    self._number, found = (np.arange(total) if total <= _MOST_CODES else None), []
    self._of = np.empty(self._num, np.int32 if self._number is None else np.min_scalar_type(total))
    for number, piece in enumerate(pieces(self._num)):
      code, parts[number] = _code(parts[number], ranges, np.int64 if self._number is None else self._of.dtype), None
      distinct, place = np.unique(code, return_inverse=True) if self._number is None else (self._number, code)
      height, width = self._sides(piece)
      ratio = width / height
      found.append((distinct, np.array([np.bincount(place, weights, len(distinct)) for weights in (None, ratio, 1 / ratio)])))
      self._of[piece] = place
      if self._number is not None:
        found = [(distinct, sum(sums for _, sums in found))]
    every = np.concatenate([np.zeros(0, np.int64), *[distinct for distinct, _ in found]])
    sums = np.concatenate([np.zeros((3, 0)), *[sums for _, sums in found]], axis=1)
    codes, place = np.unique(every[sums[0] > 0], return_inverse=True)
    self.counts, self._ratio_sum, self._inverse_sum = (np.bincount(place, one[sums[0] > 0], len(codes)) for one in sums)
    self.counts = self.counts.astype(np.int64)
    if self._number is not None:
      self._number[codes] = np.arange(len(codes))
    else:
      for piece, local in zip(pieces(self._num), np.split(place, np.cumsum([len(distinct) for distinct, _ in found])[:-1])):
        self._of[piece] = local[self._of[piece]]
    self.reason, self.prompt, self._ratio, edit, self._base, self._own_ratio, self._bits, *sources = np.unravel_index(codes, ranges)
    self.is_edit = edit > 0
    self._sources = np.stack([one.astype(np.int64) - 1 for one in sources], axis=1) if sources else np.zeros((len(codes), 0), np.int64)
    some = slice(None, None, max(1, self._num // _SAMPLE))
    kinds = self._of[some] if self._number is None else self._number[self._of[some]]
    self.sample = kinds, np.log(np.asarray(self._index["width"][some] / self._index["height"][some]))
    self._tables = {"target": self._ratios.rows, "own": self._own_ratios.rows, "source": self._source_ratios.rows}

  @property
  def num_sources(self) -> int:
    """How many condition images the records have at most."""
    return self._sources.shape[1]

  # ---- what is known of each kind at a resolution --------------------------------------------------------

  def target(self, r: int) -> np.ndarray:
    """Returns the place of the nearest target size, [K]."""
    return self._tables["target"][self._ratio, self._first(r)].astype(np.int64)

  def own_target(self, r: int) -> np.ndarray:
    """Returns the same of what latents were made of, [K]; of pictures `target`."""
    return self._tables["own"][self._own_ratio, r].astype(np.int64) if self._own else self.target(r)

  def fits(self, r: int, kinds: np.ndarray, target: int | np.ndarray) -> np.ndarray:
    """Returns whether filling target sizes cuts no more off the pictures of kinds than it may."""
    return self._tables["target"][self._ratio[kinds], self._first(r) + 1 + target] & 1 > 0

  def cut_off(self, r: int, kinds: np.ndarray, target: np.ndarray) -> float:
    """Returns the sum over the records of kinds of the share that filling a target size, [number of kinds], cuts off."""
    narrow = self._tables["target"][self._ratio[kinds], self._first(r) + 1 + target] & 2 > 0
    ratio = np.array([bucket.width / bucket.height for bucket in self.targets[r]])[target]
    return float((self.counts[kinds] - np.where(narrow, self._ratio_sum[kinds] / ratio, self._inverse_sum[kinds] * ratio)).sum())

  def enlarged(self, r: int) -> np.ndarray:
    """Returns whether the pictures would be scaled up too much, [K]."""
    return self._bits >> r & 1 > 0

  def at_resolution(self, r: int) -> np.ndarray:
    """Returns whether the records may be used at a resolution, [K]: latents are those of one."""
    return self._base == 1 + self.sides.index(self._base_px[r]) if "base_px" in self._index else np.ones(len(self.counts), bool)

  def sources(self, r: int) -> np.ndarray:
    """Returns the places of the sizes nearest to the condition images, [K, most], -1 where there is none."""
    there = self._sources >= 0
    return np.where(there, self._tables["source"][np.where(there, self._sources, 0), r].astype(np.int64), -1) if there.any() else self._sources

  def _first(self, r: int) -> int:
    return sum(1 + len(targets) for targets in self.targets[:r])

  # ---- kinds to records --------------------------------------------------------------------------------

  def positions(self, place: np.ndarray, num: int, every: np.ndarray) -> list[range]:
    """Writes the positions of the records of each program, ascending, one program after the other; returns where those of each are.

    Args: [K], the program of each kind, -1 for none; how many programs there are; [records that have one] to be filled.
    """
    sizes_of = np.bincount(place[place >= 0], self.counts[place >= 0], num).astype(np.int64)
    filled = np.cumsum(sizes_of) - sizes_of
    places = [range(begin, begin + size) for begin, size in zip(filled.tolist(), sizes_of.tolist())]
    table = self._by_code((place + 1).astype(np.min_scalar_type(num)))
    for piece in pieces(self._num):
      here = table[self._of[piece]]
      order = np.argsort(here, kind="stable").astype(np.uint32) + np.uint32(piece.start)
      stops = np.cumsum(np.bincount(here, minlength=num + 1))
      for number in np.flatnonzero(np.diff(stops)):
        some = order[stops[number]:stops[number + 1]]
        every[filled[number]:filled[number] + len(some)] = some
        filled[number] += len(some)
    return places

  def first(self, wanted: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (positions, kinds) of the first records of wanted kinds, [K] bool, at most so many."""
    table, positions = self._by_code(wanted), [np.zeros(0, np.int64)]
    for piece in pieces(self._num):
      here = np.flatnonzero(table[self._of[piece]])[:most]
      positions.append(here + piece.start)
      most -= len(here)
      if not most:
        break
    found = np.concatenate(positions)
    return found, self._by_code(np.arange(len(wanted)))[self._of[found]]

  def _by_code(self, values: np.ndarray) -> np.ndarray:
    """Returns a value of each kind, [K], so that what `_of` holds of each record finds it."""
    return values if self._number is None else values[np.minimum(self._number, len(values) - 1)]


def _looks(height: np.ndarray, width: np.ndarray, targets: Sequence[Sequence[Bucket]], max_crop: float) -> np.ndarray:
  """Returns for each resolution the place of the nearest target size, and for each of its targets 1 if filling it cuts no more than `max_crop` off,
  and 2 more if the picture is no wider than it."""
  columns = []
  for some in targets:
    columns.append(sizes.nearest_bucket(height, width, tuple(some)))
    for bucket in some:
      fits = sizes.crop_fraction(height, width, bucket.height, bucket.width) <= max_crop
      columns.append(fits + 2 * (np.multiply(width, bucket.height, dtype=np.float64) <= np.multiply(height, bucket.width, dtype=np.float64)))
  return np.stack(columns, axis=1).astype(np.uint8)


def _nearest(height: np.ndarray, width: np.ndarray, choices: Sequence[Sequence[Bucket]]) -> np.ndarray:
  """Returns for each resolution the place of the nearest of its sizes."""
  return np.stack([sizes.nearest_bucket(height, width, tuple(some)) for some in choices], axis=1).astype(np.uint8)


def _code(columns: Sequence[np.ndarray], ranges: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """Returns one number for each combination of columns of these ranges."""
  code = np.zeros(len(columns[0]), dtype)
  for column, size in zip(columns, ranges, strict=True):
    if size > 1:
      code *= np.array(size, dtype)
      code += column.astype(dtype)
  return code
