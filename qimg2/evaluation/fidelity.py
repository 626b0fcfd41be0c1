"""How far a set of pictures is from a reference set, by features [n, D] of both; and how different the pictures of one prompt are.

  FID        |μ - μ'|² + tr(C + C' - 2 (C C')^½)             normals with the sets' means and covariances (arXiv 1706.08500)       (1)
  KID        unbiased MMD² under k(x, y) = (x·y/D + 1)³       mean over random subsets (arXiv 1801.01401)                           (2)
  CMMD       1000 MMD² under k(x, y) = exp(-|x - y|²/200)     of vectors scaled to length 1 (arXiv 2401.09603)                      (3)
  precision  share of pictures in the reference's support, recall the other way round (arXiv 1904.06991); the support is the union of the balls
             around each vector that reach its k-th nearest neighbour
  density    mean number of the reference's balls that hold a picture, over k; coverage: share of the reference's balls that hold one (2002.09797)
  diversity  one minus the mean cosine over the pairs of pictures of a prompt, averaged over prompts

Quirks. FID's covariances need more than D pictures to have full rank; with fewer it is still defined, but far too large: `notes` says so. It is too
large at any size, and less so with more pictures. tr (C C')^½ is the sum of the singular values of FᵀF', with C = F Fᵀ by eigenvectors and C'
likewise: never complex, no matrix root. KID may be below 0. CMMD is the biased estimate, with the diagonals, as published; since vectors of length 1
are near beside a deviation of 10, it is within 2 % ten times |mean - mean'|² of these vectors. The published CMMD takes CLIP ViT-L/14 at 336 px, and
FID Inception's pool of 2,048 numbers: figures compare with those of the same features alone. The paper on density and coverage takes five neighbours;
here k is that of precision. Squared distances below 1e-6 of the squared lengths count as 0.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.linalg

from qimg2.evaluation.moments import Moments, check_features

NEIGHBOURS = 3
_ROWS = 256  # rows of a block of pairs: 31 MB against 30,000 vectors
_SAME = 1e-6


def fid(one: Moments, other: Moments) -> float:
  """Equation 1, at least 0, symmetric. Relative precision about 1e-8 of the traces.

  Raises:
    ValueError: widths that differ, or fewer than two vectors in a set.
  """
  if one.mean.shape != other.mean.shape:
    raise ValueError(f"Features of {one.mean.size} and {other.mean.size} numbers have no distance: they are of different networks.")
  first, second = one.covariance, other.covariance
  common = scipy.linalg.svdvals(_factor(first).T @ _factor(second)).sum()
  return max(0.0, float(np.square(one.mean - other.mean).sum() + np.trace(first) + np.trace(second) - 2 * common))


def _factor(covariance: np.ndarray) -> np.ndarray:
  """F [D, r] with F Fᵀ the covariance of rank r, at least 1."""
  values, vectors = scipy.linalg.eigh(covariance)
  kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
  kept[-1] = True
  return vectors[:, kept] * np.sqrt(np.maximum(values[kept], 0.0))


def notes(num: int, num_reference: int, dim: int) -> list[str]:
  """What must be said beside figures of so many pictures against so many of the reference, with features of `dim` numbers."""
  found = [f"FID: {which} has {n} pictures for features of {dim} numbers, so its covariance has not full rank; FID is far too large and compares "
           "only with sets of the same size." for which, n in (("the set", num), ("the reference", num_reference)) if n < dim + 1]
  if num != num_reference:
    found.append(f"Precision and recall: {num} pictures stand against {num_reference}; supports of sets of different sizes have different radii.")
  return found


def kid(one: np.ndarray, other: np.ndarray, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0) -> tuple[float, float]:
  """(mean, standard deviation) over subsets of equation 2.

  Subsets are drawn without replacement, as many rows of each set as the smaller has, `subset_size` at most. Where that is all of both there is only
  one, with deviation 0.

  Args:
    one, other: features [n, D] and [m, D].
    subset_size, num_subsets, seed: of the subsets.

  Raises:
    ValueError: fewer than two vectors in a set, or widths that differ.
  """
  size = min(subset_size, len(one), len(other))
  _check_pair(one, other, 2)
  if len(one) == len(other) == size:
    num_subsets = 1
  rng = np.random.default_rng(seed)
  found = [_polynomial_mmd(one[rng.permutation(len(one))[:size]], other[rng.permutation(len(other))[:size]]) for _ in range(num_subsets)]
  return float(np.mean(found)), float(np.std(found))


def _polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
  """Equation 2 of as many vectors x as y."""
  num = len(x)
  kernel = lambda a, b: ((a @ b.T).astype(np.float64) / a.shape[1] + 1) ** 3  # the rounding of products is lost in the mean over pairs
  within = sum((k.sum() - np.trace(k)) / (num * (num - 1)) for k in (kernel(x, x), kernel(y, y)))
  return float(within - 2 * kernel(x, y).mean())


def cmmd(one: np.ndarray, other: np.ndarray) -> float:
  """Equation 3 of features [n, D] and [m, D], which are scaled to length 1 here; at least 0 but for rounding, about 1e-6.

  Raises:
    ValueError: widths that differ, no vector, or one of length 0.
  """
  _check_pair(one, other, 1)
  mean = lambda x, y: math.fsum(float(np.exp((block - 1) / 100).sum(dtype=np.float64)) for _, block in _cosines(x, y)) / (len(x) * len(y))
  return 1000 * (mean(one, one) + mean(other, other) - 2 * mean(one, other))


def _cosines(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
  """Rows of the cosines [n, m] between the vectors of two sets, block by block."""
  lengths = [np.sqrt(np.einsum("nd,nd->n", one, one, dtype=np.float64)).astype(np.float32) for one in (x, y)]
  if not min(one.min() for one in lengths) > 0:
    raise ValueError("A vector of length 0 has no direction: the feature network gave a picture only zeros.")
  for rows in _slices(len(x)):
    yield rows, x[rows] @ y.T / lengths[0][rows, None] / lengths[1][None]


def support(reference: np.ndarray, drawn: np.ndarray, neighbours: int = NEIGHBOURS) -> dict[str, float]:
  """{"precision", "recall", "density", "coverage"} of features [m, D] against the reference's [n, D]; all in 0..1 but density, which may be more.

  Memory is that of the features and of a few blocks of 256 rows; time grows with (n + m)² D.

  Raises:
    ValueError: a set of at most `neighbours` vectors, or widths that differ.
  """
  _check_pair(reference, drawn, neighbours + 1)
  far, far_drawn = (_radii(x, neighbours) for x in (reference, drawn))
  inside, recalled, holds = [], 0, np.zeros(len(reference), bool)
  for rows, distances in _distances(drawn, reference):
    held = distances <= far[None]
    inside.append(held.sum(axis=1))
    holds |= held.any(axis=0)
    # A ball around a picture of this block that holds a vector of the reference: gathered over blocks below.
    recalled = recalled | (distances <= far_drawn[rows, None]).any(axis=0)
  inside = np.concatenate(inside)
  return {"precision": float((inside > 0).mean()), "recall": float(np.mean(recalled)), "density": float(inside.mean() / neighbours),
          "coverage": float(holds.mean())}


def _radii(x: np.ndarray, neighbours: int) -> np.ndarray:
  """[n] squared distances of each vector to its k-th nearest other one."""
  found = np.empty(len(x), np.float32)
  for rows, distances in _distances(x, x):
    distances[np.arange(len(distances)), np.arange(rows.start, rows.start + len(distances))] = np.inf
    found[rows] = np.partition(distances, neighbours - 1, axis=1)[:, neighbours - 1]
  return found


def _distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
  """Rows of the squared distances [n, m] between the vectors of two sets, block by block."""
  squares = [np.einsum("nd,nd->n", one, one, dtype=np.float64).astype(np.float32) for one in (x, y)]
  for rows in _slices(len(x)):
    lengths = squares[0][rows, None] + squares[1][None]
    found = lengths - 2 * (x[rows] @ y.T)
    yield rows, np.where(found < np.float32(_SAME) * lengths, np.float32(0), found)


def diversities(names: Sequence[str], features: np.ndarray) -> dict[str, float]:
  """{name: one minus the mean cosine over pairs of pictures of that name} of the names that have two pictures or more; their mean is the diversity.

  0 where all pictures of a prompt have the same direction. With unit vectors u of s pictures the mean over pairs is (|Σ u|² - s) / (s (s - 1)).

  Args:
    names: n names of prompts.
    features: [n, D].

  Raises:
    ValueError: as many names as vectors are not given, or a vector has length 0.
  """
  check_features(features)
  if len(names) != len(features):
    raise ValueError(f"{len(names)} names were given for {len(features)} vectors: give one for each.")
  rows: dict[str, list[int]] = {}
  for row, name in enumerate(names):
    rows.setdefault(name, []).append(row)
  return {name: 1 - _mean_cosine(features[some]) for name, some in rows.items() if len(some) > 1}


def _mean_cosine(x: np.ndarray) -> float:
  x = x.astype(np.float64)
  lengths = np.linalg.norm(x, axis=1, keepdims=True)
  if not lengths.min() > 0:
    raise ValueError("A vector of length 0 has no direction: the feature network gave a picture only zeros.")
  return float((np.square((x / lengths).sum(axis=0)).sum() - len(x)) / (len(x) * (len(x) - 1)))


def _slices(num: int) -> Iterator[slice]:
  return (slice(start, min(start + _ROWS, num)) for start in range(0, num, _ROWS))


def _check_pair(one: np.ndarray, other: np.ndarray, fewest: int) -> None:
  for features in (one, other):
    check_features(features)
  if one.shape[1] != other.shape[1]:
    raise ValueError(f"Features of {one.shape[1]} and {other.shape[1]} numbers have no distance: they are of different networks.")
  if min(len(one), len(other)) < fewest:
    raise ValueError(f"Sets of {len(one)} and {len(other)} pictures are too small: give at least {fewest} of each.")
