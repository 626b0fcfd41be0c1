"""Two evaluations of the same prompts beside each other: the difference of each figure, with its interval and a p-value."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qimg2.evaluation import ERROR, Figure
from qimg2.evaluation.statistics import paired
from qimg2.places import write_file
from qimg2.runtime.evaluating.folder import Folder
from qimg2.runtime.evaluating.page import write_comparison
from qimg2.runtime.evaluating.summary import in_words, scores_of

COMPARISON = "comparison.json"


def compare(this: Folder, other: Folder) -> dict[str, Any]:
  """{"this", "other", "rows": [{"suite", "name", "figure", "p_holm", ...}]}, in comparison.json.

  A row has what `qimg2.evaluation.statistics.paired.compare` gives for a figure of `this` (a) and of `other` (b), over prompts that both have scores
  of: "value_a", "value_b", "value", their difference, "low", "high", "p_value", "left_out", prompts that only one of them has. p-values
  are adjusted by Holm over all rows. What states chance is not compared.

  Raises:
    ValueError: one of the evaluations is not finished, they have no suite in common, or one with other prompts.
  """
  suites = _common(this, other)
  ours, theirs = ([row for row in folder.rows() if ERROR not in row] for folder in (this, other))
  found = []
  for name, facts in suites.items():
    mine, its = ([row for row in rows if row["suite"] == name] for rows in (ours, theirs))
    found += [_row(name, figure, one, mine, its) for figure, one in _figures(facts).items() if not figure.endswith("chance")]
  adjusted = iter(paired.holm([row["p_value"] for row in found if row["p_value"] is not None]))
  for row in found:
    row["p_holm"] = None if row["p_value"] is None else next(adjusted)
  result = {"this": str(this.place), "other": str(other.place), "rows": found}
  write_file(this.place / COMPARISON, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
  write_comparison(this, result)
  return result


def _common(this: Folder, other: Folder) -> dict[str, Mapping[str, Any]]:
  """{suite: its summary} of those that both have, with the same prompts."""
  ours, theirs = this.summary(), other.summary()
  names = [name for name in ours["suites"] if name in theirs["suites"]]
  if not names:
    raise ValueError(f"{this.place} has the suites {', '.join(ours['suites'])} and {other.place} has {', '.join(theirs['suites'])}: none in common, "
                     "so there is nothing to compare.")
  sets = [{name: folder["request"]["suites"][name]["prompt_set"] for name in names} for folder in (ours, theirs)]
  changed = [name for name in names if sets[0][name] != sets[1][name]]
  if changed:
    raise ValueError(f"Suite {changed[0]} had other prompts in {other.place} than in {this.place}: evaluate both with the same --num_prompts and "
                     "settings of the suite.")
  return {name: ours["suites"][name] for name in names}


def _figures(facts: Mapping[str, Any]) -> dict[str, Figure]:
  return {name: Figure(**found["figure"]) for name, found in facts["figures"].items()}


def _row(suite: str, name: str, figure: Figure, mine: Sequence[Mapping[str, Any]], its: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The difference of a figure."""
  ours, theirs = (scores_of(figure, [row for row in rows if figure.numerator in row["metrics"]]) for rows in (mine, its))
  return {"suite": suite, "name": name, **dataclasses.asdict(paired.compare(ours, theirs)), "figure": dataclasses.asdict(figure)}


def describe(comparison: Mapping[str, Any]) -> str:
  """A comparison, a line for each figure."""
  lines = [f"Compared with {comparison['other']} (difference [95 %], p, p adjusted by Holm):"]
  for row in comparison["rows"]:
    values = [in_words(row | {"value": row[key]}, with_interval=False) for key in ("value_a", "value_b")]
    chance = "" if row["p_value"] is None else f", p {row['p_value']:.3g}, {row['p_holm']:.3g}"
    unpaired = f", {row['left_out']} that only one has" if row["left_out"] else ""
    lines.append(f"  {row['suite']} {row['name']}: {values[0]} against {values[1]}, {in_words(row)}{chance} ({row['n']} prompts{unpaired})")
  return "\n".join(lines)
