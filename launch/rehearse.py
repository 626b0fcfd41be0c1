"""Compiles the train step of every stage and bucket of a config for a TPU pod, on any x86 Linux machine, and prints what it would need and how
fast it could be. Nothing is allocated, no data is read.

  python -m launch.rehearse --config=configs/pretrain.py --topology=v5p:4x4x8 [--stage=pretrain_512] [--task=t2i] [--base_px=512] [--search]

The topology is a chip (v5e, v5p, v6e, tpu7x) and the shape of its slice, and needs `pip install libtpu`; `cpu:8` stands for eight simulated CPU
devices, which have no memory limit and no published rates. How to read the table: docs/pods.md.

Buckets come from the config alone: each task of the stage's mixture at each resolution, with prompts of `num_tokens`, the longest class. One
condition image, of the target's own size, goes into an edit. Where the config's tokenizer cannot be read, the system turn has 12 tokens (one
per word and mark of the published template; a real vocabulary may split a word, which drops one more token and makes the sequence shorter) and
a condition image adds 6 tokens of words beside its slots.
"""

import atexit
import copy
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from ml_collections import ConfigDict, config_flags

from data_pipelines.buckets import Bucket, bucket_size, parse_ratio
from data_pipelines.loader import Loader
from data_pipelines.mixture import Resolution, source_grids
from data_pipelines.tokenizer import PromptTokenizer
from launch import cli, rehearse_table
from launch.rehearse_table import Row
from launch.run import from_section, make_algorithm, model_configs, plain
from qimg2 import conditioning, flops, flow, hlo, optim, roofline, sharding
from qimg2 import params as P
from qimg2.state import abstract_state, make_optimizers
from qimg2.trainer import Stage, compile_steps

SYSTEM_TOKENS, WORDS_PER_IMAGE = 12, 6
REMAT = ("none", "dots", "attention", "full", "offload")  # least work first
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_LOG_DIR": "disabled",
               "TPU_WORKER_HOSTNAMES": "localhost"}
ACCELERATORS = {"v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}  # only so that libtpu does not ask the network


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
    key = str((plain(section.algorithm), bucket, settings.accumulate))
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
  folder = re.search(r"--xla_dump_to=(\S+)", os.environ.get("XLA_FLAGS", ""))
  files = list(pathlib.Path(folder[1]).glob("*jit_step*after_codegen.txt")) if folder else []
  return max(files, key=lambda file: file.stat().st_mtime).read_text(encoding="utf-8") if files else compiled.as_text()


def find_tokenizer(cfg: ConfigDict) -> PromptTokenizer | None:
  """The tokenizer that the config names or whose data set is there; None if there is none."""
  path = pathlib.Path(cfg.tokenizer or pathlib.Path(cfg.data_dir) / cfg.stages[0].mixture[0]["name"])
  return PromptTokenizer.load(path) if path.is_file() or (path / "tokenizer.json").is_file() else None


# Devices.


def find_devices(topology: str, num_slices: int = 1) -> tuple[list[Any], roofline.Chip | None]:
  """(devices of a topology such as "v5p:4x4x8" or "cpu:8", the published rates of its chip or None).

  Raises:
    ValueError: libtpu is missing, or does not know the topology.
  """
  kind, _, shape = topology.partition(":")
  if kind == "cpu" and shape.isdigit():
    if len(jax.devices("cpu")) < int(shape):
      raise ValueError(f"Topology {topology!r} needs {shape} simulated devices, but this process has {len(jax.devices('cpu'))}: "
                       f"set JAX_NUM_CPU_DEVICES={shape}.")
    return jax.devices("cpu")[:int(shape)], None
  if kind not in roofline.CHIPS:
    raise ValueError(f"Topology {topology!r} is not understood: give one of {', '.join(roofline.CHIPS)} and a shape, such as v5p:4x4x8, or cpu:8.")
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError("To compile for a TPU needs its compiler, which is not installed: pip install libtpu.")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", ACCELERATORS[kind])
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **({"num_slices": num_slices} if num_slices > 1 else {}))
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"Topology {topology!r} cannot be had: {error}.") from error
  return list(described.devices), roofline.CHIPS[kind]


def prepare_environment(topology: str) -> None:
  """Sets what jax and libtpu read when they start: no search for a real TPU, no lock between processes, simulated devices for cpu:N, and for a
  TPU a folder for the text of what is compiled, which lives as long as the process."""
  for name, value in ENVIRONMENT.items():
    os.environ[name] = value
  jax.config.update("jax_platforms", "cpu")
  if "--xla_dump_to" not in os.environ.get("XLA_FLAGS", "") and not topology.startswith("cpu"):
    folder = tempfile.mkdtemp(prefix="rehearse_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_step"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()
  kind, _, shape = topology.partition(":")
  if kind == "cpu" and shape.isdigit():
    jax.config.update("jax_num_cpu_devices", int(shape))


# What to rehearse.


def say(row: Row) -> None:
  """One line to read while the others compile."""
  print(rehearse_table.progress(row), file=sys.stderr, flush=True)


def rehearse(cfg: ConfigDict, devices: Sequence[Any], chip: roofline.Chip | None, choice: Choice = Choice(),
             done: Callable[[Row], None] = say) -> list[Row]:
  """A row for every chosen stage and bucket; `done` is called with each when it is there.

  Raises:
    ValueError: a stage that the config does not have, or a choice that leaves nothing.
  """
  rehearsal = Rehearsal(cfg, devices, chip)
  rows = []
  for section in _sections(cfg, choice):
    for bucket in rehearsal.buckets(section, choice):
      rows.append(rehearsal.row(section, bucket))
      done(rows[-1])
  if not rows:
    raise ValueError("The stages have no bucket of this --task and --base_px: leave one of the flags out.")
  return rows


def search(cfg: ConfigDict, devices: Sequence[Any], chip: roofline.Chip | None, choice: Choice = Choice(),
           rules: Sequence[str] = (), done: Callable[[Row], None] = say) -> tuple[list[Row], dict[str, Row]]:
  """(all rows tried, stage -> the best): the rule set, remat policy and number of micro-batches with the highest bound on MFU, of those rows that
  fill at most nine tenths of the memory.

  A stage is tried with its heaviest bucket, that of most tokens per batch, under each rule set (`rules`; all by default) on the mesh that
  `fitting_mesh` gives it. The per-chip batch begins at one row per shard; from that and two rows follows how many the memory should hold, which is
  then compiled. What no longer fits is tried with the next remat policy, which computes more and keeps less. Equal bounds are told apart by fewer
  micro-batches.
  """
  rows, best = [], {}
  for section in _sections(cfg, choice):
    tried = [row for name in rules or sharding.RULES for row in _climb(cfg, name, section.name, devices, chip, choice, done)]
    rows += tried
    if roomy := [row for row in tried if row.roomy]:
      best[section.name] = max(roomy, key=lambda row: (round(row.bound.get("mfu", 0.0), 3), -row.accumulate))
  return rows, best


def fitting_mesh(rules: str, sizes: dict[str, int]) -> dict[str, int]:
  """`sizes` without the axes that a rule set leaves idle: their devices go to `context` where it splits tokens but not heads, else to `fsdp`."""
  used = {axis for axes in sharding.RULES[rules].values() for axis in axes}
  idle = {axis: size for axis, size in sizes.items() if axis not in used}
  takes = "context" if "context" in used and rules != "replicated" else "fsdp"
  kept = {axis: size for axis, size in sizes.items() if axis in used}
  return kept | {takes: kept.get(takes, 1) * math.prod(idle.values())}


def _climb(cfg: ConfigDict, rules: str, stage: str, devices: Sequence[Any], chip: roofline.Chip | None, choice: Choice,
           done: Callable[[Row], None]) -> list[Row]:
  rows, accumulate = [], None

  def attempt() -> Row:
    section.optimizer.accumulate = accumulate
    rows.append(rehearsal.row(section, heaviest))
    done(rows[-1])
    return rows[-1]

  for remat in REMAT:
    changed = copy.deepcopy(cfg)
    changed.rules, changed.model.remat, changed.mesh = rules, remat, ConfigDict(fitting_mesh(rules, plain(cfg.mesh)))
    rehearsal = Rehearsal(changed, devices, chip)
    section = next(one for one in changed.stages if one.name == stage)
    buckets = rehearsal.buckets(section, choice)
    heaviest = max(buckets, key=lambda bucket: bucket.batch_size * (bucket.num_tokens + bucket.height * bucket.width / 64))
    if accumulate is None:
      accumulate = min(bucket.batch_size for bucket in buckets) // (rehearsal.mesh.shape["data"] * rehearsal.mesh.shape["fsdp"])
    previous = None
    while accumulate >= 1 and (row := attempt()).roomy:
      accumulate //= _step(previous, row) if previous else 2
      previous = row
    while previous and accumulate >= 1 and not row.roomy and 2 * accumulate < previous.accumulate:  # it went too far: back, to the last that fits
      accumulate *= 2
      if (row := attempt()).roomy:
        accumulate //= 2
        break
    if accumulate < 1:
      break
  return rows


def _step(before: Row, now: Row) -> int:
  """By how much, a power of two, the micro-batch may grow: memory grows with it as it did from `before` to `now`."""
  if now.limit_bytes is None or now.peak_bytes <= before.peak_bytes:
    return 2
  per_row = (now.peak_bytes - before.peak_bytes) / (now.per_chip - before.per_chip)
  room = (rehearse_table.HEADROOM * now.limit_bytes - now.peak_bytes) / per_row / now.per_chip
  return max(2, 2 ** int(math.log2(max(1.0, 1 + room))))


def _sections(cfg: ConfigDict, choice: Choice) -> list[ConfigDict]:
  names = [section.name for section in cfg.stages]
  for name in choice.stages:
    if name not in names:
      raise ValueError(f"The config has no stage {name!r}: it has {', '.join(names)}.")
  return [section for section in cfg.stages if not choice.stages or section.name in choice.stages]


# Command line.


def define_flags() -> None:
  """The flags of this launcher."""
  config_flags.DEFINE_config_file("config", None, "File of the config.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_string("topology", None, "Chip and slice, such as v5p:4x4x8 or v6e:16x16; cpu:8 for simulated devices.", required=True)
  flags.DEFINE_integer("num_slices", 1, "Slices. A mesh that fits one of them is repeated along its data axis.", lower_bound=1)
  flags.DEFINE_multi_string("stage", [], "Stages to rehearse; all by default.")
  flags.DEFINE_multi_string("task", [], "Tasks to rehearse, t2i or ti2i; all by default.")
  flags.DEFINE_multi_integer("base_px", [], "Resolutions to rehearse; all by default.")
  flags.DEFINE_bool("all_buckets", False, "All aspect ratios, not only the square and the widest of each resolution.")
  flags.DEFINE_bool("squares", False, "Only the square of each resolution.")
  flags.DEFINE_string("rules", "", "Rule set in place of config.rules; with --search the only one to try.")
  flags.DEFINE_bool("search", False, "Look for the rule set, remat policy and micro-batches that fit with the best bound.")
  flags.DEFINE_string("json", "", "File to write the rows to as JSON.")


def main(_) -> None:
  """Rehearses as the flags say; exits with 1 if a row does not fit, or a searched stage has nothing that does."""
  args = flags.FLAGS
  prepare_environment(args.topology)
  devices, chip = find_devices(args.topology, args.num_slices)
  cfg = args.config
  cfg.rules = args.rules or cfg.rules
  sizes = plain(cfg.mesh).values()
  if args.num_slices > 1 and -1 not in sizes and math.prod(sizes) * args.num_slices == len(devices):  # the mesh of one slice
    cfg.mesh.data = cfg.mesh.get("data", 1) * args.num_slices
  choice = Choice(tuple(args.stage), tuple(args.task), tuple(args.base_px), args.all_buckets, args.squares)
  so_far = []

  def done(row: Row) -> None:
    say(row)
    so_far.append(rehearse_table.as_json(row))
    if args.json:  # after every row: a compilation takes minutes, and may be the last that one waits for
      record = {"topology": args.topology, "num_slices": args.num_slices, "rows": so_far}
      pathlib.Path(args.json).write_text(json.dumps(record, indent=1), encoding="utf-8")

  if args.search:
    rows, best = search(cfg, devices, chip, choice, (args.rules,) if args.rules else (), done)
    missing = [section.name for section in _sections(cfg, choice) if section.name not in best]
  else:
    rows, best = rehearse(cfg, devices, chip, choice, done), {}
    missing = [row.stage for row in rows if row.fits is False]
  print(rehearse_table.table(rows))
  for number, section in enumerate(cfg.stages):
    if section.name in best:
      print(rehearse_table.advice(best[section.name], number))
  if missing:
    print(f"Does not fit: {', '.join(dict.fromkeys(missing))}.", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main, define_flags)
