"""Masks: which part of a picture an edit may change.

One rule for soft and hard ones: 0 keeps the source's pixel bit for bit, 255 takes the pixel that is drawn, and grey mixes both, so that a blurred
mask gives a soft seam. A latent may change if any of its pixels may.
"""

import pathlib

import numpy as np

from data_pipelines.transforms import decode_image


def load_mask(path: str | pathlib.Path, height: int, width: int) -> np.ndarray:
  """[height, width] uint8 from a grey, or grey as RGB, picture file.

  Raises:
    ValueError: no such file, no picture, another size, colour or transparency in it, or one that lets nothing change.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"There is no mask {path}: give the path of a PNG file, white where the picture may change, black where it stays.")
  image = decode_image(path.read_bytes(), str(path), keep_alpha=True)
  if image.shape[:2] != (height, width):
    raise ValueError(f"The mask {path} has {image.shape[0]} x {image.shape[1]} px, but the image that is edited has {height} x {width}: give both "
                     "one size.")
  if image.shape[-1] == 4 and (image[..., 3] < 255).any():
    raise ValueError(f"The mask {path} has transparent pixels: save it as grey, white where the picture may change, black where it stays.")
  if (image[..., :3] != image[..., :1]).any():
    raise ValueError(f"The mask {path} has colours: save it as grey, white where the picture may change, black where it stays.")
  mask = image[..., 0]
  if not mask.any():
    raise ValueError(f"The mask {path} is all black, so nothing may change: make white what is to be drawn.")
  return np.ascontiguousarray(mask)


def free_latents(mask: np.ndarray, factor: int) -> np.ndarray:
  """[n, h, w, 1] bool: the latents that a mask [n, H, W] uint8 lets change in at least one of their factor x factor pixels."""
  num, height, width = mask.shape
  return (mask.reshape(num, height // factor, factor, width // factor, factor) > 0).any(axis=(2, 4))[..., None]


def paste(source: np.ndarray, picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """`picture` over `source`, both [n, H, W, 3 or 4] uint8, where the mask [n, H, W] uint8 says so: 0 is the source's pixel, 255 the picture's. The
  channels are the picture's; a source without transparency is opaque."""
  if source.shape[-1] < picture.shape[-1]:
    source = np.concatenate([source, np.full_like(source[..., :1], 255)], axis=-1)
  share = mask[..., None].astype(np.uint32)
  return ((source * (255 - share) + picture * share + 127) // 255).astype(np.uint8)
