"""A stage that goes on with other weights, or other data, than it began with: what its checkpoints say of both is compared with what is there now."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from qimg2.places import Place
from qimg2.training.stage import Stage

ORDER = 2  # how batches follow from a stage's description; checkpoints that do not say it have 1
# Of a stage's description:
ORDER_KEYS = ("order", "seed", "mixture", "resolutions", "max_crop", "min_bucket_records", "max_programs", "num_tokens", "prompt_classes",
              "batches")


def saved_description(folder: Place) -> dict[str, Any]:
  """What a checkpoint, the folder of a step, says of its stage, see `qimg2.training.stage.Stage`; {} where it is of an earlier version. No weight is
  read.

  Raises:
    ValueError: it is not there, or no JSON.
  """
  try:
    return json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8")).get("stage", {})
  except (OSError, ValueError) as error:
    raise ValueError(f"The checkpoint {folder} is damaged ({' '.join(str(error).split())}): put back a copy, or remove it, and training goes on from "
                     "the one before it.") from error


def check_frozen(name: str, now: Mapping[str, Any], saved: Mapping[str, Any], may_change: bool = False) -> None:
  """Raises a `ValueError` where a stage reads something else at each start than it began with, see `qimg2.training.stage.Stage.description`.

  Args: name of the stage; what its description says now; what a checkpoint of it says; whether the log says it, and nothing is raised.
  """
  steps, contents = now.get("frozen_steps", {}), now.get("contents", {})
  changes = [(f"{role} of step {step} of {folder}, which has step {steps[role][1]} now", "put that checkpoint back and move newer ones away")
             for role, (folder, step) in saved.get("frozen_steps", {}).items()
             if role in steps and steps[role][0] == folder and steps[role][1] != step]
  changes += [(f"another {what}: {contents[what][0]} does not hold what {'it' if contents[what][0] == place else place} held when the stage began",
               "put that back") for what, (place, digest) in saved.get("contents", {}).items() if what in contents and contents[what][1] != digest]
  if changes and may_change:
    logging.warning("Stage %s goes on all the same, but was trained with %s.", name, "; and with ".join(change for change, _ in changes))
  elif changes:
    change, mend = changes[0]
    raise ValueError(f"Stage {name} was trained with {change}: {mend}, begin the stage anew with a copy that stays as it is, or take what is there "
                     "with --allow_config_change.")


def warn_of_another_order(stage: Stage, step: int, saved: Mapping[str, Any]) -> None:
  """Says in the log, which is absl's where a launcher started the run, that batches from here on are not those that the stage began with."""
  now, saved = json.loads(json.dumps(dict(stage.description))), {"order": 1, **saved}
  both = [key for key in ORDER_KEYS if key in saved and key in now]
  changes = [text for key in both for text in differences(saved[key], now[key], key)]
  if changes:
    logging.warning("Stage %s goes on at batch %d with another mixture: %s: from here on the order is that of the new mixture.", stage.name, step,
                    "; ".join(changes))


def differences(old: Any, new: Any, path: str, free: Callable[[str], Any] = lambda path: False) -> Iterator[str]:
  """The places where two JSON values differ, as readable strings that begin with `path`; where `free` is true of a place, it may."""
  if free(path):
    return
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(set(old) | set(new)):
      yield from differences(old.get(key), new.get(key), f"{path}.{key}", free)
  elif isinstance(old, list) and isinstance(new, list) and (len(old) == len(new) or all(isinstance(item, dict) for item in old + new)):
    for number, pair in enumerate(itertools.zip_longest(old, new)):
      yield from differences(*pair, f"{path}[{number}]", free)
  elif old != new:
    yield f"{path} was {old!r} and is {new!r}"
