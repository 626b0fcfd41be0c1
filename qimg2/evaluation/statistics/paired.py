"""Two runs on the same prompts: the difference, its interval, and whether chance explains it.

Both runs drew the same prompts, so what a prompt makes hard for both cancels in the difference. Tests of the hypothesis that the runs are alike:

  McNemar, sign   of b + c prompts that only one run got right (or won), as many as b are the first's with chance 1/2; prompts where both are alike
                  say nothing. Two-sided exact p = 2 P(X <= min(b, c)), X binomial of b + c and 1/2, at most 1; mid-p takes P(X = min(b, c)) off it,
                  half of it at each end (Fagerland et al. 2013, doi 10.1186/1471-2288-13-91).
  sign flip       if runs are alike, which of the two gave which result is chance, prompt by prompt: the difference of the figures is computed again
                  with the runs exchanged on some prompts (Fisher 1935), all 2^n ways where at most 13 prompts differ, else random ones. Then
                  p = (1 + those at least as far from 0) / (1 + number of random ones), never 0 (Phipson and Smyth, arXiv 1603.05766).
  Holm            of several tests: p-values in ascending order, times the number of those that are not smaller, never falling.

For one 0-or-1 picture a prompt the sign flip is McNemar's exact test. The interval of a difference is value -+ t_{G-1} SE, SE the jackknife over
prompts of both figures at once, but for 0-or-1 single pictures that of Agresti and Min (2005, doi 10.1002/sim.1781), which adds half a prompt to
each of the four kinds and is defined where no prompt differs:

  d = (b - c) / (n + 2),  d -+ q sqrt((b + c + 1) / (n + 2) - d^2) / sqrt(n + 2)                                            (1)

The ends of an interval and a p-value are made in different ways: near p = 0.05 they may disagree.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from qimg2.evaluation.statistics.intervals import is_constant
from qimg2.evaluation.statistics.sums import Estimate, Scores, Sums, by_prompt, check_confidence, jackknife_error, student, unusable

MAX_EXACT = 13  # prompts: 8,192 exchanges, fewer than the random ones
NUM_PERMUTATIONS = 9999
CHUNK = 2**17  # bits at a time: what the caches of a core hold as float64


@dataclasses.dataclass(frozen=True)
class PValue:
  """A p-value and what it is of.

  Attributes:
    p_value: two-sided, in 0..1.
    method: the test.
    n: number of prompts that say something: those that differ.
    note: what was special, "" for nothing.
  """
  p_value: float
  method: str
  n: int
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison(Estimate):
  """The difference of two runs, first minus second, and its interval; `dataclasses.asdict` of it is JSON.

  Attributes:
    value_a, value_b: the figures of both runs on the prompts that both have.
    higher, equal, lower: on how many prompts the first run's figure is higher than, equal to, lower than the second's.
    p_value: of the hypothesis that the runs are alike, two-sided; None where there is no difference to test.
    test: what made it.
    left_out: prompts that only one of the runs has.
  """
  value_a: float | None = None
  value_b: float | None = None
  higher: int = 0
  equal: int = 0
  lower: int = 0
  p_value: float | None = None
  test: str = ""
  left_out: int = 0


def mcnemar(only_a: int, only_b: int, mid: bool = False) -> PValue:
  """McNemar's test of `only_a` prompts that only the first run got right and `only_b` that only the second did; exact, or mid-p.

  Raises:
    ValueError: a negative number.
  """
  return _binomial(only_a, only_b, mid, "McNemar", "no prompt that only one run got right")


def sign_test(wins: int, losses: int, ties: int = 0, mid: bool = False) -> PValue:
  """The sign test of wins and losses: ties say nothing, are left out and stated.

  Raises:
    ValueError: a negative number.
  """
  if ties < 0:
    raise ValueError(f"{ties} ties: give a number of at least 0.")
  test = _binomial(wins, losses, mid, "sign test", "no wins or losses")
  notes = [test.note] * bool(test.note) + [f"{ties} ties left out"] * bool(ties)
  return dataclasses.replace(test, note="; ".join(notes))


def sign_test_by_prompt(scores: Scores, null: float) -> PValue:
  """The exact sign test of a figure against `null`: a prompt is won where its own figure, over all of its pictures, is above that, lost where it is
  below. It asks whether more prompts are won than lost, and says nothing of by how much.

  Raises:
    ValueError: scores that `by_prompt` refuses.
  """
  sums = by_prompt(scores)
  lead = sums.numerator - null * sums.denominator
  won, lost = (int((sign * lead > 1e-12 * np.maximum(1.0, sums.denominator)).sum()) for sign in (1, -1))
  test = sign_test(won, lost, len(lead) - won - lost)
  return dataclasses.replace(test, note="; ".join([f"{won} prompts above {null:g}, {lost} below"] + [test.note] * bool(test.note)))


def _binomial(b: int, c: int, mid: bool, name: str, nothing: str) -> PValue:
  if b < 0 or c < 0:
    raise ValueError(f"{b} and {c} prompts: give numbers of at least 0.")
  n, low, method = b + c, min(b, c), f"{name}, {'mid-p' if mid else 'exact'}"
  if n == 0:
    return PValue(1.0, method, 0, nothing)
  p = 2 * special.bdtr(low, n, 0.5)
  if mid:
    p -= special.bdtr(low, n, 0.5) - (special.bdtr(low - 1, n, 0.5) if low else 0.0)  # P(X = low)
  return PValue(float(min(1.0, p)), method, n)


def holm(p_values: Sequence[float]) -> list[float]:
  """p-values of several tests, adjusted so that the chance of any false claim among them is at most the level (Holm 1979); in the order given.

  Raises:
    ValueError: what is not in 0..1.
  """
  p = np.asarray(p_values, np.float64)
  if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
    raise ValueError("A p-value is not a number in 0..1: leave tests out that have none.")
  order = np.argsort(p, kind="stable")
  adjusted = np.empty(len(p))
  adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
  return adjusted.tolist()


def aligned(a: Scores, b: Scores) -> tuple[Sums, Sums, int]:
  """The sums of both runs on the prompts that both have, in one order, and how many prompts only one has.

  Raises:
    ValueError: no prompt in common, or scores that `by_prompt` refuses.
  """
  first, second = by_prompt(a), by_prompt(b)
  are_texts = [one.prompt.dtype.kind in "US" for one in (first, second) if len(one.prompt)]
  if len(set(are_texts)) == 2:
    raise ValueError(f"The prompts of one run are {first.prompt.dtype}, those of the other {second.prompt.dtype}: name them alike.")
  common, mine, theirs = np.intersect1d(first.prompt, second.prompt, assume_unique=True, return_indices=True)
  if not len(common) and (len(first.prompt) or len(second.prompt)):
    raise ValueError("The two runs have no prompt in common: compare runs of the same prompt set.")
  return first.of(mine), second.of(theirs), len(first.prompt) + len(second.prompt) - 2 * len(common)


def sign_flip(a: Scores, b: Scores, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0) -> PValue:
  """The sign-flip permutation test of the difference of two figures over their common prompts, in a few MB beside the scores.

  Args: scores of both; number of random exchanges where more than 13 prompts differ; seed of these, a whole number of at least 0.

  Raises:
    ValueError: runs that `aligned` refuses, a figure whose denominator is 0.
  """
  first, second, _ = aligned(a, b)
  if first.value is None or second.value is None:
    raise ValueError("There is no difference to test: a run has no pictures or a denominator of 0 on the common prompts.")
  return _sign_flip(first, second, num_permutations, seed)


def _sign_flip(first: Sums, second: Sums, num_permutations: int, seed: int) -> PValue:
  mine, theirs = (np.stack([one.numerator, one.denominator], 1) for one in (first, second))
  moved = mine - theirs
  moved = moved[moved.any(1)]
  num, start, both = len(moved), theirs.sum(0), mine.sum(0) + theirs.sum(0)
  if num == 0:
    return PValue(1.0, "sign flip, exact", 0, "no prompt differs")
  columns = [np.ascontiguousarray(column) for column in moved.T]
  far = abs(first.value - second.value) - 1e-12 * max(1.0, abs(first.value), abs(second.value))
  exact, count = num <= MAX_EXACT, 0
  for bits in [(np.arange(2**num)[:, None] >> np.arange(num)) & 1] if exact else random_bits(num, num_permutations, seed):
    # Of one that took the first's result where the bit is 1, else the second's.
    bits = bits.astype(np.float64)
    # By einsum and not by BLAS, whose threads wait for each other longer than such a product takes, and change its last digits.
    sums = start + np.stack([np.einsum("rn,n->r", bits, column) if column.any() else np.zeros(len(bits)) for column in columns], 1)
    rest = both - sums
    with np.errstate(divide="ignore", invalid="ignore"):
      difference = sums[:, 0] / sums[:, 1] - rest[:, 0] / rest[:, 1]
    # An exchange whose denominator is 0 counts against the claim.
    count += int((~(np.abs(difference) < far)).sum())
  if exact:
    return PValue(count / 2**num, "sign flip, exact", num)
  return PValue((1 + count) / (1 + num_permutations), f"sign flip, {num_permutations} random", num)


def random_bits(num: int, rows: int, seed: int):
  """[k, num] arrays of 0 and 1, `rows` rows in all: row r is words r ceil(num / 64) and on of the stream of Philox4x64 whose key is the seed."""
  stream, words = np.random.Philox(key=seed), -(-num // 64)
  for begin in range(0, rows, max(1, CHUNK // num)):
    size = min(max(1, CHUNK // num), rows - begin)
    octets = stream.random_raw(size * words).astype("<u8", copy=False).view(np.uint8).reshape(size, 8 * words)
    yield np.unpackbits(octets, axis=1, count=num, bitorder="little")


def compare(a: Scores, b: Scores, confidence: float = 0.95, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0) -> Comparison:
  """The difference of a figure between two runs on their common prompts, first minus second, its interval and p-value.

  McNemar's exact test and equation 1 where all pictures are 0 or 1 and each prompt has one in each run; else the sign flip and t over prompts.

  Raises:
    ValueError: no prompt in common, scores that `by_prompt` refuses, or confidence is not in 0..1.
  """
  check_confidence(confidence)
  first, second, left_out = aligned(a, b)
  n, mine, theirs = len(first.prompt), first.numerator * second.denominator, second.numerator * first.denominator
  close = 1e-12 * np.maximum(1.0, np.maximum(np.abs(mine), np.abs(theirs)))
  higher, lower = int((mine - theirs > close).sum()), int((theirs - mine > close).sum())
  notes = [f"{left_out} prompts that only one run has are left out"] * bool(left_out)
  shared = dict(confidence=confidence, n=n, value_a=first.value, value_b=second.value, higher=higher, equal=n - higher - lower, lower=lower,
                left_out=left_out)
  if first.value is None or second.value is None:
    return Comparison(None, note="; ".join(notes + [unusable(first) or unusable(second)]), **shared)
  if all(one.is_binary and (one.pictures == 1).all() for one in (first, second)):
    (low, high), method, test, why = agresti_min(higher, lower, n, confidence), "Agresti-Min", mcnemar(higher, lower), ""
  else:
    low, high, why = _t_interval(first, second, confidence)
    method, test = "t over prompts", _sign_flip(first, second, num_permutations, seed)
  notes += [note for note in (why, test.note) if note]
  return Comparison(first.value - second.value, low, high, method=method, note="; ".join(notes), p_value=test.p_value, test=test.method, **shared)


def _t_interval(first: Sums, second: Sums, confidence: float) -> tuple[float | None, float | None, str]:
  """(low, high, why there is none) of a difference over the same prompts."""
  n, why = len(first.prompt), unusable(first) or unusable(second)
  if why:
    return None, None, why
  error, value = jackknife_error(first.shifts() - second.shifts()), first.value - second.value
  if is_constant(max(abs(first.value), abs(second.value)), error):
    return None, None, f"all {n} differences are equal: no interval"
  half = student(confidence, min(first.effective, second.effective)) * error
  return value - half, value + half, ""


def agresti_min(only_a: int, only_b: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
  """(low, high) of the difference of two paired shares, equation 1, clipped to -1..1; n >= only_a + only_b prompts."""
  check_confidence(confidence)
  d = (only_a - only_b) / (n + 2)
  half = float(special.ndtri((1 + confidence) / 2)) * math.sqrt(((only_a + only_b + 1) / (n + 2) - d**2) / (n + 2))
  return max(-1.0, d - half), min(1.0, d + half)


def preference(outcome, prompt, confidence: float = 0.95, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0) -> Comparison:
  """The net win rate, (wins - losses) / votes, with its interval over prompts and p-value; value_a and value_b are the shares of wins and of losses.

  With one vote a prompt the p-value is that of the sign test without ties.

  Args: outcome [votes] of 1 where the first won, -1 where the second did, 0 for a tie; prompt [votes]; the others as for `compare`.

  Raises:
    ValueError: another outcome, or arrays of different lengths.
  """
  outcome = np.asarray(outcome)
  if not np.isin(outcome, (-1, 0, 1)).all():
    raise ValueError("An outcome is none of 1 (the first won), 0 (a tie), -1 (the second won).")
  won, lost = (Scores((outcome == sign).astype(np.float64), None, prompt) for sign in (1, -1))
  return compare(won, lost, confidence, num_permutations, seed)
