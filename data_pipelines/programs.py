"""Which batch shapes a stage compiles, when its records have more shapes than it may have programs.

A record's own shape is the target size and the sizes of condition images nearest to its pictures, and the smallest prompt class that holds its
longest caption. Its batch may have another one at a price: a longer class is padding; another target size cuts more off, at most `max_crop`; another
size of a condition image shows less of it, or leaves more of the paper around it blank. `Chooser` starts with every shape that occurs, and takes
away, again and again, the one whose records lose least by moving to the next best, until no more than `max_programs` are left (the drop heuristic
for facility location, Feldman, Lehrer and Ray 1966). It looks at counts of shapes alone, whatever the number of records.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)  # of leaving a data set out, where 1 is all pictures of the stage lost in padding
_MOST_SHAPES = 4096  # of one group that are moved about; rarer ones count as the simplest of their target and prompt class
_MOST_CANDIDATES = 256  # of the most frequent shapes of a group that may become programs, beside the simplest ones
_MOST_COST = 0.2  # at which a cell too small for a batch joins another
_HARDLY_ANY = 64  # records; a cell that has neither so many nor a batch joins another, be that too small itself, at up to
_MOST_COST_OF_FEW = 0.3
_DIGITS = 9  # mirrored aspect ratios are true ties: they are broken alike on machines whose logarithms differ in the last bit


@dataclasses.dataclass(frozen=True)
class Family:
  """What shapes of one task and resolution are made of.

  Attributes:
    targets, sources: sizes (height, width), px, of a target and of a condition image.
    prompts: prompt classes, tokens, ascending.
    reach: for each target, how far the logarithms of width to height of its pictures go below and above its own, all but a few of them.
    rigid: whether the records hold latents, which cannot be cut.
  """
  targets: tuple[tuple[int, int], ...]
  sources: tuple[tuple[int, int], ...]
  prompts: tuple[int, ...]
  reach: tuple[tuple[float, float], ...]
  rigid: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
  """The shapes of a family with one number k of condition images.

  Attributes:
    family: theirs.
    shapes: [N, 1 + k + 1], the place of the target, of each condition image and of the prompt class in the family's lists; each row once.
    weights: [N], the share of the rows of the stage's batches that each has.
    members: [N, D], the share of the records of each of D data sets that each has, a record at several resolutions being several.
  """
  family: Family
  shapes: np.ndarray
  weights: np.ndarray
  members: np.ndarray


def costs(family: Family, shapes: np.ndarray, programs: np.ndarray, max_crop: float | None) -> np.ndarray:
  """Returns what moving a record of each shape to each program costs, [N, F]: the share of tokens that becomes padding, and of its pictures that is
  cut off or blank; infinite where it may not be. `max_crop` None lets every target be cut, to be looked at record by record."""
  ratios = lambda sizes: np.log([width / height for height, width in sizes])
  away = lambda ratio, column: ratio[programs[:, column]][None] - ratio[shapes[:, column]][:, None]
  moved = lambda ratio, column: 1 - np.exp(-np.abs(away(ratio, column)))
  targets, num_sources = ratios(family.targets), shapes.shape[1] - 2
  cost, never = moved(targets, 0), shapes[:, -1][:, None] > programs[:, -1][None]
  if family.rigid:
    never |= (shapes[:, None, :-1] != programs[None, :, :-1]).any(axis=-1)
  elif max_crop is not None:
    distance, reach = away(targets, 0), np.array(family.reach)[shapes[:, 0]]
    farthest = np.abs(distance) + np.where(distance > 0, reach[:, :1], reach[:, 1:])  # of pictures on the other side
    never |= (distance != 0) & (np.round(1 - np.exp(-farthest), _DIGITS) > max_crop)
  for slot in range(num_sources):
    cost += moved(ratios(family.sources), 1 + slot) / num_sources
  return np.where(never, np.inf, np.round(cost + np.maximum(0.0, padding(family, shapes[:, None], programs[None])), _DIGITS))


def padding(family: Family, shapes: np.ndarray, programs: np.ndarray) -> np.ndarray:
  """Returns the share of the tokens of each of `programs` [..., 1 + k + 1] that is padding for a record of the shape beside it, because its prompt
  class is a longer one. A row has about one token for each 16 px square, one more for each 32 px square of a condition image, and its prompt's."""
  squares = lambda sizes: np.array([height * width / 1024 for height, width in sizes])
  prompts = np.array(family.prompts)
  tokens = 4 * squares(family.targets)[programs[..., 0]] + prompts[programs[..., -1]]
  for column in range(1, programs.shape[-1] - 1):
    tokens = tokens + 5 * squares(family.sources)[programs[..., column]]
  return (prompts[programs[..., -1]] - prompts[shapes[..., -1]]) / tokens


class Chooser:
  """Chooses the programs of a stage: call it with penalties, and again with higher ones where too much is left out."""

  def __init__(self, groups: Sequence[Group], max_programs: int, max_crop: float):
    """Args: groups; most programs of all of them; largest share of a target that may be cut off."""
    self.num_shapes, self._groups, self._max_programs = sum(len(group.shapes) for group in groups), groups, max_programs
    self._parts = [_Part(group, max_crop) for group in groups] if self.num_shapes > max_programs else []

  def __call__(self, penalties: np.ndarray) -> list[np.ndarray]:
    """Returns the programs of each group, [F, 1 + k + 1] as `Group.shapes`, where leaving all records of data set d out costs penalties[d]."""
    if not self._parts:
      return [group.shapes for group in self._groups]
    for part in self._parts:
      part.open(penalties)
    left = sum(part.num_open for part in self._parts)
    while left > self._max_programs:
      part = min(self._parts, key=lambda part: part.cheapest)
      left -= part.drop(max(1, min(part.num_open // 20, left - 4 * self._max_programs)))
    return [part.programs for part in self._parts]


class _Part:
  """The programs of one group while they are chosen."""

  def __init__(self, group: Group, max_crop: float):
    self.group, (shapes, self._weights, self._members) = group, _without_tail(group)
    frequent = shapes[np.argsort(-self._weights, kind="stable")[:None if group.family.rigid else _MOST_CANDIDATES]]
    self._candidates = np.unique(np.concatenate([frequent, *_simplest(group)]), axis=0)
    self._costs = costs(group.family, shapes, self._candidates, max_crop)

  def open(self, penalties: np.ndarray) -> None:
    """Begins with all candidates."""
    self._open, self._out = np.arange(len(self._candidates)), self._members @ penalties
    self._all = np.minimum(self._costs * self._weights[:, None], self._out[:, None])
    self._weigh()

  @property
  def num_open(self) -> int:
    return len(self._open)

  @property
  def programs(self) -> np.ndarray:
    return self._candidates[self._open]

  def drop(self, num: int) -> int:
    """Closes the `num` programs that are missed least; returns how many."""
    self._open = np.delete(self._open, np.argsort(self._losses, kind="stable")[:num])
    self._weigh()
    return num

  def _weigh(self) -> None:
    """Finds what closing each program would cost."""
    here, rows = self._all[:, self._open], np.arange(len(self._weights))
    if len(self._open) > 1:
      first = here.argmin(axis=1)
      least = here[rows, first]
      here[rows, first] = np.inf
      losses = np.bincount(first, np.minimum(here.min(axis=1), self._out) - least, minlength=len(self._open))
    else:
      losses = (self._out[:, None] - here).sum(axis=0)
    self._losses = np.round(losses, _DIGITS + 3)
    self.cheapest = self._losses.min(initial=np.inf)


def _without_tail(group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (shapes, weights, members) of a group. Of very many the rarer ones are added to the simplest of their target and prompt class, so that
  none of these is forgotten."""
  if len(group.shapes) <= _MOST_SHAPES or group.family.rigid:
    return group.shapes, group.weights, group.members
  tail = np.argsort(-group.weights, kind="stable")[_MOST_SHAPES:]
  shapes = group.shapes.copy()
  shapes[tail, 1:-1] = _like_target(group.family)[shapes[tail, 0]][:, None]
  shapes, place = np.unique(shapes, axis=0, return_inverse=True)
  add = lambda values: np.bincount(place.ravel(), values, minlength=len(shapes))
  return shapes, add(group.weights), np.stack([add(column) for column in group.members.T], axis=1)


def _like_target(family: Family) -> np.ndarray:
  """Returns for each target the place of the size of a condition image nearest to its ratio."""
  ratio = lambda sizes: np.log([width / height for height, width in sizes])
  return np.round(np.abs(ratio(family.targets)[:, None] - ratio(family.sources)), _DIGITS).argmin(axis=1)


def _simplest(group: Group) -> list[np.ndarray]:
  """Returns shapes that hold much, occur they or not: each target and prompt class, with condition images that are all square or all like it."""
  family, num_sources = group.family, group.shapes.shape[1] - 2
  if family.rigid:
    return []
  found = []
  for target in range(len(family.targets)):
    square = int(np.argmin([round(abs(np.log(width / height)), _DIGITS) for height, width in family.sources])) if num_sources else 0
    for source in {square, int(_like_target(family)[target])} if num_sources else {0}:
      found += [(target, *[source] * num_sources, prompt) for prompt in range(len(family.prompts))]
  return [np.array(found)]


def assign(family: Family, shapes: np.ndarray, counts: np.ndarray, programs: np.ndarray, max_crop: float, enough: int, required: int) -> np.ndarray:
  """Returns the place in `programs` that each of a data set's shapes goes to, [N], -1 for none.

  Args:
    family, shapes [N, 1 + k + 1], programs [F, 1 + k + 1]: as for `costs`.
    counts: [N], how many records each shape has.
    max_crop: largest share of a target that may be cut off.
    enough: a program with fewer of these records than a batch has rows would repeat them: it is left to others where that costs little and these
      have enough then, or where it has hardly any.
    required: fewest records for which a program is worth using; fewer go elsewhere, and what fits nowhere is left out.
  """
  cost = costs(family, shapes, programs, max_crop)
  used, kept = np.ones(len(programs), bool), np.zeros(len(programs), bool)
  while True:
    home = _homes(cost, used)
    num = _fill(home, counts, len(programs))
    used &= num > 0
    small = [int(one) for one in np.argsort(num, kind="stable") if used[one] and not kept[one] and num[one] < max(enough, required)]
    if not small:
      return home
    gone = next((one for one in small if _may_go(cost, home, counts, used, one, enough, required)), None)
    if gone is None and num[small[0]] < required:
      gone = _pulled(cost, home, counts, used, small[0])  # nowhere else to go: others come to it, or it is left out
    if gone is None:
      kept[small] = True
    else:
      used[gone] = False


def _homes(cost: np.ndarray, used: np.ndarray) -> np.ndarray:
  """Returns the cheapest of the used programs for each shape, -1 where there is none."""
  if not used.any():
    return np.full(len(cost), -1)
  here = cost[:, used]
  return np.where(np.isfinite(here).any(axis=1), np.flatnonzero(used)[here.argmin(axis=1)], -1)


def _fill(home: np.ndarray, counts: np.ndarray, num_programs: int) -> np.ndarray:
  return np.bincount(home[home >= 0], counts[home >= 0], minlength=num_programs)


def _may_go(cost: np.ndarray, home: np.ndarray, counts: np.ndarray, used: np.ndarray, one: int, enough: int, required: int) -> bool:
  """Returns whether all shapes of a small program have another one, at a price that is worth it."""
  others = used.copy()
  others[one] = False
  moved, there = home == one, _homes(cost, others)
  to, num = there[moved], int(counts[moved].sum())
  if (to < 0).any():
    return False
  price = np.average(cost[moved, to], weights=counts[moved])
  if num < max(required, min(enough, _HARDLY_ANY)):
    return num < required or price <= _MOST_COST_OF_FEW
  return bool((_fill(there, counts, len(used))[to] >= enough).all()) and price <= _MOST_COST


def _pulled(cost: np.ndarray, home: np.ndarray, counts: np.ndarray, used: np.ndarray, one: int) -> int:
  """Returns the program whose shapes all fit into `one`, at the least price; `one` itself if there is none."""
  prices = {int(other): np.average(cost[home == other, one], weights=counts[home == other])
            for other in np.flatnonzero(used) if other != one and np.isfinite(cost[home == other, one]).all()}
  return min(prices, key=prices.get) if prices else one
