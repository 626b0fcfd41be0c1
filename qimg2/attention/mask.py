"""Who sees whom, in memory that grows with the sequence and not with its square: the last key that each query sees, and which keys are real.

Block-causal attention has this form, because text is causal and an image is one run of tokens: a text token sees up to itself, an image
token up to the end of its image, the target everything.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Mask:
  """Who sees whom: query s sees key t if t <= last[s] and valid[t]. Without arguments everyone sees everything.

  Attributes:
    last: [B, S] int32, index of the last key that a query sees; None: all keys.
    valid: [B, T] bool, False for padding; None: no padding.
    num_prefix: so many queries at the start see keys before `num_prefix` only; those after them see all. 0 without `last`.
    reach: `last` of a query in the prefix is at most its own index plus this; 0 for causal attention.
  """
  last: jax.Array | None = None
  valid: jax.Array | None = None
  num_prefix: int = flax.struct.field(pytree_node=False, default=0)
  reach: int = flax.struct.field(pytree_node=False, default=0)


def causal(batch: int, length: int) -> Mask:
  """Every token sees itself and what comes before it. Padding on the right needs nothing more."""
  return Mask(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)), None, length, 0)


def block_causal(block: jax.Array, valid: jax.Array, num_prefix: int, longest: int) -> Mask:
  """A token sees what comes before it and all of its own block; padding is seen by nobody.

  Args:
    block: [B, S] int32, number of the block, 0 for text; a block is one run, and all after `num_prefix` is one.
    valid: [B, S] bool.
    num_prefix: tokens before the target.
    longest: bound on the length of a block in the prefix, at most which is skipped; 0 or 1 for text alone.
  """
  place = jnp.arange(block.shape[1], dtype=jnp.int32)
  ends = jnp.concatenate([block[:, 1:] != block[:, :-1], jnp.ones_like(block[:, :1], bool)], axis=1)
  last = jax.lax.cummin(jnp.where(ends | (block == 0), place, block.shape[1]), axis=1, reverse=True)
  return Mask(last, valid, num_prefix, max(0, longest - 1))


def dense(mask: Mask, num_keys: int) -> jax.Array | None:
  """`mask` as a bool array [B, S or 1, T], True where a query sees a key; None if everyone sees everything."""
  seen = None if mask.last is None else jnp.arange(num_keys)[None, None] <= mask.last[:, :, None]
  if mask.valid is None:
    return seen
  return mask.valid[:, None] if seen is None else seen & mask.valid[:, None]
