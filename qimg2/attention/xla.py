"""The definition of attention, on every device; the only back end that can be differentiated forward (jax.jvp). It holds all logits."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from qimg2.attention.mask import Mask, dense
from qimg2.sharding import Shard, identity, parts_of


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, shard: Shard = identity) -> jax.Array:
  """Attention [B, S, H, K]; over a split sequence each device gets all keys. Arguments as in `qimg2.attention.attention`."""
  if parts_of(shard, "token") > 1:
    gathered = NamedSharding(shard.mesh, shard.spec(key.shape, "batch", None, "kv_heads", None))
    key, value = (jax.lax.with_sharding_constraint(x, gathered) for x in (key, value))
  return dot_product(query, key, value, dense(mask, key.shape[1]))


def dot_product(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Scaled dot-product attention [B, S, H, K] with scale 1/sqrt(K) and softmax in float32.

  Args:
    query: [B, S, H, K].
    key, value: [B, T, G, K]; G divides H, and each of them serves H/G query heads.
    mask: bool, broadcastable to [B, S, T]; True where a query may see a key. None: every query sees every key.
  """
  B, S, H, K = query.shape
  G = key.shape[2]
  query = query.reshape(B, S, G, H // G, K)
  logits = jnp.einsum("bsgrk,btgk->bgrst", query, key, preferred_element_type=jnp.float32) / math.sqrt(K)
  if mask is not None:
    mask = jnp.broadcast_to(mask, (B, S, key.shape[1]))[:, None, None]  # B 1 1 S T
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum("bgrst,btgk->bsgrk", weights, value).reshape(B, S, H, K)
