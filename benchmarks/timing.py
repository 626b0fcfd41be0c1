"""What the benchmarks share: ways that take turns, medians with their spread, and the limits of this machine measured in the same process.

Every figure is a ratio of times from one process in which the ways run one after the other, again and again, so that whatever else the machine does
hits all of them. The order changes from round to round. The first calls, which compile, are left out.
"""

import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

REST_S = 0.25  # between two ways: threads that wait for work of the one before must have gone to sleep


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of each round of one way."""
  seconds: tuple[float, ...]

  @property
  def median(self) -> float:
    """Of the rounds."""
    return statistics.median(self.seconds)

  @property
  def spread(self) -> float:
    """(largest - smallest) / median."""
    return (max(self.seconds) - min(self.seconds)) / self.median


def take_turns(ways: Mapping[str, Callable[[int], Any]], rounds: int, warm_up: int = 2) -> dict[str, Times]:
  """Name -> times of `way(round)`, which returns when its work is done. `round` counts from 0, warm-up included: inputs may differ by it."""
  found = {name: [] for name in ways}
  for number in range(warm_up + rounds):
    names = list(ways)
    start = number % len(names)
    for name in names[start:] + names[:start]:
      time.sleep(REST_S)
      begin = time.perf_counter()
      ways[name](number)
      took = time.perf_counter() - begin
      if number >= warm_up:
        found[name].append(took)
  return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def matrix_rates(size: int = 2048, rounds: int = 7, dtype: str = "float32", torch: Any = None) -> dict[str, float]:
  """The largest rate of a square matrix product in FLOP/s, of XLA and, where the module is given, of torch."""
  a, b = (jax.random.normal(jax.random.key(seed), (size, size)).astype(dtype) for seed in range(2))
  product = jax.jit(jnp.matmul)
  ways = {"xla": lambda _: jax.block_until_ready(product(a, b))}
  if torch is not None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    ways["torch"] = lambda _: synchronize(torch, torch.matmul(x, y))
  times = take_turns(ways, rounds)
  return {name: 2 * size**3 / min(one.seconds) for name, one in times.items()}


def copy_bandwidth(size: int = 2**26, rounds: int = 5) -> float:
  """Bytes per second that adding one to a large float32 array reads and writes."""
  x = jnp.zeros(size, jnp.float32)
  add = jax.jit(lambda x: x + 1)
  times = take_turns({"add": lambda _: jax.block_until_ready(add(x))}, rounds)
  return 8 * size / min(times["add"].seconds)


def synchronize(torch: Any, result: Any) -> Any:
  """`result`, once the device is done with it."""
  if torch.cuda.is_available():
    torch.cuda.synchronize()
  return result


def geometric_mean(values: list[float]) -> float:
  """Of ratios."""
  return math.exp(statistics.fmean(map(math.log, values)))


def write_json(path: str, rows: list[dict], **about: Any) -> None:
  """Writes rows, the device and what else is said of the run; nothing where `path` is empty."""
  if path:
    about |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    pathlib.Path(path).write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")
