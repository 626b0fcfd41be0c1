"""Shape and colours of the embedded data set's pictures, and of its edits, by the nearest of all clean renders."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from data_pipelines.embedded import glyphs
from data_pipelines.embedded.glyphs import Attributes
from qimg2.rewards import Reward, Task

PARTS = ("glyph", "ink", "paper")


def glyph(parts: tuple[str, ...] = PARTS) -> Reward:
  """The share, 0 to 1, of `parts` that a picture shows as its prompt asks: "glyph", "ink" and "paper". Of an edit it is what its result should show.

  Raises:
    ValueError: no parts, or unknown ones.
  """
  if not parts or set(parts) - set(PARTS):
    raise ValueError(f"parts is {parts!r}: give some of {', '.join(PARTS)}.")
  return Reward(_Score(parts), check=attributes_of)


@dataclasses.dataclass(frozen=True)
class _Score:
  parts: tuple[str, ...]

  def __call__(self, picture: np.ndarray, task: Task) -> float:
    right = glyphs.score(picture[..., :3], attributes_of(task))
    return sum(right[part] for part in self.parts) / len(self.parts)


def attributes_of(task: Task) -> Attributes:
  """What the picture of a task should show.

  Raises:
    ValueError: its truth has none of the fields of the glyphs' records.
  """
  truth = task.get("target", task)
  fields = [field.name for field in dataclasses.fields(Attributes)]
  if not isinstance(truth, Mapping) or not all(isinstance(truth.get(name), str) for name in fields):
    raise ValueError(f"its record does not say which glyph the picture shows (attributes {', '.join(fields)})")
  return Attributes(**{name: truth[name] for name in fields})
