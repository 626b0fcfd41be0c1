"""The quickstart's smoke run gives the numbers that it gave when the order of batches was last changed (tests/golden_smoke.json).

Equal to rounding: another processor, or another order of a sum, changes the last bits. Left out is what was changed on purpose: averages that a stage
takes over from an earlier one no longer begin their ramp again.
"""

import json
import pathlib
import zlib

import jax
import numpy as np
import pytest
from kill_points import last_arrays
from PIL import Image

from qimg2.training.metrics import read_rows

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_smoke.json").read_text())


def project(tree):
  """Path -> a sum of a leaf's numbers with random signs: one that is missing, moved or swapped changes it."""
  found = {}
  for path, x in jax.tree.leaves_with_path(tree):
    name, x = jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(x, np.float64).ravel()
    found[name] = x @ np.random.default_rng(zlib.crc32(name.encode())).choice([-1.0, 1.0], x.size)
  return found


@pytest.mark.parametrize("stage", GOLDEN)
def test_the_smoke_run_is_the_one_of_before(smoke_run, stage):
  golden, folder = GOLDEN[stage], smoke_run.workdir / stage
  rows = read_rows(folder / "metrics.jsonl")
  assert [row["step"] for row in rows] == [row["step"] for row in golden["rows"]]
  for now, before in zip(rows, golden["rows"]):
    np.testing.assert_allclose([now[name] for name in before], list(before.values()), rtol=1e-5, err_msg=str(list(before)))
  trees = last_arrays(folder)
  for item, projections in golden["weights"].items():
    now = project(trees[item])
    assert now.keys() == projections.keys()
    for name, (before, norm) in projections.items():
      # 6e-6 between two ways to compile it, 1.2e-4 between two processors: Adam's first steps are as long for a gradient near 0 as for any other, so
      # that its rounding moves a weight. What is missing, moved or swapped is off by about the norm.
      assert abs(now[name] - before) <= 1e-3 * norm, (item, name)
  assert sorted(path.name for path in (folder / "samples").glob("*.png")) == sorted(golden["samples"])
  for name, (mean, size) in golden["samples"].items():
    image = Image.open(folder / "samples" / name)
    assert list(image.size) == size
    np.testing.assert_allclose(np.asarray(image, np.float64).mean(), mean, atol=0.05)  # of 255 levels
