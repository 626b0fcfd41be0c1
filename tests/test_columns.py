"""The columns of an index are read from where they lie, in one process and in those that it starts."""

import errno
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import columns, embedded

MADE = {"b": np.arange(7, dtype=np.int64) * 3, "a": np.array([True, False, True]), "names": np.array(["de", "english"]), "one": np.array("text"),
        "none": np.zeros((0, 3, 2), np.int32), "table": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))}


@pytest.fixture
def path(tmp_path):
  np.savez(tmp_path / "index.npz", **MADE)
  return tmp_path / "index.npz"


def assert_equal(found, expected):
  assert list(found) == list(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype and found[name].shape == array.shape and (found[name] == array).all(), name


def test_columns_are_those_that_were_written_and_none_is_loaded(path, tmp_path):
  found = columns.map_columns(path)
  assert_equal(found, MADE)
  assert [name for name, array in found.items() if isinstance(array, np.memmap)] == ["b", "a", "names", "table"]
  with pytest.raises(ValueError, match="read-only"):
    found["b"][0] = 1
  embedded.prepare("glyphs", tmp_path, num_examples=5)
  with np.load(tmp_path / "glyphs" / "index-train.npz") as file:
    assert_equal(columns.map_columns(tmp_path / "glyphs" / "index-train.npz"), {name: file[name] for name in file.files})


def test_a_column_is_sent_as_its_place(path, tmp_path):
  np.savez(tmp_path / "large.npz", before=MADE["a"], ids=np.arange(10**6))
  whole = columns.map_columns(tmp_path / "large.npz")["ids"]
  for column, expected in ((whole, range(10**6)), (whole[700_001:], range(700_001, 10**6)), (whole[5:9], range(5, 9)), (whole[::-2][:5], [])):
    sent = pickle.dumps(column)
    there = pickle.loads(sent)
    assert len(sent) < 1000 and there.tolist() == list(expected or range(999_999, 999_989, -2))
    assert len(pickle.dumps(there)) < 1000  # and by whom it was sent to
  some = pickle.loads(pickle.dumps(whole[np.array([5, 999_999, 0])]))
  assert some.tolist() == [5, 999_999, 0] and type(some) is np.ndarray


def test_a_large_column_is_in_a_file_while_somebody_has_it(path, tmp_path, monkeypatch):
  monkeypatch.setattr(columns.tempfile, "tempdir", str(tmp_path))
  files = lambda: list(tmp_path.glob("qimg2-order-*/column"))
  assert type(columns.scratch(10, np.uint32)) is np.ndarray and not files()
  column = columns.scratch(columns.LARGE // 4, np.uint32)
  column[:] = np.arange(len(column))
  part = column[1000:3000]
  sent = pickle.dumps(part)
  del column
  assert len(files()) == 1 and len(sent) < 1000
  there = pickle.loads(sent)
  assert there.tolist() == list(range(1000, 3000))
  del part
  assert not files() and there[7] == 1007
  monkeypatch.setattr(columns.os, "posix_fallocate", _full)
  with pytest.raises(OSError, match="takes 4.0 GB in the folder of temporary files.*No space left.*by TMPDIR"):
    columns.scratch(10**9, np.uint32)
  assert not list(tmp_path.glob("qimg2-order-*"))


@pytest.mark.parametrize("fallocate", [True, False], ids=["allocated", "written"])
def test_the_file_of_a_killed_process_goes_with_the_next_one(tmp_path, monkeypatch, fallocate):
  if not fallocate:
    monkeypatch.delattr(columns.os, "posix_fallocate")  # as on macOS
  monkeypatch.setattr(columns.tempfile, "tempdir", str(tmp_path))
  monkeypatch.setattr(columns, "LARGE", 1)
  folders = lambda: sorted(tmp_path.glob("qimg2-order-*"))
  program = "import os; from data_pipelines import columns; columns.LARGE = 1; mine = columns.scratch(5000, 'int64'); os.kill(os.getpid(), 9)"
  root, place = pathlib.Path(__file__).parent.parent, {"TMPDIR": str(tmp_path)}
  assert subprocess.run([sys.executable, "-c", program], cwd=root, env=os.environ | place, check=False).returncode == -9
  left, = folders()
  assert os.path.getsize(left / "column") == 40_000
  mine = columns.scratch(3, np.int64)
  assert len(folders()) == 2, "it is young: its process may be about to take its lock"
  monkeypatch.setattr(columns, "_YOUNG_S", -1)
  mine[:] = 5
  more = columns.scratch(3, np.int64)
  assert left not in folders() and len(folders()) == 2 and mine.tolist() == [5, 5, 5] and len(more) == 3


def _full(*_):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("way", ["compressed", "cut", "text", "header"])
def test_what_is_no_index_is_refused(path, way):
  data = pathlib.Path(path).read_bytes()
  if way == "compressed":
    np.savez_compressed(path, **MADE)
  else:
    path.write_bytes({"cut": data[:len(data) // 2], "text": b"no index", "header": data.replace(b"\x93NUMPY", b"\x93NUMBY")}[way])
  with pytest.raises(ValueError, match="index.npz is no index of a data set .*prepare it anew"):
    columns.map_columns(path)


def test_a_mapped_file_that_fails_ends_the_process_in_a_sentence(tmp_path):
  """One that was cut while it was in use, looked at by another thread than the first; the system says so by a signal."""
  np.savez(tmp_path / "index.npz", ids=np.arange(10**5))
  program = (f"import os, threading; from data_pipelines import columns; ids = columns.map_columns('{tmp_path}/index.npz')['ids']; "
             f"os.truncate('{tmp_path}/index.npz', 4096); looks = threading.Thread(target=lambda: print(ids.sum())); looks.start(); looks.join()")
  done = subprocess.run([sys.executable, "-c", program], cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True, check=False)
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith("error: A file that is mapped cannot be read (SIGBUS), because its disk or mount fails, it became shorter while")
  assert done.stderr.endswith(f"Mapped are files in {tmp_path}. Mend it; the same command goes on where it was.\n") and done.stderr.count("\n") == 1
