"""What a run does when something goes wrong: a machine that is taken away, non-finite losses and gradients, a loss that jumps.

Nothing here reads a step's results before the loop says that the step is done, so nothing here makes the device wait.
"""

import collections
import dataclasses
import itertools
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax._src import distributed

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: saved and stopped as asked; the same command goes on
ON_SAVE_ERROR = ("stop", "continue")
STOP_AFTER = ("step", "micro_batch")
WINDOW = 100  # losses that the median of a spike is taken over
LEARNED = "reward/learned"  # metric of a method with rollouts: the share of samples that it learns from
NOT_FINITE = "the loss or a gradient is not finite"
NOTHING = "no sample is learned from, as where no group of one prompt has pictures of different reward"
MIN_LOSSES = 20  # fewer say nothing about a spike
NUM_SHOWN = 8  # sample ids in a message; faults.jsonl has all
HOUR_MS = 3_600_000
_agreements = itertools.count()  # every process makes them in the same order


class Preempted(Exception):
  """The run was asked to stop and has stopped; the same command goes on with it."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """Fault-tolerance settings of a stage.

  Attributes:
    max_skipped: updates in a row that may be skipped because of a non-finite loss or gradient; one more ends the run.
    spike_factor: a loss above this many times the median of the last 100 is logged with its samples; 0 for never. Not where one of these is
      negative, as those of policy gradients are: such losses have no scale.
    on_save_error: "stop" when a checkpoint cannot be written, or "continue" with a warning. The last one of a stage must be written, and with
      several processes every failure stops.
    wait_for_space_s: seconds in which a checkpoint, or a row of metrics, that a full disk does not take is tried again before it counts as one that
      cannot be written; 0 for none. Not for checkpoints of several processes.
    stop_after: what a stop waits for: the end of a "step", or of a "micro_batch". Then a step of several micro-batches runs as a program for each of
      them and one for the update; a stop between them drops the step and saves the state before it. Only for methods with one update, due at every
      step, and without a rollout.

  Raises:
    ValueError: a number below 0, or another word.
  """
  max_skipped: int = 10
  spike_factor: float = 10.0
  on_save_error: str = "stop"
  stop_after: str = "step"
  wait_for_space_s: float = 600.0

  def __post_init__(self):
    if min(self.max_skipped, self.spike_factor, self.wait_for_space_s) < 0:
      raise ValueError("faults.max_skipped, faults.spike_factor and faults.wait_for_space_s must be 0 or more.")
    if self.on_save_error not in ON_SAVE_ERROR:
      raise ValueError(f"faults.on_save_error is {self.on_save_error!r}: choose one of {', '.join(ON_SAVE_ERROR)}.")
    if self.stop_after not in STOP_AFTER:
      raise ValueError(f"faults.stop_after is {self.stop_after!r}: choose one of {', '.join(STOP_AFTER)}.")


class Agreement:
  """A call of `reached` on which all processes agree when one of them has called `ask`. Every process makes agreements in the same order and calls
  `reached` equally often.

  One process alone reaches it at its next call. Of several, whichever asks tells the others through the coordination service of `jax.distributed`,
  and they agree on a call that none of them has passed. That costs a look at a local number per call.

  JAX has such an agreement of its own (`reached_preemption_sync_point`). It is not used: it has one counter of steps, and Orbax sets it, too, so
  that the step agreed on may be one that some or all processes have passed.
  """

  def __init__(self):
    self._asked = False
    self._num_calls, self._agreed_call = 0, math.inf  # of `reached` on this process, and the one that all agreed on
    self._lock = threading.Lock()
    self._name = f"qimg2/agreement/{next(_agreements)}"
    self._thread = threading.Thread(target=self._agree, daemon=True) if _shared() else None
    if self._thread:
      self._thread.start()

  def ask(self) -> None:
    """Asks for the agreement; again does nothing."""
    if self._thread and not self._asked:
      self._tell("asked")
    self._asked = True

  def reached(self) -> bool:
    """Whether this call is the one, or a later one."""
    if not self._thread:
      return self._asked
    with self._lock:
      self._num_calls += 1
      return self._num_calls >= self._agreed_call

  def is_asked(self) -> bool:
    """Whether this process knows that one has asked. It does not count as a call of `reached`."""
    return self._asked or self._agreed_call < math.inf

  def close(self, together: bool = True) -> None:
    """Ends it; `together`: whether all processes come to this point, which this one waits for."""
    if self._thread:
      if jax.process_index() == 0:
        self._tell("done")
      if together:
        self._thread.join()

  def _tell(self, word: str) -> None:
    """Says a word to all processes, unless one was said."""
    try:
      distributed.global_state.client.key_value_set(self._name, word)
    except jax.errors.JaxRuntimeError:
      pass  # another one was faster, or the coordinator is gone: the others know

  def _agree(self) -> None:
    """Waits until a process asks. Then each says how often it has called, and may not call again before it knows the largest number of all: the
    call after that is the one. The main thread of each may wait for another's step meanwhile; this one does not."""
    try:
      if _said(distributed.global_state.client, self._name) == "asked":
        with self._lock:
          self._agreed_call = 1 + max(map(int, _texts(f"{self._name}/calls", str(self._num_calls))))
    except jax.errors.JaxRuntimeError as error:  # `qimg2.runtime.processes` finds the lost process and ends this one
      logging.warning("The processes cannot agree on a step: %s", str(error).partition("\n")[0])


class SaveClock:
  """Whether a checkpoint is due after a step, by number or by time: `with SaveClock(1200) as due: ... due(step % 500 == 0)`.

  Every process asks after every step. The clock of the first process counts from the last save; the others agree with it on a step (`Agreement`).
  """

  def __init__(self, every_s: float):
    """Args: seconds between two saves, 0 for none by time."""
    self._every_s = every_s

  def __enter__(self):
    self._begin()
    return self

  def __exit__(self, failure: type[BaseException] | None, *_):
    if self._every_s:
      self._timer.cancel()
      self._agreement.close(_together(failure))

  def __call__(self, by_number: bool | None) -> bool:
    """Whether all processes save after this step; by_number: whether they do so whatever the time is. With None, for those who wait: whether the
    clock of the first process says so; it does not count as a call."""
    if not self._every_s:
      return bool(by_number)
    is_late = jax.process_index() == 0 and time.monotonic() - self._since >= self._every_s
    if by_number is None:
      return is_late or self._agreement.is_asked()
    if is_late:
      self._agreement.ask()
    due = self._agreement.reached() or by_number
    if due:
      self._timer.cancel()
      self._agreement.close()
      self._begin()
    return due

  def _begin(self) -> None:
    if self._every_s:
      self._since, self._agreement = time.monotonic(), Agreement()
      self._timer = threading.Timer(self._every_s, self._agreement.ask)  # the others may wait for it, and the first process for a program
      self._timer.daemon = True
      if _shared() and jax.process_index() == 0:
        self._timer.start()


class PreemptionNotice:
  """Whether the run is asked to stop: `with PreemptionNotice() as stop: ... stop(step)`.

  SIGTERM, which comes before a machine is taken away, and the first SIGINT ask for it; a second SIGINT ends the process at once, with 130. One
  process stops after the step that it is running. Several stop after the same step, whichever of them is asked (`Agreement`).
  """

  def __init__(self):
    self._before = {}

  def __enter__(self):
    self._agreement = Agreement()
    if threading.current_thread() is threading.main_thread():  # no other thread may set a handler
      for number in (signal.SIGINT, signal.SIGTERM):
        self._before[number] = signal.signal(number, self._handle)
      pipe, self._pipe = os.pipe()
      os.set_blocking(self._pipe, False)
      self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
      threading.Thread(target=self._hear, args=(pipe,), daemon=True).start()
    return self

  def __exit__(self, failure: type[BaseException] | None, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if self._before:
      signal.set_wakeup_fd(self._pipe_before)
      os.close(self._pipe)
    self._agreement.close(_together(failure))

  def __call__(self, step: int | None) -> bool:
    """Whether all processes stop after `step`, or between its micro-batches. Every process asks equally often. With None, for those who wait: whether
    this process knows that one was asked to stop; it does not count."""
    if step is None:
      return self._agreement.is_asked()
    return self._agreement.reached()  # a number of calls, not of steps: those begin anew with each stage

  def _handle(self, *_) -> None:
    if not _shared():
      self._agreement.ask()  # else `_hear` does, because a handler may interrupt what talks to the other processes

  def _hear(self, pipe: int) -> None:
    """Reads the numbers of signals as they come, which Python's handlers, in the main thread, cannot while that compiles or waits for a device."""
    num_interrupts = 0
    with open(pipe, "rb", buffering=0) as numbers:
      while some := numbers.read(64):
        num_interrupts += some.count(signal.SIGINT)
        if num_interrupts > 1:
          os._exit(130)
        if _shared() and (signal.SIGINT in some or signal.SIGTERM in some):
          self._agreement.ask()


def _shared() -> bool:
  return jax.process_count() > 1


def _together(failure: type[BaseException] | None) -> bool:
  """Whether the other processes leave a block as this one does."""
  return failure is None or issubclass(failure, Preempted)


def exchange(text: str) -> list[str]:
  """The texts of all processes, in their order, as soon as each has given one. They call it in the same order. The devices have no part in it."""
  return _texts(f"qimg2/texts/{next(_agreements)}", text) if _shared() else [text]


def _texts(name: str, text: str) -> list[str]:
  """`exchange` under a name that is used once."""
  client = distributed.global_state.client
  client.key_value_set(f"{name}/{jax.process_index()}", f" {text}")  # never an empty one
  client.wait_at_barrier(f"{name}/all", HOUR_MS)
  found = sorted(client.key_value_dir_get(f"{name}/"), key=lambda pair: int(pair[0].rpartition("/")[2]))
  return [one[1:] for _, one in found]


def _said(client: Any, key: str) -> str:
  """What a process says under a key of the coordination service, as soon as it does."""
  while True:
    try:
      return client.blocking_key_value_get(key, HOUR_MS)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


class StepMonitor:
  """Looks at the results of the steps of a stage, in order and each after it is done, and says what is wrong with them.

  What it remembers is saved with a checkpoint, so that an interrupted run says the same as one that nothing stopped.
  """

  def __init__(self, name: str, settings: Settings, record: Callable[[int, dict], None], saved: Mapping[str, Any] | None = None,
               gather: Callable[[Sequence], Sequence] = list, limits: Mapping[str, float] | None = None):
    """Args: name of the stage; settings; function of (step, JSON-serialisable row) that writes down a fault; what `saved` gave earlier; function
    that makes of this process's sample ids those of all, called on all processes alike; largest values of metrics (`Update.limits`)."""
    saved = saved or {}
    self._name, self._settings, self._record, self._limits = name, settings, record, limits or {}
    self._gather = lambda ids: [int(i) for i in gather(ids)]
    self.skipped = int(saved.get("skipped", 0))
    self._row = [(step, list(ids)) for step, ids in saved.get("row", ())]
    self._failing = set(saved.get("failing", ()))  # updates that were skipped when they were last due
    self._losses = {key: collections.deque(losses, WINDOW) for key, losses in saved.get("losses", {}).items()}

  def saved(self) -> dict:
    """All that it remembers, JSON-serialisable."""
    return {"skipped": self.skipped, "row": [[step, ids] for step, ids in self._row], "failing": sorted(self._failing),
            "losses": {key: list(losses) for key, losses in self._losses.items()}}

  def observe(self, step: int, sample_ids: Sequence, metrics: Mapping[str, Any]) -> None:
    """Looks at the metrics of a step that is done; `sample_ids` are those of this process's rows.

    Raises:
      FloatingPointError: more than `max_skipped` updates in a row were skipped, or a metric is above its limit.
    """
    for name, limit in self._limits.items():
      if name in metrics and float(metrics[name]) > limit:
        raise FloatingPointError(f"Stage {self._name}, step {step}: {name} is {float(metrics[name]):.4g}, and must not be above {limit:g}: what the "
                                 "method promises of itself is broken, and its docstring says what that is; the last checkpoint is kept.")
    losses = {name: float(value) for name, value in metrics.items() if name.split("/")[-1] == "loss"}
    for name, loss in losses.items():
      update = name.removesuffix("loss")
      (self._failing.discard if math.isfinite(loss + float(metrics.get(f"{update}grad_norm", 0.0))) else self._failing.add)(update)
    if float(metrics["skipped"]):
      idle = metrics.get(LEARNED) is not None and not float(metrics[LEARNED])
      values = losses | {name: float(metrics[name]) for name in metrics if "grad_norm" in name}
      self._skip(step, self._gather(sample_ids), {LEARNED: 0.0} if idle else values, NOTHING if idle else NOT_FINITE)
      return
    if not self._failing:  # an update that rests in this step is no better for it
      self._row.clear()
    for name, loss in losses.items():
      earlier = self._losses.setdefault(name, collections.deque(maxlen=WINDOW))
      median = statistics.median(earlier) if len(earlier) >= MIN_LOSSES and min(earlier) >= 0 else 0.0
      if self._settings.spike_factor and loss > self._settings.spike_factor * median > 0:
        ids = self._gather(sample_ids)
        logging.warning("Stage %s, step %d: %s is %.4g, the median of the steps before %.4g (%s).", self._name, step, name, loss, median, _show(ids))
        self._record(step, {"fault": "spike", name: loss, "median": median, "sample_ids": ids})
      earlier.append(loss)

  def _skip(self, step: int, ids: list[int], values: dict[str, float], why: str) -> None:
    self.skipped += 1
    self._row.append((step, ids))
    said = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    logging.warning("Stage %s, step %d: the update is skipped because %s: %s (%s).", self._name, step, why, said, _show(ids))
    self._record(step, {"fault": "skipped", **{name: str(value) for name, value in values.items()}, "sample_ids": ids})
    if len(self._row) > self._settings.max_skipped:
      batches = "; ".join(f"step {step}: {_show(ids)}" for step, ids in self._row)
      mend = "look at the rewards of these prompts" if why is NOTHING else "lower the learning rate, look at these samples"
      raise FloatingPointError(f"Stage {self._name} skipped {len(self._row)} updates in a row, steps {self._row[0][0]} to {step}, the last of them "
                               f"because {why} ({batches}): {mend}, or raise faults.max_skipped; the last checkpoint is kept.")


def _show(ids: Sequence[int]) -> str:
  return f"samples {', '.join(map(str, ids[:NUM_SHOWN]))}{' ...' if len(ids) > NUM_SHOWN else ''}"
