"""Shape and colours of the embedded data set's pictures, and of its edits, by the nearest of all clean renders."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from data_pipelines.embedded import glyphs
from data_pipelines.embedded.glyphs import Attributes
from qimg2.rewards import Reward, Task

PARTS = ("glyph", "ink", "paper", "change")


def glyph(parts: tuple[str, ...] = PARTS[:3]) -> Reward:
  """The share, 0 to 1, of `parts` that a picture gets right.

  Args:
    parts: some of "glyph", "ink" and "paper", as the prompt asks or an edit should give; and, of edits alone, "change": whether the picture is nearer
      to the clean result than to the clean source.

  Raises:
    ValueError: no parts, or unknown ones.
  """
  if not parts or set(parts) - set(PARTS):
    raise ValueError(f"parts is {parts!r}: give some of {', '.join(PARTS)}.")
  score = _Score(parts)
  return Reward(score, check=score.check)


@dataclasses.dataclass(frozen=True)
class _Score:
  parts: tuple[str, ...]

  def __call__(self, picture: np.ndarray, task: Task) -> float:
    self.check(task)
    right = right_parts(picture[..., :3], *(attributes_of(task, side) for side in sides(task)))
    return sum(right[part] for part in self.parts) / len(self.parts)

  def check(self, task: Task) -> None:
    """Raises `ValueError` for a task whose truth is no glyph, or no edit of one where that is needed."""
    found = sides(task)
    for side in found:
      attributes_of(task, side)
    if "change" in self.parts and len(found) < 2:
      raise ValueError("its record is no edit of a glyph, and has no change")


def sides(task: Task) -> tuple[str, ...]:
  """The fields of a task's truth that describe pictures, the one to draw first: "" for the truth itself, which is no edit's."""
  return ("target", "source") if "target" in task else ("",)


def attributes_of(task: Task, side: str = "") -> Attributes:
  """What the picture of a task should show, or what one side of an edit shows; `ValueError` where its truth does not say that."""
  truth = task.get(side) if side else task
  fields = [field.name for field in dataclasses.fields(Attributes)]
  if not isinstance(truth, Mapping) or not all(isinstance(truth.get(name), str) for name in fields):
    raise ValueError(f"its record does not say which glyph the picture shows ({', '.join(fields)})")
  return Attributes(**{name: truth[name] for name in fields})


def right_parts(picture: np.ndarray, asked: Attributes, source: Attributes | None = None) -> dict[str, bool]:
  """Which of `PARTS` a picture [H, W, 3] uint8 gets right; "change" where there is a source, the picture before an edit."""
  right = glyphs.score(picture, asked)
  if source is None:
    return right
  far = [np.square(picture.astype(float) - glyphs.render(one, *picture.shape[:2])).sum() for one in (asked, source)]
  return {**right, "change": bool(far[0] < far[1])}
