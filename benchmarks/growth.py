"""How our train step grows: seconds and memory against tokens, rows, layers and the number of buckets.

  python -m benchmarks.growth [--what=tokens,batch,depth,buckets] [--size=20M] [--rounds=3] [--json=F]

Each series changes one thing, and its points take turns in one process. "of FLOPs" is by how much the seconds grew from the point before, over by how
much the model FLOPs did: 1 is proportional, below 1 is better. "of size" is the same of the memory that the step needs beside weights, optimizer
state and batch, over the growth of tokens, rows or layers. A bucket costs a compiled program: their seconds are added up.
"""

import dataclasses

import jax
from absl import flags

from benchmarks import step, timing
from launch import cli

SERIES = {
    "tokens": [dict(side=side) for side in (8, 16, 32)],
    "batch": [dict(batch=rows) for rows in (1, 2, 4, 8)],
    "depth": [dict(num_layers=layers) for layers in (2, 4, 8)],
}
WHAT = (*SERIES, "buckets")
START = dict(side=16, batch=2, num_layers=4)  # of what a series does not change


def point(name: str, side: int, batch: int, num_layers: int) -> tuple[step.Size, dict]:
  """A size and a batch for it, text to image."""
  size = step.SIZES[name]()
  size = dataclasses.replace(size, side=side, model=dataclasses.replace(size.model, num_layers=num_layers))
  return size, jax.device_put(step.make_batch(size, batch, edit=False, seed=0))


def measure(name: str, what: str, rounds: int) -> list[dict]:
  """The rows of one series."""
  points = [point(name, **START | change) for change in SERIES[what]]
  programs = [step.compiled_step(*one) for one in points]
  ways = {str(number): program.way(batch) for number, (program, (_, batch)) in enumerate(zip(programs, points))}
  memory = [program.step.memory_analysis().temp_size_in_bytes for program in programs]
  times = list(timing.take_turns(ways, rounds).values())
  rows = []
  for number, (program, change) in enumerate(zip(programs, SERIES[what])):
    key, value = next(iter(change.items()))
    row = {"what": what, "key": key, "value": value, "seconds": times[number].median, "spread": times[number].spread, "flops": program.flops,
           "temp_bytes": memory[number], "compile_s": program.compile_s}
    if number:
      before = rows[-1]
      row["of_flops"] = row["seconds"] / before["seconds"] / (row["flops"] / before["flops"])
      tokens = lambda side: side**2 + step.SIZES[name]().words
      grew = tokens(value) / tokens(before["value"]) if what == "tokens" else value / before["value"]
      row["of_size"] = row["temp_bytes"] / before["temp_bytes"] / grew
    rows.append(row)
  return rows


def buckets(name: str) -> list[dict]:
  """Seconds of compiling one, two and three buckets, which differ in their side."""
  rows, total = [], 0.0
  for number, side in enumerate((8, 12, 16), start=1):
    total += step.compiled_step(*point(name, **START | dict(side=side))).compile_s
    rows.append({"what": "buckets", "key": "buckets", "value": number, "compile_s": total})
  return rows


def describe(row: dict) -> str:
  """A row as a line."""
  text = f"{row['what']:9}{row['key']:>11} {row['value']:>4}"
  if "seconds" in row:
    text += f"{row['seconds']:9.3f} ±{row['spread'] / 2:4.0%}{row['flops'] / 1e9:9.1f}{row['temp_bytes'] / 1e6:9.1f}"
    text += f"{row['of_flops']:9.2f}{row['of_size']:8.2f}" if "of_flops" in row else f"{'':17}"
  else:
    text += f"{'':50}"
  return f"{text}{row['compile_s']:10.1f}"


def define_flags() -> None:
  """The flags of this benchmark."""
  flags.DEFINE_list("what", list(WHAT), f"Any of {', '.join(WHAT)}.")
  flags.DEFINE_enum("size", "20M", list(step.SIZES), "Widths of the generator.")
  flags.DEFINE_integer("rounds", 3, "Timed steps of each point.", lower_bound=1)
  flags.DEFINE_string("json", "", "File for the rows.")


def main(_) -> None:
  """Prints the tables."""
  args = flags.FLAGS
  timing.check_choices(what=(args.what, WHAT))
  print(f"{'what':9}{'':11} {'':>4}{'s':>9}{'':6}{'GFLOP':>9}{'MB':>9}{'of FLOPs':>9}{'of size':>8}{'compile s':>10}")
  rows = []
  for what in args.what:
    rows += (some := buckets(args.size) if what == "buckets" else measure(args.size, what, args.rounds))
    print("\n".join(map(describe, some)), flush=True)
  timing.write_json(args.json, rows)


if __name__ == "__main__":
  cli.run(main, define_flags)
