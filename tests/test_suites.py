"""Evaluation suites: a clean render is right in every metric, a wrong picture is not, and a suite can be written in a few lines."""

import shutil

import numpy as np
import pytest
from marks import needs_emoji

from configs import emoji as emoji_config
from data_pipelines.embedded import emoji, glyphs
from qimg2.evaluation import Suite, Task, mean_scores
from qimg2.runtime import suites
from qimg2.runtime.config import parse
from qimg2.runtime.run import load_run


def made(name, **settings):
  return suites.SUITES[name](parse(emoji_config.get_config()).prepare, **settings)


def assert_tasks_are_a_function_of_number_and_seed(suite):
  few, many, other = ([task.prompt for task in suite.tasks(num, seed)] for num, seed in ((6, 1), (9, 1), (6, 2)))
  assert few == many[:6] != other


def test_glyphs_know_right_from_wrong():
  suite = made("glyphs")
  assert_tasks_are_a_function_of_number_and_seed(suite)
  tasks = suite.tasks(8, 1)
  assert not any(task.sources for task in tasks)
  right = [suite.score(task, glyphs.render(task.truth, *task.size)) for task in tasks]
  assert mean_scores(right) == {"glyph": 1.0, "ink": 1.0, "paper": 1.0, "everything": 1.0}
  blank = np.full((64, 64, 3), 255, np.uint8)
  scores = suite.score(tasks[0], blank)
  assert scores["everything"] == 0.0 and suite.show(tasks[0], blank, scores)[-1][1].startswith(f"{tasks[0].prompt} [wrong: ")


def test_an_edit_that_changes_nothing_is_wrong():
  suite = made("glyph_edits")
  assert_tasks_are_a_function_of_number_and_seed(suite)
  for task in suite.tasks(8, 1):
    target, source = task.truth
    assert (task.sources[0] == glyphs.render(source, *task.size)).all()
    assert set(suite.score(task, glyphs.render(target, *task.size)).values()) == {1.0}
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
  with pytest.raises(ValueError, match="config.evals.emoji asks 21 prompts among 20 candidates"):
    suite.tasks(21, 1)


@pytest.mark.slow
@needs_emoji
def test_emoji_edits_know_right_from_wrong():
  suite = made("emoji_edits")
  assert_tasks_are_a_function_of_number_and_seed(suite)
  for task in suite.tasks(4, 1):
    assert suite.score(task, emoji.render(task.truth.asked, task.truth.paper, 64)) == {
        "edit": 1.0, "edit by chance": 1 / len(task.truth.candidates)}
    assert suite.score(task, emoji.render(task.truth.source, task.truth.paper, 64))["edit"] == 0.0


def test_a_stage_is_evaluated_on_a_suite_of_ones_own(smoke_run, tmp_path):
  run = load_run(shutil.copytree(smoke_run.workdir, tmp_path / "run"))
  suite = Suite(lambda num, seed: [Task(f"{number + seed}", (64, 64)) for number in range(num)],
                lambda task, picture: {"seven": float(task.prompt == "7"), "seven by chance": 0.25})
  result = suites.evaluate(run, suites={"own": (suite, 4)})
  own = {"num_prompts": 4, "shares": {"seven": 0.25, "seven by chance": 0.25}}
  assert result == {"stage": "sft", "step": 2, "config": None, "suites": {"own": own}}
  assert suites.describe(result) == "Evaluation of stage sft on 4 held-out prompts of own: seven right 25.0%, seven by chance 25.0%."
  with pytest.raises(ValueError, match="config.evals is empty, so there is nothing to evaluate: add a suite, one of glyphs, "):
    suites.evaluate(run, suites={})
  edits = Suite(lambda num, seed: [Task("x", (64, 64), (np.zeros((64, 64, 3), np.uint8),))], suite.score)
  with pytest.raises(ValueError, match="Stage 'low_resolution' learned no task of the suites own"):
    suites.evaluate(run, "low_resolution", {"own": (edits, 1)})
