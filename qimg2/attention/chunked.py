"""Attention for CPUs: head by head and a few hundred queries at a time, so that logits stay in the cache, and those of the backward pass are computed
again in place of being kept. Queries of the prefix are not compared with the target's keys, which none of them sees.

The logits of a long sequence do not fit any cache, and the definition (`qimg2.attention.xla`) passes over them about ten times. Here the softmax
divides after the product with the values. That product in float32 is kept for the backward pass, with the largest logit and the sum of each query;
the logits are computed again (arXiv 2205.14135 does so on GPUs).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qimg2 import layers
from qimg2.attention.mask import Mask

CHUNK = 384  # queries at a time; with a thousand keys their logits take 1.5 MB
MIN_LOGITS = 2**18  # per head: what the definition computes as fast


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> jax.Array:
  """Attention [B, S, H, K]; arguments as in `qimg2.attention.attention`."""
  S, P = query.shape[1], mask.num_prefix
  if mask.last is None or not 0 < P < S:
    return _attend(query, key, value, mask.last, mask.valid)
  valid = lambda part: None if mask.valid is None else mask.valid[:, part]
  prefix, all_keys = slice(0, P), slice(None)
  return jnp.concatenate([
      _attend(query[:, prefix], key[:, prefix], value[:, prefix], mask.last[:, prefix], valid(prefix)),
      _attend(query[:, P:], key, value, None, valid(all_keys))], axis=1)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, last: jax.Array | None, valid: jax.Array | None) -> jax.Array:
  B, S, H, K = query.shape
  T, G = key.shape[1:3]
  num = math.ceil(S / CHUNK)
  size = math.ceil(S / num)
  pad = lambda x: jnp.pad(x, [(0, 0), (0, num * size - S)] + [(0, 0)] * (x.ndim - 2))
  queries = pad(query).reshape(B, num, size, G, H // G, K).transpose(0, 3, 1, 4, 2, 5)  # B G num R size K
  keys, values = (x.transpose(0, 2, 1, 3) for x in (key, value))  # B G T K
  last = None if last is None else pad(last).reshape(B, num, size)
  place = jnp.arange(T)[None]

  @functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(layers.ATTENTION_OUTPUT))
  def one_chunk(k, v, seen, chunk):
    q, last = chunk  # R size K, size
    # One matrix of all heads' queries: with two dimensions to sum over, the gradient of the keys would begin with a copy of the transposed logits.
    logits = jnp.einsum("sk,tk->st", q.reshape(-1, K), k, preferred_element_type=jnp.float32) / math.sqrt(K)
    if last is not None:
      ahead = place <= last[:, None]
      seen = ahead if seen is None else seen & ahead
    if seen is not None:
      logits = jnp.where(jnp.tile(jnp.broadcast_to(seen, (size, T)), (H // G, 1)), logits, jnp.finfo(jnp.float32).min)
    keep = lambda x: checkpoint_name(x, layers.ATTENTION_OUTPUT)  # by policies of whole layers, too, or they would compute all of it once more
    weights = jnp.exp(logits - keep(jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))))
    sums = keep(jnp.sum(weights, axis=-1, keepdims=True))
    values = keep(jnp.einsum("st,tk->sk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32))
    return (values / sums).astype(v.dtype).reshape(q.shape)

  def one_row(row):
    q, k, v, last, valid = row
    seen = None if valid is None else valid[None]
    return jax.lax.map(lambda head: jax.lax.map(functools.partial(one_chunk, head[1], head[2], seen), (head[0], last)), (q, k, v))

  out = jax.lax.map(one_row, (queries, keys, values, last, valid))  # B G num R size K
  return out.transpose(0, 2, 4, 1, 3, 5).reshape(B, num * size, H, K)[:, :S]
