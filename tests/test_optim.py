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
  new, _, _, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), optimizer.init(params), params)
  for part in new.values():
    np.testing.assert_allclose(part["w"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(part["b"], 1)


@pytest.mark.parametrize("clip_norm", [1.0, 1e9])
@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_it_is_optax_adamw_on_clipped_gradients(clip_norm, mu_dtype):
  cfg = optim.Config(learning_rate=0.1, warmup_steps=3, weight_decay=0.3, clip_norm=clip_norm, mu_dtype=mu_dtype, b1=0.8, b2=0.9, eps=1e-3)
  specs = {"one": LINEAR, "other": LINEAR}
  optimizer, new = optim.make_optimizer(cfg, 10, specs), {role: P.init(LINEAR, jax.random.key(i)) for i, role in enumerate(specs)}
  theirs, own, its = new, optimizer.init(new), optimizer.chain.init(new)
  assert jax.tree.structure(own.adam) == jax.tree.structure(its)
  # A step is 0.1 long. optax rounds once more: it multiplies the old moment in bfloat16.
  rtol, atol = (2e-5, 0) if mu_dtype == "float32" else (1e-3, 1e-3)
  for k in range(5):
    grads = jax.tree.map(lambda x, k=k: 3 * jax.random.normal(jax.random.fold_in(jax.random.key(7), k), x.shape), new)
    direction, its = optimizer.chain.update(grads, its, theirs)
    steps = jax.tree.map(lambda x, k=k: -0.1 * min(1, (k + 1) / 3) * x, direction)
    theirs = optax.apply_updates(theirs, steps)
    new, own, metrics, good = optimizer.update(grads, jnp.zeros(()), own, new)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), new, theirs)
    norms = {"grad_norm": grads, "update_norm": steps, "param_norm": theirs}
    np.testing.assert_allclose([metrics[name] for name in norms], [optax.tree.norm(tree) for tree in norms.values()], rtol=rtol, atol=atol)
    assert good and metrics["learning_rate"] == optim.learning_rate(own.rate, k)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=2e-5, atol=8e-3 * (a.dtype == jnp.bfloat16)),
               own.adam, its)
  assert {x.dtype.name for x in jax.tree.leaves(own.adam[1].mu)} == {mu_dtype} and int(own.count) == 5


def test_a_loss_sees_matrices_in_the_type_in_which_their_gradients_are_summed():
  """So that it is the one in which they leave the products; vectors stay as they are."""
  weights = {"one": P.init(LINEAR, jax.random.key(0)), "many": P.init(P.stack(LINEAR, 2), jax.random.key(0))}
  specs = {"one": LINEAR, "many": P.stack(LINEAR, 2)}
  for dtype in ("float32", "bfloat16"):
    optimizer = optim.make_optimizer(optim.Config(gradient_dtype=dtype), 10, specs)
    seen = optimizer.seen(weights)
    assert all(tree["w"].dtype == dtype and tree["b"].dtype == "float32" for tree in seen.values())
    slope = jax.grad(lambda w: sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(optimizer.seen(w))))(weights)
    assert {x.dtype.name for x in jax.tree.leaves(slope)} == {"float32"}


@pytest.mark.parametrize("gradient, loss", [(np.nan, 0.0), (np.inf, 0.0), (1e30, 0.0), (1.0, np.nan), (1.0, np.inf)])  # squares of 1e30 overflow
@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_a_gradient_or_a_loss_that_is_not_finite_changes_nothing(mu_dtype, gradient, loss):
  optimizer, weights = optim.make_optimizer(optim.Config(mu_dtype=mu_dtype), 10, {"one": LINEAR}), {"one": P.init(LINEAR, jax.random.key(0))}
  weights, before, _, good = optimizer.update(jax.tree.map(jnp.ones_like, weights), jnp.zeros(()), optimizer.init(weights), weights)
  assert good and int(before.count) == 1
  grads = jax.tree.map(lambda x: jnp.ones_like(x).at[0].set(gradient), weights)
  new, after, _, good = optimizer.update(grads, jnp.float32(loss), before, weights)
  assert not good
  jax.tree.map(np.testing.assert_array_equal, (new, after), (weights, before))


@pytest.mark.parametrize("fields, message", [({"schedule": "step"}, "optimizer.schedule is 'step'"), ({"learning_rate": 0.0}, "must be above 0"),
                                             ({"gradient_dtype": "float16"}, "optimizer.gradient_dtype is 'float16'")])
def test_optimizer_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    optim.Config(**fields)
