"""What happens between two steps of a method that learns from its own samples: generate on the device, score, cut into minibatches.

All of it is a function of (state, batch, step): the key of step k is fold_in(fold_in(key, k), 2^31 - 1), so that a run that is killed anywhere
between two saves, in the rollout or while it scores, computes the same again. Every process scores the rows of its own devices.

In C chunks, the c-th has the rows c, c + C, c + 2 C ... of the batch, whatever the number of devices, and a key of its own. All of them are
dispatched at once, each with its judge: the host scores the samples of a chunk while the device is at the next one. The device waits while the host
scores the last chunk, and what it has left of those before.
"""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qimg2.algorithms import Algorithm, Rollout
from qimg2.batch import some_rows
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
from qimg2.training import pictures
from qimg2.training.faults import LEARNED
from qimg2.training.programs import Part
from qimg2.training.state import TrainState

_FOLD = 2**31 - 1  # no step, so that the rollout draws other numbers than the updates


@dataclasses.dataclass(frozen=True)
class Programs:
  """The compiled programs of one bucket's rollout.

  Attributes:
    generate: (state, frozen, batch, number of the chunk) -> its samples.
    judge: (state, frozen, samples, batch, number of the chunk) -> the rewards that the device gives; None where it gives none.
    merge: (trees of [b, ...], one for each chunk) -> one of [B, ...], in the order of the batch.
    minibatches: (state, samples, rewards) -> (data of the step [K, B', ...], metrics, {metric: its value for each sample [B]}).
    data: abstract data.
    numbers: those of the chunks, on the device.
  """
  generate: Callable[..., dict]
  judge: Callable[..., dict] | None
  merge: Callable[[Sequence[dict]], dict]
  minibatches: Callable[..., tuple[dict, dict, dict]]
  data: dict
  numbers: tuple[jax.Array, ...]
  rollout: Rollout
  mesh: jax.sharding.Mesh
  rules: Rules

  @property
  def on_device(self) -> bool:
    """Whether the host has no part in it."""
    return not self.rollout.by_host

  def __call__(self, state: TrainState, frozen: dict, batch: dict, rows: dict) -> tuple[dict, dict, dict]:
    """(data of the step, metrics, {metric: its value for each sample [B]}, NaN for none) of one batch: global arrays `batch`, and `rows`, this
    process's rows of it as numpy arrays.

    Raises:
      ValueError: rewards that are not one number for each sample.
    """
    chunks = []
    for number in self.numbers:
      samples = self.generate(state, frozen, batch, number)
      judged = self.judge(state, frozen, samples, batch, number) if self.judge is not None else {}
      chunks.append({"samples": samples, "rewards": judged})
    whole = self.merge(chunks)
    rewards = whole["rewards"]
    if self.rollout.by_host:
      scored = self._score([chunk["samples"] for chunk in chunks], rows)
      scored = {name: first_of_equal_rows(x, self.mesh, self.rules) for name, x in scored.items()}
      rewards = rewards | put_batch(scored, self.mesh, self.rules)
    return self.minibatches(state, whole["samples"], rewards)

  def _score(self, chunks: Sequence[dict], rows: dict) -> dict[str, np.ndarray]:
    """The rewards that the host gives, in the order of this process's samples."""
    futures = []
    with concurrent.futures.ThreadPoolExecutor(1, "score") as thread:
      for number, samples in enumerate(chunks):
        # Waits for this chunk, while the thread scores the ones before.
        own = local_rows({name: samples[name] for name in self.rollout.scored or samples})
        futures.append(thread.submit(self._score_one, own, some_rows(rows, slice(number, None, len(chunks)))))
    return _interleave([future.result() for future in futures], len(rows["sample_id"]), np)

  def _score_one(self, samples: dict, rows: dict) -> dict[str, np.ndarray]:
    return _checked(self.rollout.score(samples, rows), self.rollout.by_host, samples)


@dataclasses.dataclass(frozen=True)
class RolloutParts:
  """The programs of one bucket's rollout that are not compiled yet, see `Programs`; `judge` is None where the host gives all rewards, `merge` where
  there is one chunk.

  Attributes:
    data: abstract data of the step.
    num_samples: B, what the method's own score is asked for over all processes.
  """
  generate: Part
  judge: Part | None
  merge: Part | None
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
  judge = parts.judge.compile(options) if parts.judge else None
  merge = parts.merge.compile(options) if parts.merge else lambda chunks: chunks[0]
  scalar = lambda value: jax.make_array_from_callback((), replicated(mesh), lambda index: np.int32(value))
  return Programs(parts.generate.compile(options), judge, merge, parts.minibatches.compile(options), parts.data,
                  tuple(map(scalar, range(rollout.chunks))), rollout, mesh, rules)


def rollout_parts(algorithm: Algorithm, nets: Any, abstract: TrainState, frozen: dict, batch: dict, mesh: jax.sharding.Mesh,
                  rules: Rules) -> RolloutParts:
  """What a rollout of one bucket compiles, from abstract arguments.

  Raises:
    ValueError: rewards, or minibatches, that are not those that the method declares, or rows that the mesh and the chunks do not divide.
  """
  rollout, rows, stacked = algorithm.rollout, batch_sharding(mesh, rules), stacked_batch_sharding(mesh, rules)
  functions, chunks = _Functions(rollout, nets), rollout.chunks
  _check_chunks(batch["sample_id"].shape[0], chunks, mesh, rules)

  def shapes(fn, sharding, *arguments):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(fn, *arguments))

  number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
  inputs = abstract, frozen, batch, number
  samples, judged = shapes(functions.generate, rows, *inputs), {}
  _check_rows("samples", samples, 0, mesh, rules)
  to_judge = abstract, frozen, samples, batch, number
  if rollout.by_device:
    judged = shapes(functions.judge, rows, *to_judge)
    _check_names(judged, rollout.by_device)
  parts = [{"samples": samples, "rewards": judged}] * chunks
  merge = lambda some: _interleave(some, batch["sample_id"].shape[0], jnp)
  whole = shapes(merge, rows, parts)
  num = jax.tree.leaves(whole["samples"])[0].shape[0]
  rewards = whole["rewards"] | {name: jax.ShapeDtypeStruct((num,), jnp.float32, sharding=rows) for name in rollout.by_host}
  data = shapes(lambda *args: functions.minibatches(*args)[0], stacked, abstract, whole["samples"], rewards)
  if (found := {x.shape[0] for x in jax.tree.leaves(data)}) != {rollout.num_minibatches}:
    raise ValueError(f"The rollout gives arrays of {', '.join(map(str, sorted(found)))} minibatches, but declares {rollout.num_minibatches}.")
  _check_rows("minibatches", data, 1, mesh, rules)
  jit = lambda fn, shardings: jax.jit(fn, out_shardings=shardings)
  return RolloutParts(
      Part(jit(functions.generate, rows), inputs, chunks),
      Part(jit(functions.judge, rows), to_judge, chunks) if rollout.by_device else None,
      Part(jit(merge, rows), (parts,), beside=(abstract, frozen, batch)) if chunks > 1 else None,
      Part(jit(functions.minibatches, (stacked, replicated(mesh), replicated(mesh))), (abstract, whole["samples"], rewards), beside=(frozen, batch)),
      data, num)


@dataclasses.dataclass(frozen=True)
class _Functions:
  """What `Programs` has compiled, as functions of state and frozen weights."""
  rollout: Rollout
  nets: Any

  def generate(self, state: TrainState, frozen: dict, batch: dict, number: jax.Array) -> dict:
    key = jax.random.fold_in(_key(state), 0)
    key = jax.random.fold_in(key, number) if self.rollout.chunks > 1 else key
    return self.rollout.generate(_weights(state, frozen), self.nets, self._chunk(batch, number), key)

  def judge(self, state: TrainState, frozen: dict, samples: dict, batch: dict, number: jax.Array) -> dict:
    judge = self.rollout.score if self.rollout.on_device else self.rollout.judge
    return judge(_weights(state, frozen), self.nets, samples, self._chunk(batch, number))

  def minibatches(self, state: TrainState, samples: dict, rewards: dict) -> tuple[dict, dict, dict]:
    asked = {name: self._is_asked(name, samples) for name in rewards}
    finite = {name: jnp.isfinite(x) & asked[name] for name, x in rewards.items()}
    weight = jnp.prod(jnp.stack([(x | ~self._counts(name, samples)).astype(jnp.float32) for name, x in finite.items()]), axis=0)
    values = {f"reward/{name}": jnp.where(finite[name], x, jnp.nan) for name, x in rewards.items()}
    rewards = {name: jnp.where(finite[name], x, 0.0) for name, x in rewards.items()}
    data = self.rollout.minibatches({**samples, "rewards": rewards, "weight": weight}, jax.random.fold_in(_key(state), 1))
    means = {f"reward/{name}": jnp.sum(x) / jnp.sum(finite[name]) for name, x in rewards.items()}
    shares = {f"reward/{name}/scored": jnp.sum(x) / jnp.sum(jnp.broadcast_to(asked[name], x.shape)) for name, x in finite.items()}
    figures = {f"pictures/{name}": x for name, x in pictures.statistics(samples["pictures"]).items()} if "pictures" in samples else {}
    means |= {name: jnp.mean(x) for name, x in figures.items()}
    learned = jnp.mean((data["weight"] > 0).astype(jnp.float32)) if "weight" in data else 1.0
    return data, {**means, **shares, "reward/left_out": 1.0 - jnp.mean(weight), LEARNED: learned}, values | figures

  def _chunk(self, batch: dict, number: jax.Array) -> dict:
    chunks = self.rollout.chunks
    take = lambda x: jax.lax.dynamic_index_in_dim(x.reshape(-1, chunks, *x.shape[1:]), number, 1, keepdims=False)
    return jax.tree.map(take, batch) if chunks > 1 else batch

  def _counts(self, name: str, samples: dict) -> jax.Array:
    """Whether a sample without a finite reward of this name is left out, [B] or [1] for all: not where its weight is 0."""
    column = jnp.asarray([row[self.rollout.rewards.index(name)] != 0 for row in self.rollout.weights] or [True])
    return column[samples["category"]] if len(column) > 1 else column

  def _is_asked(self, name: str, samples: dict) -> jax.Array:
    """Whether a sample is asked for this reward at all, [B] or [1]: where it counts, and everywhere if it is only watched."""
    counts = any(row[self.rollout.rewards.index(name)] for row in self.rollout.weights)
    return self._counts(name, samples) if counts else jnp.ones(1, bool)


def _key(state: TrainState) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(state.key, state.step), _FOLD)


def _weights(state: TrainState, frozen: dict) -> dict:
  return {**frozen, **state.averages, **state.params}


def _interleave(chunks: Sequence[dict], num_rows: int, xp: Any) -> dict:
  """Trees of the chunks, of arrays [b, ...] with what belongs to one row side by side, as one tree in the order of the batch's `num_rows` rows.
  `xp` is numpy, or jax's."""
  def join(*parts):
    rows = xp.stack([part.reshape(num_rows // len(parts), -1, *part.shape[1:]) for part in parts], 1)
    return rows.reshape(-1, *parts[0].shape[1:])
  return jax.tree.map(join, *chunks)


def _check_chunks(num_rows: int, chunks: int, mesh: jax.sharding.Mesh, rules: Rules) -> None:
  num_parts = math.prod(mesh.shape[axis] for axis in rules["batch"])
  if num_rows % (num_parts * chunks):
    raise ValueError(f"The rollout divides {num_rows} rows into {chunks} chunks over {num_parts} parts of the mesh's batch axes, which gives no "
                     "whole number of rows: change the batch size, the chunks or the mesh.")


def _check_rows(what: str, tree: dict, dim: int, mesh: jax.sharding.Mesh, rules: Rules) -> None:
  num_parts = math.prod(mesh.shape[axis] for axis in rules["batch"])
  odd = [x.shape[dim] for x in jax.tree.leaves(tree) if x.shape[dim] % num_parts]
  if odd:
    raise ValueError(f"The rollout's {what} have {odd[0]} rows, which the {num_parts} parts of the mesh's batch axes do not divide: change the "
                     "batch size, the samples per prompt or the mesh.")


def _check_names(rewards: Any, names: Sequence[str]) -> None:
  if set(rewards) != set(names):
    raise ValueError(f"The score gives the rewards {', '.join(sorted(rewards))}, but the method declares {', '.join(names)}.")


def _checked(rewards: Any, names: Sequence[str], samples: dict) -> dict[str, np.ndarray]:
  """What a score on the host gave, as float32 rows."""
  _check_names(rewards, names)
  num = len(jax.tree.leaves(samples)[0])
  rewards = {name: np.asarray(x, np.float32) for name, x in rewards.items()}
  for name, x in rewards.items():
    if x.shape != (num,):
      raise ValueError(f"Reward {name!r} has shape {x.shape}: it must give one number for each of the {num} samples of this process.")
  return rewards
