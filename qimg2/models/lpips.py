"""LPIPS: how different two pictures look, by the features of a network trained to classify.

Both pictures pass through the convolutions of AlexNet or VGG16. After five of their ReLUs the features φ [h, w, C] are divided by their norm over the
channels; the distance is

  d(x, y) = Σ_l mean over h, w of Σ_c w_lc (φ_l(x) - φ_l(y))²_c                                                                   (1)

with weights w >= 0 that were fitted to the judgement of people. 0 for equal pictures. Pixels are shifted and scaled to the statistics of ImageNet
first (version 0.1 of the published package; 0.0 forgot it). Values of the two networks are on different scales and must not be compared.

Weights come from a file that the user makes of the `lpips` package: `qimg2.published.lpips`. SqueezeNet, dropout and maps of distances are left out.

Source: Zhang et al. 2018, arXiv 1801.03924. Letters: B batch, H and W in px, C channels.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qimg2 import layers
from qimg2 import params as P

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]


class Conv(NamedTuple):
  """One convolution: its number in the published network, channels, side and stride of the window, pixels of zeros around its input."""
  number: int
  num_in: int
  num_out: int
  window: int = 3
  stride: int = 1
  padding: int = 1


# Slices end with the ReLU whose features are compared; each but the first begins with a max pooling where `POOLED` says so.
SLICES = {
    "alex": ((Conv(0, 3, 64, 11, 4, 2),), (Conv(3, 64, 192, 5, 1, 2),), (Conv(6, 192, 384),), (Conv(8, 384, 256),), (Conv(10, 256, 256),)),
    "vgg": ((Conv(0, 3, 64), Conv(2, 64, 64)), (Conv(5, 64, 128), Conv(7, 128, 128)),
            (Conv(10, 128, 256), Conv(12, 256, 256), Conv(14, 256, 256)), (Conv(17, 256, 512), Conv(19, 512, 512), Conv(21, 512, 512)),
            (Conv(24, 512, 512), Conv(26, 512, 512), Conv(28, 512, 512)))}
POOLED = {"alex": (False, True, True, False, False), "vgg": (False, True, True, True, True)}
_POOL_PX, _MIN_PX = {"alex": 3, "vgg": 2}, {"alex": 31, "vgg": 16}


@dataclasses.dataclass(frozen=True)
class Config:
  """Which network looks.

  Attributes:
    net: "alex" or "vgg".

  Raises:
    ValueError: another network.
  """
  net: str = "alex"

  def __post_init__(self):
    if self.net not in SLICES:
      raise ValueError(f"There is no LPIPS network {self.net!r}: choose one of {', '.join(SLICES)}.")

  @property
  def min_px(self) -> int:
    """The smallest side of a picture that reaches the last slice."""
    return _MIN_PX[self.net]


def specs(cfg: Config) -> dict:
  """The weights {"slice_<i>": {"conv_<j>": {"kernel" [h, w, in, out], "bias"}, "weights" [C] of equation 1}} as a tree of `Param`."""
  tree = {}
  for i, convs in enumerate(SLICES[cfg.net]):
    tree[f"slice_{i}"] = {f"conv_{j}": _conv_specs(conv) for j, conv in enumerate(convs)}
    # A random start weighs all channels alike, which is the "baseline" of the paper but for a factor.
    tree[f"slice_{i}"]["weights"] = P.Param((convs[-1].num_out,), (None,), P.ones)
  return tree


def _conv_specs(conv: Conv) -> dict:
  shape = (conv.window, conv.window, conv.num_in, conv.num_out)
  return {"kernel": P.Param(shape, (None,) * 4, P.fan_in(conv.window**2 * conv.num_in)), "bias": P.Param((conv.num_out,), (None,))}


@jax.default_matmul_precision("highest")
def apply(cfg: Config, params: dict, one: jax.Array, other: jax.Array) -> jax.Array:
  """Distances [B] float32, at least 0 (equation 1), of pictures [B, H, W, 3] float32 in [-1, 1]. Differentiable.

  Raises:
    ValueError: shapes that differ, other than three channels, or sides below `cfg.min_px`.
  """
  if one.shape != other.shape or one.shape[-1] != 3:
    raise ValueError(f"LPIPS compares two RGB pictures of one size, not those of shapes {one.shape} and {other.shape}.")
  if min(one.shape[1:3]) < cfg.min_px:
    raise ValueError(f"LPIPS with {cfg.net} needs sides of at least {cfg.min_px} px, but a picture has {one.shape[1]} x {one.shape[2]}.")
  num, distance = one.shape[0], 0.0
  x = (jnp.concatenate([one, other]) - layers.align(jnp.asarray(SHIFT), one)) / layers.align(jnp.asarray(SCALE), one)
  for i, convs in enumerate(SLICES[cfg.net]):
    weights = params[f"slice_{i}"]
    x = _max_pool(x, _POOL_PX[cfg.net]) if POOLED[cfg.net][i] else x
    for j, conv in enumerate(convs):
      x = jax.nn.relu(_convolve(x, weights[f"conv_{j}"], conv))
    # Of features that are all zero too the gradient is finite.
    unit = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-20)
    square = jnp.square(unit[:num] - unit[num:])
    distance += jnp.mean(jnp.sum(square * layers.align(weights["weights"], square), axis=-1), axis=(1, 2))
  return distance


def distances(cfg: Config, params: dict, one: jax.Array, other: jax.Array) -> jax.Array:
  """As `apply`, of pictures [B, H, W, 3] uint8."""
  return apply(cfg, params, *(x.astype(jnp.float32) / 127.5 - 1 for x in (one, other)))


def _convolve(x: jax.Array, weights: dict, conv: Conv) -> jax.Array:
  x = jax.lax.conv_general_dilated(x, weights["kernel"], (conv.stride,) * 2, ((conv.padding,) * 2,) * 2,
                                   dimension_numbers=("NHWC", "HWIO", "NHWC"))
  return layers.add_bias(x, weights["bias"])


def _max_pool(x: jax.Array, side: int) -> jax.Array:
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, side, side, 1), (1, 2, 2, 1), "VALID")
