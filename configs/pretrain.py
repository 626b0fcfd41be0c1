"""The report's own curriculum at the published size, as data (Qwen-Image-2.0 report, arXiv 2605.10730, table 2 and section 2.3).

                      pre-training       CPT                  SFT
  steps               700K               250K                 10K
  resolution, px      256 / 512          512 / 1024 / 2048    512 / 1024 / 2048
  batch size          32K / 16K          16K / 8K / 4K        16K / 8K / 4K
  T2I : TI2I          0.9 : 0.1          0.7 : 0.3            0.7 : 0.3
  learning rate       1e-4               2e-5                 1e-5
  Adam, weight decay 0.001, gradient clipped at norm 1.0, unconditional dropout 0.1, everywhere

Each stage takes the records that passed the filters of its data stage (`min_stage`, configs/curation.py): S1 asks for 256 px, S4 for 1024 and S5 for
2048; S2 and S3 add data and filter nothing. At no resolution is a picture enlarged more than MAX_ENLARGE. Fine-tuning takes data sets of its own,
`t2i_curated` and `ti2i_curated`, which are chosen by hand; docs/data.md says how all four are made.

The report does not say how the steps divide over the resolutions of a stage. Here each resolution of pre-training is a stage (the data stages
S1 and S3 of section 2.3), and the later stages mix their resolutions in equal shares of steps. Not stated either, and chosen here: betas
(0.9, 0.95), 1,000 steps of warm-up in every stage, a constant rate, EMA 0.9999, logit-normal times with the resolution shift. K is 1,024.
The VAE learns from the text-to-image pictures.

What it costs: if all overlapped, 475 days on the 128 chips of v5p-256, and 15 on the 4,096 of v5p-8192; if nothing did, 750 and 23. A
pod's name, such as `:v6e-256`, takes the plan for it; docs/pods.md says what was rehearsed of them, and how the days are computed. `python -m
launch.describe --config=configs/pretrain.py` lists every weight; `:smoke` runs all stages here.

The encoder is trained already: DIR is a folder in the published layout (docs/published.md), of which the encoder and the tokenizer
are taken. The stage "vae" trains the VAE; with `:v5p-256:vae:diffusers:DIR` the folder's is taken, and there is no such stage. Without a folder the
run is refused, because its encoder would be a random one.

Command:
  python -m launch.train --config=configs/pretrain.py:v5p-256:diffusers:DIR --distributed=auto --workdir=bucket/RUN --config.data_dir=bucket/DATA
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base, sizes

K = 1024
MAX_ENLARGE = 1.25  # a picture of just enough pixels whose crop may take a fifth of them is enlarged by 1.12, and rounding of the sides adds a little
RATIOS = ("1:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16", "1:3", "3:1")


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a pod is used: mesh sizes; (rematerialisation policy, tokens) of its micro-batches, see `micro_batches` in configs/base.py; rule set. An edit
  of 2048 px with one condition image has 33,900 tokens, a picture 17,400."""
  fsdp: int
  tensor: int
  data: int = 1
  micro_batches: tuple[tuple[str, int], ...] = (("dots", 36_000),)
  rules: str = "fsdp_tensor"


# Cloud's names count two cores for a chip of v5p and tpu7x. JAX shows a v5p chip as one device and a tpu7x chip as two.
PLANS = {
    "v5p-128": Plan(32, 2, rules="fsdp_sequence"),
    "v5p-256": Plan(64, 2),
    "v5p-1024": Plan(256, 2),
    "v5p-8192": Plan(256, 2, data=8),
    "v5p-128x2": Plan(32, 2, data=2),  # two slices
    "v6e-256": Plan(128, 2, micro_batches=(("dots", 11_000), ("attention", 36_000))),
    "tpu7x-128": Plan(64, 2),
}


def get_config(arg: str = "") -> ConfigDict:
  """The report's curriculum; `arg` is "smoke", or a pod of `PLANS`, "" for v5p-256, alone or with what `base.published` takes, such as
  "v5p-256:diffusers:DIR".

  Raises:
    ValueError: another word.
  """
  name, _, source = arg.partition(":")
  if name not in ("", "smoke", *PLANS) or source and name == "smoke":
    raise ValueError(f"configs/pretrain.py knows no {arg!r}: choose one of smoke, {', '.join(PLANS)}, or set config.mesh yourself; behind a pod may "
                     "stand :diffusers:DIR or :vae:diffusers:DIR.")
  plan = PLANS.get(name, PLANS["v5p-256"])
  cfg = base.base()
  cfg.mesh = ConfigDict(dict(data=plan.data, fsdp=plan.fsdp, context=1, tensor=plan.tensor))
  cfg.rules = plan.rules
  cfg.data_dir = "data"
  cfg.num_tokens = 1024
  cfg.prompt_classes = (128, 256, 512)
  cfg.num_workers = 8
  cfg.compile = "background"
  cfg.model, cfg.encoder, cfg.vae = sizes.mmdit_7b(), sizes.qwen3_vl("8B"), sizes.vae_f16c64(image_channels=4)
  cfg.model.remat = plan.micro_batches[-1][0]
  cfg.micro_batches = tuple(ConfigDict(dict(remat=remat, tokens=tokens)) for remat, tokens in plan.micro_batches)
  cfg.stages = (
      autoencoder(batch_size=max(K, plan.data * plan.fsdp)),  # a picture for each part that rows are divided into
      generator("pretrain_256_t2i", "scratch", 250_000, 1e-4, (256,), pictures(1)),  # S1
      generator("pretrain_256", "stage:pretrain_256_t2i", 200_000, 1e-4, (256,), mixture(0.9, 2)),  # S2
      generator("pretrain_512", "stage:pretrain_256", 250_000, 1e-4, (512,), mixture(0.9, 3)),  # S3
      generator("cpt_1024", "stage:pretrain_512", 125_000, 2e-5, (512, 1024), mixture(0.7, 4)),  # S4
      generator("cpt_2048", "stage:cpt_1024", 125_000, 2e-5, (512, 1024, 2048), mixture(0.7, 5)),  # S5
      generator("sft", "stage:cpt_2048", 10_000, 1e-5, (512, 1024, 2048), mixture(0.7, 6, "_curated")),  # S6
  )
  for one in cfg.stages[1:]:
    one.faults.stop_after = "micro_batch"  # a step takes minutes, and a notice of preemption comes 30 s ahead
  if source:
    base.published(cfg, source)
  return smoke(cfg) if name == "smoke" else cfg


def pictures(min_stage: int) -> tuple[dict]:
  """Text-to-image records that passed the filters of a data stage."""
  return (base.part("t2i", min_stage=min_stage, max_enlarge=MAX_ENLARGE),)


def mixture(t2i_share: float, min_stage: int, suffix: str = "") -> tuple[dict, dict]:
  """Text-to-image and editing records of a data stage in the shares t2i_share and 1 - t2i_share; `suffix` is that of the data sets' names."""
  common = dict(min_stage=min_stage, max_enlarge=MAX_ENLARGE)
  return base.part(f"t2i{suffix}", t2i_share, **common), base.part(f"ti2i{suffix}", round(1 - t2i_share, 6), "ti2i", **common)


def autoencoder(num_steps: int = 300_000, batch_size: int = K) -> ConfigDict:
  """The VAE's stage. The report gives its losses and data but neither steps nor rates: those are VA-VAE's kind of numbers."""
  return base.stage(
      "vae", "reconstruction", num_steps=num_steps, resolutions=(dict(base_px=256, batch_size=batch_size, ratios=RATIOS, weight=1.0),),
      mixture=pictures(1), evaluation=dict(num_samples=4096),
      optimizer=dict(learning_rate=1e-4, warmup_steps=1000), log_every_steps=100, eval_every_steps=5000, sample_every_steps=5000,
      save_every_steps=1000, save_every_s=1200.0, keep=3)


def generator(name: str, start_from: str, num_steps: int, learning_rate: float, base_px: tuple[int, ...], parts: tuple[dict, ...],
              batch_size: int = 32 * K) -> ConfigDict:
  """A stage of the generator; the batch is `batch_size`, the report's by default, at 256 px and is halved with each doubling of the side."""
  return base.stage(
      name, "flow_matching", start_from=start_from, num_steps=num_steps,
      algorithm=dict(ema_decay=0.9999),
      resolutions=tuple(dict(base_px=px, batch_size=batch_size * 256 // px, ratios=RATIOS, weight=1.0) for px in base_px),
      mixture=parts, evaluation=dict(num_samples=4096), caption_dropout=0.1,
      optimizer=dict(learning_rate=learning_rate, warmup_steps=1000, schedule="constant", weight_decay=0.001, clip_norm=1.0),
      log_every_steps=100, eval_every_steps=5000, sample_every_steps=5000, save_every_steps=1000, save_every_s=1200.0, keep=3)


def smoke(cfg: ConfigDict) -> ConfigDict:
  """Two steps of every stage on the embedded glyphs."""
  cfg.data_dir, cfg.num_workers, cfg.num_tokens, cfg.prompt_classes = "runs/data", 0, 64, ()
  for stage in cfg.stages:
    stage.resolutions = stage.resolutions[:1]
    stage.resolutions[0].ratios = ("1:1", "2:1", "1:2")
    for part in stage.mixture:
      part.name, part.max_enlarge = "glyphs", 0.0  # pictures of 96 px
  return base.smoke(cfg)
