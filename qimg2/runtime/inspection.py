"""What a stage's training will see, batch by batch, without building a network: the plan, sheets of samples, counts. See `launch.inspect_data`."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.arrangement import usable_captions
from data_pipelines.buckets import Bucket
from data_pipelines.loader import Loader, read_records
from data_pipelines.mixture import Cell, Mixture
from data_pipelines.records import KINDS, open_split
from data_pipelines.specs import DatasetSpec, source_grids
from data_pipelines.tokenizer import PromptTokenizer
from data_pipelines.truths import read_truth
from qimg2.runtime.config import MeshConfig, parse
from qimg2.runtime.run import Run
from qimg2.runtime.sheets import strips

SIDE_PX = 128  # of a picture on the sheet


@dataclasses.dataclass(frozen=True)
class Data:
  """The data of one stage: its name, loader, tokenizer, and the share of its prompts that are emptied."""
  stage: str
  loader: Loader
  tokenizer: PromptTokenizer
  caption_dropout: float


def open_data(cfg: Any, stage: str = "", process: tuple[int, int] = (0, 1)) -> Data:
  """The data of a stage as one process sees them; embedded data sets are made where they are missing.

  Args:
    cfg: a `RunConfig`, or what a config file returns; its mesh and what its stages start from do not matter.
    stage: the name of one of its stages, "" for the first.
    process: (its index, how many there are).

  Raises:
    ValueError: no such stage, or whatever training would say of this config's data.
  """
  cfg = parse(cfg)
  names = [one.name for one in cfg.stages]
  if stage and stage not in names:
    raise ValueError(f"There is no stage {stage!r} in this config: it has {', '.join(names)}.")
  if not 0 <= process[0] < process[1]:
    raise ValueError(f"process_id={process[0]} must be one of num_processes={process[1]} processes, counted from 0.")
  run = Run(dataclasses.replace(cfg, mesh=MeshConfig(data=1, fsdp=-1, context=1, tensor=1)), "", trained=True)
  chosen = run.stages[stage or names[0]]
  return Data(chosen.name, run.loader(chosen, process), run.tokenizer, chosen.caption_dropout)


# ---- the plan --------------------------------------------------------------------------------------


def plan(data: Data, start: int, num_batches: int) -> Iterator[dict]:
  """Yields for batches start to start + num_batches - 1 what they hold, as plain JSON; nothing is read.

  `sample_ids` are this process's, in the order of its rows, before broken records are replaced.
  """
  mixture = data.loader.mixture
  for k in range(start, start + num_batches):
    one = mixture.plan(k)
    bucket, spec = mixture.buckets[one.bucket], mixture.datasets[one.dataset]
    own = one.records[data.loader.own_rows(len(one.places))]
    yield {"batch": k, "stage": data.stage, "dataset": spec.name, "task": bucket.task, "bucket": _shape(bucket),
           "sample_ids": mixture.sample_ids(one.dataset, own).tolist()}


def truths(data: Data, k: int) -> list[dict]:
  """What the records of this process's rows of batch k say of their pictures, in the order of the rows: what rewards are told beside the prompt.

  Raises:
    ValueError: a record that cannot be read, or says nothing that can be understood.
  """
  mixture = data.loader.mixture
  one = mixture.plan(k)
  places = one.records[data.loader.own_rows(len(one.places))]
  found = []
  for place, record in zip(places.tolist(), read_records(mixture.sources[one.dataset], places.tolist())):
    name = f"record {place} of data set {mixture.datasets[one.dataset].name!r}"
    if isinstance(record, Exception):
      raise ValueError(f"Cannot read {name} ({record}): check the files with launch.prepare_data --verify.")
    found.append(read_truth(record, name))
  return found


def _shape(bucket: Bucket) -> dict:
  return {"height": bucket.height, "width": bucket.width, "source_sizes": [list(size) for size in bucket.source_sizes],
          "num_tokens": bucket.num_tokens, "batch_size": bucket.batch_size}


# ---- the sheet -------------------------------------------------------------------------------------


def sheet(data: Data, start: int, num_batches: int, num_tiles: int = 8) -> np.ndarray:
  """A picture [H, W, 3] uint8 of batches start to start + num_batches - 1: a heading and this process's first `num_tiles` samples of each.

  Raises:
    ValueError: nothing to draw, or records that cannot be read.
  """
  if num_batches < 1 or num_tiles < 1:
    raise ValueError(f"There is nothing to draw in {num_batches} batches of {num_tiles} tiles: ask for at least one of each.")
  loader, rows = first_rows(data.loader, num_tiles), []
  for row in plan(data, start, num_batches):
    number, batch = loader.batch(row["batch"])
    shape = data.loader.buckets[number]
    sources = "".join(f" from {height} x {width}" for height, width in shape.source_sizes)
    pairs = ", pairs: the better picture, then the worse" if shape.pairs else ""
    heading = (f"batch {row['batch']}: {row['dataset']}, {row['task']}{pairs}, height x width {shape.height} x {shape.width} px{sources}, "
               f"{shape.num_tokens} tokens, {shape.batch_size} rows")
    pictures = [*_seen(batch, "target", "latents"), *_seen(batch, "rejected", "rejected_latents")]
    columns = [*_sources(batch), *pictures]
    captions = [data.tokenizer.decode_prompt(tokens).strip() or "(empty)" for tokens in batch["tokens"]]
    rows.append((heading, list(zip(zip(*columns), captions))))
  return strips(rows, SIDE_PX)


def first_rows(loader: Loader, num: int) -> Loader:
  """The same loader, reading only the first `num` of this process's rows of each batch; what is in them depends on no other row."""
  some, own_rows = copy.copy(loader), loader.own_rows
  some.faults = []
  some.own_rows = lambda batch_size: own_rows(batch_size)[:num]
  return some


def _sources(batch: dict) -> Sequence[np.ndarray]:
  """The condition images of a batch, or of a latent cache without them their latents, each B h w 3 uint8."""
  return batch["sources"] or [_visible(latents) for latents in batch.get("source_latents", ())]


def _seen(batch: dict, pixels: str, latents: str) -> list[np.ndarray]:
  """The pictures of a key, or what is seen of their latents; none where the batch has neither."""
  return [batch[pixels]] if pixels in batch else [_visible(batch[latents])] if latents in batch else []


def _visible(latents: np.ndarray) -> np.ndarray:
  """The first three channels of normalised latents B h w C as colours B h w 3 uint8, -3 to 3 from black to white; fewer channels are repeated."""
  channels = [min(channel, latents.shape[-1] - 1) for channel in range(3)]
  return np.rint(255 * np.clip(latents[..., channels].astype(np.float32) / 6 + 0.5, 0, 1)).astype(np.uint8)


# ---- the summary -----------------------------------------------------------------------------------


def summary(data: Data) -> dict:
  """What the plan amounts to, as plain JSON, without reading a record.

  num_steps: compiled steps, one per bucket; merging: what it costs that shapes share buckets; records: what became of them per data set,
  resolution and target size; datasets, tasks, buckets: shares of the batches, 0 to 1, and per bucket the records and the share of the prompt
  tokens that is padding, None where the data set's tokenizer is another one, so that lengths are not known.
  """
  mixture = data.loader.mixture
  cells = cell_shares(mixture)
  lengths = {spec: _expected_tokens(data, spec) for spec in {cell.dataset: None for cell, _ in cells}}
  share = lambda chosen: sum(share for cell, share in cells if chosen(cell))
  buckets = []
  for number, bucket in enumerate(mixture.buckets):
    here = [(cell, share) for cell, share in cells if cell.bucket == number]
    buckets.append({"task": bucket.task, **_shape(bucket), "records": sum(len(cell.records) for cell, _ in here),
                    "share": share(lambda cell: cell.bucket == number), "padding": _padding(data, bucket, here, lengths)})
  return {
      "stage": data.stage, "num_steps": len(buckets), "merging": dataclasses.asdict(mixture.merging),
      "records": [dataclasses.asdict(count) for count in mixture.counts],
      "datasets": [{"dataset": spec.name, "split": spec.split, "task": spec.task, "share": share(lambda cell: cell.dataset == number)}
                   for number, spec in enumerate(mixture.datasets)],
      "tasks": [{"task": task, "share": share(lambda cell: mixture.buckets[cell.bucket].task == task)}
                for task in dict.fromkeys(bucket.task for bucket in mixture.buckets)],
      "buckets": buckets}


def cell_shares(mixture: Mixture) -> list[tuple[Cell, float]]:
  """(cell, its share of the batches) of every cell."""
  return list(zip(mixture.cells, mixture.shares))


def _padding(data: Data, bucket: Bucket, cells: list[tuple[Cell, float]], lengths: dict[int, np.ndarray | None]) -> float | None:
  if any(lengths[cell.dataset] is None for cell, _ in cells):
    return None
  text = sum(num * float(lengths[cell.dataset][cell.records].mean()) for cell, num in cells) / sum(num for _, num in cells)
  slots = data.tokenizer.num_image_tokens(source_grids(bucket.source_sizes))
  return 1 - (text + slots) / bucket.num_tokens


def _expected_tokens(data: Data, spec_number: int) -> np.ndarray | None:
  """The mean length of each record's prompt as the loader draws it, n float64, condition images not counted; 0 where it has none."""
  spec: DatasetSpec = data.loader.mixture.datasets[spec_number]
  index = open_split(spec.data_dir, spec.name, spec.split)[1]
  if str(index["tokenizer"]) != data.tokenizer.fingerprint:
    return None
  num, kind = len(index["num_captions"]), index["caption_kind"].astype(np.int64)
  record, usable = np.repeat(np.arange(num), index["num_captions"]), usable_captions(index, spec)
  group = record * len(KINDS) + kind  # captions of one kind of one record are drawn alike
  sizes = np.bincount(group[usable], minlength=num * len(KINDS)).reshape(num, len(KINDS))
  weights = np.array([spec.caption_weights.get(name, 0.0) if spec.caption_weights else 1.0 for name in KINDS])
  totals = (sizes > 0) @ weights
  chance = usable * weights[kind] / np.maximum(sizes.ravel()[group], 1) / np.where(totals, totals, 1)[record]
  drawn = np.bincount(record, chance * index["caption_tokens"], minlength=num)
  empty = float(data.tokenizer.count([""], spec.task == "ti2i")[0])
  return np.where(totals > 0, (1 - data.caption_dropout) * drawn + data.caption_dropout * empty, 0.0)


def table(facts: dict) -> str:
  """A summary as text."""
  merging = facts["merging"]
  lines = [f"stage {facts['stage']}: {facts['num_steps']} compiled steps for {merging['shapes']} shapes",
           f"  left out for want of a bucket {merging['left_out']:.2%}, padding by larger shapes {merging['padding']:.2%}",
           f"  cut off from targets {merging['cut_off']:.2%}, at sizes of their own {merging['own_cut_off']:.2%}",
           f"  in a batch of the smallest cell a record comes at most {merging['most_repeated']} times"]
  lines += ["", "records", *_columns(facts["records"])]
  for name in ("datasets", "tasks", "buckets"):
    lines += ["", f"share of the batches per {name[:-1]}", *_columns(facts[name])]
  return "\n".join(lines)


def _columns(rows: Sequence[dict]) -> list[str]:
  cells = [[name.replace("_", " ") for name in rows[0]]] + [[_text(value) for value in row.values()] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  return ["  " + "  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in cells]


def _text(value: Any) -> str:
  if value is None:
    return "unknown"
  if isinstance(value, list):
    return " + ".join(f"{height}x{width}" for height, width in value) or "-"
  return f"{value:.2%}" if isinstance(value, float) else str(value)


# ---- the command -----------------------------------------------------------------------------------
