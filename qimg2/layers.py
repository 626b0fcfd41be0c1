"""The layers that all three networks share, as functions of arrays.

Weights arrive in float32 and are cast to the compute type at use. Norms, softmax and rotary embeddings work in float32. Letters: B batch,
S sequence, D width, H heads, K head dim, F MLP width.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qimg2 import products
from qimg2.adapters import is_adapted
from qimg2.sharding import Shard, identity


def linear(x: jax.Array, weight: Any, num_dims: int = 1, join: bool = False) -> jax.Array:
  """`x` times `weight`, contracting the last `num_dims` dimensions of `x` with the first of `weight`; result in the type of `x`. A weight with an
  adapter is `qimg2.adapters.Adapted`, equation 1 there.

  `join`: as a product of two matrices. The gradient of the weight then sums over one dimension, the joined rows; over two, XLA's CPU compiler first
  transposes the cotangent, and computes what made it in the transposed order. For arrays on one device.
  """
  return checkpoint_name(_product(x, weight, num_dims, join), PRODUCT)


def _product(x: jax.Array, weight: Any, num_dims: int, join: bool) -> jax.Array:
  if is_adapted(weight):  # of its two large products no backward pass needs either alone
    low = linear(x, weight.a, num_dims, join)
    return _product(x, weight.base, num_dims, join) + weight.scale * _product(low, weight.b, 1, join)
  if join:
    inner = math.prod(weight.shape[:num_dims])
    return products.linear(x.reshape(-1, inner), weight.reshape(inner, -1)).reshape(*x.shape[:x.ndim - num_dims], *weight.shape[num_dims:])
  return products.linear(x, weight, num_dims)


def full_precision(network: Callable) -> Callable:
  """`network(cfg, ...)`, whose products are float32 where `cfg.dtype` says so: by default TPUs round the factors to bfloat16, and GPUs to TF32."""
  @functools.wraps(network)
  def exact(cfg: Any, *args: Any, **kwargs: Any) -> Any:
    with jax.default_matmul_precision("highest") if cfg.dtype == "float32" else contextlib.nullcontext():
      return network(cfg, *args, **kwargs)
  return exact


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """`x` plus `bias` along its last dimension. It is spread in its own type, so that its gradient is summed in that."""
  return x + jnp.broadcast_to(align(bias, x), x.shape).astype(x.dtype)


def align(values: jax.Array, x: jax.Array) -> jax.Array:
  """`values` with as many leading dimensions of size one as `x` has more, so that they meet along its last dimensions."""
  return values.reshape((1,) * (x.ndim - values.ndim) + values.shape)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float = 1e-6) -> jax.Array:
  """`x` over its root mean square along the last dimension, times `weight` (arXiv 1910.07467)."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  return (y * align(weight, y).astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array | None = None, bias: jax.Array | None = None, eps: float = 1e-6) -> jax.Array:
  """`x` centred and scaled to unit variance along the last dimension, then the affine map where one is given (arXiv 1607.06450)."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  if weight is not None:
    y = y * align(weight, y).astype(jnp.float32)
  if bias is not None:
    y = y + align(bias, y).astype(jnp.float32)
  return y.astype(x.dtype)


def swiglu(x: jax.Array, gate: jax.Array, proj: jax.Array, out: jax.Array, join: bool = False, shard: Shard = identity) -> jax.Array:
  """(SiLU(x·gate) ⊙ (x·proj))·out for x [B, S, D] with gate, proj [D, F] and out [F, D] (arXiv 2002.05202); `join` as in `linear`, `shard` constrains
  what is between the products to the mesh."""
  gated, linear_part = (shard(linear(x, weight, join=join), "batch", "token", "mlp") for weight in (gate, proj))
  return linear(jax.nn.silu(gated) * linear_part, out, join=join)


def rope_frequencies(dim: int, theta: float) -> jax.Array:
  """theta^(-2j/dim) for j < dim/2: the angle per position of each rotated pair (arXiv 2104.09864)."""
  return theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotate_pairs(x: jax.Array, angles: jax.Array) -> jax.Array:
  """`x` [B, S, H, K] with its adjacent pairs (2j, 2j+1) turned by `angles` [B, S, K/2].

  Neighbours change places by a product with a matrix of 0, 1 and -1, because on a TPU slices of every second number are copies through memory. It is
  exact, but for TPUs, whose products round what is not bfloat16. On a GPU they are read where they are.
  """
  cos, sin = (jnp.repeat(f(angles), 2, axis=-1)[:, :, None] for f in (jnp.cos, jnp.sin))
  y = x.astype(jnp.float32)
  return (y * cos + jax.lax.platform_dependent(y, cuda=_swap_places, default=_swap_by_product) * sin).astype(x.dtype)


def _swap_by_product(x: jax.Array) -> jax.Array:
  """To place 2j goes minus the right neighbour, to 2j + 1 the left one."""
  place = np.arange(x.shape[-1])
  return x @ jnp.asarray((place[:, None] == place ^ 1) * np.where(place % 2, 1.0, -1.0), jnp.float32)


def _swap_places(x: jax.Array) -> jax.Array:
  """The same, without a product."""
  left, right = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, 2), -1, 0)
  return jnp.stack([-right, left], axis=-1).reshape(x.shape)


def rotate_halves(x: jax.Array, angles: jax.Array) -> jax.Array:
  """`x` [B, S, H, K] with its pairs (j, j+K/2) turned by `angles` [B, S, K/2]."""
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def pad(x: jax.Array, multiple: int, axis: int = 1) -> jax.Array:
  """`x` with zeros behind it along `axis`, up to a multiple."""
  return jnp.pad(x, [(0, -n % multiple if dim == axis else 0) for dim, n in enumerate(x.shape)])


def sinusoid(t: jax.Array, dim: int, max_period: float = 10_000.0) -> jax.Array:
  """Sinusoidal features [..., dim] of `t` [...], float32: cosines in the first half, sines in the second (arXiv 1706.03762)."""
  frequencies = max_period ** (-jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
  angles = t.astype(jnp.float32)[..., None]
  angles = angles * align(frequencies, angles)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


# Names that rematerialisation policies know activations by: what goes into a layer; what `linear` gave; what attention gave, with the normaliser of
# its softmax.
LAYER_INPUT, PRODUCT, ATTENTION_OUTPUT = "layer_input", "product", "attention"
CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"  # JAX's primitive; what it gives besides the output has no name


def _save(*names: str) -> Callable[..., Any]:
  """A policy that saves what has these names, and what cuDNN's attention gave."""
  named = jax.checkpoint_policies.save_only_these_names(*names)
  return lambda primitive, *args, **params: primitive.name == CUDNN_ATTENTION or named(primitive, *args, **params)


POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _save(PRODUCT, ATTENTION_OUTPUT),
    "attention": _save(ATTENTION_OUTPUT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT], offload_src="device", offload_dst="pinned_host"),
}


def checkpoint_layer(layer, policy: str):
  """`layer` under a named rematerialisation policy.

  Args:
    layer: the function that `jax.lax.scan` runs per layer.
    policy: which activations are saved for the backward pass: "none" saves all (no rematerialisation); "full" the layer's input; "dots" the
      results of matrix products with weights, and of attention; "attention" the layer's input and the result of attention (with splash, ring and
      cudnn none runs twice); "offload" the layer's input, in the host's memory.

  Raises:
    ValueError: an unknown policy.
  """
  if policy not in POLICIES:
    raise ValueError(f"Unknown remat policy {policy!r}: choose one of {', '.join(POLICIES)}.")
  if policy == "none":
    return layer
  named = lambda carry, inputs: layer(jax.tree.map(lambda x: checkpoint_name(x, LAYER_INPUT), carry), inputs)
  return jax.checkpoint(named, policy=POLICIES[policy], prevent_cse=False)


def concat_angles(positions: Sequence[jax.Array], dims: Sequence[int], theta: float) -> jax.Array:
  """Rotary angles [..., sum(dims)/2] when axis i of a position, `positions[i]` [...], turns `dims[i]` of the head's dimensions."""
  columns = [(p.astype(jnp.float32)[..., None], rope_frequencies(dim, theta)) for p, dim in zip(positions, dims)]
  return jnp.concatenate([place * align(frequencies, place) for place, frequencies in columns], axis=-1)
