"""The program that judges a batch of questions, with abstract arguments: what a rehearsal compiles. Nothing is run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qimg2 import params as P
from qimg2 import sharding
from qimg2.models import qwen3_vl
from qimg2.runtime.judge import ANSWER_STEP, make_program
from qimg2.training.programs import Part


@dataclasses.dataclass(frozen=True)
class Batch:
  """A batch of questions: number of rows, padded length in tokens with the pictures, (height, width) in px of each picture of a row."""
  num_rows: int
  num_tokens: int
  sizes: tuple[tuple[int, int], ...]


def judge_part(cfg: qwen3_vl.Config, batch: Batch, rules: str, devices: Sequence[Any]) -> tuple[jax.sharding.Mesh, Part]:
  """(mesh, the judge's program with its abstract arguments), spread as `qimg2.runtime.judge.Judge` does; weights are in the compute type."""
  mesh, found = sharding.make_mesh({"fsdp": -1}, devices), sharding.RULES[rules]
  specs = P.with_dtype(qwen3_vl.specs(cfg), cfg.dtype)
  rows = sharding.batch_sharding(mesh, found)
  of = lambda dtype, *shape: jax.ShapeDtypeStruct((batch.num_rows, *shape), dtype, sharding=rows)
  inputs = {"tokens": of(np.int32, batch.num_tokens), "token_count": of(np.int32), "choices": of(np.int32, ANSWER_STEP),
            "images": tuple(of(np.uint8, *size, 3) for size in batch.sizes)}
  answers = jax.ShapeDtypeStruct((ANSWER_STEP,), np.int32, sharding=sharding.replicated(mesh))
  program = make_program(cfg, sharding.make_shard(mesh, found))
  return mesh, Part(program, (P.abstract(specs, sharding.param_shardings(specs, mesh, found)), inputs, answers))
