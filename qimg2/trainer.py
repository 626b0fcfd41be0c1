"""The training loop: one for all algorithms.

A stage is compiled for every bucket shape before its first step, restored from its own newest checkpoint if there is one, and then runs to
its last step. What happens at a step is a function of the step alone, so that a run that is killed anywhere and started again computes the
same numbers as one that never stopped.
"""

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
from tqdm import tqdm

from qimg2.algorithms import Algorithm
from qimg2.checkpoint import Checkpoints
from qimg2.metrics import MetricsWriter
from qimg2.sharding import Rules, put_batch
from qimg2.state import Optimizers, TrainState, abstract_state, init_state, make_step

RolesFn = Callable[[dict[str, Any], int, MetricsWriter], dict[str, float]]


class Loader(Protocol):
  """What the loop needs of a loader: batch k is a function of k."""

  def iterate(self, start: int) -> Iterator[tuple[int, dict]]:
    """(bucket number, batch) from batch `start` on."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of the curriculum, ready to run.

  Attributes:
    name: also the name of its folder.
    algorithm, optimizers, specs: the method, its optimizers, the declared weights of all roles.
    num_steps: last step.
    batch_shapes: the abstract global batch of each bucket.
    hooks: (every n steps, function of (weights of all roles, step, writer) -> scalars to log); also run after the last step.
    accumulate: micro-batches per step.
    log_every_steps, save_every_steps, keep: how often to log and to save, and how many checkpoints to keep.
    description: JSON-serialisable, saved with each checkpoint.
  """
  name: str
  algorithm: Algorithm
  optimizers: Optimizers
  specs: dict[str, dict]
  num_steps: int
  batch_shapes: tuple[dict, ...]
  hooks: tuple[tuple[int, RolesFn], ...] = ()
  accumulate: int = 1
  log_every_steps: int = 10
  save_every_steps: int = 500
  keep: int = 2
  description: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def train_stage(stage: Stage, nets: Any, loader: Loader, mesh: jax.sharding.Mesh, rules: Rules, workdir: pathlib.Path, key: jax.Array,
                start: Callable[[], tuple[dict, dict]], frozen: dict[str, Any], finish_batches: Callable[[], list[dict]]) -> TrainState:
  """The state after the stage's last step. Everything it writes lies in `workdir / stage.name`.

  Args:
    stage: what to train.
    nets: the networks, passed on to the algorithm.
    loader: gives this process's rows of each batch.
    mesh, rules: where arrays lie.
    workdir: folder of the run.
    key: PRNG key of the stage.
    start: gives (weights of each trained role, slow copies) of step 0; called only when the stage has no checkpoint.
    frozen: weights of the frozen roles.
    finish_batches: gives the batches for the algorithm's `finish`.
  """
  folder = workdir / stage.name
  checkpoints = Checkpoints(folder / "checkpoints", stage.keep)
  abstract = abstract_state(stage.algorithm, stage.optimizers, stage.specs, mesh, rules)
  latest = checkpoints.latest_step()
  if latest is None:
    state = jax.device_put(init_state(stage.algorithm, stage.optimizers, *start(), key), jax.tree.map(lambda x: x.sharding, abstract))
  else:
    state, _ = checkpoints.restore(abstract, latest)
  step = int(state.step)
  if step >= stage.num_steps:
    checkpoints.close()
    return state
  writer = MetricsWriter(folder, step, active=jax.process_index() == 0)
  steps = compile_steps(stage, nets, abstract, frozen)
  state = _loop(stage, state, frozen, steps, loader, mesh, rules, writer, checkpoints)
  if stage.algorithm.finish is not None:
    state = _finish(stage.algorithm, state, frozen, nets, finish_batches())
  _run_hooks(stage, state, frozen, stage.num_steps, writer)
  writer.sync()
  checkpoints.save(state, {"loader_step": stage.num_steps, "stage": dict(stage.description)})
  checkpoints.close()
  writer.close()
  return state


def compile_steps(stage: Stage, nets: Any, abstract: TrainState, frozen: dict[str, Any]) -> list[Any]:
  """The train step compiled for each bucket's batch, with progress. Nothing is run."""
  step = jax.jit(make_step(stage.algorithm, stage.optimizers, nets, stage.accumulate), donate_argnums=0,
                 out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), None))
  frozen_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), frozen)
  shapes = tqdm(stage.batch_shapes, desc=f"{stage.name}: compile", unit="bucket", disable=None, leave=False)
  return [step.lower(abstract, frozen_shapes, batch).compile() for batch in shapes]


def _loop(stage: Stage, state: TrainState, frozen: dict, steps: list[Any], loader: Loader, mesh: jax.sharding.Mesh, rules: Rules,
          writer: MetricsWriter, checkpoints: Checkpoints) -> TrainState:
  """Runs the steps that are left; saves, but not after the last one, which `finish` still follows."""
  first = int(state.step)
  progress = tqdm(total=stage.num_steps, initial=first, desc=stage.name, unit="step", disable=None if _is_first() else True, file=sys.stderr)
  clock, num_samples = time.monotonic(), 0
  batches = loader.iterate(first)
  for step in range(first + 1, stage.num_steps + 1):
    bucket, batch = next(batches)
    num_samples += stage.batch_shapes[bucket]["sample_id"].shape[0]
    state, metrics = steps[bucket](state, frozen, put_batch(batch, mesh, rules))
    if step % stage.log_every_steps == 0 or step == stage.num_steps:
      values = {name: float(value) for name, value in metrics.items()}
      rate = num_samples / (time.monotonic() - clock)
      writer.write(step, values)
      writer.write_timing(step, {"samples_per_second": rate})
      progress.set_postfix(loss=f"{values['loss']:.4f}", samples_per_s=f"{rate:.0f}", refresh=False)
      _check_finite(stage, step, values, batch)
      clock, num_samples = time.monotonic(), 0
    progress.update(1)
    if step == stage.num_steps:
      break
    pause = time.monotonic()
    _run_hooks(stage, state, frozen, step, writer)
    if step % stage.save_every_steps == 0:
      writer.sync()
      checkpoints.save(state, {"loader_step": step, "stage": dict(stage.description)})
    clock += time.monotonic() - pause
  progress.close()
  return state


def _is_first() -> bool:
  return jax.process_index() == 0


def _check_finite(stage: Stage, step: int, values: Mapping[str, float], batch: dict) -> None:
  if not math.isfinite(values["loss"]):
    ids = ", ".join(str(i) for i in batch["sample_id"][:8])
    raise FloatingPointError(f"The loss of stage {stage.name} at step {step} is {values['loss']} (samples {ids} ...): lower the learning rate or "
                             "look at these samples; the last checkpoint is kept.")


def _run_hooks(stage: Stage, state: TrainState, frozen: dict, step: int, writer: MetricsWriter) -> None:
  for every, hook in stage.hooks:
    if step % every == 0 or step == stage.num_steps:
      scalars = hook({**frozen, **state.params, **state.slow}, step, writer)
      if scalars:
        writer.write(step, scalars)


def _finish(algorithm: Algorithm, state: TrainState, frozen: dict, nets: Any, batches: list[dict]) -> TrainState:
  params = algorithm.finish({**frozen, **state.params}, nets, batches)
  slow = {}
  for name, (role, _) in algorithm.track.items():
    slow[name] = algorithm.finish({**frozen, **state.params, role: state.slow[name]}, nets, batches)[role]
  return state.replace(params={role: params[role] for role in state.params}, slow=slow)
