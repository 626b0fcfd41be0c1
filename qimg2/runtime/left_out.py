"""What becomes of a stage's records: one line on the console, and the names of those that are in no batch in a file."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from data_pipelines.arrangement import MOST_NAMED
from data_pipelines.loader import Loader, read_records
from qimg2.places import Place, write_file
from qimg2.runtime.config import StageConfig

NAME = "left_out.jsonl"
_TOGETHER = 64  # records that are read at once
_WORDS = {"too_long": "with a caption longer than num_tokens", "no_caption": "without a caption of the wanted languages and kinds",
          "low_stage": "below min_stage", "low_quality": "below min_quality", "cropped": "of which fitting a bucket cuts off more than max_crop",
          "enlarged": "that would be scaled up more than max_enlarge", "no_rejected": "without a rejected picture",
          "rare": "for which no bucket is worth its program"}


def say(stage: StageConfig, loader: Loader, folder: Place) -> None:
  """Prints how many records of a stage's data sets are used, how many are left out and why; writes the names of these, the first `MOST_NAMED` of each
  data set, to left_out.jsonl in the stage's folder: {"dataset", "split", "task", "sample_id", "reason", "key", "captions"}, where "key" is what
  the record's source called it.

  Raises:
    OSError: the file cannot be written.
  """
  usage, path = loader.mixture.usage, folder / NAME
  total, used = (sum(one[name] for one in usage) for name in ("records", "used"))
  reasons = {}
  for one in usage:
    for reason, number in one["left_out"].items():
      reasons[reason] = reasons.get(reason, 0) + number
  if not reasons:
    path.unlink(missing_ok=True)  # of an earlier start
    print(f"Stage {stage.name}: all {total} records are used.", flush=True)
    return
  try:
    rows = [row for d, one in enumerate(usage) for row in _rows(one, loader, d)]
  except OSError as error:  # of a record that training may never read
    logging.warning("What is left out of stage %s cannot be named: %s", stage.name, error)
    rows = []
  write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
  which = f" (the first {MOST_NAMED} of each data set)" if any(sum(one["left_out"].values()) > MOST_NAMED for one in usage) else ""
  mend = "; raise num_tokens, or set too_long='truncate'" if "too_long" in reasons else ""
  print(f"Stage {stage.name}: {used} of {total} records are used, {total - used} are left out: "
        f"{', '.join(f'{number} {_WORDS[reason]}' for reason, number in sorted(reasons.items(), key=lambda pair: -pair[1]))}{mend}. Their names: "
        f"{path}{which}.", flush=True)


def _rows(usage: Mapping[str, Any], loader: Loader, dataset: int) -> Iterator[dict[str, Any]]:
  named = usage["named"]
  for begin in range(0, len(named), _TOGETHER):
    some = named[begin:begin + _TOGETHER]
    for (position, reason), record in zip(some, read_records(loader.mixture.sources[dataset], [position for position, _ in some])):
      yield {"dataset": usage["dataset"], "split": usage["split"], "task": usage["task"],
             "sample_id": int(loader.mixture.sample_ids(dataset, position)), "reason": reason} | _names(record)


def _names(record: dict | Exception) -> dict[str, Any]:
  """What a user knows a record by; why not, where it cannot be read."""
  if isinstance(record, Exception):
    return {"unreadable": " ".join(str(record).split())[:200]}
  try:
    attributes = json.loads(record["attributes"])
  except ValueError:
    attributes = {}
  return {"key": _source_key(attributes) if isinstance(attributes, dict) else None,
          "captions": [text.decode("utf-8", "replace") for text in record["captions"]]}


def _source_key(attributes: dict) -> Any:
  """What the source called a sample. Curation keeps it as `key`, or, where the source has keys of that name or `tags` of its own, in `curation`, with
  an underscore more than any of theirs."""
  is_ours = lambda name, value: name.rstrip("_") == "curation" and isinstance(value, dict) and {"key", "tags"} <= value.keys()
  ours = [name for name, value in attributes.items() if is_ours(name, value)]
  return (attributes[max(ours, key=len)] if ours else attributes).get("key")
