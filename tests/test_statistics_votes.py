"""Ratings against choix, scipy and hand-made votes; Krippendorff's alpha against published tables; sizes against their own intervals and tests."""

import dataclasses
import json
import math

import choix
import numpy as np
import pytest
from scipy import optimize, stats

from qimg2.evaluation.statistics import sizes
from qimg2.evaluation.statistics.agreement import krippendorff
from qimg2.evaluation.statistics.intervals import wilson
from qimg2.evaluation.statistics.paired import mcnemar, sign_test
from qimg2.evaluation.statistics.ratings import CENTRE, POINTS, Estimate, bradley_terry, ranks

NAN = math.nan


def random_votes(num, eta=-math.inf, seed=0, strengths=(0.5, 0.2, -0.1, -0.6)):
  """Votes (first, second, outcome) among models named a, b, c and so on; no ties where eta is -inf."""
  rng, strengths = np.random.default_rng(seed), np.array(strengths)
  first = rng.integers(0, len(strengths), num)
  second = (first + rng.integers(1, len(strengths), num)) % len(strengths)
  d = (strengths[first] - strengths[second]) / 2
  chances = np.exp(np.stack([d, np.full(num, eta), -d], 1))
  outcome = 1 - (rng.random(num)[:, None] > (chances / chances.sum(1, keepdims=True)).cumsum(1)).sum(1)
  letters = np.array(list("abcdefgh"))
  return letters[first], letters[second], outcome


def strengths_of(found):
  return np.array([(found.ratings[name].value - CENTRE) / POINTS for name in found.names])


def test_without_ties_it_is_the_bradley_terry_of_choix():
  first, second, outcome = random_votes(300)
  pairs = [(ord(a) - 97, ord(b) - 97)[::int(y)] for a, b, y in zip(first, second, outcome)]
  theirs = choix.opt_pairwise(4, pairs, tol=1e-12)
  found = bradley_terry(first, second, outcome)
  np.testing.assert_allclose(strengths_of(found), theirs - theirs.mean(), atol=1e-6)
  assert found.tie.value == 0 and found.note == "" and sum(one.n for one in found.ratings.values()) == 600


def davidson(first, second, outcome, parameters):
  """[votes] log-likelihood of Davidson's model, with strengths as positive numbers and nu, as he wrote it in 1970."""
  strength = np.exp(parameters[:-1])
  a, b, nu = strength[[ord(x) - 97 for x in first]], strength[[ord(x) - 97 for x in second]], math.exp(parameters[-1])
  return np.log(np.choose(1 - outcome, [a, nu * np.sqrt(a * b), b]) / (a + b + nu * np.sqrt(a * b)))


def test_ties_and_the_sandwich_by_an_optimiser_and_by_differences():
  first, second, outcome = random_votes(400, -0.5, 1)
  cluster = np.arange(400) // 8
  found = bradley_terry(first, second, outcome, cluster)
  # The first strength is 0; all else is free.
  likelihood = lambda free: davidson(first, second, outcome, np.concatenate([[0], free]))
  best = optimize.minimize(lambda free: -likelihood(free).sum(), np.zeros(4), tol=1e-10).x
  np.testing.assert_allclose(strengths_of(found)[1:] - strengths_of(found)[0], best[:3], atol=1e-5)
  assert found.tie.value == pytest.approx(math.exp(best[3]), abs=1e-5)
  # Gradients of votes and the Hessian by central differences.
  steps = 1e-4 * np.eye(4)
  gradients = np.stack([likelihood(best + step) - likelihood(best - step) for step in steps], 1) / 2e-4
  value = lambda free: likelihood(free).sum()
  hessian = np.array([[value(best + x + y) - value(best + x - y) - value(best - x + y) + value(best - x - y) for x in steps] for y in steps]) / 4e-8
  sums = np.stack([gradients[cluster == c].sum(0) for c in range(50)])
  inverse = np.linalg.inv(hessian)
  covariance = 50 / 49 * inverse @ sums.T @ sums @ inverse
  for i, name in enumerate("bcd"):
    difference = found.difference(name, "a")
    half = stats.t.ppf(0.975, 49) * POINTS * math.sqrt(covariance[i, i])
    assert (difference.high - difference.low) / 2 == pytest.approx(half, rel=1e-3) and difference.n == 50
  half = stats.t.ppf(0.975, 49) * math.sqrt(covariance[3, 3])
  assert math.log(found.tie.high / found.tie.value) == pytest.approx(half, rel=1e-3)


def test_the_order_of_votes_and_of_names_changes_nothing():
  first, second, outcome = random_votes(200, -0.5, 2)
  found, order = bradley_terry(first, second, outcome), np.random.default_rng(0).permutation(200)
  other = bradley_terry(second[order], first[order], -outcome[order])
  for name in found.names:
    assert dataclasses.astuple(other.ratings[name])[:3] == pytest.approx(dataclasses.astuple(found.ratings[name])[:3], abs=1e-6)
  assert sum(one.value for one in found.ratings.values()) == pytest.approx(4 * CENTRE)
  parts = [dataclasses.asdict(one) for one in [*found.ratings.values(), found.tie]]
  json.dumps([parts, found.ranks, found.groups], allow_nan=False)


def test_copied_votes_of_a_cluster_tell_nothing_new():
  first, second, outcome = random_votes(100, -0.5, 3)
  one = bradley_terry(first, second, outcome)
  many = bradley_terry(np.tile(first, 5), np.tile(second, 5), np.tile(outcome, 5), np.tile(np.arange(100), 5))
  as_new = bradley_terry(np.tile(first, 5), np.tile(second, 5), np.tile(outcome, 5))
  width = lambda found: found.difference("a", "b").high - found.difference("a", "b").low
  assert width(many) == pytest.approx(width(one), rel=1e-6) and width(as_new) < 0.5 * width(one)


@pytest.mark.parametrize("votes, notes, order", [
    (("aab", "bbc", [1, 1, 1]), "a never lost and c never won: ratings held by a prior", "abc"),
    (("aabc", "bccb", [1, 1, 1, 1]), "a never lost: ratings held", None),
    (("abcd", "badc", [1, 1, 1, 1]), "2 groups that no votes connect", None),
    (("abab", "cdcd", [1, 1, -1, -1]), "2 groups that no votes connect", None),
    (("aacc" + "abab", "bbdd" + "cddc", [1, -1, 1, -1] + [1] * 4), "some models never lost to the others", None),
    (("ab", "ba", [0, 0]), "all votes are ties", None),
    (("aaab", "bbba", [1, 1, 0, 0]), "a never lost and b never won", "ab")])
def test_what_has_no_finite_rating_says_so(votes, notes, order):
  first, second, outcome = votes
  found = bradley_terry(list(first), list(second), outcome)
  assert notes in found.note
  assert all(math.isfinite(one.value) for one in found.ratings.values())
  if "groups" not in notes:
    assert all(one.low is None and notes.split(":")[0] in one.note for one in found.ratings.values()) and found.covariance is None
    assert set(found.ranks.values()) == {None} and found.difference("a", "b").low is None
  if order:
    assert sorted(found.names, key=lambda name: -found.ratings[name].value) == list(order)


def test_one_who_never_loses_but_ties_with_others_can_be_rated():
  """c and d win against each other, so that ties have a finite weight, and with it what a's ties say."""
  found = bradley_terry(list("aaaacdcdbc"), list("bbbbdcdcca"), [1, 1, 0, 0, 1, 1, 1, 1, 0, 0])
  assert found.note == "" and found.ratings["a"].low is not None and found.ratings["a"].value > found.ratings["b"].value


def test_groups_are_rated_apart():
  apart = bradley_terry(list("aabccd"), list("bbaddc"), [1, 1, 1, 1, 1, 1])
  alone = bradley_terry(list("aab"), list("bba"), [1, 1, 1])
  assert apart.groups == {"a": 0, "b": 0, "c": 1, "d": 1} and apart.ratings["a"].value == pytest.approx(alone.ratings["a"].value)
  assert apart.difference("a", "c").value is None and "no votes connect" in apart.difference("a", "c").note


def test_one_cluster_has_no_interval_and_few_are_stated():
  first, second, outcome = random_votes(60, -0.5, 4)
  one = bradley_terry(first, second, outcome, np.zeros(60))
  assert one.note == "1 cluster of votes: no intervals" and one.ratings["a"].low is None and one.tie.low is None
  assert "only 3 clusters for 4 models" in bradley_terry(first, second, outcome, np.arange(60) % 3).note


def test_ranks_share_a_place_where_intervals_meet():
  at = lambda low, high: Estimate((low + high) / 2, low, high)
  assert ranks([at(5, 9), at(8, 12), at(0, 4), Estimate(3.0)]) == [1, 1, 3, None]
  assert ranks([at(5, 9), at(10, 12), at(0, 4)], [0, 1, 0]) == [1, 1, 2]


def test_bad_votes_are_one_sentence():
  for votes, words in [((["a"], ["a"], [1]), "against itself"), ((["a"], ["b"], [2]), "An outcome is none of"), (([], [], []), "no votes"),
                       ((["a"], ["b", "c"], [1]), "one of each per vote"), ((["a"], ["b"], [1], [1, 2]), "give one per vote")]:
    with pytest.raises(ValueError, match=words):
      bradley_terry(*votes)
  with pytest.raises(ValueError, match="no model 'z'"):
    bradley_terry(["a", "b"], ["b", "a"], [1, 1]).difference("a", "z")


# Krippendorff's alpha.

# Four observers, twelve units: the worked example of Krippendorff (2011, section C).
TABLE = [[1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
         [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN]]


@pytest.mark.parametrize("level, published", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_table(level, published):
  found = krippendorff(TABLE, level)
  assert round(found.value, 3) == published and found.n == 11 and found.low < found.value < found.high < 1


def test_two_raters_of_ten_articles():
  """Krippendorff 2011, section A: binary, two observers: alpha = 0.095."""
  a, b = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
  assert round(krippendorff([a, b]).value, 3) == 0.095


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_leaving_units_out_by_hand(level):
  """The interval, from alphas of tables without a unit."""
  ratings = np.array(TABLE)[:, :11]
  ratings[0, 0] = 2  # no unit has all of the differences
  found = krippendorff(ratings, level)
  without = np.array([krippendorff(np.delete(ratings, i, 1), level).value for i in range(11)])
  more = (~np.isnan(ratings)).sum() / 11 - 1
  scale = lambda alpha: np.log((1 + more * alpha) / (1 - alpha))
  half = stats.t.ppf(0.975, 10) * math.sqrt(10 / 11 * np.square(scale(without) - scale(found.value)).sum())
  np.testing.assert_allclose([scale(found.low), scale(found.high)], [scale(found.value) - half, scale(found.value) + half], rtol=1e-9)


@pytest.mark.parametrize("ratings, value, note", [
    (np.zeros((0, 0)), None, "no unit has two ratings"), ([[1, 2, 3]], None, "no unit has two ratings"),
    ([[1, 2], [NAN, NAN]], None, "no unit has two ratings"), ([[2, 2], [2, 2]], None, "all ratings are the same"),
    ([[1, 2, 1], [1, 2, 1]], 1.0, "raters agree on all 3 units"), ([[1], [2]], 0.0, "1 unit: no interval"),
    ([[1, 2, 1, 2], [1, 2, 1, 1]], None, "all differences are within 1 unit")])
@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_without_an_interval_says_why(ratings, value, note, level):
  found = krippendorff(ratings, level)
  assert found.low is None and found.high is None and note in found.note and (value is None or found.value == pytest.approx(value))
  json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_alpha_refuses():
  for call, words in [(lambda: krippendorff([1, 2]), "finite numbers"), (lambda: krippendorff([[1], [2]], "ratio"), "choose one of nominal"),
                      (lambda: krippendorff([[math.inf], [2]]), "finite numbers")]:
    with pytest.raises(ValueError, match=words):
      call()


# Sizes.


def test_sizes_of_known_studies():
  assert (sizes.votes_for_power(0.55), sizes.votes_for_power(0.6), sizes.votes_for_power(0.4)) == (783, 194, 194)
  assert abs(sizes.votes_for_rating(10) - 4600) < 50 and sizes.votes_for_rating(20) == 1160
  assert sizes.prompts_for_width(0.1, 0.5) == math.ceil((2 * stats.norm.ppf(0.975) * 0.5 / 0.1)**2) == 385
  assert sizes.prompts_for_width(0.1, 0.5, seeds=4, correlation=1) == 385 and sizes.prompts_for_width(0.1, 0.5, seeds=4) == 97
  assert sizes.prompts_for_difference(0.5, 1) == math.ceil(((1.959964 + 0.841621) / 0.5)**2) == 32


@pytest.mark.parametrize("width, share", [(0.1, 0.5), (0.1, 0.9), (0.3, 0.0), (0.02, 0.97)])
def test_the_width_that_was_asked_for_is_reached(width, share):
  n = sizes.prompts_for_share(width, share)
  at = lambda n: wilson(round(share * n), n)
  assert at(n).high - at(n).low <= width < at(n - 3).high - at(n - 3).low


def test_the_power_that_was_asked_for_is_reached():
  """1,000 studies; the exact tests have a little less than the normal formula says."""
  rng = np.random.default_rng(0)
  n = sizes.prompts_for_mcnemar(0.25, 0.1)
  only_a, only_b, _ = rng.multinomial(n, [0.25, 0.1, 0.65], 1000).T
  assert 0.76 <= np.mean([mcnemar(a, b, mid=True).p_value <= 0.05 for a, b in zip(only_a.tolist(), only_b.tolist())]) <= 0.84
  n = sizes.votes_for_power(0.6)
  assert 0.74 <= np.mean([sign_test(k, n - k).p_value <= 0.05 for k in rng.binomial(n, 0.6, 1000).tolist()]) <= 0.82


def test_sizes_refuse():
  for call, words in [(lambda: sizes.votes_for_power(0.5), "not 0.5"), (lambda: sizes.prompts_for_width(0, 1), "width is 0"),
                      (lambda: sizes.prompts_for_mcnemar(0.2, 0.2), "two different shares"), (lambda: sizes.prompts_for_share(1e-6), "wider"),
                      (lambda: sizes.prompts_for_width(1, 1, correlation=2), "in 0..1"), (lambda: sizes.votes_for_power(0.6, power=80), "power is")]:
    with pytest.raises(ValueError, match=words):
      call()
