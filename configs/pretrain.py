"""The report's own curriculum at the published size, as data (Qwen-Image-2.0 report, arXiv 2605.10730, table 2 and section 2.3).

                      pre-training       CPT                  SFT
  steps               700K               250K                 10K
  resolution, px      256 / 512          512 / 1024 / 2048    512 / 1024 / 2048
  batch size          32K / 16K          16K / 8K / 4K        16K / 8K / 4K
  T2I : TI2I          0.9 : 0.1          0.7 : 0.3            0.7 : 0.3
  learning rate       1e-4               2e-5                 1e-5
  Adam, weight decay 0.001, gradient clipped at norm 1.0, unconditional dropout 0.1, everywhere

The report does not say how the steps divide over the resolutions of a stage. Here each resolution of pre-training is a stage (the data stages
S1 and S3 of section 2.3), and the later stages mix their resolutions in equal shares of steps. Not stated either, and chosen here: betas
(0.9, 0.95), 1,000 steps of warm-up in every stage, a constant rate, EMA 0.9999, logit-normal times with the resolution shift. K is 1,024.
The VAE learns from the text-to-image pictures.

What it costs: a pod for weeks. `python -m launch.describe --config=configs/pretrain.py` lists every weight; `:smoke` runs all stages here; a pod's
name, such as `:v6e-256`, takes the plan for it; docs/pods.md says what was rehearsed of them.

Command:
  python -m launch.train --config=configs/pretrain.py:v5p-256 --distributed=auto --workdir=bucket/RUN --config.data_dir=bucket/DATA
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base, sizes

K = 1024
RATIOS = ("1:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16", "1:3", "3:1")


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a pod is used: mesh sizes, and (rematerialisation policy, tokens) of its micro-batches, see `micro_batches` in configs/base.py. An edit of
  2048 px with one condition image has 33,900 tokens."""
  fsdp: int
  tensor: int
  data: int = 1
  micro_batches: tuple[tuple[str, int], ...] = (("dots", 36_000),)


# Cloud's names count two cores for a chip of v5p and tpu7x. JAX shows a v5p chip as one device and a tpu7x chip as two.
PLANS = {
    "v5p-128": Plan(32, 2),
    "v5p-256": Plan(64, 2),
    "v5p-1024": Plan(256, 2),
    "v5p-128x2": Plan(32, 2, data=2),  # two slices
    "v6e-256": Plan(128, 2, micro_batches=(("dots", 11_000), ("attention", 36_000))),
    "tpu7x-128": Plan(64, 2),
}


def get_config(arg: str = "") -> ConfigDict:
  """The report's curriculum; `arg` is a pod of `PLANS`, "" for v5p-256, or "smoke".

  Raises:
    ValueError: another word.
  """
  if arg not in ("", "smoke", *PLANS):
    raise ValueError(f"configs/pretrain.py knows no {arg!r}: choose one of smoke, {', '.join(PLANS)}, or set config.mesh yourself.")
  plan = PLANS.get(arg, PLANS["v5p-256"])
  cfg = base.base()
  cfg.mesh = ConfigDict(dict(data=plan.data, fsdp=plan.fsdp, context=1, tensor=plan.tensor))
  cfg.data_dir = "data"
  cfg.num_tokens = 1024
  cfg.prompt_classes = (128, 256, 512)
  cfg.num_workers = 8
  cfg.model, cfg.encoder, cfg.vae = sizes.mmdit_7b(), sizes.qwen3_vl("8B"), sizes.vae_f16c64(image_channels=4)
  cfg.model.remat = plan.micro_batches[-1][0]
  cfg.micro_batches = tuple(ConfigDict(dict(remat=remat, tokens=tokens)) for remat, tokens in plan.micro_batches)
  cfg.stages = (
      autoencoder(),
      generator("pretrain_256_t2i", "scratch", 250_000, 1e-4, (256,), (base.part("t2i"),)),  # S1
      generator("pretrain_256", "stage:pretrain_256_t2i", 200_000, 1e-4, (256,), mixture(0.9)),  # S2
      generator("pretrain_512", "stage:pretrain_256", 250_000, 1e-4, (512,), mixture(0.9)),  # S3
      generator("cpt_1024", "stage:pretrain_512", 125_000, 2e-5, (512, 1024), mixture(0.7)),  # S4
      generator("cpt_2048", "stage:cpt_1024", 125_000, 2e-5, (512, 1024, 2048), mixture(0.7)),  # S5
      generator("sft", "stage:cpt_2048", 10_000, 1e-5, (512, 1024, 2048), tuple(dict(part, min_quality=1.0) for part in mixture(0.7))),  # S6
  )
  return smoke(cfg) if arg == "smoke" else cfg


def mixture(t2i_share: float) -> tuple[dict, dict]:
  """Text-to-image and editing records in the shares t2i_share and 1 - t2i_share."""
  return base.part("t2i", t2i_share), base.part("ti2i", round(1 - t2i_share, 6), "ti2i")


def autoencoder() -> ConfigDict:
  """The VAE's stage. The report gives its losses and data but neither steps nor rates: those are VA-VAE's kind of numbers."""
  return base.stage(
      "vae", "reconstruction", num_steps=300_000, resolutions=(dict(base_px=256, batch_size=K, ratios=RATIOS, weight=1.0),),
      mixture=(base.part("t2i"),), evaluation=dict(num_samples=4096),
      optimizer=dict(learning_rate=1e-4, warmup_steps=1000), log_every_steps=100, eval_every_steps=5000, sample_every_steps=5000,
      save_every_steps=1000, save_every_s=1200.0, keep=3)


def batch_size(px: int) -> int:
  """The report's batch at a resolution: 32K at 256 px, halved with each doubling of the side."""
  return 32 * K * 256 // px


def generator(name: str, start_from: str, num_steps: int, learning_rate: float, base_px: tuple[int, ...], parts: tuple[dict, ...]) -> ConfigDict:
  """A stage of the generator at the report's batch size for each resolution."""
  return base.stage(
      name, "flow_matching", start_from=start_from, num_steps=num_steps,
      algorithm=dict(ema_decay=0.9999),
      resolutions=tuple(dict(base_px=px, batch_size=batch_size(px), ratios=RATIOS, weight=1.0) for px in base_px),
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
      part.name = "glyphs"
  return base.smoke(cfg)
