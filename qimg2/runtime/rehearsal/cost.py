"""What a curriculum would take on a slice: the steps of each stage times what rehearsals say that one takes at least.

  s a step = sum over tasks t and resolutions r of  share_t · weight_r / (sum of weights) · s(t, r)                                (1)

s(t, r) is the bound of the square bucket with the longest prompts, either with perfect overlap or with none, see `qimg2.analysis.roofline`. Equal
numbers of usable records at each resolution are assumed. Evaluation, saves, restarts and waiting for data are left out.

A row counts for each stage with its method, bucket and batch size: such steps differ in nothing but their rates. A step with a rollout is the sum of
its programs.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.buckets import bucket_size
from qimg2.runtime.config import RunConfig, StageConfig
from qimg2.runtime.config.rewards import declare
from qimg2.runtime.methods import make_algorithm
from qimg2.runtime.rehearsal.table import ROLLOUT, STEP, columns, serial_s

DAY_S = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a stage takes: its steps, and the mean time of one in seconds, where everything overlaps and where nothing does."""
  stage: str
  num_steps: int
  overlapped_s: float
  serial_s: float

  def days(self) -> tuple[float, float]:
    """(overlapped, serial)."""
    return self.num_steps * self.overlapped_s / DAY_S, self.num_steps * self.serial_s / DAY_S


def read_rows(path: str, topology: str, num_slices: int) -> list[dict]:
  """The rows of an earlier rehearsal's --json file.

  Raises:
    ValueError: it is no such file, or one for another slice.
  """
  try:
    record = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    rows, slices = record["rows"], (record["topology"], record["num_slices"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"--rows={path} is no file that launch.rehearse --json wrote ({error!r}): rehearse again.") from error
  if slices != (topology, num_slices):
    raise ValueError(f"--rows={path} is of --topology={slices[0]} --num_slices={slices[1]}: say so here too, or rehearse for {topology}.")
  return rows


def costs(cfg: RunConfig, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Cost], dict[str, str]]:
  """(what each stage takes, {stage that cannot be counted: the first bucket without a row}).

  Args: the config; rows as `table.as_json` gives them.

  Raises:
    ValueError: rows of another config, without times, or for none of the stages.
  """
  kinds, times = {stage.name: _kind(cfg, stage) for stage in cfg.stages}, {}
  steps = [row for row in rows if row.get("program", STEP) in (STEP, *ROLLOUT)]
  for row in sorted(steps, key=lambda row: row["num_tokens"]):  # the longest prompts come last, and stay
    if row["stage"] not in kinds:
      raise ValueError(f"The rows have a stage {row['stage']!r}, which the config has not: give the rows of this config.")
    if not row["bound"]:
      raise ValueError(f"The row of stage {row['stage']!r}, {row['task']} {row['height']}x{row['width']}, has no times, because it does not fit or "
                       "its devices have no published rates: rehearse a plan that fits, for a TPU.")
    bound = row["bound"]
    key = kinds[row["stage"]], row["task"], row["height"], row["width"], row["batch_size"]
    times.setdefault(key, {})[row.get("program", STEP)] = bound["step_s"], serial_s(bound)
  found, missing = [], {}
  for stage in cfg.stages:
    shares = _shares(stage)
    lacking = [key for key in shares if (kinds[stage.name], *key) not in times]
    if lacking:
      missing[stage.name] = "{} {}x{}, batch {:,}".format(*lacking[0])
    else:
      means = (sum(share * sum(one[which] for one in times[kinds[stage.name], *key].values()) for key, share in shares.items()) for which in range(2))
      found.append(Cost(stage.name, stage.num_steps, *means))
  if not found:
    raise ValueError(f"The rows are for no whole stage: {next(iter(missing))} lacks {next(iter(missing.values()))}; rehearse its squares, too.")
  return found, missing


def _kind(cfg: RunConfig, stage: StageConfig) -> str:
  """Equal for stages whose steps take as long for the same bucket: those of one method and adapter, and with rollouts of the same settings."""
  method, adapter = stage.algorithm, str(stage.adapter) if stage.adapter.rank else ""
  rollout = make_algorithm(method.name, method.settings, cfg.schedule, declare(stage.rewards)).rollout
  return (str(method.section()) if rollout else method.name) + adapter


def _shares(stage: StageConfig) -> dict[tuple[str, int, int, int], float]:
  """(task, height, width, batch size) of each square bucket -> its share of the steps."""
  parts, resolutions, shares = sum(part.weight for part in stage.mixture), sum(one.weight for one in stage.resolutions), {}
  for part in stage.mixture:
    for one in stage.resolutions:
      key = part.task, *bucket_size(one.base_px, "1:1", one.multiple), one.batch_size
      shares[key] = shares.get(key, 0.0) + part.weight / parts * one.weight / resolutions
  return shares


def table(found: Sequence[Cost], missing: Mapping[str, str], num_chips: int) -> str:
  """What `costs` found as text, for a slice of so many chips: seconds, days and chip-hours, each overlapped and serial."""
  head = ["stage", "steps", "s a step", "serial", "days", "serial", "chip-hours", "serial"]
  line = lambda name, steps, times, days: [name, f"{steps:,}", *times, *(f"{one:,.1f}" for one in days),
                                           *(f"{24 * num_chips * one:,.0f}" for one in days)]
  lines = [line(one.stage, one.num_steps, (f"{one.overlapped_s:.2f}", f"{one.serial_s:.2f}"), one.days()) for one in found]
  total = [sum(days) for days in zip(*(one.days() for one in found))]
  text = columns([head, *lines, line("total", sum(one.num_steps for one in found), ("", ""), total)], 1)
  return text + "".join(f"\nNot counted: {name}, because no row is of {bucket}." for name, bucket in missing.items())
