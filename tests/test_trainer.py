"""The loop between the loader and the steps: which batch a step gets, what is held, what is said."""

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import pathlib
import threading
import types
import weakref

import numpy as np
import pytest

from qimg2.algorithms import Algorithm, Role, Update
from qimg2.training import changes, checkpoint, faults, feed, metrics, progress, space, trainer, watch
from qimg2.training.profiler import Profiler
from qimg2.training.programs import StepPrograms

ALGORITHM = Algorithm({"model": Role("mlp")}, (Update(("model",), None),))
STAGE = trainer.Stage("s", ALGORITHM, None, {}, num_steps=7, batch_shapes=({"sample_id": np.zeros(4)},) * 2, save_every_steps=3)


class Result:
  """A step's loss on a device that finishes a step only when it is waited for."""

  def __init__(self, value=0.5, ready=False):
    self.value, self.ready = value, ready

  def is_ready(self):
    return self.ready

  def block_until_ready(self):
    self.ready = True
    return self

  def __float__(self):
    self.ready = True
    return self.value


class Batch:
  """A batch on the device."""

  def __init__(self, batch):
    self.ids = batch["sample_id"]


class Loop:
  """`trainer._loop` over made-up batches, which the steps write down."""

  def __init__(self, num_steps=7, start=0, losses=None, broken=None, log_every=2, settings=None, hooks=(), stop=lambda step: False,
               is_save_due=lambda by_number: by_number, num_micro=0):
    self.num_micro = num_micro
    self.seen, self.put_ids, self.alive, self.results, self.most_unready, self.logged = [], [], [], [], 0, {}
    self.losses, self.broken = losses or {}, broken
    stage = dataclasses.replace(STAGE, num_steps=num_steps, log_every_steps=log_every)
    self.faults, self.saved, self.hooked = [], [], []
    stage = dataclasses.replace(stage, faults=settings or faults.Settings(), hooks=hooks)
    writer = types.SimpleNamespace(write=self.log, write_timing=self.log, sync=lambda: None, close=lambda: None)
    save = lambda state, meta: self.saved.append(meta)
    checkpoints = types.SimpleNamespace(folder=pathlib.Path(), save=save, wait=lambda: None, close=lambda: None)
    monitor = faults.StepMonitor("s", stage.faults, lambda step, row: self.faults.append((step, row)))
    recorder = metrics.GoodputRecorder()
    self.output = trainer.StageOutput(writer, checkpoints, monitor, recorder, types.SimpleNamespace(is_due=lambda by_number: False),
                                      progress.Progress("s", num_steps, recorder), watch.Watch(watch.Settings()))
    self.programs = StepPrograms(lambda bucket: self.step, range(2))
    self.run = lambda: trainer._loop(stage, types.SimpleNamespace(step=start, params={}, averages={}), {}, self.programs, None,
                                     trainer.Feed(self.iterate(start), self.put), self.output, stop, Profiler(pathlib.Path(), None), is_save_due)

  def iterate(self, start):
    for k in range(start, 10**6):
      if k == self.broken:
        raise ValueError(f"batch {k} is broken")
      yield k % 2, {"sample_id": np.arange(4) + 100 * k}

  def put(self, batch):
    self.most_unready = max(self.most_unready, sum(not result.ready for result in self.results))
    array = Batch(batch)
    self.put_ids.append(int(array.ids[0]) // 100)
    self.alive = [ref for ref in self.alive if ref()] + [weakref.ref(array)]
    assert len(self.alive) == 1, "a batch is held after its step was dispatched"
    return array

  def step(self, state, frozen, batch, is_dropped):
    if any(is_dropped() for _ in range(self.num_micro)):
      return None
    self.seen.append(int(batch.ids[0]) // 100)
    self.results.append(Result(self.losses.get(len(self.seen), 0.5)))
    loss = self.results[-1].value
    return state, {"loss": self.results[-1], "grad_norm": Result(loss), "skipped": Result(float(not math.isfinite(loss)))}

  def log(self, step, scalars):
    self.logged.setdefault(step, {}).update(scalars)


def test_looking_ahead_changes_no_step_and_holds_few_batches():
  for start in (0, 3):
    loop = Loop(start=start, log_every=1000)
    loop.run()
    assert loop.seen == loop.put_ids == list(range(start, 7))  # nothing after the last step's is read
    # At a `put` two steps may be under way: with the batch that is put, the device holds two beside that of the running step.
    assert loop.most_unready == trainer.MAX_DISPATCHED == 2
  accounts = set(loop.output.recorder.row())
  assert set(loop.logged[7]) == {"loss", "grad_norm", "skipped", "samples_per_second", "data_wait_share", "loader_batches_per_second"} | accounts
  assert 0 <= loop.logged[7]["data_wait_share"] <= 1
  assert loop.output.progress.line().startswith("s: step 7 of 7 (100%), loss 0.5000, ") and loop.output.progress._num_samples == 4 * 4


def test_skipped_updates_are_counted_and_name_the_samples_of_their_own_step(caplog):
  loop = Loop(losses={4: math.nan, 6: math.inf}, settings=faults.Settings(max_skipped=1), num_steps=9)
  loop.run()
  assert [(step, row["fault"], row["sample_ids"][0]) for step, row in loop.faults] == [(4, "skipped", 300), (6, "skipped", 500)]
  assert [loop.logged[step]["skipped"] for step in (2, 4, 6, 8)] == [0, 1, 2, 2]
  assert ("step 4: the update is skipped because the loss or a gradient is not finite: loss nan, grad_norm nan (samples 300, 301, 302, 303)"
          in caplog.text)


def test_too_many_skipped_updates_in_a_row_stop_the_run():
  loop = Loop(losses={3: math.nan, 4: math.nan, 5: math.nan}, settings=faults.Settings(max_skipped=2), log_every=1000, num_steps=1000)
  with pytest.raises(FloatingPointError, match=r"skipped 3 updates in a row, steps 3 to 5, .*step 3: samples 200, .*step 5: samples 400, 401, 402"):
    loop.run()
  assert 5 < len(loop.seen) <= 5 + trainer.MAX_DISPATCHED  # looked at when it is done, while later ones run


def test_an_update_that_rests_between_is_still_failing():
  """Every second step is not due, and nothing is skipped there."""
  monitor = faults.StepMonitor("s", faults.Settings(max_skipped=2), lambda step, row: None)
  fine = {"fake/loss": 1.0, "fake/grad_norm": 1.0}
  for step in (1, 2, 3, 4, 5):
    bad = {"model/loss": math.nan, "model/grad_norm": 1.0, "skipped": 1.0} if step % 2 == 0 else {"skipped": 0.0}
    monitor.observe(step, [step], fine | bad)
    monitor = faults.StepMonitor("s", faults.Settings(max_skipped=2), lambda step, row: None, json.loads(json.dumps(monitor.saved())))
  with pytest.raises(FloatingPointError, match="skipped 3 updates in a row, steps 2 to 6"):
    monitor.observe(6, [6], fine | bad | {"model/loss": math.nan, "model/grad_norm": 1.0, "skipped": 1.0})


def test_a_stop_saves_the_step_and_leaves_the_evaluation_that_is_due():
  hooked = []
  for at, due in ((5, False), (4, True)):
    loop = Loop(log_every=3, hooks=((4, lambda weights, step, writer: hooked.append(step)),), stop=lambda step, at=at: step == at)
    with pytest.raises(faults.Preempted, match=f"is saved at step {at} of 7"):
      loop.run()
    assert len(loop.seen) == at and loop.saved[-1]["loader_step"] == at and loop.saved[-1]["hooks_due"] == due
    assert loop.seen == list(range(at)) and "loss" not in loop.logged[at]
  assert hooked == [4]  # by the first one


@pytest.mark.parametrize("at, saved, seen", [(1, None, 0), (4, None, 0), (5, 1, 1), (9, 1, 1), (10, 2, 2), (22, 4, 4)])
def test_a_stop_between_micro_batches_saves_the_step_before(at, saved, seen):
  """A step asks four times in it and once after it; what is due at a step that is done was done."""
  asked, hooked = itertools.count(1), []
  loop = Loop(num_micro=4, log_every=1, hooks=((4, lambda weights, step, writer: hooked.append(step)),),
              stop=lambda step: step is not None and next(asked) >= at)
  with pytest.raises(faults.Preempted, match="before its first step" if saved is None else f"is saved at step {saved} of 7"):
    loop.run()
  assert len(loop.seen) == seen and max(loop.logged, default=0) == seen and hooked == [4] * (seen == 4)
  assert [meta["loader_step"] for meta in loop.saved] == [3] * (seen > 3) + [saved] * (saved is not None)
  assert not any(meta["hooks_due"] for meta in loop.saved)


def test_a_save_by_time_within_a_step_comes_at_its_end():
  asked = itertools.count(1)
  loop = Loop(num_micro=4, is_save_due=lambda by_number: by_number is not None and next(asked) in (2, 3, 15, 27))
  loop.run()
  assert [meta["loader_step"] for meta in loop.saved] == [1, 3, 6]


def test_what_comes_while_a_step_waits_for_its_program():
  """The second bucket's is not there: a save, and then a stop, of the step before."""
  loop = Loop(log_every=1000, stop=lambda step: step is None and len(loop.saved) == 1,
              is_save_due=lambda by_number: by_number is None and len(loop.seen) == 1 and not loop.saved)
  ready = threading.Event()
  compile_one = lambda bucket: loop.step if bucket == 0 or ready.wait(30) else None
  loop.programs = StepPrograms(compile_one, range(2))
  with pytest.raises(faults.Preempted, match="is saved at step 1 of 7"):
    loop.run()
  ready.set()
  assert [meta["loader_step"] for meta in loop.saved] == [1, 1] and len(loop.seen) == 1


def test_a_save_that_fails_stops_the_run_or_is_said(caplog):
  def refuse(state, meta):
    if meta["loader_step"] == 3:
      raise checkpoint.SaveError("no space")
  for on_save_error in ("stop", "continue"):
    loop = Loop(settings=faults.Settings(on_save_error=on_save_error))
    loop.output.checkpoints.save = refuse
    with pytest.raises(checkpoint.SaveError) if on_save_error == "stop" else contextlib.nullcontext():
      loop.run()
    assert len(loop.seen) == (3 if on_save_error == "stop" else 7)
  assert caplog.text.count("goes on without a save: no space") == 1


def test_a_full_disk_is_waited_for(caplog, monkeypatch, tmp_path):
  """The save of step 3 finds no room when it ends, and that of step 6 in its place once more; rows go on where they were cut."""
  monkeypatch.setattr(space, "RETRY_S", 0.01)
  for wait_s in (60.0, 0.03):
    loop = Loop(settings=faults.Settings(wait_for_space_s=wait_s))
    failures = iter([1, 1] if wait_s > 1 else itertools.repeat(1))

    def wait(failures=failures, loop=loop):
      if loop.saved and next(failures, None):
        raise checkpoint.SaveError("not written") from ValueError("RESOURCE_EXHAUSTED: No space left on device")
    loop.output.checkpoints.wait = wait
    with contextlib.nullcontext() if wait_s > 1 else pytest.raises(checkpoint.SaveError, match="not written"):
      loop.run()
    assert [meta["loader_step"] for meta in loop.saved][-1] == 6 and len(loop.seen) == (7 if wait_s > 1 else 6)
  assert caplog.text.count("The disk is full: the checkpoint of step 6 of stage s cannot be written (not written). Free some space") == 2
  assert caplog.text.count("There is room again: the checkpoint of step 6 of stage s is written.") == 1
  left = iter([5, 0, 100])

  class Disk(io.RawIOBase):
    name, content = "metrics.jsonl", b""
    def writable(self):
      return True
    def write(self, data):
      room = next(left)
      if not room:
        raise OSError(errno.ENOSPC, "No space left on device")
      self.content += bytes(data[:room])
      return min(room, len(data))
  disk, writer = Disk(), metrics.MetricsWriter(tmp_path, 0, wait_s=60.0)
  writer._append(io.TextIOWrapper(io.BufferedWriter(disk)), {"step": 1, "loss": 0.5})
  assert disk.content == b'{"step": 1, "loss": 0.5}\n'
  with pytest.raises(OSError, match="elsewhere"):
    space.when_there_is_room(lambda: exec('raise OSError(5, "elsewhere")'), 60.0, "x")


def test_saves_are_due_by_number_and_by_the_time_since_the_last_one(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(faults, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
  for every_s, saved in ((0.0, [3, 6, 9]), (15.0, [2, 3, 5, 6, 8, 9]), (20.1, [3, 6, 9]), (5.0, list(range(1, 11)))):
    with faults.SaveClock(every_s) as due:

      def later(by_number, due=due):
        clock[0] += 10 * (by_number is not None)  # a step
        return due(by_number)
      loop = Loop(num_steps=11, is_save_due=later)
      loop.run()
    assert [meta["loader_step"] for meta in loop.saved] == saved  # and after the last step, by who called the loop


def test_a_broken_batch_stops_its_own_step_and_not_the_one_before():
  loop = Loop(broken=6, log_every=1, num_steps=9)
  with pytest.raises(ValueError, match="batch 6 is broken"):
    loop.run()
  assert loop.seen == list(range(6)) and max(loop.logged) == 6 and [meta["loader_step"] for meta in loop.saved] == [3, 6]


def test_waiting_counts_only_while_no_step_runs(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(feed, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

  def slow():
    while True:
      clock[0] += 0.02
      yield 0, {"sample_id": np.zeros(1)}
  batches = trainer.Feed(slow(), lambda batch: batch)
  for running, share in ((None, 1.0), (Result(ready=True), 1.0), (Result(ready=False), 0.0)):
    start = clock[0]
    for _ in range(3):
      batches.prefetch(running)
      batches.get()
    timing = batches.timing(clock[0] - start)
    assert timing["data_wait_share"] == pytest.approx(share) and timing["loader_batches_per_second"] == pytest.approx(50)


# ---- other weights, another mixture -------------------------------------------------------------------------------


def test_frozen_weights_of_a_run_that_trained_on_are_refused():
  steps = lambda step: {"frozen_steps": {"vae": ("runs/a/vae", step)}}
  saved = json.loads(json.dumps(steps(100)))
  for unchanged in ((steps(100), saved), (steps(200), {}), (steps(200), {"frozen_steps": {"vae": ["runs/b/vae", 100]}}), ({}, saved)):
    changes.check_frozen("s", *unchanged)
  with pytest.raises(ValueError, match="Stage s was trained with vae of step 100 of runs/a/vae, which has step 200 now: put that checkpoint back"):
    changes.check_frozen("s", steps(200), saved)
  holds = lambda place, digest: {"contents": {"reward dark": (place, digest)}}
  changes.check_frozen("s", holds("b.py", "1"), holds("a.py", "1"))
  for place, message in (("a.py", "a.py does not hold what it held when the stage began"), ("b.py", "b.py does not hold what a.py held when")):
    with pytest.raises(ValueError, match=f"Stage s was trained with another reward dark: {message}"):
      changes.check_frozen("s", holds(place, "2"), holds("a.py", "1"))


def test_going_on_with_another_mixture_is_said_once(caplog):
  section = {"mixture": ({"name": "a", "weight": 0.65},), "resolutions": ({"base_px": 64},), "num_steps": 5, "seed": 0}
  stage = dataclasses.replace(STAGE, description=section)
  saved = json.loads(json.dumps(section))
  changes.warn_of_another_order(stage, 40, saved | {"num_steps": 3})
  changes.warn_of_another_order(stage, 40, {})  # a checkpoint that says nothing
  assert not caplog.records
  saved["mixture"][0]["weight"], saved["seed"] = 0.8, 1
  saved["mixture"].append({"name": "b", "weight": 1.0})
  changes.warn_of_another_order(stage, 40, saved)
  (record,) = caplog.records
  assert record.levelname == "WARNING" and record.getMessage() == (
      "Stage s goes on at batch 40 with another mixture: seed was 1 and is 0; mixture[0].weight was 0.8 and is 0.65; mixture[1] was "
      "{'name': 'b', 'weight': 1.0} and is None: from here on the order is that of the new mixture.")
