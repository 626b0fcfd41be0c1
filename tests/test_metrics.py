"""Metrics survive a crash as if it had not happened."""

import json
import time

import numpy as np
import pytest

from qimg2.training import metrics


def write(folder, start, steps):
  writer = metrics.MetricsWriter(folder, start)
  for step in steps:
    writer.write(step, {"loss": np.float32(1 / step)})
    writer.write_timing(step, {"samples_per_second": 7.0})
  writer.sync()
  writer.close()


def test_rows_after_the_checkpoint_are_written_again(tmp_path):
  write(tmp_path / "whole", 0, range(1, 9))
  write(tmp_path / "cut", 0, range(1, 7))
  with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
    file.write('{"step": 7, "lo')  # killed in the middle of a line
  write(tmp_path / "cut", 4, range(5, 9))
  whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
  assert whole == cut
  assert [row["step"] for row in metrics.read_rows(tmp_path / "cut" / "timing.jsonl")] == list(range(1, 9))
  assert list((tmp_path / "cut").glob("events.out.tfevents.*"))


def test_starts_within_one_second_have_files_of_events_of_their_own(tmp_path, monkeypatch):
  monkeypatch.setattr("time.time", lambda: 1.7e9)
  for _ in range(2):
    writer = metrics.MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 0.5})
    writer.close()
  files = sorted(tmp_path.glob("events.out.tfevents.1700000000.*"))
  assert len(files) == 2 and files[0].stat().st_size == files[1].stat().st_size > 60


def test_an_evaluation_that_is_still_due_is_written_once(tmp_path):
  """Asked to stop at step 2; the next start evaluates there, and is killed before it saves."""
  for hooks_due in (False, True, True):
    writer = metrics.MetricsWriter(tmp_path, 2 if hooks_due else 0, hooks_due=hooks_due)
    if not hooks_due:
      writer.write(1, {"loss": 1.0, "skipped": 0.0})
      writer.write(1, {"val_loss": 2.0})
      writer.write(2, {"loss": 1.0, "skipped": 0.0})
    else:
      writer.write(2, {"val_loss": 3.0})
    writer.close()
  assert [sorted(row) for row in metrics.read_rows(tmp_path / "metrics.jsonl")] == [
      ["loss", "skipped", "step"], ["step", "val_loss"], ["loss", "skipped", "step"], ["step", "val_loss"]]


def test_a_damaged_line_is_named(tmp_path):
  write(tmp_path, 0, [1, 2])
  path = tmp_path / "metrics.jsonl"
  path.write_text("nonsense\n" + path.read_text())
  with pytest.raises(ValueError, match="metrics.jsonl, line 1 is no JSON"):
    metrics.MetricsWriter(tmp_path, 2)


def test_other_processes_write_nothing(tmp_path):
  writer = metrics.MetricsWriter(tmp_path / "x", 0, active=False)
  writer.write(1, {"loss": 1.0})
  writer.write_image(1, "a", np.zeros((2, 2, 3), np.uint8))
  writer.sync()
  writer.close()
  assert not (tmp_path / "x").exists()


def test_values_keep_all_their_bits(tmp_path):
  value = float(np.float32(0.1) / np.float32(3))
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(1, {"loss": value})
  writer.close()
  assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == value


def test_tensorboard_that_cannot_write_holds_nothing_up(tmp_path, monkeypatch, caplog):
  """Its thread goes on after a full disk, so that its queue of ten never stands still; what comes later is written."""
  writer = metrics.MetricsWriter(tmp_path, 0)
  events = writer._events.file_writer.event_writer
  record, worker = events._ev_writer._py_recordio_writer, events._worker
  write, failed = record.write, []

  def refuse(data):
    failed.append(data)
    raise OSError(28, "No space left on device")
  monkeypatch.setattr(record, "write", refuse)
  for step in range(30):
    writer.write(step + 1, {"loss": 0.5})
  while len(failed) < 30:  # all were tried: none waits in the queue
    time.sleep(0.01)
  monkeypatch.setattr(record, "write", write)
  writer.write(31, {"loss": 0.25})
  writer.close()
  assert caplog.text.count("cannot be written") == 1 and not worker.is_alive()
  assert len(metrics.read_rows(tmp_path / "metrics.jsonl")) == 31


def events(folder):
  """What is in the files of events."""
  from tensorboardX.proto.event_pb2 import Event
  for path in sorted(folder.glob("events.out.tfevents.*")):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], "little")  # then its checksum, the event, and that one's checksum
      yield Event.FromString(data[12:12 + length])
      data = data[16 + length:]


def test_a_histogram_is_of_what_is_finite(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write_histogram(3, "reward/ocr/samples", np.array([0.5, np.nan, 1.5, np.inf], np.float32))
  writer.write_histogram(4, "reward/ocr/samples", np.array([np.nan], np.float32))
  writer.close()
  found = [(event.step, value) for event in events(tmp_path) for value in event.summary.value]
  assert [(step, value.tag, value.histo.num, value.histo.min, value.histo.max) for step, value in found] == [(3, "reward/ocr/samples", 2, 0.5, 1.5)]
