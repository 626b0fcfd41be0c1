"""The train state, and the one train step that all methods share."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from qimg2 import params as P
from qimg2.algorithms import Algorithm, Average, Update
from qimg2.sharding import Rules, param_shardings, replicated
from qimg2.training import optim

Optimizers = Mapping[str, optim.Optimizer]
RESERVED = {"loss", "grad_norm", "update_norm", "param_norm", "learning_rate", "skipped"}  # metrics of every update
RESTORED = 2**30  # `num_updates` of an average that a stage took over from an earlier one: (1 + n)/(10 + n) is 1 in float32, no ramp


@flax.struct.dataclass
class AverageState:
  """State of an average: the `num_updates` that it made, int32, and its `decay`, float32, a value and no constant of the program."""
  num_updates: jax.Array
  decay: jax.Array


@flax.struct.dataclass
class TrainState:
  """All that changes while a stage trains.

  Attributes:
    step: int32, number of steps done, with those whose update was skipped.
    params: trained role -> weights.
    opt: name of an update -> `optim.OptState`.
    averages: name -> averaged weights of a role.
    average_states: name of an average -> `AverageState`.
    key: the stage's PRNG key; step k, counted from 0, uses fold_in(key, k).
  """
  step: jax.Array
  params: dict[str, Any]
  opt: dict[str, Any]
  averages: dict[str, Any]
  average_states: dict[str, AverageState]
  key: jax.Array


def make_optimizers(algorithm: Algorithm, specs: dict[str, dict], cfg: optim.Config, num_steps: int,
                    own: Mapping[str, optim.Config] | None = None) -> dict[str, optim.Optimizer]:
  """One optimizer per update of a stage of `num_steps`: with the settings that `own` has under the update's name, else the update's own, else `cfg`.

  Raises:
    ValueError: `own` names an update that the algorithm does not have, or one would never be due.
  """
  own = own or {}
  names = [update.name for update in algorithm.updates]
  if odd := sorted(set(own) - set(names)):
    raise ValueError(f"optimizers names the update {odd[0]!r}, which the algorithm does not have: it has {', '.join(names)}.")
  check_due(algorithm, num_steps)
  each = algorithm.rollout.num_minibatches if algorithm.rollout else 1
  return {update.name: optim.make_optimizer(own.get(update.name, update.optimizer or cfg), num_steps // update.every * each,
                                            {role: specs[role] for role in update.roles}) for update in algorithm.updates}


def check_due(algorithm: Algorithm, num_steps: int) -> None:
  """Whether a stage of `num_steps` is long enough for every update.

  Raises:
    ValueError: one would never be due.
  """
  if rare := [update for update in algorithm.updates if update.every > num_steps]:
    raise ValueError(f"Update {rare[0].name!r} is due at every {rare[0].every} steps, but the stage has {num_steps}: it would never run.")


def init_state(algorithm: Algorithm, optimizers: Optimizers, params: dict[str, Any], averages: dict[str, Any], key: jax.Array) -> TrainState:
  """The state before the first step. Averages that `averages` brings, restored from an earlier stage, go on without a ramp; the others start as
  copies of their role."""
  opt = {update.name: optimizers[update.name].init({role: params[role] for role in update.roles}) for update in algorithm.updates}
  average_states = {name: make_average_state(average, name in averages) for name, average in algorithm.averages.items()}
  averages = {name: averages.get(name, params[average.role]) for name, average in algorithm.averages.items()}
  return TrainState(jnp.zeros((), jnp.int32), params, opt, jax.tree.map(jnp.copy, averages), average_states, key)


def make_average_state(average: Average, restored: bool) -> AverageState:
  """The state of an average at the start of a stage."""
  over = restored or not average.ramp
  decay = 0.0 if callable(average.decay) else average.decay
  return AverageState(jnp.asarray(RESTORED if over else 0, jnp.int32), jnp.asarray(decay, jnp.float32))


def as_configured(state: TrainState, algorithm: Algorithm, optimizers: Optimizers) -> TrainState:
  """A restored state with the rates and decays of the config that goes on with it."""
  same = lambda new, old: jax.device_put(new, old.sharding)
  decay = lambda name: make_average_state(algorithm.averages[name], False).decay
  average_states = {name: own.replace(decay=same(decay(name), own.decay)) for name, own in state.average_states.items()}
  return state.replace(opt={name: optimizers[name].as_configured(opt) for name, opt in state.opt.items()}, average_states=average_states)


def abstract_state(algorithm: Algorithm, optimizers: Optimizers, specs: dict[str, dict], mesh: jax.sharding.Mesh, rules: Rules) -> TrainState:
  """The state's shapes and shardings; optimizer moments and averages are sharded as their weights are, everything else is replicated."""
  everywhere = replicated(mesh)
  shardings = {role: param_shardings(specs[role], mesh, rules) for role in algorithm.trained}
  params = {role: P.abstract(specs[role], shardings[role]) for role in algorithm.trained}
  shapes = jax.eval_shape(lambda p: init_state(algorithm, optimizers, p, {}, jax.random.key(0)), params)
  place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  replicate = lambda tree: jax.tree.map(lambda leaf: place(leaf, everywhere), tree)

  def place_opt(update: Update) -> optim.OptState:
    state, own = shapes.opt[update.name], {role: shardings[role] for role in update.roles}
    adam = optax.tree_utils.tree_map_params(optimizers[update.name].chain, place, state.adam, own,
                                            transform_non_params=lambda leaf: place(leaf, everywhere))
    return optim.OptState(replicate(state.count), replicate(state.rate), adam)

  opt = {update.name: place_opt(update) for update in algorithm.updates}
  averages = {name: params[average.role] for name, average in algorithm.averages.items()}
  return TrainState(replicate(shapes.step), params, opt, averages, replicate(shapes.average_states), replicate(shapes.key))


def make_step(algorithm: Algorithm, optimizers: Optimizers, nets: Any, accumulate: int = 1):
  """`step(state, frozen, batch) -> (state, metrics)`, a pure function to be compiled; metrics are float32 scalars.

  With a rollout, `batch` is what its `minibatches` gave, [K, B', ...], and every due update runs once in each of the K; metrics are means over those
  with a row of positive weight. An update whose loss or whose gradient's global norm is not finite keeps its weights, optimizer state and averages to
  the bit; the step counts all the same. The metric "skipped" says how many updates that were. Metrics of an update that is not due are NaN;
  `due_metrics` leaves them out.
  """
  gradient = functools.partial(_gradient, nets, accumulate)

  def step(state: TrainState, frozen: dict[str, Any], batch: dict):
    return _step(algorithm, optimizers, gradient, state, frozen, batch)
  return step


def make_split_step(algorithm: Algorithm, optimizers: Optimizers, nets: Any, accumulate: int):
  """`make_step` in three pure functions, between which the state is that of the step before:

    begin(state, frozen, batch) -> sums              zeros, of the types of what is added to them
    add(state, frozen, batch, sums) -> (sums, done)  with the metrics and the gradient of the next micro-batch; `done` counts them
    end(state, sums) -> (state, metrics)             the update, after `accumulate` of them

  `sums` is (int32 number of micro-batches, metrics, gradient {role: tree}).

  Raises:
    ValueError: see `check_split`.
  """
  check_split(algorithm)
  update, = algorithm.updates
  divide = lambda state, frozen, batch: _divide(
      nets, accumulate, update, optimizers[update.name], {role: state.params[role] for role in update.roles},
      {**frozen, **state.averages, **state.params}, batch, jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0))

  def step_begin(state: TrainState, frozen: dict[str, Any], batch: dict):
    return jnp.int32(0), *_zeros(*divide(state, frozen, batch))

  def step_add(state: TrainState, frozen: dict[str, Any], batch: dict, sums: tuple):
    number, *sums = sums
    one, parts = divide(state, frozen, batch)
    part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), parts)
    return (number + 1, *jax.tree.map(jnp.add, tuple(sums), one(*part))), number + 1

  def step_end(state: TrainState, sums: tuple):
    return _step(algorithm, optimizers, lambda *_: jax.tree.map(lambda x: x / accumulate, sums[1:]), state, {}, {})
  return step_begin, step_add, step_end


def check_split(algorithm: Algorithm) -> None:
  """Whether a method's steps can be cut between micro-batches.

  Raises:
    ValueError: they cannot, because it has several updates, or one that is not due at each step, or a rollout.
  """
  if len(algorithm.updates) > 1 or algorithm.updates[0].every > 1 or algorithm.rollout is not None:
    raise ValueError("faults.stop_after is 'micro_batch', which is for methods without a rollout and with one update, due at every step: "
                     "say 'step'.")


def _step(algorithm: Algorithm, optimizers: Optimizers, gradient, state: TrainState, frozen: dict[str, Any], batch: dict) -> tuple[TrainState, dict]:
  """One step, of which `gradient(update, optimizer, trained, params, batch, key)` gives (metrics, gradient) of each update."""
  key = jax.random.fold_in(state.key, state.step)
  run = _updates(algorithm, optimizers, gradient, {**frozen, **state.averages}, state.step + 1)
  carry = (state.params, state.opt, {role: jnp.bool_(False) for role in algorithm.trained})
  if algorithm.rollout is None:
    (params, opt, moved), metrics = run(carry, (batch, key))
  else:
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(jax.tree.leaves(batch)[0].shape[0]))
    (params, opt, moved), each = jax.lax.scan(run, carry, (batch, keys))
    metrics = _of_minibatches(each, batch.get("weight"))
  averages, average_states = _average(algorithm, state, params, moved)
  return TrainState(state.step + 1, params, opt, averages, average_states, state.key), metrics


def _updates(algorithm: Algorithm, optimizers: Optimizers, gradient, fixed: dict, step: jax.Array):
  """`run((params, optimizer states, role -> whether it moved), (batch, key)) -> (the same after all updates due in `step`, metrics)`."""
  def run(carry, part):
    (params, opt, moved), (batch, key) = map(dict, carry), part
    metrics, skipped = {}, jnp.zeros(())
    for number, update in enumerate(algorithm.updates):
      old, own_opt = {role: params[role] for role in update.roles}, opt[update.name]
      act = functools.partial(_update, gradient, update, optimizers[update.name], {**fixed, **params}, old, own_opt, batch,
                              jax.random.fold_in(key, number))
      due = jnp.bool_(True) if update.every == 1 else step % update.every == 0
      if update.every == 1:
        new, opt[update.name], own, good = act()
      else:
        nothing = {name: jnp.full((), jnp.nan) for name in jax.eval_shape(act)[2]}
        new, opt[update.name], own, good = jax.lax.cond(due, act, lambda old=old, opt=own_opt, nothing=nothing: (old, opt, nothing, jnp.bool_(True)))
      params |= new
      moved |= {role: moved[role] | (good & due) for role in update.roles}
      prefix = "" if len(algorithm.updates) == 1 else f"{update.name}/"
      metrics |= {prefix + name: value for name, value in own.items()}
      skipped += 1.0 - good.astype(jnp.float32)
    return (params, opt, moved), {**metrics, "skipped": skipped}
  return run


def due_metrics(algorithm: Algorithm, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
  """The metrics of the `step`-th step, counted from 1, without those of updates that it did not run."""
  if len(algorithm.updates) == 1:
    return dict(metrics) if list(algorithm.due(step)) else {"skipped": metrics["skipped"]}
  idle = tuple(f"{update.name}/" for update in algorithm.updates if step % update.every)
  return {name: value for name, value in metrics.items() if not name.startswith(idle)} if idle else dict(metrics)


def _update(gradient, update: Update, optimizer: optim.Optimizer, params: dict, old: dict, opt: optim.OptState, batch: dict,
            key: jax.Array) -> tuple[dict, optim.OptState, dict, jax.Array]:
  """({role: weights}, optimizer state, metrics, whether the update was made): the old ones where it was not."""
  metrics, grads = gradient(update, optimizer, old, params, batch, key)
  new, new_opt, own, good = optimizer.update(grads, metrics["loss"], opt, old)
  return new, new_opt, metrics | own, good


def _gradient(nets: Any, accumulate: int, update: Update, optimizer: optim.Optimizer, trained: dict, params: dict, batch: dict,
              key: jax.Array) -> tuple[dict, dict]:
  """(metrics, gradient) of the mean loss over the batch, in micro-batches."""
  one, parts = _divide(nets, accumulate, update, optimizer, trained, params, batch, key)
  if accumulate == 1:
    return one(*parts)
  sums, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, one(*part)), None), _zeros(one, parts), parts)
  return jax.tree.map(lambda x: x / accumulate, sums)


def _zeros(one, parts: tuple) -> tuple[dict, dict]:
  """Sums of what `one` gives for each of the stacked `parts`, before the first."""
  shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], parts))
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _divide(nets: Any, accumulate: int, update: Update, optimizer: optim.Optimizer, trained: dict, params: dict, batch: dict, key: jax.Array):
  """(function of a micro-batch and its key that gives the metrics and the gradient whose means are those of the batch; the micro-batches and their
  keys, stacked, or for one micro-batch as they are). The loss sees `optimizer.seen(trained)`."""
  num = jax.tree.leaves(batch)[0].shape[0]
  if num % accumulate:
    raise ValueError(f"A batch of {num} rows cannot be divided into {accumulate} micro-batches: change batch_size, or optimizer.accumulate "
                     "or config.micro_batches.")
  if "weight" in batch:
    batch = _without_left_out(batch)
  total = jnp.sum(batch["weight"]) / accumulate if "weight" in batch else None

  def one(micro, micro_key):
    def objective(weights):
      per_example, metrics = update.loss(optimizer.seen(weights), params, nets, micro, micro_key)
      mean = lambda x: x if jnp.ndim(x) == 0 else _mean(x, micro.get("weight"), total)
      if jnp.shape(per_example) != (num // accumulate,):
        raise ValueError(f"The loss gives {jnp.shape(per_example)}: it must be one number for each of the {num // accumulate} examples, whose "
                         "weighted mean is taken here.")
      value = mean(per_example * micro.get("loss_weight", 1.0))
      if odd := sorted(RESERVED & set(metrics)):
        raise ValueError(f"The loss gives a metric {odd[0]!r}, which is the step's own name: choose another.")
      return value, {name: jnp.asarray(x, jnp.float32) for name, x in {"loss": value, **jax.tree.map(mean, metrics)}.items()}
    (_, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(trained)
    return metrics, gradient

  if accumulate == 1:
    return one, (batch, key)
  # Row r goes to micro-batch r mod n, so that every micro-batch is spread over all devices.
  return one, (jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch), jax.random.split(key, accumulate))


def _without_left_out(batch: dict) -> dict:
  """`batch` in which rows of weight 0 hold what the row of the largest weight does: what is not finite there would come back through the gradient,
  where 0 times NaN is NaN."""
  weight, best = batch["weight"], jnp.argmax(batch["weight"])
  keep = lambda x: jnp.where(jnp.expand_dims(weight > 0, tuple(range(1, x.ndim))), x, jax.lax.dynamic_slice_in_dim(x, best, 1))
  return {name: x if name == "weight" else jax.tree.map(keep, x) for name, x in batch.items()}


def _mean(per_example: jax.Array, weight: jax.Array | None, total: jax.Array | None) -> jax.Array:
  """The mean over examples, weighted by `weight` [B] of sum `total`; NaN where all weights are 0 or one is negative, so that the update is
  skipped."""
  if weight is None:
    return jnp.mean(per_example)
  weight = jnp.where(weight < 0, jnp.nan, weight)
  return jnp.sum(jnp.where(weight == 0, 0.0, per_example) * weight) / total


def _of_minibatches(each: Mapping[str, jax.Array], weight: jax.Array | None) -> dict[str, jax.Array]:
  """The metrics of a step from those of its minibatches [K]: means, and the sum of "skipped". A minibatch without a row to learn from, all of whose
  `weight` [K, B'] is 0, has no say, unless all are such."""
  some = jnp.ones_like(each["skipped"]) if weight is None else jnp.any(weight != 0, axis=1).astype(jnp.float32)
  some = jnp.where(jnp.any(some), some, 1.0)
  sums = {name: jnp.sum(jnp.where(some > 0, x, 0.0)) for name, x in each.items()}
  return {name: x if name == "skipped" else x / jnp.sum(some) for name, x in sums.items()}


def _average(algorithm: Algorithm, state: TrainState, params: dict, moved: dict[str, jax.Array]) -> tuple[dict, dict]:
  """(averages, average_states) after a step that gave `params` and moved the roles in `moved`."""
  averages, average_states = {}, {}
  for name, average in algorithm.averages.items():
    own, old = state.average_states[name], state.averages[name]
    decay = average.decay(state.step) if callable(average.decay) else own.decay
    d = jnp.minimum(decay, (1.0 + own.num_updates) / (10.0 + own.num_updates))
    follow = moved[average.role] if average.every == 1 else (state.step + 1) % average.every == 0
    averages[name] = jax.tree.map(functools.partial(_mix, follow, d), old, params[average.role])
    average_states[name] = own.replace(num_updates=own.num_updates + jnp.where(follow & (own.num_updates < RESTORED), 1, 0))
  return averages, average_states


@jax.jit
def _mix(follow: jax.Array, decay: jax.Array, average: jax.Array, w: jax.Array) -> jax.Array:
  """One array of an average. A hard copy is a copy to the bit, which a + (w - a) need not be."""
  return jnp.where(follow, jnp.where(decay > 0, average + (1 - decay) * (w - average), w), average)
