"""How many prompts or votes a wanted interval or a wanted power needs, before any picture is drawn.

q_c is the two-sided normal quantile of the confidence or of the level, q_b the one-sided one of the power. A prompt with m pictures whose scores have
standard deviation sd, and correlate by rho within a prompt, has a mean with variance

  sd^2 (rho + (1 - rho) / m)                                                                                               (1)

so that more seeds help little where rho is large. Numbers are rounded up; below some 30 prompts they are a little too small, because intervals have
Student's quantile.
"""

import math

from scipy import special

from qimg2.evaluation.statistics.intervals import wilson
from qimg2.evaluation.statistics.ratings import POINTS
from qimg2.evaluation.statistics.sums import check_confidence

LARGEST = 10**9


def _two_sided(confidence: float) -> float:
  check_confidence(confidence)
  return float(special.ndtri((1 + confidence) / 2))


def _one_sided(power: float) -> float:
  if not 0 < power < 1:
    raise ValueError(f"power is {power}: give a number between 0 and 1, such as 0.8.")
  return float(special.ndtri(power))


def _positive(**numbers: float):
  for name, number in numbers.items():
    if not number > 0:
      raise ValueError(f"{name} is {number}: give a number above 0.")


def prompts_for_width(width: float, sd: float, seeds: int = 1, correlation: float = 0.0, confidence: float = 0.95) -> int:
  """Prompts for which the interval of a mean is `width` wide, from end to end and in the units of `sd`, equation 1.

  Args: width; standard deviation of pictures, of a share p sqrt(p (1 - p)), at most 0.5; pictures a prompt; their correlation in 0..1; confidence.

  Raises:
    ValueError: a number out of its range.
  """
  _positive(width=width, sd=sd, seeds=seeds)
  if not 0 <= correlation <= 1:
    raise ValueError(f"correlation is {correlation}: give a number in 0..1.")
  variance = sd**2 * (correlation + (1 - correlation) / seeds)
  return max(2, math.ceil(4 * _two_sided(confidence)**2 * variance / width**2 - 1e-9))


def prompts_for_share(width: float, share: float = 0.5, confidence: float = 0.95) -> int:
  """Least number of prompts with one 0-or-1 picture each whose Wilson interval, at the count nearest to `share`, is at most `width` wide.

  The search doubles and halves, so that for shares with few pictures the steps of a count may make it one or two too many.

  Raises:
    ValueError: a number out of its range.
  """
  _positive(width=width)
  if not 0 <= share <= 1:
    raise ValueError(f"share is {share}: give a number in 0..1.")

  def is_enough(n: int) -> bool:
    found = wilson(round(share * n), n, confidence)
    return found.high - found.low <= width
  return _least(is_enough)


def _least(is_enough) -> int:
  """The least n >= 1 that is enough, of a condition that stays true once it is."""
  high = 1
  while not is_enough(high):
    high *= 2
    if high > LARGEST:
      raise ValueError(f"It would take more than {LARGEST} prompts: ask for a wider interval.")
  low = high // 2
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if is_enough(middle) else (middle, high)
  return high


def prompts_for_difference(difference: float, sd: float, power: float = 0.8, level: float = 0.05) -> int:
  """Prompts on which two runs must be compared to see a `difference` of means with this power, two-sided at this level.

  Args: difference and sd, the standard deviation over prompts of the difference of the two runs' prompt means, in the same units.

  Raises:
    ValueError: a number out of its range.
  """
  _positive(difference=abs(difference), sd=sd)
  return max(2, math.ceil(((_two_sided(1 - level) + _one_sided(power)) * sd / difference)**2 - 1e-9))


def prompts_for_mcnemar(only_a: float, only_b: float, power: float = 0.8, level: float = 0.05) -> int:
  """Prompts with one 0-or-1 picture in each run for McNemar's test, where these shares of prompts are right in one run only (Connor 1987).

  Raises:
    ValueError: shares that are not in 0..1, sum to more than 1 or are equal.
  """
  if not (0 <= only_a <= 1 and 0 <= only_b <= 1 and only_a + only_b <= 1) or only_a == only_b:
    raise ValueError(f"{only_a} and {only_b} of the prompts are right in one run only: give two different shares that sum to at most 1.")
  either, difference = only_a + only_b, abs(only_a - only_b)
  root = _two_sided(1 - level) * math.sqrt(either) + _one_sided(power) * math.sqrt(either - difference**2)
  return math.ceil((root / difference)**2 - 1e-9)


def votes_for_power(win_rate: float, power: float = 0.8, level: float = 0.05) -> int:
  """Votes that are no ties for the sign test to see a win rate that is not 1/2: 783 for 0.55, 194 for 0.6.

  Raises:
    ValueError: a win rate of 1/2 or not in 0..1.
  """
  if not 0 <= win_rate <= 1 or win_rate == 0.5:
    raise ValueError(f"win_rate is {win_rate}: give a number in 0..1 that is not 0.5.")
  root = _two_sided(1 - level) / 2 + _one_sided(power) * math.sqrt(win_rate * (1 - win_rate))
  return math.ceil((root / (win_rate - 0.5))**2 - 1e-9)


def votes_for_rating(half_width: float, confidence: float = 0.95) -> int:
  """Votes on one model against known rivals of its strength, without ties, for a rating of +- `half_width` points: 4,638 for 10.

  A vote has information 1/4 on the strength, so that n votes leave an error of 2 / sqrt(n), 347 / sqrt(n) points.

  Raises:
    ValueError: a number out of its range.
  """
  _positive(half_width=half_width)
  return math.ceil((_two_sided(confidence) * 2 * POINTS / half_width)**2 - 1e-9)
