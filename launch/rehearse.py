"""Compiles the train step of every stage and bucket of a config for a TPU pod, on any x86 Linux machine, and prints what it would need and how
fast it could be. Nothing is allocated, and no picture is read.

  python -m launch.rehearse --config=configs/pretrain.py --topology=v5p:4x4x8 [--stage=pretrain_512] [--task=t2i] [--base_px=512] [--search]

The topology is a chip (v5e, v5p, v6e, tpu7x) and the shape of its slice, and needs `pip install libtpu`; `cpu:8` stands for eight simulated CPU
devices, which have no memory limit and no published rates. With --cost also what the whole curriculum would take, computed from the rows of this call
or, without compiling anything, from those of an earlier one's --json file, --cost --rows=FILE. How to read the table: docs/pods.md.

With --suite and --num_prompts what `launch.evaluate` would take with the config's networks: drawing, and scoring by a judge of its encoder's size,
its vision tower or cores of the host (docs/evaluation.md).

  python -m launch.rehearse --config=configs/pretrain.py --topology=v6e:2x4 --suite=judge,text,text_edits --num_prompts=1000

A stage of a method with rollouts has a row for each phase of its step: what draws, a judge on the device, what makes minibatches, and the updates;
the last lines say what an iteration takes, and which pictures/s rewards on the host must bear.

With --whole the evaluation and what draws samples are compiled, too. Each row counts what else is on the device meanwhile, and the last lines how
many programs a stage compiles.

Buckets come from the config alone, or with --index from the data sets in config.data_dir. From the config: each task of the stage's mixture at each
resolution, with prompts of `num_tokens`, the longest class. One condition image, of the target's own size, goes into an edit. Where the config's
tokenizer cannot be read, the system turn has 12 tokens (one per word and mark of the published template; a real vocabulary may split a word, which
drops one more token and makes the sequence shorter) and a condition image adds 6 tokens of words beside its slots.
"""

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from launch import cli
from qimg2.runtime.config import RunConfig, parse, plain
from qimg2.runtime.rehearsal import cost, evaluation, table
from qimg2.runtime.rehearsal.measure import ChildProcess
from qimg2.runtime.rehearsal.search import RANKS, best, chosen_stages, print_row, rehearse, search
from qimg2.runtime.rehearsal.shapes import Choice
from qimg2.runtime.rehearsal.steps import Rehearsal
from qimg2.runtime.rehearsal.table import Row
from qimg2.runtime.rehearsal.topology import find_devices, num_chips, prepare_environment


def define_flags() -> None:
  """The flags of this launcher."""
  config_flags.DEFINE_config_file("config", None, "File of the config.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_string("topology", None, "Chip and slice, such as v5p:4x4x8 or v6e:16x16; cpu:8 for simulated devices.", required=True)
  flags.DEFINE_integer("num_slices", 1, "Slices. A mesh that fits one of them is repeated along its data axis.", lower_bound=1)
  flags.DEFINE_multi_string("stage", [], "Stages to rehearse; all by default.")
  flags.DEFINE_multi_string("task", [], "Tasks to rehearse, t2i or ti2i; all by default.")
  flags.DEFINE_multi_integer("base_px", [], "Resolutions to rehearse; all by default.")
  flags.DEFINE_bool("all_buckets", False, "All aspect ratios, not only the square and the widest of each resolution.")
  flags.DEFINE_bool("squares", False, "Only the square of each resolution.")
  flags.DEFINE_string("rules", "", "Rule set in place of config.rules; with --search the only one to try.")
  flags.DEFINE_bool("search", False, "Look for the rule set, remat policy and micro-batches that fit with the best bound.")
  flags.DEFINE_enum("rank_by", "serial", list(RANKS), "The bound that --search ranks by: nothing overlaps, or everything does.")
  flags.DEFINE_bool("index", False, "Take the buckets of the stages' data in config.data_dir; without --all_buckets the heaviest of each task alone.")
  flags.DEFINE_bool("whole", False, "Also compile what a stage runs beside its step: the evaluation, and what draws samples.")
  flags.DEFINE_bool("machine_code", False, "Compile for a TPU to the end. Takes minutes more and changes no number, but tries each kernel.")
  flags.DEFINE_bool("cost", False, "Also print days and chip-hours of each stage and of all.")
  flags.DEFINE_list("suite", [], "Rehearse launch.evaluate with these suites, and not the stages: programs that draw, and what scores. Without it "
                    "--num_prompts takes judge.")
  flags.DEFINE_integer("num_prompts", 0, "Prompts of each suite; with --suite 1,000 by default.", lower_bound=0)
  flags.DEFINE_integer("num_seeds", 4, "Of an evaluation: pictures of each prompt.", lower_bound=1)
  flags.DEFINE_integer("side_px", 1024, "Of an evaluation: side of each picture, a square.", lower_bound=32)
  flags.DEFINE_integer("num_steps", 40, "Of an evaluation: sampling steps.", lower_bound=1)
  flags.DEFINE_float("guidance", 1.0, "Of an evaluation: scale of classifier-free guidance; at most 1 is none.", lower_bound=0)
  flags.DEFINE_integer("batch_size", 16, "Of an evaluation: pictures or questions at a time.", lower_bound=1)
  flags.DEFINE_integer("num_questions", 2, "With the suites judge and tifa: what is asked about a picture; 0 without --suite: no judge.",
                       lower_bound=0)
  flags.DEFINE_string("rows", "", "File that an earlier call wrote with --json: with --cost its rows are taken, and nothing is compiled.")
  flags.DEFINE_string("json", "", "File to write the rows to as JSON.")


def main(_) -> None:
  """Rehearses as the flags say; exits with 1 if a row does not fit, or a searched stage has nothing that does."""
  args = flags.FLAGS
  cfg = parse(args.config)
  if args.rows and not args.cost or args.search and args.cost:
    raise ValueError("--cost goes with the rows of a plan, not with --search, and --rows with nothing but --cost: leave one of the flags out.")
  if args.rows:
    _print_cost(cfg, cost.read_rows(args.rows, args.topology, args.num_slices))
    return
  prepare_environment(args.topology)
  devices, chip = find_devices(args.topology, args.num_slices)
  cfg = dataclasses.replace(cfg, rules=args.rules or cfg.rules)
  sizes = plain(cfg.mesh).values()
  if args.num_slices > 1 and -1 not in sizes and math.prod(sizes) * args.num_slices == len(devices):  # the mesh of one slice
    cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=cfg.mesh.data * args.num_slices))
  if args.num_prompts or args.suite:
    _rehearse_evaluation(args, cfg, devices, chip)
    return
  choice = Choice(tuple(args.stage), tuple(args.task), tuple(args.base_px), args.all_buckets, args.squares, args.index, args.whole)
  child = ChildProcess(args.topology, args.num_slices) if chip and not args.machine_code else None
  so_far = []

  def done(row: Row) -> None:
    print_row(row)
    so_far.append(table.as_json(row))
    if args.json:  # after every row: a compilation takes minutes, and may be the last that one waits for
      record = {"topology": args.topology, "num_slices": args.num_slices, "rows": so_far}
      pathlib.Path(args.json).write_text(json.dumps(record, indent=1), encoding="utf-8")

  if args.search:
    rows = search(cfg, devices, chip, choice, (args.rules,) if args.rules else (), done, child)
    missing = [stage.name for stage in chosen_stages(cfg, choice) if stage.name not in best(rows)]
  else:
    rows = rehearse(cfg, devices, chip, choice, done, child)
    missing = [row.stage for row in rows if row.fits is False]
  print(table.table(rows) + "\n")
  if args.search:
    _print_advice(cfg, rows, args.rank_by)
  else:
    shapes = Rehearsal(cfg, devices)
    for stage in chosen_stages(cfg, choice):
      if some := [row for row in rows if row.stage == stage.name]:
        print(table.phases(some) or "", end="\n" * any(row.num_samples for row in some))
        print(table.summary(stage, some, *shapes.num_programs(stage, choice), to_the_end=child is None))
  if args.cost and not missing:
    print()
    _print_cost(cfg, so_far)
  if missing:
    print(f"Does not fit: {', '.join(dict.fromkeys(missing))}.", file=sys.stderr)
    sys.exit(1)


def _rehearse_evaluation(args: flags.FlagValues, cfg: RunConfig, devices: list, chip: Any) -> None:
  """Prints what an evaluation would take; exits with 1 if it does not fit."""
  child = ChildProcess(args.topology, args.num_slices) if chip and not args.machine_code else None
  suites = tuple(args.suite) or ("judge",) * bool(args.num_questions)
  wanted = evaluation.Wanted(args.num_prompts or 1000, args.num_seeds, args.side_px, args.side_px, args.num_steps, args.guidance, args.batch_size,
                             num_questions=max(1, args.num_questions), suites=suites)
  rates = evaluation.host_rates(wanted)  # first: it says what is missing, and compiling takes minutes
  lines = evaluation.rehearse_evaluation(cfg, wanted, devices, chip, child)
  print(evaluation.describe(lines, wanted, rates))
  if missing := [f"{line.suite} {line.name}" for line in lines if line.fits is False]:
    print(f"Does not fit: {', '.join(missing)}.", file=sys.stderr)
    sys.exit(1)


def _print_advice(cfg: RunConfig, rows: list[Row], rank: str) -> None:
  """The best row of each stage by the bound that was asked for, and that by the other one where it is another row."""
  other, = RANKS.keys() - {rank}
  for number, stage in enumerate(cfg.stages):
    first, second = (best(rows, name).get(stage.name) for name in (rank, other))
    for name, row in ((rank, first), (other, None if second is first else second)):
      if row:
        print(f"best {name}: {table.advice(row, number, bool(cfg.micro_batches))}")


def _print_cost(cfg: RunConfig, rows: list[dict]) -> None:
  print(cost.table(*cost.costs(cfg, rows), num_chips(flags.FLAGS.topology, flags.FLAGS.num_slices)))


if __name__ == "__main__":
  cli.run(main, define_flags)
