"""Draws pictures for prompts with a trained run.

  python -m launch.sample --workdir=runs/quickstart --prompt="a large green K on yellow paper, centered" --out=grid.png
"""

from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from launch import cli
from launch.pictures import grid, save_png
from launch.run import Run, load_run
from qimg2 import sampler

class Generator:
  """Turns prompts into pictures of one size; compiled at the first call, for a fixed number of rows."""

  def __init__(self, run: Run, height: int, width: int, num_steps: int, guidance: float = 1.0, batch_size: int = 16):
    """Raises: ValueError for a size that is no multiple of the VAE's factor."""
    factor = run.nets.vae.spatial_factor
    if height % factor or width % factor or min(height, width) < factor:
      raise ValueError(f"A picture of {height} x {width} px cannot be drawn: height and width must be positive multiples of {factor}.")
    self._run, self._size = run, (height, width)
    rows = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    self._batch_size = -(-batch_size // rows) * rows
    shape = (height // factor, width // factor, run.nets.vae.latent_channels)
    sigmas = run.schedule.sigmas(num_steps, shape[0] * shape[1])

    def generate(weights, batch, empty, seed):
      cond = run.nets.condition(weights, batch)
      uncond = run.nets.condition(weights, empty) if guidance != 1.0 else None
      noise = sampler.sample_noise(jax.random.key(seed), batch["sample_id"], shape)
      latents = sampler.sample(run.nets.velocity, weights["model"], noise, cond, sigmas, uncond, guidance)
      return run.nets.decode(weights["vae"], latents)
    self._generate = jax.jit(generate)

  def __call__(self, weights: dict, prompts: Sequence[str], seed: int = 0) -> np.ndarray:
    """[n, H, W, C] uint8, one picture per prompt; picture i depends on seed, i and its prompt, never on the other prompts."""
    pieces = [self._piece(weights, prompts, start, seed) for start in range(0, len(prompts), self._batch_size)]
    return np.concatenate(pieces)[:len(prompts)]

  def _piece(self, weights: dict, prompts: Sequence[str], start: int, seed: int) -> np.ndarray:
    rows = np.arange(start, start + self._batch_size)
    texts = [prompts[min(row, len(prompts) - 1)] for row in rows]
    pixels = self._generate(weights, self._batch(texts, rows), self._batch([""] * len(rows), rows), seed)
    return np.asarray(jax.device_get(pixels))

  def _batch(self, prompts: Sequence[str], rows: np.ndarray) -> dict:
    tokens, token_count = self._run.tokenizer.encode_batch(prompts, self._run.cfg.num_tokens)
    target = np.zeros((len(prompts), *self._size, 3), np.uint8)  # only its shape is read
    return self._run.put({"target": target, "sources": (), "tokens": tokens, "token_count": token_count, "sample_id": rows})


def sampling_weights(run: Run, stage_name: str = "", copy: str = "ema") -> tuple[str, dict]:
  """(stage name, weights of all roles) to sample from: the named stage, or the last one that has a checkpoint and trains the generator.

  Raises:
    ValueError: no such stage.
  """
  stages = [s for s in run.cfg.stages if "model" in run.algorithm(s).losses]
  trained = [s.name for s in stages if (run.workdir / s.name / "checkpoints").is_dir()]
  name = stage_name or (trained[-1] if trained else "")
  if name not in trained:
    raise ValueError(f"Stage {name or '(any)'!r} of {run.workdir} has no generator to sample from; trained are: {', '.join(trained) or 'none'}.")
  stage = run.stages[name]
  copy = copy if copy in run.algorithm(stage).track else ""
  return name, {**run.frozen_weights(stage), "model": run.trained_weights(name, "model", copy)}


def define_flags() -> None:
  """The flags of this launcher."""
  flags.DEFINE_string("workdir", None, "Folder of the run, as given to launch.train.", required=True)
  flags.DEFINE_string("stage", "", "Stage whose weights to use; the last trained one when empty.")
  flags.DEFINE_string("copy", "ema", "Slow copy of the weights to use where the stage keeps one; empty for the weights themselves.")
  flags.DEFINE_multi_string("prompt", None, "A prompt; repeat the flag for more.", required=True)
  flags.DEFINE_string("out", "grid.png", "PNG file to write: one sheet of all pictures.")
  flags.DEFINE_integer("seed", 0, "Seed of the noise.")
  flags.DEFINE_integer("num_steps", 40, "Sampling steps.", lower_bound=1)
  flags.DEFINE_float("guidance", 1.0, "Scale of classifier-free guidance; 1 runs no second pass.", lower_bound=0)
  flags.DEFINE_integer("height", 0, "Height in px; 0 takes the stage's first bucket.", lower_bound=0)
  flags.DEFINE_integer("width", 0, "Width in px; 0 takes the stage's first bucket.", lower_bound=0)


def main(_) -> None:
  """Samples as the flags say."""
  args = flags.FLAGS
  run = load_run(args.workdir)
  name, weights = sampling_weights(run, args.stage, args.copy)
  bucket = run.loader(run.stages[name]).buckets[0]
  generator = Generator(run, args.height or bucket.height, args.width or bucket.width, args.num_steps, args.guidance, min(16, len(args.prompt)))
  images = generator(weights, args.prompt, args.seed)
  save_png(grid(list(images), min(4, len(images)), args.prompt, scale=2), args.out)
  print(f"{len(images)} pictures of stage {name} are in {args.out}")


if __name__ == "__main__":
  cli.run(main, define_flags)
