"""From prompts and condition images to pictures, with the networks of a trained run or of a published folder."""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
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
from qimg2.runtime.kept_states import KeptStates, digest
from qimg2.runtime.masks import free_latents, paste
from qimg2.runtime.offload import Offloaded
from qimg2.runtime.phases import Phases
from qimg2.training.programs import Part


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
  """Turns prompts into pictures of one size; compiled at the first call, for a fixed number of rows.

  Text encoder, VAE and generator run one after another, and what one gives the next goes through the host. With `offload.Offloaded` weights each
  network is on the devices only meanwhile. Prompts and condition images that are the same are encoded once, also from one call to the next.
  """

  def __init__(self, source: Source, size: Size, num_steps: int = 40, guidance: float = 1.0, base_times: Sequence[float] | None = None,
               cache: bool = True, vae_tile: int = 0, keep_size: bool = False):
    """Args:
      source: networks and tokenizer.
      size: shapes.
      num_steps: sampling steps.
      guidance: scale of classifier-free guidance; at most 1 runs no second pass.
      base_times: sampling times before the shift in place of an even grid, see `flow.Schedule.sigmas`.
      cache: whether keys and values of the prefix are computed once, where the network allows it.
      vae_tile: side in px of the VAE's tiles, see `qimg2.models.vae_tiling`; 0 for none.
      keep_size: whether sizes of pictures and condition images may be any: these are then padded to multiples of 32 px by reflection, and pictures
        are cut back.

    Raises:
      ValueError: a size or tile that is no multiple of the VAE's factor, or times that do not fit the steps.
    """
    nets, factor = source.nets, source.nets.vae.spatial_factor
    rows = source.mesh.shape["data"] * source.mesh.shape["fsdp"]
    self._source, self._guided, self._cut, self._given = source, guidance > 1.0, (size.height, size.width), size.source_sizes
    if 0 < guidance < 1:
      logging.log_first_n(logging.WARNING, "Guidance %g is none: scales of at most 1 are drawn without a second pass.", 1, guidance)
    self._size = dataclasses.replace(_padded_size(size) if keep_size else size, batch_size=-(-size.batch_size // rows) * rows)
    height, width = self._size.height, self._size.width
    if height % factor or width % factor or min(height, width) < factor:
      raise ValueError(f"A picture of {height} x {width} px cannot be drawn: height and width must be positive multiples of {factor}.")
    self._shape = (height // factor, width // factor, nets.vae.latent_channels)
    sigmas = source.schedule.sigmas(num_steps, self._shape[0] * self._shape[1], base_times)
    self._phases = Phases(nets, source.mesh, source.rules, sigmas, guidance, cache, vae_tile)
    self._texts, self._latents = KeptStates("qwen3_vl"), KeptStates("vae")
    self._noise = jax.jit(lambda seed, ids: sampler.sample_noise(jax.random.key(seed), ids, self._shape))

  def __call__(self, weights: Mapping, prompts: Sequence[str], seed: int = 0, **conditions: Any) -> np.ndarray:
    """[n, H, W, C] uint8, one picture per prompt; arguments as in `draw`."""
    return self.draw(weights, prompts, seed, **conditions)[1]

  def draw(self, weights: Mapping, prompts: Sequence[str], seed: int = 0, images: Sequence[np.ndarray] = (), negative_prompt: str = "",
           noise: np.ndarray | None = None, mask: np.ndarray | None = None, numbers: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(latents [n, h, w, C] float32, pictures [n, H, W, C] uint8), one per prompt. As `draw_each`, but all must be finite.

    Raises:
      ValueError: as `draw_each`.
      FloatingPointError: latents or pixels of a picture are not.
    """
    latents, pictures, wrong = self.draw_each(weights, prompts, seed, images, negative_prompt, noise, mask, numbers)
    if any(wrong):
      first = next(i for i, why in enumerate(wrong) if why)
      raise FloatingPointError(f"{sum(map(bool, wrong))} of {len(wrong)} pictures cannot be drawn; that of {prompts[first]!r}: {wrong[first]}. Take "
                               "--dtype=float32, or the weights of another step or file.")
    return latents, pictures

  def draw_each(self, weights: Mapping, prompts: Sequence[str], seed: int = 0, images: Sequence[np.ndarray] = (), negative_prompt: str = "",
                noise: np.ndarray | None = None, mask: np.ndarray | None = None,
                numbers: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(latents [n, h, w, C] float32, pictures [n, H, W, C] uint8, n texts), one per prompt. The text says why a picture is none, because what it was
    computed from is not finite; "" for a good one.

    Picture i depends on the seed, its number, its prompt and its images, never on the other prompts. Of several processes all ask for the same
    pictures and all get them.

    Args:
      weights: {network: weights}, of "mmdit", "qwen3_vl" and "vae".
      prompts: n texts.
      seed: of the noise. That of an edit depends on its condition images as well, lest it begins with the noise that drew the image it edits.
      images: one array [n, h, w, 3 or 4] uint8 per condition image, of the sizes in `size.source_sizes`.
      negative_prompt: what guidance leads away from.
      noise: [n, h, w, C] float32 in place of noise from the seed.
      mask: [n, H, W] uint8, where the last condition image, of the picture's size, may change: 0 keeps its pixels as they are, 255 takes those that
        are drawn, and what lies between mixes both. A latent may change if any of its pixels may.
      numbers: of the n pictures, which tell their noise apart; none for 0 to n - 1. Pictures of a longer list can so be drawn a part at a time.

    Raises:
      ValueError: images, noise or mask of another number or shape, or a prompt that does not fit `size.num_tokens`.
    """
    self.check_noise(noise, len(prompts))
    self._check_mask(mask, len(prompts))
    if len(images) != len(self._size.source_sizes):
      raise ValueError(f"{len(images)} condition image(s) were given where size.source_sizes has {len(self._size.source_sizes)}: give one for each.")
    for image, given in zip(images, self._given):
      if image.shape[1:3] != tuple(given):
        raise ValueError(f"An image of {image.shape[1]} x {image.shape[2]} px was given where size.source_sizes has {given[0]} x {given[1]}.")
    images = [pad(image, *size) for image, size in zip(images, self._size.source_sizes)]
    if numbers and len(numbers) != len(prompts):
      raise ValueError(f"{len(numbers)} number(s) were given for {len(prompts)} prompt(s): give one for each.")
    job = _Job(prompts, seed, images, negative_prompt, noise, None if mask is None else pad(mask, *self._padded, mode="constant"),
               np.array(numbers or range(len(prompts))))
    rows = np.arange(-(-len(prompts) // self._size.batch_size) * self._size.batch_size)
    # Offloaded weights are brought once for all pictures; else there is no need to have the states of all at once.
    groups = [rows] if isinstance(weights, Offloaded) else self._batches(rows)
    latents, pixels, good = (np.concatenate(parts)[:len(prompts)] for parts in zip(*(self._draw(weights, job, group) for group in groups)))
    height, width = self._cut
    pixels = pixels[:, :height, :width]
    pictures = pixels if mask is None else paste(images[-1][:, :height, :width], pixels, mask)
    whose = np.where(np.isfinite(latents).all((1, 2, 3)), "the VAE gave pixels", "the generator gave latents")
    return latents, pictures, ["" if is_good else f"{network} that are not finite" for is_good, network in zip(good, whose)]

  def parts(self, weights: Mapping, masked: bool = False, resident: bool = True) -> list[tuple[str, Part]]:
    """(phase, program that draws) in order, for abstract weights {network: tree of ShapeDtypeStruct}; see `Phases.parts`. Nothing is run."""
    rows = self._size.batch_size
    texts = 2 * rows if self._guided else rows
    channels = self._source.nets.vae.image_channels
    sources = tuple((rows, *size, channels) for size in self._size.source_sizes)
    shapes = {"sources": sources, "tokens": (texts, self._size.num_tokens), "noise": (rows, *self._shape)}
    return self._phases.parts(weights, shapes, masked, resident)

  def check_noise(self, noise: np.ndarray | None, num: int) -> None:
    """Raises a `ValueError` if `noise` is not that of `num` pictures."""
    if noise is not None and noise.shape != (num, *self._shape):
      raise ValueError(f"The noise has shape {noise.shape}, but {num} picture(s) of {self._size.height} x {self._size.width} px need "
                       f"{(num, *self._shape)}.")

  def _check_mask(self, mask: np.ndarray | None, num: int) -> None:
    if mask is None:
      return
    if self._size.source_sizes[-1:] != (self._padded,):
      raise ValueError("A mask says what of the last condition image may change: that image must have the size of the picture.")
    if mask.shape != (num, *self._cut) or mask.dtype != np.uint8:
      raise ValueError(f"The mask is {mask.dtype} of shape {mask.shape}, but {num} picture(s) need uint8 of {(num, *self._cut)}.")

  @property
  def _padded(self) -> tuple[int, int]:
    return self._size.height, self._size.width

  def _batches(self, rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start:start + self._size.batch_size] for start in range(0, len(rows), self._size.batch_size)]

  def _draw(self, weights: Mapping, job: "_Job", rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latents, pixels, whether they are finite) of some rows, a multiple of the batch size; the last picture fills what is left. One network after
    the other."""
    real = np.minimum(rows, len(job.prompts) - 1)
    seen = [tuple(image[row] for image in job.images) for row in real]
    names = [tuple(map(digest, pictures)) for pictures in seen]
    texts = [(job.prompts[row], name) for row, name in zip(real, names)]
    negatives = [(job.negative_prompt, name) for name in names] if self._guided else []
    states = self._texts.find(weights, {key: (key[0], pictures) for key, pictures in zip(texts + negatives, seen + seen)}, self._encode_texts)
    pictures = {name: picture for some, own in zip(names, seen) for name, picture in zip(some, own)}
    latents = self._latents.find(weights, pictures, self._encode_images)
    batches = self._batches(np.arange(len(rows)))
    params, drawn, is_laid_out = weights["mmdit"], [], not isinstance(weights, Offloaded)
    for batch in batches:
      keys = [some[row] for some in (texts, negatives) if some for row in batch]
      sources = tuple(np.stack([latents[name[slot]] for _, name in keys]) for slot in range(len(job.images)))
      tokens, token_count = self._encode_prompts([text for text, _ in keys])
      inputs = {"tokens": tokens, "token_count": token_count, "features": np.stack([states[key] for key in keys]), "source_latents": sources}
      inputs = inputs, self._noise_of(job, real[batch]), *self._kept(job, real[batch], sources)
      params, is_laid_out = params if is_laid_out else self._phases.lay_out(params, *inputs), True
      drawn.append(self._phases.denoise(params, *inputs, laid_out=isinstance(weights, Offloaded)))
    del params  # what is offloaded leaves the devices
    params = weights["vae"]
    return np.concatenate(drawn), *map(np.concatenate, zip(*(self._phases.decode_image(params, x) for x in drawn)))

  def _noise_of(self, job: "_Job", real: np.ndarray) -> np.ndarray:
    if job.noise is not None:
      return job.noise[real]
    return np.asarray(self._noise(job.seed, _noise_ids(job.numbers[real], [image[real] for image in job.images])))

  def _kept(self, job: "_Job", real: np.ndarray, sources: Sequence[np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(latents of what stays, which latents may change) under a mask."""
    return (None, None) if job.mask is None else (sources[-1][:len(real)], free_latents(job.mask[real], self._source.nets.vae.spatial_factor))

  def _encode_texts(self, weights: Any, inputs: Sequence[tuple[str, tuple[np.ndarray, ...]]]) -> list[np.ndarray]:
    def one(some):
      tokens, token_count = self._encode_prompts([text for text, _ in some])
      sources = tuple(np.stack(pictures) for pictures in zip(*(pictures for _, pictures in some)))
      return self._phases.encode_text(weights, {"tokens": tokens, "token_count": token_count, "sources": sources})
    return self._in_batches(one, inputs)

  def _encode_images(self, weights: Any, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    found = {}
    for shape in dict.fromkeys(image.shape for image in images):
      numbers = [i for i, image in enumerate(images) if image.shape == shape]
      found |= zip(numbers, self._in_batches(lambda some: self._phases.encode_image(weights, np.stack(some)), [images[i] for i in numbers]))
    return [found[i] for i in range(len(images))]

  def _in_batches(self, run: Callable[[list], np.ndarray], inputs: Sequence[Any]) -> list[np.ndarray]:
    """A result for each input, by a function of as many as a batch has; the last input fills what is left."""
    batches = self._batches(np.arange(-(-len(inputs) // self._size.batch_size) * self._size.batch_size))
    return [x for batch in batches for x in run([inputs[min(i, len(inputs) - 1)] for i in batch])][:len(inputs)]

  def _encode_prompts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    return self._source.tokenizer.encode_batch(texts, self._size.num_tokens, source_grids(self._size.source_sizes))


@dataclasses.dataclass(frozen=True)
class _Job:
  """What one call draws: images and mask padded."""
  prompts: Sequence[str]
  seed: int
  images: Sequence[np.ndarray]
  negative_prompt: str
  noise: np.ndarray | None
  mask: np.ndarray | None
  numbers: np.ndarray


def pad_size(size: tuple[int, int]) -> tuple[int, int]:
  """(height, width) in px, up to multiples of 32."""
  return tuple(-(-px // SLOT_PX) * SLOT_PX for px in size)


def _padded_size(size: Size) -> Size:
  height, width = pad_size((size.height, size.width))
  return dataclasses.replace(size, height=height, width=width, source_sizes=tuple(map(pad_size, size.source_sizes)))


def pad(images: np.ndarray, height: int, width: int, mode: str = "reflect") -> np.ndarray:
  """Images [n, h, w, ...] at the top left of height x width px."""
  missing = height - images.shape[1], width - images.shape[2]
  if missing == (0, 0):
    return images
  return np.pad(images, ((0, 0), (0, missing[0]), (0, missing[1]), *((0, 0),) * (images.ndim - 3)), mode)


def _noise_ids(rows: np.ndarray, images: Sequence[np.ndarray]) -> np.ndarray:
  """[n] what tells the noise of one picture from that of another: its number, for an edit with the checksum of its condition images."""
  if not images:
    return rows
  checksum = lambda image, start: zlib.crc32(np.ascontiguousarray(image), start)
  return np.array([functools.reduce(lambda found, image: checksum(image[i], found), images, int(row)) for i, row in enumerate(rows)], np.uint32)


def load_condition_image(path: str | pathlib.Path, output_resolution: int, num_channels: int) -> np.ndarray:
  """A picture file [h, w, 3 or 4] uint8 as the published pipeline feeds it to encoder and VAE.

  Resized once (Lanczos) to the area `output_resolution`² at its own aspect ratio, sides in multiples of 32 px; 0 keeps its size. Transparency is kept
  for a VAE of four channels, else composited on white.

  Raises:
    ValueError: no such file, one that is no picture, or one too long and thin.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"There is no image {path}: give the path of a PNG, JPEG or WebP file.")
  image = decode_image(path.read_bytes(), str(path), keep_alpha=True)
  if output_resolution:
    image = resize_condition_image(image, *bucket_size(output_resolution, image.shape[1] / image.shape[0], SLOT_PX))
  return image if image.shape[-1] <= num_channels else composite_on_white(image)


def resize_condition_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """[height, width, 3 or 4] uint8, by Lanczos, as the published pipeline resizes a condition image to a size of nearly its own aspect ratio."""
  return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
