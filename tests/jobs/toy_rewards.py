"""Rewards of the toy method `rewarded`, for processes without jax: a picture is a point, [1, 2, 1] uint8, from -4 to 4."""

import numpy as np

CENTRES = 2.0 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])


def near(picture, task):
  """Minus the distance to the heap of the task's label; now and then it fails."""
  if task["sample_id"] % 16 == 5:
    raise ValueError("this one is blurred")
  return -float(np.hypot(*(picture[0, :, 0] / 255 * 8 - 4 - CENTRES[task["label"]])))


def odd(picture, task):
  """What only tasks of one category are scored by, and some of them cannot be."""
  if task["sample_id"] % 4 == 3:
    raise ValueError("there is nothing to see")
  return 1.0
