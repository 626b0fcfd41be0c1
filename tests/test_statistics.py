"""Intervals and tests against scipy, statsmodels and hand-made cases; what has no interval says so."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats import contingency_tables, multitest, proportion

from qimg2.evaluation.statistics import Scores, compare, figure, holm, preference
from qimg2.evaluation.statistics.bootstrap import bootstrap, resampled
from qimg2.evaluation.statistics.intervals import clustered_t, clustered_wilson, wilson
from qimg2.evaluation.statistics.paired import agresti_min, mcnemar, sign_flip, sign_test, sign_test_by_prompt
from qimg2.evaluation.statistics.sums import by_prompt


def ragged(seed, num=40):
  """Scores of 1 to 5 pictures a prompt, with weights of 1 to 9."""
  rng = np.random.default_rng(seed)
  prompt = np.repeat(np.arange(num), rng.integers(1, 6, num))
  weight = rng.integers(1, 10, len(prompt)).astype(float)
  return Scores(weight * np.clip(rng.normal(0.5, 0.2, num)[prompt] + rng.normal(0, 0.1, len(prompt)), 0, 1), weight, prompt)


@pytest.mark.parametrize("successes, n", [(0, 1), (1, 1), (0, 30), (30, 30), (29, 30), (7, 19), (1234, 2000)])
def test_wilson_is_that_of_statsmodels(successes, n):
  for confidence in (0.8, 0.95, 0.99):
    found = wilson(successes, n, confidence)
    theirs = proportion.proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    np.testing.assert_allclose([found.low, found.high], theirs, atol=1e-12)
    assert found.value == successes / n and found.n == n and bool(found.note) == (successes in (0, n))


def test_t_over_prompts_of_equal_size_is_students():
  values = np.random.default_rng(0).normal(5, 2, (17, 4))
  found = clustered_t(Scores(values.ravel(), None, np.repeat(np.arange(17), 4)))
  means = values.mean(1)
  theirs = scipy.stats.t.interval(0.95, 16, means.mean(), scipy.stats.sem(means))
  np.testing.assert_allclose([found.value, found.low, found.high], [means.mean(), *theirs], rtol=1e-12)


def test_leaving_prompts_out_by_hand():
  scores = ragged(1)
  sums = by_prompt(scores)
  rows = np.stack(scores)
  without = np.array([rows[0][rows[2] != i].sum() / rows[1][rows[2] != i].sum() for i in range(40)])
  np.testing.assert_allclose(sums.shifts(), without - sums.value, atol=1e-14)
  sizes = np.array([rows[1][rows[2] == i].sum() for i in range(40)])
  effective = sizes.sum()**2 / (sizes**2).sum()
  assert 20 < effective < 38
  error = math.sqrt(39 / 40 * ((without - sums.value) ** 2).sum())
  found = clustered_t(scores)
  np.testing.assert_allclose(found.high - found.low, 2 * scipy.stats.t.ppf(0.975, effective - 1) * error, rtol=1e-12)


def test_wilson_over_prompts_by_hand():
  """Three prompts of two pictures: 2, 1 and 0 right. The error is that of the means 1, 1/2, 0, so that n_eff = 1/4 / (1/4 / 3) = 3."""
  found = clustered_wilson(Scores([1, 1, 1, 0, 0, 0], None, [0, 0, 1, 1, 2, 2]))
  t = scipy.stats.t.ppf(0.975, 2)
  half = t * math.sqrt(0.25 / 3 + t**2 / 36) / (1 + t**2 / 3)
  np.testing.assert_allclose([found.value, found.low, found.high], [0.5, 0.5 - half, 0.5 + half], rtol=1e-12)


def test_prompts_that_are_too_alike_are_no_more_pictures_than_there_are():
  """Two of four pictures right of each of 30 prompts, and three of one: nearly the same interval, that of 120 pictures. Also for words asked for."""
  prompt, right = np.repeat(np.arange(30), 4), np.tile([1.0, 1.0, 0.0, 0.0], 30)
  more = right.copy()
  more[2] = 1
  t = scipy.stats.t.ppf(0.975, 29)
  for scores in (right, more):
    found, p = figure(scores, None, prompt), scores.mean()
    half = t * math.sqrt(p * (1 - p) / 120 + t**2 / (4 * 120**2)) / (1 + t**2 / 120)
    middle = (p + t**2 / 240) / (1 + t**2 / 120)
    np.testing.assert_allclose([found.low, found.high], [middle - half, middle + half], rtol=1e-12)
  by_words, by_pictures = figure([2.0] * 29 + [3.0], [4.0] * 30, np.arange(30)), figure(more, None, prompt)
  np.testing.assert_allclose([by_words.low, by_words.high], [by_pictures.low, by_pictures.high], rtol=1e-12)
  all_right = figure(np.ones(120), None, prompt)
  np.testing.assert_allclose(all_right.low, 1 / (1 + t**2 / 30), rtol=1e-12)  # nothing says how alike the pictures of a prompt are
  similarity = np.random.default_rng(0).normal(0.9, 0.01, 120)  # no count: it varies less than 0 or 1 would
  assert figure(similarity, None, prompt).high - figure(similarity, None, prompt).low < 0.005


def test_more_seeds_of_one_prompt_are_not_more_prompts():
  few, many = (figure(np.tile([1.0, 0.0, 1.0, 1.0, 0.0], num), None, np.tile(np.arange(5), num)) for num in (2, 50))
  np.testing.assert_allclose([few.low, few.high], [many.low, many.high], rtol=1e-12)


def test_figure_chooses():
  rng = np.random.default_rng(0)
  right = rng.integers(0, 2, 20)
  assert figure(right, None, np.arange(20)) == wilson(int(right.sum()), 20)
  assert figure(right, None, np.repeat(np.arange(10), 2)).method == "Wilson over prompts"
  assert figure(right * 3, np.full(20, 4), np.arange(20)).method == "Wilson over prompts"
  assert figure(right * 3, None, np.arange(20)).method == "t over prompts"
  assert figure(right, None, [f"prompt {i}" for i in range(20)]).n == 20


def test_what_has_no_interval_says_why():
  for found, value, note in [
      (figure([], None, []), None, "no pictures"), (figure([2.5], None, [0]), 2.5, "1 prompt"),
      (figure([1, 0], None, ["a", "a"]), 0.5, "1 prompt"), (figure([0, 0], [0, 0], [0, 1]), None, "the denominator is 0"),
      (figure([3, 0], [5, 0], [0, 1]), 0.6, "1 prompt has nearly all of the denominator"),
      (figure([7, 7, 7], None, [0, 1, 2]), 7, "all 3 prompts are equal"), (bootstrap(Scores([7, 7, 7], None, [0, 1, 2])), 7, "all 3 prompts are")]:
    assert found.value == value and found.low is None and found.high is None and note in found.note, found
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_all_right_is_no_certainty():
  """Eight pictures of two prompts count as two."""
  found = figure(np.ones(8), None, np.repeat([0, 1], 4))
  t2 = scipy.stats.t.ppf(0.975, 1) ** 2
  assert found.value == 1 and found.high == 1 and found.low == pytest.approx(1 / (1 + t2 / 2)) and "each counts as one picture" in found.note
  assert figure(np.ones(9), None, np.arange(9)).note == "all 9 right"


@pytest.mark.parametrize("scores, words", [
    (Scores([1, np.nan], None, [0, 1]), "The numerator of picture 1 is not a finite number"),
    (Scores([1, 2], [1], [0, 1]), "give one number per picture"),
    (Scores([1, 2], [1, -1], [0, 1]), "denominator of picture 1 is negative"), (Scores([1, 2], None, [0]), "one name or number per picture")])
def test_bad_scores_are_one_sentence(scores, words):
  for call in (lambda: figure(*scores), lambda: bootstrap(scores), lambda: compare(scores, scores)):
    with pytest.raises(ValueError, match=words):
      call()


def test_bad_settings_are_one_sentence():
  scores = ragged(0)
  for call, words in [(lambda: wilson(3, 2), "3 successes among 2"), (lambda: figure(*scores, confidence=95), "confidence is 95"),
                      (lambda: bootstrap(scores, "bac"), "choose one of bca, percentile"), (lambda: bootstrap(scores, num_resamples=9), "too few"),
                      (lambda: clustered_wilson(Scores([2, 0], None, [0, 1])), "no share"), (lambda: holm([0.1, math.nan]), "not a number in 0..1"),
                      (lambda: mcnemar(-1, 2), "at least 0"), (lambda: preference([2], [0]), "An outcome is none of"),
                      (lambda: compare(scores, Scores([1], None, [99])), "no prompt in common"),
                      (lambda: compare(scores, Scores([1], None, ["1"])), "name them alike")]:
    with pytest.raises(ValueError, match=words):
      call()


# The bootstrap.


@pytest.mark.parametrize("method, theirs", [("percentile", "percentile"), ("bca", "BCa")])
@pytest.mark.parametrize("draw", ["exponential", "poisson"])  # numbers, and counts whose resamples often equal the value
def test_bootstrap_is_that_of_scipy(method, theirs, draw):
  values = getattr(np.random.default_rng(3), draw)(0.3, 50)
  found = bootstrap(Scores(values, None, np.arange(50)), method, num_resamples=20000, expand=False)
  wanted = scipy.stats.bootstrap((values,), np.mean, n_resamples=20000, method=theirs, rng=np.random.default_rng(0)).confidence_interval
  # An end of 20,000 resamples is known to 0.02 of the standard error.
  np.testing.assert_allclose([found.low, found.high], [wanted.low, wanted.high], atol=0.06 * values.std() / math.sqrt(50))


def test_few_prompts_are_resampled_in_all_ways_alike():
  """Of 3 prompts there are 27 resamples; each comes as often."""
  values = resampled(by_prompt(Scores([0, 1, 5], None, [0, 1, 2])), 54000, 1)
  found, counts = np.unique(np.round(values * 3), return_counts=True)
  wanted = np.unique([sum(three) for three in itertools.product([0, 1, 5], repeat=3)], return_counts=True)
  np.testing.assert_array_equal(found, wanted[0])
  assert np.abs(counts / 2000 - wanted[1]).max() < 0.25


def test_resamples_are_the_same_everywhere_and_in_any_chunks(monkeypatch):
  sums = by_prompt(ragged(2, 41))
  values = resampled(sums, 300, 5)
  monkeypatch.setattr("qimg2.evaluation.statistics.bootstrap.CHUNK", 100)
  np.testing.assert_array_equal(resampled(sums, 300, 5), values)
  assert not np.allclose(resampled(sums, 300, 6), values)
  # The stream of key 5: a numpy with another one would be seen here.
  assert np.random.Philox(key=5).random_raw(3).tolist() == [13535223855206698129, 10893183200674769480, 3833398344621921443]


def test_expanded_intervals_are_wider_at_small_n_only():
  for num, least, most in ((10, 1.1, 1.35), (400, 1.0, 1.02)):
    wide, narrow = (bootstrap(ragged(4, num), "percentile", expand=expand) for expand in (True, False))
    assert least <= (wide.high - wide.low) / (narrow.high - narrow.low) < most


# Two runs.


@pytest.mark.parametrize("b, c", [(0, 0), (0, 5), (3, 11), (6, 6), (40, 71)])
def test_mcnemar_and_the_sign_test(b, c):
  wanted = contingency_tables.mcnemar([[9, b], [c, 4]], exact=True).pvalue if b + c else 1.0
  assert mcnemar(b, c).p_value == pytest.approx(wanted, abs=1e-12)
  assert sign_test(c, b, 7).p_value == pytest.approx(wanted, abs=1e-12) and "7 ties left out" in sign_test(c, b, 7).note
  point = scipy.stats.binom.pmf(min(b, c), b + c, 0.5)
  assert mcnemar(b, c, mid=True).p_value == pytest.approx(2 * scipy.stats.binom.cdf(min(b, c), b + c, 0.5) - point if b + c else 1.0)


def test_a_figure_against_a_half_has_one_vote_a_prompt():
  wins = {"a": [0.9, 0.2], "b": [0.6], "c": [0.5, 0.5], "d": [0.1] * 9, "e": [0.7, 0.8, 0.4], "f": [1.0]}  # above: a, b, e, f; below: d
  scores = Scores(sum(wins.values(), []), None, [name for name, some in wins.items() for _ in some])
  found = sign_test_by_prompt(scores, 0.5)
  assert found.p_value == pytest.approx(scipy.stats.binomtest(4, 5).pvalue, abs=1e-12) and found.n == 5
  assert found.note == "4 prompts above 0.5, 1 below; 1 ties left out"
  ties = sign_test_by_prompt(Scores([0.5, 0.5], None, ["a", "b"]), 0.5)
  assert ties.p_value == 1 and ties.n == 0 and "no wins or losses" in ties.note
  weighted = sign_test_by_prompt(Scores([3, 1], [4, 4], ["a", "a"]), 0.5)  # of sums, not of pictures
  assert weighted.n == 0
  assert sign_test_by_prompt(Scores([], [], []), 0.5).p_value == 1


def test_holm_is_that_of_statsmodels():
  for p in ([0.01, 0.04, 0.03, 0.005], [0.5], [0.02, 0.02, 0.9], list(np.random.default_rng(0).random(30) ** 3)):
    np.testing.assert_allclose(holm(p), multitest.multipletests(p, method="holm")[1], rtol=1e-12)
  assert holm([]) == []


def test_the_exact_sign_flip_is_that_of_scipy():
  rng = np.random.default_rng(1)
  a, b = rng.normal(0.4, 1, 12), rng.normal(0, 1, 12)
  found = sign_flip(Scores(a, None, np.arange(12)), Scores(b, None, np.arange(12)))
  difference = lambda x, y, axis: (x - y).mean(axis)
  theirs = scipy.stats.permutation_test((a, b), difference, permutation_type="samples", vectorized=True, n_resamples=np.inf)
  assert found.p_value == pytest.approx(theirs.pvalue, abs=1e-12) and found.method == "sign flip, exact" and found.n == 12


def test_the_random_sign_flip_is_near_students_test():
  rng = np.random.default_rng(2)
  a, b = rng.normal(0.25, 1, 200), rng.normal(0, 1, 200)
  runs = Scores(a, None, np.arange(200)), Scores(b, None, np.arange(200))
  found = sign_flip(*runs)
  assert found.p_value == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, abs=0.01) and "9999" in found.method
  assert sign_flip(*runs) == found and sign_flip(*runs[::-1]).p_value == pytest.approx(found.p_value, abs=0.005)


def test_sign_flips_of_ratios_by_hand():
  """Runs whose denominators differ: each of the 2^4 exchanges by hand."""
  (na, da), (nb, db) = ([3, 4, 2, 6], [5, 5, 5, 9]), ([1, 3, 4, 2], [4, 5, 5, 9])
  ratio = lambda n, d: sum(n) / sum(d)
  both = [list(zip(na, da)), list(zip(nb, db))]
  differences = [ratio(*zip(*[both[s][i] for i, s in enumerate(signs)])) - ratio(*zip(*[both[1 - s][i] for i, s in enumerate(signs)]))
                 for signs in itertools.product([0, 1], repeat=4)]
  wanted = np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12)
  assert sign_flip(Scores(na, da, range(4)), Scores(nb, db, range(4))).p_value == wanted


def test_compare_of_single_pictures_is_mcnemar():
  a = np.array([1] * 9 + [0] * 2 + [1] * 20 + [0] * 5)
  b = np.array([0] * 9 + [1] * 2 + [1] * 20 + [0] * 5)
  order = np.random.default_rng(0).permutation(36)
  found = compare(Scores(a, None, np.arange(36)), Scores(b[order], None, order))
  assert found.p_value == mcnemar(9, 2).p_value == pytest.approx(sign_flip(Scores(a, None, range(36)), Scores(b, None, range(36))).p_value)
  d, half = 7 / 38, scipy.stats.norm.ppf(0.975) * math.sqrt((12 / 38 - (7 / 38) ** 2) / 38)
  assert (found.low, found.high) == pytest.approx((d - half, d + half)) and found.value == pytest.approx(7 / 36)
  assert (found.higher, found.equal, found.lower, found.n) == (9, 25, 2, 36)
  assert agresti_min(0, 0, 30)[1] > 0.05  # no difference seen is no certainty


def test_compare_of_many_pictures_is_students_paired_interval():
  rng = np.random.default_rng(5)
  a, b = rng.normal(30, 3, (25, 4)), rng.normal(29, 3, (25, 4))
  prompt = np.repeat(np.arange(25), 4)
  found = compare(Scores(a.ravel(), None, prompt), Scores(b.ravel(), None, prompt))
  theirs = scipy.stats.ttest_rel(a.mean(1), b.mean(1)).confidence_interval()
  np.testing.assert_allclose([found.low, found.high], [theirs.low, theirs.high], rtol=1e-10)
  back = compare(Scores(b.ravel(), None, prompt), Scores(a.ravel(), None, prompt))
  np.testing.assert_allclose([back.low, back.high], [-found.high, -found.low], rtol=1e-10)
  json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_compare_states_what_it_leaves_out_and_cannot_say():
  scores = ragged(3)
  same = compare(scores, scores)
  assert same.value == 0 and same.low is None and same.p_value == 1 and same.note == "all 40 differences are equal: no interval; no prompt differs"
  less = compare(Scores([1, 2, 3], None, np.uint8([0, 1, 2])), Scores([1, 1, 1, 1], None, [1, 2, 3, 3]))
  assert (less.n, less.left_out, less.value) == (2, 2, 1.5) and "2 prompts that only one run has" in less.note
  one = compare(Scores([3.5], None, [0]), Scores([1], None, [0]))
  assert one.value == 2.5 and one.low is None and "1 prompt: no interval" in one.note and one.p_value == 1
  nothing = compare(Scores([], None, []), Scores([], None, []))
  assert nothing.value is None and nothing.p_value is None and nothing.note == "no pictures"


def test_preference_is_the_net_win_rate():
  outcome = np.array([1] * 12 + [-1] * 4 + [0] * 6)
  found = preference(outcome, np.arange(22))
  assert found.value == pytest.approx(8 / 22) and found.p_value == sign_test(12, 4, 6).p_value and found.equal == 6
  ties = preference(np.zeros(9), np.arange(9))
  assert ties.value == 0 and ties.p_value == 1 and "no prompt" in ties.note and ties.low < 0 < ties.high
  crowd = preference(np.tile(outcome, 5), np.tile(np.arange(22), 5))
  assert crowd.n == 22 and crowd.high - crowd.low == pytest.approx(found.high - found.low, rel=0.2)
