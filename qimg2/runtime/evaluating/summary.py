"""What all scores of an evaluation say: each figure with its interval, over prompts as clusters (`qimg2.evaluation.statistics`)."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qimg2.evaluation import ERROR, Figure, Suite, Task
from qimg2.evaluation.statistics import intervals, paired
from qimg2.evaluation.statistics.sums import Scores

MOST_REASONS = 5


class Missing(NamedTuple):
  """Tasks without any picture, tasks with fewer than they should have, and pictures that both lack: of the seeds that were asked for, or of as many
  as the task with most pictures has."""
  num_missing: int = 0
  num_incomplete: int = 0
  num_missing_pictures: int = 0


def row_of(suite: str, name: str, task: Task, seed: int, file: str, scores: Mapping[str, Any], cluster: str = "") -> dict[str, Any]:
  """A line of scores.jsonl; `cluster` names the prompt, see `clusters`, "" for the task's name."""
  row = {"suite": suite, "task": name, "cluster": cluster or name, "category": task.category, "prompt": task.prompt, "seed": seed, "file": file}
  row |= {"num_sources": len(task.sources)} if task.sources else {}
  if ERROR in scores:
    return row | {ERROR: scores[ERROR]}
  is_metric = lambda value: isinstance(value, (bool, int, float))
  return row | {"metrics": {key: float(value) for key, value in scores.items() if is_metric(value)},
                "details": {key: value for key, value in scores.items() if not is_metric(value)}}


def summarise(suite: Suite, rows: Sequence[Mapping[str, Any]], missing: Missing = Missing()) -> dict[str, Any]:
  """The figures of a suite: {"num_prompts", "num_pictures", "num_left_out", "left_out", those of `Missing`, "figures", "categories"}.

  "figures" is {name: {"value", "low", "high", ...}}, an interval of `qimg2.evaluation.statistics.figure` each; "categories" the same for each
  category, where there is more than one. Pictures that have no scores are left out and counted, with the most frequent reasons.

  Args: the suite; the rows of all its pictures; what it lacks.
  """
  good = [row for row in rows if ERROR not in row]
  reasons = collections.Counter(row[ERROR] for row in rows if ERROR in row)
  figures = figures_of(suite, good)
  categories = sorted({row["category"] for row in good})
  result = {
      "num_prompts": len({row["cluster"] for row in good}), "num_pictures": len(good), "num_left_out": len(rows) - len(good),
      "left_out": dict(reasons.most_common(MOST_REASONS)), **missing._asdict(),
      "figures": {name: interval(figure, good) for name, figure in figures.items()}}
  if len(categories) > 1:
    result["categories"] = {one: {name: interval(figure, [row for row in good if row["category"] == one]) for name, figure in figures.items()}
                            for one in categories}
  return result


def figures_of(suite: Suite, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
  """{name: figure} of a suite: its own, or the mean of each metric, as shares."""
  return dict(suite.figures) or {name: Figure(name) for name in (rows[0]["metrics"] if rows else ())}


def interval(figure: Figure, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """A figure of some rows as JSON, with what a reader needs to print it; with "test", a `paired.PValue`, where the figure has a `null`."""
  scores = scores_of(figure, [row for row in rows if figure.numerator in row["metrics"]])
  found = dataclasses.asdict(intervals.figure(*scores)) | {"figure": dataclasses.asdict(figure)}
  return found if figure.null is None else found | {"test": dataclasses.asdict(paired.sign_test_by_prompt(scores, figure.null))}


def scores_of(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> Scores:
  """A figure's numerator and denominator of each picture, and the name of its prompt."""
  numerator = np.array([row["metrics"][figure.numerator] for row in rows], float)
  denominator = np.array([row["metrics"][figure.denominator] for row in rows], float) if figure.denominator else np.ones(len(rows))
  return Scores(numerator, denominator, np.array([row["cluster"] for row in rows], str))


def prompt_set(tasks: Sequence[Task]) -> str:
  """A digest of what is asked and what would be right: names, categories, prompts, sizes, condition images and truths, in order."""
  found = hashlib.sha256()
  for task in tasks:
    found.update(repr((task.name, task.category, _asked(task), _stable(task.truth))).encode())
  return found.hexdigest()


def clusters(names: Sequence[str], tasks: Sequence[Task]) -> list[str]:
  """For each task the name of the first one that asks the same: prompt, size and condition images. Their pictures are as alike as those of two seeds,
  so that intervals take them together."""
  first: dict[Any, str] = {}
  return [first.setdefault(_asked(task), name) for name, task in zip(names, tasks)]


def _asked(task: Task) -> tuple:
  return task.prompt, tuple(task.size), tuple(_stable(image) for image in task.sources)


def _stable(value: Any) -> Any:
  """A value as nested tuples that are the same in every process; of what is none of the usual types its class alone."""
  if isinstance(value, np.ndarray):
    return value.shape, str(value.dtype), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
  if isinstance(value, Mapping):
    return tuple((str(key), _stable(one)) for key, one in value.items())
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return tuple(_stable(getattr(value, field.name)) for field in dataclasses.fields(value))
  if isinstance(value, (tuple, list)):
    return tuple(map(_stable, value))
  if isinstance(value, (set, frozenset)):
    return tuple(sorted(map(repr, value)))
  return value if isinstance(value, (str, bytes, bool, int, float, type(None), np.generic)) else type(value).__qualname__


# In words.


def in_words(found: Mapping[str, Any], with_interval: bool = True) -> str:
  """A figure as "98.5 % [95.7, 99.5]"."""
  if found["value"] is None:
    return "none"
  factor, digits, unit = (100, 1, " %") if found["figure"]["is_share"] else (1, 3, "")
  text = f"{found['value'] * factor:.{digits}f}{unit}"
  if not with_interval or found["low"] is None:
    return text
  return f"{text} [{found['low'] * factor:.{digits}f}, {found['high'] * factor:.{digits}f}]"


def test_in_words(found: Mapping[str, Any]) -> str:
  """The test of a figure against its `null` as "p 0.031 (sign test, exact: 9 prompts above 0.5, 2 below)"; "" where there is none."""
  test = found.get("test")
  return f"p {test['p_value']:.3g} ({test['method']}: {test['note']})" if test else ""


def of_set_in_words(value: Any) -> str:
  """A figure of a whole set, or a text about it."""
  return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)


def describe(summary: Mapping[str, Any]) -> str:
  """The figures of an evaluation, a line for each, with what was left out."""
  found = []
  for name, suite in summary["suites"].items():
    found.append(f"{name}: {suite['num_prompts']} prompts, {suite['num_pictures']} pictures{_left_out(suite)}")
    found += [f"  {figure}: {', '.join(filter(None, (in_words(value), test_in_words(value))))}" for figure, value in suite["figures"].items()]
    found += [f"  {figure}: {of_set_in_words(value)}" for figure, value in suite.get("of_set", {}).items() if value != ""]
  return "\n".join(found)


def left_out_in_words(suite: Mapping[str, Any]) -> str:
  """How many pictures of a suite are left out, of which there are some, and the most frequent reason."""
  reason, count = next(iter(suite["left_out"].items()))
  return f"{suite['num_left_out']} left out, {f'{count} because' if count > 1 else 'one because'}: {reason}"


def _left_out(suite: Mapping[str, Any]) -> str:
  parts = [left_out_in_words(suite)] if suite["num_left_out"] else []
  parts += missing_in_words(suite)
  return f" ({'; '.join(parts)})" if parts else ""


def missing_in_words(suite: Mapping[str, Any]) -> list[str]:
  """What a suite lacks, see `Missing`; nothing for nothing."""
  parts = [f"{suite['num_missing']} prompts without a picture"] if suite["num_missing"] else []
  if some := suite.get("num_incomplete", 0):  # a summary of before has it not
    parts.append(f"{some} prompts with some of their pictures only, {suite['num_missing_pictures']} pictures missing in all")
  return parts
