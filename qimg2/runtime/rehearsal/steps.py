"""A program of a stage (its train step, its evaluation, what draws its samples) compiled for one bucket and a mesh of devices that need not exist,
and what is read from it. See `launch.rehearse`.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from data_pipelines.buckets import Bucket
from data_pipelines.loader import Loader
from qimg2 import networks, sharding
from qimg2 import params as P
from qimg2.analysis import flops, hlo, roofline
from qimg2.runtime import micro_batches
from qimg2.runtime.config import RunConfig, StageConfig, parse, plain
from qimg2.runtime.config.rewards import declare
from qimg2.runtime.generator import Generator, Size
from qimg2.runtime.idle import idle_roles
from qimg2.runtime.methods import stage_algorithm
from qimg2.runtime.rehearsal import table
from qimg2.runtime.rehearsal.measure import Child, ChildProcess, bytes_of, measure
from qimg2.runtime.rehearsal.shapes import SYSTEM_TOKENS, Choice, Shapes, find_tokenizer
from qimg2.runtime.rehearsal.table import EVALUATION, GENERATE, JUDGE, MINIBATCHES, ROLLOUT, STEP, Row
from qimg2.runtime.rewards import added_shapes
from qimg2.training.programs import Part
from qimg2.training.rollout import RolloutParts, rollout_parts
from qimg2.training.stage import Stage, step_parts
from qimg2.training.state import TrainState, abstract_state, make_optimizers
from qimg2.training.validation import bin_sums


class Rehearsal(Shapes):
  """A config on a mesh of devices that need not exist."""

  def __init__(self, cfg: Any, devices: Sequence[Any], chip: roofline.Chip | None = None, child: ChildProcess | None = None):
    """Args: a `RunConfig`, or what a config file returns; the devices of a topology; their published rates, None for devices without; where to
    compile, None for in this process and to the end.

    Raises:
      ValueError: a config that does not fit together, or does not fit the devices.
    """
    cfg, self.chip, self.child = parse(cfg), chip, child
    self.mesh = sharding.make_mesh(plain(cfg.mesh), devices)
    self.rules = sharding.find_rules(cfg.rules, self.mesh)
    self.schedule = cfg.schedule  # with it a rehearsal is a `qimg2.runtime.generator.Source`
    tokenizer, shard = find_tokenizer(cfg), sharding.make_shard(self.mesh, self.rules)
    super().__init__(cfg, tokenizer, shard.parts("batch"))
    self.nets = networks.Networks(cfg.model, cfg.encoder, cfg.vae, tokenizer.num_system_tokens if tokenizer else SYSTEM_TOKENS, shard)
    self.specs = self.nets.specs()
    self._measured: dict[str, dict] = {}

  def row(self, config: StageConfig, bucket: Bucket, program: str = STEP, choice: Choice = Choice()) -> Row:
    """One line of the table: a program of the stage compiled for one bucket. Programs that differ in nothing but their rates are compiled once.

    Args: the stage; rows and shapes of the batch; one of `table.PROGRAMS`; says where the buckets of the stage's other batches come from.

    Raises:
      ValueError: a global batch that the devices and micro-batches do not divide.
    """
    stage = self._stage(config, bucket, program)
    algorithm, (nets, accumulate), (batch,) = stage.algorithm, *stage.variants, stage.batch_shapes
    types = {name: (own.mu_dtype, own.gradient_dtype) for name, own in ({"": config.optimizer} | dict(config.optimizers)).items()}
    key = str((plain(config.algorithm), plain(config.adapter), config.offload_frozen, bucket,
               nets.model.remat, accumulate, types, stage.faults.stop_after, program))
    if key not in self._measured:
      self._measured[key] = self._measure(stage, config, bucket, program)
    networks_of = lambda roles: {role: algorithm.roles[role].network for role in roles}
    rollout, counts = self._rollout(stage, *self._arrays(stage)), {}
    if program == STEP and not rollout:
      counts = flops.step_flops(self.nets, networks_of(algorithm.trained), networks_of(algorithm.frozen), batch)
    measured = dict(self._measured[key])
    beside = measured.pop("idle_bytes") + self.beside_bytes(config, choice, program)
    row = Row(stage=config.name, task=bucket.task, height=bucket.height, width=bucket.width, num_sources=len(bucket.source_sizes),
              num_tokens=bucket.num_tokens, batch_size=bucket.batch_size, accumulate=accumulate, num_devices=self.mesh.size,
              mesh=dict(self.mesh.shape), rules=self.cfg.rules, remat=nets.model.remat,
              model_flops={role: n / self.mesh.size for role, n in counts.items()}, program=program,
              num_samples=rollout.num_samples if rollout else 0, beside_bytes=beside, **measured)
    return table.with_bound(row, self.chip, self.mesh)

  def _stage(self, config: StageConfig, bucket: Bucket, program: str) -> Stage:
    """What training has for the bucket alone."""
    algorithm = stage_algorithm(config, self.cfg.schedule, declare(config.rewards))
    shards = self.nets.shard.parts("batch")
    remat, accumulate = self.cfg.model.remat, config.optimizer.accumulate
    if program != STEP:
      accumulate = 1
    elif algorithm.rollout is None:
      remat, accumulate = micro_batches.choose(self.cfg, config, bucket, shards)
    if bucket.batch_size % (shards * (accumulate if algorithm.rollout is None else 1)):  # minibatches have rows of their own
      raise ValueError(f"Stage {config.name!r}: a batch of {bucket.batch_size} cannot be divided over {shards} devices of the axes data and fsdp "
                       f"in {accumulate} micro-batches: change config.mesh, batch_size, or optimizer.accumulate or "
                       "config.micro_batches.")
    specs = algorithm.specs(self.specs, self.nets.compute_dtypes())
    optimizers = make_optimizers(algorithm, specs, config.optimizer, config.num_steps, config.optimizers)
    batch, variant = self._batch(config, bucket, algorithm.unconditional), (micro_batches.with_remat(self.nets, remat), accumulate)
    return Stage(config.name, algorithm, optimizers, specs, config.num_steps, (batch,), faults=config.faults, variants=(variant,))

  def _batch(self, config: StageConfig, bucket: Bucket, unconditional: bool) -> dict:
    """The abstract global batch, as the loader would make it."""
    rows = sharding.batch_sharding(self.mesh, self.rules)
    shape = lambda x: jax.ShapeDtypeStruct((bucket.batch_size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype), sharding=rows)
    row = dataclasses.replace(bucket, batch_size=1)
    return jax.tree.map(shape, Loader.example(row, unconditional) | added_shapes(declare(config.rewards), None, row))

  def _arrays(self, stage: Stage) -> tuple[TrainState, dict]:
    """(abstract state, abstract weights of the frozen roles that are on the devices)."""
    config = next(one for one in self.cfg.stages if one.name == stage.name)
    idle = idle_roles(config, stage.algorithm, self.buckets(config))
    return (abstract_state(stage.algorithm, stage.optimizers, stage.specs, self.mesh, self.rules),
            {role: {} if role in idle else self._place(stage.specs[role]) for role in stage.algorithm.frozen})

  def _place(self, specs: dict) -> dict:
    """Abstract weights."""
    return P.abstract(specs, sharding.param_shardings(specs, self.mesh, self.rules))

  def _parts_of(self, stage: Stage, bucket: Bucket, program: str) -> tuple[tuple[Part, ...], float, float]:
    """(what is compiled: of a step one program or those that it is cut into; bytes of a device that all weights and optimizer state take; those of
    them that no program reads)."""
    state, frozen = self._arrays(stage)
    held = bytes_of((state, frozen))
    rollout = self._rollout(stage, state, frozen)
    if program == STEP:
      return step_parts(stage, self.nets, state, frozen, self.mesh, rollout and [rollout])(0), held, 0.0
    if program in ROLLOUT:
      part = {GENERATE: rollout.generate, JUDGE: rollout.judge, MINIBATCHES: rollout.minibatches}[program]
      return (part,), held, 0.0
    if program == EVALUATION:
      read = {**frozen, **state.params}
      batch = stage.batch_shapes[0] | {"weight": jax.ShapeDtypeStruct((bucket.batch_size,), jnp.float32)}
      part = Part(jax.jit(bin_sums(stage.algorithm, self.nets)), (read, batch))
    else:
      idle = {role: self._place(stage.specs[role]) for role, tree in frozen.items() if not tree}
      read = stage.algorithm.deployed({**frozen, **idle, **state.params, **state.averages})
      size = Size(bucket.height, bucket.width, bucket.num_tokens, bucket.source_sizes, bucket.batch_size)
      parts = [part for _, part in Generator(self, size, **self.cfg.sampling.settings()).parts(read, resident=not idle)]
      if idle:  # one network at a time beside what training has there
        return tuple(dataclasses.replace(part, beside=_without((frozen, state), part.arguments)) for part in parts), held, 0.0
      return tuple(parts), held, held - bytes_of(read)
    return (part,), held, held - bytes_of(read)

  def _rollout(self, stage: Stage, state: TrainState, frozen: dict) -> RolloutParts | None:
    """What the stage does before its step."""
    if stage.algorithm.rollout is None:
      return None
    nets, _ = stage.variants[0]
    return rollout_parts(stage.algorithm, nets, state, frozen, stage.batch_shapes[0], self.mesh, self.rules)

  def programs_of_step(self, config: StageConfig) -> tuple[str, ...]:
    """The programs that a step of a stage is, in their order."""
    rollout = stage_algorithm(config, self.cfg.schedule, declare(config.rewards)).rollout
    return (STEP,) if rollout is None else (GENERATE, *(JUDGE,) * bool(rollout.by_device), MINIBATCHES, STEP)

  def _measure(self, stage: Stage, config: StageConfig, bucket: Bucket, program: str) -> dict:
    """The measured fields of a row: those of memory alone if the program does not fit. "idle_bytes" are weights and state that it does not read."""
    parts, held, idle = self._parts_of(stage, bucket, program)
    limit, peak, compile_s, traffic = self.chip.hbm_bytes if self.chip else None, 0.0, 0.0, []
    if limit and held > limit:  # nothing to compile
      return {"peak_bytes": float(held), "limit_bytes": limit, "compile_s": 0.0, "idle_bytes": 0.0}
    for number, part in enumerate(parts):
      if not part.arguments:
        continue  # it makes zeros
      measured = self._measure_part(part, config, bucket, program, number)
      peak, limit = max(peak, measured["peak_bytes"] + bytes_of(part.beside)), measured["limit_bytes"]
      compile_s += measured["compile_s"]
      if measured.get("traffic") is None:
        return {"peak_bytes": peak, "limit_bytes": limit, "compile_s": compile_s, "idle_bytes": idle}
      traffic.append((measured["traffic"], part.times))
    return {"peak_bytes": peak, "limit_bytes": limit, "compile_s": compile_s, "idle_bytes": idle, "traffic": hlo.total(traffic)}

  def _measure_part(self, part: Part, config: StageConfig, bucket: Bucket, program: str, number: int) -> dict:
    """The measured fields of the part with a number: no traffic if it does not fit."""
    child = None
    if self.child:
      stages = tuple(config if one.name == config.name else one for one in self.cfg.stages)
      arguments = dataclasses.replace(self.cfg, stages=stages), config.name, bucket, program, number
      child = Child(self.child, f"stage {config.name!r}", _answer, arguments)
    options = sharding.compile_options(self.mesh) if program in (STEP, *ROLLOUT) else {}
    return measure(part, self.mesh.size, self.chip.hbm_bytes if self.chip else None, options, child)

  def measure_part(self, config: StageConfig, bucket: Bucket, program: str, number: int) -> dict:
    """The measured fields of one part of a program of a stage for one bucket, see `Row`.

    Raises:
      ValueError: as `row`.
    """
    stage = self._stage(config, bucket, program)
    return self._measure_part(self._parts_of(stage, bucket, program)[0][number], config, bucket, program, number)


def _without(held: Any, read: Any) -> list[jax.ShapeDtypeStruct]:
  """The abstract arrays of `held` that are none of `read`, each object as often as it is in both taken away."""
  own = collections.Counter(map(id, jax.tree.leaves(read)))
  rest = []
  for x in jax.tree.leaves(held):
    if own[id(x)]:
      own[id(x)] -= 1
    else:
      rest.append(x)
  return rest


def _answer(devices: Sequence[Any], chip: roofline.Chip | None, cfg: RunConfig, name: str, bucket: Bucket, program: str, number: int) -> dict:
  """What a process of its own measures."""
  del chip  # there, a program that does not fit says so itself
  rehearsal = Rehearsal(cfg, devices)
  return rehearsal.measure_part(next(stage for stage in rehearsal.cfg.stages if stage.name == name), bucket, program, number)
