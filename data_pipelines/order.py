"""The order of everything, as a function that can be asked at any point.

Two tools. `permute` shuffles n records without an array of n numbers: a Feistel network is a bijection on 2^bits >= n numbers whatever its round
function, and walking on from an image outside [0, n) until one falls inside makes it a bijection on [0, n) (Black and Rogaway 2002, "Ciphers with
arbitrary finite domains", cycle walking). `Turns` deals turns to any number of streams by their shares, however small these are.
"""

import bisect
import fractions
import functools
import itertools
from collections.abc import Sequence

import numpy as np

_ROUNDS = 6
_BITS = 40  # of the number of turns that can be dealt, and of the precision of a share
_BLOCK = 16  # turns that are shuffled together


def permute(index, num: int, key: tuple[int, ...], epoch=0) -> np.ndarray:
  """Returns the images of `index` (numbers in [0, num)) under the permutation of [0, num) that `key` and `epoch` name, int64.

  `epoch` is a number, or one for each of `index`.
  """
  bits = (num - 1).bit_length()
  index, epoch = np.broadcast_arrays(np.asarray(index, np.uint64), np.asarray(epoch, np.uint64))
  shape, index, epoch = index.shape, index.ravel(), epoch.ravel()
  if len(epoch) and (epoch == epoch[0]).all():
    epoch = epoch[:1]  # they share their constants
  first, *constants = np.random.default_rng(key).integers(0, 2**64, 1 + _ROUNDS, dtype=np.uint64)
  own = _mix(epoch + first)
  rounds = [own + constant for constant in constants]
  image = _feistel(index, bits, rounds)
  outside = np.flatnonzero(image >= num)
  while len(outside):  # fewer than half each time
    image[outside] = _feistel(image[outside], bits, [one[outside] if len(one) > 1 else one for one in rounds])
    outside = outside[image[outside] >= num]
  return image.reshape(shape).astype(np.int64)


def _feistel(value: np.ndarray, bits: int, rounds: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the images of numbers of `bits` bits; their number of rounds is even, so that the halves have their widths again."""
  low = bits // 2
  left, right, widths = value >> np.uint64(low), value & _mask(low), (bits - low, low)
  for constant in rounds:
    left, right, widths = right, left ^ (_mix(right ^ constant) & _mask(widths[0])), widths[::-1]
  return left << np.uint64(low) | right


def _mask(bits: int) -> np.uint64:
  return np.uint64(2**bits - 1)


def _mix(value: np.ndarray) -> np.ndarray:
  """Returns 64 well-mixed bits: the finaliser of splitmix64."""
  with np.errstate(over="ignore"):
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return value ^ value >> np.uint64(31)


class Turns:
  """Deals turns to streams by their shares; turn k is known without those before it.

  Each stream has a part of the numbers below 2^40, as long as its share. Turn k goes to the stream in whose part the number lies that has the bits of
  k in reverse order, some of them flipped as the seed says: van der Corput's sequence (1935) with a digital shift. That sequence nearly has a period,
  and what looks at every second turn could meet the same streams for ever; therefore each sixteen turns are shuffled. Of the first n turns a stream,
  and also several that stand side by side, get their share to within about log2(n) / 3 + 5 turns, be there two streams or a million.
  """

  def __init__(self, weights: Sequence[fractions.Fraction | int], seed: int):
    """Args: the weights of the streams, above 0; seed. One with less than 2^-40 of their sum may have no turn of the 2^40 that there are."""
    total = sum(weights)
    self._ends = [round(end * 2**_BITS / total) for end in itertools.accumulate(map(fractions.Fraction, weights))]
    self._seed, self._flips = seed, int(np.random.default_rng((seed, 1)).integers(0, 2**_BITS))

  def __call__(self, k: int) -> tuple[int, int]:
    """Returns (the stream that has turn k, how many turns it has had before)."""
    if not 0 <= k < 2**_BITS:
      raise ValueError(f"Batch {k} is not one of the first 2^{_BITS}.")
    first = k // _BLOCK * _BLOCK
    *before, stream = _deal(self, first)[:k - first + 1]
    begin, end = self._ends[stream - 1] if stream else 0, self._ends[stream]
    return stream, self._count(first, end) - self._count(first, begin) + before.count(stream)

  def deal(self, first: int) -> list[int]:
    """Returns the streams of the turns that are shuffled together, from `first` on."""
    order = permute(np.arange(_BLOCK), _BLOCK, (self._seed, 4), first // _BLOCK).tolist()
    return [bisect.bisect_right(self._ends, _reverse(first + k) ^ self._flips) for k in order]

  def _count(self, k: int, end: int) -> int:
    """Returns how many of the turns before k have a number below `end`."""
    total = 0
    for j in range(k.bit_length()):
      if k >> j & 1:
        # The turns that have the bits of k above bit j, and bit j not: their numbers have the lowest 40 - j bits in common, and any above.
        rest = (_reverse(k >> j + 1 << j + 1) ^ self._flips) & (1 << _BITS - j) - 1
        total += min(max(0, -(-(end - rest) >> _BITS - j)), 1 << j)
    return total


@functools.lru_cache(maxsize=8)
def _deal(turns: Turns, first: int) -> list[int]:
  return turns.deal(first)


def _reverse(k: int) -> int:
  """Returns the number below 2^40 whose bits are those of k in reverse order."""
  return int(f"{k:0{_BITS}b}"[::-1], 2)


def scatter(values: np.ndarray, key: int) -> np.ndarray:
  """Returns a hash of each of the int64 values, uint64: sorting by it puts them in an order that says nothing of theirs."""
  with np.errstate(over="ignore"):
    return _mix(_mix(np.asarray(values).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) + np.uint64(key))
