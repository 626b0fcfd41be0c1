"""The condition encoder: Qwen3-VL, a causal language model that reads text and images.

Pre-norm decoder layers over one sequence of text and image tokens:

  x += Attention(RMSNorm(x))    causal, grouped key/value heads, RMSNorm on each query and key head, M-RoPE
  x += SwiGLU(RMSNorm(x))

M-RoPE gives a token a position on three axes (time, row, column). A text token has the same number on all three, and it grows by one per
token. An image of r x c tokens that starts at position p has time p, rows p ... p+r-1 and columns p ... p+c-1; the text after it goes on
at p + max(r, c). The rotated pairs take the axes in turn (time, row, column, time, ...) until a section is used up; the rest turn by time.

Image tokens take the place of the embeddings at `image_token_id`, in order. DeepStack features, one per tapped vision block, are added at
those places after the first layers. The generator reads the state of the last layer *before* the final norm. Video, a key/value cache and
generation of text are left out.

A random init is meant to be useful as it is, frozen, for small runs: embeddings have unit variance and all residual branches together add
about as much again, so a state tells both its token and its context.

Source: Qwen3-VL Technical Report, arXiv 2511.21631. Letters: B batch, M prompt tokens, D width, H heads, G key/value heads, K head dim,
J DeepStack taps, n image tokens of all slots.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qimg2 import attention, layers
from qimg2 import params as P
from qimg2.models.qwen3_vl_vision import VisionConfig, image_grid, vision_apply, vision_specs
from qimg2.sharding import Shard, divide_tokens, gather_tokens, identity, parts_of

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the encoder; the defaults are Qwen3-VL-8B.

  Attributes:
    vocab_size, width, num_layers, num_heads, num_kv_heads, head_dim, mlp_width: of the language model.
    rope_theta: base of the rotary angles.
    mrope_sections: how many of the head_dim / 2 rotated pairs turn by time, row and column.
    eps: of every RMSNorm.
    tie_embeddings: True when the head is the embedding itself.
    image_token_id: the token whose embeddings are replaced by image tokens.
    vision: the vision transformer; None for a text-only encoder.
    dtype: compute type, "float32" or "bfloat16".
    attention_backend: what computes attention in both parts, see `qimg2.attention`.
    remat: rematerialisation policy, see `layers.checkpoint_layer`.

  Raises:
    ValueError: sizes that do not fit each other, or an unknown dtype.
  """
  vocab_size: int = 151_936
  width: int = 4096
  num_layers: int = 36
  num_heads: int = 32
  num_kv_heads: int = 8
  head_dim: int = 128
  mlp_width: int = 12_288
  rope_theta: float = 5e6
  mrope_sections: tuple[int, int, int] = (24, 20, 20)
  eps: float = 1e-6
  tie_embeddings: bool = False
  image_token_id: int = 151_655
  vision: VisionConfig | None = VisionConfig()
  dtype: str = "float32"
  attention_backend: str = "auto"
  remat: str = "none"

  def __post_init__(self):
    object.__setattr__(self, "mrope_sections", tuple(self.mrope_sections))
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}.")
    if len(self.mrope_sections) != 3 or 2 * sum(self.mrope_sections) != self.head_dim:
      raise ValueError(f"mrope_sections {self.mrope_sections} must be three numbers that sum to half of head_dim {self.head_dim}.")
    if max(self.mrope_sections[1:]) > sum(self.mrope_sections) // 3:
      raise ValueError(f"mrope_sections {self.mrope_sections}: row and column may take at most a third of the pairs each.")
    if self.dtype not in DTYPES:
      raise ValueError(f"Unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}.")
    attention.check_backend(self.attention_backend)
    self._check_vision()

  def _check_vision(self):
    if self.vision is None:
      return
    if self.vision.out_width != self.width:
      raise ValueError(f"vision.out_width {self.vision.out_width} must equal the width {self.width} of the language model.")
    if len(self.vision.deepstack_layers) > self.num_layers:
      raise ValueError(f"vision.deepstack_layers {self.vision.deepstack_layers} are more than the {self.num_layers} language layers.")
    if not 0 <= self.image_token_id < self.vocab_size:
      raise ValueError(f"image_token_id {self.image_token_id} must lie in the vocabulary of {self.vocab_size} tokens.")


def specs(cfg: Config) -> dict:
  """The weights of the encoder as a tree of `Param`. `apply` reads neither "norm" nor "head": they serve `logits` only."""
  D, H, G, K, F = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.mlp_width
  residual = 1 / math.sqrt(2 * cfg.num_layers)
  block = {
      "norm1": _norm(D),
      "attn": {
          "q": P.Param((D, H, K), ("embed", "heads", None), P.fan_in(D), num_inputs=1),
          "k": P.Param((D, G, K), ("embed", "kv_heads", None), P.fan_in(D), num_inputs=1),
          "v": P.Param((D, G, K), ("embed", "kv_heads", None), P.fan_in(D), num_inputs=1),
          "q_norm": _norm(K),
          "k_norm": _norm(K),
          "out": P.Param((H, K, D), ("heads", None, "embed"), P.fan_in(H * K, residual), num_inputs=2),
      },
      "norm2": _norm(D),
      "mlp": {
          "gate": P.Param((D, F), ("embed", "mlp"), P.fan_in(D), num_inputs=1),
          "proj": P.Param((D, F), ("embed", "mlp"), P.fan_in(D), num_inputs=1),
          "out": P.Param((F, D), ("mlp", "embed"), P.fan_in(F, residual), num_inputs=1),
      },
  }
  embed = P.Param((cfg.vocab_size, D), ("vocab", "embed"), P.normal(1.0))
  tree = {"embed": embed, "blocks": P.stack(block, cfg.num_layers), "norm": _norm(D)}
  if not cfg.tie_embeddings:
    tree["head"] = P.Param((D, cfg.vocab_size), ("embed", "vocab"), P.fan_in(D))
  if cfg.vision is not None:
    tree["vision"] = vision_specs(cfg.vision)
  return tree


def _norm(width: int) -> P.Param:
  return P.Param((width,), (None,), P.ones)


@layers.full_precision
def apply(cfg: Config, params: dict, tokens: jax.Array, token_count: jax.Array, images: Sequence[jax.Array] = (),
          shard: Shard = identity) -> jax.Array:
  """The state after the last layer, before the final norm: [B, M, D] in `cfg.dtype`, zero at padding.

  Args:
    cfg: sizes.
    params: tree of arrays, as `specs(cfg)`.
    tokens: int32 [B, M] ids, padded on the right with any id.
    token_count: int32 [B], true lengths. Padding changes nothing for the tokens before it.
    images: one uint8 [B, h, w, 3] per image slot, in prompt order. A row's image tokens must be those of all slots, each slot's in one run;
      a row may also have none. Image tokens past the last slot count as text.
    shard: constrains activations to the layout of their logical axes.

  Raises:
    ValueError: images for a text-only encoder, more image tokens than `M`, or an image that `image_grid` refuses.

  Source: arXiv 2511.21631.
  """
  num_tokens, grids = tokens.shape[1], _image_grids(cfg, images, tokens.shape[1])
  tokens = layers.pad(tokens, parts_of(shard, "residual"))
  positions, ordinal, visual = prompt_positions(cfg, tokens, token_count, grids)
  x = jnp.take(params["embed"], tokens, axis=0).astype(cfg.dtype)
  if images:
    features = _place(_look(cfg, params["vision"], images, shard), ordinal, visual)  # 1+J B M D
    x = jnp.where(visual[..., None], features[0], x)
    # One more row, of zeros, for all layers past the taps.
    deepstack = jnp.pad(features[1:], ((0, 1), (0, 0), (0, 0), (0, 0)))
  angles = mrope_angles(cfg, positions)
  causal = attention.causal(*tokens.shape)  # hides the padding too: it is on the right

  def layer(x, inputs):
    index, weights = inputs
    x = _block(cfg, weights, x, angles, causal, shard)
    if images:
      x = x + deepstack[jnp.minimum(index, deepstack.shape[0] - 1)]
    return x, None

  x = shard(x, "batch", "residual", None)
  x, _ = jax.lax.scan(layers.checkpoint_layer(layer, cfg.remat), x, (jnp.arange(cfg.num_layers), params["blocks"]))
  return jnp.where(_real(tokens, token_count)[..., None], x, 0)[:, :num_tokens]


@layers.full_precision
def logits(cfg: Config, params: dict, state: jax.Array) -> jax.Array:
  """Next-token logits [B, M, vocab_size], float32, of the `state` that `apply` returns."""
  head = params["embed"].T if cfg.tie_embeddings else params["head"]
  return layers.linear(layers.rms_norm(state, params["norm"], cfg.eps), head).astype(jnp.float32)


@layers.full_precision
def answer_logits(cfg: Config, params: dict, state: jax.Array, token_count: jax.Array, answers: jax.Array) -> jax.Array:
  """Logits [B, n], float32, that the token after each row's last one is each of `answers`: a few rows of the head, not its whole product.

  The product is float32 whatever `cfg.dtype` says, because a softmax over logits of 20 would feel bfloat16's steps of 1/8.

  Args:
    cfg, params: as in `apply`, with the head, or the embedding where the two are tied.
    state: [B, M, D] that `apply` returns.
    token_count: int32 [B], true lengths.
    answers: int32 [n] ids.
  """
  last = jnp.take_along_axis(state, (token_count - 1)[:, None, None], axis=1)[:, 0].astype(jnp.float32)  # B D
  head = jnp.take(params["embed"], answers, axis=0).T if cfg.tie_embeddings else jnp.take(params["head"], answers, axis=1)  # D n
  normed = layers.rms_norm(last, params["norm"], cfg.eps)
  return jnp.matmul(normed, head.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def prompt_positions(cfg: Config, tokens: jax.Array, token_count: jax.Array,
                     grids: Sequence[tuple[int, int]] = ()) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(positions int32 [3, B, M] on the axes time, row, column; ordinal int32 [B, M]; visual bool [B, M]).

  `visual` marks image tokens, and `ordinal` counts those before each token, over all image slots.

  Args:
    cfg: gives `image_token_id`.
    tokens, token_count: as in `apply`.
    grids: (rows, columns) of image tokens of each slot.
  """
  offsets, passed = _image_tables(grids)
  is_image = ((tokens == cfg.image_token_id) & _real(tokens, token_count)).astype(jnp.int32)
  ordinal = jnp.minimum(jnp.cumsum(is_image, axis=1) - is_image, len(passed) - 1)
  visual = (is_image == 1) & (ordinal < len(passed) - 1)
  num_text = jnp.cumsum(~visual, axis=1, dtype=jnp.int32) - ~visual
  # A text token's ordinal is that of the first token of the next image, whose row and column are zero.
  positions = (num_text + jnp.asarray(passed)[ordinal])[None] + jnp.asarray(offsets)[:, ordinal]
  return positions, ordinal, visual


def mrope_angles(cfg: Config, positions: jax.Array) -> jax.Array:
  """Rotary angles [B, M, K/2] of `positions` [3, B, M], with the axes interleaved over the pairs (arXiv 2511.21631)."""
  pair = np.arange(cfg.head_dim // 2)
  axis = np.where(pair < 3 * np.asarray(cfg.mrope_sections)[pair % 3], pair % 3, 0)
  return jnp.moveaxis(positions[axis], 0, -1).astype(jnp.float32) * layers.rope_frequencies(cfg.head_dim, cfg.rope_theta)[None, None]


def _image_grids(cfg: Config, images: Sequence[jax.Array], num_tokens: int) -> tuple[tuple[int, int], ...]:
  if images and cfg.vision is None:
    raise ValueError("The condition encoder has no vision part (vision is None), but the batch has condition images.")
  grids = tuple(image_grid(cfg.vision, image.shape) for image in images or ())
  needed = sum(rows * cols for rows, cols in grids)
  if needed > num_tokens:
    raise ValueError(f"The condition images take {needed} tokens, but the prompt is padded to {num_tokens}: use a longer prompt bucket.")
  return grids


def _image_tables(grids: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
  # Per image token, and once more for what follows the last: (0, row, column) inside its image; how far earlier images moved the position.
  offsets, passed, moved = [], [], 0
  for rows, cols in grids:
    offsets.append(np.indices((1, rows, cols)).reshape(3, -1))
    passed += [moved] * (rows * cols)
    moved += max(rows, cols)
  return np.concatenate([*offsets, np.zeros((3, 1))], axis=1).astype(np.int32), np.asarray([*passed, moved], np.int32)


def _look(cfg: Config, params: dict, images: Sequence[jax.Array], shard: Shard) -> jax.Array:
  # Image tokens and DeepStack features of all slots, one after the other: 1+J B n D.
  return jnp.concatenate([vision_apply(cfg.vision, params, image, cfg.dtype, cfg.remat, shard, cfg.attention_backend) for image in images], axis=2)


def _place(features: jax.Array, ordinal: jax.Array, visual: jax.Array) -> jax.Array:
  # 1+J B n D -> 1+J B M D, zero where there is no image token. A gather: rows of one batch have their images at different indices.
  index = jnp.minimum(ordinal, features.shape[2] - 1)[None, :, :, None]
  return jnp.where(visual[None, :, :, None], jnp.take_along_axis(features, index, axis=2), 0)


def _block(cfg: Config, params: dict, x: jax.Array, angles: jax.Array, mask: attention.Mask, shard: Shard) -> jax.Array:
  attn, h = params["attn"], gather_tokens(layers.rms_norm(x, params["norm1"], cfg.eps), shard)
  query = shard(layers.rms_norm(layers.linear(h, attn["q"]), attn["q_norm"], cfg.eps), "batch", "token", "heads", None)
  key = shard(layers.rms_norm(layers.linear(h, attn["k"]), attn["k_norm"], cfg.eps), "batch", "token", "kv_heads", None)
  value = shard(layers.linear(h, attn["v"]), "batch", "token", "kv_heads", None)
  query, key = layers.rotate_halves(query, angles), layers.rotate_halves(key, angles)
  h = attention.attention(query, key, value, mask, cfg.attention_backend, shard)
  x = x + divide_tokens(layers.linear(h, attn["out"], num_dims=2), shard)
  mlp, h = params["mlp"], gather_tokens(layers.rms_norm(x, params["norm2"], cfg.eps), shard)
  return shard(x + divide_tokens(layers.swiglu(h, mlp["gate"], mlp["proj"], mlp["out"], shard=shard), shard), "batch", "residual", None)


def _real(tokens: jax.Array, token_count: jax.Array) -> jax.Array:
  return jnp.arange(tokens.shape[1])[None] < token_count[:, None]
