"""Files of records: few of them are open at a time, and a file system that fails is no broken record."""

import concurrent.futures
import os
import pathlib
import pickle
import resource

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines import shards
from data_pipelines.loader import WorkerLost, named_ends
from tests import test_fuzz_records as fuzz

NUM_FILES, PER_FILE = 9, 5


def record(position: int) -> bytes:
  return np.random.default_rng(position).bytes(1000)


@pytest.fixture
def paths(tmp_path):
  found = [str(tmp_path / f"some.array_record-{number:05d}") for number in range(NUM_FILES)]
  for number, path in enumerate(found):
    writer = ArrayRecordWriter(path, "group_size:1")
    for i in range(PER_FILE):
      writer.write(record(number * PER_FILE + i))
    writer.close()
  return found


@pytest.fixture
def pauses(monkeypatch):
  """The pauses before another try, which take no time."""
  found = []
  monkeypatch.setattr(shards.time, "sleep", found.append)
  return found


def num_open(folder: pathlib.Path) -> int:
  names = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
  return sum(os.readlink(name).startswith(str(folder)) for name in names if os.path.islink(name))


def test_records_come_in_the_order_asked_for_and_few_files_stay_open(paths, tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "MOST_OPEN", 3)
  source = pickle.loads(pickle.dumps(shards.Shards(paths, [PER_FILE] * NUM_FILES)))  # as a worker process gets it
  assert len(source) == NUM_FILES * PER_FILE
  order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(source)), 2)).tolist()
  assert source.__getitems__(order) == [record(position) for position in order]
  assert 0 < num_open(tmp_path) <= 3
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(source.__getitem__, order)) == [record(position) for position in order]
  assert 0 < num_open(tmp_path) <= 3
  for position in (-1, len(source)):
    with pytest.raises(IndexError, match="not one of 45 records"):
      source[position]


def test_a_failure_that_passes_is_waited_for(paths, monkeypatch):
  taken, pauses = [], []

  def pause(seconds):
    pauses.append(seconds)
    if len(pauses) == 3:
      for file in taken:
        file.close()
  monkeypatch.setattr(shards.time, "sleep", pause)
  source = shards.Shards(paths, [PER_FILE] * NUM_FILES)
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
  try:
    with pytest.raises(OSError, match="Too many open files"):
      while True:
        taken.append(open(os.devnull))
    assert source[7] == record(7)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for file in taken:
      file.close()
  assert pauses == [0.5, 1, 2]


class Failing:
  """A reader of a file that cannot be read, in the reader's own words."""

  def __init__(self, path, **options):
    self._path = path

  def read(self, positions):
    raise RuntimeError("INTERNAL: pread() failed: Input/output error")

  def close(self):
    pass


@pytest.mark.parametrize("way, words", [("gone", "open() failed: No such file"), ("unreadable", "pread() failed: Input/output error")])
def test_a_failure_that_stays_stops_the_run_and_no_record_counts_as_broken(tmp_path, pauses, monkeypatch, way, words):
  made = [fuzz.glyphs.example(i, seed=0) for i in range(60)]
  fuzz.write(tmp_path, made, [{}] * 60)
  loader = fuzz.open_loader(tmp_path, max_faulty=1.0)
  path = next((tmp_path / fuzz.DATA / fuzz.records.VERSION).glob("*train*"))
  whole = path.read_bytes()
  with monkeypatch.context() as patch:
    if way == "gone":
      path.unlink()
    else:
      patch.setattr(shards, "ArrayRecordReader", Failing)
    with pytest.raises(OSError, match="7 times in a row") as caught:
      loader.batch(0)
  assert words in str(caught.value) and path.name in str(caught.value) and loader.faults == []
  assert sum(pauses) == 31.5
  path.write_bytes(whole)
  assert len(loader.batch(0)[1]["sample_id"]) == 8  # the storage is back


def test_a_file_that_holds_something_else_is_refused_at_once(paths, pauses):
  data = pathlib.Path(paths[0]).read_bytes()
  pathlib.Path(paths[0]).write_bytes(data[:500] + bytes(len(data) - 500))
  pathlib.Path(paths[1]).write_bytes(b"")
  source = shards.Shards(paths, [PER_FILE] * NUM_FILES)
  for number in (0, 1):
    with pytest.raises(ValueError, match=f"some.array_record-0000{number}: "):
      source[number * PER_FILE + 2]
  assert source[2 * PER_FILE] == record(2 * PER_FILE) and pauses == []


def test_too_few_files_may_be_open(paths):
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (2 * shards.MOST_OPEN - 1, before[1]))
  try:
    with pytest.raises(OSError, match="may have 511 files open, too few for 256 files.*ulimit -n 1024"):
      shards.Shards(paths * 30, [PER_FILE] * NUM_FILES * 30)
    assert shards.Shards(paths, [PER_FILE] * NUM_FILES)[7] == record(7)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_worker_process_that_ends_is_a_sentence():
  def batches(words):
    yield 0, {}, []
    raise RuntimeError(words)

  words = "Worker process was terminated unexpectedly with exit code {}. Search the logs above for the source of the crash."
  for code, kind in ((-9, WorkerLost), (-15, WorkerLost), (1, OSError), (-11, OSError)):  # a defect comes again
    with pytest.raises(OSError, match=f"A worker process that loads data ended with {code}: what it said stands above") as raised:
      list(named_ends(batches(words.format(code))))
    assert raised.type is kind
  with pytest.raises(RuntimeError, match="a defect"):
    list(named_ends(batches("a defect")))
