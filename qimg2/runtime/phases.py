"""The programs that drawing runs one after another: prompts to text states, pictures to latents, noise to latents, latents to pictures.

Each reads the weights of one network alone, takes numpy arrays and gives numpy arrays, so that between two of them nothing need be on the devices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from qimg2 import networks, sampler, sharding
from qimg2.models import vae, vae_tiling
from qimg2.training.programs import Part

ENCODE_TEXT, ENCODE_IMAGE, DENOISE, DECODE_IMAGE = "encode_text", "encode_image", "denoise", "decode_image"
LAYOUT_PLATFORMS = ("tpu",)
NETWORK = {ENCODE_TEXT: "qwen3_vl", ENCODE_IMAGE: "vae", DENOISE: "mmdit", DECODE_IMAGE: "vae"}  # phase -> whose weights it reads


class Phases:
  """The programs for pictures of one size, for a fixed number of rows. A picture that is larger than a tile goes through the VAE tile by tile, and
  each shape of a tile is compiled once."""

  def __init__(self, nets: networks.Networks, mesh: jax.sharding.Mesh, rules: sharding.Rules, sigmas: np.ndarray, guidance: float, cache: bool,
               tile_px: int = 0):
    """Args: networks and where they run; sampling times from 1 down to 0; guidance scale; whether keys and values of the prefix are computed once;
    side of a VAE's tile in px, 0 for none.

    Raises:
      ValueError: a tile that does not fit the VAE.
    """
    self._nets, self._mesh, self._rules, self._factor = nets, mesh, rules, nets.vae.spatial_factor
    self._tile_px, self._stride_px = tile_px, vae_tiling.tile_stride(tile_px, self._factor) if tile_px else 0

    def encode_text(weights, batch):
      return nets.text_states({"qwen3_vl": weights}, batch)

    def denoise(weights, batch, noise, original, free):
      cond = nets.condition({"qwen3_vl": {}, "vae": {}}, {**batch, "latents": noise})
      if cache:
        cond = nets.shared(weights, cond)
      return sampler.sample(nets.velocity, weights, noise, cond, sigmas, guidance, original, free)

    def encode_tile(weights, pixels):
      return vae.encode(nets.vae, weights, vae.pixels_to_float(pixels, nets.vae.image_channels), shard=nets.shard).mode

    def decode_tile(weights, latents):
      return vae.decode(nets.vae, weights, _denormalize(weights, latents), shard=nets.shard, clamp=False)

    def decode_image(weights, latents):
      return _to_pixels(decode_tile(weights, latents))

    self._encode_text, self._denoise = jax.jit(encode_text), jax.jit(denoise)
    # Which layout of a weight suits its products is the compiler's to say. Where it may not, the program copies the weights that lie otherwise:
    # of the 7B generator on a TPU 3 GiB, next to the weights themselves.
    self._chooses_layouts = mesh.devices.flat[0].platform in LAYOUT_PLATFORMS
    self._denoise_laid_out = jax.jit(denoise, in_shardings=(Format(Layout.AUTO), None, None, None, None))
    self._compiled: dict[str, jax.stages.Compiled] = {}
    self._whole = {ENCODE_IMAGE: _named(ENCODE_IMAGE, nets.encode), DECODE_IMAGE: jax.jit(decode_image)}
    self._tile = {ENCODE_IMAGE: _named(ENCODE_IMAGE, encode_tile), DECODE_IMAGE: _named(DECODE_IMAGE, decode_tile)}

  # What they compute.

  def encode_text(self, weights: Any, batch: dict) -> np.ndarray:
    """[B, M', E] text states of `tokens`, `token_count` and the condition images `sources`, in the encoder's type."""
    return sharding.to_host(self._encode_text(weights, self._put(batch)))

  def encode_image(self, weights: Any, pixels: np.ndarray) -> np.ndarray:
    """[B, h, w, C] float32 normalised latents of uint8 pixels [B, H, W, 3 or 4]."""
    if not self._is_tiled(*pixels.shape[1:3]):
      return sharding.to_host(self._whole[ENCODE_IMAGE](weights, self._put(pixels)))
    mean = vae_tiling.over_tiles(self._run_tile(ENCODE_IMAGE, weights), pixels, self._tile_px, self._stride_px, lambda n: n // self._factor)
    return sharding.to_host(jax.jit(_normalize)(weights, self._put(mean)))

  def denoise(self, weights: Any, batch: dict, noise: np.ndarray, original: np.ndarray | None = None, free: np.ndarray | None = None,
              laid_out: bool = False) -> np.ndarray:
    """[B, h, w, C] float32 latents of `features`, `source_latents`, `tokens` and `token_count`; see `sampler.sample` for the rest. Weights that
    `lay_out` gave (`laid_out`) go with inputs of the same shapes."""
    inputs = self._put((batch, noise, original, free))
    program = self._compiled.get(_shapes_of(inputs), self._denoise) if laid_out else self._denoise
    return sharding.to_host(program(weights, *inputs))

  def lay_out(self, weights: Any, batch: dict, noise: np.ndarray, original: np.ndarray | None = None, free: np.ndarray | None = None) -> Any:
    """Weights that `denoise` takes for such inputs without a copy of its own; those that were given are gone. They are moved one at a time."""
    if not self._chooses_layouts:
      return weights
    inputs = self._put((batch, noise, original, free))
    key = _shapes_of(inputs)
    if key not in self._compiled:
      abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      self._compiled[key] = self._denoise_laid_out.lower(*jax.tree.map(abstract, (weights, *inputs))).compile()
    move = lambda x, where: x if x.format == where else jax.device_put(x, where, donate=True).block_until_ready()
    leaves, tree = jax.tree.flatten(weights)
    return jax.tree.unflatten(tree, [move(x, where) for x, where in zip(leaves, jax.tree.leaves(self._compiled[key].input_formats[0][0]))])

  def decode_image(self, weights: Any, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 pixels [B, H, W, C] of normalised latents [B, h, w, C], [B] whether all numbers were finite before they became such pixels)."""
    height, width = (side * self._factor for side in latents.shape[1:3])
    if not self._is_tiled(height, width):
      return sharding.to_host(self._whole[DECODE_IMAGE](weights, self._put(latents)))
    picture = vae_tiling.over_tiles(self._run_tile(DECODE_IMAGE, weights), latents, self._tile_px // self._factor, self._stride_px // self._factor,
                                    lambda n: n * self._factor)
    return sharding.to_host(jax.jit(_to_pixels)(self._put(picture)))

  def _is_tiled(self, height: int, width: int) -> bool:
    return bool(self._tile_px) and max(height, width) > self._tile_px

  def _run_tile(self, phase: str, weights: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: sharding.to_host(self._tile[phase](weights, self._put(x)))

  def _put(self, tree: Any) -> Any:
    return sharding.put_global_batch(tree, self._mesh, self._rules)

  # What they would compute: nothing is run.

  def parts(self, weights: Mapping[str, Any], batch: dict, masked: bool = False, resident: bool = True) -> list[tuple[str, Part]]:
    """(phase, program with its abstract arguments) in the order in which they run.

    Args:
      weights: {network: tree of ShapeDtypeStruct}.
      batch: shapes: `sources`, one uint8 shape for each condition image, rows first; `tokens`, two numbers; `noise`, four numbers.
      masked: whether a part of the picture is kept.
      resident: whether the weights of all networks are on the devices all the time.
    """
    put = sharding.batch_sharding(self._mesh, self._rules)
    of = lambda dtype, shape: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=put)
    (rows, height, width, channels), (texts, length) = batch["noise"], batch["tokens"]
    noise = of(np.float32, batch["noise"])
    tokens = {"tokens": of(np.int32, (texts, length)), "token_count": of(np.int32, (texts,))}
    few = {"tokens": of(np.int32, (rows, length)), "token_count": of(np.int32, (rows,))}
    features = of(self._nets.encoder.dtype, (texts, length - self._nets.num_system_tokens, self._nets.encoder.width))
    latents = tuple(of(np.float32, (texts, shape[1] // self._factor, shape[2] // self._factor, channels)) for shape in batch["sources"])
    kept = (noise, of(np.bool_, (rows, height, width, 1))) if masked else (None, None)
    found = [(ENCODE_TEXT, self._encode_text, (few | {"sources": tuple(of(np.uint8, shape) for shape in batch["sources"])},))]
    found += [(ENCODE_IMAGE, *self._image_program(ENCODE_IMAGE, of(np.uint8, shape), 1)) for shape in dict.fromkeys(batch["sources"])]
    denoise = self._denoise if resident or not self._chooses_layouts else self._denoise_laid_out
    found += [(DENOISE, denoise, (tokens | {"features": features, "source_latents": latents}, noise, *kept)),
              (DECODE_IMAGE, *self._image_program(DECODE_IMAGE, noise, self._factor))]
    beside = lambda phase: {name: tree for name, tree in weights.items() if resident and name != NETWORK[phase]}
    return [(phase, Part(function, (weights[NETWORK[phase]], *arguments), beside=beside(phase))) for phase, function, arguments in found]

  def _image_program(self, phase: str, x: jax.ShapeDtypeStruct, px: int) -> tuple[Any, tuple]:
    """The VAE's program for pixels or latents of that shape, of `px` px each, or for the largest of their tiles."""
    rows, height, width, channels = x.shape
    if not self._is_tiled(height * px, width * px):
      return self._whole[phase], (x,)
    shape = rows, *(min(side, self._tile_px // px) for side in (height, width)), channels
    return self._tile[phase], (jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding),)


def _shapes_of(inputs: Any) -> str:
  return str(jax.tree.map(lambda x: (x.shape, x.dtype), inputs))


def _named(name: str, function: Callable) -> Callable:
  """`function` as a program of that name, by which a rehearsal finds what the compiler writes down."""
  program = lambda *arguments: function(*arguments)
  program.__name__ = name
  return jax.jit(program)


def _normalize(weights: Any, mean: jax.Array) -> jax.Array:
  return vae.normalize_latents(mean, weights["statistics"]["mean"], weights["statistics"]["std"])


def _to_pixels(picture: jax.Array) -> tuple[jax.Array, jax.Array]:
  return vae.float_to_pixels(picture), jnp.isfinite(picture).all((1, 2, 3))


def _denormalize(weights: Any, latents: jax.Array) -> jax.Array:
  return vae.denormalize_latents(latents, weights["statistics"]["mean"], weights["statistics"]["std"])
