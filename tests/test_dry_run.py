"""All that a training would meet is said before it begins, and nothing is made."""

import copy
import dataclasses
import os
import shutil

import jax
import pytest
from ml_collections import ConfigDict

from configs import base
from qimg2.runtime import dry_run, run


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


@pytest.mark.slow
def test_all_that_is_wrong_is_found_at_once(tmp_path, smoke_config, made, monkeypatch):
  cfg = copy.deepcopy(smoke_config)
  cfg.mesh.data = 3
  cfg.random_frozen = False
  cfg.stages[1].mixture = (ConfigDict(base.part("nowhere")),)
  cfg.stages[2].resolutions[0].batch_size = 12
  cfg.stages[3].start_from = "diffusers:/nowhere"
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
  lines, wrong = dry_run.dry_run(cfg, tmp_path / "run")
  for words in ("Mesh {'data': 3,", "no data set 'nowhere'", "would draw its weights from the seed", "high_resolution: 12 rows of a batch",
                "config.stages[sft].start_from is 'diffusers:/nowhere', but there is no folder", "MB, but the disk of"):
    assert [sentence for sentence in wrong if words in sentence], (words, wrong)
  assert len(set(wrong)) == len(wrong) and not os.listdir(tmp_path)
  lines, wrong = dry_run.dry_run(dataclasses.replace(dry_run.parse(smoke_config), data_dir=str(tmp_path / "none")), tmp_path / "run")
  assert not wrong and "training makes it" in lines[0] and not os.listdir(tmp_path)
