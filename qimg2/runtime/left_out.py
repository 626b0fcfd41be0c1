"""What becomes of a stage's records: one line on the console, and the names of those that are in no batch in a file."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.arrangement import MOST_NAMED
from data_pipelines.loader import Loader, read_records
from qimg2.places import Place, write_file
from qimg2.runtime.config import StageConfig

NAME = "left_out.jsonl"
_TOGETHER = 64  # records that are read at once
_WORDS = {"too_long": "with a caption longer than num_tokens", "no_caption": "without a caption of the wanted languages and kinds",
          "low_stage": "below min_stage", "low_quality": "below min_quality", "cropped": "of which fitting a bucket cuts off more than max_crop",
          "enlarged": "that would be scaled up more than max_enlarge", "rare": "for which no bucket is worth its program"}


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
  write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for d, one in enumerate(usage) for row in _rows(one, loader, d)))
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
  key = attributes.get("key") if isinstance(attributes, dict) else None
  return {"key": key, "captions": [text.decode("utf-8", "replace") for text in record["captions"]]}
