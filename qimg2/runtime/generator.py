"""From prompts and condition images to pictures, with the networks of a trained run or of a published folder."""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from PIL import Image

from data_pipelines.buckets import bucket_size
from data_pipelines.specs import SLOT_PX, source_grids
from data_pipelines.tokenizer import PromptTokenizer
from data_pipelines.transforms import composite_on_white, decode_image
from qimg2 import flow, networks, sampler, sharding


class Source(Protocol):
  """What drawing needs: a `qimg2.runtime.run.Run` or a `qimg2.runtime.pretrained.Pretrained`."""
  nets: networks.Networks
  tokenizer: PromptTokenizer
  schedule: flow.Schedule
  mesh: jax.sharding.Mesh
  rules: sharding.Rules


@dataclasses.dataclass(frozen=True)
class Size:
  """The static shapes of a program that draws.

  Attributes:
    height, width: of the pictures in px, multiples of the VAE's factor.
    num_tokens: M, prompt tokens with the whole template and all image slots.
    source_sizes: (height, width) in px of each condition image, multiples of 32.
    batch_size: pictures at a time.
  """
  height: int
  width: int
  num_tokens: int
  source_sizes: tuple[tuple[int, int], ...] = ()
  batch_size: int = 16


class Generator:
  """Turns prompts into pictures of one size; compiled at the first call, for a fixed number of rows."""

  def __init__(self, source: Source, size: Size, num_steps: int = 40, guidance: float = 1.0, base_times: Sequence[float] | None = None,
               cache: bool = True):
    """Args:
      source: networks and tokenizer.
      size: shapes.
      num_steps: sampling steps.
      guidance: scale of classifier-free guidance; at most 1 runs no second pass.
      base_times: sampling times before the shift in place of an even grid, see `flow.Schedule.sigmas`.
      cache: whether keys and values of the prefix are computed once, where the network allows it.

    Raises:
      ValueError: a size that is no multiple of the VAE's factor, or times that do not fit the steps.
    """
    nets, factor = source.nets, source.nets.vae.spatial_factor
    if size.height % factor or size.width % factor or min(size.height, size.width) < factor:
      raise ValueError(f"A picture of {size.height} x {size.width} px cannot be drawn: height and width must be positive multiples of {factor}.")
    rows = source.mesh.shape["data"] * source.mesh.shape["fsdp"]
    self._source, self._guided = source, guidance > 1.0
    if 0 < guidance < 1:
      logging.log_first_n(logging.WARNING, "Guidance %g is none: scales of at most 1 are drawn without a second pass.", 1, guidance)
    self._size = dataclasses.replace(size, batch_size=-(-size.batch_size // rows) * rows)
    self._shape = (size.height // factor, size.width // factor, nets.vae.latent_channels)
    sigmas = source.schedule.sigmas(num_steps, self._shape[0] * self._shape[1], base_times)

    def generate(weights, batch, noise):
      cond = nets.condition(weights, batch)
      if cache and nets.model.prefix_is_fixed:
        cond = nets.cache(weights["mmdit"], cond)
      latents = sampler.sample(nets.velocity, weights["mmdit"], noise, cond, sigmas, guidance)
      return latents, nets.decode(weights["vae"], latents)
    self._generate = jax.jit(generate)
    self._noise = jax.jit(lambda seed, ids: sampler.sample_noise(jax.random.key(seed), ids, self._shape))

  def __call__(self, weights: dict, prompts: Sequence[str], seed: int = 0, **conditions: Any) -> np.ndarray:
    """[n, H, W, C] uint8, one picture per prompt; arguments as in `draw`."""
    return self.draw(weights, prompts, seed, **conditions)[1]

  def draw(self, weights: dict, prompts: Sequence[str], seed: int = 0, images: Sequence[np.ndarray] = (), negative_prompt: str = "",
           noise: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(latents [n, h, w, C] float32, pictures [n, H, W, C] uint8), one per prompt.

    Picture i depends on the seed, i, its prompt and its images, never on the other prompts. Of several processes all ask for the same pictures
    and all get them.

    Args:
      weights: {network: weights}, of "mmdit", "qwen3_vl" and "vae".
      prompts: n texts.
      seed: of the noise. That of an edit depends on its condition images as well, lest it begins with the noise that drew the image it edits.
      images: one array [n, h, w, 3 or 4] uint8 per condition image, of the sizes in `size.source_sizes`.
      negative_prompt: what guidance leads away from.
      noise: [n, h, w, C] float32 in place of noise from the seed.

    Raises:
      ValueError: noise of another shape, or a prompt that does not fit `size.num_tokens`.
    """
    self.check_noise(noise, len(prompts))
    pieces = [self._piece(weights, prompts, start, seed, images, negative_prompt, noise)
              for start in range(0, len(prompts), self._size.batch_size)]
    latents, pixels = (np.concatenate(parts)[:len(prompts)] for parts in zip(*pieces))
    return latents, pixels

  def lower(self, weights: dict) -> jax.stages.Lowered:
    """The program that draws, for abstract weights {network: tree of ShapeDtypeStruct}. Nothing is run."""
    rows, sharded = self._size.batch_size, sharding.batch_sharding(self._source.mesh, self._source.rules)
    texts = 2 * rows if self._guided else rows
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharded)
    batch = {"target": of(np.uint8, texts, self._size.height, self._size.width, 3),
             "sources": tuple(of(np.uint8, texts, *size, 3) for size in self._size.source_sizes),
             "tokens": of(np.int32, texts, self._size.num_tokens), "token_count": of(np.int32, texts)}
    return self._generate.lower(weights, batch, of(np.float32, rows, *self._shape))

  def check_noise(self, noise: np.ndarray | None, num: int) -> None:
    """Raises a `ValueError` if `noise` is not that of `num` pictures."""
    if noise is not None and noise.shape != (num, *self._shape):
      raise ValueError(f"The noise has shape {noise.shape}, but {num} picture(s) of {self._size.height} x {self._size.width} px need "
                       f"{(num, *self._shape)}.")

  def _piece(self, weights, prompts, start, seed, images, negative_prompt, noise) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(start, start + self._size.batch_size)
    real = np.minimum(rows, len(prompts) - 1)  # the last picture fills what is left
    texts, sources = [prompts[row] for row in real], [image[real] for image in images]
    noise = self._noise(seed, _noise_ids(rows, sources)) if noise is None else noise[real]
    if self._guided:
      texts, sources = texts + [negative_prompt] * len(rows), [np.concatenate([image, image]) for image in sources]
    tokens, token_count = self._source.tokenizer.encode_batch(texts, self._size.num_tokens, source_grids(self._size.source_sizes))
    target = np.zeros((len(texts), self._size.height, self._size.width, 3), np.uint8)  # only its shape is read
    batch = self._put({"target": target, "sources": tuple(sources), "tokens": tokens, "token_count": token_count})
    return sharding.to_host(self._generate(weights, batch, self._put({"noise": np.asarray(noise)})["noise"]))

  def _put(self, batch: dict) -> dict:
    return sharding.put_global_batch(batch, self._source.mesh, self._source.rules)


def _noise_ids(rows: np.ndarray, images: Sequence[np.ndarray]) -> np.ndarray:
  """[n] what tells the noise of one picture from that of another: its number, for an edit with the checksum of its condition images."""
  if not images:
    return rows
  checksum = lambda image, start: zlib.crc32(np.ascontiguousarray(image), start)
  return np.array([functools.reduce(lambda found, image: checksum(image[i], found), images, int(row)) for i, row in enumerate(rows)], np.uint32)


def load_condition_image(path: str | pathlib.Path, output_resolution: int, num_channels: int) -> np.ndarray:
  """A picture file [h, w, 3 or 4] uint8 as the published pipeline feeds it to encoder and VAE.

  Resized once (Lanczos) to the area `output_resolution`² at its own aspect ratio, sides in multiples of 32 px. Transparency is kept for a VAE
  of four channels, else composited on white.

  Raises:
    ValueError: no such file, one that is no picture, or one too long and thin.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"There is no image {path}: give the path of a PNG, JPEG or WebP file.")
  image = decode_image(path.read_bytes(), str(path), keep_alpha=True)
  height, width = bucket_size(output_resolution, image.shape[1] / image.shape[0], SLOT_PX)
  image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
  return image if image.shape[-1] <= num_channels else composite_on_white(image)
