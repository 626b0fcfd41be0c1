"""All rewards of a stage together: pictures and tasks in, numbers out, with every one that is missing counted and explained."""

import collections
import concurrent.futures
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from qimg2.rewards import Reward, Scored, Task, without_pictures
from qimg2.rewards.pool import Pool


class Scorer:
  """Scores pictures with several rewards at once; a context manager, which ends its processes."""

  def __init__(self, rewards: Mapping[str, Reward], timeouts: Mapping[str, float], is_asked: Callable[[str, Task], bool], num_processes: int):
    """Args:
      rewards: by name, those of the host alone.
      timeouts: seconds that one picture may take, by name.
      is_asked: whether the reward of a name is asked for a task at all.
      num_processes: of the pool.
    """
    self._is_asked = is_asked
    self._services = {name: one for name, one in rewards.items() if one.score is None}  # they wait, each in a thread
    self._functions = {name: one for name, one in rewards.items() if one.score is not None}
    self._pool = Pool({name: one.score for name, one in self._functions.items()}, timeouts, num_processes,
                      sum(one.setup_timeout_s for one in self._functions.values()))
    self._threads = concurrent.futures.ThreadPoolExecutor(max(1, len(self._services)), "services")
    self._names = tuple(rewards)

  def __enter__(self) -> "Scorer":
    return self

  def __exit__(self, *exception) -> None:
    self._pool.__exit__(*exception)
    self._threads.shutdown(cancel_futures=True)

  def start(self) -> None:
    """Starts a process of the pool; `ValueError` where it cannot score."""
    if self._functions:
      self._pool.start()

  def __call__(self, pictures: np.ndarray, tasks: Sequence[Task]) -> dict[str, np.ndarray]:
    """{name: [B] float32} of pictures [B, H, W, C] uint8 and as many tasks. NaN is what could not be scored, which the log explains, and what was not
    asked for.

    Raises:
      ValueError: a process of the pool cannot begin.
    """
    asked = {name: [i for i, task in enumerate(tasks) if self._is_asked(name, task)] for name in self._names}
    waiting = {name: self._threads.submit(one.score_batch, pictures[asked[name]], [tasks[i] for i in asked[name]])
               for name, one in self._services.items() if asked[name]}
    found = self._in_processes(pictures, tasks, asked)
    found |= {name: dict(zip(asked[name], future.result(), strict=True)) for name, future in waiting.items()}
    rewards = {name: np.full(len(tasks), np.nan, np.float32) for name in self._names}
    for name, values in found.items():
      rewards[name][list(values)] = [number for number, _ in values.values()]
      _explain(name, values, tasks)
    return rewards

  def _in_processes(self, pictures: np.ndarray, tasks: Sequence[Task], asked: Mapping[str, Sequence[int]]) -> dict[str, dict[int, Scored]]:
    """{name: {place of a picture: what a process says of it}}; a picture goes to one process for all of its rewards."""
    names, found = collections.defaultdict(list), {name: {} for name in self._functions}
    for name in self._functions:
      for i in asked[name]:
        names[i].append(name)
    shown = [tasks[i] if any(self._functions[name].sees_pictures for name in own) else without_pictures(tasks[i]) for i, own in names.items()]
    futures = self._pool.begin([pictures[i] for i in names], shown, list(names.values()))
    for (i, own), future in zip(names.items(), futures):
      for name, scored in zip(own, future.result(), strict=True):
        found[name][i] = scored
    return found


def _explain(name: str, values: Mapping[int, Scored], tasks: Sequence[Task]) -> None:
  """Says in the log why numbers are missing: one line for each reason, with the first task that it befell."""
  reasons = collections.defaultdict(list)
  for i, (number, why) in values.items():
    if not math.isfinite(number):
      reasons[why].append(tasks[i])
  for why, some in reasons.items():
    logging.warning("The reward %s has no number for %d of %d pictures, such as that of sample %s (%r): %s. They are left out.", name, len(some),
                    len(values), some[0].get("sample_id", "unknown"), some[0].get("prompt", ""), why)
