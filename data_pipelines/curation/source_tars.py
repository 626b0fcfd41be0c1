"""Containers as sources: files that hold the pictures themselves (WebDataset tars, Parquet, TFDS data sets in ArrayRecord files).

As in source_tables, a planner gives (start, stop, options) of each unit of work, and a reader yields the samples [start, stop).
"""

import dataclasses
import functools
import itertools
import json
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from data_pipelines.curation.reading import Reading
from data_pipelines.curation.sample import Sample
from data_pipelines.curation.source_places import LeftOut, Place, full_location, normal, open_location
from data_pipelines.curation.source_records import (
  IMAGES,
  PICTURES_OF_PAIRS,
  guarded,
  in_prompt_order,
  parse_object,
  parse_text,
  record_sample,
)
from data_pipelines.curation.source_tables import Piece, Rows, check_columns, ranges
from data_pipelines.transforms import encode_png

# What Pillow reads and people store pictures in.
IMAGE_EXTENSIONS = frozenset("png apng jpg jpeg jpe jfif webp gif bmp tif tiff ppm pgm pbm pnm avif jp2 tga ico qoi".split())
_SOURCE_MEMBER = re.compile(r"(?:source|control)_?([0-9]*)\.([^.]+)")
_REJECTED_MEMBER = re.compile(r"rejected\.([^.]+)")
_CONTROL_FOLDER = re.compile(r"(.*/|)control(?:_?[0-9]+)?")
TEXT_EXTENSIONS = frozenset(("txt", "caption"))
_ROWS_PER_BATCH = 16
# Numbers in an array that is kept as an attribute; masks and the like are larger.
_LARGEST_ATTRIBUTE = 256
_TAR_BLOCK = 512
# What may follow the end of a tar is padding; this much of it is looked at.
_TAR_PADDING = 1 << 20


def plan_tar(place: Place, size: int, left_out: LeftOut) -> list[Piece]:
  """Returns the pieces of a tar whose members are grouped by their names up to the first dot, as WebDataset does; counts the members that are
  no part of a sample.

  A tar that is cut short or damaged counts its whole groups and one more, for what is lost. `ValueError` if it holds no member.
  """
  with place.open() as file:
    seen, offsets, repeated = set(), [], []
    for number, (offset, group) in enumerate(_groups(file, place)):
      offsets.append(offset)
      key = _tar_key(group[0]) if group else None
      if key in seen:
        repeated.append(number)
      seen.add(key)
      for name in _Parts.of(group).unread(group) if group else ():
        left_out.add("members of tars that are neither pictures nor captions", f"{place.name}:{name}")
  _check_no_control_folders(place, {posixpath.dirname(key) for key in seen if key})
  return [(start, stop, {"offset": offsets[start], "repeated": [number for number in repeated if start <= number < stop]})
          for start, stop in ranges(len(offsets), size)]


def _check_no_control_folders(place: Place, folders: set[str]) -> None:
  """Raises `ValueError` for a tar whose edits have their condition images in folders of their own: they do not lie beside their pictures."""
  for folder in sorted(folders):
    match = _CONTROL_FOLDER.fullmatch(folder)
    if match and f"{match[1]}target" in folders:
      raise ValueError(f"{place.path} has the condition images of {match[1]}target in a folder of their own, {folder}: unpack it and give the "
                       "folder, or store them beside their pictures as KEY.source1.png.")


def read_tar(place: Place, start: int, stop: int, options: dict) -> Iterator[Sample]:
  """Yields the samples of groups [start, stop); keys hold the name of the group."""
  with place.open() as file:
    file.seek(options["offset"])
    for number, (_, group) in zip(range(start, stop), _groups(file, place)):
      if group is None:
        yield Sample(f"{place.name}:{number}:end", error=f"{place.name} is cut short or damaged after {number} samples: replace it.")
      elif number in options["repeated"]:
        yield Sample(f"{place.name}:{_tar_key(group[0])}@{number}",
                     error=f"The members of {_tar_key(group[0])!r} are not side by side: write the tar again, sorted by name.")
      else:
        yield guarded(f"{place.name}:{_tar_key(group[0])}", _tar_sample, file, group, place.reading)


def _groups(file: BinaryIO, place: Place) -> Iterator[tuple[int, list[tarfile.TarInfo] | None]]:
  """Yields (where it begins, its members) of each sample from the file's position on; the last has None if the end of the tar is missing."""
  begin = file.tell()
  try:
    tar = tarfile.open(fileobj=file, mode="r:")
  except tarfile.TarError as error:
    raise ValueError(f"{place.path} is not a tar file ({error}): replace it or leave it out.") from error
  group: list[tarfile.TarInfo] = []
  for member in _members(tar):
    if group and normal(_tar_key(member)) != normal(_tar_key(group[0])):
      yield group[0].offset, group
      group = []
    group.append(member)
  # The last group of a cut tar may lack members, and an edit without its sources would pass for another task.
  if not _ends_well(file, tar.offset):
    yield group[0].offset if group else begin, None
  elif group:
    yield group[0].offset, group


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
  """Yields the files in a tar up to its end or to the first damage."""
  while True:
    try:
      member = tar.next()
    except (tarfile.TarError, ValueError, EOFError):
      return
    # Otherwise every member of a large tar would stay in memory.
    tar.members = []
    if member is None:
      return
    if member.isfile() and not posixpath.basename(member.name).startswith("."):
      yield member


def _ends_well(file: BinaryIO, offset: int) -> bool:
  """Whether a tar has its end mark at `offset`, with nothing behind it."""
  file.seek(offset)
  rest = file.read(_TAR_PADDING)
  return len(rest) >= _TAR_BLOCK and not rest.strip(b"\0")


def _tar_key(member: tarfile.TarInfo) -> str:
  folder, base = posixpath.split(posixpath.normpath(member.name))
  return posixpath.join(folder, base.split(".")[0])


@dataclasses.dataclass(frozen=True)
class _Parts:
  """What the members of a group are: places in it. Sources come with their numbers; `rejected` are those of rejected pictures."""
  images: list[int]
  texts: list[int]
  objects: list[int]
  classes: list[int]
  sources: list[tuple[str, int]]
  rejected: list[int]

  @classmethod
  def of(cls, group: Sequence[tarfile.TarInfo]) -> "_Parts":
    """Tells them by their suffixes, what follows the first dot: KEY.jpg is the picture, or where there is none the only KEY.word.jpg."""
    suffixes = [posixpath.basename(member.name).partition(".")[2].lower() for member in group]
    matches = [(place, _SOURCE_MEMBER.fullmatch(suffix)) for place, suffix in enumerate(suffixes)]
    sources = {place: match[1] for place, match in matches if match and match[2] in IMAGE_EXTENSIONS}
    worse = [(place, _REJECTED_MEMBER.fullmatch(suffix)) for place, suffix in enumerate(suffixes)]
    rejected = [place for place, match in worse if match and match[1] in IMAGE_EXTENSIONS]

    def named(kinds: Collection[str]) -> list[int]:
      exact = [place for place, suffix in enumerate(suffixes) if suffix in kinds]
      longer = [place for place, suffix in enumerate(suffixes) if suffix.rpartition(".")[2] in kinds and place not in (*sources, *rejected)]
      return exact if exact or len(longer) != 1 else longer
    numbered = [(number, place) for place, number in sources.items()]
    return cls(named(IMAGE_EXTENSIONS), named(TEXT_EXTENSIONS), named(("json",)), named(("cls",)), numbered, rejected)

  def unread(self, group: Sequence[tarfile.TarInfo]) -> list[str]:
    """Returns the names of the members that are none of these."""
    read = {*self.images, *self.texts, *self.objects, *self.classes, *(place for _, place in self.sources), *self.rejected}
    return [member.name for place, member in enumerate(group) if place not in read]


def _tar_sample(key: str, file: BinaryIO, group: list[tarfile.TarInfo], reading: Reading) -> Sample:
  parts, record, texts = _Parts.of(group), {}, []
  if len(parts.images) > 1:
    raise ValueError(f"There are two pictures of one name, the second {group[parts.images[1]].name!r}: give them different names.")
  if not parts.images:
    raise ValueError(f"The tar has no picture beside {group[0].name!r}: add it under the same name up to the first dot, such as KEY.jpg with "
                     "KEY.txt, or remove that member.")

  def data(place: int) -> bytes:
    file.seek(group[place].offset_data)
    return file.read(group[place].size)
  for place in parts.objects:
    record |= parse_object(data(place), group[place].name)
  for place in parts.texts:
    texts += reading.texts(parse_text(data(place), group[place].name), group[place].name)
  for place in parts.classes:
    record.setdefault("cls", data(place).decode("utf-8", "replace").strip())
  if len(parts.rejected) > 1:
    raise ValueError(f"There are two rejected pictures, the second {group[parts.rejected[1]].name!r}: remove one of them.")
  sources = in_prompt_order((number, data(place)) for number, place in parts.sources)
  rejected = data(parts.rejected[0]) if parts.rejected else b""
  return record_sample(key, record, _not_here, reading, data(parts.images[0]), f"{posixpath.basename(_tar_key(group[0]))}.", sources, texts, rejected)


def _not_here(name: str) -> bytes:
  raise ValueError(f"The path {name[:300]!r} cannot be followed in a tar: store the condition image as KEY.source1.png.")


def plan_parquet(place: Place, size: int) -> list[Piece]:
  """Returns the pieces of a Parquet file. `ValueError` if it cannot be opened, or has no picture or no caption column."""
  with place.open() as file:
    try:
      parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
      raise ValueError(f"{place.path} is not a readable Parquet file ({error}): replace it or leave it out.") from error
    check_columns(parquet.schema_arrow.names, place)
    return [(start, stop, {}) for start, stop in ranges(parquet.metadata.num_rows, size)]


def names_pictures(place: Place) -> bool:
  """Whether a Parquet file names its pictures by paths, and does not hold them: whether their column has texts."""
  with place.open() as file:
    schema = pq.ParquetFile(file).schema_arrow
  names = [name for name in (*IMAGES, *PICTURES_OF_PAIRS) if name in schema.names]
  return bool(names) and (pa.types.is_string(schema.field(names[0]).type) or pa.types.is_large_string(schema.field(names[0]).type))


def read_parquet(place: Place, start: int, stop: int, options: dict) -> Rows:
  """Yields the rows [start, stop), from the row groups that hold them; keys count rows from 1."""
  del options
  with place.open() as file:
    parquet, first = pq.ParquetFile(file), 0
    for group in range(parquet.num_row_groups):
      end = first + parquet.metadata.row_group(group).num_rows
      wanted = range(max(start, first), min(stop, end))
      rows = _group_rows(parquet, group, wanted.start - first) if wanted else iter(())
      for number in wanted:
        yield f"{place.name}:{number + 1}", functools.partial(_parquet_record, next(rows, None))
      first = end


def _group_rows(parquet: pq.ParquetFile, group: int, skip: int) -> Iterator[pa.RecordBatch]:
  """Yields batches of one row each, from row `skip` of a row group on; ends early where the file is damaged."""
  try:
    for batch in parquet.iter_batches(_ROWS_PER_BATCH, row_groups=[group]):
      for row in range(skip, batch.num_rows):
        yield batch.slice(row, 1)
      skip = max(0, skip - batch.num_rows)
  except (pa.ArrowException, OSError) as error:
    # Arrow reports damaged pages as an OSError without a number; one with a number comes from the disk or the network.
    if getattr(error, "errno", None) or isinstance(error, (TimeoutError, ConnectionError)):
      raise


def _parquet_record(row: pa.RecordBatch | None) -> dict[str, Any]:
  if row is None:
    raise ValueError("The row group is damaged here: replace the Parquet file.")
  try:
    return {name: _cell(row.column(name)[0]) for name in row.schema.names}
  except UnicodeDecodeError as error:
    raise ValueError("A text of the row is not UTF-8: write the column again in that encoding.") from error


def _cell(scalar: pa.Scalar) -> Any:
  # Times of less than a microsecond have no Python value.
  return (scalar.cast(pa.string()) if pa.types.is_temporal(scalar.type) else scalar).as_py()


def find_tfds(name: str) -> tuple[str, str]:
  """Returns (folder, split) of "NAME[/config][:split]" or "FOLDER[:split]", a data set that TFDS has prepared; the split is train by default.

  `ValueError` if it is not there, has no feature `image`, no such split, or is not in ArrayRecord files.
  """
  match = re.fullmatch(r"(.+?)(?::([A-Za-z_][^/:\[]*(?:\[.*\])?))?", name)
  if not match:
    raise ValueError(f"tfds:{name} names no data set: write tfds:NAME:split or tfds:FOLDER:split.")
  folder, split = _dataset_folder(match[1]), match[2] or "train"
  _open_tfds(folder, split)
  return folder, split


def _dataset_folder(place: str) -> str:
  """The folder with dataset_info.json: `place` itself, its only version, or the prepared data set of that name."""
  fs, path = open_location(place)
  if not fs.isdir(path):
    try:
      return str(read_only_builder.builder_from_files(place).data_path)
    except ValueError as error:
      raise ValueError(f"There is no prepared data set {place!r}, neither a folder nor below {tfds.core.constants.DATA_DIR}: "
                       "prepare it with TFDS or name its folder.") from error
  if not fs.exists(posixpath.join(path, "dataset_info.json")):
    versions = sorted(posixpath.basename(posixpath.dirname(found)) for found in fs.glob(posixpath.join(path, "*", "dataset_info.json")))
    if len(versions) != 1:
      raise ValueError(f"{place} has no dataset_info.json, and of its folders {len(versions)} have one {versions}: name the folder of one version.")
    path = posixpath.join(path, versions[0])
  return full_location(fs, path)


def _open_tfds(folder: str, split: str) -> tuple[tfds.core.DatasetInfo, Sequence[dict]]:
  """Returns (facts, examples by position). Encoded images stay as they are."""
  builder = tfds.builder_from_directory(folder)
  features, formats = builder.info.features, [form.value for form in builder.info.available_file_formats()]
  if "array_record" not in formats:
    raise ValueError(f"{folder} is stored as {' and '.join(formats)}, which cannot be read by position without TensorFlow: "
                     "convert it with tfds convert_format --out_file_format=array_record.")
  if not isinstance(features, tfds.features.FeaturesDict) or "image" not in features:
    raise ValueError(f"{folder} has no feature `image`, only {list(features)}: choose another data set.")
  decoders = {"image": tfds.decode.SkipDecoding()} if isinstance(features["image"], tfds.features.Image) else None
  try:
    return builder.info, builder.as_data_source(split, decoders=decoders, file_format="array_record")
  except ValueError as error:
    raise ValueError(f"{folder} has no split {split!r}: choose one of {', '.join(builder.info.splits)}.") from error


def plan_tfds(place: Place, size: int, split: str) -> list[Piece]:
  """Returns the pieces of a split of the prepared data set in the folder `place`."""
  return [(start, stop, {"split": split}) for start, stop in ranges(len(_open_tfds(full_location(place.fs, place.path), split)[1]), size)]


def read_tfds(place: Place, start: int, stop: int, options: dict) -> Iterator[Sample]:
  """Yields the samples of positions [start, stop) of the split; keys count from 0, as TFDS does."""
  info, examples = _open_tfds(full_location(place.fs, place.path), options["split"])
  for number in range(start, stop):
    yield guarded(f"{info.full_name}:{options['split']}:{number}", _tfds_sample, examples, number, info.features, place.reading)


def _tfds_sample(key: str, examples: Sequence[dict], number: int, features: tfds.features.FeaturesDict, reading: Reading) -> Sample:
  example = dict(examples[number])
  image, sources = _encoded(example.pop("image")), [_encoded(data) for data in example.pop("sources", ())]
  record = {name: _python(value) for name, value in example.items()}
  is_class = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
  if is_class and not {"caption", "captions", "text"} & set(record):
    record["caption"] = features["label"].int2str(record["label"])
  texts = record.get("captions")
  # A sequence of structs comes as a struct of lists; the data sets of this project keep the languages beside the texts.
  texts = texts.get("text") if isinstance(texts, dict) else texts
  if texts is not None:
    languages = record.pop("languages", [])
    record["captions"] = [{"text": text, "language": language} for text, language in itertools.zip_longest(texts, languages[:len(texts)])]
  if isinstance(record.get("attributes"), str):
    record["attributes"] = json.loads(record["attributes"] or "{}")
  return record_sample(key, record, _not_here, reading, image, sources=sources)


def _encoded(value: Any) -> bytes:
  """An encoded image: bytes as they are, a uint8 array H W, H W 1 or H W 3 as PNG."""
  if isinstance(value, bytes):
    return value
  value = np.asarray(value)
  if value.ndim == 3 and value.shape[2] == 1:
    value = value[:, :, 0]
  if value.dtype != np.uint8 or value.ndim not in (2, 3) or value.ndim == 3 and value.shape[2] not in (3, 4):
    raise ValueError(f"The picture is an array of {value.dtype} {value.shape} instead of uint8 H W 3: convert it.")
  return encode_png(value)


def _python(value: Any) -> Any:
  """The value without NumPy and with texts for bytes; of a large array only its type and shape."""
  match value:
    case np.ndarray() if value.dtype != object and value.size > _LARGEST_ATTRIBUTE:
      return f"{value.dtype} {list(value.shape)}"
    case np.ndarray() | np.generic():
      return _python(value.tolist())
    case bytes():
      return value.decode("utf-8", "surrogateescape")
    case dict():
      return {name: _python(entry) for name, entry in value.items()}
    case list() | tuple():
      return [_python(entry) for entry in value]
  return value
