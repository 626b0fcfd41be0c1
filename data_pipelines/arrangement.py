"""Which records are in which bucket of a mixture, worked out from the indices of its data sets; see `data_pipelines.mixture`.

What is found depends on neither seed nor process, and takes the longer the more records there are: `data_pipelines.kept` keeps it for the next start.
"""

import dataclasses
import fractions
import functools
import hashlib
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from data_pipelines.buckets import Bucket
from data_pipelines.cache import Cache
from data_pipelines.columns import LARGE, scratch
from data_pipelines.kept import New, keep
from data_pipelines.kinds import Kinds
from data_pipelines.pieces import pieces
from data_pipelines.programs import PENALTIES, Chooser, Family, Group
from data_pipelines.records import KINDS
from data_pipelines.sorting import REASONS, Count, Merging, Placed, Sorted, exact, merging
from data_pipelines.specs import DatasetSpec, Resolution, source_grids
from data_pipelines.tokenizer import PromptTokenizer

MOST_NAMED = 1000  # records of a data set that are left out; all are counted
MOST_LEFT_OUT = 0.01  # of the records of a data set, for want of programs


class Found(NamedTuple):
  """A data set: its records by position and their index, see `data_pipelines.records.open_split`; if it holds latents, its `Cache` and the shapes of
  the buckets that it was made for; and a text that names its content, "" for one of which nothing is kept."""
  records: Sequence[dict] | None
  index: Mapping[str, np.ndarray]
  cache: Cache | None = None
  shapes: Sequence = ()
  identity: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
  """One data set in one bucket: `records` are positions in the split, ascending, and `checksum` is their CRC-32."""
  bucket: int
  dataset: int
  resolution: int
  weight: fractions.Fraction
  records: np.ndarray
  checksum: int


@dataclasses.dataclass(frozen=True)
class Arrangement:
  """Which records are in which bucket; the attributes of `data_pipelines.mixture.Mixture` of these names."""
  buckets: tuple[Bucket, ...]
  cells: tuple[Cell, ...]
  counts: tuple[Count, ...]
  merging: Merging
  programs: Mapping[tuple, np.ndarray]
  used: tuple[Mapping[tuple, np.ndarray], ...]
  shapes: tuple[tuple, ...]
  usage: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What decides an arrangement beside the indices; see `data_pipelines.mixture.Mixture`, `classes` are all prompt lengths, ascending."""
  datasets: tuple[DatasetSpec, ...]
  resolutions: tuple[Resolution, ...]
  classes: tuple[int, ...]
  tokenizer: PromptTokenizer
  max_crop: float
  min_bucket_records: int
  max_programs: int
  programs: Mapping[tuple, np.ndarray] | None
  every: bool
  alpha: bool
  truncate: bool
  captions: bool = True
  pairs: bool = False

  @property
  def weighted(self) -> bool:
    """Whether the loss of some data set has a weight."""
    return any(spec.loss_weight != 1 for spec in self.datasets)

  def key(self, identities: Sequence[str]) -> str:
    """Returns hexadecimal digits that name the arrangement of data sets with these identities, and this version of the code."""
    given = None if self.programs is None else sorted((repr(key), some.tolist()) for key, some in self.programs.items())
    specs = [dataclasses.replace(spec, data_dir="") for spec in self.datasets]  # wherever it is, its identity says what it holds
    return _digest(_code(), identities, specs, self.resolutions, self.classes, self.tokenizer.fingerprint, self.max_crop, self.min_bucket_records,
                   self.max_programs, given, self.every, self.alpha, self.truncate, self.captions, self.pairs)


def _digest(*parts: Any) -> str:
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
  """Returns hexadecimal digits of the source text of this package: another version may sort otherwise."""
  texts = [path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.glob("*.py"))]
  return hashlib.sha256(b"".join(texts)).hexdigest()


def arrange(wanted: Wanted, found: Sequence[Found], folder: str) -> Arrangement:
  """Returns which records are in which bucket.

  Args: what is wanted; the data sets; the folder in which large arrangements are kept, "" for nowhere.

  Raises:
    ValueError: a data set of which nothing is left, or too little.
    OSError: the folder cannot be written.
  """
  num_bytes = sum(len(one.index["height"]) for one in found) * np.dtype(np.uint32).itemsize
  identities = [one.identity for one in found]
  facts, columns = _kept(folder, num_bytes, identities, wanted.key(identities), _Arranger(wanted, found).arrange)
  return _unpacked(facts, columns["records"])


def sample_ids(found: Found, folder: str) -> np.ndarray:
  """Returns a column that is near of the sample_id of each record: they will be read one by one from anywhere, and the index may be on a mounted
  bucket. `folder` as in `arrange`."""
  column = found.index["sample_id"]

  def copy(new: New) -> None:
    near = new("sample_id", len(column), column.dtype)
    for piece in pieces(len(column)):
      near[piece] = column[piece]

  return _kept(folder, column.nbytes, [found.identity], _digest("sample_id", found.identity), copy)[1]["sample_id"]


def _kept(folder: str, num_bytes: int, identities: Sequence[str], key: str, make: Callable[[New], Any]) -> tuple[Any, dict[str, np.ndarray]]:
  """`keep`, where there is a folder and what to keep is large and can be named; otherwise the same made for this process alone."""
  if folder and num_bytes >= LARGE and all(identities):
    return keep(folder, key, make)
  columns = {}

  def new(name: str, num: int, dtype: Any) -> np.ndarray:
    columns[name] = scratch(num, dtype)
    return columns[name]

  return make(new), columns


class _Arranger:
  """Sorts the records of some data sets into buckets."""

  def __init__(self, wanted: Wanted, found: Sequence[Found]):
    self._wanted, self._found = wanted, found

  def arrange(self, new: New) -> dict:
    """Returns what an `Arrangement` is made of, in lists and tuples; fills the column of the positions of the records of all cells, one after the
    other."""
    sorts = [self._sorts(spec, found) for spec, found in zip(self._wanted.datasets, self._found)]
    given = self._wanted.programs
    chosen = self._choose(sorts) if given is None else given
    placed = self._place(sorts, chosen, self._wanted.min_bucket_records, stored=given is None)
    records = new("records", sum(one.kept for own in placed for one in own), np.uint32)
    buckets, cells, first = {}, [], 0
    for d, (spec, parts, own) in enumerate(zip(self._wanted.datasets, sorts, placed)):
      if not any(one.kept for one in own):
        self._nothing_left(spec, _usage(parts, own), given is not None)
      total = sum(sum(one.weights) for one in own)
      for r, (part, one) in enumerate(zip(parts, own)):
        for (target, source_sizes, prompt), (positions, weight) in part.cells(one, records[first:first + one.kept]).items():
          bucket = self._bucket(part.targets[target], source_sizes, self._wanted.classes[prompt])
          bucket = dataclasses.replace(bucket, cache=part.cache, alpha=self._wanted.alpha, pairs=self._wanted.pairs, weighted=self._wanted.weighted)
          begin = first + positions.start
          cells.append((buckets.setdefault(bucket, len(buckets)), d, r, weight / total * exact(spec.weight), begin, begin + len(positions),
                        zlib.crc32(records[begin:begin + len(positions)])))
        first += one.kept
    sizes = list(buckets)
    repeated = (-(-sizes[bucket].batch_size // (end - begin)) for bucket, _, _, _, begin, end, _ in cells)
    return {"buckets": tuple(sizes), "cells": cells, "counts": tuple(count for own in placed for one in own for count in one.counts),
            "merging": merging([one for own in placed for one in own], len(sizes), max(repeated, default=1)),
            "programs": _plain(_used(sorts, placed)), "used": [_plain(_used([parts], [own])) for parts, own in zip(sorts, placed)],
            "shapes": tuple(tuple(part.shape(row) for part, one in zip(parts, own) for some in one.used.values() for row in some.tolist())
                            for parts, own in zip(sorts, placed)),
            "usage": tuple(_usage(parts, own) for parts, own in zip(sorts, placed))}

  def _sorts(self, spec: DatasetSpec, found: Found) -> list[Sorted]:
    """Returns the records of a data set at each resolution."""
    looks = self._unusable(spec, found.index)
    if self._wanted.every:  # those that the spec refuses go by their pictures alone
      looks = ((piece, np.zeros_like(reason), np.where(reason > 0, np.uint8(0), prompt)) for piece, reason, prompt in looks)
      spec = dataclasses.replace(spec, max_enlarge=0.0)
    kinds = Kinds(spec, self._wanted.resolutions, found.index, self._wanted.max_crop, looks)
    return [Sorted(spec, resolution, r, kinds, found.cache, found.shapes, self._wanted.classes, "base_px" in found.index)
            for r, resolution in enumerate(self._wanted.resolutions)]

  def _nothing_left(self, spec: DatasetSpec, usage: Mapping[str, Any], may_be: bool) -> None:
    sentence = (f"No record of {spec.name!r} ({spec.split}) is left by task={spec.task}, min_quality={spec.min_quality}, "
                f"min_stage={spec.min_stage}, max_enlarge={spec.max_enlarge}, languages={spec.languages}, "
                f"caption_weights={dict(spec.caption_weights)}, num_tokens={self._wanted.classes[-1]}, max_crop={self._wanted.max_crop}, "
                f"min_bucket_records={self._wanted.min_bucket_records} and max_programs={self._wanted.max_programs}")
    if usage["records"]:
      sentence += f" (of {usage['records']}: {', '.join(f'{number} {reason}' for reason, number in usage['left_out'].items())})"
    if not may_be:
      raise ValueError(f"{sentence}: loosen one or add ratios.")
    logging.warning("%s and the buckets of the training data: it is not looked at.", sentence)

  def _place(self, sorts: Sequence[Sequence[Sorted]], chosen: Mapping[tuple, np.ndarray], min_records: int,
             stored: bool = True) -> list[list[Placed]]:
    """Returns where the records of each data set are at each resolution, given the programs of each group, and with `stored` those that latents were
    cached for."""
    def place(one: Sorted, r: int) -> Placed:
      here = {key[3]: some for key, some in chosen.items() if key[:3] == (one.spec.task, r, one.cache)} | (one.stored if stored else {})
      return one.place(here, self._wanted.max_crop, one.resolution.batch_size if self._wanted.max_programs and not one.stored else 0, min_records)
    return [[place(one, r) for r, one in enumerate(parts)] for parts in sorts]

  def _choose(self, sorts: Sequence[Sequence[Sorted]]) -> dict[tuple, np.ndarray]:
    """Returns the programs of each group of shapes, as few as there may be.

    Raises:
      ValueError: so few leave out too many records.
    """
    keys, groups = _groups(sorts)
    stored = len({(one.spec.task, r, one.cache, *shape) for parts in sorts for r, one in enumerate(parts) for some in one.stored.values()
                  for shape in some.tolist()})
    if self._wanted.max_programs and stored and stored + bool(groups) > self._wanted.max_programs:
      raise ValueError(f"The latent caches of the mixture are made for {stored} buckets, and max_programs={self._wanted.max_programs}"
                       + (" leaves too few for the other data sets" if groups else "") + ": raise it, or cache for a stage with fewer.")
    most = self._wanted.max_programs - stored if self._wanted.max_programs else sum(len(group.shapes) for group in groups)
    chooser, level = Chooser(groups, most, self._wanted.max_crop), np.zeros(len(sorts), int)
    while level.max() < len(PENALTIES):
      chosen = dict(zip(keys, chooser(np.array(PENALTIES)[level])))
      if not self._wanted.max_programs and not stored:
        return chosen
      lost, usable = np.array([_lost(parts, own) for parts, own in zip(sorts, self._place(sorts, chosen, 0))]).T
      over = lost > np.maximum(1, MOST_LEFT_OUT * usable)
      if not over.any():
        return chosen
      level += over
    worst = int((lost / np.maximum(1, usable) * over).argmax())
    spec, budget = self._wanted.datasets[worst], f"With max_programs={self._wanted.max_programs}"
    sentence = f"{lost[worst] / usable[worst]:.1%} of the records of data set {spec.name!r} ({spec.task})"
    if any(one.stored for one in sorts[worst]):
      raise ValueError(f"{sentence} fit none of the buckets that their latents were cached for: cache them for a stage with these prompts.")
    if any(one.family.rigid for one in sorts[worst]):
      raise ValueError(f"{budget}, {sentence} would be in no batch, because latents cannot be cut: cache them anew, or "
                       "give max_programs=0 for a bucket per shape.")
    latents = f", of which {stored} are those of latent caches" if stored else ""
    raise ValueError(f"{budget}{latents}, {sentence} would be in no batch; all records together have "
                     f"{chooser.num_shapes} shapes. Raise it, or max_crop, or leave out ratios or resolutions.")

  def _unusable(self, spec: DatasetSpec, index: Mapping[str, np.ndarray]) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yields (some records, why each of them cannot be used, a place in `REASONS`, the first that holds; the prompt class of its longest usable
    caption)."""
    first, longest = 0, self._wanted.classes[-1]
    classes = np.searchsorted(self._wanted.classes, np.arange(longest + 1)).astype(np.min_scalar_type(len(self._wanted.classes)))
    # Lengths by another tokenizer say nothing: all prompts get the longest class, and one that does not fit is found when it is read.
    known = str(index["tokenizer"]) == self._wanted.tokenizer.fingerprint
    for piece in pieces(len(index["height"])):
      counts = np.array(index["num_captions"][piece])
      captions = slice(first, first := first + int(counts.sum()))
      tokens = np.array(index["caption_tokens"][captions]) if known else np.full(captions.stop - captions.start, longest)
      if spec.languages or spec.caption_weights:
        some = {name: index[name][captions] for name in ("caption_language", "caption_kind", "caption_tokens")}
        tokens = np.where(usable_captions(some | {"language_names": index["language_names"]}, spec), tokens, 0)
      length, reason = _longest(tokens, counts), np.zeros(len(counts), np.uint8)
      length = np.minimum(length, longest) if self._wanted.truncate else length
      tests = {"too_long": length > longest, "no_caption": (length == 0) & self._wanted.captions,
               "low_stage": np.array(index["stage"][piece]) < spec.min_stage,
               "low_quality": np.array(index["quality"][piece]) < np.float32(spec.min_quality),
               "no_rejected": ~_paired(index, piece) & self._wanted.pairs}
      for name, holds in tests.items():  # the first reason comes last
        reason[holds] = REASONS.index(name)
      yield piece, reason, classes[np.minimum(length, longest)]

  def _bucket(self, target: Bucket, source_sizes: tuple[tuple[int, int], ...], prompt_tokens: int) -> Bucket:
    """Returns the bucket with condition images and room for their tokens: `prompt_tokens` counts text."""
    extra = self._wanted.tokenizer.num_image_tokens(source_grids(source_sizes))
    return dataclasses.replace(target, source_sizes=source_sizes, num_tokens=prompt_tokens + extra)


def _groups(sorts: Sequence[Sequence[Sorted]]) -> tuple[list[tuple], list[Group]]:
  """Returns (names, groups) of the shapes of all data sets; a name is (task, resolution, cache, number of condition images)."""
  found: dict[tuple, tuple[list[Family], dict[tuple, np.ndarray]]] = {}
  for d, parts in enumerate(sorts):
    raw = [one.weights() for one in parts]
    total, records = sum(some.sum() for some in raw) or 1.0, sum(one.counts.sum() for one in parts) or 1
    for r, (one, some) in enumerate(zip(parts, raw)):
      for number, rows in one.groups().items():
        if number in one.stored:
          continue  # what it was cached for
        families, shapes = found.setdefault((one.spec.task, r, one.cache, number), ([], {}))
        families.append(one.family)
        for shape, weight, count in zip(map(tuple, one.shapes[rows, :2 + number].tolist()), some[rows], one.counts[rows]):
          here = shapes.setdefault(shape, np.zeros(1 + len(sorts)))
          here[0] += weight / total * one.spec.weight
          here[1 + d] += count / records
  groups = []
  for families, shapes in found.values():
    table = np.array(list(shapes.values()))
    reach = tuple(map(tuple, np.max([family.reach for family in families], axis=0).tolist()))
    groups.append(Group(dataclasses.replace(families[0], reach=reach), np.array(list(shapes)), table[:, 0], table[:, 1:]))
  return list(found), groups


def _lost(parts: Sequence[Sorted], own: Sequence[Placed]) -> tuple[int, int]:
  """Returns (how many records of a data set have a shape at some resolution, and a bucket at none; how many have a shape)."""
  counts = parts[0].kinds.counts
  usable = functools.reduce(np.logical_or, (one.usable() for one in parts))
  kept = functools.reduce(np.logical_or, (one.place >= 0 for one in own))
  return int(counts[usable & ~kept].sum()), int(counts[usable].sum())


def _usage(parts: Sequence[Sorted], own: Sequence[Placed]) -> dict[str, Any]:
  """Returns what becomes of the records of a data set at all resolutions together: how many there are of the task, how many of them are in batches,
  why the others are not, reason -> number, and (position, reason) of the first `MOST_NAMED` of these. A record that one resolution uses is used; why
  another is not is what the first resolution says."""
  kinds, mine = parts[0].kinds, functools.reduce(np.logical_or, (one.own for one in parts))
  unused = mine & ~functools.reduce(np.logical_or, (one.place >= 0 for one in own))
  first = functools.reduce(lambda found, one: np.where(found >= 0, found, np.where(one.own, one.reason, -1)), parts, np.full(len(mine), -1))
  numbers = np.bincount(first[unused], kinds.counts[unused], len(REASONS)).astype(int).tolist()
  named = kinds.first(unused, MOST_NAMED)
  word = lambda number: REASONS[number] or "rare"
  return {"dataset": parts[0].spec.name, "split": parts[0].spec.split, "task": parts[0].spec.task, "records": int(kinds.counts[mine].sum()),
          "used": int(kinds.counts[mine & ~unused].sum()), "left_out": {word(i): number for i, number in enumerate(numbers) if number},
          "named": tuple((int(position), word(first[kind])) for position, kind in zip(*named))}


def _used(sorts: Sequence[Sequence[Sorted]], placed: Sequence[Sequence[Placed]]) -> dict[tuple, np.ndarray]:
  """Returns the programs of each group that have records."""
  found = {}
  for parts, own in zip(sorts, placed):
    for r, (one, where) in enumerate(zip(parts, own)):
      for number, some in where.used.items():
        found.setdefault((one.spec.task, r, one.cache, number), []).append(some)
  return {key: np.unique(np.concatenate(some), axis=0) for key, some in found.items()}


def _paired(index: Mapping[str, np.ndarray], piece: slice) -> np.ndarray:
  """Returns whether some records have a rejected picture, n bool; none has where the data set was written before there were pairs."""
  return np.array(index["has_rejected"][piece]) if "has_rejected" in index else np.zeros(len(index["height"][piece]), bool)


def _longest(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Returns the largest of the `counts[i]` values of each record i; 0 where there are none."""
  if (counts == 1).all():
    return values
  starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
  longest = np.zeros(len(counts), values.dtype)
  some = counts > 0
  longest[some] = np.maximum.reduceat(values, starts[some]) if some.any() else 0
  return longest


def usable_captions(index: dict, spec: DatasetSpec) -> np.ndarray:
  """Returns for each caption of an index whether a data set's languages and caption kinds let it be used, bool."""
  usable = np.ones(len(index["caption_tokens"]), bool)
  if spec.languages:
    usable &= np.isin(index["language_names"], spec.languages)[index["caption_language"]]
  if spec.caption_weights:
    usable &= np.array([spec.caption_weights.get(kind, 0) > 0 for kind in KINDS])[index["caption_kind"]]
  return usable


def _plain(programs: Mapping[tuple, np.ndarray]) -> dict[tuple, list]:
  return {key: some.tolist() for key, some in programs.items()}


def _unpacked(facts: dict, records: np.ndarray) -> Arrangement:
  arrays = lambda programs: {key: np.array(some, int).reshape(-1, 2 + key[3]) for key, some in programs.items()}
  cells = tuple(Cell(bucket, d, r, weight, records[begin:end], checksum) for bucket, d, r, weight, begin, end, checksum in facts["cells"])
  return Arrangement(**facts | {"cells": cells, "programs": arrays(facts["programs"]), "used": tuple(map(arrays, facts["used"]))})
