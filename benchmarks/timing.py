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
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

PEERS = ("eager", "compiled")  # torch's ways
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


def read_stage(run_config: str, name: str) -> tuple[Any, Any]:
  """(what a config file returns, its stage of that name) for FILE or FILE:ARGUMENT.

  Raises:
    ValueError: there is no such file, or no such stage.
  """
  file, _, argument = run_config.partition(":")
  if not pathlib.Path(file).is_file():
    raise ValueError(f"--run_config={file}: there is no such file; give a config such as configs/quickstart.py.")
  found = {}
  exec(compile(pathlib.Path(file).read_text(encoding="utf-8"), file, "exec"), found)
  cfg = found["get_config"](argument)
  stages = {one.name: one for one in cfg.stages}
  if name not in stages:
    raise ValueError(f"--stage={name}, but {file} has the stages {', '.join(stages)}.")
  return cfg, stages[name]


def take_turns(ways: Mapping[str, Callable[[int], Any]], rounds: int, warm_up: int = 2) -> dict[str, Times]:
  """Name -> times of `way(round)`, which returns when its work is done. `round` counts from 0, warm-up included: inputs may differ by it."""
  found, rest_s = {name: [] for name in ways}, REST_S if jax.default_backend() == "cpu" else 0.0  # a GPU that rests slows down
  for number in range(warm_up + rounds):
    names = list(ways)
    start = number % len(names)
    for name in names[start:] + names[:start]:
      time.sleep(rest_s)
      begin = time.perf_counter()
      ways[name](number)
      took = time.perf_counter() - begin
      if number >= warm_up:
        found[name].append(took)
  return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def matrix_rates(rounds: int = 7, dtype: str = "float32", torch: Any = None) -> dict[str, float]:
  """The largest rate of a square matrix product in FLOP/s, of XLA and, where the module is given, of torch."""
  size, repeats = (2048, 1) if jax.default_backend() == "cpu" else (8192, 20)  # so many that to start them takes no time beside them
  a, b = (jax.random.normal(jax.random.key(seed), (size, size)).astype(dtype) for seed in range(2))
  product = jax.jit(jnp.matmul)
  ways = {"xla": lambda _: jax.block_until_ready([product(a, b) for _ in range(repeats)])}
  if torch is not None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    ways["torch"] = lambda _: synchronize(torch, [torch.matmul(x, y) for _ in range(repeats)])
  times = take_turns(ways, rounds)
  return {name: repeats * 2 * size**3 / min(one.seconds) for name, one in times.items()}


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


def check_choices(**chosen: tuple[list[str], Collection[str]]) -> None:
  """Raises a `ValueError` for a value of a list flag that is none of its choices; by the flag's name, (values, choices)."""
  for name, (values, choices) in chosen.items():
    if odd := [value for value in values if value not in choices]:
      raise ValueError(f"--{name}={odd[0]} is unknown: choose among {', '.join(choices)}.")


def numbers(name: str, values: list[str], kind: type = int) -> list:
  """The numbers of a list flag; raises a `ValueError` that names the flag and what is none."""
  try:
    return [kind(value) for value in values]
  except ValueError:
    raise ValueError(f"--{name}={','.join(values)} must be a list of numbers, such as --{name}=1,4.") from None


def limits(dtype: str, rates: Mapping[str, float]) -> str:
  """The device and its largest matrix rates as a line."""
  text = ", ".join(f"{name} {x / 1e9:.0f} GFLOP/s" for name, x in rates.items())
  return f"{jax.devices()[0].device_kind}, {dtype}; matrix products at most {text}"


def columns(times: Mapping[str, Times]) -> dict[str, float]:
  """What a row says of the ways: seconds and spread of each, and the speed of "ours" beside the fastest of the others."""
  row = {f"{way}_s": one.median for way, one in times.items()} | {f"{way}_spread": one.spread for way, one in times.items()}
  others = [one.median for way, one in times.items() if way != "ours"]
  return row | ({"speed": min(others) / times["ours"].median} if others else {})


def heads() -> str:
  """The heads over `cells`."""
  return "".join(f"{way + ' s':>16}" for way in ("ours", *PEERS)) + f"{'speed':>8}"


def cells(row: Mapping[str, float]) -> str:
  """Seconds of each way with their spread, and the speed, of a row made by `columns`."""
  ways = (f"{row[f'{way}_s']:9.3f} ±{row[f'{way}_spread'] / 2:4.0%} " if f"{way}_s" in row else "" for way in ("ours", *PEERS))
  return "".join(f"{way:>16}" for way in ways) + (f"{row['speed']:8.2f}" if "speed" in row else f"{'':8}")


def summary(rows: list[dict], path: str, **about: Any) -> None:
  """Prints the geometric mean of the speeds, and writes the rows."""
  if rows and "speed" in rows[0]:
    peers = " and ".join(peer for peer in PEERS if f"{peer}_s" in rows[0])
    print(f"ours is {geometric_mean([row['speed'] for row in rows]):.2f} times as fast as torch ({peers}, the faster), geometric mean")
  write_json(path, rows, **about)


def geometric_mean(values: list[float]) -> float:
  """Of ratios."""
  return math.exp(statistics.fmean(map(math.log, values)))


def write_json(path: str, rows: list[dict], **about: Any) -> None:
  """Writes rows, the device and what else is said of the run; nothing where `path` is empty."""
  if path:
    about |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)  # what took minutes is not lost for want of a folder
    pathlib.Path(path).write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")
