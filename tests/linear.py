"""Methods on a linear regression whose answers are known, and the one train step around them."""

import jax
import jax.numpy as jnp
import numpy as np

from qimg2 import params as P
from qimg2.algorithms import Algorithm, Average, Role, Update
from qimg2.training import optim, state

LINEAR = {"w": P.Param((4, 3), ("embed", "mlp"), P.normal(1.0)), "b": P.Param((3,), (None,), P.normal(1.0))}
SETTINGS = optim.Config(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)


def squared(role):
  def loss(trained, params, nets, batch, key):
    del params, nets
    error = batch["x"] @ trained[role]["w"] + trained[role]["b"][None] - batch["y"]
    return jnp.mean(jnp.square(error), axis=1), {"noise": jax.random.normal(key, ()), "largest": jnp.max(jnp.abs(error), axis=1)}
  return loss


def update(role, **fields):
  return Update((role,), squared(role), **fields)


def algorithm(*updates, averages={}, **fields):
  roles = {role: Role("linear") for one in updates for role in one.roles}
  return Algorithm(roles, updates, averages, deploy=lambda weights: {"linear": weights["model"]}, **fields)


ONE = algorithm(update("model"))
MEAN = algorithm(update("model"), averages={"ema": Average("model", 0.9)})


def make(method, settings=SETTINGS, num_steps=100, averages={}, own=None, split=False):
  """(initial state, compiled step, or with `split` one that is a program for each micro-batch and one for the update)."""
  specs = {role: LINEAR for role in method.roles}
  optimizers = state.make_optimizers(method, specs, settings, num_steps, own)
  params = {role: P.init(LINEAR, jax.random.key(0)) for role in method.trained}
  first = state.init_state(method, optimizers, params, averages, jax.random.key(7))
  if not split:
    return first, jax.jit(state.make_step(method, optimizers, None, settings.accumulate))
  begin, add, end = map(jax.jit, state.make_split_step(method, optimizers, None, settings.accumulate))

  def step(now, frozen, batch):
    sums = begin(now, frozen, batch)
    for _ in range(settings.accumulate):
      sums, _ = add(now, frozen, batch, sums)
    return end(now, sums)
  return first, step


def batch(rows=8, seed=0):
  rng = np.random.default_rng(seed)
  return {"x": rng.normal(size=(rows, 4)).astype(np.float32), "y": rng.normal(size=(rows, 3)).astype(np.float32)}
