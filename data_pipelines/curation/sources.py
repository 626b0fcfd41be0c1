"""Where curation's pictures come from: folders, tables, tars and TFDS data sets, cut in units of work that are read one by one.

A source is one of

  FOLDER                        pictures, found recursively; NAME.txt (a caption per line) or NAME.json (a record) beside NAME.png.
                                NAME.source.png, or NAME.source1.png and so on, are the condition images of an edit whose result is NAME.png
  x.csv, x.tsv, x.jsonl         tables of paths; source_tables says what columns and keys mean
  x.parquet, x.tar              pictures and texts in one file; a folder that holds no pictures but one of these kinds counts as all of them
  x-*.tar, x-{000..127}.tar     several such files
  tfds:NAME[/config][:split]    a data set that TFDS has prepared as ArrayRecord files, or tfds:FOLDER:split; the split is train by default

on this machine or on one of fsspec's file systems, such as gs://bucket/folder. Files of a folder that are neither pictures nor texts, and
hidden ones, are left out. Any other thing that cannot be used becomes a sample with an `error`, so that every count is exact.
"""

import dataclasses
import functools
import hashlib
import itertools
import posixpath
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import fsspec

from data_pipelines.curation import source_tables, source_tars
from data_pipelines.curation.sample import Sample
from data_pipelines.curation.source_tables import Piece, Place, full_location, open_location, ranges

_READERS_OF_EXTENSIONS = {".csv": "table", ".tsv": "table", ".jsonl": "jsonl", ".parquet": "parquet", ".tar": "tar"}
_PLANNERS = {"table": source_tables.plan_csv, "jsonl": source_tables.plan_jsonl, "parquet": source_tars.plan_parquet, "tar": source_tars.plan_tar}
_SOURCE_FILE = re.compile(r"(.+)\.source([0-9]*)", re.DOTALL)


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
class _Found:
  """What a source string stands for: files by their names below `root`, with their sizes in bytes."""
  reader: str
  fs: fsspec.AbstractFileSystem
  root: str
  files: dict[str, int]
  split: str = ""


def plan_units(source: str, samples_per_unit: int = 512) -> list[Unit]:
  """Returns the units of a source, in its order; of several tars each is one unit.

  `ValueError` in one sentence if the source as a whole cannot be used: nothing is there, its kind is not known, a table has no picture
  column, a Parquet or tar file cannot be opened, there is no sample in it.
  """
  if samples_per_unit < 1:
    raise ValueError(f"samples_per_unit={samples_per_unit} must be at least 1.")
  found = _find(source)
  units = [Unit(number, found.reader, location, start, stop, options)
           for number, (location, (start, stop, options)) in enumerate(_pieces(found, samples_per_unit))]
  if not units:
    raise ValueError(f"{source} holds no sample: put pictures or records in it, or name another source.")
  return units


def read_unit(unit: Unit) -> Iterator[Sample]:
  """Yields the stop - start samples of a unit, always in the same order and under the same keys.

  What cannot be read has an `error`, also what has vanished since the unit was planned. Raises what the file system raises if a file of
  several samples cannot be opened, or a connection is lost.
  """
  readers = {"folder": _read_folder, "table": source_tables.read_csv, "jsonl": source_tables.read_jsonl, "parquet": source_tars.read_parquet,
             "tar": source_tars.read_tar, "tfds": source_tars.read_tfds}
  place = Place(*open_location(unit.location), unit.options.get("name", ""))
  samples = itertools.islice(readers[unit.reader](place, unit.start, unit.stop, unit.options), unit.stop - unit.start)
  number = unit.start - 1
  for number, sample in enumerate(samples, unit.start):
    # A file name that is not UTF-8 must not break what writes the key.
    yield dataclasses.replace(sample, key=_printable(sample.key), error=_printable(sample.error))
  for number in range(number + 1, unit.stop):
    yield Sample(_printable(f"{place.name or unit.location}:{number}:gone"), error=f"{unit.location} has become shorter: plan its units again.")


def fingerprint(source: str, units: Sequence[Unit]) -> str:
  """Returns the SHA-256, in hex, of the names, sizes in bytes and times of change of the source's files as they are now, and of the number of
  samples.

  Pictures that a table names are not looked at, and names are relative, so that a source may move as a whole.
  """
  found = _find(source)
  digest = hashlib.sha256(f"{found.reader} {found.split} {sum(unit.stop - unit.start for unit in units)}".encode())
  for name, size in found.files.items():
    digest.update(f"\0{_printable(name)}\0{size}\0{_stamp(found, name)}".encode())
  return digest.hexdigest()


def _stamp(found: _Found, name: str) -> str:
  """When a file was changed, or a checksum that its file system keeps; "" where neither is known."""
  try:
    facts = found.fs.info(posixpath.join(found.root, name))
  except FileNotFoundError:  # a link to nothing
    return ""
  return next((str(facts[key]) for key in ("mtime", "md5Hash", "etag", "ETag", "updated") if facts.get(key)), "")


def _printable(text: str) -> str:
  return text.encode("utf-8", "backslashreplace").decode()


def _pieces(found: _Found, size: int) -> Iterator[tuple[str, Piece]]:
  """Yields (location, piece) in the order of the source."""
  if found.reader == "folder":
    location = full_location(found.fs, found.root)
    yield from ((location, piece) for piece in _plan_folder(found.files, size))
    return
  if found.reader == "tfds":
    places = [Place(found.fs, found.root, "")]
    plan = functools.partial(source_tars.plan_tfds, split=found.split)
  else:
    places = [Place(found.fs, posixpath.join(found.root, name), name) for name in found.files]
    plan = _PLANNERS[found.reader]
  if found.reader == "tar" and len(places) > 1:
    size = sys.maxsize
  for place in places:
    for start, stop, options in plan(place, size):
      yield full_location(place.fs, place.path), (start, stop, options | {"name": place.name})


def _find(source: str) -> _Found:
  """Looks a source up; `ValueError` if nothing is there or its kind is not known."""
  if source.startswith("tfds:"):
    folder, split = source_tars.find_tfds(source.removeprefix("tfds:"))
    fs, path = open_location(folder)
    return _Found("tfds", fs, path, _list(fs, path), split)
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
  return _Found(readers.pop(), fs, root, {_below(root, name): size for name, size in files.items()})


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


def _list(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, int]:
  """The files of a folder by their relative names, sorted, with their sizes; no hidden ones."""
  files = {}
  for path, facts in sorted(fs.find(folder, detail=True).items()):
    name = _below(folder, path)
    if any(part.startswith(".") for part in name.split("/")):
      continue
    if facts.get("islink") and fs.isdir(path):
      raise ValueError(f"{path} is a link to a folder, which is not followed: move the folder there, or name it as a source of its own.")
    files[name] = facts["size"]
  return files


def _find_in_folder(fs: fsspec.AbstractFileSystem, folder: str) -> _Found:
  files = _list(fs, folder)
  roles = {name: _role(name)[1] for name in files}
  if "image" in roles.values() or "source" in roles.values():
    return _Found("folder", fs, folder, {name: size for name, size in files.items() if roles[name]})
  kinds = {name: _READERS_OF_EXTENSIONS.get(posixpath.splitext(name)[1].lower()) for name in files}
  readers = set(kinds.values()) - {None}
  if len(readers) != 1:
    raise ValueError(f"The folder {folder} holds no picture and {len(readers)} kinds of tables or tars {sorted(readers)}: name the files of "
                     "one kind, or another folder.")
  return _Found(*readers, fs, folder, {name: size for name, size in files.items() if kinds[name]})


def _role(name: str) -> tuple[str, str, str]:
  """What a file of a folder is: (the stem that the files of a sample share, "image", "text", "source" or "", the number of a source)."""
  stem, extension = posixpath.splitext(name)
  if extension.lower() in (".txt", ".json"):
    return stem, "text", ""
  if extension[1:].lower() not in source_tars.IMAGE_EXTENSIONS:
    return stem, "", ""
  match = _SOURCE_FILE.fullmatch(stem)
  return (match[1], "source", match[2]) if match else (stem, "image", "")


def _plan_folder(names: Iterable[str], size: int) -> Iterator[Piece]:
  """Yields pieces whose options hold the files of each sample: the picture first; or only texts or sources, if it is missing."""
  groups: dict[str, dict[str, list[str]]] = {}
  for name in names:
    stem, role, _ = _role(name)
    groups.setdefault(stem, {"image": [], "text": [], "source": []})[role].append(name)
  samples = []
  for group in groups.values():
    beside = group["text"] + group["source"]
    samples += [[image, *beside] for image in group["image"]] or [beside]
  samples.sort()
  yield from ((start, stop, {"samples": samples[start:stop]}) for start, stop in ranges(len(samples), size))


def _read_folder(place: Place, start: int, stop: int, options: dict) -> Iterator[Sample]:
  """Yields the samples of a folder; keys are the names of the pictures."""
  del start, stop
  for names in options["samples"]:
    yield source_tables.guarded(names[0], _folder_sample, place, names[1:])


def _folder_sample(key: str, place: Place, beside: list[str]) -> Sample:
  stem, role, _ = _role(key)
  if role != "image":
    raise ValueError(f"There is no picture {stem!r} for {key!r}: add it or remove this file.")
  read = functools.partial(source_tables.read_below, place.fs, place.path)
  image, record, lines, sources = read(key), {}, [], []
  for name in beside:
    if name.lower().endswith(".txt"):
      lines += source_tables.parse_lines(read(name), name)
    elif name.lower().endswith(".json"):
      record |= source_tables.parse_object(read(name), name)
    else:
      sources.append((_role(name)[2], read(name)))
  folder = posixpath.dirname(key)
  return source_tables.record_sample(key, record, lambda name: read(posixpath.join(folder, name)), image,
                                     source_tables.in_prompt_order(sources), lines)
