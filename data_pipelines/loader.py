"""Batches from prepared data sets: records read, decoded and tokenised, in the order that a `Mixture` gives.

Batch k is a pure function of (seed, mixture, k): each process loads its rows of the global batch, and the state of a run is the integer k.

A record that cannot be decoded is replaced by the next one of its cell that can be, on every host and after every resume alike; it is named
in the log and counted, and too many of them are an error.
"""

import contextlib
import dataclasses
import functools
import re
import signal
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

import grain.python as grain
import numpy as np
from absl import logging

from data_pipelines import children
from data_pipelines.buckets import Bucket
from data_pipelines.mixture import Cell, Mixture
from data_pipelines.specs import DatasetSpec, Resolution, source_grids
from data_pipelines.tags import varies, vary
from data_pipelines.tokenizer import PromptTokenizer
from data_pipelines.transforms import fit_source, load_picture
from data_pipelines.truths import make_task, pack, unpack

_ENDLESS = 2**62
_MOST_TRIES = 64  # records of a cell in a row that may be broken
_PROMPT = ("tokens", "token_count", "features")  # what stands for a prompt in a batch
FIRST_ROWS = 1000  # the share of broken records is judged as if at least so many had been read


class WorkerLost(OSError):
  """A worker process was killed from outside, by a machine without memory left for instance: the same command may go on."""


@dataclasses.dataclass(frozen=True)
class Fault:
  """A record that could not be used, and what was read in its place."""
  dataset: str
  sample_id: int
  replacement: int
  sentence: str


class Loader:
  """The batches of a mixture; see the module docstring.

  A batch is a dict: target B H W 3 uint8, sources (a tuple of B h w 3 uint8, in prompt order; all of them RGBA, 4 in place of 3, where a data set of
  the mixture keeps alpha, and opaque for those that do not), tokens B M int32, token_count B int32,
  sample_id B int64, where B is this process's share of the bucket's batch size. From a latent cache, see data_pipelines.cache for what
  takes the place of pixels. With `unconditional` also null_tokens and null_token_count, the empty prompt around the same condition images, and
  null_features where there are features. With `pairs` also rejected, or rejected_latents, of the shape of the target; where a data set has a
  loss_weight also that, B float32. With `tasks` also tasks, a tuple of B mappings (`data_pipelines.truths`) for the host alone. `buckets` and
  `counts` are the same on every process; `faults` holds this process's, in the order of batches.
  """

  def __init__(self, datasets: Sequence[DatasetSpec], resolutions: Sequence[Resolution], num_tokens: int,
               tokenizer: PromptTokenizer, seed: int, caption_dropout: float = 0.1, max_crop: float = 0.2, prompt_classes: Sequence[int] = (),
               min_bucket_records: int = 0, max_faulty: float = 0.01, process_index: int | Sequence[int] = 0, process_count: int = 1,
               num_workers: int = 0, unconditional: bool = False, max_programs: int = 0,
               programs: Mapping[tuple, np.ndarray] | None = None, order_dir: str = "", alpha: bool = False, truncate: bool = False,
               captions: bool = True, tasks: bool = False, pairs: bool = False):
    """Args: those of `Mixture`, some of them at the end; share of prompts that are emptied; largest share of records that may be broken; which of
    how many processes this one is, or which parts of every batch, divided into `process_count` ones, are its own; worker processes, 0 for threads;
    whether a batch has the unconditional prompt, and the tasks of its rows; whether its rows are pairs.

    Raises:
      ValueError: numbers that make no sense, or data sets of which nothing is left.
    """
    parts = (process_index,) if isinstance(process_index, int) else tuple(process_index)
    _check(resolutions, caption_dropout, max_faulty, parts, process_count)
    self.mixture = Mixture(datasets, resolutions, num_tokens, tokenizer, seed, prompt_classes, max_crop, min_bucket_records, max_programs, programs,
                           order_dir=order_dir, alpha=alpha, truncate=truncate, captions=captions, pairs=pairs)
    self.buckets, self.counts = self.mixture.buckets, self.mixture.counts
    self.faults: list[Fault] = []
    self._tokenizer, self._seed = tokenizer, seed
    self._caption_dropout, self._max_faulty = caption_dropout, max_faulty
    self._process, self._num_workers = (parts, process_count), num_workers
    self.unconditional, self._truncate, self._captions, self._tasks = unconditional, truncate, captions, tasks
    if tasks and caption_dropout:
      raise ValueError(f"caption_dropout={caption_dropout} empties prompts that pictures are drawn for and scored by: set it to 0.")
    self._held_out: dict[int | None, list] = {}

  # ---- batches -----------------------------------------------------------------------------------

  def batch(self, k: int) -> tuple[int, dict]:
    """Returns (bucket index, this process's rows of batch k)."""
    return self._judged([self._batch(k)], k, k + 1).__next__()

  def _batch(self, k: int) -> tuple[int, dict, list[Fault]]:
    plan = self.mixture.plan(k)
    # Three numbers per row of the global batch, so that a process draws for its rows what any other would; and the row's epoch.
    rng, num = np.random.default_rng((self._seed, 3, k)), len(plan.places)
    draws = np.concatenate([rng.random((num, 2)), rng.random((num, 1)), plan.epochs[:, None]], axis=1)
    own = self.own_rows(len(plan.places))
    return plan.bucket, *self._load(self.buckets[plan.bucket], [(plan.cell, place) for place in plan.places[own]], draws[own])

  def iterate(self, start: int = 0) -> Generator[tuple[int, dict], None, None]:
    """Returns an endless iterator of (bucket index, batch) from batch `start` on, which reads ahead. `close` it where it is not needed any more: it
    ends the workers.

    To resume, start at the number of batches already used: nothing else needs saving. Worker processes (num_workers >
    0) need parsed absl flags, which a launcher has; in a notebook call `absl.flags.FLAGS.mark_as_parsed()` first.
    """
    if start < 0:
      raise ValueError(f"start={start} must not be negative: it is the number of batches already used.")
    return self._ahead(grain.MapDataset.range(start, _ENDLESS).map(self._batch), start)

  def _ahead(self, batches: grain.MapDataset, start: int) -> Generator[tuple[int, dict], None, None]:
    with contextlib.closing(iter(self._reading(batches))) as found:
      # What workers send lies in shared memory, which is given back at once.
      mine = ((bucket, _owned(batch), faults) for bucket, batch, faults in found) if self._num_workers else found
      yield from self._judged(mine, start, _ENDLESS)

  def _reading(self, batches: grain.MapDataset) -> Iterable[tuple]:
    if not self._num_workers:
      return batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))
    children.start_tracker()
    # Threads inside the worker processes would only fight over their one lock.
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return named_ends(batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=2),
                                          worker_init_fn=children.begin_worker))

  def _judged(self, batches, start: int, stop: int) -> Iterator[tuple[int, dict]]:
    """Yields the batches without their faults, which it names and counts; `ValueError` when they become too many."""
    num_rows = num_faults = 0
    for k, (bucket, batch, faults) in zip(range(start, stop), batches):
      for fault in faults:
        if fault not in self.faults:  # held-out batches are read again and again
          logging.warning("Batch %d: %s Sample %d takes its place.", k, fault.sentence, fault.replacement)
          self.faults.append(fault)
      num_rows, num_faults = num_rows + len(batch["sample_id"]), num_faults + len(faults)
      if num_faults > self._max_faulty * max(num_rows, FIRST_ROWS):
        raise ValueError(f"{num_faults} of {num_rows} records could not be used by batch {k}, more than max_faulty={self._max_faulty}; the last "
                         f"one: {faults[-1].sentence}")
      yield bucket, batch | ({"tasks": unpack(batch["tasks"])} if "tasks" in batch else {})

  # ---- one pass for evaluation -------------------------------------------------------------------

  def evaluation_batches(self, max_samples: int | None = None) -> Iterator[tuple[int, dict]]:
    """Yields (bucket index, batch) for one pass at every resolution, bucket by bucket, as `Mixture.held_out` chooses and orders them.

    No dropout, always the first wanted caption. Batches have the extra key `weight` B float32: 1, or 0 for the rows
    that fill the last batch of a bucket by repeating, or stand for a record that cannot be decoded.
    """
    for k, (bucket, rows, weight) in enumerate(self._passes(max_samples)):
      own = self.own_rows(len(rows))
      mine = [rows[row] for row in own]
      for _, batch in self._judged([(bucket, *self._load(self.buckets[bucket], mine, None))], k, k + 1):
        wanted = [int(self.mixture.sample_ids(cell.dataset, cell.records[place])) for cell, place in mine]
        yield bucket, batch | {"weight": weight[own] * (batch["sample_id"] == wanted)}

  def _passes(self, max_samples: int | None) -> Iterator[tuple[int, list[tuple[Cell, int]], np.ndarray]]:
    if max_samples not in self._held_out:
      self._held_out[max_samples] = self.mixture.held_out(max_samples)
    for bucket, rows in self._held_out[max_samples]:
      batch_size = self.buckets[bucket].batch_size
      for first in range(0, len(rows), batch_size):
        some = rows[first:first + batch_size]
        yield bucket, [some[i % len(some)] for i in range(batch_size)], (np.arange(batch_size) < len(some)).astype(np.float32)

  def num_evaluation_batches(self, max_samples: int | None = None) -> int:
    """Returns how many batches `evaluation_batches` yields."""
    return sum(1 for _ in self._passes(max_samples))

  # ---- records to arrays -------------------------------------------------------------------------

  @staticmethod
  def example(bucket: Bucket, unconditional: bool = False) -> dict:
    """Returns a global batch of a bucket with the true shapes and types and no meaning. Its pages are never touched, so it takes no memory."""
    arrays = _arrays(bucket.batch_size, bucket) | _prompts(bucket.batch_size, bucket)
    return _tuples(arrays | ({f"null_{name}": arrays[name] for name in _PROMPT if name in arrays} if unconditional else {}))

  def own_rows(self, batch_size: int) -> np.ndarray:
    """Returns the numbers of the rows of a global batch that are this process's, ascending."""
    parts, count = self._process
    return np.concatenate([np.arange(part * batch_size // count, (part + 1) * batch_size // count) for part in parts])

  def _load(self, bucket: Bucket, rows: list[tuple[Cell, int]], draws: np.ndarray | None) -> tuple[dict, list[Fault]]:
    arrays, faults, used = _arrays(len(rows), bucket) | _prompts(len(rows), bucket), [], []
    tasks, epochs = [{}] * len(rows), None if draws is None else draws[:, 3].astype(np.int64)
    for i, ((cell, place), record) in enumerate(zip(rows, self._read(rows, epochs))):
      chosen, fault = self._fill(arrays, tasks, i, cell, int(place), record, bucket, None if draws is None else draws[i])
      used.append(chosen)
      faults += fault
    if bucket.cache is not None and bucket.cache.has_features:
      bucket.cache.read_features(arrays["features"], *zip(*used))
    if self.unconditional:
      arrays |= self._null(bucket, [record for record, _ in used])
    return _tuples(arrays) | ({"tasks": pack(tasks)} if self._tasks else {}), faults

  def _null(self, bucket: Bucket, records: list[dict]) -> dict:
    """Returns the arrays of the empty prompt, around the condition images of each row."""
    tokens, count = self._tokenizer.encode_batch([""], bucket.num_tokens, source_grids(bucket.source_sizes))
    arrays = {"null_tokens": np.repeat(tokens, len(records), axis=0), "null_token_count": np.repeat(count, len(records))}
    if bucket.cache is not None and bucket.cache.has_features:
      arrays["null_features"] = bucket.cache.empty(len(records), bucket)["features"]
      bucket.cache.read_features(arrays["null_features"], records, [None] * len(records))
    return arrays

  def _fill(self, arrays: dict, tasks: list[dict], row: int, cell: Cell, place: int, record: dict | Exception, bucket: Bucket,
            draw: np.ndarray | None) -> tuple[tuple[dict, int | None], list[Fault]]:
    """Writes one row of the arrays and of the tasks; returns ((the record that is in it, the number of its caption), what was wrong with those that
    are not)."""
    spec, broken = self.mixture.datasets[cell.dataset], []
    for step in range(min(len(cell.records), _MOST_TRIES)):
      here = (place + step) % len(cell.records)
      if step:
        record = self._read([(cell, here)])[0]
      sample_id = int(self.mixture.sample_ids(cell.dataset, cell.records[here]))
      name = f"sample {sample_id} of data set {spec.name!r}"
      try:
        check_record(record, sample_id, bucket, name)
        number = self._pick_caption(record, spec, draw)
        tags = None if draw is None or not varies(spec) else (spec, int(draw[3]))
        prompt = self._encode(arrays, row, record, number, bucket, name, tags)
        if self._tasks:
          tasks[row] = make_task(record, prompt, spec.name, name)
        _decode(arrays, row, record, bucket, name, self.mixture.max_crop, spec.alpha)
        if bucket.weighted:
          arrays["loss_weight"][row] = spec.loss_weight
      except ValueError as error:
        broken.append((sample_id, str(error)))
      else:
        return (record, number), [Fault(spec.name, bad, sample_id, sentence) for bad, sentence in broken]
    raise ValueError(f"{len(broken)} records of one bucket of data set {spec.name!r} in a row cannot be used; {broken[-1][1]}")

  def _encode(self, arrays: dict, row: int, record: dict, caption: int | None, bucket: Bucket, name: str,
              tags: tuple[DatasetSpec, int] | None = None) -> str:
    """Writes the prompt of a record, its tags varied as a data set says in an epoch, and returns it; `ValueError` for one that is not UTF-8, or too
    long."""
    try:
      prompt = "" if caption is None else record["captions"][caption].decode()
    except UnicodeDecodeError as error:
      raise ValueError(f"A caption of {name} is not UTF-8: {error}; prepare the data set anew.") from error
    grids = source_grids(bucket.source_sizes)
    if tags is not None:
      varied = vary(prompt, tags[0], (self._seed, 5, int(record["sample_id"]), tags[1]))
      # In another order a text may have more tokens; as it is written it is known to have a place.
      fits = lambda text: len(self._tokenizer.encode(text, grids)) <= bucket.num_tokens
      prompt = varied if fits(varied) or self._truncate and not fits(prompt) else prompt
    try:
      tokens, count = self._tokenizer.encode_batch([prompt], bucket.num_tokens, grids, self._truncate)
    except ValueError as error:
      raise ValueError(f"Cannot use {name}: {error}") from error
    arrays["tokens"][row], arrays["token_count"][row], arrays["sample_id"][row] = tokens[0], count[0], record["sample_id"]
    return prompt

  def _read(self, rows: list[tuple[Cell, int]], epochs: Sequence[int] | None = None) -> list[dict | Exception]:
    """Returns the records in the order of `rows`, read with one request per data set; in place of one that cannot be read, why. A source without end
    has other ones in each of the `epochs` of the rows."""
    records = [None] * len(rows)
    for d in {cell.dataset for cell, _ in rows}:
      here, source = [i for i, (cell, _) in enumerate(rows) if cell.dataset == d], self.mixture.sources[d]
      further = len(source) if epochs is not None and getattr(source, "endless", False) else 0
      positions = [int(rows[i][0].records[rows[i][1]]) + further * int(epochs[i] if further else 0) for i in here]
      for i, record in zip(here, read_records(source, positions)):
        records[i] = record
    return records

  def _pick_caption(self, record: dict, spec: DatasetSpec, draw: np.ndarray | None) -> int | None:
    """Returns the number of the caption that is shown, None for an empty prompt. The kind is drawn first, then one caption of it.

    Raises:
      ValueError: the record has no caption that the data set's spec lets be used.
    """
    if draw is not None and draw[0] < self._caption_dropout:
      return None
    wanted, weights = _encoded(tuple(spec.languages)), {kind.encode(): weight for kind, weight in spec.caption_weights.items()}
    usable = [i for i, (language, kind) in enumerate(zip(record["languages"], record["kinds"]))
              if (not wanted or language in wanted) and (not weights or weights.get(kind, 0) > 0)]
    if not usable and not self._captions:
      return None
    if not usable:
      raise ValueError(f"Sample {record['sample_id']} of data set {spec.name!r} has no caption of the wanted languages and kinds: the index says "
                       "otherwise; prepare the data set anew.")
    if draw is None:
      return usable[0]
    kinds = list(dict.fromkeys(record["kinds"][i] for i in usable))
    shares = np.cumsum([weights.get(kind, 1.0) for kind in kinds])
    kind = kinds[int(np.searchsorted(shares, draw[2] * shares[-1], side="right"))]
    usable = [i for i in usable if record["kinds"][i] == kind]
    return usable[int(draw[1] * len(usable))]


def named_ends(batches: Iterable[tuple]) -> Iterator[tuple]:
  """Yields batches of worker processes; `OSError` where one of these ends, which its own last words, if it had any, explain; `WorkerLost` where it
  was killed."""
  try:
    yield from batches
  except RuntimeError as error:  # Grain's word for it
    if "terminated unexpectedly" not in str(error):
      raise
    code = re.search(r"exit code (-?\d+)", str(error))
    kind = WorkerLost if code and int(code[1]) in (-signal.SIGKILL, -signal.SIGTERM) else OSError
    raise kind(f"A worker process that loads data ended with {code[1] if code else 'an unknown code'}: what it said stands above; -9 is a "
               "machine without memory left, for which num_workers may be lower. The same command goes on.") from error


def read_records(source: Sequence[dict], positions: list[int]) -> list[dict | Exception]:
  """Returns the records at these positions; in place of one that cannot be read, why.

  Raises:
    OSError: the file system fails, which says nothing of the records.
  """
  try:
    return list(source.__getitems__(positions))
  except OSError:
    raise
  except Exception as error:  # a damaged file makes the reader or the parser raise nearly anything
    return [error] if len(positions) == 1 else [read_records(source, [position])[0] for position in positions]


def check_record(record: dict | Exception, sample_id: int, bucket: Bucket, name: str) -> None:
  """Raises `ValueError` for what `read_records` could not read, or a record that is another than the index says."""
  if isinstance(record, Exception):
    raise ValueError(f"Cannot read {name} ({type(record).__name__}: {record}): check the files with launch.prepare_data --verify.")
  if record["sample_id"] != sample_id or len(record["source_height"]) != len(bucket.source_sizes):
    raise ValueError(f"In the place of {name} is another record: check the files with launch.prepare_data --verify.")


def _arrays(num: int, bucket: Bucket) -> dict:
  """Returns the arrays of `num` rows of a bucket that hold pictures, not filled; those of condition images are lists."""
  if bucket.cache is not None:
    return bucket.cache.empty(num, bucket)
  picture = lambda: np.empty((num, bucket.height, bucket.width, bucket.image_channels), np.uint8)
  return {"target": picture(), **({"rejected": picture()} if bucket.pairs else {}),
          "sources": [np.empty((num, *size, bucket.image_channels), np.uint8) for size in bucket.source_sizes]}


def _prompts(num: int, bucket: Bucket) -> dict:
  """Returns the arrays of `num` rows of a bucket that hold prompts, ids and weights, not filled."""
  weights = {"loss_weight": np.empty(num, np.float32)} if bucket.weighted else {}
  return {"tokens": np.empty((num, bucket.num_tokens), np.int32), "token_count": np.empty(num, np.int32), "sample_id": np.empty(num, np.int64),
          **weights}


def _owned(batch: dict) -> dict:
  own = lambda value: value if isinstance(value, bytes) else children.own(value)
  return {name: tuple(map(own, value)) if isinstance(value, tuple) else own(value) for name, value in batch.items()}


def _tuples(arrays: dict) -> dict:
  return {name: tuple(value) if isinstance(value, list) else value for name, value in arrays.items()}


def _decode(arrays: dict, row: int, record: dict, bucket: Bucket, name: str, max_crop: float, alpha: bool) -> None:
  """Writes the pictures of a record into a row of the arrays; `ValueError` for what cannot be decoded."""
  if bucket.cache is not None:
    bucket.cache.read(arrays, row, record, bucket, name)
    return
  fill_pixels(arrays["target"][row], load_picture(record["image"], bucket.height, bucket.width, name, alpha))
  if bucket.pairs:
    fill_pixels(arrays["rejected"][row], load_picture(record["rejected"], bucket.height, bucket.width, f"the rejected picture of {name}", alpha))
  for slot, size in enumerate(bucket.source_sizes):
    fill_pixels(arrays["sources"][slot][row], load_source(record, slot, size, max_crop, name, alpha))


def fill_pixels(row: np.ndarray, pixels: np.ndarray) -> None:
  """Writes a picture into a row of a batch; RGB becomes opaque in a row of RGBA."""
  row[..., 3:] = 255
  row[..., :pixels.shape[-1]] = pixels


def load_source(record: dict, slot: int, size: tuple[int, int], max_crop: float, name: str, alpha: bool = False) -> np.ndarray:
  """Returns condition image `slot` of a record, height width 3 uint8, or 4 with `alpha` as in `load_picture`: it fills `size`, or is
  whole on white paper where that would cut more than `max_crop` off; `ValueError` if it cannot be decoded."""
  load = functools.partial(load_picture, record["sources"][slot], name=f"condition image {slot + 1} of {name}", alpha=alpha)
  return fit_source(load, (record["source_height"][slot], record["source_width"][slot]), size, max_crop)


@functools.cache
def _encoded(languages: tuple[str, ...]) -> frozenset[bytes]:
  return frozenset(language.encode() for language in languages)


def _check(resolutions, caption_dropout, max_faulty, parts, process_count) -> None:
  for resolution in resolutions:
    if resolution.batch_size < 1 or resolution.batch_size % process_count:
      raise ValueError(f"batch_size={resolution.batch_size} at {resolution.base_px} px does not divide over "
                       f"{process_count} processes: choose a multiple.")
  if not 0 <= caption_dropout <= 1:
    raise ValueError(f"caption_dropout={caption_dropout} must lie between 0 and 1.")
  if not 0 <= max_faulty <= 1:
    raise ValueError(f"max_faulty={max_faulty} must lie between 0 and 1.")
  if not parts or not all(0 <= part < process_count for part in parts):
    raise ValueError(f"process_index={', '.join(map(str, parts))} must lie in [0, {process_count}).")
