"""Counting by the million: a column of any length is looked at in pieces, so that what is held beside it does not grow with it."""

from collections.abc import Iterator

import numpy as np

PIECE = 2**20  # records that are looked at together
_MOST_CODES = 2**24  # that are counted in a table


def pieces(num: int) -> Iterator[slice]:
  """Yields the pieces of a column of `num` rows."""
  return (slice(first, min(first + PIECE, num)) for first in range(0, num, PIECE))


class Tally:
  """How often each of the numbers in [0, num) comes, counted piece by piece."""

  def __init__(self, num: int):
    self._table = np.zeros(num, np.int64) if num <= _MOST_CODES else None
    self._codes, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    self._place: np.ndarray | None = None

  def add(self, codes: np.ndarray) -> None:
    """Counts some more."""
    if self._table is not None:
      self._table += np.bincount(codes, minlength=len(self._table))
      return
    here, counts = np.unique(codes, return_counts=True)
    self._codes, place = np.unique(np.concatenate([self._codes, here]), return_inverse=True)
    self._counts = np.bincount(place, np.concatenate([self._counts, counts]), minlength=len(self._codes)).astype(np.int64)

  def result(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the numbers that came, ascending; how often each did)."""
    if self._table is None:
      return self._codes, self._counts
    codes = np.flatnonzero(self._table)
    return codes, self._table[codes]

  def place(self, codes: np.ndarray) -> np.ndarray:
    """Returns where these numbers, all of which came, are in `result`."""
    if self._table is None:
      return np.searchsorted(self._codes, codes)
    if self._place is None:
      self._place = np.cumsum(self._table > 0) - 1
    return self._place[codes]
