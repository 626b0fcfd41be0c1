"""Scores of pictures: on the host, in a pool of processes while the device draws the next ones, or in batches on the device.

A picture that cannot be scored has {"error": why}. That is a broken file, an answer of the suite, a metric that is not finite, a score that takes too
long, and a scorer that was killed twice over the same picture, the second time over it alone. A mistake of the suite itself ends the evaluation.
"""

import concurrent.futures
import functools
import math
import multiprocessing
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from data_pipelines.children import end_with_parent
from qimg2.evaluation import ERROR, Suite, Task, metrics_of

LATE_S = 600.0  # seconds that one picture may take


class Scorer:
  """Scores pictures with a suite; a context manager, which ends its processes."""

  def __init__(self, suite: Suite, num_workers: int = 0):
    """Args: the suite; processes for one whose scores take long, 0 for one less than `num_cores`, at least one."""
    self._suite = suite
    self._num = num_workers or max(1, num_cores() - 1)
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None
    self._second: concurrent.futures.ProcessPoolExecutor | None = None  # of one process, for pictures whose first one ended

  def __enter__(self) -> "Scorer":
    return self

  def __exit__(self, *_: Any) -> None:
    self._pool, self._second = _end(self._pool), _end(self._second)

  def begin(self, tasks: Sequence[Task], pictures: Sequence[np.ndarray | str]) -> "Pending":
    """Begins to score pictures of as many tasks; in place of one that could not be read stands why. A suite in processes goes on meanwhile."""
    slow = self._suite.is_slow and self._suite.score is not None
    futures = [self._submit(task, picture) if slow and not isinstance(picture, str) else None for task, picture in zip(tasks, pictures)]
    return Pending(self, list(tasks), list(pictures), futures)

  def _submit(self, task: Task, picture: np.ndarray) -> concurrent.futures.Future:
    self._pool = self._pool or _start(self._num)
    try:
      return self._pool.submit(_score, self._suite.score, task, picture)
    except BrokenProcessPool:
      self._pool = _end(self._pool)
      return self._submit(task, picture)

  def _result(self, future: concurrent.futures.Future, task: Task, picture: np.ndarray) -> Mapping[str, Any]:
    try:
      return future.result(LATE_S)
    except TimeoutError:
      self._pool = _kill(self._pool)
      return _late()
    except (BrokenProcessPool, concurrent.futures.CancelledError):  # of all that were under way: another picture may be the cause
      return self._again(task, picture)

  def _again(self, task: Task, picture: np.ndarray) -> Mapping[str, Any]:
    """The score from a process that has nothing else to do, so that only this picture can be the cause of its end."""
    self._second = self._second or _start(1)
    try:
      return self._second.submit(_score, self._suite.score, task, picture).result(LATE_S)
    except TimeoutError:
      self._second = _kill(self._second)
      return _late()
    except BrokenProcessPool:
      self._second = _end(self._second)
      return {ERROR: "the process that scored it was killed, twice"}

  def finish(self, pending: "Pending") -> tuple[list[dict[str, Any]], np.ndarray | None]:
    """(scores, features [n, D] float32 or None) of what was begun; the row of a picture without a score is NaN."""
    suite, good = self._suite, [i for i, picture in enumerate(pending.pictures) if not isinstance(picture, str)]
    scores: list[Mapping[str, Any]] = [{ERROR: picture} if isinstance(picture, str) else {} for picture in pending.pictures]
    some = lambda: ([pending.tasks[i] for i in good], [pending.pictures[i] for i in good])
    if suite.score_batch is not None and good:
      for i, found in zip(good, suite.score_batch(*some())):
        scores[i] = found
    elif suite.score is not None:
      for i in good:
        task, picture, future = pending.tasks[i], pending.pictures[i], pending.futures[i]
        scores[i] = _score(suite.score, task, picture) if future is None else self._result(future, task, picture)
    features = None
    if suite.features is not None:
      found = suite.features(*some()) if good else np.zeros((0, 0), np.float32)
      features = np.full((len(scores), found.shape[1]), np.nan, np.float32)
      features[good] = found
    return [_checked(found) for found in scores], features


class Pending:
  """Pictures whose scores are under way."""

  def __init__(self, scorer: Scorer, tasks: list[Task], pictures: list[np.ndarray | str], futures: list[concurrent.futures.Future | None]):
    self.tasks, self.pictures, self.futures, self._scorer = tasks, pictures, futures, scorer

  def finish(self) -> tuple[list[dict[str, Any]], np.ndarray | None]:
    """As `Scorer.finish`."""
    return self._scorer.finish(self)


def num_cores(cgroup: pathlib.Path = pathlib.Path("/proc/self/cgroup"), root: pathlib.Path = pathlib.Path("/sys/fs/cgroup")) -> int:
  """Number of cores that this process may use, at least one: by its affinity and, on Linux, by `cpu.max` of its control group (version 2) and of
  those that this one is in.

  Args: what names the group of this process; where groups are mounted.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  names = [line[3:] for line in cgroup.read_text().split("\n") if line.startswith("0::")] if cgroup.is_file() else []
  place = root / names[0].lstrip("/") if names else root
  for folder in (place, *place.parents):
    if folder.is_relative_to(root) and (folder / "cpu.max").is_file():
      quota, period = (folder / "cpu.max").read_text().split()
      cores = cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period)))
  return max(1, cores)


def _start(num: int) -> concurrent.futures.ProcessPoolExecutor:
  return concurrent.futures.ProcessPoolExecutor(num, multiprocessing.get_context("spawn"), _begin)


def _end(pool: concurrent.futures.ProcessPoolExecutor | None) -> None:
  """Ends a pool; what waits there is cancelled."""
  if pool is not None:
    pool.shutdown(cancel_futures=True)


def _kill(pool: concurrent.futures.ProcessPoolExecutor | None) -> None:
  """Ends a pool without waiting for what it is at."""
  for process in list(pool._processes.values()) if pool else ():
    process.kill()
  _end(pool)


def _late() -> dict[str, Any]:
  return {ERROR: f"its score took more than {LATE_S:.0f} s"}


def _begin() -> None:
  """A process of the pool has one core; what it scores with must not ask for all of them. It ends with its parent, however that ends."""
  end_with_parent()
  for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
  os.environ["JAX_PLATFORMS"] = "cpu"  # a device has one owner


def _score(score: Any, task: Task, picture: np.ndarray) -> Mapping[str, Any]:
  try:
    return score(task, picture)
  except (ValueError, OSError) as error:  # what the contract calls a picture that cannot be scored
    return {ERROR: " ".join(str(error).split())}


def _checked(scores: Mapping[str, Any]) -> dict[str, Any]:
  """Scores as JSON can hold them; an error alone where there is one or where a metric is not finite."""
  if ERROR in scores:
    return {ERROR: str(scores[ERROR])}
  wrong = [name for name, value in metrics_of(scores).items() if not math.isfinite(value)]
  return {ERROR: f"{', '.join(wrong)} is not finite"} if wrong else {name: _plain(value) for name, value in scores.items()}


@functools.singledispatch
def _plain(value: Any) -> Any:
  """A value as JSON knows it."""
  return value


@_plain.register(np.generic)
@_plain.register(np.ndarray)
def _(value: Any) -> Any:
  return value.tolist()


@_plain.register(tuple)
@_plain.register(list)
def _(value: Sequence[Any]) -> list[Any]:
  return [_plain(one) for one in value]


@_plain.register(dict)
def _(value: Mapping[str, Any]) -> dict[str, Any]:
  return {name: _plain(one) for name, one in value.items()}
