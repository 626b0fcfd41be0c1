"""Duplicates over a whole data set, as Beam transforms: nothing needs all samples in one memory.

A sample is an exact duplicate if an earlier one has the same bytes, and a near duplicate if the perceptual hash of an earlier one, that is no
exact duplicate itself, differs in at most `max_distance` of 64 bits. So no two samples that stay are near each other, every sample that goes has
an earlier one near it, and the result depends on the order of the source alone. Near ones are found by bands: the 64 bits are cut in
max_distance + 1 pieces, and two hashes that differ in max_distance bits have at least one piece in common.
"""

import json
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np

from data_pipelines.curation import files
from data_pipelines.curation.funnel import Job, Row

BITS = 64


def find(rows: beam.PCollection, max_distance: int) -> beam.PCollection:
  """(unit, [position, reason, detail]) of every duplicate among rows of type `Row`."""
  same_bytes = (rows | "by bytes" >> beam.Map(lambda row: ((row.group, row.sha256), row)) | "same bytes" >> beam.GroupByKey())
  exact = same_bytes | "exact duplicates" >> beam.FlatMap(_exact)
  distinct = same_bytes | "first of each" >> beam.Map(lambda item: min(item[1], key=_order))
  near = (distinct | "bands" >> beam.FlatMap(_bands, max_distance) | "same band" >> beam.GroupByKey()
          | "neighbours" >> beam.FlatMap(_neighbours, max_distance) | "of each" >> beam.GroupByKey() | "first neighbour" >> beam.Map(_near))
  return (exact, near) | "all duplicates" >> beam.Flatten()


def write(duplicates: beam.PCollection, job: Job, pipeline: beam.Pipeline) -> beam.PCollection:
  """One file per unit, position -> [reason, detail]; units without duplicates have an empty one."""
  units = pipeline | "all units" >> beam.Create([(number, None) for number in range(job.num_units)])
  return ((duplicates, units) | "with all units" >> beam.Flatten() | "by unit" >> beam.GroupByKey() | "save" >> beam.Map(_save, job))


def _save(item: tuple[int, Iterable], job: Job) -> None:
  found = {str(position): [reason, detail] for position, reason, detail in sorted(entry for entry in item[1] if entry is not None)}
  files.write(job.path("duplicates", item[0], ".json"), json.dumps(found).encode())


def _order(row: Row) -> tuple[int, int]:
  return row.unit, row.position


def _exact(item: tuple[tuple, Iterable[Row]]) -> Iterator[tuple[int, tuple]]:
  first, *rest = sorted(item[1], key=_order)
  for row in rest:
    yield row.unit, (row.position, "exact_duplicate", f"The file is the same as {first.key}.")


def _bands(row: Row, max_distance: int) -> Iterator[tuple[tuple, Row]]:
  edges = [BITS * i // (max_distance + 1) for i in range(max_distance + 2)]
  for band, (low, high) in enumerate(zip(edges, edges[1:])):
    yield (row.group, band, row.perceptual >> low & (1 << high - low) - 1), row


def _neighbours(item: tuple[tuple, Iterable[Row]], max_distance: int) -> Iterator[tuple[tuple[int, int], tuple]]:
  """Yields (place of a row, (place, key and distance of its first earlier neighbour within this band))."""
  rows = sorted(item[1], key=_order)
  hashes = np.array([row.perceptual for row in rows], np.uint64)
  for i in range(1, len(rows)):
    distances = np.bitwise_count(hashes[:i] ^ hashes[i])
    near = np.flatnonzero(distances <= max_distance)
    if len(near):
      first = rows[near[0]]
      yield _order(rows[i]), (*_order(first), first.key, int(distances[near[0]]))


def _near(item: tuple[tuple[int, int], Iterable[tuple]]) -> tuple[int, tuple]:
  (unit, position), (*_, key, distance) = item[0], min(item[1])
  return unit, (position, "near_duplicate", f"Its perceptual hash differs in {distance} of {BITS} bits from that of {key}.")
