"""Scores of pictures, summed by prompt: what every interval and test of this package starts from.

Pictures of one prompt are alike, so prompts are the units that vary, never pictures. A figure is a ratio of sums,

  value = sum_i N_i / sum_i D_i,   N_i and D_i the sums of numerator and denominator over the pictures of prompt i          (1)

which is the mean over pictures where every denominator is 1, also when prompts have different numbers of pictures. What prompt i moves is read off by
leaving it out (the delete-one jackknife, Efron and Stein 1981):

  value without i - value = -(N_i - value D_i) / (sum_j D_j - D_i)                                                         (2)

Where a few prompts have most of the denominator, the error is known less well than n - 1 degrees of freedom say. Quantiles are those of G - 1, with
G the effective number of prompts, n where all are of one size (Kish 1965; Carter, Schnepel and Steigerwald 2017, doi 10.1162/REST_a_00639):

  G = (sum_i D_i)^2 / sum_i D_i^2                                                                                          (3)

All arithmetic is float64. Nothing here draws random numbers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

MIN_EFFECTIVE = 1.5  # prompts: with fewer an interval would be hundreds of errors wide


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number and what is known of it; `dataclasses.asdict` of it is JSON.

  Attributes:
    value: the estimate; None where it is undefined, and `note` says why.
    low, high: ends of the interval; None where there is none, and `note` says why.
    confidence: wanted coverage of the interval, in 0..1.
    method: what made the interval.
    n: number of units that vary: prompts for figures, votes, units or clusters elsewhere.
    note: what was special, "" for nothing.
  """
  value: float | None
  low: float | None = None
  high: float | None = None
  confidence: float = 0.95
  method: str = ""
  n: int = 0
  note: str = ""


class Scores(NamedTuple):
  """One metric of the pictures of a run, in any order.

  Attributes:
    numerator: [pictures] finite numbers.
    denominator: [pictures] finite numbers of at least 0; None for 1 each.
    prompt: [pictures] whole numbers or texts, the same for pictures of the same prompt; the same prompt has the same one in every run.
  """
  numerator: np.ndarray | Sequence[float]
  denominator: np.ndarray | Sequence[float] | None
  prompt: np.ndarray | Sequence


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
  """Sums over the pictures of each of n prompts, in the order of the prompts.

  Attributes:
    prompt: [n] what the prompts are called, sorted.
    numerator, denominator: [n] float64.
    pictures: [n] number of pictures of each.
    is_share: whether each picture's numerator lies between 0 and its denominator.
    is_count: whether each picture's numerator and denominator are whole numbers.
    is_binary: whether all pictures are 0 or 1, out of 1.
  """
  prompt: np.ndarray
  numerator: np.ndarray
  denominator: np.ndarray
  pictures: np.ndarray
  is_share: bool
  is_count: bool
  is_binary: bool

  @functools.cached_property
  def value(self) -> float | None:
    """The ratio of sums, equation 1; None where the denominators sum to 0."""
    total = self.denominator.sum()
    return float(self.numerator.sum() / total) if total > 0 else None

  @property
  def effective(self) -> float:
    """The number of prompts of equal size that would tell as much, equation 3."""
    return float(self.denominator.sum()**2 / np.square(self.denominator).sum())

  def of(self, chosen: np.ndarray) -> "Sums":
    """The sums of some prompts: [k] indices."""
    return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in ("prompt", "numerator", "denominator", "pictures")})

  def shifts(self) -> np.ndarray:
    """[n] by how much the value changes where each prompt is left out, equation 2. At least two prompts have a denominator."""
    return -(self.numerator - self.value * self.denominator) / (self.denominator.sum() - self.denominator)


def check_confidence(confidence: float):
  """ValueError unless it lies strictly between 0 and 1."""
  if not 0 < confidence < 1:
    raise ValueError(f"confidence is {confidence}: give a number between 0 and 1, such as 0.95.")


def column(values, name: str, length: int | None = None) -> np.ndarray:
  """[pictures] float64. `ValueError` names what is not one finite number per picture."""
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or length is not None and len(values) != length:
    raise ValueError(f"{name} has shape {values.shape}: give one number per picture" + (f", {length} of them." if length is not None else "."))
  if not np.isfinite(values).all():
    raise ValueError(f"{name} of picture {int(np.argmin(np.isfinite(values)))} is not a finite number: leave pictures without a score out.")
  return values


def by_prompt(scores: Scores) -> Sums:
  """The sums of scores by prompt.

  Raises:
    ValueError: columns of different lengths, what is no finite number, a negative denominator.
  """
  numerator = column(scores.numerator, "The numerator")
  size = len(numerator)
  denominator = np.ones(size) if scores.denominator is None else column(scores.denominator, "The denominator", size)
  if (denominator < 0).any():
    raise ValueError(f"The denominator of picture {int(np.argmax(denominator < 0))} is negative: give counts or weights of at least 0.")
  prompt = np.asarray(scores.prompt)
  if prompt.shape != (size,):
    raise ValueError(f"The prompts have shape {prompt.shape}: give one name or number per picture, {size} of them.")
  names, index = np.unique(prompt, return_inverse=True)
  total = functools.partial(np.bincount, index, minlength=len(names))
  is_share = bool(((numerator >= 0) & (numerator <= denominator)).all())
  is_count = bool((np.mod(numerator, 1) == 0).all() and (np.mod(denominator, 1) == 0).all())
  is_binary = bool((np.isin(numerator, (0, 1)) & (denominator == 1)).all())
  return Sums(names, total(numerator), total(denominator), total(), is_share, is_count, is_binary)


def student(confidence: float, n: float) -> float:
  """The two-sided quantile of Student's t for n units, so n - 1 degrees of freedom; n may be an effective number."""
  return float(special.stdtrit(n - 1, (1 + confidence) / 2))


def jackknife_error(shifts: np.ndarray) -> float:
  """Standard error of what changes by `shifts` [n] where each of n >= 2 units is left out: sqrt((n - 1) / n sum shifts^2).

  For a mean over units with equal denominators it is exactly s / sqrt(n); where sizes differ it is a little larger than the linearised one, which is
  too small when units are few.
  """
  return float(np.sqrt((len(shifts) - 1) / len(shifts) * np.square(shifts).sum()))


def unusable(sums: Sums) -> str:
  """Why sums can have no interval; "" where they can."""
  if not len(sums.prompt):
    return "no pictures"
  if sums.value is None:
    return "the denominator is 0"
  if len(sums.prompt) == 1:
    return "1 prompt: no interval"
  if sums.effective < MIN_EFFECTIVE:
    return "1 prompt has nearly all of the denominator: no interval"
  return ""
