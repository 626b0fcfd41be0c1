"""All that a training would meet is said before it begins, and nothing is made."""

import copy
import dataclasses
import json
import os
import shutil
import types

import jax
import pytest
from ml_collections import ConfigDict

from configs import base
from qimg2.runtime import dry_run, run
from qimg2.runtime import lock as lock_module


@pytest.fixture
def made(smoke_config):
  """A run whose data are there."""
  return run.Run(smoke_config, "")


@pytest.mark.slow
def test_a_training_that_could_begin(tmp_path, smoke_config, made):
  lines, wrong = dry_run.dry_run(smoke_config, tmp_path / "run")
  assert not wrong and not os.listdir(tmp_path)
  used = next(line for line in lines if line.startswith("Stage sft"))
  assert "2 steps of flow_matching; " in used and f"8 rows in a batch, over {jax.device_count()} parts of the mesh" in used
  loader = made.loader(made.stages["sft"])
  counts = [sum(one[name] for one in loader.mixture.usage) for name in ("used", "records")]
  assert f"{counts[0]} of {counts[1]} records are used, in {len(loader.buckets)} buckets" in used


def test_what_needs_no_data_is_looked_at_first(tmp_path, smoke_config, monkeypatch):
  """A lock whose holder lives, folders that may not be written, and stages that are done; a lock that is stale is no mistake."""
  cfg = dataclasses.replace(dry_run.parse(smoke_config), order_dir=str(tmp_path / "orders"), data_dir=str(tmp_path / "none"))
  workdir = tmp_path / "run"
  workdir.mkdir()
  lock, record = workdir / "train.lock", {"host": "elsewhere", "pid": 7, "since": "now"}
  lock.write_text(json.dumps(record))
  clock = [0.0]
  def sleep(seconds):
    clock[0] += seconds
    if is_alive:
      os.utime(lock, (clock[0], clock[0]))
  monkeypatch.setattr(lock_module, "time", types.SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
  can = os.access
  monkeypatch.setattr(os, "access", lambda path, mode, **rest: path != tmp_path and can(path, mode, **rest))
  for is_alive in (True, False):
    wrong = dry_run.dry_run(cfg, workdir)[1]
    held = f"The run in {workdir} is being trained by process 7 on elsewhere (since now): wait until it ends, stop it, or use another --workdir."
    refused = f"config.order_dir is '{tmp_path}/orders', where nothing can be written, because {tmp_path} may not be written: name a folder"
    assert (wrong[:-1] == [held]) == is_alive and wrong[-1].startswith(refused) and len(wrong) == 1 + is_alive
    assert json.loads(lock.read_text()) == record and sorted(os.listdir(tmp_path)) == ["run"]


@pytest.mark.slow
def test_all_that_is_wrong_is_found_at_once(tmp_path, smoke_config, made, monkeypatch):
  cfg = copy.deepcopy(smoke_config)
  cfg.mesh.data = 3
  cfg.random_frozen = False
  cfg.stages[1].mixture = (ConfigDict(base.part("nowhere")),)
  cfg.stages[2].resolutions[0].batch_size = 12
  cfg.stages[0].optimizer.accumulate = 3
  (tmp_path / "run" / cfg.stages[1].name / "checkpoints" / "2").mkdir(parents=True)
  cfg.stages[3].start_from = "diffusers:/nowhere"
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
  lines, wrong = dry_run.dry_run(cfg, tmp_path / "run")
  for words in ("Mesh {'data': 3,", "no data set 'nowhere'", "would draw its weights from the seed", "high_resolution: 12 rows of a batch",
                "Stage vae: 8 rows of a batch cannot be divided into 3 micro-batches: change batch_size or optimizer.accumulate",
                "config.stages[sft].start_from is 'diffusers:/nowhere', but there is no folder", "MB, but the disk of"):
    assert [sentence for sentence in wrong if words in sentence], (words, wrong)
  assert [line for line in lines if "is done" in line] == ["Stage low_resolution is done."]
  assert len(set(wrong)) == len(wrong) and os.listdir(tmp_path) == ["run"]
  lines, wrong = dry_run.dry_run(dataclasses.replace(dry_run.parse(smoke_config), data_dir=str(tmp_path / "none")), tmp_path / "run")
  assert not wrong and "training makes it" in lines[0] and os.listdir(tmp_path) == ["run"]
