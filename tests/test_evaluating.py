"""An evaluation's folder: whatever is killed, in whatever shares, the same files; what cannot be scored is left out and counted."""

import concurrent.futures
import dataclasses
import errno
import functools
import io
import itertools
import json
import os
import pathlib
import re
import threading
import types

import commands
import numpy as np
import pytest
from jobs.brightness import score

from qimg2 import places
from qimg2.evaluation import Figure, Reference, Suite, Task
from qimg2.runtime.evaluating import comparing, job, scoring, summary
from qimg2.runtime.evaluating.drawing import Group, chunks_of
from qimg2.runtime.evaluating.folder import Folder, read_lines
from qimg2.runtime.evaluating.job import Share, evaluate_into, work_of_images, work_of_painter
from qimg2.runtime.evaluating.scoring import Scorer
from qimg2.runtime.generator import Size

REQUEST = {"format": 1, "model": {"run": "toy"}, "suites": {"toy": {"prompt_set": "1"}}}
SIDE = 8


def toy(num=7, truths=None, **changes):
  tasks = [Task(f"prompt {i}", (SIDE, SIDE * (1 + i % 2)), truth=(truths or {}).get(i), category="even" if i % 2 == 0 else "odd") for i in range(num)]
  suite = Suite(lambda n, seed: tasks[:n], score, figures={"bright": Figure("bright"), "per word": Figure("bright", "words", is_share=False)})
  return dataclasses.replace(suite, **changes), tasks


class Painter:
  """Draws noise that depends on prompt and seed; ends as a kill would after so many chunks."""

  def __init__(self, tasks, most=None, wrong=()):
    sizes = sorted({task.size for task in tasks})
    self.groups = [Group(Size(*size, 8), tuple(i for i, task in enumerate(tasks) if task.size == size), lambda image, slot: image) for size in sizes]
    self.tasks, self.left, self.wrong = tasks, most, wrong

  def chunks(self, seeds):
    self.found = chunks_of(self.groups, seeds, 3)
    return self.found

  def tasks_of(self, chunk):
    return [self.groups[chunk.group].tasks[place] for place in chunk.places]

  def draw(self, chunk):
    if self.left == 0:
      raise KeyboardInterrupt
    self.left = None if self.left is None else self.left - 1
    noise = lambda i: np.random.default_rng([i, chunk.seed]).integers(0, 256, (*self.tasks[i].size, 3)).astype(np.uint8)
    return ["it is not finite" if i in self.wrong else noise(i) for i in self.tasks_of(chunk)]


def work(out, suite, tasks, seeds=(0, 1), most=None, wrong=()):
  return work_of_painter(out, "toy", suite, tasks, Painter(tasks, most, wrong), seeds)


def files(folder):
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The files of an evaluation that nothing interrupted."""
  place = tmp_path_factory.mktemp("whole") / "out"
  suite, tasks = with_features()
  evaluate_into(Folder(place), REQUEST, [work(Folder(place), suite, tasks)])
  return files(place)


def with_features(computed=None):
  taken, computed = [], [] if computed is None else computed  # numbers of the reference's blocks

  def of_set(blocks):
    names, features = zip(*blocks)
    return {"mean": float(np.concatenate(features).mean()), "num": len(sum(names, [])), "reference": float(taken.pop().mean())}
  return toy(features=lambda tasks, pictures: np.stack([picture.mean((0, 1)) for picture in pictures]).astype(np.float32), of_set=of_set,
             reference=Reference("r", 5, lambda i: computed.append(i) or np.full((2, 3), i, np.float32), taken.append))


def test_files_say_what_was_drawn_and_found(whole):
  rows = [json.loads(line) for line in whole["scores.jsonl"].decode().strip().split("\n")]
  assert [(row["task"], row["seed"]) for row in rows] == [(f"{i:05d}", seed) for i in range(7) for seed in (0, 1)]
  picture = np.random.default_rng([3, 1]).integers(0, 256, (8, 16, 3)).astype(np.uint8)
  assert rows[7] == {"suite": "toy", "task": "00003", "category": "odd", "cluster": "00003", "prompt": "prompt 3", "seed": 1,
                     "file": "pictures/toy/00003_1.png", "metrics": {"bright": picture.mean() / 255, "words": 8.0},
                     "details": {"recognised": "prompt 3 ☃\u2028"}}
  assert len([name for name in whole if name.endswith(".png")]) == 14 and not [name for name in whole if name.startswith("parts")]
  features = np.load(io.BytesIO(whole["features/toy.npy"]))
  np.testing.assert_allclose(features.mean(1) / 255, [row["metrics"]["bright"] for row in rows], rtol=1e-5)  # a row for each line
  found = json.loads(whole["summary.json"])["suites"]["toy"]
  brightness = [row["metrics"]["bright"] for row in rows]
  assert found["figures"]["bright"]["value"] == pytest.approx(np.mean(brightness)) and found["num_prompts"] == 7 and found["num_pictures"] == 14
  assert found["figures"]["per word"]["value"] == pytest.approx(sum(brightness) / (14 * 8))
  assert found["categories"]["odd"]["bright"]["value"] == pytest.approx(np.mean([b for b, row in zip(brightness, rows) if row["category"] == "odd"]))
  assert found["of_set"] == {"mean": pytest.approx(255 * np.mean(brightness), rel=1e-5), "num": 14, "num_pictures": 14, "reference": 2}
  assert b"per word" in whole["report.html"] and whole["report.html"].count(b"<img") == 3  # histograms, and both ends of two figures


@pytest.mark.parametrize("most", range(6))
def test_killed_while_it_draws_it_goes_on(whole, tmp_path, most):
  out, (suite, tasks) = Folder(tmp_path / "out"), with_features()
  with pytest.raises(KeyboardInterrupt):
    evaluate_into(out, REQUEST, [work(out, suite, tasks, most=most)])
  assert len(list(out.place.rglob("*.png"))) < 14 and not (out.place / "summary.json").exists()
  evaluate_into(out, REQUEST, [work(out, suite, tasks)])
  assert files(out.place) == whole


@pytest.mark.parametrize("kept", range(0, 20, 4))
def test_killed_while_it_scores_or_writes_it_goes_on(whole, tmp_path, monkeypatch, kept):
  """After every fourth file that is written, whichever it is."""
  out, (suite, tasks), left = Folder(tmp_path / "out"), with_features(), itertools.count()
  write = {module: module.write_file for module in (job, job.files)}

  def failing(module, *arguments):
    if next(left) == kept:
      raise KeyboardInterrupt
    write[module](*arguments)
  with monkeypatch.context() as patch:
    for module in write:
      patch.setattr(module, "write_file", functools.partial(failing, module))
    with pytest.raises(KeyboardInterrupt):
      evaluate_into(out, REQUEST, [work(out, suite, tasks)])
  evaluate_into(out, REQUEST, [work(out, suite, tasks)])
  assert files(out.place) == whole
  assert evaluate_into(out, REQUEST, [work(out, suite, tasks, most=0)]) == json.loads(whole["summary.json"])  # nothing is drawn again


@pytest.mark.parametrize("kept", (0, 3, 20))
def test_a_full_disk_is_said_with_the_file_and_nothing_of_that_stays(whole, tmp_path, monkeypatch, kept):
  out, (suite, tasks), left = Folder(tmp_path / "out"), with_features(), itertools.count()
  with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: '[^']*/out/[^']*\.(json|png|npy|jsonl)'$"):
    patch.setattr(places.os, "fsync", lambda file: next(left) == kept and (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    evaluate_into(out, REQUEST, [work(out, suite, tasks)])
  assert not list(out.place.rglob("*.part"))
  assert evaluate_into(out, REQUEST, [work(out, suite, tasks)]) and files(out.place) == whole


def test_what_a_killed_process_left_behind_is_swept(whole, tmp_path):
  """A file that it was at, and parts that it had not yet taken away. What others write below the same folder is theirs."""
  out, (suite, tasks) = Folder(tmp_path / "out"), with_features()
  half = out.place / "pictures" / "toy" / f"00000_0.png.{'0f' * 16}.part"
  with pytest.raises(KeyboardInterrupt):
    evaluate_into(out, REQUEST, [work(out, suite, tasks, most=2)])
  others = out.place / "other" / half.name
  others.parent.mkdir(parents=True)
  for path in (half, out.place / half.name, others):
    path.touch()
  evaluate_into(out, REQUEST, [work(out, suite, tasks)])
  others.unlink()
  assert files(out.place) == whole
  out.write_part("toy", 0, [{}], np.zeros((1, 1)))
  assert evaluate_into(out, REQUEST, [work(out, suite, tasks, most=0)]) == json.loads(whole["summary.json"])
  assert files(out.place) == whole


def test_64_jobs_in_any_order_write_the_same_files(whole, tmp_path):
  """More than there are chunks; one that was lost is done by another."""
  out, (suite, tasks) = Folder(tmp_path / "out"), with_features(computed := [])
  for index in np.random.default_rng(0).permutation(64)[:-1]:
    found = evaluate_into(out, REQUEST, [work(out, suite, tasks)], Share(int(index), 64))
  if found is None:
    assert np.random.default_rng(0).permutation(64)[-1] < 6 and (out.place / "parts").is_dir()
  assert evaluate_into(out, REQUEST, [work(out, suite, tasks)]) is not None
  assert files(out.place) == whole and sorted(computed) == [0, 1, 2, 3, 4]


def test_another_evaluation_is_refused(whole, tmp_path):
  out, (suite, tasks) = Folder(tmp_path / "out"), toy()
  evaluate_into(out, REQUEST, [work(out, suite, tasks)])
  with pytest.raises(ValueError, match=r'another evaluation: model.run was "toy" and is "other". Give another --out'):
    evaluate_into(out, REQUEST | {"model": {"run": "other"}}, [work(out, suite, tasks)])
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").touch()
  for place, message in (("mine", "holds other files, and no evaluation"), ("mine/thesis.tex/out", "cannot be made, because .* is a file, or below")):
    with pytest.raises(ValueError, match=message):
      evaluate_into(Folder(tmp_path / place), REQUEST, [])


def test_what_cannot_be_scored_is_left_out_and_counted(tmp_path):
  out, released = Folder(tmp_path / "out"), []
  suite, tasks = toy(truths={1: "refuse", 2: "nan"}, release=lambda: released.append(1))
  found = evaluate_into(out, REQUEST, [work(out, suite, tasks)])["suites"]["toy"]
  assert found["num_left_out"] == 4 and found["left_out"] == {"nothing can be read in it": 2, "bright is not finite": 2} and released
  rows = out.rows()
  assert found["figures"]["bright"]["value"] == pytest.approx(np.mean([row["metrics"]["bright"] for row in rows if "error" not in row]))
  assert "4 left out, 2 because: nothing can be read in it" in summary.describe({"suites": {"toy": found}})


def test_what_is_no_picture_has_no_file_and_no_score(tmp_path):
  """Not after a kill either, and not where the folder is scored again."""
  found = {}
  for name, most in (("whole", None), ("killed", 1)):
    out, (suite, tasks) = Folder(tmp_path / name), with_features()
    if most:
      with pytest.raises(KeyboardInterrupt):
        evaluate_into(out, REQUEST, [work(out, suite, tasks, most=most, wrong=(0, 3))])
    found[name] = evaluate_into(out, REQUEST, [work(out, suite, tasks, wrong=(0, 3))])["suites"]["toy"]
    rows = out.rows()
  assert files(tmp_path / "whole") == files(tmp_path / "killed") and found["whole"] == found["killed"]
  assert found["whole"]["num_left_out"] == 4 and found["whole"]["left_out"] == {"it is not finite": 4} and found["whole"]["num_pictures"] == 10
  no_file = {row["task"] for row in rows if not out.picture_of(row["file"]).exists()}
  assert {row["task"] for row in rows if "error" in row} == {"00000", "00003"} == no_file
  again = evaluate_into(Folder(tmp_path / "again"), REQUEST, [work_of_images(out.place, "toy", *with_features())])["suites"]["toy"]
  same = ("figures", "of_set", "num_left_out", "num_pictures", "num_missing")
  assert [again[key] for key in same] == [found["whole"][key] for key in same]


def test_scores_in_processes_are_those_of_one_and_outlive_a_scorer_that_is_killed():
  suite, tasks = toy(truths={4: "kill"}, is_slow=True)
  pictures = [np.full((8, 8, 3), 10 * i, np.uint8) for i in range(7)]
  with Scorer(suite, 2) as scorer:
    pending = [scorer.begin([task], [picture]) for task, picture in zip(tasks, pictures)]
    found = [one.finish()[0][0] for one in pending]
  assert found[4] == {"error": "the process that scored it was killed, twice"}
  assert [one["bright"] for one in found[:4] + found[5:]] == [10 * i / 255 for i in (0, 1, 2, 3, 5, 6)]


def test_a_picture_that_takes_too_long_is_alone_left_out(monkeypatch):
  """With it end those that a process is at, and those that wait; they are scored again."""
  killed = threading.Event()

  class Threads(concurrent.futures.ThreadPoolExecutor):
    _processes = {0: types.SimpleNamespace(kill=killed.set)}

  def slow_or_bright(task, picture):
    return score(task, picture) if task.truth != "slow" else killed.wait() and score(task, picture)
  monkeypatch.setattr(scoring, "_start", Threads)
  monkeypatch.setattr(scoring, "LATE_S", 1.0)
  suite, tasks = toy(truths={2: "slow"}, is_slow=True, score=slow_or_bright)
  with Scorer(suite, 1) as scorer:
    pictures = [np.full((8, 8, 3), 10 * i, np.uint8) for i in range(6)]
    pending = [scorer.begin(tasks[:5], pictures[:5]), scorer.begin(tasks[5:6], pictures[5:])]
    found = [score for one in pending for score in one.finish()[0]]
  assert found[2] == {"error": "its score took more than 1 s"}
  assert [one["bright"] for one in found[:2] + found[3:]] == [10 * i / 255 for i in (0, 1, 3, 4, 5)]


def test_cores_are_those_that_this_process_may_use(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
  inner = tmp_path / "groups" / "pod" / "box"
  inner.mkdir(parents=True)
  (tmp_path / "cgroup").write_text("1:cpu:/other\n0::/pod/box\n")
  count = lambda: scoring.num_cores(tmp_path / "cgroup", tmp_path / "groups")
  assert count() == 12 and scoring.num_cores(tmp_path / "none", tmp_path / "none") == 12
  (inner / "cpu.max").write_text("max 100000\n")
  assert count() == 12
  (inner.parent / "cpu.max").write_text("250000 100000\n")  # of the group that it is in
  assert count() == 3
  (inner / "cpu.max").write_text("50000 100000\n")
  assert count() == 1


# Two evaluations.


def finished(place, request=REQUEST, lift=0, **changes):
  out, (suite, tasks) = Folder(place), toy(num=40, **changes)
  lifted = dataclasses.replace(suite, score=lambda task, picture: score(task, picture) | (
      {"bright": picture.mean() / 255 + lift} if task.truth is None else {}))
  evaluate_into(out, request, [work(out, lifted, tasks)])
  return out


def test_a_difference_is_of_prompts_that_both_have(tmp_path):
  one, other = finished(tmp_path / "1", lift=0.1), finished(tmp_path / "2", truths={0: "refuse"})
  found = comparing.compare(one, other)
  bright = found["rows"][0]
  assert (bright["name"], bright["n"], bright["left_out"]) == ("bright", 39, 1)
  assert bright["value"] == pytest.approx(0.1) and bright["value_a"] - bright["value_b"] == pytest.approx(0.1)
  assert bright["p_value"] < 1e-3 and bright["p_holm"] >= bright["p_value"]
  same = comparing.compare(other, other)["rows"][0]
  assert same["value"] == 0 and same["p_value"] == 1
  assert "bright: " in comparing.describe(found) and json.loads((one.place / "comparison.json").read_text()) == found


def test_other_prompts_are_not_compared(tmp_path):
  one, other = finished(tmp_path / "1"), finished(tmp_path / "2", REQUEST | {"suites": {"toy": {"prompt_set": "2"}}})
  with pytest.raises(ValueError, match="Suite toy had other prompts or truths in .*2 than in .*1: evaluate both with the same"):
    comparing.compare(one, other)
  with pytest.raises(ValueError, match="holds no finished evaluation"):
    comparing.compare(one, Folder(tmp_path / "3"))
  for name, text, said in (("scores.jsonl", "{}", "scores.jsonl has lines that no evaluation wrote"), ("summary.json", "{}", "is not that of an"),
                           ("summary.json", "[]", "summary.json is not that of an evaluation"), ("summary.json", "{", "is no JSON file")):
    (one.place / name).write_text(text)
    with pytest.raises(ValueError, match=said):
      comparing.compare(one, one)


def test_what_is_not_comparable_is_refused_or_said(tmp_path):
  """Other settings, another judge; a figure that one side has alone, and figures of whole sets."""
  with_rank = lambda rank: REQUEST | {"suites": {"toy": {"prompt_set": "1", "candidates": rank}}}
  one, other = finished(tmp_path / "1", with_rank(50)), finished(tmp_path / "2", with_rank(500))
  with pytest.raises(ValueError, match="Suite toy has candidates=50 in .*1 and 500 in .*2: such scores are not comparable"):
    comparing.compare(one, other)
  judged = lambda name: lambda task, picture: {"bright": 0.5, "words": 1, "judge": name}
  judges = []
  for name in ("8B", "2B"):
    out, (suite, tasks) = Folder(tmp_path / name), toy(score=judged(name))
    evaluate_into(out, REQUEST, [work(out, suite, tasks)])
    judges.append(out)
  with pytest.raises(ValueError, match="Suite toy was scored by 2B and 8B: scores of two judges are not comparable"):
    comparing.compare(*judges)
  sets = []
  for name, more in (("3", {"extra": Figure("words", is_share=False)}), ("4", {})):
    out, (suite, tasks) = Folder(tmp_path / name), with_features()
    evaluate_into(out, REQUEST, [work(out, dataclasses.replace(suite, figures={**suite.figures, **more}), tasks)])
    sets.append(out)
  rows = {row["name"]: row for row in comparing.compare(*sets)["rows"]}
  assert rows["extra"]["value"] == 0 and rows["mean"]["value"] == 0 and rows["mean"]["low"] is None and rows["mean"]["p_holm"] is None
  assert comparing.describe(comparing.compare(*sets[::-1])) and "num_pictures" not in rows
  blind = Folder(tmp_path / "5")
  evaluate_into(blind, REQUEST, [work(blind, dataclasses.replace(suite, score=lambda *_: {"error": "blind"}), tasks)])
  row = comparing.compare(sets[0], blind)["rows"][0]
  assert row["value"] is None and row["note"] == "no prompt has it on both sides" and row["left_out"] == 7


def test_a_repeated_prompt_is_one_cluster(tmp_path):
  """Its pictures are as alike as those of two seeds; those of a folder belong to its tasks in turn."""
  suite, tasks = toy()
  tasks[6] = dataclasses.replace(tasks[6], prompt=tasks[0].prompt)
  out = Folder(tmp_path / "out")
  found = evaluate_into(out, REQUEST, [work(out, suite, tasks)])["suites"]["toy"]
  assert found["num_prompts"] == 6 and found["num_pictures"] == 14 and found["figures"]["bright"]["n"] == 6
  (out.place / "manifest.jsonl").write_text("".join(
      json.dumps({"file": row["file"], "prompt": row["prompt"], "seed": row["seed"]}) + "\r\n" for row in out.rows()), encoding="utf-8-sig")
  again = Folder(tmp_path / "again")
  assert evaluate_into(again, REQUEST, [work_of_images(out.place, "toy", suite, tasks)])["suites"]["toy"] == found


def test_jobs_that_begin_and_end_together(whole, tmp_path):
  """One finds the folder while another one begins in it; one merges what another one has just merged."""
  out, (suite, tasks) = Folder(tmp_path / "out"), with_features()
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "request.json.1234.part").touch()
  for index in range(2):
    evaluate_into(out, REQUEST, [work(out, suite, tasks)], Share(index, 3))
  merged, racing = job._merged, []

  def slow(*arguments):
    if not racing:
      racing.append(None)
      racing.append(evaluate_into(out, REQUEST, [work(out, suite, tasks)]))  # another job ends meanwhile, and takes the parts away
    return merged(*arguments)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(job, "_merged", slow)
    assert evaluate_into(out, REQUEST, [work(out, suite, tasks)], Share(2, 3)) == racing[1]
  (tmp_path / "out" / "request.json.1234.part").unlink()
  assert files(out.place) == whole


def test_rows_are_read_as_they_were_written(tmp_path):
  path = pathlib.Path(tmp_path / "rows.jsonl")
  rows = [{"text": "a\u2028b\u0085c\n\"d\""}, {"text": "é"}]
  path.write_text(job.files.lines(rows), encoding="utf-8")
  assert read_lines(path) == rows


# As a user starts it.


def test_a_launched_evaluation(smoke_run, tmp_path, one_device):
  """Two stages of a run on one prompt set, one of them as pictures of a folder too; what is asked wrongly is one sentence."""
  suites = ("--suite=glyphs,glyph_edits", "--num_prompts=8")
  evaluate = lambda *flags: commands.launch("launch.evaluate", *flags)
  first = evaluate(f"--workdir={smoke_run.workdir}", *suites, f"--out={tmp_path}/sft")
  assert first.returncode == 0, first.stderr
  assert "glyphs: 8 prompts, 8 pictures" in first.stdout and re.search(r"  ink: \d+\.0 % \[", first.stdout)
  ours = json.loads((tmp_path / "sft" / "summary.json").read_text())
  recorded = json.loads((smoke_run.workdir / "evaluation.json").read_text())["suites"]["glyphs"]  # drawn with another seed, of the same prompts
  assert ours["suites"]["glyphs"]["figures"].keys() == recorded["figures"].keys() and ours["request"]["model"]["step"] == 2
  again = evaluate(f"--workdir={smoke_run.workdir}", *suites, f"--out={tmp_path}/sft")
  assert again.stdout == first.stdout
  other = evaluate(f"--workdir={smoke_run.workdir}", "--stage=high_resolution", *suites, f"--out={tmp_path}/before", f"--compare={tmp_path}/sft")
  assert other.returncode == 0 and "Compared with" in other.stdout and re.search(r"glyph_edits edit: paper: .* against .*, p ", other.stdout), other
  theirs = evaluate(f"--images={tmp_path}/sft", *suites, f"--out={tmp_path}/images")
  assert theirs.returncode == 0 and json.loads((tmp_path / "images" / "summary.json").read_text())["suites"] == ours["suites"]
  run, out = f"--workdir={smoke_run.workdir}", f"--out={tmp_path}/x"
  for flags, sentence in (
      ((run, "--suite=glyph", out), "--suite names no suite 'glyph': did you mean 'glyphs'?"),
      ((run, "--suite=glyphs"), "Give --out, a folder"),
      ((run, *suites, "--seeds=0,1,1", out), "--seeds=0,1,1 has one twice"),
      ((run, *suites, "--seeds=1", f"--out={tmp_path}/sft"), "holds another evaluation: seeds was [0] and is [1]"),
      ((run, "--stage=low_resolution", *suites, out), "which stage low_resolution did not learn"),
      ((f"--images={tmp_path}/sft", *suites, "--guidance=3", out), "--guidance is for a model"),
      ((run, *suites, "--part=64/64", out), "--part=64/64 is not understood"),
      ((out,), "what is to be evaluated"),
      ((f"--out={tmp_path}/sft", f"--compare={tmp_path}/x"), "holds no finished evaluation")):
    refused = evaluate(*flags)
    assert refused.returncode == 1 and sentence in refused.stderr and refused.stderr.count("\n") == 1, (flags, refused.stderr)
