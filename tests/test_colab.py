"""The notebooks' config: a plan for each device; what tells the device; the curves of a run; what installs."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from configs import colab
from qimg2.analysis.roofline import GIB
from qimg2.runtime import curves, device_at_hand, watching
from qimg2.runtime.config import parse
from qimg2.runtime.notebook import Device
from qimg2.runtime.report import figure_png

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("device, plan", [
    (Device("cpu", "cpu", 8, 0, False), "cpu"), (Device("gpu", "Tesla T4", 1, 11 * GIB, False), "small"),
    (Device("gpu", "of another kind", 1, 40 * GIB, False), "small"), (Device("gpu", "NVIDIA L4", 1, 16 * GIB, True), "medium"),
    (Device("gpu", "NVIDIA A100", 1, 29 * GIB, True), "large"), (Device("tpu", "TPU v5 lite", 1, int(15.75 * GIB), True), "medium"),
    (Device("tpu", "TPU v6 lite", 1, int(31.24 * GIB), True), "large"), (Device("tpu", "of unknown memory", 1, 0, True), "small")])
def test_a_device_gets_the_largest_plan_that_it_can_run(device, plan):
  assert colab.plan_for(device) == plan


def test_the_argument_chooses_sizes_and_data():
  cfg = parse(colab.get_config("large"))
  assert (cfg.model.width, cfg.model.dtype) == (512, "bfloat16") and [stage.resolutions[0].batch_size for stage in cfg.stages] == [32, 64]
  assert [stage.num_steps for stage in cfg.stages] == [1500, 3000] and {part.task for part in cfg.stages[1].mixture} == {"t2i", "ti2i"}
  own = parse(colab.get_config("small:mine"))
  assert own.model == parse(colab.get_config("small")).model and {part.name for stage in own.stages for part in stage.mixture} == {"mine"}
  tiny = parse(colab.get_config("smoke:mine"))
  assert tiny.data_dir == own.data_dir and [stage.num_steps for stage in tiny.stages] == [2, 2] and tiny.stages[0].mixture[0].name == "mine"
  with pytest.raises(ValueError, match="huge is unknown: say one of cpu, small, medium, large or smoke, and :NAME"):
    colab.get_config("huge")


@dataclasses.dataclass(frozen=True)
class Chip:
  platform: str
  device_kind: str
  compute_capability: str | None = None

  def memory_stats(self):
    return {"bytes_limit": 11 * GIB} if self.platform == "gpu" else None


@pytest.mark.parametrize("chip, described", [
    (Chip("gpu", "Tesla T4", "7.5"), ("gpu", 11 * GIB, False)), (Chip("gpu", "NVIDIA L4", "8.9"), ("gpu", 11 * GIB, True)),
    (Chip("tpu", "TPU v5 lite"), ("tpu", 0, True)), (Chip("cpu", "cpu"), ("cpu", 0, False))])
def test_the_device_at_hand(monkeypatch, chip, described):
  monkeypatch.setattr(jax, "devices", lambda: [chip])
  device = device_at_hand()
  assert (device.backend, device.memory_bytes, device.bfloat16) == described
  assert ("11.0 GiB" in str(device)) == (chip.platform == "gpu") and chip.device_kind in str(device)


@pytest.fixture
def begun(tmp_path):
  """Folder of a run of two stages, the first of which has two rows and the second none."""
  (tmp_path / "config.json").write_text(json.dumps({"config": {"stages": [{"name": "vae"}, {"name": "generator"}]}}))
  (tmp_path / "vae").mkdir()
  (tmp_path / "vae" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
  return tmp_path


def test_curves_grow_with_the_run(begun):
  first = curves(begun)
  assert np.asarray(first).min() < 100  # something is drawn
  with open(begun / "vae" / "metrics.jsonl", "a") as file:
    file.write('{"step": 3, "loss": 0.5}\n')
  second = curves(begun)
  assert second.size == first.size and np.any(np.asarray(second) != np.asarray(first))
  (begun / "generator").mkdir()
  (begun / "generator" / "metrics.jsonl").write_text('{"step": 1, "val_loss": 2.0}\n')
  third = curves(begun)
  assert third.size == (first.width, 2 * first.height) and np.array_equal(np.asarray(third)[:first.height], np.asarray(second))
  with pytest.raises(ValueError, match="There are no losses in .* yet"):
    curves(begun / "vae")


def test_labels_of_a_narrow_range_are_whole_and_figures_of_one_size():
  figures = [Image.open(io.BytesIO(figure_png({"loss": ((1, 2), values)}, "loss of generator", log=True))) for values in ((2.05, 1.95), (1, 1e-3))]
  assert figures[0].size == figures[1].size
  for figure in figures:
    assert np.asarray(figure.convert("L"))[:, :2].min() == 255, "something is cut off at the left"


def test_watching_shows_curves_while_the_body_runs_and_at_its_end(begun):
  shown = []
  with pytest.raises(KeyboardInterrupt), watching(begun, shown.append, every_s=0.01):
    while not shown:
      pass
    (begun / "generator").mkdir()
    (begun / "generator" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    raise KeyboardInterrupt
  assert shown[0].height * 2 == shown[-1].height
  with watching(begun / "vae", shown.append, every_s=0.01):
    seen = len(shown)
  assert len(shown) == seen  # nothing to show


def test_a_display_that_fails_takes_nothing_from_the_body(begun, caplog):
  shown = []
  def show(sheet):
    shown.append(sheet)
    raise RuntimeError("the browser\nis gone")
  with watching(begun, show, every_s=0.01):
    while "watching" in [thread.name for thread in threading.enumerate()]:
      time.sleep(0.01)
    done = True
  assert done and len(shown) == 1, "nothing more is shown"
  assert caplog.text.count("The curves cannot be shown any more (RuntimeError: the browser is gone): training goes on.") == 1


@pytest.mark.parametrize("file, extra", [("accel0", "tpu"), ("vfio/0", "tpu"), ("nvidiactl", "cuda12"), ("null", "cpu")])
def test_what_is_installed_follows_the_accelerator(tmp_path, file, extra):
  (tmp_path / file).parent.mkdir(exist_ok=True)
  (tmp_path / file).touch()
  env = {**os.environ, "DEV": str(tmp_path), "PIP": "echo pip"}
  result = subprocess.run(["bash", "notebooks/install.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
  line = next(line for line in result.stdout.splitlines() if line.startswith("pip"))
  assert result.returncode == 0 and f"jax[{extra}]" in line.split() and "-c requirements.lock" in line


def test_an_installation_that_fails_says_so():
  result = subprocess.run(["bash", "notebooks/install.sh"], cwd=ROOT, env={**os.environ, "PIP": "false"}, capture_output=True, text=True)
  assert result.returncode != 0 and "Installed." not in result.stdout
