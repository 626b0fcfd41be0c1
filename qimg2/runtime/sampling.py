"""Draws and edits pictures with a trained run or a published folder. See `launch.sample`."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from data_pipelines.buckets import bucket_size
from data_pipelines.specs import SLOT_PX, source_grids
from data_pipelines.transforms import composite_on_white
from qimg2.runtime.config import StageConfig
from qimg2.runtime.generator import Generator, Size, Source, load_condition_image, pad_size
from qimg2.runtime.masks import load_mask
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.run import Run
from qimg2.runtime.weights import DEPLOYED

MAX_BATCH = 16
TOKEN_STEP = 16  # prompt lengths are rounded up to multiples of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Request:
  """What to draw: the flags of this launcher, see `--help`. Zero or None takes the default of the run or folder."""
  prompts: tuple[str, ...]
  images: tuple[str, ...] = ()
  negative_prompt: str = ""
  num_images_per_prompt: int = 1
  seed: int = 0
  num_steps: int = 0
  guidance: float | None = None
  sigmas: tuple[float, ...] = ()
  height: int = 0
  width: int = 0
  output_resolution: int = 0
  noise: str = ""
  cache: bool = True
  batch_size: int = 0
  vae_tile: int = 0
  keep_size: bool = False
  mask: str = ""

  @property
  def keeps_size(self) -> bool:
    """Whether the last condition image is edited at its own size; a mask stands for pixels of it."""
    return self.keep_size or bool(self.mask)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A request that was checked: what draws it, and what of. `images` are [h, w, 3 or 4] uint8, `mask` is [H, W] uint8 or None, `noise` [n, h, w, C]
  float32 or None; `alpha` says whether pictures keep their transparency."""
  generator: Generator
  prompts: list[str]
  images: list[np.ndarray]
  noise: np.ndarray | None
  mask: np.ndarray | None
  alpha: bool


def sample(source: Source, load: Callable[[], Mapping], request: Request, defaults: dict) -> tuple[np.ndarray, np.ndarray, list[str]]:
  """(latents [n, h, w, C] float32, pictures [n, H, W, 3 or 4] uint8, captions), `num_images_per_prompt` for each prompt in turn.

  Args:
    source: networks and tokenizer.
    load: gives the weights of all networks; called when all that is asked for has been checked, since it may take minutes.
    request: what to draw.
    defaults: see `prepare`.

  Raises:
    ValueError: an image, a mask, a noise file or a size that does not fit.
  """
  job = prepare(source, request, defaults)
  of_all = lambda x: None if x is None else np.stack([x] * len(job.prompts))
  latents, pictures = job.generator.draw(load(), job.prompts, request.seed, [of_all(image) for image in job.images], request.negative_prompt,
                                         job.noise, of_all(job.mask))
  return latents, pictures if job.alpha or pictures.shape[-1] == 3 else np.stack([composite_on_white(x) for x in pictures]), job.prompts


def prepare(source: Source, request: Request, defaults: dict) -> Prepared:
  """A checked request, and what draws it; no weights are read, and nothing is compiled.

  Args:
    source: networks and tokenizer.
    request: what to draw.
    defaults: "height", "width", "output_resolution", "num_steps", "guidance" and "sigmas" for what the request leaves open; "multiple", px, to
      multiples of which sizes are rounded down, as the published pipeline does, and said; "only_sigmas", whether another number of steps may not
      replace these; "image_pixels", the fewest and most px of a condition image; "alpha", whether transparency was learned: otherwise pictures are
      laid on white paper, those that are drawn and condition images.

  Raises:
    ValueError: an image, a mask, a noise file or a size that does not fit.
  """
  _check_kept_size(request)
  resolution = _whole("output_resolution", request.output_resolution, SLOT_PX) or defaults["output_resolution"]
  alpha = defaults["alpha"] and source.nets.vae.image_channels == 4
  areas = [resolution] * len(request.images)
  if request.keeps_size:
    areas[-1] = 0
  images = [load_condition_image(path, area, 4 if alpha else 3) for path, area in zip(request.images, areas)]
  _check_images(request, images, resolution, *defaults["image_pixels"])
  sizes = tuple(image.shape[:2] for image in images)
  height, width = _picture_size(request, images, resolution, defaults)
  mask = load_mask(request.mask, height, width) if request.mask else None
  prompts = [prompt for prompt in request.prompts for _ in range(request.num_images_per_prompt)]
  grids = source_grids(tuple(map(pad_size, sizes)))
  longest = max(len(source.tokenizer.encode(text, grids)) for text in (*request.prompts, request.negative_prompt))
  base_times, num_steps = _times(request, defaults)
  guidance = defaults["guidance"] if request.guidance is None else request.guidance
  if request.negative_prompt and guidance <= 1.0:
    raise ValueError("A negative prompt is only read with guidance: give --guidance above 1, such as 4.")
  size = Size(height, width, -(-longest // TOKEN_STEP) * TOKEN_STEP, sizes, min(request.batch_size or MAX_BATCH, len(prompts)))
  generator = Generator(source, size, num_steps, guidance, base_times or None, request.cache, request.vae_tile, request.keeps_size)
  noise = _load_noise(request.noise, len(prompts))
  generator.check_noise(noise, len(prompts))
  return Prepared(generator, prompts, images, noise, mask, alpha)


def _check_kept_size(request: Request) -> None:
  if not request.keeps_size:
    return
  flag = "--mask" if request.mask else "--keep_size"
  if not request.images:
    raise ValueError(f"{flag} is for edits: give the picture to edit with --image.")
  if request.height or request.width:
    raise ValueError(f"With {flag} a picture has the size of the one that is edited: leave --height and --width out.")


def _check_images(request: Request, images: Sequence[np.ndarray], resolution: int, fewest: int, most: int) -> None:
  for number, (path, image) in enumerate(zip(request.images, images)):
    num = math.prod(pad_size(image.shape[:2]))
    if fewest <= num <= most:
      continue
    if request.keeps_size and number == len(images) - 1:
      raise ValueError(f"The image {path} has {num} px, padded to multiples of {SLOT_PX}, but the folder's processor takes {fewest} to {most} px "
                       "unchanged: resize it, or leave --keep_size and --mask out.")
    raise ValueError(f"The image {path} has {num} px at output_resolution {resolution}, but the folder's processor takes {fewest} to {most} px "
                     "unchanged: choose another --output_resolution.")


def _times(request: Request, defaults: dict) -> tuple[tuple[float, ...], int]:
  """(times before the shift or none, number of steps) as asked, else as the run or the folder says."""
  own = request.sigmas or (() if request.num_steps and not defaults["only_sigmas"] else defaults["sigmas"])
  if own and request.num_steps and request.num_steps != len(own):
    raise ValueError(f"--num_steps={request.num_steps} does not go with the {len(own)} sampling times that "
                     f"{'--sigmas gives' if request.sigmas else 'the folder brings'}: leave it out.")
  return own, len(own) or request.num_steps or defaults["num_steps"]


def _picture_size(request: Request, images: Sequence[np.ndarray], resolution: int, defaults: dict) -> tuple[int, int]:
  """(height, width) as asked; else of the last condition image, or the default."""
  if images:
    height, width = images[-1].shape[:2]
  elif request.output_resolution:
    height = width = resolution
  else:
    height, width = defaults["height"], defaults["width"]
  asked = (_whole(name, getattr(request, name), defaults["multiple"]) for name in ("height", "width"))
  return tuple(own or other for own, other in zip(asked, (height, width)))


def _whole(name: str, px: int, multiple: int) -> int:
  """`px` of a flag, down to a multiple, which is said; 0 where nothing is asked for."""
  found = px // multiple * multiple
  if px and not found:
    raise ValueError(f"--{name}={px} is too small: it must be at least {multiple}.")
  if found != px:
    logging.warning("--%s=%d is drawn at %d: it must be a multiple of %d.", name, px, found, multiple)
  return found


def _load_noise(path: str, num: int) -> np.ndarray | None:
  """[num, h, w, C] float32 from a file of that shape, or of [h, w, C], which then serves for every picture."""
  if not path:
    return None
  try:
    noise = np.load(path, allow_pickle=False)
  except (OSError, EOFError, ValueError) as error:
    raise ValueError(f"The noise file {path} cannot be read ({error}): write it with numpy.save as h w C float32.") from error
  if not isinstance(noise, np.ndarray):
    raise ValueError(f"The noise file {path} is an archive: write one array with numpy.save as h w C float32.")
  if noise.dtype != np.float32 or noise.ndim not in (3, 4):
    raise ValueError(f"The noise file {path} holds {noise.dtype} of shape {noise.shape}: it must be float32, h w C or n h w C in latents.")
  if not np.isfinite(noise).all():
    raise ValueError(f"The noise file {path} holds numbers that are not finite: write another one.")
  return noise if noise.ndim == 4 else np.stack([noise] * num)


def sampling_stage(run: Run, stage_name: str = "") -> str:
  """The stage to sample from: the named one, or for "" the last one that has a checkpoint and trains the generator.

  Raises:
    ValueError: there is no such stage.
  """
  stages = [s for s in run.cfg.stages if s.kind == "generator"]
  trained = [s.name for s in stages if (run.workdir / s.name / "checkpoints").is_dir()]
  name = stage_name or (trained[-1] if trained else "")
  if name not in trained:
    raise ValueError(f"Stage {name or '(any)'!r} of {run.workdir} has no generator to sample from; trained are: {', '.join(trained) or 'none'}.")
  return name


def sampling_weights(run: Run, stage_name: str = "", average: str = DEPLOYED, step: int | None = None) -> tuple[str, dict]:
  """(stage name, {network: weights}) to sample from.

  Args: run; stage, as for `sampling_stage`; averaged weights to take, "none" for the weights themselves, "deployed" for the method's choice; step of
  the checkpoint, None for the newest.

  Raises:
    ValueError: no such stage, average or step.
  """
  name = sampling_stage(run, stage_name)
  return name, run.deployed_weights(name, average, step)


def run_defaults(run: Run, stage_name: str) -> dict:
  """What a run's config says of sampling, with the stage's first size and its last resolution, and whether it was trained with transparency."""
  stage = run.stages[stage_name]
  height, width = first_size(stage)
  return {"height": height, "width": width, "output_resolution": stage.resolutions[-1].base_px,
          "num_steps": run.cfg.sampling.num_steps, "guidance": run.cfg.sampling.guidance, "sigmas": run.cfg.sampling.sigmas,
          "only_sigmas": False, "multiple": run.nets.vae.spatial_factor, "image_pixels": (0, math.inf),
          "alpha": any(part.alpha for part in stage.mixture)}


def first_size(stage: StageConfig) -> tuple[int, int]:
  """(height, width), px, of the first ratio of a stage's first resolution."""
  resolution = stage.resolutions[0]
  return bucket_size(resolution.base_px, resolution.ratios[0], resolution.multiple)


def pretrained_defaults(pretrained: Pretrained, resolution: int = 1024) -> dict:
  """The published pipeline's defaults: 1024 px, 40 steps or the folder's own times, no guidance."""
  return {"height": resolution, "width": resolution, "output_resolution": resolution, "num_steps": 40, "guidance": 1.0,
          "sigmas": tuple(pretrained.sample_sigmas or ()), "only_sigmas": True, "multiple": SLOT_PX,
          "image_pixels": pretrained.folder.image_pixels, "alpha": True}
