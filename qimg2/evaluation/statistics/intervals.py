"""Intervals without random numbers: of a share, and of a mean or a ratio of sums whose pictures come in prompts.

Wilson (1927), for k of n independent pictures, q the normal quantile, p = k / n:

  (p + q^2 / 2n -+ q sqrt(p (1 - p) / n + q^2 / 4n^2)) / (1 + q^2 / n)                                                     (1)

Clustered t: value -+ t_{G-1} SE, SE the jackknife over prompts and G their effective number (qimg2.evaluation.statistics.sums).

Clustered Wilson, for what lies in 0..1: equation 1 with q = t_{G-1} and the effective number of pictures, at which independent pictures would have
the error that the prompts show (Korn and Graubard 1998; Dean and Pagano 2015, doi 10.1093/jssam/smv024):

  n_eff = p (1 - p) / SE^2                                                                                                 (2)

Where scores are counts, as 0 or 1 a picture or words right of those asked for, n_eff is at most the number of what is counted, the sum of the
denominators: prompts that differ less than chance would make them, as where two of four pictures are right of every prompt, are no more pictures than
there are. Scores between 0 and 1 may vary less than such counts do, and have no such bound.

It stays in 0..1 and, near 0 and 1, is as lopsided as the truth. `figure` chooses among the three.
"""

import math

from scipy import special

from qimg2.evaluation.statistics.sums import Estimate, Scores, Sums, by_prompt, check_confidence, jackknife_error, student, unusable


def _wilson(share: float, size: float, quantile: float) -> tuple[float, float]:
  """Equation 1, clipped to 0..1."""
  extra = quantile**2 / size
  half = quantile * math.sqrt(share * (1 - share) / size + extra / (4 * size))
  return max(0.0, (share + extra / 2 - half) / (1 + extra)), min(1.0, (share + extra / 2 + half) / (1 + extra))


def wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
  """The share of successes among n independent trials, and its Wilson interval, also for 0 and n successes (Wilson 1927).

  Raises:
    ValueError: no 0 <= successes <= n, or confidence is not in 0..1.
  """
  check_confidence(confidence)
  if not 0 <= successes <= n:
    raise ValueError(f"{successes} successes among {n} trials: give 0 <= successes <= trials.")
  if n == 0:
    return Estimate(None, confidence=confidence, method="Wilson", note="no pictures")
  share = successes / n
  low, high = _wilson(share, n, float(special.ndtri((1 + confidence) / 2)))
  note = f"all {n} right" if successes == n else f"none of {n} right" if successes == 0 else ""
  # At the ends equation 1 is exact, but not its floating-point sum.
  return Estimate(share, 0.0 if successes == 0 else low, 1.0 if successes == n else high, confidence, "Wilson", n, note)


def clustered_t(scores: Scores, confidence: float = 0.95) -> Estimate:
  """The ratio of sums, and its t interval over prompts. It may leave 0..1; where all prompts are equal there is none.

  Raises:
    ValueError: scores that `by_prompt` refuses, or confidence is not in 0..1.
  """
  check_confidence(confidence)
  return _clustered_t(by_prompt(scores), confidence)


def _clustered_t(sums: Sums, confidence: float) -> Estimate:
  n, method = len(sums.prompt), "t over prompts"
  note = unusable(sums)
  if note:
    return Estimate(sums.value, None, None, confidence, method, n, note)
  error = jackknife_error(sums.shifts())
  if is_constant(sums.value, error):
    return Estimate(sums.value, None, None, confidence, method, n, f"all {n} prompts are equal: no interval")
  half = student(confidence, sums.effective) * error
  return Estimate(sums.value, sums.value - half, sums.value + half, confidence, method, n)


def clustered_wilson(scores: Scores, confidence: float = 0.95) -> Estimate:
  """The ratio of sums of what lies in 0..1, and its Wilson interval at the effective number of pictures, equations 1 and 2.

  Where the prompts show no spread, each prompt counts as one picture, and the note says so; but of counts that are neither none nor all, everything
  that is counted does.

  Raises:
    ValueError: a numerator that is not between 0 and its denominator, scores that `by_prompt` refuses, or confidence is not in 0..1.
  """
  check_confidence(confidence)
  sums = by_prompt(scores)
  if not sums.is_share:
    raise ValueError("A numerator is not between 0 and its denominator, so that this is no share: use clustered_t.")
  return _clustered_wilson(sums, confidence)


def _clustered_wilson(sums: Sums, confidence: float) -> Estimate:
  n, method = len(sums.prompt), "Wilson over prompts"
  note = unusable(sums)
  if note:
    return Estimate(sums.value, None, None, confidence, method, n, note)
  error, share = jackknife_error(sums.shifts()), sums.value
  most = float(sums.denominator.sum()) if sums.is_count else math.inf
  if not is_constant(share, error):
    size = min(share * (1 - share) / error**2, most)
  elif sums.is_count and 0 < share < 1:
    size, note = most, f"all {n} prompts are equal"
  else:
    size, note = n, f"all {n} prompts are equal: each counts as one picture"
  low, high = _wilson(share, size, student(confidence, sums.effective))
  return Estimate(share, low, high, confidence, method, n, note)


def is_constant(value: float, error: float) -> bool:
  """Whether a standard error is but rounding."""
  return error <= 1e-12 * max(1.0, abs(value))


def figure(numerator, denominator, prompt, confidence: float = 0.95) -> Estimate:
  """A figure of a suite and its interval: what the report prints.

  Wilson where every picture is 0 or 1 and each prompt has one; Wilson over prompts where every picture lies in 0..1 of its denominator; else t over
  prompts. Never a bootstrap, which at 30 prompts covers no better (docs/evaluation_statistics.md).

  Args: numerator [pictures]; denominator [pictures], None for 1 each; prompt [pictures], what each picture was drawn for; confidence in 0..1.

  Raises:
    ValueError: scores that `by_prompt` refuses, or confidence is not in 0..1.
  """
  check_confidence(confidence)
  sums = by_prompt(Scores(numerator, denominator, prompt))
  if sums.is_binary and (sums.pictures == 1).all():
    return wilson(int(sums.numerator.sum()), len(sums.prompt), confidence)
  return (_clustered_wilson if sums.is_share else _clustered_t)(sums, confidence)
