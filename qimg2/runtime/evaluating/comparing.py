"""Two evaluations of the same prompts beside each other: the difference of each figure, with its interval and a p-value."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qimg2.evaluation import ERROR, Figure, Task
from qimg2.evaluation.judge_scores import Preference, pairwise_figures
from qimg2.evaluation.statistics import intervals, paired
from qimg2.places import write_file
from qimg2.runtime.config.suites import SETTINGS
from qimg2.runtime.evaluating.folder import Folder, read_picture, task_names
from qimg2.runtime.evaluating.folder import lines as as_lines
from qimg2.runtime.evaluating.page import write_comparison
from qimg2.runtime.evaluating.registry import SEED, make_suite
from qimg2.runtime.evaluating.summary import in_words, prompt_set, scores_of

COMPARISON, PAIRS = "comparison.json", "pairs.jsonl"
AT_ONCE = 32  # pairs that a judge is asked about together


def compare(this: Folder, other: Folder, judge: Any = None) -> dict[str, Any]:
  """{"this", "other", "rows": [{"suite", "name", "figure", "p_holm", ...}]}, in comparison.json.

  A row has what `qimg2.evaluation.statistics.paired.compare` gives for a figure of `this` (a) and of `other` (b), over prompts that both have scores
  of: "value_a", "value_b", "value", their difference, "low", "high", "p_value", "left_out", prompts that only one of them has. p-values
  are adjusted by Holm over all rows. What states chance is not compared.

  With a `qimg2.runtime.judge.Judge` also "judge": {suite: figures of `judge_pairs`}, with a line for each pair of pictures in pairs.jsonl.

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
  if judge is not None:
    result["judge"] = judge_pairs(this, other, list(suites), judge)
  write_file(this.place / COMPARISON, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
  write_comparison(this, result)
  return result


def judge_pairs(this: Folder, other: Folder, suites: Sequence[str], judge: Any) -> dict[str, dict[str, Any]]:
  """{suite: {"win": share of the pairs in which the picture of `this` is the better one, an interval over prompts; "preferred", "tied",
  "contradictions", "first place": see `qimg2.evaluation.judge_scores.pairwise_figures`; "num_pairs", "left_out"}}.

  A pair is what both drew for a prompt with a seed; the judge sees it in both orders.

  Raises:
    ValueError: a suite whose prompts cannot be made again, or no pair.
  """
  lines, found = [], {}
  for name in suites:
    again = _tasks_again(this, name)
    tasks = dict(zip(task_names(name, again), again))
    ours, theirs = ({(row["task"], row["seed"]): folder.place / row["file"] for row in folder.rows() if row["suite"] == name}
                    for folder in (this, other))
    keys = [key for key in ours if key in theirs]
    if not keys:
      raise ValueError(f"Suite {name} has no prompt that {this.place} and {other.place} drew with the same seed: give both the same --seeds.")
    mine = [row for start in range(0, len(keys), AT_ONCE) for row in _judged(judge, tasks, keys[start:start + AT_ONCE], ours, theirs)]
    lines += [{"suite": name, **row} for row in mine]
    found[name] = _pair_figures(mine)
  write_file(this.place / PAIRS, as_lines(lines))
  return found


def _judged(judge: Any, tasks: Mapping[str, Task], keys: Sequence[tuple[str, int]], ours: Mapping, theirs: Mapping) -> list[dict[str, Any]]:
  """What the judge says of some pairs; of one whose pictures cannot be read why not."""
  from qimg2.runtime.judging import compare_pictures  # whoever asks no judge needs none of it
  rows, pairs = [{"task": task, "seed": seed} for task, seed in keys], {}
  for number, key in enumerate(keys):
    try:
      pairs[number] = read_picture(ours[key]), read_picture(theirs[key])
    except (ValueError, OSError) as error:
      rows[number][ERROR] = " ".join(str(error).split())
  answers = compare_pictures(judge, [tasks[keys[i][0]] for i in pairs], *zip(*pairs.values())) if pairs else []
  for number, answer in zip(pairs, answers):
    rows[number] |= answer
  return rows


def _pair_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  good = [row for row in rows if ERROR not in row]
  if not good:
    raise ValueError(f"The judge could compare none of {len(rows)} pairs: {rows[0][ERROR]}.")
  win = intervals.figure([row["win"] for row in good], None, [row["task"] for row in good])
  figures = pairwise_figures([Preference(*row["probabilities"]) for row in good])
  return {**figures, "win": dataclasses.asdict(win) | {"figure": dataclasses.asdict(Figure("win"))}, "num_pairs": len(good),
          "left_out": len(rows) - len(good)}


def _tasks_again(folder: Folder, name: str) -> Sequence[Task]:
  """The tasks of a suite, made from what the evaluation asked for."""
  asked = folder.summary()["request"]["suites"][name]
  suite, num = make_suite(name, {key: value for key, value in asked.items() if key in SETTINGS.get(name, ())})
  tasks = suite.tasks(num, SEED)
  if prompt_set(tasks) != asked["prompt_set"]:
    raise ValueError(f"The prompts of suite {name} in {folder.place} cannot be made again: a file of prompts changed, or its data set was prepared "
                     "in another way. Compare without a judge.")
  return tasks


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
  for name, found in comparison.get("judge", {}).items():
    lines.append(f"  {name}, by the judge: better in {in_words(found['win'])} of {found['num_pairs']} pairs; its two orders contradict each other in "
                 f"{found['contradictions']:.1%}, and it likes the first place with {found['first place']:.2f}"
                 + f"; {found['left_out']} pairs left out" * bool(found["left_out"]))
  return "\n".join(lines)
