"""The config that a run's config.json records, as a program writes it now and as earlier ones did."""

import json
from typing import Any

from qimg2.places import Place
from qimg2.runtime.config import RunConfig, parse
from qimg2.runtime.config.sources import DIFFUSERS, STAGE

FORMAT = 5


def read_record(path: Place) -> RunConfig:
  """The config in a config.json; those of earlier formats are translated.

  Raises:
    ValueError: it cannot be read or understood, with the file and the key.
  """
  record = _read(path)
  if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
    raise ValueError(f"{path} lacks the key 'config': it is no record of a run.")
  if record.get("format", 1) not in range(1, FORMAT + 1):
    raise ValueError(f"{path} has the key 'format' at {record['format']!r}, but this program reads 1 to {FORMAT}: use the version that wrote it.")
  try:
    return parse(translate(record["config"], record.get("format", 1)))
  except ValueError as error:
    raise ValueError(f"{path} cannot be understood: {error}") from error


def read_section(path: Place, name: str) -> dict[str, Any]:
  """A section of a config.json beside the config, such as "versions", {package: version}; {} where there is no record, or it says nothing of it.

  Raises:
    ValueError: it cannot be read.
  """
  record = _read(path) if path.exists() else None
  section = record.get(name) if isinstance(record, dict) else None
  return section if isinstance(section, dict) else {}


def _read(path: Place) -> Any:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is no JSON file ({error}): it was changed or cut off; a copy of the run may still have it.") from error


def translate(config: dict[str, Any], version: int) -> dict[str, Any]:
  """A config of an earlier format as today's.

  Format 1 had "" and the bare names of stages where "scratch", "default", "none" and "stage:NAME" are now; formats 1 and 2 had a section `check`
  of one name where `evals` names suites; before format 4 a stage had as many buckets as there were shapes; before format 5
  any frozen role might be drawn from the seed.

  Raises:
    ValueError: a section that is none, or a check that there was not.
  """
  if version < 2:
    config = _with_words(config)
  if version < 3 and "check" in config:
    config = {key: value for key, value in config.items() if key != "check"} | {"evals": _evals(config["check"])}
  if version < 4:
    config = config | {"stages": [{"max_programs": 0} | stage if isinstance(stage, dict) else stage for stage in config.get("stages", ())]}
  if version < 5:
    config = _with_sums_as_before({"random_frozen": True, "compile": "ahead"} | config)
  return config


def _with_sums_as_before(config: dict[str, Any]) -> dict[str, Any]:
  """Gradients of networks that compute in bfloat16 were summed in that."""
  def stage(section: Any) -> Any:
    algorithm = section.get("algorithm") if isinstance(section, dict) else None
    network = config.get("vae" if isinstance(algorithm, dict) and algorithm.get("name") == "reconstruction" else "model")
    if not isinstance(network, dict) or network.get("dtype") != "bfloat16" or not isinstance(section.get("optimizer"), dict):
      return section
    return section | {"optimizer": {"gradient_dtype": "bfloat16"} | section["optimizer"]}
  stages = config.get("stages")
  return config | {"stages": [stage(section) for section in stages]} if isinstance(stages, (list, tuple)) else config


def _with_words(config: dict[str, Any]) -> dict[str, Any]:
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


def _evals(check: Any) -> dict[str, Any]:
  """The suites of a check, which drew edits too: half as many as prompts of glyphs, as many as of emoji."""
  if not isinstance(check, dict) or not all(isinstance(check.get(key, 0), int) for key in ("num_prompts", "num_candidates")):
    raise ValueError(f"config.check is {check!r}: it must be a section with a name and whole numbers.")
  name, num = check.get("name"), check.get("num_prompts", 0)
  if name == "none":
    return {}
  if name == "glyphs":
    return {"glyphs": {"num_prompts": num}} | ({"glyph_edits": {"num_prompts": num // 2}} if num > 1 else {})
  if name == "emoji":
    return {"emoji": {"num_prompts": num, "num_candidates": check.get("num_candidates", 0)}, "emoji_edits": {"num_prompts": num}}
  raise ValueError(f"config.check.name is {name!r}: it was one of none, glyphs, emoji.")
