"""The records of one data set at one resolution, sorted into buckets: to which each of them goes, and what becomes of those that go to none."""

import dataclasses
import fractions
import math
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines import buckets as sizes
from data_pipelines.buckets import Bucket
from data_pipelines.cache import Cache
from data_pipelines.kinds import Kinds
from data_pipelines.programs import Family, assign, costs, padding
from data_pipelines.specs import DatasetSpec, Resolution

# Why a record cannot be used; the first: it can.
REASONS = ("", "low_quality", "low_stage", "no_caption", "too_long", "cropped", "enlarged", "no_rejected")


@dataclasses.dataclass(frozen=True)
class Count:
  """What became of a task's records nearest to one target size: kept + low_quality + low_stage + no_caption + too_long + cropped + enlarged +
  no_rejected + rare = records.

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
  enlarged: int
  no_rejected: int
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
    place: [K], the number among `programs` of the program of each kind of records, -1 for none.
    programs: all that were offered, each as `Chooser` gives them.
    sizes, weights: how many records each of them has, and the sum of their weights.
    counts: per target size.
    usable, kept: how many records have a shape, and how many a bucket.
    used: number of condition images -> the programs that have records, as `Chooser` gives them.
    shapes: names of all shapes.
    padding, cut_off, own_cut_off: sums over the records that are kept of what `Merging` has the means of.
  """
  place: np.ndarray
  programs: list[tuple[int, ...]]
  sizes: np.ndarray
  weights: list[fractions.Fraction]
  counts: list[Count]
  usable: int
  kept: int
  used: dict[int, np.ndarray]
  shapes: set[tuple]
  padding: float
  cut_off: float
  own_cut_off: float


def merging(placed: Sequence[Placed], num_buckets: int, most_repeated: int) -> Merging:
  """Sums up what became of all data sets at all resolutions."""
  records, kept = sum(one.usable for one in placed), sum(one.kept for one in placed)
  mean = lambda name: sum(getattr(one, name) for one in placed) / max(1, kept)
  return Merging(len(set().union(*(one.shapes for one in placed))), num_buckets, 1 - kept / max(1, records), mean("padding"), mean("cut_off"),
                 mean("own_cut_off"), most_repeated)


class Sorted:
  """The records of one data set at one resolution, each kind with its own shape.

  Attributes:
    kinds: of the records.
    targets: buckets of the target sizes, prompts and condition images left open.
    family: what shapes are made of.
    shapes: [N, 1 + most condition images + 1] each row once: the places in `family` of the target, the condition images and the prompt class, then -1
      up to the end.
    counts: [N], how many records have each.
    own: [K], whether the records have the task and may be used at the resolution.
    reason: [K], why they cannot be used, a place in `REASONS`.
    stored: number of condition images -> the programs that its latents were cached for, where the stage has these prompt classes.
  """

  def __init__(self, spec: DatasetSpec, resolution: Resolution, r: int, kinds: Kinds, cache: Cache | None, shapes: Sequence, classes: tuple[int, ...],
               rigid: bool):
    """Args: data set; resolution, and its place among those that the kinds are made for; kinds; how its latents are stored, and for which shapes;
    prompt classes, tokens; whether the records hold latents."""
    self.spec, self.resolution, self.cache, self.kinds, self.r = spec, resolution, cache, kinds, r
    self.targets, slots = kinds.targets[r], kinds.slots[r]
    self.ratio_weights = _per_target(resolution, self.targets)
    every, target = np.arange(len(kinds.counts)), kinds.target(r)
    own = (kinds.is_edit == (spec.task == "ti2i")) & kinds.at_resolution(r)
    reason = np.where((kinds.reason == 0) & ~kinds.fits(r, every, target), REASONS.index("cropped"), kinds.reason)
    reason = np.where((reason == 0) & kinds.enlarged(r), REASONS.index("enlarged"), reason)
    self.own, self.reason = own, reason
    self._reasons = _sum(reason[own] * len(self.targets) + target[own], kinds.counts[own], len(REASONS) * len(self.targets)).reshape(len(REASONS), -1)
    usable = np.flatnonzero(own & (reason == 0))
    ranges = (len(self.targets), *[len(slots) + 1] * kinds.num_sources, len(classes))
    codes, place = np.unique(np.ravel_multi_index((target[usable], *(kinds.sources(r)[usable].T + 1), kinds.prompt[usable]), ranges),
                             return_inverse=True)
    self._shape = np.full(len(every), -1)
    self._shape[usable] = place
    self.shapes, self.counts = _unpacked(codes, ranges), _sum(place, kinds.counts[usable], len(codes))
    size = lambda some: tuple((bucket.height, bucket.width) for bucket in some)
    self.family = Family(size(self.targets), size(slots), classes, self._reach(target), rigid)
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

  def _reach(self, target: np.ndarray) -> tuple[tuple[float, float], ...]:
    """`Family.reach` of a sample of the records, given the target of each kind."""
    kind, ratio = self.kinds.sample
    kind, ratio = kind[self._shape[kind] >= 0], ratio[self._shape[kind] >= 0]
    found = []
    for number, bucket in enumerate(self.targets):
      here = ratio[target[kind] == number] - math.log(bucket.width / bucket.height)
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

  def usable(self) -> np.ndarray:
    """Returns which kinds have a shape, [K]."""
    return self._shape >= 0

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
    kinds, everywhere = self.kinds, np.full(len(self._shape), -1)
    usable = np.flatnonzero(self._shape >= 0)
    everywhere[usable] = _Recut(self, offered, np.unique(home[home >= 0]))(usable, self._shape[usable], home[self._shape[usable]])
    kept = np.flatnonzero(everywhere >= 0)
    shape, place, times, own_target = self._shape[kept], everywhere[kept], kinds.counts[kept], kinds.target(self.r)[kept]
    there = own_target if self.family.rigid else np.array([program[0] for program in offered], int)[place]
    cuts = kinds.cut_off(self.r, kept, there), kinds.cut_off(self.r, kept, own_target)
    ratios = place * len(self.targets) + kinds.own_target(self.r)[kept]
    sizes_of = _sum(place, times, len(offered))
    by_target = lambda some: _sum(self.shapes[shape[some], 0], times[some], len(self.targets))
    used = {number: np.array([one for i, one in enumerate(offered) if sizes_of[i] and len(one) == 2 + number], int).reshape(-1, 2 + number)
            for number in self.groups()}
    names = {(self.spec.task, self.resolution, self.cache, *one) for one in map(tuple, self.shapes.tolist())}
    return Placed(everywhere, offered, sizes_of, self._weights_of(_sum(ratios, times, len(offered) * len(self.targets)), len(offered)),
                  self._count(by_target(slice(None)), by_target(place != same[shape])), int(self.counts.sum()), int(times.sum()), used, names,
                  self._padding(shape, place, times, offered), *cuts)

  def cells(self, placed: Placed, records: np.ndarray) -> dict[tuple, tuple[range, fractions.Fraction]]:
    """Writes the positions of all records that are kept; returns (target, source sizes, prompt class) -> (where in `records` its own are, ascending;
    the sum of their weights)."""
    key = lambda shape: (shape[0], tuple(self.family.sources[i] for i in shape[1:-1]), shape[-1])
    found = zip(map(key, placed.programs), self.kinds.positions(placed.place, len(placed.programs), records), placed.weights)
    return {key: (there, weight) for key, there, weight in sorted(found, key=lambda one: one[0]) if there}

  def _weights_of(self, counts: np.ndarray, num: int) -> list[fractions.Fraction]:
    """Returns the weight of each of `num` programs: the sum over its records of those of their own ratios, not of the ratio that they share now.
    Given are the counts of each program and ratio."""
    factors = [exact(self.resolution.weight) * exact(weight) for weight in self.ratio_weights]
    return [sum((count * factor for count, factor in zip(row, factors) if count), fractions.Fraction(0))
            for row in counts.reshape(num, len(factors)).tolist()]

  def _padding(self, shape: np.ndarray, place: np.ndarray, times: np.ndarray, offered: list[tuple]) -> float:
    shapes, total = self.shapes[shape], 0.0
    for number in self.groups():
      here = np.flatnonzero((shapes >= 0).sum(axis=1) == 2 + number)
      there = np.array([offered[i] for i in place[here]], int).reshape(-1, 2 + number)
      total += float(times[here] @ padding(self.family, shapes[here, :2 + number], there))
    return total

  def _count(self, kept: np.ndarray, moved: np.ndarray) -> list[Count]:
    columns = dict(zip(REASONS, self._reasons)) | {"records": self._reasons.sum(axis=0), "kept": kept, "moved": moved}
    columns["rare"] = columns.pop("") - kept
    return [Count(self.spec.name, self.spec.split, self.spec.task, self.resolution.base_px, bucket.height, bucket.width,
                  **{name: int(values[i]) for name, values in columns.items()}) for i, bucket in enumerate(self.targets) if columns["records"][i]]


class _Recut:
  """Looks at kinds of records whose program has another target size than their own, and moves on those that would lose more than they may."""

  def __init__(self, of: Sorted, offered: list[tuple], used: np.ndarray):
    self._of, self._family, self._shapes, self._offered, self._used = of, of.family, of.shapes, offered, used
    self._target = np.array([shape[0] for shape in offered], int)
    self._ranked: dict[int, list[int]] = {}

  def __call__(self, kinds: np.ndarray, shape: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Returns the program of each of some kinds, -1 where none holds it, given their shapes and the programs of these."""
    place = place.copy()
    if not self._offered or self._family.rigid:
      return place
    fits = lambda rows, targets: self._of.kinds.fits(self._of.r, kinds[rows], targets)
    elsewhere = np.flatnonzero((place >= 0) & (self._target[place] != self._shapes[shape, 0]))
    bad = elsewhere[~fits(elsewhere, self._target[place[elsewhere]])]
    bad = bad[np.argsort(shape[bad], kind="stable")]
    numbers, first = np.unique(shape[bad], return_index=True)
    for number, rows in zip(numbers.tolist(), np.split(bad, first[1:])):
      place[rows] = -1
      for other in self._others(number):
        there = fits(rows, self._target[other])
        place[rows[there]] = other
        rows = rows[~there]
        if not len(rows):
          break
    return place

  def _others(self, number: int) -> list[int]:
    """Returns the programs that a shape's records may go to, the cheapest first."""
    if number not in self._ranked:
      own = self._shapes[number][self._shapes[number] >= 0]
      others = [i for i in self._used.tolist() if len(self._offered[i]) == len(own)]
      cost = costs(self._family, own[None], np.array([self._offered[i] for i in others]), None)[0]
      self._ranked[number] = [others[i] for i in np.argsort(cost, kind="stable") if np.isfinite(cost[i])]
    return self._ranked[number]


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


def _sum(places: np.ndarray, counts: np.ndarray, num: int) -> np.ndarray:
  """Returns the sum of the counts at each of `num` places."""
  return np.bincount(places, counts, num).astype(np.int64)


def _unpacked(codes: np.ndarray, ranges: Sequence[int]) -> np.ndarray:
  """Returns the shapes of codes, [N, number of ranges]; a condition image that is not there is -1, at the end."""
  rows = np.stack(np.unravel_index(codes, ranges), axis=1).astype(np.int64)
  rows[:, 1:-1] -= 1
  return np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), axis=1)
