"""Trains the stages of a config, one after the other, and goes on where an earlier call was stopped.

SIGTERM or Ctrl-C saves after the running step and exits with 75; the same command goes on. A second Ctrl-C ends at once.

  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.stages[1].num_steps=10]
  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart --dry_run
"""

import sys

import jax
from absl import flags
from ml_collections import config_flags

from launch import cli
from qimg2.places import find_place
from qimg2.runtime import processes
from qimg2.runtime.config import parse
from qimg2.runtime.curriculum import train
from qimg2.runtime.dry_run import dry_run
from qimg2.training import faults, tracker


def define_flags() -> None:
  """The flags of this launcher."""
  config_flags.DEFINE_config_file("config", None, "File of the config, such as configs/quickstart.py or configs/quickstart.py:smoke.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.", required=True)
  flags.DEFINE_bool("allow_config_change", False, "Go on although the config differs from the one that started the run.")
  flags.DEFINE_bool("allow_version_change", False, "Go on although jax or another package has another version than the one that started the run.")
  flags.DEFINE_bool("allow_data_change", False, "Go on although a data set, or what a latent cache was made of, is not what the run began with.")
  flags.DEFINE_string("compilation_cache", "~/.cache/qimg2", "Folder of compiled programs, kept between runs; empty for none.")
  flags.DEFINE_string("profile", "", "START:STOP: trace these steps of every stage for XProf and Perfetto, into <stage>/profile; counted from 1.")
  flags.DEFINE_enum("tracker", "none", tracker.TRACKERS, "Where metrics, pictures and the config go beside TensorBoard.")
  flags.DEFINE_bool("dry_run", False, "Check everything that costs seconds, say all that is wrong and what would be trained, and train nothing.")
  cli.define_process_flags()


def _parse_window(text: str) -> tuple[int, int] | None:
  first, _, last = text.partition(":")
  if text and not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
    raise ValueError(f"--profile={text} is not understood: give the first and the last step, such as 20:25.")
  return (int(first), int(last)) if text else None


def main(_) -> None:
  """Trains as the flags say."""
  args = flags.FLAGS
  window = _parse_window(args.profile)
  if args.compilation_cache:
    jax.config.update("jax_compilation_cache_dir", str(find_place(args.compilation_cache, "--compilation_cache").expanduser()))
  if args.dry_run:
    lines, wrong = dry_run(parse(args.config), args.workdir, args.allow_config_change, args.allow_version_change, args.allow_data_change,
                           args.tracker)
    print("\n".join([*lines, *(f"WRONG: {sentence}" for sentence in wrong)]))
    if wrong:
      raise ValueError(f"{len(wrong)} thing{'s are' if len(wrong) > 1 else ' is'} wrong, named above; nothing was trained.")
    print("Nothing is wrong; nothing was trained.")
    return
  try:
    run = train(parse(args.config), args.workdir, args.allow_config_change, window, args.allow_version_change,
                args.allow_data_change, args.tracker)
  except faults.Preempted as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(faults.EXIT_CODE)
  if processes.is_first():
    print(f"Report: {run.workdir / 'report.html'}")
    print(f"Samples: {run.workdir}/<stage>/samples/")


if __name__ == "__main__":
  cli.run(cli.together(main), define_flags)
