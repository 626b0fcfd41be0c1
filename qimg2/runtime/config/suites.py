"""The settings of the evaluation suites, by name: what `config.evals` and `launch.evaluate --suite` may say of each."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
  """A setting of a suite.

  Attributes:
    default: where it is not given; None for one that must be.
    kind: int for whole numbers, str for texts, paths and names, tuple for several texts, in flags with + between.
    least: smallest whole number.
    what: what it is, for the sentence that asks for it.
  """
  default: Any
  kind: type = int
  least: int = 1
  what: str = ""


ALL = Setting(0, least=0)  # number of prompts of a set that has an end; 0: all
SETTINGS: dict[str, dict[str, Setting]] = {
    "glyphs": {"num_prompts": Setting(200)},
    "glyph_edits": {"num_prompts": Setting(100)},
    "emoji": {"num_prompts": Setting(100), "num_candidates": Setting(100)},
    "emoji_edits": {"num_prompts": Setting(100)},
}


def check_settings(name: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
  """All settings of a suite: those that are given, from a config or as the texts of a flag, and the defaults of the others.

  Raises:
    ValueError: no such suite or setting, one that must be given, or a value of another kind. The sentence begins with `where`.
  """
  if name not in SETTINGS:
    near = difflib.get_close_matches(name, SETTINGS, 1)
    raise ValueError(f"{where} names no suite {name!r}" + (f": did you mean {near[0]!r}?" if near else f": there are {', '.join(SETTINGS)}."))
  known = SETTINGS[name]
  for key in given:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      raise ValueError(f"{where}.{name} has no key {key!r}" + (f": did you mean {near[0]!r}?" if near else f": it has {', '.join(known)}."))
  missing = [key for key, setting in known.items() if setting.default is None and key not in given]
  if missing:
    raise ValueError(f"{where}.{name} lacks {missing[0]!r}: give {known[missing[0]].what}.")
  return {key: _value(setting, given[key], f"{where}.{name}.{key}") if key in given else setting.default for key, setting in known.items()}


def _value(setting: Setting, value: Any, where: str) -> Any:
  """A value as its setting wants it."""
  if setting.kind is int:
    number = int(value) if isinstance(value, str) and value.strip().lstrip("-").isdigit() else value
    if not isinstance(number, int) or isinstance(number, bool):
      raise ValueError(f"{where} is {value!r}: give a whole number.")
    if number < setting.least:
      raise ValueError(f"{where} is {number}: give at least {setting.least}.")
    return number
  if setting.kind is tuple:
    parts = tuple(value.split("+")) if isinstance(value, str) else value
    if not isinstance(parts, (tuple, list)) or not all(isinstance(part, str) and part for part in parts):
      raise ValueError(f"{where} is {value!r}: give texts, in a flag with + between.")
    return tuple(parts)
  if not isinstance(value, setting.kind):
    raise ValueError(f"{where} is {value!r}: give a text.")
  return value
