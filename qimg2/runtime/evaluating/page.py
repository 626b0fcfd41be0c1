"""report.html of an evaluation: tables with intervals, how the metrics are distributed, the best and the worst pictures of each."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.transforms import encode_png
from qimg2.evaluation import ERROR, Suite, Task
from qimg2.places import write_file
from qimg2.runtime import html_parts
from qimg2.runtime.evaluating import folder as files
from qimg2.runtime.evaluating.summary import figures_of, in_words, missing_in_words, of_set_in_words, scores_of, test_in_words
from qimg2.runtime.sheets import strips

NUM_SHOWN = 6  # pictures of each end of a metric
SIDE_PX = 160


def write_page(out: files.Folder, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
               suites: Mapping[str, tuple[Suite, Sequence[Task]]]) -> None:
  """Writes report.html. Args: the folder; summary and rows as its files hold them; the suites with their tasks."""
  body = [f"<h1>Evaluation</h1><pre>{html.escape(json.dumps(summary['request'], indent=1, ensure_ascii=False))}</pre>"]
  for name, found in summary["suites"].items():
    suite, tasks = suites[name]
    mine = [row for row in rows if row["suite"] == name]
    body += [f"<h2>{html.escape(name)}</h2>", _counts(found), _figures(found), _of_set(found)]
    good = [row for row in mine if ERROR not in row]
    if good:
      body += [_histograms(good), *_extremes(out, suite, tasks, good)]
    body.append(_errors([row for row in mine if ERROR in row]))
  write_file(out.place / files.REPORT, html_parts.page("Evaluation", body))


def write_comparison(out: files.Folder, comparison: Mapping[str, Any]) -> None:
  """Writes comparison.html of what `comparing.compare` gave."""
  head = ("suite", "figure", "this", "other", "difference [95 %]", "p", "p, Holm", "prompts", "only one has")
  cells = lambda row: (*(in_words(row | {"value": row[key]}, with_interval=False) for key in ("value_a", "value_b")), in_words(row),
                       *("" if row[key] is None else f"{row[key]:.3g}" for key in ("p_value", "p_holm")))
  rows = [(row["suite"], row["name"], *cells(row), row["n"], row["left_out"]) for row in comparison["rows"]]
  body = [f"<h1>{html.escape(comparison['this'])} compared with {html.escape(comparison['other'])}</h1>", html_parts.table(head, rows)]
  write_file(out.place / "comparison.html", html_parts.page("Comparison", body))


def _counts(found: Mapping[str, Any]) -> str:
  parts = [f"{found['num_prompts']} prompts, {found['num_pictures']} pictures"]
  parts += [f"{count} left out: {reason}" for reason, count in found["left_out"].items()]
  parts += missing_in_words(found)
  parts += list(found.get("left_out_of_manifest", ()))[:NUM_SHOWN]
  return f"<p>{'<br>'.join(map(html.escape, parts))}</p>"


def _figures(found: Mapping[str, Any]) -> str:
  categories = found.get("categories", {})
  notes = lambda value: "; ".join(filter(None, (test_in_words(value), value["note"])))
  rows = [(name, in_words(value), value["method"], notes(value), *(in_words(categories[one][name]) for one in categories))
          for name, value in found["figures"].items()]
  return html_parts.table(("figure", "value [95 %]", "interval", "note", *categories), rows)


def _of_set(found: Mapping[str, Any]) -> str:
  rows = [(name, of_set_in_words(value)) for name, value in found.get("of_set", {}).items()]
  return f"<h3>Of all pictures together</h3>{html_parts.table(('figure', 'value'), rows)}" if rows else ""


def _histograms(rows: Sequence[Mapping[str, Any]]) -> str:
  """A small histogram of each metric that takes more than two values."""
  from matplotlib.figure import Figure

  metrics = {name: [row["metrics"][name] for row in rows if name in row["metrics"]] for name in rows[0]["metrics"]}
  metrics = {name: values for name, values in metrics.items() if len(set(values)) > 2}
  if not metrics:
    return ""
  columns, num = min(4, len(metrics)), len(metrics)
  figure = Figure(figsize=(2.6 * columns, 1.9 * -(-num // columns)), dpi=90, layout="constrained")
  for place, (name, values) in enumerate(metrics.items(), 1):
    axes = figure.add_subplot(-(-num // columns), columns, place)
    axes.hist(values, bins=20)
    axes.set_title(name, fontsize=8)
    axes.tick_params(labelsize=7)
  return f"<h3>Distribution over pictures</h3>{html_parts.image(html_parts.as_png(figure))}"


def _extremes(out: files.Folder, suite: Suite, tasks: Sequence[Task], rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Best and worst pictures of each figure."""
  by_name, found = dict(zip(files.task_names("", tasks), tasks)), []
  for name, figure in figures_of(suite, rows).items():
    some = [row for row in rows if figure.numerator in row["metrics"] and row["metrics"].get(figure.denominator, 1) > 0]  # no 0 of nothing
    if name.endswith("chance") or not some:
      continue
    numerator, denominator, _ = scores_of(figure, some)
    values = numerator / denominator
    order = np.argsort(values if figure.lower_is_better else -values, kind="stable")
    shown = [("best", order[:NUM_SHOWN])] + [("worst", order[-NUM_SHOWN:][::-1])] * (len(order) > NUM_SHOWN)
    shown = [("all are alike, some", order[:NUM_SHOWN])] if values.min() == values.max() else shown
    parts = [(f"{name}: {kind}", [_tile(out, suite, by_name, some[i], values[i]) for i in places]) for kind, places in shown]
    found.append(html_parts.image(encode_png(strips(parts, SIDE_PX))))
  return ["<h3>Best and worst</h3>", *found] if found else []


def _tile(out: files.Folder, suite: Suite, tasks: Mapping[str, Task], row: Mapping[str, Any], value: float) -> tuple[list[np.ndarray], str]:
  picture = files.read_picture(out.picture_of(row["file"]))
  cells = suite.show(tasks[row["task"]], picture, row["metrics"] | row["details"])
  return [image for image, _ in cells], f"{value:.3g}: {cells[-1][1]}"


def _errors(rows: Sequence[Mapping[str, Any]]) -> str:
  shown = [(row["task"], row["seed"], row["prompt"], row[ERROR]) for row in rows[:20]]
  return f"<h3>Left out</h3>{html_parts.table(('task', 'seed', 'prompt', 'why'), shown)}" if shown else ""
