"""Shows what a stage's training will see, batch by batch, without building a network.

  python -m launch.inspect_data --config=configs/quickstart.py --stage=sft --num_batches=20 [--start=1000] [--out=sheet.png] [--summary]
  python -m launch.inspect_data --config=configs/pretrain.py --num_processes=4 --process_id=1

Each line on stdout is one batch as JSON: its number, stage, data set, task, bucket, and the ids of the samples that this process loads. That is
the plan, and no picture is read for it. --truth adds what the records of these samples say of their pictures, which is what rewards are told. --out
reads the batches and draws them: for each sample the condition images, then the target, and below them the prompt that the batch's tokens say.
--summary prints to stderr what became of the records, how the batches divide over data sets, tasks and buckets, and how much of the prompts is
padding.
"""

import json
import sys
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags

from launch import cli
from qimg2.runtime.config import parse
from qimg2.runtime.inspection import open_data, plan, sheet, summary, table, truths
from qimg2.runtime.sheets import save_picture


def define_flags() -> None:
  """The flags of this launcher."""
  config_flags.DEFINE_config_file("config", None, "File of the config.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_string("stage", "", "Name of the stage; empty for the config's first.")
  flags.DEFINE_integer("start", 0, "First batch: the number of steps that training has done before it.", lower_bound=0)
  flags.DEFINE_integer("num_batches", 20, "How many batches.", lower_bound=0)
  flags.DEFINE_integer("num_processes", 1, "Over how many processes the batches are divided.", lower_bound=1)
  flags.DEFINE_integer("process_id", 0, "Which of them to look at.", lower_bound=0)
  flags.DEFINE_string("out", "", "A PNG file to draw the batches into; empty draws nothing.")
  flags.DEFINE_integer("num_tiles", 8, "How many samples of each batch to draw.", lower_bound=1)
  flags.DEFINE_bool("truth", False, "Add to each line what the records of its samples say of their pictures.")
  flags.DEFINE_bool("summary", False, "Print counts and shares to stderr; with --num_batches=0 nothing else.")


def main(_: Sequence[str]) -> None:
  """Shows what the flags say."""
  args = flags.FLAGS
  jax.config.update("jax_platforms", "cpu")  # training may be using the accelerators
  data = open_data(parse(args.config), args.stage, (args.process_id, args.num_processes))
  for row in plan(data, args.start, args.num_batches):
    print(json.dumps(row | ({"truth": truths(data, row["batch"])} if args.truth else {}), ensure_ascii=False))
  if args.summary:
    print(table(summary(data)), file=sys.stderr)
  if args.out:
    save_picture(sheet(data, args.start, args.num_batches, args.num_tiles), args.out)


if __name__ == "__main__":
  cli.run(main, define_flags)
