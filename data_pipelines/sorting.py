"""The records of one data set at one resolution, sorted into buckets: to which each of them goes, and what becomes of those that go to none."""

import dataclasses
import fractions
import math
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines import buckets as sizes
from data_pipelines.buckets import Bucket
from data_pipelines.cache import Cache
from data_pipelines.programs import Family, assign, costs, padding
from data_pipelines.specs import SLOT_PX, DatasetSpec, Resolution
from data_pipelines.tally import Tally, pieces

REASONS = ("", "low_quality", "low_stage", "no_caption", "too_long", "cropped", "enlarged")  # why a record cannot be used; the first: it can
_SAMPLE = 10**6  # records that are enough to know how far their aspect ratios spread


@dataclasses.dataclass(frozen=True)
class Count:
  """What became of a task's records nearest to one target size: kept + low_quality + low_stage + no_caption + too_long + cropped + enlarged + rare =
  records.

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
    place: [n], the number of each record's program among `programs`, -1 for none.
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

  def positions(self, every: np.ndarray) -> list[range]:
    """Writes the positions of the records of each program, ascending, one program after the other; returns where those of each are."""
    ends = np.cumsum(self.sizes)
    filled = ends - self.sizes
    places = [range(*one) for one in zip(filled.tolist(), ends.tolist())]
    for piece in pieces(len(self.place)):
      here = self.place[piece]
      order = np.argsort(here, kind="stable")
      nums = np.bincount(here + 1, minlength=len(self.programs) + 1)
      stops = np.cumsum(nums)
      for number in np.flatnonzero(nums[1:]):
        some = order[stops[number]:stops[number + 1]]
        every[filled[number]:filled[number] + len(some)] = some + piece.start
        filled[number] += len(some)
    return places


def merging(placed: Sequence[Placed], num_buckets: int, most_repeated: int) -> Merging:
  """Sums up what became of all data sets at all resolutions."""
  records, kept = sum(one.usable for one in placed), sum(one.kept for one in placed)
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
               prompt: np.ndarray, reason: np.ndarray, max_crop: float):
    """Args: data set; resolution; its index; how its latents are stored, and for which shapes; prompt classes, tokens; [n] the class of each record;
    [n] why it cannot be used, a place in `REASONS`, 0 if it can; largest share of a target that may be cut off."""
    self.spec, self.resolution, self.cache, self._index = spec, resolution, cache, index
    self.targets = sizes.make_buckets(spec.task, resolution.base_px, resolution.ratios, 0, resolution.batch_size, resolution.multiple)
    self.ratio_weights = _per_target(resolution, self.targets)
    self._slots = sizes.make_buckets(spec.task, resolution.base_px, sizes.RATIOS, 0, 1, SLOT_PX) if spec.task == "ti2i" else ()
    num_sources = index["source_sizes"].shape[1] if self._slots else 0
    self._ranges = (len(self.targets), *[len(self._slots) + 1] * num_sources, len(classes))
    if math.prod(self._ranges) >= 2**62:
      raise ValueError(f"A record has {num_sources} condition images: so many cannot be sorted.")
    self._tally = Tally(math.prod(self._ranges))
    self._code = np.full(len(index["height"]), -1, np.int32 if math.prod(self._ranges) < 2**31 else np.int64)
    self._reasons = np.zeros((len(REASONS), len(self.targets)), np.int64)
    spread = [self._look(piece, prompt[piece], reason[piece], max_crop) for piece in pieces(len(self._code))]
    codes, self.counts = self._tally.result()
    self.shapes = _unpacked(codes, self._ranges)
    size = lambda some: tuple((bucket.height, bucket.width) for bucket in some)
    self.family = Family(size(self.targets), size(self._slots), classes, self._reach(spread), "base_px" in index)
    self.stored = self._stored(shapes)

  def _look(self, piece: slice, prompt: np.ndarray, reason: np.ndarray, max_crop: float) -> tuple[np.ndarray, np.ndarray]:
    """Finds the shapes of some records; returns (target, logarithm of width to height) of a sample of those that have one."""
    rows = {name: np.array(self._index[name][piece]) for name in ("height", "width", "source_sizes", "base_px") if name in self._index}
    own = rows["source_sizes"].any(axis=(1, 2)) == (self.spec.task == "ti2i")
    if "base_px" in rows:  # a latent cache holds pictures of one size each
      own &= rows["base_px"] == self.resolution.base_px
    target, cut = _fit(rows["height"], rows["width"], self.targets)
    reason = np.where((reason == 0) & (cut > max_crop), REASONS.index("cropped"), reason)
    if self.spec.max_enlarge:
      reason = np.where((reason == 0) & (self._enlarged(piece) > self.spec.max_enlarge), REASONS.index("enlarged"), reason)
    self._reasons += np.bincount(reason[own] * len(self.targets) + target[own], minlength=self._reasons.size).reshape(self._reasons.shape)
    usable = np.flatnonzero(own & (reason == 0))
    columns = [target, *(_nearest(rows["source_sizes"], self._slots).T + 1 if self._slots else ()), prompt]
    code = np.zeros(len(usable), np.int64)
    for column, size in zip(columns, self._ranges, strict=True):
      code = code * size + column[usable]
    self._code[piece.start + usable] = code
    self._tally.add(code)
    some = usable[(piece.start + usable) % max(1, len(self._code) // _SAMPLE) == 0]
    return target[some], np.log(rows["width"][some] / rows["height"][some])

  def _enlarged(self, piece: slice) -> np.ndarray:
    """Returns by how much some pictures, or those that latents were made of, are scaled up to cover the target sizes nearest to them."""
    own = "own_" * ("own_height" in self._index)
    height, width = (np.maximum(1, self._index[f"{own}{side}"][piece]) for side in ("height", "width"))
    target, _ = _fit(height, width, self.targets)
    tall, wide = (np.array([getattr(bucket, side) for bucket in self.targets])[target] for side in ("height", "width"))
    return np.maximum(tall / height, wide / width)

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

  def _reach(self, spread: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[tuple[float, float], ...]:
    """`Family.reach` of a sample of the records."""
    target, ratio = (np.concatenate(some) for some in zip(*spread)) if spread else (np.zeros(0), np.zeros(0))
    found = []
    for number, bucket in enumerate(self.targets):
      here = ratio[target == number] - math.log(bucket.width / bucket.height)
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
    """Returns which records have a shape, [n]."""
    return self._code >= 0

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
    num, num_targets = max(1, len(offered)), len(self.targets)
    everywhere = np.full(len(self._code), -1, np.int16 if num < 2**15 else np.int32)
    pairs, ratios, cuts = Tally(len(self.shapes) * num), Tally(num * num_targets), np.zeros(2)
    recut = _Recut(self.family, self.shapes, offered, np.unique(home[home >= 0]), max_crop)
    for piece in pieces(len(self._code)):
      usable = np.flatnonzero(self._code[piece] >= 0)
      shape = self._tally.place(self._code[piece][usable])
      height, width = (np.array(self._index[side][piece])[usable] for side in ("height", "width"))
      place, own_cut, cut = recut(height, width, shape, home[shape])
      kept = np.flatnonzero(place >= 0)
      everywhere[piece.start + usable] = place
      pairs.add(shape[kept] * num + place[kept])
      ratios.add(place[kept] * num_targets + self._own_target(piece, usable, shape)[kept])
      cuts += cut[kept].sum(), own_cut[kept].sum()
    code, times = pairs.result()
    shape, place = np.divmod(code, num)
    sizes_of = np.bincount(place, times, minlength=len(offered)).astype(np.int64)
    by_target = lambda some: np.bincount(self.shapes[shape[some], 0], times[some], minlength=num_targets).astype(np.int64)
    used = {number: np.array([one for i, one in enumerate(offered) if sizes_of[i] and len(one) == 2 + number], int).reshape(-1, 2 + number)
            for number in self.groups()}
    names = {(self.spec.task, self.resolution, self.cache, *one) for one in map(tuple, self.shapes.tolist())}
    return Placed(everywhere, offered, sizes_of, self._weights_of(*ratios.result(), len(offered)),
                  self._count(by_target(slice(None)), by_target(place != same[shape])), int(self.counts.sum()), int(times.sum()), used, names,
                  self._padding(shape, place, times, offered), *map(float, cuts))

  def cells(self, placed: Placed, records: np.ndarray) -> dict[tuple, tuple[range, fractions.Fraction]]:
    """Writes the positions of all records that are kept; returns (target, source sizes, prompt class) -> (where in `records` its own are, ascending;
    the sum of their weights)."""
    key = lambda shape: (shape[0], tuple(self.family.sources[i] for i in shape[1:-1]), shape[-1])
    found = zip(map(key, placed.programs), placed.positions(records), placed.weights)
    return {key: (there, weight) for key, there, weight in sorted(found, key=lambda one: one[0]) if there}

  def _own_target(self, piece: slice, usable: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Returns the target size nearest to each picture: where the records hold latents, to the one that these were made of."""
    if "own_height" not in self._index:
      return self.shapes[shape, 0]
    return _fit(*(np.array(self._index[side][piece])[usable] for side in ("own_height", "own_width")), self.targets)[0]

  def _weights_of(self, code: np.ndarray, times: np.ndarray, num: int) -> list[fractions.Fraction]:
    """Returns the weight of each program: the sum over its records of those of their own ratios, not of the ratio that they share now."""
    found, factors = [fractions.Fraction(0)] * num, [exact(self.resolution.weight) * exact(weight) for weight in self.ratio_weights]
    for one, count in zip(code.tolist(), times.tolist()):
      found[one // len(factors)] += count * factors[one % len(factors)]
    return found

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
  """Looks at records one by one whose program has another target size than their own, and moves on those that would lose more than `max_crop`."""

  def __init__(self, family: Family, shapes: np.ndarray, offered: list[tuple], used: np.ndarray, max_crop: float):
    self._family, self._shapes, self._offered, self._used, self._max_crop = family, shapes, offered, used, max_crop
    self._target = np.array([shape[0] for shape in offered], int)
    self._sides = np.array(family.targets).T
    self._ranked: dict[int, list[int]] = {}

  def __call__(self, height: np.ndarray, width: np.ndarray, shape: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (the program of each record, -1 where none holds it; the share that its own target size cuts off; that which its program's does)."""
    crop = lambda rows, targets: sizes.crop_fraction(height[rows], width[rows], *(side[targets] for side in self._sides))
    own = crop(slice(None), self._shapes[shape, 0])
    cut, place = own.copy(), place.copy()
    if not self._offered or self._family.rigid:
      return place, own, cut
    elsewhere = np.flatnonzero((place >= 0) & (self._target[place] != self._shapes[shape, 0]))
    cut[elsewhere] = crop(elsewhere, self._target[place[elsewhere]])
    bad = elsewhere[cut[elsewhere] > self._max_crop]
    bad = bad[np.argsort(shape[bad], kind="stable")]
    numbers, first = np.unique(shape[bad], return_index=True)
    for number, rows in zip(numbers.tolist(), np.split(bad, first[1:])):
      place[rows] = -1
      for other in self._others(number):
        lost = crop(rows, self._target[other])
        fits = lost <= self._max_crop
        place[rows[fits]], cut[rows[fits]] = other, lost[fits]
        rows = rows[~fits]
        if not len(rows):
          break
    return place, own, cut

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


def _unpacked(codes: np.ndarray, ranges: Sequence[int]) -> np.ndarray:
  """Returns the shapes of codes, [N, number of ranges]; a condition image that is not there is -1, at the end."""
  rows = np.stack(np.unravel_index(codes, ranges), axis=1).astype(np.int64)
  rows[:, 1:-1] -= 1
  return np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), axis=1)
