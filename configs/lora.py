"""A style or a subject from 5 to 50 pictures of your own: a LoRA on a generator that is trained already.

What to expect. The generator stays as it is, in bfloat16, and an adapter of rank 32 on all linear maps of its blocks learns the pictures: 84M weights
for the published generator of 7B, a file of 168 MB that diffusers and ComfyUI load. Captions say what is on each picture, and for a subject all hold
one rare word that stands for it ("a photo of zwx dog"). A few hundred steps are enough for a style; look at the sheets in samples/, and stop when
pictures begin to copy yours. docs/lora.md says how to choose.

A subject drags its class with it: after a while every dog is your dog. Prior preservation (arXiv 2208.12242) holds it back: pictures of the class
that the generator drew before are a second data set, which half of the steps are of. Draw 100 or more of them, and name both data sets with a +
between. They count as much as yours, `PRIOR_WEIGHT`; --config.stages[0].mixture[1].loss_weight=0.5 has them count half as much:

  python -m launch.sample --pretrained=DIR --prompt="a photo of a dog" --num_images_per_prompt=100 --pictures=CLASS --captions
  python -m launch.prepare_data --source=CLASS --name=dogs --out=runs/data --config=configs/curation.py:small
  ... --config=configs/lora.py:mine+dogs:diffusers:DIR

Of pairs, pictures of a prompt of which one is better than the other (docs/post_training.md), it learns by DPO what is better: dpo@NAME in place of
NAME.

The argument is NAME:SOURCE, or NAME:PLAN:SOURCE. NAME is the name that launch.prepare_data gave your pictures; SOURCE is diffusers:DIR, a folder in
the published layout, or run:RUN, the --workdir of a run of launch.train, whose networks, tokenizer and last generator are taken. PLAN, of `PLANS`,
says which chips there are and how large pictures are: v6e-1-512 is one chip of v6e with pictures of 512 px.

What it costs. docs/lora.md has memory and bounds of each plan. Without a plan: 1,000 steps of 4 pictures of 1024 px, or for run:RUN of 8 pictures of
the size that the run was trained on, which takes a few minutes on two CPU cores for the networks of configs/quickstart.py.

Commands:
  python -m launch.prepare_data --source=FOLDER --name=mine --out=runs/data --config=configs/curation.py:small
  python -m launch.train --config=configs/lora.py:mine:diffusers:DIR --workdir=runs/lora
  python -m launch.export --workdir=runs/lora --lora --out=runs/mine.safetensors
  python -m launch.sample --pretrained=DIR --lora=runs/mine.safetensors --prompt="a photo of zwx dog in the snow" --out=dog.png
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from configs import base, sizes
from qimg2.published.folder import open_folder
from qimg2.runtime.config import RunConfig, StageConfig, plain
from qimg2.runtime.config.records import read_record
from qimg2.runtime.config.sources import DIFFUSERS, STAGE, parse_source

RUN, PAIRS = "run:", "dpo@"
PRIOR_WEIGHT = 1.0  # of the loss on pictures of the class, as in the paper
RATIOS = ("1:1", "3:2", "2:3", "4:3", "3:4")


@dataclasses.dataclass(frozen=True)
class Plan:
  """How chips are used: `fsdp`, their number; `base_px`, side of the square whose area pictures have; `batch_size`, pictures in a batch, at most as
  many as fit with a tenth of the memory free; rematerialisation policy; `cached`, whether encoder and VAE stay in the host's memory while steps run,
  for data sets of launch.cache_latents."""
  fsdp: int
  base_px: int
  batch_size: int
  remat: str = "attention"
  cached: bool = False


PLANS = {
    "v6e-1-512": Plan(1, 512, 8, cached=True),
    "v6e-1-1024": Plan(1, 1024, 2, cached=True),
    "v5e-4-512": Plan(4, 512, 12),
    "v5e-4-1024": Plan(4, 1024, 4),
    "v5p-4-512": Plan(4, 512, 16, "dots"),
    "v5p-4-1024": Plan(4, 1024, 16, "dots"),
}


def get_config(arg: str = "") -> ConfigDict:
  """A LoRA on the data set, and for the chips and the generator, that `arg` names, see above; "smoke" is two steps on the glyphs.

  Raises:
    ValueError: no such plan or source.
  """
  name, _, rest = arg.partition(":")
  name, is_dpo = name.removeprefix(PAIRS), name.startswith(PAIRS)
  plan, _, source = rest.partition(":") if rest.partition(":")[0] in PLANS else ("", "", rest)
  if source and not source.startswith((DIFFUSERS, RUN)) or name != "smoke" and not (name and (source or plan)) or is_dpo and "+" in name:
    raise ValueError(f"--config=configs/lora.py:{arg} is not understood: say NAME:diffusers:DIR or NAME:run:RUN, with one of {', '.join(PLANS)} and "
                     f"a colon before the source for a plan, {PAIRS}NAME for pairs, or smoke.")
  cfg = base.base()
  cfg.num_tokens, cfg.prompt_classes = 512, (64, 128)
  cfg.model, cfg.encoder, cfg.vae = sizes.mmdit_7b(), sizes.qwen3_vl("8B"), sizes.vae_f16c64(image_channels=4)
  own, _, prior = name.partition("+")
  parts = (base.part("glyphs" if name == "smoke" else own),)
  if prior:
    parts += (base.part(prior) | dict(loss_weight=PRIOR_WEIGHT),)
  cfg.stages = (stage(parts, "dpo" if is_dpo else "flow_matching"),)
  if name == "smoke":
    return smoke(cfg)
  if source.startswith(RUN):
    from_run(cfg, source.removeprefix(RUN))
  else:
    from_folder(cfg, source or f"{DIFFUSERS}DIR")
  return planned(cfg, PLANS[plan]) if plan else cfg


def stage(parts: tuple[dict, ...], method: str) -> ConfigDict:
  """The stage that trains the adapter on some data sets, in equal shares."""
  return base.stage(
      "lora", method, start_from="scratch", frozen=dict(encoder="default", vae="default"), adapter=dict(rank=32, alpha=32.0),
      algorithm=dict(ema_decay=0.99), num_steps=1000, mixture=parts, max_crop=0.4, evaluation=dict(num_samples=64),
      resolutions=(dict(base_px=1024, batch_size=4, ratios=RATIOS, weight=1.0),),
      optimizer=dict(learning_rate=1e-4, warmup_steps=20, b2=0.999, weight_decay=0.0),
      eval_every_steps=250, sample_every_steps=100, save_every_steps=100)


def from_folder(cfg: ConfigDict, source: str) -> None:
  """Sets networks, sampling times and tokenizer of a published folder; those of the published 7B where the folder is not there, which training will
  say."""
  cfg.tokenizer = f"{DIFFUSERS}{parse_source(source).name}"
  cfg.stages[0].start_from = source
  folder = pathlib.Path(parse_source(source).name)
  if (folder / "model_index.json").is_file():
    opened = open_folder(folder, dtype="bfloat16", remat="dots")
    cfg.model, cfg.encoder, cfg.vae = (ConfigDict(plain(one)) for one in (opened.model, opened.encoder, opened.vae))
    cfg.schedule = ConfigDict(plain(opened.schedule))
    cfg.sampling.sigmas = opened.sample_sigmas or ()


def from_run(cfg: ConfigDict, workdir: str) -> None:
  """Sets what a run of launch.train was trained with, and starts from what its last generator deploys."""
  run, last = last_generator(workdir)
  for key in ("model", "encoder", "vae", "schedule", "sampling", "prepare"):
    cfg[key] = ConfigDict(plain(getattr(run, key)))
  # Your captions may be longer than what the run was trained on, and its tokenizer is not the one that your data set was indexed with.
  cfg.num_tokens, cfg.prompt_classes, cfg.random_frozen = max(96, run.num_tokens), (), run.random_frozen
  cfg.tokenizer = f"{workdir}/tokenizer.json"
  own = cfg.stages[0]
  own.start_from = weights_of(workdir)
  own.frozen.update({role: from_elsewhere(run, workdir, role, last.frozen[role]) for role in ("encoder", "vae")})
  own.resolutions[0].update(plain(last.resolutions[-1]))
  own.resolutions[0].batch_size = 8
  own.optimizer.learning_rate = 1e-3  # small networks bear, and need, more


def last_generator(workdir: str) -> tuple[RunConfig, StageConfig]:
  """A run of launch.train, and its last stage that trains a generator."""
  record = pathlib.Path(workdir) / "config.json"
  if not record.is_file():
    raise ValueError(f"There is no run in {workdir}: name the --workdir of a launch.train that trained a generator.")
  run = read_record(record)
  last = next((one for one in reversed(run.stages) if one.kind == "generator"), None)
  if last is None:
    raise ValueError(f"The run in {workdir} trains no generator: name another one.")
  return run, last


def weights_of(workdir: str) -> str:
  """The weights that a run's last generator deploys, as `start_from` and `frozen` say it."""
  last = last_generator(workdir)[1]
  return f"{workdir}/{last.name}" + (":ema" if last.algorithm.settings.get("ema_decay") else "")


def from_elsewhere(run: RunConfig, workdir: str, role: str, text: str) -> str:
  """Where a frozen role of a stage of a run is, as another run says it."""
  if text.startswith(STAGE):
    return f"{workdir}/{text.removeprefix(STAGE)}"
  if text != "default":
    return text
  roots = [one.start_from for one in run.stages if one.start_from.startswith(DIFFUSERS)]
  return roots[0] if roots else f"{workdir}/frozen/{role}"


def planned(cfg: ConfigDict, plan: Plan) -> ConfigDict:
  """The run on the chips of a plan."""
  own = cfg.stages[0]
  cfg.mesh.fsdp, cfg.model.remat = plan.fsdp, plan.remat
  own.resolutions[0].update(dict(base_px=plan.base_px, batch_size=plan.batch_size))
  own.offload_frozen = plan.cached
  return cfg


def smoke(cfg: ConfigDict) -> ConfigDict:
  """Two steps on the glyphs, on a generator drawn from the seed."""
  cfg.num_tokens, cfg.prompt_classes = 64, ()
  own = cfg.stages[0]
  own.resolutions[0].ratios = ("1:1",)
  return base.smoke(cfg)
