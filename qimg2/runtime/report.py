"""The report of a run: one HTML file with everything inside, rewritten after every stage."""

import dataclasses
import functools
import html
import json
import re
from collections.abc import Iterable, Sequence

from absl import logging

from data_pipelines.loader import Loader
from qimg2.places import Place, write_file
from qimg2.runtime.config import StageConfig
from qimg2.runtime.evaluating.of_run import counts_of, figures_of
from qimg2.runtime.html_parts import as_png, image, page, table
from qimg2.runtime.run import Run
from qimg2.training.metrics import NEXT_TO_STEPS, goodput, read_rows

Curves = dict[str, tuple[tuple[int, ...], tuple[float, ...]]]  # name -> (steps, values)
MAX_SHEETS = 4
SHEETS = {  # kind of a stage -> task -> what its sheets show
    "autoencoder": {"": "Reconstructions, each left of its original", "ti2i": "Edits, each between its source and the held-out picture"},
    "generator": {"": "Samples, each left of the held-out picture", "ti2i": "Edits, each between its source and the held-out picture"},
}


def save_counts(run: Run, stage: StageConfig, loader: Loader) -> None:
  """Writes data.json of a stage: what became of the records of each target size, and what it cost that shapes share buckets. The log says what is in
  no batch."""
  folder = run.workdir / stage.name
  merging = loader.mixture.merging
  facts = {"merging": dataclasses.asdict(merging), "counts": [dataclasses.asdict(count) for count in loader.counts]}
  write_file(folder / "data.json", json.dumps(facts, indent=1))
  if merging.most_repeated > 1:
    logging.warning("Stage %s: a batch holds a record up to %d times, because a data set has fewer records in a bucket than a batch has rows.",
                    stage.name, merging.most_repeated)
  if merging.left_out:
    logging.warning("Stage %s: %.2f%% of the records are in no batch, because none of its %d buckets fits them: raise max_programs or max_crop, "
                    "give it more ratios, or lower min_bucket_records. %s counts them by target size.", stage.name, 100 * merging.left_out,
                    merging.buckets, folder / "data.json")


def write_report(run: Run) -> Place:
  """Writes report.html of a run and returns its path; what does not exist yet is left out."""
  record = json.loads((run.workdir / "config.json").read_text(encoding="utf-8"))
  started = [stage for stage in run.cfg.stages if (run.workdir / stage.name / "data.json").exists()]
  body = [f"<h1>{html.escape(run.workdir.name)}</h1>", _evaluation(run.workdir), _overview(run, started, record)]
  body += [part for stage in started for part in _stage(run, stage)]
  body += ["<h2>Config</h2>", f"<pre>{html.escape(json.dumps(record, indent=1))}</pre>"]
  path = run.workdir / "report.html"
  write_file(path, page(run.workdir.name, body))
  return path


def _evaluation(workdir: Place) -> str:
  path = workdir / "evaluation.json"
  if not path.exists():
    return ""
  result = json.loads(path.read_text(encoding="utf-8"))
  figures = figures_of(result, with_intervals=True)
  return (f"<h2>Evaluation</h2><p>{html.escape(counts_of(result))}, drawn by stage "
          f"<b>{html.escape(result['stage'])}</b>.</p>" + table(("figure", "value, 95 % interval"), figures)
          + image((workdir / "evaluation.png").read_bytes()))


def _overview(run: Run, stages: Sequence[StageConfig], record: dict) -> str:
  rows = []
  for stage in stages:
    losses = read_rows(run.workdir / stage.name / "metrics.jsonl")
    rates = _series(read_rows(run.workdir / stage.name / "timing.jsonl"), "samples_per_second")[1]
    validation = _series(losses, "val_loss")[1]
    sizes = ", ".join(f"{r.base_px} px x {r.batch_size}" for r in stage.resolutions)
    rows.append((stage.name, stage.algorithm.name, stage.start_from, max((row["step"] for row in losses), default=0),
                 stage.num_steps, sizes, f"{stage.optimizer.learning_rate:g}", f"{validation[-1]:.4f}" if validation else "",
                 f"{sorted(rates)[len(rates) // 2]:.1f}" if rates else ""))
  head = ("stage", "algorithm", "start", "step", "of", "resolution x batch", "learning rate", "validation loss", "samples/s, median")
  device = f"{record['num_devices']} device(s) of kind {html.escape(record['device_kind'])}"
  return f"<h2>Stages</h2>{table(head, rows)}<p>{device}.</p>"


def _stage(run: Run, stage: StageConfig) -> Iterable[str]:
  folder = run.workdir / stage.name
  rows = read_rows(folder / "metrics.jsonl")
  yield f"<h2>Stage {html.escape(stage.name)}</h2>"
  yield _plot(loss_curves(rows), "loss", log=True)
  bins = {key for row in rows for key in row if re.fullmatch(r"val_loss_bin\d+", key)}
  if bins:
    yield "<h3>Validation loss per time bin</h3><p>Bin 0 is nearest to the data, the last one to noise.</p>"
    yield _plot({name.removeprefix("val_loss_"): _series(rows, name) for name in sorted(bins)}, "validation loss", log=True)
  suites = sorted({key for row in rows for key in row if key.startswith("evals/")})
  if suites:
    yield "<h3>Evaluation suites while it trained</h3>"
    yield _plot({name.removeprefix("evals/"): _series(rows, name) for name in suites}, "figure", log=False)
  timing = read_rows(folder / "timing.jsonl")
  yield "<h3>Throughput</h3>" + _throughput(timing) + _goodput(timing)
  yield _faults(folder)
  yield "<h3>Data</h3>" + _counts(folder)
  sheets = sorted((folder / "samples").glob("*.png"))
  for task, title in SHEETS.get(stage.kind, {}).items():
    for sheet in _spread([path for path in sheets if path.stem.partition("_")[2] == task], MAX_SHEETS):
      yield f"<h3>{title}: step {int(sheet.stem.partition('_')[0])}</h3>{image(sheet.read_bytes())}"


def _throughput(timing: Sequence[dict]) -> str:
  parts = [_plot({"samples/s": _series(timing, "samples_per_second")}, "samples per second", log=False)]
  steps, shares = _series(timing, "data_wait_share")
  if shares:
    parts += [f"<p>Steps waited for data during at most {sum(shares) / len(shares):.1%} of the time on average, {max(shares):.1%} between the two "
              "rows of the log with the most waiting.</p>", _plot({"waiting for data": (steps, shares)}, "share of the time", log=False)]
  return "".join(parts)


def _goodput(timing: Sequence[dict]) -> str:
  """A table of where the wall time went, over all starts of the stage."""
  total = goodput(timing)
  if not total:
    return ""
  kinds = [("steps", total["step_s"]), ("steps that a later start repeated", total["lost_s"])]
  kinds += [("evaluation and samples" if kind == "evaluation" else kind, total[f"{kind}_s"]) for kind in NEXT_TO_STEPS]
  rows = [(name, f"{seconds:.1f}", f"{seconds / total['wall_s']:.1%}") for name, seconds in kinds]
  starts = f"{total['starts']} start{'s' if total['starts'] > 1 else ''}"
  return (f"<p>Goodput {total['step_s'] / total['wall_s']:.1%}: steps that count, of {total['wall_s']:.0f} s in {starts}.</p>"
          + table(("time went to", "seconds", "share"), rows))


def _faults(folder: Place) -> str:
  """How many updates were skipped, how many losses jumped, and which rule ended the stage; nothing where none did."""
  rows = read_rows(folder / "faults.jsonl")
  kinds = [row["fault"] for row in rows]
  said = [f"<p>Ended by its watch after step {row['step']}: {html.escape(row['sentence'])}.</p>" for row in rows if row["fault"] == "watch"]
  if len(said) < len(rows):
    said.append(f"<p>{kinds.count('skipped')} updates were skipped because the loss or a gradient was not finite, and {kinds.count('spike')} times "
                "the loss was far above its median: steps and samples are in faults.jsonl.</p>")
  return f"<h3>Faults</h3>{''.join(said)}" if said else ""


def _counts(folder: Place) -> str:
  facts = json.loads((folder / "data.json").read_text(encoding="utf-8"))
  counts, merging = (facts, {}) if isinstance(facts, list) else (facts["counts"], facts["merging"])  # a list is of an earlier version
  shown = table(("shapes and buckets", ""), [(name.replace("_", " "), f"{value:.2%}" if isinstance(value, float) else value)
                                              for name, value in merging.items()]) if merging else ""
  return shown + (table(tuple(name.replace("_", " ") for name in counts[0]), [tuple(count.values()) for count in counts]) if counts else "")


def _series(rows: Sequence[dict], name: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
  pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
  return tuple(step for step, _ in pairs), tuple(value for _, value in pairs)


def _spread(items: Sequence, most: int) -> list:
  """At most `most` items, evenly spread, first and last among them."""
  if len(items) <= most:
    return list(items)
  return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def loss_curves(rows: Sequence[dict]) -> Curves:
  """The losses among the rows of a metrics.jsonl: of training, and of validation where there was one."""
  curves = {name: _series(rows, name) for name in ("loss", "val_loss", "ema/val_loss", "ti2i/val_loss", "ti2i/ema/val_loss")}
  return {name: curve for name, curve in curves.items() if curve[0]}


def _plot(curves: Curves, label: str, log: bool) -> str:
  return image(figure_png(curves, label, log))


def figure_png(curves: Curves, label: str, log: bool) -> bytes:
  """A figure of curves over the steps as a PNG, all of one size; `label` is that of the other axis, `log` whether it is logarithmic."""
  return _figure(tuple(curves.items()), label, log)


@functools.lru_cache(maxsize=256)  # the report is written after every stage, and the curves of those before it are the same
def _figure(curves: tuple, label: str, log: bool) -> bytes:
  from matplotlib.figure import Figure  # it takes a while, and only this needs it

  figure = Figure(figsize=(9, 3.2), dpi=90, layout="constrained")  # there is room for the labels, however wide, and the size stays
  axes = figure.add_subplot()
  for name, (steps, values) in curves:
    axes.plot(steps, values, label=name, marker="." if len(steps) < 20 else None, linewidth=1.2)
  axes.set_xlabel("step")
  axes.set_ylabel(label)
  if log:
    axes.set_yscale("log")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8, ncols=2)
  return as_png(figure)
