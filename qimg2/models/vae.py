"""The image autoencoder of Qwen-Image-2.0: pixels [B, H, W, C] <-> latents [B, H/16, W/16, 64].

A convolutional residual network in the single-frame form of the published 2.1 weights. A level is

  y = resample(blocks(x)) + shortcut(x)                                              (1)

where each block adds conv(silu(norm(conv(silu(norm(·)))))) to its input, resample is a strided convolution on the way down and a nearest-
neighbour enlargement with a convolution on the way up, and the shortcut has no weights: going down it moves each 2x2 cell of pixels to
channels and averages consecutive channels, going up it repeats channels and moves them to 2x2 cells (DC-AE, arXiv 2410.10733). The network
was made for video, and a level of temporal factor 2 still takes its shortcut over two frames; for an image the first frame is zero going
down, and is dropped going up. The encoder ends, and the decoder starts, with block, single-head attention, block.

Left out: video, and the convolutions over time. Tiles, for devices that cannot hold a large picture: `qimg2.models.vae_tiling`. The weights over time
are declared (`Config.temporal_weights`), so that published files can be read and written back, but no image ever uses them.

Sources: Qwen-Image-2.0 report (arXiv 2605.10730) section 3.1; sizes, statistics, single-frame form: diffusers `AutoencoderKLQwenImage21`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qimg2 import attention, layers, products
from qimg2 import params as P
from qimg2.params import Param
from qimg2.sharding import Shard, identity

LATENTS_MEAN = (
    0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722, 1.8873, -1.7177, -0.6510, 0.2732, 0.7562,
    -0.6163, -1.0277, 3.8363, 2.0210, 0.0472, 0.9320, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464, -0.5236, 1.2826,
    3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955, -0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076,
    1.7376, -1.0914, -1.9435, -0.2784, -1.3680, 0.4809, -0.4433, 0.3764, 0.5729, -2.0595, 1.0960, -1.3260, -2.0211,
    -5.0179, 0.5275, 4.0162, 1.8505, 0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304)
LATENTS_STD = (
    3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.7910, 3.0785, 3.6500, 3.9308, 3.0904, 2.8778, 3.7675, 3.7320, 5.0756,
    3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489, 3.4896, 3.8513, 3.9323, 3.4719, 3.7498, 4.2830, 3.5694, 4.2467,
    3.9037, 3.2947, 5.0770, 3.5075, 3.2700, 3.4767, 2.8063, 5.1125, 3.5327, 4.7833, 3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875,
    3.9624, 4.0168, 3.5643, 4.0550, 5.5614, 4.2963, 4.4080, 3.4959, 3.8747, 3.7608, 3.5735, 3.1490, 3.7662, 3.6746, 3.4563, 3.8161)

IMAGE_AXES = ("batch", None, None, None)
NORM_EPS = 1e-12  # the reference divides by the norm itself; this much keeps the gradient finite at a zero pixel
WIDE = 256  # convolutions with at least so many inputs, in multiples of 64, are sharded over them


class Level(NamedTuple):
  """One level of the encoder or decoder: channels in and out, and the factors by which its shortcut changes image side and frames."""
  num_in: int
  num_out: int
  space: int
  time: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the autoencoder; the defaults are the published ones.

  Attributes:
    base_dim, decoder_base_dim: channels of a level of multiplier 1, in the encoder and in the decoder.
    latent_channels: channels of a latent.
    dim_mult: multiplier of each level, from pixels to latents. All levels but the last halve the image side.
    temporal_downsample: for each level that halves, whether its shortcut spans two frames.
    num_res_blocks: residual blocks per encoder level; decoder levels have one more.
    image_channels: 3 for RGB, 4 for RGBA.
    latents_mean, latents_std: statistics per latent channel, for `normalize_latents`.
    temporal_weights: whether the published but unused weights over time are declared. Switch it off for training from scratch.
    dtype: compute type. Norms, softmax and all results are float32.
    remat: "none", or "full" to keep only each level's input for the backward pass.

  Raises:
    ValueError: sizes that do not fit each other.
  """
  base_dim: int = 96
  decoder_base_dim: int = 144
  latent_channels: int = 64
  dim_mult: tuple[int, ...] = (1, 2, 4, 8, 8)
  temporal_downsample: tuple[bool, ...] = (False, True, True, True)
  num_res_blocks: int = 2
  image_channels: int = 4
  latents_mean: tuple[float, ...] = LATENTS_MEAN
  latents_std: tuple[float, ...] = LATENTS_STD
  temporal_weights: bool = True
  dtype: str = "float32"
  remat: str = "none"

  def __post_init__(self):
    if min(self.base_dim, self.decoder_base_dim, self.latent_channels, self.num_res_blocks, self.image_channels, *self.dim_mult) < 1:
      raise ValueError(f"Every size of the autoencoder must be at least 1, but the config is {self}.")
    if len(self.temporal_downsample) != len(self.dim_mult) - 1:
      raise ValueError(f"temporal_downsample {self.temporal_downsample} must have one entry for each level of dim_mult {self.dim_mult} but "
                       "the last.")
    if not len(self.latents_mean) == len(self.latents_std) == self.latent_channels:
      raise ValueError(f"latents_mean has {len(self.latents_mean)} and latents_std {len(self.latents_std)} entries: give one per latent "
                       f"channel, {self.latent_channels}.")
    if min(self.latents_std) <= 0:
      raise ValueError(f"latents_std must be positive, but its smallest entry is {min(self.latents_std)}.")
    if self.remat not in ("none", "full"):
      raise ValueError(f"Unknown remat policy {self.remat!r} of the autoencoder: choose none or full.")
    if self.dtype not in ("float32", "bfloat16", "float16"):
      raise ValueError(f"Unknown compute type {self.dtype!r} of the autoencoder: choose float32, bfloat16 or float16.")
    self._check_shortcuts()

  def _check_shortcuts(self):
    for i, (num_in, num_out, space, time) in enumerate(self.encoder_levels):
      if num_in * space**2 * time % num_out:
        raise ValueError(f"dim_mult {self.dim_mult}: the shortcut of encoder level {i} cannot average {num_in} channels to {num_out}.")
    for i, (num_in, num_out, space, time) in enumerate(self.decoder_levels[:-1]):
      if num_out * space**2 * time % num_in:
        raise ValueError(f"dim_mult {self.dim_mult}: the shortcut of decoder level {i} cannot repeat {num_in} channels to {num_out}.")

  @property
  def spatial_factor(self) -> int:
    """Pixels per latent along each side: 16 with five levels."""
    return 2 ** (len(self.dim_mult) - 1)

  @property
  def encoder_levels(self) -> tuple[Level, ...]:
    """The levels of the encoder, first to last."""
    dims = [self.base_dim * m for m in (1, *self.dim_mult)]
    return _levels(dims, self.temporal_downsample)

  @property
  def decoder_levels(self) -> tuple[Level, ...]:
    """The levels of the decoder, first to last."""
    dims = [self.decoder_base_dim * m for m in (self.dim_mult[-1], *reversed(self.dim_mult))]
    return _levels(dims, self.temporal_downsample[::-1])


def _levels(dims: list[int], temporal: tuple[bool, ...]) -> tuple[Level, ...]:
  halves = [(2, 2 if t else 1) for t in temporal] + [(1, 1)]
  return tuple(Level(i, o, space, time) for i, o, (space, time) in zip(dims, dims[1:], halves))


class Posterior(NamedTuple):
  """The Gaussian that the encoder gives for each latent: `mean` and `logvar`, both [B, h, w, latent_channels] float32."""
  mean: jax.Array
  logvar: jax.Array

  @property
  def mode(self) -> jax.Array:
    """The most likely latents: the mean."""
    return self.mean

  def sample(self, key: jax.Array) -> jax.Array:
    """Random latents."""
    return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

  def kl(self) -> jax.Array:
    """Kullback-Leibler divergence from N(0, 1) in nats, [B], summed over all latents of an example (arXiv 1312.6114, appendix B)."""
    return 0.5 * jnp.sum(jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar, axis=(1, 2, 3))


# Weights.


def specs(cfg: Config) -> dict:
  """The weights as {"encoder": ..., "decoder": ...}; `encode` and `decode` read their own half only.

  Kernels are [h, w, in, out]. The network starts as a nearly linear map that keeps what it can of the image: kernels are delta-orthogonal
  (arXiv 1806.05393) and residual branches start at zero. From an ordinary random start it learns several times slower.
  """
  return {"encoder": _encoder_specs(cfg), "decoder": _decoder_specs(cfg)}


def _encoder_specs(cfg: Config) -> dict:
  width, num_moments = cfg.base_dim * cfg.dim_mult[-1], 2 * cfg.latent_channels
  tree = {"conv_in": _conv_specs(3, cfg.image_channels, cfg.base_dim)}
  for i, level in enumerate(cfg.encoder_levels):
    tree[f"level_{i}"] = _level_specs(cfg, level, cfg.num_res_blocks, level.num_out, down=True)
  return tree | {"mid": _mid_specs(width), "norm_out": _norm_specs(width), "conv_out": _conv_specs(3, width, num_moments),
                 "quant": _conv_specs(1, num_moments, num_moments)}


def _decoder_specs(cfg: Config) -> dict:
  first, last = cfg.decoder_levels[0].num_in, cfg.decoder_levels[-1].num_out
  channels = cfg.latent_channels
  tree = {"quant": _conv_specs(1, channels, channels), "conv_in": _conv_specs(3, channels, first), "mid": _mid_specs(first)}
  for i, level in enumerate(cfg.decoder_levels):
    tree[f"level_{i}"] = _level_specs(cfg, level, cfg.num_res_blocks + 1, 2 * level.num_out, down=False)
  return tree | {"norm_out": _norm_specs(last), "conv_out": _conv_specs(3, last, cfg.image_channels)}


def _level_specs(cfg: Config, level: Level, num_blocks: int, num_time_out: int, down: bool) -> dict:
  tree = {f"block_{i}": _block_specs(level.num_in if i == 0 else level.num_out, level.num_out) for i in range(num_blocks)}
  if level.space > 1:
    init = P.delta_orthogonal(0, 2) if down else P.fan_in(9 * level.num_out)
    tree["resample"] = _conv_specs(3, level.num_out, level.num_out, init)
  if level.time > 1 and cfg.temporal_weights:
    tree["time"] = _conv_specs(1, level.num_out, num_time_out)
  return tree


def _block_specs(num_in: int, num_out: int) -> dict:
  tree = {"norm1": _norm_specs(num_in), "conv1": _conv_specs(3, num_in, num_out), "norm2": _norm_specs(num_out),
          "conv2": _conv_specs(3, num_out, num_out, P.zeros)}
  return tree if num_in == num_out else tree | {"shortcut": _conv_specs(1, num_in, num_out)}


def _mid_specs(width: int) -> dict:
  attn = {"norm": _norm_specs(width), "qkv": _conv_specs(1, width, 3 * width), "proj": _conv_specs(1, width, width, P.zeros)}
  return {"block_0": _block_specs(width, width), "attn": attn, "block_1": _block_specs(width, width)}


def _norm_specs(width: int) -> Param:
  return Param((width,), (None,), P.ones)


def _conv_specs(window: int, num_in: int, num_out: int, init: P.Init | None = None) -> dict:
  axis = "channel" if num_in >= WIDE and num_in % 64 == 0 else None
  kernel = Param((window, window, num_in, num_out), (None, None, axis, None), init or P.delta_orthogonal(window // 2, 1))
  return {"kernel": kernel, "bias": Param((num_out,), (None,), P.zeros)}


# Network.


@layers.full_precision
def encode(cfg: Config, params: dict, image: jax.Array, shard: Shard = identity) -> Posterior:
  """The posterior over the latents of `image`.

  Args:
    cfg: sizes.
    params: arrays for `specs(cfg)`; only "encoder" is read.
    image: [B, H, W, image_channels], values in [-1, 1]; H and W multiples of `cfg.spatial_factor`.
    shard: constrains the layout of activations.

  Raises:
    ValueError: `image` has another number of channels, or a side that is not a multiple.
  """
  _check_image(cfg, image.shape)
  p = params["encoder"]
  x = shard(_conv(image.astype(cfg.dtype), p["conv_in"]), *IMAGE_AXES)
  for i, level in enumerate(cfg.encoder_levels):
    x = shard(_rematted(cfg, _level_down)(level, p[f"level_{i}"], x), *IMAGE_AXES)  # B H W C -> B H/2 W/2 C'
  x = _mid(p["mid"], x, shard)
  x = _conv(jax.nn.silu(_norm(x, p["norm_out"])), p["conv_out"])
  mean, logvar = jnp.split(_conv(x, p["quant"]).astype(jnp.float32), 2, axis=-1)
  return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))


@layers.full_precision
def decode(cfg: Config, params: dict, latents: jax.Array, shard: Shard = identity, clamp: bool = True) -> jax.Array:
  """The image [B, H, W, image_channels] of `latents` (not normalised), float32 in [-1, 1].

  Args:
    cfg: sizes.
    params: arrays for `specs(cfg)`; only "decoder" is read.
    latents: [B, h, w, latent_channels].
    shard: constrains the layout of activations.
    clamp: False leaves values outside [-1, 1] as they are, so that a loss on them has a gradient.

  Raises:
    ValueError: `latents` has another number of channels.
  """
  if latents.ndim != 4 or latents.shape[-1] != cfg.latent_channels:
    raise ValueError(f"Latents of shape {latents.shape} do not fit: the autoencoder decodes [B, h, w, {cfg.latent_channels}].")
  p = params["decoder"]
  x = _conv(_conv(latents.astype(cfg.dtype), p["quant"]), p["conv_in"])
  x = shard(_mid(p["mid"], x, shard), *IMAGE_AXES)
  for i, level in enumerate(cfg.decoder_levels):
    x = shard(_rematted(cfg, _level_up)(level, p[f"level_{i}"], x), *IMAGE_AXES)  # B h w C -> B 2h 2w C'
  x = _conv(jax.nn.silu(_norm(x, p["norm_out"])), p["conv_out"]).astype(jnp.float32)
  return jnp.clip(x, -1.0, 1.0) if clamp else x


def _check_image(cfg: Config, shape: tuple[int, ...]) -> None:
  if len(shape) != 4 or shape[-1] != cfg.image_channels:
    raise ValueError(f"An image batch of shape {shape} does not fit: the autoencoder encodes [B, H, W, {cfg.image_channels}].")
  if shape[1] % cfg.spatial_factor or shape[2] % cfg.spatial_factor:
    raise ValueError(f"Images of {shape[1]}x{shape[2]} px do not fit: both sides must be multiples of {cfg.spatial_factor}.")


def _rematted(cfg: Config, level_fn):
  return jax.checkpoint(level_fn, static_argnums=0) if cfg.remat == "full" else level_fn


def _level_down(level: Level, p: dict, x: jax.Array) -> jax.Array:
  y = _blocks(p, x)
  if level.space > 1:
    y = _conv(y, p["resample"], stride=2)
  return y + _shortcut_down(level, x)


def _level_up(level: Level, p: dict, x: jax.Array) -> jax.Array:
  y = _blocks(p, x)
  if level.space == 1:
    return y
  return _conv(_enlarge(y), p["resample"]) + _shortcut_up(level, x)


def _blocks(p: dict, x: jax.Array) -> jax.Array:
  for i in range(sum(name.startswith("block_") for name in p)):
    x = _block(p[f"block_{i}"], x)
  return x


def _block(p: dict, x: jax.Array) -> jax.Array:
  y = _conv(jax.nn.silu(_norm(x, p["norm1"])), p["conv1"])
  y = _conv(jax.nn.silu(_norm(y, p["norm2"])), p["conv2"])
  return y + (_conv(x, p["shortcut"]) if "shortcut" in p else x)


def _mid(p: dict, x: jax.Array, shard: Shard) -> jax.Array:
  x = _block(p["block_0"], x)
  return _block(p["block_1"], x + _attention(p["attn"], x, shard))


def _attention(p: dict, x: jax.Array, shard: Shard) -> jax.Array:
  batch, height, width, dim = x.shape
  qkv = _conv(_norm(x, p["norm"]), p["qkv"]).reshape(batch, height * width, 3, 1, dim)  # B S 3 H K with one head
  y = attention.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], shard=shard)
  return _conv(y.reshape(x.shape), p["proj"])


def _norm(x: jax.Array, weight: jax.Array) -> jax.Array:
  return layers.rms_norm(x, weight, NORM_EPS)


def _conv(x: jax.Array, p: dict, stride: int = 1) -> jax.Array:
  kernel = p["kernel"]
  return layers.add_bias(layers.linear(x, kernel[0, 0]) if kernel.shape[0] == 1 else products.convolve(x, kernel, stride), p["bias"])


def _enlarge(x: jax.Array) -> jax.Array:
  batch, height, width, dim = x.shape
  cells = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, dim))
  return cells.reshape(batch, 2 * height, 2 * width, dim)


def _shortcut_down(level: Level, x: jax.Array) -> jax.Array:
  """Channels in the order (channel, frame, row, column), averaged in groups of neighbours."""
  batch, height, width, dim = x.shape
  side = level.space
  cells = x.reshape(batch, height // side, side, width // side, side, dim).transpose(0, 1, 3, 5, 2, 4)  # B H/2 W/2 C 2 2
  cells = cells.reshape(*cells.shape[:4], 1, side * side)
  frames = jnp.pad(cells, ((0, 0),) * 4 + ((level.time - 1, 0), (0, 0)))  # B H/2 W/2 C T 4
  return jnp.mean(frames.reshape(*cells.shape[:3], level.num_out, -1), axis=-1)


def _shortcut_up(level: Level, x: jax.Array) -> jax.Array:
  """Channels repeated, read in the order (channel, frame, row, column), and of the frames the last one kept."""
  batch, height, width, dim = x.shape
  side = level.space
  repeated = jnp.repeat(x, level.num_out * level.time * side * side // dim, axis=-1)
  cells = repeated.reshape(batch, height, width, level.num_out, level.time, side, side)[..., -1, :, :]
  return cells.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * side, width * side, level.num_out)


# Pixels and latents at the border.


def pixels_to_float(pixels: jax.Array, image_channels: int) -> jax.Array:
  """uint8 `pixels` [..., 3 or 4] as float32 in [-1, 1] with `image_channels` channels; RGB becomes opaque RGBA where 4 are asked for.

  Raises:
    ValueError: another type than uint8, another number of channels, or RGBA pixels for an RGB autoencoder.
  """
  if pixels.dtype != jnp.uint8:
    raise ValueError(f"Pixels must be uint8 in 0..255, but they are {pixels.dtype}.")
  num = pixels.shape[-1]
  if num != image_channels and (num, image_channels) != (3, 4):
    raise ValueError(f"Pixels with {num} channels do not fit an autoencoder of {image_channels}: composite RGBA images on a colour first.")
  x = jnp.asarray(pixels).astype(jnp.float32) / 255.0 * 2.0 - 1.0
  return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1) if num != image_channels else x


def float_to_pixels(x: jax.Array) -> jax.Array:
  """`x` in [-1, 1] as uint8, values outside clipped, rounded to the nearest and halves to even, like the reference's image processor."""
  return jnp.round(jnp.clip(x.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def normalize_latents(x: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
  """(`x` - mean) / std per channel, float32: what the generator works on."""
  mean, std = (layers.align(jnp.asarray(values, jnp.float32), x) for values in (mean, std))
  return (x.astype(jnp.float32) - mean) / std


def denormalize_latents(x: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
  """`x`·std + mean per channel, float32: what `decode` takes."""
  mean, std = (layers.align(jnp.asarray(values, jnp.float32), x) for values in (mean, std))
  return x.astype(jnp.float32) * std + mean
