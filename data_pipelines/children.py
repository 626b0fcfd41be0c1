"""Worker processes that end with the one that started them, however it ends, and leave nothing behind.

A process that is killed runs none of its own code any more. So each worker waits for its parent's end, on a pipe whose other end that has, and ends
too. What is left then, shared memory and semaphores, Python's resource tracker removes: a process of its own, which waits for the last of them.
"""

import multiprocessing
import os
import sys
import threading
from multiprocessing import connection, resource_tracker, util

import numpy as np

_QUIET = "ignore:resource_tracker:UserWarning"


def end_with_parent() -> None:
  """Ends this process, a worker that `multiprocessing` has started, as soon as its parent is gone. A thread waits, not the kernel (PR_SET_PDEATHSIG),
  which takes the end of the thread that started a process for the parent's."""
  def wait() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
  threading.Thread(target=wait, name="end with parent", daemon=True).start()


def end_quickly() -> None:
  """Has this process, a worker that `multiprocessing` has started, end as soon as all that it sent is sent. Python would take everything down first,
  which for the packages that a worker has imported takes nearly a second of a processor."""
  def leave() -> None:
    if sys.exc_info()[0] is None:  # else what went wrong is still to be said
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(0)
  util.Finalize(None, leave, exitpriority=-100)  # queues are emptied at -5


def begin_worker(*_: int) -> None:
  """What a worker that loads data does first, see `end_with_parent` and `end_quickly`. Grain gives its `worker_init_fn` numbers."""
  end_with_parent()
  end_quickly()


def start_tracker() -> None:
  """Starts the resource tracker, where it does not run yet, without its warning about what it removes: only the parent's death leaves it some."""
  before = os.environ.get("PYTHONWARNINGS")
  os.environ["PYTHONWARNINGS"] = f"{before},{_QUIET}" if before else _QUIET
  try:
    resource_tracker.ensure_running()
  finally:
    if before is None:
      del os.environ["PYTHONWARNINGS"]
    else:
      os.environ["PYTHONWARNINGS"] = before


def own(x: np.ndarray) -> np.ndarray:
  """The same array in memory of this process, so that what it was sent in can be given back at once and not when the last name of it is gone."""
  return np.array(x, subok=False)
