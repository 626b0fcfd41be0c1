"""Files that the judge's suites read: prompts, pictures of another evaluation by its manifest, condition images when they are looked at."""

import dataclasses
import json
import types

import numpy as np
import pytest

from data_pipelines.transforms import decode_image, encode_png
from qimg2.evaluation import Task, judge_prompts
from qimg2.runtime import judging
from qimg2.runtime.evaluating.drawing import groups_of_sizes
from qimg2.runtime.evaluating.summary import prompt_set
from qimg2.runtime.rivals import Rivals

ROWS = [("a", "x", 3), ("a", "x", 4), ("b", "another", 3), ("renamed", "z", 3), ("one", "u", 3), ("two", "u", 3), ("gone", "w", 3)]


def flat(level):
  return np.full((8, 8, 3), level, np.uint8)


def line(name, prompt, seed, suite="judge"):
  return json.dumps({"file": f"pictures/{suite}/{name}_{seed}.png", "task": name, "prompt": prompt, "seed": seed}) + "\n"


@pytest.fixture
def other(tmp_path):
  """An evaluation of two suites; the picture in place i of `ROWS` has level i."""
  for suite in ("judge", "tifa"):
    (tmp_path / "pictures" / suite).mkdir(parents=True)
  for level, (name, _, seed) in enumerate(ROWS[:-1]):
    (tmp_path / "pictures" / "judge" / f"{name}_{seed}.png").write_bytes(encode_png(flat(level)))
  (tmp_path / "pictures" / "tifa" / "a_3.png").write_bytes(encode_png(flat(99)))
  (tmp_path / "manifest.jsonl").write_text(line("a", "x", 3, "tifa") + "".join(line(*row) for row in ROWS))
  return tmp_path


def test_a_rival_is_of_the_same_prompt_and_of_one_seed(other):
  task = lambda prompt, name: Task(prompt, (8, 8), name=name)
  judge, whole = Rivals(str(other / "pictures" / "judge"), 3), Rivals(str(other), 4)
  level = lambda rivals, *what: int(rivals.read(task(*what))[0, 0, 0])
  assert level(judge, "x", "a") == 0 and level(judge, "x", "other") == 0 and level(whole, "x", "a") == 1
  assert level(Rivals(str(other / "pictures" / "tifa"), 3), "x", "a") == 99
  assert level(judge, "z", "c") == 3  # the name differs, the prompt does not
  assert level(judge, "u", "two") == 5
  for what, message in [(("y", "b"), "the picture b of .* was drawn for another prompt, 'another'"), (("w", "gone"), "no picture of this prompt"),
                        (("u", "d"), "2 pictures of this prompt with seed 3, and none has the name d"), (("v", "e"), "no picture .* with seed 3")]:
    with pytest.raises(ValueError, match=message):
      judge.read(task(*what))
  (other / "manifest.jsonl").write_text('{"file": "a.png"}\n')
  with pytest.raises(ValueError, match="Line 1 of .*manifest.jsonl has no text in the field 'prompt'"):
    Rivals(str(other), 3)
  (other / "manifest.jsonl").unlink()
  assert level(Rivals(str(other / "pictures" / "judge"), 3), "unknown", "b") == 2  # by its name alone


def test_condition_images_are_read_when_they_are_looked_at(tmp_path, monkeypatch):
  opened, paths = [], tuple(tmp_path / f"{number}.png" for number in range(2))
  images = [np.random.default_rng(number).integers(0, 256, (64, 32, 3), np.uint8) for number in range(2)]
  for path, image in zip(paths, images):
    path.write_bytes(encode_png(image))
  monkeypatch.setattr(judging, "decode_image", lambda data, name: opened.append(name) or decode_image(data, name))
  tasks = [Task("red", (64, 32), judging.LazySources(paths), name=f"{number}") for number in range(3)]
  assert [len(task.sources) for task in tasks] == [2] * 3 and all(task.sources for task in tasks) and not opened
  assert not judging.LazySources(()) and tasks[0] == dataclasses.replace(tasks[0])
  group, = groups_of_sizes(tasks, types.SimpleNamespace(encode=lambda prompt, grids: [0] * 9), 32, 64)
  assert group.size.source_sizes == ((96, 32),) * 2 and len(group.tasks) == 3 and len(opened) == 2
  np.testing.assert_array_equal(tasks[0].sources[1], images[1])
  np.testing.assert_array_equal(list(tasks[0].sources), images)
  np.testing.assert_array_equal(tasks[0].sources[:1], images[:1])
  np.testing.assert_array_equal(np.stack([group.fit(task.sources[0], 0) for task in tasks])[1], group.fit(images[0], 0))
  assert prompt_set(tasks) == prompt_set([dataclasses.replace(task, sources=tuple(images)) for task in tasks])


# Prompts.


def test_prompts_of_both_forms(tmp_path):
  line = {"prompt": "four cows", "atom_count": 3, "vqa_list": [["How many cows are there?", "four"], ["Are there cows?", "Yes"]],
          "skills": ["count", "object"]}
  edit = {"prompt": "x", "name": "x-1", "sources": ["s.png"], "height": 64}
  (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n\n" + json.dumps(edit) + "\n")
  first, second = judge_prompts.read_prompts(tmp_path / "a.jsonl")
  assert (first.name, first.category, first.size) == ("0", "3 atoms", (1024, 1024))
  assert second.sources == (tmp_path / "s.png",) and second.size == (64, 1024)
  assert [(one.expected, one.skill, len(one.choices)) for one in first.questions] == [(4, "count", 11), (0, "object", 2)]
  assert first.questions[1].choices[0] == ("yes", "Yes", " yes", " Yes") and first.questions[0].choices[4][-1] == "4"
  (tmp_path / "b.json").write_text(json.dumps([line]), encoding="utf-8-sig")
  assert judge_prompts.read_prompts(tmp_path / "b.json") == [first]


@pytest.mark.parametrize("content,message", [
    ([{"text": "x"}], "Entry 1 of .*no object with a text in the field 'prompt'"), ([], "holds no prompts"),
    ('{"prompt": "x"}\n\n{', "p.json, line 3, is no JSON"),
    ([{"prompt": "x", "questions": [["Is it?", "maybe"]]}], "'maybe' is neither yes nor no"),
    ([{"prompt": "x", "questions": [["How many?", "11"]]}], "'11' is neither"), ([{"prompt": "x", "questions": ["Is it?"]}], "no list of"),
    ([{"prompt": "x", "name": "a"}, {"prompt": "y", "name": "a"}], "Entry 2 .* 'a' is there twice"),
    ([{"prompt": "x", "name": "a/b"}], "signs other than"),
    ([{"prompt": "x", "height": "64"}], "whole numbers of px"), ([{"prompt": "x", "sources": "a.png"}], "no list of paths"),
    ([{"prompt": "x", "questions": [], "skills": ["count"]}], "a skill for each of the 0 questions")])
def test_a_wrong_file_of_prompts_is_one_sentence(tmp_path, content, message):
  (tmp_path / "p.json").write_text(content if isinstance(content, str) else json.dumps(content))
  with pytest.raises(ValueError, match=message):
    judge_prompts.read_prompts(tmp_path / "p.json")
