"""Which records batch k holds: a pure function of (seed, mixture, k), known without opening a record.

A *cell* is one data set in one bucket. Cells are dealt batches by `Turns`: a data set has its weight's share of them, its resolutions divide that by
their weights times their record counts, and so do the buckets of a resolution. Inside a cell the v-th visit takes positions v B to v B + B - 1 of an
endless stream; position p is place p mod n of epoch p div n, and each epoch is a permutation of the n records of its own. So every record is seen
exactly once per epoch of its cell, and as often as those of the other cells of its data set and resolution. Any k can be asked at once, and neither
hosts nor workers enter.

A bucket is (task, target size, source sizes, prompt length). Two tasks: "t2i" takes the records without condition images, "ti2i" (editing)
those with some. A condition image is fitted to the size nearest to its own aspect ratio among all ratios at the resolution's area, in
multiples of one vision slot. A record's prompt length is the smallest class that holds the longest of its captions that the stage may use.
"""

import dataclasses
import fractions
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from data_pipelines import buckets as sizes
from data_pipelines.buckets import Bucket
from data_pipelines.cache import Cache, open_cache
from data_pipelines.order import Turns, permute
from data_pipelines.records import KINDS, open_split
from data_pipelines.tokenizer import PromptTokenizer

TASKS = ("t2i", "ti2i")
SLOT_PX = 32  # side of one vision slot


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
  """One data set of a mixture.

  Attributes:
    data_dir, name, split: where it is.
    weight: its share of the batches, relative to the other data sets.
    task: "t2i" or "ti2i".
    min_quality: records below it are not used.
    min_stage: records that did not pass the filters of this data stage (1 to 6) are not used.
    languages: captions in others are not used; empty takes all.
    caption_weights: kind of caption -> how often it is drawn where a record has several kinds; empty draws all kinds alike, and a kind that
      is not named, or has weight 0, is not used.
  """

  data_dir: str
  name: str
  split: str = "train"
  weight: float = 1.0
  task: str = "t2i"
  min_quality: float = 0.0
  min_stage: int = 0
  languages: tuple[str, ...] = ()
  caption_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Resolution:
  """Buckets of nearly one area.

  Attributes:
    base_px: side of the square of that area.
    batch_size: rows of the global batch.
    ratios: width to height of the buckets.
    weight: how often its records are seen, relative to the other resolutions.
    multiple: what the sides are multiples of, px.
    ratio_weights: the same as `weight` for each of the ratios; empty for 1.0 each.
  """

  base_px: int
  batch_size: int
  ratios: tuple[float | str, ...] = sizes.RATIOS
  weight: float = 1.0
  multiple: int = 32
  ratio_weights: tuple[float, ...] = ()

  def __post_init__(self):
    if min(self.base_px, self.batch_size, self.multiple) < 1:
      raise ValueError(f"base_px={self.base_px}, batch_size={self.batch_size} and multiple={self.multiple} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Count:
  """What became of a task's records nearest to one bucket: kept + low_quality + low_stage + no_caption + too_long + cropped + rare = records.

  `moved` of the kept ones were too few for a bucket of their own and went to another one.
  """

  dataset: str
  split: str
  task: str
  base_px: int
  height: int
  width: int
  records: int
  kept: int
  low_quality: int
  low_stage: int
  no_caption: int
  too_long: int
  cropped: int
  rare: int
  moved: int


@dataclasses.dataclass(frozen=True)
class Cell:
  """One data set in one bucket: `records` are positions in the split, ascending."""
  bucket: int
  dataset: int
  resolution: int
  weight: fractions.Fraction
  records: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
  """One global batch: its bucket, data set and cell, and the place of each row's record in the cell's records, B int64."""
  bucket: int
  dataset: int
  cell: Cell
  places: np.ndarray

  @property
  def records(self) -> np.ndarray:
    """Positions of the records in their split, B int64."""
    return self.cell.records[self.places].astype(np.int64)


Found = tuple[Sequence[dict], Mapping[str, np.ndarray], Cache | None]


def open_dataset(spec: DatasetSpec) -> Found:
  """The records of a data set and its index, see `data_pipelines.records.open_split`, and its `Cache` if it holds latents."""
  return *open_split(spec.data_dir, spec.name, spec.split), open_cache(spec.data_dir, spec.name)


class Mixture:
  """The order of batches; see the module docstring.

  Attributes:
    buckets: all batch shapes, the same on every process.
    counts: what became of the records.
    datasets, resolutions: as given.
    sources: the records of each data set, by position.
  """

  def __init__(self, datasets: Sequence[DatasetSpec], resolutions: Sequence[Resolution], num_tokens: int, tokenizer: PromptTokenizer, seed: int,
               prompt_classes: Sequence[int] = (), max_crop: float = 0.2, min_bucket_records: int = 0,
               find: Callable[[DatasetSpec], "Found"] | None = None):
    """Args: data sets; resolutions; M, the longest prompt, condition images not counted; tokenizer; seed; further, shorter prompt lengths that
    have buckets of their own; largest share of a picture that may be cut off; fewest records for which a bucket is worth a compiled step;
    what opens a data set, `open_dataset` unless it is made up.

    Raises:
      ValueError: numbers that make no mixture, or a data set of which nothing is left.
    """
    _check(datasets, resolutions, num_tokens, prompt_classes, seed)
    self.datasets, self.resolutions = tuple(datasets), tuple(resolutions)
    self._classes = tuple(sorted({*prompt_classes, num_tokens}))
    self._tokenizer, self._seed, self._max_crop, self._min_records = tokenizer, seed, max_crop, min_bucket_records
    self.sources, self._sample_ids = [], []
    self._build(find or open_dataset)
    self._turns = Turns([cell.weight for cell in self._cells], seed)

  # ---- which records go where --------------------------------------------------------------------

  def _build(self, find: Callable[[DatasetSpec], "Found"]) -> None:
    places, counts, cells = {}, [], []
    for d, spec in enumerate(self.datasets):
      source, index, cached = find(spec)
      self.sources.append(source)
      self._sample_ids.append(index["sample_id"])
      reasons, length = self._unusable(spec, index)
      found = []
      for r, resolution in enumerate(self.resolutions):
        sorter = _Sorter(spec, resolution, index, self._max_crop)
        kept, some = sorter.sort(reasons, np.searchsorted(self._classes, length), len(self._classes), self._min_records)
        counts += some
        for (target, source_sizes, prompt), records in kept.items():
          bucket = dataclasses.replace(self._bucket(sorter.targets[target], source_sizes, self._classes[prompt]), cache=cached)
          raw = len(records) * _exact(resolution.weight) * _exact(sorter.ratio_weights[target])
          found.append(Cell(places.setdefault(bucket, len(places)), d, r, raw, records))
      if not found:
        raise ValueError(f"No record of {spec.name!r} ({spec.split}) is left by task={spec.task}, min_quality={spec.min_quality}, "
                         f"min_stage={spec.min_stage}, languages={spec.languages}, caption_weights={dict(spec.caption_weights)}, "
                         f"num_tokens={self._classes[-1]}, max_crop={self._max_crop} and min_bucket_records={self._min_records}: loosen one or "
                         "add ratios.")
      total = sum(cell.weight for cell in found)
      cells += [dataclasses.replace(cell, weight=cell.weight / total * _exact(spec.weight)) for cell in found]
    self.buckets: tuple[Bucket, ...] = tuple(places)
    self.counts: tuple[Count, ...] = tuple(counts)
    self._cells = cells

  def _unusable(self, spec: DatasetSpec, index: dict) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns (reason -> which records it leaves out, each record under the first that holds; the longest usable caption of each record, tokens)."""
    tokens = index["caption_tokens"]
    if str(index["tokenizer"]) != self._tokenizer.fingerprint:
      # Lengths by another tokenizer say nothing: all prompts get the longest class, and one that does not fit is found when it is read.
      tokens = np.full_like(tokens, self._classes[-1])
    usable = usable_captions(index, spec)
    length = _longest(np.where(usable, tokens, 0), index["num_captions"])
    tests = {"low_quality": index["quality"] < np.float32(spec.min_quality), "low_stage": index["stage"] < spec.min_stage,
             "no_caption": length == 0, "too_long": length > self._classes[-1]}
    seen = np.zeros(len(length), bool)
    for name, test in tests.items():
      tests[name] = test & ~seen
      seen |= test
    return tests, np.minimum(length, self._classes[-1])

  def _bucket(self, target: Bucket, source_sizes: tuple[tuple[int, int], ...], prompt_tokens: int) -> Bucket:
    """Returns the bucket with condition images and room for their tokens: `prompt_tokens` counts text."""
    extra = self._tokenizer.num_image_tokens(source_grids(source_sizes))
    return dataclasses.replace(target, source_sizes=source_sizes, num_tokens=prompt_tokens + extra)

  # ---- the endless order of training -------------------------------------------------------------

  def plan(self, k: int) -> Plan:
    """Returns the global batch k, one of the first 2^40."""
    number, visit = self._turns(k)
    cell = self._cells[number]
    batch_size, num = self.buckets[cell.bucket].batch_size, len(cell.records)
    position = visit * batch_size + np.arange(batch_size)
    return Plan(cell.bucket, cell.dataset, cell, permute(position % num, num, (self._seed, 2, number), position // num))

  def sample_ids(self, dataset: int, records: np.ndarray) -> np.ndarray:
    """Returns the ids, int64, of records of a data set."""
    return self._sample_ids[dataset][records]

  @property
  def cells(self) -> tuple[Cell, ...]:
    """All cells: data set by data set, resolution by resolution."""
    return tuple(self._cells)

  @property
  def shares(self) -> tuple[float, ...]:
    """The share of the batches that each of `cells` has, 0 to 1."""
    total = sum(cell.weight for cell in self._cells)
    return tuple(float(cell.weight / total) for cell in self._cells)

  # ---- one pass for evaluation -------------------------------------------------------------------

  def one_pass(self, max_samples: int | None = None) -> Iterator[tuple[int, list[tuple[Cell, int]]]]:
    """Yields for each bucket (its number, (cell, place in the cell's records) of each of its records), by ascending sample_id.

    `max_samples` keeps the lowest ids at each resolution.
    """
    rows = {bucket: [] for bucket in range(len(self.buckets))}
    for r in range(len(self.resolutions)):
      entries = sorted((int(self._sample_ids[cell.dataset][record]), number, place)
                       for number, cell in enumerate(self._cells) if cell.resolution == r for place, record in enumerate(cell.records))
      for _, number, place in entries[:max_samples]:
        rows[self._cells[number].bucket].append((self._cells[number], place))
    yield from rows.items()


class _Sorter:
  """Sorts the records of one data set into the buckets of one resolution."""

  def __init__(self, spec: DatasetSpec, resolution: Resolution, index: dict, max_crop: float):
    self._spec, self._resolution, self._index, self._max_crop = spec, resolution, index, max_crop
    self.targets = sizes.make_buckets(spec.task, resolution.base_px, resolution.ratios, 0, resolution.batch_size, resolution.multiple)
    self.ratio_weights = _per_target(resolution, self.targets)
    self._slots = sizes.make_buckets(spec.task, resolution.base_px, sizes.RATIOS, 0, 1, SLOT_PX) if spec.task == "ti2i" else ()

  def sort(self, reasons: dict[str, np.ndarray], prompt: np.ndarray, num_classes: int, min_records: int) -> tuple[dict, list[Count]]:
    """Returns ((target, source sizes, prompt class) -> positions of its records; counts per target and source sizes)."""
    index = self._index
    own = index["source_sizes"].any(axis=(1, 2)) == (self._spec.task == "ti2i")
    if "base_px" in index:  # a latent cache holds pictures of one size each
      own &= index["base_px"] == self._resolution.base_px
    target, lost = _fit(index["height"], index["width"], self.targets)
    keys = target[:, None]
    if self._slots:
      source, source_lost = _fit(index["source_sizes"][..., 0], index["source_sizes"][..., 1], self._slots)
      keys, lost = np.concatenate([keys, source], axis=1), np.maximum(lost, source_lost.max(axis=1, initial=0))
    left_out = functools.reduce(np.logical_or, reasons.values())
    reasons = reasons | {"cropped": (lost > self._max_crop) & ~left_out}
    left_out = left_out | reasons["cropped"]
    groups = {(int(key[0]), self._source_sizes(key[1:])): own & (keys == key).all(axis=1) for key in np.unique(keys[own], axis=0)}
    cells = {(*group, p): np.flatnonzero(here & ~left_out & (prompt == p)).astype(np.int32)
             for group, here in groups.items() for p in range(num_classes)}
    cells = {key: records for key, records in cells.items() if len(records)}
    merged = self._merge(dict(cells), min_records)
    before, after = (_cell_numbers(some, list(cells), len(own)) for some in (cells, merged))
    reasons["rare"], moved = (before >= 0) & (after < 0), (after >= 0) & (after != before)
    left_out = left_out | reasons["rare"]
    return merged, [self._count(group, here, reasons, left_out, moved) for group, here in groups.items()]

  def _source_sizes(self, numbers: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple((self._slots[i].height, self._slots[i].width) for i in numbers if i >= 0)

  def _count(self, group: tuple, here: np.ndarray, reasons: dict, left_out: np.ndarray, moved: np.ndarray) -> Count:
    bucket = self.targets[group[0]]
    return Count(self._spec.name, self._spec.split, self._spec.task, self._resolution.base_px, bucket.height, bucket.width, int(here.sum()),
                 kept=int((here & ~left_out).sum()), moved=int((here & moved).sum()),
                 **{name: int((here & reason).sum()) for name, reason in reasons.items()})

  def _merge(self, cells: dict, min_records: int) -> dict:
    """Returns the cells without those of fewer than `min_records`: the smallest goes first, where its records lose nothing (a longer prompt
    class), or else to the target sizes nearest to its own, as long as no more than `max_crop` is cut off. What fits nowhere is left out."""
    while small := [key for key, records in cells.items() if len(records) < min_records]:
      key = min(small, key=lambda key: (len(cells[key]), key))
      rest = cells.pop(key)
      options = [other for other in cells if other[1] == key[1] and other[2] >= key[2]]
      for other in sorted(options, key=lambda other: self._distance(key, other)):
        fits = self._crop(rest, other[0]) <= self._max_crop
        cells[other] = np.sort(np.concatenate([cells[other], rest[fits]]))
        rest = rest[~fits]
    return cells

  def _distance(self, key: tuple, other: tuple) -> tuple:
    ratio = lambda target: np.log(self.targets[target].width / self.targets[target].height)
    return round(abs(ratio(key[0]) - ratio(other[0])), 9), other[2], other[0]

  def _crop(self, records: np.ndarray, target: int) -> np.ndarray:
    bucket = self.targets[target]
    if "base_px" in self._index:  # what is cached cannot be cut
      return 1.0 * ((self._index["height"][records] != bucket.height) | (self._index["width"][records] != bucket.width))
    return sizes.crop_fraction(self._index["height"][records], self._index["width"][records], bucket.height, bucket.width)


def usable_captions(index: dict, spec: DatasetSpec) -> np.ndarray:
  """Returns for each caption of an index whether a data set's languages and caption kinds let it be used, bool."""
  usable = np.ones(len(index["caption_tokens"]), bool)
  if spec.languages:
    usable &= np.isin(index["language_names"], spec.languages)[index["caption_language"]]
  if spec.caption_weights:
    usable &= np.array([spec.caption_weights.get(kind, 0) > 0 for kind in KINDS])[index["caption_kind"]]
  return usable


def source_grids(source_sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
  """Returns (rows, columns) of vision slots of condition images of (height, width) px."""
  return tuple((height // SLOT_PX, width // SLOT_PX) for height, width in source_sizes)


def _cell_numbers(cells: dict, keys: list, num: int) -> np.ndarray:
  """Returns for each of `num` records the place in `keys` of the cell that it is in, -1 for none."""
  numbers = np.full(num, -1, np.int32)
  for key, records in cells.items():
    numbers[records] = keys.index(key)
  return numbers


def _longest(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Returns the largest of the `counts[i]` values of each record i; 0 where there are none."""
  starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
  longest = np.zeros(len(counts), values.dtype)
  some = counts > 0
  longest[some] = np.maximum.reduceat(values, starts[some]) if some.any() else 0
  return longest


def _exact(weight: float) -> fractions.Fraction:
  """Decimal text keeps 0.3 exactly 3/10."""
  return fractions.Fraction(str(weight))


def _per_target(resolution: Resolution, targets: Sequence[Bucket]) -> list[float]:
  """Returns a weight per target size: that of the first ratio which gives it."""
  weights = resolution.ratio_weights or (1.0,) * len(resolution.ratios)
  by_size = {}
  for ratio, weight in zip(resolution.ratios, weights, strict=True):
    by_size.setdefault(sizes.bucket_size(resolution.base_px, ratio, resolution.multiple), weight)
  return [by_size[target.height, target.width] for target in targets]


def _fit(height: np.ndarray, width: np.ndarray, choice: Sequence[Bucket]) -> tuple[np.ndarray, np.ndarray]:
  """Returns (index of the nearest size, share of the picture that fitting it cuts off); -1 and 0 where there is no picture."""
  there = height > 0
  height, width = np.where(there, height, 1), np.where(there, width, 1)
  nearest = sizes.nearest_bucket(height, width, tuple(choice))
  tall, wide = (np.array([getattr(bucket, side) for bucket in choice])[nearest] for side in ("height", "width"))
  return np.where(there, nearest, -1), np.where(there, sizes.crop_fraction(height, width, tall, wide), 0.0)


def _check(datasets, resolutions, num_tokens, prompt_classes, seed) -> None:
  if not datasets or not resolutions:
    raise ValueError("A loader needs at least one data set and one resolution: add them to the config.")
  for spec in datasets:
    if spec.task not in TASKS:
      raise ValueError(f"Data set {spec.name!r} has task={spec.task!r}: choose one of {', '.join(TASKS)}.")
    if spec.weight <= 0:
      raise ValueError(f"Data set {spec.name!r} has weight={spec.weight}: give a positive one or leave the set out.")
    unknown = [kind for kind in spec.caption_weights if kind not in KINDS]
    if unknown or any(weight < 0 for weight in spec.caption_weights.values()):
      raise ValueError(f"Data set {spec.name!r} has caption_weights={dict(spec.caption_weights)}: give {', '.join(KINDS)} weights of 0 or more.")
  for resolution in resolutions:
    if resolution.weight <= 0 or any(weight <= 0 for weight in resolution.ratio_weights):
      raise ValueError(f"Resolution {resolution.base_px} has weight={resolution.weight} and ratio_weights={resolution.ratio_weights}: give "
                       "positive ones, and leave out ratios that you do not want.")
    if resolution.ratio_weights and len(resolution.ratio_weights) != len(resolution.ratios):
      raise ValueError(f"Resolution {resolution.base_px} has {len(resolution.ratio_weights)} ratio_weights for {len(resolution.ratios)} ratios: "
                       "give one for each.")
  if any(not 0 < one <= num_tokens for one in prompt_classes):
    raise ValueError(f"prompt_classes={tuple(prompt_classes)} must lie between 1 and num_tokens={num_tokens}, the longest of them.")
  if seed < 0:
    raise ValueError(f"seed={seed} must not be negative.")
