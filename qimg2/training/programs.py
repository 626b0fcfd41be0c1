"""The compiled steps of a stage, one for each bucket, each there when a step first needs it.

A stage of the published size has up to 64 of them, and the compiler takes minutes for each. So they are compiled by threads in the order in which the
steps need them, while those that are there already train. Nothing that is computed depends on when a program is there.
"""

import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

CPUS_PER_THREAD = 16  # the compiler is partly parallel itself, and the loader needs the others
MAX_THREADS = 8
_THREAD = "compile-step"  # beginning of the threads' names


class StepPrograms:
  """Programs by the number of their bucket."""

  def __init__(self, compile_one: Callable[[int], Any], order: Iterable[int]):
    """Args: what compiles the program of a bucket, called in other threads; numbers of all buckets, in the order in which they are needed."""
    self._pool = concurrent.futures.ThreadPoolExecutor(num_threads(os.cpu_count() or 1), _THREAD)
    self._futures = {bucket: self._pool.submit(compile_one, bucket) for bucket in order}

  def is_ready(self, bucket: int) -> bool:
    """Whether the program of a bucket is there."""
    return self._futures[bucket].done()

  def __getitem__(self, bucket: int) -> Any:
    """The program of a bucket, as soon as it is there.

    Raises:
      Exception: what the compiler raised.
    """
    return self._futures[bucket].result()

  def wait(self, what: str, num: int) -> None:
    """Waits for the `num` that are needed first, with a bar that says `what`.

    Raises:
      Exception: what the compiler raised first.
    """
    for bucket in tqdm(list(self._futures)[:num], desc=what, unit="bucket", disable=None, leave=False):
      self._futures[bucket].result()

  def close(self) -> None:
    """Gives up what is not yet being compiled. A compilation that is under way goes on, and what it gives is not used."""
    self._pool.shutdown(wait=False, cancel_futures=True)


def is_compiling() -> bool:
  """Whether a thread of this process is still compiling. Python would wait for it at its end, for minutes."""
  return any(thread.name.startswith(_THREAD) for thread in threading.enumerate())


def num_threads(num_cpus: int) -> int:
  """How many programs are compiled at once on a machine with so many processors."""
  return max(1, min(MAX_THREADS, num_cpus // CPUS_PER_THREAD))
