"""The evaluation that a run makes of itself: the suites of its config, drawn by its last stage.

A config names suites in `config.evals`, such as {"glyphs": {"num_prompts": 200}}; the run evaluates its last stage, and `python -m launch.evaluate`
any other. While a stage trains, a few prompts of each can be drawn and scored, too (`config.stages[i].evals_every_steps`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from qimg2.evaluation import ERROR, Suite, show
from qimg2.places import write_file
from qimg2.runtime import processes
from qimg2.runtime.config import StageConfig, plain
from qimg2.runtime.evaluating.drawing import Painter, learned, painter_of_run
from qimg2.runtime.evaluating.registry import SEED, SUITES, make_suite
from qimg2.runtime.evaluating.scoring import Scorer
from qimg2.runtime.evaluating.summary import clusters, in_words, left_out_in_words, row_of, summarise
from qimg2.runtime.run import Run
from qimg2.runtime.sampling import sampling_weights
from qimg2.runtime.sheets import grid, save_picture
from qimg2.sharding import broadcast_from_first
from qimg2.training.checkpoint import Checkpoints, newest_step
from qimg2.training.metrics import MetricsWriter

NUM_SHOWN = 48
BLANK_PX = 16
RIGHT = ("glyphs", "glyph_edits", "emoji", "emoji_edits")  # suites that compare pictures with clean renders


def evaluate(run: Run, stage_name: str = "", suites: Mapping[str, tuple[Suite, int]] | None = None,
             step: int | None = None) -> dict[str, Any]:
  """{"stage", "step", "config", "suites": {name: {"num_prompts", "shares": {metric: mean}, "figures", ...}}}: results, and of what they are.

  "config" is a digest of the run's, None for suites that are not the config's; "figures" are the shares with their intervals, see
  `summary.summarise`. All of it is also in evaluation.json, and the pictures are in evaluation.png, of the run's folder.

  Suites whose number of condition images the stage did not learn are left out, with a line in the log. Each is drawn for itself, so its figures
  do not depend on the others.

  Args: run; stage, the last trained one when empty; {name: (suite, number of prompts)} in place of those of the config; step of the checkpoint, whose
  result is in `<stage>/evaluation_<step>.json` and `.png`, None for the newest.

  Raises:
    ValueError: no suite, none that the stage learned, or no such stage.
  """
  digest, suites = (_digest(run), configured(run)) if suites is None else (None, suites)
  if not suites:
    raise ValueError(f"config.evals is empty, so there is nothing to evaluate: add a suite, one of {', '.join(SUITES)}.")
  name, weights = sampling_weights(run, stage_name, step=step)
  place = run.workdir / (f"{name}/evaluation_{step}" if step is not None else "evaluation" if not stage_name or name == last_generator(run) else
                         f"{name}/evaluation")  # that of the run is of its last stage
  step = Checkpoints(run.workdir / name / "checkpoints").latest_step() if step is None else step
  results, shown = {}, []
  for suite_name, (suite, num) in suites.items():
    tasks = suite.tasks(num, SEED)
    if not learned(run.loader(run.stages[name]).buckets, tasks):
      logging.warning("Suite %s is left out: stage %s has no batches with %d condition images.", suite_name, name, len(tasks[0].sources))
      continue
    painter = painter_of_run(run, name, lambda: weights, tasks)
    pictures, results[suite_name] = _scored(painter, suite_name, suite, tasks)
    suite.release()
    shown.append([cell for i, (picture, scores) in enumerate(pictures) for cell in _cells(suite, tasks[i], picture, scores)])
  if not results:
    raise ValueError(f"Stage {name!r} learned no task of the suites {', '.join(suites)}: evaluate another stage or add a suite.")
  result = {"stage": name, "step": step, "config": digest, "suites": results}
  if processes.is_first():
    images, captions = zip(*[cell for cells in shown for cell in cells[:NUM_SHOWN // len(shown)]])
    save_picture(grid(images, 8, captions), place.with_name(f"{place.name}.png"))
    write_file(place.with_name(f"{place.name}.json"), json.dumps(result, indent=1))
  return result


def _cells(suite: Suite, task: Any, picture: np.ndarray | str, scores: Mapping[str, Any]) -> list[tuple[np.ndarray, str]]:
  """What stands on the sheet for a task; a blank in place of a picture that is none."""
  if isinstance(picture, str):
    return show(dataclasses.replace(task, prompt=f"{task.prompt} ({picture})"), np.full((BLANK_PX, BLANK_PX, 3), 255, np.uint8), {})
  return show(task, picture, {}) if ERROR in scores else suite.show(task, picture, scores)


def _scored(painter: Painter, name: str, suite: Suite, tasks: list) -> tuple[list[tuple[np.ndarray | str, dict]], dict[str, Any]]:
  """([(picture or why there is none, scores)] of all tasks, the suite's figures), each drawn once with the seed of the tasks."""
  found: list = [None] * len(tasks)
  with Scorer(suite) as scorer:
    for chunk in painter.chunks((SEED,)):
      numbers, pictures = painter.tasks_of(chunk), painter.draw(chunk)
      scores, _ = scorer.begin([tasks[i] for i in numbers], pictures).finish()
      for i, *pair in zip(numbers, pictures, scores):
        found[i] = tuple(pair)
  same = clusters(list(map(str, range(len(tasks)))), tasks)
  rows = [row_of(name, str(i), tasks[i], SEED, "", scores, same[i]) for i, (_, scores) in enumerate(found)]
  summary = summarise(suite, rows)
  if summary["num_left_out"]:
    logging.warning("Suite %s: %s.", name, left_out_in_words(summary))
  return found, summary | {"num_prompts": len(tasks), "shares": {
      key: value["value"] for key, value in summary["figures"].items() if value["figure"]["is_share"]}}


def suites_hook(run: Run, config: StageConfig, deployed: Callable[[dict], dict]):
  """A hook that draws the first `config.evals_num_prompts` prompts of each suite of the config that the stage learns, and logs their figures."""
  suites = {name: (suite, suite.tasks(num, SEED)[:config.evals_num_prompts]) for name, (suite, num) in configured(run).items()}
  buckets, current = run.loader(config).buckets, {}
  painters = {name: painter_of_run(run, config.name, lambda: current["weights"], tasks)
              for name, (_, tasks) in suites.items() if learned(buckets, tasks)}

  def hook(weights: dict, step: int, writer: MetricsWriter) -> dict[str, float]:
    del step, writer
    current["weights"] = deployed(weights)
    scalars = {}
    for name, painter in painters.items():
      _, found = _scored(painter, name, *suites[name])
      scalars |= {f"evals/{name}/{key}": value for key, value in found["shares"].items() if value is not None}
    current.clear()
    for suite, _ in suites.values():
      suite.release()  # training goes on, and needs the memory
    return scalars
  return hook


def evaluation(run: Run) -> dict[str, Any]:
  """What `evaluate` gives for a run whose stages are trained: read where it was done before."""
  found = recorded_evaluation(run)
  return evaluate(run) if found is None else found


def recorded_evaluation(run: Run) -> dict[str, Any] | None:
  """What evaluation.json says where it is of the run's last generator, its newest checkpoint, and the same config, which the first process sees for
  all; else None. No checkpoint is read."""
  path, name = run.workdir / "evaluation.json", last_generator(run)
  wanted = {"stage": name, "step": newest_step(run.workdir / name / "checkpoints"), "config": _digest(run)}
  found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  return found if broadcast_from_first(np.int32({key: found.get(key) for key in wanted} == wanted)) else None


def last_generator(run: Run) -> str:
  """Name of the last stage that trains the generator, which is evaluated when all are trained; "" where there is none."""
  return next((stage.name for stage in reversed(run.cfg.stages) if stage.kind == "generator"), "")


def _digest(run: Run) -> str:
  return hashlib.sha256(json.dumps(plain(run.cfg), sort_keys=True).encode()).hexdigest()


def configured(run: Run) -> dict[str, tuple[Suite, int]]:
  """Name -> (suite, number of prompts) of the run's config."""
  return {name: make_suite(name, run.cfg.evals[name], run) for name in SUITES if name in run.cfg.evals}


# In words.


def figures_of(result: dict, with_intervals: bool = False) -> list[tuple[str, str]]:
  """(what it is, its value in words) of each figure of a result, also of one of an earlier version, which has shares alone."""
  found = []
  for suite, facts in result["suites"].items():
    for name, share in facts["shares"].items() if "figures" not in facts else ():
      found.append((_called(suite, name), f"{share:.1%}"))
    for name, figure in facts.get("figures", {}).items():
      is_share = figure["figure"]["is_share"]
      short = is_share and not with_intervals and figure["value"] is not None
      found.append((_called(suite, name) if is_share else name, f"{figure['value']:.1%}" if short else in_words(figure, with_intervals)))
  return found


def _called(suite: str, name: str) -> str:
  """What a share is called: of what is compared with clean renders it says how often that is right."""
  return f"{name} right" if (suite in RIGHT or suite not in SUITES) and not name.endswith("chance") else name


def counts_of(result: dict) -> str:
  """How many prompts of which suites were drawn, and how many pictures could not be scored."""
  of = lambda suite: f" ({suite['num_left_out']} could not be scored)" if suite.get("num_left_out") else ""
  return " and ".join(f"{suite['num_prompts']} held-out prompts of {name}{of(suite)}" for name, suite in result["suites"].items())


def describe(result: dict) -> str:
  """One line that states the result of `evaluate`."""
  figures = ", ".join(f"{name} {text}" for name, text in figures_of(result))
  return f"Evaluation of stage {result['stage']} on {counts_of(result)}: {figures}."
