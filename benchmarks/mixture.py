"""How records are dealt at size: a made-up index of a web-like data set, sorted into buckets as a stage of a config would, and its batches.

  python -m benchmarks.mixture [--pictures=1e6] [--edits=2e5] [--run_config=configs/pretrain.py] [--stage=sft] [--batches=10000] [--dir=D] [--json=F]

Two thirds of the pictures have nearly a usual aspect ratio; captions have 20 to 1,024 tokens. Edits have one, two or three condition images (85, 12
and 3 %), the first of which has the target's aspect ratio in 90 %. No picture is there; the index is in files, as that of a data set. Printed are:
processor seconds and GiB of memory, without mapped files, from the index to the order; the seconds of a second start, which finds it kept; bytes
that a worker process of the loader is sent; programs and what merging costs; how far the shares of data sets are from what the config asks, after
`--batches`; how often the most frequent record of a data set and resolution comes to how often the rarest does; distinct records of the worst batch;
milliseconds of a plan.
"""

import dataclasses
import os
import pickle
import tempfile
import threading
import time

import numpy as np
from absl import flags

from benchmarks import timing
from data_pipelines.arrangement import Found
from data_pipelines.columns import Column
from data_pipelines.mixture import Mixture
from data_pipelines.pieces import pieces
from data_pipelines.tokenizer import PromptTokenizer, train_tokenizer
from launch import cli
from qimg2.runtime.config import RunConfig, parse

USUAL = {1.0: 0.16, 4 / 3: 0.13, 3 / 4: 0.08, 3 / 2: 0.17, 2 / 3: 0.1, 16 / 9: 0.12, 9 / 16: 0.05, 1.91: 0.03, 0.8: 0.05, 1.25: 0.03, 2.33: 0.02,
         0.5: 0.03, 2.0: 0.03}  # width to height -> share


def make_index(num: int, edits: bool, tokenizer: PromptTokenizer, folder: str, seed: int = 0) -> dict[str, np.ndarray]:
  """The index, as `data_pipelines.records.open_split` gives it, of `num` made-up records with one English caption each, written into a folder."""
  columns = {}
  for number, piece in enumerate(pieces(num)):
    for name, values in _some(piece, edits, np.random.default_rng(seed + number)).items():
      if name not in columns:
        file = np.lib.format.open_memmap(os.path.join(folder, f"{name}.npy"), "w+", values.dtype, (num, *values.shape[1:]))
        columns[name] = file.view(Column)
      if values.any():  # a new file is all zeros, which take no room
        columns[name][piece] = values
  return columns | {"language_names": np.array(["en"]), "tokenizer": np.array(tokenizer.fingerprint)}


def _some(piece: slice, edits: bool, rng: np.random.Generator) -> dict[str, np.ndarray]:
  num = piece.stop - piece.start
  longest = 256 if edits else 1024
  length = np.minimum(20 + rng.lognormal(3.5 if edits else 4.9, 0.6, num), longest).astype(np.int32)
  target = _aspects(rng, num)
  height, width = _sides(rng, target)
  source_sizes = np.zeros((num, 3 if edits else 0, 2), np.int32)
  if edits:
    number = rng.choice([1, 2, 3], num, p=[0.85, 0.12, 0.03])
    for slot in range(3):
      aspects = np.where(rng.random(num) < 0.9, target, _aspects(rng, num)) if slot == 0 else _aspects(rng, num)
      source_sizes[:, slot] = np.where((number > slot)[:, None], np.stack(_sides(rng, aspects), axis=1), 0)
  return {"height": height, "width": width, "quality": np.ones(num, np.float32), "sample_id": np.arange(piece.start, piece.stop, dtype=np.int64),
          "stage": np.full(num, 6, np.uint8), "has_text": np.zeros(num, bool), "source_sizes": source_sizes,
          "num_captions": np.ones(num, np.int32), "caption_language": np.zeros(num, np.uint16), "caption_kind": np.zeros(num, np.uint8),
          "caption_tokens": length}


def _aspects(rng: np.random.Generator, num: int) -> np.ndarray:
  """Logarithms of width to height."""
  usual = np.log(list(USUAL))[rng.choice(len(USUAL), num, p=np.array(list(USUAL.values())) / sum(USUAL.values()))] + rng.normal(0, 0.02, num)
  return np.where(rng.random(num) < 0.35, np.clip(rng.normal(0.1, 0.45, num), -1.3, 1.3), usual)


def _sides(rng: np.random.Generator, aspects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  side = rng.uniform(512, 4096, len(aspects))
  return tuple(np.rint(side * np.exp(sign * aspects / 2)).astype(np.int32) for sign in (-1, 1))


class _Memory:
  """The most memory of this process that is its own, without files that it only maps, from now on until `stop`; looked at every 20 ms."""

  def __init__(self):
    self._before = self._most = self._now()
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def _watch(self) -> None:
    while not self._end.wait(0.02):
      self._most = max(self._most, self._now())

  @staticmethod
  def _now() -> int:
    """Kilobytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
      return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:"))

  def stop(self) -> float:
    """Returns by how many GiB it has grown."""
    self._end.set()
    self._thread.join()
    return (max(self._most, self._now()) - self._before) / 2**20


def measure(cfg: RunConfig, stage_name: str, num_pictures: int, num_edits: int, num_batches: int, folder: str) -> dict:
  """What `main` prints; the index is written into a folder."""
  stage, = [one for one in cfg.stages if one.name == stage_name]
  tokenizer = train_tokenizer(["a red ball", "make it blue"], 300)
  made = {}
  for task, num in (("t2i", num_pictures), ("ti2i", num_edits)):
    os.mkdir(os.path.join(folder, task))
    made[task] = make_index(num, task == "ti2i", tokenizer, os.path.join(folder, task))
  find = lambda spec: Found(None, made[spec.task], identity=f"made up: {len(made[spec.task]['height'])} {spec.task}")
  memory, begin, clock = _Memory(), time.process_time(), time.perf_counter()
  classes = () if stage.kind == "autoencoder" else cfg.prompt_classes
  datasets = [dataclasses.replace(spec, min_stage=0, max_enlarge=0.0) for spec in stage.mixture]  # these pictures went through no funnel
  build = lambda: Mixture(datasets, stage.resolutions, cfg.num_tokens, tokenizer, cfg.seed, classes, stage.max_crop, stage.min_bucket_records,
                          stage.max_programs, find=find, order_dir=os.path.join(folder, "orders"))
  mixture = build()
  found = {"cpu_s": time.process_time() - begin, "seconds": time.perf_counter() - clock, "more_gb": memory.stop()}
  digest, begin, clock = mixture.digest, time.process_time(), time.perf_counter()
  mixture = build()
  found |= {"again_cpu_s": time.process_time() - begin, "again_seconds": time.perf_counter() - clock}
  if mixture.digest != digest:
    raise AssertionError("What was kept is another order.")
  found |= {"bytes_per_worker": len(pickle.dumps(mixture)), "shapes": mixture.merging.shapes,
           "programs": mixture.merging.buckets, "left_out": mixture.merging.left_out, "padding": mixture.merging.padding,
           "cut_off": mixture.merging.cut_off, "own_cut_off": mixture.merging.own_cut_off, "most_repeated": mixture.merging.most_repeated}
  plans = [mixture.plan(k) for k in range(num_batches)]
  total = sum(spec.weight for spec in mixture.datasets)
  found["share_off_by"] = max(abs(sum(plan.dataset == d for plan in plans) / num_batches - spec.weight / total)
                              for d, spec in enumerate(mixture.datasets))
  found["distinct"] = min(len(np.unique(plan.places)) / len(plan.places) for plan in plans[:200])
  found["rarest_to_most"] = max(_spread(mixture, spec, r) for spec in range(len(mixture.datasets)) for r in range(len(mixture.resolutions)))
  times = []
  for k in [*range(100), *(10**11 + 7919 * np.arange(100)).tolist()]:
    begin = time.process_time()
    mixture.plan(k)
    times.append(time.process_time() - begin)
  return found | {"plan_ms": 1e3 * float(np.median(times)), "slowest_plan_ms": 1e3 * max(times)}


def _spread(mixture: Mixture, dataset: int, resolution: int) -> float:
  """How often the most frequent record of a data set at a resolution comes to how often the rarest does, by the shares of its cells."""
  often = [share * mixture.buckets[cell.bucket].batch_size / len(cell.records) for cell, share in zip(mixture.cells, mixture.shares)
           if (cell.dataset, cell.resolution) == (dataset, resolution)]
  return max(often, default=1.0) / min(often, default=1.0)


def define_flags() -> None:
  """The flags of this benchmark."""
  flags.DEFINE_float("pictures", 1e6, "Text-to-image records.", lower_bound=1)
  flags.DEFINE_float("edits", 2e5, "Editing records.", lower_bound=1)
  flags.DEFINE_string("run_config", "configs/pretrain.py", "Config of which one stage is dealt.")
  flags.DEFINE_string("stage", "sft", "That stage.")
  flags.DEFINE_integer("batches", 10000, "How many batches are looked at.", lower_bound=1)
  flags.DEFINE_string("dir", "", "Folder in which index and order are made, of a picture 37 bytes and 4 for each resolution, of an edit 24 more; "
                      "empty for that of temporary files.")
  flags.DEFINE_string("json", "", "File for the row.")


def main(_) -> None:
  """Prints the figures."""
  args = flags.FLAGS
  with tempfile.TemporaryDirectory(dir=args.dir or None) as folder:
    row = measure(parse(timing.read_stage(args.run_config, args.stage)[0]), args.stage, int(args.pictures), int(args.edits), args.batches, folder)
  for name, value in row.items():
    print(f"{name:16} {value:.5g}")
  timing.write_json(args.json, [row], config=args.run_config, stage=args.stage, pictures=args.pictures, edits=args.edits)


if __name__ == "__main__":
  cli.run(main, define_flags)
