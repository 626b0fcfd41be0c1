"""Damaged records and files never crash or hang the loader: each is replaced, named and counted, or refused in one sentence."""

import collections
import pathlib

import numpy as np
import pytest

from data_pipelines import embedded, records
from data_pipelines.embedded import glyphs
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.verify import verify

NUM = 1500
DATA = "damaged"


def damage(data: bytes, rng: np.random.Generator) -> bytes:
  """The bytes cut short, with bits flipped, or replaced by noise."""
  way = rng.integers(4)
  if way == 0:
    return data[:rng.integers(len(data))]
  if way == 1:
    return rng.bytes(int(rng.integers(len(data))))
  changed = bytearray(data)
  for place in rng.integers(0, len(data), rng.integers(1, 40)):
    changed[place] ^= 1 << rng.integers(8)
  return bytes(changed) if way == 2 else data[:24] + rng.bytes(len(data))


def write(folder: pathlib.Path, made: list[dict], lies: list[dict]) -> None:
  """Writes records `lies` under an index that says `made`."""
  columns = records.Columns()
  shard = records.write_shard(folder / "shard", (record | lie for record, lie in zip(columns.watch(made), lies)))
  empty = records.Columns()
  tokenizer = embedded.train_tokenizer(columns.captions, 300)
  none = records.write_shard(folder / "none", [])
  records.finish(folder / DATA, DATA, {"train": [shard], "validation": [none]},
                 {"train": columns.arrays(tokenizer), "validation": empty.arrays(tokenizer)}, tokenizer, {}, {})


def open_loader(folder: pathlib.Path, **options) -> Loader:
  return Loader([DatasetSpec(str(folder), DATA)], [Resolution(64, 8, ("1:1", "2:1", "1:2"))], 96, records.load_tokenizer(folder, DATA), 0,
                max_crop=0.5, **options)


@pytest.fixture(scope="module")
def made():
  return [glyphs.example(i, seed=0) for i in range(NUM)]


@pytest.mark.slow
def test_damaged_records_are_replaced_and_counted(made, tmp_path):
  rng, lies, bad = np.random.default_rng(0), [], set()
  for i, record in enumerate(made):
    lie = {}
    if i % 3 == 1:
      lie = {"image": damage(record["image"], rng)}
    elif i % 30 == 2:
      lie = [{"captions": [b"\xff\xfe caption"] * len(record["captions"])}, {"sample_id": i + 7}, {"languages": ["en"], "kinds": []},
             {"sources": [b"x"], "source_height": [4], "source_width": [4]}][i // 30 % 4]
      bad.add(i)
    lies.append(lie)
  write(tmp_path, made, lies)
  loader, seen = open_loader(tmp_path, max_faulty=1.0, caption_dropout=0.0), collections.Counter()
  for k in range(NUM // 8 + 8):
    _, batch = loader.batch(k)
    seen.update(batch["sample_id"].tolist())
  faulty = {fault.sample_id for fault in loader.faults}
  assert NUM // 6 < len(faulty - bad) <= NUM // 3 and bad <= faulty  # some flipped bits leave a picture that can be decoded
  assert not bad & set(seen) and all(fault.sample_id != fault.replacement and fault.replacement not in faulty for fault in loader.faults)
  for fault in loader.faults:
    assert str(fault.sample_id) in fault.sentence and "\n" not in fault.sentence.strip()


def test_replacements_are_the_same_on_every_host_and_after_resume(made, tmp_path):
  write(tmp_path, made[:200], [{"image": record["image"][:i]} if i % 5 == 0 else {} for i, record in enumerate(made[:200])])
  whole = open_loader(tmp_path, max_faulty=1.0)
  hosts = [open_loader(tmp_path, max_faulty=1.0, process_index=i, process_count=2) for i in range(2)]
  ahead = open_loader(tmp_path, max_faulty=1.0).iterate(20)
  for k in range(20, 30):
    bucket, expected = whole.batch(k)
    joined = [np.concatenate([host.batch(k)[1][name] for host in hosts]) for name in ("target", "sample_id", "tokens")]
    assert all((one == expected[name]).all() for one, name in zip(joined, ("target", "sample_id", "tokens")))
    again, batch = next(ahead)
    assert again == bucket and (batch["target"] == expected["target"]).all()
  assert len(whole.faults) > 5


@pytest.mark.slow
def test_more_than_the_configured_share_is_an_error(made, tmp_path):
  write(tmp_path, made[:400], [{"image": b"gone"} if i % 20 == 0 else {} for i in range(400)])
  loader = open_loader(tmp_path, max_faulty=0.02)
  with pytest.raises(ValueError, match=r"2[12] of \d+ records could not be used by batch \d+, more than max_faulty=0.02; the last one: Cannot"):
    for _ in zip(range(200), loader.iterate()):
      pass
  assert len(list(zip(range(60), open_loader(tmp_path, max_faulty=0.1).iterate()))) == 60


def test_a_bucket_without_a_good_record_is_an_error(made, tmp_path):
  write(tmp_path, made[:60], [{"image": b"gone"}] * 60)
  with pytest.raises(ValueError, match="records of one bucket of data set 'damaged' in a row cannot be used; Cannot decode sample"):
    open_loader(tmp_path, max_faulty=1.0).batch(0)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_file_is_a_sentence(made, tmp_path, seed):
  """Bits flipped anywhere in an ArrayRecord file, or its end cut off: records behind checksums are replaced, or the file is refused."""
  write(tmp_path, made[:120], [{}] * 120)
  path, rng = next((tmp_path / DATA / records.VERSION).glob("*train*")), np.random.default_rng(seed)
  data = bytearray(path.read_bytes())
  for place in rng.integers(0, len(data), [1, 5, 200][seed % 3]):
    data[place] ^= 1 << rng.integers(8)
  path.write_bytes(data[:rng.integers(len(data))] if seed % 4 == 3 else data)
  loader = open_loader(tmp_path, max_faulty=1.0)
  try:
    for k in range(20):
      loader.batch(k)
  except ValueError as error:
    assert "cannot be used" in str(error)
  with pytest.raises(ValueError, match="has other bytes than were written"):
    verify(tmp_path, DATA)
