"""What a batch of a judge would need on a TPU slice, and how fast it could be: memory and the bound of `qimg2.analysis.roofline`. Nothing is run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qimg2 import params as P
from qimg2 import sharding
from qimg2.analysis import roofline
from qimg2.analysis.flops import encoder_forward
from qimg2.models import qwen3_vl
from qimg2.runtime.judge import ANSWER_STEP, make_program
from qimg2.runtime.rehearsal import topology
from qimg2.runtime.rehearsal.measure import Child, ChildProcess, measure
from qimg2.runtime.rehearsal.table import GIB, Row, with_bound
from qimg2.training.stage import Part


@dataclasses.dataclass(frozen=True)
class Batch:
  """A batch of questions: number of rows, padded length in tokens with the pictures, (height, width) in px of each picture of a row."""
  num_rows: int
  num_tokens: int
  sizes: tuple[tuple[int, int], ...]


def rehearse_judge(cfg: qwen3_vl.Config, batch: Batch, where: str, rules: str = "fsdp_tensor") -> Row:
  """The row of one batch on a topology such as "v5p:2x2x1", spread as `qimg2.runtime.judge.Judge` does; weights are in the compute type.

  Call `topology.prepare_environment(where)` before anything uses jax.

  Raises:
    ValueError: as `topology.find_devices`.
  """
  devices, chip = topology.find_devices(where)
  child = Child(ChildProcess(where), "the judge", _answer, (cfg, batch, rules)) if chip else None
  mesh, part = judge_part(cfg, batch, rules, devices)
  measured = measure(part, mesh.size, chip.hbm_bytes if chip else None, child=child)
  height, width = batch.sizes[0]
  row = Row("judge", "judge", height, width, len(batch.sizes), batch.num_tokens, batch.num_rows, 1, mesh.size, dict(mesh.shape), rules, cfg.remat,
            {"judge": batch.num_rows * encoder_forward(cfg, batch.num_tokens, batch.sizes)}, program="judge", **measured)
  return with_bound(row, chip, mesh)


def judge_part(cfg: qwen3_vl.Config, batch: Batch, rules: str, devices: Sequence[Any]) -> tuple[jax.sharding.Mesh, Part]:
  """(mesh, the judge's program with its abstract arguments)."""
  mesh, found = sharding.make_mesh({"fsdp": -1}, devices), sharding.RULES[rules]
  specs = P.with_dtype(qwen3_vl.specs(cfg), cfg.dtype)
  rows = sharding.batch_sharding(mesh, found)
  of = lambda dtype, *shape: jax.ShapeDtypeStruct((batch.num_rows, *shape), dtype, sharding=rows)
  inputs = {"tokens": of(np.int32, batch.num_tokens), "token_count": of(np.int32), "choices": of(np.int32, ANSWER_STEP),
            "images": tuple(of(np.uint8, *size, 3) for size in batch.sizes)}
  answers = jax.ShapeDtypeStruct((ANSWER_STEP,), np.int32, sharding=sharding.replicated(mesh))
  program = make_program(cfg, sharding.make_shard(mesh, found))
  return mesh, Part(program, (P.abstract(specs, sharding.param_shardings(specs, mesh, found)), inputs, answers))


def describe(row: Row) -> str:
  """A row in one line: weights and questions in GiB = 2^30 bytes on each device, and the bounds of a batch in seconds."""
  text = f"{row.batch_size} questions of {row.num_tokens} tokens on {row.num_devices} devices: peak {row.peak_bytes / GIB:.2f} GiB"
  if row.limit_bytes:
    text += f", {'fits' if row.fits else 'does not fit'} in {row.limit_bytes / GIB:.2f}"
  if not row.bound:
    return text + "."
  serial = sum(row.bound[f"{part}_s"] for part in ("compute", "hbm", "ici", "dcn"))
  return text + f"; at least {row.bound['step_s']:.3f} s a batch with everything overlapped, {serial:.3f} s with nothing."


def _answer(devices: Sequence[Any], chip: roofline.Chip | None, cfg: qwen3_vl.Config, batch: Batch, rules: str) -> dict:
  """What a process of its own measures."""
  mesh, part = judge_part(cfg, batch, rules, devices)
  return measure(part, mesh.size, chip.hbm_bytes if chip else None)
