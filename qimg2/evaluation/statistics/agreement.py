"""Krippendorff's alpha: how far raters agree beyond chance, with any number of raters and with ratings missing.

Of a unit (a picture, a pair of pictures) with m >= 2 ratings, each ordered pair of ratings (c, k) by different raters adds 1 / (m - 1) to the
coincidences o_ck; a unit with one rating says nothing. With n_c = sum_k o_ck and n = sum_c n_c (Krippendorff 2011, Computing Krippendorff's
Alpha-Reliability):

  alpha = 1 - (n - 1) sum_ck o_ck delta_ck^2 / sum_ck n_c n_k delta_ck^2                                                   (1)

  nominal   delta^2 = 1 where c and k differ
  ordinal   delta^2 = (sum of n_g from c to k, without half of n_c and half of n_k)^2
  interval  delta^2 = (c - k)^2

1 is full agreement, 0 that of chance, below 0 systematic disagreement. The interval leaves units out one by one (the jackknife), and its ends are
those of Student's t on Fisher's scale for an intraclass correlation (1925), with k the mean number of ratings of a unit:

  z = log((1 + (k - 1) alpha) / (1 - alpha))                                                                               (2)
"""

import math

import numpy as np

from qimg2.evaluation.statistics.sums import Estimate, check_confidence, jackknife_error, student

FULL = 1 - 1e-12  # what is more is full agreement, but for rounding
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
  ratings = ratings[:, (~np.isnan(ratings)).sum(0) >= 2]
  num, method = ratings.shape[1], f"{level}, jackknife over units"
  result = lambda value, note, low=None, high=None: Estimate(value, low, high, confidence, method, num, note)
  if not num:
    return result(None, "no unit has two ratings")
  alpha, without = _interval_alphas(ratings) if level == "interval" else _alphas(ratings, level)
  if math.isnan(alpha):
    return result(None, "all ratings are the same: alpha is undefined")
  if num == 1:
    return result(alpha, "1 unit: no interval")
  if alpha > FULL:
    return result(1.0, f"raters agree on all {num} units: no interval")
  if not (without <= FULL).all():  # also nan: without this unit all ratings are the same
    return result(alpha, "all differences are within 1 unit: no interval")
  more = (~np.isnan(ratings)).sum(0).mean() - 1
  # Missing ratings may bring alpha a little below -1 / more, where the scale ends.
  scale = lambda x: np.log(np.maximum(1 + more * x, 1e-6) / (1 - x))
  z, error = scale(alpha), jackknife_error(scale(without) - scale(alpha))
  if error < 1e-12:
    return result(alpha, f"all {num} units are equal: no interval")
  with np.errstate(over="ignore"):
    low, high = 1 - (1 + more) / (np.exp(z + np.array([-1, 1]) * student(confidence, num) * error) + more)
  return result(alpha, "", float(min(low, alpha)), float(max(high, alpha)))


def _interval_alphas(ratings: np.ndarray) -> tuple[float, np.ndarray]:
  """Alpha of ratings [raters, units], and without each unit [units], nan where undefined; at the interval level, where sums of squares are enough."""
  ratings = ratings - np.nanmean(ratings)
  size, total, squares = (~np.isnan(ratings)).sum(0), np.nansum(ratings, 0), np.nansum(ratings**2, 0)
  apart = 2 * (size * squares - total**2) / (size - 1)
  within = [np.append(column.sum(), column.sum() - column) for column in (size, total, squares, apart)]
  expected = 2 * (within[0] * within[2] - within[1]**2)
  alphas = np.full(len(expected), np.nan)
  np.divide((within[0] - 1) * within[3], expected, out=alphas, where=expected > 1e-12 * max(1e-300, expected[0]))
  return float(1 - alphas[0]), 1 - alphas[1:]


def _alphas(ratings: np.ndarray, level: str) -> tuple[float, np.ndarray]:
  """The same at the other levels, from the coincidences: those of a unit are counts_c counts_k / (m - 1) off the diagonal, where delta is not 0."""
  values = np.unique(ratings[~np.isnan(ratings)])
  counts = np.stack([(ratings == value).sum(0) for value in values], 1).astype(np.float64)  # units, values
  total, coincidences = counts.sum(0), (counts / (counts.sum(1, keepdims=True) - 1)).T @ counts
  # Units with the same counts have the same alpha without them.
  kinds, index = np.unique(counts, axis=0, return_inverse=True)
  without = [_alpha(total - kind, coincidences - np.outer(kind, kind) / (kind.sum() - 1), level) for kind in kinds]
  return _alpha(total, coincidences, level), np.array(without)[index.ravel()]


def _alpha(total: np.ndarray, coincidences: np.ndarray, level: str) -> float:
  """Equation 1 of n_c [values] and o_ck [values, values], whose diagonal does not matter; nan where all ratings are the same."""
  if level == "nominal":
    far = 1.0 - np.eye(len(total))
  else:
    middle = np.cumsum(total) - total / 2
    far = np.square(middle[:, None] - middle)
  if (total > 0.5).sum() < 2:
    return math.nan
  return float(1 - (total.sum() - 1) * (coincidences * far).sum() / (total @ far @ total))
