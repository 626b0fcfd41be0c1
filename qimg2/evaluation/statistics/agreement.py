"""Krippendorff's alpha: how far raters agree beyond chance, with any number of raters and with ratings missing.

Of a unit (a picture, a pair of pictures) with m >= 2 ratings, each ordered pair of ratings (c, k) by different raters adds 1 / (m - 1) to the
coincidences o_ck; a unit with one rating says nothing. With n_c = sum_k o_ck and n = sum_c n_c (Krippendorff 2011, Computing Krippendorff's
Alpha-Reliability):

  alpha = 1 - (n - 1) sum_ck o_ck delta_ck^2 / sum_ck n_c n_k delta_ck^2                                                   (1)

  nominal   delta^2 = 1 where c and k differ
  ordinal   delta^2 = (sum of n_g from c to k, without half of n_c and half of n_k)^2
  interval  delta^2 = (c - k)^2

1 is full agreement, 0 that of chance, below 0 systematic disagreement. The interval leaves units out one by one (the jackknife), and its ends are
those of Student's t on the scale log(1 - alpha), where the distribution is nearly even.
"""

import math

import numpy as np

from qimg2.evaluation.statistics.sums import Estimate, check_confidence, jackknife_error, student

LEVELS = ("nominal", "ordinal", "interval")


def krippendorff(ratings, level: str = "nominal", confidence: float = 0.95) -> Estimate:
  """Krippendorff's alpha of ratings [raters, units], nan where one is missing; n is the number of units with at least two.

  Where all ratings are the same one there is nothing to agree about, and alpha is undefined.

  Args: ratings, numbers (code categories as numbers); level of measurement, "nominal", "ordinal" or "interval"; confidence in 0..1.

  Raises:
    ValueError: no matrix, an infinite rating, an unknown level, confidence not in 0..1.
  """
  check_confidence(confidence)
  ratings = np.asarray(ratings, np.float64)
  if ratings.ndim != 2 or np.isinf(ratings).any():
    raise ValueError(f"Ratings have shape {ratings.shape}: give finite numbers [raters, units], nan where one is missing.")
  if level not in LEVELS:
    raise ValueError(f"The level of measurement is {level!r}: choose one of {', '.join(LEVELS)}.")
  values = np.unique(ratings[~np.isnan(ratings)])
  counts = np.stack([(ratings == value).sum(0) for value in values], 1).astype(np.float64) if len(values) else np.zeros((ratings.shape[1], 0))
  counts = counts[counts.sum(1) >= 2]  # U, values
  num, method = len(counts), f"{level}, jackknife over units"
  result = lambda value, note, low=None, high=None: Estimate(value, low, high, confidence, method, num, note)
  if not num:
    return result(None, "no unit has two ratings")
  alpha = float(_alphas(counts, values, level)[0])
  if math.isnan(alpha):
    return result(None, "all ratings are the same: alpha is undefined")
  if num == 1:
    return result(alpha, "1 unit: no interval")
  if alpha == 1:
    return result(1.0, f"raters agree on all {num} units: no interval")
  without = _alphas(counts, values, level, leave_out=True)
  if np.isnan(without).any():
    return result(alpha, "1 unit has all of the differences: no interval")
  logs = np.log1p(-np.minimum(without, 1 - 1e-9))
  error = jackknife_error(logs - math.log1p(-alpha))
  if error < 1e-12:
    return result(alpha, f"all {num} units are equal: no interval")
  half = student(confidence, num) * error
  return result(alpha, "", 1 - (1 - alpha) * math.exp(half), 1 - (1 - alpha) * math.exp(-half))


def _alphas(counts: np.ndarray, values: np.ndarray, level: str, leave_out: bool = False) -> np.ndarray:
  """[1] alpha of counts [U, values], or [U] alpha without each unit; nan where it is undefined.

  The sum over coincidences of a unit is sum_ck (counts_c counts_k - [c = k] counts_c) delta_ck / (m - 1), and delta_cc is 0.
  """
  weight = 1 / (counts.sum(1) - 1)
  if not leave_out:
    return np.array([_alpha(counts.sum(0), np.einsum("u,uc,uk->ck", weight, counts, counts, optimize=True), values, level)])
  total, coincidences = counts.sum(0), np.einsum("u,uc,uk->ck", weight, counts, counts, optimize=True)
  # Units with the same counts have the same alpha without them.
  kinds, index = np.unique(counts, axis=0, return_inverse=True)
  found = [_alpha(total - kind, coincidences - np.outer(kind, kind) / (kind.sum() - 1), values, level) for kind in kinds]
  return np.array(found)[index.ravel()]


def _alpha(total: np.ndarray, coincidences: np.ndarray, values: np.ndarray, level: str) -> float:
  """Equation 1 of n_c [values] and o_ck [values, values], whose diagonal does not matter."""
  far = _distances(total, values, level)
  expected = total @ far @ total
  return 1 - (total.sum() - 1) * (coincidences * far).sum() / expected if expected > 1e-12 * far.max(initial=1.0) else math.nan


def _distances(total: np.ndarray, values: np.ndarray, level: str) -> np.ndarray:
  """[values, values] delta^2."""
  if level == "nominal":
    return 1.0 - np.eye(len(values))
  if level == "interval":
    return np.square(values[:, None] - values)
  middle = np.cumsum(total) - total / 2
  return np.square(middle[:, None] - middle)
