"""What an evaluation is known by: its request also tells the code and the files that score, so that no folder mixes two of them in silence."""

import dataclasses
import functools
import json
import mmap
import os

import numpy as np
import pytest
from jobs.brightness import score
from PIL import Image

from qimg2.evaluation import Figure, Suite, Task, ocr
from qimg2.runtime.evaluating import asked, comparing, job, of_run
from qimg2.runtime.evaluating.folder import Folder, read_manifest
from qimg2.runtime.evaluating.registry import parse_suites

TASKS = [Task(f"prompt {i}", (8, 8)) for i in range(40)]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
  """A folder of 40 pictures, and a suite `fidelity` that is a cheap one with a file that scores, net.onnx."""
  folder = tmp_path / "pictures"
  folder.mkdir()
  for i in range(40):
    Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
  (folder / "manifest.jsonl").write_text("\n".join(json.dumps({"file": f"{i}.png", "prompt": task.prompt}) for i, task in enumerate(TASKS)))
  (tmp_path / "net.onnx").write_bytes(b"one")
  suite = Suite(lambda num, seed: TASKS[:num or None], score, figures={"bright": Figure("bright")})
  monkeypatch.setattr(asked, "make_suite", lambda name, settings, source: (suite, settings["num_prompts"]))
  return tmp_path


def evaluate(place, out, share=job.Share(), network="net.onnx", num_prompts=0):
  return asked.evaluate_images(str(place / out), str(place / "pictures"), {"fidelity": {"network": str(place / network), "num_prompts": num_prompts}},
                               share)


def test_a_file_or_code_that_changed_does_not_go_on_with_the_scores_of_another(pictures, monkeypatch):
  assert evaluate(pictures, "out", job.Share(0, 2)) is None
  (pictures / "net.onnx").write_bytes(b"two")
  with pytest.raises(ValueError, match="another evaluation: suites.fidelity.files.network was"):
    evaluate(pictures, "out")
  (pictures / "net.onnx").write_bytes(b"one")
  with monkeypatch.context() as patch:
    patch.setattr(job, "_code", lambda: "another commit")
    with pytest.raises(ValueError, match='another evaluation: versions.qimg2 was "[0-9a-f]{16}" and is "another commit"'):
      evaluate(pictures, "out")
    patch.undo()
  found = evaluate(pictures, "out")
  assert found["versions"] == found["request"]["versions"] and len(found["versions"]["qimg2"]) == 16
  monkeypatch.setattr(job, "_code", lambda: "another commit")
  assert evaluate(pictures, "out") == found  # it is finished: nothing is scored


def test_what_files_hold_is_compared_and_not_where_they_are(pictures):
  (pictures / "copy.onnx").write_bytes(b"one")
  (pictures / "other.onnx").write_bytes(b"two")
  evaluate(pictures, "out")
  evaluate(pictures, "copy", network="copy.onnx", num_prompts=40)
  evaluate(pictures, "other", network="other.onnx")
  one, same, other = (Folder(pictures / name) for name in ("out", "copy", "other"))
  assert comparing.compare(one, same)["rows"][0]["value"] == 0
  with pytest.raises(ValueError, match="Suite fidelity had another network in .*other than in .*out, by what its files hold"):
    comparing.compare(one, other)


@pytest.mark.parametrize("text, said", [
    ("text:languages=en,zh", "has 'zh' where SETTING=VALUE should stand: .* several values have + between: languages=en+zh; for another suite"),
    ("text:,", "has '' where SETTING=VALUE should stand: .* between: SETTING=VALUE+VALUE"), ("text:languages", "several values have + between"),
    ("text:languages=en,languages=zh", "gives languages twice: once is enough"), ("text, text", "--suite names text twice"),
    ("text,glyphs:num_prompts=3", "names several suites before its settings: give the flag again"),
    ("", "names no suite ''"), ("text:num_prompts=²", "num_prompts is '²': give a whole")])
def test_a_suite_that_is_named_wrongly_is_one_sentence(text, said):
  with pytest.raises(ValueError, match=said.replace("+", "[+]")):
    parse_suites([text])


def test_a_suite_that_says_its_number_of_prompts_has_it():
  found = parse_suites(["text: num_prompts = 3 ,languages=en+zh", "glyphs, glyph_edits"], 5)
  assert [settings["num_prompts"] for settings in found.values()] == [3, 5, 5] and found["text"]["languages"] == "en,zh"


def test_lines_of_a_manifest_are_counted_as_an_editor_counts_them(pictures):
  path = pictures / "pictures" / "manifest.jsonl"
  path.write_text(path.read_text() + '\n\n\n{"file": "x.png", "prompt": "of another set"}')
  assert read_manifest(pictures / "pictures", "toy", TASKS)[1] == ['line 43: "of another set" is no prompt of toy']


def test_a_run_that_evaluates_itself_takes_a_repeated_prompt_as_one_cluster():
  tasks = [dataclasses.replace(TASKS[0], name=str(i)) for i in range(2)] + TASKS[1:3]

  class Painter:
    chunks = staticmethod(lambda seeds: [range(4)])
    tasks_of = staticmethod(list)
    draw = staticmethod(lambda chunk: [np.full((8, 8, 3), 10 * i, np.uint8) for i in chunk])
  assert of_run._scored(Painter, "toy", Suite(lambda num, seed: tasks, score), tasks)[1]["figures"]["bright"]["n"] == 3


def test_a_picture_without_a_denominator_is_neither_best_nor_worst(tmp_path):
  """Its ratio would be shown as 0."""
  found, suite = [], Suite(lambda num, seed: TASKS, figures={"kept": Figure("kept", "known", is_share=False, lower_is_better=True)})
  rows = [{"suite": "toy", "task": f"{i:05d}", "metrics": {"kept": 5.0 + i if i else 0.0, "known": float(i > 0)}, "details": {}, "file": f"{i}.png"}
          for i in range(3)]
  for i in range(3):
    Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
  show = lambda task, picture, scores: found.append(scores["kept"]) or [(picture, task.prompt)]
  asked_page = functools.partial(job.write_page, Folder(tmp_path), {"request": {}, "suites": {"toy": job.summarise(suite, [])}})
  asked_page([row | {"cluster": row["task"], "category": "", "seed": 0, "prompt": ""} for row in rows],
             {"toy": (dataclasses.replace(suite, show=show), TASKS)})
  assert found == [6.0, 7.0]


def test_a_strip_is_left_to_no_ocr():
  with pytest.raises(ValueError, match="OCR cannot read a strip of 2000 x 16 px: one side may be at most 32 times the other"):
    ocr.read(np.zeros((2000, 16, 3), np.uint8))


def test_features_have_their_room_before_they_are_mapped(tmp_path, monkeypatch):
  """What is written through a map to a disk that is full ends the process with a bus error, without a word."""
  map_file, found = mmap.mmap, []
  monkeypatch.setattr(mmap, "mmap", lambda file, *rest, **names: found.append(os.fstat(file)) or map_file(file, *rest, **names))
  features = Folder(tmp_path).write_features("toy", 600, [(np.arange(1, 600), np.ones((599, 100), np.float32))])
  assert found[0].st_blocks * 512 >= found[0].st_size == 128 + 4 * 600 * 100
  assert np.isnan(features[0]).all() and (features[1:] == 1).all()
