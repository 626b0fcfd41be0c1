"""The fused kernel for NVIDIA GPUs, in 16-bit types, through `jax.nn.dot_product_attention`; prefix and target are two calls."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qimg2.attention.mask import Mask, dense
from qimg2.layers import pad

MAX_HEAD_DIM = 128


def fits(dtype: Any, head_dim: int) -> bool:
  """True if the kernel takes queries, keys and values of this type and head dim."""
  return jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, implementation: str = "cudnn") -> jax.Array:
  """Attention [B, S, H, K] by the kernel; arguments as in `qimg2.attention.attention`.

  The target sees all real keys, in whatever order: moved to the front they are a length. The prefix sees only itself.
  """
  run, P = functools.partial(jax.nn.dot_product_attention, implementation=implementation), 0 if mask.last is None else mask.num_prefix
  parts = []
  if P and mask.reach == 0:  # padding of a causal prefix is on its right
    parts.append(run(query[:, :P], key[:, :P], value[:, :P], is_causal=True))
  elif P:
    valid = jnp.ones((query.shape[0], P), bool) if mask.valid is None else mask.valid[:, :P]
    here = Mask(pad(mask.last[:, :P], 2), pad(valid, 2))  # with a mask the kernel's backward pass needs lengths that are even
    parts.append(run(*(pad(x[:, :P], 2) for x in (query, key, value)), mask=dense(here, P + P % 2)[:, None])[:, :P])
  if P < query.shape[1]:
    lengths = {}
    if mask.valid is not None:
      order = jnp.argsort(~mask.valid, axis=1, stable=True)
      key, value = (jax.vmap(_take)(x, order) for x in (key, value))
      lengths["key_value_seq_lengths"] = jnp.sum(mask.valid, axis=1, dtype=jnp.int32)
    parts.append(run(query[:, P:], key, value, **lengths))
  return jnp.concatenate(parts, axis=1)


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
  """The rows of `x` in another order; that no two are the same spares its gradient the atomic sums."""
  return x.at[order].get(mode="promise_in_bounds", unique_indices=True)
