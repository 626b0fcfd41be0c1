"""Large pictures through the autoencoder in overlapping tiles, so that the devices hold the activations of one tile at a time.

Tiles begin at every `stride`; those at the right and at the bottom end with the picture and may be smaller. Over the overlap each tile fades in over
its neighbour above, then over that to the left, linearly:

  tile[y] <- above[y - extent] (1 - y/extent) + tile[y] y/extent,   extent = side - stride                                          (1)

and of each tile the first `stride` rows and columns stay. A tile knows nothing beyond its borders, so the result is near to that of the whole picture
but not equal to it. The arithmetic is that of diffusers' `AutoencoderKLQwenImage21.enable_tiling`, whose tiles have 256 px and a stride of 192.
"""

from collections.abc import Callable

import numpy as np


def tile_stride(side_px: int, factor: int) -> int:
  """Distance in px between tiles of `side_px`: three quarters of it. `factor` is the number of pixels per latent along each side.

  Raises:
    ValueError: a side of which three quarters are no whole number of latents.
  """
  if side_px <= 0 or side_px % (4 * factor):
    raise ValueError(f"Tiles of {side_px} px do not fit the autoencoder: their side must be a positive multiple of {4 * factor} px, such as "
                     f"{16 * factor}.")
  return side_px // 4 * 3


def over_tiles(run: Callable[[np.ndarray], np.ndarray], x: np.ndarray, side: int, stride: int, scale: Callable[[int], int]) -> np.ndarray:
  """What `run` makes of `x` [B, H, W, C], tile by tile: [B, scale(H), scale(W), C'] float32.

  Args:
    run: function of a tile [B, h, w, C], h and w at most `side`, that gives [B, scale(h), scale(w), C'] float32.
    x: the whole, on the host.
    side, stride: of the tiles, in the units of `x`.
    scale: length in `x` -> length in the result.
  """
  height, width = x.shape[1:3]
  kept, extent = scale(stride), scale(side) - scale(stride)
  strips, above = [], []
  for top in range(0, height, stride):
    row = []
    for number, left in enumerate(range(0, width, stride)):
      tile = np.array(run(x[:, top:top + side, left:left + side]))
      if above:
        _fade_in(tile, above[number], extent, 1)
      if row:
        _fade_in(tile, row[-1], extent, 2)
      row.append(tile)
    strips.append(np.concatenate([tile[:, :kept, :kept] for tile in row], axis=2))
    above = row
  return np.concatenate(strips, axis=1)[:, :scale(height), :scale(width)]


def _fade_in(tile: np.ndarray, before: np.ndarray, extent: int, dim: int) -> None:
  """Equation 1 along a dimension, in place; `before` is the neighbour, as it was blended itself."""
  extent = min(extent, tile.shape[dim], before.shape[dim])
  if not extent:
    return
  weight = (np.arange(extent, dtype=np.float32) / extent).reshape((-1,) + (1,) * (tile.ndim - 1 - dim))
  place = (slice(None),) * dim
  first, last = place + (slice(extent),), place + (slice(before.shape[dim] - extent, None),)
  tile[first] = before[last] * (1 - weight) + tile[first] * weight
