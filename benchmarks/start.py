"""How long it takes to get going: imports, from the command to the first step, a restart, and what a checkpoint holds up.

  python -m benchmarks.start [--what=help,train] [--rounds=3] [--run_config=configs/quickstart.py] [--stage=low_resolution] [--json=F]

  help   each launcher's `--help`, beside `import jax` alone
  train  one stage of the config, with random weights in place of those it would start from, for a few steps: with an empty folder of compiled
         programs (cold), with the same folder again (warm), and once more to go on from its last checkpoint (restart). "first step" is the time
         from the command until that step's metrics are on disk. "save" is what a checkpoint in the middle of the restart holds up: the time of the
         call, and by how much the steps after it, beside which it is written, take longer than those before; as a share of the time between two
         saves at the stage's own interval

Processes of the ways take turns, and data is prepared before. Steps are the stage's own, so a share depends on how long they take.
"""

import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags

from benchmarks import timing
from launch import cli

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 3  # of the cold and of the warm start
SAVED, LONGER = 23, 43  # when the restart saves, and where it ends
CONFIG = """
import importlib.util

def get_config(arg=""):
  spec = importlib.util.spec_from_file_location("whole", {config!r})
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  cfg = module.get_config({argument!r})
  stage, = [one for one in cfg.stages if one.name == {stage!r}]
  cfg.stages, cfg.evals, cfg.data_dir = (stage,), {{}}, {data_dir!r}
  stage.start_from, stage.frozen = "scratch", {{role: "default" for role in stage.frozen}}
  stage.num_steps, stage.save_every_steps, stage.log_every_steps = int(arg), {save_every}, 1
  stage.eval_every_steps = stage.sample_every_steps = 10**6
  return cfg
"""


def launchers() -> list[str]:
  """Modules of `launch` that are commands."""
  return sorted(f"launch.{path.stem}" for path in (ROOT / "launch").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def command(*arguments: str) -> None:
  """Runs Python with these arguments.

  Raises:
    ChildProcessError: it failed.
  """
  done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
  helped = "--help" in arguments and done.returncode == 1 and "--helpfull" in done.stdout  # which absl prints below the flags, and ends with 1
  if done.returncode and not helped:
    raise ChildProcessError(f"{' '.join(arguments)} ended with code {done.returncode}: {done.stderr[-500:]}")


def help_rows(rounds: int) -> list[dict]:
  """Seconds of `--help` of each launcher and of importing jax."""
  ways = {"import jax": ("-c", "import jax"), **{name: ("-m", name, "--help") for name in launchers()}}
  times = timing.take_turns({name: lambda _, given=given: command(*given) for name, given in ways.items()}, rounds, warm_up=1)
  return [{"what": name, "seconds": one.median, "spread": one.spread} for name, one in times.items()]


def train_rows(config: str, stage: str, rounds: int) -> list[dict]:
  """Seconds of a cold start, a warm one and a restart, and the share of saving; medians over rounds."""
  file, _, argument = config.partition(":")
  found = []
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / "one.py").write_text(CONFIG.format(config=str(pathlib.Path(file).resolve()), argument=argument, stage=stage,
                                                 data_dir=str(folder / "data"), save_every=SAVED), encoding="utf-8")
    interval = timing.read_stage(config, stage)[1].save_every_steps
    _start(folder, stage, "data", "any", 1)
    for number in range(rounds):
      cache = f"cache{number}"
      cold, _ = _start(folder, stage, f"cold{number}", cache, STEPS)
      warm, _ = _start(folder, stage, f"warm{number}", cache, STEPS)
      restart, timings = _start(folder, stage, f"warm{number}", cache, LONGER)
      step, save = save_costs(timings)
      found.append({"cold": cold, "warm": warm, "restart": restart, "step": step, "save": save, "save_share": save / (interval * step)})
      for name in (f"cold{number}", f"warm{number}", cache):
        shutil.rmtree(folder / name)
  medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
  spread = lambda name: (max(one[name] for one in found) - min(one[name] for one in found)) / medians[name]
  return [{"what": f"first step, {name}", "seconds": medians[name], "spread": spread(name)} for name in ("cold", "warm", "restart")] + [
      {"what": "step", "seconds": medians["step"], "spread": spread("step")},
      {"what": f"save, {medians['save_share']:.2%} of {interval} steps", "seconds": medians["save"], "spread": spread("save"),
       "share": medians["save_share"]}]


def save_costs(timings: list[dict]) -> tuple[float, float]:
  """(seconds of a step, seconds that a save adds to the loop) of the rows of a run that saved at step `SAVED` and went on to `LONGER`."""
  rows = {row["step"]: row for row in timings if "wall_s" in row and SAVED - 15 < row["step"] < LONGER}
  step = statistics.median(row["wall_s"] for number, row in rows.items() if number < SAVED)
  return step, max(0.0, sum(row["wall_s"] - step for number, row in rows.items() if number >= SAVED))


def _start(folder: pathlib.Path, stage: str, name: str, cache: str, num_steps: int) -> tuple[float, list[dict]]:
  """(seconds until the first step of this start is on disk, rows of timing.jsonl) of a run up to `num_steps`."""
  written = folder / name / stage / "metrics.jsonl"
  before = written.stat().st_size if written.exists() else 0
  with open(folder / "stderr", "w+", encoding="utf-8") as stderr:
    begin, took = time.perf_counter(), None
    process = subprocess.Popen([sys.executable, "-m", "launch.train", f"--config={folder}/one.py:{num_steps}", f"--workdir={folder / name}",
                                f"--compilation_cache={folder / cache}", "--allow_config_change"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
    while process.poll() is None:
      if took is None and written.exists() and written.stat().st_size > before:
        took = time.perf_counter() - begin
      time.sleep(0.02)
    if process.returncode:
      stderr.seek(0)
      raise ChildProcessError(f"launch.train ended with code {process.returncode}: {stderr.read()[-500:]}")
  return took, [json.loads(line) for line in (folder / name / stage / "timing.jsonl").read_text(encoding="utf-8").splitlines()]


def define_flags() -> None:
  """The flags of this benchmark."""
  flags.DEFINE_list("what", ["help", "train"], "Any of help, train.")
  flags.DEFINE_string("run_config", "configs/quickstart.py", "Config of which one stage is started.")
  flags.DEFINE_string("stage", "low_resolution", "That stage.")
  flags.DEFINE_integer("rounds", 3, "Timed starts of each kind.", lower_bound=1)
  flags.DEFINE_string("json", "", "File for the rows.")


def main(_) -> None:
  """Prints the table."""
  args = flags.FLAGS
  timing.check_choices(what=(args.what, ("help", "train")))
  rows = help_rows(args.rounds) if "help" in args.what else []
  rows += train_rows(args.run_config, args.stage, args.rounds) if "train" in args.what else []
  for row in rows:
    print(f"{row['what']:36}{row['seconds']:9.2f} s ±{row['spread'] / 2:4.0%}")
  timing.write_json(args.json, rows, config=args.run_config, stage=args.stage)


if __name__ == "__main__":
  cli.run(main, define_flags)
