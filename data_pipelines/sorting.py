"""The records of one data set at one resolution, sorted into buckets: to which each of them goes, and what becomes of those that go to none."""

import dataclasses
import fractions
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines import buckets as sizes
from data_pipelines.buckets import Bucket
from data_pipelines.cache import Cache
from data_pipelines.programs import Family, assign, costs, padding
from data_pipelines.specs import SLOT_PX, DatasetSpec, Resolution

_MOST_CODES = 2**24  # possible shapes that are counted in a table
_SAMPLE = 10**6  # records that are enough to know how far their aspect ratios spread


@dataclasses.dataclass(frozen=True)
class Count:
  """What became of a task's records nearest to one target size: kept + low_quality + low_stage + no_caption + too_long + cropped + rare = records.

  `moved` of the kept ones are in a bucket of another shape than their own. For `rare` ones no bucket was worth its step, or fits.
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
class Merging:
  """What it cost that shapes share buckets. Shares are means over the records that are kept, of all resolutions alike, 0 to 1.

  Attributes:
    shapes, buckets: how many there are of each.
    left_out: share of the records that have a shape, but no bucket.
    padding: share of a row's tokens that is padding because its prompt class is a longer one.
    cut_off: share of the target that is cut off; `own_cut_off` would be at its own size.
    most_repeated: how often a batch of the smallest cell holds a record; 1 unless that has fewer records than a batch has rows.
  """
  shapes: int
  buckets: int
  left_out: float
  padding: float
  cut_off: float
  own_cut_off: float
  most_repeated: int


@dataclasses.dataclass(frozen=True)
class Placed:
  """Where the records of one data set at one resolution went.

  Attributes:
    cells: (target, source sizes, prompt class) -> (positions of its records, ascending; the sum of their weights).
    counts: per target size.
    usable, kept: [n] which records have a shape, and which a bucket.
    used: number of condition images -> the programs that have records, as `Chooser` gives them.
    shapes: names of all shapes.
    padding, cut_off, own_cut_off: sums over the records that are kept of what `Merging` has the means of.
  """
  cells: dict[tuple, tuple[np.ndarray, fractions.Fraction]]
  counts: list[Count]
  usable: np.ndarray
  kept: np.ndarray
  used: dict[int, np.ndarray]
  shapes: set[tuple]
  padding: float
  cut_off: float
  own_cut_off: float


def merging(placed: Sequence[Placed], num_buckets: int, most_repeated: int) -> Merging:
  """Sums up what became of all data sets at all resolutions."""
  records, kept = (sum(int(mask.sum()) for mask in masks) for masks in ([one.usable for one in placed], [one.kept for one in placed]))
  mean = lambda name: sum(getattr(one, name) for one in placed) / max(1, kept)
  return Merging(len(set().union(*(one.shapes for one in placed))), num_buckets, 1 - kept / max(1, records), mean("padding"), mean("cut_off"),
                 mean("own_cut_off"), most_repeated)


class Sorted:
  """The records of one data set at one resolution, each with its own shape.

  Attributes:
    targets: buckets of the target sizes, prompts and condition images left open.
    family: what shapes are made of.
    shapes: [N, 1 + most condition images + 1] each row once: the places in `family` of the target, the condition images and the prompt class, then -1
      up to the end.
    counts: [N], how many records have each.
    stored: number of condition images -> the programs that its latents were cached for, where the stage has these prompt classes.
  """

  def __init__(self, spec: DatasetSpec, resolution: Resolution, index: Mapping, cache: Cache | None, shapes: Sequence, classes: tuple[int, ...],
               prompt: np.ndarray, reasons: dict[str, np.ndarray], max_crop: float):
    self.spec, self.resolution, self.cache, self._index = spec, resolution, cache, index
    self.targets = sizes.make_buckets(spec.task, resolution.base_px, resolution.ratios, 0, resolution.batch_size, resolution.multiple)
    self.ratio_weights = _per_target(resolution, self.targets)
    slots = sizes.make_buckets(spec.task, resolution.base_px, sizes.RATIOS, 0, 1, SLOT_PX) if spec.task == "ti2i" else ()
    size = lambda some: tuple((bucket.height, bucket.width) for bucket in some)
    rigid = "base_px" in index
    own = index["source_sizes"].any(axis=(1, 2)) == (spec.task == "ti2i")
    if rigid:  # a latent cache holds pictures of one size each
      own &= index["base_px"] == resolution.base_px
    self._target, self._cut = _fit(index["height"], index["width"], self.targets)
    columns = [self._target, *_nearest(index["source_sizes"], slots).T] if slots else [self._target]
    left_out = functools.reduce(np.logical_or, reasons.values())
    self._reasons = reasons | {"cropped": (self._cut > max_crop) & ~left_out}
    self._own, self._usable = own, own & ~left_out & ~self._reasons["cropped"]
    self.shapes, self.counts, self._number = _distinct([*columns, prompt], self._usable)
    self.family = Family(size(self.targets), size(slots), classes, self._reach(), rigid)
    self.stored = self._stored(shapes)

  def _stored(self, shapes: Sequence) -> dict[int, np.ndarray]:
    """Returns the shapes (task, base_px, target, condition images, prompt tokens) of this task and resolution as programs."""
    targets, sources, prompts = ({one: i for i, one in enumerate(some)} for some in (self.family.targets, self.family.sources, self.family.prompts))
    found = {}
    for task, base_px, target, images, tokens in shapes:
      if (task, base_px) == (self.spec.task, self.resolution.base_px):
        if target not in targets or tokens not in prompts or not set(images) <= set(sources):
          return {}  # of a stage with other prompt classes
        found.setdefault(len(images), []).append((targets[target], *(sources[one] for one in images), prompts[tokens]))
    return {number: np.unique(np.array(some), axis=0) for number, some in found.items()}

  def shape(self, program: Sequence[int]) -> tuple:
    """A program as `Sorted` is given those of a cache."""
    target, *images, prompt = program
    family = self.family
    return self.spec.task, self.resolution.base_px, family.targets[target], tuple(family.sources[i] for i in images), family.prompts[prompt]

  def _reach(self) -> tuple[tuple[float, float], ...]:
    """`Family.reach` of a sample of the records."""
    some = np.flatnonzero(self._usable)
    some = some[::max(1, len(some) // _SAMPLE)]
    ratio = np.log(self._index["width"][some] / self._index["height"][some])
    found = []
    for number, bucket in enumerate(self.targets):
      here = ratio[self._target[some] == number] - math.log(bucket.width / bucket.height)
      below, above = np.quantile(here, (0.01, 0.99)) if len(here) else (0.0, 0.0)
      found.append((-float(below), float(above)))
    return tuple(found)

  def groups(self) -> dict[int, np.ndarray]:
    """Number of condition images -> the places of its shapes in `shapes`."""
    number = (self.shapes >= 0).sum(axis=1) - 2
    return {int(one): np.flatnonzero(number == one) for one in np.unique(number)}

  def weights(self) -> np.ndarray:
    """How often each shape is seen, up to a factor, [N]."""
    return self.counts * self.resolution.weight * np.array([float(weight) for weight in self.ratio_weights])[self.shapes[:, 0]]

  def place(self, chosen: Mapping[int, np.ndarray], max_crop: float, enough: int, required: int) -> Placed:
    """Sorts the records.

    Args: number of condition images -> programs; largest share of a target that may be cut off; `enough` and `required` of `assign`.
    """
    offered, home, same = [], np.full(len(self.shapes), -1), np.full(len(self.shapes), -2)
    for number, rows in self.groups().items():
      some, shapes = chosen.get(number, np.zeros((0, 2 + number), int)), self.shapes[rows, :2 + number]
      place = assign(self.family, shapes, self.counts[rows], some, max_crop, enough, required)
      home[rows] = np.where(place >= 0, len(offered) + place, -1)
      known = {tuple(one): len(offered) + i for i, one in enumerate(some.tolist())}
      same[rows] = [known.get(tuple(shape), -2) for shape in shapes.tolist()]
      offered += map(tuple, some.tolist())
    nowhere = np.full(len(self._usable), -1)
    place = np.where(self._usable, home[self._number], -1) if len(home) else nowhere
    cut = self._recut(place, home, offered, max_crop)
    kept = place >= 0
    moved = kept & (place != (same[self._number] if len(home) else nowhere))
    order = np.argsort(place.astype(np.int16 if len(offered) < 2**15 else np.int32), kind="stable").astype(np.uint32)[(~kept).sum():]
    sizes_of = np.bincount(place[kept], minlength=len(offered))
    ends, weights, cells = np.cumsum(sizes_of), self._weights_of(place, kept, len(offered)), {}
    for number in sorted(np.flatnonzero(sizes_of), key=lambda number: self._key(offered[number])):
      cells[self._key(offered[number])] = order[ends[number] - sizes_of[number]:ends[number]], weights[number]
    used = {number: np.array([one for i, one in enumerate(offered) if sizes_of[i] and len(one) == 2 + number], int).reshape(-1, 2 + number)
            for number in self.groups()}
    names = {(self.spec.task, self.resolution, self.cache, *shape) for shape in map(tuple, self.shapes.tolist())}
    return Placed(cells, self._count(kept, moved), self._usable, kept, used, names, self._padding(place, kept, offered), float(cut[kept].sum()),
                  float(self._cut[kept].sum()))

  def _key(self, shape: tuple[int, ...]) -> tuple:
    return shape[0], tuple(self.family.sources[i] for i in shape[1:-1]), shape[-1]

  def _weights_of(self, place: np.ndarray, kept: np.ndarray, num: int) -> list[fractions.Fraction]:
    """Returns the weight of each program: the sum over its records of those of their own ratios, not of the ratio that they share now."""
    target = self._target
    if "own_height" in self._index:  # of the picture that latents were made of
      target = _fit(self._index["own_height"], self._index["own_width"], self.targets)[0]
    own = np.bincount(place[kept] * len(self.targets) + target[kept], minlength=num * len(self.targets)).reshape(num, len(self.targets))
    factors = [exact(self.resolution.weight) * exact(weight) for weight in self.ratio_weights]
    return [sum((int(count) * factor for count, factor in zip(row, factors) if count), fractions.Fraction(0)) for row in own]

  def _recut(self, place: np.ndarray, home: np.ndarray, offered: list[tuple], max_crop: float) -> np.ndarray:
    """Looks at the records whose target size is not their own, and moves on, in `place`, those that would lose more than `max_crop`; -1 where nothing
    holds them. Returns the share of each record's target that is cut off."""
    cut = self._cut.copy()
    if not offered or self.family.rigid:
      return cut
    target, (height, width) = np.array([shape[0] for shape in offered]), np.array(self.family.targets).T
    sides = lambda records: (self._index["height"][records], self._index["width"][records])
    crop = lambda records, targets: sizes.crop_fraction(*sides(records), height[targets], width[targets])
    elsewhere = np.flatnonzero((place >= 0) & (target[place] != self._target))
    cut[elsewhere] = crop(elsewhere, target[place[elsewhere]])
    bad = elsewhere[cut[elsewhere] > max_crop]
    bad = bad[np.argsort(self._number[bad], kind="stable")]
    used = np.unique(home[home >= 0])
    shapes, first = np.unique(self._number[bad], return_index=True)
    for shape, records in zip(shapes, np.split(bad, first[1:])):
      own = self.shapes[shape][self.shapes[shape] >= 0]
      others = [i for i in used if len(offered[i]) == len(own)]
      cost = costs(self.family, own[None], np.array([offered[i] for i in others]), None)[0]
      place[records] = -1
      for i in np.argsort(cost, kind="stable"):
        if np.isfinite(cost[i]) and len(records):
          lost = crop(records, target[others[i]])
          place[records[lost <= max_crop]], cut[records[lost <= max_crop]] = others[i], lost[lost <= max_crop]
          records = records[lost > max_crop]
    return cut

  def _padding(self, place: np.ndarray, kept: np.ndarray, offered: list[tuple]) -> float:
    code, num = np.unique(self._number[kept] * len(offered) + place[kept], return_counts=True) if offered else (np.zeros(0, int), np.zeros(0, int))
    shapes, total = self.shapes[code // max(1, len(offered))], 0.0
    for number in self.groups():
      here = np.flatnonzero((shapes >= 0).sum(axis=1) == 2 + number)
      there = np.array([offered[i] for i in code[here] % len(offered)], int).reshape(-1, 2 + number)
      total += float(num[here] @ padding(self.family, shapes[here, :2 + number], there))
    return total

  def _count(self, kept: np.ndarray, moved: np.ndarray) -> list[Count]:
    reasons = self._reasons | {"rare": self._usable & ~kept}
    count = lambda mask: np.bincount(self._target[self._own & mask], minlength=len(self.targets)).tolist()
    columns = {"records": count(True), "kept": count(kept), "moved": count(moved), **{name: count(reason) for name, reason in reasons.items()}}
    return [Count(self.spec.name, self.spec.split, self.spec.task, self.resolution.base_px, bucket.height, bucket.width,
                  **{name: values[i] for name, values in columns.items()}) for i, bucket in enumerate(self.targets) if columns["records"][i]]


def exact(weight: float) -> fractions.Fraction:
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


def _nearest(source_sizes: np.ndarray, slots: Sequence[Bucket]) -> np.ndarray:
  """Returns the place of the nearest of `slots` for each condition image, [n, most], -1 where there is none."""
  return _fit(source_sizes[..., 0], source_sizes[..., 1], slots)[0]


def _distinct(columns: Sequence[np.ndarray], which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (the distinct rows of columns of small numbers from -1 on, [N, C], a -1 moved to the end; how many of the records `which` have each, [N];
  the place of each record's, n, of which only those of `which` mean something)."""
  ranges = [int(column.max(initial=0)) + 2 for column in columns]
  code = np.zeros(len(which), np.int64)
  if math.prod(ranges) >= 2**62:
    raise ValueError(f"A record has {len(columns) - 2} condition images: so many cannot be sorted.")
  for column, size in zip(columns, ranges):
    code = code * size + (column + 1)
  if math.prod(ranges) <= _MOST_CODES:  # much quicker than sorting
    every = np.bincount(code[which], minlength=math.prod(ranges))
    codes = np.flatnonzero(every)
    counts, number = every[codes], np.cumsum(every > 0)[code] - 1
  else:
    codes, counts = np.unique(code[which], return_counts=True)
    number = np.searchsorted(codes, code)
  rows = np.empty((len(codes), len(columns)), np.int64)
  rest = codes
  for place in reversed(range(len(columns))):
    rest, rows[:, place] = np.divmod(rest, ranges[place])
  rows -= 1
  return np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), axis=1), counts, np.clip(number, 0, max(0, len(codes) - 1))
