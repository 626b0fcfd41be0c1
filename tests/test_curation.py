"""Raw folders become data sets: every sample is accounted for, whoever does the work and however often it is interrupted."""

import collections
import filecmp
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import apache_beam as beam
import commands
import numpy as np
import pytest
from apache_beam.testing.util import assert_that, equal_to
from PIL import Image
from raw_folder import encoded, held_after_two, make_folder, picture

from configs import curation
from data_pipelines import records
from data_pipelines.curation import duplicates, encode, files, funnel, packing, pipeline
from data_pipelines.curation.funnel import Row
from data_pipelines.curation.operators import make_operators, missing_report_operators
from data_pipelines.curation.sample import Caption, Sample
from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.transforms import decode_image
from data_pipelines.verify import verify
from qimg2.runtime.config import plain


def settings(**changes):
  """The config for small pictures."""
  cfg = plain(curation.get_config("small"))
  return cfg | {"samples_per_unit": 16, "vocab_size": 300, "shard_gb": 1e-4, "reading": cfg["reading"] | {"captions": "lines"}} | changes


def dropped(path) -> collections.Counter:
  steps = json.loads((pathlib.Path(path) / "funnel.json").read_text())["steps"]
  for step, after in zip(steps, steps[1:]):
    assert step["entered"] == step["passed"] + sum(step["drops"].values()) and after["entered"] == step["passed"]
  return collections.Counter({(step["operator"], reason): count for step in steps for reason, count in step["drops"].items()})


def same_bytes(first, second) -> bool:
  left, right = ({path.relative_to(root): path for path in sorted(pathlib.Path(root).rglob("*")) if path.is_file()} for root in (first, second))
  return left.keys() == right.keys() and all(filecmp.cmp(left[name], right[name], shallow=False) for name in left)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """A folder of 60 samples, 10 of them of no use, and the data set made of it by one worker."""
  root = tmp_path_factory.mktemp("small")
  expected = make_folder(root / "raw", 60, 10)
  facts = pipeline.curate(str(root / "raw"), "mine", str(root / "out"), settings(), num_workers=1)
  return root, expected, facts


def test_counts_add_up(small):
  root, expected, facts = small
  assert sum(expected.values()) == 10 and len(expected) == 6
  assert dropped(facts["path"]) == expected
  assert facts["samples"] == 60 and facts["train"] + facts["validation"] == facts["passed_all"] == 50 and facts["dropped"] == 10
  assert facts["validation"] >= 1
  assert os.listdir(root / "out") == ["mine"]
  page = pathlib.Path(facts["path"], "report.html").read_text()
  assert "Not run" in page and "near_duplicate, 1 dropped" in page and "of 64 bits from that of" in page and page.count("data:image/jpeg") > 20


def test_records_are_what_was_there(small):
  assert len(list(pathlib.Path(small[2]["path"], records.VERSION).glob("mine-train*-of-00002"))) == 2  # of four units
  root, _, facts = small
  assert verify(root / "out", "mine")["records"] == 50
  seen = set()
  for split in records.SPLITS:
    source, index = records.open_split(root / "out", "mine", split)
    for i in range(len(source)):
      record = source[i]
      key = json.loads(record["attributes"])["key"]
      assert record["image"] == (root / "raw" / key).read_bytes()
      assert [text.decode() for text in record["captions"]] == (root / "raw" / key).with_suffix(".txt").read_text().splitlines()
      assert index["sample_id"][i] == record["sample_id"] and record["stage"] == 6
      seen.add(int(record["sample_id"]))
  assert len(seen) == 50 and max(seen) < 60


def test_the_same_command_finds_it_and_another_is_refused(small):
  root, _, facts = small
  again = pipeline.curate(str(root / "raw"), "mine", str(root / "out"), settings(), num_workers=1)
  assert again == facts | {"reused": True}
  meta = records.read_meta(facts["path"])["request"]
  before = {key: value for key, value in meta["config"].items() if key not in ("shard_gb", "reading")}
  before["encode"] = {key: value for key, value in before["encode"].items() if key != "alpha"}
  now = lambda **reading: meta | {"config": meta["config"] | {"reading": meta["config"]["reading"] | reading}}
  for same in ({}, {"captions": "ask"}):
    assert pipeline._difference(meta | {"config": before}, now(**same)) == "", "of a version without these keys"
  for other in ({"captions": "whole"}, {"uncaptioned": "keep"}, {"captions": "ask", "uncaptioned": "file_name"}):
    assert pipeline._difference(meta | {"config": before}, now(**other)) == "with another config (reading)"
  with pytest.raises(ValueError, match=r"holds a data set with another config \(validation_share\): remove that folder, or choose another --name"):
    pipeline.curate(str(root / "raw"), "mine", str(root / "out"), settings(validation_share=0.5), num_workers=1)


@pytest.mark.slow
def test_interrupted_between_units(small, tmp_path, monkeypatch):
  """In either pass: the result is the same to the byte, and no unit that is done is done again."""
  root, _, facts = small
  for number, phase in enumerate(("_survey", "_curate")):
    done = []
    real = getattr(funnel, phase)

    def stop(job, unit, *rest):
      if len(done) == number + 1:
        raise KeyboardInterrupt
      done.append(unit.number)
      return real(job, unit, *rest)
    out = tmp_path / str(number)
    with monkeypatch.context() as patch:
      patch.setattr(funnel, phase, stop)
      with pytest.raises(KeyboardInterrupt):
        pipeline.curate(str(root / "raw"), "mine", str(out), settings(), num_workers=1)
    assert os.listdir(out) == [".mine.work"]
    again = []
    with monkeypatch.context() as patch:
      patch.setattr(funnel, phase, lambda job, unit, *rest: (again.append(unit.number), real(job, unit, *rest))[1])
      pipeline.curate(str(root / "raw"), "mine", str(out), settings(), num_workers=1)
    assert not set(done) & set(again) and same_bytes(out / "mine", facts["path"])


@pytest.mark.slow
def test_interrupted_while_the_data_set_is_put_together(small, tmp_path, monkeypatch):
  root, _, facts = small
  with monkeypatch.context() as patch:
    patch.setattr(pipeline.report, "write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
      pipeline.curate(str(root / "raw"), "mine", str(tmp_path), settings(), num_workers=1)
  with monkeypatch.context() as patch:
    patch.setattr(funnel, "_curate", lambda *args: pytest.fail("a unit that is done is done again"))
    patch.setattr(packing, "_write", lambda *args: pytest.fail("a file that is there is written again"))
    pipeline.curate(str(root / "raw"), "mine", str(tmp_path), settings(), num_workers=1)
  assert same_bytes(tmp_path / "mine", facts["path"]) and os.listdir(tmp_path) == ["mine"]


@pytest.mark.slow
@pytest.mark.parametrize(("num", "share", "expected"), [(1, 0.02, (1, 0)), (1, 0.9, (1, 0)), (6, 1e-9, (5, 1)), (6, 0.999999, (5, 1)),
                                                        (6, 0.0, (6, 0))])
def test_some_are_held_out_and_some_are_not(tmp_path, num, share, expected):
  make_folder(tmp_path / "raw", num, 0)
  facts = pipeline.curate(str(tmp_path / "raw"), "mine", str(tmp_path / "out"), settings(validation_share=share, samples_per_unit=3), num_workers=1)
  assert (facts["train"], facts["validation"]) == expected
  assert verify(tmp_path / "out", "mine")["records"] == num


def test_a_picture_and_its_edits_are_in_one_split(tmp_path):
  for i in range(24):
    (tmp_path / f"p{i}.png").write_bytes(encoded(picture(i), "PNG"))
    (tmp_path / f"e{i}.png").write_bytes(encoded(picture(100 + i), "PNG"))
    (tmp_path / f"e{i}.source.png").write_bytes(encoded(picture(i), "PNG"))
    for name in (f"p{i}.txt", f"e{i}.txt"):
      (tmp_path / name).write_text(f"text {i}")
  pipeline.curate(str(tmp_path), "both", str(tmp_path.parent / f"{tmp_path.name}_out"), settings(validation_share=0.4), num_workers=1)
  split_of = {}
  for split in records.SPLITS:
    for record in iter(records.open_split(tmp_path.parent / f"{tmp_path.name}_out", "both", split)[0]):
      split_of.setdefault((record["sources"] or [record["image"]])[0], set()).add(split)
  assert len(split_of) == 24 and all(len(splits) == 1 for splits in split_of.values()) and len(set(map(min, split_of.values()))) == 2


def test_later_stages_do_not_run_in_the_survey_and_take_no_captions_out():
  entries = [{"name": "broken", "stage": "S1"}, {"name": "luma", "stage": "S1"}, {"name": "min_resolution", "stage": "S4"}]
  assert funnel.survey_length(entries) == 2
  with pytest.raises(ValueError, match="Operator 'token_length' of S4 takes captions out, which all stages share: list it in S1"):
    pipeline._check(settings(operators=(*entries, {"name": "token_length", "stage": "S4"})), "mine")


def test_a_list_of_keys_keeps_nothing_else(tmp_path):
  (tmp_path / "keys.txt").write_text("cats/1.jpg\n")
  entries = plain(curation.get_config("listed"))["operators"]
  entries[1]["path"] = str(tmp_path / "keys.txt")
  steps = make_operators(entries, train_tokenizer([], 300))
  assert [steps[1].apply(Sample(key)) is None for key in ("cats/1.jpg", "cats/2.jpg")] == [True, False]
  assert funnel.last_stage(steps, (1, steps[1].apply(Sample("cats/2.jpg")))) == 0
  assert "S6 listed" not in missing_report_operators(steps) and len(steps) == 1 + len(curation.get_config().operators)


def test_a_changed_source_or_config_does_not_go_on(small, tmp_path, monkeypatch):
  make_folder(tmp_path / "raw", 20, 0)
  with monkeypatch.context() as patch:
    patch.setattr(pipeline, "_settle", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
      pipeline.curate(str(tmp_path / "raw"), "mine", str(tmp_path / "out"), settings(), num_workers=1)
  with pytest.raises(ValueError, match=r"unfinished run with another config \(validation_share\): remove that folder"):
    pipeline.curate(str(tmp_path / "raw"), "mine", str(tmp_path / "out"), settings(validation_share=0.3), num_workers=1)
  text = tmp_path / "raw" / "p00001.txt"
  text.write_text(text.read_text().upper())  # of the same length
  os.utime(text, ns=(1, 1))
  with pytest.raises(ValueError, match="files were added, removed or changed"):
    pipeline.curate(str(tmp_path / "raw"), "mine", str(tmp_path / "out"), settings(), num_workers=1)


OPTIONS = ("--config=configs/curation.py:small", "--config.samples_per_unit=16", "--captions=lines")


def launch(*arguments, **environment):
  return subprocess.Popen([sys.executable, "-m", "launch.prepare_data", *OPTIONS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, start_new_session=True, env={**os.environ, **environment})


@pytest.mark.slow
def test_a_folder_by_one_worker_and_by_two_that_are_killed(tmp_path):
  """Killed in the second pass; what an interruption leaves of either is in `test_interrupted_between_units`."""
  expected = make_folder(tmp_path / "raw", 80, 10)  # 5 units
  assert sum(expected.values()) == 10 and len(expected) == 6
  arguments = (f"--source={tmp_path}/raw", "--name=mine")
  one = commands.launch("launch.prepare_data", *OPTIONS, *arguments, f"--out={tmp_path}/1", "--num_workers=1")
  assert one.returncode == 0 and "70" in one.stdout, one.stderr
  assert dropped(tmp_path / "1" / "mine") == expected
  out = tmp_path / "killed"
  killed = launch(*arguments, f"--out={out}", "--num_workers=2", PYTHONPATH=held_after_two(tmp_path / "held"))
  work = out / ".mine.work" / "curated"
  while len(list(work.glob("*.json"))) < 2:
    assert killed.poll() is None
    time.sleep(0.02)
  os.killpg(killed.pid, signal.SIGKILL)
  killed.communicate()
  assert not (out / "mine").exists() and len(list(work.glob("*.json"))) < 5
  printed, error = launch(*arguments, f"--out={out}", "--num_workers=2").communicate(timeout=600)
  assert error == "" and "70" in printed, error
  assert same_bytes(tmp_path / "1", out)


# ---- parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("most, expected", [
    (10, [["a0", "a2"], ["a3"], ["a4"], ["b1", "b4"]]), (1e9, [["a0", "a2", "a3", "a4"], ["b1", "b4"]]),
    (1, [["a0"], ["a2"], ["a3"], ["a4"], ["b1"], ["b4"]])])
def test_units_that_follow_one_another_share_a_file(most, expected):
  train, held_out = (tuple(records.Shard(f"{split}{i}", int(size > 0), size, "") for i, size in enumerate(sizes))
                     for split, sizes in (("a", (4, 0, 6, 1, 30)), ("b", (0, 2, 0, 0, 3))))
  packs = packing.plan({"train": train, "validation": held_out}, most)
  assert [[shard.path for shard in one.shards] for one in packs] == expected and [one.number for one in packs] == list(range(len(packs)))
  assert [one.split for one in packs] == [{"a": "train", "b": "validation"}[names[0][0]] for names in expected]


def test_duplicates_equal_a_search_of_all_pairs():
  rng = np.random.default_rng(3)
  base = rng.integers(0, 2**63, 12).tolist()
  hashes = [value ^ sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 8), replace=False)) for value in base for _ in range(9)]
  rows = [Row(i // 10, i % 10, f"k{i}", "" if i % 5 else "other", f"{'same' if i % 17 == 0 else i}", value)
          for i, value in enumerate(rng.permutation(np.array(hashes, np.uint64)).tolist())]
  expected, distinct = [], []
  for row in rows:
    same = [other for other in rows[:rows.index(row)] if (other.group, other.sha256) == (row.group, row.sha256)]
    if same:
      expected.append((row.unit, (row.position, "exact_duplicate", f"The file is the same as {same[0].key}.")))
      continue
    near = [other for other in distinct if other.group == row.group and (other.perceptual ^ row.perceptual).bit_count() <= 4]
    distinct.append(row)
    if near:
      bits = (near[0].perceptual ^ row.perceptual).bit_count()
      expected.append((row.unit, (row.position, "near_duplicate", f"Its perceptual hash differs in {bits} of 64 bits from that of {near[0].key}.")))
  assert 20 < len(expected) < len(rows) - 20
  with beam.Pipeline() as p:
    found = duplicates.find(p | beam.Create(rows), 4)
    assert_that(found, equal_to(expected))


def test_edits_are_duplicates_only_with_their_sources_and_words():
  edit = lambda source, text: funnel._group(Sample("k", b"x", [Caption(text)], [source]))
  assert edit(b"a", "red") == edit(b"a", "red") != edit(b"b", "red") and edit(b"a", "red") != edit(b"a", "blue")
  assert funnel._group(Sample("k", b"x", [Caption("red")])) == ""


def test_an_edit_folder_becomes_editing_records(tmp_path):
  for i in range(6):
    (tmp_path / f"e{i}.png").write_bytes(encoded(picture(i), "PNG"))
    (tmp_path / f"e{i}.source1.png").write_bytes(encoded(picture(100 + i), "PNG"))
    (tmp_path / f"e{i}.source2.jpg").write_bytes(encoded(picture(200 + i, 64, 64)))
    (tmp_path / f"e{i}.txt").write_text(f"make it like the second {i}")
  facts = pipeline.curate(str(tmp_path), "edits", str(tmp_path / "out"), settings(), num_workers=1)
  assert facts["train_edits"] + facts["validation_edits"] == 6
  source, index = records.open_split(tmp_path / "out", "edits", "train")
  assert index["source_sizes"][0].tolist() == [[72, 96], [64, 64]] and len(source[0]["sources"]) == 2


def test_pictures_are_no_larger_than_training_wants():
  large, small_one = picture(1, 700, 900), picture(2)
  data, size = encode.shrink(encoded(large, "BMP"), np.asarray(large), 256, "webp", 95)
  assert Image.open(io.BytesIO(data)).format == "WEBP" and size == decode_image(data).shape[:2] and 224 <= size[0] < 260
  kept = encoded(small_one, "JPEG")
  assert encode.shrink(kept, np.asarray(small_one), 256, "webp", 95) == (kept, (72, 96))
  turned = encoded(small_one, "JPEG", exif=_orientation(6))
  data, size = encode.shrink(turned, decode_image(turned), 256, "png", 95)
  assert size == (96, 72) and (decode_image(data) == decode_image(turned)).all() and not Image.open(io.BytesIO(data)).getexif()


def test_a_picture_that_is_encoded_anew_keeps_its_transparency_where_that_is_asked_for():
  pixels = np.zeros((700, 900, 4), np.uint8)
  pixels[..., 1], pixels[:, :300] = 255, (200, 30, 10, 255)  # red beside clear green
  pixels[:, 300:600] = (0, 0, 255, 128)
  data, opaque = encoded(Image.fromarray(pixels), "PNG"), encoded(picture(1, 700, 900), "PNG")
  for kind in ("webp", "png"):
    kept, size = encode.shrink(data, decode_image(data), 256, kind, 95, alpha=True)
    small = decode_image(kept, keep_alpha=True)
    third = size[1] // 3
    assert small.shape == (*size, 4) and 224 <= size[0] < 260
    for columns, colour in ((slice(5, third - 5), (200, 30, 10, 255)), (slice(third + 5, 2 * third - 5), (0, 0, 255, 128))):
      assert np.abs(small[:, columns].astype(int) - colour).max() <= 12, "red does not bleed into what is clear"
    assert small[:, 2 * third + 5:, 3].max() == 0
    assert decode_image(encode.shrink(data, decode_image(data), 256, kind, 95)[0], keep_alpha=True).shape[-1] == 3
    assert encode.shrink(opaque, decode_image(opaque), 256, kind, 95, alpha=True) == encode.shrink(opaque, decode_image(opaque), 256, kind, 95)
  with pytest.raises(ValueError, match="config.encode.alpha keeps transparency, which a JPEG has not: choose webp or png"):
    encode.check(settings()["encode"] | {"alpha": True, "format": "jpeg"})


def _orientation(value: int) -> bytes:
  exif = Image.Exif()
  exif[0x0112] = value
  return exif.tobytes()


def test_later_stages_limit_and_do_not_drop():
  steps = funnel.make_steps([{"name": "broken", "stage": "S1"}, {"name": "min_resolution", "stage": "S1", "min_px": 32},
                             {"name": "min_resolution", "stage": "S4", "min_px": 200}, {"name": "min_resolution", "stage": "S6", "min_px": 400}])
  stage = lambda side: funnel.last_stage(steps, funnel._first_failure(steps, Sample("k", encoded(picture(1, side, side)))))
  assert [stage(side) for side in (16, 64, 200, 400)] == [0, 3, 5, 6]


def test_a_remote_place_ends_with_the_same_bytes(small):
  """Work files and the data set may be in a bucket; fsspec's memory file system stands for one."""
  root, _, facts = small
  pipeline.curate(str(root / "raw"), "mine", "memory://bucket/out", settings(), num_workers=1)
  for path in pathlib.Path(facts["path"]).rglob("*"):
    if path.is_file():
      assert files.read(f"memory://bucket/out/mine/{path.relative_to(facts['path'])}") == path.read_bytes(), path
  assert files.names("memory://bucket/out") == {"mine"}
  assert pipeline.curate(str(root / "raw"), "mine", "memory://bucket/out", settings(), num_workers=1)["reused"]


def test_user_errors_are_one_sentence(tmp_path):
  make_folder(tmp_path / "raw", 4, 0)
  run = lambda name="mine", **changes: pipeline.curate(str(tmp_path / "raw"), name, str(tmp_path / "out"), settings(**changes), num_workers=1)
  for name in ("../x", "my-set", "a b", "1a", ""):
    with pytest.raises(ValueError, match="cannot be that of a data set: use letters, digits and _"):
      run(name)
  with pytest.raises(ValueError, match="validation_share is 1.5"):
    run(validation_share=1.5)
  with pytest.raises(ValueError, match="first of config.operators must be 'broken'"):
    run(operators=({"name": "duplicate", "stage": "S1"},))
  with pytest.raises(ValueError, match="wants a model"):
    run(operators=({"name": "broken", "stage": "S1"}, {"name": "nsfw", "stage": "S1", "model": ""}))
  with pytest.raises(ValueError, match="No picture of .* is left for training: 4 samples: 4 dropped by min_resolution of S1"):
    run(operators=({"name": "broken", "stage": "S1"}, {"name": "min_resolution", "stage": "S1", "min_px": 4000}))
  with pytest.raises(ValueError, match="encode.format is 'gif'"):
    run(encode=settings()["encode"] | {"format": "gif"})


@pytest.mark.parametrize(("flags", "code", "message"), [
    (("--source={0}/raw", "--name=glyphs", "--out={0}/out"), 1, "that of an embedded data set"),
    (("--source={0}/raw", "--name=mine", "--out={0}/raw/out"), 1, "lies in the source"),
    (("--source={0}/raw", "--name=mine", "--out={0}/out", "--vocab_size=300"), 1, "--vocab_size is for --dataset"),
    (("--source={0}/raw", "--name=mine", "--out={0}/out", "--config=configs/quickstart.py"), 1, "--config is none for curation"),
    (("--source={0}/nothing", "--name=mine", "--out={0}/out"), 1, "{0}/nothing"),
    (("--out={0}/out",), 1, "Give one of --source"),
    (("--source={0}/raw", "--name=mine", "--out={0}/out", "--config.operators[1].min_pix=3"), 2, "min_px"),
])
def test_the_launcher_refuses_in_one_sentence(tmp_path, flags, code, message):
  make_folder(tmp_path / "raw", 3, 0)
  done = commands.launch("launch.prepare_data", *(flag.format(tmp_path) for flag in flags))
  assert done.returncode == code and message.format(tmp_path) in done.stderr and done.stderr.count("\n") == 1, done.stderr
  assert not (tmp_path / "out").exists()


def test_verify_finds_a_flipped_bit_and_a_missing_file(small, tmp_path):
  root, _, facts = small
  shutil.copytree(facts["path"], tmp_path / "other")
  (tmp_path / "other" / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="tokenizer.json has other bytes than were written"):
    verify(tmp_path, "other")
  shutil.copytree(facts["path"], tmp_path / "mine")
  shard = next((tmp_path / "mine" / records.VERSION).glob("*train*"))
  data = bytearray(shard.read_bytes())
  data[len(data) // 2] ^= 1
  shard.write_bytes(data)
  with pytest.raises(ValueError, match="has other bytes than were written"):
    verify(tmp_path, "mine")
  shard.unlink()
  with pytest.raises(ValueError, match="is missing: copy it again"):
    verify(tmp_path, "mine")


@pytest.mark.slow
def test_training_imports_nothing_of_curation():
  code = ("import sys, launch.train\n"
          "print([m for m in sys.modules if m.startswith(('apache_beam', 'imagehash', 'rapidocr', 'data_pipelines.curation'))])")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]", done.stdout
