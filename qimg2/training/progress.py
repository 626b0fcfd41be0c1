"""How far a stage is, for whoever waits for it: a bar on a terminal, and a line every `LINE_S` seconds anywhere else.

What is shown is of steps that the device has done, not of those on their way to it. A stage that goes on counts from where it went on, and its
rate is that of this start. The time that is left follows from the steps, and all that came between them, of the last `WINDOW_S` seconds; what was
spent on compiling is left out, because it does not come again. While something else than steps goes on, a line says what, and for how long.
"""

import collections
import contextlib
import datetime
import sys
import threading
import time
from typing import Any

from tqdm import tqdm

from qimg2.training.metrics import GoodputRecorder

LINE_S = 30.0
WINDOW_S = 600.0
_MARK_S = 1.0  # between two points of time that are remembered
DOING = {"start": "reading what it starts from", "compile": "compiling", "rollout": "making samples", "save": "saving", "evaluation": "evaluating"}


class Progress:
  """The progress of one stage, on stderr: `with Progress(...) as progress`."""

  def __init__(self, name: str, num_steps: int, recorder: GoodputRecorder, active: bool = True):
    """Args: name of the stage; its last step; what knows what the time is spent on; active is False on all processes but the first."""
    self._name, self._num_steps, self._recorder = name, num_steps, recorder
    self._active, self._bar = active, None
    self._step, self._loss = 0, None
    self._marks: collections.deque[tuple[float, int, int]] = collections.deque()  # (seconds without compiling, step, samples of this start)
    self._num_samples, self._last = 0, time.monotonic()
    self._ended, self._lock = threading.Event(), threading.Lock()
    self._lines = active and not _is_terminal()
    self._thread = threading.Thread(target=self._say, name="progress", daemon=True)

  def __enter__(self):
    if self._lines:
      self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    self.close_bar()
    if self._lines:
      self._thread.join()

  def begin(self, step: int) -> None:
    """The steps after `step` begin."""
    with self._lock:
      self._step, self._last = step, time.monotonic()
      self._marks.append((self._clock(), step, 0))
    if self._active and not self._lines:
      self._bar = tqdm(total=self._num_steps, initial=step, desc=self._name, unit="step", file=sys.stderr)

  def done(self, step: int, num_samples: int, loss: float | None) -> None:
    """A step is done, with so many samples; its loss, None where it has none."""
    with self._lock:
      self._step, self._loss, self._num_samples = step, self._loss if loss is None else loss, self._num_samples + num_samples
      self._last, now = time.monotonic(), self._clock()
      if len(self._marks) < 2 or now - self._marks[-2][0] >= _MARK_S:
        self._marks.append((now, step, self._num_samples))
      else:
        self._marks[-1] = now, step, self._num_samples
      while len(self._marks) > 2 and now - self._marks[1][0] > WINDOW_S:
        self._marks.popleft()
    if self._bar is not None:
      self._bar.update(1)

  def show(self, **facts: Any) -> None:
    """Shows facts beside the bar, where there is one."""
    if self._bar is not None:
      self._bar.set_postfix(**facts, refresh=False)

  def close_bar(self) -> None:
    """Ends the bar, before something else is printed."""
    if self._bar is not None:
      self._bar.close()

  def line(self) -> str:
    """The stage, its step, loss, steps and samples per second, the time that is left, and what goes on beside steps."""
    with self._lock:
      doing, since = self._recorder.doing
      now = time.monotonic()
      if not self._marks:
        return f"{self._name}: {DOING.get(doing, 'starting')}, for {_duration(now - since)}"
      (begin, first, few), (end, step, many) = self._marks[0], self._marks[-1]
      parts = [f"{self._name}: step {self._step} of {self._num_steps} ({self._step / self._num_steps:.0%})"]
      parts += [f"loss {self._loss:.4f}"] if self._loss is not None else []
      if step > first and end > begin:
        rate = (step - first) / (end - begin)
        parts += [f"{rate:.3g} steps/s", f"{(many - few) / (end - begin):.3g} samples/s", f"{_duration((self._num_steps - self._step) / rate)} left"]
        late = now - self._last > max(LINE_S, 3 / rate)
      else:
        parts, late = [*parts, "no step of this start yet"], now - self._last > LINE_S
      if doing in DOING:
        parts.append(f"{DOING[doing]} for {_duration(now - since)}")
      elif late:
        parts.append(f"no step has ended for {_duration(now - self._last)}")
      return ", ".join(parts)

  def _clock(self) -> float:
    """Seconds of this stage, without those of compiling."""
    return time.monotonic() - self._recorder.compiled_s

  def _say(self) -> None:
    while not self._ended.wait(LINE_S):
      with contextlib.suppress(ValueError):  # stderr was closed
        try:
          print(self.line(), file=sys.stderr, flush=True)
        except OSError:  # nobody reads it any more
          return


def _is_terminal() -> bool:
  return sys.stderr is not None and sys.stderr.isatty()


def _duration(seconds: float) -> str:
  """Such as "4:05" or "2 days, 3:00:05"."""
  text = str(datetime.timedelta(seconds=round(seconds)))
  return text[3:] if text.startswith("0:0") else text.removeprefix("0:")
