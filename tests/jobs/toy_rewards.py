"""Rewards for processes without jax: those of the toy method `rewarded`, whose picture is one pixel, red and green a point from -4 to 4; and some for
tests of the processes themselves."""

import os
import signal
import sys
import time

import numpy as np

CENTRES = 2.0 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])


def near(picture, task):
  """Minus the distance to the heap of the task's label; now and then it fails."""
  if task["sample_id"] % 16 == 5:
    raise ValueError("this one is blurred")
  return -float(np.hypot(*(picture[0, 0, :2] / 255 * 8 - 4 - CENTRES[task["label"]])))


def bright(picture, task):
  """How bright a picture is, 0 to 1."""
  return float(picture.mean() / 255)


def odd(picture, task):
  """What only tasks of one category are scored by, and some of them cannot be."""
  if task["sample_id"] % 4 == 3:
    raise ValueError("there is nothing to see")
  return 1.0


def trouble(picture, task):
  """What a task says: a number, or what goes wrong."""
  if task["do"] == "sleep":
    time.sleep(60)
  if task["do"] == "die":
    os._exit(3)
  if task["do"] == "raise":
    raise ZeroDivisionError("a mistake in the function")
  return task["do"]


class Loaded:
  """What knows whether it was loaded, which takes longer than a picture may; with LOADED_FAILS the first process alone can be."""
  is_ready = False

  def setup(self):
    mark = os.environ.get("LOADED_FAILS", "")
    if mark and os.path.exists(mark):
      raise MemoryError("no room")
    if mark:
      with open(mark, "w", encoding="utf-8"):
        pass
    time.sleep(1.0)
    self.is_ready = True

  def __call__(self, picture, task):
    if task.get("do") == "die":
      os.kill(os.getpid(), signal.SIGKILL)
    return float(self.is_ready)


loaded = Loaded()


def pixel(picture, task):
  """The first level of a picture; late pictures come first."""
  time.sleep(0.02 * (4 - int(picture[0, 0, 0])))
  return picture[0, 0, 0]


def knows_jax(picture, task):
  """Whether the process has imported jax, or was told which pictures its task has."""
  return float("jax" in sys.modules) + 2 * float("sources" in task)
