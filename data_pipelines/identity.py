"""What a data set is, apart from its name and its place, so that one that was made anew under an old name is noticed.

dataset.json has the checksum of every file that was written. The identity is made of those of the records and of the tokenizer: a copy has the same
one wherever it lies, and so has what is prepared again from the same source with the same config. No record is read.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from data_pipelines.records import RENDERED, SPLITS, checksum, read_meta

_TOKENIZER, _TOKENIZER_FILE, _FONTS = "tokenizer", "tokenizer.json", "fonts"
_WORDS = {"train": "other training records", "validation": "other held-out records", _TOKENIZER: "another tokenizer", _FONTS: "other fonts"}


def identify(data_dir: str | os.PathLike, name: str) -> dict[str, Any]:
  """Returns what identifies a data set, as plain JSON: of each split the number of records and 16 hexadecimal digits, and those of the tokenizer.

  Raises:
    ValueError: it is no prepared data set.
  """
  folder = os.path.join(data_dir, name)
  meta = read_meta(folder)
  sums = meta.get("checksums") or {"": checksum(os.path.join(folder, "dataset.json"))}  # an earlier version wrote none

  rendered = dict(meta.get(RENDERED, {}))  # pictures that are drawn when they are read have no file: their settings stand for them
  fonts = {_FONTS: {"digest": rendered.pop(_FONTS)}} if rendered else {}

  def digest(part: str) -> str:
    own = [sums[file] for file in sorted(sums) if part in file or not file] + [rendered] * bool(rendered and part != _TOKENIZER_FILE)
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]

  splits = {split: {"records": meta["facts"].get(split, 0), "digest": digest(f"-{split}.array_record-")} for split in SPLITS}
  return splits | {_TOKENIZER: {"digest": digest(_TOKENIZER_FILE)}} | fonts


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """Returns in words what a data set has that it had not, given what `identify` said of it before and says now; "" for nothing."""
  other = [part for part in now if before.get(part) != now[part]]
  counts = lambda part: f" ({before[part]['records']} then, {now[part]['records']} now)" if "records" in before.get(part, {}) else ""
  return " and ".join(_WORDS[part] + counts(part) for part in other)


def differences_from_cached(data_dir: str | os.PathLike, request: Mapping[str, Any]) -> str:
  """Returns in words what the data set that a latent cache was made of has that it had not then; "" for nothing, or where it is gone: the cache
  holds all that training reads. `request` is that of the cache's dataset.json."""
  folder = os.path.join(data_dir, request["dataset"])
  if not os.path.isdir(folder):
    return ""
  if "data" in request:
    return differences(request["data"], identify(data_dir, request["dataset"]))
  # caches of earlier versions
  return "" if request["dataset_sha256"] == checksum(os.path.join(folder, "dataset.json")) else "another dataset.json"
