"""The main job: every stage trains, and nothing that happens to a run changes its numbers."""

import copy
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_emoji import needs_packages

from configs import emoji, folder, pretrain
from qimg2.runtime.curriculum import train
from qimg2.runtime.exporting import export
from qimg2.runtime.run import Run
from qimg2.training.metrics import read_rows

ROOT = pathlib.Path(__file__).parent.parent
STAGES = ("vae", "high_resolution")
NUM_STEPS = 20
CONFIG = """
from configs import quickstart

def get_config(arg=""):
  cfg = quickstart.get_config("smoke")
  cfg.data_dir = {data_dir!r}
  cfg.check.name = "none"
  cfg.stages = cfg.stages[0], cfg.stages[2]  # the second one mixes drawing and editing
  cfg.stages[1].start_from = "scratch"
  for stage in cfg.stages:
    stage.num_steps, stage.save_every_steps, stage.eval_every_steps, stage.sample_every_steps = {num_steps}, 3, 7, 10
    stage.optimizer.warmup_steps = 5
  return cfg
"""


def files(run):
  return {str(path.relative_to(run.workdir)) for path in run.workdir.rglob("*") if path.is_file()}


def test_smoke_writes_what_it_promises(smoke_run):
  names = files(smoke_run)
  assert {"config.json", "report.html", "check.json", "check.png"} <= names
  for stage in smoke_run.cfg.stages:
    assert {f"{stage.name}/metrics.jsonl", f"{stage.name}/timing.jsonl", f"{stage.name}/samples/00000002.png"} <= names
    rows = read_rows(smoke_run.workdir / stage.name / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert any("val_loss" in row for row in rows)
    edits = "ti2i" in {part.task for part in stage.mixture}
    assert edits == any("ti2i/ema/val_loss" in row for row in rows) == (f"{stage.name}/samples/00000002_ti2i.png" in names)
  result = json.loads((smoke_run.workdir / "check.json").read_text())
  assert result["num_prompts"] == 8 and {"glyph", "ink", "paper", "edit: everything", "edit: change"} <= set(result)


def test_training_again_changes_nothing(smoke_run, smoke_config):
  before = {stage.name: (smoke_run.workdir / stage.name / "metrics.jsonl").read_bytes() for stage in smoke_config.stages}
  train(smoke_config, smoke_run.workdir)
  for name, content in before.items():
    assert (smoke_run.workdir / name / "metrics.jsonl").read_bytes() == content


def test_each_stage_starts_from_the_one_it_names(smoke_run):
  stage = smoke_run.stages["sft"]
  started, slow = smoke_run.start_weights(stage)
  previous = smoke_run.trained_weights("high_resolution", "model")
  jax.tree.map(np.testing.assert_array_equal, started["model"], previous)
  jax.tree.map(np.testing.assert_array_equal, slow["ema"], smoke_run.trained_weights("high_resolution", "model", "ema"))
  frozen = smoke_run.frozen_weights(stage)
  jax.tree.map(np.testing.assert_array_equal, frozen["vae"], smoke_run.trained_weights("vae", "vae"))
  assert np.std(frozen["vae"]["statistics"]["std"]) > 0  # measured, not the initial ones


def test_weights_can_come_from_another_run(smoke_run, smoke_config, tmp_path):
  cfg = copy.deepcopy(smoke_config)
  stage = cfg.stages[1]
  stage.frozen.encoder, stage.frozen.vae = str(smoke_run.workdir / "frozen" / "encoder"), str(smoke_run.workdir / "vae")
  stage.start_from = str(smoke_run.workdir / "sft")
  run = Run(cfg, tmp_path)
  stage = run.stages[stage.name]
  frozen, (started, slow) = run.frozen_weights(stage), run.start_weights(stage)
  theirs = smoke_run.frozen_weights(smoke_run.stages["sft"])
  jax.tree.map(np.testing.assert_array_equal, frozen, theirs)
  jax.tree.map(np.testing.assert_array_equal, started["model"], smoke_run.trained_weights("sft", "model"))
  jax.tree.map(np.testing.assert_array_equal, slow["ema"], smoke_run.trained_weights("sft", "model", "ema"))
  with pytest.raises(ValueError, match="There is no checkpoint of 'nowhere'"):
    run.trained_weights("nowhere", "model")


def test_a_changed_config_is_refused(smoke_run, smoke_config):
  cfg = copy.deepcopy(smoke_config)
  cfg.model.num_layers = 3
  with pytest.raises(ValueError, match="started with another config: config.model.num_layers was 2 and is 3"):
    train(cfg, smoke_run.workdir)


@pytest.fixture(scope="module")
def published(smoke_run, tmp_path_factory):
  """A folder in the published layout, of the networks of the smoke run."""
  return export(smoke_run, tmp_path_factory.mktemp("published") / "pipeline", dtype="float32")


def test_a_stage_can_start_from_a_published_folder(smoke_run, smoke_config, published, tmp_path):
  cfg = copy.deepcopy(smoke_config)
  cfg.stages, cfg.check.name, cfg.tokenizer = cfg.stages[2:], "none", f"diffusers:{published}"
  cfg.stages[0].start_from = f"diffusers:{published}"
  for stage in cfg.stages:
    stage.frozen.vae = "default"  # with the encoder, from where the chain of start_from begins
  run = Run(cfg, tmp_path)
  theirs = smoke_run.frozen_weights(smoke_run.stages["sft"])
  for stage in run.cfg.stages:
    jax.tree.map(np.testing.assert_array_equal, run.frozen_weights(stage), theirs)
  started, slow = run.start_weights(run.cfg.stages[0])
  jax.tree.map(np.testing.assert_array_equal, started["model"], smoke_run.trained_weights("sft", "model", "ema"))
  assert not slow
  cfg.model.mlp_ratio = 2
  with pytest.raises(ValueError, match="config.model.mlp_ratio is 2, but the pipeline in .* has 3"):
    run = Run(cfg, tmp_path)
    run.start_weights(run.cfg.stages[0])


@pytest.mark.slow
def test_training_goes_on_from_a_published_folder(smoke_config, published, tmp_path):
  cfg = copy.deepcopy(smoke_config)
  cfg.stages, cfg.check.name, cfg.tokenizer = cfg.stages[3:], "none", f"diffusers:{published}"
  cfg.stages[0].start_from, cfg.stages[0].frozen.vae = f"diffusers:{published}", "default"
  train(cfg, tmp_path)
  assert [row["step"] for row in read_rows(tmp_path / "sft" / "metrics.jsonl") if "loss" in row] == [1, 2]


def misspell(stage):
  with stage.resolutions[0].unlocked():
    stage.resolutions[0].multipel = 16


@pytest.mark.parametrize("change, message", [
    (misspell, r"\[sft\].resolutions\[0\] has no key 'multipel': did you mean 'multiple'"),
    (lambda stage: stage.algorithm.update(name="flow"), r"\[sft\].algorithm.name is 'flow': choose one of flow_matching, "),
    (lambda stage: stage.algorithm.update(ema_dekay=0.5), r"\[sft\].algorithm has no key 'ema_dekay': did you mean 'ema_decay'"),
    (lambda stage: stage.optimizer.update(schedule="step"), r"\[sft\].optimizer.schedule is 'step'"),
    (lambda stage: stage.update(start_from="hig_resolution"), r"\[sft\].start_from is 'hig_resolution', .*did you mean 'stage:high_resolution'"),
    (lambda stage: stage.frozen.__delitem__("vae"), r"\[sft\].frozen lacks 'vae'"),
    (lambda stage: stage.mixture[0].update(wait=1.0), r"\[sft\].mixture\[0\] has no key 'wait': did you mean 'weight'"),
    (lambda stage: stage.frozen.update(vae="stage:sft"), r"frozen.vae is 'stage:sft', but no earlier stage \(vae, "),
])
def test_mistakes_of_any_stage_are_named_before_the_first_one_trains(smoke_config, tmp_path, change, message):
  cfg = copy.deepcopy(smoke_config)
  with cfg.unlocked():
    change(cfg.stages[3])
  with pytest.raises(ValueError, match=message):
    train(cfg, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("module", [pretrain, folder, pytest.param(emoji, marks=needs_packages)])
def test_smoke_of_the_other_configs(module, data_dir, tmp_path):
  cfg = module.get_config("smoke")
  cfg.data_dir = str(data_dir)
  run = train(cfg, tmp_path)
  for stage in cfg.stages:
    assert [row["step"] for row in read_rows(tmp_path / stage.name / "metrics.jsonl") if "loss" in row] == [1, 2]
  assert (run.workdir / "report.html").is_file()


# Real processes.


def command(config, workdir, *more):
  return [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={workdir}", *more]


def environment(cache, num_devices=1):
  # Compiled as a user's run is, with all optimisations.
  inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return {**inherited, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices), "JAX_COMPILATION_CACHE_DIR": cache,
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def config_file(data_dir, tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "short.py"
  path.write_text(CONFIG.format(data_dir=str(data_dir), num_steps=NUM_STEPS))
  return path


@pytest.fixture(scope="module")
def uninterrupted(config_file, compilation_cache, tmp_path_factory):
  """Folder of a run that nothing stopped, on one device."""
  workdir = tmp_path_factory.mktemp("uninterrupted")
  subprocess.run(command(config_file, workdir, "--compilation_cache="), cwd=ROOT, env=environment(compilation_cache), check=True)
  return workdir


def kill_at(process, path, num_rows, delay):
  """Kills the process -9 when `path` holds `num_rows` rows, and `delay` seconds later."""
  while process.poll() is None:
    if path.exists() and path.read_bytes().count(b"\n") >= num_rows:
      time.sleep(delay)
      process.send_signal(signal.SIGKILL)
      break
    time.sleep(0.001)
  return process.wait()


def final_weights(workdir, stage):
  folder = workdir / stage / "checkpoints" / str(NUM_STEPS)
  items = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "meta")
  assert len(items) >= 2
  return {path.name: ocp.PyTreeCheckpointer().restore(path) for path in items}


@pytest.mark.slow
def test_killed_runs_end_bit_identical(config_file, uninterrupted, compilation_cache, tmp_path):
  """Killed in each stage at steps before, at and after a save, and once while a save is being written."""
  rng = np.random.default_rng(0)
  plan = [("vae", 2), ("vae", 3), ("vae", 11), ("vae", NUM_STEPS), ("high_resolution", 1), ("high_resolution", 9), ("high_resolution", 16)]
  for stage, rows in plan:
    process = subprocess.Popen(command(config_file, tmp_path, "--compilation_cache="), cwd=ROOT, env=environment(compilation_cache),
                               stderr=subprocess.DEVNULL)
    code = kill_at(process, tmp_path / stage / "metrics.jsonl", rows, rng.uniform(0, 0.05))
    assert code == -signal.SIGKILL, f"it ended with {code} before row {rows} of {stage}"
  subprocess.run(command(config_file, tmp_path, "--compilation_cache="), cwd=ROOT, env=environment(compilation_cache), check=True)
  for stage in STAGES:
    assert (tmp_path / stage / "metrics.jsonl").read_bytes() == (uninterrupted / stage / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, final_weights(tmp_path, stage), final_weights(uninterrupted, stage))


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(config_file, uninterrupted, compilation_cache, tmp_path):
  more = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--compilation_cache=")
  subprocess.run(command(config_file, tmp_path, *more), cwd=ROOT, env=environment(compilation_cache, 8), check=True)
  for stage in STAGES:
    one, eight = ([row["loss"] for row in read_rows(folder / stage / "metrics.jsonl") if "loss" in row] for folder in (uninterrupted, tmp_path))
    assert len(one) == NUM_STEPS
    np.testing.assert_allclose(eight, one, rtol=1e-5)
