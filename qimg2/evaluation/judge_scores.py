"""Figures made of a judge's probabilities: edits, questions about a picture, pairs of pictures.

  SC = min(instruction, over_editing),  PQ = min(naturalness, artefacts),  O = sqrt(SC · PQ)     per edit, then means           (1)
  AM = (1/n) sum p_i,  GM = (prod p_i)^(1/n)      p_i the probability of the expected answer to question i of a picture          (2)
  w = (p + 1 - q) / 2       p, q the probabilities that the picture shown first is better, for (a, b) and for (b, a)             (3)

(1) is the rule of VIEScore (arXiv 2312.14867) and of GEdit-Bench (arXiv 2504.17761), whose judges score 0 to 10; here
scores are those of the rubrics, 1 to 5, so that figures of one cannot be compared with figures of the other. (2) is Soft-TIFA of GenEval 2 (arXiv
2512.16853). (3) cancels a liking for a place: a judge that only looks at the place gives w = 1/2.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

EDIT = {"SC": ("instruction", "over_editing"), "PQ": ("naturalness", "artefacts")}  # figure -> the rubrics whose least score it is
OVERALL = "O"


def edit_scores(scores: Mapping[str, float]) -> dict[str, float]:
  """{"SC", "PQ", "O"} of one edit by (1), in the scale of its rubrics; {} unless there is a score of each of the four rubrics in `EDIT`."""
  if not all(rubric in scores for rubrics in EDIT.values() for rubric in rubrics):
    return {}
  parts = {name: min(scores[rubric] for rubric in rubrics) for name, rubrics in EDIT.items()}
  return {**parts, OVERALL: math.sqrt(math.prod(parts.values()))}


def soft_tifa(probabilities: Sequence[float]) -> tuple[float, float]:
  """(arithmetic mean, geometric mean) of the probabilities 0..1 of a picture's expected answers, equation (2). One zero makes the second 0.

  Raises:
    ValueError: none, or one that is not in 0..1.
  """
  p = np.asarray(probabilities, np.float64)
  if not p.size or not np.all((p >= 0) & (p <= 1)):
    raise ValueError(f"Soft-TIFA needs at least one probability, all in 0..1, but got {list(probabilities)}.")
  return float(p.mean()), float(np.exp(np.log(p).mean())) if p.all() else 0.0


@dataclasses.dataclass(frozen=True)
class Preference:
  """What a judge says of two pictures of one task.

  Attributes:
    first: its probability 0..1 that the first picture is better, shown first.
    swapped: its probability that the second picture is better, shown first.
  """
  first: float
  swapped: float

  @property
  def win(self) -> float:
    """Probability that the first picture is better, over both orders, equation (3)."""
    return (self.first + 1 - self.swapped) / 2

  @property
  def contradicts(self) -> bool:
    """Whether each order has another winner. An order that is at exactly 1/2 has none, and contradicts nothing."""
    return (self.first - 0.5) * (self.swapped - 0.5) > 0


def pairwise_figures(preferences: Sequence[Preference]) -> dict[str, float]:
  """Figures of a comparison, all shares 0..1 of the pairs: "win", the mean of `Preference.win`; "preferred", how often it is above 1/2, and
  "tied", at 1/2; "contradictions", how often the order decided; "first place", the mean probability of whatever is shown first, 1/2 without a liking
  for a place.

  Raises:
    ValueError: no pairs, or a probability outside 0..1.
  """
  p = np.array([(one.first, one.swapped) for one in preferences], np.float64).reshape(-1, 2)
  if not len(p) or not np.all((p >= 0) & (p <= 1)):
    raise ValueError(f"A comparison needs at least one pair and probabilities in 0..1, but got {len(p)} pair(s).")
  lead = p[:, 0] - p[:, 1]  # above 0 where `win` is above 1/2
  return {"win": float(np.mean([one.win for one in preferences])), "preferred": float(np.mean(lead > 0)), "tied": float(np.mean(lead == 0)),
          "contradictions": float(np.mean([one.contradicts for one in preferences])), "first place": float(p.mean())}
