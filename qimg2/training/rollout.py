"""What happens between two steps of a method that learns from its own samples: generate on the device, score, cut into minibatches.

All of it is a function of (state, batch, step): the key of step k is fold_in(fold_in(key, k), 2^31 - 1), so that a run that is killed anywhere
between two saves, in the rollout or while it scores, computes the same again. Every process scores the rows of its own devices.

In C chunks, the c-th has the rows c, c + C, c + 2 C ... of the batch, whatever the number of devices, and a key of its own. All are dispatched at
once, then the judge: the host scores the samples of a chunk while the device is at the next one. What waits is the device for the scores of the last
chunk.
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
from qimg2.training.state import TrainState

_FOLD = 2**31 - 1  # no step, so that the rollout draws other numbers than the updates


@dataclasses.dataclass(frozen=True)
class Programs:
  """The compiled programs of one bucket's rollout.

  Attributes:
    generate: (state, frozen, batch, number of the chunk) -> samples of a chunk.
    merge: (samples of each chunk) -> samples in the order of the batch.
    judge: (state, frozen, samples, batch) -> rewards that the device gives; None where it gives none.
    minibatches: (state, samples, rewards) -> (data of the step [K, B', ...], metrics).
    data: abstract data.
    rollout: the method's own.
    numbers: those of the chunks, on the device.
  """
  generate: Callable[..., dict]
  merge: Callable[..., dict]
  judge: Callable[..., Any] | None
  minibatches: Callable[..., tuple[dict, dict]]
  data: dict
  rollout: Rollout
  numbers: tuple[jax.Array, ...]
  mesh: jax.sharding.Mesh
  rules: Rules

  @property
  def on_device(self) -> bool:
    """Whether the host has no part in it."""
    return not self.rollout.on_host

  def __call__(self, state: TrainState, frozen: dict, batch: dict, rows: dict) -> tuple[dict, dict]:
    """(data of the step, metrics) of one batch: global arrays `batch`, and `rows`, this process's rows of it as numpy arrays.

    Raises:
      ValueError: rewards that are not one number for each sample.
    """
    chunks = [self.generate(state, frozen, batch, number) for number in self.numbers]
    samples = self.merge(chunks)
    rewards = self.judge(state, frozen, samples, batch) if self.judge is not None else {}
    if self.rollout.on_host:
      scored = self._score(chunks, rows)
      rewards = rewards | put_batch({name: first_of_equal_rows(x, self.mesh, self.rules) for name, x in scored.items()}, self.mesh, self.rules)
    return self.minibatches(state, samples, rewards)

  def _score(self, chunks: Sequence[dict], rows: dict) -> dict[str, np.ndarray]:
    """The rewards that the host gives, in the order of this process's samples."""
    if len(chunks) == 1:
      own = local_rows(chunks[0])
      return _checked(self.rollout.score(own, rows), self.rollout.on_host, own)
    futures = []
    with concurrent.futures.ThreadPoolExecutor(1, "score") as thread:
      for number, samples in enumerate(chunks):
        own = local_rows(samples)  # waits for this chunk, while the thread scores the ones before
        futures.append(thread.submit(self._score_one, own, some_rows(rows, slice(number, None, len(chunks)))))
    scored = [future.result() for future in futures]
    num = len(rows["sample_id"])
    return {name: np.asarray(_interleave([one[name] for one in scored], num, np)) for name in self.rollout.on_host}

  def _score_one(self, samples: dict, rows: dict) -> dict[str, np.ndarray]:
    return _checked(self.rollout.score(samples, rows), self.rollout.on_host, samples)


def compile_rollout(algorithm: Algorithm, nets: Any, abstract: TrainState, frozen: dict, batch: dict, mesh: jax.sharding.Mesh,
                    rules: Rules) -> Programs:
  """The programs of one bucket, compiled from abstract arguments.

  Raises:
    ValueError: rewards, or minibatches, that are not those that the method declares, or rows that the mesh and the chunks do not divide.
  """
  rollout, options = algorithm.rollout, compile_options(mesh)
  rows, stacked, everywhere = batch_sharding(mesh, rules), stacked_batch_sharding(mesh, rules), replicated(mesh)
  functions = _Functions(rollout, nets, batch["sample_id"].shape[0])
  num_parts = math.prod(mesh.shape[axis] for axis in rules["batch"])

  def build(fn, shardings, *arguments):
    return jax.jit(fn, out_shardings=shardings).lower(*arguments).compile(compiler_options=options)

  def shapes(fn, sharding, *arguments):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(fn, *arguments))

  if functions.num_rows % (num_parts * rollout.chunks):
    raise ValueError(f"The rollout divides {functions.num_rows} rows into {rollout.chunks} chunks over {num_parts} parts of the mesh's batch axes, "
                     "which gives no whole number of rows: change the batch size, the chunks or the mesh.")
  number = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  chunk = shapes(functions.generate, rows, abstract, frozen, batch, number)
  _check_rows("samples", chunk, 0, num_parts)
  samples = shapes(functions.merge, rows, [chunk] * rollout.chunks)
  num = jax.tree.leaves(samples)[0].shape[0]
  judged, given = rollout.rewards if rollout.on_device else rollout.judged, {}
  if judged:
    given = shapes(functions.judge, rows, abstract, frozen, samples, batch)
    _check_names(given, judged)
  rewards = {**given, **{name: jax.ShapeDtypeStruct((num,), jnp.float32, sharding=rows) for name in rollout.on_host}}
  data = shapes(lambda *args: functions.minibatches(*args)[0], stacked, abstract, samples, rewards)
  if (found := {x.shape[0] for x in jax.tree.leaves(data)}) != {rollout.num_minibatches}:
    raise ValueError(f"The rollout gives arrays of {', '.join(map(str, sorted(found)))} minibatches, but declares {rollout.num_minibatches}.")
  _check_rows("minibatches", data, 1, num_parts)
  return Programs(build(functions.generate, rows, abstract, frozen, batch, number),
                  build(functions.merge, rows, [chunk] * rollout.chunks) if rollout.chunks > 1 else lambda chunks: chunks[0],
                  build(functions.judge, rows, abstract, frozen, samples, batch) if judged else None,
                  build(functions.minibatches, (stacked, everywhere), abstract, samples, rewards), data, rollout,
                  tuple(_scalar(c, everywhere) for c in range(rollout.chunks)), mesh, rules)


@dataclasses.dataclass(frozen=True)
class _Functions:
  """What the programs of a rollout are compiled from; `num_rows` of the global batch."""
  rollout: Rollout
  nets: Any
  num_rows: int

  def generate(self, state: TrainState, frozen: dict, batch: dict, number: jax.Array) -> dict:
    key, chunks = jax.random.fold_in(_key(state), 0), self.rollout.chunks
    if chunks > 1:
      take = lambda x: jax.lax.dynamic_index_in_dim(x.reshape(-1, chunks, *x.shape[1:]), number, 1, keepdims=False)
      batch, key = jax.tree.map(take, batch), jax.random.fold_in(key, number)
    return self.rollout.generate(_weights(state, frozen), self.nets, batch, key)

  def merge(self, chunks: Sequence[dict]) -> dict:
    return jax.tree.map(lambda *parts: _interleave(parts, self.num_rows, jnp), *chunks)

  def judge(self, state: TrainState, frozen: dict, samples: dict, batch: dict) -> dict:
    judge = self.rollout.score if self.rollout.on_device else self.rollout.judge
    return judge(_weights(state, frozen), self.nets, samples, batch)

  def minibatches(self, state: TrainState, samples: dict, rewards: dict) -> tuple[dict, dict]:
    finite = {name: jnp.isfinite(x) for name, x in rewards.items()}
    weight = jnp.prod(jnp.stack([(x | ~self._counts(name, samples)).astype(jnp.float32) for name, x in finite.items()]), axis=0)
    rewards = {name: jnp.where(finite[name], x, 0.0) for name, x in rewards.items()}
    data = self.rollout.minibatches({**samples, "rewards": rewards, "weight": weight}, jax.random.fold_in(_key(state), 1))
    means = {f"reward/{name}": jnp.sum(x) / jnp.sum(finite[name]) for name, x in rewards.items()}
    shares = {f"reward/{name}/scored": jnp.mean(x.astype(jnp.float32)) for name, x in finite.items()}
    return data, {**means, **shares, "reward/left_out": 1.0 - jnp.mean(weight)}

  def _counts(self, name: str, samples: dict) -> jax.Array:
    """Whether a sample without a finite reward of this name is left out, [B] or [1] for all: not where its weight is 0."""
    column = jnp.asarray([row[self.rollout.rewards.index(name)] != 0 for row in self.rollout.weights] or [True])
    return column[samples["category"]] if len(column) > 1 else column


def _key(state: TrainState) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(state.key, state.step), _FOLD)


def _weights(state: TrainState, frozen: dict) -> dict:
  return {**frozen, **state.averages, **state.params}


def _interleave(parts: Sequence[Any], num_rows: int, np_or_jnp: Any) -> Any:
  """Samples of chunks, each [B / C, ...] with those of a row side by side, in the order of the batch's rows."""
  per_chunk = num_rows // len(parts)
  rows = np_or_jnp.stack([part.reshape(per_chunk, -1, *part.shape[1:]) for part in parts], 1)
  return rows.reshape(-1, *parts[0].shape[1:])


def _scalar(value: int, sharding: jax.sharding.Sharding) -> jax.Array:
  return jax.make_array_from_callback((), sharding, lambda index: np.int32(value))


def _check_rows(what: str, tree: dict, dim: int, num_parts: int) -> None:
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
