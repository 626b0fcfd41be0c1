"""A run in a bucket: what is there, what counts, and what is left of it by kills and refusals."""

import json
import os
import re
import signal
import time

import commands
import jax
import numpy as np
import pytest
from bucket import ROOT, Bucket
from etils import epath
from kill_points import assert_same_bits
from many import PATIENCE_S, UNHURRIED_S, ends, start, together, toy
from test_checkpoint import assert_equal, make, specs
from test_evaluating import REQUEST, files, with_features, work
from test_evaluating import toy as toy_suite

from data_pipelines.transforms import encode_png
from qimg2 import places
from qimg2.runtime import lock
from qimg2.runtime.evaluating import asked
from qimg2.runtime.evaluating import folder as evaluating
from qimg2.runtime.evaluating.job import Share, evaluate_into, work_of_images
from qimg2.training import checkpoint, faults, manifest, metrics

pytestmark = pytest.mark.slow  # a minute together


@pytest.fixture(scope="module")
def bucket():
  """A bucket that this process reaches, too."""
  one = Bucket()
  with pytest.MonkeyPatch.context() as patch:
    for name, value in one.environment.items():
      patch.setenv(name, value)
    yield one
  epath.backend.fsspec_backend._get_filesystem.cache_clear()  # what follows would reach a server that is gone
  one.close()


@pytest.fixture
def folder(bucket, request):
  """A folder of it for one test."""
  bucket.refuse_every, bucket.is_down = 0, False
  return places.find_place(f"{ROOT}{request.node.name}", "--workdir")


@pytest.mark.parametrize("text, said", [
    ("gs://", "names no folder: give gs://BUCKET/FOLDER"), ("gs://bucket", "names no folder"), ("gs:///folder", "names no folder"),
    ("s3://bucket/folder", "s3:// is neither a folder"), ("file:///tmp", "file:// is neither a folder")])
def test_what_is_no_folder_is_refused(text, said):
  with pytest.raises(ValueError, match=f"--workdir is {text}, .*{said}"):
    places.find_place(text, "--workdir")


def test_a_path_of_a_bucket_may_have_lost_a_slash():
  assert str(places.find_place("gs:/bucket/a/b/", "x")) == "gs://bucket/a/b"  # as pathlib prints it


@pytest.fixture
def two(folder):
  """(folder with the checkpoints of steps 5 and 6, what step 5 holds, abstract state)."""
  abstract, five = make({"fsdp": 8}, specs())
  six = five.replace(step=jax.numpy.int32(6), params=jax.tree.map(lambda x: x + 1, five.params))
  writer = checkpoint.Checkpoints(folder, keep=2)
  for each in (five, six):
    writer.save(each, {"loader_step": int(each.step)})
  writer.close()
  return folder, five, six, abstract


def test_checkpoints_come_back_and_are_whole_on_a_disk_too(bucket, two, tmp_path):
  folder, five, six, abstract = two
  reader = checkpoint.Checkpoints(folder)
  assert reader.latest_step() == 6 == checkpoint.newest_step(folder) and checkpoint.is_done(folder, 6) and not checkpoint.is_done(folder, 7)
  restored, meta = reader.restore(abstract, 6)
  assert_equal(restored, six)
  assert meta == {"loader_step": 6}
  bucket.download(tmp_path)
  copy = tmp_path / folder.name
  assert_equal(checkpoint.Checkpoints(copy).restore(abstract, 6)[0], six)
  big = max((file for name, file in places.list_files(copy / "6").items() if "/d/" in name), key=lambda file: file.size).path
  big.write_bytes(big.read_bytes()[:-1] + bytes([big.read_bytes()[-1] ^ 1]))
  assert manifest.find_fault(copy / "6") == f"the content of {big.relative_to(copy / '6').as_posix()} was changed"
  assert checkpoint.Checkpoints(copy).latest_step() == 5


def test_an_object_that_changed_is_found_without_reading_any(bucket, two, caplog):
  folder, five, _, abstract = two
  name, file = max(places.list_files(folder / "6").items(), key=lambda item: item[1].size)
  file.path.write_bytes(bytes(file.size))
  before = bucket.num_requests
  assert manifest.find_fault(folder / "6") == f"the content of {name} was changed"
  assert bucket.num_requests - before < 15 < len(places.list_files(folder / "6"))  # a listing, the manifest and Orbax's own record
  writer = checkpoint.Checkpoints(folder, keep=2)  # a run that goes on from step 5
  assert writer.latest_step() == 5 and "6 is damaged" in caplog.text
  assert sorted(path.name for path in folder.iterdir()) == ["5", "6.damaged"]
  writer.save(five.replace(step=jax.numpy.int32(6)), {})
  writer.close()
  assert sorted(path.name for path in folder.iterdir()) == ["5", "6", "6.damaged"] and checkpoint.Checkpoints(folder).latest_step() == 6


def test_a_save_that_was_cut_off_does_not_count(two):
  folder, _, six, _ = two
  for name in (places.COMMITTED, manifest.NAME):
    (folder / "6" / name).unlink()
  assert checkpoint.Checkpoints(folder).latest_step() == 5 == checkpoint.newest_step(folder)
  assert (folder / "6").is_dir()  # perhaps a run is at it
  writer = checkpoint.Checkpoints(folder, keep=2)
  assert writer.latest_step() == 5
  writer.save(six, {})
  writer.close()
  assert checkpoint.Checkpoints(folder).latest_step() == 6


def test_what_is_whole_without_a_mark_is_marked(two):
  """A copy of a folder that a program wrote which marks none, or a save that was killed at its very end."""
  folder, _, six, abstract = two
  for step in "56":
    (folder / step / places.COMMITTED).unlink()
  writer = checkpoint.Checkpoints(folder, keep=2)
  assert_equal(writer.restore(abstract, writer.latest_step())[0], six)
  writer.close()


def test_frozen_weights_that_were_cut_off_are_written_again(folder):
  abstract, saved = make({"fsdp": 8}, specs())
  for _ in range(2):
    assert not places.is_complete(folder)
    checkpoint.save_weights(folder, saved.params["model"])
    assert places.is_complete(folder)
    assert_equal(checkpoint.restore_weights(folder, abstract.params["model"]), saved.params["model"])
    (folder / places.COMMITTED).unlink()


def test_a_run_in_a_bucket_has_one_holder(folder, monkeypatch, caplog):
  monkeypatch.setattr(lock, "BEAT_S", 0.1)
  monkeypatch.setattr(lock, "STALE_S", 1.0)
  lost = []
  with lock.RunLock(folder, lost.append):
    monkeypatch.setattr(lock, "STALE_S", PATIENCE_S)  # a beat may be late on a busy machine
    with pytest.raises(ValueError, match=f"The run in {folder} is being trained by process {os.getpid()} on "), lock.RunLock(folder, lost.append):
      pass
    # one that was silent for so long that another one has it
    limit = time.monotonic() + PATIENCE_S
    while not lost and time.monotonic() < limit:  # a beat that was under way may write over it once
      (folder / lock.NAME).write_text(json.dumps({"holder": "another", "host": "elsewhere", "pid": 7}))
      time.sleep(1)
  assert len(lost) == 1 and f"The run in {folder} was taken over by process 7 on elsewhere" in lost[0]
  monkeypatch.setattr(lock, "STALE_S", 1.0)
  with lock.RunLock(folder, lost.append):
    assert "process 7 on elsewhere (since an unknown time), which had it, gave no sign of life" in caplog.text
  assert not (folder / lock.NAME).exists()


def test_rows_are_there_when_a_checkpoint_is(bucket, folder, tmp_path):
  def write(place, steps, start=0):
    writer = metrics.MetricsWriter(place, start)
    for step in steps:
      writer.write(step, {"loss": 1 / step})
      writer.write_timing(step, {"rate": 2.0})
    return writer
  writer = write(folder, range(1, 7))
  writer.sync()
  writer.write(7, {"loss": 0.0})  # after the checkpoint; the machine is taken away
  assert [row["step"] for row in metrics.read_rows(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
  writer.write_fault(7, {"fault": "nan"})
  writer._growing.push()
  assert [row["step"] for row in metrics.read_rows(folder / "faults.jsonl")] == [7]
  write(folder, range(5, 9), start=4).close()
  write(tmp_path / "whole", range(1, 9)).close()
  bucket.download(tmp_path)
  assert (tmp_path / folder.name / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
  assert metrics.read_rows(folder / "faults.jsonl") == [] and list(folder.glob("events.out.tfevents.*"))


def test_an_upload_that_fails_is_named_and_nothing_is_lost(bucket, folder, monkeypatch, caplog):
  monkeypatch.setattr(places, "UPLOAD_S", 0)
  writer = metrics.MetricsWriter(folder, 0)
  monkeypatch.setattr(places, "write_file", lambda *_: (_ for _ in ()).throw(RuntimeError("503")))
  writer.write(1, {"loss": 1.0})
  while "It is tried again" not in caplog.text:
    time.sleep(0.01)
  with pytest.raises(OSError, match=f"{folder}/events.* could not be written .RuntimeError: 503.: does this machine reach the bucket"):
    writer.sync()
  writer.close()
  left = places.pathlib.Path(re.search("What was not uploaded is in (.*)[.]", caplog.text)[1])
  assert metrics.read_rows(left / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_the_rows_of_a_killed_process_go_with_the_next_one_those_of_a_living_one_and_what_is_not_uploaded_stay(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
  there = lambda: {path.name for path in tmp_path.iterdir()}
  living, killed, failed = (places.Growing(folder) for _ in range(3))
  killed._lock.close()  # as the operating system does
  (failed.local / "a").write_text("1")
  with monkeypatch.context() as patch:
    patch.setattr(places, "write_file", lambda *_: (_ for _ in ()).throw(RuntimeError("503")))
    failed.close()
  young = places.Growing(folder)
  assert there() == {one.local.parent.name for one in (living, killed, failed, young)}, "the killed one is young: it may be about to take its lock"
  monkeypatch.setattr(places, "_YOUNG_S", -1)
  next_one = places.Growing(folder)
  assert there() == {one.local.parent.name for one in (living, failed, young, next_one)} and (failed.local / "a").exists()
  for one in (living, young, next_one):
    one.close()
  assert there() == {failed.local.parent.name}


def test_a_bucket_that_does_not_answer_is_one_sentence(bucket, folder, monkeypatch, tmp_path):
  monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda _: done())
  async def done():
    pass
  bucket.is_down = True
  result = commands.launch("launch.sample", f"--workdir={folder}", "--prompt=x", f"--out={tmp_path}/x.png")
  assert result.returncode == 75 and "Traceback" not in result.stderr  # whoever starts training again starts this, too
  assert re.search("error: The bucket could not be read or written .HttpError: .*503.*: does this machine reach the bucket.* goes on", result.stderr)


@pytest.mark.slow
@pytest.mark.apart("bucket")  # it waits more than it computes
def test_a_run_in_a_bucket_that_refuses_one_request_in_25_and_is_killed_ends_bit_identical(tmp_path):
  few = ("--num_steps=4", "--save_every=2")
  together(1, *toy(tmp_path / "disk", *few))
  one = Bucket()
  process, = start(1, *toy(f"{ROOT}cut", *few, "--slow_s=0.1"), **one.environment)
  while not any(name.startswith("cut/toy/checkpoints/4/optimizer/") for name in one.names()):  # a save is under way
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  ends([process], PATIENCE_S)
  assert f"cut/toy/checkpoints/4/{places.COMMITTED}" not in one.names()
  one.refuse_every = 25
  together(1, *toy(f"{ROOT}cut", *few), **one.environment)
  assert one.num_refused > 10
  ended_alike(one, tmp_path)


@pytest.mark.slow
@pytest.mark.apart("bucket")
def test_two_processes_in_a_bucket_that_are_asked_to_stop_end_bit_identical(tmp_path):
  few, unhurried = ("--num_steps=4", "--save_every=3"), {"heartbeat_s": UNHURRIED_S}
  together(2, *toy(tmp_path / "disk", *few), **unhurried)
  one = Bucket()
  started = start(2, *toy(f"{ROOT}cut", *few, "--ask_at=3"), **unhurried, **one.environment)  # the second one is asked
  for code, _, stderr in ends(started, PATIENCE_S):
    assert code == faults.EXIT_CODE and "is saved at step" in stderr, stderr[-3000:]
  together(2, *toy(f"{ROOT}cut", *few), **unhurried, **one.environment)
  files = ended_alike(one, tmp_path)
  for item in ("params.model", "optimizer"):
    assert all(any(name.startswith(f"{item}/{manifest.OWN}{index}/d/") for name in files) for index in range(2))  # each has rows of each array


def ended_alike(one, folder):
  """Asserts that the run `cut` of a bucket ended, after its fourth step, as `disk` in a folder did; returns the files that its manifest lists. The
  server ends."""
  one.download(folder)
  one.close()
  assert_same_bits(folder / "disk", folder / "cut")
  assert checkpoint.Checkpoints(folder / "cut" / "toy" / "checkpoints").latest_step() == 4
  return json.loads((folder / "cut" / "toy" / "checkpoints" / "4" / manifest.NAME).read_text())["content"]["files"]


def test_an_evaluation_in_a_bucket_writes_the_files_of_one_on_a_disk(bucket, folder, tmp_path):
  """In three shares, scored by their features too; what is there is not drawn again, and its pictures are read from the bucket."""
  suite, tasks = with_features()
  one = evaluate_into(evaluating.Folder(tmp_path / "out"), REQUEST, [work(evaluating.Folder(tmp_path / "out"), suite, tasks)])
  out = evaluating.Folder(str(folder))
  assert [evaluate_into(out, REQUEST, [work(out, suite, tasks)], Share(index, 3)) for index in range(3)] == [None, None, one]
  assert evaluate_into(out, REQUEST, [work(out, suite, tasks, most=0)]) == one
  bucket.download(tmp_path / "down")
  assert files(tmp_path / "down" / folder.name) == files(tmp_path / "out")
  images = places.find_place(str(folder), "--images")
  again = evaluate_into(evaluating.Folder(tmp_path / "again"), REQUEST, [work_of_images(images, "toy", suite, tasks)])
  assert again["suites"] == one["suites"]


def test_pictures_in_a_bucket_are_found_by_any_of_their_names_and_a_change_is_seen(bucket, folder, tmp_path, monkeypatch):
  """Relative, with .., or of another folder: one that is listed once. None of their bytes is read for that."""
  suite, _ = toy_suite(4)
  monkeypatch.setattr(asked, "make_suite", lambda name, settings, source: (suite, 4))
  other = places.find_place(f"{folder}-other", "x")
  names = {"0.png": folder, "./1.png": folder, "../" + other.name + "/2.png": other, f"{other}/3.png": other, "none.png": None}
  png = lambda level: encode_png(np.full((8, 8, 3), level, np.uint8))
  for i, (name, place) in enumerate(names.items()):
    if place is not None:
      places.write_file(place / f"{i}.png", png(i))
  rows = [{"file": name, "prompt": f"prompt {i % 4}", "seed": i // 4} for i, name in enumerate(names)]
  places.write_file(folder / "manifest.jsonl", evaluating.lines(rows))
  listed, before = [], places.list_files
  monkeypatch.setattr(asked, "list_files", lambda place: listed.append(str(place)) or before(place))
  evaluate = lambda out: asked.evaluate_images(str(tmp_path / out), str(folder), {"toy": {}})
  found = evaluate("out")["suites"]["toy"]
  assert found["num_pictures"] == 4 and list(found["left_out"]) == [f"There is no picture {folder}/none.png."]
  assert found["figures"]["bright"]["value"] == pytest.approx(1.5 / 255) and listed == [str(folder), str(other)]
  assert evaluate("out")["suites"]["toy"] == found
  for place in (folder / "1.png", other / "3.png"):
    places.write_file(place, png(9))
    with pytest.raises(ValueError, match="another evaluation: suites.toy.pictures was"):
      evaluate("out")
    places.write_file(place, png(int(place.stem)))  # another object, whatever it holds
    with pytest.raises(ValueError, match="another evaluation: suites.toy.pictures was"):
      evaluate("out")
    (tmp_path / "out").rename(tmp_path / place.stem)
    evaluate("out")
