"""A program compiled for devices that need not exist, and what is read from it.

The compiler for TPUs first optimises the program, schedules it and gives every array its place in memory, and then writes machine code, which takes
most of the time and changes none of what is read here. `Child` lets it work in a process of its own, which is ended between the two.
"""

import dataclasses
import math
import multiprocessing
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from data_pipelines.children import end_with_parent
from qimg2.analysis import hlo
from qimg2.runtime.rehearsal import topology
from qimg2.training.programs import Part


@dataclasses.dataclass(frozen=True)
class ChildProcess:
  """Name of a TPU topology and number of slices: programs for it are compiled in a process of their own, up to their machine code."""
  topology: str
  num_slices: int = 1


@dataclasses.dataclass(frozen=True)
class Child:
  """What a process of its own measures: `answer(devices, chip, *arguments)` there is the result of `measure` of the same program."""
  process: ChildProcess
  name: str
  answer: Callable[..., dict]
  arguments: tuple


def measure(part: Part, num_devices: int, limit: float | None, options: dict[str, Any] | None = None, child: Child | None = None) -> dict:
  """"peak_bytes", "limit_bytes", "compile_s" of a program, see `table.Row`, and "traffic" unless it does not fit.

  Args: what is compiled; devices of its mesh; their memory in bytes, None for no limit; the compiler's options; None to compile to the end and here.

  Raises:
    ValueError: as the other process did.
    ChildProcessError: the other process ended otherwise.
  """
  name = part.function.__name__
  assert child is None or name in topology.MODULES, f"{name} is none of the programs whose text the compiler writes down"
  for file in topology.dumped():
    file.unlink()  # of an earlier program
  start, peak = time.monotonic(), None
  if child:
    answer = _measure_in_child(child)
    if answer is not None:
      return answer
  else:
    try:
      compiled = part.compile(options or {})
    except jax.errors.JaxRuntimeError as error:
      sizes = hlo.out_of_memory(str(error))
      if sizes is None:
        raise
      return {"peak_bytes": sizes[0], "limit_bytes": sizes[1], "compile_s": time.monotonic() - start}
    peak = compiled.memory_analysis().peak_memory_in_bytes
  measured = {"limit_bytes": limit, "compile_s": time.monotonic() - start}
  text = topology.program_text() or compiled.as_text()
  peak = (topology.reserved_bytes() or peak) + unread_bytes(part.arguments, text)
  return {"peak_bytes": float(peak), **measured, "traffic": hlo.analyze(text, num_devices)}


def bytes_of(tree: Any) -> float:
  """Of the arrays in a tree on each device."""
  here = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
  return sum(math.prod(here(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def unread_bytes(arguments: Any, text: str) -> float:
  """Of arguments that are none of the compiled program, because it does not read them: they are on the devices all the same. (To have them kept is no
  way: libtpu 0.0.52 crashes on programs of pictures, which do not read the vision tower.)"""
  read = sum(array.num_bytes for one in hlo.parse(text)["ENTRY"] if one.opcode == "parameter" for array in one.arrays)
  return max(0.0, bytes_of(arguments) - read)


def _measure_in_child(child: Child) -> dict | None:
  """None when the compiler has assigned the memory; what the other process measured if it came to its end before that, which it does when the program
  does not fit."""
  context = multiprocessing.get_context("spawn")
  receive, send = context.Pipe(duplex=False)
  process = context.Process(target=_child_main, args=(send, child), daemon=True)
  process.start()
  send.close()
  try:
    while not topology.is_assigned():
      if receive.poll(0.2):
        try:
          answer = receive.recv()
        except EOFError as error:
          process.join()
          raise ChildProcessError(f"The process that compiles {child.name} ended with code {process.exitcode}: what it said stands above; "
                                  "-9 is a machine without memory left.") from error
        if isinstance(answer, Exception):
          raise answer
        return answer
    return None
  finally:
    process.kill()
    process.join()


def _child_main(send: Any, child: Child) -> None:
  """What the other process does."""
  tqdm.set_lock(threading.RLock())  # one between processes would outlive a process that is killed
  end_with_parent()  # nobody is left to tell
  topology.prepare_environment(child.process.topology)
  devices, chip = topology.find_devices(child.process.topology, child.process.num_slices)
  try:
    send.send(child.answer(devices, chip, *child.arguments))
  except ValueError as error:
    send.send(error)
