"""Text tables as sources (CSV, TSV, JSON lines): a row is a record, see source_records.

Paths are relative to the folder of the file and stay inside it, unless the user names a root for them. A planner gives (start, stop, options) of
each unit of work, and a reader yields (key, what gives the record) of the rows [start, stop).
"""

import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from data_pipelines.curation.source_places import Place
from data_pipelines.curation.source_records import IMAGES, INSTRUCTIONS, PICTURES_OF_PAIRS, TEXTS, is_condition, parse_object, short

Piece = tuple[int, int, dict[str, Any]]
Rows = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def ranges(count: int, size: int) -> list[tuple[int, int]]:
  """Returns [0, count) cut in pieces of `size`; the last may be shorter."""
  return [(start, min(start + size, count)) for start in range(0, count, size)]


def check_columns(names: Iterable[str], place: Place) -> None:
  """Raises `ValueError` unless a table with columns of these names can give a picture and a caption."""
  for what, wanted in (("picture", IMAGES), ("caption", (*TEXTS, "captions", *INSTRUCTIONS, "tags"))):
    if what == "caption" and place.reading.uncaptioned != "drop":
      continue
    if not {*wanted, *(PICTURES_OF_PAIRS if what == "picture" else ())} & set(names):
      raise ValueError(f"{place.path} has no {what} column, only {short(list(names))}: name one of them {' or '.join(wanted)}"
                       + ("." if what == "picture" else ", or see --uncaptioned."))


def plan_csv(place: Place, size: int) -> list[Piece]:
  """Returns the pieces of a CSV or TSV file. `ValueError` if the header names no picture or no caption."""
  with place.open() as file:
    rows = _csv_rows(file, place, 0)
    header, end = next(rows, ([], 0))
    columns = [cell.strip().lower() for cell in header or []]
    check_columns(columns, place)
    if len(set(columns)) < len(columns):
      raise ValueError(f"{place.path} has two columns of one name, {short(columns)}: rename one of them.")
    count, offsets = 0, []
    for _, row_end in rows:
      if count % size == 0:
        offsets.append(end)
      count, end = count + 1, row_end
  return [(start, stop, {"columns": columns, "offset": offset}) for (start, stop), offset in zip(ranges(count, size), offsets)]


def read_csv(place: Place, start: int, stop: int, options: dict) -> Rows:
  """Yields the rows [start, stop); keys count them from 1, without the header."""
  with place.open() as file:
    file.seek(options["offset"])
    for number, (cells, _) in zip(range(start, stop), _csv_rows(file, place, options["offset"])):
      yield f"{place.name}:{number + 1}", functools.partial(_csv_record, options["columns"], cells)


def _csv_rows(file: BinaryIO, place: Place, offset: int) -> Iterator[tuple[list[str] | None, int]]:
  """Yields (cells, or None for a row that is not valid; where the next row begins), without blank lines."""
  ends = []  # of the lines of the row that is being read

  def rows():
    nonlocal offset
    for line in file:
      is_first, offset = not offset, offset + len(line)
      ends.append(offset)
      text = line.decode("utf-8", "surrogateescape")
      yield text.removeprefix("\ufeff") if is_first else text
  # Strict: otherwise a quote that is never closed would swallow all rows below it without a word.
  start = lambda: csv.reader(rows(), delimiter="\t" if place.path.lower().endswith(".tsv") else ",", strict=True)
  reader = start()
  while True:
    ends.clear()
    try:
      cells = next(reader)
    except StopIteration:
      return
    except csv.Error:  # the row is given up where its first line ends, and the next line may be a good one
      cells, offset = None, ends[0]
      file.seek(offset)
      reader = start()
    if cells != []:
      yield cells, offset


def _csv_record(columns: list[str], cells: list[str] | None) -> dict[str, Any]:
  if cells is None:
    raise ValueError("The row is not valid CSV: close its quotes, double the quotes inside quotes, or remove it.")
  if len(cells) != len(columns):
    raise ValueError(f"The row has {len(cells)} cells where the header has {len(columns)}: quote cells that hold the separator.")
  return {name: _json_cell(name, cell) if name == "attributes" or cell[:1] in ("[", "{") and (name == "captions" or is_condition(name)) else cell
          for name, cell in zip(columns, cells)}


def _json_cell(name: str, cell: str) -> Any:
  try:
    return json.loads(cell) if cell else None
  except ValueError as error:
    raise ValueError(f"The cell `{name}` is not valid JSON ({error}): write a list such as [\"a\", \"b\"].") from error


def plan_jsonl(place: Place, size: int) -> list[Piece]:
  """Returns the pieces of a file with one JSON object per line; blank lines are no records."""
  count, offset, marks = 0, 0, []
  with place.open() as file:
    for number, line in enumerate(file):
      if line.strip():
        if count % size == 0:
          marks.append({"offset": offset, "line": number})
        count += 1
      offset += len(line)
  return [(start, stop, mark) for (start, stop), mark in zip(ranges(count, size), marks)]


def read_jsonl(place: Place, start: int, stop: int, options: dict) -> Rows:
  """Yields the records [start, stop); keys name lines, from 1."""
  with place.open() as file:
    file.seek(options["offset"])
    lines = ((number, line) for number, line in enumerate(file, options["line"] + 1) if line.strip())
    for number, line in itertools.islice(lines, stop - start):
      yield f"{place.name}:{number}", functools.partial(parse_object, line, "The line")
