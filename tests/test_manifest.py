"""Pictures that something else made, by the manifest of their folder: which belong to which prompt, what is missing, what is wrong."""

import itertools
import json
import sys

import numpy as np
import pytest
from PIL import Image
from test_evaluating import REQUEST, toy, work

from qimg2.evaluation import Task
from qimg2.runtime.evaluating import job, summary
from qimg2.runtime.evaluating.folder import Folder
from qimg2.runtime.evaluating.job import evaluate_into, work_of_images


@pytest.fixture
def images(tmp_path):
  """A folder of four pictures, of which one is broken, with a manifest."""
  folder = tmp_path / "images"
  folder.mkdir()
  for i in range(4):
    Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
  (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:40])
  write(folder, [{"file": f"{i}.png", "prompt": f"prompt {i}"} for i in range(4)] + [{"file": "x.png", "prompt": "of another set"}])
  return folder


def write(folder, rows):
  (folder / "manifest.jsonl").write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows))


def test_pictures_of_a_folder(images, tmp_path):
  out, (suite, tasks) = Folder(tmp_path / "out"), toy()
  one = work_of_images(images, "toy", suite, tasks)
  assert one.missing == (3, 0, 3) and one.notes == ['line 5: "of another set" is no prompt of toy']
  found = evaluate_into(out, REQUEST, [one])["suites"]["toy"]
  assert found["num_missing"] == 3 and found["num_pictures"] == 3 and found["num_left_out"] == 1 and "2.png" in next(iter(found["left_out"]))
  assert found["figures"]["bright"]["value"] == pytest.approx((0 + 50 + 150) / 3 / 255)
  assert [row["file"] for row in out.rows()] == [str(images / f"{i}.png") for i in range(4)]


def test_a_prompt_that_lacks_some_seeds_is_counted(images, tmp_path):
  """Of those that are asked for, or of as many as another prompt has."""
  for i, seed in itertools.product(range(2), range(3)):
    Image.fromarray(np.full((8, 8, 3), 20 * i + seed, np.uint8)).save(images / f"{i}_{seed}.png")
  write(images, [{"file": f"{i}_{seed}.png", "prompt": f"prompt {i}", "seed": seed} for i, seed in [(0, 0), (0, 1), (0, 2), (1, 1)]])
  suite, tasks = toy(3)
  assert work_of_images(images, "toy", suite, tasks).missing == (1, 1, 5)
  assert work_of_images(images, "toy", suite, tasks, (1,)).missing == (1, 0, 1)
  asked = work_of_images(images, "toy", suite, tasks, (0, 1))
  assert asked.missing == (1, 1, 3) and asked.notes == ["line 3: seed 2 is none of those that are asked for"]
  found = evaluate_into(Folder(tmp_path / "out"), REQUEST, [asked])["suites"]
  assert (found["toy"]["num_missing"], found["toy"]["num_incomplete"], found["toy"]["num_missing_pictures"]) == (1, 1, 3)
  said = "1 prompts without a picture; 1 prompts with some of their pictures only, 3 pictures missing in all"
  assert said in summary.describe({"suites": found}) and said.replace("; ", "<br>") in (tmp_path / "out" / "report.html").read_text()
  with pytest.raises(ValueError, match="is a picture for suite toy; 4 of them have another seed than 7: give --seeds that are there"):
    work_of_images(images, "toy", suite, tasks, (7,))


def test_the_work_of_a_manifest_grows_as_its_lines(tmp_path):
  """Also where all of them have one prompt: steps of Python are counted, and not time."""
  def steps(num):
    write(tmp_path, [{"file": f"{i}.png", "prompt": "one"} for i in range(num)])
    count, tasks, path = itertools.count(), [Task("one", (8, 8))] * num, job.files.__file__

    def trace(frame, event, argument):
      if frame.f_code.co_filename != path:
        return None
      next(count)
      return trace
    before = sys.gettrace()
    sys.settrace(trace)
    try:
      found, left_out = job.files.read_manifest(tmp_path, "toy", tasks)
    finally:
      sys.settrace(before)
    assert [task for task, _, _ in found] == list(range(num)) and not left_out
    return next(count)
  assert steps(400) < 2.2 * steps(200)


def test_pictures_that_were_drawn_are_scored_again_alike(tmp_path):
  out, again, (suite, tasks) = Folder(tmp_path / "out"), Folder(tmp_path / "again"), toy()
  first = evaluate_into(out, REQUEST, [work(out, suite, tasks)])
  second = evaluate_into(again, REQUEST, [work_of_images(out.place, "toy", suite, tasks)])
  assert first["suites"] == second["suites"]


@pytest.mark.parametrize("rows, message", [
    (None, "has no manifest.jsonl: give it one with a line for each picture"),
    ([{"prompt": "prompt 1"}], "Line 1 of .* has no 'file'"),
    ([{"file": "1.png"}], "Line 1 of .* has no 'prompt' or 'task'"),
    ([{"file": "1.png", "prompt": "prompt 1", "seed": "a"}], "Line 1 of .* has the seed 'a'"),
    ([{"file": "1.png", "task": None}], "Line 1 of .* has no 'prompt' or 'task'"), ([{"file": "1.png", "task": ["a"]}], "has no 'prompt' or 'task'"),
    (["{"], "Line 1 of .* is no JSON"), (["[" * 100_000], "Line 1 of .* nests too many"),
    (['{"file": "\\ud800.png", "prompt": "prompt 1"}'], r"Line 1 of .* holds '.ud800', half of a character: write"),
    (["[1]"], "each line must be an object"),
    ([{"file": "1.png", "prompt": "prompt 1"}] * 2, 'Line 2 of .* is another picture of "prompt 1" with seed 0: '),
    ([{"file": "1.png", "prompt": "prompt 1", "seed": i} for i in range(2)], 'Line 2 of .* names 1.png again for "prompt 1"'),
    ([{"file": f"{i * './'}1.png", "prompt": "prompt 1", "seed": i} for i in range(2)], 'Line 2 of .* names ./1.png again for "prompt 1"'),
    ([""], "No line of .* is a picture for suite toy; it has no line"),
    ([{"file": "1.png", "prompt": "promt 1"}], 'No line of .* belongs to suite toy: line 1 has "promt 1", whose nearest is "prompt 1"'),
    ([{"file": "1.png", "task": "00001", "prompt": "other"}], "No line of .* belongs to suite toy")])
def test_a_manifest_that_is_wrong_is_one_sentence(images, rows, message):
  (images / "manifest.jsonl").unlink()
  if rows is not None:
    write(images, rows)
  with pytest.raises(ValueError, match=message):
    work_of_images(images, "toy", *toy())
