"""The training loop: one for all algorithms.

A stage is restored from its own newest checkpoint if there is one, and then runs to its last step. Its step is compiled for every bucket shape,
before the first one or while it trains (`qimg2.training.programs`). What happens at a step is a function of the step alone, so that a run that is
killed anywhere and started again computes the same numbers as one that never stopped.

Nothing stands between two steps but their dispatch: while a step runs, the next one is dispatched and the batch after that is on its way to the
device. No more than that: beside the batch of the running step the device holds at most two. What a step computed is looked at when later ones have
long been dispatched.

A run that is asked to stop saves after the step that it is at, or, where steps can be cut, the step before, and drops what it did of this one. An
evaluation that is due at the step is left to the run that goes on from it.
"""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from qimg2.algorithms import Algorithm
from qimg2.batch import for_device
from qimg2.sharding import Rules, gather_ids, put_batch
from qimg2.training.changes import check_frozen, warn_of_another_order
from qimg2.training.checkpoint import Checkpoints
from qimg2.training.faults import Preempted, SaveClock, StepMonitor
from qimg2.training.feed import Feed
from qimg2.training.local_copy import LocalCopies
from qimg2.training.metrics import GoodputRecorder, MetricsWriter
from qimg2.training.profiler import Profiler
from qimg2.training.programs import StepPrograms
from qimg2.training.progress import Progress
from qimg2.training.rollout import Programs
from qimg2.training.space import when_there_is_room
from qimg2.training.stage import Loader, Stage, compile_rollouts, step_compiler
from qimg2.training.state import TrainState, abstract_state, as_configured, due_metrics, init_state
from qimg2.training.watch import Watch

MAX_DISPATCHED = 2  # steps whose results are still to come


@dataclasses.dataclass(frozen=True)
class StageOutput:
  """Where the output of a stage goes, and what measures it."""
  writer: MetricsWriter
  checkpoints: Checkpoints
  monitor: StepMonitor
  recorder: GoodputRecorder
  copies: LocalCopies
  progress: Progress
  watch: Watch


def train_stage(stage: Stage, nets: Any, loader: Loader, mesh: jax.sharding.Mesh, rules: Rules, workdir: pathlib.Path, key: jax.Array,
                start: Callable[[], tuple[dict, dict]], frozen: dict[str, Any], finish_batches: Callable[[], Iterable[dict]],
                stop: Callable[[int | None], bool] = lambda step: False, began: float | None = None) -> TrainState | None:
  """The state after the stage's last step; None if it was done before. Everything it writes is in `workdir / stage.name`.

  Args:
    stage: what to train.
    nets: the networks, passed on to the algorithm.
    loader: gives this process's rows of each batch.
    mesh, rules: how arrays are sharded.
    workdir: folder of the run.
    key: PRNG key of the stage.
    start: gives (weights of each trained role, averages restored from elsewhere) of step 0; called only when the stage has no checkpoint.
    frozen: weights of the frozen roles.
    finish_batches: gives the batches for the algorithm's `finalize`.
    stop: asked at every step, by every process, whether to stop after it, and before each micro-batch of a step that can be cut; see
      `qimg2.training.faults.PreemptionNotice`.
    began: `time.monotonic()` of when the time that goes to this stage began; None for now.

  Raises:
    Preempted: `stop` said so. The stage is saved, and the same call goes on with it.
    qimg2.training.watch.Ended: a rule of the watch ended the stage now, or did so before.
    FloatingPointError: too many updates in a row were skipped.
    OSError: a checkpoint (SaveError), or the rows up to it, could not be written.
    ValueError: there are checkpoints but none is intact, or they do not fit.
  """
  folder, recorder = workdir / stage.name, GoodputRecorder(began)
  with recorder.measure("start"):
    checkpoints = Checkpoints(folder / "checkpoints", stage.keep, stage.save_every_steps, stage.keep_every_steps)
    if (checkpoints.latest_step() or 0) >= stage.num_steps:
      checkpoints.close()
      LocalCopies(*stage.local_copies, folder).clear()
      return None
  first = jax.process_index() == 0
  with LocalCopies(*stage.local_copies, folder) as copies, Progress(stage.name, stage.num_steps, recorder, first) as progress:
    with recorder.measure("start"):
      abstract = abstract_state(stage.algorithm, stage.optimizers, stage.specs, mesh, rules)
      state, meta = _first_state(stage, checkpoints, copies, abstract, start, key)
    step, watch = int(state.step), Watch(stage.watch, meta.get("rules"))
    if watch.ended:
      checkpoints.close()
      raise watch.reason(stage.name, step)
    writer = MetricsWriter(folder, step, first, meta.get("hooks_due", False), stage.tracker,
                           stage.faults.wait_for_space_s if jax.process_count() == 1 else 0.0)  # the others would wait in a collective
    monitor = StepMonitor(stage.name, stage.faults, writer.write_fault, meta.get("watch"), gather_ids, stage.algorithm.limits)
    output = StageOutput(writer, checkpoints, monitor, recorder, copies, progress, watch)
    if step > (checkpoints.latest_step() or 0):  # it is from a copy, which may be lost with a machine
      _save(stage, state, step, output, meta["hooks_due"], can_continue=True)
    if meta:
      state = as_configured(state, stage.algorithm, stage.optimizers)
    if stop(step):
      _leave_before_start(stage, step, output)
    state = _train(stage, nets, loader, mesh, rules, abstract, state, meta.get("hooks_due", False), frozen, output, folder, stop)
    return _end(stage, state, frozen, nets, finish_batches, output, stop)


def _train(stage: Stage, nets: Any, loader: Loader, mesh: jax.sharding.Mesh, rules: Rules, abstract: TrainState, state: TrainState, hooks_due: bool,
           frozen: dict[str, Any], output: StageOutput, folder: pathlib.Path, stop: Callable[[int | None], bool]) -> TrainState:
  """Compiles, and runs the steps that are left; the state after the last one."""
  step, recorder = int(state.step), output.recorder
  with recorder.measure("compile"):
    rollouts = compile_rollouts(stage, nets, abstract, frozen, mesh, rules)
    compile_one = step_compiler(stage, nets, abstract, frozen, mesh, rollouts)
    order = list(stage.first_needed(step) if stage.first_needed else range(len(stage.batch_shapes)))
  with contextlib.closing(StepPrograms(compile_one, order)) as programs, output.writer.kept_on_failure(), output.checkpoints.kept_on_failure():
    with recorder.measure("compile"):
      word = programs.wait(f"{stage.name}: compile", 1 if stage.first_needed else len(order), lambda: "stop" if stop(None) else "")
    if word or stop(step):
      _leave_before_start(stage, step, output)
    if hooks_due:
      _run_hooks(stage, state, frozen, step, output)
    output.writer.write_timing(step, recorder.row())
    with (contextlib.closing(loader.iterate(step)) as batches, contextlib.closing(Profiler(folder / "profile", stage.profile)) as profiler,
          SaveClock(stage.save_every_s) as is_save_due):
      feed = Feed(batches, lambda batch: put_batch(for_device(batch), mesh, rules))
      return _loop(stage, state, frozen, programs, rollouts, feed, output, stop, profiler, is_save_due)


def _first_state(stage: Stage, checkpoints: Checkpoints, copies: LocalCopies, abstract: TrainState, start: Callable[[], tuple[dict, dict]],
                 key: jax.Array) -> tuple[TrainState, dict]:
  """(state, meta) as saved in the newest intact checkpoint, or in a whole copy that is newer; without any the state of step 0 and nothing."""
  latest = checkpoints.latest_step()
  restored = copies.newest(abstract, latest or 0, stage.num_steps)
  if restored:
    logging.warning("Stage %s goes on at step %d from copies on the machines' own disks: the newest checkpoint is of step %s.", stage.name,
                    restored[0].step, latest)
  elif latest is None:
    begin = lambda params, averages: init_state(stage.algorithm, stage.optimizers, params, averages, key)  # jitted, for arrays that span processes
    return jax.jit(begin, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(*start()), {}
  state, meta = restored or checkpoints.restore(abstract, latest)
  check_frozen(stage.name, stage.description, meta.get("stage", {}), stage.may_change)
  warn_of_another_order(stage, int(state.step), meta.get("stage", {}))
  return state, meta


def _end(stage: Stage, state: TrainState, frozen: dict, nets: Any, finish_batches: Callable[[], Iterable[dict]], output: StageOutput,
         stop: Callable[[int | None], bool]) -> TrainState:
  """What follows the last step: the algorithm's `finalize`, the hooks, the save.

  Raises:
    Preempted: the run was asked to stop meanwhile.
    SaveError: the state could not be written.
  """
  stopping = stop(stage.num_steps)
  if stage.algorithm.finalize is not None:
    with output.recorder.measure("evaluation"):
      state = _finalize(stage.algorithm, state, frozen, nets, finish_batches())
  _run_hooks(stage, state, frozen, stage.num_steps, output)
  with output.recorder.measure("save"):
    _save(stage, state, stage.num_steps, output, whole=True)
    output.checkpoints.close()
  output.copies.clear()
  output.writer.write_timing(stage.num_steps, output.recorder.row())
  output.writer.close()
  if stop(stage.num_steps + 1) or stopping:
    raise Preempted(f"Stage {stage.name} was asked to stop when it was done and saved: the same command goes on.")
  return state


def _loop(stage: Stage, state: TrainState, frozen: dict, programs: StepPrograms, rollouts: list[Programs] | None, feed: Feed, output: StageOutput,
          stop: Callable[[int | None], bool], profiler: Profiler, is_save_due: Callable[[bool | None], bool]) -> TrainState:
  """Runs the steps that are left; saves, but not after the last one, which `finalize` still follows."""
  first = int(state.step)
  output.progress.begin(first)
  clock, num_samples, dispatched = time.monotonic(), 0, collections.deque()
  clocks = {"save": is_save_due, "copy": output.copies.is_due}
  feed.prefetch()
  for step in range(first + 1, stage.num_steps + 1):
    bucket, rows, batch = feed.get()
    num_rows = stage.batch_shapes[bucket]["sample_id"].shape[0]
    num_samples += num_rows
    if not programs.is_there(bucket):
      pause = time.monotonic()
      _wait(stage, state, step, first, programs, bucket, dispatched, output, stop, is_save_due)
      clock += time.monotonic() - pause
    profiler.before(step)
    extra, values, due = {}, {}, set()
    if rollouts is not None:
      if not rollouts[bucket].on_device:
        _observe(dispatched, len(dispatched), output)  # the time of the step before is not the rollout's
      with output.recorder.measure("rollout"):
        batch, extra, values = rollouts[bucket](state, frozen, batch, rows)
    done = programs[bucket](state, frozen, batch, functools.partial(_is_dropped, step, clocks, due, stop))
    if done is None:
      _drop(stage, state, step, first, dispatched, output)
    state, metrics = done
    del batch, done  # so that the device is free of it as soon as the step is done
    row = extra | due_metrics(stage.algorithm, step, metrics)
    dispatched.append((step, num_rows, rows["sample_id"], row))
    if len(dispatched) > MAX_DISPATCHED:
      _observe(dispatched, 1, output)
    profiler.after(step, metrics)
    last = step == stage.num_steps
    if not last:
      feed.prefetch(next(iter(metrics.values())))
    if step % stage.log_every_steps == 0 or last:
      _observe(dispatched, len(dispatched), output)
      now = time.monotonic()
      output.progress.show(**_log(stage, step, row, values, num_samples, now - clock, feed, output))
      clock, num_samples = now, 0
    if output.watch.is_due(step):
      _observe(dispatched, len(dispatched), output)
      due |= {"end"} if output.watch.look(step, row) else set()
    if last:
      break
    if stop(step):
      due.add("stop")
    due |= {name for name, is_due in clocks.items() if is_due(name == "save" and step % stage.save_every_steps == 0)}
    if due or _is_due(stage, step):
      pause = time.monotonic()
      _between(stage, state, frozen, step, dispatched, output, due)
      clock += time.monotonic() - pause
  output.progress.close_bar()
  return state


def _is_dropped(step: int, clocks: Mapping[str, Callable[[bool], bool]], due: set[str], stop: Callable[[int], bool]) -> bool:
  """Whether all processes drop the step between two micro-batches; adds to `due` what is to follow the step."""
  due |= {name for name, is_due in clocks.items() if is_due(False)}
  return stop(step)


def _between(stage: Stage, state: TrainState, frozen: dict, step: int, dispatched: collections.deque, output: StageOutput, due: set[str]) -> None:
  """What is due after `step`: the "end" of the stage, or the "stop"; or the hooks, the "save" and the "copy" on local disks."""
  _observe(dispatched, len(dispatched), output)  # the device is done with the steps: what follows is no time of theirs
  if "end" in due:
    output.progress.close_bar()
    output.writer.write_fault(step, {"fault": "watch", "sentence": output.watch.ended})
    _leave(stage, state, step, output, _is_due(stage, step), output.watch.reason(stage.name, step))
  if "stop" in due:
    output.progress.close_bar()
    _leave(stage, state, step, output, hooks_due=_is_due(stage, step))
  _run_hooks(stage, state, frozen, step, output)
  with output.recorder.measure("save"):
    if "save" in due:
      _save(stage, state, step, output, can_continue=True)
    if "copy" in due:
      output.copies.save(state, _meta(stage, step, output), output.writer.sync)


def _wait(stage: Stage, state: TrainState, step: int, first: int, programs: StepPrograms, bucket: int, dispatched: collections.deque,
          output: StageOutput, stop: Callable[[int | None], bool], is_save_due: Callable[[bool | None], bool]) -> None:
  """Waits, before `step`, until all processes have its program. A stop, or a save by time, need not wait that long."""
  look = lambda: "stop" if stop(None) else "save" if is_save_due(None) else ""
  while not programs.is_there(bucket):
    with output.recorder.measure("compile"):
      word = programs.wait_for(bucket, look)
    if word == "stop":
      _drop(stage, state, step, first, dispatched, output)
    if word == "save":
      is_save_due(True)  # the time is counted anew, on all processes
      _observe(dispatched, len(dispatched), output)
      if step - 1 > first:
        with output.recorder.measure("save"):
          _save(stage, state, step - 1, output, can_continue=True)


def _drop(stage: Stage, state: TrainState, step: int, first: int, dispatched: collections.deque, output: StageOutput) -> None:
  """Leaves `step`, which is not done, to the run that goes on, and saves the one before; `first` is the step that this run began with.

  Raises:
    Preempted: always.
    SaveError: it could not be saved.
  """
  _observe(dispatched, len(dispatched), output)
  output.progress.close_bar()
  if step - 1 == first:
    _leave_before_start(stage, first, output)
  _leave(stage, state, step - 1, output, hooks_due=False)  # they ran


def _observe(dispatched: collections.deque, num: int, output: StageOutput) -> None:
  """Waits for the `num` oldest of the dispatched steps and hands what they computed to the monitor, and to who shows the progress."""
  for _ in range(num):
    step, num_rows, sample_ids, metrics = dispatched.popleft()
    jax.block_until_ready(metrics)
    output.monitor.observe(step, sample_ids, metrics)
    output.watch.observe(metrics)
    output.progress.done(step, num_rows, _loss(metrics))


def _log(stage: Stage, step: int, metrics: Mapping[str, Any], each: Mapping[str, Any], num_samples: int, elapsed_s: float, feed: Feed,
         output: StageOutput) -> dict[str, str]:
  """Writes the rows of a step that is done, and histograms of what `each` has of its samples; returns what to show of it beside the progress."""
  values = {name: float(value) for name, value in metrics.items()} | {"skipped": float(output.monitor.skipped)}
  output.writer.write(step, values)
  for name, some in each.items():
    output.writer.write_histogram(step, f"{name}/samples", np.asarray(some))
  timing = {"samples_per_second": num_samples / elapsed_s, **feed.timing(elapsed_s)}
  output.writer.write_timing(step, timing)
  output.recorder.add("data", timing["data_wait_share"] * elapsed_s)
  output.writer.write_timing(step, output.recorder.row())
  loss = _loss(values)
  return {"loss": "-" if loss is None else f"{loss:.4f}", "samples_per_s": f"{timing['samples_per_second']:.0f}",
          "data_wait": f"{timing['data_wait_share']:.0%}"}


def _loss(values: Mapping[str, Any]) -> float | None:
  """The loss of the first update that has one in this row."""
  return next((float(value) for name, value in values.items() if name.split("/")[-1] == "loss"), None)


# Saving and stopping.


def _save(stage: Stage, state: TrainState, step: int, output: StageOutput, hooks_due: bool = False, can_continue: bool = False,
          whole: bool = False) -> None:
  """Starts to save the state, and with `whole` waits until it is saved. A full disk is waited for. Where the settings say so, a failure of the save
  before it is only logged, and with `can_continue` its own, too."""
  meta, checkpoints = _meta(stage, step, output, hooks_due), output.checkpoints
  wait_s = stage.faults.wait_for_space_s if jax.process_count() == 1 else 0.0  # several would have to fail together

  def start() -> None:
    output.writer.sync()  # where the rows are not safe, nothing is saved
    checkpoints.save(state, meta)

  def save_whole() -> None:
    start()
    checkpoints.wait()

  for part, may_fail in ((checkpoints.wait, True), (save_whole if whole else start, can_continue)):
    try:
      when_there_is_room(part, wait_s, f"the checkpoint of step {step} of stage {stage.name}", save_whole)
    except OSError as error:
      if not may_fail or stage.faults.on_save_error == "stop" or jax.process_count() > 1:
        raise
      logging.warning("Stage %s goes on without a save: %s", stage.name, error)


def _meta(stage: Stage, step: int, output: StageOutput, hooks_due: bool = False) -> dict:
  return {"loader_step": step, "stage": dict(stage.description), "watch": output.monitor.saved(), "hooks_due": hooks_due,
          "rules": output.watch.saved()}


def _leave(stage: Stage, state: TrainState, step: int, output: StageOutput, hooks_due: bool, reason: Exception | None = None) -> None:
  """Saves the state after `step`; hooks_due: whether the evaluation there is still to come.

  Raises:
    Preempted: always, once it is saved; or the `reason` that is given.
    SaveError: it could not be saved.
  """
  with output.recorder.measure("save"):
    _save(stage, state, step, output, hooks_due, whole=True)
    output.checkpoints.close()
  output.writer.write_timing(step, output.recorder.row())
  output.writer.close()
  raise reason or Preempted(f"Stage {stage.name} was asked to stop and is saved at step {step} of {stage.num_steps}: the same command goes on.")


def _leave_before_start(stage: Stage, step: int, output: StageOutput) -> None:
  output.checkpoints.close()  # a save of what came from a copy may be under way
  raise Preempted(f"Stage {stage.name} was asked to stop before its first step, with nothing new to save at step {step} of {stage.num_steps}: the "
                  "same command goes on.")


def _is_due(stage: Stage, step: int) -> bool:
  return any(step % every == 0 for every, _ in stage.hooks)


def _run_hooks(stage: Stage, state: TrainState, frozen: dict, step: int, output: StageOutput) -> None:
  with output.recorder.measure("evaluation"):
    for every, hook in stage.hooks:
      if step % every == 0 or step == stage.num_steps:
        scalars = hook({**frozen, **state.params, **state.averages}, step, output.writer)
        if scalars:
          output.writer.write(step, scalars)


def _finalize(algorithm: Algorithm, state: TrainState, frozen: dict, nets: Any, batches: Iterable[dict]) -> TrainState:
  params, averages = algorithm.finalize({**frozen, **state.params}, nets, batches), {}
  for name, average in algorithm.averages.items():
    averages[name] = algorithm.finalize({**frozen, **state.params, average.role: state.averages[name]}, nets, batches)[average.role]
  return state.replace(params={role: params[role] for role in state.params}, averages=averages)
