"""The optimizer: its schedules, clipping and weight decay, against numbers known by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import LINEAR, MEAN, SETTINGS, algorithm, batch, make, update

from qimg2 import params as P
from qimg2.algorithms import Average
from qimg2.training import optim, state


def rates(num_steps=10, **fields):
  rate = optim.make_rate(optim.Config(**{"learning_rate": 1.0, "warmup_steps": 0} | fields), num_steps)
  return np.array([optim.learning_rate(rate, k) for k in range(num_steps + 1)])


def test_schedules():
  np.testing.assert_allclose(rates(), 1)
  np.testing.assert_allclose(rates(warmup_steps=4)[:6], [0.25, 0.5, 0.75, 1, 1, 1])
  np.testing.assert_allclose(rates(schedule="linear", final_ratio=0.2)[[0, 5, 10]], [1, 0.6, 0.2], rtol=1e-6)
  cosine = rates(schedule="cosine", warmup_steps=2, final_ratio=0.1)
  np.testing.assert_allclose(cosine[[2, 6, 10]], [1, 0.55, 0.1], rtol=1e-6)


def test_runs_that_differ_in_rates_alone_share_one_program():
  def text(decay=0.9, num_steps=100, **fields):
    method = algorithm(update("model"), averages={"ema": Average("model", decay)})
    now, step = make(method, dataclasses.replace(SETTINGS, **fields), num_steps)
    return step.lower(now, {}, batch()).as_text()
  assert text() == text(learning_rate=3e-4, warmup_steps=7, schedule="cosine", final_ratio=0.1, num_steps=55, decay=0.999)
  assert text() != text(clip_norm=1.0)


def test_a_restored_state_takes_the_rates_of_its_config():
  old, _ = make(MEAN, SETTINGS)
  settings = dataclasses.replace(SETTINGS, learning_rate=0.125)
  optimizers = state.make_optimizers(MEAN, {"model": LINEAR}, settings, 100)
  slower = algorithm(update("model"), averages={"ema": Average("model", 0.5)})
  now = state.as_configured(old, slower, optimizers)
  assert now.opt["model"].rate.peak == 0.125 and now.average_states["ema"].decay == 0.5 and int(now.average_states["ema"].num_updates) == 0


def test_weight_decay_leaves_vectors_alone_stacked_or_not():
  specs = {"one": LINEAR, "many": P.stack(LINEAR, 2)}
  optimizer = optim.make_optimizer(optim.Config(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10, specs)
  params = jax.tree.map(lambda p: jnp.ones(p.shape), specs, is_leaf=P.is_param)
  updates, _, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
  for part in updates.values():
    np.testing.assert_allclose(part["w"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(part["b"], 0)


def test_gradients_are_clipped_by_their_global_norm():
  optimizer = optim.make_optimizer(optim.Config(clip_norm=1.0), 10, LINEAR)
  reference = optim.make_optimizer(optim.Config(clip_norm=1e9), 10, LINEAR)
  params = P.init(LINEAR, jax.random.key(0))
  grads = jax.tree.map(lambda x: 100 * jnp.ones_like(x), params)
  scaled = jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)
  first = optimizer.update(grads, optimizer.init(params), params)[1]
  second = reference.update(scaled, reference.init(params), params)[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), first.adam, second.adam)


@pytest.mark.parametrize("fields, message", [({"schedule": "step"}, "optimizer.schedule is 'step'"), ({"learning_rate": 0.0}, "must be above 0")])
def test_optimizer_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    optim.Config(**fields)
