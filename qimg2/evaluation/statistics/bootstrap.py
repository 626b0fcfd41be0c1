"""Bootstrap intervals over prompts: percentile and BCa.

A resample draws n of n prompts with replacement, each with all of its pictures, and gives the ratio of sums again. The percentile interval has the
quantiles alpha_1, alpha_2 of these. BCa (Efron 1987) moves them by the bias z_0 and the acceleration a:

  alpha_i = Phi(z_0 + (z_0 + z_i) / (1 - a (z_0 + z_i))),   a = sum s^3 / (6 (sum s^2)^1.5)                                (1)

with Phi(z_0) the share of resamples below the value, those equal to it by half, and s_i = mean of the leave-one-out values - value without i. Both
are too narrow at small n, by sqrt((n - 1) / n) and by the normal's quantile in place of Student's. `expand` takes z = sqrt(n / (n - 1)) t_{n-1} in
place of the normal's quantile, the expanded percentile interval of Hesterberg (arXiv 1411.5279, section 5.3), with n the effective number of prompts.

Resample r is words r ceil(n / 2) to (r + 1) ceil(n / 2) - 1 of the stream of Philox4x64 (Salmon et al. 2011), whose key is the seed; each word gives
two indices, (half word x n) >> 32. So they are the same for any version of numpy, any machine and however many are drawn at once.
"""

import numpy as np
from scipy import special

from qimg2.evaluation.statistics.intervals import is_constant
from qimg2.evaluation.statistics.sums import Estimate, Scores, Sums, by_prompt, check_confidence, student, unusable

METHODS = ("bca", "percentile")
NUM_RESAMPLES = 4000
CHUNK = 2**17  # indices at a time: what the caches of a core hold


def resampled(sums: Sums, num_resamples: int, seed: int) -> np.ndarray:
  """[num_resamples] values of resamples of the prompts, in chunks of at least one, so in a few MB. A resample whose denominators sum to 0 is nan."""
  n, stream = len(sums.prompt), np.random.Philox(key=seed)
  words = -(-n // 2)
  per_chunk = max(1, CHUNK // (2 * words))
  is_even = (sums.denominator == sums.denominator[0]).all()
  found = []
  for begin in range(0, num_resamples, per_chunk):
    rows = min(per_chunk, num_resamples - begin)
    halves = stream.random_raw(rows * words).astype("<u8", copy=False).view("<u4").reshape(rows, 2 * words)[:, :n]
    index = np.multiply(halves, n, dtype=np.uint64)
    index >>= np.uint64(32)
    index = index.view(np.int64)
    numerator = np.take(sums.numerator, index).sum(1)
    total = np.full(rows, n * sums.denominator[0]) if is_even else np.take(sums.denominator, index).sum(1)
    found.append(np.divide(numerator, total, out=np.full(rows, np.nan), where=total > 0))
  return np.concatenate(found)


def ends(sums: Sums, values: np.ndarray, method: str, confidence: float = 0.95, expand: bool = True) -> tuple[float, float]:
  """(low, high) of the percentile or the BCa interval from the values of resamples [k], none of them nan; prompts are not all equal."""
  low, high = np.quantile(values, _levels(sums, values, method, confidence, expand))
  return float(low), float(high)


def _levels(sums: Sums, values: np.ndarray, method: str, confidence: float, expand: bool) -> np.ndarray:
  """[2] which quantiles of the resamples are the ends of the interval, equation 1."""
  n = sums.effective
  z = np.sqrt(n / (n - 1)) * student(confidence, n) if expand else special.ndtri((1 + confidence) / 2)
  z = np.array([-z, z])
  if method == "percentile":
    return special.ndtr(z)
  close = 1e-12 * max(1.0, abs(sums.value))
  below = (values < sums.value - close).sum() + (np.abs(values - sums.value) <= close).sum() / 2
  # A half keeps the bias finite where all resamples are on one side.
  bias = special.ndtri(np.clip(below, 0.5, len(values) - 0.5) / len(values))
  shifts = sums.shifts()
  s = shifts.mean() - shifts
  acceleration = (s**3).sum() / (6 * np.square(s).sum() ** 1.5)
  return special.ndtr(bias + (bias + z) / np.maximum(1 - acceleration * (bias + z), 1e-6))


def bootstrap(scores: Scores, method: str = "bca", confidence: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0,
              expand: bool = True) -> Estimate:
  """The ratio of sums, and its bootstrap interval over prompts.

  Args: scores; "bca" or "percentile"; confidence in 0..1; number of resamples, at least 100; seed, a whole number of at least 0; whether quantiles
  are moved outwards for few prompts.

  Raises:
    ValueError: scores that `by_prompt` refuses, an unknown method, too few resamples, confidence not in 0..1.
  """
  check_confidence(confidence)
  if method not in METHODS:
    raise ValueError(f"The method of a bootstrap is {method!r}: choose one of {', '.join(METHODS)}.")
  if num_resamples < 100:
    raise ValueError(f"{num_resamples} resamples are too few for quantiles: give at least 100.")
  sums = by_prompt(scores)
  n, name = len(sums.prompt), f"{'BCa' if method == 'bca' else 'percentile'} bootstrap over prompts"
  note = unusable(sums)
  if not note and is_constant(sums.value, float(np.abs(sums.shifts()).max())):
    note = f"all {n} prompts are equal: no interval"
  if note:
    return Estimate(sums.value, None, None, confidence, name, n, note)
  values = resampled(sums, num_resamples, seed)
  defined = values[~np.isnan(values)]
  lost = len(values) - len(defined)
  low, high = ends(sums, defined, method, confidence, expand)
  note = f"{lost} of {len(values)} resamples had a denominator of 0 and are left out" if lost else ""
  return Estimate(sums.value, low, high, confidence, name, n, note)
