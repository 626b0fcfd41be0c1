"""Bijections and shares."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from data_pipelines.order import Turns, permute, scatter


@pytest.mark.parametrize("num", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(num):
  for key in ((0,), (1, 2), (2**31, 5)):
    for epoch in (0, 1, 10**12):
      image = permute(np.arange(num), num, key, epoch)
      assert sorted(image) == list(range(num))


def test_permutation_depends_on_the_key_and_looks_random():
  first, second, later = (permute(np.arange(10000), 10000, (key,), epoch) for key, epoch in ((0, 0), (1, 0), (0, 1)))
  for other in (second, later):
    assert (first == other).sum() < 20 and abs(np.corrcoef(first, other)[0, 1]) < 0.05
  # Ranks of neighbours are uncorrelated.
  assert (first == np.arange(10000)).sum() < 20 and abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05


def test_permutation_can_be_asked_anywhere():
  whole = permute(np.arange(501), 501, (3,))
  assert (permute(np.array([500, 2, 77]), 501, (3,)) == whole[[500, 2, 77]]).all()
  assert 0 <= permute(10**12, 10**12 + 7, (3,)) < 10**12 + 7


def test_epochs_may_be_mixed_in_one_call():
  epochs = (0, 1, 7)
  mixed = permute(np.tile(np.arange(33), 3), 33, (5,), np.repeat(epochs, 33)).reshape(3, 33)
  for row, epoch in zip(mixed, epochs):
    np.testing.assert_array_equal(row, permute(np.arange(33), 33, (5,), epoch))


def test_every_order_of_a_few_is_as_likely():
  orders = Counter(tuple(permute(np.arange(3), 3, (4,), epoch).tolist()) for epoch in range(6000))
  assert len(orders) == 6 and all(abs(num - 1000) < 120 for num in orders.values())  # four standard deviations


@pytest.mark.parametrize("weights", [[Fraction("0.9"), Fraction("0.1")], [1], [5, 3, 1], list(range(1, 400))])
def test_turns_count_visits_and_keep_shares_from_the_first_one_on(weights):
  turns, seen, share = Turns(weights, 4), Counter(), np.array([float(one / sum(weights)) for one in weights])
  for k in range(3000):
    stream, visit = turns(k)
    assert visit == seen[stream]
    seen[stream] += 1
    had = np.cumsum([seen[i] for i in range(len(weights))])
    assert np.abs(had - np.cumsum(share) * (k + 1)).max() < np.log2(k + 1) / 3 + 5.5, "streams that stand side by side have their share"


def test_shares_are_within_a_thousandth_after_ten_thousand_turns_however_many_streams():
  """One stream of a weight of 0.9 beside two thousand of 0.1 in all, some of which have no turn for days."""
  weights = [Fraction("0.9"), *[Fraction(i, 10 * 2001000) for i in range(1, 2001)]]
  turns = Turns(weights, 1)
  assert abs(sum(turns(k)[0] == 0 for k in range(10000)) - 9000) < 10


def test_turns_can_be_asked_anywhere_and_depend_on_the_seed():
  weights = (5, 3, 1)
  deal = lambda seed, first: [Turns(weights, seed)(k)[0] for k in range(first, first + 36)]
  assert deal(4, 0) != deal(5, 0) and deal(4, 0) != deal(4, 10**12)
  stream, visit = Turns(weights, 4)(10**12)
  assert abs(visit - 10**12 * weights[stream] / 9) < 16
  with pytest.raises(ValueError, match=r"is not one of the first 2\^40"):
    Turns(weights, 4)(2**40)


def test_every_second_turn_has_all_streams_in_their_shares():
  """An update that comes every n steps sees all that others see."""
  for every in (2, 4, 8):
    streams = [Turns((1, 1, 2), 0)(k)[0] for k in range(0, 1000 * every, every)]
    assert abs(streams.count(2) - 500) < 64 and abs(streams.count(0) - 250) < 55  # four standard deviations of independent draws


def test_a_share_too_small_for_any_turn_harms_no_other():
  turns = Turns([1, Fraction(1, 10**15), 1], 0)
  seen = [turns(k) for k in range(200)]
  assert {stream for stream, _ in seen} == {0, 2} and abs(sum(stream == 0 for stream, _ in seen) - 100) < 8


def test_a_hash_scatters_neighbours_and_tells_data_sets_apart():
  first, second = (np.argsort(scatter(np.arange(10000), key)) for key in (0, 1))
  assert abs(np.corrcoef(first, np.arange(10000))[0, 1]) < 0.05 and abs(np.corrcoef(first, second)[0, 1]) < 0.05
