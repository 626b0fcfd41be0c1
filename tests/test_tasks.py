"""Rewards are told of each row what its record says, in every process what its own rows need, and no device sees it."""

import dataclasses
import json
import types

import numpy as np
import pytest

from data_pipelines import embedded, records, truths
from data_pipelines.embedded import glyphs
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution
from qimg2.algorithms import Rewards
from qimg2.batch import for_device
from qimg2.runtime import rewards
from qimg2.runtime.config.rewards import parse_rewards

RESOLUTIONS = (Resolution(64, 4, ("1:1",), multiple=16),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The embedded data set with 60 training pictures and 30 edits."""
  folder = tmp_path_factory.mktemp("data")
  embedded.prepare("glyphs", folder, num_examples=60, seed=0)
  return folder


@pytest.fixture(scope="module")
def make(folder):
  """Makes a loader of these data, without caption dropout."""
  tokenizer = records.load_tokenizer(folder, "glyphs")
  return lambda task="t2i", **options: Loader([DatasetSpec(str(folder), "glyphs", task=task)], RESOLUTIONS, 64, tokenizer, 0,
                                              **{"caption_dropout": 0.0, "tasks": True} | options)


def test_a_row_has_the_prompt_that_its_tokens_say_and_the_truth_of_its_record(make):
  loader = make()
  _, batch = loader.batch(3)
  for tokens, sample_id, task in zip(batch["tokens"], batch["sample_id"], batch["tasks"], strict=True):
    record = glyphs.example(int(sample_id), 0)
    assert task["prompt"] in record["captions"] and loader._tokenizer.decode_prompt(tokens).strip() == task["prompt"]
    assert task == {**json.loads(record["attributes"]), "prompt": task["prompt"], "category": "glyphs", "dataset": "glyphs", "sample_id": sample_id}
  assert "tasks" not in for_device(batch) and for_device(batch).keys() == loader.example(loader.buckets[0]).keys()
  assert "tasks" not in make(tasks=False).batch(3)[1]


@pytest.mark.parametrize("options", [{}, {"process_index": 1, "process_count": 2}])
def test_each_process_has_the_tasks_of_its_rows(make, options):
  whole, some = make().batch(2)[1], make(**options).batch(2)[1]
  rows = make(**options).own_rows(4)
  assert some["tasks"] == tuple(whole["tasks"][row] for row in rows)
  assert next(make(**options).iterate(2))[1]["tasks"] == some["tasks"]


def test_the_prompts_of_scored_pictures_are_never_empty(make):
  with pytest.raises(ValueError, match="caption_dropout=0.1 empties prompts"):
    make(caption_dropout=0.1)


def record(attributes):
  return {"attributes": attributes, "sample_id": 7}


def test_a_truth_names_the_category_and_hides_nothing_of_the_batch():
  task = truths.make_task(record(b'{"category": "posters", "prompt": "other", "text": ["OPEN"]}'), "a sign", "signs", "it")
  assert task == {"category": "posters", "prompt": "a sign", "text": ["OPEN"], "dataset": "signs", "sample_id": 7}
  assert truths.make_task(record(b'{"category": 3}'), "a sign", "signs", "it")["category"] == "signs"
  for wrong, message in ((b"{", "no JSON"), (b"[1]", r"\[1\] and no JSON object")):
    with pytest.raises(ValueError, match=f"attributes of sample 7 .*{message}"):
      truths.make_task(record(wrong), "a sign", "signs", "sample 7")


def test_a_batch_gets_its_categories_and_condition_images(make):
  _, batch = make("ti2i").batch(0)
  declared = Rewards(("a", "b"), None, ((1.0, 0.0), (0.0, 1.0), (0.0, 0.5)), ("glyphs", "posters", "other"))
  found = rewards.with_tasks(batch, declared)
  assert found["category"].tolist() == [0] * 4 and found["category"].dtype == np.int32
  np.testing.assert_array_equal(found["tasks"][2]["sources"][0], batch["sources"][0][2])
  assert [declared.find_category({"category": name}) for name in ("posters", "cats", "glyphs")] == [1, 2, 0]
  assert "category" not in rewards.with_tasks(batch, dataclasses.replace(declared, weights=((1.0, 1.0),), categories=()))
  with pytest.raises(ValueError, match="3 categories need as many rows of weights, not 1"):
    dataclasses.replace(declared, weights=((1.0, 1.0),))


def stage_with(folder, sections, **part):
  """What `check_rewards` and `asks` look at of a stage."""
  return types.SimpleNamespace(name="rl", rewards=parse_rewards(sections, "rewards"), mixture=(DatasetSpec(str(folder), "glyphs", **part),))


def test_a_data_set_without_the_truth_that_a_reward_needs_is_refused(folder):
  rewards.check_rewards(stage_with(folder, {"glyph": {}}))
  rewards.check_rewards(stage_with(folder, {"glyph": {"parts": ("change",)}, "kept": {}}, task="ti2i"))
  for sections, message in (({"ocr": {}}, "the reward ocr, but the data set 'glyphs' has no truth for it: of sample 0, its record has no field text"),
                            ({"kept": {}}, "no truth for it: of sample 0, its record is no edit: it has no condition image; take another"),
                            ({"own": {"kind": "function", "function": "no_such:f"}}, "has the reward own, but there is no module 'no_such'")):
    with pytest.raises(ValueError, match=message):
      rewards.check_rewards(stage_with(folder, sections))


def test_a_reward_asks_for_no_truth_where_it_does_not_count(folder):
  stage = stage_with(folder, {"glyph": {}, "ocr": {"weight": {"posters": 1.0}}, "seen": {"kind": "ocr", "weight": 0.0}})
  is_asked = rewards.asks(stage)
  assert [is_asked(name, {"category": "glyphs"}) for name in ("glyph", "ocr", "seen")] == [True, False, True]
  assert is_asked("ocr", {"category": "posters"})
  rewards.check_rewards(stage_with(folder, {"glyph": {}, "ocr": {"weight": {"posters": 1.0}}}))


def test_records_of_which_some_have_no_truth_are_used_with_a_warning(folder, caplog, monkeypatch):
  tasks = [{"prompt": prompt, "category": "", "sample_id": number} for number, prompt in enumerate(('a "B"', "a cat", "a dog"))]
  monkeypatch.setattr(rewards, "_some_tasks", lambda part: tasks)
  rewards.check_rewards(stage_with(folder, {"ocr": {}}))
  assert "2 of 3 records of the data set 'glyphs' that were looked at have no truth for the reward ocr" in caplog.text and "'a cat'" in caplog.text
