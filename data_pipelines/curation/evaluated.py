"""Pairs from the scores of an evaluation: of the pictures of one prompt the best and the worst by a metric.

The folder is what `launch.evaluate` writes for several seeds: scores.jsonl has a line for each picture, with "suite", "cluster" (its prompt),
"prompt", "file" and "metrics". What comes out is a table of `chosen`, `rejected` and `prompt` (`data_pipelines.curation.source_records`), with paths
from the folder on, and what both are worth.
"""

import collections
import json
import math
import os
import pathlib

from data_pipelines.curation.source_records import parse_object


def write_pairs(folder: str | os.PathLike, by: str, table: str | os.PathLike) -> dict[str, int]:
  """Writes a table of the pairs that an evaluation gives, unless it is there already, and returns how many there are, {"pairs"}, and how many prompts
  give none, {"tied", "single"}.

  Args:
    folder: of the evaluation, on this machine.
    by: METRIC or SUITE/METRIC of which more is better; -METRIC where less is.
    table: path ending in .jsonl; its folder is there.

  Raises:
    ValueError: no finished evaluation, no such metric, one of several suites, pictures of edits, or no pair at all.
  """
  scores = pathlib.Path(folder) / "scores.jsonl"
  if not scores.is_file():
    raise ValueError(f"{folder} has no scores.jsonl: name the --out of launch.evaluate, when it has finished.")
  sign, name = (-1, by[1:]) if by.startswith("-") else (1, by)
  rows = [parse_object(line, f"line {number} of {scores}") for number, line in enumerate(scores.read_bytes().splitlines(), 1)]
  rows = [row for row in rows if "metrics" in row]  # not those that were left out
  named = [(row, metric) for row in rows for metric in row["metrics"] if name in (metric, f"{row['suite']}/{metric}")]
  suites = sorted({row["suite"] for row, _ in named})
  if not named:
    known = sorted({f"{row['suite']}/{metric}" for row in rows for metric in row["metrics"]})
    raise ValueError(f"The evaluation in {folder} has no metric {name!r}: choose one of {', '.join(known)}; a - before it says that less is better.")
  if len(suites) > 1:
    raise ValueError(f"The suites {' and '.join(suites)} of {folder} both have the metric {name!r}: say {suites[0]}/{name}.")
  if any(row.get("num_sources") for row, _ in named):
    raise ValueError(f"The pictures of the suite {suites[0]} are edits, whose condition images an evaluation does not keep: take another suite.")
  groups = collections.defaultdict(list)
  for row, metric in named:
    if math.isfinite(row["metrics"][metric]):
      groups[row["cluster"], row["prompt"]].append((sign * row["metrics"][metric], row))
  lines, tied = [], 0
  for some in groups.values():
    most, best = max(some, key=lambda one: one[0])
    least, worst = min(some, key=lambda one: one[0])
    tied += len(some) > 1 and most == least
    if most > least:
      lines.append({"chosen": best["file"], "rejected": worst["file"], "prompt": best["prompt"], "chosen_worth": most, "rejected_worth": least})
  single = sum(len(some) == 1 for some in groups.values())
  if not lines:
    raise ValueError(f"The evaluation in {folder} gives no pair by {by}: {single} of {len(groups)} prompts have one picture, and {tied} only such as "
                     "are worth the same: evaluate with more --seeds, or take another metric.")
  text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
  table = pathlib.Path(table)
  if not table.is_file() or table.read_text(encoding="utf-8") != text:  # or its time would make another source of it
    table.write_text(text, encoding="utf-8")
  return {"pairs": len(lines), "tied": tied, "single": single}
