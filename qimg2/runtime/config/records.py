"""The config that a run's config.json records, as a program writes it now and as earlier ones did."""

import json
import pathlib
from typing import Any

from qimg2.runtime.config import RunConfig, parse
from qimg2.runtime.config.sources import DIFFUSERS, STAGE

FORMAT = 2


def read_record(path: pathlib.Path) -> RunConfig:
  """The config in a config.json; in files of the first format words are put where "" and bare names of stages stood.

  Raises:
    ValueError: it cannot be read or understood, with the file and the key.
  """
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is no JSON file ({error}): it was changed or cut off; a copy of the run may still have it.") from error
  if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
    raise ValueError(f"{path} lacks the key 'config': it is no record of a run.")
  if record.get("format", 1) not in (1, FORMAT):
    raise ValueError(f"{path} has the key 'format' at {record['format']!r}, but this program reads 1 and {FORMAT}: use the version that wrote it.")
  try:
    return parse(record["config"] if "format" in record else translate(record["config"]))
  except ValueError as error:
    raise ValueError(f"{path} cannot be understood: {error}") from error


def translate(config: dict[str, Any]) -> dict[str, Any]:
  """A config of the first format in today's words: "" becomes "scratch", "default" or "none", and the bare name of a stage "stage:NAME".

  Raises:
    ValueError: a section that is none.
  """
  stages = config.get("stages", ())
  for number, stage in enumerate(stages):
    if not isinstance(stage, dict) or not isinstance(stage.get("frozen", {}), dict):
      raise ValueError(f"config.stages[{number}] is no stage: it must be a section, and its key 'frozen' one too.")
  names = [stage.get("name") for stage in stages]

  def source(text: Any, empty: str) -> Any:
    if not isinstance(text, str):
      return text  # for `parse` to refuse
    if text.startswith(DIFFUSERS):
      return text
    return f"{STAGE}{text}" if text.partition(":")[0] in names else text or empty

  def word(value: Any, empty: str) -> Any:
    return empty if value == "" else value

  changed = [stage | {"start_from": source(stage.get("start_from", ""), "scratch"), "faults": stage.get("faults", {}),
                      "frozen": {role: source(text, "default") for role, text in stage.get("frozen", {}).items()}} for stage in stages]
  check = config.get("check")
  check = check | {"name": word(check.get("name"), "none")} if isinstance(check, dict) else check
  return config | {"stages": changed, "tokenizer": word(config.get("tokenizer", ""), "default")} | ({"check": check} if check is not None else {})
