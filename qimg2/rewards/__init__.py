"""Rewards of pictures: pure functions of a picture and its task.

A *task* is what is known of the picture that was asked for: a mapping with "prompt", "category", and the truth that the record holds, see
`data_pipelines.truths`; for an edit also "sources", its condition images. A reward is a number; more of it is better. The same picture and task
give the same number, at any time and in any process: a run that was killed scores its last pictures again, and must go on with the same bits.

What cannot be scored is NaN: a picture, or a task without the truth that the reward needs. It is never 0, because a method would learn from that.
Nothing here imports jax: rewards run in processes beside the one that has the device.

  glyphs   shape and colours of the embedded data set's pictures, and of its edits
  text     text in pictures, read by OCR
  edits    what an edit should leave as it is
  own      a function of the user's, in a module or behind an HTTP endpoint
  pool     the processes
  kinds    the rewards that a config can name
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Task = Mapping[str, Any]


def accept(task: Task) -> None:
  """The check of a reward that needs nothing but a picture."""


@dataclasses.dataclass(frozen=True)
class Reward:
  """One reward. It has a `score` or a `score_batch`.

  Attributes:
    score: (picture [H, W, C] uint8, task) -> a number, in a process of the pool; a function of a module or a partial of one. `ValueError` or
      `OSError` for a picture that cannot be scored.
    score_batch: (pictures [B, H, W, C] uint8, tasks) -> B numbers, NaN for what cannot be scored, in a thread of this process: for a service that
      waits, and takes many pictures at a time.
    check: raises `ValueError`, a clause without a full stop, for a task without the truth that the reward needs.
  """
  score: Callable[[np.ndarray, Task], float] | None = None
  score_batch: Callable[[np.ndarray, Sequence[Task]], Sequence[float]] | None = None
  check: Callable[[Task], None] = accept
