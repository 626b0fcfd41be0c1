"""Rehearsals of the stages and buckets of a config, and the search for the sharding rules, remat policy and micro-batches with the highest bound.
Where buckets and prompts come from: `launch.rehearse`.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from qimg2 import sharding
from qimg2.analysis import roofline
from qimg2.runtime.config import MeshConfig, RunConfig, StageConfig, parse, plain
from qimg2.runtime.micro_batches import num_tokens
from qimg2.runtime.rehearsal import table
from qimg2.runtime.rehearsal.measure import ChildProcess
from qimg2.runtime.rehearsal.shapes import Choice
from qimg2.runtime.rehearsal.steps import Rehearsal
from qimg2.runtime.rehearsal.table import Row

RANKS = {"serial": "serial_mfu", "overlapped": "mfu"}  # by which bound a search ranks: nothing overlaps, or everything
REMAT = ("none", "dots", "attention", "full", "offload")  # least work first


# What to rehearse.


def print_row(row: Row) -> None:
  """One line to read while the others compile."""
  print(table.progress(row), file=sys.stderr, flush=True)


def rehearse(cfg: Any, devices: Sequence[Any], chip: roofline.Chip | None, choice: Choice = Choice(),
             done: Callable[[Row], None] = print_row, child: ChildProcess | None = None) -> list[Row]:
  """A row for every chosen stage and bucket; `done` is called with each when it is there.

  Raises:
    ValueError: a stage that the config does not have, or a choice that leaves nothing.
  """
  cfg = parse(cfg)
  rehearsal = Rehearsal(cfg, devices, chip, child)
  rows = []
  for stage in chosen_stages(cfg, choice):
    buckets = rehearsal.buckets(stage, choice)
    steps = [(program, one) for one in buckets for program in rehearsal.programs_of_step(stage)]
    for program, bucket in [*steps, *(rehearsal.beside_the_step(stage, buckets) if choice.whole else ())]:
      rows.append(rehearsal.row(stage, bucket, program, choice))
      done(rows[-1])
  if not rows:
    raise ValueError("The stages have no bucket of this --task and --base_px: leave one of the flags out.")
  return rows


def search(cfg: Any, devices: Sequence[Any], chip: roofline.Chip | None, choice: Choice = Choice(),
           rules: Sequence[str] = (), done: Callable[[Row], None] = print_row, child: ChildProcess | None = None) -> list[Row]:
  """All rows tried for the rule set, remat policy and number of micro-batches with the highest bound on MFU; `best` chooses from them.

  A stage is tried with its heaviest bucket, that of most tokens per batch, under each rule set (`rules`; all by default) on the mesh that
  `fitting_mesh` gives it. The per-chip batch begins at one row per shard; from that and two rows follows how many the memory should hold, which is
  then compiled. What no longer fits is tried with the next remat policy, which computes more and keeps less.
  """
  cfg, rows = parse(cfg), []
  for stage in chosen_stages(cfg, choice):
    for name in rules or sharding.RULES:
      try:
        rows += _climb(cfg, name, stage, devices, chip, choice, done, child)
      except ValueError as error:  # another rule set may do
        print(f"Stage {stage.name}, rules {name}: {error}", file=sys.stderr, flush=True)
  return rows


def best(rows: Sequence[Row], rank: str = "serial") -> dict[str, Row]:
  """Stage -> its row with the highest bound on MFU, of those that leave a tenth of the memory free; equal bounds are told apart by fewer
  micro-batches. `rank` is one of `RANKS`. A real step lies between them. Where compute is what takes longest, plans that differ in memory and
  links are alike while everything overlaps, so the default is that nothing does."""
  worth = lambda row: (round(row.bound.get(RANKS[rank], 0.0), 3), -row.accumulate)
  return {name: max((row for row in rows if row.stage == name and row.has_headroom), key=worth)
          for name in dict.fromkeys(row.stage for row in rows if row.has_headroom)}


def fitting_mesh(rules: str, sizes: dict[str, int]) -> dict[str, int]:
  """`sizes` without the axes that a rule set leaves idle: their devices go to `context` where it splits tokens but not heads, else to `fsdp`."""
  used = {axis for axes in sharding.RULES[rules].values() for axis in axes}
  idle = {axis: size for axis, size in sizes.items() if axis not in used}
  takes = "context" if "context" in used and rules != "replicated" else "fsdp"
  kept = {axis: size for axis, size in sizes.items() if axis in used}
  return kept | {takes: kept.get(takes, 1) * math.prod(idle.values())}


def _climb(cfg: RunConfig, rules: str, stage: StageConfig, devices: Sequence[Any], chip: roofline.Chip | None, choice: Choice,
           done: Callable[[Row], None], child: ChildProcess | None) -> list[Row]:
  rows, accumulate = [], None
  sizes = dict(sharding.make_mesh(plain(cfg.mesh), devices).shape)

  def attempt() -> Row:
    tried = dataclasses.replace(stage, optimizer=dataclasses.replace(stage.optimizer, accumulate=accumulate))
    rows.append(rehearsal.row(tried, heaviest, choice=choice))
    done(rows[-1])
    return rows[-1]

  for remat in REMAT if stage.kind == "generator" else (cfg.model.remat,):
    mesh = MeshConfig(**(dict.fromkeys(sharding.MESH_AXES, 1) | fitting_mesh(rules, sizes)))
    changed = dataclasses.replace(cfg, rules=rules, model=dataclasses.replace(cfg.model, remat=remat), mesh=mesh, micro_batches=())
    rehearsal = Rehearsal(changed, devices, chip, child)
    buckets = rehearsal.buckets(stage, choice)
    if not buckets:
      raise ValueError("there is no bucket of this --task and --base_px: leave one of the flags out.")
    heaviest = max(buckets, key=lambda bucket: bucket.batch_size * num_tokens(bucket, rehearsal.nets.vae.spatial_factor))
    if accumulate is None:
      smallest, shards = min(bucket.batch_size for bucket in buckets), rehearsal.mesh.shape["data"] * rehearsal.mesh.shape["fsdp"]
      accumulate = smallest // shards
      if not accumulate:
        raise ValueError(f"a batch of {smallest} has no row for each of the {shards} parts of mesh {dict(rehearsal.mesh.shape)}.")
    previous = None
    while accumulate >= 1 and (row := attempt()).has_headroom:
      accumulate = max(1, accumulate // (_step(previous, row) if previous else 2)) if accumulate > 1 else 0
      previous = row
    while previous and accumulate >= 1 and not row.has_headroom and 2 * accumulate < previous.accumulate:  # too far: back, to the last that fits
      accumulate *= 2
      if (row := attempt()).has_headroom:
        accumulate //= 2
        break
    if accumulate < 1:
      break
  return rows


def _step(before: Row, now: Row) -> int:
  """By how much, a power of two, the micro-batch may grow: memory grows with it as it did from `before` to `now`."""
  if now.limit_bytes is None or now.peak_bytes <= before.peak_bytes:
    return 2
  per_row = (now.peak_bytes - before.peak_bytes) / (now.per_chip - before.per_chip)
  room = (table.HEADROOM * now.limit_bytes - now.peak_bytes) / per_row / now.per_chip
  return max(2, 2 ** int(math.log2(max(1.0, 1 + room))))


def chosen_stages(cfg: RunConfig, choice: Choice) -> list[StageConfig]:
  """The stages of a config that were chosen.

  Raises:
    ValueError: one that the config does not have.
  """
  names = [stage.name for stage in cfg.stages]
  for name in choice.stages:
    if name not in names:
      raise ValueError(f"The config has no stage {name!r}: it has {', '.join(names)}.")
  return [stage for stage in cfg.stages if not choice.stages or stage.name in choice.stages]


# Command line.
