"""Several processes that run one launcher together: how they find each other, wait for each other, and end together.

  python -m launch.train ... --coordinator=HOST:PORT --num_processes=4 --process_id=0   (and 1, 2, 3)
  python -m launch.train ... --distributed=auto                                          (on every worker of a TPU pod, or under Slurm)

All processes call the same functions in the same order; process 0 alone writes files that are not checkpoints. When one of them fails, it tells
the others through JAX's coordination service, which runs in process 0; when one of them is lost, process 0 misses its heartbeats there and tells
the others; when process 0 is lost, JAX aborts the others, which is caught. Either way every other one ends with one line and a code that says
whether starting all of them again helps:

  1    a mistake or a defect: the line says what; it would happen again
  75   a process is lost, its machine perhaps, or did not start: start all again, and training goes on from the last checkpoint
"""

import ctypes
import dataclasses
import hashlib
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from jax._src import distributed

from qimg2.training.faults import EXIT_CODE
from qimg2.training.programs import is_compiling

BARRIER_S = 3600
_POLL_S = 1.0
_FAILURE, _BEATS = "qimg2/failure", "qimg2/beat/"
# What JAX says when another process is gone: over gloo, by its coordination service, or from a TPU whose neighbour halted.
_BROKEN = re.compile(r"gloo|(closed|reset) by peer|coordination service|barrier|heartbeat|task:\d|^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)|halted",
                     re.IGNORECASE)
_AGAIN = "start all processes again, and training goes on from the last checkpoint."
_GOES_ON = "The same command goes on."
_numbers = itertools.count()
_end_once = threading.Lock()
_met, _ended = threading.Event(), threading.Event()
_connect_timeout_s: list[int] = []  # read where JAX aborts this process


@dataclasses.dataclass(frozen=True)
class Rendezvous:
  """Where and how the processes of one run meet.

  Attributes:
    coordinator: HOST:PORT of process 0; "" for one process alone, or with `distributed`.
    num_processes, process_id: how many there are, and which one this is, counted from 0; with `coordinator`.
    distributed: "off", or "auto" for processes that JAX finds by itself, as on a TPU pod or under Slurm.
    heartbeat_timeout_s: without a sign of life for so long a process counts as lost, and the others end.
    connect_timeout_s: in which all processes must have started.
    quiet: whether processes other than 0 log errors alone.
  """
  coordinator: str = ""
  num_processes: int | None = None
  process_id: int | None = None
  distributed: str = "off"
  heartbeat_timeout_s: int = 100
  connect_timeout_s: int = 300
  quiet: bool = True


def together(act: Callable[[], None], rendezvous: Rendezvous, user_errors: tuple[type[Exception], ...]) -> None:
  """Calls `act` as one of the processes of `rendezvous`; alone if there are no others. SIGTERM ends it, unless `act` is inside
  `qimg2.training.faults.PreemptionNotice`. An exception of `user_errors` is told to all as its sentence, any other with its traceback."""
  jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM; see PreemptionNotice
  if not start(rendezvous):
    try:
      act()
    except SystemExit as stopped:
      _leave(stopped)
    return
  try:
    act()
    barrier("end")  # a process that is done is not lost
  except SystemExit as stopped:
    if stopped.code != EXIT_CODE:
      _fail_all(f"it ended with {stopped.code}.")
    barrier("end")  # all stop together
    _leave(stopped)
  except KeyboardInterrupt:
    _fail_all("it was interrupted.")
  except Exception as error:  # whatever it is, the others must hear of it
    sentence = " ".join(str(error).split())
    if _BROKEN.search(sentence):  # JAX raises it as JaxRuntimeError or ValueError, depending on where the connection broke
      _wait_for_the_cause(sentence, rendezvous)
    if not isinstance(error, user_errors):
      traceback.print_exc()
      sentence = f"{type(error).__name__}: {sentence[:300]}"
    _fail_all(sentence)
  finally:
    _ended.set()


def start(rendezvous: Rendezvous) -> bool:
  """Connects this process with the others if there are any; returns whether there are.

  Raises:
    ValueError: fields that do not go together, or processes that did not start.
  """
  if not rendezvous.coordinator and rendezvous.distributed == "off":
    if rendezvous.num_processes is not None or rendezvous.process_id is not None:
      raise ValueError("--num_processes and --process_id need --coordinator, the HOST:PORT where the processes meet.")
    return False
  where = _place(rendezvous)
  if where:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  _connect_timeout_s.append(rendezvous.connect_timeout_s)
  ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)  # Python's own handlers never run in a process that aborts
  try:
    # JAX's own heartbeats are the last resort: it ends processes with pages of text.
    jax.distributed.initialize(initialization_timeout=rendezvous.connect_timeout_s,
                               heartbeat_timeout_seconds=2 * rendezvous.heartbeat_timeout_s + 30, **where)
  except (RuntimeError, ValueError) as error:  # those who do not come make it abort
    raise ValueError(f"JAX cannot connect the processes ({' '.join(str(error).split())[:200]}): give --coordinator, --num_processes and "
                     "--process_id where it does not find the others by itself.") from error
  threading.Thread(target=_watch, args=(rendezvous.heartbeat_timeout_s,), daemon=True).start()
  _met.set()
  if jax.process_index() and rendezvous.quiet:
    logging.set_verbosity(logging.ERROR)  # process 0 says it
  return True


def is_first() -> bool:
  """Whether this is process 0, which writes what all would write alike."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns when all processes have come to this point, however long the slowest works, up to an hour."""
  if jax.process_count() > 1:
    distributed.global_state.client.wait_at_barrier(f"qimg2/{name}/{next(_numbers)}", BARRIER_S * 1000)


def in_turn(name: str, act: Callable[[], Any]) -> None:
  """Calls `act` on process 0, and then on the others: what it made once is there, or on disks of their own they make the same."""
  if is_first():
    act()
  barrier(name)
  if not is_first():
    act()


def from_first(what: str, text: str) -> str:
  """The text that process 0 gives, on every process. All must call it alike."""
  if jax.process_count() == 1:
    return text
  client, key = distributed.global_state.client, f"qimg2/agree/{what}/{next(_numbers)}"
  if is_first():
    client.key_value_set(key, text)
    return text
  return client.blocking_key_value_get(key, BARRIER_S * 1000)


def agree(what: str, text: str) -> None:
  """Checks that `text` is the same on all processes.

  Raises:
    ValueError: it is not.
  """
  digest = hashlib.sha256(text.encode()).hexdigest()
  if from_first(what, digest) != digest:
    raise ValueError(f"The {what} of process {jax.process_index()} is not that of process 0: start all processes with the same flags and files.")


def _place(rendezvous: Rendezvous) -> dict[str, Any]:
  """The arguments of `jax.distributed.initialize` that say who meets where; none where JAX finds out by itself."""
  if rendezvous.distributed == "auto":
    if rendezvous.coordinator:
      raise ValueError("--distributed=auto finds the coordinator by itself: leave out --coordinator, or give --num_processes and --process_id.")
    return {}
  if rendezvous.num_processes is None or rendezvous.process_id is None:
    raise ValueError(f"--coordinator={rendezvous.coordinator} needs --num_processes and --process_id.")
  if rendezvous.process_id >= rendezvous.num_processes:
    raise ValueError(f"--process_id={rendezvous.process_id} must be below --num_processes={rendezvous.num_processes}: processes are counted from 0.")
  if not re.fullmatch(r".+:\d+", rendezvous.coordinator):
    raise ValueError(f"--coordinator={rendezvous.coordinator} names no port: give HOST:PORT, such as 10.0.0.2:8476.")
  return {"coordinator_address": rendezvous.coordinator, "num_processes": rendezvous.num_processes, "process_id": rendezvous.process_id}


# How it ends.


def _end(sentence: str, code: int) -> None:
  """Ends this process at once: those that wait for a lost one would never come to a regular end."""
  _end_once.acquire()  # never released: one line, and one code
  sys.stdout.flush()
  print(f"error: {sentence}", file=sys.stderr, flush=True)
  os._exit(code)


def _leave(stopped: SystemExit) -> None:
  """Raises it. While programs are still being compiled it ends the process at once, with the same code: who takes the machine away does not wait."""
  if not is_compiling():
    raise stopped
  _ended.set()
  if jax.process_count() > 1:
    jax.distributed.shutdown()  # which waits for the others
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None))


def _fail_all(sentence: str, code: int = 1) -> None:
  """Ends all processes for the same reason."""
  _ended.set()
  try:
    distributed.global_state.client.key_value_set(_FAILURE, f"Process {jax.process_index()} failed: {sentence}")
  except jax.errors.JaxRuntimeError:
    pass  # another one was faster, or the coordinator is gone: the others know
  if is_first():
    time.sleep(3 * _POLL_S)  # it holds what the others have to read
  _end(sentence, code)


def fail(sentence: str) -> None:
  """Ends this process and all others at once, from any thread, with 1 and a line that says why."""
  if jax.process_count() > 1:
    _fail_all(sentence)
  _end(sentence, 1)


def fail_for_now(sentence: str) -> None:
  """Ends this process and all others with 75 and a line that says why: the same command goes on.

  Raises:
    SystemExit: where there are no others.
  """
  sentence = sentence.removesuffix(_GOES_ON).rstrip()
  if jax.process_count() > 1:
    _fail_all(f"{sentence} {_AGAIN[0].upper()}{_AGAIN[1:]}", EXIT_CODE)
  print(f"error: {sentence} {_GOES_ON}", file=sys.stderr)
  sys.exit(EXIT_CODE)


def _watch(heartbeat_timeout: int) -> None:
  """Until this process ends: says that it lives, and looks whether another one failed. Process 0 also looks whether all live."""
  client, me, beats = distributed.global_state.client, distributed.global_state.process_id, _Heartbeats(distributed.global_state.num_processes)
  while not _ended.wait(_POLL_S):
    try:
      client.key_value_set(f"{_BEATS}{me}", str(time.monotonic()), allow_overwrite=True)
      lost = beats.lost(client.key_value_dir_get(_BEATS), heartbeat_timeout) if me == 0 else []
      if lost:
        client.key_value_set(_FAILURE, f"{_names(lost)} lost: {_AGAIN}")
      sentence = client.key_value_try_get(_FAILURE)
    except jax.errors.JaxRuntimeError:
      continue  # nobody failed
    if me == 0:
      time.sleep(3 * _POLL_S)
    _end(sentence, EXIT_CODE if sentence.endswith(_AGAIN[1:]) else 1)


class _Heartbeats:
  """When each process last said that it lives, by this process's clock."""

  def __init__(self, num: int):
    self._last = {process: ("", time.monotonic()) for process in range(num)}

  def lost(self, found: Sequence[tuple[str, str]], timeout: float) -> list[int]:
    """The processes that said nothing new for `timeout` seconds; `found` holds (key, what it said last) of each."""
    now = time.monotonic()
    for key, text in found:
      process = int(key.rpartition("/")[2])
      if self._last[process][0] != text:
        self._last[process] = text, now
    return [process for process, (_, when) in self._last.items() if now - when > timeout]


def _names(numbers: Sequence[int]) -> str:
  return f"Process {numbers[0]} is" if len(numbers) == 1 else f"Processes {', '.join(map(str, numbers))} are"


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
  """Ends a process that JAX aborts, which it does when processes do not meet, or when it cannot reach process 0. Where process 0 answers, the
  reason is another one."""
  if not _met.is_set():
    _end(f"The processes did not meet within {_connect_timeout_s[0]} s: start all of them with the same flags, each with its own --process_id.",
         EXIT_CODE)
  host, _, port = distributed.global_state.coordinator_address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
  except OSError:
    _end(f"{_names([0])} lost, which all others are connected to: {_AGAIN}", EXIT_CODE)
  _end("JAX aborted this process, for the reason above.", 128 + number)


def _wait_for_the_cause(sentence: str, rendezvous: Rendezvous) -> None:
  """A broken connection says that somebody is gone, but not who and why: waits until `_watch` or `_on_abort` knows and ends this process."""
  time.sleep(rendezvous.heartbeat_timeout_s + 10)
  _end(f"The connection to another process broke ({sentence[:200]}): {_AGAIN}", EXIT_CODE)
