"""Folders of pictures as sources, found recursively: which files make a sample.

  NAME.txt, NAME.caption        the text of NAME.png, in the same folder; NAME.json a record of it
  NAME.source1.png ...          the condition images of an edit whose result is NAME.png; NAME.source.png is one alone, or comes first
  NAME.rejected.png             the worse picture of a pair whose better one is NAME.png
  target/ beside control/       the condition images of target/NAME.png are control/NAME.png, or control_1/NAME.png, control_2/NAME.png and so on
  metadata.jsonl, .csv, ...     a table (Hugging Face's image folder) whose rows name pictures; what lies beside these belongs to their rows

Names are compared in one Unicode normalisation where they differ in nothing else.
"""

import collections
import dataclasses
import posixpath
import re
from collections.abc import Iterable, Iterator

from data_pipelines.curation import source_tables, source_tars
from data_pipelines.curation.sample import Sample
from data_pipelines.curation.source_places import Place, normal, read_below
from data_pipelines.curation.source_records import guarded, in_prompt_order, parse_object, parse_text, picture_paths, record_sample
from data_pipelines.curation.source_tables import Piece, Rows, ranges

# Kind of a table -> (what cuts it in pieces, what reads the rows of one), and the kinds by file name extension.
TABLES = {"table": (source_tables.plan_csv, source_tables.read_csv), "jsonl": (source_tables.plan_jsonl, source_tables.read_jsonl),
          "parquet": (source_tars.plan_parquet, source_tars.read_parquet)}
TABLE_EXTENSIONS = {".csv": "table", ".tsv": "table", ".jsonl": "jsonl", ".parquet": "parquet"}
_METADATA = "metadata"
_SOURCE_FILE = re.compile(r"(.+)\.source([0-9]*)", re.DOTALL)
_REJECTED_FILE = re.compile(r"(.+)\.rejected", re.DOTALL)
_TARGET = re.compile(r"((?:.*/)?)target/", re.DOTALL)
_CONTROL = re.compile(r"((?:.*/)?)control(?:_?([0-9]+))?/(.+)", re.DOTALL)


@dataclasses.dataclass
class _Group:
  """The files of one stem: pictures, texts, (number, name) of condition images, whether it must have some, and rejected pictures."""
  images: list[str] = dataclasses.field(default_factory=list)
  texts: list[str] = dataclasses.field(default_factory=list)
  sources: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  is_edit: bool = False
  rejected: list[str] = dataclasses.field(default_factory=list)

  def beside(self) -> list:
    """What lies beside a picture, as JSON."""
    return [self.texts, [list(one) for one in self.sources], self.is_edit, self.rejected]


def kind(name: str) -> str:
  """Returns what a file of a folder of pictures is: "image", "text", "table" (of the folder's pictures), or "" for no part of a sample."""
  stem, extension = posixpath.splitext(name)
  extension = extension.lower()
  if extension[1:] in source_tars.IMAGE_EXTENSIONS:
    return "image"
  if extension == ".json" or extension[1:] in source_tars.TEXT_EXTENSIONS:
    return "text"
  return "table" if extension in TABLE_EXTENSIONS and posixpath.basename(stem).lower() == _METADATA else ""


def plan_folder(place: Place, files: Iterable[str], size: int) -> Iterator[tuple[str, Place, Piece]]:
  """Yields (reader, place, piece): the samples of a folder, whose options hold the files of each; then the rows of its tables."""
  files = [name for name in files if kind(name)]
  groups, tables = _groups(name for name in files if kind(name) != "table"), []
  folder = _Folder(place, files, groups)
  for name in files:
    if kind(name) == "table":
      table = dataclasses.replace(place, path=posixpath.join(place.path, name), name=name)
      tables += [(TABLE_EXTENSIONS[posixpath.splitext(name)[1].lower()], table, piece)
                 for piece in _plan_table(table, size, folder)]
  samples = []
  for stem, group in groups.items():
    rest = [image for image in group.images
            if image not in folder.images and (image not in folder.conditions or group.texts or group.sources)]
    samples += [[image, *group.beside(), stem] for image in rest] or ([] if group.images else [["", *group.beside(), stem]])
  samples.sort(key=lambda sample: _key(*sample[:5]))
  yield from (("folder", place, (start, stop, {"samples": samples[start:stop]})) for start, stop in ranges(len(samples), size))
  yield from tables


def _groups(names: Iterable[str]) -> dict[str, _Group]:
  """The files by the stem that those of a sample share."""
  names = list(names)
  targets = {match[1] for name in names if kind(name) == "image" and (match := _TARGET.match(name))}
  controlled = {match[1] for name in names if kind(name) == "image" and (match := _CONTROL.fullmatch(name))} & targets
  groups: dict[str, _Group] = collections.defaultdict(_Group)
  for name in names:
    stem, control = posixpath.splitext(name)[0], _CONTROL.fullmatch(name)
    match, worse = _SOURCE_FILE.fullmatch(stem), _REJECTED_FILE.fullmatch(stem)
    if kind(name) == "text":
      groups[stem].texts.append(name)
    elif control and control[1] in controlled:
      groups[posixpath.splitext(f"{control[1]}target/{control[3]}")[0]].sources.append((control[2] or "", name))
    elif match:
      groups[match[1]].sources.append((match[2], name))
    elif worse:
      groups[worse[1]].rejected.append(name)
    else:
      groups[stem].images.append(name)
  for stem, group in groups.items():
    match = _TARGET.match(stem)
    group.is_edit = match is not None and match[1] in controlled
  return _joined(groups)


def _joined(groups: dict[str, _Group]) -> dict[str, _Group]:
  """The groups, those without a picture joined with the only one that has some and whose stem differs in Unicode normalisation alone."""
  others = collections.defaultdict(list)
  for stem, group in groups.items():
    if group.images and not stem.isascii():
      others[normal(stem)].append(group)
  for stem in [stem for stem, group in groups.items() if not group.images and not stem.isascii()]:
    if len(others[normal(stem)]) == 1:
      group, lonely = others[normal(stem)][0], groups.pop(stem)
      group.texts, group.sources = sorted({*group.texts, *lonely.texts}), sorted({*group.sources, *lonely.sources})
      group.rejected = sorted({*group.rejected, *lonely.rejected})
  return groups


class _Folder:
  """The files of a folder by the paths that records give.

  Attributes:
    groups: the group of each picture.
    images, conditions: what rows of tables have named as their picture, or as a condition image of it.
  """

  def __init__(self, place: Place, names: Iterable[str], groups: dict[str, _Group]):
    self._root, self._names = place.path.rstrip("/") + "/", {normal(name): name for name in names}
    self.groups = {image: group for group in groups.values() for image in group.images}
    self.images: set[str] = set()
    self.conditions: set[str] = set()

  def find(self, table: Place, path: str) -> str | None:
    """Returns the name of the file that a row of a table names by its path; None if it is not in the folder."""
    try:
      return self._names.get(normal(table.locate(path).removeprefix(self._root)))
    except ValueError:  # the row's own sample will say why
      return None


def _plan_table(table: Place, size: int, folder: _Folder) -> Iterator[Piece]:
  """Yields the pieces of a table whose rows name pictures of its folder, with what lies beside these; notes what it has named."""
  plan, read = TABLES[TABLE_EXTENSIONS[posixpath.splitext(table.name)[1].lower()]]
  for start, stop, options in plan(table, size):
    beside = {}
    for number, (_, make) in enumerate(read(table, start, stop, options), start):
      try:
        picture, sources = picture_paths(make())
      except (ValueError, RecursionError):  # the row's own sample will say why
        continue
      folder.conditions.update(filter(None, (folder.find(table, path) for path in sources)))
      for name in filter(None, (folder.find(table, path) for path in picture)):
        folder.images.add(name)
        if name in folder.groups and any(folder.groups[name].beside()):
          beside[str(number)] = folder.groups[name].beside()
    yield start, stop, options | {"name": table.name, "beside": beside}


def read_folder(place: Place, start: int, stop: int, options: dict) -> Iterator[Sample]:
  """Yields the samples of a folder; keys are the names of the pictures."""
  del start, stop
  for image, texts, sources, is_edit, rejected, stem in options["samples"]:
    yield guarded(_key(image, texts, sources, is_edit, rejected), _folder_sample, place, image, texts, sources, is_edit, rejected, stem)


def _key(image: str, texts: list[str], sources: list, is_edit: bool, rejected: list[str]) -> str:
  del is_edit
  return image or (texts or [name for _, name in sources] or rejected)[0]


def _folder_sample(key: str, place: Place, image: str, texts: list[str], sources: list, is_edit: bool, rejected: list[str], stem: str) -> Sample:
  if not image:
    raise ValueError(f"There is no picture {stem!r} for {key!r}: add it or remove this file.")
  folder = posixpath.join(place.path, posixpath.dirname(key))
  data, side = read_below(place.fs, place.path, image), _read_beside(place, image, texts, sources, is_edit, rejected)
  return record_sample(key, side.pop("record"), lambda name: place.near(name, folder), place.reading, data, posixpath.basename(image), **side)


def _read_beside(place: Place, image: str, texts: list[str], sources: list, is_edit: bool, rejected: list[str]) -> dict:
  """The record, texts, condition images and rejected picture in the files beside a picture, all named from the root of the source."""
  record, found = {}, []
  for name in texts:
    data = read_below(place.fs, place.root, name)
    if name.lower().endswith(".json"):
      record |= parse_object(data, name)
    else:
      found += place.reading.texts(parse_text(data, name), name)
  if is_edit and not sources:
    raise ValueError(f"The edit has no condition image: put it in control/ beside target/, under the name of {posixpath.basename(image)!r}.")
  if len(rejected) > 1:
    raise ValueError(f"There are two rejected pictures, {rejected[0]!r} and {rejected[1]!r}: remove one of them.")
  read = lambda name: read_below(place.fs, place.root, name)
  return {"record": record, "texts": found, "sources": in_prompt_order((number, read(name)) for number, name in sources),
          "rejected": read(rejected[0]) if rejected else b""}


def row_samples(place: Place, rows: Rows, first: int, beside: dict[str, list]) -> Iterator[Sample]:
  """Yields the samples of the rows of a table from number `first` on; `beside` has, by the number of a row, what lies beside its picture."""
  for number, (key, make) in enumerate(rows, first):
    yield guarded(key, _row_sample, place, make, beside.get(str(number)))


def _row_sample(key: str, place: Place, make, beside: list | None) -> Sample:
  record = make()
  side = _read_beside(place, key, *beside) if beside else {"record": {}}
  twice = sorted(name for name, value in side.pop("record").items() if record.setdefault(name, value) != value)
  if twice:
    raise ValueError(f"`{twice[0]}` is one thing in the row and another in the JSON file beside its picture: remove one of them.")
  return record_sample(key, record, place.near, place.reading, **side)
