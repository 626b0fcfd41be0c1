"""Where a stage writes its numbers.

`metrics.jsonl` holds what training computes and nothing that depends on the clock: an interrupted and resumed run writes the same bytes as
an uninterrupted one. `faults.jsonl`, if there is one, holds what `faults` found, with all sample ids of the batch, and nothing of the clock
either. `timing.jsonl` holds samples per second and the like, and where the time went: rows of `GoodputRecorder`, which stay when a run goes on
from an earlier step. TensorBoard gets metrics and timing.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

import numpy as np
from absl import logging

from qimg2.places import Growing, Place
from qimg2.training.space import when_there_is_room
from qimg2.training.tracker import Tracker

_numbers = itertools.count()
NEXT_TO_STEPS = ("start", "compile", "data", "rollout", "save", "evaluation")  # what time goes to beside steps


class MetricsWriter:
  """Appends rows of scalars under a stage's folder; rows after `step` (of a run that was cut off) are dropped, to be written again. In a bucket the
  files are as new as the last checkpoint, fault or minute."""

  def __init__(self, folder: Place, step: int, active: bool = True, hooks_due: bool = False, tracker: Tracker | None = None,
               wait_s: float = 0.0):
    """Args: folder of the stage; step it starts from; active is False on all processes but the first; hooks_due, whether the evaluation of that step
    is still to come, so that rows of one that was cut off later are dropped, too; tracker, which gets what TensorBoard gets; seconds to
    wait for room on a full disk.

    Raises:
      ValueError: a line in the middle of metrics.jsonl that is no JSON.
    """
    self._active = active
    if not active:
      return
    self._growing, self._tracker, self._stage = Growing(folder), tracker, folder.name
    self._wait_s = wait_s
    self._folder = self._growing.local
    for name in ("metrics.jsonl", "timing.jsonl", "faults.jsonl"):
      _truncate(folder / name, self._folder / name, step, hooks_due)
    self._metrics, self._timing = (_open_rows(self._folder / name) for name in ("metrics.jsonl", "timing.jsonl"))
    self._events = _event_writer(self._folder, step + 1 if step else None)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds a row to metrics.jsonl, where what is not finite is null, and to TensorBoard."""
    self._row("_metrics", step, scalars)

  def write_timing(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds a row to timing.jsonl and to TensorBoard."""
    self._row("_timing", step, scalars)

  def write_fault(self, step: int, row: Mapping) -> None:
    """Adds a JSON-serialisable row to faults.jsonl."""
    if self._active:
      with _open_rows(self._folder / "faults.jsonl") as file:
        self._append(file, {"step": step, **row})
        os.fsync(file.fileno())
      self._growing.push_soon(now=True)

  def write_image(self, step: int, name: str, image: np.ndarray) -> None:
    """Adds an [H, W, 3] uint8 picture to TensorBoard."""
    if self._active:
      self._events.add_image(name, image, step, dataformats="HWC")
      if self._tracker:
        self._tracker.log_image(self._stage, step, name, image)

  def write_histogram(self, step: int, name: str, values: np.ndarray) -> None:
    """Adds the histogram of an array to TensorBoard, without what is not finite; nothing where that is all."""
    values = values[np.isfinite(values)]
    if self._active and values.size:
      self._events.add_histogram(name, values, step)
      if self._tracker:
        self._tracker.log_histogram(self._stage, step, name, values)

  def sync(self) -> None:
    """Returns when all rows so far are on the disk, or in the bucket, so that no checkpoint is newer than its metrics.

    Raises:
      OSError: they cannot be written.
    """
    if self._active:
      for file in (self._metrics, self._timing):
        os.fsync(file.fileno())
      self._events.flush()
      self._growing.push()

  @contextlib.contextmanager
  def kept_on_failure(self) -> Iterator[None]:
    """Where something fails inside, what was written until then is brought to the bucket, too."""
    try:
      yield
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Ends writing. What cannot be brought to a bucket, which no checkpoint counts, is named in the log and stays on this machine."""
    if self._active:
      self._active = False
      self._metrics.close()
      self._timing.close()
      self._events.close()
      self._growing.close()

  def _row(self, file: str, step: int, scalars: Mapping[str, float]) -> None:
    if not self._active:
      return
    values = {name: float(value) for name, value in scalars.items()}
    # JSON knows no NaN and no infinity.
    row = {name: value if math.isfinite(value) else None for name, value in values.items()}
    self._append(getattr(self, file), {"step": step, **row})
    self._growing.push_soon()
    for name, value in values.items():
      self._events.add_scalar(name, value, step)
    if self._tracker:
      self._tracker.log(self._stage, step, values)

  def _append(self, file: TextIO, row: Mapping) -> None:
    """Adds a row to an open file. What a full disk did not take stays in the file's buffer and follows, so that no row is cut or comes twice."""
    file.write(json.dumps(row, allow_nan=False) + "\n")
    when_there_is_room(file.flush, self._wait_s, f"a row of {file.name}")


def _open_rows(path: pathlib.Path) -> TextIO:
  """A file that grows by rows; its buffer holds any row, so that only a flush meets the disk."""
  return open(path, "a", buffering=2**22, encoding="utf-8")


def _event_writer(folder: pathlib.Path, purge_step: int | None):
  """TensorBoard's writer. Its package imports others where they are installed, torch for three seconds, that it needs for what nothing here does.
  What it cannot write is lost, and said once: an error would end its thread, and training would then wait for ever for room in its queue."""
  others = [name for name in ("torch", "boto3", "google.cloud.storage") if name not in sys.modules]
  sys.modules.update(dict.fromkeys(others))  # None: not to be found
  try:
    import tensorboardX
  finally:
    for name in others:
      del sys.modules[name]
  # Its names have the second and the host alone, and a second start within that second would write over the first one's file.
  writer = tensorboardX.SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=f".{os.getpid()}.{next(_numbers)}")
  events = writer.file_writer.event_writer._ev_writer
  for name in ("write_event", "flush", "close"):
    setattr(events, name, _losing(getattr(events, name), folder))
  return writer


def _losing(write: Callable, folder: pathlib.Path) -> Callable:
  """`write`, whose failures are said once."""
  def attempt(*args):
    try:
      write(*args)
    except OSError as error:
      logging.log_first_n(logging.WARNING, "TensorBoard's events in %s cannot be written (%s): they have a gap; metrics.jsonl has all rows.", 1,
                          folder, error)
  return attempt


def read_rows(path: Place) -> list[dict]:
  """The rows of a .jsonl file; a last line that was cut off is left out.

  Raises:
    ValueError: another line is no JSON.
  """
  if not path.exists():
    return []
  rows, lines = [], path.read_text(encoding="utf-8").splitlines(keepends=True)
  for number, line in enumerate(lines):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number == len(lines) - 1:
        break
      raise ValueError(f"{path}, line {number + 1} is no JSON: the file was edited or damaged; mend or move it away.") from error
  return rows


def _truncate(source: Place, path: pathlib.Path, step: int, hooks_due: bool) -> None:
  """Writes to `path` those rows of `source`, which may be the same file, that stay."""
  if path.name == "faults.jsonl" and not source.exists():
    return
  of_hook = lambda row: hooks_due and path.name == "metrics.jsonl" and row["step"] == step and "skipped" not in row
  rows = [row for row in read_rows(source) if row["step"] <= step and not of_hook(row) or "wall_s" in row]
  part = path.with_suffix(".part")
  part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  part.replace(path)


# Where the time goes.


class GoodputRecorder:
  """Where the wall time of a stage goes. What is spent on nothing else is spent on steps.

  Attributes:
    doing: (one of NEXT_TO_STEPS that is measured now, or "step", `time.monotonic()` of when that began).
    compiled_s: seconds that went to compiling until now.
  """

  def __init__(self, began: float | None = None):
    """Args: `time.monotonic()` of when the stage began, which until now went to its start; None for now."""
    self._mark = time.monotonic() if began is None else began
    self._spent = dict.fromkeys(NEXT_TO_STEPS, 0.0)
    self._spent["start"] = time.monotonic() - self._mark
    self.doing, self.compiled_s = ("step", self._mark), 0.0

  @contextlib.contextmanager
  def measure(self, kind: str) -> Iterator[None]:
    """Counts the time inside as spent on `kind`, one of NEXT_TO_STEPS."""
    start, before = time.monotonic(), self.doing
    self.doing = kind, start
    try:
      yield
    finally:
      self.doing = before
      self.add(kind, time.monotonic() - start)

  def add(self, kind: str, seconds: float) -> None:
    """Counts seconds that were spent on `kind`."""
    self._spent[kind] += seconds
    if kind == "compile":
      self.compiled_s += seconds

  def row(self) -> dict[str, float]:
    """Seconds since the last row, to be logged: `wall_s` of all, `step_s` and one for each of NEXT_TO_STEPS of its parts; `goodput`, the share of
    steps, 0 to 1."""
    now = time.monotonic()
    wall, spent = now - self._mark, {f"{kind}_s": seconds for kind, seconds in self._spent.items()}
    self._mark, self._spent = now, dict.fromkeys(NEXT_TO_STEPS, 0.0)
    step = max(0.0, wall - sum(spent.values()))
    return {"wall_s": wall, "step_s": step, **spent, "goodput": step / max(wall, 1e-9)}


def goodput(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Sums of the rows of `GoodputRecorder` among the rows of timing.jsonl, over all starts of a stage; {} when there are none.

  `wall_s`, `step_s` and one for each of NEXT_TO_STEPS in seconds; `lost_s`, steps that a later start computed again, which are not in `step_s`;
  `starts`, how often the stage was started. What a killed process did after its last row is in none of them, and neither is the time between two.
  """
  rows = [row for row in rows if "wall_s" in row]
  if not rows:
    return {}
  names = ("wall_s", "step_s", *(f"{kind}_s" for kind in NEXT_TO_STEPS))
  total = {name: sum(row.get(name, 0.0) for row in rows) for name in names}
  lost, starts, done, at = 0.0, 0, [], 0  # done: (from step, to step, seconds)
  for row in rows:
    if row["start_s"]:
      starts, at = starts + 1, row["step"]
      lost += sum(seconds * (to - max(first, at)) / (to - first) for first, to, seconds in done if to > at)
      done = [(first, min(to, at), seconds * (min(to, at) - first) / (to - first)) for first, to, seconds in done if first < at]
    if row["step"] > at:
      done.append((at, row["step"], row["step_s"]))
    at = row["step"]
  return {**total, "step_s": total["step_s"] - lost, "lost_s": lost, "starts": starts}
