"""What is saved comes back to the bit, and what does not fit is an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qimg2 import checkpoint, optim, sharding, state
from qimg2 import params as P
from qimg2.algorithms import Algorithm

RULES = sharding.RULES["fsdp_tensor"]
ALGORITHM = Algorithm(losses={"model": lambda *_: None}, track={"ema": ("model", 0.5)})


def specs(width=8):
  return {"model": {"w": P.Param((width, 4), ("embed", "mlp"), P.normal(1.0)), "b": P.Param((4,), (None,), P.normal(1.0))}}


def make(sizes, declared):
  """(abstract state, real state) on a mesh of `sizes`."""
  mesh = sharding.make_mesh(sizes)
  optimizers = state.make_optimizers(ALGORITHM, declared, optim.Config(), 10)
  abstract = state.abstract_state(ALGORITHM, optimizers, declared, mesh, RULES)
  real = state.init_state(ALGORITHM, optimizers, {"model": P.init(declared["model"], jax.random.key(0))}, {}, jax.random.key(3))
  real = real.replace(step=jnp.int32(5), slow=jax.tree.map(lambda x: x + 1, real.slow))
  return abstract, jax.device_put(real, jax.tree.map(lambda x: x.sharding, abstract))


def assert_equal(a, b):
  raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def test_round_trip_onto_another_mesh(tmp_path):
  _, saved = make({"fsdp": 8}, specs())
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(saved, {"loader_step": 5, "stage": {"name": "x"}})
  checkpoints.close()
  abstract, _ = make({"fsdp": 2, "tensor": 4}, specs())
  again = checkpoint.Checkpoints(tmp_path)
  assert again.latest_step() == 5
  restored, meta = again.restore(abstract, 5)
  assert_equal(restored, saved)
  assert meta == {"loader_step": 5, "stage": {"name": "x"}}
  assert restored.params["model"]["w"].sharding == abstract.params["model"]["w"].sharding
  assert_equal(again.restore_item("slow.ema", abstract.params["model"]), saved.slow["ema"])


def test_only_the_newest_are_kept(tmp_path):
  _, saved = make({"fsdp": 8}, specs())
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(saved.replace(step=jnp.int32(step)), {})
  checkpoints.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_what_does_not_fit_is_an_error(tmp_path):
  abstract, saved = make({"fsdp": 8}, specs())
  checkpoints = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(FileNotFoundError, match="no checkpoint in"):
    checkpoints.restore_item("params.model", abstract.params["model"])
  checkpoints.save(saved, {})
  checkpoints.wait()
  wider, _ = make({"fsdp": 8}, specs(width=16))
  with pytest.raises(ValueError, match="does not fit the config"):
    checkpoints.restore(wider, 5)
  with pytest.raises(ValueError, match="does not fit the config"):
    checkpoints.restore_item("params.model", {**abstract.params["model"], "c": abstract.step})
  with pytest.raises(ValueError, match="holds no 'params.vae': it has params.model, slow.ema"):
    checkpoints.restore_item("params.vae", abstract.params["model"])


def test_frozen_weights_round_trip(tmp_path):
  abstract, saved = make({"fsdp": 8}, specs())
  checkpoint.save_weights(tmp_path / "w", saved.params["model"])
  assert_equal(checkpoint.restore_weights(tmp_path / "w", abstract.params["model"]), saved.params["model"])
  wider, _ = make({"fsdp": 8}, specs(width=16))
  with pytest.raises(ValueError, match="do not fit the config"):
    checkpoint.restore_weights(tmp_path / "w", wider.params["model"])
