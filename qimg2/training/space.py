"""A disk that is full may have room again soon: what cannot be written is tried again for a while, and said."""

import errno
import time
from collections.abc import Callable

from absl import logging

RETRY_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("no space left on device", "disk quota exceeded")  # of libraries that keep no number


def is_full(error: BaseException | None) -> bool:
  """Whether an error, or one that it came from, says that a disk is full or a quota is used up."""
  while error is not None:
    if getattr(error, "errno", None) in _FULL or any(word in str(error).lower() for word in _WORDS):
      return True
    error = error.__cause__ or error.__context__
  return False


def when_there_is_room(act: Callable[[], None], wait_s: float, what: str, again: Callable[[], None] | None = None) -> None:
  """Calls `act`; where the disk is full, says on the log what is wanted, and calls `again`, by default `act`, every `RETRY_S` seconds.

  Raises:
    OSError: what `act` raised for another reason, or for this one still after `wait_s` seconds.
  """
  end = time.monotonic() + wait_s
  try:
    act()
    return
  except OSError as error:
    if not is_full(error) or wait_s <= 0:
      raise
    failure = error
  logging.warning("The disk is full: %s cannot be written (%s). Free some space: it is tried again for %.0f s.", what, failure, wait_s)
  while (left := end - time.monotonic()) > 0:
    time.sleep(min(RETRY_S, left))
    try:
      (again or act)()
      logging.warning("There is room again: %s is written.", what)
      return
    except OSError as error:
      if not is_full(error):
        raise
      failure = error
  raise failure
