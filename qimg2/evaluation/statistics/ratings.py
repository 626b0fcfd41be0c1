"""Ratings of models from votes between two of them, with ties.

The model of Davidson (1970), Bradley and Terry's with ties: of models with strengths theta, and eta the inclination to ties, d = theta_a - theta_b,

  P(a) : P(tie) : P(b) = exp(d / 2) : exp(eta) : exp(-d / 2)                                                               (1)

Without ties it is Bradley and Terry's, and eta drops out. The log-likelihood is concave; Newton's method finds its maximum. With g_c the sum of the
gradients of the votes of cluster c (a prompt, a rater, or a vote by itself), H minus the Hessian and G clusters, the errors are those of the sandwich

  cov = G / (G - 1) H^+ (sum_c g_c g_c') H^+                                                                               (2)

with Student's quantile for G - 1 degrees of freedom: right also where votes of a cluster are alike, or where the model is wrong (Huber 1967; White
1982). H^+ is the pseudo-inverse: only differences of strengths are known, so strengths have mean 0 among models that votes connect, and a rating is

  1000 + 400 / ln 10 theta                                                                                                 (3)

No maximum exists where one can win without end: a model that never loses, or a group that never loses to the others (Ford 1957; with ties, Albert and
Anderson 1984): there is a direction along which no vote gets less likely and one gets likelier. Then each strength gets a normal prior of standard
deviation 3 (521 points) and the note says so: the order means something, the distances do not, and there are no intervals.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, sparse

from qimg2.evaluation.statistics.sums import Estimate, check_confidence, student

POINTS = 400 / math.log(10)
CENTRE = 1000.0
PRIOR = 1 / 3.0**2
MAX_STEPS = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Ratings:
  """Ratings of models on one scale.

  Attributes:
    names: models, in the order given.
    ratings: {name: estimate} in points, equation 3; its n is the number of votes on the model.
    ranks: {name: 1 + number of models of its group whose whole interval is above its own}; None where there are no intervals.
    groups: {name: number of its group}; ratings compare within a group of models that votes connect.
    tie: the estimate of exp(eta), the weight of a tie between equals relative to one of them winning; its value is 0 where nothing is a tie.
    covariance: [K, K] of the ratings, in points squared; None where there are no intervals.
    num_clusters: G of equation 2.
    note: what was special, "" for nothing.
  """
  names: tuple[str, ...]
  ratings: dict[str, Estimate]
  ranks: dict[str, int | None]
  groups: dict[str, int]
  tie: Estimate
  covariance: np.ndarray | None
  num_clusters: int
  note: str

  def difference(self, a: str, b: str) -> Estimate:
    """The rating of a minus that of b, in points; narrower than what their two intervals suggest.

    Raises:
      ValueError: a model that is not there.
    """
    for name in (a, b):
      if name not in self.ratings:
        raise ValueError(f"There is no model {name!r}: it is one of {', '.join(map(str, self.names))}.")
    i, j, method = self.names.index(a), self.names.index(b), self.ratings[a].method
    if self.groups[a] != self.groups[b]:
      return Estimate(None, None, None, self.tie.confidence, method, self.num_clusters, f"no votes connect {a} with {b}")
    value = self.ratings[a].value - self.ratings[b].value
    if self.covariance is None:
      return Estimate(value, None, None, self.tie.confidence, method, self.num_clusters, self.note)
    half = student(self.tie.confidence, self.num_clusters) * math.sqrt(
        max(0.0, self.covariance[i, i] + self.covariance[j, j] - 2 * self.covariance[i, j]))
    return Estimate(value, value - half, value + half, self.tie.confidence, method, self.num_clusters, self.note)


def bradley_terry(first: Sequence[str], second: Sequence[str], outcome, cluster: Sequence | None = None, confidence: float = 0.95) -> Ratings:
  """Ratings of all models that appear in votes, in alphabetical order, and their intervals.

  Args: first, second [votes], names of the models shown; outcome [votes] of 1 where the first won, -1 where the second did, 0 for a tie (also "both
  bad"); cluster [votes], the prompt or rater of each vote, None where all votes are independent; confidence in 0..1.

  Raises:
    ValueError: no votes, arrays of different lengths, another outcome, a model against itself, or confidence not in 0..1.
  """
  check_confidence(confidence)
  names, pairs, outcome = _checked(first, second, outcome)
  cluster = np.arange(len(outcome)) if cluster is None else np.asarray(cluster)
  if cluster.shape != outcome.shape:
    raise ValueError(f"The clusters have shape {cluster.shape}: give one per vote, {len(outcome)} of them.")
  cluster = np.unique(cluster, return_inverse=True)[1]
  has_ties, num_clusters = bool((outcome == 0).any()), int(cluster.max()) + 1
  codes, counts = np.unique((pairs[:, 0] * len(names) + pairs[:, 1]) * 3 + outcome + 1, return_counts=True)
  rows = np.stack([codes // 3 // len(names), codes // 3 % len(names), codes % 3 - 1], 1)
  graph = sparse.coo_matrix((counts, (rows[:, 0], rows[:, 1])), shape=(len(names), len(names)))
  num_groups, groups = sparse.csgraph.connected_components(graph, directed=False)
  why = _separation(rows, names, num_groups, has_ties)
  theta, hessian = _fit(rows, counts, groups, has_ties, PRIOR if why else 0.0)
  covariance, notes = None, [f"{num_groups} groups that no votes connect: ratings compare within a group only"] * (num_groups > 1)
  if not why:
    covariance, why = _sandwich(pairs, outcome, theta, hessian, cluster, len(names))
  votes = np.bincount(pairs.ravel())
  method = "sandwich over " + ("votes" if num_clusters == len(outcome) else "clusters")
  found = [_estimate(CENTRE + POINTS * theta[i], covariance, i, POINTS, confidence, method, num_clusters, int(votes[i]), why)
           for i in range(len(names))]
  tie = Estimate(0.0, None, None, confidence, method, len(outcome), "no ties")
  if has_ties and why and covariance is None:
    tie = dataclasses.replace(tie, value=None, note=why)
  elif has_ties:
    log = _estimate(theta[-1], covariance, len(names), 1.0, confidence, method, num_clusters, len(outcome), why)
    tie = dataclasses.replace(log, **{end: math.exp(getattr(log, end)) for end in ("value", "low", "high")})
  return Ratings(tuple(names.tolist()), dict(zip(names.tolist(), found)), dict(zip(names.tolist(), ranks(found, groups.tolist()))),
                 dict(zip(names.tolist(), groups.tolist())), tie, None if covariance is None else POINTS**2 * covariance[:len(names), :len(names)],
                 num_clusters, "; ".join(notes + [why] * bool(why)))


def _estimate(value: float, covariance: np.ndarray | None, i: int, scale: float, confidence: float, method: str, num_clusters: int, n: int,
              why: str) -> Estimate:
  if covariance is None:
    return Estimate(float(value), None, None, confidence, method, n, why)
  half = student(confidence, num_clusters) * scale * math.sqrt(max(0.0, covariance[i, i]))
  return Estimate(float(value), float(value) - half, float(value) + half, confidence, method, n, why)


def ranks(estimates: Sequence[Estimate], groups: Sequence[int] | None = None) -> list[int | None]:
  """[K] 1 + the number of those of the same group whose whole interval is above one's own, so that several may be first; None for one without."""
  groups = [0] * len(estimates) if groups is None else groups
  above = lambda other, mine: other.low is not None and other.low > mine.high
  return [None if mine.low is None else 1 + sum(group == my_group and above(other, mine) for other, group in zip(estimates, groups))
          for mine, my_group in zip(estimates, groups)]


def _checked(first, second, outcome) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Names [K] sorted, pairs [V, 2] of their numbers, outcomes [V]."""
  first, second, outcome = np.asarray(first), np.asarray(second), np.asarray(outcome)
  if not outcome.size:
    raise ValueError("There are no votes: give at least one.")
  if outcome.ndim != 1 or first.shape != outcome.shape or second.shape != outcome.shape:
    raise ValueError(f"Votes have {first.shape} first models, {second.shape} second ones, {outcome.shape} outcomes: give one of each per vote.")
  if not np.isin(outcome, (-1, 0, 1)).all():
    raise ValueError("An outcome is none of 1 (the first won), 0 (a tie), -1 (the second won).")
  names, index = np.unique(np.concatenate([first, second]), return_inverse=True)
  pairs = index.reshape(2, -1).T
  if (pairs[:, 0] == pairs[:, 1]).any():
    raise ValueError(f"Vote {int(np.argmax(pairs[:, 0] == pairs[:, 1]))} sets {first[np.argmax(pairs[:, 0] == pairs[:, 1])]} against itself.")
  return names, pairs, outcome


def _chances(theta: np.ndarray, pairs: np.ndarray, has_ties: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """P(first), P(tie), P(second) of votes [V] on pairs [V, 2], equation 1."""
  half = (theta[pairs[:, 0]] - theta[pairs[:, 1]]) / 2
  logits = np.stack([half, np.full(len(half), theta[-1] if has_ties else -np.inf), -half])
  chances = np.exp(logits - logits.max(0))
  return tuple(chances / chances.sum(0))


def _fit(rows: np.ndarray, counts: np.ndarray, groups: np.ndarray, has_ties: bool, prior: float) -> tuple[np.ndarray, np.ndarray]:
  """Strengths, then eta where there are ties, that make votes likeliest, and minus the Hessian there, made invertible: it is 1 along a common shift
  of a group. Rows [R, 3] are first, second, outcome, each seen `counts` times."""
  num = len(groups)
  theta, last = np.zeros(num + has_ties), -np.inf
  shift = np.zeros((len(theta), len(theta)))
  shift[:num, :num] = (groups[:, None] == groups) / np.bincount(groups)[groups]
  step = np.zeros_like(theta)
  for _ in range(MAX_STEPS):
    first, tie, second = _chances(theta, rows, has_ties)
    seen = np.choose(1 - rows[:, 2], [first, tie, second])
    height = counts @ np.log(np.maximum(seen, 1e-300)) - prior / 2 * theta @ theta
    if height < last - 1e-9 * abs(last):
      step /= 2  # too far: back by half
      theta = theta - step
      continue
    gradient, hessian = _slopes(rows, counts, first, tie, second, num, has_ties)
    gradient, hessian = gradient - prior * theta, hessian + prior * np.eye(len(theta)) + shift
    step, last = np.linalg.solve(hessian, gradient), height
    if np.abs(step).max() < 1e-8:
      return theta, hessian
    theta = theta + step
  raise RuntimeError("The ratings did not converge: a vote count is too uneven for float64.")


def _slopes(rows, counts, first, tie, second, num: int, has_ties: bool) -> tuple[np.ndarray, np.ndarray]:
  """Gradient and minus the Hessian of the log-likelihood, whose statistics are u = outcome / 2 along theta_a - theta_b, and whether it is a tie."""
  mean, a, b = (first - second) / 2, rows[:, 0], rows[:, 1]
  gradient, hessian = np.zeros(num + has_ties), np.zeros((num + has_ties, num + has_ties))
  pull, curve = counts * (rows[:, 2] / 2 - mean), counts * ((first + second) / 4 - mean**2)
  for i, sign in ((a, 1), (b, -1)):
    np.add.at(gradient, i, sign * pull)
    np.add.at(hessian, (i, i), curve)
  np.add.at(hessian, (a, b), -curve)
  np.add.at(hessian, (b, a), -curve)
  if has_ties:
    gradient[-1], hessian[-1, -1] = counts @ ((rows[:, 2] == 0) - tie), counts @ (tie * (1 - tie))
    np.add.at(hessian, (a, -1), -counts * mean * tie)
    np.add.at(hessian, (b, -1), counts * mean * tie)
    hessian[-1, :-1] = hessian[:-1, -1]
  return gradient, hessian


def _sandwich(pairs, outcome, theta, hessian, cluster, num: int) -> tuple[np.ndarray | None, str]:
  """Equation 2 of the strengths, and of eta where there are ties; else None. What is to be said of it."""
  size, has_ties, num_clusters = len(outcome), len(theta) > num, int(cluster.max()) + 1
  if num_clusters == 1:
    return None, "1 cluster of votes: no intervals"
  first, tie, second = _chances(theta, pairs, has_ties)
  pull = outcome / 2 - (first - second) / 2
  # One row a cluster: the sum of the gradients of its votes.
  parts = [(pull, pairs[:, 0]), (-pull, pairs[:, 1])] + [((outcome == 0) - tie, np.full(size, num))] * has_ties
  values, columns = (np.concatenate(column) for column in zip(*parts))
  gradients = sparse.coo_matrix((values, (np.tile(cluster, len(parts)), columns)), shape=(num_clusters, len(theta))).tocsr()
  inner = num_clusters / (num_clusters - 1) * (gradients.T @ gradients).toarray()
  inverse = np.linalg.inv(hessian)
  covariance = inverse @ inner @ inverse
  if covariance.diagonal().max() < 1e-20:
    return None, f"all {num_clusters} clusters of votes are equal: no intervals"
  return covariance, f"only {num_clusters} clusters for {num} models: intervals may be too short" if num_clusters <= num else ""


def _separation(rows: np.ndarray, names: np.ndarray, num_groups: int, has_ties: bool) -> str:
  """Why the likelihood has no maximum; "" where it has one."""
  if not rows[:, 2].any():
    return "all votes are ties: all ratings are equal, without intervals"
  num = len(names)
  won = rows[rows[:, 2] != 0]
  beat = np.where(won[:, 2:] > 0, won[:, :2], won[:, 1::-1])
  graph = sparse.coo_matrix((np.ones(len(beat)), (beat[:, 0], beat[:, 1])), shape=(num, num))
  # Where wins lead around from each model to each other, no strength can grow without end; without ties, only there (Ford 1957).
  if sparse.csgraph.connected_components(graph, connection="strong")[0] == num_groups or has_ties and not _can_grow(rows, num):
    return ""
  wins, losses = (set(rows[rows[:, 2] == sign, 0]) | set(rows[rows[:, 2] == -sign, 1]) for sign in (1, -1))
  named = ((wins - losses, "lost"), (losses - wins, "won"))
  parts = [f"{', '.join(str(names[i]) for i in sorted(some))} never {what}" for some, what in named if some]
  who = " and ".join(parts) or "some models never lost to the others"
  return f"{who}: ratings held by a prior of {POINTS * PRIOR**-0.5:.0f} points, no intervals"


def _can_grow(rows: np.ndarray, num: int) -> bool:
  """Whether there is a direction of strengths and eta along which no vote gets less likely and one gets likelier; there are ties."""
  # Statistics of the outcomes 1, 0, -1 of each row: what was seen must stay at least as likely as each of the others.
  steps = []
  for a, b, outcome in rows.tolist():
    for other in {1, -1, 0} - {outcome}:
      step = np.zeros(num + 1)
      step[a], step[b], step[-1] = (outcome - other) / 2, (other - outcome) / 2, int(outcome == 0) - int(other == 0)
      steps.append(step)
  steps = np.array(steps)
  found = optimize.linprog(-steps.sum(0), A_ub=sparse.csr_matrix(-steps), b_ub=np.zeros(len(steps)), bounds=(-1, 1), method="highs")
  return bool(-found.fun > 1e-7)
