"""What an evaluation of many pictures would take on devices that need not exist: for each suite the programs that draw, and what scores: the judge's
program or the vision tower's, compiled, with their memory and the bound of their time; or cores of the host, by a rate that is measured here. See
`launch.rehearse --num_prompts --suite`.

All weights are kept in bfloat16 and spread over all devices, as `launch.evaluate --pretrained` has them; the judge is a Qwen3-VL of the size of the
config's encoder, with its head, and lies on the devices beside the weights that draw, as the tower of `fidelity` does. Suites run one after the other
and give what scores back, so that a program has beside it what its own suite needs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines.specs import source_grids
from qimg2 import params as P
from qimg2 import sharding
from qimg2.analysis import roofline
from qimg2.evaluation import vision_features
from qimg2.models import qwen3_vl
from qimg2.models.qwen3_vl_vision import VisionConfig
from qimg2.runtime.config import MeshConfig, RunConfig
from qimg2.runtime.generator import Generator, Size
from qimg2.runtime.judge import TOKEN_STEP
from qimg2.runtime.rehearsal import table
from qimg2.runtime.rehearsal.judging import Batch, judge_part
from qimg2.runtime.rehearsal.measure import Child, ChildProcess, bytes_of, measure
from qimg2.runtime.rehearsal.scoring import SCORINGS, host_rate
from qimg2.runtime.rehearsal.steps import Rehearsal
from qimg2.training.programs import Part

RULES, DTYPE = "fsdp_tensor", "bfloat16"
WORDS = 256  # tokens of a rubric and a prompt beside the picture's


@dataclasses.dataclass(frozen=True)
class Wanted:
  """How much is evaluated.

  Attributes:
    num_prompts, num_seeds: pictures of each suite are their product.
    height, width: px of each.
    num_steps, guidance: of sampling.
    batch_size: pictures at a time, and questions; rounded up to what the devices share.
    num_tokens: M of a prompt; 0 for the config's.
    num_questions: that the judge answers about a picture in the suites `judge` and `tifa`.
    suites: names of suites; none for pictures that nothing scores.
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
  suites: tuple[str, ...] = ("judge",)

  def __post_init__(self):
    if len(set(self.suites)) < len(self.suites):
      raise ValueError(f"--suite={','.join(self.suites)} names a suite twice: once is enough.")
    if odd := [name for name in self.suites if name not in SCORINGS]:
      raise ValueError(f"There is no suite {odd[0]!r} to rehearse: choose among {', '.join(SCORINGS)}.")

  @property
  def num_pictures(self) -> int:
    """Of each suite."""
    return self.num_prompts * self.num_seeds


@dataclasses.dataclass(frozen=True)
class Line:
  """A program of a suite. Bytes are a device's: `peak_bytes` with its arguments, `beside_bytes` of the other weights, of `limit_bytes` or None;
  `calls` in the whole evaluation; `bound` by `roofline.bound` of one call, empty without rates or where it does not fit."""
  suite: str
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


class _Program(NamedTuple):
  """A program of a suite, and what else of the suite is on the devices; `key` is equal for programs that are compiled once."""
  suite: str
  name: str
  part: Part
  calls: int
  key: tuple


def rehearse_evaluation(cfg: RunConfig, wanted: Wanted, devices: Sequence[Any], chip: roofline.Chip | None,
                        child: ChildProcess | None = None) -> list[Line]:
  """A line for each program of each suite. Nothing is read or run.

  Args: a config, of which networks, tokenizer and schedule are taken; how much; the devices; their rates, None for none; where to compile.

  Raises:
    ValueError: a config that does not fit the devices, sizes that the VAE cannot draw, or an encoder without the vision tower that a suite needs.
  """
  limit = chip.hbm_bytes if chip else None
  programs, mesh, rows = _programs(cfg, wanted, devices)
  found, measured = [], {}
  for number, one in enumerate(programs):
    if one.key not in measured:
      own = child and Child(child, f"the evaluation's {one.name}", _answer, (cfg, wanted, number))
      measured[one.key] = measure(one.part, len(devices), limit, child=own)
    of = measured[one.key]
    bound = table.bound_of(of["traffic"], chip, mesh)[1] if chip and of.get("traffic") is not None else {}
    found.append(Line(one.suite, one.name, rows, of["peak_bytes"], bytes_of(one.part.beside), of["limit_bytes"], one.calls, bound, of["compile_s"]))
  return found


def _programs(cfg: RunConfig, wanted: Wanted, devices: Sequence[Any]) -> tuple[list[_Program], jax.sharding.Mesh, int]:
  """(programs, mesh, rows of each)."""
  spread = dataclasses.replace(cfg, mesh=MeshConfig(1, -1, 1, 1), rules=RULES)
  source = Rehearsal(spread, devices)
  parts = source.mesh.shape["data"] * source.mesh.shape["fsdp"]
  rows = -(-wanted.batch_size // parts) * parts
  place = lambda specs: P.abstract(specs, sharding.param_shardings(specs, source.mesh, source.rules))
  weights = {name: place(P.with_dtype({key: tree for key, tree in specs.items() if (name, key) != ("qwen3_vl", "head")}, DTYPE))
             for name, specs in source.specs.items()}
  drawing = functools.cache(lambda num_sources: _drawing(source, wanted, num_sources, rows, weights))
  scoring = functools.cache(lambda by, num_seen: _SCORERS[by](cfg, wanted, devices, rows, num_seen))
  found = []
  for suite in wanted.suites or ("",):
    how = SCORINGS.get(suite)
    part = scoring(how.by, how.num_seen) if how and not how.on_host else None
    for name, one in drawing(how.num_sources if how else 0):
      beside = {**one.beside, "scores": part.arguments[0]} if part else one.beside
      found.append(_Program(suite, name, dataclasses.replace(one, beside=beside), -(-wanted.num_pictures // rows), (name, how and how.num_sources)))
    if part:
      asked = wanted.num_pictures * (1 if how.by == "vision" else how.num_questions or wanted.num_questions)
      found.append(_Program(suite, how.by, dataclasses.replace(part, beside=weights), -(-asked // rows), (how.by, how.num_seen)))
  return found, source.mesh, rows


def _drawing(source: Rehearsal, wanted: Wanted, num_sources: int, rows: int, weights: Mapping) -> list[tuple[str, Part]]:
  """[(phase, program)] of pictures with so many condition images of their own size."""
  sources = ((wanted.height, wanted.width),) * num_sources
  num_tokens = (wanted.num_tokens or source.cfg.num_tokens) + source.image_tokens(source_grids(sources))
  return Generator(source, Size(wanted.height, wanted.width, num_tokens, sources, rows), wanted.num_steps, wanted.guidance).parts(weights)


def _judge(cfg: RunConfig, wanted: Wanted, devices: Sequence[Any], rows: int, num_seen: int) -> Part:
  """The judge's program for questions that show so many pictures."""
  px = _tower(cfg).token_px
  size = tuple(side // px * px for side in (wanted.height, wanted.width))
  length = -(-(num_seen * size[0] * size[1] // px**2 + WORDS) // TOKEN_STEP) * TOKEN_STEP
  return judge_part(dataclasses.replace(cfg.encoder, dtype=DTYPE), Batch(rows, length, (size,) * num_seen), RULES, devices)[1]


def _vision(cfg: RunConfig, wanted: Wanted, devices: Sequence[Any], rows: int, num_seen: int) -> Part:
  """The program of the vision tower, at the size that `fidelity` recommends for it."""
  del wanted, num_seen
  mesh, rules, side_px = sharding.make_mesh({"fsdp": -1}, devices), sharding.RULES[RULES], vision_features.SIDE_PX
  tower, specs = _tower(cfg), P.with_dtype(qwen3_vl.specs(cfg.encoder)["vision"], DTYPE)
  pixels = jax.ShapeDtypeStruct((rows, side_px, side_px, 3), np.uint8, sharding=sharding.batch_sharding(mesh, rules))
  program = vision_features.make_program(tower, DTYPE, sharding.make_shard(mesh, rules))
  return Part(program, (P.abstract(specs, sharding.param_shardings(specs, mesh, rules)), pixels))


def _tower(cfg: RunConfig) -> VisionConfig:
  if cfg.encoder.vision is None:
    raise ValueError("The config's encoder has no vision tower, so that it neither judges nor gives features: take such suites out of --suite.")
  return cfg.encoder.vision


_SCORERS: dict[str, Callable[..., Part]] = {"judge": _judge, "vision": _vision}


def _answer(devices: Sequence[Any], chip: roofline.Chip | None, cfg: RunConfig, wanted: Wanted, number: int) -> dict:
  """What a process of its own measures."""
  return measure(_programs(cfg, wanted, devices)[0][number].part, len(devices), chip.hbm_bytes if chip else None)


def host_rates(wanted: Wanted) -> dict[str, float]:
  """{suite: pictures that one core of this machine scores in a second} of the suites that score on the host."""
  return {name: host_rate(name, round((wanted.height * wanted.width) ** 0.5)) for name in wanted.suites if SCORINGS[name].on_host}


# In words.


def describe(lines: Sequence[Line], wanted: Wanted, rates: Mapping[str, float]) -> str:
  """The lines as a table, and of each suite what the whole takes by the bounds: the longest of a program's times, and their sum; of those that score
  on the host how many cores keep up with it. `rates` as of `host_rates`."""
  gib = lambda num: f"{num / roofline.GIB:,.2f}"
  rows = [["suite", "program", "rows", "peak GiB", "beside", "of", "fits", "calls", "s a call", "serial s"]]
  for line in lines:
    times = [f"{line.bound['step_s']:.3f}", f"{serial(line.bound):.3f}"] if line.bound else ["-", "-"]
    limit = "-" if line.limit_bytes is None else gib(line.limit_bytes)
    fits = {None: "no limit", True: "fits", False: "does not"}[line.fits]
    rows.append([line.suite, line.name, str(line.rows), gib(line.peak_bytes), gib(line.beside_bytes), limit, fits, str(line.calls), *times])
  suites = {suite: [line for line in lines if line.suite == suite] for suite in wanted.suites or ("",)}
  return "\n".join([table.columns(rows, 2), "", *(_in_all(suite, some, wanted, rates.get(suite)) for suite, some in suites.items())])


def _in_all(suite: str, lines: Sequence[Line], wanted: Wanted, rate: float | None) -> str:
  """A line about a suite."""
  head, host = f"{suite or 'drawing'}: {wanted.num_pictures} pictures", rate and f"a core of this machine scores {rate:.3g} pictures/s"
  if not all(line.bound for line in lines):
    return f"{head}{f'; {host}' if host else ''}"
  least, most = (sum(line.calls * of(line.bound) for line in lines) for of in (lambda bound: bound["step_s"], serial))
  text = f"{head}: {least / 3600:.2f} h at least, {most / 3600:.2f} h if nothing overlaps"
  if not host:
    return text
  few, many = (math.ceil(wanted.num_pictures / seconds / rate) for seconds in (most, least))
  cores = f"{few} cores" if few == many else f"{few} to {many} cores"
  return f"{text}; {host}, so that {cores} keep the devices busy, and one takes {wanted.num_pictures / rate / 3600:.2f} h"


def serial(bound: dict[str, float]) -> float:
  """Seconds of a call in which nothing overlaps."""
  return sum(bound[name] for name in ("compute_s", "hbm_s", "ici_s", "dcn_s"))
