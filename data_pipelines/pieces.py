"""A column of any length is looked at in pieces, so that what is held beside it does not grow with it."""

from collections.abc import Iterator

PIECE = 2**20  # records that are looked at together


def pieces(num: int) -> Iterator[slice]:
  """Yields the pieces of a column of `num` rows."""
  return (slice(first, min(first + PIECE, num)) for first in range(0, num, PIECE))
