"""A small pre-training for those who have a slice for a week: a generator of 1B, from 256 to 1024 px, with the encoder Qwen3-VL-2B.

                      pretrain_256    pretrain_512    cpt_1024      sft
  steps               200K            140K            70K           5K
  resolution, px      256             512             512 / 1024    512 / 1024
  batch size          4K              2K              2K / 1K       2K / 1K
  T2I : TI2I          1 : 0           0.9 : 0.1       0.7 : 0.3     0.7 : 0.3
  learning rate       1e-4            1e-4            2e-5          1e-5

The stages, their data and all else are those of configs/pretrain.py, with fewer steps and an eighth of the batch: 820 million pictures are seen at
256 px, 290 million at 512. Prompts have at most 512 tokens. Nobody has trained this yet, so what it draws is not known.

What it costs: on 64 chips of TPU v6e, `v6e:8x8`, 6.9 days if nothing overlaps and 3.3 if everything does; docs/pods.md has the command that says so.

DIR is a folder in the published layout (docs/published.md) whose text_encoder and processor are those of Qwen3-VL-2B; its VAE is taken, too. With
`:diffusers:DIR` the encoder alone is, and the stage "vae" trains a VAE first. Without a folder the run is refused.

Command:
  python -m launch.train --config=configs/pretrain_1b.py:vae:diffusers:DIR --distributed=auto --workdir=bucket/RUN --config.data_dir=bucket/DATA
"""

from ml_collections import ConfigDict

from configs import base, pretrain, sizes

K = 1024


def get_config(arg: str = "") -> ConfigDict:
  """The curriculum for 64 chips of TPU v6e; `arg` is "", "smoke", or what `base.published` takes.

  Raises:
    ValueError: another word.
  """
  cfg = base.base()
  cfg.mesh = ConfigDict(dict(data=1, fsdp=64, context=1, tensor=1))
  cfg.data_dir = "data"
  cfg.num_tokens, cfg.prompt_classes = 512, (128, 256)
  cfg.num_workers = 8
  cfg.compile = "background"
  cfg.model, cfg.encoder, cfg.vae = sizes.mmdit_1b(), sizes.qwen3_vl("2B"), sizes.vae_f16c64(image_channels=4)
  cfg.micro_batches = (ConfigDict(dict(remat=cfg.model.remat, tokens=25_000)),)
  cfg.stages = (
      pretrain.autoencoder(100_000),
      pretrain.generator("pretrain_256", "scratch", 200_000, 1e-4, (256,), pretrain.pictures(1), 4 * K),
      pretrain.generator("pretrain_512", "stage:pretrain_256", 140_000, 1e-4, (512,), pretrain.mixture(0.9, 3), 4 * K),
      pretrain.generator("cpt_1024", "stage:pretrain_512", 70_000, 2e-5, (512, 1024), pretrain.mixture(0.7, 4), 4 * K),
      pretrain.generator("sft", "stage:cpt_1024", 5_000, 1e-5, (512, 1024), pretrain.mixture(0.7, 4, "_curated"), 4 * K),
  )
  if arg in ("", "smoke"):
    return pretrain.smoke(cfg) if arg else cfg
  return base.published(cfg, arg)
