"""Drawing beside the published pipeline of diffusers: the same weights, prompt, condition images, noise and steps, from prompt to pixels.

  python -m benchmarks.sampler [--size=20M] [--px=256] [--images=0,1] [--guidance=1,4] [--cache=true,false] [--steps=40] [--rounds=3] [--json=F]

One picture at a time, as the pipeline does with one prompt; with guidance both run the unconditional prompt too. Times hold everything between the
prompt and the picture on the host: tokens, encoder, VAE, steps, decoder. Before anything is timed the pictures are compared: "off by" is the
largest difference of a pixel, of 255 levels; in float32 more than two end the benchmark. `--peer=eager,compiled` chooses torch's ways; compiled are
the generator, the language model and the VAE. Needs requirements-dev.txt.
"""

import itertools
from collections.abc import Callable

import jax
import numpy as np
import torch
from absl import flags
from PIL import Image

from benchmarks import published, timing
from launch import cli
from qimg2.runtime.generator import Generator, Size

PROMPT = "a red poster with the word make it blue, " * 4
NEGATIVE = "a poster"


def pictures(num: int, px: int) -> list[np.ndarray]:
  """Condition images [px, px, 3] uint8."""
  return [np.random.default_rng(i).integers(0, 256, (px, px, 3), dtype=np.uint8) for i in range(num)]


def our_way(source, weights, px: int, num_images: int, guidance: float, cache: bool, steps: int) -> Callable[[int], np.ndarray]:
  """A function that draws the picture [px, px, C] uint8 of a seed."""
  sizes = ((px, px),) * num_images
  grids = tuple((px // 32, px // 32) for _ in sizes)
  num_tokens = int(source.tokenizer.encode_batch([PROMPT, NEGATIVE], 8192, grids)[1].max())
  draw = Generator(source, Size(px, px, num_tokens, sizes, 1), steps, guidance, cache=cache)
  images = [image[None] for image in pictures(num_images, px)]
  return lambda seed: draw.draw(weights, [PROMPT], images=images, negative_prompt=NEGATIVE, noise=make_noise(source, px, seed))[1][0]


def their_way(pipe, source, px: int, num_images: int, guidance: float, cache: bool, steps: int) -> Callable[[int], np.ndarray]:
  """The same by the published pipeline, as floats in [0, 1]."""
  images = [Image.fromarray(image) for image in pictures(num_images, px)]

  def run(seed):
    noise = torch.from_numpy(make_noise(source, px, seed)).to(published.device(), pipe.transformer.dtype)
    with torch.no_grad():
      return pipe(PROMPT, image=images or None, latents=noise.reshape(1, -1, noise.shape[-1]), height=px, width=px, num_inference_steps=steps,
                  negative_prompt=NEGATIVE if guidance != 1 else None, true_cfg_scale=guidance, output_type="np", output_resolution=px,
                  use_kv_cache=cache).images[0]
  return run


def make_noise(source, px: int, seed: int) -> np.ndarray:
  """[1, h, w, C] float32."""
  side = px // source.nets.vae.spatial_factor
  return np.random.default_rng(seed).standard_normal((1, side, side, source.nets.vae.latent_channels)).astype(np.float32)


def measure(size: str, px: int, num_images: int, guidance: float, cache: bool, steps: int, rounds: int, dtype: str, peers: list[str]) -> dict:
  """A row of the table."""
  source, weights = published.ours(size, dtype)
  setting = (px, num_images, guidance, cache, steps)
  ways = {"ours": our_way(source, weights, *setting)}
  for peer in peers:
    ways[peer] = their_way(published.theirs(size, dtype, peer == "compiled"), source, *setting)
  picture = ways["ours"](0)
  off = max((float(np.abs(way(0) * 255 - picture).max()) for name, way in ways.items() if name != "ours"), default=0.0)
  if dtype == "float32" and off > 2:
    raise ValueError(f"The pictures differ by {off:.1f} of 255 levels: the two sides do not draw the same, so their times say nothing.")
  times = timing.take_turns(ways, rounds, warm_up=1)
  row = {"size": size, "px": px, "images": num_images, "guidance": guidance, "cache": cache, "steps": steps, "off_by": off}
  return row | timing.columns(times)


def describe(row: dict) -> str:
  """A row as a line."""
  return (f"{row['size']:6}{row['px']:>5}{row['images']:>8}{row['guidance']:>10g}  {'yes' if row['cache'] else 'no':6}"
          f"{timing.cells(row)}{row['off_by']:>9.2f}")


def define_flags() -> None:
  """The flags of this benchmark."""
  flags.DEFINE_list("size", ["20M"], f"Any of {', '.join(published.SIZES)}.")
  flags.DEFINE_list("px", ["256"], "Sides of the pictures.")
  flags.DEFINE_list("images", ["0", "1"], "Numbers of condition images.")
  flags.DEFINE_list("guidance", ["1", "4"], "Scales of guidance; 1 is none.")
  flags.DEFINE_list("cache", ["true", "false"], "Whether keys and values of the prefix are computed once.")
  flags.DEFINE_list("peer", ["eager"], "What of torch to time: eager, compiled; empty for ours alone.")
  flags.DEFINE_integer("steps", 40, "Sampling steps.", lower_bound=1)
  flags.DEFINE_integer("rounds", 3, "Timed calls of each way.", lower_bound=1)
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of weights and computation.")
  flags.DEFINE_string("json", "", "File for the rows.")


def main(_) -> None:
  """Prints the table."""
  args = flags.FLAGS
  timing.check_choices(size=(args.size, published.SIZES), peer=(args.peer, timing.PEERS), cache=(args.cache, ("true", "false")))
  print(f"{jax.devices()[0].device_kind}, {args.dtype}, {args.steps} steps")
  print(f"{'size':6}{'px':>5}{'images':>8}{'guidance':>10}  {'cache':6}{timing.heads()}{'off by':>9}")
  guidances = timing.numbers("guidance", args.guidance, float)
  if odd := [one for one in guidances if one < 1]:
    raise ValueError(f"--guidance={odd[0]:g}: the published pipeline guides only above 1.")
  rows = []
  sides, counts = timing.numbers("px", args.px), timing.numbers("images", args.images)
  for size, px, images, guidance, cache in itertools.product(args.size, sides, counts, guidances, args.cache):
    rows.append(measure(size, px, images, guidance, cache == "true", args.steps, args.rounds, args.dtype, args.peer))
    print(describe(rows[-1]), flush=True)
    torch.compiler.reset()
  timing.summary(rows, args.json, dtype=args.dtype, steps=args.steps)


if __name__ == "__main__":
  cli.run(main, define_flags)
