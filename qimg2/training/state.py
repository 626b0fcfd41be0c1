"""The train state, and the one train step that all algorithms share."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from qimg2 import params as P
from qimg2.algorithms import Algorithm
from qimg2.sharding import Rules, param_shardings, replicated
from qimg2.training import optim

Optimizers = Mapping[str, optax.GradientTransformation]


@flax.struct.dataclass
class TrainState:
  """All that changes while a stage trains.

  Attributes:
    step: int32, number of steps done, with those whose update was skipped.
    params: trained role -> weights.
    opt: trained role -> optimizer state.
    slow: name -> slow copy of a role's weights.
    key: the stage's PRNG key; step k uses fold_in(key, k).
  """
  step: jax.Array
  params: dict[str, Any]
  opt: dict[str, Any]
  slow: dict[str, Any]
  key: jax.Array


def make_optimizers(algorithm: Algorithm, specs: dict[str, dict], cfg: optim.Config, num_steps: int) -> Optimizers:
  """One optimizer per trained role."""
  return {role: optim.make_optimizer(cfg, num_steps, specs[role]) for role in algorithm.losses}


def init_state(algorithm: Algorithm, optimizers: Optimizers, params: dict[str, Any], slow: dict[str, Any], key: jax.Array) -> TrainState:
  """The state before the first step. Slow copies that `slow` does not bring start as copies of their role."""
  slow = {name: slow.get(name, params[role]) for name, (role, _) in algorithm.track.items()}
  opt = {role: optimizer.init(params[role]) for role, optimizer in optimizers.items()}
  return TrainState(jnp.zeros((), jnp.int32), params, opt, jax.tree.map(jnp.copy, slow), key)


def abstract_state(algorithm: Algorithm, optimizers: Optimizers, specs: dict[str, dict], mesh: jax.sharding.Mesh, rules: Rules) -> TrainState:
  """The state's shapes and shardings; optimizer moments lie as their weights do, everything else is replicated."""
  everywhere = replicated(mesh)
  shardings = {role: param_shardings(specs[role], mesh, rules) for role in optimizers}
  params = {role: P.abstract(specs[role], shardings[role]) for role in optimizers}
  shapes = jax.eval_shape(lambda p: init_state(algorithm, optimizers, p, {}, jax.random.key(0)), params)
  place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  opt = {role: optax.tree_utils.tree_map_params(optimizer, place, shapes.opt[role], shardings[role],
                                                transform_non_params=lambda leaf: place(leaf, everywhere))
         for role, optimizer in optimizers.items()}
  slow = {name: params[role] for name, (role, _) in algorithm.track.items()}
  return TrainState(place(shapes.step, everywhere), params, opt, slow, place(shapes.key, everywhere))


def make_step(algorithm: Algorithm, optimizers: Optimizers, nets: Any, accumulate: int = 1):
  """`step(state, frozen, batch) -> (state, metrics)`, a pure function to be compiled; metrics are float32 scalars.

  A role whose loss or whose gradient's global norm is no finite number keeps its weights, optimizer state and slow copies to the bit; the step
  counts all the same. The metric "skipped" says how many roles that were.
  """
  def step(state: TrainState, frozen: dict[str, Any], batch: dict):
    key = jax.random.fold_in(state.key, state.step)
    if algorithm.experience is not None:
      key, key_experience = jax.random.split(key)
      batch = algorithm.experience({**frozen, **state.params, **state.slow}, nets, batch, key_experience)
    params, opt, metrics, good = dict(state.params), dict(state.opt), {}, {}
    for number, (role, optimizer) in enumerate(sorted(optimizers.items())):
      gradient = _gradient(algorithm, nets, role, frozen, params, batch, jax.random.fold_in(key, number), accumulate)
      update = lambda: _update(optimizer, params[role], opt[role], gradient)
      every = algorithm.every.get(role, 1)
      if every == 1:
        params[role], opt[role], role_metrics, good[role] = update()
      else:
        skip = lambda: (params[role], opt[role], {name: jnp.full((), jnp.nan) for name in jax.eval_shape(update)[2]},
                        jnp.bool_(True))
        params[role], opt[role], role_metrics, good[role] = jax.lax.cond(state.step % every == 0, update, skip)
      prefix = "" if len(optimizers) == 1 else f"{role}/"
      metrics |= {prefix + name: value for name, value in role_metrics.items()}
    slow = {name: _choose(good[role], _track(state.slow[name], params[role], decay, state.step), state.slow[name])
            for name, (role, decay) in algorithm.track.items()}
    metrics["skipped"] = sum(1.0 - one.astype(jnp.float32) for one in good.values())
    return TrainState(state.step + 1, params, opt, slow, state.key), metrics
  return step


def _gradient(algorithm: Algorithm, nets: Any, role: str, frozen: dict, params: dict, batch: dict, key: jax.Array, accumulate: int):
  """A function of no arguments that gives (metrics, gradient) of one role, averaged over the micro-batches."""
  def objective(weights, micro, micro_key):
    value, metrics = algorithm.losses[role]({**frozen, **params, role: weights}, nets, micro, micro_key)
    return value, {"loss": value, **metrics}

  def one(micro, micro_key):
    (_, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(params[role], micro, micro_key)
    return metrics, gradient

  def accumulated():
    if accumulate == 1:
      return one(batch, key)
    # Row r goes to micro-batch r mod n, so that every micro-batch is spread over all devices.
    micros = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, accumulate)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], micros), keys[0]))
    total, _ = jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, one(*micro)), None), zero, (micros, keys))
    return jax.tree.map(lambda x: x / accumulate, total)
  return accumulated


def _update(optimizer: optax.GradientTransformation, weights: Any, opt: Any, gradient) -> tuple[Any, Any, dict, jax.Array]:
  """(weights, optimizer state, metrics, whether the update was made): the old ones where it was not."""
  metrics, grads = gradient()
  norm = optax.global_norm(grads)
  good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
  updates, new_opt = optimizer.update(grads, opt, weights)
  return _choose(good, optax.apply_updates(weights, updates), weights), _choose(good, new_opt, opt), {**metrics, "grad_norm": norm}, good


def _choose(good: jax.Array, new: Any, old: Any) -> Any:
  return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def _track(slow: Any, weights: Any, decay: float, step: jax.Array) -> Any:
  """slow + (1 - d)(weights - slow) with d = min(decay, (1 + step)/(10 + step)), so that early copies follow closely."""
  d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda s, w: s + (1 - d) * (w - s), slow, weights)
