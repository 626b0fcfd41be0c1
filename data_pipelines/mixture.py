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
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.arrangement import Cell, Found, Wanted, arrange, sample_ids
from data_pipelines.cache import cached_shapes, open_cache
from data_pipelines.order import Turns, permute, scatter
from data_pipelines.records import KINDS, checksum, index_path, open_split
from data_pipelines.specs import TASKS, DatasetSpec, Resolution
from data_pipelines.tags import varies
from data_pipelines.tokenizer import PromptTokenizer


@dataclasses.dataclass(frozen=True)
class Plan:
  """One global batch: its bucket, data set and cell, and the place of each row's record in the cell's records, and how often all of these were seen
  before it, B int64 each."""
  bucket: int
  dataset: int
  cell: Cell
  places: np.ndarray
  epochs: np.ndarray

  @property
  def records(self) -> np.ndarray:
    """Positions of the records in their split, B int64."""
    return np.asarray(self.cell.records[self.places], np.int64)


def open_dataset(spec: DatasetSpec) -> Found:
  """The records of a data set with their index, and what is known of them."""
  cached, folder = open_cache(spec.data_dir, spec.name), os.path.join(spec.data_dir, spec.name)
  records, index = open_split(spec.data_dir, spec.name, spec.split)
  identity = f"{checksum(os.path.join(folder, 'dataset.json'))} {spec.split} {os.path.getsize(index_path(folder, spec.split))}"
  return Found(records, index, cached, cached_shapes(spec.data_dir, spec.name) if cached else (), identity)


class Mixture:
  """The order of batches; see the module docstring.

  Attributes:
    buckets: all batch shapes, the same on every process.
    cells: all of them, data set by data set, resolution by resolution.
    counts: what became of the records.
    merging: what it cost that shapes share buckets.
    programs: the shapes of the buckets, (task, resolution, cache, number of condition images) -> as `data_pipelines.programs.Chooser` gives them.
    used: the same of each data set alone.
    usage: what becomes of the records of each data set, and the first that are in no batch; see `data_pipelines.arrangement`.
    shapes: those of each data set in words: (task, base_px, target size, sizes of condition images, prompt tokens) of each bucket.
    datasets, resolutions, max_crop: as given.
    sources: the records of each data set, by position.
  """

  def __init__(self, datasets: Sequence[DatasetSpec], resolutions: Sequence[Resolution], num_tokens: int, tokenizer: PromptTokenizer, seed: int,
               prompt_classes: Sequence[int] = (), max_crop: float = 0.2, min_bucket_records: int = 0, max_programs: int = 0,
               programs: Mapping[tuple, np.ndarray] | None = None, every: bool = False,
               find: Callable[[DatasetSpec], Sequence] | None = None, order_dir: str = "", alpha: bool = False,
               truncate: bool = False, captions: bool = True, pairs: bool = False):
    """Args: data sets; resolutions; M, the longest prompt, condition images not counted; tokenizer; seed; further, shorter prompt lengths that
    have buckets of their own; largest share of a target that may be cut off; fewest records for which a bucket is worth a compiled step; most
    buckets, 0 for one per shape; `programs` of another mixture with the same resolutions, but for batch sizes, and the same prompt lengths, in
    place of own ones; whether records count whose quality, stage, size or captions the data sets' specs refuse; what opens a data set,
    `open_dataset` unless it is made up; folder in which what takes long to sort is kept for the next start, "" for none; whether
    pixels have alpha, be there a data set that keeps its own or not; whether captions that are longer than M may be cut, so that their records
    count; whether captions are read, without which records without one count, too; whether rows are pairs, so that records without a rejected
    picture do not count.

    Raises:
      ValueError: numbers that make no mixture, or a data set of which nothing is left.
      OSError: what is sorted cannot be written.
    """
    _check(datasets, resolutions, num_tokens, prompt_classes, seed)
    self.datasets, self.resolutions, self.max_crop, self._seed = tuple(datasets), tuple(resolutions), max_crop, seed
    found = [Found(*(find or open_dataset)(spec)) for spec in self.datasets]
    for spec, one in zip(self.datasets, found):
      if varies(spec) and one.cache is not None and one.cache.has_features:
        raise ValueError(f"Data set {spec.name!r} holds the encoder's states of its captions as they are written, but shuffle_tags or drop_tags "
                         "change them: cache it without --features, or leave the tags as they are.")
    wanted = Wanted(self.datasets, self.resolutions, tuple(sorted({*prompt_classes, num_tokens})), tokenizer, max_crop, min_bucket_records,
                    max_programs, programs, every, alpha or any(spec.alpha for spec in self.datasets), truncate, captions, pairs)
    arrangement = arrange(wanted, found, order_dir)
    self.buckets, self.cells, self.counts, self.merging = arrangement.buckets, arrangement.cells, arrangement.counts, arrangement.merging
    self.programs, self.used, self.shapes = arrangement.programs, arrangement.used, arrangement.shapes
    self.usage = arrangement.usage
    self.sources = [one.records for one in found]
    self._sample_ids = [sample_ids(one, order_dir) for one in found]
    self._turns = Turns([cell.weight for cell in self.cells], seed)

  # ---- the endless order of training -------------------------------------------------------------

  def plan(self, k: int) -> Plan:
    """Returns the global batch k, one of the first 2^40."""
    number, visit = self._turns(k)
    cell = self.cells[number]
    batch_size, num = self.buckets[cell.bucket].batch_size, len(cell.records)
    position = visit * batch_size + np.arange(batch_size)
    epochs = position // num
    return Plan(cell.bucket, cell.dataset, cell, permute(position % num, num, (self._seed, 2, number), epochs), epochs)

  def first_needed(self, start: int, end: int) -> list[int]:
    """Returns the numbers of all buckets: in the order in which the batches from `start` on need them, as far as these are looked at; then those that
    none of them needs, the most frequent first. Looked at are those before `end`, 10,000 at most."""
    order = dict.fromkeys(self.cells[self._turns(k)[0]].bucket for k in range(start, min(end, start + 10_000)))
    share = collections.Counter()
    for cell, part in zip(self.cells, self.shares):
      share[cell.bucket] += part
    return list(order | dict.fromkeys(sorted(range(len(self.buckets)), key=lambda bucket: -share[bucket])))

  def sample_ids(self, dataset: int, records: np.ndarray) -> np.ndarray:
    """Returns the ids, int64, of records of a data set."""
    return np.asarray(self._sample_ids[dataset][records])

  @functools.cached_property
  def digest(self) -> str:
    """Hexadecimal digits that differ where any batch does."""
    whole = hashlib.sha256(repr((self._seed, [dataclasses.replace(bucket, cache=None) for bucket in self.buckets])).encode())
    for cell in self.cells:
      whole.update(repr((cell.bucket, cell.dataset, cell.resolution, cell.weight, len(cell.records), cell.checksum)).encode())
    return whole.hexdigest()[:16]

  @property
  def shares(self) -> tuple[float, ...]:
    """The share of the batches that each of `cells` has, 0 to 1."""
    total = sum(cell.weight for cell in self.cells)
    return tuple(float(cell.weight / total) for cell in self.cells)

  # ---- one pass for evaluation -------------------------------------------------------------------

  def held_out(self, max_samples: int | None = None) -> list[tuple[int, list[tuple[Cell, int]]]]:
    """Returns for each bucket (its number, (cell, place in the cell's records) of the records to evaluate on), in an order that a hash of sample_id
    gives, so that a few of them are from anywhere in the source.

    `max_samples` bounds their number at each resolution. Then buckets get whole batches, as many as their share of the records says, so that little
    of a batch is filler; what is less than a batch is taken where there is not enough else.
    """
    cells = {}
    for cell in self.cells:  # two resolutions may share a bucket; the same record is looked at once
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


def _check(datasets, resolutions, num_tokens, prompt_classes, seed) -> None:
  if not datasets or not resolutions:
    raise ValueError("A loader needs at least one data set and one resolution: add them to the config.")
  for spec in datasets:
    if spec.task not in TASKS:
      raise ValueError(f"Data set {spec.name!r} has task={spec.task!r}: choose one of {', '.join(TASKS)}.")
    if spec.weight <= 0:
      raise ValueError(f"Data set {spec.name!r} has weight={spec.weight}: give a positive one or leave the set out.")
    if spec.loss_weight <= 0:
      raise ValueError(f"Data set {spec.name!r} has loss_weight={spec.loss_weight}: give a positive one or leave the set out.")
    if spec.max_enlarge < 0:
      raise ValueError(f"Data set {spec.name!r} has max_enlarge={spec.max_enlarge}: give the largest factor, such as 1.25, or 0 for any.")
    if not 0 <= spec.drop_tags <= 1 or spec.keep_tags < 0 or not spec.tag_separator:
      raise ValueError(f"Data set {spec.name!r} has drop_tags={spec.drop_tags}, keep_tags={spec.keep_tags} and tag_separator={spec.tag_separator!r}: "
                       "give a chance from 0 to 1, a number of 0 or more, and what stands between tags, such as \",\".")
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
