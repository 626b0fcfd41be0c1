"""Forms of data: each line of the table in docs/data.md gives what it says, and what is left out is named."""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import unicodedata
import zlib

import commands
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import raw_folder
import tensorflow_datasets as tfds
from raw_sources import tar, tiny, write

from configs import curation
from data_pipelines import records
from data_pipelines.curation import encode, pipeline
from data_pipelines.curation.reading import NeedsAnswer, Reading
from data_pipelines.curation.sample import Caption, Sample
from data_pipelines.curation.sources import look_up, plan_units, read_unit
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.transforms import encode_png
from data_pipelines.verify import verify
from qimg2.runtime.config import plain

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
TABLE = re.search(r"\| form \| files \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE)[1]
ROWS = [re.fullmatch(r"\| (.*) \| (.*) \| (.*) \| (.*) \|", line).groups() for line in TABLE.splitlines()]
PICTURES = (".jpg", ".png")


def picture(name: str) -> bytes:
  """A picture that no other name's is equal to."""
  return encode_png(np.full((4, 5, 3), tuple(zlib.crc32(name.encode()).to_bytes(4, "big")[:3]), np.uint8))


def spans(cell: str) -> list[str]:
  return [span.replace("\\n", "\n") for span in re.findall(r"`([^`]*)`", cell)]


def record(text: str) -> dict:
  """A JSON object whose `bytes` are those of the picture that they name."""
  return json.loads(text, object_hook=lambda one: {name: picture(value) if name == "bytes" else value for name, value in one.items()})


def parquet(text: str) -> bytes:
  buffer = io.BytesIO()
  pq.write_table(pa.Table.from_pylist([record(text)]), buffer)
  return buffer.getvalue()


def build(folder: str, files: list[str]) -> None:
  """Writes the files of a line of the table."""
  tars: dict[str, dict] = {}
  for name, _, content in (file.replace("FOLDER", folder).partition(" = ") for file in files):
    data = picture(name) if name.endswith(PICTURES) else content
    if ".tar/" in name:
      path, member = name.split("/")
      tars.setdefault(path, {})[member] = data
    elif name == "tfds":
      features = {"image": tfds.features.Scalar(np.object_), "captions": tfds.features.Sequence(tfds.features.Text())}
      one = json.loads(content)
      tiny(folder, features, [one | {"image": picture(one["image"])}])
    else:
      write(folder, {name: parquet(content) if name.endswith(".parquet") else data})
  write(folder, {path: tar(members) for path, members in tars.items()}) if tars else None


def read(source: str, size: int = 512, **reading):
  found = look_up(source, Reading(**reading))
  return [sample for unit in plan_units(found, size) for sample in read_unit(unit)], found.left_out.plain()


@pytest.mark.parametrize("form, files, source, samples", ROWS, ids=[row[0] for row in ROWS])
def test_each_line_of_the_table(form, files, source, samples, tmp_path):
  build(str(tmp_path), spans(files))
  source, *flags = spans(source)[0].replace("FOLDER", str(tmp_path)).split()
  found, left_out = read(source, **dict(flag.removeprefix("--").split("=") for flag in flags))
  expected = []
  for text in spans(samples):
    images, _, captions = text.partition(":")
    target, _, sources = images.partition(" from ")
    target, _, worse = target.partition(" over ")
    expected.append((picture(target), picture(worse) if worse else b"",
                     list(map(picture, filter(None, sources.split(", ")))), list(filter(None, captions.strip().split(" + ")))))
  got = [(sample.image, sample.rejected, sample.sources, [caption.text for caption in sample.captions]) for sample in found]
  assert sorted(got, key=str) == sorted(expected, key=str) and expected, [sample.error for sample in found]
  assert not any(sample.error for sample in found) and not left_out


def test_the_table_has_every_kind_of_source():
  assert len(ROWS) >= 24 and {re.split(r"[ .:]", spans(row[2])[0].removeprefix("FOLDER/"))[0] for row in ROWS} >= {"FOLDER", "x", "t/x", "tfds"}


def check(folder, expected, left_out={}, **reading):
  """Each sample by its key: (captions, condition images) by name, or words of its error; the same for units of one sample."""
  for size in (512, 1):
    found, unread = read(str(folder), size, **reading)
    assert {sample.key for sample in found} == set(expected) and len(found) == len(expected)
    for sample in found:
      wanted = expected[sample.key]
      if isinstance(wanted, str):
        assert re.search(wanted, sample.error) and sample.error.endswith("."), (sample.key, sample.error)
      else:
        captions, *sources = wanted
        assert (sample.error, [one.text for one in sample.captions], sample.sources) == ("", captions, list(map(picture, sources))), sample.key
    assert len(unread) == len(left_out), unread
    for words, counts in left_out.items():
      assert [(one["count"], one["examples"]) for one in unread if words in one["reason"]] == [counts], unread


def test_files_beside_pictures_that_do_not_go_together_are_named(tmp_path):
  build(str(tmp_path), ["a.png", "a.txt = x", "a.source2.png", "b.png", "b.txt = x", "b.source.png", "b.source1.png", "c.png",
                        'c.json = {"instruction": "x"}', "d/target/1.png", "d/target/1.txt = x", "d/target/2.png", "d/target/2.txt = x",
                        "d/control/1.png", "d/control/3.png", "target/5.png", "target/5.txt = no control", "f.png", "f.txt = one\ntwo"])
  check(tmp_path, {"a.png": "Condition image number 2 is there and number 1 is not", "b.png": (["x"], "b.source.png", "b.source1.png"),
                   "c.png": "edit has no condition image.*call the text `caption`", "d/target/1.png": (["x"], "d/control/1.png"),
                   "d/target/2.png": "no condition image: put it in control/ beside target/, under the name of '2.png'",
                   "d/control/3.png": "no picture 'd/target/3' for 'd/control/3.png'", "target/5.png": (["no control"],), "f.png": (["one", "two"],)},
        captions="lines")


def test_a_table_in_a_folder_and_what_lies_beside_its_pictures(tmp_path):
  rows = [{"file_name": "a.png", "text": "row"}, {"file_name": "none.png", "text": "row"},
          {"file_name": "p/b.png", "control_image": "p/c.png", "text": "edit"},
          {"file_name": "d.png", "text": "edit"}, {"file_name": "e.png", "author": "Ann"}, "{"]
  rows = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows)
  build(str(tmp_path), ["a.png", "a.txt = beside", "p/b.png", "p/c.png", "d.png", "d.source1.png", "e.png", 'e.json = {"author": "Bob"}',
                        "lost.png", "own.png", "own.txt = its own", "table.csv = image,caption\na.png,x", ".x = hidden", "film.mp4 = x",
                        "y.tar/1.png",
                        f"metadata.jsonl = {rows}"])
  check(tmp_path, {"metadata.jsonl:1": (["row", "beside"],), "metadata.jsonl:2": "'none.png' is missing", "metadata.jsonl:3": (["edit"], "p/c.png"),
                   "metadata.jsonl:4": (["edit"], "d.source1.png"),
                   "metadata.jsonl:5": "`author` is one thing in the row and another", "metadata.jsonl:6": "not valid JSON",
                        "lost.png": "no caption", "own.png": (["its own"],)},
        {".csv beside pictures": (1, ["table.csv"]), ".mp4": (1, ["film.mp4"]), ".tar beside": (1, ["y.tar"]), "hidden": (1, [".x"])})


def test_names_that_differ_in_normalisation_alone_and_linked_folders(tmp_path):
  one, other = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
  rows = json.dumps({"file_name": f"t/{one}.png", "text": "row"})
  build(str(tmp_path / "in"), [f"{other}.png", f"{one}.txt = beside", f"both/{one}.png", f"both/{one}.txt = one", f"both/{other}.png",
                               f"both/{other}.txt = other", f"t/{other}.png", f"metadata.jsonl = {rows}"])
  build(str(tmp_path / "far"), ["x.png", "x.txt = far"])
  os.symlink(tmp_path / "far", tmp_path / "in/a")
  os.symlink(tmp_path / "far", tmp_path / "in/b")
  os.symlink(tmp_path / "in", tmp_path / "far/cycle")
  check(tmp_path / "in", {f"{other}.png": (["beside"],), f"both/{one}.png": (["one"],), f"both/{other}.png": (["other"],),
                          "metadata.jsonl:1": (["row"],), "a/x.png": (["far"],)}, {"links to folders": (2, ["b", "a/cycle"])})


def test_members_of_tars(tmp_path):
  build(str(tmp_path), ["x.tar/a.png", "x.tar/a.txt = x", "x.tar/a.mask.png", "x.tar/b.png", 'x.tar/b.json = {"edit_prompt": "x"}', "x.tar/c.txt = x",
                        "x.tar/d.png", "x.tar/d.source2.png", "x.tar/d.txt = x", "y.tar/target/1.png".replace("/1", "_1")])
  check(tmp_path / "x.tar", {"x.tar:a": (["x"],), "x.tar:b": "no condition image", "x.tar:c": "no picture beside 'c.txt'.*such as KEY.jpg",
                             "x.tar:d": "number 2 is there and number 1 is not"}, {"members": (1, ["x.tar:a.mask.png"])})
  write(tmp_path, {"z.tar": tar({"control/1.png": picture("c"), "target/1.png": picture("t"), "target/1.txt": "x"})})
  with pytest.raises(ValueError, match="condition images of target in a folder of their own, control: unpack it"):
    plan_units(str(tmp_path / "z.tar"))


def test_what_only_the_user_knows_is_asked(tmp_path):
  build(str(tmp_path), ["a.png", "a.txt = one\n\n two\n", "b.png", "b.txt =  one \n", "x.tar/a.png", "x.tar/a.txt = one\ntwo"])
  for source in (tmp_path, tmp_path / "x.tar"):
    with pytest.raises(NeedsAnswer, match="'a.txt' has 2 lines: say --captions=lines if .* or --captions=whole"):
      read(str(source))
  check(tmp_path / "x.tar", {"x.tar:a": (["one\ntwo"],)}, captions="whole")
  for field in ("captions", "uncaptioned"):
    with pytest.raises(ValueError, match=f"config.reading.{field} is 'x': choose one of "):
      Reading(**{field: "x"})


def test_pictures_elsewhere(tmp_path):
  (tmp_path / "in").mkdir()
  paths = [f"{tmp_path}/p/a.png", "a.png", f"{tmp_path}/q/a.png", "../q/a.png", f"file://{tmp_path}/p/a.png"]
  build(str(tmp_path), ["p/a.png", "q/a.png", "in/x.csv = image,caption\n" + "\n".join(f"{path},x" for path in paths)])
  ours, leads_out = (["x"],), f"leads out of --picture_root={tmp_path}/p: correct it"
  keys = [f"x.csv:{number}" for number in range(1, 6)]
  check(tmp_path / "in/x.csv", dict(zip(keys, (ours, ours, leads_out, leads_out, ours))), picture_root=f"{tmp_path}/p")
  away = "is absolute, and pictures are taken from the source's own folder alone: --picture_root=DIR"
  check(tmp_path / "in/x.csv", dict(zip(keys, (away, "missing", away, "leads out of its folder.*--picture_root", away))))


@pytest.mark.slow
def test_where_nothing_is_left_the_reasons_are_said_and_reported(tmp_path):
  for i in range(5):
    (tmp_path / f"p{i}.png").write_bytes(raw_folder.encoded(raw_folder.picture(i), "PNG"))
  (tmp_path / "p4.txt").write_text("one\ntwo")
  (tmp_path / "p3.json").write_text('{"caption": 3}')
  out, cfg = tmp_path.parent / f"{tmp_path.name}_out", plain(curation.get_config("small"))
  run = lambda **reading: pipeline.curate(str(tmp_path), "mine", str(out), cfg | {"reading": cfg["reading"] | reading}, num_workers=1)
  with pytest.raises(ValueError, match="^The caption file 'p4.txt' has 2 lines: say --captions=lines"):
    run()
  (tmp_path / "p4.txt").unlink()
  shutil.rmtree(out)
  with pytest.raises(ValueError, match=r"No picture of .* is left for training: 5 samples: 5 dropped by broken of S1 \(5 unreadable\)\. "
                     r"Of 4, such as p0.png: The picture has no caption: .*--uncaptioned=keep.*Of 1, such as p3.png: A caption is 3: ") as error:
    run()
  assert os.listdir(out) == ["mine-report"] and "loosen" not in str(error.value).lower()
  page = pathlib.Path(re.search(r"pictures: (.*)\.$", str(error.value))[1]).read_text()
  assert "4, such as p0.png: The picture has no caption" in page and json.loads((out / "mine-report/funnel.json").read_text())["samples"] == 5
  done = commands.launch("launch.prepare_data", f"--source={tmp_path}", "--name=mine", f"--out={out}", "--config=configs/curation.py:small",
                         "--num_workers=1", "--uncaptioned=keep")
  assert done.returncode == 0 and "1, such as p3.png: A caption is 3" in done.stdout, done.stderr
  assert verify(out, "mine")["records"] == 4 and os.listdir(out) == ["mine"]
  tokenizer = records.load_tokenizer(out, "mine")
  # As a VAE takes them.
  _, batch = Loader([DatasetSpec(str(out), "mine")], [Resolution(64, 2, ("4:3",))], 32, tokenizer, 0, max_crop=0.5, captions=False).batch(0)
  assert batch["tokens"][:, :batch["token_count"][0]].tolist() == [tokenizer.encode("")] * 2
  with pytest.raises(ValueError, match=r"holds a data set with another config \(reading\)"):
    run(uncaptioned="file_name")


def test_keys_of_the_source_arrive_in_the_record():
  cfg = plain(curation.get_config("small"))["encode"]
  sample = Sample("k", raw_folder.encoded(raw_folder.picture(1), "PNG"), [Caption("a")], tags={"luma": 1})
  own = lambda attributes: json.loads(encode.record(dataclasses.replace(sample, attributes=attributes), cfg, 6)["attributes"])
  ours = {"key": "k", "tags": {"luma": 1}}
  assert own({"a": 2}) == {"a": 2} | ours and own({"tags": ["x"]}) == {"tags": ["x"], "curation": ours}
  assert own({"key": 5, "curation": 1}) == {"key": 5, "curation": 1, "curation_": ours}


def test_an_answer_does_not_begin_anew():
  config = plain(curation.get_config("small"))
  request = lambda **reading: json.loads(json.dumps({"fingerprint": "f", "config": config | {"reading": config["reading"] | reading}}))
  assert pipeline._difference(request(), request(captions="lines")) == "" == pipeline._difference(request(), request(captions="whole"))
  for stored in (request(captions="whole"), request(uncaptioned="keep")):
    assert "another config (reading)" in pipeline._difference(stored | {"source": "s"}, request(captions="lines"))
