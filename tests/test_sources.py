"""Sources of curation: every kind gives the same samples, nothing is lost without a word, and a changed source is noticed."""

import dataclasses
import io
import json
import os
import re
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from raw_sources import PICTURES, ROWS, SOURCES, json_lines, parquet, png, tar, tfds_records, tiny, write

from data_pipelines.curation.reading import Reading
from data_pipelines.curation.sample import Caption
from data_pipelines.curation.sources import Unit, fingerprint, look_up, plan_units, read_unit
from data_pipelines.records import KINDS
from data_pipelines.transforms import decode_image


def read(source, samples_per_unit=512, **reading):
  return [sample for unit in plan(source, samples_per_unit, **reading) for sample in read_unit(unit)]


def plan(source, samples_per_unit=512, captions="lines", **reading):
  return plan_units(look_up(source, Reading(captions, **reading)), samples_per_unit)


def facts(sample):
  return sample.error, sample.image, sample.captions, sample.sources


# TFDS reads no memory:// files.
@pytest.mark.parametrize("kind, where", [(kind, "") for kind in SOURCES] + [(kind, "memory:/") for kind in SOURCES if kind != "tfds"])
def test_every_kind_gives_the_same_samples(kind, where, tmp_path):
  source = SOURCES[kind](f"{where}{tmp_path}")
  whole = read(source)
  assert list(map(facts, whole)) == [("", row.image, [Caption(text, row.language, row.kind) for text in row.captions], row.sources) for row in ROWS]
  assert len({sample.key for sample in whole}) == len(ROWS) and not any(str(tmp_path) in sample.key for sample in whole)
  units = plan(source, 3)
  assert [unit.number for unit in units] == list(range(len(units))) and sum(unit.stop - unit.start for unit in units) == len(ROWS)
  stored = [Unit(**json.loads(json.dumps(dataclasses.asdict(unit)))) for unit in units]
  assert stored == units
  # Backwards: a unit depends on no other.
  parts = [list(read_unit(unit)) for unit in reversed(stored)][::-1]
  assert [len(part) for part in parts] == [unit.stop - unit.start for unit in units]
  assert [(sample.key, facts(sample)) for part in parts for sample in part] == [(sample.key, facts(sample)) for sample in whole]
  # Several tars are units as they are.
  expected = {"folder of parquet": [(0, 2), (0, 3), (3, 5)], "tars *": [(0, 3), (0, 4)], "tars {}": [(0, 3), (0, 4)]}
  assert [(unit.start, unit.stop) for unit in units] == expected.get(kind, [(0, 3), (3, 6), (6, 7)])


def test_a_unit_of_a_table_reads_only_its_own_lines(tmp_path):
  for source in (SOURCES["csv"](tmp_path), json_lines(tmp_path)):
    last, path = plan_units(source, 3)[-1], tmp_path / os.path.basename(source)
    path.write_bytes(b"?" * last.options["offset"] + path.read_bytes()[last.options["offset"]:])
    assert [(sample.error, sample.image) for sample in read_unit(last)] == [("", ROWS[6].image)]


def check_errors(source, expected):
  """Every sample has the key expected, and an error with these words or none; neither depends on the units."""
  for size in (512, 2, 1):
    samples = read(source, size)
    assert [sample.key for sample in samples] == list(expected)
    assert sum(unit.stop - unit.start for unit in plan_units(source, size)) == len(samples)
    for sample, words in zip(samples, expected.values()):
      assert re.search(words, sample.error) if words else not sample.error, (sample.key, sample.error)
      assert not sample.error or sample.error.endswith(".") and "\n" not in sample.error and sample.error.encode()
  return samples


def test_broken_files_of_a_folder(tmp_path):
  image = png(1)
  write(tmp_path, {
      "a.png": image, "a.txt": "fine", "bare.png": image, "blank.png": image, "blank.txt": " \n\n", "bad.png": image, "bad.txt": b"caf\xe9",
      "nul.png": image, "nul.txt": "a\0b", "empty.png": b"", "empty.txt": "a", "lonely.txt": "a", "json.png": image, "json.json": "{",
      "list.png": image, "list.json": "[1]", "kind.png": image, "kind.json": '{"caption": "a", "kind": "poem"}', "gone.source2.png": image,
      "gone.txt": "make it red", "twice.png": image, "twice.txt": "a", "twice.source1.png": image, "twice.source01.jpg": image,
      "deep.png": image, "deep.json": '{"caption": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "other.source.png": image})
  os.symlink(tmp_path / "nowhere", tmp_path / "link.png")
  with open(os.fsencode(tmp_path) + b"/odd\xe9.png", "wb") as file:
    file.write(image)
  check_errors(str(tmp_path), {
      "a.png": "", "bad.png": "bad.txt is not UTF-8", "bare.png": "no caption", "blank.png": "no caption", "deep.png": "nested too deeply",
      "empty.png": "0 bytes", "gone.txt": "no picture 'gone'", "json.png": "not valid JSON", "kind.png": ", ".join(KINDS), "link.png": "missing",
      "list.png": "instead of a JSON object", "lonely.txt": "no picture 'lonely'", "nul.png": "NUL", "odd\\udce9.png": "no caption",
      "other.source.png": "no picture 'other'", "twice.png": "two condition images number 1"})
  assert fingerprint(str(tmp_path), plan_units(str(tmp_path)))


# What is changed in a good record, or the whole line, and the words of the error.
BROKEN_RECORDS = [
    ({}, ""), ({"image": "p/none.png"}, "missing"), ({"image": None}, "names no picture"), ({"image": None, "bytes": "*"}, "not base64"),
    ({"image": "../p/00.png"}, "leads out"), ({"image": "../inside/p/00.png"}, "leads out"),
    ({"image": "/etc/hostname"}, "is absolute.*--picture_root=DIR.*'/etc'"),
    ({"image": "p"}, "missing"), ({"image": "p/00.png/x"}, "missing"), ({"image": "p/\0.png"}, "leads out"), ({"image": "p/\ud800.png"}, "missing"),
    ({"image": "x" * 5000}, "cannot be followed"), ({"image": 3}, "given as 3"), ({"image": {"bytes": "*"}}, "not base64"),
    ({"target": "p/01.png"}, "both `image` and `target`"), ({"caption": None}, "no caption"), ({"caption": " "}, "no caption"),
    ({"caption": 3}, "A caption is 3"), ({"captions": 3}, "A caption is 3"), ({"captions": [{"text": "b", "kind": "poem"}]}, ", ".join(KINDS)),
    ({"language": 3}, "language of a caption is 3"), ({"caption": "a\ud800"}, "not UTF-8"), ({"caption": "a\0"}, "NUL"),
    ({"quality": 1.5}, "is 1.5"), ({"quality": float("nan")}, "is nan"), ({"sources": 3}, "has 3 where"),
    ({"sources": ["none.png"]}, "missing"), ({"sources": "none.png"}, "missing"), ({"sources": ["p/01.png", None]}, "has None where"),
    ({"sources": []}, "no condition image: its list is empty"),
    ({"caption": None, "instruction": "b"}, "no condition image.*in place of `instruction`"),
    ({"sources": ["p/01.png"], "control_image": "p/01.png"}, "given twice, as control_image and sources"),
    ({"control_image_2": "p/01.png"}, "number 2 is there and number 1 is not"), ({"control_image": "p/none.png"}, "missing"),
    ({"attributes": {"a": 1}, "a": 2}, "`a` is given twice"), ({"image": "https://x.org/a.png"}, "web address"),
    ({"attributes": 3}, "of an object"), ('{"image"', "not valid JSON"), ('"a"', "a JSON object"),
    ('{"image": "p/00.png", "caption": "caf\udce9"}', "not UTF-8"), ("\udcff\udcfe", "not UTF-8"), ({"image": "./p//01.png"}, "")]


def test_broken_records(tmp_path):
  lines = [json.dumps({"image": "p/00.png", "caption": "a"} | line) if isinstance(line, dict) else line for line, _ in BROKEN_RECORDS]
  source = write(tmp_path / "in", {"rows.jsonl": "\n".join(lines).encode(errors="surrogateescape")} | PICTURES)
  write(tmp_path / "inside", PICTURES)
  check_errors(source, {f"rows.jsonl:{i}": words for i, (_, words) in enumerate(BROKEN_RECORDS, 1)})


def test_broken_rows_of_a_table(tmp_path):
  text = (b'image,caption,quality,captions\r\np/00.png,"two\r\nlines, ""quoted""",0.5,\r\np/00.png,a\r\n\r\np/00.png,a"b,,\r\np/00.png,"a"b,,\r\n'
          b'p/00.png,caf\xe9,,\r\np/00.png,a,x,\r\np/00.png,a,,[\r\np/00.png,a\0,,\r\np/01.png,last,,"[""a"", ""last""]"\r\np/00.png,"op,,\r\nx\r\n')
  errors = ["", "2 cells where", "", "not valid CSV", "not UTF-8", "`quality`", "`captions` is not valid JSON", "NUL", "", "not valid CSV",
            "1 cells where"]
  samples = check_errors(write(tmp_path, {"rows.csv": text} | PICTURES), {f"rows.csv:{i}": words for i, words in enumerate(errors, 1)})
  assert samples[0].captions == [Caption('two\r\nlines, "quoted"')] and samples[0].quality == 0.5
  assert samples[2].captions == [Caption('a"b')] and samples[8].captions == [Caption("last"), Caption("a")]


def test_broken_rows_of_parquet(tmp_path):
  captions = pa.Array.from_buffers(pa.string(), 4, pa.array([b"fine", b"caf\xe9", None, b"fine"], pa.binary()).buffers())
  buffer = io.BytesIO()
  pq.write_table(pa.table({"image": [png(1)] * 3 + [b""], "caption": captions, "time": pa.array([1] * 4, pa.timestamp("ns"))}), buffer)
  samples = check_errors(write(tmp_path, {"x.parquet": buffer.getvalue()}),
                         {"x.parquet:1": "", "x.parquet:2": "not UTF-8", "x.parquet:3": "no caption", "x.parquet:4": "0 bytes"})
  assert samples[0].attributes == {"time": "1970-01-01 00:00:00.000000001"}
  # A damaged row group costs its own rows.
  records = [{"image": np.random.default_rng(i).bytes(2000), "caption": "a"} for i in range(60)]
  source = parquet(tmp_path, records, row_group_size=20, use_dictionary=False)
  page, data = pq.ParquetFile(source).metadata.row_group(1).column(0).data_page_offset, bytearray((tmp_path / "rows.parquet").read_bytes())
  data[page:page + 200] = bytes(200)
  (tmp_path / "rows.parquet").write_bytes(data)
  samples = check_errors(source, {f"rows.parquet:{i + 1}": "row group is damaged" if 20 <= i < 40 else "" for i in range(60)})
  assert [sample.image for sample in samples] == [b"" if 20 <= i < 40 else record["image"] for i, record in enumerate(records)]


def test_broken_tars(tmp_path):
  good = {"a.png": png(1), "a.txt": "fine", "a.cls": "7", "a.seg.png": "ignored"}
  samples = check_errors(write(tmp_path, {"x.tar": tar(good | {
      "bare.png": png(1), "nothing.txt": "a", "two.png": png(1), "two.jpg": png(1), "two.txt": "a", "ref.png": png(1),
      "ref.json": '{"caption": "a", "sources": ["a.png"]}', "._a.png": b"macOS", "a.source1.png": png(3)})}), {
          "x.tar:a": "", "x.tar:bare": "no caption", "x.tar:nothing": "no picture beside 'nothing.txt'", "x.tar:two": "two pictures",
          "x.tar:ref": "cannot be followed in a tar", "x.tar:a@5": "not side by side"})
  assert samples[0].attributes == {"cls": "7"}
  data = tar(good | {"b.png": png(2), "b.txt": "b"})
  place = data.index(b"b.txt")
  # One tar behind another, and a header that is overwritten.
  for broken in (data + data, data[:place] + b"#" * 512 + data[place + 512:]):
    check_errors(write(tmp_path, {"x.tar": broken}), {"x.tar:a": "", "x.tar:1:end": "damaged after 1 samples"})


def test_a_tar_cut_anywhere_keeps_a_stable_count(tmp_path):
  files = {f"{i}.{suffix}": data for i in range(4) for suffix, data in (("png", png(i)), ("source1.png", png(9)), ("txt", f"picture {i}"))}
  data = tar(files)
  end = len(data.rstrip(b"\0")) // 512 * 512 + 512
  for cut in range(600, end + 1, 300):
    source = write(tmp_path, {"x.tar": data[:cut]})
    samples, parts = read(source), read(source, 1)
    assert [(sample.key, facts(sample)) for sample in samples] == [(sample.key, facts(sample)) for sample in parts]
    # What is before is whole: an edit that lost its source would be another task.
    assert "cut short" in samples[-1].error and all(not sample.error and len(sample.sources) == 1 for sample in samples[:-1])
    # A sample is known to be whole once the header of the next one is there.
    assert len(samples) == 1 + (cut - 512) // (end // 4), cut


def test_keys_of_records(tmp_path):
  rows = [{"target": "p/00.png", "instruction": "make it red", "caption": "a red hat", "sources": ["p/01.png"], "quality": 0.25,
           "attributes": {"a": 1}, "b": [float("inf"), "\ud800"]},
          {"path": "p/00.png", "text": "a", "captions": [dict(text="b", language="fr", kind="text"), dict(text="a", language="x")], "language": "it"}]
  edit, plain = read(write(tmp_path, {"rows.jsonl": "\n".join(map(json.dumps, rows))} | PICTURES))
  assert edit.captions == [Caption("make it red")] and edit.sources == [png(1)] and edit.quality == 0.25
  assert edit.attributes == {"a": 1, "b": [None, "\\ud800"], "caption": "a red hat"}
  assert plain.captions == [Caption("a", "it"), Caption("b", "fr", "text")] and plain.quality == 1 and not plain.attributes
  write(tmp_path / "side", {
      "a.PNG": png(1), "a.txt": "one\ntwo", "a.json": '{"caption": "two", "language": "nl", "author": "x", "path": "was/here.png"}',
      "a.source.png": png(2), "a.source1.webp": png(3), "d/b.png": png(4), "d/b.json": '{"caption": "b", "sources": ["../a.PNG"]}'})
  side, deeper = read(f"{tmp_path}/side")
  assert side.captions == [Caption("two", "nl"), Caption("one", "nl")] and side.sources == [png(2), png(3)]
  assert side.key == "a.PNG" and side.attributes == {"author": "x", "path": "was/here.png"} and deeper.sources == [png(1)]


@pytest.mark.parametrize("encoded", [True, False])
def test_labels_and_pixels_of_tfds(encoded, tmp_path, monkeypatch):
  feature = tfds.features.Image() if encoded else tfds.features.Tensor(shape=(4, 5, 3), dtype=np.uint8)
  features = {"image": feature, "label": tfds.features.ClassLabel(names=["cat", "dog"]), "mask": tfds.features.Tensor(shape=(300,), dtype=np.uint8)}
  images = [io.BytesIO(png(i) + b"as it is") if encoded else decode_image(png(i)) for i in range(3)]
  tiny(tmp_path, features, [{"image": image, "label": i % 2, "mask": np.zeros(300, np.uint8)} for i, image in enumerate(images)])
  samples = read(f"tfds:{tmp_path}/tiny/1.0.0:train[1:]")
  assert [(sample.key, sample.captions) for sample in samples] == [
      ("tiny/1.0.0:train[1:]:0", [Caption("dog")]), ("tiny/1.0.0:train[1:]:1", [Caption("cat")])]
  assert (samples[0].pixels == decode_image(png(1))).all() and samples[0].attributes == {"label": 1, "mask": "uint8 [300]"}
  assert samples[0].image == png(1) + b"as it is" or not encoded
  monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
  assert [sample.image for sample in read("tfds:tiny")][1:] == [sample.image for sample in samples]


def refused(source, words):
  with pytest.raises(ValueError) as error:
    plan_units(source)
  text = str(error.value)
  assert re.search(words, text) and text.endswith(".") and "\n" not in text, text


def test_sources_that_cannot_be_used(tmp_path):
  write(tmp_path, {"empty.csv": "", "header.csv": "image,caption\n", "urls.csv": "url,caption\na,b\n", "mute.csv": "image,title\na,b\n",
                   "double.csv": "image,caption,Caption\na,b,c\n", "utf16.csv": "image,caption\n".encode("utf-16"), "x.zip": "", "blank.jsonl": "\n",
                   "bad.parquet": "PAR1", "bad.tar": "no tar", "empty/.hidden": "", "two/a.parquet": "", "two/b.tar": "", "words/a.txt": "a"})
  parquet(tmp_path, [{"caption": "a"}], "mute.parquet")
  SOURCES["tar"](tmp_path)
  for name, words in {
      "nothing": "does not exist", "*.png": "does not exist", "x-{0..1}.tar": "x-0.tar .*does not exist", "x.zip": "extension .zip",
      "{x.tar,blank.jsonl}": "extension .jsonl and .tar", "empty": "holds no picture", "words": "holds no picture", "two": "2 kinds",
      "empty.csv": "no picture column", "header.csv": "holds no sample", "urls.csv": r"no picture column, only \['url', 'caption'\]",
      "mute.csv": "no caption column", "double.csv": "two columns of one name", "utf16.csv": "no picture column", "blank.jsonl": "holds no sample",
      "bad.parquet": "not a readable Parquet", "mute.parquet": "no picture column", "bad.tar": "not a tar"}.items():
    refused(f"{tmp_path}/{name}", words)
  name, info = tfds_records(tmp_path), tmp_path / "tiny/1.0.0/dataset_info.json"
  for source, words in {"nosuch://x/y.csv": "cannot be opened", name.replace(":train", ":test"): "has no split 'test': choose one of train",
                        "tfds:no_such_set": "no prepared data set 'no_such_set'", "tfds:": "names no data set"}.items():
    refused(source, words)
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  refused(name, "stored as tfrecord.*convert_format")
  write(tmp_path, {"tiny/1.1.0/dataset_info.json": "{}"})
  refused(name, "of its folders 2 have one")
  with pytest.raises(ValueError, match="samples_per_unit=0"):
    plan_units(str(tmp_path), 0)


def test_what_vanishes_after_planning_is_counted(tmp_path, monkeypatch):
  units = plan_units(json_lines(tmp_path), 3)
  os.remove(tmp_path / "p/01.png")
  samples = [sample for unit in units for sample in read_unit(unit)]
  assert [bool(sample.error) for sample in samples] == [False, True] + [False] * 5 and "'p/01.png' is missing" in samples[1].error
  (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0].record()) + "\n")
  parts = [list(read_unit(unit)) for unit in units]
  assert [len(part) for part in parts] == [3, 3, 1] and not parts[0][0].error
  gone = parts[0][1:] + parts[1] + parts[2]
  assert all("has become shorter" in sample.error for sample in gone) and len({sample.key for sample in gone}) == 6
  monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.cat_file", mock.Mock(side_effect=TimeoutError))
  # Not this sample's fault: the unit must be read again.
  with pytest.raises(TimeoutError):
    list(read_unit(units[0]))
