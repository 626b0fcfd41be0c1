"""Low-rank adapters (LoRA, arXiv 2106.09685): a few weights that are trained beside a network whose own stay as they are.

  y = x W + (alpha / rank) (x A) B,     A [in, rank] drawn, B [rank, out] zero at the start                                    (1)

With B at zero the network computes what it did, to the bit. Which of its weights get an adapter is said by patterns of their paths: those of linear
maps can, which is what `Param.num_inputs` says. Equation 1 is computed as it stands, by `qimg2.layers.linear`: an `Adapted` weight takes the place
of an array in the network's tree, and no second copy of W is made. A and B are sharded as W is along its inputs and outputs.

A is drawn with the variance of PEFT's, 1 / (3 in). Left out: dropout, DoRA, adapters of convolutions, embeddings and norms.
"""

import dataclasses
import difflib
import fnmatch
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qimg2 import params as P

PREFIX = "lora/"  # and the name of a network: that of its adapters
GAIN = 3 ** -0.5  # of A over 1 / sqrt(in)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What an adapter is.

  Attributes:
    rank: of the product A B; 0 for no adapter, all weights are trained then.
    alpha: numerator of the scale alpha / rank; 0 takes the rank, a scale of 1.
    targets: patterns of paths, comma-separated, such as "blocks/attn/*,blocks/mlp/out": which linear maps get an adapter. A * stands for any text.

  Raises:
    ValueError: a negative rank or alpha, or no pattern.
  """
  rank: int = 0
  alpha: float = 0.0
  targets: str = "blocks/*"

  def __post_init__(self):
    if self.rank < 0 or self.alpha < 0:
      raise ValueError(f"adapter.rank is {self.rank} and adapter.alpha {self.alpha}: give numbers above 0, or rank 0 to train all weights.")
    if not all(self.patterns):
      raise ValueError(f"adapter.targets is {self.targets!r}: give patterns of weights' paths, comma-separated, such as \"blocks/attn/*\".")

  @property
  def patterns(self) -> tuple[str, ...]:
    """The patterns of `targets`."""
    return tuple(text.strip() for text in self.targets.split(","))

  @property
  def scale(self) -> float:
    """alpha / rank."""
    return (self.alpha or self.rank) / self.rank


@flax.struct.dataclass
class Adapted:
  """A weight and its adapter, in place of the weight in a network's tree; stacked over layers where the weight is.

  Attributes:
    base: the weight, [in..., out...], or another `Adapted`.
    a, b: [in..., rank] and [rank, out...].
    scale: of their product.
  """
  base: Any
  a: jax.Array
  b: jax.Array
  scale: float = flax.struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the weight."""
    return self.base.shape

  @property
  def dtype(self) -> Any:
    """The type that the weight is stored in."""
    return self.base.dtype


def is_adapted(x: Any) -> bool:
  """True for an `Adapted`; the `is_leaf` of a tree_map over weights."""
  return isinstance(x, Adapted)


def find_targets(specs: dict, settings: Settings) -> list[str]:
  """Paths of the weights of `specs` that get an adapter, sorted.

  Raises:
    ValueError: a pattern that no linear map has, with the nearest that there is.
  """
  paths = [path for path, p in P.flatten(specs).items() if p.num_inputs]
  found = {pattern: fnmatch.filter(paths, pattern) for pattern in settings.patterns}
  for pattern, some in found.items():
    if not some:
      near = difflib.get_close_matches(pattern, paths, 1, 0.0)
      raise ValueError(f"adapter.targets names {pattern!r}, but no linear map of the network has such a path"
                       + (f": did you mean {near[0]!r}? There are {', '.join(paths)}." if near else ": it has none."))
  return sorted(set().union(*found.values()))


def specs(network: dict, settings: Settings) -> dict:
  """The declared weights of an adapter: {"a", "b"} in place of each target in the network's tree, and nothing else; float32.

  Raises:
    ValueError: as `find_targets`.
  """
  leaves, tree = P.flatten(network), {}
  for path in find_targets(network, settings):
    place_at(tree, path, low_rank(leaves[path], settings.rank))
  return tree


def low_rank(p: P.Param, rank: int) -> dict:
  """The declared factors {"a", "b"} of a linear map's weight."""
  stacked = p.axes[:1] == ("layer",)
  shape, axes, n = p.shape[stacked:], p.axes[stacked:], p.num_inputs
  factors = {"a": P.Param((*shape[:n], rank), (*axes[:n], None), P.fan_in(math.prod(shape[:n]), GAIN)),
             "b": P.Param((rank, *shape[n:]), (None, *axes[n:]), P.zeros)}
  return P.stack(factors, p.shape[0]) if stacked else factors


def place_at(tree: dict, path: str, value: Any) -> None:
  """Puts `value` into a dict tree at a path such as "blocks/attn/q"."""
  *parents, name = path.split(P.SEPARATOR)
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[name] = value


def adapt(weights: Any, adapter: Mapping, scale: float) -> Any:
  """`weights` in which each weight that `adapter` has factors of is an `Adapted`. Nothing is computed, and no array is copied."""
  if not isinstance(weights, dict):
    return Adapted(weights, adapter["a"], adapter["b"], scale)
  return {name: adapt(own, adapter[name], scale) if name in adapter else own for name, own in weights.items()}


def taken(weights: dict) -> dict:
  """The adapter of weights that `adapt` gave; its inverse. Weights without one do not appear."""
  tree: dict = {}
  for path, weight in P.flatten(weights).items():
    if is_adapted(weight):
      place_at(tree, path, {"a": weight.a, "b": weight.b})
  return tree


def filled(specs: dict, adapter: dict, drawn: dict) -> dict:
  """`adapter` with A as in `drawn` for each rank of each layer at which A and B are both zero: there neither has a gradient, and would stay so for
  ever. The product A B is what it was; all three are of one structure, `specs` declares it."""
  declared, own, new = map(P.flatten, (specs, adapter, drawn))
  tree: dict = {}
  for path, p in declared.items():
    pair, _, name = path.rpartition(P.SEPARATOR)
    first = int(p.axes[:1] == ("layer",))
    a, b = own[f"{pair}{P.SEPARATOR}a"], own[f"{pair}{P.SEPARATOR}b"]
    is_idle = ~(jnp.any(a != 0, axis=tuple(range(first, a.ndim - 1))) | jnp.any(b != 0, axis=tuple(range(first + 1, b.ndim))))  # layers, rank
    is_idle = is_idle.reshape(*a.shape[:first], *[1] * (a.ndim - 1 - first), a.shape[-1])
    place_at(tree, path, jnp.where(is_idle, new[path], a) if name == "a" else b)
  return tree


def output(weight: Any, number: int) -> Any:
  """One of the outputs of a weight [in, n, out] that holds n maps of the same input: [in, out]."""
  if is_adapted(weight):
    return weight.replace(base=output(weight.base, number), b=weight.b[:, number])
  return weight[:, number]


def merged(weight: Any, dtype: Any = None) -> Any:
  """W + scale A B, computed in float32, as `dtype` or in the type of W; a weight without an adapter as it is, or as `dtype`."""
  if not is_adapted(weight):
    return weight if dtype is None else weight.astype(dtype)
  multiply = lambda a, b: jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision=jax.lax.Precision.HIGHEST)
  stacked = weight.a.ndim + weight.b.ndim - 2 > len(weight.shape)
  product = (jax.vmap(multiply) if stacked else multiply)(weight.a, weight.b)
  return (merged(weight.base, jnp.float32) + weight.scale * product).astype(dtype or weight.dtype)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="scale")
def _merge_one(base: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  return merged(Adapted(base, a, b, scale))


def merge(weights: dict) -> dict:
  """`weights` with every adapter added to its weight, one after the other: a merged weight takes the memory of the one that it was, which is gone."""
  return jax.tree.map(_merge_leaf, weights, is_leaf=is_adapted)


def _merge_leaf(weight: Any) -> Any:
  return _merge_one(_merge_leaf(weight.base), weight.a, weight.b, weight.scale) if is_adapted(weight) else weight
