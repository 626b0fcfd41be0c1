"""Figures of pictures that say what a reward does to them: flat, dark, garish or overdrawn pictures show here before anybody looks at them.

With Y = 0.2126 R + 0.7152 G + 0.0722 B of the sRGB values over 255 (the weights of ITU-R BT.709), of a picture of H x W px:

  dark         share of pixels with Y < 0.15
  saturation   mean of (max - min) / max over the three colours, that of HSV; 0 where the pixel is black
  entropy      -sum p log2 p of the 64 equal classes of Y, in bits, 0 to 6; 0 for a picture of one tone
  edges        share of neighbouring pixels, to the right and below, whose Y differs by more than 0.1
"""

import jax
import jax.numpy as jnp

DARK, EDGE, CLASSES = 0.15, 0.1, 64
LUMA = (0.2126, 0.7152, 0.0722)


def statistics(pictures: jax.Array) -> dict[str, jax.Array]:
  """{figure: [B] float32} of `pictures` [B, H, W, 3] uint8, or of 4 channels, whose transparency is laid on white; see the module docstring.

  A picture of a single pixel has no neighbours, and its `edges` are 0.
  """
  colours = _on_white(pictures)
  luma = jnp.einsum("bhwc,c->bhw", colours, jnp.asarray(LUMA, jnp.float32), precision="highest")
  most, least = jnp.max(colours, axis=-1), jnp.min(colours, axis=-1)
  saturation = jnp.where(most > 0, (most - least) / jnp.where(most > 0, most, 1.0), 0.0)
  mean = lambda x: jnp.mean(x.astype(jnp.float32), axis=(1, 2))
  return {"dark": mean(luma < DARK), "saturation": mean(saturation), "entropy": _entropy(luma), "edges": _edges(luma)}


def _on_white(pictures: jax.Array) -> jax.Array:
  """[B, H, W, 3] float32 colours, 0 to 1."""
  x = pictures.astype(jnp.float32) / 255
  return x if x.shape[-1] == 3 else 1 - x[..., 3:] * (1 - x[..., :3])


def _entropy(luma: jax.Array) -> jax.Array:
  classes = jnp.minimum((luma * CLASSES).astype(jnp.int32), CLASSES - 1)
  share = jax.lax.map(lambda one: jnp.mean((classes == one).astype(jnp.float32), axis=(1, 2)), jnp.arange(CLASSES))
  return -jnp.sum(jnp.where(share > 0, share * jnp.log2(jnp.where(share > 0, share, 1.0)), 0.0), axis=0)


def _edges(luma: jax.Array) -> jax.Array:
  steps = [jnp.abs(jnp.diff(luma, axis=axis)) > EDGE for axis in (1, 2)]
  num = sum(step.shape[1] * step.shape[2] for step in steps)
  return sum(jnp.sum(step.astype(jnp.float32), axis=(1, 2)) for step in steps) / max(num, 1)
