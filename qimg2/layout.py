"""The joint sequence of prompt, condition images and target: what stands where, at which position, in which image block.

It keeps the condition encoder's token order (Qwen-Image-2.0 report, equation 1): every image slot of the prompt is replaced by the VAE latents
of that image, four latents (16 px each) per slot of 32 px, in raster order of the whole image; the target comes last. Positions count true
tokens, never padding: one per text token, max(h, w) per image of h x w latents.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qimg2.batch import Grid
from qimg2.models import mmdit

LATENTS_PER_SLOT = 4


def flatten_grid(x: jax.Array) -> jax.Array:
  """[B, h, w, C] -> [B, h·w, C] in raster order."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def make_layout(tokens: jax.Array, token_count: jax.Array, image_token_id: int, source_grids: Sequence[Grid], target_grid: Grid) -> mmdit.Layout:
  """The joint sequence of a batch.

  Args:
    tokens: [B, M] prompt ids after the system turn, right-padded; each image slot repeated once per 2 x 2 latents.
    token_count: [B] number of real tokens.
    image_token_id: id of an image slot.
    source_grids: (h, w) in latents of each condition image, in prompt order, the same for all rows.
    target_grid: (h, w) of the target in latents.

  Raises:
    ValueError: a condition image whose latents do not fill whole slots.
  """
  odd = [grid for grid in source_grids if grid[0] % 2 or grid[1] % 2]
  if odd:
    raise ValueError(f"A condition image of {odd[0][0]} x {odd[0][1]} latents does not fill whole prompt slots: make its sides multiples of 32 px.")
  num_latents = sum(h * w for h, w in source_grids)
  prefix = _prefix(tokens, token_count, image_token_id, source_grids, tokens.shape[1] + num_latents // LATENTS_PER_SLOT * (LATENTS_PER_SLOT - 1))
  index, positions, block, valid = prefix
  num_text = token_count - num_latents // LATENTS_PER_SLOT
  frame = num_text + sum(max(grid) for grid in source_grids)  # B
  h, w = centred_grid(target_grid)
  target = jnp.stack(jnp.broadcast_arrays(frame[:, None], h[None], w[None]), axis=-1)
  rows = tokens.shape[0], target_grid[0] * target_grid[1]
  return mmdit.Layout(
      index=index,
      positions=jnp.concatenate([positions, target], axis=1).astype(jnp.int32),
      block=jnp.concatenate([block, jnp.full(rows, len(source_grids) + 1)], axis=1).astype(jnp.int32),
      valid=jnp.concatenate([valid, jnp.ones(rows, bool)], axis=1))


def centred_grid(grid: Grid) -> tuple[jax.Array, jax.Array]:
  """Row and column numbers [h·w] of a grid in raster order, centred: from -(n - n//2) to n//2 - 1."""
  h, w = grid
  rows, columns = jnp.arange(h) - (h - h // 2), jnp.arange(w) - (w - w // 2)
  return jnp.repeat(rows, w), jnp.tile(columns, h)


def _prefix(tokens: jax.Array, token_count: jax.Array, image_token_id: int, grids: Sequence[Grid], length: int):
  """(index, positions, block, valid) of the `length` prefix tokens, rows first."""
  sizes = jnp.array([h * w for h, w in grids], jnp.int32)
  starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes)])  # first latent of each image, and one past the last
  advance = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(jnp.array([max(g) for g in grids], jnp.int32))])
  rows = jnp.concatenate([centred_grid(g)[0] for g in grids] or [jnp.zeros(1, jnp.int32)])
  columns = jnp.concatenate([centred_grid(g)[1] for g in grids] or [jnp.zeros(1, jnp.int32)])

  def one(tokens, count):
    is_slot = (tokens == image_token_id) & (jnp.arange(tokens.shape[0]) < count)
    ends = jnp.cumsum(jnp.where(is_slot, LATENTS_PER_SLOT, 1))
    token = jnp.minimum(jnp.searchsorted(ends, jnp.arange(length), side="right"), tokens.shape[0] - 1)  # which prompt token an index belongs to
    is_latent = is_slot[token]
    latent = jnp.cumsum(is_latent) - is_latent  # latents before this index
    image = jnp.searchsorted(starts[1:], latent, side="right")  # images entirely before this index
    text = jnp.cumsum(~is_latent) - ~is_latent
    p = text + advance[image]
    inside = jnp.minimum(latent, rows.shape[0] - 1)
    positions = jnp.stack([p, jnp.where(is_latent, rows[inside], p), jnp.where(is_latent, columns[inside], p)], axis=-1)
    index = jnp.where(is_latent, tokens.shape[0] + latent, token)
    valid = jnp.arange(length) < count + (ends[-1] - tokens.shape[0])
    return index.astype(jnp.int32), positions, jnp.where(is_latent, image + 1, 0), valid

  return jax.vmap(one)(tokens, token_count)
