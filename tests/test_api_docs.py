"""The examples of docs/api.md run as they stand, one after the other, over a run that is trained already."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from qimg2 import runtime

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_runs(smoke_run, smoke_config, tmp_path, monkeypatch, one_device):
  monkeypatch.chdir(tmp_path)
  shutil.copytree(smoke_run.workdir, "runs/api")
  os.symlink(smoke_config.data_dir, "runs/data_smoke")
  blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
  assert len(blocks) == 7
  # The run was trained with the config as it is.
  blocks[0] = blocks[0].replace("config.stages[1].optimizer.learning_rate = 1e-3", "config.stages[1].optimizer.learning_rate *= 1")
  found = {"__name__": "page"}
  for block in blocks:
    exec(block, found)
  assert found["pictures"].shape == found["edited"].shape == (2, 64, 64, 4) and pathlib.Path("k.png").is_file()
  assert found["scores"]["stage"] == found["stage"] == list(smoke_run.stages)[-1]
  # With and without a mesh float32 sums may have another order: a level of 255 at most.
  assert np.abs(found["again"].astype(int) - found["pictures"]).max() <= 1
  assert all(isinstance(x, np.ndarray) for x in found["arrays"].values())
  assert sum(x.size for x in found["arrays"].values()) == sum(x.size for x in found["tensors"].values())
  np.testing.assert_allclose(found["flat"].reshape(found["velocity"].shape), found["velocity"], atol=1e-5)


def test_every_public_name_is_there_and_on_the_page():
  for name in runtime.__all__:
    assert callable(getattr(runtime, name))
    assert re.search(rf"^from qimg2.runtime import .*\b{name}\b", PAGE, re.MULTILINE) or name == "Run"
  assert set(runtime.__all__) <= set(dir(runtime))
  with pytest.raises(AttributeError, match="has no attribute 'Generators'"):
    runtime.Generators  # noqa: B018


def test_one_module_does_not_load_all():
  code = ("import sys, qimg2.runtime; assert 'jax' not in sys.modules; import qimg2.runtime.processes; "
          "assert not [name for name in sys.modules if name in ('qimg2.runtime.run', 'data_pipelines.loader')]")
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
