"""Draws pictures for prompts, and edits pictures, with a trained run or a published folder.

  python -m launch.sample --workdir=runs/quickstart --prompt="a large green K on yellow paper, centered" --out=grid.png
  python -m launch.sample --workdir=runs/quickstart --image=k.png --prompt="make it red" --out=edited.png
  python -m launch.sample --pretrained=DIR --prompt="a poster" --output_resolution=1024 --out=poster.png
  python -m launch.sample --pretrained=DIR --lora=style.safetensors,0.8 --prompt="a poster" --out=poster.png
  python -m launch.sample --pretrained=DIR --prompt="a poster" --offload --vae_tile=256 --plan=v5e:1x1
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from data_pipelines.folders import local_folder
from launch import cli
from qimg2.analysis.roofline import GIB
from qimg2.runtime import processes
from qimg2.runtime.rehearsal.drawing import HERE, Drawer, describe, peaks, plan
from qimg2.runtime.rehearsal.topology import prepare_environment
from qimg2.runtime.sampling import Request, sample
from qimg2.runtime.sheets import grid, picture_format, save_picture
from qimg2.runtime.weights import DEPLOYED


def define_flags() -> None:
  """The flags of this launcher."""
  flags.DEFINE_string("workdir", "", "Folder of the run, as given to launch.train.")
  flags.DEFINE_string("pretrained", "", "Folder in the published layout, in place of --workdir.")
  flags.DEFINE_string("transformer", "", "File with the generator's weights, .safetensors or .gguf, in place of those of --pretrained.")
  flags.DEFINE_multi_string("lora", [], "A LoRA on the generator, FILE or FILE,SCALE such as style.safetensors,0.8; repeat the flag for more.")
  flags.DEFINE_string("stage", "", "Stage whose weights to use; the last trained one when empty.")
  cli.define_step_flag()
  flags.DEFINE_string("average", DEPLOYED, "Averaged weights to use, such as ema, or none: the weights themselves. Default: what the method deploys.")
  flags.DEFINE_multi_string("prompt", None, "A prompt; repeat the flag for more.", required=True)
  flags.DEFINE_multi_string("image", [], "A condition image (PNG, JPEG, WebP) that every prompt sees; repeat the flag for more, in prompt order.")
  flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
  flags.DEFINE_integer("num_images_per_prompt", 1, "Pictures for each prompt.", lower_bound=1)
  flags.DEFINE_string("out", "grid.png", "File to write, .png, .jpg or .webp: the picture, or one sheet of all pictures.")
  flags.DEFINE_string("pictures", "", "Folder for each picture as a PNG of its own.")
  flags.DEFINE_bool("captions", False, "With --pictures: the prompt of each in a text file beside it, as launch.prepare_data reads them.")
  flags.DEFINE_string("save_latents", "", "File for the final latents, .npy: h w C float32, n h w C for several pictures.")
  flags.DEFINE_integer("seed", 0, "Seed of the noise; that of an edit depends on its condition images as well.", lower_bound=0, upper_bound=2**31 - 1)
  flags.DEFINE_string("noise", "", "File of the initial noise, .npy: h w C float32 in latents, or n h w C, one for each picture.")
  flags.DEFINE_integer("num_steps", 0, "Sampling steps; 0 takes the run's, or 40.", lower_bound=0)
  flags.DEFINE_float("guidance", None, "Scale of classifier-free guidance; at most 1 is none. Default: the run's, or 1.", lower_bound=0)
  flags.DEFINE_list("sigmas", [], "Sampling times before the shift, from 1 down, comma-separated, without the last 0; their number is that of steps.")
  flags.DEFINE_integer("height", 0, "Height in px; 0 takes the default.", lower_bound=0)
  flags.DEFINE_integer("width", 0, "Width in px; 0 takes the default.", lower_bound=0)
  flags.DEFINE_integer("output_resolution", 0, "Side of the square whose area pictures and condition images take; 0: the default.",
                       lower_bound=0)
  cli.define_process_flags()
  flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type of the networks; default: the run's, or that of a folder's files.")
  flags.DEFINE_bool("cache", True, "Compute keys and values of the prefix once.")
  flags.DEFINE_integer("batch_size", 0, "Pictures at a time; 0: all, at most 16.", lower_bound=0)
  flags.DEFINE_bool("offload", False, "Keep only the network that runs on the device, and the weights of the others in host memory.")
  flags.DEFINE_integer("vae_tile", 0, "Side in px of the tiles in which the VAE reads and writes larger pictures, such as 256; 0: whole pictures.",
                       lower_bound=0)
  flags.DEFINE_bool("keep_size", False, "Edit the last condition image at its own size, whatever it is.")
  flags.DEFINE_string("mask", "", "Grey PNG of the size of the last condition image: white may change, black stays bit for bit; has the size kept.")
  flags.DEFINE_flag(flags.Flag(_PlanParser(), flags.ArgumentSerializer(), "plan", "", "Draw nothing: print what memory it takes, on this machine or, "
                               "with --plan=v5e:1x1, on a TPU that need not exist; needs no weights, only configs and --dtype.", boolean=True))


class _PlanParser(flags.ArgumentParser):
  """--plan, --plan=TOPOLOGY or --noplan."""

  def parse(self, argument: str) -> str:
    """The topology, `HERE`, or "" for none."""
    return {"true": HERE, "false": ""}.get(argument, argument)


def request_from_flags(args: flags.FlagValues) -> Request:
  """The request that the flags state.

  Raises:
    ValueError: a sampling time that is not a number.
  """
  try:
    sigmas = tuple(float(text) for text in args.sigmas)
  except ValueError as error:
    raise ValueError(f"--sigmas={','.join(args.sigmas)} is not understood ({error}): give numbers such as 1.0,0.9,0.6.") from error
  if any(not 0 < sigma <= 1 for sigma in sigmas) or list(sigmas) != sorted(sigmas, reverse=True):
    raise ValueError(f"--sigmas={','.join(args.sigmas)} must fall from at most 1 and stay above 0.")
  return Request(tuple(args.prompt), tuple(args.image), args.negative_prompt, args.num_images_per_prompt, args.seed, args.num_steps, args.guidance,
                 sigmas, args.height, args.width, args.output_resolution, args.noise, args.cache, args.batch_size, args.vae_tile, args.keep_size,
                 args.mask)


def main(_) -> None:
  """Samples as the flags say."""
  args = flags.FLAGS
  if bool(args.workdir) == bool(args.pretrained):
    raise ValueError("Give either --workdir, the folder of a run, or --pretrained, a published folder.")
  request = request_from_flags(args)
  if local_folder(args.out, "--out").is_dir():
    raise ValueError(f"--out={args.out} is a folder: name a PNG file; --pictures takes a folder.")
  picture_format(args.out)
  if args.captions and not args.pictures:
    raise ValueError("--captions writes the prompts beside --pictures: name their folder.")
  if args.transformer and not args.pretrained:
    raise ValueError("--transformer names the generator alone: give --pretrained too, a folder that has the encoder and the VAE.")
  if args.pretrained and (args.stage or args.average != DEPLOYED or args.step is not None):
    raise ValueError("--stage, --step and --average choose among a run's weights: leave them out with --pretrained.")
  drawer = Drawer(args.pretrained, args.workdir, args.stage, args.average, args.dtype, args.transformer, args.step,
                  tuple(args.lora))
  if args.plan:
    print_plan(drawer, request, args)
    return
  opened = drawer.open()
  latents, pictures, captions = sample(opened.source, opened.offloaded if args.offload else opened.load, request, opened.defaults)
  if not processes.is_first():
    return
  write(args, latents, pictures, captions)
  print(f"{len(pictures)} picture{'s' * (len(pictures) > 1)} of {opened.where} {'are' if len(pictures) > 1 else 'is'} in {args.out}")


def print_plan(drawer: Drawer, request: Request, args: flags.FlagValues) -> None:
  """Prints the memory of each phase; exits with 1 if the request does not fit as the flags are."""
  if args.plan != HERE:
    prepare_environment(args.plan)
  phases, limit = plan(drawer, request, args.plan)
  print(describe(phases, limit, request.vae_tile))
  peak = peaks(phases)[args.offload, bool(request.vae_tile)].total(args.offload)
  if limit is not None and peak > limit:
    print(f"Does not fit as the flags are: {peak / GIB:.2f} GiB of {limit / GIB:.2f}.", file=sys.stderr)
    sys.exit(1)


def write(args: flags.FlagValues, latents: np.ndarray, pictures: np.ndarray, captions: Sequence[str]) -> None:
  """Writes what the flags ask for."""
  scale = max(1, 96 // pictures.shape[1])
  save_picture(pictures[0] if len(pictures) == 1 else grid(list(pictures), min(4, len(pictures)), captions, scale), args.out)
  if args.pictures:
    for number, picture in enumerate(pictures):
      save_picture(picture, pathlib.Path(args.pictures) / f"{number:04d}.png")
      if args.captions:
        (pathlib.Path(args.pictures) / f"{number:04d}.txt").write_text(captions[number], encoding="utf-8")
  if args.save_latents:
    path = pathlib.Path(args.save_latents)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
      np.save(file, latents[0] if len(latents) == 1 else latents)


if __name__ == "__main__":
  cli.run(cli.together(main), define_flags)
