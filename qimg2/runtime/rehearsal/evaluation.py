"""What an evaluation of many pictures would take on devices that need not exist: the programs that draw and the judge's, compiled, with their memory
and the bound of their time. See `launch.rehearse --num_prompts`.

All weights are kept in bfloat16 and spread over all devices, as `launch.evaluate --pretrained` has them; the judge is a Qwen3-VL of the size of the
config's encoder, with its head, and lies on the devices beside the weights that draw.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from qimg2 import params as P
from qimg2 import sharding
from qimg2.analysis import roofline
from qimg2.runtime.config import MeshConfig, RunConfig
from qimg2.runtime.generator import Generator, Size
from qimg2.runtime.judge import TOKEN_STEP
from qimg2.runtime.rehearsal import table
from qimg2.runtime.rehearsal.judging import Batch, judge_part
from qimg2.runtime.rehearsal.measure import Child, ChildProcess, bytes_of, measure
from qimg2.runtime.rehearsal.steps import Rehearsal
from qimg2.training.programs import Part

RULES, DTYPE, JUDGE = "fsdp_tensor", "bfloat16", "judge"
WORDS = 256  # tokens of a rubric and a prompt beside the picture's


@dataclasses.dataclass(frozen=True)
class Wanted:
  """How much is evaluated.

  Attributes:
    num_prompts, num_seeds: pictures are their product.
    height, width: px of each.
    num_steps, guidance: of sampling.
    batch_size: pictures at a time, and questions; rounded up to what the devices share.
    num_tokens: M of a prompt; 0 for the config's.
    num_questions: that the judge answers about a picture; 0 for no judge.
  """
  num_prompts: int
  num_seeds: int = 4
  height: int = 1024
  width: int = 1024
  num_steps: int = 40
  guidance: float = 1.0
  batch_size: int = 16
  num_tokens: int = 0
  num_questions: int = 2

  @property
  def num_pictures(self) -> int:
    """Of the whole evaluation."""
    return self.num_prompts * self.num_seeds


@dataclasses.dataclass(frozen=True)
class Line:
  """A program. Bytes are a device's: `peak_bytes` with its arguments, `beside_bytes` of the other weights, of `limit_bytes` or None; `calls` in the
  whole evaluation; `bound` by `roofline.bound` of one call, empty without rates or where it does not fit."""
  name: str
  rows: int
  peak_bytes: float
  beside_bytes: float
  limit_bytes: float | None
  calls: int
  bound: dict[str, float]
  compile_s: float

  @property
  def fits(self) -> bool | None:
    """Whether all fits into memory; None where there is no limit."""
    return None if self.limit_bytes is None else self.peak_bytes + self.beside_bytes <= self.limit_bytes


def rehearse_evaluation(cfg: RunConfig, wanted: Wanted, devices: Sequence[Any], chip: roofline.Chip | None,
                        child: ChildProcess | None = None) -> list[Line]:
  """A line for each program of an evaluation. Nothing is read or run.

  Args: a config, of which networks, tokenizer and schedule are taken; how much; the devices; their rates, None for none; where to compile.

  Raises:
    ValueError: a config that does not fit the devices, or sizes that the VAE cannot draw.
  """
  found, limit = [], chip.hbm_bytes if chip else None
  programs, mesh = _programs(cfg, wanted, devices)
  for number, (name, part, rows, calls) in enumerate(programs):
    own = child and Child(child, f"the evaluation's {name}", _answer, (cfg, wanted, number))
    measured = measure(part, len(devices), limit, child=own)
    bound = table.bound_of(measured["traffic"], chip, mesh)[1] if chip and measured.get("traffic") is not None else {}
    found.append(Line(name, rows, measured["peak_bytes"], bytes_of(part.beside), measured["limit_bytes"], calls, bound, measured["compile_s"]))
  return found


def _programs(cfg: RunConfig, wanted: Wanted, devices: Sequence[Any]) -> tuple[list[tuple[str, Part, int, int]], jax.sharding.Mesh]:
  """([(name, program, rows, calls)], mesh)."""
  spread = dataclasses.replace(cfg, mesh=MeshConfig(1, -1, 1, 1), rules=RULES)
  source = Rehearsal(spread, devices)
  parts = source.mesh.shape["data"] * source.mesh.shape["fsdp"]
  rows = -(-wanted.batch_size // parts) * parts
  place = lambda specs: P.abstract(specs, sharding.param_shardings(specs, source.mesh, source.rules))
  weights = {name: place(P.with_dtype({key: tree for key, tree in specs.items() if (name, key) != ("qwen3_vl", "head")}, DTYPE))
             for name, specs in source.specs.items()}
  size = Size(wanted.height, wanted.width, wanted.num_tokens or cfg.num_tokens, (), rows)
  calls = -(-wanted.num_pictures // rows)
  drawing = Generator(source, size, wanted.num_steps, wanted.guidance).parts(weights)
  if not wanted.num_questions:
    return [(name, part, rows, calls) for name, part in drawing], source.mesh
  judging = _judge(cfg, wanted, devices, rows, weights)
  beside = lambda part: dataclasses.replace(part, beside={**part.beside, JUDGE: judging.arguments[0]})
  asked = -(-wanted.num_pictures * wanted.num_questions // rows)
  return [*((name, beside(part), rows, calls) for name, part in drawing), (JUDGE, judging, rows, asked)], source.mesh


def _judge(cfg: RunConfig, wanted: Wanted, devices: Sequence[Any], rows: int, weights: dict) -> Part:
  """The judge's program."""
  px = cfg.encoder.vision.token_px
  size = tuple(side // px * px for side in (wanted.height, wanted.width))
  length = -(-(size[0] * size[1] // px**2 + WORDS) // TOKEN_STEP) * TOKEN_STEP
  _, part = judge_part(dataclasses.replace(cfg.encoder, dtype=DTYPE), Batch(rows, length, (size,)), RULES, devices)
  return dataclasses.replace(part, beside=weights)


def _answer(devices: Sequence[Any], chip: roofline.Chip | None, cfg: RunConfig, wanted: Wanted, number: int) -> dict:
  """What a process of its own measures."""
  return measure(_programs(cfg, wanted, devices)[0][number][1], len(devices), chip.hbm_bytes if chip else None)


def describe(lines: Sequence[Line], wanted: Wanted) -> str:
  """The lines as a table, and what the whole takes by the bounds: the longest of a program's times, and their sum."""
  gib = lambda num: f"{num / roofline.GIB:,.2f}"
  rows = [["program", "rows", "peak GiB", "beside", "of", "fits", "calls", "s a call", "serial s"]]
  for line in lines:
    times = [f"{line.bound['step_s']:.3f}", f"{serial(line.bound):.3f}"] if line.bound else ["-", "-"]
    limit = "-" if line.limit_bytes is None else gib(line.limit_bytes)
    fits = {None: "no limit", True: "fits", False: "does not"}[line.fits]
    rows.append([line.name, str(line.rows), gib(line.peak_bytes), gib(line.beside_bytes), limit, fits, str(line.calls), *times])
  text = table.columns(rows, 1)
  if not all(line.bound for line in lines):
    return text
  total = {name: sum(line.calls * of(line.bound) for line in lines) for name, of in (("step_s", lambda bound: bound["step_s"]), ("serial", serial))}
  rate = wanted.num_pictures / total["step_s"]
  return (f"{text}\n\n{wanted.num_pictures} pictures: {total['step_s'] / 3600:.2f} h at least, {total['serial'] / 3600:.2f} h if nothing overlaps; "
          f"scores on the host must keep up with {rate:.2f} pictures/s")


def serial(bound: dict[str, float]) -> float:
  """Seconds of a call in which nothing overlaps."""
  return sum(bound[name] for name in ("compute_s", "hbm_s", "ici_s", "dcn_s"))
