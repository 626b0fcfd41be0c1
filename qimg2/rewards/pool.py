"""Processes that score pictures while the device works.

Each process has a thread here that hands it one picture at a time and waits no longer than the reward's time-out. A process that is late is killed,
one that died is replaced, and either costs the one number that it was at. A process that takes the place of another and cannot begin, such as where
memory is short, costs the picture; after `MOST_FAILURES` in a row it ends the stage, as the first one does. Numbers come back in the order of the
pictures, whichever was done first.
"""

import concurrent.futures
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection

import numpy as np

from qimg2.rewards import Scored, Task, missing

START_S = 120.0  # for a process to import what it scores with
SETUP_S = 600.0  # for the `setup` of its functions, where nothing else is said
MOST_FAILURES = 3
ONE_CORE = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
OVER = "This process scores no more pictures."


class Process:
  """One process, started at its first picture, and again when it was lost."""

  def __init__(self, functions: Mapping[str, Callable[[np.ndarray, Task], float]], timeouts: Mapping[str, float], setup_s: float = SETUP_S):
    """Args: those of `Pool`."""
    self._functions, self._timeouts, self._setup_s = dict(functions), dict(timeouts), setup_s
    self._has_begun, self._failures = False, 0
    self._process: subprocess.Popen | None = None
    self._connection: Connection | None = None
    self._life = -1
    self._is_over = False

  def score(self, picture: np.ndarray, task: Task, names: Sequence[str]) -> list[Scored]:
    """What the functions of these names say of a picture, in their order.

    Raises:
      ValueError: the first process cannot be started, or the functions cannot be imported there; or several in a row that take its place.
      RuntimeError: `end` was called.
    """
    scored: list[Scored] = []
    while len(scored) < len(names):
      try:
        self.start()
      except ValueError as error:
        self._failures += 1
        if not self._has_begun or self._failures == MOST_FAILURES:
          raise
        return scored + [missing(str(error))] * (len(names) - len(scored))
      try:
        self._connection.send((names[len(scored):], picture, task))
        for name in names[len(scored):]:
          if not self._connection.poll(self._timeouts[name]):
            self.close()
            scored.append(missing(f"it took more than {self._timeouts[name]:g} s"))
            break
          scored.append(self._connection.recv())
      except (EOFError, OSError) as error:
        ended = self._ended()
        if self._is_over:
          raise RuntimeError(OVER) from error
        scored.append(missing(f"the process that scored it ended with {ended}"))
    return scored

  def start(self) -> None:
    """Starts the process unless it runs; see `score` for what it raises."""
    if self._process is None or self._process.poll() is not None:
      self.close()  # it may have ended between two pictures, which is the fault of neither
      self._begin()
    if self._is_over:
      raise RuntimeError(OVER)

  def _begin(self) -> None:
    self._connection, theirs = multiprocessing.Pipe()
    life, self._life = os.pipe()
    environment = {**os.environ, **dict.fromkeys(ONE_CORE, "1"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
      # A session of its own: Ctrl-C lets the running step end, for which its pictures must be scored. What a function prints is no output of ours.
      self._process = subprocess.Popen([sys.executable, "-m", "qimg2.rewards.worker", str(theirs.fileno()), str(life)], env=environment,
                                       pass_fds=(theirs.fileno(), life), stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
    finally:
      theirs.close()
      os.close(life)
    self._greet()

  def _greet(self) -> None:
    """Sends the functions and hears whether they are there, and then whether they are set up."""
    try:
      self._connection.send(self._functions)
      wrong = self._hear(START_S, "it was not ready") or self._hear(self._setup_s, "the setup of its functions was not done")
    except (EOFError, OSError):
      wrong = f"it ended with {self._ended()}"
    if wrong:
      self.close()
      raise ValueError(f"A process that scores pictures cannot begin ({wrong}): mend the functions of the stage's rewards.")
    self._has_begun, self._failures = True, 0

  def _hear(self, most_s: float, late: str) -> str | None:
    return self._connection.recv() if self._connection.poll(most_s) else f"{late} within {most_s:g} s"

  def _ended(self) -> str:
    """How the process, whose pipe is broken, ended."""
    self.close()
    if self._code == -signal.SIGKILL:
      return "SIGKILL, as the system ends one when memory is short"
    return f"code {self._code}"

  def end(self) -> None:
    """Ends the process for good, from any thread; the one that scores with it notices."""
    self._is_over = True
    if (process := self._process) is not None:
      process.kill()

  def close(self) -> None:
    """Ends the process, whatever it is at, and forgets it."""
    if self._process is None:
      return
    self._connection.close()
    os.close(self._life)
    self._process.kill()
    self._code, self._process = self._process.wait(), None


class Pool:
  """Processes that score pictures; a context manager, which ends them."""

  def __init__(self, functions: Mapping[str, Callable[[np.ndarray, Task], float]], timeouts: Mapping[str, float], num_processes: int,
               setup_s: float = SETUP_S):
    """Args:
      functions: name -> function of a picture and a task, see `qimg2.rewards.Reward.score`.
      timeouts: name -> seconds that one number may take.
      num_processes: at least one.
      setup_s: seconds that the `setup` of all functions may take together, in each process.
    """
    self._threads = concurrent.futures.ThreadPoolExecutor(num_processes, "rewards")
    self._processes = [Process(functions, timeouts, setup_s) for _ in range(num_processes)]
    self._free: queue.SimpleQueue[Process] = queue.SimpleQueue()
    for process in self._processes:
      self._free.put(process)

  def __enter__(self) -> "Pool":
    return self

  def __exit__(self, *_) -> None:
    for process in self._processes:
      process.end()
    self._threads.shutdown(cancel_futures=True)
    for process in self._processes:
      process.close()

  def start(self) -> None:
    """Starts one of the processes, so that functions that are not there are noticed; `ValueError` says which."""
    self._with_process(Process.start)

  def begin(self, pictures: Sequence[np.ndarray], tasks: Sequence[Task], names: Sequence[Sequence[str]]) -> list[concurrent.futures.Future]:
    """Begins to score pictures, each by the functions of its names; each future gives `Process.score` of one."""
    return [self._threads.submit(self._with_process, Process.score, picture, task, some) for picture, task, some in zip(pictures, tasks, names)]

  def _with_process(self, do: Callable, *args):
    process = self._free.get()
    try:
      return do(process, *args)
    finally:
      self._free.put(process)
