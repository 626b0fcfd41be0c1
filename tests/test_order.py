"""Bijections and exact shares."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from data_pipelines.order import Schedule, apportion, permute


@pytest.mark.parametrize("num", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(num):
  for key in ((0,), (1, 2), (2**31, 5)):
    image = permute(np.arange(num), num, key)
    assert sorted(image) == list(range(num))


def test_permutation_depends_on_the_key_and_looks_random():
  first, second = (permute(np.arange(10000), 10000, (key,)) for key in (0, 1))
  assert (first == second).sum() < 20 and (first == np.arange(10000)).sum() < 20
  # Ranks of neighbours are uncorrelated.
  assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_permutation_can_be_asked_anywhere():
  whole = permute(np.arange(501), 501, (3,))
  assert (permute(np.array([500, 2, 77]), 501, (3,)) == whole[[500, 2, 77]]).all()
  assert 0 <= permute(10**12, 10**12 + 7, (3,)) < 10**12 + 7


def test_shares_are_exact_where_they_can_be():
  assert apportion((Fraction("0.3"), Fraction("0.7"))) == (3, 7)
  assert apportion((Fraction(2), Fraction(1), Fraction(1))) == (2, 1, 1)


def test_other_shares_are_off_by_less_than_a_turn_and_never_none():
  weights = (Fraction(104729), Fraction(7919), Fraction(1, 10**9))
  turns = apportion(weights, 1000)
  assert turns[2] == 1
  for count, weight in zip(turns[:2], weights):
    assert abs(count - 1000 * weight / sum(weights)) < 1


def test_schedule_deals_exact_shares_and_counts_visits():
  schedule, seen = Schedule((5, 3, 1), seed=4), Counter()
  cycles = []
  for k in range(9 * 4):
    stream, visit = schedule(k)
    assert visit == seen[stream]
    seen[stream] += 1
    cycles.append(stream)
  assert seen == {0: 20, 1: 12, 2: 4}
  assert cycles[:9] != cycles[9:18]
  assert Schedule((5, 3, 1), seed=4)(10**12) == schedule(10**12)
  assert [Schedule((5, 3, 1), seed=5)(k)[0] for k in range(36)] != cycles
