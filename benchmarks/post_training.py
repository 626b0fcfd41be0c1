"""What each method of post-training gains on the quickstart's glyphs: trained from several seeds, evaluated, compared with where it began.

  python -m benchmarks.post_training --half=runs/half --out=runs/gains [--methods=grpo,nft,sft+lora --seeds=0,1,2] [--plot=curves.png]

Runs `launch.train --config=configs/post_training.py:METHOD:HALF` and `launch.evaluate` for each method and seed, each in a process of its own; what
is done already is not done again, so the same command goes on. The prompts are 200 held-out ones, drawn twice and without guidance.

  right     share of pictures with the right shape, of each seed and over all of them
  gain      what that is above the start, in points, with its 95 % interval over prompts; the start's pictures have the same noise
  ink, paper  the same gain of parts that are watched
  minutes   of a run's training, by its own clock

`--plot` draws the mean reward of each run over its steps, each point a mean over `SMOOTH` logged ones.
"""

import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from benchmarks import timing
from configs.post_training import LORA, METHODS
from launch import cli
from qimg2.evaluation import ERROR, Figure
from qimg2.evaluation.statistics import paired
from qimg2.runtime.evaluating.folder import read_lines
from qimg2.runtime.evaluating.summary import scores_of
from qimg2.runtime.report import figure_png
from qimg2.training.metrics import read_rows

ROOT = pathlib.Path(__file__).parent.parent
PARTS = ("glyph", "ink", "paper")
REWARD = "reward/glyph"
SMOOTH = 5
Row = Mapping[str, Any]


def run(*command: str) -> None:
  """Runs a module of this project to its end.

  Raises:
    ValueError: it failed; with the last line that it said.
  """
  done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  if done.returncode:
    said = done.stdout.strip().splitlines() or ["nothing was said"]
    raise ValueError(f"python -m {' '.join(command)} ended with code {done.returncode}: {said[-1]}")


def evaluate(workdir: pathlib.Path, num_prompts: int) -> list[Row]:
  """The lines of scores.jsonl of a run's last stage."""
  out = workdir / "scores"
  if not (out / "summary.json").exists():
    run("launch.evaluate", f"--workdir={workdir}", "--suite=glyphs", f"--num_prompts={num_prompts}", "--seeds=0,1", "--guidance=1", f"--out={out}")
  return [row for row in read_lines(out / "scores.jsonl") if ERROR not in row]


def train(method: str, seed: int, half: pathlib.Path, workdir: pathlib.Path, more: Sequence[str] = ()) -> None:
  """Trains a method from a run, or goes on with it."""
  config = f"--config=configs/post_training.py:{method}:{half}"
  run("launch.train", config, f"--config.seed={seed}", "--config.evals={}", f"--workdir={workdir}", *more)


def gain(after: Sequence[Row], before: Sequence[Row], part: str) -> paired.Comparison:
  """How much larger the share of pictures with the right `part` is after training."""
  return paired.compare(scores_of(Figure(part), after), scores_of(Figure(part), before))


def in_points(found: paired.Comparison) -> str:
  """Such as "+15.2 [11.0, 19.5]"."""
  interval = "" if found.low is None else f" [{100 * found.low:.1f}, {100 * found.high:.1f}]"
  return f"{100 * found.value:+.1f}{interval}"


def table_row(method: str, runs: Sequence[Sequence[Row]], before: Sequence[Row], minutes: Sequence[float]) -> str:
  """A line of the table: `runs` are the scores of each seed."""
  share = lambda rows: 100 * statistics.mean(row["metrics"][PARTS[0]] for row in rows)
  pooled = [row for rows in runs for row in rows]
  gains = [in_points(gain(pooled, before, part)) for part in PARTS]
  return f"| {method} | {', '.join(f'{share(rows):.1f}' for rows in runs)} | {share(pooled):.1f} % | {' | '.join(gains)} | {max(minutes):.1f} |"


def minutes_of(stage: pathlib.Path) -> float:
  """Minutes between the first and the last step, by the seconds of each that the run wrote down."""
  return sum(row["wall_s"] for row in read_rows(stage / "timing.jsonl") if "wall_s" in row) / 60


def smoothed(rows: Sequence[Row], name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """(steps, means of a metric over `SMOOTH` logged rows before each)."""
  found = [(row["step"], row[name]) for row in rows if name in row]
  values = [value for _, value in found]
  return tuple(float(step) for step, _ in found), tuple(statistics.mean(values[max(0, i + 1 - SMOOTH):i + 1]) for i in range(len(values)))


def main(_: Sequence[str]) -> None:
  """The command; see the module docstring."""
  f = flags.FLAGS
  timing.check_choices(methods=([one.removesuffix(LORA) for one in f.methods], METHODS))
  out, half = pathlib.Path(f.out), pathlib.Path(f.half)
  more = [f"--config.data_dir={f.data_dir}"] if f.data_dir else []
  before = evaluate(half, f.num_prompts)
  print(_start(before), flush=True)
  print(f"| method | right, %, of each seed | all | gain | ink | paper | minutes |\n|{'---|' * 7}", flush=True)
  curves = {}
  for method in f.methods:
    runs, minutes = [], []
    for seed in map(int, f.seeds):
      workdir = out / f"{method}-{seed}"
      if not (workdir / "scores" / "summary.json").exists():
        train(method, seed, half, workdir, more)
      runs.append(evaluate(workdir, f.num_prompts))
      stage = workdir / method.removesuffix(LORA)
      minutes.append(minutes_of(stage))
      curves |= {f"{method}, seed {seed}": smoothed(list(read_rows(stage / "metrics.jsonl")), REWARD)}
    print(table_row(method, runs, before, minutes), flush=True)
  if f.plot:
    pathlib.Path(f.plot).write_bytes(figure_png({name: curve for name, curve in curves.items() if curve[0]}, REWARD, False))


def _start(rows: Sequence[Row]) -> str:
  share = lambda part: 100 * statistics.mean(row["metrics"][part] for row in rows)
  return f"The start: {', '.join(f'{part} {share(part):.1f} %' for part in PARTS)}\n"


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_string("half", None, "Run to start from, what configs/post_training.py:half made.", required=True)
  flags.DEFINE_string("out", None, "Folder of the runs.", required=True)
  flags.DEFINE_list("methods", ["grpo", "guard", "nft", "dpo"], "Methods of configs/post_training.py, with commas between.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, with commas between.")
  flags.DEFINE_integer("num_prompts", 200, "Held-out prompts.", lower_bound=1)
  flags.DEFINE_string("data_dir", "", "Folder of the data sets; by default the config's.")
  flags.DEFINE_string("plot", "", "PNG file for the curves.")


if __name__ == "__main__":
  cli.run(main, define_flags)
