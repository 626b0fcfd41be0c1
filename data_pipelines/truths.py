"""What a reward is told of a row of a batch beside its picture, its *task*: a mapping that JSON can hold.

  prompt      the text that the model was asked to draw, as it was before it became tokens
  category    of the prompt: the truth's own, or else the data set's name
  dataset, sample_id   which record it is
  ...         every field of the record's `attributes`, its *truth*: the text to render, the glyph and its colours ...

The first four are the batch's own, and hide fields of the truth of these names, but for the category. So do the pictures that the runtime adds,
"sources" and "reference".
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def make_task(record: Mapping[str, Any], prompt: str, dataset: str, name: str) -> dict[str, Any]:
  """The task of a row.

  Args: the record, as `data_pipelines.records.open_split` gives it; the prompt; name of the data set; what the record is called in messages.

  Raises:
    ValueError: the record's attributes are no JSON object.
  """
  truth = read_truth(record, name)
  category = truth.get("category")
  return {**truth, "prompt": prompt, "category": category if isinstance(category, str) and category else dataset, "dataset": dataset,
          "sample_id": int(record["sample_id"])}


def read_truth(record: Mapping[str, Any], name: str) -> dict[str, Any]:
  """What a record says of its picture; `ValueError`, which calls the record `name`, where that is no JSON object."""
  try:
    truth = json.loads(record["attributes"])
  except ValueError as error:
    raise ValueError(f"The attributes of {name} are no JSON ({error}): prepare the data set anew.") from error
  if not isinstance(truth, dict):
    raise ValueError(f"The attributes of {name} are {truth!r} and no JSON object: prepare the data set anew.")
  return truth


def pack(tasks: Sequence[Mapping[str, Any]]) -> bytes:
  """Tasks as one text, which a worker process sends as it is."""
  return json.dumps(list(tasks), ensure_ascii=False).encode()


def unpack(text: bytes) -> tuple[dict[str, Any], ...]:
  """The tasks of `pack`."""
  return tuple(json.loads(text))
