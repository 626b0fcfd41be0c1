"""The train step of a stage and bucket compiled for a mesh of devices that need not exist, and what is read from it. See `launch.rehearse`.

The compiler for TPUs first optimises the program, schedules it and gives every array its place in memory, and then writes machine code, which takes
most of the time and changes none of what is read here. `ChildProcess` lets it work in a process of its own, which is ended between the two.
"""

import dataclasses
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

from data_pipelines.buckets import Bucket, bucket_size, parse_ratio
from data_pipelines.loader import Loader
from data_pipelines.specs import source_grids
from data_pipelines.tokenizer import PromptTokenizer
from qimg2 import networks, sharding
from qimg2 import params as P
from qimg2.analysis import flops, hlo, roofline
from qimg2.runtime import micro_batches
from qimg2.runtime.config import RunConfig, StageConfig, parse, plain
from qimg2.runtime.methods import make_algorithm
from qimg2.runtime.rehearsal import table, topology
from qimg2.runtime.rehearsal.table import Row
from qimg2.runtime.run import tokenizer_path
from qimg2.training.stage import Part, Stage, step_parts
from qimg2.training.state import TrainState, abstract_state, make_optimizers

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


@dataclasses.dataclass(frozen=True)
class ChildProcess:
  """Name of a TPU topology and number of slices: steps for it are compiled in a process of their own, up to their machine code."""
  topology: str
  num_slices: int = 1


class Rehearsal:
  """A config on a mesh of devices that need not exist."""

  def __init__(self, cfg: Any, devices: Sequence[Any], chip: roofline.Chip | None = None, child: ChildProcess | None = None):
    """Args: a `RunConfig`, or what a config file returns; the devices of a topology; their published rates, None for devices without; where to
    compile, None for in this process and to the end.

    Raises:
      ValueError: a config that does not fit together, or does not fit the devices.
    """
    self.cfg, self.chip, self.child = parse(cfg), chip, child
    cfg = self.cfg
    self.mesh = sharding.make_mesh(plain(cfg.mesh), devices)
    self.rules = sharding.find_rules(cfg.rules, self.mesh)
    self.tokenizer = find_tokenizer(cfg)
    system = self.tokenizer.num_system_tokens if self.tokenizer else SYSTEM_TOKENS
    self.nets = networks.Networks(cfg.model, cfg.encoder, cfg.vae, system, sharding.make_shard(self.mesh, self.rules))
    self.specs = self.nets.specs()
    self._measured: dict[str, dict] = {}

  def buckets(self, config: StageConfig, choice: Choice = Choice()) -> list[Bucket]:
    """The chosen batch shapes of a stage: tasks in the order of the mixture, resolutions in that of the config."""
    found = {}
    for task in dict.fromkeys(part.task for part in config.mixture):
      for resolution in config.resolutions:
        if choice.tasks and task not in choice.tasks or choice.base_px and resolution.base_px not in choice.base_px:
          continue
        for ratio in _ratios(resolution.ratios, choice):
          sources = (bucket_size(resolution.base_px, ratio, 32),) if task == "ti2i" else ()
          size = bucket_size(resolution.base_px, ratio, resolution.multiple)
          classes = [Bucket(task, *size, sources, num_tokens=words + self._image_tokens(sources), batch_size=resolution.batch_size)
                     for words in (self.cfg.num_tokens, *sorted(self.cfg.prompt_classes, reverse=True))]
          found |= dict.fromkeys(self._heaviest(config, classes))
    return list(found)

  def _heaviest(self, config: StageConfig, classes: list[Bucket]) -> list[Bucket]:
    """Of buckets that differ in the length of their prompts the longest, and of each policy that with the most tokens at once: of short rows more may
    fit into a micro-batch than fill it with long ones."""
    if not self.cfg.micro_batches:
      return classes[:1]
    fullest: dict[str, tuple[float, Bucket]] = {}
    for bucket in classes:
      remat, accumulate = micro_batches.choose(self.cfg, config, bucket, self.nets.shard.parts("batch"))
      tokens = bucket.batch_size / accumulate * micro_batches.num_tokens(bucket, self.cfg.vae.spatial_factor)
      if remat not in fullest or tokens > fullest[remat][0]:
        fullest[remat] = tokens, bucket
    return list(dict.fromkeys((classes[0], *(bucket for _, bucket in fullest.values()))))

  def _image_tokens(self, sources: tuple[tuple[int, int], ...]) -> int:
    grids = source_grids(sources)
    return self.tokenizer.num_image_tokens(grids) if self.tokenizer else sum(h * w + WORDS_PER_IMAGE for h, w in grids)

  def row(self, config: StageConfig, bucket: Bucket) -> Row:
    """One line of the table: the stage's step compiled for one bucket. Programs that differ in nothing but their rates are compiled once.

    Raises:
      ValueError: a global batch that the devices and micro-batches do not divide.
    """
    stage = self._stage(config, bucket)
    algorithm, (nets, accumulate), (batch,) = stage.algorithm, *stage.variants, stage.batch_shapes
    types = {name: (own.mu_dtype, own.gradient_dtype) for name, own in ({"": config.optimizer} | dict(config.optimizers)).items()}
    key = str((plain(config.algorithm), bucket, nets.model.remat, accumulate, types, stage.faults.stop_after))
    if key not in self._measured:
      self._measured[key] = self._measure(stage, config, bucket)
    networks_of = lambda roles: {role: algorithm.roles[role].network for role in roles}
    counts = flops.step_flops(self.nets, networks_of(algorithm.trained), networks_of(algorithm.frozen), batch)
    row = Row(stage=config.name, task=bucket.task, height=bucket.height, width=bucket.width, num_sources=len(bucket.source_sizes),
              num_tokens=bucket.num_tokens, batch_size=bucket.batch_size, accumulate=accumulate, num_devices=self.mesh.size,
              mesh=dict(self.mesh.shape), rules=self.cfg.rules, remat=nets.model.remat,
              model_flops={role: n / self.mesh.size for role, n in counts.items()}, **self._measured[key])
    return table.with_bound(row, self.chip, self.mesh)

  def _stage(self, config: StageConfig, bucket: Bucket) -> Stage:
    """What training has for the bucket alone."""
    algorithm = make_algorithm(config.algorithm.name, config.algorithm.settings, self.cfg.schedule)
    shards = self.nets.shard.parts("batch")
    remat, accumulate = micro_batches.choose(self.cfg, config, bucket, shards)
    if bucket.batch_size % (shards * accumulate):
      raise ValueError(f"Stage {config.name!r}: a batch of {bucket.batch_size} cannot be divided over {shards} devices of the axes data and fsdp "
                       f"in {accumulate} micro-batches: change config.mesh, batch_size, or optimizer.accumulate or "
                       "config.micro_batches.")
    if algorithm.rollout is not None:
      raise ValueError(f"Stage {config.name!r} has a rollout, and a rehearsal knows steps alone: leave the stage out with --stage.")
    specs = algorithm.specs(self.specs, self.nets.compute_dtypes())
    optimizers = make_optimizers(algorithm, specs, config.optimizer, config.num_steps, config.optimizers)
    batch, variant = self._batch(bucket, algorithm.unconditional), (micro_batches.with_remat(self.nets, remat), accumulate)
    return Stage(config.name, algorithm, optimizers, specs, config.num_steps, (batch,), faults=config.faults, variants=(variant,))

  def _batch(self, bucket: Bucket, unconditional: bool) -> dict:
    """The abstract global batch, as the loader would make it."""
    rows = sharding.batch_sharding(self.mesh, self.rules)
    shape = lambda x: jax.ShapeDtypeStruct((bucket.batch_size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype), sharding=rows)
    return jax.tree.map(shape, Loader.example(dataclasses.replace(bucket, batch_size=1), unconditional))

  def _measure(self, stage: Stage, config: StageConfig, bucket: Bucket) -> dict:
    """The measured fields of a row, of all programs of a step: those of memory alone if one does not fit."""
    arrays, limit = self._arrays(stage), self.chip.hbm_bytes if self.chip else None
    if limit and _num_bytes(arrays) > limit:  # nothing to compile
      return {"peak_bytes": _num_bytes(arrays), "limit_bytes": limit, "compile_s": 0.0}
    peak, compile_s, traffic = 0.0, 0.0, []
    for number, part in enumerate(step_parts(stage, self.nets, *arrays, self.mesh)(0)):
      if not part.arguments:
        continue  # it makes zeros
      measured = self._measure_part(part, config, bucket, number)
      peak, limit = max(peak, measured["peak_bytes"] + _num_bytes(part.beside)), measured["limit_bytes"]
      compile_s += measured["compile_s"]
      if measured.get("traffic") is None:
        return {"peak_bytes": peak, "limit_bytes": limit, "compile_s": compile_s}
      traffic.append((measured["traffic"], part.times))
    return {"peak_bytes": peak, "limit_bytes": limit, "compile_s": compile_s, "traffic": hlo.total(traffic)}

  def _arrays(self, stage: Stage) -> tuple[TrainState, dict]:
    """(abstract state, abstract weights of the frozen roles)."""
    place = lambda specs: P.abstract(specs, sharding.param_shardings(specs, self.mesh, self.rules))
    return (abstract_state(stage.algorithm, stage.optimizers, stage.specs, self.mesh, self.rules),
            {role: place(stage.specs[role]) for role in stage.algorithm.frozen})

  def _measure_part(self, part: Part, config: StageConfig, bucket: Bucket, number: int) -> dict:
    """The measured fields of the program with a number among those of a step: no traffic if it does not fit."""
    for file in topology.dumped():
      file.unlink()  # of an earlier program
    start, peak, limit = time.monotonic(), None, self.chip.hbm_bytes if self.chip else None
    if self.child:
      stages = tuple(config if one.name == config.name else one for one in self.cfg.stages)
      answer = _measure_in_child(self.child, dataclasses.replace(self.cfg, stages=stages), config.name, bucket, number)
      if answer is not None:
        return answer
    else:
      try:
        compiled = part.compile(sharding.compile_options(self.mesh))
      except jax.errors.JaxRuntimeError as error:
        sizes = hlo.out_of_memory(str(error))
        if sizes is None:
          raise
        return {"peak_bytes": sizes[0], "limit_bytes": sizes[1], "compile_s": time.monotonic() - start}
      peak = compiled.memory_analysis().peak_memory_in_bytes
    measured = {"limit_bytes": limit, "compile_s": time.monotonic() - start}
    text = topology.program_text() or compiled.as_text()
    return {"peak_bytes": float(topology.reserved_bytes() or peak), **measured, "traffic": hlo.analyze(text, self.mesh.size)}

  def measure_program(self, config: StageConfig, bucket: Bucket, number: int) -> dict:
    """The measured fields of the program with a number among those of a stage's step for one bucket.

    Raises:
      ValueError: as `row`.
    """
    stage = self._stage(config, bucket)
    return self._measure_part(step_parts(stage, self.nets, *self._arrays(stage), self.mesh)(0)[number], config, bucket, number)


def _num_bytes(tree: Any) -> float:
  """Bytes of abstract arrays on one device."""
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _measure_in_child(child: ChildProcess, cfg: RunConfig, name: str, bucket: Bucket, number: int) -> dict | None:
  """Lets another process compile a program of the step of a stage and bucket. None when the compiler has assigned the memory; what the other process
  measured if it came to its end before that, which it does when the program does not fit.

  Raises:
    ValueError: as the other process did.
    ChildProcessError: the other process ended otherwise.
  """
  context = multiprocessing.get_context("spawn")
  receive, send = context.Pipe(duplex=False)
  process = context.Process(target=_child_main, args=(send, child, cfg, name, bucket, number), daemon=True)
  process.start()
  send.close()
  try:
    while not topology.is_assigned():
      if receive.poll(0.2):
        try:
          answer = receive.recv()
        except EOFError as error:
          process.join()
          raise ChildProcessError(f"The process that compiles stage {name!r} ended with code {process.exitcode}: what it said stands above; "
                                  "-9 is a machine without memory left.") from error
        if isinstance(answer, Exception):
          raise answer
        return answer
    return None
  finally:
    process.kill()
    process.join()


def _child_main(send: Any, child: ChildProcess, cfg: RunConfig, name: str, bucket: Bucket, number: int) -> None:
  """What the other process does."""
  tqdm.set_lock(threading.RLock())  # one between processes would outlive a process that is killed
  threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()  # nobody is left to tell
  topology.prepare_environment(child.topology)
  rehearsal = Rehearsal(cfg, *topology.find_devices(child.topology, child.num_slices))
  try:
    send.send(rehearsal.measure_program(next(stage for stage in rehearsal.cfg.stages if stage.name == name), bucket, number))
  except ValueError as error:
    send.send(error)


def _ratios(ratios: Sequence[Any], choice: Choice) -> list[Any]:
  """The chosen ones of a resolution's ratios: the one nearest to a square first."""
  if choice.all_buckets:
    return list(ratios)
  square, widest = min(ratios, key=lambda ratio: max(parse_ratio(ratio), 1 / parse_ratio(ratio))), max(ratios, key=parse_ratio)
  return [square] if choice.squares else list(dict.fromkeys((square, widest)))


def find_tokenizer(cfg: RunConfig) -> PromptTokenizer | None:
  """The tokenizer that the config names or whose data set is there; None if there is none."""
  path = tokenizer_path(cfg)
  return PromptTokenizer.load(path) if path.is_file() or (path / "tokenizer.json").is_file() else None
