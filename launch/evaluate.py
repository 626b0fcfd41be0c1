"""Evaluates a stage of a run: held-out prompts of the suites in its config are drawn, and the pictures are scored (qimg2/runtime/suites.py).

  python -m launch.evaluate --workdir=runs/quickstart
"""

from absl import flags

from launch import cli
from qimg2.runtime import processes
from qimg2.runtime.run import load_run
from qimg2.runtime.suites import describe, evaluate


def define_flags() -> None:
  """The flags of this launcher."""
  flags.DEFINE_string("workdir", None, "Folder of the run, as given to launch.train.", required=True)
  flags.DEFINE_string("stage", "", "Stage to evaluate; the last trained one when empty.")
  cli.define_step_flag()
  cli.define_process_flags()


def main(_) -> None:
  """Evaluates as the flags say and prints the result."""
  result = evaluate(load_run(flags.FLAGS.workdir), flags.FLAGS.stage, step=flags.FLAGS.step)
  if processes.is_first():
    print(describe(result))


if __name__ == "__main__":
  cli.run(cli.together(main), define_flags)
