"""The one train step, on a linear regression whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qimg2 import params as P
from qimg2 import sharding
from qimg2.algorithms import Algorithm
from qimg2.training import optim, state

SPECS = {"model": {"w": P.Param((4, 3), ("embed", "mlp"), P.normal(1.0)), "b": P.Param((3,), (None,), P.normal(1.0))},
         "critic": {"w": P.Param((4, 3), ("embed", "mlp"), P.normal(1.0)), "b": P.Param((3,), (None,), P.normal(1.0))}}
SETTINGS = optim.Config(learning_rate=1e-2, weight_decay=0.0, clip_norm=1e9)


def squared(role):
  def loss(params, nets, batch, key):
    error = batch["x"] @ params[role]["w"] + params[role]["b"] - batch["y"]
    return jnp.mean(jnp.square(error)), {"noise": jax.random.normal(key, ())}
  return loss


def make(algorithm, settings=SETTINGS, num_steps=100):
  """(initial state, compiled step)."""
  optimizers = state.make_optimizers(algorithm, SPECS, settings, num_steps)
  params = {role: P.init(SPECS[role], jax.random.key(0)) for role in algorithm.losses}
  first = state.init_state(algorithm, optimizers, params, {}, jax.random.key(7))
  return first, jax.jit(state.make_step(algorithm, optimizers, None, settings.accumulate))


def batch(rows=8, seed=0):
  rng = np.random.default_rng(seed)
  return {"x": rng.normal(size=(rows, 4)).astype(np.float32), "y": rng.normal(size=(rows, 3)).astype(np.float32)}


ONE = Algorithm(losses={"model": squared("model")})


def test_loss_falls_and_noise_is_a_function_of_the_step():
  now, step = make(ONE)
  losses, noises = [], []
  for _ in range(50):
    now, metrics = step(now, {}, batch())
    losses.append(float(metrics["loss"]))
    noises.append(float(metrics["noise"]))
  assert losses[-1] < 0.7 * losses[0] and int(now.step) == 50
  assert len(set(noises)) == 50
  assert float(step(make(ONE)[0].replace(step=jnp.int32(7)), {}, batch())[1]["noise"]) == noises[7]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_whole_batch(accumulate):
  now, step = make(ONE)
  split, split_step = make(ONE, dataclasses.replace(SETTINGS, accumulate=accumulate))
  for k in range(3):
    now, whole = step(now, {}, batch(seed=k))
    split, parts = split_step(split, {}, batch(seed=k))
    np.testing.assert_allclose([parts["loss"], parts["grad_norm"]], [whole["loss"], whole["grad_norm"]], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), split.params, now.params)


def test_slow_copy_follows_with_its_decay():
  now, step = make(dataclasses.replace(ONE, track={"ema": ("model", 0.9)}))
  for k in range(200):
    before, (now, _) = now, step(now, {}, batch(seed=k))
    decay = min(0.9, (1 + k) / (10 + k))
    expected = decay * before.slow["ema"]["w"] + (1 - decay) * now.params["model"]["w"]
    np.testing.assert_allclose(now.slow["ema"]["w"], expected, rtol=1e-4, atol=1e-6)


def test_a_role_can_be_updated_more_rarely():
  algorithm = Algorithm(losses={"model": squared("model"), "critic": squared("critic")}, every={"model": 3})
  now, step = make(algorithm)
  moved = []
  for k in range(6):
    before, (now, metrics) = now, step(now, {}, batch(seed=k))
    moved.append(tuple(bool((now.params[role]["w"] != before.params[role]["w"]).any()) for role in ("model", "critic")))
    assert np.isnan(metrics["model/loss"]) == (k % 3 != 0) and np.isfinite(metrics["critic/loss"])
  assert moved == [(k % 3 == 0, True) for k in range(6)]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])  # the last one overflows in the loss
def test_an_update_without_numbers_changes_nothing_but_the_step(accumulate, value):
  algorithm = dataclasses.replace(ONE, track={"ema": ("model", 0.9)})
  now, step = make(algorithm, dataclasses.replace(SETTINGS, accumulate=accumulate))
  now, metrics = step(now, {}, batch())
  assert metrics["skipped"] == 0
  bad = batch(seed=1)
  bad["x"][3, 1] = value
  after, metrics = step(now, {}, bad)
  assert metrics["skipped"] == 1 and int(after.step) == 2
  raw = lambda x: np.asarray(x).tobytes()
  for part in ("params", "opt", "slow"):
    assert jax.tree.map(raw, getattr(after, part)) == jax.tree.map(raw, getattr(now, part))
  again, metrics = step(after, {}, batch(seed=2))
  assert metrics["skipped"] == 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(again.params))


def test_a_role_without_numbers_holds_up_no_other():
  def broken(params, nets, data, key):
    loss, metrics = squared("critic")(params, nets, data, key)
    return jnp.where(jnp.any(data["y"] > 90), jnp.nan, 1.0) * loss, metrics
  algorithm = Algorithm(losses={"model": squared("model"), "critic": broken}, every={"model": 2},
                        track={"m": ("model", 0.5), "c": ("critic", 0.5)})
  now, step = make(algorithm)
  for k, bad in enumerate((False, True, True, False)):
    data = batch(seed=k)
    data["y"][0, 0] = 99 if bad else 0
    before, (now, metrics) = now, step(now, {}, data)
    moved = [bool((now.params[role]["w"] != before.params[role]["w"]).any()) for role in ("model", "critic")]
    assert moved == [k % 2 == 0, not bad] and metrics["skipped"] == bad and int(now.step) == k + 1
    assert bool((now.slow["c"]["w"] != before.slow["c"]["w"]).any()) == (not bad)


def test_frozen_roles_are_seen_and_experience_replaces_the_batch():
  def experience(params, nets, batch, key):
    return {**batch, "y": params["teacher"] + jnp.zeros_like(batch["y"])}
  now, step = make(dataclasses.replace(ONE, frozen=("teacher",), experience=experience))
  for k in range(400):
    now, metrics = step(now, {"teacher": jnp.array([1.0, 2.0, 3.0])}, batch(seed=k))
  assert float(metrics["loss"]) < 0.05
  np.testing.assert_allclose(now.params["model"]["b"], [1, 2, 3], atol=0.2)


def test_abstract_state_has_the_shapes_of_the_real_one():
  mesh, rules = sharding.make_mesh({"fsdp": 4, "data": 2}), sharding.RULES["fsdp_tensor"]
  algorithm = dataclasses.replace(ONE, track={"ema": ("model", 0.9)})
  optimizers = state.make_optimizers(algorithm, SPECS, SETTINGS, 10)
  abstract = state.abstract_state(algorithm, optimizers, SPECS, mesh, rules)
  real, _ = make(algorithm)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
  weights = abstract.params["model"]["w"].sharding
  moments = [x for x in jax.tree.leaves(abstract.opt) if x.shape == (4, 3)]
  assert len(moments) == 2 and all(x.sharding == weights for x in moments) and "fsdp" in weights.spec


# The optimizer.


def rates(num_steps=10, **fields):
  schedule = optim.learning_rate(optim.Config(learning_rate=1.0, **fields), num_steps)
  return np.array([schedule(k) for k in range(num_steps + 1)])


def test_schedules():
  np.testing.assert_allclose(rates(), 1)
  np.testing.assert_allclose(rates(warmup_steps=4)[:6], [0.25, 0.5, 0.75, 1, 1, 1])
  np.testing.assert_allclose(rates(schedule="linear", final_ratio=0.2)[[0, 5, 10]], [1, 0.6, 0.2], rtol=1e-6)
  cosine = rates(schedule="cosine", warmup_steps=2, final_ratio=0.1)
  np.testing.assert_allclose(cosine[[2, 6, 10]], [1, 0.55, 0.1], rtol=1e-6)


def test_weight_decay_leaves_vectors_alone_stacked_or_not():
  specs = {"one": SPECS["model"], "many": P.stack(SPECS["model"], 2)}
  optimizer = optim.make_optimizer(optim.Config(learning_rate=0.1, weight_decay=0.5), 10, specs)
  params = jax.tree.map(lambda p: jnp.ones(p.shape), specs, is_leaf=P.is_param)
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
  for part in updates.values():
    np.testing.assert_allclose(part["w"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(part["b"], 0)


def test_gradients_are_clipped_by_their_global_norm():
  optimizer = optim.make_optimizer(optim.Config(clip_norm=1.0), 10, SPECS["model"])
  reference = optim.make_optimizer(optim.Config(clip_norm=1e9), 10, SPECS["model"])
  params = P.init(SPECS["model"], jax.random.key(0))
  grads = jax.tree.map(lambda x: 100 * jnp.ones_like(x), params)
  scaled = jax.tree.map(lambda g: g / optax.global_norm(grads), grads)
  first = optimizer.update(grads, optimizer.init(params), params)[1]
  second = reference.update(scaled, reference.init(params), params)[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), first, second)


@pytest.mark.parametrize("fields, message", [({"schedule": "step"}, "optimizer.schedule is 'step'"), ({"learning_rate": 0.0}, "must be above 0")])
def test_optimizer_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    optim.Config(**fields)
