"""Data sets on disk: ArrayRecord files written and read through TFDS, without TensorFlow.

A record holds an encoded image and its labels:

  image       bytes          a PNG, JPEG or WebP file
  height      int32          px
  width       int32          px
  captions    list of text   any one describes the picture
  languages   list of text   the language of each caption, such as "en"
  attributes  text           JSON: what a checker needs
  quality     float32        0 to 1; 1 is clean
  sample_id   int64          stable, unique in the data set, below 2^31
  sources     list of bytes  condition images of an editing record, in prompt order; none for text-to-image
  source_height, source_width   list of int32   px

Beside the records each split has `index-<split>.npz`, the columns a loader needs to choose records without opening
them. A data set is built in a hidden folder and renamed when complete, so a folder that is there is whole:

  <out>/<name>/dataset.json, tokenizer.json, index-train.npz, index-validation.npz, <version>/*.array_record
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines import emoji, emoji_pairs, glyph_edits, glyphs
from data_pipelines.tokenizer import PromptTokenizer, train_tokenizer

SPLITS = ("train", "validation")
_VERSION = "1.2.0"
_NO_SOURCES = {"sources": [], "source_height": [], "source_width": []}


@dataclasses.dataclass(frozen=True)
class Source:
  """What a data set is made from.

  `examples(split, num_examples, seed)` gives the records in order, as dicts; `describe()` gives facts for the report;
  `tokenizer_texts(captions)` gives what the tokenizer is trained on, of the distinct training captions.
  """

  examples: Callable[[str, int | None, int], Iterable[dict]]
  vocab_size: int
  describe: Callable[[], dict] = dict
  tokenizer_texts: Callable[[Iterable[str]], Iterable[str]] = iter


def _one_after_the_other(*parts: Callable) -> Callable:
  return lambda split, num_examples, seed: itertools.chain.from_iterable(part(split, num_examples, seed) for part in parts)


SOURCES = {
    "glyphs": Source(_one_after_the_other(glyphs.examples, glyph_edits.examples), vocab_size=1024),
    "emoji": Source(_one_after_the_other(emoji.examples, emoji_pairs.examples), vocab_size=8192, describe=emoji_pairs.describe,
                    tokenizer_texts=emoji.tokenizer_texts),
}


class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Base of the data sets: the features of a record, filled from an iterable of records per split."""

  VERSION = tfds.core.Version(_VERSION)
  # TFDS would look beside this file for lists of downloads; there are none.
  code_path = None

  def __init__(self, examples: dict[str, Iterable[dict]], **kwargs):
    self._examples = examples
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features
    record = features.FeaturesDict({
        "image": features.Scalar(np.object_), "height": np.int32, "width": np.int32, "quality": np.float32,
        "captions": features.Sequence(features.Text()), "languages": features.Sequence(features.Text()),
        "attributes": features.Text(), "sample_id": np.int64,
        "sources": features.Sequence(features.Scalar(np.object_)),
        "source_height": features.Sequence(np.int32), "source_width": features.Sequence(np.int32)})
    # The loader shuffles; written order must equal the order of the index file.
    return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=record, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in self._examples}

  def _generate_examples(self, split: str):
    for position, record in enumerate(self._examples[split]):
      yield position, _NO_SOURCES | record


class Glyphs(Records):
  """Letters, digits and shapes in plain colours on plain paper, with exact captions."""


class Emoji(Records):
  """Noto colour emoji on coloured paper, with the CLDR names and keywords in many languages."""


_BUILDERS = {"glyphs": Glyphs, "emoji": Emoji}


def prepare(dataset: str, out: str, num_examples: int | None = None, seed: int = 0,
            vocab_size: int | None = None) -> dict:
  """Returns the facts of the data set <out>/<dataset>, which is built unless the same one is there already.

  The facts: path, reused, records per split, vocab_size, num_system_tokens, longest_caption_tokens (with the
  template), and what the source adds. `num_examples` counts the training pictures without editing pairs, None for the source's default.
  Another request (or a folder that is not a data set) in the same place is a `ValueError`. Can be interrupted at any
  time: nothing half-built stays.
  """
  if dataset not in SOURCES:
    raise ValueError(f"Unknown data set {dataset!r}: choose one of {', '.join(SOURCES)}.")
  if num_examples is not None and num_examples < 1:
    raise ValueError(f"num_examples={num_examples} must be at least 1.")
  if seed < 0:
    raise ValueError(f"seed={seed} must not be negative.")
  request = {"dataset": dataset, "num_examples": num_examples, "seed": seed, "version": _VERSION,
             "vocab_size": vocab_size or SOURCES[dataset].vocab_size}
  path = os.path.join(out, dataset)
  if not os.path.exists(path):
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dataset}.incomplete.", dir=out) as partial:
      facts = _build(request, partial)
      if _publish(os.path.join(partial, dataset), path):
        return {"path": path, "reused": False} | facts
  return {"path": path, "reused": True} | _matching_facts(path, request)


def _publish(built: str, path: str) -> bool:
  """Moves a complete data set to its place; returns False if another process was faster."""
  try:
    os.rename(built, path)
  except OSError:
    if not os.path.exists(path):
      raise
    return False
  return True


def _matching_facts(path: str, request: dict) -> dict:
  """Returns the facts stored at `path`; `ValueError` unless they answer the same request."""
  stored = _read_meta(path)
  different = [key for key in request if stored["request"].get(key) != request[key]]
  if different:
    key = different[0]
    raise ValueError(f"{path} holds a data set made with {key}={stored['request'].get(key)}, not {key}={request[key]}: "
                     "remove that folder or choose another --out.")
  return stored["facts"]


def _read_meta(path: str) -> dict:
  try:
    with open(os.path.join(path, "dataset.json"), encoding="utf-8") as file:
      return json.load(file)
  except (OSError, json.JSONDecodeError) as error:
    raise ValueError(f"{path} is not a prepared data set (no readable dataset.json): remove that folder or choose "
                     "another place.") from error


def _build(request: dict, partial: str) -> dict:
  """Writes the whole data set to <partial>/<dataset> and returns its facts."""
  name, source = request["dataset"], SOURCES[request["dataset"]]
  folder = os.path.join(partial, name)
  columns = {split: _Columns() for split in SPLITS}
  examples = {
      split: columns[split].watch(source.examples(split, request["num_examples"], request["seed"])) for split in SPLITS}
  # Written as a stream, so that a data set larger than memory can pass.
  _write_records(_BUILDERS[name](examples, data_dir=partial))
  for split in SPLITS:
    columns[split].save(_index_path(folder, split))
  tokenizer = train_tokenizer(source.tokenizer_texts(columns["train"].captions), request["vocab_size"])
  tokenizer.save(os.path.join(folder, "tokenizer.json"))
  counts = {split: len(columns[split]) for split in SPLITS} | {f"{split}_edits": columns[split].num_edits for split in SPLITS}
  facts = counts | source.describe() | _token_facts(tokenizer, columns)
  with open(os.path.join(folder, "dataset.json"), "w", encoding="utf-8") as file:
    json.dump({"request": request, "facts": facts}, file, indent=2)
  return facts


def _token_facts(tokenizer: PromptTokenizer, columns: dict) -> dict:
  captions = set(itertools.chain.from_iterable(columns[split].captions for split in SPLITS))
  around, longest = len(tokenizer.encode("")), 0
  # A caption has no more tokens than bytes, so the walk from the longest down can stop early.
  for num_bytes, caption in sorted(((len(caption.encode()), caption) for caption in captions), reverse=True):
    if num_bytes + around <= longest:
      break
    longest = max(longest, len(tokenizer.encode(caption)))
  return {"vocab_size": tokenizer.vocab_size, "num_system_tokens": tokenizer.num_system_tokens,
          "longest_caption_tokens": longest}


def _write_records(builder: Records) -> None:
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  # TFDS prints what it would download; here nothing is.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare()


class _Columns:
  """The columns of an index, gathered while the records go by."""

  def __init__(self):
    self.captions: set[str] = set()
    self._rows: list[tuple] = []
    self._languages: list[tuple[str, ...]] = []
    self._source_sizes: list[tuple[tuple[int, int], ...]] = []

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def num_edits(self) -> int:
    return sum(map(bool, self._source_sizes))

  def watch(self, records: Iterable[dict]) -> Iterable[dict]:
    for record in records:
      self._rows.append((record["height"], record["width"], record["quality"], record["sample_id"]))
      # Equal tuples are kept once: a few distinct ones serve all records.
      self._languages.append(tuple(sys.intern(language) for language in dict.fromkeys(record["languages"])))
      self._source_sizes.append(tuple(zip(record.get("source_height", ()), record.get("source_width", ()))))
      self.captions.update(record["captions"])
      yield record

  def save(self, path: str) -> None:
    height, width, quality, sample_id = zip(*self._rows)
    names = sorted(set(itertools.chain.from_iterable(self._languages)))
    place = {name: i for i, name in enumerate(names)}
    present = np.zeros((len(self), len(names)), bool)
    for row, languages in enumerate(self._languages):
      present[row, [place[language] for language in languages]] = True
    source_sizes = np.zeros((len(self), max(map(len, self._source_sizes)), 2), np.int32)
    for row, sizes in enumerate(self._source_sizes):
      source_sizes[row, :len(sizes)] = np.array(sizes, np.int32).reshape(-1, 2)
    np.savez(path, source_sizes=source_sizes, height=np.array(height, np.int32), width=np.array(width, np.int32),
             quality=np.array(quality, np.float32), sample_id=np.array(sample_id, np.int64),
             language_names=np.array(names), languages=np.packbits(present, axis=1))


def _index_path(folder: str, split: str) -> str:
  return os.path.join(folder, f"index-{split}.npz")


def has_language(index: dict[str, np.ndarray], wanted: Sequence[str]) -> np.ndarray:
  """Returns for each record whether it has a caption in one of the wanted languages, bool; none wanted means all do."""
  names = index["language_names"].tolist()
  present = np.unpackbits(index["languages"], axis=1, count=len(names)).astype(bool)
  if not wanted:
    return present.any(axis=1)
  return present[:, [names.index(language) for language in wanted if language in names]].any(axis=1)


def open_split(data_dir: str, name: str, split: str) -> tuple[Sequence[dict], dict[str, np.ndarray]]:
  """Returns (records by position, as dicts; the index: height, width, quality, sample_id, languages, source_sizes by position).

  `source_sizes` [n, most sources, 2] int32 holds (height, width) in px of each condition image, and zeros where there is none.
  Texts come as UTF-8 bytes and images as encoded files. `ValueError` if the data set or the split is not there.
  """
  folder = os.path.join(data_dir, name)
  if not os.path.isdir(folder):
    raise ValueError(f"No data set {name!r} in {data_dir}: make it with python -m launch.prepare_data --dataset={name} "
                     f"--out={data_dir}.")
  version = _read_meta(folder)["request"]["version"]
  if not os.path.exists(_index_path(folder, split)):
    raise ValueError(f"Data set {folder} has no split {split!r}: choose one of {', '.join(SPLITS)}.")
  with np.load(_index_path(folder, split)) as file:
    index = {column: file[column] for column in file.files}
  source = tfds.builder_from_directory(os.path.join(folder, version)).as_data_source(split)
  return source, index


def load_tokenizer(data_dir: str, name: str) -> PromptTokenizer:
  """Returns the tokenizer trained on a data set."""
  return PromptTokenizer.load(os.path.join(data_dir, name))
