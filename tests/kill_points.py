"""Kills a run of several processes with SIGKILL at random moments, starts it again each time, and compares all that it ends with, bit for bit, with a
run that nothing stopped.

  python tests/kill_points.py --workdir=runs/kills [--config=configs/quickstart.py:smoke] [--num_kills=20] [--num_processes=2] [--seed=0]

A moment is drawn over the time that the uninterrupted run took. Half of the times one process dies, and the others must end by themselves; half of
the times all die at once. A run that is done before it is killed is compared and begun anew.
"""

import dataclasses
import pathlib
import signal
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from many import PATIENCE_S, ends, start, together, train

from qimg2.training.faults import EXIT_CODE
from qimg2.training.metrics import read_rows


@dataclasses.dataclass(frozen=True)
class Job:
  """A training command: `command(workdir)` gives what each of its processes is started with."""
  command: Callable[[pathlib.Path], list[str]]
  num_processes: int


def kill_and_compare(job: Job, folder: pathlib.Path, num_kills: int, seed: int) -> int:
  """Kills a run `num_kills` times; returns how many runs came to their end and were compared. Says each kill on stdout.

  Raises:
    AssertionError: a run ended otherwise than it should, or with another bit.
  """
  rng, whole = np.random.default_rng(seed), folder / "whole"
  begin = time.monotonic()
  together(job.num_processes, *job.command(whole))
  length, num_kill, num_runs = time.monotonic() - begin, 0, 0
  while num_kill < num_kills:
    workdir = folder / f"cut{num_runs}"
    started, delay = start(job.num_processes, *job.command(workdir)), rng.uniform(0, length)
    victims = started if rng.random() < 0.5 else [started[rng.integers(len(started))]]
    end = time.monotonic() + delay
    while time.monotonic() < end and any(one.poll() is None for one in started):
      time.sleep(0.01)
    if all(one.poll() is not None for one in started):
      assert all(code == 0 for code, _, _ in ends(started, PATIENCE_S))
    else:
      num_kill += 1
      for one in victims:
        one.send_signal(signal.SIGKILL)
      _check_survivors(started, victims)
      print(f"kill {num_kill}: {len(victims)} of {len(started)} after {delay:.1f} s, at {_place(workdir)}", flush=True)
      if num_kill < num_kills:
        continue
      together(job.num_processes, *job.command(workdir))
    assert_same_bits(whole, workdir)
    num_runs += 1
  print(f"{num_kill} kills, {num_runs} runs that came to their end with the bits of the uninterrupted one", flush=True)
  return num_runs


def _check_survivors(started: list, victims: list) -> None:
  """Those that were not killed end by themselves, with a code that says: again. One that was just done, or not yet connected, may end otherwise."""
  for one, (code, _, stderr) in zip(started, ends(started, PATIENCE_S)):
    if one not in victims:
      assert code in (0, EXIT_CODE), f"A survivor ended with {code}: {stderr[-2000:]}"


def _place(workdir: pathlib.Path) -> str:
  """How far the run came: the stage that wrote last, and its last step."""
  files = sorted(workdir.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
  rows = [row["step"] for row in read_rows(files[-1])] if files else []
  return f"{files[-1].parent.name} step {rows[-1] if rows else 0}" if files else "its start"


def assert_same_bits(one: pathlib.Path, other: pathlib.Path) -> None:
  """Checks that two runs have the same metrics, to the byte, and the same arrays in the last checkpoint of every stage.

  Raises:
    AssertionError: they have not.
  """
  stages = sorted(path.parent.name for path in one.glob("*/metrics.jsonl"))
  assert stages and stages == sorted(path.parent.name for path in other.glob("*/metrics.jsonl"))
  for stage in stages:
    assert (one / stage / "metrics.jsonl").read_bytes() == (other / stage / "metrics.jsonl").read_bytes(), stage
    jax.tree.map(np.testing.assert_array_equal, last_arrays(one / stage), last_arrays(other / stage))


def last_arrays(stage: pathlib.Path) -> dict:
  """All arrays of the newest checkpoint of a stage, see `arrays`."""
  return arrays(stage, max(int(path.name) for path in (stage / "checkpoints").iterdir() if path.name.isdigit()))


def arrays(stage: pathlib.Path, step: int) -> dict:
  """All arrays of a checkpoint of a stage, whole and in this process, whatever devices saved them."""
  trees = {}
  for item in (path for path in (stage / "checkpoints" / str(step)).iterdir() if path.is_dir() and path.name != "meta"):
    reader = ocp.PyTreeCheckpointer()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(item).item_metadata.tree)
    trees[item.name] = reader.restore(item, restore_args=as_numpy)
  assert len(trees) >= 2
  return trees


def main(_) -> None:
  """Kills as the flags say."""
  args = flags.FLAGS
  logging.set_verbosity(logging.ERROR)
  folder = pathlib.Path(args.workdir)
  job = Job(lambda workdir: train(args.config, workdir, str(folder / "compiled"), f"--config.data_dir={folder / 'data'}"), args.num_processes)
  kill_and_compare(job, folder, args.num_kills, args.seed)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Folder, new.", required=True)
  flags.DEFINE_string("config", "configs/quickstart.py:smoke", "Config of the run.")
  flags.DEFINE_integer("num_kills", 20, "How often to kill.", lower_bound=1)
  flags.DEFINE_integer("num_processes", 2, "Processes.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Of the moments.")
  app.run(main)
