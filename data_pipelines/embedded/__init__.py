"""The data sets that come with the project: drawn here, from fonts and tables, when they are first asked for."""

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator

from data_pipelines import folders, records
from data_pipelines.embedded import emoji, emoji_pairs, glyph_edits, glyphs
from data_pipelines.tokenizer import PromptTokenizer, train_tokenizer

_RECORDS_PER_SHARD = 8192


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


def prepare(dataset: str, out: str | os.PathLike, num_examples: int | None = None, seed: int = 0, vocab_size: int | None = None) -> dict:
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
  request = {"dataset": dataset, "num_examples": num_examples, "seed": seed, "vocab_size": vocab_size or SOURCES[dataset].vocab_size}
  return make(dataset, request, out, lambda partial: build(dataset, SOURCES[dataset], request, partial))


def make(name: str, request: dict, out: str | os.PathLike, build_in: Callable[[str], dict]) -> dict:
  """Returns the facts of the data set <out>/<name>: of the one that is there, or of what `build_in(folder)` builds as <folder>/<name>.

  Raises:
    ValueError: what is there answers another request.
  """
  path = os.path.join(folders.local_folder(out, "--out"), name)
  if not os.path.exists(path):
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.incomplete.", dir=out) as partial:
      facts = build_in(partial)
      if folders.publish(os.path.join(partial, name), path):
        return {"path": path, "reused": False} | facts
  return {"path": path, "reused": True} | records.matching_facts(path, request)


def build(name: str, source: Source, request: dict, partial: str, tokenizer: PromptTokenizer | None = None) -> dict:
  """Writes the whole data set to <partial>/<name> and returns its facts; its tokenizer is trained on its captions unless it is given."""
  columns, shards = {}, {}
  for split in records.SPLITS:
    columns[split] = records.Columns()
    examples = columns[split].watch(source.examples(split, request["num_examples"], request["seed"]))
    # Written as a stream, so that a data set larger than memory can pass.
    shards[split] = [records.write_shard(os.path.join(partial, f"{split}-{number:05d}"), some) for number, some in enumerate(_groups(examples))]
  tokenizer = tokenizer or train_tokenizer(source.tokenizer_texts(columns["train"].captions), request["vocab_size"])
  index = {split: columns[split].arrays(tokenizer) for split in records.SPLITS}
  return records.finish(os.path.join(partial, name), name, shards, index, tokenizer, request, source.describe())


def _groups(examples: Iterable[dict]) -> Iterator[Iterable[dict]]:
  """Yields the examples in groups of a shard's size, each a stream that must be used up before the next."""
  examples = iter(examples)
  for first in examples:
    yield itertools.chain([first], itertools.islice(examples, _RECORDS_PER_SHARD - 1))
