"""Features of pictures from our own Qwen3-VL vision tower: the mean of its image tokens, before the language model.

They need no file of the user's but the published folder that also draws. The tower was trained to describe pictures, so that it sees what a picture
shows and writes rather than its textures. Figures compare among pictures of one folder and one `side_px` alone.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from PIL import Image

from qimg2.evaluation import Task
from qimg2.models.qwen3_vl_vision import VisionConfig, vision_apply
from qimg2.sharding import Shard, identity

SIDE_PX = 448


def make_program(cfg: VisionConfig, dtype: str, shard: Shard) -> Callable[[dict, jax.Array], jax.Array]:
  """The jitted function (weights of the tower, pixels [n, H, W, 3] uint8) -> features [n, out_width] float32."""
  @jax.jit
  def vision(params, pixels):
    return vision_apply(cfg, params, pixels, dtype, shard=shard)[0].astype("float32").mean(axis=1)
  return vision


class VisionFeatures:
  """(tasks, pictures [H, W, 3] uint8) -> [n, out_width] float32; one program, which is compiled at the first call."""

  def __init__(self, cfg: VisionConfig, weights: Callable[[], dict], side_px: int = SIDE_PX, dtype: str = "float32", batch_size: int = 8,
               shard: Shard = identity):
    """Args:
      cfg: of the tower, such as `encoder.vision` of a published folder.
      weights: gives those of the tower, on devices of this process; called for each batch.
      side_px: pictures are resized to this square by Pillow's antialiased bicubic filter.
      dtype: compute type.
      batch_size: pictures at a time.
      shard: constrains activations to the mesh.

    Raises:
      ValueError: a side that is no positive multiple of `cfg.token_px`.
    """
    if side_px < 1 or side_px % cfg.token_px:
      raise ValueError(f"The vision tower does not see squares of {side_px} px: their side must be a positive multiple of {cfg.token_px}.")
    self._side_px, self._batch_size, self._weights = side_px, batch_size, weights

    self._run = make_program(cfg, dtype, shard)

  def __call__(self, tasks: Sequence[Task], pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Features of at least one picture; the tasks are not looked at."""
    size = (self._side_px, self._side_px)
    found = []
    for start in range(0, len(pictures), self._batch_size):
      some = [np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)) for x in pictures[start:start + self._batch_size]]
      filled = some + some[-1:] * (self._batch_size - len(some))
      found.append(np.asarray(self._run(self._weights(), np.stack(filled)))[:len(some)])
    return np.concatenate(found)
