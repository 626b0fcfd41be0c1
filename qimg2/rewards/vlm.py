"""A vision-language model as a judge: its settings. It is a frozen role, and looks at pictures on the device (`qimg2.runtime.judged`)."""

import dataclasses
import os

from qimg2.evaluation.rubrics import find_rubric, rubric_file
from qimg2.rewards import Reward


@dataclasses.dataclass(frozen=True)
class Judge:
  """What a judge is asked; the attributes are the arguments of `judge`."""
  pretrained: str
  rubric: str
  side_px: int
  num_tokens: int


def judge(pretrained: str, rubric: str = "prompt_following", side_px: int = 512, num_tokens: int = 512) -> Reward:
  """The expected score of a rubric, in the scale of its answers: for most 1 to 5.

  Args:
    pretrained: folder of a Qwen3-VL Instruct model (`qimg2.published.language`); all judges of a stage are of one folder.
    rubric: name or .toml file of a pointwise rubric, see `qimg2.evaluation.rubrics`.
    side_px: a picture of more than side_px² px is made smaller before the judge sees it.
    num_tokens: of the longest question without its pictures: the rubric and a prompt. A longer one has no score.

  Raises:
    ValueError: no such rubric, or numbers below 1.
  """
  if not rubric.endswith(".toml"):  # a file may be gone when a run that was trained with it is read
    find_rubric(rubric)
  if min(side_px, num_tokens) < 1:
    raise ValueError(f"side_px is {side_px} and num_tokens {num_tokens}: give at least 1.")
  return Reward(judge=Judge(pretrained, rubric, side_px, num_tokens), files=lambda: (os.fspath(rubric_file(rubric)),))
