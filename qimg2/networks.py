"""From a batch to what the generator sees: latents, text states and the layout of the joint sequence.

The joint sequence keeps the condition encoder's token order (Qwen-Image-2.0 report, equation 1): every image slot of the prompt is replaced
by the VAE latents of that image, four latents (16 px each) per slot of 32 px, in raster order of the whole image; the target comes last.
Positions count true tokens, never padding: one per text token, max(h, w) per image of h x w latents.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qimg2 import params as P
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.sharding import Shard, identity, to_host

LATENTS_PER_SLOT = 4
Grid = tuple[int, int]


@flax.struct.dataclass
class Condition:
  """What a batch of prompts and condition images says to the generator; every array has the batch's rows first.

  Attributes:
    text: [B, M, E] states of the condition encoder without the system turn.
    images: [B, I, C] normalised latents of the condition images, or None.
    layout: the joint sequence.
    cache: keys and values of the prefix, made by `Networks.cache`; they stand for `text` and `images`.
  """
  text: jax.Array | None
  images: jax.Array | None
  layout: mmdit.Layout
  cache: mmdit.Cache | None = None


@dataclasses.dataclass(frozen=True)
class Networks:
  """The three networks of a run closed over their configs, as the functions that algorithms, evaluation and sampling call.

  Attributes:
    model, encoder, vae: configs.
    num_system_tokens: length of the system turn, dropped after encoding.
    shard: constrains activations to the mesh.
  """
  model: mmdit.Config
  encoder: qwen3_vl.Config
  vae: vae.Config
  num_system_tokens: int
  shard: Shard = identity

  def specs(self) -> dict[str, dict]:
    """The declared weights of every role. The VAE carries the mean and deviation of its latents, one number per channel."""
    return {"model": mmdit.specs(self.model), "encoder": qwen3_vl.specs(self.encoder), "vae": vae_specs(self.vae)}

  def condition(self, params: dict, batch: dict) -> Condition:
    """The condition of a batch: text states, source latents and layout. No gradient flows into it.

    What a latent cache holds is taken as it is: `source_latents` in place of what the VAE makes of `sources`, `features` in place of the text
    states. Its states are zero at padding, as the encoder's are, and no valid place of the joint sequence sees one of those.
    """
    frozen = {role: jax.lax.stop_gradient(params[role]) for role in ("encoder", "vae")}
    n = self.num_system_tokens
    text = batch["features"].astype(self.encoder.dtype) if "features" in batch else self.text_states(frozen, batch)
    latents = [x.astype(jnp.float32) for x in batch["source_latents"]] if "source_latents" in batch else [
        self.encode(frozen["vae"], source) for source in batch.get("sources", ())]
    layout = make_layout(batch["tokens"][:, n:], batch["token_count"] - n, self.encoder.image_token_id, [x.shape[1:3] for x in latents],
                         self._target_grid(batch))
    images = jnp.concatenate([flatten_grid(x) for x in latents], axis=1) if latents else None
    return Condition(text, images, layout)

  def text_states(self, params: dict, batch: dict) -> jax.Array:
    """[B, M', E] states of a batch's prompts in the encoder's type, without the system turn and zero at padding; it looks at `sources`."""
    seen = [on_white(source) for source in batch.get("sources", ())] if self.encoder.vision is not None else ()
    states = qwen3_vl.apply(self.encoder, params["encoder"], batch["tokens"], batch["token_count"], seen, shard=self.shard)
    return states[:, self.num_system_tokens:]

  def target_latents(self, params: dict, batch: dict) -> jax.Array:
    """[B, h, w, C] float32 normalised latents of a batch's targets: those of a latent cache, or what the VAE makes of pixels. No gradient
    flows into them."""
    x = batch["latents"].astype(jnp.float32) if "latents" in batch else self.encode(params["vae"], batch["target"])
    return jax.lax.stop_gradient(x)

  def _target_grid(self, batch: dict) -> Grid:
    if "latents" in batch:
      return batch["latents"].shape[1:3]
    height, width = batch["target"].shape[1:3]
    return height // self.vae.spatial_factor, width // self.vae.spatial_factor

  def encode(self, params: dict, pixels: jax.Array) -> jax.Array:
    """Normalised latents [B, h, w, C] (posterior mode) of uint8 pixels [B, H, W, 3 or 4]."""
    mean = vae.encode(self.vae, params, vae.pixels_to_float(pixels, self.vae.image_channels), shard=self.shard).mode
    return vae.normalize_latents(mean, params["statistics"]["mean"], params["statistics"]["std"])

  def decode(self, params: dict, latents: jax.Array) -> jax.Array:
    """uint8 pixels [B, H, W, C] of normalised latents [B, h, w, C]."""
    x = vae.denormalize_latents(latents, params["statistics"]["mean"], params["statistics"]["std"])
    return vae.float_to_pixels(vae.decode(self.vae, params, x, shard=self.shard))

  def autoencode(self, params: dict, pixels: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array, vae.Posterior]:
    """(reconstruction, original, posterior) of uint8 pixels, images as floats in about [-1, 1]; a key draws the latents from the posterior."""
    original = vae.pixels_to_float(pixels, self.vae.image_channels)
    posterior = vae.encode(self.vae, params, original, shard=self.shard)
    latents = posterior.mode if key is None else posterior.sample(key)
    return vae.decode(self.vae, params, latents, clamp=False, shard=self.shard), original, posterior

  def velocity(self, params: dict, x_t: jax.Array, t: jax.Array, cond: Condition) -> jax.Array:
    """The generator's velocity [B, h, w, C] at `x_t` and times `t` [B]; `params` are the weights of role "model"."""
    x = flatten_grid(x_t)
    if cond.cache is None:
      v = mmdit.apply(self.model, params, x, t, cond.text, cond.images, cond.layout, shard=self.shard)
    else:
      v = mmdit.apply_cached(self.model, params, x, t, cond.cache, cond.layout, shard=self.shard)
    return v.reshape(x_t.shape)

  def cache(self, params: dict, cond: Condition) -> Condition:
    """`cond` with the prefix computed once for all sampling steps; `params` are the weights of role "model"."""
    cache = mmdit.prefix_cache(self.model, params, cond.text, cond.images, cond.layout, shard=self.shard)
    return Condition(None, None, cond.layout, cache)


def vae_specs(cfg: vae.Config) -> dict:
  """The VAE's weights and its latent statistics, which start as the config's and are measured at the end of VAE training."""
  def constant(values: Sequence[float]) -> P.Param:
    init: Callable = lambda key, shape, dtype: jnp.asarray(values, dtype)
    return P.Param((cfg.latent_channels,), (None,), init)
  return {**vae.specs(cfg), "statistics": {"mean": constant(cfg.latents_mean), "std": constant(cfg.latents_std)}}


def fingerprint(params: dict) -> str:
  """Names weights by all of their values: equal for equal ones, however they lie on the mesh and whatever floating type holds them."""
  digest = hashlib.sha256()
  for (path, leaf), sums in zip(jax.tree.leaves_with_path(params), to_host(_all_checksums(jax.tree.leaves(params)))):
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {[int(one) for one in sums]}\n".encode())
  return digest.hexdigest()[:16]


@jax.jit
def _all_checksums(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  return [_checksums(leaf) for leaf in leaves]


def _checksums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The sum of a leaf's float32 bits, and the sum weighted by place, both modulo 2^32: whole numbers, so that no order of adding changes them."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  strides = [int(np.prod(x.shape[dim + 1:], dtype=np.int64)) % 2**32 for dim in range(x.ndim)]
  place = sum((jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * np.uint32(stride) for dim, stride in enumerate(strides)), np.uint32(0))
  return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * (place * np.uint32(2) + np.uint32(1)), dtype=jnp.uint32)


def on_white(pixels: jax.Array) -> jax.Array:
  """uint8 RGB [B, H, W, 3] of RGB or RGBA pixels: the condition encoder sees transparency as white paper."""
  if pixels.shape[-1] == 3:
    return pixels
  colour, alpha = pixels[..., :3].astype(jnp.float32), pixels[..., 3:].astype(jnp.float32) / 255
  return jnp.round(alpha * colour + (1 - alpha) * 255).astype(jnp.uint8)


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
  """(index, positions, block, valid) of the `length` prefix places, rows first."""
  sizes = jnp.array([h * w for h, w in grids], jnp.int32)
  starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes)])  # first latent of each image, and one past the last
  advance = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(jnp.array([max(g) for g in grids], jnp.int32))])
  rows = jnp.concatenate([centred_grid(g)[0] for g in grids] or [jnp.zeros(1, jnp.int32)])
  columns = jnp.concatenate([centred_grid(g)[1] for g in grids] or [jnp.zeros(1, jnp.int32)])

  def one(tokens, count):
    is_slot = (tokens == image_token_id) & (jnp.arange(tokens.shape[0]) < count)
    ends = jnp.cumsum(jnp.where(is_slot, LATENTS_PER_SLOT, 1))
    token = jnp.minimum(jnp.searchsorted(ends, jnp.arange(length), side="right"), tokens.shape[0] - 1)  # which prompt token a place belongs to
    is_latent = is_slot[token]
    latent = jnp.cumsum(is_latent) - is_latent  # latents before this place
    image = jnp.searchsorted(starts[1:], latent, side="right")  # images wholly before this place
    text = jnp.cumsum(~is_latent) - ~is_latent
    p = text + advance[image]
    inside = jnp.minimum(latent, rows.shape[0] - 1)
    positions = jnp.stack([p, jnp.where(is_latent, rows[inside], p), jnp.where(is_latent, columns[inside], p)], axis=-1)
    index = jnp.where(is_latent, tokens.shape[0] + latent, token)
    valid = jnp.arange(length) < count + (ends[-1] - tokens.shape[0])
    return index.astype(jnp.int32), positions, jnp.where(is_latent, image + 1, 0), valid

  return jax.vmap(one)(tokens, token_count)
