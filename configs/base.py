"""What all configs share: every key that a run may have, with its default. A config file starts here and changes what it means to.

Sections are complete, in every stage too, so that a stage can be read alone and any key can be overridden on the command line:
  --config.stages[1].num_steps=10 --config.stages[1].faults.max_skipped=3
A section that is a class of its own has that class's defaults, and its keys are explained there: `schedule` is `qimg2.flow.Schedule`, `optimizer`
`qimg2.training.optim.Config`, `adapter` `qimg2.adapters.Settings`, `faults` and `watch` the `Settings` of the modules of these names in
`qimg2.training`, `mixture` and `resolutions`
`DatasetSpec` and `Resolution` of data_pipelines/specs.py (squares alone, unless a stage says otherwise), and `algorithm` has the arguments of its
method in `qimg2.algorithms`.
The sections of the three networks (configs/sizes.py) are the exception: what they do not name has the default of the network's class.

Where weights come from, in `start_from` and `frozen`:
  scratch             drawn from the seed
  stage:NAME          the last checkpoint of an earlier stage; stage:NAME:ema its averaged weights
  diffusers:DIR       a folder in the published layout; diffusers:DIR,lora=FILE with a LoRA on its generator
  FOLDER, FOLDER:ema  a stage's folder in another run; for frozen roles also a folder of weights alone, such as another run's frozen/encoder
  default             for frozen roles: from the diffusers folder that the chain of stages started from, or else as "scratch"
A frozen role that is drawn from the seed teaches nothing but tiny runs: it is refused unless `random_frozen` says that it is meant.
"""

from ml_collections import ConfigDict

from configs import sizes
from data_pipelines.specs import DatasetSpec, Resolution
from qimg2 import adapters, flow
from qimg2.runtime.config import plain
from qimg2.runtime.config.sources import DIFFUSERS
from qimg2.runtime.methods import METHODS
from qimg2.training import faults, optim, watch

RESOLUTION = plain(Resolution(base_px=64, batch_size=32, ratios=("1:1",)))


def base() -> ConfigDict:
  """A run without stages."""
  cfg = ConfigDict()
  cfg.seed = 0
  cfg.mesh = ConfigDict(dict(data=1, fsdp=-1, context=1, tensor=1))
  cfg.rules = "fsdp_tensor"
  cfg.data_dir = "runs/data"  # where launch.prepare_data wrote; the embedded data sets are made here when missing
  cfg.prepare = ConfigDict(dict(num_examples=None, seed=0))  # None: the data set's own size
  cfg.tokenizer = "default"  # that of the first stage's first data set; or a tokenizer.json, its folder, or diffusers:DIR
  cfg.num_tokens = 48  # longest prompt in tokens, system turn included, condition images not counted
  cfg.prompt_classes = ()  # shorter prompt lengths that have buckets of their own, so that less of a batch is padding
  cfg.num_workers = 0
  cfg.order_dir = "default"  # folder of this machine where the order of large data sets is kept for the next start; or "none"
  cfg.compile = "ahead"  # all programs of a stage before its first step, or in the "background" while it trains
  cfg.random_frozen = False  # whether frozen roles may be drawn from the seed, as the encoders of the embedded data sets are
  cfg.model, cfg.encoder, cfg.vae = sizes.mmdit_tiny(), sizes.qwen3_vl_tiny(), sizes.vae_tiny()
  cfg.schedule = ConfigDict(plain(flow.Schedule()))
  cfg.sampling = ConfigDict(dict(num_steps=40, guidance=1.0, sigmas=(), num_images=16))  # sigmas: own times before the shift, 1 first
  cfg.evals = ConfigDict()  # evaluation suite (docs/evaluation.md) -> its settings, for the last stage: {"glyphs": dict(num_prompts=200)}
  # What steps of the generator keep, and their tokens per micro-batch, such as (dict(remat="dots", tokens=10_000), dict(remat="attention",
  # tokens=35_000)): each bucket takes the first in which a row of it finds room. Empty: model.remat and optimizer.accumulate for all buckets.
  cfg.micro_batches = ()
  cfg.local_copies = ConfigDict(dict(folder="", every_s=60.0))  # copies of the state on a disk of each machine, beside the checkpoints; "": none
  cfg.stages = ()
  return cfg


def stage(name: str, method: str, **changes) -> ConfigDict:
  """A stage with every key. `changes` replaces values; nested sections take dicts.

  Raises:
    ValueError: a method that there is not, or a key that no stage has.
  """
  if method not in METHODS:
    raise ValueError(f"There is no method {method!r}: choose one of {', '.join(METHODS)}.")
  generator = METHODS[method].kind == "generator"
  cfg = ConfigDict(dict(
      name=name,
      algorithm=dict(name=method, **METHODS[method].settings()[1]),
      start_from="scratch",
      frozen=dict(encoder="default", vae="stage:vae") if generator else {},
      num_steps=100,
      resolutions=(RESOLUTION,),
      mixture=(part("glyphs"),),
      evaluation=dict(split="validation", num_samples=256),  # of the mixture's data sets, per task
      caption_dropout=0.1 if generator and not METHODS[method].takes_rewards else 0.0,
      max_crop=0.2,  # largest share of a picture that fitting it to a bucket may cut off
      max_programs=64,  # most buckets, each of which is a compiled step; more shapes than that share them. 0: one for each shape
      min_bucket_records=0,  # buckets with fewer records are merged into others, and what fits nowhere is left out
      too_long="drop",  # records with a caption longer than num_tokens are left out, or with "truncate" its end is; a VAE reads none and takes all
      max_faulty=0.01,  # largest share of records that may be broken
      offload_frozen=False,  # with latent caches: whether encoder and VAE, which no step then reads, are in the host's memory (qimg2/runtime/idle.py)
      adapter=plain(adapters.Settings()),  # LoRA: with rank=32 the generator stays as it is, and a small adapter is trained; 0: all weights
      optimizer=plain(optim.Config()),
      optimizers={},  # name of an update -> what its optimizer has in place of the above, such as {"fake": dict(learning_rate=1e-4)}
      faults=plain(faults.Settings()),
      watch=plain(watch.Settings()),  # rules about metrics that end the stage early: {"bands": {"pictures/dark": (0.0, 0.5)}}
      log_every_steps=10, eval_every_steps=100, sample_every_steps=200, save_every_steps=200,
      save_every_s=0.0,  # seconds after a save when another is due, where a step is long; 0: by steps alone
      keep=2,  # newest checkpoints, and as many of the newest at multiples of save_every_steps
      rewards={},  # of a method that learns from its own pictures, see docs/rewards.md: {"glyph": dict(weight=1.0)}
      reward_workers=0,  # processes that score pictures on each machine; 0: one less than there are cores
      evals_every_steps=0, evals_num_prompts=16,  # config.evals on so many prompts while the stage trains, how often; 0: only at the run's end
      keep_every_steps=0,  # checkpoints at multiples of this stay for good; a multiple of save_every_steps, 0: none
  ))
  for key, value in changes.items():
    if key not in cfg:
      raise ValueError(f"A stage has no key {key!r}: it has {', '.join(sorted(cfg))}.")
    if isinstance(cfg[key], ConfigDict) and key not in ("frozen", "optimizers", "rewards"):
      unknown = sorted(set(value) - set(cfg[key]))
      if unknown:
        raise ValueError(f"The section {key!r} of a stage has no key {unknown[0]!r}: it has {', '.join(sorted(cfg[key]))}.")
      cfg[key].update(value)
    else:
      cfg[key] = ConfigDict(value) if isinstance(value, dict) else value
  # Parts of a tuple are sections too, so that --config.stages[0].resolutions[0].batch_size=8 works.
  cfg.resolutions = tuple(ConfigDict(RESOLUTION | dict(one)) for one in cfg.resolutions)
  cfg.mixture = tuple(ConfigDict(dict(one)) for one in cfg.mixture)
  return cfg


def part(name: str, weight: float = DatasetSpec.weight, task: str = DatasetSpec.task, split: str = DatasetSpec.split,
         min_quality: float = DatasetSpec.min_quality, min_stage: int = DatasetSpec.min_stage, max_enlarge: float = DatasetSpec.max_enlarge,
         languages: tuple[str, ...] = DatasetSpec.languages, alpha: bool = DatasetSpec.alpha, shuffle_tags: bool = DatasetSpec.shuffle_tags,
         drop_tags: float = DatasetSpec.drop_tags, keep_tags: int = DatasetSpec.keep_tags, tag_separator: str = DatasetSpec.tag_separator,
         loss_weight: float = DatasetSpec.loss_weight, ignore_rejected: bool = DatasetSpec.ignore_rejected, **caption_weights: float) -> dict:
  """A data set in a mixture; `weight` is its share of the batches, `task` "t2i" (text to image) or "ti2i" (editing).

  `min_stage` leaves out records that did not pass the filters of that data stage (1 to 6), `max_enlarge` at each resolution those whose picture would
  be scaled up by more than that. `caption_weights`: general, text, knowledge, structured, how often captions of each kind are drawn; without
  any all kinds alike. `alpha` keeps the transparency of pictures, which needs a VAE of four channels; otherwise they are laid on white paper.
  Captions that are lists of tags: `shuffle_tags` has them in another order in each epoch, `drop_tags` is the chance that one is left out, and the
  first `keep_tags` stay as they are. `loss_weight` multiplies the loss of its examples, for prior preservation; `ignore_rejected` lets a method
  that takes no pairs train on the better pictures of a data set of pairs.
  """
  return plain(DatasetSpec("", name, split, weight, task, min_quality, min_stage, languages, caption_weights, max_enlarge, alpha, shuffle_tags,
                           drop_tags, keep_tags, tag_separator, loss_weight, ignore_rejected))


def published(cfg: ConfigDict, source: str) -> ConfigDict:
  """The run with the encoder and the tokenizer of a folder in the published layout, and with "vae:" before it also with its VAE, which no stage
  trains then: `source` is "diffusers:DIR" or "vae:diffusers:DIR".

  Raises:
    ValueError: another word.
  """
  roles, folder = ("encoder", "vae") if source.startswith("vae:") else ("encoder",), source.removeprefix("vae:")
  if not folder.removeprefix(DIFFUSERS) or not folder.startswith(DIFFUSERS):
    raise ValueError(f"--config=...:{source} is unknown: say diffusers:DIR for a published folder's encoder, or vae:diffusers:DIR for its VAE too.")
  cfg.tokenizer = folder
  cfg.stages = tuple(stage for stage in cfg.stages if "vae" not in roles or METHODS[stage.algorithm.name].kind != "autoencoder")
  for stage in cfg.stages:
    stage.frozen.update({role: folder for role in roles if role in stage.frozen})
  return cfg


def chosen(cfg: ConfigDict, arg: str) -> ConfigDict:
  """The run that FILE:ARG names: the whole one for "", two steps of each stage for "smoke".

  Raises:
    ValueError: another word.
  """
  if arg not in ("", "smoke"):
    raise ValueError(f"--config=...:{arg} is unknown: leave :{arg} out, or say :smoke for two steps of every stage.")
  return smoke(cfg) if arg else cfg


def smoke(cfg: ConfigDict) -> ConfigDict:
  """The same run at two steps per stage, with tiny networks and batches: for tests, on a CPU."""
  cfg.model.update(dict(width=32, num_layers=2, num_heads=4, head_dim=8, rope_dims=(4, 2, 2), context_width=32, latent_channels=8,
                        remat="none", dtype="float32"))
  cfg.encoder.update(dict(vocab_size=min(cfg.encoder.vocab_size, 8192), width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                          mlp_width=64, dtype="float32", tie_embeddings=False))
  cfg.encoder.mrope_sections, cfg.encoder.image_token_id, cfg.encoder.vision = (4, 2, 2), sizes.IMAGE_TOKEN, sizes.vision_tiny(32)
  cfg.vae.update(dict(base_dim=4, decoder_base_dim=4, num_res_blocks=1, latent_channels=8, image_channels=4, dtype="float32"))
  cfg.vae.latents_mean, cfg.vae.latents_std = (0.0,) * 8, (1.0,) * 8
  cfg.data_dir = f"{cfg.data_dir}_smoke"
  cfg.prepare.num_examples = 4800
  cfg.mesh = ConfigDict(dict(data=1, fsdp=-1, context=1, tensor=1))
  cfg.sampling.update(dict(num_steps=2, num_images=8))
  cfg.micro_batches, cfg.random_frozen, cfg.compile = (), True, "ahead"
  for settings in cfg.evals.values():
    settings.update({key: min(8, value) for key, value in settings.items() if not isinstance(value, str)})
  for one in cfg.stages:
    one.num_steps, one.log_every_steps, one.eval_every_steps, one.sample_every_steps, one.save_every_steps = 2, 1, 2, 2, 1
    one.save_every_s = 0.0
    one.evaluation.num_samples = 64
    for resolution in one.resolutions:
      resolution.batch_size, resolution.base_px, resolution.ratios = 8, min(resolution.base_px, 96), resolution.ratios[-1:]
    one.optimizer.accumulate = 1
  return cfg
