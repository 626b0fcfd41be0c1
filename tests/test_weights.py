"""Where a run's weights come from, and what they take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pretrain
from qimg2 import networks, sharding
from qimg2 import params as P
from qimg2.algorithms import Algorithm, Average, Role, Update
from qimg2.runtime.config import parse
from qimg2.runtime.methods import make_algorithm
from qimg2.runtime.weights import LazyWeights, choose_average
from qimg2.training import checkpoint, manifest, optim, state

METHOD = Algorithm({"model": Role("mlp"), "fake": Role("mlp", start="model"), "ref": Role("mlp", start="model")},
                   (Update(("model",), None), Update(("fake",), None)), {"ema": Average("model", 0.9), "slow": Average("model", 0.99)},
                   deploy=lambda weights: {"mlp": weights["ema"]})
SPECS = {"w": P.Param((4, 2), ("embed", "mlp"), P.normal(1.0))}


def test_a_published_encoder_is_stored_in_half_the_bytes():
  """In the type that it computes in: 17.5 GB where float32 takes 35."""
  cfg = parse(pretrain.get_config())
  nets = networks.Networks(cfg.model, cfg.encoder, cfg.vae, 0)
  stage = cfg.stages[-1]
  specs = make_algorithm(stage.algorithm.name, stage.algorithm.settings, cfg.schedule).specs(nets.specs(), nets.compute_dtypes())
  size = lambda role: sum(p.size * jnp.dtype(p.dtype).itemsize for p in P.flatten(specs[role]).values())
  assert size("encoder") == 2 * 8_767_123_696 and size("model") == 4 * 7_115_124_736
  assert {jnp.dtype(p.dtype) for p in P.flatten(specs["vae"]).values()} == {jnp.dtype("float32")}


def test_weights_that_were_saved_in_float32_are_restored_in_fewer_bits(tmp_path):
  saved = P.init(SPECS, jax.random.key(0))
  checkpoint.save_weights(tmp_path / "w", saved)
  mesh = sharding.make_mesh({"fsdp": -1}, jax.devices()[:1])
  half = P.with_dtype(SPECS, "bfloat16")
  restored = checkpoint.restore_weights(tmp_path / "w", P.abstract(half, sharding.param_shardings(half, mesh, sharding.RULES["fsdp"])))
  assert restored["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(restored["w"], saved["w"].astype(jnp.bfloat16))


def test_averages_of_older_checkpoints_are_read(tmp_path):
  """They were called slow.NAME."""
  mesh, rules = sharding.make_mesh({"fsdp": -1}, jax.devices()[:1]), sharding.RULES["fsdp"]
  method = dataclasses.replace(METHOD, averages={"ema": Average("model", 0.9)})
  specs = dict.fromkeys(method.roles, SPECS)
  optimizers = state.make_optimizers(method, specs, optim.Config(), 10)
  abstract = state.abstract_state(method, optimizers, specs, mesh, rules)
  params = {role: P.init(SPECS, jax.random.key(number)) for number, role in enumerate(method.trained)}
  real = state.init_state(method, optimizers, params, {"ema": P.init(SPECS, jax.random.key(7))}, jax.random.key(3))
  writer = checkpoint.Checkpoints(tmp_path, keep=2)
  writer.save(jax.device_put(real, jax.tree.map(lambda x: x.sharding, abstract)), {})
  writer.close()
  (tmp_path / "0" / "average.ema").rename(tmp_path / "0" / "slow.ema")
  (tmp_path / "0" / manifest.NAME).unlink()
  manifest.write_manifest(tmp_path / "0")
  reader = checkpoint.Checkpoints(tmp_path)
  assert "average.ema" in reader.items(0)
  np.testing.assert_array_equal(reader.restore_item("average.ema", abstract.params["model"], 0)["w"], real.averages["ema"]["w"])


def chosen(average):
  read = []
  names = (*METHOD.roles, *METHOD.averages)
  weights = LazyWeights({name: lambda name=name: read.append(name) or name for name in names})
  found = choose_average(METHOD, weights, "sft", average)
  return METHOD.deployed(found)["mlp"], found["model"], found["fake"], read


def test_the_average_that_draws_is_chosen_and_nothing_else_is_read():
  assert chosen(None) == ("ema", "model", "fake", ["ema", "model", "fake"])  # what the method deploys
  assert chosen("") == ("model", "model", "fake", ["model", "fake"])
  assert chosen("slow") == ("slow", "slow", "fake", ["slow", "fake"])
  with pytest.raises(ValueError, match="Stage sft keeps no averaged weights 'fast': choose one of ema, slow"):
    chosen("fast")
