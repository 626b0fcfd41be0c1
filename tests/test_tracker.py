"""A tracker beside TensorBoard: it gets what that gets, goes on where it was, and costs no training."""

import sys

import numpy as np
import pytest

from qimg2.training import metrics, tracker


@pytest.mark.slow
def test_an_offline_run_goes_on_as_the_same(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  for start in (0, 2):
    with tracker.tracking("wandb", tmp_path, {"seed": 17, "stages": [{"name": "vae"}]}) as tracked:
      writer = metrics.MetricsWriter(tmp_path / "vae", start, tracker=tracked)
      writer.write(start + 1, {"loss": 0.125})
      writer.write_image(start + 1, "samples", np.zeros((4, 4, 3), np.uint8))
      writer.close()
  name = (tmp_path / tracker.ID).read_text()
  runs = sorted(path for path in (tmp_path / "wandb").glob("offline-run-*"))
  assert len(runs) in (1, 2) and all(run.name.endswith(name) for run in runs)
  logged = b"".join(path.read_bytes() for run in runs for path in run.glob("*.wandb"))
  assert all(word in logged for word in (b"vae/loss", b"0.125", b"vae/step", b"vae/samples", b"seed", b"17"))
  assert list((tmp_path / "wandb").rglob("*.png"))


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_tracker_that_does_not_begin_ends_a_new_run_and_not_one_that_goes_on(goes_on, tmp_path, monkeypatch, caplog):
  def fail(*arguments):
    raise ValueError("wandb does not begin (no key): log in.")
  monkeypatch.setattr(tracker, "Tracker", fail)
  if not goes_on:
    with pytest.raises(ValueError, match="does not begin"), tracker.tracking("wandb", tmp_path, {}):
      raise AssertionError("it must not come here")
    return
  (tmp_path / tracker.ID).write_text("run1")
  with tracker.tracking("wandb", tmp_path, {}) as tracked:
    assert tracked is None
  assert "wandb does not begin (no key): log in. Training goes on without it." in caplog.text and (tmp_path / tracker.ID).read_text() == "run1"


def test_a_missing_package_and_one_that_fails_are_sentences(tmp_path, monkeypatch, caplog):
  class Failing:
    def __getattr__(self, name):
      raise RuntimeError("the network\nis gone")
  tracked = tracker.Tracker.__new__(tracker.Tracker)
  tracked._run, tracked._stages = Failing(), set()
  writer = metrics.MetricsWriter(tmp_path, 0, tracker=tracked)
  for step in (1, 2):
    writer.write(step, {"loss": 0.5})
  writer.close()
  tracked.close()
  assert caplog.text.count("wandb failed (RuntimeError: the network is gone): training goes on without it") == 1
  assert len(metrics.read_rows(tmp_path / "metrics.jsonl")) == 2
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match="needs the package wandb, which is not installed: pip install wandb"):
    tracker.Tracker(tmp_path, {})
