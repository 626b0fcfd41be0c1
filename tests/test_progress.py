"""Who waits for a stage is told the truth about it, without a terminal too."""

import sys
import types

import pytest

from qimg2.training import metrics, progress


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  for module in (metrics, progress):
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
  return now


def test_a_line_says_what_goes_on_and_how_fast(clock):
  """A stage that goes on at step 500: compiles for a minute, then two steps a second, with an evaluation of 10 s in between."""
  recorder = metrics.GoodputRecorder()
  shown = progress.Progress("vae", 1000, recorder)
  with recorder.measure("start"):
    clock[0] += 5
    assert shown.line() == "vae: reading what it starts from, for 0:05"
  with recorder.measure("compile"):
    clock[0] += 61
    assert shown.line() == "vae: compiling, for 1:01"
  shown.begin(500)
  assert shown.line() == "vae: step 500 of 1000 (50%), no step of this start yet"

  def steps(first, num):
    for step in range(first, first + num):
      clock[0] += 0.5
      shown.done(step, 32, 1 / step)
  steps(501, 20)
  assert shown.line() == "vae: step 520 of 1000 (52%), loss 0.0019, 2 steps/s, 64 samples/s, 4:00 left"
  with recorder.measure("evaluation"):
    clock[0] += 10
    assert shown.line() == "vae: step 520 of 1000 (52%), loss 0.0019, 2 steps/s, 64 samples/s, 4:00 left, evaluating for 0:10"
  steps(521, 20)
  assert shown.line() == "vae: step 540 of 1000 (54%), loss 0.0019, 1.33 steps/s, 42.7 samples/s, 5:45 left"  # 40 in 30 s: more will be evaluated
  with recorder.measure("compile"):  # for another bucket: of that nothing follows
    clock[0] += 100
  steps(541, 1)
  assert "1.34 steps/s" in shown.line()
  clock[0] += 40
  assert shown.line().endswith("no step has ended for 0:40")


def test_the_rate_is_that_of_the_last_minutes(clock):
  shown = progress.Progress("vae", 10_000, metrics.GoodputRecorder())
  shown.begin(0)
  for step in range(1, 2001):
    clock[0] += 10.0 if step <= 1000 else 1.0
    shown.done(step, 4, None)
  assert shown.line() == "vae: step 2000 of 10000 (20%), 1 steps/s, 4 samples/s, 2:13:20 left"
  assert len(shown._marks) < 605


@pytest.mark.parametrize("active, lines", [(True, True), (False, False)])
def test_lines_come_where_there_is_no_terminal(monkeypatch, capsys, active, lines):
  """And on the first process alone."""
  monkeypatch.setattr(progress, "LINE_S", 0.01)
  with progress.Progress("vae", 10, metrics.GoodputRecorder(), active) as shown:
    shown.begin(0)
    shown.done(1, 4, 0.25)
    shown._thread.join(0.3) if lines else None
  found = capsys.readouterr().err.splitlines()
  assert bool(found) == lines and all(line.startswith("vae: step 1 of 10 (10%), loss 0.2500, ") for line in found)


def test_a_terminal_has_its_bar(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  with progress.Progress("vae", 10, metrics.GoodputRecorder()) as shown:
    shown.begin(3)
    shown.done(4, 4, 0.25)
    shown.show(loss="0.2500")
    assert not shown._thread.is_alive()
  assert "vae:  40%" in capsys.readouterr().err
