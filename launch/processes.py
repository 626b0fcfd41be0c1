"""Several processes that run one launcher together: how they find each other, wait for each other, and end together.

  python -m launch.train ... --coordinator=HOST:PORT --num_processes=4 --process_id=0   (and 1, 2, 3)
  python -m launch.train ... --distributed=auto                                          (on every worker of a TPU pod, or under Slurm)

All processes call the same functions in the same order; process 0 alone writes files that are not checkpoints. When one of them fails, it tells
the others through JAX's coordination service; when one of them is lost, that service notices the missing heartbeats. Either way every other one
ends with one line and a code that says whether starting all of them again helps:

  1    a mistake or a defect: the line says what; it would happen again
  75   a process is lost, its machine perhaps, or did not start: start all again, and training goes on from the last checkpoint
"""

import hashlib
import itertools
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags, logging
from jax._src import distributed

from launch.cli import USER_ERRORS

TRY_AGAIN = 75  # EX_TEMPFAIL
BARRIER_S = 3600
_POLL_S = 1.0
_FAILURE = "qimg2/failure"
_CONNECTION = re.compile(r"gloo|peer|socket|connection|barrier|UNAVAILABLE|DEADLINE|ABORTED|CANCELLED|heartbeat", re.IGNORECASE)
_numbers = itertools.count()
_end_once = threading.Lock()
_ended = threading.Event()


def define_flags() -> None:
  """The flags of every launcher that can run as several processes."""
  flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where the processes of one run meet; empty for one process alone.")
  flags.DEFINE_integer("num_processes", None, "How many processes there are; with --coordinator.", lower_bound=1)
  flags.DEFINE_integer("process_id", None, "Which of them this one is, counted from 0; with --coordinator.", lower_bound=0)
  flags.DEFINE_enum("distributed", "off", ["off", "auto"], "auto: one of several processes that JAX finds by itself, as on a TPU pod or under Slurm.")
  flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds without a sign of life after which a process counts as lost and the others end.",
                       lower_bound=2)
  flags.DEFINE_integer("connect_timeout", 300, "Seconds in which all processes must have started.", lower_bound=1)


def together(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
  """`main` as one of the processes that the flags speak of; without such flags `main` as it is."""
  def wrapped(argv: Sequence[str]) -> None:
    if not start(flags.FLAGS):
      main(argv)
      return
    try:
      main(argv)
    except USER_ERRORS as error:
      _fail_all(" ".join(str(error).split()))
    except jax.errors.JaxRuntimeError as error:
      _wait_for_the_cause(error)
    except Exception as error:  # a defect: its traceback here, one line on the others
      traceback.print_exc()
      _fail_all(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    _ended.set()
  return wrapped


def start(args: flags.FlagValues) -> bool:
  """Connects this process with the others if the flags say that there are any; returns whether there are.

  Raises:
    ValueError: flags that do not go together, or processes that did not start.
  """
  if not args.coordinator and args.distributed == "off":
    if args.num_processes is not None or args.process_id is not None:
      raise ValueError("--num_processes and --process_id need --coordinator, the HOST:PORT where the processes meet.")
    return False
  where = _place(args)
  if where:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    _initialize(args.heartbeat_timeout, initialization_timeout=args.connect_timeout, **where)
  except jax.errors.JaxRuntimeError as error:
    _end(f"The processes did not meet within {args.connect_timeout} s ({' '.join(str(error).split())[:200]}): start all of them with the same "
         "flags, each with its own --process_id.", TRY_AGAIN)
  except (RuntimeError, ValueError) as error:
    raise ValueError(f"JAX cannot connect the processes ({' '.join(str(error).split())[:200]}): give --coordinator, --num_processes and "
                     "--process_id where it does not find the others by itself.") from error
  threading.Thread(target=_watch, daemon=True).start()
  if jax.process_index() and not args["verbosity"].present:
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


def agree(what: str, text: str) -> None:
  """Checks that `text` is the same on all processes.

  Raises:
    ValueError: it is not.
  """
  if jax.process_count() == 1:
    return
  client, key, digest = distributed.global_state.client, f"qimg2/agree/{what}/{next(_numbers)}", hashlib.sha256(text.encode()).hexdigest()
  if is_first():
    client.key_value_set(key, digest)
  elif client.blocking_key_value_get(key, BARRIER_S * 1000) != digest:
    raise ValueError(f"The {what} of process {jax.process_index()} is not that of process 0: start all processes with the same flags and files.")


def _place(args: flags.FlagValues) -> dict[str, Any]:
  """The arguments of `jax.distributed.initialize` that say who meets where; none where JAX finds out by itself."""
  if args.distributed == "auto":
    if args.coordinator:
      raise ValueError("--distributed=auto finds the coordinator by itself: leave out --coordinator, or give --num_processes and --process_id.")
    return {}
  if args.num_processes is None or args.process_id is None:
    raise ValueError(f"--coordinator={args.coordinator} needs --num_processes and --process_id.")
  if args.process_id >= args.num_processes:
    raise ValueError(f"--process_id={args.process_id} must be below --num_processes={args.num_processes}: processes are counted from 0.")
  if not re.fullmatch(r".+:\d+", args.coordinator):
    raise ValueError(f"--coordinator={args.coordinator} names no port: give HOST:PORT, such as 10.0.0.2:8476.")
  return {"coordinator_address": args.coordinator, "num_processes": args.num_processes, "process_id": args.process_id}


def _initialize(heartbeat_timeout: int, **settings: Any) -> None:
  """`jax.distributed.initialize` with a callback for lost processes, which it has no argument for: its own one aborts with a stack trace."""
  library = distributed._jax
  make = library.get_distributed_runtime_client
  library.get_distributed_runtime_client = lambda *args, **more: make(*args, **more, missed_heartbeat_callback=_on_lost)
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_timeout, **settings)
  finally:
    library.get_distributed_runtime_client = make


# How it ends.


def _end(sentence: str, code: int) -> None:
  """Ends this process at once: those that wait for a lost one would never come to a regular end."""
  _end_once.acquire()  # never released: one line, and one code
  sys.stdout.flush()
  print(f"error: {sentence}", file=sys.stderr, flush=True)
  os._exit(code)


def _fail_all(sentence: str) -> None:
  """Ends all processes for the same reason."""
  _ended.set()
  try:
    distributed.global_state.client.key_value_set(_FAILURE, f"Process {jax.process_index()} failed: {sentence}")
  except jax.errors.JaxRuntimeError:
    pass  # another one was faster, or the coordinator is gone: the others know
  if is_first():
    time.sleep(3 * _POLL_S)  # it holds what the others have to read
  _end(sentence, 1)


def _watch() -> None:
  """Looks whether another process failed, until this one ends."""
  while not _ended.wait(_POLL_S):
    try:
      sentence = distributed.global_state.client.key_value_try_get(_FAILURE)
    except (jax.errors.JaxRuntimeError, AttributeError):
      continue  # nobody did, or the coordinator is gone, of which `_on_lost` hears
    if is_first():
      time.sleep(3 * _POLL_S)
    _end(sentence, 1)


def _on_lost(status: Any) -> None:
  """Called by the coordination service."""
  if _ended.is_set():
    return
  lost = sorted({int(task) for task in re.findall(r"task:(\d+)", str(status))})
  who = f"Process {', '.join(map(str, lost))} is" if len(lost) == 1 else f"Processes {', '.join(map(str, lost))} are" if lost else (
      "Process 0, the coordinator, is")
  _end(f"{who} lost: start all processes again, and training goes on from the last checkpoint.", TRY_AGAIN)


def _wait_for_the_cause(error: Exception) -> None:
  """A broken connection says that somebody is gone, but not who and why: waits until that is known, and then ends."""
  broken = bool(_CONNECTION.search(str(error)))
  time.sleep(flags.FLAGS.heartbeat_timeout + 10 if broken else 3 * _POLL_S)
  if broken:
    _end(f"The connection to another process broke ({' '.join(str(error).split())[:200]}): start all processes again, and training goes on from the "
         "last checkpoint.", TRY_AGAIN)
  traceback.print_exc()
  _fail_all(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
