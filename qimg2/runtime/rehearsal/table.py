"""The rows of `launch.rehearse`: what was measured, the bound that follows, and both as text and JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from qimg2.analysis import hlo, roofline
from qimg2.analysis.roofline import GIB
from qimg2.runtime.config import StageConfig

PROGRAMS = STEP, EVALUATION, SAMPLES, GENERATE, JUDGE, MINIBATCHES = "step", "evaluation", "samples", "rollout", "judge", "minibatches"
ROLLOUT = GENERATE, JUDGE, MINIBATCHES  # what comes before the step of a method that learns from its own samples, and is a part of it
HEADROOM = 0.9  # of the memory, which a plan should not exceed: the next compiler may need a little more


@dataclasses.dataclass(frozen=True)
class Row:
  """A program of one stage for one bucket. All measures are per device and step, or run of another program.

  Attributes:
    stage, task, height, width, num_sources, num_tokens: which bucket; px and prompt tokens, condition images counted.
    batch_size, accumulate, num_devices: global batch, micro-batches, devices.
    mesh: mesh axis -> size.
    rules, remat: rule set and rematerialisation policy of the generator.
    model_flops: role -> FLOPs by `qimg2.analysis.flops`.
    peak_bytes, limit_bytes: memory that the program reserves, and what there is; None for devices without a limit.
    compile_s: seconds.
    program: one of `PROGRAMS`, what a stage compiles.
    num_samples: of a stage with rollouts, the pictures that a step draws and learns from.
    beside_bytes: what else is on the device while it runs: batches on their way, held-out ones, state that the program does not read.
    traffic: what the compiled program does; None if it does not fit.
    collectives: rows of kind, dtype, axes, bytes, calls, route: the traffic's messages added up by kind, type and mesh axes.
    bound: `roofline.bound`; empty without rates or traffic.
  """
  stage: str
  task: str
  height: int
  width: int
  num_sources: int
  num_tokens: int
  batch_size: int
  accumulate: int
  num_devices: int
  mesh: dict[str, int]
  rules: str
  remat: str
  model_flops: dict[str, float]
  peak_bytes: float
  limit_bytes: float | None
  compile_s: float
  program: str = STEP
  num_samples: int = 0
  beside_bytes: float = 0.0
  traffic: hlo.Traffic | None = None
  collectives: tuple[dict, ...] = ()
  bound: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def fits(self) -> bool | None:
    """Whether the program and what is beside it fit into memory; None where there is no limit."""
    return None if self.limit_bytes is None else self.total_bytes <= self.limit_bytes

  @property
  def has_headroom(self) -> bool:
    """Whether both fill at most `HEADROOM` of the memory."""
    return self.limit_bytes is None or self.total_bytes <= HEADROOM * self.limit_bytes

  @property
  def total_bytes(self) -> float:
    """Of the program and what is beside it."""
    return self.peak_bytes + self.beside_bytes

  @property
  def per_chip(self) -> float:
    """Rows of a micro-batch per device."""
    return self.batch_size / self.accumulate / self.num_devices


def with_bound(row: Row, chip: roofline.Chip | None, mesh: Mesh) -> Row:
  """`row` with its collectives by mesh axis and, for a chip with published rates, its bound."""
  if row.traffic is None:
    return row
  collectives, bound = bound_of(row.traffic, chip, mesh, sum(row.model_flops.values()))
  return dataclasses.replace(row, collectives=collectives, bound=bound)


def bound_of(traffic: hlo.Traffic, chip: roofline.Chip | None, mesh: Mesh, model_flops: float = 0.0) -> tuple[tuple[dict, ...], dict[str, float]]:
  """(`Row.collectives`, `Row.bound`) of what a program does."""
  sums: dict[tuple, dict] = {}
  for one in traffic.collectives:
    kind, axes = one.kind, "+".join(hlo.mesh_axes(one.groups, mesh.shape)) or "none"
    way = roofline.route(chip, list(mesh.devices.flat), one.groups) if chip else None
    if kind == "send":  # to the host, and from there to the other slices
      axes, way = "data", roofline.NETWORK
    entry = sums.setdefault((kind, one.dtype, axes, way), {"kind": kind, "dtype": one.dtype, "axes": axes, "bytes": 0.0, "calls": 0, "route": way})
    entry["bytes"] += one.num_bytes * one.times
    entry["calls"] += one.times
  collectives = tuple(sorted(sums.values(), key=lambda entry: -entry["bytes"]))
  bound = {}
  if chip:
    messages = [(entry["route"], entry["bytes"]) for entry in collectives]
    bound = roofline.bound(chip, model_flops, traffic.flops, traffic.hbm_bytes, messages)
  return collectives, bound


def bucket_name(row: Row) -> str:
  """Such as "ti2i 512x512+1 1286t": task, height x width, condition images, prompt tokens; with its name, if the program is another than the step."""
  name = "" if row.program == STEP else f"{row.program} "
  return f"{name}{row.task} {row.height}x{row.width}{f'+{row.num_sources}' if row.num_sources else ''} {row.num_tokens}t"


def fit_text(row: Row) -> str:
  """Whether it fits, or by how many GiB not."""
  if row.fits is None:
    return "no limit"
  return "fits" if row.fits else f"{(row.total_bytes - row.limit_bytes) / GIB:,.1f} over"


def progress(row: Row) -> str:
  """One line to read while the others compile."""
  bound = f"MFU <= {row.bound['mfu']:.1%}, serial {row.bound['serial_mfu']:.1%}, " if _has_mfu(row) else ""
  memory = f"{row.peak_bytes / GIB:.2f} + {row.beside_bytes / GIB:.2f} GiB, {fit_text(row)}"
  return f"{row.stage} {bucket_name(row)} {row.rules} {row.remat} 1/{row.accumulate}: {memory}, {bound}compiled in {row.compile_s:.0f} s"


def _has_mfu(row: Row) -> bool:
  return bool(row.bound and row.model_flops)


def table(rows: Sequence[Row]) -> str:
  """The rows as text, two tables: memory and bound; then messages. Units: GiB = 2^30 and GB = 10^9 bytes, TFLOP = 10^12, ms."""
  head = ["stage", "bucket", "rules", "remat", "batch", "micro", "per chip", "peak GiB", "beside", "of", "fits", "model TFLOP", "run TFLOP", "HBM GB",
          "compute ms", "HBM ms", "ICI ms", "DCN ms", "MFU <=", "serial"]
  lines = []
  for row in rows:
    limit = "-" if row.limit_bytes is None else f"{row.limit_bytes / GIB:.2f}"
    traffic = ["-", "-"] if row.traffic is None else [f"{row.traffic.flops / 1e12:,.2f}", f"{row.traffic.hbm_bytes / 1e9:,.1f}"]
    times = [f"{1e3 * row.bound[key]:,.1f}" if row.bound else "-" for key in ("compute_s", "hbm_s", "ici_s", "dcn_s")]
    lines.append([row.stage, bucket_name(row), row.rules, row.remat, f"{row.batch_size:,}", str(row.accumulate), f"{row.per_chip:g}",
                  f"{row.peak_bytes / GIB:,.2f}", f"{row.beside_bytes / GIB:,.2f}", limit, fit_text(row),
                  f"{sum(row.model_flops.values()) / 1e12:,.2f}" if row.model_flops else "-", *traffic, *times,
                  *(f"{row.bound[key]:.1%}" if _has_mfu(row) else "-" for key in ("mfu", "serial_mfu"))])
  text = columns([head, *lines], 4)
  messages = [[row.stage, bucket_name(row), row.remat, one["kind"], one["dtype"], one["axes"], f"{one['bytes'] / 1e9:,.3f}", f"{one['calls']:,}"]
              for row in rows for one in _by_axes(row)]
  if messages:
    text += "\n\n" + columns([["stage", "bucket", "remat", "messages", "type", "mesh axes", "GB sent", "calls"], *messages], 6)
  unknown = sum(len(row.traffic.unknown_loops) for row in rows if row.traffic)
  return text + (f"\n\n{unknown} loops of unknown length were counted once." if unknown else "")


def _by_axes(row: Row) -> list[dict]:
  """The collectives with those of different routes added up."""
  sums: dict[tuple, dict] = {}
  for one in row.collectives:
    entry = sums.setdefault((one["kind"], one["dtype"], one["axes"]), {**one, "bytes": 0.0, "calls": 0})
    entry["bytes"] += one["bytes"]
    entry["calls"] += one["calls"]
  return list(sums.values())


def columns(lines: Sequence[Sequence[str]], num_texts: int) -> str:
  """Lines of cells as text; the first `num_texts` columns begin below each other, the others end so."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  return "\n".join("  ".join(cell.ljust(width) if place < num_texts else cell.rjust(width) for place, (cell, width) in enumerate(zip(line, widths)))
                   .rstrip() for line in lines)


def advice(row: Row, number: int, micro_batches: bool = False) -> str:
  """The flags that give the best row that a search found; `number` is the stage's place in the config, and `micro_batches` whether the config has
  those, which must go."""
  bound = f", MFU at most {row.bound['mfu']:.1%}, serial {row.bound['serial_mfu']:.1%}" if row.bound else ""
  mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in row.mesh.items())
  mesh += " --config.micro_batches='()'" if micro_batches else ""
  return (f"{row.stage}: {mesh} --config.rules={row.rules} --config.model.remat={row.remat} "
          f"--config.stages[{number}].optimizer.accumulate={row.accumulate} "
          f"({row.per_chip:g} per chip, {row.total_bytes / GIB:.2f} GiB{bound})")


def summary(config: StageConfig, rows: Sequence[Row], num_programs: int, exact: bool, to_the_end: bool) -> str:
  """What a stage compiles in all, and which of its programs takes most memory.

  Args: the stage; its rows; how many steps it has, 0 if that is not known, and whether that is exact; whether rows were compiled to machine code.
  """
  worst = max(rows, key=lambda row: row.total_bytes)
  share = "" if worst.limit_bytes is None else f", {worst.total_bytes / worst.limit_bytes:.0%} of the memory"
  times = {program: [row.compile_s for row in rows if row.program == program] for program in PROGRAMS}
  num = dict.fromkeys(PROGRAMS, num_programs) | {SAMPLES: len(times[SAMPLES])}
  mean = {program: sum(some) / len(some) for program, some in times.items() if some}
  some = ", ".join(f"{num[program]} of {program} in {seconds:,.0f} s each" for program, seconds in mean.items())
  text = f"{config.name}: most memory takes {bucket_name(worst)}, {worst.total_bytes / GIB:.2f} GiB{share}."
  if not num_programs:
    return f"{text} As many steps as its data have shapes, because max_programs is 0: count them with --index."
  total = sum(num[program] * seconds for program, seconds in mean.items())
  return (f"{text} Programs{'' if exact else ' at most'}: {some}, {total / 60:,.0f} min one after the other"
          f"{'' if to_the_end else ', machine code not counted'}; seconds are the means of the rows, as measured here.")


def phases(rows: Sequence[Row]) -> str:
  """What one step of a stage with rollouts takes at least, phase by phase, for each of its buckets: seconds where everything inside a program
  overlaps, where nothing does, and the share of each; and how many pictures a second its rewards on the host must bear to take no longer than the
  devices. The phases follow one another: a step waits for its rollout, and the rewards on the host for all of its pictures."""
  lines = []
  for bucket in dict.fromkeys((row.task, row.height, row.width, row.num_sources, row.num_tokens) for row in rows if row.num_samples):
    own = [row for row in rows if (row.task, row.height, row.width, row.num_sources, row.num_tokens) == bucket and row.program in (STEP, *ROLLOUT)]
    if not all(row.bound for row in own):
      continue
    times = {row.program: (row.bound["step_s"], serial_s(row.bound)) for row in own}
    best, worst = (sum(one[place] for one in times.values()) for place in (0, 1))
    shares = ", ".join(f"{program} {one[1]:,.1f} s ({one[1] / worst:.0%})" for program, one in times.items())
    lines.append(f"{own[0].stage} {bucket_name(dataclasses.replace(own[0], program=STEP))}: a step of {own[0].num_samples:,} pictures takes at least "
                 f"{best:,.1f} s, serial {worst:,.1f} s: {shares}. Rewards on the host come on top: at {own[0].num_samples / worst:,.1f} "
                 "pictures/s they take as long again.")
  return "\n".join(lines)


def serial_s(bound: Mapping[str, float]) -> float:
  """Seconds of a program of which nothing overlaps."""
  return sum(bound[key] for key in ("compute_s", "hbm_s", "ici_s", "dcn_s"))


def as_json(row: Row) -> dict[str, Any]:
  """A row as JSON-serialisable values, its properties among them."""
  values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name not in ("traffic", "collectives")}
  traffic = row.traffic and {"hbm_bytes": row.traffic.hbm_bytes, "flops": row.traffic.flops, "unknown_loops": list(row.traffic.unknown_loops)}
  messages = [{key: one[key] for key in ("kind", "dtype", "axes", "bytes", "calls")} for one in _by_axes(row)]
  return {**values, "fits": row.fits, "total_bytes": row.total_bytes, "per_chip": row.per_chip, "traffic": traffic, "collectives": messages}
