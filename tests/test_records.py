"""Data sets on disk: whole or absent, never mistaken for another, read without TensorFlow."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from commands import launch, process

from configs import quickstart
from data_pipelines import columns, embedded, records
from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.transforms import decode_image
from qimg2.runtime import run
from qimg2.runtime.config import parse, plain


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  out = tmp_path_factory.mktemp("data")
  return out, embedded.prepare("glyphs", out, num_examples=50, seed=1)


def test_facts(prepared):
  out, facts = prepared
  assert facts["train"] == 75 and facts["validation"] == 4 and not facts["reused"]
  assert facts["train_edits"] == 25 and facts["validation_edits"] == 2
  assert facts["path"] == os.path.join(out, "glyphs") and sorted(os.listdir(out)) == ["glyphs"]
  tokenizer = records.load_tokenizer(out, "glyphs")
  assert tokenizer.vocab_size == facts["vocab_size"] and tokenizer.num_system_tokens == facts["num_system_tokens"]
  lengths = []
  for split in records.SPLITS:
    for record in embedded.SOURCES["glyphs"].examples(split, 50, 1):
      lengths += [len(tokenizer.encode(text)) for text in record["captions"]]
  assert facts["longest_caption_tokens"] == max(lengths)


@pytest.mark.parametrize("split", records.SPLITS)
def test_records_and_index_agree_with_the_source(prepared, split):
  source, index = records.open_split(prepared[0], "glyphs", split)
  made = list(embedded.SOURCES["glyphs"].examples(split, 50, 1))
  assert len(source) == len(made) == len(index["sample_id"])
  for i, expected in enumerate(made):
    read = source[i]
    assert read["image"] == expected["image"] and read["attributes"].decode() == expected["attributes"]
    assert [text.decode() for text in read["captions"]] == expected["captions"]
    assert [text.decode() for text in read["languages"]] == expected["languages"]
    assert read["quality"] == pytest.approx(expected["quality"])
    for column in ("height", "width", "sample_id"):
      assert read[column] == index[column][i] == expected[column]
    assert index["quality"][i] == np.float32(expected["quality"])
    assert list(read["sources"]) == expected.get("sources", [])
    there = index["source_sizes"][i][(index["source_sizes"][i] > 0).all(1)].tolist()
    assert there == [list(size) for size in zip(expected.get("source_height", []), expected.get("source_width", []))]
    assert decode_image(read["image"]).shape == (read["height"], read["width"], 3)


def test_ids_are_unique_over_splits(prepared):
  ids = np.concatenate([records.open_split(prepared[0], "glyphs", split)[1]["sample_id"] for split in records.SPLITS])
  assert len(set(ids.tolist())) == len(ids) and 0 <= ids.min() and ids.max() < 2**31


def test_the_same_request_is_reused_and_another_refused(prepared):
  out, facts = prepared
  assert embedded.prepare("glyphs", out, num_examples=50, seed=1) == facts | {"reused": True}
  with pytest.raises(ValueError, match="made with seed=1, not seed=2: remove that folder or choose another --out"):
    embedded.prepare("glyphs", out, num_examples=50, seed=2)
  with pytest.raises(ValueError, match="num_examples=50, not num_examples=51"):
    embedded.prepare("glyphs", out, num_examples=51, seed=1)


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
  def interrupted(*args):
    raise KeyboardInterrupt
  with monkeypatch.context() as patch:
    patch.setattr(embedded, "train_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
      embedded.prepare("glyphs", tmp_path, num_examples=3)
  assert os.listdir(tmp_path) == []
  assert embedded.prepare("glyphs", tmp_path, num_examples=3)["train"] == 4


def test_a_faster_process_wins_without_harm(tmp_path, monkeypatch):
  build = embedded.build
  def slow_build(*arguments):
    monkeypatch.setattr(embedded, "build", build)
    embedded.prepare("glyphs", tmp_path, num_examples=3)
    return build(*arguments)
  monkeypatch.setattr(embedded, "build", slow_build)
  assert embedded.prepare("glyphs", tmp_path, num_examples=3)["reused"]
  assert os.listdir(tmp_path) == ["glyphs"]


def test_user_errors_are_one_sentence(prepared, tmp_path):
  with pytest.raises(ValueError, match="Unknown data set 'cats': choose one of glyphs, emoji"):
    embedded.prepare("cats", tmp_path)
  with pytest.raises(ValueError, match="num_examples=0"):
    embedded.prepare("glyphs", tmp_path, num_examples=0)
  with pytest.raises(ValueError, match="make it with python -m launch.prepare_data, --dataset=glyphs for an embedded one"):
    records.open_split(tmp_path, "glyphs", "train")
  with pytest.raises(ValueError, match="no split 'test': it has train, validation"):
    records.open_split(prepared[0], "glyphs", "test")
  (tmp_path / "glyphs").mkdir()
  with pytest.raises(ValueError, match="not a prepared data set"):
    embedded.prepare("glyphs", tmp_path)


def test_no_tensorflow_and_no_jax_of_ours():
  code = ("import sys, data_pipelines.records as r, data_pipelines.embedded as e, tempfile\n"
          "with tempfile.TemporaryDirectory() as d:\n"
          "  e.prepare('glyphs', d, 2); r.open_split(d, 'glyphs', 'train')[0][0]\n"
          "print('tensorflow' in sys.modules, 'jax' in sys.modules)")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == ["False", "False"], done.stderr


def test_launcher_prepares_and_explains(tmp_path):
  done = process("launch.prepare_data", "--dataset=glyphs", f"--out={tmp_path}", "--num_examples=2")
  assert done.returncode == 0 and f"Wrote {tmp_path}/glyphs" in done.stdout, done.stderr
  with open(tmp_path / "glyphs" / "dataset.json", encoding="utf-8") as file:
    assert json.load(file)["facts"]["train"] == 3
  again = launch("launch.prepare_data", "--dataset=glyphs", f"--out={tmp_path}", "--num_examples=3")
  assert again.returncode != 0 and again.stdout == "" and "Traceback" not in again.stderr
  assert "num_examples=2, not num_examples=3" in again.stderr


USES = {"prepare": lambda place: embedded.prepare("glyphs", place, 3), "load_run": run.load_run,
        "Run": lambda place: run.Run(quickstart.get_config("smoke"), place),
        "data_dir": lambda place: parse(plain(quickstart.get_config("smoke")) | {"data_dir": str(place)})}


@pytest.mark.parametrize("use, place", [
    pytest.param(use, place, id=f"{name}-{place}") for name, use in USES.items()
    for place in ("gs://bucket/folder", pathlib.Path("s3://bucket/folder")) if name not in ("load_run", "Run") or "gs" not in str(place)])
def test_a_url_never_becomes_a_folder_of_its_name(use, place, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  said = "(mount the bucket|neither a folder of this machine nor gs://BUCKET/FOLDER)"
  with pytest.raises(ValueError, match=f"(--out|--workdir|config.data_dir) is (gs|s3):/.*{said}"):
    use(place)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, what", [("quality", "records"), ("caption_tokens", "captions")])
def test_columns_that_do_not_go_together_are_refused(tmp_path, name, what):
  embedded.prepare("glyphs", tmp_path, num_examples=3)
  path = tmp_path / "glyphs" / "index-train.npz"
  with np.load(path) as file:
    index = dict(file)
  np.savez(path, **index | {name: index[name][:-1]})
  num = len(index[name])
  with pytest.raises(ValueError, match=f"index-train.npz has the column {name} of {num - 1} {what}, and others of {num}: copy it again"):
    records.open_split(tmp_path, "glyphs", "train")


@pytest.mark.parametrize("large", [False, True])
def test_indices_of_parts_become_one(monkeypatch, tmp_path, large):
  """Languages are numbered anew, and rows of fewer condition images get zeros. What is large is in files, and comes to a data set from there."""
  monkeypatch.setattr(columns, "LARGE", 1 if large else 2**22)
  tokenizer, parts, made = train_tokenizer(["a b"], 300), [], []
  for languages, sizes in ((["en", "de"], [(4, 8)]), (["fr"], []), ([], []), (["de", "de", "en"], [(1, 2), (3, 4)])):
    part = records.Columns()
    for _ in range(2 if languages else 0):
      made.append({"height": 5 + len(made), "width": 6, "sample_id": 7 * len(made), "captions": ["a"] * len(languages), "languages": languages,
                   "source_height": [height for height, _ in sizes], "source_width": [width for _, width in sizes]})
      part.add(made[-1])
    parts.append(part.arrays(tokenizer))
  whole = records.Columns()
  for record in made:
    whole.add(record)
  joined, expected = records.join_indices(lambda: iter(parts)), whole.arrays(tokenizer)
  assert isinstance(joined["height"], np.memmap) == isinstance(joined["source_sizes"], np.memmap) == large
  np.savez(tmp_path / "joined.npz", **joined)
  found = columns.map_columns(tmp_path / "joined.npz")
  assert list(found) == list(joined) and found.keys() == expected.keys()
  for name, column in expected.items():
    assert found[name].dtype == column.dtype and found[name].tolist() == column.tolist(), name


@pytest.mark.parametrize("large", [False, True])
def test_an_index_that_was_replaced_is_refused(tmp_path, monkeypatch, large):
  """By one of the same length, which the kept order of the records would not be that of; of a large one not all bytes are read."""
  embedded.prepare("glyphs", tmp_path, num_examples=3)
  monkeypatch.setattr(records, "_READ_WHOLE", 0 if large else 2**26)
  monkeypatch.setattr(records, "sampled_digest" if not large else "checksum", None)
  assert len(records.open_split(tmp_path, "glyphs", "train")[0]) == 4
  path = tmp_path / "glyphs" / "index-train.npz"
  whole = path.read_bytes()
  with np.load(path) as file:
    index = dict(file)
  np.savez(path, **index | {"caption_tokens": index["caption_tokens"] + 1})
  assert path.stat().st_size == len(whole)
  with pytest.raises(ValueError, match="index-train.npz is not the index that dataset.json beside it was written with: copy both again"):
    records.open_split(tmp_path, "glyphs", "train")
  path.write_bytes(whole)
  records.open_split(tmp_path, "glyphs", "train")
