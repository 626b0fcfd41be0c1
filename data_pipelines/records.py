"""Data sets on disk: ArrayRecord files that TFDS reads, without TensorFlow.

A record holds an encoded image and its labels:

  image       bytes          a PNG, JPEG or WebP file; empty in a latent cache
  height      int32          px
  width       int32          px
  captions    list of text   any one describes the picture
  languages   list of text   the language of each caption, such as "en"
  kinds       list of text   the kind of each caption, see KINDS
  attributes  text           JSON: what a checker needs, what curation found out
  quality     float32        0 to 1; 1 is clean
  stage       int32          last data stage, 1 to 6, whose filters the record passed
  has_text    bool           whether text can be read in the picture
  sample_id   int64          stable, unique in the data set, below 2^31
  sources     list of bytes  condition images of an editing record, in prompt order; none for text-to-image
  source_height, source_width   list of int32   px
  rejected    bytes          of a pair: the picture of the same prompt that is worse than `image`, of its aspect ratio; else empty; none before pairs
  latents, source_latents, rejected_latents, features   what a latent cache holds in place of pixels and encoder states, see data_pipelines.cache

Beside the records each split has `index-<split>.npz`, the columns a loader needs to choose records without opening them. `dataset.json` is
written last and the folder is renamed when complete, so a folder that is there is whole:

  <out>/<name>/dataset.json, tokenizer.json, index-train.npz, index-validation.npz, <version>/<name>-train.array_record-00000-of-00004
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipelines.columns import map_columns, sampled_digest, scratch
from data_pipelines.pieces import pieces
from data_pipelines.shards import Shards
from data_pipelines.tokenizer import PromptTokenizer

SPLITS = ("train", "validation")
# General: objects, context, relations. Text: what is written, and where. Knowledge: background that the picture does not show. Structured:
# entities, attributes and relations of charts and diagrams (Qwen-Image-2.0 report, arXiv 2605.10730, section 2.2).
KINDS = ("general", "text", "knowledge", "structured")
LAST_STAGE = 6
FIXED = ("language_names", "tokenizer")  # columns of an index that have no row for each record or caption
VERSION = "2.0.0"
RENDERED = "rendered"  # section of dataset.json of a data set whose pictures are drawn when they are read
_READ_WHOLE = 2**26  # bytes of an index, up to which it is compared with its checksum when it is opened; of a larger one pages from all over are
_OF_RECORDS = {"height": np.int32, "width": np.int32, "quality": np.float32, "sample_id": np.int64, "stage": np.uint8, "has_text": bool,
               "has_rejected": bool}  # columns of an index with a number for each record
_TOGETHER = 16  # records that are read at once from a file that is copied
_DEFAULTS = {"quality": 1.0, "stage": LAST_STAGE, "has_text": False, "attributes": "{}", "sources": [], "source_height": [], "source_width": [],
             "image": b"", "rejected": b"", "latents": b"", "rejected_latents": b"", "source_latents": [], "features": []}


def _features() -> Any:
  from tensorflow_datasets import features  # where it is used, here and below: its import takes half a second, for which --help need not wait
  blob, texts = features.Scalar(np.object_), features.Sequence(features.Text())
  return features.FeaturesDict({
      "image": blob, "height": np.int32, "width": np.int32, "quality": np.float32, "stage": np.int32, "has_text": np.bool_,
      "captions": texts, "languages": texts, "kinds": texts, "attributes": features.Text(), "sample_id": np.int64,
      "sources": features.Sequence(blob), "source_height": features.Sequence(np.int32), "source_width": features.Sequence(np.int32),
      "rejected": blob, "rejected_latents": blob, "latents": blob, "source_latents": features.Sequence(blob), "features": features.Sequence(blob)})


@dataclasses.dataclass(frozen=True)
class Shard:
  """A written file of records: where it is, how many records, how many bytes of them, and the file's SHA-256."""
  path: str
  num_records: int
  num_bytes: int
  sha256: str


class ShardWriter:
  """Writes records, as dicts, to one ArrayRecord file, which appears whole when `close` is called and not before.

  Fields with a default (all but the size, captions, languages and sample_id) can be left out.
  """

  def __init__(self, path: str | os.PathLike):
    from tensorflow_datasets.core import example_serializer
    self._path, self._features = os.fspath(path), _features()
    self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())
    self._num_records = self._num_bytes = 0
    # One record per chunk: a batch is drawn from anywhere, and nothing is unpacked in vain.
    self._writer = ArrayRecordWriter(f"{self._path}.part", "group_size:1")

  def write(self, record: dict) -> None:
    """Appends a record."""
    example = self._serializer.get_tf_example(self._features.encode_example(complete(record)))
    self._write(example.SerializeToString(deterministic=True))  # else the order of the fields is another in every process

  def append(self, path: str | os.PathLike) -> None:
    """Appends all records of another file, as they are."""
    reader = ArrayRecordReader(os.fspath(path))
    num = reader.num_records()
    for first in range(0, num, _TOGETHER):
      for data in reader.read(list(range(first, min(first + _TOGETHER, num)))):
        self._write(data)
    reader.close()

  def _write(self, data: bytes) -> None:
    self._writer.write(data)
    self._num_records, self._num_bytes = self._num_records + 1, self._num_bytes + len(data)

  def close(self) -> Shard:
    """Finishes the file and describes it."""
    self._writer.close()
    os.replace(f"{self._path}.part", self._path)
    return Shard(self._path, self._num_records, self._num_bytes, checksum(self._path))


def write_shard(path: str | os.PathLike, records: Iterable[dict]) -> Shard:
  """Writes all records to one file, see `ShardWriter`."""
  writer = ShardWriter(path)
  for record in records:
    writer.write(record)
  return writer.close()


def complete(record: dict) -> dict:
  """The record with every field that it leaves out at its default."""
  return _DEFAULTS | {"kinds": ["general"] * len(record["captions"])} | record


def checksum(path: str | os.PathLike) -> str:
  """The SHA-256 of a file, as hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the index -------------------------------------------------------------------------------------


class Columns:
  """The columns of an index, gathered while the records go by."""

  def __init__(self):
    self._rows: list[tuple] = []
    self._source_sizes: list[tuple[tuple[int, int], ...]] = []
    self._captions: list[tuple[str, ...]] = []
    self._languages: list[tuple[str, ...]] = []
    self._kinds: list[tuple[str, ...]] = []
    self._same: dict = {}

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def captions(self) -> dict[str, None]:
    """The distinct captions, in the order of their first use."""
    return dict.fromkeys(itertools.chain.from_iterable(self._captions))

  def watch(self, records: Iterable[dict]) -> Iterator[dict]:
    """Yields the records, and remembers what the index says of them."""
    for record in records:
      yield self.add(record)

  def add(self, record: dict) -> dict:
    """Remembers what the index says of a record, and returns it complete."""
    record = complete(record)
    values = record | {"has_rejected": bool(record["rejected"] or record["rejected_latents"])}
    self._rows.append(tuple(values[name] for name in _OF_RECORDS))
    self._source_sizes.append(tuple(zip(record["source_height"], record["source_width"])))
    # Equal texts and tuples are kept once: many records share them.
    self._captions.append(tuple(self._same.setdefault(text, text) for text in record["captions"]))
    for column, values in ((self._languages, record["languages"]), (self._kinds, record["kinds"])):
      column.append(self._same.setdefault(tuple(values), tuple(values)))
    return record

  def arrays(self, tokenizer: PromptTokenizer) -> dict[str, np.ndarray]:
    """The index, see `open_split`; caption lengths are counted with `tokenizer`."""
    columns = zip(*self._rows) if self._rows else [()] * len(_OF_RECORDS)
    names = sorted(set(itertools.chain.from_iterable(self._languages)))
    place = {name: i for i, name in enumerate(names)}
    flat = lambda column, table, dtype: np.array([table[x] for row in column for x in row], dtype)
    source_sizes = np.zeros((len(self), max(map(len, self._source_sizes), default=0), 2), np.int32)
    for row, sizes in enumerate(self._source_sizes):
      source_sizes[row, :len(sizes)] = np.array(sizes, np.int32).reshape(-1, 2)
    return {
        **{name: np.array(values, dtype) for (name, dtype), values in zip(_OF_RECORDS.items(), columns)}, "source_sizes": source_sizes,
        "num_captions": np.array(list(map(len, self._captions)), np.int32),
        "caption_language": flat(self._languages, place, np.uint16), "language_names": np.array(names, str),
        "caption_kind": flat(self._kinds, {kind: i for i, kind in enumerate(KINDS)}, np.uint8),
        "caption_tokens": self._count_tokens(tokenizer), "tokenizer": np.array(tokenizer.fingerprint)}

  def _count_tokens(self, tokenizer: PromptTokenizer) -> np.ndarray:
    counts = {}
    for edit in (False, True):
      texts = dict.fromkeys(itertools.chain.from_iterable(
          captions for captions, sizes in zip(self._captions, self._source_sizes) if bool(sizes) == edit))
      counts |= zip(zip(texts, itertools.repeat(edit)), tokenizer.count(list(texts), edit).tolist())
    return np.array([counts[text, bool(sizes)] for captions, sizes in zip(self._captions, self._source_sizes) for text in captions], np.int32)


def join_indices(parts: Callable[[], Iterable[dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
  """One index of the records of all parts, in their order.

  `parts` gives them, at least one. It is called twice, and one part at a time is looked at: what is joined is in temporary files where it is large,
  so memory does not grow with the records.

  Raises:
    OSError: there is no room for it.
  """
  names, most, lengths = set(), 0, collections.Counter()
  for part in parts():
    names.update(part["language_names"].tolist())
    most = max(most, part["source_sizes"].shape[1])
    lengths.update({name: len(column) for name, column in part.items() if name not in FIXED})
  joined, filled, place = {}, collections.Counter(), {name: i for i, name in enumerate(sorted(names))}
  for part in parts():
    table = np.array([place[name] for name in part["language_names"].tolist()], np.uint16)
    languages = part["caption_language"]
    padded = np.pad(part["source_sizes"], ((0, 0), (0, most - part["source_sizes"].shape[1]), (0, 0)))
    changed = {"caption_language": table[languages] if len(table) else languages, "source_sizes": padded}
    for name in lengths:
      values = changed.get(name, part[name])
      if name not in joined:
        joined[name] = scratch(lengths[name] * math.prod(values.shape[1:]), values.dtype).reshape(lengths[name], *values.shape[1:])
      joined[name][filled[name]:filled[name] + len(values)] = values
      filled[name] += len(values)
  return joined | {"language_names": np.array(sorted(names), str), "tokenizer": part["tokenizer"]}


# ---- a data set ------------------------------------------------------------------------------------


def finish(folder: str | os.PathLike, name: str, shards: dict[str, Sequence[Shard]], index: dict[str, dict[str, np.ndarray]],
           tokenizer: PromptTokenizer, request: dict, facts: dict, move: Callable[[str, str], None] = os.replace, **extra) -> dict:
  """Makes `folder` a data set out of written shards, which are moved there, and returns its facts.

  Args:
    folder: of the data set; its parent is on the same file system as the shards.
    name: of the data set, the beginning of its file names.
    shards, index: per split, in the order of the records. Empty shards are left out.
    tokenizer: the one that counted the captions' tokens.
    request: what was asked for, plain JSON; the same request finds the data set again.
    facts: figures about it, plain JSON; counts and token facts are added.
    move: puts a shard in its place.
    extra: further sections of dataset.json.
  """
  import tensorflow_datasets as tfds
  folder, splits, checksums, pages = pathlib.Path(folder), [], {}, {}
  (folder / VERSION).mkdir(parents=True, exist_ok=True)
  for split in SPLITS:
    template = tfds.core.ShardedFileTemplate(dataset_name=name, split=split, filetype_suffix="array_record", data_dir=folder / VERSION)
    filled = [shard for shard in shards[split] if shard.num_records]
    for number, shard in enumerate(filled):
      place = folder / VERSION / f"{name}-{split}.array_record-{number:05d}-of-{len(filled):05d}"
      move(shard.path, os.fspath(place))
      checksums[f"{VERSION}/{place.name}"] = shard.sha256
    if filled:
      lengths, num_bytes = [shard.num_records for shard in filled], sum(shard.num_bytes for shard in filled)
      splits.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template))
    if len(index[split]["height"]):  # records that are drawn when they are read are in no file
      np.savez(index_path(folder, split), **index[split])
      checksums[f"index-{split}.npz"], pages[f"index-{split}.npz"] = (of(index_path(folder, split)) for of in (checksum, sampled_digest))
  if splits:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloads; here are none
      tfds.folder_dataset.write_metadata(data_dir=folder / VERSION, features=_features(), split_infos=splits, version=VERSION, check_data=False,
                                         description=f"Records of {name}.", disable_shuffling=True)
  tokenizer.save(folder / "tokenizer.json")
  for file in ("tokenizer.json", *((f"{VERSION}/dataset_info.json", f"{VERSION}/features.json") if splits else ())):
    checksums[file] = checksum(folder / file)
  facts = _counts(index) | facts | _token_facts(tokenizer, index)
  text = json.dumps({"request": request | {"version": VERSION}, "facts": facts, "checksums": checksums, "pages": pages} | extra, indent=2)
  (folder / "dataset.json").write_text(text, encoding="utf-8")
  return facts


def _counts(index: dict) -> dict:
  nums = {split: len(index[split]["height"]) for split in SPLITS}
  edits = lambda split: sum(int(index[split]["source_sizes"][piece].any((1, 2)).sum()) for piece in pieces(nums[split]))
  pairs = {f"{split}_pairs": sum(int(index[split]["has_rejected"][piece].sum()) for piece in pieces(nums[split])) for split in SPLITS}
  return nums | {f"{split}_edits": edits(split) for split in SPLITS} | (pairs if any(pairs.values()) else {})


def _token_facts(tokenizer: PromptTokenizer, index: dict) -> dict:
  longest = max(int(index[split]["caption_tokens"].max(initial=0)) for split in SPLITS)
  return {"vocab_size": tokenizer.vocab_size, "num_system_tokens": tokenizer.num_system_tokens, "longest_caption_tokens": longest}


def read_meta(folder: str | os.PathLike) -> dict:
  """The parsed dataset.json of a data set; `ValueError` if there is none."""
  try:
    with open(os.path.join(folder, "dataset.json"), encoding="utf-8") as file:
      meta = json.load(file)
    return meta | {key: meta[key] for key in ("request", "facts")}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{folder} is not a prepared data set (no readable dataset.json): remove that folder or choose "
                     "another place.") from error


def matching_facts(folder: str | os.PathLike, request: dict) -> dict:
  """The facts of the data set in `folder`; `ValueError` unless it answers the same request."""
  stored, request = read_meta(folder), json.loads(json.dumps(request | {"version": VERSION}))
  key = next((key for key in request if stored["request"].get(key) != request[key]), None)
  if key is not None:
    raise ValueError(f"{folder} holds a data set made with {key}={stored['request'].get(key)}, not {key}={request[key]}: "
                     "remove that folder or choose another --out.")
  return stored["facts"]


def index_path(folder: str | os.PathLike, split: str) -> str:
  """Where the index of a split of the data set in a folder is."""
  return os.path.join(folder, f"index-{split}.npz")


def list_splits(data_dir: str | os.PathLike, name: str) -> list[str]:
  """The splits of a data set that hold records."""
  return [split for split in SPLITS if os.path.exists(index_path(os.path.join(data_dir, name), split))]


def open_split(data_dir: str | os.PathLike, name: str, split: str) -> tuple[Sequence[dict], dict[str, np.ndarray]]:
  """Returns (records by position, as dicts; the index by position).

  The index: height, width, quality, sample_id, stage, has_text, has_rejected (none before pairs); source_sizes [n, most sources, 2] int32, (height,
  width) in px of each condition image and zeros where there is none; num_captions, and for all captions one after the other caption_language (a
  place in language_names), caption_kind (a place in KINDS) and caption_tokens, the length of the whole prompt without image slots by the tokenizer
  whose fingerprint is `tokenizer`. Texts come as UTF-8 bytes and images as encoded files. `ValueError` if the data set or the split is not there.
  """
  folder = os.path.join(data_dir, name)
  if not os.path.isdir(folder):
    raise ValueError(f"No data set {name!r} in {data_dir}: make it with python -m launch.prepare_data, --dataset={name} for an embedded one "
                     f"or --source=... --name={name} for your own, and --out={data_dir}.")
  version = (meta := read_meta(folder))["request"]["version"]
  if version != VERSION:
    raise ValueError(f"The data set {folder} has the format {version}, and this program reads {VERSION}: remove that folder and prepare it anew.")
  if not os.path.exists(index_path(folder, split)):
    raise ValueError(f"Data set {folder} has no split {split!r}: it has {', '.join(list_splits(data_dir, name)) or 'none'}.")
  index = map_columns(index_path(folder, split))
  _check_lengths(index, index_path(folder, split))
  _check_content(index_path(folder, split), meta)
  if RENDERED in meta:
    from data_pipelines.text_rendering.stored import open_source
    return open_source(folder, split, meta, len(index["height"])), index
  import tensorflow_datasets as tfds
  builder = tfds.builder_from_directory(os.path.join(folder, version))
  source, files = builder.as_data_source(split), builder.info.splits[split]
  source.data_source = Shards(files.filepaths, files.shard_lengths)  # in place of the one that keeps all files open
  return source, index


def _check_lengths(index: dict[str, np.ndarray], path: str) -> None:
  """Raises `ValueError` unless the columns of an index that is mapped go together, so that no row is looked for behind the end of its file."""
  of_captions = ("caption_language", "caption_kind", "caption_tokens")
  for names, what in (([name for name in index if name not in (*of_captions, *FIXED)], "records"), (of_captions, "captions")):
    lengths = {name: len(index[name]) for name in names}
    if len(set(lengths.values())) > 1:
      short = min(lengths, key=lengths.get)
      raise ValueError(f"{path} has the column {short} of {lengths[short]} {what}, and others of {max(lengths.values())}: copy it again, or remove "
                       "the data set and prepare it anew.")


def _check_content(path: str, meta: dict) -> None:
  """Raises `ValueError` where an index is another than dataset.json was written with, as far as that says."""
  kind, of = ("checksums", checksum) if os.path.getsize(path) <= _READ_WHOLE else ("pages", sampled_digest)
  wanted = meta.get(kind, {}).get(os.path.basename(path))
  if wanted is not None and of(path) != wanted:
    raise ValueError(f"{path} is not the index that dataset.json beside it was written with: copy both again, or remove the data set and prepare it "
                     "anew.")


def load_tokenizer(data_dir: str | os.PathLike, name: str) -> PromptTokenizer:
  """Returns the tokenizer of a data set."""
  return PromptTokenizer.load(os.path.join(data_dir, name))
