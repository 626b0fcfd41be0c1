"""One job at a time in the folder of a run, on a disk or in a bucket.

`train.lock` says who holds it: host, process, since when. The holder gives a sign of life every `BEAT_S` seconds, which changes the file. Who finds
the file looks whether it changes, by a clock of its own, so that machines' clocks may differ. While it does, the run is refused. Otherwise the
lock is stale, and taken over:

  at once            on the machine of the holder, where the process is gone
  after RESTART_S    on a machine of the same name that has another view of processes, such as a pod whose container was started again
  after STALE_S      anywhere else

Several processes of one job are one holder: process 0 has the lock. A holder that was silent for long, because its machine slept or lost the disk,
may find that another one has the lock. It ends then, before it writes another checkpoint over the other's.
"""

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from qimg2.places import Place, check_rights, client_failures, is_remote, write_file
from qimg2.runtime import processes

NAME = "train.lock"
BEAT_S, RESTART_S, STALE_S = 5.0, 12.0, 30.0
_LOOK_S, _SETTLE_S = 0.5, 1.0


class RunLock:
  """The lock of a run's folder, held inside `with RunLock(workdir, lost):`.

  Raises:
    ValueError: another job holds it.
    OSError: the folder cannot be written.
  """

  def __init__(self, workdir: Place, lost: Callable[[str], None]):
    """Args: folder of the run; what to call, in a thread, with a sentence, when another job has taken the lock over."""
    self._place, self._workdir, self._lost = workdir / NAME, workdir, lost
    self._ended, self._thread = threading.Event(), threading.Thread(target=self._beat, name="lock", daemon=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    self._record = {"holder": secrets.token_hex(8), **_here(), "since": now}

  def __enter__(self):
    if not is_remote(self._workdir):
      self._workdir.mkdir(parents=True, exist_ok=True)
    if not self._create():
      self._take_over()
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    self._thread.join(STALE_S)
    try:
      with client_failures():
        if self._is_mine():
          self._place.unlink(missing_ok=True)
    except OSError as error:  # what the job did, and how it ended, is not changed by that
      logging.warning("The lock of the run in %s cannot be removed (%s): the next job waits for it.", self._workdir, error)

  def _create(self) -> bool:
    """Whether the lock was free, and is this one's now."""
    if is_remote(self._place):
      if self._place.exists():
        return False
    else:
      part = self._place.with_name(f"{NAME}.{self._record['holder']}")
      try:
        with open(part, "w", encoding="utf-8") as file:
          file.write(json.dumps(self._record))
          file.flush()
          os.fsync(file.fileno())  # an empty file after a power failure would be a lock of nobody
        os.link(part, self._place)  # whole, or not at all
        return True
      except FileExistsError:
        return False
      except OSError:
        if self._place.exists() or not part.exists():  # a file system without links
          raise
      finally:
        part.unlink(missing_ok=True)
    return self._write()

  def _write(self) -> bool:
    """Whether this one's record is still there a moment after it was written: of two that come at once, the later one's is."""
    write_file(self._place, json.dumps(self._record))
    time.sleep(_SETTLE_S)
    return self._is_mine()

  def _take_over(self) -> None:
    """Takes the lock if its holder gives no sign of life."""
    seen = check_free(self._workdir)
    if seen:
      logging.warning("The lock of the run in %s is taken over: %s, which had it, gave no sign of life.", self._workdir, seen)
    if not (self._write() if seen else self._create()):
      raise ValueError(f"Another job took the run in {self._workdir} at the same moment: wait until it ends, or use another --workdir.")

  def _is_mine(self) -> bool:
    found = _look(self._place)
    return bool(found) and _parse(found[0]).get("holder") == self._record["holder"]

  def _beat(self) -> None:
    """Gives signs of life until the end."""
    number, is_silent = 0, False
    while not self._ended.wait(BEAT_S):
      number += 1
      try:
        with client_failures():
          seen = _look(self._place)
          found = _parse(seen[0]) if seen else {}
          if found and found.get("holder") != self._record["holder"]:
            self._lost(f"The run in {self._workdir} was taken over by {_name(found)} while this process gave no sign of life: it ends here, and that "
                       "one goes on.")
            return
          self._show(number, bool(found))
        is_silent = False
      except Exception as error:  # whatever a client raises: without signs of life the run would be taken over
        if not is_silent:
          logging.warning("The lock of the run in %s cannot be renewed (%s): another job may take it over.", self._workdir, error)
        is_silent = True

  def _show(self, number: int, is_there: bool) -> None:
    if is_there and not is_remote(self._place):
      os.utime(self._place)  # which a full disk does not mind
    else:
      write_file(self._place, json.dumps(self._record | {"beat": number}))


def check_free(workdir: Place) -> str:
  """Waits as long as the module docstring says for a sign of life of who holds a run, and returns who that was, in words, if none comes; "" where
  there is no lock. Nothing is written.

  Raises:
    ValueError: another job trains the run.
  """
  place, begin, said = workdir / NAME, time.monotonic(), False
  seen = _look(place)
  while seen:
    record = _parse(seen[0])
    if time.monotonic() - begin >= _patience(record):
      return _name(record)
    if not said:
      said = True
      logging.warning("The run in %s is held by %s: looking for a sign of life of it, for up to %.0f s.", workdir, _name(record), _patience(record))
    time.sleep(_LOOK_S)
    now = _look(place)
    if now and now != seen:
      raise ValueError(f"The run in {workdir} is being trained by {_name(_parse(now[0]))}: wait until it ends, stop it, or use another --workdir.")
    seen = now
  return ""


@contextlib.contextmanager
def hold(workdir: Place) -> Iterator[None]:
  """The lock of a run's folder for all processes of this job, as in `RunLock`. Whoever loses it ends all of them."""
  with contextlib.ExitStack() as stack:
    if processes.is_first():
      check_rights(workdir)
      stack.enter_context(RunLock(workdir, processes.fail))
    processes.barrier("lock")
    yield


def _here() -> dict[str, Any]:
  """What names this process: host, process, when that began in ticks of the kernel, the kernel's own start, and its view of processes."""
  return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid()), "kernel": _read("/proc/sys/kernel/random/boot_id"),
          "processes": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""}


def _patience(record: dict[str, Any]) -> float:
  """Seconds in which the holder must give a sign of life."""
  here = _here()
  same = lambda *keys: all(here[key] and record.get(key) == here[key] for key in keys)
  if same("kernel", "processes"):
    return STALE_S if _began(record.get("pid", 0)) == record.get("began") else 0.0
  return RESTART_S if same("host", "kernel") else STALE_S


def _began(pid: int) -> str:
  """When a process was started, in ticks since the kernel was; "" where there is none, or it is not known."""
  fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # from the third on: the name before may hold anything
  return fields[19] if fields and fields[0] not in "XZ" else ""


def _read(path: str) -> str:
  try:
    return pathlib.Path(path).read_text(encoding="utf-8").strip()
  except OSError:
    return ""


def _look(place: Place) -> tuple[str, int] | None:
  """(what a lock says, a number that changes with signs of life); None where there is none."""
  try:
    return place.read_text(), 0 if is_remote(place) else place.stat().st_mtime_ns
  except FileNotFoundError:
    return None


def _parse(text: str) -> dict[str, Any]:
  try:
    record = json.loads(text)
  except ValueError:
    return {}
  return record if isinstance(record, dict) else {}


def _name(record: dict[str, Any]) -> str:
  return f"process {record.get('pid', '?')} on {record.get('host', 'an unknown host')} (since {record.get('since', 'an unknown time')})"
