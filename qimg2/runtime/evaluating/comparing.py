"""Two evaluations of the same prompts beside each other: the difference of each figure, with its interval and a p-value."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from qimg2.evaluation import ERROR, Figure
from qimg2.evaluation.statistics import paired
from qimg2.places import write_file
from qimg2.runtime.evaluating.folder import Folder
from qimg2.runtime.evaluating.page import write_comparison
from qimg2.runtime.evaluating.summary import in_words, scores_of

COMPARISON = "comparison.json"
# Of a request, what may differ between two evaluations. What files hold stands elsewhere: in prompt_set, files, and the judge of each line.
FREE = {"batch_size", "num_prompts", "pictures", "pretrained", "rivals", "keep", "path", "prompts", "network", "model", "reference", "files"}
SCORERS = ("qimg2", "rapidocr", "onnxruntime", "rapidfuzz")
COUNTS = ("num_pictures", "num_reference")


def compare(this: Folder, other: Folder) -> dict[str, Any]:
  """{"this", "other", "rows": [{"suite", "name", "figure", "p_holm", ...}]}, in comparison.json.

  A row has what `qimg2.evaluation.statistics.paired.compare` gives for a figure of `this` (a) and of `other` (b), over prompts that both have scores
  of: "value_a", "value_b", "value", their difference, "low", "high", "p_value", "left_out", prompts that only one of them has. p-values
  are adjusted by Holm over all rows. What states chance is not compared.

  Raises:
    ValueError: one of the evaluations is not finished, they have no suite in common, or one with other prompts, settings or judges.
  """
  suites = _common(this, other)
  ours, theirs = ([row for row in folder.rows() if ERROR not in row] for folder in (this, other))
  found = []
  for name, both in suites.items():
    mine, its = ([row for row in rows if row["suite"] == name] for rows in (ours, theirs))
    _check_scorers(name, mine, its)
    figures = {figure: Figure(**facts["figure"]) for facts in reversed(both) for figure, facts in facts["figures"].items()}
    found += [_row(name, figure, one, mine, its) for figure, one in figures.items() if not figure.endswith("chance")]
    found += _rows_of_set(name, *(facts.get("of_set", {}) for facts in both))
  adjusted = iter(paired.holm([row["p_value"] for row in found if row["p_value"] is not None]))
  for row in found:
    row["p_holm"] = None if row["p_value"] is None else next(adjusted)
  result = {"this": str(this.place), "other": str(other.place), "rows": found}
  write_file(this.place / COMPARISON, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
  write_comparison(this, result)
  return result


def _common(this: Folder, other: Folder) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
  """{suite: its summaries here and there} of those that both have, with the same prompts and settings."""
  ours, theirs = this.summary(), other.summary()
  names = [name for name in ours["suites"] if name in theirs["suites"]]
  if not names:
    raise ValueError(f"{this.place} has the suites {', '.join(ours['suites'])} and {other.place} has {', '.join(theirs['suites'])}: none in common, "
                     "so there is nothing to compare.")
  for name in names:
    asked = [folder["request"]["suites"][name] for folder in (ours, theirs)]
    if asked[0]["prompt_set"] != asked[1]["prompt_set"]:
      raise ValueError(f"Suite {name} had other prompts or truths in {other.place} than in {this.place}: evaluate both with the same --num_prompts "
                       "and settings of the suite.")
    changed = [key for key in sorted({*asked[0], *asked[1]} - FREE) if asked[0].get(key) != asked[1].get(key)]
    if changed:
      raise ValueError(f"Suite {name} has {changed[0]}={asked[0].get(changed[0])!r} in {this.place} and {asked[1].get(changed[0])!r} in "
                       f"{other.place}: such scores are not comparable; evaluate both with the same settings.")
    files = [{key: value for key, value in one.get("files", {}).items() if key in ("network", "model", "reference")} for one in asked]
    changed = [key for key in sorted({*files[0], *files[1]}) if files[0].get(key) != files[1].get(key)]
    if changed:
      raise ValueError(f"Suite {name} had another {changed[0]} in {other.place} than in {this.place}, by what its files hold: such scores are not "
                       "comparable; evaluate both with the same one.")
  versions = [{key: value for key, value in folder["versions"].items() if key in SCORERS} for folder in (ours, theirs)]
  if versions[0] != versions[1]:
    logging.warning("%s was scored with %s, %s with %s: a difference may be theirs.", this.place, versions[0], other.place, versions[1])
  return {name: (ours["suites"][name], theirs["suites"][name]) for name in names}


def _check_scorers(suite: str, mine: Sequence[Mapping[str, Any]], its: Sequence[Mapping[str, Any]]) -> None:
  """Whether one judge scored all, where one did."""
  judges = [{row["details"]["judge"] for row in rows if "judge" in row["details"]} for rows in (mine, its)]
  if all(judges) and len(judges[0] | judges[1]) > 1:
    raise ValueError(f"Suite {suite} was scored by {' and '.join(sorted(judges[0] | judges[1]))}: scores of two judges are not comparable.")


def _row(suite: str, name: str, figure: Figure, mine: Sequence[Mapping[str, Any]], its: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The difference of a figure; none, and why, where only one side has it."""
  ours, theirs = ([row for row in rows if figure.numerator in row["metrics"]] for rows in (mine, its))
  if ours and theirs and {row["cluster"] for row in ours} & {row["cluster"] for row in theirs}:
    found = paired.compare(scores_of(figure, ours), scores_of(figure, theirs))
  else:
    found = paired.Comparison(None, note="no prompt has it on both sides", left_out=len({row["cluster"] for row in (*ours, *theirs)}))
  return {"suite": suite, "name": name, **dataclasses.asdict(found), "figure": dataclasses.asdict(figure)}


def _rows_of_set(suite: str, mine: Mapping[str, Any], its: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The figures of whole sets, which have neither intervals nor tests."""
  numbers = [{name: value for name, value in some.items() if isinstance(value, (int, float)) and name not in COUNTS} for some in (mine, its)]
  rows = []
  for name in dict.fromkeys((*numbers[0], *numbers[1])):
    pair = [some.get(name) for some in numbers]
    difference = None if None in pair else pair[0] - pair[1]
    found = paired.Comparison(difference, note="of whole sets: no interval", value_a=pair[0], value_b=pair[1])
    rows.append({"suite": suite, "name": name, **dataclasses.asdict(found), "figure": dataclasses.asdict(Figure(name, is_share=False))})
  return rows


def describe(comparison: Mapping[str, Any]) -> str:
  """A comparison, a line for each figure."""
  lines = [f"Compared with {comparison['other']} (difference [95 %], p, p adjusted by Holm):"]
  for row in comparison["rows"]:
    values = [in_words(row | {"value": row[key]}, with_interval=False) for key in ("value_a", "value_b")]
    chance = "" if row["p_value"] is None else f", p {row['p_value']:.3g}, {row['p_holm']:.3g}"
    unpaired = f", {row['left_out']} that only one has" if row["left_out"] else ""
    lines.append(f"  {row['suite']} {row['name']}: {values[0]} against {values[1]}, {in_words(row)}{chance} ({row['n']} prompts{unpaired})")
  return "\n".join(lines)
