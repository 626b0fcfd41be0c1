"""Which records batch k holds: a pure function of (seed, mixture, k), known without opening a record.

A *cell* is one data set in one bucket. Cells have `Turns`: a data set has its weight's share of the batches, its resolutions divide that by their
weights times their record counts, and so do the buckets of a resolution. Inside a cell the v-th
visit takes positions v B to v B + B - 1 of an endless stream; position p is place p mod n of epoch p div n, and each epoch is a permutation of the
n records of its own. So every record is seen exactly once per epoch of its cell, and equally often as those of other cells of its data set and
resolution; any k can be asked at once, and neither hosts nor workers enter.

A bucket is (task, target size, source sizes, prompt length). Two tasks: "t2i" takes the records without condition images, "ti2i" (editing)
those with some. A record's own shape is the target size and the sizes of condition images nearest to its pictures' aspect ratios, these among all
ratios at the resolution's area, in multiples of one vision slot; and the smallest prompt class that holds the longest of its captions that the stage
may use. Where that would be more shapes than `max_programs`, `data_pipelines.programs` says which buckets there are.
"""

import collections
import dataclasses
import fractions
import functools
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from data_pipelines.buckets import Bucket
from data_pipelines.cache import Cache, cached_shapes, open_cache
from data_pipelines.columns import nearby
from data_pipelines.order import Turns, permute, scatter
from data_pipelines.programs import PENALTIES, Chooser, Family, Group
from data_pipelines.records import KINDS, open_split
from data_pipelines.sorting import REASONS, Count, Placed, Sorted, exact, merging
from data_pipelines.specs import TASKS, DatasetSpec, Resolution, source_grids
from data_pipelines.tally import pieces
from data_pipelines.tokenizer import PromptTokenizer

MOST_LEFT_OUT = 0.01  # of the records of a data set, for want of programs


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
    return np.asarray(self.cell.records[self.places], np.int64)


Found = tuple[Sequence[dict], Mapping[str, np.ndarray], Cache | None, Sequence]


def open_dataset(spec: DatasetSpec) -> Found:
  """The records of a data set and its index, see `data_pipelines.records.open_split`; if it holds latents, its `Cache` and the shapes of the buckets
  that it was made for."""
  cached = open_cache(spec.data_dir, spec.name)
  return *open_split(spec.data_dir, spec.name, spec.split), cached, cached_shapes(spec.data_dir, spec.name) if cached else ()


class Mixture:
  """The order of batches; see the module docstring.

  Attributes:
    buckets: all batch shapes, the same on every process.
    counts: what became of the records.
    merging: what it cost that shapes share buckets.
    programs: the shapes of the buckets, (task, resolution, cache, number of condition images) -> as `data_pipelines.programs.Chooser` gives them.
    used: the same of each data set alone.
    shapes: those of each data set in words: (task, base_px, target size, sizes of condition images, prompt tokens) of each bucket.
    datasets, resolutions, max_crop: as given.
    sources: the records of each data set, by position.
  """

  def __init__(self, datasets: Sequence[DatasetSpec], resolutions: Sequence[Resolution], num_tokens: int, tokenizer: PromptTokenizer, seed: int,
               prompt_classes: Sequence[int] = (), max_crop: float = 0.2, min_bucket_records: int = 0, max_programs: int = 0,
               programs: Mapping[tuple, np.ndarray] | None = None, every: bool = False,
               find: Callable[[DatasetSpec], "Found"] | None = None):
    """Args: data sets; resolutions; M, the longest prompt, condition images not counted; tokenizer; seed; further, shorter prompt lengths that
    have buckets of their own; largest share of a target that may be cut off; fewest records for which a bucket is worth a compiled step; most
    buckets, 0 for one per shape; `programs` of another mixture with the same resolutions, but for batch sizes, and the same prompt lengths, in
    place of own ones; whether records count whose quality, stage, size or captions the data sets' specs refuse; what opens a data set,
    `open_dataset` unless it is made up.

    Raises:
      ValueError: numbers that make no mixture, or a data set of which nothing is left.
    """
    _check(datasets, resolutions, num_tokens, prompt_classes, seed)
    self.datasets, self.resolutions, self.max_crop = tuple(datasets), tuple(resolutions), max_crop
    self._classes = tuple(sorted({*prompt_classes, num_tokens}))
    self._tokenizer, self._seed, self._min_records, self._max_programs = tokenizer, seed, min_bucket_records, max_programs
    self.sources, self._sample_ids = [], []
    self._every = every
    self._build(programs, find or open_dataset)
    self._turns = Turns([cell.weight for cell in self._cells], seed)

  # ---- which records go where --------------------------------------------------------------------

  def _build(self, given: Mapping[tuple, np.ndarray] | None, find: Callable[[DatasetSpec], "Found"]) -> None:
    sorts = []
    for spec in self.datasets:
      source, index, cached, shapes = find(spec)
      self.sources.append(source)
      self._sample_ids.append(nearby(index["sample_id"]))
      reason, prompt = self._unusable(spec, index)
      if self._every:  # those that the spec refuses go by their pictures alone
        prompt[reason > 0], reason[:] = 0, 0
        spec = dataclasses.replace(spec, max_enlarge=0.0)
      sort = functools.partial(Sorted, spec, index=index, cache=cached, shapes=shapes, classes=self._classes, prompt=prompt, reason=reason,
                               max_crop=self.max_crop)
      sorts.append([sort(resolution=resolution) for resolution in self.resolutions])
    chosen = self._choose(sorts) if given is None else given
    placed = self._place(sorts, chosen, self._min_records, stored=given is None)
    buckets, cells, alpha = {}, [], any(spec.alpha for spec in self.datasets)
    for d, (spec, parts, own) in enumerate(zip(self.datasets, sorts, placed)):
      if not any(one.kept for one in own):
        self._nothing_left(spec, given is not None)
        continue
      total = sum(sum(one.weights) for one in own)
      for r, (part, one) in enumerate(zip(parts, own)):
        for (target, source_sizes, prompt), (records, weight) in part.cells(one).items():
          bucket = self._bucket(part.targets[target], source_sizes, self._classes[prompt])
          bucket = dataclasses.replace(bucket, cache=part.cache, alpha=alpha)
          cells.append(Cell(buckets.setdefault(bucket, len(buckets)), d, r, weight / total * exact(spec.weight), records))
    self.buckets: tuple[Bucket, ...] = tuple(buckets)
    self.counts: tuple[Count, ...] = tuple(count for own in placed for one in own for count in one.counts)
    self._cells = tuple(cells)
    self.used = tuple(_used([parts], [own]) for parts, own in zip(sorts, placed))
    self.shapes = tuple(tuple(part.shape(row) for part, one in zip(parts, own) for some in one.used.values() for row in some.tolist())
                        for parts, own in zip(sorts, placed))
    self.programs = _used(sorts, placed)
    repeated = (-(-self.buckets[cell.bucket].batch_size // len(cell.records)) for cell in cells)
    self.merging = merging([one for own in placed for one in own], len(buckets), max(repeated, default=1))

  def _nothing_left(self, spec: DatasetSpec, may_be: bool) -> None:
    sentence = (f"No record of {spec.name!r} ({spec.split}) is left by task={spec.task}, min_quality={spec.min_quality}, "
                f"min_stage={spec.min_stage}, max_enlarge={spec.max_enlarge}, languages={spec.languages}, "
                f"caption_weights={dict(spec.caption_weights)}, num_tokens={self._classes[-1]}, max_crop={self.max_crop}, "
                f"min_bucket_records={self._min_records} and max_programs={self._max_programs}")
    if not may_be:
      raise ValueError(f"{sentence}: loosen one or add ratios.")
    logging.warning("%s and the buckets of the training data: it is not looked at.", sentence)

  def _place(self, sorts: Sequence[Sequence[Sorted]], chosen: Mapping[tuple, np.ndarray], min_records: int,
             stored: bool = True) -> list[list[Placed]]:
    """Returns where the records of each data set are at each resolution, given the programs of each group, and with `stored` those that latents were
    cached for."""
    def place(one: Sorted, r: int) -> Placed:
      here = {key[3]: some for key, some in chosen.items() if key[:3] == (one.spec.task, r, one.cache)} | (one.stored if stored else {})
      return one.place(here, self.max_crop, one.resolution.batch_size if self._max_programs and not one.stored else 0, min_records)
    return [[place(one, r) for r, one in enumerate(parts)] for parts in sorts]

  def _choose(self, sorts: Sequence[Sequence[Sorted]]) -> dict[tuple, np.ndarray]:
    """Returns the programs of each group of shapes, as few as there may be.

    Raises:
      ValueError: so few leave out too many records.
    """
    keys, groups = _groups(sorts)
    stored = len({(one.spec.task, r, one.cache, *shape) for parts in sorts for r, one in enumerate(parts) for some in one.stored.values()
                  for shape in some.tolist()})
    if self._max_programs and stored and stored + bool(groups) > self._max_programs:
      raise ValueError(f"The latent caches of the mixture are made for {stored} buckets, and max_programs={self._max_programs}"
                       + (" leaves too few for the other data sets" if groups else "") + ": raise it, or cache for a stage with fewer.")
    most = self._max_programs - stored if self._max_programs else sum(len(group.shapes) for group in groups)
    chooser, level = Chooser(groups, most, self.max_crop), np.zeros(len(sorts), int)
    while level.max() < len(PENALTIES):
      chosen = dict(zip(keys, chooser(np.array(PENALTIES)[level])))
      if not self._max_programs and not stored:
        return chosen
      lost, usable = np.array([_lost(parts, own) for parts, own in zip(sorts, self._place(sorts, chosen, 0))]).T
      over = lost > np.maximum(1, MOST_LEFT_OUT * usable)
      if not over.any():
        return chosen
      level += over
    worst = int((lost / np.maximum(1, usable) * over).argmax())
    sentence = f"{lost[worst] / usable[worst]:.1%} of the records of data set {self.datasets[worst].name!r} ({self.datasets[worst].task})"
    if any(one.stored for one in sorts[worst]):
      raise ValueError(f"{sentence} fit none of the buckets that their latents were cached for: cache them for a stage with these prompts.")
    if any(one.family.rigid for one in sorts[worst]):
      raise ValueError(f"With max_programs={self._max_programs}, {sentence} would be in no batch, because latents cannot be cut: cache them anew, or "
                       "give max_programs=0 for a bucket per shape.")
    latents = f", of which {stored} are those of latent caches" if stored else ""
    raise ValueError(f"With max_programs={self._max_programs}{latents}, {sentence} would be in no batch; all records together have "
                     f"{chooser.num_shapes} shapes. Raise it, or max_crop, or leave out ratios or resolutions.")

  def _unusable(self, spec: DatasetSpec, index: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (why each record cannot be used, a place in `REASONS`, the first that holds; the prompt class of its longest usable caption)."""
    num = len(index["height"])
    reason, prompt, first = np.zeros(num, np.uint8), np.zeros(num, np.uint8 if len(self._classes) < 256 else np.uint32), 0
    # Lengths by another tokenizer say nothing: all prompts get the longest class, and one that does not fit is found when it is read.
    known = str(index["tokenizer"]) == self._tokenizer.fingerprint
    for piece in pieces(num):
      counts = np.array(index["num_captions"][piece])
      captions = slice(first, first := first + int(counts.sum()))
      some = {name: np.array(index[name][captions]) for name in ("caption_language", "caption_kind", "caption_tokens")}
      tokens = some["caption_tokens"] if known else np.full_like(some["caption_tokens"], self._classes[-1])
      length = _longest(np.where(usable_captions(some | {"language_names": index["language_names"]}, spec), tokens, 0), counts)
      tests = {"low_quality": np.array(index["quality"][piece]) < np.float32(spec.min_quality),
               "low_stage": np.array(index["stage"][piece]) < spec.min_stage, "no_caption": length == 0, "too_long": length > self._classes[-1]}
      reason[piece] = np.select(list(tests.values()), [REASONS.index(name) for name in tests], 0)
      prompt[piece] = np.searchsorted(self._classes, np.minimum(length, self._classes[-1]))
    return reason, prompt

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

  def first_needed(self, start: int, end: int) -> list[int]:
    """Returns the numbers of all buckets: in the order in which the batches from `start` on need them, as far as these are looked at; then those that
    none of them needs, the most frequent first. Looked at are those before `end`, 10,000 at most."""
    order = dict.fromkeys(self._cells[self._turns(k)[0]].bucket for k in range(start, min(end, start + 10_000)))
    share = collections.Counter()
    for cell, part in zip(self._cells, self.shares):
      share[cell.bucket] += part
    return list(order | dict.fromkeys(sorted(range(len(self.buckets)), key=lambda bucket: -share[bucket])))

  def sample_ids(self, dataset: int, records: np.ndarray) -> np.ndarray:
    """Returns the ids, int64, of records of a data set."""
    return np.asarray(self._sample_ids[dataset][records])

  @property
  def cells(self) -> tuple[Cell, ...]:
    """All cells: data set by data set, resolution by resolution."""
    return self._cells

  @functools.cached_property
  def digest(self) -> str:
    """Hexadecimal digits that differ where any batch does."""
    whole = hashlib.sha256(repr((self._seed, [dataclasses.replace(bucket, cache=None) for bucket in self.buckets])).encode())
    for cell in self._cells:
      whole.update(repr((cell.bucket, cell.dataset, cell.resolution, cell.weight, len(cell.records), zlib.crc32(cell.records))).encode())
    return whole.hexdigest()[:16]

  @property
  def shares(self) -> tuple[float, ...]:
    """The share of the batches that each of `cells` has, 0 to 1."""
    total = sum(cell.weight for cell in self._cells)
    return tuple(float(cell.weight / total) for cell in self._cells)

  # ---- one pass for evaluation -------------------------------------------------------------------

  def held_out(self, max_samples: int | None = None) -> list[tuple[int, list[tuple[Cell, int]]]]:
    """Returns for each bucket (its number, (cell, place in the cell's records) of the records to evaluate on), in an order that a hash of sample_id
    gives, so that a few of them are from anywhere in the source.

    `max_samples` bounds their number at each resolution. Then buckets get whole batches, as many as their share of the records says, so that little
    of a batch is filler; what is less than a batch is taken where there is not enough else.
    """
    cells = {}
    for cell in self._cells:  # two resolutions may share a bucket; the same record is looked at once
      cells.setdefault(cell.bucket, {}).setdefault(cell.dataset, cell)
    num = {bucket: sum(len(cell.records) for cell in own.values()) for bucket, own in cells.items()}
    chosen = {}
    for r in range(len(self.resolutions)):
      here = {bucket: num[bucket] for bucket, own in cells.items() if min(cell.resolution for cell in own.values()) == r}
      chosen |= here if max_samples is None or sum(here.values()) <= max_samples else self._whole_batches(here, max_samples)
    return [(bucket, self._scattered(list(cells[bucket].values()), chosen[bucket])) for bucket in range(len(self.buckets))]

  def _whole_batches(self, num: dict[int, int], max_samples: int) -> dict[int, int]:
    """Returns how many of the `num[bucket]` records of each bucket are evaluated."""
    size = {bucket: self.buckets[bucket].batch_size for bucket in num}
    wanted = {bucket: max_samples * some / sum(num.values()) for bucket, some in num.items()}
    chosen = {bucket: min(int(wanted[bucket] // size[bucket]), some // size[bucket]) * size[bucket] for bucket, some in num.items()}
    for whole in (True, False):
      for bucket in sorted(num, key=lambda bucket: chosen[bucket] - wanted[bucket]):  # those that lack most of their share come first
        batch = min(size[bucket], num[bucket] - chosen[bucket])
        left = max_samples - sum(chosen.values())
        if batch and (batch == size[bucket] if whole else True) and (batch <= left or not any(chosen.values())):
          chosen[bucket] += batch
    return chosen

  def _scattered(self, cells: list[Cell], num: int) -> list[tuple[Cell, int]]:
    """Returns `num` of a bucket's (cell, place), those with the lowest hash first."""
    if not num:
      return []
    hashes = np.concatenate([scatter(self.sample_ids(cell.dataset, cell.records), cell.dataset) for cell in cells])
    starts = np.cumsum([0, *[len(cell.records) for cell in cells]])
    lowest = np.argpartition(hashes, num - 1)[:num]
    lowest = lowest[np.lexsort((lowest, hashes[lowest]))]
    owner = np.searchsorted(starts, lowest, side="right") - 1
    return [(cells[i], int(place - starts[i])) for i, place in zip(owner, lowest)]


def _groups(sorts: Sequence[Sequence[Sorted]]) -> tuple[list[tuple], list[Group]]:
  """Returns (names, groups) of the shapes of all data sets; a name is (task, resolution, cache, number of condition images)."""
  found: dict[tuple, tuple[list[Family], dict[tuple, np.ndarray]]] = {}
  for d, parts in enumerate(sorts):
    raw = [one.weights() for one in parts]
    total, records = sum(some.sum() for some in raw) or 1.0, sum(one.counts.sum() for one in parts) or 1
    for r, (one, some) in enumerate(zip(parts, raw)):
      for number, rows in one.groups().items():
        if number in one.stored:
          continue  # what it was cached for
        families, shapes = found.setdefault((one.spec.task, r, one.cache, number), ([], {}))
        families.append(one.family)
        for shape, weight, count in zip(map(tuple, one.shapes[rows, :2 + number].tolist()), some[rows], one.counts[rows]):
          here = shapes.setdefault(shape, np.zeros(1 + len(sorts)))
          here[0] += weight / total * one.spec.weight
          here[1 + d] += count / records
  groups = []
  for families, shapes in found.values():
    table = np.array(list(shapes.values()))
    reach = tuple(map(tuple, np.max([family.reach for family in families], axis=0).tolist()))
    groups.append(Group(dataclasses.replace(families[0], reach=reach), np.array(list(shapes)), table[:, 0], table[:, 1:]))
  return list(found), groups


def _lost(parts: Sequence[Sorted], own: Sequence[Placed]) -> tuple[int, int]:
  """Returns (how many records of a data set have a shape at some resolution, and a bucket at none; how many have a shape)."""
  usable = functools.reduce(np.logical_or, (one.usable() for one in parts))
  kept = functools.reduce(np.logical_or, (one.place >= 0 for one in own))
  return int(usable.sum()) - int(kept.sum()), int(usable.sum())


def _used(sorts: Sequence[Sequence[Sorted]], placed: Sequence[Sequence[Placed]]) -> dict[tuple, np.ndarray]:
  """Returns the programs of each group that have records."""
  found = {}
  for parts, own in zip(sorts, placed):
    for r, (one, where) in enumerate(zip(parts, own)):
      for number, some in where.used.items():
        found.setdefault((one.spec.task, r, one.cache, number), []).append(some)
  return {key: np.unique(np.concatenate(some), axis=0) for key, some in found.items()}


def _longest(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Returns the largest of the `counts[i]` values of each record i; 0 where there are none."""
  starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
  longest = np.zeros(len(counts), values.dtype)
  some = counts > 0
  longest[some] = np.maximum.reduceat(values, starts[some]) if some.any() else 0
  return longest


def usable_captions(index: dict, spec: DatasetSpec) -> np.ndarray:
  """Returns for each caption of an index whether a data set's languages and caption kinds let it be used, bool."""
  usable = np.ones(len(index["caption_tokens"]), bool)
  if spec.languages:
    usable &= np.isin(index["language_names"], spec.languages)[index["caption_language"]]
  if spec.caption_weights:
    usable &= np.array([spec.caption_weights.get(kind, 0) > 0 for kind in KINDS])[index["caption_kind"]]
  return usable


def _check(datasets, resolutions, num_tokens, prompt_classes, seed) -> None:
  if not datasets or not resolutions:
    raise ValueError("A loader needs at least one data set and one resolution: add them to the config.")
  for spec in datasets:
    if spec.task not in TASKS:
      raise ValueError(f"Data set {spec.name!r} has task={spec.task!r}: choose one of {', '.join(TASKS)}.")
    if spec.weight <= 0:
      raise ValueError(f"Data set {spec.name!r} has weight={spec.weight}: give a positive one or leave the set out.")
    if spec.max_enlarge < 0:
      raise ValueError(f"Data set {spec.name!r} has max_enlarge={spec.max_enlarge}: give the largest factor, such as 1.25, or 0 for any.")
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
