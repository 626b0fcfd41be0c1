"""The latents of a stage's data sets, and the condition encoder's states, written as data sets that a stage can train on. What is stored, and how
machines divide the work: `launch.cache_latents`.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain.python as grain
import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from data_pipelines import folders
from data_pipelines import records as R
from data_pipelines.buckets import Bucket, make_buckets
from data_pipelines.cache import open_cache
from data_pipelines.identity import differences_from_cached, identify
from data_pipelines.kept import folder_of
from data_pipelines.loader import FIRST_ROWS, check_record, fill_pixels, load_source, read_records
from data_pipelines.mixture import Cell, Mixture
from data_pipelines.specs import Resolution
from data_pipelines.tags import varies
from data_pipelines.transforms import DECODING, encode_png, load_picture
from qimg2.runtime.caching import MADE_BY
from qimg2.runtime.caching.networks import Encoder, Options
from qimg2.runtime.config import StageConfig
from qimg2.runtime.run import Run

_MORE = ("base_px", "own_height", "own_width")  # columns of a cache's index beside those of every data set
_NAMED = 1000  # broken records that dataset.json names; all are counted


def cache_latents(cfg: Any, stage_name: str, workdir: str | pathlib.Path, out_name: str = "", options: Options = Options()) -> list[dict]:
  """Caches the data sets of a stage's mixture, and returns the facts of each, with its path, or None for the path of a part.

  Args: a `RunConfig`, or what a config file returns; stage; folder of the run; name of the cache, "" for that of the data set with "_latents"; how to
  cache.

  Raises:
    ValueError: a stage that needs no latents, weights that are not there, or another cache in the same place.
  """
  if jax.process_count() > 1:
    raise ValueError(f"launch.cache_latents runs in one process, but JAX has {jax.process_count()}: start it once per machine with --part=i/n.")
  run = Run(cfg, workdir)
  if stage_name not in run.stages:
    raise ValueError(f"The config has no stage {stage_name!r}: choose one of {', '.join(run.stages)}.")
  stage = run.stages[stage_name]
  algorithm = run.algorithm(stage)
  if "vae" not in {algorithm.roles[role].network for role in algorithm.frozen}:
    raise ValueError(f"Stage {stage_name!r} has no frozen VAE whose latents could be cached: choose a stage that trains a generator.")
  if options.features and stage.truncates:
    raise ValueError(f"Stage {stage_name!r} has too_long='truncate', but no states of captions that are longer than num_tokens are cached: leave out "
                     "--features, or choose too_long='drop'.")
  tagged = [part.name for part in stage.mixture if varies(part)]
  if options.features and tagged:
    raise ValueError(f"Stage {stage_name!r} has shuffle_tags or drop_tags for data set {tagged[0]!r}, whose captions are others in each epoch, but "
                     "the encoder's states are cached of captions as they are written: leave out --features, or leave the tags as they are.")
  names = list(dict.fromkeys(part.name for part in stage.mixture))
  if out_name and len(names) > 1:
    raise ValueError(f"--name={out_name} names one cache, but stage {stage_name!r} has the data sets {', '.join(names)}: leave it out.")
  weights = {algorithm.roles[role].network: tree for role, tree in run.frozen_weights(stage, MADE_BY.values()).items()}
  encoder = Encoder(run, weights, options)
  return [_Job(run, stage, name, out_name or f"{name}_latents", encoder, options).write() for name in names]


# ---- one data set --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Split:
  """A split of the original: its number of records, and which of them are in which cell of which mixture."""
  num_records: int
  cells: tuple[tuple[Mixture, Cell], ...]


@dataclasses.dataclass(frozen=True)
class _Batch:
  """Records of one bucket that could be decoded, their pictures in the first rows, the rejected ones of those that have one, and what was wrong with
  the others."""
  records: list[dict]
  target: np.ndarray
  rejected: np.ndarray
  sources: list[np.ndarray]
  broken: list[str]


class _Job:
  """The cache of one data set, shard by shard. Shards stay in a folder of their own until the data set is complete:

    <data_dir>/.<name>.incomplete/request.json, <split>-00000, and <split>-00000.npz, its index, written when the shard is
  """

  def __init__(self, run: Run, stage: StageConfig, name: str, out_name: str, encoder: Encoder, options: Options):
    self._run, self._stage, self._name, self._out_name = run, stage, name, out_name
    self._encoder, self._options = encoder, options
    self._data_dir = pathlib.Path(run.cfg.data_dir)
    if open_cache(self._data_dir, name) is not None:
      raise ValueError(f"Data set {name!r} of stage {stage.name!r} is a latent cache itself: name the data set that it was made from.")
    if out_name == name:
      raise ValueError(f"--name={out_name} is the name of the original data set: choose another one.")
    self._resolutions = _distinct(stage.resolutions)
    self._tasks = tuple(sorted({part.task for part in stage.mixture if part.name == name}))
    alphas = {part.alpha for part in stage.mixture if part.name == name}
    if len(alphas) > 1:
      raise ValueError(f"Stage {stage.name!r} keeps the alpha of data set {name!r} in one part of its mixture and not in another: choose one.")
    self._alpha = {"alpha": True} if True in alphas else {}
    self._programs, self._shapes = _of_dataset(run.loader(stage).mixture, name, self._resolutions)
    self._meta = R.read_meta(self._data_dir / name)
    self._work = self._data_dir / f".{out_name}.incomplete"
    self._request = json.loads(json.dumps(self._make_request()))

  def write(self) -> dict:
    """Writes what is missing and returns the facts."""
    path = self._data_dir / self._out_name
    if path.exists():
      facts = R.read_meta(path)["facts"]
      _check_request(path, self._data_dir, R.read_meta(path)["request"], self._request)
      return {"path": str(path), "reused": True} | facts
    self._work.mkdir(exist_ok=True)
    self._begin()
    splits = {split: self._open(split) for split in R.SPLITS}
    shards = [(split, number) for split in R.SPLITS for number in range(math.ceil(splits[split].num_records / self._options.shard_records))]
    self._write_shards(splits, shards)
    if self._options.part is not None:
      done = sum(self._place(*shard).with_suffix(".npz").exists() for shard in shards)
      return {"path": None, "shards_done": done, "shards": len(shards)}
    facts = self._finish(shards)
    folders.publish(self._work / self._out_name, path)
    shutil.rmtree(self._work)
    return {"path": str(path), "reused": False} | facts

  # ---- what is asked for -------------------------------------------------------------------------

  def _make_request(self) -> dict:
    """What decides every byte of the cache. Mesh and batch size are left out: they change the last bits at most."""
    run, options = self._run, self._options
    sizes = [{"base_px": one.base_px, "ratios": list(one.ratios), "multiple": one.multiple} for one in self._resolutions]
    request = {"dataset": self._name, "data": identify(self._data_dir, self._name), "tasks": self._tasks,
               "resolutions": sizes, "max_crop": self._stage.max_crop, "shapes": self._shapes, "features": options.features, "dtype": options.dtype,
               "shard_records": options.shard_records, "tokenizer": run.tokenizer.fingerprint, "vae": self._encoder.fingerprints["vae"],
               "vae_dtype": run.cfg.vae.dtype, "decoding": DECODING} | self._alpha
    if options.features:
      request |= {"encoder": self._encoder.fingerprints["encoder"], "encoder_dtype": run.nets.encoder.dtype, "num_tokens": run.cfg.num_tokens}
    return request

  def _describe(self) -> dict:
    """The section `cache` of dataset.json."""
    run, features = self._run, self._options.features
    sizes = {str(one.base_px): [(bucket.height, bucket.width) for bucket in make_buckets("t2i", one.base_px, one.ratios, 0, 1, one.multiple)]
             for one in self._resolutions}
    frozen = {run.algorithm(self._stage).roles[role].network: text for role, text in self._stage.frozen.items()}
    weights_from = {name: frozen[MADE_BY[name]] for name in self._encoder.fingerprints}
    made_with = {"base_px": [one.base_px for one in self._resolutions], "sizes": sizes,
                 "resolutions": self._request["resolutions"], "shapes": self._request["shapes"],
                 "tokenizer": run.tokenizer.fingerprint, "num_tokens": run.cfg.num_tokens, **self._encoder.fingerprints,
                 "weights_from": weights_from, "decoding": DECODING} | self._alpha
    return {"dtype": self._options.dtype, "channels": run.nets.vae.latent_channels, "factor": run.nets.vae.spatial_factor,
            "feature_width": run.nets.encoder.width if features else 0, "num_system_tokens": run.nets.num_system_tokens, "made_with": made_with}

  def _begin(self) -> None:
    """Checks that what is in the work folder was begun for the same request."""
    file = self._work / "request.json"
    if not file.exists():
      part = self._work / f"request.{os.getpid()}.part"
      part.write_text(json.dumps(self._request, indent=1), encoding="utf-8")
      part.replace(file)
    _check_request(self._work, self._data_dir, json.loads(file.read_text(encoding="utf-8")), self._request)

  def _open(self, split: str) -> _Split:
    """Which records of a split to cache. The validation split may have none of a task."""
    num_records, found = self._meta["facts"][split], []
    for task in self._tasks if num_records else ():
      part = next(one for one in self._stage.mixture if (one.name, one.task) == (self._name, task))
      spec = dataclasses.replace(part, split=split)
      try:
        mixture = Mixture([spec], self._resolutions, self._run.cfg.num_tokens, self._run.tokenizer, 0, self._run.cfg.prompt_classes,
                          self._stage.max_crop, programs=self._programs, every=True, order_dir=folder_of(self._run.cfg.order_dir))
      except ValueError as error:
        if split == "train":
          raise
        logging.warning("The cache %s will have no validation records of the task %s: %s", self._out_name, task, error)
        continue
      if not mixture.cells and split == "train":
        raise ValueError(f"None of the records of data set {self._name!r} has the task {task}: leave it out of the mixture of {self._stage.name!r}.")
      if mixture.merging.left_out:
        logging.warning("The cache %s will lack %.2f%% of the %s records of the task %s: none of the buckets of stage %s fits them.", self._out_name,
                        100 * mixture.merging.left_out, split, task, self._stage.name)
      found += [(mixture, cell) for cell in sorted(mixture.cells, key=lambda cell: (cell.resolution, cell.bucket))]
    return _Split(num_records, tuple(found))

  # ---- shards ------------------------------------------------------------------------------------

  def _place(self, split: str, number: int) -> pathlib.Path:
    return self._work / f"{split}-{number:05d}"

  def _write_shards(self, splits: dict[str, _Split], shards: list[tuple[str, int]]) -> None:
    """Writes those shards of this process's part that are not there yet."""
    first, step = self._options.part or (0, 1)
    mine = shards[first::step]
    sizes = {shard: sum(len(some) for _, _, some in self._rows(splits[shard[0]], shard[1])) for shard in mine}
    done = [shard for shard in mine if self._place(*shard).with_suffix(".npz").exists()]
    with tqdm(total=sum(sizes.values()), initial=sum(map(sizes.get, done)), desc=self._out_name, unit="record", disable=None) as progress:
      for split, number in mine:
        if (split, number) not in done:
          self._write_shard(splits[split], split, number, progress)

  def _write_shard(self, opened: _Split, split: str, number: int, progress: tqdm) -> None:
    """Writes one shard, and then its index with what else `_finish` needs of it."""
    path, columns, more, broken = self._place(split, number), R.Columns(), {name: [] for name in _MORE}, []

    def stream() -> Iterator[dict]:
      for mixture, cell, batch, num_read in self._batches(opened, number):
        for sentence in batch.broken:
          logging.warning("Left out: %s", sentence)
        broken.extend(batch.broken)
        for original, record in zip(batch.records, self._encode(mixture.buckets[cell.bucket], batch)):
          for name, value in zip(_MORE, (mixture.resolutions[cell.resolution].base_px, original["height"], original["width"])):
            more[name].append(value)
          yield record
        progress.update(num_read)

    shard = R.write_shard(path, columns.watch(stream()))
    about = json.dumps({"num_records": shard.num_records, "num_bytes": shard.num_bytes, "sha256": shard.sha256, "broken": broken})
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
      np.savez(file, about=np.array(about), **{name: np.array(values, np.int32) for name, values in more.items()},
               **columns.arrays(self._run.tokenizer))
    part.replace(path.with_suffix(".npz"))

  def _rows(self, opened: _Split, number: int) -> Iterator[tuple[Mixture, Cell, np.ndarray]]:
    """The records of a shard: (mixture, cell, its positions there, ascending as in the original, so that each epoch is shuffled alike)."""
    first = number * self._options.shard_records
    for mixture, cell in opened.cells:
      start, stop = np.searchsorted(cell.records, (first, first + self._options.shard_records))
      yield mixture, cell, cell.records[start:stop]

  def _batches(self, opened: _Split, number: int) -> Iterator[tuple[Mixture, Cell, _Batch, int]]:
    """(mixture, cell, decoded batch, number of records read), decoded ahead by threads."""
    pieces = [(mixture, cell, some[i:i + size]) for mixture, cell, some in self._rows(opened, number)
              for size in [self._batch_size(mixture.buckets[cell.bucket])] for i in range(0, len(some), size)]
    load = lambda i: self._load(*pieces[i])
    batches = grain.MapDataset.range(len(pieces)).map(load).to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4))
    for (mixture, cell, positions), batch in zip(pieces, batches):
      yield mixture, cell, batch, len(positions)

  def _batch_size(self, bucket: Bucket) -> int:
    rows = self._run.mesh.shape["data"] * self._run.mesh.shape["fsdp"]
    return math.ceil((self._options.batch_size or bucket.batch_size) / rows) * rows

  def _load(self, mixture: Mixture, cell: Cell, positions: np.ndarray) -> _Batch:
    bucket = mixture.buckets[cell.bucket]
    num, good, broken = self._batch_size(bucket), [], []
    target, rejected = np.zeros((2, num, bucket.height, bucket.width, bucket.image_channels), np.uint8)
    sources = [np.zeros((num, *size, bucket.image_channels), np.uint8) for size in bucket.source_sizes]
    for sample_id, record in zip(mixture.sample_ids(cell.dataset, positions), read_records(mixture.sources[cell.dataset], positions.tolist())):
      row, name = len(good), f"sample {sample_id} of data set {self._name!r}"
      try:
        check_record(record, int(sample_id), bucket, name)
        fill_pixels(target[row], load_picture(record["image"], bucket.height, bucket.width, name, bool(self._alpha)))
        if record.get("rejected"):
          picture = load_picture(record["rejected"], bucket.height, bucket.width, f"the rejected picture of {name}", bool(self._alpha))
          fill_pixels(rejected[row], picture)
        for slot, size in enumerate(bucket.source_sizes):
          fill_pixels(sources[slot][row], load_source(record, slot, size, mixture.max_crop, name, bool(self._alpha)))
      except ValueError as error:
        broken.append(str(error))
      else:
        good.append(record)
    return _Batch(good, target, rejected, sources, broken)

  def _encode(self, bucket: Bucket, batch: _Batch) -> Iterator[dict]:
    """The records of the cache."""
    num, sizes, features = len(batch.records), bucket.source_sizes, self._options.features
    if not num:
      return
    name = f"samples {batch.records[0]['sample_id']} to {batch.records[-1]['sample_id']} of data set {self._name!r}"
    latents, *sources = [self._encoder.latents(pixels, num, name) for pixels in (batch.target, *batch.sources)]
    is_pair = [bool(record.get("rejected")) for record in batch.records]
    rejected = self._encoder.latents(batch.rejected, num, name) if any(is_pair) else [b""] * num
    captions = [_texts(record["captions"]) for record in batch.records]
    states = self._encoder.states(captions, batch.sources, sizes, len(batch.target), name) if features else [[]] * num
    for row, record in enumerate(batch.records):
      yield {**record, "image": b"", "rejected": b"", "rejected_latents": rejected[row] if is_pair[row] else b"",
             "height": bucket.height, "width": bucket.width, "captions": captions[row],
             "languages": _texts(record["languages"]), "kinds": _texts(record["kinds"]), "attributes": record["attributes"].decode(),
             "sources": [] if features else [encode_png(source[row]) for source in batch.sources],
             "source_height": [height for height, _ in sizes], "source_width": [width for _, width in sizes],
             "latents": latents[row], "source_latents": [source[row] for source in sources], "features": states[row]}

  # ---- all of it --------------------------------------------------------------------------------

  def _finish(self, shards: list[tuple[str, int]]) -> dict:
    """Makes a data set of the shards, inside the work folder, and returns its facts."""
    built, tokenizer = self._work / self._out_name, self._run.tokenizer
    shutil.rmtree(built, ignore_errors=True)
    empty = R.Columns().arrays(tokenizer) | {name: np.zeros(0, np.int32) for name in _MORE}
    files, broken = {split: [] for split in R.SPLITS}, []
    for split, number in shards:
      about = self._stored(split, number)[1]
      broken += about.pop("broken")
      files[split].append(R.Shard(os.fspath(self._place(split, number)), **about))
    num_read = sum(shard.num_records for some in files.values() for shard in some) + len(broken)
    if len(broken) > self._stage.max_faulty * max(num_read, FIRST_ROWS) or len(broken) == num_read:
      raise ValueError(f"{len(broken)} of {num_read} records of data set {self._name!r} could not be cached, more than max_faulty="
                       f"{self._stage.max_faulty} of stage {self._stage.name!r} allows; the last one: {broken[-1]}")
    parts = lambda split: itertools.chain((self._stored(*shard)[0] for shard in shards if shard[0] == split), [empty])
    index = {split: R.join_indices(functools.partial(parts, split)) for split in R.SPLITS}
    facts = {"cached_from": self._name, "left_out": len(broken)}
    # Linked, not moved: should this be interrupted, the shards are still where they were.
    return R.finish(built, self._out_name, files, index, tokenizer, self._request, facts, move=R.link, cache=self._describe(), broken=broken[:_NAMED])

  def _stored(self, split: str, number: int) -> tuple[dict[str, np.ndarray], dict]:
    """(the index of a shard, what else was written down of it)."""
    with np.load(self._place(split, number).with_suffix(".npz")) as stored:
      arrays = {name: stored[name] for name in stored.files}
    return arrays, json.loads(str(arrays.pop("about")))


def _of_dataset(mixture: Mixture, name: str, distinct: Sequence[Resolution]) -> tuple[dict[tuple, np.ndarray], list]:
  """Returns the programs that a stage uses for a data set, as a mixture of the `distinct` resolutions has them, and as `Mixture.shapes` has them."""
  found, shapes, base_px = {}, set(), [one.base_px for one in distinct]
  for spec, used, own in zip(mixture.datasets, mixture.used, mixture.shapes):
    if spec.name == name:
      shapes.update(own)
      for (task, r, cache, number), some in used.items():
        found.setdefault((task, base_px.index(mixture.resolutions[r].base_px), cache, number), []).append(some)
  return {key: np.unique(np.concatenate(some), axis=0) for key, some in found.items()}, json.loads(json.dumps(sorted(shapes)))


def _distinct(resolutions: Sequence[Resolution]) -> tuple[Resolution, ...]:
  """One resolution per area."""
  chosen = {}
  for one in resolutions:
    same = chosen.setdefault(one.base_px, one)
    if (same.ratios, same.multiple) != (one.ratios, one.multiple):
      raise ValueError(f"Two resolutions have base_px={one.base_px} and other ratios or multiples, which one cache cannot tell apart: cache two "
                       "stages with one of them each.")
  return tuple(chosen.values())


def _check_request(folder: pathlib.Path, data_dir: pathlib.Path, stored: dict, request: dict) -> None:
  other = differences_from_cached(data_dir, stored)
  if other:
    raise ValueError(f"{folder} holds latents of data set {request['dataset']!r} as it was when they were cached, and this has {other} now: remove "
                     "that folder or choose another --name.")
  for key, value in request.items():
    if key == "data":
      continue
    if key == "shapes" and stored.get(key) != value:
      raise ValueError(f"{folder} holds a latent cache for other buckets, or of an older version: remove that folder or choose another --name.")
    if stored.get(key) != value:
      raise ValueError(f"{folder} holds a latent cache made with {key}={stored.get(key)}, not {key}={value}: remove that folder or choose "
                       "another --name.")


def _texts(values: Iterable[bytes]) -> list[str]:
  return [value.decode() for value in values]


# ---- command line --------------------------------------------------------------------------------------------------
