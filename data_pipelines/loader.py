"""Batches from prepared data sets: batch k of a run is a pure function of (seed, mixture, k).

A *cell* is one data set in one bucket. Cells take turns by a `Schedule`: a data set has its weight's share of the
batches, its resolutions divide that by their weights times their record counts, and so do the buckets of a resolution.
Inside a cell the v-th visit takes positions v B to v B + B - 1 of an endless stream; position p is place p mod n of
epoch p div n, and each epoch is a permutation of the n records of its own. So every record is seen exactly once per
epoch of its cell, any k can be asked at once, and neither hosts nor workers enter: each process loads its rows of the
global batch. The state of a run is the integer k.

Two tasks: "t2i" takes the records without condition images, "ti2i" (editing) those with some. A condition image is fitted to the size nearest
to its own aspect ratio among all ratios at the resolution's area, in multiples of one vision slot; the tuple of these sizes is part of the
bucket.
"""

import dataclasses
import fractions
import functools
from collections.abc import Iterator, Sequence

import grain.python as grain
import numpy as np

from data_pipelines import buckets as sizes
from data_pipelines.buckets import Bucket
from data_pipelines.order import Schedule, apportion, permute
from data_pipelines.records import has_language, open_split
from data_pipelines.tokenizer import PromptTokenizer
from data_pipelines.transforms import decode_image, resize_crop

TASKS = ("t2i", "ti2i")
SLOT_PX = 32  # side of one vision slot
_ENDLESS = 2**62


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
  """One data set of a mixture. Captions in other than `languages` are not used; empty takes all."""

  data_dir: str
  name: str
  split: str = "train"
  weight: float = 1.0
  task: str = "t2i"
  min_quality: float = 0.0
  languages: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Resolution:
  """Buckets of nearly one area. `batch_size` counts rows of the global batch; sides are multiples of `multiple` px."""

  base_px: int
  batch_size: int
  ratios: tuple[float | str, ...] = sizes.RATIOS
  weight: float = 1.0
  multiple: int = 32


@dataclasses.dataclass(frozen=True)
class Count:
  """What became of a task's records nearest to one bucket: kept + low_quality + no_language + cropped = records."""

  dataset: str
  split: str
  task: str
  base_px: int
  height: int
  width: int
  records: int
  kept: int
  low_quality: int
  no_language: int
  cropped: int


@dataclasses.dataclass(frozen=True)
class _Cell:
  bucket: int
  dataset: int
  resolution: int
  records: np.ndarray  # positions in the split, ascending


class Loader:
  """The batches of a mixture; see the module docstring.

  A batch is a dict: target B H W 3 uint8, sources (a tuple of B h w 3 uint8, in prompt order), tokens B M int32, token_count B int32,
  sample_id B int64, where B is this process's share of the bucket's batch size. `buckets` and `counts` are the same on every process.
  """

  def __init__(self, datasets: Sequence[DatasetSpec], resolutions: Sequence[Resolution], num_tokens: int,
               tokenizer: PromptTokenizer, seed: int, caption_dropout: float = 0.1, max_crop: float = 0.2,
               process_index: int = 0, process_count: int = 1, num_workers: int = 0):
    _check(datasets, resolutions, seed, caption_dropout, process_index, process_count)
    self._datasets, self._resolutions = tuple(datasets), tuple(resolutions)
    self._num_tokens, self._tokenizer, self._seed = num_tokens, tokenizer, seed
    self._caption_dropout, self._max_crop = caption_dropout, max_crop
    self._process, self._num_workers = (process_index, process_count), num_workers
    self._sources, self._sample_ids = [], []
    self._build_cells()
    self._schedule = Schedule(apportion(tuple(self._weights())), seed)

  # ---- which records go where --------------------------------------------------------------------

  def _build_cells(self) -> None:
    places, counts, cells = {}, [], []
    for d, spec in enumerate(self._datasets):
      source, index = open_split(spec.data_dir, spec.name, spec.split)
      self._sources.append(source)
      self._sample_ids.append(index["sample_id"])
      kept_before = len(cells)
      for r, resolution in enumerate(self._resolutions):
        for bucket, records, count in self._sort_records(spec, resolution, index):
          counts.append(count)
          if len(records):
            cells.append(_Cell(places.setdefault(bucket, len(places)), d, r, records))
      if len(cells) == kept_before:
        raise ValueError(f"No record of {spec.name!r} ({spec.split}) is left by task={spec.task}, min_quality={spec.min_quality}, "
                         f"languages={spec.languages} and max_crop={self._max_crop}: loosen one or add ratios.")
    self.buckets: tuple[Bucket, ...] = tuple(places)
    self.counts: tuple[Count, ...] = tuple(counts)
    self._cells = cells

  def _sort_records(self, spec: DatasetSpec, resolution: Resolution, index: dict) -> Iterator[tuple]:
    """Yields (bucket, positions of its records, count) for one data set at one resolution."""
    choice = sizes.make_buckets(spec.task, resolution.base_px, resolution.ratios, self._num_tokens,
                                resolution.batch_size, resolution.multiple)
    nearest, lost = _fit(index["height"], index["width"], choice)
    own = index["source_sizes"].any(axis=(1, 2)) == (spec.task == "ti2i")
    keys, slots = nearest[:, None], ()
    if spec.task == "ti2i":
      slots = sizes.make_buckets(spec.task, resolution.base_px, sizes.RATIOS, 0, 1, SLOT_PX)
      source_nearest, source_lost = _fit(index["source_sizes"][..., 0], index["source_sizes"][..., 1], slots)
      keys, lost = np.concatenate([keys, source_nearest], axis=1), np.maximum(lost, source_lost.max(axis=1, initial=0))
    # Each record left out is counted under the first reason that holds.
    low_quality = index["quality"] < np.float32(spec.min_quality)
    no_language = ~low_quality & ~has_language(index, spec.languages)
    cropped = (lost > self._max_crop) & ~low_quality & ~no_language
    for key in np.unique(keys[own], axis=0):
      here = own & (keys == key).all(axis=1)
      kept = here & ~low_quality & ~no_language & ~cropped
      bucket = self._with_sources(choice[key[0]], tuple((slots[i].height, slots[i].width) for i in key[1:] if i >= 0))
      yield bucket, np.flatnonzero(kept).astype(np.int32), Count(
          spec.name, spec.split, spec.task, resolution.base_px, bucket.height, bucket.width, int(here.sum()), int(kept.sum()),
          int((here & low_quality).sum()), int((here & no_language).sum()), int((here & cropped).sum()))

  def _with_sources(self, bucket: Bucket, source_sizes: tuple[tuple[int, int], ...]) -> Bucket:
    """Returns the bucket with condition images and room for their tokens: `num_tokens` counts text."""
    extra = self._tokenizer.num_image_tokens(source_grids(source_sizes))
    return dataclasses.replace(bucket, source_sizes=source_sizes, num_tokens=bucket.num_tokens + extra)

  def _weights(self) -> list[fractions.Fraction]:
    """Returns the share of the batches of each cell, not normalised. Decimal text keeps 0.3 exactly 3/10."""
    raw = [len(c.records) * fractions.Fraction(str(self._resolutions[c.resolution].weight)) for c in self._cells]
    totals = [sum(w for w, c in zip(raw, self._cells) if c.dataset == d) for d in range(len(self._datasets))]
    return [w / totals[c.dataset] * fractions.Fraction(str(self._datasets[c.dataset].weight))
            for w, c in zip(raw, self._cells)]

  # ---- the endless order of training -------------------------------------------------------------

  def plan(self, k: int) -> tuple[int, int, np.ndarray]:
    """Returns (bucket index, data set index, positions of the records in their split B int64) of global batch k."""
    place, visit = self._schedule(k)
    cell = self._cells[place]
    batch_size, num = self.buckets[cell.bucket].batch_size, len(cell.records)
    position = visit * batch_size + np.arange(batch_size)
    epoch, offset = position // num, position % num
    rows = np.empty(batch_size, np.int64)
    for number in np.unique(epoch):
      now = epoch == number
      rows[now] = permute(offset[now], num, (self._seed, 2, place, int(number)))
    return cell.bucket, cell.dataset, cell.records[rows].astype(np.int64)

  def batch(self, k: int) -> tuple[int, dict]:
    """Returns (bucket index, this process's rows of batch k)."""
    bucket, dataset, records = self.plan(k)
    # Two numbers per row of the global batch, so that a process draws for its rows what any other would.
    draws = np.random.default_rng((self._seed, 3, k)).random((len(records), 2))
    own = self._own_rows(len(records))
    return bucket, self._load(self.buckets[bucket], [(dataset, record) for record in records[own]], draws[own])

  def iterate(self, start: int = 0) -> Iterator[tuple[int, dict]]:
    """Returns an endless Grain iterator of (bucket index, batch) from batch `start` on, which reads ahead.

    To resume, start at the number of batches already used: nothing else needs saving. Worker processes (num_workers >
    0) need parsed absl flags, which a launcher has; in a notebook call `absl.flags.FLAGS.mark_as_parsed()` first.
    """
    if start < 0:
      raise ValueError(f"start={start} must not be negative: it is the number of batches already used.")
    batches = grain.MapDataset.range(start, _ENDLESS).map(self.batch)
    return iter(self._read_ahead(batches))

  def _read_ahead(self, batches: grain.MapDataset) -> grain.IterDataset:
    if not self._num_workers:
      return batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))
    # Threads inside the worker processes would only fight over their one lock.
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=2))

  # ---- one pass for evaluation -------------------------------------------------------------------

  def evaluation_batches(self, max_samples: int | None = None) -> Iterator[tuple[int, dict]]:
    """Yields (bucket index, batch) for one pass at every resolution, bucket by bucket, by ascending sample_id.

    No dropout, always the first wanted caption. Batches have the extra key `weight` B float32: 1, or 0 for the rows
    that fill the last batch of a bucket by repeating. `max_samples` keeps the lowest ids at each resolution.
    """
    for bucket, rows in self._evaluation_rows(max_samples):
      batch_size = self.buckets[bucket].batch_size
      for first in range(0, len(rows), batch_size):
        some = rows[first:first + batch_size]
        weight = (np.arange(batch_size) < len(some)).astype(np.float32)
        some = [some[i % len(some)] for i in range(batch_size)]
        own = self._own_rows(batch_size)
        yield bucket, self._load(self.buckets[bucket], some[own], None) | {"weight": weight[own]}

  def _evaluation_rows(self, max_samples: int | None) -> list[tuple[int, list[tuple[int, int]]]]:
    rows = {bucket: [] for bucket in range(len(self.buckets))}
    for r in range(len(self._resolutions)):
      entries = sorted((int(self._sample_ids[c.dataset][record]), c.dataset, int(record), c.bucket)
                       for c in self._cells if c.resolution == r for record in c.records)
      for _, dataset, record, bucket in entries[:max_samples]:
        rows[bucket].append((dataset, record))
    return list(rows.items())

  # ---- records to arrays -------------------------------------------------------------------------

  def _own_rows(self, batch_size: int) -> slice:
    index, count = self._process
    return slice(index * batch_size // count, (index + 1) * batch_size // count)

  def _load(self, bucket: Bucket, rows: list[tuple[int, int]], draws: np.ndarray | None) -> dict:
    records = self._read(rows)
    prompts = [self._pick_caption(record, self._datasets[d], None if draws is None else draws[i])
               for i, ((d, _), record) in enumerate(zip(rows, records))]
    names = [f"sample {record['sample_id']} of data set {self._datasets[d].name!r}" for (d, _), record in zip(rows, records)]
    target = _decode([record["image"] for record in records], names, bucket.height, bucket.width)
    sources = tuple(_decode([record["sources"][slot] for record in records], [f"condition image {slot + 1} of {name}" for name in names], *size)
                    for slot, size in enumerate(bucket.source_sizes))
    tokens, token_count = self._tokenizer.encode_batch(prompts, bucket.num_tokens, source_grids(bucket.source_sizes))
    sample_id = np.array([record["sample_id"] for record in records], np.int64)
    return {"target": target, "sources": sources, "tokens": tokens, "token_count": token_count, "sample_id": sample_id}

  def _read(self, rows: list[tuple[int, int]]) -> list[dict]:
    """Returns the records in the order of `rows`, read with one request per data set."""
    records = [None] * len(rows)
    for d in {dataset for dataset, _ in rows}:
      places = [i for i, (dataset, _) in enumerate(rows) if dataset == d]
      for i, record in zip(places, self._sources[d].__getitems__([int(rows[i][1]) for i in places])):
        records[i] = record
    return records

  def _pick_caption(self, record: dict, spec: DatasetSpec, draw: np.ndarray | None) -> str:
    if draw is not None and draw[0] < self._caption_dropout:
      return ""
    wanted = _encoded(spec.languages)
    captions = [text for text, language in zip(record["captions"], record["languages"])
                if not wanted or language in wanted]
    return captions[0 if draw is None else int(draw[1] * len(captions))].decode()


def source_grids(source_sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
  """Returns (rows, columns) of vision slots of condition images of (height, width) px."""
  return tuple((height // SLOT_PX, width // SLOT_PX) for height, width in source_sizes)


def _fit(height: np.ndarray, width: np.ndarray, choice: Sequence[Bucket]) -> tuple[np.ndarray, np.ndarray]:
  """Returns (index of the nearest size, share of the picture that fitting it cuts off); -1 and 0 where there is no picture."""
  there = height > 0
  height, width = np.where(there, height, 1), np.where(there, width, 1)
  nearest = sizes.nearest_bucket(height, width, tuple(choice))
  tall, wide = (np.array([getattr(bucket, side) for bucket in choice])[nearest] for side in ("height", "width"))
  return np.where(there, nearest, -1), np.where(there, sizes.crop_fraction(height, width, tall, wide), 0.0)


def _decode(images: Sequence[bytes], names: Sequence[str], height: int, width: int) -> np.ndarray:
  """Returns the pictures fitted to one size, uint8 B height width 3."""
  pixels = np.empty((len(images), height, width, 3), np.uint8)
  for i, (image, name) in enumerate(zip(images, names)):
    pixels[i] = resize_crop(decode_image(image, name), height, width)
  return pixels


@functools.cache
def _encoded(languages: tuple[str, ...]) -> frozenset[bytes]:
  return frozenset(language.encode() for language in languages)


def _check(datasets, resolutions, seed, caption_dropout, process_index, process_count) -> None:
  if not datasets or not resolutions:
    raise ValueError("A loader needs at least one data set and one resolution: add them to the config.")
  for spec in datasets:
    if spec.task not in TASKS:
      raise ValueError(f"Data set {spec.name!r} has task={spec.task!r}: choose one of {', '.join(TASKS)}.")
    if spec.weight <= 0:
      raise ValueError(f"Data set {spec.name!r} has weight={spec.weight}: give a positive one or leave the set out.")
  for resolution in resolutions:
    if resolution.weight <= 0:
      raise ValueError(f"Resolution {resolution.base_px} has weight={resolution.weight}: give a positive one.")
    if resolution.batch_size < 1 or resolution.batch_size % process_count:
      raise ValueError(f"batch_size={resolution.batch_size} at {resolution.base_px} px does not divide over "
                       f"{process_count} processes: choose a multiple.")
  if seed < 0:
    raise ValueError(f"seed={seed} must not be negative.")
  if not 0 <= caption_dropout <= 1:
    raise ValueError(f"caption_dropout={caption_dropout} must lie between 0 and 1.")
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index={process_index} must lie in [0, {process_count}).")
