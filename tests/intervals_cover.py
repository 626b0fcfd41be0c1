"""How often intervals cover the truth: simulated studies whose prompts differ and whose pictures of a prompt are alike.

Each study has a truth of its own, so that the steps of one binomial do not stand for all. One row is one function of an interval on one kind of
scores; `python -m tests.intervals_cover` prints the table of docs/evaluation_statistics.md, in some minutes. The tests run what is cheap of it.
"""

import argparse
import dataclasses
import math
import zlib
from collections.abc import Callable

import numpy as np

from qimg2.evaluation.statistics import Scores, compare, figure, preference
from qimg2.evaluation.statistics.agreement import krippendorff
from qimg2.evaluation.statistics.bootstrap import ends, resampled
from qimg2.evaluation.statistics.intervals import clustered_t, clustered_wilson
from qimg2.evaluation.statistics.ratings import POINTS, bradley_terry
from qimg2.evaluation.statistics.sums import by_prompt

SIZES = (30, 200, 2000)
STRENGTHS = np.array([0.6, 0.1, -0.7])


@dataclasses.dataclass(frozen=True)
class Case:
  """study (n, rng) -> (what was seen, truth); intervals (what was seen) -> (low, high) of each row of the table, None for none."""
  rows: tuple[str, ...]
  study: Callable
  intervals: Callable


def prompts(n, rng, seeds=0):
  """Which prompt each picture is of: `seeds` each, or 1 to 4 each for 0."""
  return np.repeat(np.arange(n), seeds or rng.integers(1, 5, n))


def binary(n, rng, seeds=4, low=0.1, high=0.9):
  """0 or 1, right with a chance between low and high; pictures of a prompt correlate by 1/3."""
  truth, prompt = rng.uniform(low, high), prompts(n, rng, seeds)
  chance = rng.beta(2 * truth, 2 * (1 - truth), n)[prompt]
  return Scores((rng.random(len(prompt)) < chance).astype(float), None, prompt), truth


def words(n, rng):
  """Words right of 2 to 30 that were asked for, of 1 to 4 pictures a prompt."""
  truth, prompt = rng.uniform(0.3, 0.95), prompts(n, rng)
  asked = rng.integers(2, 31, n)[prompt]
  return Scores(rng.binomial(asked, rng.beta(3 * truth, 3 * (1 - truth), n)[prompt]).astype(float), asked, prompt), truth


def decibels(n, rng):
  """Numbers about 30, of 1 to 4 pictures a prompt."""
  prompt = prompts(n, rng)
  return Scores(rng.normal(30, 4, n)[prompt] + rng.normal(0, 2, len(prompt)), None, prompt), 30.0


def pair(seeds):
  """Two runs of 0 or 1 that give the same picture with chance 0.6."""
  def study(n, rng):
    a, truth = binary(n, rng, seeds)
    other, same = rng.uniform(0.2, 0.8), rng.random(len(a.prompt)) < 0.6
    return (a, a._replace(numerator=np.where(same, a.numerator, rng.random(len(a.prompt)) < other))), 0.4 * (truth - other)
  return study


def wins(n, rng):
  """Three votes on each prompt by different raters, who agree about the prompt."""
  chances = rng.dirichlet([2, 1, 1.5], n)
  votes = 1 - (rng.random((n, 3, 1)) > chances.cumsum(1)[:, None]).sum(2)
  return (votes.ravel(), np.repeat(np.arange(n), 3)), 2 / 4.5 - 1.5 / 4.5


def votes(clustered):
  """Votes with ties among three models, three a prompt; what a prompt suits moves two of the votes together where clustered."""
  def study(n, rng):
    first = np.tile([0, 1, 2], n)
    second, prompt = (first + 1) % 3, np.repeat(np.arange(n), 3)
    d = (STRENGTHS[first] - STRENGTHS[second]) / 2
    logits = np.exp(np.stack([d, np.full(3 * n, -0.4), -d], 1))
    draw = rng.random(3 * n)
    if clustered:
      draw = np.where(rng.random(3 * n) < 0.5, draw[3 * prompt], draw)
    outcome = 1 - (draw[:, None] > (logits / logits.sum(1, keepdims=True)).cumsum(1)).sum(1)
    return (first, second, outcome, prompt if clustered else None), POINTS * (STRENGTHS[0] - STRENGTHS[1])
  return study


def raters(nominal):
  """Three raters, of whom the first leaves 30 % out, and who agree by what is drawn."""
  def study(n, rng):
    if nominal:
      spread, mean = rng.uniform(1, 6), rng.uniform(0.2, 0.8)
      seen, truth = (rng.random((3, n)) < rng.beta(spread * mean, spread * (1 - mean), n)).astype(float), 1 / (1 + spread)
    else:
      truth = rng.uniform(0.2, 0.9)
      seen = math.sqrt(truth) * rng.normal(size=n) + math.sqrt(1 - truth) * rng.normal(size=(3, n))
    seen[0, rng.random(n) < 0.3] = np.nan
    return seen, truth
  return study


def of(function):
  """The intervals of a function that gives one estimate."""
  def intervals(seen):
    found = function(seen)
    return [(found.low, found.high)]
  return intervals


def seeded(n, rng):
  """0 or 1, and a seed for resamples."""
  scores, truth = binary(n, rng)
  return (scores, int(rng.integers(2**31))), truth


def bootstraps(seen):
  """Percentile and BCa from the same resamples, fewer where they cost most, as `bootstrap` makes them."""
  scores, seed = seen
  sums = by_prompt(scores)
  num = {30: 1000, 200: 500}.get(len(sums.prompt), 200)
  values = resampled(sums, num, seed)
  return [ends(sums, values, method) for method in ("percentile", "bca")]


near_one = lambda n, rng: binary(n, rng, low=0.97, high=0.97)
CASES = {
    "wilson": Case(("Wilson, 0 or 1",), lambda n, rng: binary(n, rng, seeds=1), of(lambda seen: figure(*seen))),
    "wilson_prompts": Case(("Wilson over prompts, 0 or 1, 4 seeds",), binary, of(clustered_wilson)),
    "wilson_words": Case(("Wilson over prompts, words, 1 to 4 seeds",), words, of(lambda seen: figure(*seen))),
    "t": Case(("t over prompts, 0 or 1, 4 seeds",), binary, of(clustered_t)),
    "t_decibels": Case(("t over prompts, decibels, 1 to 4 seeds",), decibels, of(lambda seen: figure(*seen))),
    "bootstraps": Case(("percentile bootstrap, 0 or 1, 4 seeds", "BCa bootstrap, the same"), seeded, bootstraps),
    "pairs": Case(("difference, Agresti-Min, 0 or 1",), pair(1), of(lambda runs: compare(*runs, num_permutations=1))),
    "pairs_t": Case(("difference, t over prompts, 0 or 1, 1 to 4 seeds",), pair(0), of(lambda runs: compare(*runs, num_permutations=1))),
    "wins": Case(("net win rate, 3 votes a prompt",), wins, of(lambda seen: preference(*seen, num_permutations=1))),
    "ratings": Case(("difference of ratings, independent votes",), votes(False), of(lambda seen: bradley_terry(*seen).difference(0, 1))),
    "ratings_prompts": Case(("difference of ratings, votes in prompts",), votes(True), of(lambda seen: bradley_terry(*seen).difference(0, 1))),
    "alpha": Case(("nominal alpha, units",), raters(True), of(krippendorff)),
    "alpha_interval": Case(("interval alpha, units",), raters(False), of(lambda seen: krippendorff(seen, "interval"))),
    "near_one": Case(("Wilson over prompts, 97 % right", "t over prompts, the same"), near_one,
                     lambda scores: of(clustered_wilson)(scores) + of(clustered_t)(scores)),
}


def covered(name: str, n: int, studies: int = 1000) -> dict[str, float]:
  """{row: share of studies of n prompts (votes, units) whose interval has the truth in it}; one without an interval has not."""
  case, rng = CASES[name], np.random.default_rng([zlib.crc32(name.encode()), n])
  counts = np.zeros(len(case.rows))
  for _ in range(studies):
    seen, truth = case.study(n, rng)
    counts += [low is not None and low <= truth <= high for low, high in case.intervals(seen)]
  return dict(zip(case.rows, (counts / studies).tolist()))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--studies", type=int, default=1000)
  parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
  args = parser.parse_args()
  print(f"| interval | {' | '.join(f'n = {n}' for n in SIZES)} |\n|---|{'---|' * len(SIZES)}")
  for name in args.cases:
    found = [covered(name, n, args.studies) for n in SIZES]
    for row in CASES[name].rows:
      print(f"| {row} | {' | '.join(f'{one[row]:.1%}'.replace('%', ' %') for one in found)} |", flush=True)


if __name__ == "__main__":
  main()
