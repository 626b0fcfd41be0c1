"""Weights, declared once.

A model's `specs(cfg)` is a dict tree whose leaves are `Param`. Everything that has to know the weights is computed from that one tree: the
random initialisation, abstract shapes for ahead-of-time compilation and for restoring, shardings (`qimg2.sharding`), the parameter count and
the table of names. A tree of arrays with the same structure is called `params` everywhere.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
SEPARATOR = "/"


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """An array of zeros; `key` is not used."""
  del key
  return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """An array of ones; `key` is not used."""
  del key
  return jnp.ones(shape, dtype)


def normal(stddev: float) -> Init:
  """An initialiser that draws from N(0, stddev²)."""
  return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def fan_in(num_inputs: int, gain: float = 1.0) -> Init:
  """An initialiser that draws from N(0, gain² / num_inputs): it keeps the variance of unit inputs when gain is 1."""
  return normal(gain / math.sqrt(num_inputs))


def delta_orthogonal(start: int, size: int) -> Init:
  """An initialiser of convolution kernels [h, w, in, out] that keeps what passes through it (arXiv 1806.05393).

  The taps from `start` to `start + size - 1` of both directions form a semi-orthogonal map of their inputs; all other taps are zero. One
  tap in the middle suits a convolution of stride 1, size x size taps suit one of stride `size`.
  """
  def draw(key, shape, dtype):
    num_in, num_out = size * size * shape[2], shape[3]
    q, _ = jnp.linalg.qr(jax.random.normal(key, (max(num_in, num_out), min(num_in, num_out)), dtype))
    taps = (q if num_in >= num_out else q.T).reshape(size, size, *shape[2:])
    return jnp.zeros(shape, dtype).at[start:start + size, start:start + size].set(taps)
  return draw


@dataclasses.dataclass(frozen=True)
class Param:
  """The declaration of one weight.

  Attributes:
    shape: size of each dimension.
    axes: logical axis name of each dimension, None for a dimension that is never sharded.
    init: `init(key, shape, dtype)`.
    dtype: storage type; float32 unless a model says otherwise.
    exact: keeps its type where the others of a network are stored in fewer bits (`with_dtype`).
    num_inputs: for the weight of a linear map, how many dimensions (those of a layer, the first) a product contracts; 0 for any other weight.

  Raises:
    ValueError: `axes` and `shape` differ in rank.
  """
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Init = zeros
  dtype: Any = jnp.float32
  exact: bool = False
  num_inputs: int = 0

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f"Param of shape {self.shape} names {len(self.axes)} axes {self.axes}: give one name or None per dimension.")

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)


def is_param(x: Any) -> bool:
  """True for a `Param`; the `is_leaf` of every tree_map over specs."""
  return isinstance(x, Param)


def flatten(specs: dict) -> dict[str, Any]:
  """The leaves of a dict tree by path, such as {"blocks/attn/q": leaf}, in sorted order. Works on specs and on params alike."""
  return dict(_walk(specs, ()))


def _walk(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
  if not isinstance(tree, dict):
    yield SEPARATOR.join(path), tree
    return
  for name in sorted(tree):
    yield from _walk(tree[name], (*path, name))


def map_with_path(fn: Callable[[str, Any], Any], specs: dict, path: tuple[str, ...] = ()) -> dict:
  """A tree of `fn(path, leaf)` with the structure of `specs`."""
  return {name: map_with_path(fn, leaf, (*path, name)) if isinstance(leaf, dict) else fn(SEPARATOR.join((*path, name)), leaf)
          for name, leaf in specs.items()}


def init(specs: dict, key: jax.Array) -> dict:
  """Random params for `specs`. Each leaf's key is folded from its path, so adding a weight changes no other weight's draw."""
  return map_with_path(lambda path, p: p.init(jax.random.fold_in(key, zlib.crc32(path.encode())), p.shape, p.dtype), specs)


def abstract(specs: dict, shardings: dict | None = None) -> dict:
  """A tree of `jax.ShapeDtypeStruct`, with shardings where a tree of them is given: nothing is allocated."""
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), specs, is_leaf=is_param)
  if shardings is None:
    return shapes
  return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)


def count(specs: dict) -> int:
  """Number of weights declared in `specs`."""
  return sum(p.size for p in flatten(specs).values())


def with_dtype(specs: dict, dtype: Any) -> dict:
  """`specs` with every weight that is not `exact` stored in `dtype`; random ones are drawn in their own type and rounded."""
  def stored(p: Param) -> Param:
    if p.exact or p.dtype == jnp.dtype(dtype):
      return p
    draw = lambda key, shape, _: p.init(key, shape, p.dtype).astype(dtype)
    return dataclasses.replace(p, dtype=jnp.dtype(dtype), init=draw)
  return jax.tree.map(stored, specs, is_leaf=is_param)


def stack(specs: dict, num: int, axis: str = "layer") -> dict:
  """The specs of `num` equal modules with their weights stacked along a new first dimension, ready for `jax.lax.scan`."""
  return jax.tree.map(
      lambda p: dataclasses.replace(p, shape=(num, *p.shape), axes=(axis, *p.axes), init=_stacked(p.init, num)), specs, is_leaf=is_param)


def _stacked(one: Init, num: int) -> Init:
  # One key per layer: a deeper model starts with the same first layers.
  def draw(key, shape, dtype):
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num))
    return jax.vmap(lambda k: one(k, shape[1:], dtype))(keys)
  return draw
