"""What the funnel dropped, and why: funnel.json for programs and report.html, one file with the pictures inside, for people."""

import html
import json
from collections.abc import Iterable, Sequence

from data_pipelines.curation.operators import Step

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2, h3 { line-height: 1.2 } h2 { border-top: 1px solid #ccc; padding-top: 1em }
table { border-collapse: collapse; margin: .5em 0 } td, th { border: 1px solid #ccc; padding: .2em .6em; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } code { background: #f6f6f6 }
.sheet { display: flex; flex-wrap: wrap; gap: 8px } figure { width: 130px; margin: 0; font-size: 11px; overflow-wrap: anywhere }
figure img { max-width: 128px; max-height: 128px; border: 1px solid #ddd } figure div { color: #777 }
"""


def rows(tally: dict, steps: Sequence[Step]) -> list[dict]:
  """One dict per step in order: stage, operator, settings, entered, passed, and drops as reason -> count; entered = passed + sum of drops."""
  entered, result = tally["total"], []
  for step, drops in zip(steps, tally["drops"], strict=True):
    counts = {reason: drops[reason]["count"] for reason in sorted(drops)}
    passed = entered - sum(counts.values())
    result.append({"stage": step.stage, "operator": step.name, "settings": step.settings, "entered": entered, "passed": passed, "drops": counts})
    entered = passed
  return result


def summary(tally: dict, steps: Sequence[Step]) -> str:
  """The counts in one line, such as "100 samples: 5 dropped by broken (5 undecodable)"."""
  parts = [f"{sum(row['drops'].values())} dropped by {row['operator']} of {row['stage']} "
           f"({', '.join(f'{count} {reason}' for reason, count in row['drops'].items())})" for row in rows(tally, steps) if row["drops"]]
  return f"{tally['total']} samples: {', '.join(parts) or 'none dropped'}"


def sentences(entry: dict, most: int = 5) -> list[dict]:
  """The most frequent sentences of a reason of a tally: count, detail, and the key of a sample."""
  return sorted(entry["sentences"].values(), key=lambda one: -one["count"])[:most]


def why_nothing_is_left(tally: dict, steps: Sequence[Step]) -> str:
  """The counts, what was said most often of the samples that were dropped, and what can be done about it."""
  drops = [(entry, step) for step, some in zip(steps, tally["drops"]) for entry in some.values()]
  said = sorted(((one, step) for entry, step in drops for one in sentences(entry)), key=lambda pair: -pair[0]["count"])[:3]
  text = f"{summary(tally, steps)}. " + " ".join(f"Of {one['count']}, such as {one['key']}: {one['detail']}" for one, _ in said)
  return text if not said or said[0][1].name == "broken" else f"{text} Loosen a threshold, --config.operators[i].NAME=VALUE."


def write(tally: dict, steps: Sequence[Step], not_run: Sequence[str], name: str, source: str, facts: dict,
          left_out: Sequence[dict]) -> tuple[bytes, bytes]:
  """(funnel.json, report.html). `not_run` names the operators of the report's funnel that the config leaves out, `left_out` has reason, count and
  examples of the source's files that no sample was made of."""
  table = rows(tally, steps)
  examples = [{reason: [{key: one[key] for key in ("key", "detail")} for one in entry["examples"]] for reason, entry in sorted(drops.items())}
              for drops in tally["drops"]]
  data = {"name": name, "source": source, "samples": tally["total"], "passed_all": tally["kept"]["count"], "not_run": list(not_run),
          "left_out": list(left_out), "facts": facts,
          "steps": [row | {"examples": some, "sentences": {reason: sentences(entry) for reason, entry in sorted(drops.items())}}
                    for row, some, drops in zip(table, examples, tally["drops"])]}
  page = _page(tally, steps, table, not_run, name, source, facts, left_out)
  return json.dumps(data, indent=1, ensure_ascii=False).encode(), page.encode()


def _page(tally: dict, steps: Sequence[Step], table: Sequence[dict], not_run: Sequence[str], name: str, source: str, facts: dict,
          left_out: Sequence[dict]) -> str:
  body = [f"<h1>{html.escape(name)}</h1><p>{tally['total']} samples of <code>{html.escape(source)}</code>; {facts['train']} records for training, "
          f"{facts['validation']} held out.</p>", "<h2>Funnel</h2>", _funnel(table)]
  if not_run:
    body.append(f"<p><b>Not run</b>, though the report's funnel has them: {html.escape(', '.join(not_run))}.</p>")
  if left_out:
    body.append("<p><b>Files that are no part of a sample</b>:</p>" + _list(f"{one['count']} {left_out_words(one)}" for one in left_out))
  for step, drops in zip(steps, tally["drops"]):
    for reason, entry in sorted(drops.items()):
      body += [f"<h2>{step.stage} {html.escape(step.name)}: {html.escape(reason)}, {entry['count']} dropped</h2>",
               _list(f"{one['count']}, such as {one['key']}: {one['detail']}" for one in sentences(entry)), _sheet(entry["examples"])]
  body += [f"<h2>Passed every step: {tally['kept']['count']}</h2>", _sheet(tally["kept"]["examples"])]
  return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(name)}</title><style>{_STYLE}</style></head>"
          f"<body>{''.join(body)}</body></html>")


def left_out_words(one: dict) -> str:
  """Why files are no part of a sample, with names of some."""
  return f"{one['reason']} (such as {', '.join(one['examples'][:2])})"


def _list(lines: Iterable[str]) -> str:
  return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _funnel(table: Sequence[dict]) -> str:
  head = "".join(f"<th>{title}</th>" for title in ("stage", "operator", "settings", "entered", "passed", "dropped, by reason"))
  lines = []
  for row in table:
    settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items())
    drops = "<br>".join(f"{html.escape(reason)}: {count}" for reason, count in row["drops"].items())
    lines.append(f"<tr><td>{row['stage']}</td><td>{html.escape(row['operator'])}</td><td>{html.escape(settings)}</td>"
                 f"<td class='n'>{row['entered']}</td><td class='n'>{row['passed']}</td><td>{drops}</td></tr>")
  return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _sheet(examples: Sequence[dict]) -> str:
  figures = []
  for one in examples:
    picture = f"<img alt='' src='data:image/jpeg;base64,{one['thumb']}'>" if one["thumb"] else "<div>(no picture)</div>"
    figures.append(f"<figure>{picture}<b>{html.escape(one['key'])}</b><div>{html.escape(one['detail'])}</div></figure>")
  return f"<div class='sheet'>{''.join(figures)}</div>"
