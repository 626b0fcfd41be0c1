"""A TPU slice that is not there, as libtpu describes it, and what its compiler writes down while it works."""

import atexit
import importlib.util
import math
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
from jax.experimental import topologies

from qimg2.analysis import roofline
from qimg2.runtime import phases

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_LOG_DIR": "disabled",
               "TPU_WORKER_HOSTNAMES": "localhost"}
ACCELERATORS = {"v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}  # only so that libtpu does not ask the network
ASSIGNED = "after_optimizations_after_buffer_assignment.txt"  # the program, scheduled, with a place in memory for every array
# Names of the functions that are rehearsed: the step, the evaluation, a suite's judge, what draws, the parts of a rollout, a vision tower.
MODULES = ("step", "step_begin", "step_add", "step_end", "sums", "judge_pictures", *phases.NETWORK, "generate", "judge", "merge", "minibatches",
           "vision")
NEXT = "debug_options"  # what the compiler writes after each such text


def find_devices(topology: str, num_slices: int = 1) -> tuple[list[Any], roofline.Chip | None]:
  """(devices of a topology such as "v5p:4x4x8" or "cpu:8", the published rates of its chip or None).

  Raises:
    ValueError: libtpu is missing, or does not know the topology.
  """
  kind, shape = _parse(topology)
  if kind == "cpu":
    if len(jax.devices("cpu")) < int(shape):
      raise ValueError(f"Topology {topology!r} needs {shape} simulated devices, but this process has {len(jax.devices('cpu'))}: "
                       f"set JAX_NUM_CPU_DEVICES={shape}.")
    return jax.devices("cpu")[:int(shape)], None
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError("To compile for a TPU needs its compiler, which is not installed: pip install libtpu.")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", ACCELERATORS[kind])
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **({"num_slices": num_slices} if num_slices > 1 else {}))
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"Topology {topology!r} cannot be had: {error}.") from error
  return list(described.devices), roofline.CHIPS[kind]


def num_chips(topology: str, num_slices: int = 1) -> int:
  """How many chips a topology such as "v5p:4x4x8" has; simulated devices count as one each.

  Raises:
    ValueError: it is no topology.
  """
  return num_slices * math.prod(map(int, _parse(topology)[1].split("x")))


def _parse(topology: str) -> tuple[str, str]:
  """(kind of chip or "cpu", shape such as "4x4x8")."""
  kind, _, shape = topology.partition(":")
  if not (kind == "cpu" and re.fullmatch("[1-9][0-9]*", shape) or kind in roofline.CHIPS and re.fullmatch("[1-9][0-9]*(x[1-9][0-9]*)*", shape)):
    raise ValueError(f"Topology {topology!r} is not understood: give one of {', '.join(roofline.CHIPS)} and a shape, such as v5e:1x1, v5p:4x4x8 or "
                     "cpu:8.")
  return kind, shape


def prepare_environment(topology: str) -> None:
  """Sets what jax and libtpu read when they start: no search for a real TPU, no lock between processes, simulated devices for cpu:N, and for a
  TPU a folder for the text of what is compiled, which lives as long as the process."""
  for name, value in ENVIRONMENT.items():
    os.environ[name] = value
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)  # what is not compiled is not written down
  if "--xla_dump_to" not in os.environ.get("XLA_FLAGS", "") and not topology.startswith("cpu"):
    folder = tempfile.mkdtemp(prefix="rehearse_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_({'|'.join(MODULES)})"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()
  kind, _, shape = topology.partition(":")
  if kind == "cpu" and shape.isdigit():
    jax.config.update("jax_num_cpu_devices", int(shape))


# What the compiler writes down.


def dumped() -> list[pathlib.Path]:
  """What the compiler wrote down of what is rehearsed."""
  folder = re.search(r"--xla_dump_to=(\S+)", os.environ.get("XLA_FLAGS", ""))
  return [path for path in pathlib.Path(folder[1]).glob("*jit_*") if path.is_file()] if folder else []


def is_assigned() -> bool:
  """Whether the program that is being compiled is scheduled and has its memory: what follows is machine code alone."""
  written = {ending: max((file.stat().st_mtime_ns for file in dumped() if file.name.endswith(ending)), default=0) for ending in (ASSIGNED, NEXT)}
  return 0 < written[ASSIGNED] <= written[NEXT]


def program_text() -> str | None:
  """The program that was compiled last as text, with its schedule and memory spaces; None if the compiler wrote nothing down. (A libtpu that is
  newer than jaxlib writes instructions that `Compiled.as_text` cannot read back.)"""
  return _newest(ASSIGNED)


def reserved_bytes() -> float | None:
  """Main memory that the program compiled last reserves: arguments, results, everything between and the gaps; None if that is not written down.
  What is local to a thread of the compiled program is another name for a part of the rest, and memory of another colour is not main memory."""
  text = _newest("after_optimizations-buffer-assignment.txt")
  found = re.findall(r"^allocation \d+: size (\d+), page \d+(?!.*thread-local)", text or "", re.MULTILINE)
  return float(sum(map(int, found))) if found else None


def _newest(ending: str) -> str | None:
  files = [file for file in dumped() if file.name.endswith(ending)]
  return max(files, key=lambda file: file.stat().st_mtime).read_text(encoding="utf-8") if files else None
