"""One job at a time in the folder of a run; what a killed one left is taken over."""

import json
import multiprocessing
import os
import subprocess
import time
import types

import pytest
from many import PATIENCE_S

from qimg2.runtime import lock


@pytest.fixture
def quick(monkeypatch):
  for name, seconds in (("BEAT_S", 0.1), ("RESTART_S", 1.0), ("STALE_S", 2.0), ("_LOOK_S", 0.05), ("_SETTLE_S", 0.2)):
    monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def clock(quick, monkeypatch):
  """A clock that only the waits of the lock move, so that no busy machine does."""
  now = [0.0]
  def sleep(seconds):
    now[0] += seconds
  monkeypatch.setattr(lock, "time", types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
  return now


def never(sentence):
  raise AssertionError(sentence)


def waited(workdir, clock):
  """Seconds that are waited until the lock of a folder is taken."""
  begin = clock[0]
  with lock.RunLock(workdir, never):
    return clock[0] - begin


def test_a_second_job_is_refused_while_the_first_lives(tmp_path, quick, monkeypatch):
  workdir = tmp_path / "run"
  with lock.RunLock(workdir, never):
    monkeypatch.setattr(lock, "STALE_S", 60.0)
    said = f"The run in {workdir} is being trained by process {os.getpid()} on .* \\(since 20.*\\): wait until it ends, stop it, or use another"
    for _ in range(3):  # one that was refused takes nothing away
      with pytest.raises(ValueError, match=said), lock.RunLock(workdir, never):
        pass
    assert os.listdir(workdir) == [lock.NAME]
  assert os.listdir(workdir) == []


def test_the_lock_of_a_killed_process_is_taken_over_and_said(tmp_path, clock, caplog):
  """At once where it is known to be gone: a number may belong to another process since."""
  here, place = lock._here(), tmp_path / lock.NAME
  write = lambda **changes: place.write_text(json.dumps(here | {"holder": "gone", "since": "then"} | changes))
  ended = subprocess.Popen(["true"])
  ended.wait()
  write(pid=ended.pid)
  assert waited(tmp_path, clock) == pytest.approx(lock._SETTLE_S)
  assert f"is taken over: process {ended.pid} on {here['host']} (since then), which had it, gave no sign of life" in caplog.text
  write(began="1")
  assert waited(tmp_path, clock) == pytest.approx(lock._SETTLE_S)
  write(processes="pid:[1]")  # another container of that name on this machine
  assert waited(tmp_path, clock) == pytest.approx(1.2, abs=0.06)
  write(kernel="another", host="elsewhere")
  assert waited(tmp_path, clock) == pytest.approx(2.2, abs=0.06)
  place.write_text("")  # a machine that lost its power
  assert waited(tmp_path, clock) == pytest.approx(2.2, abs=0.06)


def test_a_job_that_was_silent_for_long_ends_when_another_has_its_run(tmp_path, quick):
  lost, place = [], tmp_path / lock.NAME
  with lock.RunLock(tmp_path, lost.append):
    place.unlink()  # as a user who forces it
    limit = time.monotonic() + PATIENCE_S
    while not place.exists() and time.monotonic() < limit:
      time.sleep(0.05)
    assert place.exists() and not lost
    while not lost and time.monotonic() < limit:  # a beat that reads half of it writes over it
      place.write_text(json.dumps({"holder": "another", "host": "elsewhere", "pid": 7, "since": "now"}))
      time.sleep(0.5)
  assert lost == [f"The run in {tmp_path} was taken over by process 7 on elsewhere (since now) while this process gave no sign of life: it "
                  "ends here, and that one goes on."]
  assert json.loads(place.read_text())["holder"] == "another", "which is not taken away from it"


@pytest.mark.filterwarnings("ignore:os.fork")
def test_of_two_processes_one_holds_a_run_until_it_is_killed(tmp_path, quick, monkeypatch, caplog):
  """The second one is as in a container of its own, which cannot see whether the first one's process is there."""
  monkeypatch.setattr(lock, "RESTART_S", PATIENCE_S)  # a busy machine may keep the first one from a sign of life for long
  assert lock.processes.is_first()  # before the fork, whose child computes nothing
  mine, theirs = multiprocessing.Pipe()
  def keep():
    with lock.hold(tmp_path):
      theirs.send(os.getpid())
      time.sleep(600)
  first = multiprocessing.get_context("fork").Process(target=keep, daemon=True)
  first.start()
  try:
    assert mine.poll(PATIENCE_S) and mine.recv() == first.pid
    here = lock._here()
    monkeypatch.setattr(lock, "_here", lambda: here | {"processes": "pid:[1]"})
    for take in (lambda: lock.hold(tmp_path).__enter__(), lambda: lock.check_free(tmp_path)):
      with pytest.raises(ValueError, match=f"is being trained by process {first.pid} on "):
        take()
  finally:
    first.kill()
    first.join()
  assert os.listdir(tmp_path) == [lock.NAME], "which the killed one left"
  monkeypatch.setattr(lock, "RESTART_S", 1.0)
  begin = time.monotonic()
  with lock.hold(tmp_path):
    assert time.monotonic() - begin >= 1.0 and json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
  assert f"is taken over: process {first.pid} on" in caplog.text and os.listdir(tmp_path) == []


def test_a_folder_that_is_free_is_taken_at_once(tmp_path, clock):
  assert waited(tmp_path / "run", clock) == 0 and os.listdir(tmp_path / "run") == []
  (tmp_path / "file").touch()
  for path in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(ValueError, match=f"--workdir={path} cannot be made, because {path}.* is a file, or below one: name another"):
      waited(path, clock)
