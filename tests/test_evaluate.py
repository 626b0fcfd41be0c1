"""Validation: the mean of bin means over held-out rows, the same to the last bit every time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qimg2 import flow
from qimg2.algorithms import Algorithm, Role, Update
from qimg2.algorithms.flow_matching import NUM_TIME_BINS, flow_matching, time_bins
from qimg2.algorithms.reconstruction import reconstruction
from qimg2.training.validation import Evaluator


def method(validation, num_bins):
  return Algorithm({"model": Role("linear")}, (Update(("model",), lambda *_: None),), validation=validation, num_bins=num_bins)


def test_mean_of_bin_means_without_filler(caplog):
  validation = lambda params, nets, batch, key: ({"loss": params["scale"] * batch["x"]}, batch["bin"])
  rows = lambda x, bins, weight: {"x": jnp.array(x, jnp.float32), "bin": jnp.array(bins), "weight": jnp.array(weight, jnp.float32)}
  batches = [rows([1, 2, 3], [0, 1, 1], [1, 1, 1]), rows([6, 100, 100], [0, 0, 1], [1, 0, 0])]
  result = Evaluator(method(validation, 2), None, batches)({"scale": 2.0})
  assert result == {"val_loss": pytest.approx(6.0), "val_loss_bin0": pytest.approx(7.0), "val_loss_bin1": pytest.approx(5.0)}
  with_empty = Evaluator(method(validation, 3), None, batches)
  assert with_empty({"scale": 2.0}) == with_empty({"scale": 2.0}) == result
  assert [text for text in caplog.messages if "4 evaluation samples fall into 2 of 3 time bins" in text] == caplog.messages[-1:]
  with pytest.raises(ValueError, match="None of the evaluation samples can be used"):
    Evaluator(method(validation, 2), None, [rows([1], [0], [0])])({"scale": 2.0})
  with pytest.raises(ValueError, match="no evaluation samples"):
    Evaluator(method(None, 1), None, [])


def test_losses_are_added_as_exactly_as_they_are():
  """What a TPU would make of the default cannot be seen here; the compiled sums say how they are to be added."""
  validation = lambda params, nets, batch, key: ({"loss": params["scale"] * batch["x"]}, batch["bin"])
  batch = {"x": jnp.ones(4), "bin": jnp.zeros(4, int), "weight": jnp.ones(4)}
  text = Evaluator(method(validation, 2), None, [batch])._sums.lower({"scale": 2.0}, batch).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  assert len(products) == 1 and "precision = [HIGHEST, HIGHEST]" in products[0]


class Nets:
  """Latents are the pixels; the velocity is a gain times x_t."""

  def target_latents(self, params, batch):
    return self.encode(params.get("vae"), batch["target"])

  def encode(self, params, pixels):
    return pixels

  def condition(self, params, batch):
    return None

  def velocity(self, params, x_t, t, cond):
    return params * x_t


def batch(ids, seed=0):
  x = np.random.default_rng(seed).normal(size=(64, 2, 2, 3)).astype(np.float32)
  return {"target": jnp.asarray(x[ids]), "sample_id": jnp.asarray(ids), "weight": jnp.ones(len(ids))}


PARAMS = {"model": jnp.float32(0.5), "encoder": None, "vae": None}


def test_flow_matching_validation_is_fixed_per_sample():
  algorithm = flow_matching(flow.Schedule(), ema_decay=0.0)
  whole = Evaluator(algorithm, Nets(), [batch(np.arange(32))])(PARAMS)
  assert whole == Evaluator(algorithm, Nets(), [batch(np.arange(32))])(PARAMS)
  assert len(whole) == 1 + NUM_TIME_BINS
  order = np.random.default_rng(1).permutation(32)
  shuffled = Evaluator(algorithm, Nets(), [batch(order[:8]), batch(order[8:])])(PARAMS)
  assert shuffled == pytest.approx(whole, rel=1e-6)
  # A known case: with v = 0 the loss is E|noise - x_0|², about 1 + |x_0|².
  zero = Evaluator(algorithm, Nets(), [batch(np.arange(64))])({**PARAMS, "model": jnp.float32(0)})
  assert zero["val_loss"] == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize("first", [0, 2**30, 2**31 - 256])
def test_time_bins_are_even_for_neighbours_and_spread_structured_ids(first):
  bins = np.asarray(time_bins(jnp.arange(256, dtype=jnp.int32) + first))
  assert all(sorted(block) == list(range(8)) for block in bins.reshape(-1, 8))
  variants = np.asarray(time_bins(jnp.arange(32, dtype=jnp.int32) * 8 + first % 8))  # one variant of eight per picture
  assert np.bincount(variants, minlength=8).min() >= 1


def test_flow_matching_loss_is_the_mean_over_its_times():
  algorithm = flow_matching(flow.Schedule(shift="none", density="uniform"), ema_decay=0.0)
  loss = jax.jit(lambda key: jnp.mean(algorithm.updates[0].loss(PARAMS, PARAMS, Nets(), batch(np.arange(64)), key)[0]))
  mean = np.mean([loss(key) for key in jax.random.split(jax.random.key(0), 200)])
  # v = x_t / 2: E over t of (t/2 - 1)² Var(noise) + ((1 - t)/2 + 1)² E[x_0²].
  power = float(np.mean(np.square(batch(np.arange(64))["target"])))
  expected = np.mean([(t / 2 - 1) ** 2 + ((1 - t) / 2 + 1) ** 2 * power for t in np.linspace(0, 1, 1001)])
  assert mean == pytest.approx(expected, rel=0.03)


class Identity:
  """An autoencoder that adds `params` to every value."""

  def autoencode(self, params, pixels, key=None):
    original = pixels / 127.5 - 1
    class Posterior:
      mode = mean = original
    return original + params["shift"], original, Posterior


def test_reconstruction_metrics_and_statistics():
  pixels = np.random.default_rng(0).uniform(60, 200, (8, 4, 4, 3)).astype(np.float32)
  rows = {"target": jnp.asarray(pixels), "sample_id": jnp.arange(8), "weight": jnp.ones(8)}
  zero = {"mean": jnp.zeros(3), "std": jnp.ones(3)}
  algorithm = reconstruction(l1_weight=0.5, l2_weight=2.0)
  params = {"vae": {"shift": jnp.float32(0.1), "statistics": zero}}
  loss, _ = algorithm.updates[0].loss(params, params, Identity(), rows, jax.random.key(0))
  np.testing.assert_allclose(loss, np.full(8, 0.5 * 0.1 + 2 * 0.01), rtol=1e-3)
  result = Evaluator(algorithm, Identity(), [rows])(params)
  assert result["val_psnr_db"] == pytest.approx(10 * np.log10(4 / 0.01), abs=0.01) and result["val_loss"] == pytest.approx(0.1, rel=1e-3)
  measured = algorithm.finalize(params, Identity(), [rows])["vae"]["statistics"]
  latents = pixels / 127.5 - 1
  np.testing.assert_allclose(measured["mean"], latents.mean((0, 1, 2)), rtol=1e-4)
  np.testing.assert_allclose(measured["std"], latents.std((0, 1, 2)), rtol=1e-4)
