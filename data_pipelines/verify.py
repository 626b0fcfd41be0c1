"""Reads a whole data set back: every file's checksum, and every record against the index."""

import os

import numpy as np
from tqdm import tqdm

from data_pipelines import records
from data_pipelines.cache import open_cache
from data_pipelines.transforms import decode_image


def verify(data_dir: str | os.PathLike, name: str) -> dict[str, int]:
  """Returns how many files and records were read and found to be as written.

  Raises:
    ValueError: a file is missing or has other bytes than were written, or a record does not say what the index says of it; names the first.
  """
  folder = os.path.join(data_dir, name)
  meta = records.read_meta(folder)
  if "checksums" not in meta:
    raise ValueError(f"{folder}/dataset.json holds no checksums: prepare the data set anew.")
  for file, wanted in tqdm(meta["checksums"].items(), desc="files", disable=None, leave=False):
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
      raise ValueError(f"{path} is missing: copy it again, or remove the data set and prepare it anew.")
    if records.checksum(path) != wanted:
      raise ValueError(f"{path} has other bytes than were written (SHA-256 differs): copy it again, or remove the data set and prepare it anew.")
  num = 0
  for split in records.SPLITS:
    if f"index-{split}.npz" in meta["checksums"]:
      num += _verify_split(data_dir, name, split)
  return {"files": len(meta["checksums"]), "records": num}


def _verify_split(data_dir: str | os.PathLike, name: str, split: str) -> int:
  source, index = records.open_split(data_dir, name, split)
  if len(source) != len(index["sample_id"]):
    raise ValueError(f"Split {split!r} of {name!r} has {len(source)} records and {len(index['sample_id'])} lines of index: prepare it anew.")
  if str(index["tokenizer"]) != records.load_tokenizer(data_dir, name).fingerprint:
    raise ValueError(f"The tokenizer of {name!r} is not the one that counted the tokens of split {split!r}: prepare it anew.")
  first = np.concatenate([[0], np.cumsum(index["num_captions"])])
  cached = open_cache(data_dir, name) is not None
  for position in tqdm(range(len(source)), desc=f"{split} records", disable=None, leave=False):
    record, where = source[position], f"record {position} of split {split!r} of {name!r}"
    problem = _difference(record, index, position, slice(first[position], first[position + 1]))
    if problem:
      raise ValueError(f"{where} has another {problem} than the index says: prepare the data set anew.")
    _check_pictures(record, where, cached)
  return len(source)


def _difference(record: dict, index: dict, position: int, captions: slice) -> str:
  """Returns the first field in which a record and its line of the index differ, "" for none."""
  for field in ("height", "width", "quality", "sample_id", "stage", "has_text"):
    if record[field] != index[field][position]:
      return field
  if "has_rejected" in index and bool(record["rejected"] or record["rejected_latents"]) != index["has_rejected"][position]:
    return "rejected picture"
  sizes = index["source_sizes"][position]
  if list(zip(record["source_height"], record["source_width"])) != [tuple(size) for size in sizes[sizes.any(axis=1)]]:
    return "source size"
  if [text.decode() for text in record["languages"]] != index["language_names"][index["caption_language"][captions]].tolist():
    return "caption language"
  if [text.decode() for text in record["kinds"]] != [records.KINDS[kind] for kind in index["caption_kind"][captions]]:
    return "caption kind"
  return "" if len(record["captions"]) == index["num_captions"][position] else "number of captions"


def _check_pictures(record: dict, where: str, cached: bool) -> None:
  pictures = [] if cached else [(record["image"], record["height"], record["width"], where)]
  pictures += [(image, height, width, f"condition image {slot + 1} of {where}") for slot, (image, height, width) in enumerate(
      zip(record["sources"], record["source_height"], record["source_width"]))]
  for data, height, width, name in pictures:
    shape = decode_image(data, name).shape[:2]
    if shape != (height, width):
      raise ValueError(f"{name} is {shape[0]}x{shape[1]} px, and {height}x{width} px were written: prepare the data set anew.")
  if record.get("rejected"):
    decode_image(record["rejected"], f"the rejected picture of {where}")
