"""A source that changed since its units were planned is noticed; one that moved is the same."""

import contextlib
import errno
import os
import re
import shutil
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_sources import SOURCES, folder, png, write

from data_pipelines.curation import pipeline, sources
from data_pipelines.curation.sources import fingerprint, fingerprint_of_pictures, plan_units


@pytest.mark.parametrize("kind", SOURCES)
def test_fingerprint(kind, tmp_path):
  one, two = SOURCES[kind](tmp_path / "a"), SOURCES[kind](tmp_path / "b")
  for path in tmp_path.rglob("*"):
    os.utime(path, (1, 1))
  units = plan_units(one)
  digest = fingerprint(one, units)
  # The same files elsewhere, cut in other units, are the same source.
  assert re.fullmatch("[0-9a-f]{64}", digest) and digest == fingerprint(one, plan_units(one, 2)) == fingerprint(two, plan_units(two))
  changed = next(path for path in sorted((tmp_path / "a").rglob("*")) if path.name != "y.tar"
                 and path.suffix in (".csv", ".TSV", ".jsonl", ".parquet", ".tar", ".json", ".txt"))
  os.utime(changed, (2, 2))
  touched = fingerprint(one, units)
  with open(changed, "ab") as file:
    file.write(b" ")
  os.utime(changed, (1, 1))
  assert len({digest, touched, fingerprint(one, units)}) == 3


def test_fingerprint_of_a_folder_that_gains_or_renames_a_file(tmp_path):
  units = plan_units(source := folder(tmp_path))
  digests = [fingerprint(source, units)]
  for change in (lambda: write(tmp_path, {"notes.md": "no part of it"}), lambda: write(tmp_path, {"new.png": png(1)}),
                 lambda: os.rename(tmp_path / "sub.d/00.png", tmp_path / "sub.d/0.png")):
    change()
    digests.append(fingerprint(source, units))
  assert digests[0] == digests[1] and len(set(digests)) == 3


def test_a_picture_whose_name_is_written_in_another_normalisation_is_seen(tmp_path):
  for form, spelt in (("NFC", "NFD"), ("NFD", "NFC")):
    path, name = tmp_path / f"{form}.csv", unicodedata.normalize(form, "café/é.png")
    path.write_text(f"image,caption\n{name},x\n", encoding="utf-8")
    write(tmp_path, {unicodedata.normalize(spelt, "café/é.png"): png(1)})
    look, there = lambda path=path: fingerprint_of_pictures(plan_units(str(path))), tmp_path / unicodedata.normalize(spelt, "café/é.png")
    before = look()
    os.utime(there, (7, 7))
    after = look()
    shutil.rmtree(there.parent)
    assert len({before, after, look()}) == 3


@pytest.mark.parametrize("number, is_told", [(errno.ECONNRESET, True), (errno.EIO, True), (errno.ENAMETOOLONG, False), (errno.ELOOP, False)])
def test_a_lost_connection_says_nothing_of_a_picture(number, is_told, tmp_path, monkeypatch):
  """But a path that cannot be followed is as one where nothing is."""
  (tmp_path / "t.csv").write_text("image,caption\na.png,x\n")
  units = plan_units(str(tmp_path / "t.csv"))
  missing = fingerprint_of_pictures(units)
  def facts(self, name):
    raise OSError(number, os.strerror(number))
  monkeypatch.setattr(sources.Place, "facts", facts)
  with pytest.raises(OSError, match=os.strerror(number)) if is_told else contextlib.nullcontext():
    assert fingerprint_of_pictures(units) == missing


@pytest.mark.parametrize("table, text", [("t.csv", "image,caption\na.png,x\nb.png,y\n"),
                                         ("t.parquet", {"image": ["a.png", "b.png"], "text": ["x", "y"]}),
                                         ("t.jsonl", '{"image": "a.png", "text": "x"}\n{"image": "b.png"}\n')])
def test_pictures_of_a_table_that_did_not_change(table, text, tmp_path, monkeypatch):
  """One is missing at first, and is mended; then another is replaced by one of its size."""
  path = tmp_path / table
  pq.write_table(pa.table(text), path) if table.endswith("parquet") else path.write_text(text)
  write(tmp_path, {"a.png": png(1)})
  look = lambda: fingerprint_of_pictures(plan_units(str(path), 1))
  before = fingerprint(str(path), plan_units(str(path)))
  seen = [look(), look()]
  write(tmp_path, {"b.png": png(2)})
  seen.append(look())
  os.utime(tmp_path / "a.png", (7, 7))
  seen.append(look())
  assert seen[0] == seen[1] and len(set(seen)) == 3 and fingerprint(str(path), plan_units(str(path))) == before
  stored, now = ({"source": "t", "fingerprint": before, "pictures": one, "config": {}} for one in seen[1:3])
  assert pipeline._difference(stored, now) == "of t with the pictures that it named then; some were added, removed or changed"
  monkeypatch.setattr(sources, "MOST_LOOKED_AT", 1)  # every second unit
  first = look()
  os.utime(tmp_path / "b.png", (9, 9))
  assert look() == first != seen[3]
