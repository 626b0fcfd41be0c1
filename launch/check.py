"""Automatic checks: prompts whose right answer is known are drawn, and the pictures are compared with clean renders.

  glyphs   200 held-out (glyph, ink, paper) triples: is the nearest of all clean renders the prompted one, in glyph, ink and paper? And the
           same for 100 held-out edits, where the stage learns them, and whether the picture is nearer to what was asked than to its source.
  emoji    is the picture nearest, by pixel correlation, to the prompted emoji among 100 candidates? And is an edited one nearest to what was
           asked, among its source and everything that the source could be turned into?

  python -m launch.check --workdir=runs/quickstart
"""


from absl import flags

from launch import cli
from qimg2.runtime import processes
from qimg2.runtime.run import load_run
from qimg2.runtime.suites import check, describe


def define_flags() -> None:
  """The flags of this launcher."""
  flags.DEFINE_string("workdir", None, "Folder of the run, as given to launch.train.", required=True)
  flags.DEFINE_string("stage", "", "Stage to check; the last trained one when empty.")
  cli.define_process_flags()


def main(_) -> None:
  """Checks as the flags say and prints the result."""
  result = check(load_run(flags.FLAGS.workdir), flags.FLAGS.stage)
  if processes.is_first():
    print(describe(result))


if __name__ == "__main__":
  cli.run(cli.together(main), define_flags)
