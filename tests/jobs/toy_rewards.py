"""Rewards for processes without jax: those of the toy method `rewarded`, whose picture is a point, [1, 2, 1] uint8, from -4 to 4; and some for tests
of the processes themselves."""

import os
import sys
import time

import numpy as np

CENTRES = 2.0 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])


def near(picture, task):
  """Minus the distance to the heap of the task's label; now and then it fails."""
  if task["sample_id"] % 16 == 5:
    raise ValueError("this one is blurred")
  return -float(np.hypot(*(picture[0, :, 0] / 255 * 8 - 4 - CENTRES[task["label"]])))


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


def pixel(picture, task):
  """The first level of a picture; late pictures come first."""
  time.sleep(0.02 * (4 - int(picture[0, 0, 0])))
  return picture[0, 0, 0]


def knows_jax(picture, task):
  """Whether the process has imported jax, or was told which pictures its task has."""
  return float("jax" in sys.modules) + 2 * float("sources" in task)
