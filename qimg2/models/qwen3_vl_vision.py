"""Qwen3-VL's vision transformer: pixels to image tokens and DeepStack features.

An image is cut into patches of 16 px. A patch becomes a vector by a linear map, plus a learned position that is read from a square table by
bilinear interpolation (the corners of the table lie on the corners of the image, whatever its size). Pre-norm blocks follow:

  x += Attention(LayerNorm(x))    full attention inside one image, rotary positions over (row, column)
  x += MLP(LayerNorm(x))          two linear maps around a tanh-GELU

A merger then joins every 2 x 2 patches into one image token: LayerNorm, linear, GELU, linear to the width of the language model. The states
after some earlier blocks pass through mergers of their own; the language model adds those DeepStack features after its first layers.

The published temporal patch spans two frames and an image is a clip of two equal frames, so the two temporal slices of the patch weight are
added before use. Video is left out.

Source: Qwen3-VL Technical Report, arXiv 2511.21631; DeepStack, arXiv 2406.04334. Letters: B batch, N patches of one image, n = N / merge²
image tokens, D vision width, H heads, K head dim, J DeepStack taps.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qimg2 import attention, layers
from qimg2 import params as P
from qimg2.sharding import Shard, identity


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Sizes of the vision transformer; the defaults are those inside Qwen3-VL-8B.

  Attributes:
    width, num_layers, num_heads, mlp_width: of the transformer; each head has width / num_heads dimensions.
    patch_px: side of a patch.
    num_frames: frames in one temporal patch of the published weight.
    merge: side, in patches, of the square that becomes one image token.
    num_positions: entries of the learned position table, a square number.
    out_width: width of the language model.
    deepstack_layers: indices, increasing, of the blocks whose output is tapped.

  Raises:
    ValueError: sizes that do not fit each other.
  """
  width: int = 1152
  num_layers: int = 27
  num_heads: int = 16
  mlp_width: int = 4304
  num_channels: int = 3
  patch_px: int = 16
  num_frames: int = 2
  merge: int = 2
  num_positions: int = 2304
  out_width: int = 4096
  deepstack_layers: tuple[int, ...] = (8, 16, 24)
  rope_theta: float = 10_000.0
  eps: float = 1e-6

  def __post_init__(self):
    if self.width % self.num_heads or self.head_dim % 4:
      raise ValueError(f"Vision width {self.width} over {self.num_heads} heads must give a head dim that is a multiple of 4.")
    if math.isqrt(self.num_positions) ** 2 != self.num_positions:
      raise ValueError(f"num_positions {self.num_positions} must be a square number: it is a square table.")
    taps = tuple(self.deepstack_layers)
    if list(taps) != sorted(set(taps)) or any(not 0 <= i < self.num_layers for i in taps):
      raise ValueError(f"deepstack_layers {taps} must be increasing block indices below num_layers {self.num_layers}.")
    object.__setattr__(self, "deepstack_layers", taps)

  @property
  def head_dim(self) -> int:
    """Dimensions of one head."""
    return self.width // self.num_heads

  @property
  def token_px(self) -> int:
    """Side of the square of pixels that one image token stands for."""
    return self.patch_px * self.merge


def image_grid(cfg: VisionConfig, shape: tuple[int, ...]) -> tuple[int, int]:
  """(rows, columns) of image tokens for an image batch of `shape` (B, h, w, C).

  Raises:
    ValueError: sides that are not multiples of `token_px`, or another number of channels than `num_channels`.
  """
  _, height, width, num_channels = shape
  if height % cfg.token_px or width % cfg.token_px:
    raise ValueError(f"Condition image of {width}x{height} px: both sides must be multiples of {cfg.token_px} px.")
  if num_channels != cfg.num_channels:
    raise ValueError(f"Condition image with {num_channels} channels: the encoder sees {cfg.num_channels}; composite RGBA on white first.")
  return height // cfg.token_px, width // cfg.token_px


def vision_specs(cfg: VisionConfig) -> dict:
  """The weights of the vision transformer as a tree of `Param`."""
  D, H, K, F = cfg.width, cfg.num_heads, cfg.head_dim, cfg.mlp_width
  side, residual = math.isqrt(cfg.num_positions), 1 / math.sqrt(2 * cfg.num_layers)
  patch = (cfg.num_frames, cfg.patch_px, cfg.patch_px, cfg.num_channels)
  block = {
      "norm1": _norm(D),
      "attn": {
          "qkv": {"weight": P.Param((D, 3, H, K), ("embed", None, "heads", None), P.fan_in(D)),
                  "bias": P.Param((3, H, K), (None, "heads", None))},
          "out": {"weight": P.Param((H, K, D), ("heads", None, "embed"), P.fan_in(D, residual)),
                  "bias": P.Param((D,), (None,))},
      },
      "norm2": _norm(D),
      "mlp": _mlp(D, F, D, residual),
  }
  joined = D * cfg.merge ** 2
  return {
      "patch": {"weight": P.Param((*patch, D), (None,) * 4 + ("embed",), P.fan_in(math.prod(patch))), "bias": P.Param((D,), (None,))},
      "positions": P.Param((side, side, D), (None, None, "embed"), P.normal(0.1)),
      "blocks": P.stack(block, cfg.num_layers),
      "merger": {"norm": _norm(D), "mlp": _mlp(joined, joined, cfg.out_width)},
      "deepstack": P.stack({"norm": _norm(joined), "mlp": _mlp(joined, joined, cfg.out_width)}, len(cfg.deepstack_layers)),
  }


def _norm(width: int) -> dict:
  return {"weight": P.Param((width,), (None,), P.ones), "bias": P.Param((width,), (None,))}


def _mlp(num_in: int, num_hidden: int, num_out: int, gain: float = 1.0) -> dict:
  return {
      "in": {"weight": P.Param((num_in, num_hidden), ("embed", "mlp"), P.fan_in(num_in)), "bias": P.Param((num_hidden,), ("mlp",))},
      "out": {"weight": P.Param((num_hidden, num_out), ("mlp", "embed"), P.fan_in(num_hidden, gain)), "bias": P.Param((num_out,), (None,))},
  }


def vision_apply(cfg: VisionConfig, params: dict, image: jax.Array, dtype: str = "float32", remat: str = "none",
                 shard: Shard = identity, backend: str = "auto") -> jax.Array:
  """The image tokens and DeepStack features of one image slot, [1 + J, B, n, out_width] in `dtype`: tokens first, then one row per tap.

  Args:
    cfg: sizes.
    params: tree of arrays, as `vision_specs(cfg)`.
    image: uint8 [B, h, w, C], one image per row; sides multiples of `token_px`. Image tokens come in raster order.
    dtype: compute type.
    remat: rematerialisation policy of the blocks.
    shard: constrains activations to the layout of their logical axes.
    backend: what computes attention, see `qimg2.attention`.

  Raises:
    ValueError: as `image_grid`.

  Source: arXiv 2511.21631.
  """
  rows, cols = image_grid(cfg, image.shape)
  x = embed_patches(cfg, params, image, dtype)  # B N D
  angles = layers.concat_angles(_patch_index(cfg, rows, cols)[:, None], (cfg.head_dim // 2,) * 2, cfg.rope_theta)  # 1 N K/2
  angles = jnp.broadcast_to(angles, (x.shape[0], *angles.shape[1:]))
  # Each block writes its output to the slot of the next tap. The tapped block is the last to write there, so its output stays.
  slots = jnp.asarray(np.searchsorted(cfg.deepstack_layers, np.arange(cfg.num_layers)))

  def layer(carry, inputs):
    (x, taps), (slot, weights) = carry, inputs
    x = _block(cfg, weights, x, angles, shard, backend)
    return (x, taps.at[slot].set(x)), None

  taps = jnp.zeros((len(cfg.deepstack_layers) + 1, *x.shape), x.dtype)
  (x, taps), _ = jax.lax.scan(layers.checkpoint_layer(layer, remat), (x, taps), (slots, params["blocks"]))
  tokens = _merge(cfg, params["merger"], x, norm_first=True)
  deepstack = jax.vmap(lambda weights, tap: _merge(cfg, weights, tap, norm_first=False))(params["deepstack"], taps[:-1])
  return shard(jnp.concatenate([tokens[None], deepstack]), None, "batch", "token", None)


def embed_patches(cfg: VisionConfig, params: dict, image: jax.Array, dtype: str = "float32") -> jax.Array:
  """Patch vectors with learned positions, [B, N, D] in `dtype`; the merge² patches of one image token stand next to each other."""
  rows, cols = image_grid(cfg, image.shape)
  patches = split_patches(cfg, image).astype(dtype)  # B N p p C
  x = layers.linear(patches, jnp.sum(params["patch"]["weight"], axis=0), num_dims=3)
  x = layers.add_bias(x, params["patch"]["bias"])
  row, col = _patch_index(cfg, rows, cols)
  positions = interpolate_positions(params["positions"], rows * cfg.merge, cols * cfg.merge)
  return x + positions[row, col][None].astype(dtype)


def split_patches(cfg: VisionConfig, image: jax.Array) -> jax.Array:
  """Patches [B, N, p, p, C] float32 in [-1, 1] of uint8 `image` [B, h, w, C], ordered as `embed_patches` says."""
  rows, cols = image_grid(cfg, image.shape)
  x = image.astype(jnp.float32) / 127.5 - 1
  x = x.reshape(x.shape[0], rows, cfg.merge, cfg.patch_px, cols, cfg.merge, cfg.patch_px, x.shape[-1])
  x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)  # B rows cols merge merge p p C
  return x.reshape(x.shape[0], -1, *x.shape[5:])


def interpolate_positions(table: jax.Array, rows: int, cols: int) -> jax.Array:
  """The table [side, side, D] resampled to [rows, cols, D]: bilinear, corners on corners."""
  (low, high, share) = _neighbours(rows, table.shape[0])
  table = table[low] * (1 - share)[:, None, None] + table[high] * share[:, None, None]
  (low, high, share) = _neighbours(cols, table.shape[1])
  return table[:, low] * (1 - share)[None, :, None] + table[:, high] * share[None, :, None]


def _neighbours(num: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  place = np.arange(num, dtype=np.float32) * np.float32(side - 1) / np.float32(max(num - 1, 1))
  low = np.floor(place).astype(np.int32)
  return low, np.minimum(low + 1, side - 1), place - low


def _patch_index(cfg: VisionConfig, rows: int, cols: int) -> np.ndarray:
  # Row and column of each patch, in the order of split_patches: [2, N].
  index = np.indices((rows * cfg.merge, cols * cfg.merge)).reshape(2, rows, cfg.merge, cols, cfg.merge)
  return index.transpose(0, 1, 3, 2, 4).reshape(2, -1)


def _block(cfg: VisionConfig, params: dict, x: jax.Array, angles: jax.Array, shard: Shard, backend: str) -> jax.Array:
  h = _linear(_layer_norm(x, params["norm1"], cfg.eps), params["attn"]["qkv"])  # B N 3 H K
  query, key, value = (shard(h[:, :, i], "batch", "token", "heads", None) for i in range(3))
  query, key = layers.rotate_halves(query, angles), layers.rotate_halves(key, angles)
  h = attention.attention(query, key, value, attention.Mask(), backend, shard)
  x = x + _linear(h, params["attn"]["out"], num_dims=2)
  h = jax.nn.gelu(_linear(_layer_norm(x, params["norm2"], cfg.eps), params["mlp"]["in"]), approximate=True)
  return shard(x + _linear(h, params["mlp"]["out"]), "batch", "token", None)


def _merge(cfg: VisionConfig, params: dict, x: jax.Array, norm_first: bool) -> jax.Array:
  # B N D -> B n out_width. The last merger normalises each patch, the DeepStack mergers each group of patches.
  shape = (x.shape[0], -1, x.shape[-1] * cfg.merge ** 2)
  x = _layer_norm(x, params["norm"], cfg.eps).reshape(shape) if norm_first else _layer_norm(x.reshape(shape), params["norm"], cfg.eps)
  return _linear(jax.nn.gelu(_linear(x, params["mlp"]["in"]), approximate=False), params["mlp"]["out"])


def _layer_norm(x: jax.Array, params: dict, eps: float) -> jax.Array:
  return layers.layer_norm(x, params["weight"], params["bias"], eps)


def _linear(x: jax.Array, params: dict, num_dims: int = 1) -> jax.Array:
  return layers.add_bias(layers.linear(x, params["weight"], num_dims), params["bias"])
