"""How every launcher starts: flags are defined, parsed and handed on, and a user's mistake ends in one sentence instead of a traceback."""

import gc
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from launch import console

USER_ERRORS = (ValueError, OSError, FloatingPointError)
IN_CONFIG_FILE = (ImportError, NameError, SyntaxError)
FLAG_ERRORS = (AttributeError, KeyError, OSError, ValueError, TypeError, IndexError, flags.Error, *IN_CONFIG_FILE)


def collect_rarely() -> None:
  """Has Python look for garbage less often. Tracing makes millions of objects that live on, and by default all are looked through at every 70,000th
  or so: a fifteenth of the time of a short run, a tenth of the tests'. Arrays are freed without it, when the last name of them is gone.

  What is imported by now is never looked through again, not at the end either, which takes a second in a process that does little."""
  gc.set_threshold(20_000, 20, 50)
  gc.freeze()


def run(main: Callable[[Sequence[str]], None], define_flags: Callable[[], None]) -> None:
  """Runs `main(argv)` under absl and exits.

  A `ValueError`, a file that cannot be read or written, or a non-finite loss prints its message on stderr and exits with 1; a wrong
  flag, a config file that is missing or a key that the config does not have, with 2; an interruption (Ctrl-C) with 130; a closed pipe quietly
  with 141. Anything else is a defect of the program and keeps its traceback.
  """
  collect_rarely()
  console.begin()
  try:
    define_flags()  # a config file with a default is read here, with what the command line changes in it
  except FLAG_ERRORS as error:
    _fail_flags(error)

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      console.fail(f"What is {argv[1]!r}? Every argument is a flag, --name=value; --help lists them.", 2)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # libraries log every file they touch
    try:
      main(argv)
    except USER_ERRORS as error:
      if isinstance(error, BrokenPipeError) and console.is_closed():
        sys.exit(console.CLOSED)
      console.fail(" ".join(str(error).split()), 1)
    except KeyboardInterrupt:
      console.fail("Interrupted. The same command goes on where it was.", 130)

  try:
    app.run(guarded, flags_parser=_parse)
  finally:
    console.is_closed()  # what is still to be printed is dropped then, and the exit code stays what it is


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(list(argv))
    if getattr(flags.FLAGS, "config", None) is not None:
      flags.FLAGS.config.keys()  # a missing file is only reported when the config is first read
    return rest
  except FLAG_ERRORS as error:
    _fail_flags(error)


def _fail_flags(error: Exception) -> None:
  in_file = "get_config" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]
  while error.args and isinstance(error.args[0], Exception):  # ml_collections hands on the text of an error in another one
    error = error.args[0]
  text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()  # str(KeyError) has quotes around it
  changes = [argument.partition("=")[0] for argument in sys.argv if argument.startswith(("--config.", "-config."))]
  if changes and not in_file and isinstance(error, (AttributeError, KeyError, IndexError, TypeError)):  # none of them says where it was
    text = f"{'one of ' * (len(changes) > 1)}{', '.join(changes)} names no place in the config: {text}"
  if isinstance(error, IN_CONFIG_FILE) and not isinstance(error, SyntaxError):  # that says itself where it is
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{text} ({place.filename}, line {place.lineno})"
  if "Traceback" in text:  # ml_collections hands on that of a config file
    text = text.splitlines()[-1].strip()
  console.fail(f"The flags cannot be used: {' '.join(text.split())}", 2)


def define_step_flag() -> None:
  """The flag of every launcher that reads one checkpoint of a stage."""
  flags.DEFINE_integer("step", None, "Step of the checkpoint to take; default: the newest. config.stages[i].keep_every_steps keeps older ones.",
                       lower_bound=0)


# Launchers that can run as several processes.


def define_process_flags() -> None:
  """The flags of every launcher that can run as several processes."""
  flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where the processes of one run meet; empty for one process alone.")
  flags.DEFINE_integer("num_processes", None, "How many processes there are; with --coordinator.", lower_bound=1)
  flags.DEFINE_integer("process_id", None, "Which of them this one is, counted from 0; with --coordinator.", lower_bound=0)
  flags.DEFINE_enum("distributed", "off", ["off", "auto"], "auto: one of several processes that JAX finds by itself, as on a TPU pod or under Slurm.")
  flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds without a sign of life after which a process counts as lost and the others end.",
                       lower_bound=2)
  flags.DEFINE_integer("connect_timeout", 300, "Seconds in which all processes must have started.", lower_bound=1)


def together(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
  """`main` as one of the processes that the flags speak of; without such flags `main` as it is. See `qimg2.runtime.processes.together`."""
  def wrapped(argv: Sequence[str]) -> None:
    from data_pipelines.loader import WorkerLost
    from qimg2.places import BucketError, client_failures  # jax is not needed to say --help
    from qimg2.runtime import processes

    def run_main() -> None:
      try:
        with client_failures():
          main(argv)
      except (BucketError, WorkerLost) as error:
        processes.fail_for_now(" ".join(str(error).split()))

    args = flags.FLAGS
    rendezvous = processes.Rendezvous(args.coordinator, args.num_processes, args.process_id, args.distributed, args.heartbeat_timeout,
                                      args.connect_timeout, quiet=not args["verbosity"].present)
    processes.together(run_main, rendezvous, USER_ERRORS)
  return wrapped
