"""What is kept for the next start is found there whole, or made anew."""

import concurrent.futures
import fcntl
import fractions
import os
import pathlib
import pickle
import time

import numpy as np
import pytest
from made_up import plain_index, world_of

from data_pipelines import arrangement, kept
from data_pipelines.arrangement import Found
from data_pipelines.buckets import Bucket
from data_pipelines.cache import Cache
from data_pipelines.mixture import Mixture
from data_pipelines.specs import Resolution

FACTS = {"bucket": Bucket("t2i", 64, 32, cache=Cache("float16", 4, 8, 0, 3), num_tokens=7, batch_size=2), "weight": fractions.Fraction(1, 3)}


class Maker:
  """Fills two columns, and counts how often."""

  def __init__(self, num=5000):
    self.num, self.times = num, 0

  def __call__(self, new):
    self.times += 1
    new("records", self.num, np.uint32)[:] = np.arange(self.num)
    new("none", 0, np.int64)
    return FACTS


def assert_found(found, num=5000):
  facts, columns = found
  assert facts == FACTS and columns["records"].tolist() == list(range(num)) and columns["none"].tolist() == []
  assert pickle.loads(pickle.dumps(columns["records"][7:])).tolist() == list(range(7, num))


def test_what_was_made_once_is_found(tmp_path):
  make = Maker()
  for _ in range(3):
    assert_found(kept.keep(tmp_path / "new", "key", make))
  assert make.times == 1
  assert_found(kept.keep(tmp_path / "new", "other", make))
  assert make.times == 2 and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("way, words", [
    ("cut", "records has 10000 bytes, not 20000"), ("zeros", "records is not what was written"), ("facts", "its facts are not those"),
    ("gone", "No such file"), ("code", "its facts name posix.system")])
def test_a_broken_entry_is_named_and_made_anew(tmp_path, caplog, monkeypatch, way, words):
  make = Maker()
  kept.keep(tmp_path, "key", make)
  file, facts = tmp_path / "key" / "records", tmp_path / "key" / "facts"
  if way == "cut":
    os.truncate(file, 10_000)
  elif way == "zeros":
    file.write_bytes(bytes(20_000))
  elif way == "gone":
    file.unlink()
  elif way == "facts":
    facts.write_bytes(facts.read_bytes()[:-1])
  else:
    body = pickle.dumps(os.system)
    facts.write_bytes(kept.hashlib.sha256(body).digest() + body)
  assert_found(kept.keep(tmp_path, "key", make))
  assert make.times == 2 and words in caplog.text and str(tmp_path / "key") in caplog.text
  assert_found(kept.keep(tmp_path, "key", make))
  assert make.times == 2


def test_what_is_half_made_is_never_used(tmp_path):
  """What a killed process leaves has a lock that nobody holds."""
  (tmp_path / "key.part").mkdir(), (tmp_path / "busy.part").mkdir()
  (tmp_path / "key.part" / "records").write_bytes(b"half")
  (tmp_path / "key.lock").touch()
  make = Maker()
  with open(tmp_path / "busy.lock", "wb") as busy:
    fcntl.flock(busy, fcntl.LOCK_EX)
    kept.keep(tmp_path, "other", make)
  assert not (tmp_path / "key.part").exists() and (tmp_path / "busy.part").exists()
  assert_found(kept.keep(tmp_path, "busy", make))
  with pytest.raises(ValueError, match="nothing left"):
    kept.keep(tmp_path, "wrong", _fail)
  assert make.times == 2 and not (tmp_path / "wrong").exists() and not list(tmp_path.glob("*.part"))


def _fail(new):
  new("records", 9, np.uint32)
  raise ValueError("nothing left")


def test_of_several_that_want_the_same_one_makes_it(tmp_path):
  """Threads here: a lock is one of an open file, whatever process has that open."""
  make = Maker()

  def slowly(new):
    time.sleep(0.2)
    return make(new)

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for found in [pool.submit(kept.keep, tmp_path, "key", slowly) for _ in range(4)]:
      assert_found(found.result())
  assert make.times == 1


def test_old_entries_go_but_not_those_in_use(tmp_path, monkeypatch):
  monkeypatch.setattr(kept, "MOST_BYTES", 50_000)  # two entries of 20 kB
  monkeypatch.setattr(kept, "_in_use", [])
  for number, key in enumerate("abcd"):
    if key == "c":
      kept.keep(tmp_path, "a", Maker())
      del kept._in_use[:-1]  # a alone is left in use
    kept.keep(tmp_path, key, Maker())
    os.utime(tmp_path / key / "facts", (number + 1, number + 1))
  assert {path.parent.name for path in tmp_path.glob("*/facts")} == {"a", "c", "d"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="cannot be kept in .*file/orders .*config.order_dir=DIR, or \"none\""):
    kept.keep(tmp_path / "file" / "orders", "key", Maker())


def test_the_words_for_a_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert [kept.folder_of(word) for word in ("default", "none", "/a")] == [str(tmp_path / "qimg2" / "orders"), "", "/a"]


def test_a_folder_that_cannot_be_written_is_named_at_the_start(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="config.order_dir is '.*file', where nothing can be written .*name a folder"):
    kept.check_folder(str(tmp_path / "file"))
  kept.check_folder(str(tmp_path / "new" / "one"))
  assert not list((tmp_path / "new" / "one").iterdir())


def test_a_second_start_sorts_nothing(tmp_path, monkeypatch):
  """Whoever asks for the same, whatever the seed; and nobody else."""
  monkeypatch.setattr(arrangement, "LARGE", 1)
  index = plain_index([(64, 64)] * 20 + [(64, 128)] * 20)
  sizes = (Resolution(64, 4, ("1:1", "2:1"), multiple=16), Resolution(128, 2, ("1:1",)))
  def build(identity="one", order_dir=str(tmp_path), sizes=sizes, spec=None, **more):
    world = world_of(index, sizes, spec=spec, **({"max_crop": 0.5} | more))
    found = Found(None, index, identity=identity)
    return world.build(Mixture, find=lambda _: found, order_dir=order_dir)
  fresh = build(order_dir="")
  entries = lambda: len([path for path in pathlib.Path(tmp_path).glob("*/facts")])
  assert entries() == 0 == (build(identity="") is None)
  first = build()
  assert entries() == 2  # the order, and the ids
  with monkeypatch.context() as patch:
    patch.setattr(arrangement, "_Arranger", lambda *_: type("", (), {"arrange": staticmethod(_fail)})())
    found = build()
    assert found.digest == first.digest == fresh.digest and found.counts == fresh.counts and found.merging == fresh.merging
    assert found.buckets == fresh.buckets and found.shapes == fresh.shapes and found.shares == fresh.shares
    for ours, theirs in zip((found.programs, *found.used), (fresh.programs, *fresh.used), strict=True):
      assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() and ours[key].shape == theirs[key].shape for key in theirs)
    for k in (0, 5, 10**9):
      one, other = found.plan(k), fresh.plan(k)
      assert one.records.tolist() == other.records.tolist() and found.sample_ids(0, one.records).tolist() == other.records.tolist()
    assert build(seed=1).digest != first.digest and entries() == 2
    changes = [{"identity": "two"}, {"max_crop": 0.4}, {"prompt_classes": (40,)}, {"sizes": sizes[:1]}, {"spec": {"min_stage": 1}},
               {"min_bucket_records": 3}, {"max_programs": 3}, {"every": True}, {"num_tokens": 65}, {"programs": fresh.programs}]
    for change in changes:
      with pytest.raises(ValueError, match="nothing left"):
        build(**change)
    patch.setattr(arrangement, "_code", lambda: "of another version")
    with pytest.raises(ValueError, match="nothing left"):
      build()
