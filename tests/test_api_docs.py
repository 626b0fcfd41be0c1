"""The examples of docs/api.md run as they stand, one after the other, over a run that is trained already; the method of docs/methods.md trains."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs import base, quickstart
from qimg2 import runtime
from qimg2.runtime.curriculum import train
from qimg2.runtime.methods import METHODS, Method
from qimg2.training.metrics import read_rows

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_runs(smoke_run, smoke_config, tmp_path, monkeypatch, one_device):
  monkeypatch.chdir(tmp_path)
  shutil.copytree(smoke_run.workdir, "runs/api")
  os.symlink(smoke_config.data_dir, "runs/data_smoke")
  blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
  assert len(blocks) == 9
  # The run was trained with the config as it is.
  blocks[0] = blocks[0].replace("config.stages[1].optimizer.learning_rate = 1e-3", "config.stages[1].optimizer.learning_rate *= 1")
  found = {"__name__": "page"}
  for block in blocks:
    exec(block, found)
  assert found["pictures"].shape == found["edited"].shape == (2, 64, 64, 4) and pathlib.Path("k.png").is_file()
  assert found["sheet"].shape[1] >= 128 and pathlib.Path("curves.png").read_bytes() == pathlib.Path("live.png").read_bytes()
  assert found["scores"]["stage"] == found["stage"] == list(smoke_run.stages)[-1]
  # With and without a mesh float32 sums may have another order: a level of 255 at most.
  assert np.abs(found["again"].astype(int) - found["pictures"]).max() <= 1
  assert all(isinstance(x, np.ndarray) for x in found["arrays"].values())
  assert sum(x.size for x in found["arrays"].values()) == sum(x.size for x in found["tensors"].values())
  np.testing.assert_allclose(found["flat"].reshape(found["velocity"].shape), found["velocity"], atol=1e-5)


@pytest.mark.slow
def test_the_method_of_the_page_trains(smoke_run, smoke_config, tmp_path, monkeypatch, one_device):
  *_, code = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
  found = {"__name__": "page"}
  exec(code, found)
  monkeypatch.setitem(METHODS, "reward_weighting", Method("generator", found["reward_weighting"]))
  cfg, theirs = quickstart.get_config(), smoke_run.workdir
  cfg.evals, cfg.stages = {}, (base.stage(
      "reward", "reward_weighting", start_from=f"{theirs}/sft", frozen=dict(encoder=f"{theirs}/frozen/encoder", vae=f"{theirs}/vae"),
      algorithm=dict(num_steps=2, group=2), caption_dropout=0.0, resolutions=(dict(base_px=32, batch_size=8),)),)
  base.smoke(cfg).data_dir = smoke_config.data_dir
  train(cfg, tmp_path)
  rows = [row for row in read_rows(tmp_path / "reward" / "metrics.jsonl") if "loss" in row]
  assert len(rows) == 2 and all(np.isfinite(value) for row in rows for value in row.values())
  meta = json.loads((tmp_path / "reward" / "checkpoints" / "2" / "meta" / "metadata").read_text(encoding="utf-8"))
  assert meta["stage"]["frozen_steps"] == {"vae": [f"{theirs}/vae", 2], "ref": [f"{theirs}/sft", 2]}
  assert rows[0]["away"] < 1e-6 and abs(rows[0]["reward/green"]) < 1 and rows[0]["reward/left_out"] == 0.0


def test_every_public_name_is_there_and_on_the_page():
  for name in runtime.__all__:
    assert callable(getattr(runtime, name))
    assert re.search(rf"^from qimg2.runtime import .*\b{name}\b", PAGE, re.MULTILINE) or name == "Run"
  assert set(runtime.__all__) <= set(dir(runtime))
  with pytest.raises(AttributeError, match="has no attribute 'Generators'"):
    runtime.Generators  # noqa: B018


@pytest.mark.slow
def test_one_module_does_not_load_all():
  code = ("import sys, qimg2.runtime; assert 'jax' not in sys.modules; import qimg2.runtime.processes; "
          "assert not [name for name in sys.modules if name in ('qimg2.runtime.run', 'data_pipelines.loader')]")
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
