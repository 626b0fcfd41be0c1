"""What goes wrong around a run: it is asked to stop, losses jump, time is lost. Real signals go to real processes."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from commands import ROOT
from many import PATIENCE_S

from qimg2.training import faults, metrics
from qimg2.training.metrics import read_rows

# The notice.

LOOP = """
import sys, time
import jax
{setup}
from qimg2.training.faults import PreemptionNotice
with PreemptionNotice() as stop:
  print("ready", flush=True)
  for step in range(1, 10**6):
    time.sleep({pause})
    {before}
    if stop(step):
      print(step, flush=True)
      {after}
"""


def start(**parts):
  parts = {"setup": "", "pause": 0.01, "before": "", "after": "break"} | parts
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
  return subprocess.Popen([sys.executable, "-c", LOOP.format(**parts)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_is_asked_for_and_a_second_interrupt_ends_at_once(number):
  process = start(after="pass" if number == signal.SIGINT else "break")
  assert process.stdout.readline() == "ready\n"
  process.send_signal(number)
  assert int(process.stdout.readline()) > 0
  if number == signal.SIGINT:
    process.send_signal(number)
  assert process.wait(PATIENCE_S) == (130 if number == signal.SIGINT else 0)
  process.communicate()


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait_for_compiled_code():
  work = 'import hashlib; print("busy", flush=True); hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)'  # many minutes, without Python's lock
  process = start(after=work)
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  assert [process.stdout.readline() for _ in range(2)][1] == "busy\n"
  limit = time.monotonic() + PATIENCE_S
  while process.poll() is None and time.monotonic() < limit:  # of two that come at once one may be lost
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
  process.kill()
  assert process.wait() == 130
  process.communicate()


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step():
  """One that leads the job is asked by an interrupt; others are asked to end in tests/test_processes.py."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  setup = "jax.distributed.initialize({!r}, 2, {}); assert jax.process_count() == 2"
  before = ('step == 20 and print("under way", flush=True)', "")
  processes = [start(setup=setup.format(address, index), pause=pause, before=before[index]) for index, pause in enumerate((0.01, 0.03))]
  assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
  assert processes[0].stdout.readline() == "under way\n"
  processes[0].send_signal(signal.SIGINT)
  steps = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
  assert steps[0] == steps[1] and int(steps[0]) >= 20
  assert [process.returncode for process in processes] == [0, 0]


def test_handlers_are_put_back():
  before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  with faults.PreemptionNotice() as stop:
    assert not stop(1)
    signal.raise_signal(signal.SIGTERM)
    assert stop(2)
    signal.raise_signal(signal.SIGINT)
  assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# Losses.


def watch_all(losses, settings=faults.Settings(), saved=None):
  rows = []
  watch = faults.StepMonitor("s", settings, lambda step, row: rows.append((step, row)), saved)
  for step, loss in losses:
    watch.observe(step, [step * 10, step * 10 + 1], {"loss": loss, "grad_norm": 1.0, "skipped": float(not math.isfinite(loss))})
  return watch, rows


def test_a_jump_of_the_loss_is_said_with_its_samples(caplog):
  losses = [(step, 1.0 + 0.01 * (step % 3)) for step in range(1, 60)]
  losses[4], losses[39], losses[44], losses[49] = (5, 50.0), (40, 50.0), (45, 0.001), (50, 9.9)  # the first one too early to tell
  _, rows = watch_all(losses)
  assert rows == [(40, {"fault": "spike", "loss": 50.0, "median": 1.01, "sample_ids": [400, 401]})]
  assert "Stage s, step 40: loss is 50, the median of the steps before 1.01 (samples 400, 401)." in caplog.text
  assert not watch_all(losses, faults.Settings(spike_factor=0))[1]
  assert not watch_all([(0, -1.0), *losses], faults.Settings())[1]  # a loss with a sign has no scale


def test_what_a_watch_remembers_goes_on_after_a_restart():
  losses = [(step, 100.0 if step % 37 == 0 else math.nan if step % 25 < 3 else 1.0) for step in range(1, 200)]
  _, whole = watch_all(losses)
  for cut in (26, 60, 125):
    first, rows = watch_all(losses[:cut])
    second, more = watch_all(losses[cut:], saved=json.loads(json.dumps(first.saved())))
    assert rows + more == whole and second.skipped == sum(math.isnan(loss) for _, loss in losses)


def test_fault_rows_after_the_checkpoint_are_written_again(tmp_path):
  for start_at in (0, 4):
    writer = metrics.MetricsWriter(tmp_path, start_at)
    assert start_at or not (tmp_path / "faults.jsonl").exists()
    for step in range(start_at + 1, 9):
      writer.write_fault(step, {"fault": "skipped", "sample_ids": [step]})
    writer.close()
  assert [row["step"] for row in read_rows(tmp_path / "faults.jsonl")] == list(range(1, 9))


@pytest.mark.parametrize("fields, message", [({"on_save_error": "ignore"}, "on_save_error is 'ignore': choose one of stop, continue"),
                                             ({"max_skipped": -1}, "must be 0 or more"), ({"spike_factor": -1.0}, "must be 0 or more")])
def test_settings_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    faults.Settings(**fields)


# Time.


def test_accounts_divide_the_wall_time(monkeypatch):
  now = [10.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  recorder = metrics.GoodputRecorder(began=7.0)
  with recorder.measure("compile"):
    now[0] += 5
  row = recorder.row()
  assert row["wall_s"] == 8 and row["start_s"] == 3 and row["compile_s"] == 5 and row["step_s"] == row["goodput"] == 0
  with recorder.measure("save"):
    now[0] += 1
  now[0] += 3
  row = recorder.row()
  assert (row["wall_s"], row["save_s"], row["step_s"], row["goodput"]) == (4, 1, 3, 0.75)


def test_goodput_leaves_out_what_was_computed_twice(tmp_path):
  parts = {f"{kind}_s": 0.0 for kind in metrics.NEXT_TO_STEPS}

  def start_at(step, to):
    writer = metrics.MetricsWriter(tmp_path, step)
    writer.write_timing(step, parts | {"wall_s": 5, "step_s": 0, "start_s": 5})
    for end in range(step + 10, to + 1, 10):
      writer.write_timing(end, {"samples_per_second": 1.0})
      writer.write_timing(end, parts | {"wall_s": 10, "step_s": 8, "save_s": 2})
    writer.close()
  start_at(0, 40)
  start_at(25, 45)  # 15 steps are computed again: 0.5 + 1 rows
  start_at(45, 65)
  rows = read_rows(tmp_path / "timing.jsonl")
  total = metrics.goodput(rows)
  assert total["starts"] == 3 and total["lost_s"] == 12 and total["wall_s"] == 15 + 80 and total["save_s"] == 16
  assert total["step_s"] == 8 * 8 - 12
  assert [row["step"] for row in rows if "samples_per_second" in row] == [10, 20, 35, 45, 55, 65]
  assert metrics.goodput([{"step": 1, "samples_per_second": 1.0}]) == {}
