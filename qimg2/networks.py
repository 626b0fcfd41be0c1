"""The three networks of a run as functions of weights and batches: from pixels and prompts to latents and text states, and the velocity.

Weights are named by their network: "mmdit" (the generator), "qwen3_vl" (the condition encoder), "vae".
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qimg2 import params as P
from qimg2.batch import source_grids, target_grid
from qimg2.layout import flatten_grid, make_layout
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.sharding import Shard, identity, to_host


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
    """{network: declared weights}. The VAE carries the mean and deviation of its latents, one number per channel."""
    return {"mmdit": mmdit.specs(self.model), "qwen3_vl": qwen3_vl.specs(self.encoder), "vae": vae_specs(self.vae)}

  def configs(self) -> dict[str, Any]:
    """{network: config}."""
    return {"mmdit": self.model, "qwen3_vl": self.encoder, "vae": self.vae}

  def compute_dtypes(self) -> dict[str, str]:
    """{network: the type that it computes in}."""
    return {name: config.dtype for name, config in self.configs().items()}

  def condition(self, params: dict, batch: dict) -> Condition:
    """The condition of a batch: text states, source latents and layout. No gradient flows into it.

    What a latent cache holds is taken as it is: `source_latents` in place of what the VAE makes of `sources`, `features` in place of the text
    states. Its states are zero at padding, as the encoder's are, and no valid token of the joint sequence sees one of those.
    """
    n, factor, encoded = self.num_system_tokens, self.vae.spatial_factor, self.encoded(params, batch)
    layout = make_layout(batch["tokens"][:, n:], batch["token_count"] - n, self.encoder.image_token_id, source_grids(batch, factor),
                         target_grid(batch, factor))
    latents = encoded["source_latents"]
    images = jnp.concatenate([flatten_grid(x) for x in latents], axis=1) if latents else None
    return Condition(encoded["features"], images, layout)

  def encoded(self, params: dict, batch: dict) -> dict:
    """Prompt and condition images of a batch as a latent cache holds them, so that `condition` of these computes nothing more: `tokens`,
    `token_count`, `features` in the encoder's type and `source_latents` in float32. No gradient flows into them."""
    frozen = {role: jax.lax.stop_gradient(params[role]) for role in ("qwen3_vl", "vae")}
    text = batch["features"].astype(self.encoder.dtype) if "features" in batch else self.text_states(frozen, batch)
    latents = tuple(x.astype(jnp.float32) for x in batch["source_latents"]) if "source_latents" in batch else tuple(
        self.encode(frozen["vae"], source) for source in batch.get("sources", ()))
    return {"tokens": batch["tokens"], "token_count": batch["token_count"], "features": text, "source_latents": latents}

  def text_states(self, params: dict, batch: dict) -> jax.Array:
    """[B, M', E] states of a batch's prompts in the encoder's type, without the system turn and zero at padding; it looks at `sources`."""
    seen = [on_white(source) for source in batch.get("sources", ())] if self.encoder.vision is not None else ()
    states = qwen3_vl.apply(self.encoder, params["qwen3_vl"], batch["tokens"], batch["token_count"], seen, shard=self.shard)
    return states[:, self.num_system_tokens:]

  def target_latents(self, params: dict, batch: dict) -> jax.Array:
    """[B, h, w, C] float32 normalised latents of a batch's targets: those of a latent cache, or what the VAE makes of pixels. No gradient
    flows into them."""
    x = batch["latents"].astype(jnp.float32) if "latents" in batch else self.encode(params["vae"], batch["target"])
    return jax.lax.stop_gradient(x)

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
    """The generator's velocity [B, h, w, C] at `x_t` and times `t` [B]; `params` are the generator's weights."""
    x = flatten_grid(x_t)
    if cond.cache is None:
      v = mmdit.apply(self.model, params, x, t, cond.text, cond.images, cond.layout, shard=self.shard)
    else:
      v = mmdit.apply_cached(self.model, params, x, t, cond.cache, cond.layout, shard=self.shard)
    return v.reshape(x_t.shape)

  def shared(self, params: dict, cond: Condition, num: int = 1) -> Condition:
    """`cond` with `num` rows in the place of each, and the prefix computed once for these and for all times, where the network allows it
    (`mmdit.Config.prefix_is_fixed`); `params` are the generator's weights, and gradients flow into them. The keys and values of a row are
    2 L P H K numbers of the compute type: 128 MiB for 256 tokens of the published 7B in bfloat16, 2 GiB for a condition image of 1,024 px."""
    repeat = lambda tree, axis=0: jax.tree.map(lambda x: jnp.repeat(x, num, axis), tree) if num > 1 else tree
    if not self.model.prefix_is_fixed:
      return repeat(cond)
    cache = mmdit.prefix_cache(self.model, params, cond.text, cond.images, cond.layout, shard=self.shard)
    return Condition(None, None, repeat(cond.layout), repeat(cache, axis=1))


def vae_specs(cfg: vae.Config) -> dict:
  """The VAE's weights and its latent statistics, which start as the config's and are measured at the end of VAE training."""
  def constant(values: Sequence[float]) -> P.Param:
    init: Callable = lambda key, shape, dtype: jnp.asarray(values, dtype)
    return P.Param((cfg.latent_channels,), (None,), init, exact=True)
  return {**vae.specs(cfg), "statistics": {"mean": constant(cfg.latents_mean), "std": constant(cfg.latents_std)}}


def fingerprint(params: dict) -> str:
  """Names weights by all of their values: equal for equal ones, however they are sharded and whatever floating type holds them."""
  digest = hashlib.sha256()
  for (path, leaf), sums in zip(jax.tree.leaves_with_path(params), to_host(_all_checksums(jax.tree.leaves(params)))):
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {[int(one) for one in sums]}\n".encode())
  return digest.hexdigest()[:16]


@jax.jit
def _all_checksums(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  return [_checksums(leaf) for leaf in leaves]


def _checksums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The sum of a leaf's float32 bits, and the sum weighted by index, both modulo 2^32: integers, so that no order of adding changes them."""
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
