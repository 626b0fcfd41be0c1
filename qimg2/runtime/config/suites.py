"""The settings of the evaluation suites, by name: what `config.evals` and `launch.evaluate --suite` may say of each."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
  """A setting of a suite.

  Attributes:
    kind: int for whole numbers, str for texts, paths and names, list for names with commas between, or + in a flag.
    default: where it is not given; None for one that the suite's function knows.
    needed: what must be given, in words; "" where there is a default.
    least: smallest whole number.
  """
  kind: type = int
  default: Any = None
  needed: str = ""
  least: int = 1


ALL = Setting(default=0, least=0)  # number of prompts of a set that has an end; 0: all
JUDGE = {"num_prompts": ALL, "pretrained": Setting(str, needed="the folder of a Qwen3-VL Instruct model, the judge"),
         "prompts": Setting(str, needed="a JSON file of prompts"), "side_px": Setting(), "batch_size": Setting(), "max_tokens": Setting()}
SETTINGS: dict[str, dict[str, Setting]] = {
    "glyphs": {"num_prompts": Setting(default=200)},
    "glyph_edits": {"num_prompts": Setting(default=100)},
    "emoji": {"num_prompts": Setting(default=100), "num_candidates": Setting(default=100), "num_examples": Setting(least=0)},
    "emoji_edits": {"num_prompts": Setting(default=100)},
    "text": {"num_prompts": ALL, "languages": Setting(list), "kinds": Setting(list), "model": Setting(str), "side_px": Setting(), "by": Setting(str)},
    "longtext_bench": {"num_prompts": ALL, "path": Setting(str, needed="LongText-Bench's file of prompts"), "language": Setting(str),
                       "model": Setting(str), "side_px": Setting()},
    "cvtg": {"num_prompts": ALL, "path": Setting(str, needed="CVTG-2K's folder or one of its files"), "model": Setting(str), "side_px": Setting()},
    "text_edits": {"num_prompts": Setting(default=96), "languages": Setting(list), "changes": Setting(list), "model": Setting(str),
                   "side_px": Setting(), "by": Setting(str), "fonts": Setting(str)},
    "words": {"num_prompts": Setting(default=200), "folder": Setting(str, needed="the folder of a data set of words, of rendered text")},
    "fidelity": {"num_prompts": ALL, "reference": Setting(str, needed="a folder of reference pictures or the .npz file that keep wrote"),
                 "network": Setting(str, needed="an .onnx file or a published folder"), "prompts": Setting(str), "keep": Setting(str),
                 "side_px": Setting(), "input_px": Setting(), "mean": Setting(str), "std": Setting(str), "layout": Setting(str),
                 "output": Setting(str), "batch_size": Setting()},
    "judge": JUDGE | {"rubrics": Setting(list)},
    "tifa": JUDGE | {"rubric": Setting(str)},
    "pairwise": JUDGE | {"rivals": Setting(str, needed="the folder of another evaluation, or of pictures to compare with"),
                         "rival_seed": Setting(least=0), "rubric": Setting(str)},
}


ALONE = ("fidelity", "pairwise")  # suites that a run's own evaluation cannot make: they compare whole sets of pictures, or need another's


def check_settings(name: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The settings of a suite: those that are given, from a config or as the texts of a flag, and the defaults of others that have one here.

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
  missing = [key for key, setting in known.items() if setting.needed and key not in given]
  if missing:
    raise ValueError(f"{where}.{name} lacks {missing[0]!r}: give {known[missing[0]].needed}.")
  values = {key: _value(setting, given[key], f"{where}.{name}.{key}") if key in given else setting.default for key, setting in known.items()}
  return {key: value for key, value in values.items() if value is not None}


def _value(setting: Setting, value: Any, where: str) -> Any:
  """A value as its setting wants it."""
  if setting.kind is int:
    number = int(value) if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]+\s*", value) else value
    if not isinstance(number, int) or isinstance(number, bool):
      raise ValueError(f"{where} is {value!r}: give a whole number.")
    if number < setting.least:
      raise ValueError(f"{where} is {number}: give at least {setting.least}.")
    return number
  if not isinstance(value, str):
    raise ValueError(f"{where} is {value!r}: give a text.")
  return value.replace("+", ",") if setting.kind is list else value
