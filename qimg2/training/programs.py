"""The compiled steps of a stage, one for each bucket, each there when a step first needs it.

A stage of the published size has up to 64 of them, and the compiler takes minutes for each. So they are compiled by threads in the order in which the
steps need them, while those that are there already train. Nothing that is computed depends on when a program is there.
"""

import concurrent.futures
import dataclasses
import os
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
from tqdm import tqdm

from qimg2.training.faults import exchange

CPUS_PER_THREAD = 16  # the compiler is partly parallel itself, and the loader needs the others
MAX_THREADS = 8
WORDS = ("stop", "save")  # what a wait for a program may be broken off for
POLL_S = 0.2
_THREAD = "compile-step"  # beginning of the threads' names


@dataclasses.dataclass(frozen=True)
class Part:
  """A program of a stage that is not compiled yet.

  Attributes:
    function, arguments: a jitted function and its abstract arguments.
    times: how often a step calls it, or a run of another program.
    beside: abstract arrays that are on the devices while it runs, and none of its arguments.
    key: equal for equal programs of several buckets; None where each has its own.
  """
  function: Any
  arguments: tuple
  times: int = 1
  beside: Any = ()
  key: Hashable = None

  def compile(self, options: dict[str, Any]) -> jax.stages.Compiled:
    """The program. Nothing is run."""
    return self.function.lower(*self.arguments).compile(compiler_options=options)


@dataclasses.dataclass(frozen=True)
class WholeStep:
  """A step as one compiled program, which nothing cuts."""
  program: Callable[..., Any]

  def __call__(self, state: Any, frozen: dict, batch: dict, is_dropped: Callable[[], bool]) -> tuple[Any, dict]:
    """Dispatches the step and returns (state, metrics)."""
    del is_dropped
    return self.program(state, frozen, batch)


@dataclasses.dataclass(frozen=True)
class SplitStep:
  """A step as compiled programs: `begin` makes sums, `add`, called `num` times, adds a micro-batch to them, `end` updates."""
  begin: Callable[..., Any]
  add: Callable[..., Any]
  end: Callable[..., Any]
  num: int

  def __call__(self, state: Any, frozen: dict, batch: dict, is_dropped: Callable[[], bool]) -> tuple[Any, dict] | None:
    """Dispatches the step and returns (state, metrics); None, with `state` as it was, where `is_dropped`, asked before each micro-batch, said so.

    One micro-batch is dispatched while another one runs, and no more, so that an answer counts soon. The sums of the step before may still be there
    while it is updated; they are gone before the first micro-batch takes its memory.
    """
    sums, before = self.begin(), state.step
    for _ in range(self.num):
      if is_dropped():
        return None
      sums, done = self.add(state, frozen, batch, sums)
      jax.block_until_ready(before)
      before = done
    return self.end(state, sums)


class StepPrograms:
  """Programs by the number of their bucket. Several processes wait for them together (`wait_for`), so that all go on, or none."""

  def __init__(self, compile_one: Callable[[int], Any], order: Iterable[int]):
    """Args: what compiles the program of a bucket, called in other threads; numbers of all buckets, in the order in which they are needed."""
    self._pool = concurrent.futures.ThreadPoolExecutor(num_threads(os.cpu_count() or 1), _THREAD)
    self._futures = {bucket: self._pool.submit(compile_one, bucket) for bucket in order}
    self._there: set[int] = set()

  def is_there(self, bucket: int) -> bool:
    """Whether `wait_for` has said that all processes have the program of a bucket; the same on all."""
    return bucket in self._there

  def __getitem__(self, bucket: int) -> Any:
    """The program of a bucket, as soon as it is there.

    Raises:
      Exception: what the compiler raised.
    """
    return self._futures[bucket].result()

  def wait_for(self, bucket: int, look: Callable[[], str] = lambda: "") -> str:
    """"" as soon as all processes have the program of a bucket; before that the first word, in the order of `WORDS`, that `look` gave on any of them.
    All of them must call it alike, and hear the same.

    Raises:
      Exception: what the compiler raised.
    """
    if bucket not in self._there:
      while not (word := look()) and not concurrent.futures.wait([self._futures[bucket]], POLL_S).done:
        pass
      said = exchange(word)
      if words := [word for word in WORDS if word in said]:
        return words[0]
      self._futures[bucket].result()
      self._there.add(bucket)
    return ""

  def wait(self, what: str, num: int, look: Callable[[], str] = lambda: "") -> str:
    """`wait_for` the `num` that are needed first, with a bar that says `what`; the first word of one of them, or ""."""
    waiting = (self.wait_for(bucket, look) for bucket in tqdm(list(self._futures)[:num], desc=what, unit="bucket", disable=None, leave=False))
    return next(filter(None, waiting), "")

  def close(self) -> None:
    """Gives up what is not yet being compiled. A compilation that is under way goes on, and what it gives is not used."""
    self._pool.shutdown(wait=False, cancel_futures=True)


def is_compiling() -> bool:
  """Whether a thread of this process is still compiling. Python would wait for it at its end, for minutes."""
  return any(thread.name.startswith(_THREAD) for thread in threading.enumerate())


def num_threads(num_cpus: int) -> int:
  """How many programs are compiled at once on a machine with so many processors."""
  return max(1, min(MAX_THREADS, num_cpus // CPUS_PER_THREAD))
