"""Distances between sets of features: values known by hand, and the published formulas written out."""

import numpy as np
import pytest
import scipy.linalg

from qimg2.evaluation import fidelity
from qimg2.evaluation.moments import Moments


def normal(seed, num, dim=6, mean=0.0, spread=1.0):
  return (np.random.default_rng(seed).normal(mean, spread, (num, dim))).astype(np.float32)


def with_moments(mean, deviations, num=8):
  """2 num vectors whose mean and covariance are exactly these, the covariance diagonal."""
  dim = len(deviations)
  signs = np.concatenate([np.eye(dim), -np.eye(dim)]) * np.sqrt((2 * dim - 1) / 2)
  return mean + signs * deviations


# Moments.


@pytest.mark.parametrize("cuts", [[1000], [1, 999], [500, 500], [3, 17, 230, 750], [1] * 1000])
def test_moments_do_not_depend_on_the_blocks(cuts):
  x = normal(0, 1000, 8, mean=50.0)
  parts = np.split(x, np.cumsum(cuts)[:-1])
  found = Moments.of_blocks(parts)
  exact = x.astype(np.float64)
  assert found.num == 1000
  np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-13)
  np.testing.assert_allclose(found.covariance, np.cov(exact.T), rtol=1e-11, atol=1e-13)


def test_moments_merge_in_any_order():
  a, b, c = (Moments.of(normal(seed, num, mean=seed)) for seed, num in ((1, 30), (2, 1), (3, 70)))
  one, other = a.merged(b).merged(c), c.merged(a.merged(b))
  np.testing.assert_allclose(one.mean, other.mean, rtol=1e-13)
  np.testing.assert_allclose(one.scatter, other.scatter, rtol=1e-12)


def test_moments_refuse_what_has_none():
  with pytest.raises(ValueError, match="not a single vector"):
    Moments.of_blocks([])
  with pytest.raises(ValueError, match="first those of picture 2"):
    Moments.of(np.float32([[1, 2], [3, 4], [np.nan, 1]]))
  with pytest.raises(ValueError, match="at least two pictures"):
    Moments.of(normal(0, 1)).covariance  # noqa: B018
  with pytest.raises(ValueError, match="of different networks"):
    Moments.of(normal(0, 3, 4)).merged(Moments.of(normal(0, 3, 5)))


# FID.


def test_fid_of_axis_aligned_normals_by_hand():
  """|Δμ|² + Σ (σ - σ')²."""
  one = Moments.of(with_moments(np.array([0, 0, 0.0]), np.array([1, 2, 3.0])))
  other = Moments.of(with_moments(np.array([3, 4, 0.0]), np.array([2, 2, 1.0])))
  assert fidelity.fid(one, other) == pytest.approx(25 + 1 + 0 + 4, rel=1e-9)
  assert fidelity.fid(other, one) == pytest.approx(30, rel=1e-9)
  assert fidelity.fid(one, one) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("num", [200, 20])  # of 32 numbers: full rank, and not
def test_fid_is_the_matrix_root_of_the_published_code(num):
  x, y = normal(1, num, 32), normal(2, num + 5, 32, 0.3, 1.5)
  first, second = np.cov(x.T.astype(float)), np.cov(y.T.astype(float))
  root = scipy.linalg.sqrtm(first @ second).real
  expected = np.square(x.astype(float).mean(0) - y.astype(float).mean(0)).sum() + np.trace(first + second - 2 * root)
  tolerance = 1e-8 if num == 200 else 1e-5  # the root of a matrix without full rank is what is inexact
  assert fidelity.fid(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=tolerance)


def test_fid_without_full_rank_is_said():
  assert not fidelity.notes(40, 40, 32)
  assert len(fidelity.notes(32, 40, 32)) == 2
  assert "the reference has 32 pictures for features of 32 numbers" in fidelity.notes(40, 32, 32)[0]


def test_fid_of_pictures_that_are_all_the_same():
  same = Moments.of(np.ones((5, 3)))
  assert fidelity.fid(same, same) == 0
  assert fidelity.fid(same, Moments.of(with_moments(np.ones(3), np.array([1, 2, 3.0])))) == pytest.approx(14, rel=1e-9)


# KID and CMMD.


def polynomial(x, y):
  return (x @ y / len(x) + 1) ** 3


def test_kid_by_loops_over_pairs():
  x, y = normal(1, 7, 4).astype(float), normal(2, 7, 4, 0.5).astype(float)
  pairs = [(i, j) for i in range(7) for j in range(7)]
  within = sum(polynomial(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j) / 42
  expected = within - 2 * sum(polynomial(x[i], y[j]) for i, j in pairs) / 49
  assert fidelity.kid(x, y) == (pytest.approx(expected, rel=1e-10), 0)


def test_kid_is_unbiased_and_its_subsets_are_those_of_the_seed():
  found = [fidelity.kid(normal(seed, 60), normal(seed + 500, 60))[0] for seed in range(200)]
  assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200) and min(found) < 0
  x, y = normal(1, 90), normal(2, 80, mean=0.5)
  one, other = (fidelity.kid(x, y, 40, 20, seed) for seed in (3, 4))
  assert one == fidelity.kid(x, y, 40, 20, 3) != other
  assert one[1] > 0 and one[0] == pytest.approx(other[0], abs=one[1])
  with pytest.raises(ValueError, match="at least 2 of each"):
    fidelity.kid(x, y[:1])


def test_cmmd_by_loops_over_pairs():
  x, y = normal(1, 9, 5), normal(2, 301, 5, 0.7)
  u, v = (z.astype(float) / np.linalg.norm(z.astype(float), axis=1, keepdims=True) for z in (x, y))
  mean = lambda a, b: np.mean(np.exp(-np.square(a[:, None] - b[None]).sum(-1) / 200))
  expected = 1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v))
  assert fidelity.cmmd(x, y) == pytest.approx(expected, abs=2e-5)
  assert fidelity.cmmd(x, y) == pytest.approx(10 * np.square(u.mean(0) - v.mean(0)).sum(), rel=0.02)
  assert fidelity.cmmd(x, 3 * x) == pytest.approx(0, abs=1e-5)
  with pytest.raises(ValueError, match="only zeros"):
    fidelity.cmmd(x, np.zeros((3, 5), np.float32))


# Support.


def test_support_by_hand():
  """On a line: the reference at 0, 1, 2, 10; with one neighbour its balls reach 1, 1, 1, 8."""
  reference, drawn = np.float32([[0], [1], [2], [10]]), np.float32([[0.5], [3.5], [30]])
  found = fidelity.support(reference, drawn, neighbours=1)
  # 0.5 is in the balls of 0 and 1, 3.5 in that of 10, 30 in none. Drawn balls reach 3, 3, 26.5 and hold 0..6.5 and 3.5..56.5.
  assert found == {"precision": pytest.approx(2 / 3), "recall": 1.0, "density": 1.0, "coverage": 0.75}


def test_support_is_the_definition_over_all_blocks():
  reference, drawn = normal(1, 300), normal(2, 270, mean=0.6, spread=0.8)
  far = np.linalg.norm(reference[:, None] - drawn[None], axis=-1)
  radius = lambda z: np.sort(np.linalg.norm(z[:, None] - z[None], axis=-1), axis=1)[:, 3]
  inside, recalled = far <= radius(reference)[:, None], far <= radius(drawn)[None]
  assert fidelity.support(reference, drawn) == {
      "precision": pytest.approx(inside.any(0).mean()), "recall": pytest.approx(recalled.any(1).mean()),
      "density": pytest.approx(inside.sum(0).mean() / 3), "coverage": pytest.approx(inside.any(1).mean())}
  assert fidelity.support(reference, reference) == {"precision": 1, "recall": 1, "density": pytest.approx(4 / 3, abs=0.1), "coverage": 1}
  assert fidelity.support(reference, drawn + 100)["precision"] == 0


def test_support_of_equal_vectors():
  same = np.ones((5, 3), np.float32)
  assert fidelity.support(same, same)["precision"] == 1
  assert fidelity.support(same, same + 1)["precision"] == 0
  with pytest.raises(ValueError, match="at least 4 of each"):
    fidelity.support(same, same[:3])


# Diversity.


def test_diversity_by_hand():
  x = np.float32([[1, 0], [0, 2], [-3, 0], [1, 1], [2, 2], [5, 5]])
  # "a": cosines 0, -1, 0; "b": 1; "c" has no pair.
  assert fidelity.diversities(["a", "a", "a", "b", "b", "c"], x) == pytest.approx({"a": 4 / 3, "b": 0})
  assert fidelity.diversities(["a", "b"], x[:2]) == {}
  with pytest.raises(ValueError, match="2 names were given for 6"):
    fidelity.diversities(["a", "b"], x)
