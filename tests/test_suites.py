"""Evaluation suites: a clean render is right in every metric, a wrong picture is not, and a suite can be written in a few lines."""

import dataclasses
import shutil
import types

import numpy as np
import pytest
from marks import needs_emoji

from configs import emoji as emoji_config
from data_pipelines.embedded import emoji, glyphs
from qimg2.evaluation import Suite, Task
from qimg2.rewards.glyphs import PARTS
from qimg2.runtime.config import parse
from qimg2.runtime.evaluating import of_run, registry
from qimg2.runtime.generator import Generator
from qimg2.runtime.run import load_run


def made(name, **settings):
  return registry.SUITES[name](types.SimpleNamespace(cfg=parse(emoji_config.get_config())), **settings)


def assert_tasks_are_a_function_of_number_and_seed(suite):
  few, many, other = ([task.prompt for task in suite.tasks(num, seed)] for num, seed in ((6, 1), (9, 1), (6, 2)))
  assert few == many[:6] != other


def test_glyphs_know_right_from_wrong():
  suite = made("glyphs")
  assert_tasks_are_a_function_of_number_and_seed(suite)
  tasks = suite.tasks(8, 1)
  assert not any(task.sources for task in tasks)
  right = [suite.score(task, glyphs.render(task.truth, *task.size)) for task in tasks]
  assert all(scores == {"glyph": 1.0, "ink": 1.0, "paper": 1.0, "everything": 1.0} for scores in right)
  blank = np.full((64, 64, 3), 255, np.uint8)
  scores = suite.score(tasks[0], blank)
  assert scores["everything"] == 0.0 and suite.show(tasks[0], blank, scores)[-1][1].startswith(f"{tasks[0].prompt} [wrong: ")


def test_an_edit_that_changes_nothing_is_wrong():
  suite = made("glyph_edits")
  assert_tasks_are_a_function_of_number_and_seed(suite)
  for task in suite.tasks(8, 1):
    target, source = task.truth
    assert (task.sources[0] == glyphs.render(source, *task.size)).all()
    scores = suite.score(task, glyphs.render(target, *task.size))
    assert {scores[f"edit: {name}"] for name in (*PARTS, "everything")} == {1.0}
    assert scores.get("edit: kept_psnr", 100) == 100 and scores.get("edit: kept_ssim", 1) == 1 and scores.keys() <= {
        name for figure in suite.figures.values() for name in (figure.numerator, figure.denominator)}
    unchanged = suite.score(task, task.sources[0])
    assert unchanged["edit: change"] == unchanged["edit: everything"] == 0.0
    (_, first), (_, second) = suite.show(task, task.sources[0], unchanged)
    assert first == "(source)" and second.startswith(f"edit: {task.prompt} [wrong: ") and second.endswith("change]")


@needs_emoji
@pytest.mark.apart("emoji")
@pytest.mark.slow  # draws every emoji once
def test_emoji_know_right_from_wrong():
  suite = made("emoji", num_candidates=20)
  assert_tasks_are_a_function_of_number_and_seed(suite)
  one, other = suite.tasks(2, 1)
  picture = emoji.render(one.truth.asked, one.truth.paper, 64)
  assert suite.score(one, picture) == {"emoji": 1.0} and suite.score(other, picture) == {"emoji": 0.0}
  assert suite.show(other, picture, {"emoji": 0.0})[0][1] == f"{other.prompt} [nearest: {one.prompt.rpartition(', on ')[0]}]"
  with pytest.raises(ValueError, match="The suite emoji asks 21 prompts among 20 candidates"):
    suite.tasks(21, 1)


@pytest.mark.slow
@needs_emoji
@pytest.mark.apart("emoji")
def test_emoji_edits_know_right_from_wrong():
  suite = made("emoji_edits")
  assert_tasks_are_a_function_of_number_and_seed(suite)
  for task in suite.tasks(4, 1):
    assert suite.score(task, emoji.render(task.truth.asked, task.truth.paper, 64)) == {
        "edit": 1.0, "edit by chance": 1 / len(task.truth.candidates)}
    assert suite.score(task, emoji.render(task.truth.source, task.truth.paper, 64))["edit"] == 0.0


def test_a_stage_is_evaluated_on_a_suite_of_ones_own(smoke_run, tmp_path, one_device):
  run = load_run(shutil.copytree(smoke_run.workdir, tmp_path / "run"))
  suite = Suite(lambda num, seed: [Task(f"{number + seed}", (64, 64)) for number in range(num)],
                lambda task, picture: {"seven": float(task.prompt == "7"), "seven by chance": 0.25})
  result = of_run.evaluate(run, suites={"own": (suite, 4)})
  own = result["suites"].pop("own")
  assert result == {"stage": "sft", "step": 2, "config": None, "suites": {}}
  assert own["num_prompts"] == 4 and own["shares"] == {"seven": 0.25, "seven by chance": 0.25} and own["figures"]["seven"]["low"] < 0.25
  result["suites"]["own"] = own
  assert of_run.describe(result) == "Evaluation of stage sft on 4 held-out prompts of own: seven right 25.0%, seven by chance 25.0%."
  with pytest.raises(ValueError, match="config.evals is empty, so there is nothing to evaluate: add a suite, one of glyphs, "):
    of_run.evaluate(run, suites={})
  edits = Suite(lambda num, seed: [Task("x", (64, 64), (np.zeros((64, 64, 3), np.uint8),))], suite.score)
  with pytest.raises(ValueError, match="Stage 'low_resolution' learned no task of the suites own"):
    of_run.evaluate(run, "low_resolution", {"own": (edits, 1)})


def test_suites_are_drawn_while_a_stage_trains(smoke_run, tmp_path, one_device):
  """Their figures are those of the end, of the first prompts, and stand in the metrics; a suite of edits is none of a stage without them."""
  run, stage = smoke_run, smoke_run.stages["sft"]
  stage = dataclasses.replace(stage, evals_every_steps=2, evals_num_prompts=4)
  algorithm = run.algorithm(stage)
  weights = {**run.stage_weights("sft"), **run.frozen_weights(stage)}
  found = of_run.suites_hook(run, stage, algorithm.deployed)(weights, 2, None)
  assert {name.split("/")[:2][1] for name in found} == {"glyphs", "glyph_edits"} and all(0 <= share <= 1 for share in found.values())
  few = of_run.evaluate(load_run(shutil.copytree(run.workdir, tmp_path / "run")), suites={
      name: (suite, 4) for name, (suite, _) in of_run.configured(run).items()})["suites"]
  assert found == {f"evals/{name}/{key}": share for name, suite in few.items() for key, share in suite["shares"].items()}
  hook, first = of_run.suites_hook(run, stage, lambda given: given), algorithm.deployed(weights)
  seen = []
  with pytest.MonkeyPatch.context() as patch:  # of each call its own weights, not those of the first
    blank = lambda self, given, prompts, *_, **__: (
        None, seen.append(given) or np.zeros((len(prompts), 64, 64, 3), np.uint8), [""] * len(prompts))
    patch.setattr(Generator, "draw_each", blank)
    hook(first, 2, None), hook(dict(first), 4, None)
  assert seen[0] is first and seen[-1] is not first
  low = of_run.suites_hook(run, dataclasses.replace(run.stages["low_resolution"], evals_num_prompts=1), algorithm.deployed)
  assert {name.split("/")[1] for name in low(weights, 2, None)} == {"glyphs"}
