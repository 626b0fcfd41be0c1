"""The evaluation suites by name, and their settings: what `config.evals` and `launch.evaluate --suite` may name."""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from qimg2.evaluation import Suite
from qimg2.runtime.config.suites import check_settings
from qimg2.runtime.evaluating import embedded

SEED = 7  # of the tasks; in a run's own evaluation of the noise, too


def _of_data(make: Callable[..., Suite]) -> Callable[..., Suite]:
  """A suite of an embedded data set, which may have to know how a run prepared that."""
  @functools.wraps(make)
  def made(source: Any, **settings: Any) -> Suite:
    return make(source.cfg.prepare if hasattr(source, "cfg") else None, **settings)
  return made


def _imported(module: str, name: str) -> Callable[..., Suite]:
  """A suite whose module is read when it is asked for: what it needs is not everywhere."""
  def made(source: Any, **settings: Any) -> Suite:
    del source
    return getattr(importlib.import_module(module), name)(**settings)
  made.module, made.name = module, name
  return made


# Name -> (the run or folder that draws, or None; settings) -> the suite.
SUITES: dict[str, Callable[..., Suite]] = {
    "glyphs": _of_data(embedded.glyph_suite), "glyph_edits": _of_data(embedded.glyph_edit_suite), "emoji": _of_data(embedded.emoji_suite),
    "emoji_edits": _of_data(embedded.emoji_edit_suite),
    **{name: _imported("qimg2.evaluation.text_suites", f"{name}_suite") for name in ("text", "longtext_bench", "cvtg")},
    "text_edits": _imported("qimg2.evaluation.text_edits", "text_edits_suite"),
    "words": _imported("qimg2.runtime.word_suite", "words_suite"),
    "fidelity": _imported("qimg2.runtime.picture_suites", "fidelity_suite"),
    **{name: _imported("qimg2.runtime.judging", f"{name}_suite") for name in ("judge", "tifa", "pairwise")}}


def make_suite(name: str, settings: Mapping[str, Any], source: Any = None) -> tuple[Suite, int]:
  """(suite, number of prompts) of checked settings.

  Args: the name; settings, "num_prompts" among them; the run or the published folder that draws, None where pictures are read.
  """
  rest = dict(settings)
  return SUITES[name](source, **{key: value for key, value in rest.items() if key != "num_prompts"}), rest["num_prompts"]


def parse_suites(texts: list[str], num_prompts: int | None = None) -> dict[str, dict[str, Any]]:
  """{name: settings} of what `--suite` says: names with commas between, or a name with settings, "cvtg:path=FILE,areas=2".

  Args: the flags' texts; number of prompts of suites that do not say their own, None for all prompts of a suite, or 200 of one that makes as many as
  are asked for.

  Raises:
    ValueError: an unknown suite or setting, one that is missing, or a suite or a setting twice.
  """
  found: dict[str, dict[str, Any]] = {}
  for text in texts:
    name, colon, rest = text.partition(":")
    if colon and "," in name:
      raise ValueError(f"--suite={text} names several suites before its settings: give the flag again for each.")
    for one in map(str.strip, [name] if colon else text.split(",")):
      if one in found:
        raise ValueError(f"--suite names {one} twice: once is enough.")
      given = _settings(one, rest) if colon else {}
      found[one] = check_settings(one, ({} if num_prompts is None else {"num_prompts": num_prompts}) | given, "--suite")
  return found


def _settings(suite: str, text: str) -> dict[str, str]:
  """{setting: value} of "languages=en+zh,num_prompts=50"."""
  found: dict[str, str] = {}
  for part in text.split(","):
    key, equals, value = (one.strip() for one in part.partition("="))
    if not equals:
      *_, last = found or ("SETTING",)
      why = f"a comma stands between settings, and several values have + between: {last}={found.get(last, 'VALUE')}+{key or 'VALUE'}"
      raise ValueError(f"--suite={suite}:{text} has {part!r} where SETTING=VALUE should stand: {why}; for another suite give the flag again.")
    if key in found:
      raise ValueError(f"--suite={suite}:{text} gives {key} twice: once is enough.")
    found[key] = value
  return found
