"""Rewards of pictures: pure functions of a picture and its task.

A *task* is what is known of the picture that was asked for: a mapping with "prompt", "category", and the truth that the record holds, see
`data_pipelines.truths`; and with pictures [h, w, C] uint8: "sources", a tuple of the condition images, and "reference", the record's own picture,
where the batch has it. A reward is a number; more of it is better. The same picture and task give the same number, at any time and in any process: a
run that was killed scores its last pictures again, and must go on with the same bits.

What cannot be scored is NaN: a picture, or a task without the truth that the reward needs. It is never 0, because a method would learn from that.
Nothing here imports jax: rewards run in processes beside the one that has the device.

  glyphs   shape and colours of the embedded data set's pictures, and of its edits
  text     text in pictures, read by OCR
  edits    what an edit should leave as it is
  own      a function of the user's
  service  an HTTP endpoint of the user's
  vlm      a vision-language model as a judge on the device: its settings
  kinds    the rewards that a config can name
  pool, worker, scoring   the processes, and all rewards of a stage together
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Task = Mapping[str, Any]
Scored = tuple[float, str]  # (a finite number, "") or (NaN, why there is none)
LARGEST = float(np.finfo(np.float32).max)
PICTURES = ("sources", "reference")  # fields of a task that are pictures


def accept(task: Task) -> None:
  """The check of a reward that needs nothing but a picture."""


def ready() -> None:
  """The check of a reward that needs nothing of its machine."""


def no_files() -> tuple[str, ...]:
  """The files of a reward that reads none of the user's."""
  return ()


@dataclasses.dataclass(frozen=True)
class Reward:
  """One reward. It has a `score`, a `score_batch` or a `judge`.

  Attributes:
    score: (picture [H, W, C] uint8, task) -> a number, in a process of the pool; a function of a module or a partial of one. `ValueError` or
      `OSError` for a picture that cannot be scored. Where it has an attribute `setup`, a function without arguments, each process calls that first.
    score_batch: (pictures [B, H, W, C] uint8, tasks) -> B times `Scored`, in a thread of this process: for a service that waits, and takes many
      pictures at a time.
    judge: settings of a judge on the device, `qimg2.rewards.vlm.Judge`.
    check: raises `ValueError`, a clause without a full stop, for a task without the truth that the reward needs.
    check_machine: raises `ValueError` where this machine lacks what the reward needs, such as a package.
    sees_pictures: whether it looks at those of the task. Others get a task without them, because to send them takes time.
    setup_timeout_s: seconds that `score.setup` may take.
    files: gives the paths of files that change what it computes, but for those of the judge's folder; a run notices when they change.
  """
  score: Callable[[np.ndarray, Task], float] | None = None
  score_batch: Callable[[np.ndarray, Sequence[Task]], Sequence[Scored]] | None = None
  judge: Any = None
  check: Callable[[Task], None] = accept
  check_machine: Callable[[], None] = ready
  sees_pictures: bool = False
  setup_timeout_s: float = 600.0
  files: Callable[[], tuple[str, ...]] = no_files


def scored(number: float) -> Scored:
  """A number as `Scored`; NaN where float32 does not hold it."""
  return (number, "") if abs(number) <= LARGEST else missing(f"it is {number}")


def missing(why: str) -> Scored:
  """What stands for a number that there is not."""
  return math.nan, why


def without_pictures(task: Task) -> dict[str, Any]:
  """A task that JSON can hold."""
  return {name: value for name, value in task.items() if name not in PICTURES}
