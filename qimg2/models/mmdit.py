"""The generator: a single-stream multimodal diffusion transformer (Qwen-Image-2.0 report, section 3.2; sizes and details of the 2.1 release).

Prompt tokens, the latents of condition images and the noisy target latents run as one sequence through L equal blocks without biases:

  x = x + tanh(gate1) · Attention(LN(x) · (1 + scale1))
  x = x + tanh(gate2) · SwiGLU(LN(x) · (1 + scale2))

The four modulation vectors are one linear map of the time embedding, shared by all blocks, multiplicative only. Queries and keys are
RMS-normalised per head and rotated by MSRoPE: a position is (frame, height, width), text has the same number on all three, an image block
keeps its frame and centres its grid on zero. The last tokens are the target; their output is the velocity.

Left out: the clipping that float16 needs (use bfloat16), and a cache of the prefix keys and values.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from qimg2 import layers
from qimg2 import params as P
from qimg2.sharding import Shard, identity

NUM_MODULATIONS = 4  # scale1, gate1, scale2, gate2


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and switches of the generator; the defaults are the published 7B network.

  Attributes:
    latent_channels: C of the latents, at patch size 1.
    width, num_layers, num_heads, head_dim, mlp_ratio: D, L, H, K and F/D.
    context_width: width of the condition encoder's states.
    rope_dims: how many of the K dimensions turn with frame, height and width; even numbers that sum to K.
    attention: "block_causal" (text causal, each image whole, the target sees all) or "full".
    condition_time: "zero" modulates text and condition images as at t = 0, "shared" with the target's t.
    time_dim: size of the sinusoidal time features.
    remat: rematerialisation policy of the blocks, see `layers.checkpoint_layer`.
    dtype: compute type.

  Raises:
    ValueError: a value out of its range.
  """
  latent_channels: int = 64
  width: int = 4096
  num_layers: int = 32
  num_heads: int = 32
  head_dim: int = 128
  mlp_ratio: int = 3
  context_width: int = 4096
  rope_dims: tuple[int, int, int] = (16, 56, 56)
  rope_theta: float = 10_000.0
  eps: float = 1e-6
  attention: str = "block_causal"
  condition_time: str = "zero"
  time_dim: int = 256
  remat: str = "none"
  dtype: str = "float32"

  def __post_init__(self):
    if sum(self.rope_dims) != self.head_dim or any(d % 2 for d in self.rope_dims):
      raise ValueError(f"model.rope_dims {self.rope_dims} must be even and sum to model.head_dim {self.head_dim}.")
    if self.attention not in ("block_causal", "full"):
      raise ValueError(f"model.attention is {self.attention!r}: choose 'block_causal' or 'full'.")
    if self.condition_time not in ("zero", "shared"):
      raise ValueError(f"model.condition_time is {self.condition_time!r}: choose 'zero' or 'shared'.")


@flax.struct.dataclass
class Layout:
  """Where everything lies in the joint sequence of S = P prefix tokens and N target tokens. Made by `conditioning.make_layout`.

  Attributes:
    index: [B, P] int32, which token of concat(text [M], condition latents) stands at each prefix place.
    positions: [B, S, 3] int32, (frame, height, width).
    block: [B, S] int32, number of the image block, 0 for text.
    valid: [B, S] bool, False for padding.
  """
  index: jax.Array
  positions: jax.Array
  block: jax.Array
  valid: jax.Array


def specs(cfg: Config) -> dict:
  """The declared weights. Modulation, output scale and output projection start at zero, so every block starts as the identity."""
  D, C, E = cfg.width, cfg.latent_channels, cfg.context_width
  return {
      "img_in": P.Param((C, D), (None, "embed"), P.fan_in(C)),
      "txt_in": {
          "norm": P.Param((E,), (None,), P.zeros),
          "in": P.Param((E, D), ("embed", "mlp"), P.fan_in(E)),
          "out": P.Param((D, D), ("mlp", "embed"), P.fan_in(D)),
      },
      "time": {
          "in": P.Param((cfg.time_dim, D), (None, "mlp"), P.fan_in(cfg.time_dim)),
          "out": P.Param((D, D), ("mlp", "embed"), P.fan_in(D)),
      },
      "modulation": P.Param((D, NUM_MODULATIONS, D), ("embed", None, None), P.zeros),
      "blocks": P.stack(_block_specs(cfg), cfg.num_layers),
      "norm_out": P.Param((D, D), ("embed", None), P.zeros),
      "proj_out": P.Param((D, C), ("embed", None), P.zeros),
  }


def _block_specs(cfg: Config) -> dict:
  D, H, K, F = cfg.width, cfg.num_heads, cfg.head_dim, cfg.width * cfg.mlp_ratio
  project = P.Param((D, H, K), ("embed", "heads", None), P.fan_in(D))
  return {
      "attn": {
          "q": project, "k": project, "v": project,
          "out": P.Param((H, K, D), ("heads", None, "embed"), P.fan_in(H * K)),
          "norm_q": P.Param((K,), (None,), P.ones),
          "norm_k": P.Param((K,), (None,), P.ones),
      },
      "mlp": {
          "gate": P.Param((D, F), ("embed", "mlp"), P.fan_in(D)),
          "proj": P.Param((D, F), ("embed", "mlp"), P.fan_in(D)),
          "out": P.Param((F, D), ("mlp", "embed"), P.fan_in(F)),
      },
  }


def apply(cfg: Config, params: dict, target: jax.Array, t: jax.Array, text: jax.Array, images: jax.Array | None, layout: Layout,
          shard: Shard = identity) -> jax.Array:
  """The velocity [B, N, C] of the target latents, float32.

  Args:
    cfg: sizes.
    params: weights, as `specs(cfg)`.
    target: [B, N, C] noisy latents in raster order.
    t: [B] time in [0, 1], 1 is noise.
    text: [B, M, E] states of the condition encoder, in prompt order; what stands at image slots and padding is not read.
    images: [B, I, C] clean latents of the condition images, one after the other in raster order; None without images.
    layout: the joint sequence.
    shard: constrains activations to the mesh.
  """
  prefix = _embed_prefix(cfg, params, text, images, layout)
  x = jnp.concatenate([prefix, layers.linear(target.astype(cfg.dtype), params["img_in"])], axis=1)  # B S D
  x = shard(x, "batch", "token", None)
  modulation, scale_out = _modulate(cfg, params, t, prefix.shape[1], x.shape[1])
  angles = layers.concat_angles(jnp.moveaxis(layout.positions, -1, 0), cfg.rope_dims, cfg.rope_theta)  # B S K/2
  mask = attention_mask(cfg, layout)

  def block(x, weights):
    scale1, gate1, scale2, gate2 = modulation
    a = layers.layer_norm(x, eps=cfg.eps) * (1 + scale1)
    x = x + jnp.tanh(gate1) * _attend(cfg, weights["attn"], a, angles, mask, shard)
    b = layers.layer_norm(x, eps=cfg.eps) * (1 + scale2)
    x = x + jnp.tanh(gate2) * layers.swiglu(b, weights["mlp"]["gate"], weights["mlp"]["proj"], weights["mlp"]["out"])
    return shard(x, "batch", "token", None), None

  x, _ = jax.lax.scan(layers.checkpoint_layer(block, cfg.remat), x, params["blocks"])
  num_target = target.shape[1]
  y = layers.layer_norm(x[:, -num_target:], eps=cfg.eps) * (1 + scale_out[:, -num_target:])
  return layers.linear(y, params["proj_out"]).astype(jnp.float32)


def _embed_prefix(cfg: Config, params: dict, text: jax.Array, images: jax.Array | None, layout: Layout) -> jax.Array:
  w = params["txt_in"]
  x = layers.rms_norm(text.astype(cfg.dtype), 1 + w["norm"], cfg.eps)
  x = layers.linear(jax.nn.gelu(layers.linear(x, w["in"]), approximate=True), w["out"])  # B M D
  if images is None:
    return x
  x = jnp.concatenate([x, layers.linear(images.astype(cfg.dtype), params["img_in"])], axis=1)
  return jnp.take_along_axis(x, layout.index[..., None], axis=1)  # B P D


def _modulate(cfg: Config, params: dict, t: jax.Array, num_prefix: int, num_tokens: int) -> tuple[list[jax.Array], jax.Array]:
  """The four modulation vectors and the output scale, each [B, S, D]: prefix tokens take them at their own time."""
  t_prefix = jnp.zeros_like(t) if cfg.condition_time == "zero" else t
  temb = _embed_time(cfg, params["time"], jnp.stack([t_prefix, t]))  # 2 B D
  active = jax.nn.silu(temb)
  per_time = [layers.linear(active, params["modulation"][:, i]) for i in range(NUM_MODULATIONS)] + [layers.linear(active, params["norm_out"])]
  is_target = (jnp.arange(num_tokens) >= num_prefix)[:, None]  # S 1
  *modulation, scale_out = [jnp.where(is_target, m[1][:, None], m[0][:, None]) for m in per_time]  # B S D
  return modulation, scale_out


def _embed_time(cfg: Config, params: dict, t: jax.Array) -> jax.Array:
  x = layers.sinusoid(1000.0 * t, cfg.time_dim).astype(cfg.dtype)
  return layers.linear(jax.nn.silu(layers.linear(x, params["in"])), params["out"])


def _attend(cfg: Config, params: dict, x: jax.Array, angles: jax.Array, mask: jax.Array, shard: Shard) -> jax.Array:
  q, k, v = (shard(layers.linear(x, params[name]), "batch", "token", "heads", None) for name in ("q", "k", "v"))  # B S H K
  q = layers.rotate_pairs(layers.rms_norm(q, params["norm_q"], cfg.eps), angles)
  k = layers.rotate_pairs(layers.rms_norm(k, params["norm_k"], cfg.eps), angles)
  return layers.linear(layers.attention(q, k, v, mask), params["out"], num_dims=2)


def attention_mask(cfg: Config, layout: Layout) -> jax.Array:
  """[B, S, S] bool, True where a query (row) may see a key: never padding; under "block_causal" what comes before it or its own image."""
  visible = layout.valid[:, None, :]
  if cfg.attention == "full":
    return visible
  place = jnp.arange(layout.block.shape[1])
  before = place[:, None] >= place[None, :]
  same_image = (layout.block[:, :, None] == layout.block[:, None, :]) & (layout.block[:, None, :] > 0)
  return visible & (before | same_image)
