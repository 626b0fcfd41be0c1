"""Draws the same pictures with diffusers and with qimg2, from a trained run that was exported: same weights, prompts, images and noise.

  python tests/compare_engines.py --workdir=runs/quickstart --out=docs/engines.png

Prints the largest difference of latents (relative to the largest value) and of pixels; the sheet shows diffusers above qimg2.
"""

import argparse
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np

import reference  # isort: skip (defines what transformers needs before it is imported)
import torch
from diffusers import QwenImage21Pipeline
from PIL import Image

from data_pipelines.embedded import glyph_edits, glyphs
from qimg2.runtime.exporting import export
from qimg2.runtime.generator import Generator, Size
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.run import load_run
from qimg2.runtime.sheets import grid, save_picture

SIDE_PX, NUM_STEPS, GUIDANCE, NUM_PICTURES = 64, 40, 3.0, 4


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="folder of a run on glyphs")
  parser.add_argument("--out", required=True, help="PNG to write")
  args = parser.parse_args()
  prompts = [(text, None) for text, *_ in glyphs.held_out_prompts(NUM_PICTURES, 1)]
  edits = glyph_edits.held_out_edits(NUM_PICTURES, 1)
  prompts += [(text, glyphs.render(source, SIDE_PX, SIDE_PX)) for text, source, *_ in edits]
  with tempfile.TemporaryDirectory() as folder:
    folder = export(load_run(args.workdir), pathlib.Path(folder) / "pipeline", dtype="float32")
    pipe, source = QwenImage21Pipeline.from_pretrained(folder), Pretrained(folder, "float32")
    weights = source.load()
    drawn = [draw_both(pipe, source, weights, text, image, seed) for seed, (text, image) in enumerate(prompts)]
  latents, pixels = (max(one[key] for one in drawn) for key in ("latents", "pixels"))
  print(f"{len(drawn)} pictures of {SIDE_PX} px, {NUM_STEPS} steps, guidance {GUIDANCE:g}: latents differ by at most {latents:.1e} of the largest, "
        f"pixels by at most {pixels:.3f} of 255.")
  sheet = [one["theirs"] for one in drawn] + [one["ours"] for one in drawn]
  save_picture(grid(sheet, len(drawn), [f"diffusers: {t}" for t, _ in prompts] + [f"qimg2: {t}" for t, _ in prompts], scale=2), args.out)


def draw_both(pipe, source, weights, text, image, seed):
  """The picture of both engines, and how far they are apart."""
  side = SIDE_PX // source.nets.vae.spatial_factor
  noise = np.random.default_rng(seed).standard_normal((side, side, source.nets.vae.latent_channels)).astype(np.float32)
  last = {}
  def keep(pipe, step, t, values):
    last.update(values)
    return values
  theirs = pipe(text, image=None if image is None else [Image.fromarray(image)], negative_prompt=" ", true_cfg_scale=GUIDANCE, height=SIDE_PX,
                width=SIDE_PX, num_inference_steps=NUM_STEPS, latents=torch.from_numpy(noise).reshape(1, -1, noise.shape[-1]), output_type="np",
                output_resolution=SIDE_PX, callback_on_step_end=keep).images[0]
  sizes = () if image is None else (image.shape[:2],)
  generator = Generator(source, Size(SIDE_PX, SIDE_PX, 64, sizes, 1), NUM_STEPS, GUIDANCE)
  latents, pixels = generator.draw(weights, [text], images=[] if image is None else [image[None]], noise=noise[None])
  return {"theirs": np.round(theirs * 255).astype(np.uint8), "ours": pixels[0], "pixels": float(np.abs(theirs * 255 - pixels[0]).max()),
          "latents": reference.relative_error(latents[0], last["latents"].numpy().reshape(noise.shape))}


if __name__ == "__main__":
  main()
