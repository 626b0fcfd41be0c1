"""The train step of a stage and bucket compiled for a mesh of devices that need not exist, and what is read from it. See `launch.rehearse`."""

import dataclasses
import math
import os
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines.buckets import Bucket, bucket_size, parse_ratio
from data_pipelines.loader import Loader
from data_pipelines.mixture import Resolution, source_grids
from data_pipelines.tokenizer import PromptTokenizer
from launch import rehearse_table
from launch.cli import plain
from launch.rehearse_table import Row
from launch.sections import from_section, make_algorithm, model_configs
from qimg2 import conditioning, flops, flow, hlo, optim, roofline, sharding
from qimg2 import params as P
from qimg2.state import abstract_state, make_optimizers
from qimg2.trainer import Stage, compile_steps

SYSTEM_TOKENS, WORDS_PER_IMAGE = 12, 6  # where there is no tokenizer


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which stages and buckets to rehearse; empty takes all. Without `all_buckets`, of each resolution the square and the widest alone, or with
  `squares` the square alone."""
  stages: tuple[str, ...] = ()
  tasks: tuple[str, ...] = ()
  base_px: tuple[int, ...] = ()
  all_buckets: bool = False
  squares: bool = False


class Rehearsal:
  """A config on a mesh of devices that need not exist."""

  def __init__(self, cfg: ConfigDict, devices: Sequence[Any], chip: roofline.Chip | None = None):
    """Args: a run's config; the devices of a topology; their published rates, None for devices without.

    Raises:
      ValueError: a config that does not fit together, or does not fit the devices.
    """
    self.cfg, self.chip = cfg, chip
    self.mesh = sharding.make_mesh(plain(cfg.mesh), devices)
    self.rules = sharding.find_rules(cfg.rules, self.mesh)
    self.tokenizer = find_tokenizer(cfg)
    system = self.tokenizer.num_system_tokens if self.tokenizer else SYSTEM_TOKENS
    self.nets = conditioning.Networks(*model_configs(cfg), system, sharding.make_shard(self.mesh, self.rules))
    self.specs = self.nets.specs()
    self._measured: dict[str, dict] = {}

  def buckets(self, section: ConfigDict, choice: Choice = Choice()) -> list[Bucket]:
    """The chosen batch shapes of a stage: tasks in the order of the mixture, resolutions in that of the config."""
    found = {}
    for task in dict.fromkeys(part.task for part in section.mixture):
      for part in section.resolutions:
        resolution = from_section(Resolution, part, f"stages[{section.name}].resolutions")
        if choice.tasks and task not in choice.tasks or choice.base_px and resolution.base_px not in choice.base_px:
          continue
        for ratio in _ratios(resolution.ratios, choice):
          sources = (bucket_size(resolution.base_px, ratio, 32),) if task == "ti2i" else ()
          size = bucket_size(resolution.base_px, ratio, resolution.multiple)
          num_tokens = self.cfg.num_tokens + self._image_tokens(sources)
          found[Bucket(task, *size, sources, num_tokens=num_tokens, batch_size=resolution.batch_size)] = None
    return list(found)

  def _image_tokens(self, sources: tuple[tuple[int, int], ...]) -> int:
    grids = source_grids(sources)
    return self.tokenizer.num_image_tokens(grids) if self.tokenizer else sum(h * w + WORDS_PER_IMAGE for h, w in grids)

  def row(self, section: ConfigDict, bucket: Bucket) -> Row:
    """One line of the table: the stage's step compiled for one bucket. Programs that differ in nothing but their rates are compiled once.

    Raises:
      ValueError: a global batch that the devices and micro-batches do not divide.
    """
    settings = from_section(optim.Config, section.optimizer, f"stages[{section.name}].optimizer")
    algorithm = make_algorithm(section.algorithm, from_section(flow.Schedule, self.cfg.schedule, "schedule"))
    shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    if bucket.batch_size % (shards * settings.accumulate):
      raise ValueError(f"Stage {section.name!r}: a batch of {bucket.batch_size} cannot be divided over {shards} devices of the axes data and fsdp "
                       f"in {settings.accumulate} micro-batches: change config.mesh, batch_size or optimizer.accumulate.")
    batch = self._batch(bucket)
    key = str((plain(section.algorithm), bucket, settings.accumulate, settings.mu_dtype))
    if key not in self._measured:
      stage = Stage(section.name, algorithm, make_optimizers(algorithm, self.specs, settings, section.num_steps), self.specs, section.num_steps,
                    (batch,), accumulate=settings.accumulate)
      self._measured[key] = self._measure(stage)
    counts = flops.step_flops(self.nets, algorithm.losses, algorithm.frozen, batch)
    row = Row(stage=section.name, task=bucket.task, height=bucket.height, width=bucket.width, num_sources=len(bucket.source_sizes),
              num_tokens=bucket.num_tokens, batch_size=bucket.batch_size, accumulate=settings.accumulate, num_devices=self.mesh.size,
              mesh=dict(self.mesh.shape), rules=self.cfg.rules, remat=self.nets.model.remat,
              model_flops={role: n / self.mesh.size for role, n in counts.items()}, **self._measured[key])
    return rehearse_table.with_bound(row, self.chip, self.mesh)

  def _batch(self, bucket: Bucket) -> dict:
    """The abstract global batch, as the loader would make it."""
    rows = sharding.batch_sharding(self.mesh, self.rules)
    shape = lambda x: jax.ShapeDtypeStruct((bucket.batch_size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype), sharding=rows)
    return jax.tree.map(shape, Loader.example(dataclasses.replace(bucket, batch_size=1)))

  def _measure(self, stage: Stage) -> dict:
    """The measured fields of a row: those of memory alone if the program does not fit."""
    state = abstract_state(stage.algorithm, stage.optimizers, stage.specs, self.mesh, self.rules)
    place = lambda specs: P.abstract(specs, sharding.param_shardings(specs, self.mesh, self.rules))
    frozen = {role: place(self.specs[role]) for role in stage.algorithm.frozen}
    start, limit = time.monotonic(), self.chip.hbm_bytes if self.chip else None
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves((state, frozen)))
    if limit and held > limit:  # nothing to compile
      return {"peak_bytes": float(held), "limit_bytes": limit, "compile_s": 0.0}
    for file in dumped():
      file.unlink()  # of an earlier row
    try:
      compiled, = compile_steps(stage, self.nets, state, frozen, self.mesh)
    except jax.errors.JaxRuntimeError as error:
      sizes = hlo.out_of_memory(str(error))
      if sizes is None:
        raise
      return {"peak_bytes": sizes[0], "limit_bytes": sizes[1], "compile_s": time.monotonic() - start}
    memory = compiled.memory_analysis()
    traffic = hlo.analyze(program_text(compiled), self.mesh.size)
    return {"peak_bytes": float(memory.peak_memory_in_bytes), "limit_bytes": limit, "compile_s": time.monotonic() - start, "traffic": traffic}


def _ratios(ratios: Sequence[Any], choice: Choice) -> list[Any]:
  """The chosen ones of a resolution's ratios: the one nearest to a square first."""
  if choice.all_buckets:
    return list(ratios)
  square, widest = min(ratios, key=lambda ratio: max(parse_ratio(ratio), 1 / parse_ratio(ratio))), max(ratios, key=parse_ratio)
  return [square] if choice.squares else list(dict.fromkeys((square, widest)))


def program_text(compiled: jax.stages.Compiled) -> str:
  """The program that was compiled last as text: what the compiler dumped, where it did. A libtpu that is newer than jaxlib writes instructions
  that `as_text` cannot read back."""
  files = [file for file in dumped() if file.name.endswith("after_codegen.txt")]
  return max(files, key=lambda file: file.stat().st_mtime).read_text(encoding="utf-8") if files else compiled.as_text()


def dumped() -> list[pathlib.Path]:
  """What the compiler wrote down of train steps."""
  folder = re.search(r"--xla_dump_to=(\S+)", os.environ.get("XLA_FLAGS", ""))
  return [path for path in pathlib.Path(folder[1]).glob("*jit_step*") if path.is_file()] if folder else []


def find_tokenizer(cfg: ConfigDict) -> PromptTokenizer | None:
  """The tokenizer that the config names or whose data set is there; None if there is none."""
  path = pathlib.Path(cfg.tokenizer or pathlib.Path(cfg.data_dir) / cfg.stages[0].mixture[0]["name"])
  return PromptTokenizer.load(path) if path.is_file() or (path / "tokenizer.json").is_file() else None
