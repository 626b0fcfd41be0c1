"""Text tables as sources (CSV, TSV, JSON lines), and what one record says about a picture.

The keys of a record, whichever file it comes from; all but a picture and a text may be left out:

  image        a path, or bytes, or {"bytes": ..., "path": ...}, where bytes are base64 text in JSON; also called target, image_bytes, bytes,
               image_path, file_name, path
  caption      text; also called text, prompt, instruction
  captions     a list of texts or of {"text", "language", "kind"}
  language     of the captions that name none, "en"
  kind         of the captions that name none, "general"
  sources      the condition images of an edit in prompt order, each like `image`; the text is then its instruction
  quality      0 to 1
  attributes   an object; keys that are not in this list are added to it

Paths are relative to the folder of the file and stay inside it. A planner gives (start, stop, options) of each unit of work, and
a reader yields the samples [start, stop).
"""

import base64
import csv
import dataclasses
import errno
import json
import math
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_pipelines.curation.sample import Caption, Sample
from data_pipelines.records import KINDS

_IMAGE_COLUMNS = ("image", "target", "image_bytes", "bytes", "image_path", "file_name", "path")
_BYTES_COLUMNS = ("image_bytes", "bytes")
_TEXT_COLUMNS = ("caption", "text", "prompt", "instruction")
_JSON_COLUMNS = ("captions", "sources", "attributes")
Piece = tuple[int, int, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Place:
  """A file of the source: `path` as `fs` spells it, and `name` below the source's root, which begins the keys of its samples."""
  fs: fsspec.AbstractFileSystem
  path: str
  name: str

  def open(self) -> BinaryIO:
    return self.fs.open(self.path, "rb")

  def near(self, name: str) -> bytes:
    """Returns a file by its path relative to this file's folder; `ValueError` if it is not there or outside of that folder."""
    return read_below(self.fs, posixpath.dirname(self.path), name)


def open_location(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """Returns (file system, path on it) of a path, or of a URL such as gs://bucket/folder; `ValueError` if that kind of URL is not known."""
  if "://" not in location:
    return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(location))
  try:
    return fsspec.core.url_to_fs(location)
  except (ValueError, ImportError) as error:
    raise ValueError(f"{location} cannot be opened ({error}): install the package for it or copy the files here.") from error


def full_location(fs: fsspec.AbstractFileSystem, path: str) -> str:
  """Returns what `open_location` opens again."""
  return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def read_below(fs: fsspec.AbstractFileSystem, folder: str, name: str) -> bytes:
  """Returns the file `name` of a folder; `ValueError` if it is outside of the folder, missing, or may not be read."""
  path = posixpath.normpath(posixpath.join(folder, name))
  if "\0" in name or not path.startswith(folder.rstrip("/") + "/"):
    raise ValueError(f"The path {name[:300]!r} leads out of its folder: put the file inside and write its relative path.")
  try:
    return fs.cat_file(path)
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, UnicodeEncodeError) as error:
    raise ValueError(f"The file {name[:300]!r} is missing or may not be read: put it there or remove the record.") from error
  except OSError as error:
    # Anything else, such as a lost connection, is not this sample's fault and must not be recorded as such.
    if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
      raise
    raise ValueError(f"The path {name[:300]!r} cannot be followed: shorten it or remove the record.") from error


def guarded(key: str, make: Callable[..., Sample], *arguments) -> Sample:
  """Returns make(key, *arguments), or a sample with the reason if that is a `ValueError`: one bad record must not stop the others."""
  try:
    return make(key, *arguments)
  except RecursionError:
    return Sample(key, error="The record is nested too deeply to be read: flatten it or remove it.")
  except ValueError as error:
    return Sample(key, error=" ".join(str(error).split()))


def ranges(count: int, size: int) -> list[tuple[int, int]]:
  """Returns [0, count) cut in pieces of `size`; the last may be shorter."""
  return [(start, min(start + size, count)) for start in range(0, count, size)]


def parse_object(data: bytes, name: str) -> dict[str, Any]:
  """Returns the JSON object in a file or a line; `ValueError` that names it unless it holds one, in UTF-8."""
  try:
    value = json.loads(data.decode("utf-8-sig"))
  except UnicodeDecodeError as error:
    raise ValueError(f"{name} is not UTF-8: save it in that encoding.") from error
  except ValueError as error:
    raise ValueError(f"{name} is not valid JSON ({error}): mend it or remove it.") from error
  if not isinstance(value, dict):
    raise ValueError(f"{name} holds a {type(value).__name__} instead of a JSON object: write {{\"image\": ..., \"caption\": ...}}.")
  return value


def parse_lines(data: bytes, name: str) -> list[str]:
  """Returns the lines of a caption file that are not blank, without the space around them; `ValueError` unless it is UTF-8."""
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{name} is not UTF-8: save it in that encoding.") from error
  # Not splitlines: it also cuts at characters such as U+2028, which may stand inside a caption.
  lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
  return [line.strip() for line in lines if line.strip()]


def in_prompt_order(numbered: Iterable[tuple[str, Any]]) -> list:
  """Returns the values by number; "" counts as 0. `ValueError` if a number is there twice."""
  places = {}
  for digits, value in numbered:
    if int(digits or 0) in places:
      raise ValueError(f"There are two condition images number {int(digits or 0)}: number them .source1, .source2 and so on.")
    places[int(digits or 0)] = value
  return [places[number] for number in sorted(places)]


def record_sample(key: str, record: dict[str, Any], read: Callable[[str], bytes], image: bytes | None = None,
                  sources: Iterable[bytes] = (), lines: Iterable[str] = ()) -> Sample:
  """Returns the sample that a record describes; `ValueError` in one sentence if it does not describe one.

  `read` opens the paths in the record. `image`, `sources` and `lines` come from files beside the record: the picture, the
  condition images, and further captions.
  """
  record = {name: value for name, value in record.items() if value is not None and value != ""}
  image = _image(record, read) if image is None else _filled(image)
  listed = record.pop("sources", [])
  if not isinstance(listed, list):
    raise ValueError(f"`sources` is {_short(listed)} instead of a list: write the paths of the condition images in brackets.")
  if listed and sources:
    raise ValueError("The condition images are given twice, in the record and as .source files: remove one of the two.")
  sources = [_filled(data) for data in sources] or [_payload(value, read) for value in listed]
  captions = _captions(record, lines, bool(sources))
  quality, attributes = _quality(record.pop("quality", 1.0)), record.pop("attributes", {})
  if not isinstance(attributes, dict):
    raise ValueError(f"`attributes` is {_short(attributes)} instead of an object: write {{\"name\": value}}.")
  return Sample(key, image, captions, sources, _plain(attributes | record), quality)


def _image(record: dict, read: Callable) -> bytes:
  """The picture; its key leaves the record."""
  if "image" in record and "target" in record:
    raise ValueError("The record has both `image` and `target`: name the edited picture `target` and the others `sources`.")
  name = next((name for name in _IMAGE_COLUMNS if name in record), None)
  if name is None:
    raise ValueError(f"The record names no picture: add one of {', '.join(_IMAGE_COLUMNS)}.")
  value = record.pop(name)
  return _payload({"bytes": value} if name in _BYTES_COLUMNS else value, read)


def _payload(value: Any, read: Callable[[str], bytes]) -> bytes:
  """An encoded image, given as a path, as bytes, or as {"bytes", "path"}."""
  if isinstance(value, dict):
    value = value["path"] if not value.get("bytes") and value.get("path") else _decoded(value.get("bytes"))
  if isinstance(value, str):
    value = read(value)
  if not isinstance(value, bytes):
    raise ValueError(f"A picture is given as {_short(value)}: write a path, bytes, or {{\"bytes\": ..., \"path\": ...}}.")
  return _filled(value)


def _decoded(value: Any) -> Any:
  if not isinstance(value, str):
    return value
  try:
    return base64.b64decode(value, validate=True)
  except ValueError as error:
    raise ValueError(f"The bytes of a picture are not base64 ({error}): encode them again.") from error


def _filled(data: bytes) -> bytes:
  if not data:
    raise ValueError("A picture has 0 bytes: replace the file or remove the record.")
  return data


def _captions(record: dict, lines: Iterable[str], is_edit: bool) -> list[Caption]:
  """The texts, each once. Of an edit that has an instruction only that: a caption beside it describes the result, not the change."""
  language, kind = record.pop("language", "en"), record.pop("kind", "general")
  names = ("instruction",) if is_edit and "instruction" in record else _TEXT_COLUMNS
  texts = [record.pop(name) for name in [name for name in names if name in record][:1]]
  listed = [] if names == ("instruction",) else record.pop("captions", [])
  if not isinstance(listed, list):
    raise ValueError(f"`captions` is {_short(listed)} instead of a list: write the texts in brackets, or one text as `caption`.")
  unique = {}
  for caption in (_caption(entry, language, kind) for entry in [*texts, *listed, *lines]):
    if caption.text.strip():
      unique.setdefault(caption.text, caption)
  if not unique:
    raise ValueError("The picture has no caption: write one or remove the picture.")
  return list(unique.values())


def _caption(entry: Any, language: Any, kind: Any) -> Caption:
  entry = {"text": entry} if isinstance(entry, str) else entry
  if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
    raise ValueError(f"A caption is {_short(entry)}: write a text or {{\"text\": ..., \"language\": ..., \"kind\": ...}}.")
  caption = Caption(entry["text"], entry.get("language") or language, entry.get("kind") or kind)
  if caption.kind not in KINDS:
    raise ValueError(f"The kind of a caption is {_short(caption.kind)}: choose one of {', '.join(KINDS)}.")
  if not isinstance(caption.language, str):
    raise ValueError(f"The language of a caption is {_short(caption.language)}: write a code such as \"en\".")
  if "\0" in caption.text:
    raise ValueError(f"The caption {_short(caption.text)} has a NUL character: remove it.")
  if any("\ud800" <= letter <= "\udfff" for letter in caption.text + caption.language):
    raise ValueError(f"The caption {_short(caption.text)} is not UTF-8: save the file in that encoding.")
  return caption


def _quality(value: Any) -> float:
  try:
    quality = float(value)
  except (TypeError, ValueError):
    quality = math.nan
  if not 0 <= quality <= 1:
    raise ValueError(f"`quality` is {_short(value)}: write a number from 0 to 1.")
  return quality


def _short(value: Any) -> str:
  text = ascii(value)
  return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: Any) -> Any:
  """The nearest thing that JSON in UTF-8 can hold."""
  match value:
    case None | bool() | int():
      return value
    case float():
      return value if math.isfinite(value) else None
    case str():
      return value.encode("utf-8", "backslashreplace").decode()
    case bytes():
      return f"{len(value)} bytes"
    case dict():
      return {_plain(str(name)): _plain(entry) for name, entry in value.items()}
    case list() | tuple():
      return [_plain(entry) for entry in value]
  return str(value)


def check_columns(names: Iterable[str], place: Place) -> None:
  """Raises `ValueError` unless a table with columns of these names can give a picture and a caption."""
  for what, wanted in (("picture", _IMAGE_COLUMNS), ("caption", _TEXT_COLUMNS + ("captions",))):
    if not set(wanted) & set(names):
      raise ValueError(f"{place.path} has no {what} column, only {_short(list(names))}: name one of them {' or '.join(wanted)}.")


def plan_csv(place: Place, size: int) -> list[Piece]:
  """Returns the pieces of a CSV or TSV file. `ValueError` if the header names no picture or no caption."""
  with place.open() as file:
    rows = _csv_rows(file, place, 0)
    header, end = next(rows, ([], 0))
    columns = [cell.strip().lower() for cell in header or []]
    check_columns(columns, place)
    if len(set(columns)) < len(columns):
      raise ValueError(f"{place.path} has two columns of one name, {_short(columns)}: rename one of them.")
    count, offsets = 0, []
    for _, row_end in rows:
      if count % size == 0:
        offsets.append(end)
      count, end = count + 1, row_end
  return [(start, stop, {"columns": columns, "offset": offset}) for (start, stop), offset in zip(ranges(count, size), offsets)]


def read_csv(place: Place, start: int, stop: int, options: dict) -> Iterator[Sample]:
  """Yields the samples of rows [start, stop); keys count rows from 1, without the header."""
  with place.open() as file:
    file.seek(options["offset"])
    for number, (cells, _) in zip(range(start, stop), _csv_rows(file, place, options["offset"])):
      yield guarded(f"{place.name}:{number + 1}", _csv_sample, options["columns"], cells, place)


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


def _csv_sample(key: str, columns: list[str], cells: list[str] | None, place: Place) -> Sample:
  if cells is None:
    raise ValueError("The row is not valid CSV: close its quotes, double the quotes inside quotes, or remove it.")
  if len(cells) != len(columns):
    raise ValueError(f"The row has {len(cells)} cells where the header has {len(columns)}: quote cells that hold the separator.")
  record = dict(zip(columns, cells))
  for name in _JSON_COLUMNS:
    if record.get(name):
      try:
        record[name] = json.loads(record[name])
      except ValueError as error:
        raise ValueError(f"The cell `{name}` is not valid JSON ({error}): write a list such as [\"a\", \"b\"].") from error
  return record_sample(key, record, place.near)


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


def read_jsonl(place: Place, start: int, stop: int, options: dict) -> Iterator[Sample]:
  """Yields the samples of records [start, stop); keys name lines, from 1."""
  with place.open() as file:
    file.seek(options["offset"])
    lines = ((number, line) for number, line in enumerate(file, options["line"] + 1) if line.strip())
    for _, (number, line) in zip(range(start, stop), lines):
      yield guarded(f"{place.name}:{number}", _jsonl_sample, line, place)


def _jsonl_sample(key: str, line: bytes, place: Place) -> Sample:
  return record_sample(key, parse_object(line, "The line"), place.near)
