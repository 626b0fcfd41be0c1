"""All rewards of a stage together: pictures and tasks in, numbers out, with every one that is missing counted and explained."""

import collections
import concurrent.futures
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from qimg2.rewards import Reward, Task
from qimg2.rewards.pool import Pool, Scored


class Scorer:
  """Scores pictures with several rewards at once; a context manager, which ends its processes."""

  def __init__(self, rewards: Mapping[str, Reward], timeouts: Mapping[str, float], is_asked: Callable[[str, Task], bool], num_processes: int):
    """Args:
      rewards: by name.
      timeouts: seconds that one picture may take, by name.
      is_asked: whether the reward of a name is asked for a task at all.
      num_processes: of the pool.
    """
    self._rewards, self._is_asked = dict(rewards), is_asked
    self._apart = [name for name, one in rewards.items() if one.score is None]  # those that wait for a service, one thread for each
    functions = {name: one.score for name, one in rewards.items() if one.score is not None}
    self._pool = Pool(functions, timeouts, num_processes) if functions else None
    self._threads = concurrent.futures.ThreadPoolExecutor(max(1, len(self._apart)), "services")

  def __enter__(self) -> "Scorer":
    return self

  def __exit__(self, *exception) -> None:
    if self._pool is not None:
      self._pool.__exit__(*exception)
    self._threads.shutdown(cancel_futures=True)

  def start(self) -> None:
    """Starts a process of the pool; `ValueError` where it cannot score."""
    if self._pool is not None:
      self._pool.start()

  def __call__(self, pictures: np.ndarray, tasks: Sequence[Task]) -> dict[str, np.ndarray]:
    """{name: [B] float32} of pictures [B, H, W, C] uint8 and as many tasks. NaN is what could not be scored, which the log explains, and what was not
    asked for.

    Raises:
      ValueError: a process of the pool cannot begin, or a service cannot be reached.
    """
    asked = {name: [i for i, task in enumerate(tasks) if self._is_asked(name, task)] for name in self._rewards}
    services = {name: self._threads.submit(self._rewards[name].score_batch, pictures[asked[name]], [tasks[i] for i in asked[name]])
                for name in self._apart if asked[name]}
    found: dict[str, dict[int, Scored]] = {name: {} for name in self._rewards}
    for i, scored in self._in_processes(pictures, tasks, asked):
      for name, one in scored.items():
        found[name][i] = one
    for name, future in services.items():
      found[name] = {i: (value, "" if math.isfinite(value) else "the service gave no finite number")
                     for i, value in zip(asked[name], map(float, future.result()), strict=True)}
    for name, values in found.items():
      _explain(name, values, tasks)
    return {name: np.array([values.get(i, (math.nan, ""))[0] for i in range(len(tasks))], np.float32) for name, values in found.items()}

  def _in_processes(self, pictures: np.ndarray, tasks: Sequence[Task], asked: Mapping[str, Sequence[int]]) -> list[tuple[int, dict[str, Scored]]]:
    """(place, {name: what a process says}) of every picture that one is asked about."""
    names = [[name for name in asked if name not in self._apart and i in set(asked[name])] for i in range(len(tasks))]
    some = [i for i, own in enumerate(names) if own]
    if not some:
      return []
    futures = self._pool.begin([pictures[i] for i in some], [tasks[i] for i in some], [names[i] for i in some])
    return [(i, dict(zip(names[i], future.result()))) for i, future in zip(some, futures)]


def _explain(name: str, values: Mapping[int, Scored], tasks: Sequence[Task]) -> None:
  """Says in the log why numbers are missing: one line for each reason, with the first task that it befell."""
  reasons = collections.defaultdict(list)
  for i, (_, why) in values.items():
    if why:
      reasons[why].append(tasks[i])
  for why, missing in reasons.items():
    logging.warning("The reward %s has no number for %d of %d pictures, such as that of sample %s (%r): %s. They are left out.", name, len(missing),
                    len(values), missing[0].get("sample_id", "unknown"), missing[0].get("prompt", ""), why)
