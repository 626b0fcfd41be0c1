"""What a stage is, and the programs that its steps run.

A step is one program, or with `faults.stop_after="micro_batch"` several (`qimg2.training.state.make_split_step`): one that adds the gradient of a
micro-batch to sums that stay on the devices, called once for each, and one for the update. Between two of them the state is that of the step before,
and can be saved. A step of one micro-batch is one program in any case.
"""

import dataclasses
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from tqdm import tqdm

from qimg2.algorithms import Algorithm
from qimg2.sharding import Rules, compile_options, replicated
from qimg2.training.faults import Settings
from qimg2.training.metrics import MetricsWriter
from qimg2.training.programs import Part, SplitStep, WholeStep
from qimg2.training.rollout import Programs, compile_rollout
from qimg2.training.state import Optimizers, TrainState, make_split_step, make_step
from qimg2.training.tracker import Tracker
from qimg2.training.watch import Settings as WatchSettings

RolesFn = Callable[[dict[str, Any], int, MetricsWriter], dict[str, float]]


class Loader(Protocol):
  """What the loop needs of a loader: batch k is a function of k."""

  def iterate(self, start: int) -> Generator[tuple[int, dict], None, None]:
    """(bucket number, batch) from batch `start` on; it is closed where no more are wanted."""


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
    log_every_steps, save_every_steps, keep, keep_every_steps: how often to log and to save, and which checkpoints to keep, see `Checkpoints`.
    faults: fault-tolerance settings.
    profile: (first, last) step, counted from 1, to trace for XProf and Perfetto, into the folder `profile`; None for none.
    description: JSON-serialisable, saved with each checkpoint; a run that goes on compares what it says of the data, and of what it reads at each
      start and others may change: "frozen_steps", {role: (folder, step)}, and "contents", {role or another name: (place, digest)}.
    variants: (networks, micro-batches) of each bucket's step, where they are not `nets` and `accumulate` for all.
    save_every_s: seconds after a save when another one is due, wherever the step stands; 0 for never.
    local_copies: folder on a disk of each machine, "" for none, and seconds from a copy there to the next, see `qimg2.training.local_copy`.
    first_needed: the numbers of all buckets in the order in which the steps from the given one on need them: their programs are compiled in this
      order while training runs. None compiles all before the first step.
    tracker: gets the metrics and pictures, beside TensorBoard; on the first process alone.
    watch: rules that end the stage early.
    may_change: whether it goes on with whatever it reads at its start, and with a warning in the log.
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
  faults: Settings = Settings()
  description: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  profile: tuple[int, int] | None = None
  variants: tuple[tuple[Any, int], ...] = ()
  save_every_s: float = 0.0
  first_needed: Callable[[int], Iterable[int]] | None = None
  local_copies: tuple[str, float] = ("", 0.0)
  keep_every_steps: int = 0
  tracker: Tracker | None = None
  watch: WatchSettings = WatchSettings()
  may_change: bool = False


def compile_rollouts(stage: Stage, nets: Any, abstract: TrainState, frozen: dict[str, Any], mesh: jax.sharding.Mesh,
                     rules: Rules) -> list[Programs] | None:
  """The rollout compiled for each bucket's batch; None for a method without."""
  if stage.algorithm.rollout is None:
    return None
  shapes = tqdm(stage.batch_shapes, desc=f"{stage.name}: compile rollouts", unit="bucket", disable=None, leave=False)
  return [compile_rollout(stage.algorithm, nets, abstract, _shapes(frozen), batch, mesh, rules) for batch in shapes]


def step_parts(stage: Stage, nets: Any, abstract: TrainState, frozen: dict[str, Any], mesh: jax.sharding.Mesh,
               rollouts: list[Programs] | None = None) -> Callable[[int], tuple[Part, ...]]:
  """What gives the programs of a step with the batch of the bucket of a number, or with the data that its rollout gives: the step; or what begins
  the sums, what adds a micro-batch, and what ends the step."""
  batches = stage.batch_shapes if rollouts is None else [rollout.data for rollout in rollouts]
  variants = stage.variants or ((nets, stage.accumulate),) * len(batches)
  shapes, own, everywhere = _shapes(frozen), jax.tree.map(lambda x: x.sharding, abstract), replicated(mesh)

  def parts(bucket: int) -> tuple[Part, ...]:
    (nets, accumulate), inputs = variants[bucket], (abstract, shapes, batches[bucket])
    if accumulate == 1 or stage.faults.stop_after == "step":
      return Part(jax.jit(make_step(stage.algorithm, stage.optimizers, nets, accumulate), donate_argnums=0, out_shardings=(own, None)), inputs),
    begin, add, end = make_split_step(stage.algorithm, stage.optimizers, nets, accumulate)
    number, metrics, gradient = jax.eval_shape(begin, *inputs)
    place = everywhere, dict.fromkeys(metrics, everywhere), {role: own.params[role] for role in gradient}
    sums = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (number, metrics, gradient), place)
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    same = accumulate, *sorted(metrics)
    return (Part(jax.jit(zeros, out_shardings=place), (), key=("begin", *same)),
            Part(jax.jit(add, donate_argnums=3, out_shardings=(place, everywhere)), (*inputs, sums), accumulate),
            Part(jax.jit(end, donate_argnums=0, out_shardings=(own, None)), (abstract, sums), beside=inputs[1:], key=("end", *same)))
  return parts


def step_compiler(stage: Stage, nets: Any, abstract: TrainState, frozen: dict[str, Any], mesh: jax.sharding.Mesh,
                  rollouts: list[Programs] | None = None) -> Callable[[int], WholeStep | SplitStep]:
  """What compiles `step_parts` of the bucket of a number, in any thread; programs that are equal for several buckets once. Nothing is run."""
  parts, options = step_parts(stage, nets, abstract, frozen, mesh, rollouts), compile_options(mesh)
  shared, lock = {}, threading.Lock()

  def compile_part(part: Part) -> jax.stages.Compiled:
    if part.key is None:
      return part.compile(options)
    with lock:
      if part.key not in shared:
        shared[part.key] = part.compile(options)
      return shared[part.key]

  def compile_one(bucket: int) -> WholeStep | SplitStep:
    found = parts(bucket)
    programs = list(map(compile_part, found))
    return WholeStep(*programs) if len(found) == 1 else SplitStep(*programs, found[1].times)
  return compile_one


def _shapes(frozen: dict) -> dict:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), frozen)
