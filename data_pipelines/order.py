"""The order of everything, as a function that can be asked at any point.

Two tools. `permute` shuffles n records without an array of n numbers: a Feistel network is a bijection on 2^bits >= n
numbers whatever its round function, and walking on from an image outside [0, n) until one falls inside makes it a
bijection on [0, n) (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking). `Schedule` deals
turns to several streams: every cycle gives each stream exactly its share, in an order drawn anew for each cycle.
"""

import dataclasses
import fractions
import functools
import math

import numpy as np

_ROUNDS = 6
_MAX_CYCLE = 4096


def permute(index, num: int, key: tuple[int, ...]) -> np.ndarray:
  """Returns the images of `index` (numbers in [0, num)) under the permutation of [0, num) that `key` names, int64."""
  half = max(1, math.ceil((num - 1).bit_length() / 2))
  rounds = np.random.default_rng(key).integers(0, 2**63, _ROUNDS, dtype=np.uint64)
  image = _feistel(np.asarray(index, np.uint64), half, rounds)
  outside = image >= num
  while outside.any():
    image = np.where(outside, _feistel(image, half, rounds), image)
    outside = image >= num
  return image.astype(np.int64)


def _feistel(value: np.ndarray, half: int, rounds: np.ndarray) -> np.ndarray:
  mask, shift = np.uint64(2**half - 1), np.uint64(half)
  left, right = value >> shift, value & mask
  for constant in rounds:
    left, right = right, left ^ (_mix(right ^ constant) & mask)
  return left << shift | right


def _mix(value: np.ndarray) -> np.ndarray:
  """Returns 64 well-mixed bits: the finaliser of splitmix64."""
  with np.errstate(over="ignore"):
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return value ^ value >> np.uint64(31)


def apportion(weights: tuple[fractions.Fraction, ...], max_cycle: int = _MAX_CYCLE) -> tuple[int, ...]:
  """Returns how many turns of a cycle each weight gets.

  Exact where a cycle of at most `max_cycle` turns can be; else by largest remainders over `max_cycle` turns, off by
  less than one turn. No positive weight gets fewer than one turn.
  """
  total = sum(weights)
  shares = [fractions.Fraction(weight) / total for weight in weights]
  cycle = math.lcm(*(share.denominator for share in shares))
  if cycle <= max_cycle:
    return tuple(int(share * cycle) for share in shares)
  turns = [int(share * max_cycle) for share in shares]
  by_remainder = sorted(range(len(shares)), key=lambda i: (turns[i] - shares[i] * max_cycle, i))
  for i in by_remainder[:max_cycle - sum(turns)]:
    turns[i] += 1
  return tuple(max(1, count) for count in turns)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Weighted round-robin: each cycle gives `turns[i]` turns to stream i, in an order that the seed shuffles per cycle."""

  turns: tuple[int, ...]
  seed: int

  def __call__(self, k: int) -> tuple[int, int]:
    """Returns (the stream that has turn k, how many turns it has had before). O(1) in k."""
    cycle, place = divmod(k, sum(self.turns))
    streams, visits = _deal(self.turns, self.seed, cycle)
    stream = int(streams[place])
    return stream, cycle * self.turns[stream] + int(visits[place])


@functools.lru_cache(maxsize=8)
def _deal(turns: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (stream of each turn of a cycle, its number of earlier turns in that cycle)."""
  streams = np.repeat(np.arange(len(turns)), turns)
  np.random.default_rng((seed, 1, cycle)).shuffle(streams)
  visits = np.empty_like(streams)
  for stream, count in enumerate(turns):
    visits[streams == stream] = np.arange(count)
  return streams, visits
