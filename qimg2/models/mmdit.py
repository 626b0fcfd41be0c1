"""The generator: a single-stream multimodal diffusion transformer (Qwen-Image-2.0 report, section 3.2; sizes and details of the 2.1 release).

Prompt tokens, the latents of condition images and the noisy target latents run as one sequence through L equal blocks without biases:

  x = x + tanh(gate1) · Attention(LN(x) · (1 + scale1))
  x = x + tanh(gate2) · SwiGLU(LN(x) · (1 + scale2))

The four modulation vectors are one linear map of the time embedding, shared by all blocks, multiplicative only. Queries and keys are
RMS-normalised per head and rotated by MSRoPE: a position is (frame, height, width), text has the same number on all three, an image block
keeps its frame and centres its grid on zero. The last tokens are the target; their output is the velocity.

With "block_causal" attention and prefix tokens at t = 0 nothing of the target reaches the prefix, so its keys and values are the same at
every sampling step: `prefix_cache` computes them once, and `apply_cached` runs the target alone.

Left out: the clipping that float16 needs (use bfloat16).
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from qimg2 import adapters, attention, layers
from qimg2 import params as P
from qimg2.sharding import Shard, divide_tokens, gather_tokens, identity, on_one_cpu, parts_of

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
    attention_backend: what computes attention, see `qimg2.attention`; "xla" for methods that differentiate forward.
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
  attention_backend: str = "auto"
  remat: str = "none"
  dtype: str = "float32"

  def __post_init__(self):
    if sum(self.rope_dims) != self.head_dim or any(d % 2 for d in self.rope_dims):
      raise ValueError(f"model.rope_dims {self.rope_dims} must be even and sum to model.head_dim {self.head_dim}.")
    if self.attention not in ("block_causal", "full"):
      raise ValueError(f"model.attention is {self.attention!r}: choose 'block_causal' or 'full'.")
    if self.condition_time not in ("zero", "shared"):
      raise ValueError(f"model.condition_time is {self.condition_time!r}: choose 'zero' or 'shared'.")
    attention.check_backend(self.attention_backend)

  @property
  def prefix_is_fixed(self) -> bool:
    """True if prefix tokens depend neither on the target nor on its time, so that their keys and values can be cached."""
    return self.attention == "block_causal" and self.condition_time == "zero"


@flax.struct.dataclass
class Layout:
  """Where everything is in the joint sequence of S = P prefix tokens and N target tokens. Made by `qimg2.layout.make_layout`.

  Attributes:
    index: [B, P] int32, which token of concat(text [M], condition latents) is at each index of the prefix.
    positions: [B, S, 3] int32, (frame, height, width).
    block: [B, S] int32, number of the image block, 0 for text.
    valid: [B, S] bool, False for padding.
  """
  index: jax.Array
  positions: jax.Array
  block: jax.Array
  valid: jax.Array


@flax.struct.dataclass
class Cache:
  """Keys (rotated) and values of the prefix in every layer, [L, B, P, H, K] each."""
  key: jax.Array
  value: jax.Array


def specs(cfg: Config) -> dict:
  """The declared weights. Modulation, output scale and output projection start at zero, so every block starts as the identity."""
  D, C, E = cfg.width, cfg.latent_channels, cfg.context_width
  return {
      "img_in": P.Param((C, D), (None, "embed"), P.fan_in(C), num_inputs=1),
      "txt_in": {
          "norm": P.Param((E,), (None,), P.zeros),
          "in": P.Param((E, D), ("embed", "mlp"), P.fan_in(E), num_inputs=1),
          "out": P.Param((D, D), ("mlp", "embed"), P.fan_in(D), num_inputs=1),
      },
      "time": {
          "in": P.Param((cfg.time_dim, D), (None, "mlp"), P.fan_in(cfg.time_dim), num_inputs=1),
          "out": P.Param((D, D), ("mlp", "embed"), P.fan_in(D), num_inputs=1),
      },
      "modulation": P.Param((D, NUM_MODULATIONS, D), ("embed", None, None), P.zeros, num_inputs=1),
      "blocks": P.stack(_block_specs(cfg), cfg.num_layers),
      "norm_out": P.Param((D, D), ("embed", None), P.zeros, num_inputs=1),
      "proj_out": P.Param((D, C), ("embed", None), P.zeros, num_inputs=1),
  }


def _block_specs(cfg: Config) -> dict:
  D, H, K, F = cfg.width, cfg.num_heads, cfg.head_dim, cfg.width * cfg.mlp_ratio
  project = P.Param((D, H, K), ("embed", "heads", None), P.fan_in(D), num_inputs=1)
  return {
      "attn": {
          "q": project, "k": project, "v": project,
          "out": P.Param((H, K, D), ("heads", None, "embed"), P.fan_in(H * K), num_inputs=2),
          "norm_q": P.Param((K,), (None,), P.ones),
          "norm_k": P.Param((K,), (None,), P.ones),
      },
      "mlp": {
          "gate": P.Param((D, F), ("embed", "mlp"), P.fan_in(D), num_inputs=1),
          "proj": P.Param((D, F), ("embed", "mlp"), P.fan_in(D), num_inputs=1),
          "out": P.Param((F, D), ("mlp", "embed"), P.fan_in(F), num_inputs=1),
      },
  }


@layers.full_precision
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
  prefix = _embed_prefix(cfg, params, text, images, layout, shard)
  x = jnp.concatenate([prefix, layers.linear(target.astype(cfg.dtype), params["img_in"])], axis=1)  # B S D
  times = jnp.stack([t, jnp.zeros_like(t) if cfg.condition_time == "zero" else t])
  *modulation, scale_out = _modulate(cfg, params, times)  # 2 B D
  x, _ = _run_blocks(cfg, params, x, modulation, layout.positions, _mask(cfg, layout, images), shard, num_prefix=prefix.shape[1])
  return _project_out(cfg, params, x[:, -target.shape[1]:], scale_out)


@layers.full_precision
def prefix_cache(cfg: Config, params: dict, text: jax.Array, images: jax.Array | None, layout: Layout, shard: Shard = identity) -> Cache:
  """The prefix's keys and values in every layer, for `apply_cached`; arguments as in `apply`.

  Raises:
    ValueError: the config lets the prefix depend on the target.
  """
  if not cfg.prefix_is_fixed:
    raise ValueError("The prefix can only be cached with model.attention 'block_causal' and model.condition_time 'zero', but the config has "
                     f"{cfg.attention!r} and {cfg.condition_time!r}: sample without a cache.")
  x = _embed_prefix(cfg, params, text, images, layout, shard)  # B P D
  alone = jax.tree.map(lambda leaf: leaf[:, :x.shape[1]], layout)
  *modulation, _ = _modulate(cfg, params, jnp.zeros((1, x.shape[0])))  # 1 B D
  _, cache = _run_blocks(cfg, params, x, modulation, alone.positions, _mask(cfg, alone, images), shard, keep=True)
  return cache


@layers.full_precision
def apply_cached(cfg: Config, params: dict, target: jax.Array, t: jax.Array, cache: Cache, layout: Layout, shard: Shard = identity) -> jax.Array:
  """`apply` with the prefix in place of its text and images: the same velocity [B, N, C], at the cost of the target tokens alone."""
  x = layers.linear(target.astype(cfg.dtype), params["img_in"])  # B N D
  *modulation, scale_out = _modulate(cfg, params, t[None])  # 1 B D
  mask = attention.Mask(valid=layout.valid)  # the target comes last and sees everything
  x, _ = _run_blocks(cfg, params, x, modulation, layout.positions[:, -x.shape[1]:], mask, shard, cache)
  return _project_out(cfg, params, x, scale_out)


def _run_blocks(cfg: Config, params: dict, x: jax.Array, modulation: list[jax.Array], positions: jax.Array, mask: attention.Mask,
                shard: Shard, past: Cache | None = None, keep: bool = False, num_prefix: int = 0) -> tuple[jax.Array, Cache | None]:
  """(tokens [B, S, D] after the last block, their keys and values of every layer if `keep`); `past` tokens come before these.

  Modulation [1 or 2, B, D] is that of all tokens, or of those after the first `num_prefix` and of these. It is spread over the tokens inside the
  layer, so that its gradient is summed over tokens there, in place of being carried from layer to layer as one row per token.

  Between its products a layer divides the tokens as the rules' "residual" says. Tokens that nobody sees make them divisible.
  """
  num_tokens = x.shape[1]
  extra = -num_tokens % parts_of(shard, "residual")
  x, positions, mask = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, extra if dim == 1 else 0) for dim in range(leaf.ndim)]), (x, positions, mask))
  angles = layers.concat_angles(jnp.moveaxis(positions, -1, 0), cfg.rope_dims, cfg.rope_theta)  # B S K/2
  is_prefix = (jnp.arange(x.shape[1]) < num_prefix)[:, None]  # S 1
  join = on_one_cpu(shard)
  spread = lambda m: jnp.where(is_prefix, m[1][:, None], m[0][:, None]) if num_prefix else m[0][:, None]  # B S D
  scale1, gate1, scale2, gate2 = modulation
  scale1, gate1, scale2, gate2 = 1 + scale1, jnp.tanh(gate1), 1 + scale2, jnp.tanh(gate2)

  def block(x, inputs):
    weights, past = inputs
    a = gather_tokens(layers.layer_norm(x, eps=cfg.eps) * spread(scale1), shard)
    attended, own = _attend(cfg, weights["attn"], a, angles, mask, past, shard)
    x = x + spread(gate1) * divide_tokens(attended, shard)
    b = gather_tokens(layers.layer_norm(x, eps=cfg.eps) * spread(scale2), shard)
    b = layers.swiglu(b, *(weights["mlp"][name] for name in ("gate", "proj", "out")), join, shard)
    x = x + spread(gate2) * divide_tokens(b, shard)
    return shard(x, "batch", "residual", None), own if keep else None

  x, cache = jax.lax.scan(layers.checkpoint_layer(block, cfg.remat), shard(x, "batch", "residual", None), (params["blocks"], past))
  return x[:, :num_tokens], jax.tree.map(lambda leaf: leaf[:, :, :num_tokens], cache)


def _project_out(cfg: Config, params: dict, x: jax.Array, scale: jax.Array) -> jax.Array:
  return layers.linear(layers.layer_norm(x, eps=cfg.eps) * (1 + scale[0][:, None]), params["proj_out"]).astype(jnp.float32)


def _embed_prefix(cfg: Config, params: dict, text: jax.Array, images: jax.Array | None, layout: Layout,
                  shard: Shard) -> jax.Array:
  w = params["txt_in"]
  x = layers.rms_norm(text.astype(cfg.dtype), 1 + w["norm"], cfg.eps)
  x = layers.linear(jax.nn.gelu(layers.linear(x, w["in"]), approximate=True), w["out"])  # B M D
  if images is None:
    return x
  x = jnp.concatenate([x, layers.linear(images.astype(cfg.dtype), params["img_in"])], axis=1)
  # Whole rows: left to itself, the partitioner splits the tokens of this gather, and over context and tensor together its gradient is wrong.
  x = shard(x, "batch", None, None)
  return shard(jnp.take_along_axis(x, layout.index[..., None], axis=1), "batch", None, None)  # B P D


def _modulate(cfg: Config, params: dict, times: jax.Array) -> list[jax.Array]:
  """The four modulation vectors and the output scale, each [..., B, D], at `times` [..., B]."""
  active = jax.nn.silu(_embed_time(cfg, params["time"], times))
  maps = [adapters.output(params["modulation"], i) for i in range(NUM_MODULATIONS)] + [params["norm_out"]]
  return [layers.linear(active, weight) for weight in maps]


def _embed_time(cfg: Config, params: dict, t: jax.Array) -> jax.Array:
  x = layers.sinusoid(1000.0 * t, cfg.time_dim).astype(cfg.dtype)
  return layers.linear(jax.nn.silu(layers.linear(x, params["in"])), params["out"])


def _attend(cfg: Config, params: dict, x: jax.Array, angles: jax.Array, mask: attention.Mask, past: Cache | None,
            shard: Shard) -> tuple[jax.Array, Cache]:
  join = on_one_cpu(shard)
  q, k, v = (shard(layers.linear(x, params[name], join=join), "batch", "token", "heads", None) for name in ("q", "k", "v"))  # B S H K
  q = layers.rotate_pairs(layers.rms_norm(q, params["norm_q"], cfg.eps), angles)
  own = Cache(layers.rotate_pairs(layers.rms_norm(k, params["norm_k"], cfg.eps), angles), v)
  seen = own if past is None else jax.tree.map(lambda before, now: jnp.concatenate([before, now], axis=1), past, own)
  attended = attention.attention(q, seen.key, seen.value, mask, cfg.attention_backend, shard)
  return layers.linear(attended, params["out"], num_dims=2, join=join), own


def _mask(cfg: Config, layout: Layout, images: jax.Array | None) -> attention.Mask:
  if cfg.attention == "full":
    return attention.Mask(valid=layout.valid)
  return attention.block_causal(layout.block, layout.valid, layout.index.shape[1], 0 if images is None else images.shape[1])


def attention_mask(cfg: Config, layout: Layout) -> jax.Array:
  """[B, S or 1, S] bool, True where a query (row) may see a key: never padding; under "block_causal" what comes before it or its own image."""
  return attention.dense(_mask(cfg, layout, layout.block), layout.block.shape[1])
