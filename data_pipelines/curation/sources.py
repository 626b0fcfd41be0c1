"""Where curation's pictures come from: folders, tables, tars and TFDS data sets, cut in units of work that are read one by one.

A source is one of

  FOLDER                        pictures with texts, records, tables or condition images beside them; see source_folders
  x.csv, x.tsv, x.jsonl         tables of paths; source_records says what columns and keys mean
  x.parquet, x.tar              pictures and texts in one file; a folder that holds no pictures but one of these kinds counts as all of them
  x-*.tar, x-{000..127}.tar     several such files
  tfds:NAME[/config][:split]    a data set that TFDS has prepared as ArrayRecord files, or tfds:FOLDER:split; the split is train by default

on this machine or on one of fsspec's file systems, such as gs://bucket/folder. Files of a folder that are no part of a sample are counted by
reason. Any other thing that cannot be used becomes a sample with an `error`, so that every count is exact.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import posixpath
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import fsspec

from data_pipelines.curation import source_tars
from data_pipelines.curation.reading import Reading
from data_pipelines.curation.sample import Sample
from data_pipelines.curation.source_folders import TABLE_EXTENSIONS, TABLES, kind, plan_folder, read_folder, row_samples
from data_pipelines.curation.source_places import LeftOut, Place, full_location, list_files, open_location
from data_pipelines.curation.source_records import picture_paths
from data_pipelines.curation.source_tables import Piece

MOST_LOOKED_AT, MOST_ASKED_FOR = 1_000_000, 20_000  # rows of tables whose pictures are compared, on this machine and in a bucket
LOOKERS = 32  # threads that ask for pictures
_READERS_OF_EXTENSIONS = TABLE_EXTENSIONS | {".tar": "tar"}


@dataclasses.dataclass(frozen=True)
class Unit:
  """One piece of work: samples [start, stop) of a file or folder. Holds only what JSON can.

  Attributes:
    number: 0, 1, 2 and so on, in the order of the source.
    reader: "folder", "table", "jsonl", "parquet", "tar" or "tfds".
    location: the file or folder, a path or a URL.
    start, stop: positions in that file or folder.
    options: what the reader needs besides.
  """
  number: int
  reader: str
  location: str
  start: int
  stop: int
  options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
  """What a source string stands for: files by their names below `root`, with their sizes in bytes; how they are read; and which files are no part of
  a sample."""
  source: str
  reader: str
  fs: fsspec.AbstractFileSystem
  root: str
  files: dict[str, int]
  split: str = ""
  reading: Reading = Reading()
  left_out: LeftOut = dataclasses.field(default_factory=LeftOut)


def plan_units(source: str | Found, samples_per_unit: int = 512) -> list[Unit]:
  """Returns the units of a source, or of one that was looked up, in its order; of several tars each is one unit.

  `ValueError` in one sentence if the source as a whole cannot be used: nothing is there, its kind is not known, a table has no picture
  column, a Parquet or tar file cannot be opened, there is no sample in it.
  """
  if samples_per_unit < 1:
    raise ValueError(f"samples_per_unit={samples_per_unit} must be at least 1.")
  found = _looked_up(source)
  units = [Unit(number, reader, full_location(place.fs, place.path), start, stop, options | {"reading": dataclasses.asdict(found.reading)})
           for number, (reader, place, (start, stop, options)) in enumerate(_pieces(found, samples_per_unit))]
  if not units:
    raise ValueError(f"{found.source} holds no sample: put pictures or records in it, or name another source.")
  return units


def read_unit(unit: Unit) -> Iterator[Sample]:
  """Yields the stop - start samples of a unit, always in the same order and under the same keys.

  What cannot be read has an `error`, also what has vanished since the unit was planned. Raises what the file system raises if a file of
  several samples cannot be opened, or a connection is lost; `reading.NeedsAnswer` where the user has to say how the source is read.
  """
  place = Place(*open_location(unit.location), unit.options.get("name", ""), Reading(**unit.options["reading"]))
  if unit.reader in TABLES:
    samples = row_samples(place, TABLES[unit.reader][1](place, unit.start, unit.stop, unit.options), unit.start, unit.options.get("beside", {}))
  else:
    read = {"folder": read_folder, "tar": source_tars.read_tar, "tfds": source_tars.read_tfds}[unit.reader]
    samples = read(place, unit.start, unit.stop, unit.options)
  number = unit.start - 1
  for number, sample in enumerate(itertools.islice(samples, unit.stop - unit.start), unit.start):
    # A file name that is not UTF-8 must not break what writes the key.
    yield dataclasses.replace(sample, key=_printable(sample.key), error=_printable(sample.error))
  for number in range(number + 1, unit.stop):
    yield Sample(_printable(f"{place.name or unit.location}:{number}:gone"), error=f"{unit.location} has become shorter: plan its units again.")


def fingerprint(source: str | Found, units: Sequence[Unit]) -> str:
  """Returns the SHA-256, in hex, of the names, sizes in bytes and times of change of the source's files as they are now, and of the number of
  samples.

  Pictures that a table names are in `fingerprint_of_pictures`; names are relative, so that a source may move as a whole.
  """
  found = _looked_up(source)
  digest = hashlib.sha256(f"{found.reader} {found.split} {sum(unit.stop - unit.start for unit in units)}".encode())
  for name, size in found.files.items():
    digest.update(f"\0{_printable(name)}\0{size}\0{_stamp(found, name)}".encode())
  return digest.hexdigest()


def fingerprint_of_pictures(units: Sequence[Unit]) -> str:
  """Returns the SHA-256, in hex, of the names, sizes in bytes and times of change of the pictures that tables (CSV, TSV, JSON lines, Parquet) name,
  as they are now; "" for other sources. Of more rows than `MOST_LOOKED_AT` those of every n-th unit are looked at, so that a source of 1e8 rows costs
  what one of 1e6 does.

  Raises:
    OSError: a file system does not answer.
  """
  named = functools.cache(lambda location: source_tars.names_pictures(Place(*open_location(location), "")))
  tables = [unit for unit in units if unit.reader in ("table", "jsonl") or (unit.reader == "parquet" and named(unit.location))]
  rows = sum(unit.stop - unit.start for unit in tables)
  digest = hashlib.sha256()
  with futures.ThreadPoolExecutor(LOOKERS) as pool:
    for unit in tables[::max(1, -(-rows // (MOST_LOOKED_AT if _is_local(tables) else MOST_ASKED_FOR)))]:
      place = Place(*open_location(unit.location), unit.options.get("name", ""), Reading(**unit.options["reading"]))
      names = []
      for _, make in TABLES[unit.reader][1](place, unit.start, unit.stop, unit.options):
        with contextlib.suppress(ValueError, RecursionError):  # a row that curation will name
          names += [name for some in picture_paths(make()) for name in some]
      for name, facts in zip(names, pool.map(lambda name, place=place: _picture(place, name), names)):
        digest.update(f"\0{_printable(name)}\0{facts}".encode())
  return digest.hexdigest() if tables else ""


def _is_local(units: Sequence[Unit]) -> bool:
  return not any("://" in unit.location or "://" in unit.options["reading"].get("picture_root", "") for unit in units)


def _picture(place: Place, name: str) -> str:
  """The size of a picture that a table names and when it was changed; "" where it is not there or may not be read."""
  try:
    facts = place.facts(name)
  except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
    return ""
  except OSError as error:  # a lost connection says nothing of the picture
    if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
      raise
    return ""
  return f"{facts['size']} {_changed(facts)}"


def _stamp(found: Found, name: str) -> str:
  """When a file was changed, or a checksum that its file system keeps; "" where neither is known."""
  try:
    return _changed(found.fs.info(posixpath.join(found.root, name)))
  except FileNotFoundError:  # a link to nothing
    return ""


def _changed(facts: Mapping[str, Any]) -> str:
  return next((str(facts[key]) for key in ("mtime", "md5Hash", "etag", "ETag", "updated") if facts.get(key)), "")


def _printable(text: str) -> str:
  return text.encode("utf-8", "backslashreplace").decode()


def _pieces(found: Found, size: int) -> Iterator[tuple[str, Place, Piece]]:
  """Yields (reader, place, piece) in the order of the source."""
  root = Place(found.fs, found.root, "", found.reading)
  if found.reader == "folder":
    yield from plan_folder(root, found.files, size)
    return
  if found.reader == "tfds":
    places, plan = [root], functools.partial(source_tars.plan_tfds, split=found.split)
  else:
    places = [dataclasses.replace(root, path=posixpath.join(found.root, name), name=name) for name in found.files]
    plan = TABLES[found.reader][0] if found.reader in TABLES else functools.partial(source_tars.plan_tar, left_out=found.left_out)
  if found.reader == "tar" and len(places) > 1:
    size = sys.maxsize
  for place in places:
    for start, stop, options in plan(place, size):
      yield found.reader, place, (start, stop, options | {"name": place.name})


def _looked_up(source: str | Found) -> Found:
  return source if isinstance(source, Found) else look_up(source)


def look_up(source: str, reading: Reading = Reading()) -> Found:
  """Returns what a source is, to be read in a certain way; `ValueError` if nothing is there or its kind is not known."""
  if reading.picture_root:
    reading = dataclasses.replace(reading, picture_root=full_location(*open_location(reading.picture_root)))
  return dataclasses.replace(_find(source), source=source, reading=reading)


def _find(source: str) -> Found:
  if source.startswith("tfds:"):
    folder, split = source_tars.find_tfds(source.removeprefix("tfds:"))
    fs, path = open_location(folder)
    return Found(source, "tfds", fs, path, list_files(fs, path, LeftOut()), split)
  fs, path = open_location(source)
  fs.invalidate_cache()
  path = path.rstrip("/")
  if fs.isdir(path):
    return _find_in_folder(fs, path)
  root = posixpath.dirname(path)
  if fs.exists(path):
    files = {path: fs.size(path)}
  else:
    root, files = posixpath.dirname(re.split(r"[*?\[{]", path)[0]), _expand(fs, path, source)
  kinds = {posixpath.splitext(name)[1].lower() for name in files}
  readers = {_READERS_OF_EXTENSIONS.get(kind, "") for kind in kinds}
  if len(readers) > 1 or "" in readers:
    raise ValueError(f"{source} has the file name extension {' and '.join(sorted(kinds)) or 'none'}: a source is a folder of pictures, a tfds: "
                     f"data set, or files of one of the kinds {', '.join(_READERS_OF_EXTENSIONS)}.")
  return Found(source, readers.pop(), fs, root, {_below(root, name): size for name, size in files.items()})


def _expand(fs: fsspec.AbstractFileSystem, pattern: str, source: str) -> dict[str, int]:
  """The files that match a pattern with {a,b}, {000..127}, * and the like, with their sizes; each choice in braces must be there."""
  files = {}
  for path in _choices(pattern):
    matches = {name: facts["size"] for name, facts in sorted(fs.glob(path, detail=True).items()) if facts["type"] != "directory"}
    if not matches:
      raise ValueError(f"{path} of the source {source} does not exist: correct the path or leave it out.")
    files |= matches
  return files


def _choices(pattern: str) -> list[str]:
  """The patterns that one with braces stands for, as a shell expands them."""
  braces = re.search(r"\{([^{}]*)\}", pattern)
  if not braces:
    return [pattern]
  span = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", braces[1])
  words = [f"{number:0{len(span[1])}d}" for number in range(int(span[1]), int(span[2]) + 1)] if span else braces[1].split(",")
  return [choice for word in words for choice in _choices(pattern[:braces.start()] + word + pattern[braces.end():])]


def _below(root: str, path: str) -> str:
  return path.removeprefix(root).lstrip("/")


def _find_in_folder(fs: fsspec.AbstractFileSystem, folder: str) -> Found:
  left_out = LeftOut()
  files = list_files(fs, folder, left_out)
  kinds = {name: kind(name) for name in files}
  if "image" in kinds.values():
    reader = "folder"
  else:
    kinds = {name: _READERS_OF_EXTENSIONS.get(posixpath.splitext(name)[1].lower(), "") for name in files}
    readers = set(kinds.values()) - {""}
    if len(readers) != 1:
      raise ValueError(f"The folder {folder} holds no picture and {len(readers)} kinds of tables or tars {sorted(readers)}: name the files of "
                       "one kind, or another folder.")
    reader, = readers
  for name in files:
    if not kinds[name]:
      left_out.add(_why_left_out(reader, name), name)
  return Found(folder, reader, fs, folder, {name: size for name, size in files.items() if kinds[name]}, left_out=left_out)


def _why_left_out(reader: str, name: str) -> str:
  extension = posixpath.splitext(name)[1].lower()
  if reader != "folder":
    return f"{extension or 'no extension'} beside .{reader} files"
  if extension in TABLE_EXTENSIONS:
    return f"{extension} beside pictures: a table of these is called metadata{extension}"
  if extension in _READERS_OF_EXTENSIONS:
    return f"{extension} beside pictures: name such files as a source of their own"
  return f"{extension or 'no extension'}: neither a picture nor a caption"
