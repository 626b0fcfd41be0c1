"""For sequences that are split over the mesh axis `context`: keys and values go round the devices while a running softmax adds up
(arXiv 2310.01889), and go round again in the backward pass. On one device it is a softmax in one block with a backward pass of its own.

Letters as in `qimg2.attention`, and R = H/G, query heads per key head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qimg2.attention.mask import Mask
from qimg2.layers import ATTENTION_OUTPUT

HIDDEN = float(jnp.finfo(jnp.float32).min)  # the logit of what a query does not see


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, axis: str | None = None, parts: int = 1) -> jax.Array:
  """Attention [B, S, H, K] of this device's queries over the keys of all; arguments as in `qimg2.attention.attention`.

  Args:
    query, key, value, mask: this device's part.
    axis: mesh axis that the sequence is split over.
    parts: its size.
  """
  (B, S, H, K), (T, G) = query.shape, key.shape[1:3]
  last = jnp.full((B, S), parts * T - 1, jnp.int32) if mask.last is None else mask.last
  valid = jnp.ones((B, T), bool) if mask.valid is None else mask.valid
  return _rotate(axis, parts, query.reshape(B, S, G, H // G, K), key, value, last, valid).reshape(B, S, H, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate(axis, parts, query, key, value, last, valid):
  return _rotate_forward(axis, parts, query, key, value, last, valid)[0]


def _rotate_forward(axis, parts, query, key, value, last, valid):
  """Per step one block of keys: what was added up so far shrinks when a larger logit turns up."""
  B, S, G, R, K = query.shape
  total, weight, largest = jnp.zeros((B, S, G, R, K), jnp.float32), jnp.zeros((B, G, R, S)), jnp.full((B, G, R, S), HIDDEN)
  block = key, value, valid
  for step in range(parts):
    logits = _logits(query, block[0], last, block[2], _first_place(axis, parts, step, key.shape[1]))
    new = jnp.maximum(largest, jnp.max(logits, axis=-1))
    shrink, p = jnp.exp(largest - new), jnp.exp(logits - new[..., None])
    total = total * _per_query(shrink) + jnp.einsum("bgrst,btgk->bsgrk", p.astype(value.dtype), block[1], preferred_element_type=jnp.float32)
    weight, largest = weight * shrink + jnp.sum(p, axis=-1), new
    block = _pass_on(block, axis, parts) if step + 1 < parts else block
  out = checkpoint_name((total / _per_query(weight)).astype(query.dtype), ATTENTION_OUTPUT)
  normaliser = checkpoint_name(largest + jnp.log(weight), ATTENTION_OUTPUT)
  return out, (query, key, value, last, valid, out, normaliser)


def _rotate_backward(axis, parts, saved, d_out):
  """The gradient of a block of keys travels with it, and is home after a whole turn."""
  query, key, value, last, valid, out, normaliser = saved
  d_out = d_out.astype(jnp.float32)
  scale, common = 1 / math.sqrt(query.shape[-1]), jnp.einsum("bsgrk,bsgrk->bgrs", d_out, out.astype(jnp.float32))
  d_query, d_key, d_value = (jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
  block = key, value, valid
  for step in range(parts):
    logits = _logits(query, block[0], last, block[2], _first_place(axis, parts, step, key.shape[1]))
    p = jnp.exp(logits - normaliser[..., None])
    d_p = jnp.einsum("bsgrk,btgk->bgrst", d_out.astype(value.dtype), block[1], preferred_element_type=jnp.float32)
    d_logits = (p * (d_p - common[..., None]) * scale).astype(query.dtype)
    d_query += jnp.einsum("bgrst,btgk->bsgrk", d_logits, block[0], preferred_element_type=jnp.float32)
    d_key += jnp.einsum("bgrst,bsgrk->btgk", d_logits, query, preferred_element_type=jnp.float32)
    d_value += jnp.einsum("bgrst,bsgrk->btgk", p.astype(value.dtype), d_out.astype(value.dtype), preferred_element_type=jnp.float32)
    d_key, d_value = _pass_on((d_key, d_value), axis, parts)
    block = _pass_on(block, axis, parts) if step + 1 < parts else block
  return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def _logits(query, key, last, valid, first) -> jax.Array:
  # B G R S T; `first` is the index of the first of these keys in the full sequence.
  seen = (first + jnp.arange(key.shape[1])[None, None] <= last[:, :, None]) & valid[:, None]
  logits = jnp.einsum("bsgrk,btgk->bgrst", query, key, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
  return jnp.where(seen[:, None, None], logits, HIDDEN)


def _first_place(axis, parts, step, length):
  return 0 if parts == 1 else (jax.lax.axis_index(axis) - step) % parts * length


def _pass_on(arrays, axis, parts):
  if parts == 1:
    return arrays
  return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % parts) for i in range(parts)]), arrays)


def _per_query(x: jax.Array) -> jax.Array:
  return jnp.moveaxis(x, 3, 1)[..., None]  # B G R S -> B S G R 1
