"""What an edit should leave as it is, by `qimg2.evaluation.editing`."""

import dataclasses

import numpy as np

from qimg2.evaluation import editing
from qimg2.rewards import Reward, Task


def kept(margin_px: int = editing.MARGIN_PX, tolerance: int = 0) -> Reward:
  """SSIM, -1 to 1, between an edited picture and its first condition image where this and the record's own picture are equal: 1 if nothing was
  touched there. A model that does nothing at all has 1, too: it is a reward beside another one.

  Args:
    margin_px: pixels around what the edit may change that do not count.
    tolerance: levels of 255 by which two pixels may differ and still be equal: 0 for drawn pairs, more for those that were compressed.

  Raises:
    ValueError: numbers out of range.
  """
  if margin_px < 0 or not 0 <= tolerance <= 255:
    raise ValueError(f"margin_px is {margin_px} and tolerance {tolerance}: give at least 0, and 0 to 255.")
  return Reward(_Score(margin_px, tolerance), check=_check, sees_pictures=True)


@dataclasses.dataclass(frozen=True)
class _Score:
  margin_px: int
  tolerance: int

  def __call__(self, picture: np.ndarray, task: Task) -> float:
    _check(task)
    if "reference" not in task:
      raise ValueError("its batch is of a latent cache, which holds no picture of what the edit should give")
    source, target = task["sources"][0][..., :3], task["reference"][..., :3]
    if source.shape == target.shape:  # else `kept_region` says what is wrong
      same = np.abs(source.astype(np.int16) - target).max(axis=-1, keepdims=True) <= self.tolerance
      target = np.where(same, source, target)
    return editing.kept_scores(picture[..., :3], source, editing.kept_region(source, target, self.margin_px))["kept_ssim"]


def _check(task: Task) -> None:
  if not task.get("sources"):
    raise ValueError("its record is no edit: it has no condition image")
