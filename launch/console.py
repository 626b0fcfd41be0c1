"""What a launcher leaves on the screen: a user's mistake is one sentence, and the last thing there.

Threads of libraries that are cut off by the end of a process print their tracebacks by the hundred, before and after the sentence. They go to a log
file, which is named. So do those that the log of a library would print. A reader of the output that has seen enough (`| head`) ends a
launcher quietly.
"""

import atexit
import contextlib
import os
import pathlib
import select
import sys
import tempfile
import threading
import traceback
from typing import Any, TextIO

from absl import logging

CLOSED = 141  # as a process ends that SIGPIPE ends


class Aside:
  """The log file, which is there when something is in it. `write` adds to it; `divert` sends there what is written to stderr from now on."""

  def __init__(self):
    self.path: pathlib.Path | None = None
    self._stderr: int | None = None
    self._was_named = False

  def write(self, text: str) -> str:
    """Adds a traceback, and returns where it is, in words."""
    try:
      with open(self._made(), "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{text.rstrip()}\n")
    except OSError as error:  # a full disk, no folder for temporary files: no reason to lose the line that this stands behind
      return f"its traceback could not be written: {error}"
    return f"its traceback is in {self.path}"

  def mention(self) -> str:
    """Where more can be read, to stand behind a sentence; "" where nothing is."""
    return f" More is in {self.path}." if self._says_something() else ""

  def divert(self) -> None:
    """What threads and libraries write to stderr from now on goes to the file. When the process ends, one line says so if there was any."""
    self._was_named = self._says_something()
    try:
      file = os.open(self._made(), os.O_WRONLY | os.O_APPEND)
    except OSError:
      return
    self._stderr = os.dup(2)
    os.dup2(file, 2)
    os.close(file)

  def finish(self) -> None:
    """What is left to say, at the end of the process."""
    if self._stderr is None:
      return
    sys.stderr.flush()
    if not self._says_something():
      self.path.unlink(missing_ok=True)
    elif not self._was_named:
      with contextlib.suppress(BrokenPipeError):
        os.write(self._stderr, f"What was cut off by that said more, in {self.path}.\n".encode())

  def _made(self) -> pathlib.Path:
    if self.path is None:
      file, name = tempfile.mkstemp(prefix="qimg2-", suffix=".log")
      os.close(file)
      self.path = pathlib.Path(name)
    return self.path

  def _says_something(self) -> bool:
    return self.path is not None and self.path.exists() and self.path.stat().st_size > 0


class _WithoutTracebacks(logging.PythonFormatter):
  """absl's format; the traceback of a record goes to the file."""

  def __init__(self, aside: Aside):
    super().__init__()
    self._aside = aside

  def format(self, record: Any) -> str:
    """The line of a record."""
    if not record.exc_info and not record.stack_info:
      return super().format(record)
    where = self._aside.write(super().format(record))
    record = type(record)(record.name, record.levelno, record.pathname, record.lineno, f"{record.getMessage()} ({where})", (), None, record.funcName)
    return super().format(record)


def is_own() -> bool:
  """Whether this process and its stderr are the launcher's: not where a test or a notebook calls it."""
  return sys.stderr is sys.__stderr__


_aside = Aside()


def begin() -> None:
  """Sends tracebacks of threads and of logs to the file; a line on stderr stands for each."""
  if not is_own():
    return
  def of_thread(args: threading.ExceptHookArgs) -> None:
    _say(f"The thread {args.thread and args.thread.name!r}", args)

  def unraisable(args: Any) -> None:
    _say(f"{args.err_msg or 'Exception ignored in'} {args.object!r}", args)

  threading.excepthook, sys.unraisablehook = of_thread, unraisable
  logging.get_absl_handler().python_handler.setFormatter(_WithoutTracebacks(_aside))
  atexit.register(_aside.finish)


def _say(what: str, args: Any) -> None:
  where = _aside.write("".join([f"{what}:\n", *traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)]))
  print(f"{what}: {args.exc_type.__name__}: {' '.join(str(args.exc_value).split())[:200]} ({where})", file=sys.stderr)


def fail(sentence: str, code: int) -> None:
  """Prints the sentence as the last thing on stderr, and exits with `code`."""
  with contextlib.suppress(BrokenPipeError):
    sys.stdout.flush()
  print(f"error: {sentence}{_aside.mention() if is_own() else ''}", file=sys.stderr, flush=True)
  if is_own():
    _aside.divert()
  sys.exit(code)


def is_closed() -> bool:
  """Whether nobody reads what this process prints any more. What it prints from then on is dropped."""
  return any([_is_closed(stream) for stream in (sys.stdout, sys.stderr)]) if is_own() else False


def _is_closed(stream: TextIO | None) -> bool:
  if stream is None:  # there was none from the beginning
    return False
  poll = select.poll()
  poll.register(stream.fileno(), 0)  # which tells of a pipe without a reader all the same
  try:
    stream.flush()
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
  except BrokenPipeError:
    closed = True
  if closed:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
      os.dup2(nowhere.fileno(), stream.fileno())
  return closed
