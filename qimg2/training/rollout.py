"""What happens between two steps of a method that learns from its own samples: generate on the device, score, cut into minibatches.

All of it is a function of (state, batch, step): the key of step k is fold_in(fold_in(key, k), 2^31 - 1), so that a run that is killed anywhere
between two saves, in the rollout or while it scores, computes the same again. Every process scores the rows of its own devices.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qimg2.algorithms import Algorithm, Rollout
from qimg2.sharding import (
  Rules,
  batch_sharding,
  compile_options,
  first_of_equal_rows,
  local_rows,
  put_batch,
  replicated,
  stacked_batch_sharding,
)
from qimg2.training.programs import Part
from qimg2.training.state import TrainState

_FOLD = 2**31 - 1  # no step, so that the rollout draws other numbers than the updates


@dataclasses.dataclass(frozen=True)
class Programs:
  """The compiled programs of one bucket's rollout.

  Attributes:
    generate: (state, frozen, batch) -> samples.
    score: the method's own, on the host; or compiled (state, frozen, samples, batch) -> rewards.
    minibatches: (state, samples, rewards) -> (data of the step [K, B', ...], metrics).
    data: abstract data.
  """
  generate: Callable[..., dict]
  score: Callable[..., Any]
  minibatches: Callable[..., tuple[dict, dict]]
  data: dict
  rewards: tuple[str, ...]
  on_device: bool
  mesh: jax.sharding.Mesh
  rules: Rules

  def __call__(self, state: TrainState, frozen: dict, batch: dict, rows: dict) -> tuple[dict, dict]:
    """(data of the step, metrics) of one batch: global arrays `batch`, and `rows`, this process's rows of it as numpy arrays.

    Raises:
      ValueError: rewards that are not one number for each sample.
    """
    samples = self.generate(state, frozen, batch)
    if self.on_device:
      rewards = self.score(state, frozen, samples, batch)
    else:
      own = local_rows(samples)
      rewards = _checked(self.score(own, rows), self.rewards, own)
      rewards = put_batch({name: first_of_equal_rows(x, self.mesh, self.rules) for name, x in rewards.items()}, self.mesh, self.rules)
    return self.minibatches(state, samples, rewards)


@dataclasses.dataclass(frozen=True)
class RolloutParts:
  """The programs of one bucket's rollout that are not compiled yet, see `Programs`; `judge` is None for a score on the host.

  Attributes:
    data: abstract data of the step.
    num_samples: B, what the method's own score is asked for over all processes.
  """
  generate: Part
  judge: Part | None
  minibatches: Part
  data: dict
  num_samples: int


def compile_rollout(algorithm: Algorithm, nets: Any, abstract: TrainState, frozen: dict, batch: dict, mesh: jax.sharding.Mesh,
                    rules: Rules) -> Programs:
  """The programs of one bucket, compiled from abstract arguments.

  Raises:
    ValueError: as `rollout_parts`.
  """
  rollout, options = algorithm.rollout, compile_options(mesh)
  parts = rollout_parts(algorithm, nets, abstract, frozen, batch, mesh, rules)
  score = parts.judge.compile(options) if parts.judge else rollout.score
  return Programs(parts.generate.compile(options), score, parts.minibatches.compile(options), parts.data, rollout.rewards, rollout.on_device, mesh,
                  rules)


def rollout_parts(algorithm: Algorithm, nets: Any, abstract: TrainState, frozen: dict, batch: dict, mesh: jax.sharding.Mesh,
                  rules: Rules) -> RolloutParts:
  """What a rollout of one bucket compiles, from abstract arguments.

  Raises:
    ValueError: rewards, or minibatches, that are not those that the method declares, or rows that the mesh does not divide.
  """
  rollout, rows, stacked = algorithm.rollout, batch_sharding(mesh, rules), stacked_batch_sharding(mesh, rules)
  generate, judge, minibatches = _functions(rollout, nets)

  def shapes(fn, sharding, *arguments):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(fn, *arguments))

  samples = shapes(generate, rows, abstract, frozen, batch)
  _check_rows("samples", samples, 0, mesh, rules)
  num = jax.tree.leaves(samples)[0].shape[0]
  if rollout.on_device:
    given = shapes(judge, rows, abstract, frozen, samples, batch)
    if set(given) != set(rollout.rewards):
      raise ValueError(f"The score gives the rewards {', '.join(sorted(given))}, but the method declares {', '.join(rollout.rewards)}.")
  else:
    given = {name: jax.ShapeDtypeStruct((num,), jnp.float32, sharding=rows) for name in rollout.rewards}
  data = shapes(lambda *args: minibatches(*args)[0], stacked, abstract, samples, given)
  if (found := {x.shape[0] for x in jax.tree.leaves(data)}) != {rollout.num_minibatches}:
    raise ValueError(f"The rollout gives arrays of {', '.join(map(str, sorted(found)))} minibatches, but declares {rollout.num_minibatches}.")
  _check_rows("minibatches", data, 1, mesh, rules)
  jit = lambda fn, shardings: jax.jit(fn, out_shardings=shardings)
  return RolloutParts(
      Part(jit(generate, rows), (abstract, frozen, batch)),
      Part(jit(judge, rows), (abstract, frozen, samples, batch)) if rollout.on_device else None,
      Part(jit(minibatches, (stacked, replicated(mesh))), (abstract, samples, given), beside=(frozen, batch)), data, num)


def _functions(rollout: Rollout, nets: Any) -> tuple[Callable, Callable, Callable]:
  """What `Programs` has compiled, as functions of state and frozen weights: (generate, score on the device, minibatches)."""
  key = lambda state: jax.random.fold_in(jax.random.fold_in(state.key, state.step), _FOLD)
  weights = lambda state, frozen: {**frozen, **state.averages, **state.params}

  def generate(state, frozen, batch):
    return rollout.generate(weights(state, frozen), nets, batch, jax.random.fold_in(key(state), 0))

  def judge(state, frozen, samples, batch):
    return rollout.score(weights(state, frozen), nets, samples, batch)

  def minibatches(state, samples, rewards):
    finite = {name: jnp.isfinite(x) for name, x in rewards.items()}
    weight = jnp.prod(jnp.stack([x.astype(jnp.float32) for x in finite.values()]), axis=0)
    rewards = {name: jnp.where(finite[name], x, 0.0) for name, x in rewards.items()}
    data = rollout.minibatches({**samples, "rewards": rewards, "weight": weight}, jax.random.fold_in(key(state), 1))
    means = {f"reward/{name}": jnp.sum(x) / jnp.sum(finite[name]) for name, x in rewards.items()}
    return data, {**means, "reward/left_out": 1.0 - jnp.mean(weight)}

  return generate, judge, minibatches


def _check_rows(what: str, tree: dict, dim: int, mesh: jax.sharding.Mesh, rules: Rules) -> None:
  num_parts = math.prod(mesh.shape[axis] for axis in rules["batch"])
  odd = [x.shape[dim] for x in jax.tree.leaves(tree) if x.shape[dim] % num_parts]
  if odd:
    raise ValueError(f"The rollout's {what} have {odd[0]} rows, which the {num_parts} parts of the mesh's batch axes do not divide: change the "
                     "batch size, the samples per prompt or the mesh.")


def _checked(rewards: Any, names: tuple[str, ...], samples: dict) -> dict[str, np.ndarray]:
  """What a score on the host gave, as float32 rows."""
  if set(rewards) != set(names):
    raise ValueError(f"The score gives the rewards {', '.join(sorted(rewards))}, but the method declares {', '.join(names)}.")
  num = len(jax.tree.leaves(samples)[0])
  rewards = {name: np.asarray(x, np.float32) for name, x in rewards.items()}
  for name, x in rewards.items():
    if x.shape != (num,):
      raise ValueError(f"Reward {name!r} has shape {x.shape}: it must give one number for each of the {num} samples of this process.")
  return rewards
