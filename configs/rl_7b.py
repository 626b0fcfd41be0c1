"""Reinforcement learning of the published generator at full size, after the 2.0-RL report (arXiv 2606.27608): two specialists, then one student.

  rl_t2i   GRPO-Guard on text to image      48 prompts of 24 pictures a step, 1024 px, 10 steps, guidance 4 in the rollout alone
  rl_edit  the same on edits                rewards: a judge with rubrics for the instruction, over-editing, naturalness; what should stay is watched
  distill  on-policy distillation           the student draws without guidance; its teachers are the two, each for its task, with guidance

Rewards are normalised each for itself in each group of one prompt and added with the weights of the prompt's category (the record's "category"):
"text" for prompts that ask for writing, "portrait", and all others. The judge is a Qwen3-VL of 8B in JUDGE, a folder in its published layout, as a
frozen role beside the generator; it sees pictures at 512 px. Edge density, entropy, darkness and saturation of pictures are logged. A stage ends by
itself whose pictures leave a band, whose beauty falls by 0.3 of the rubric's 1 to 5 while the prompt is followed better, or, of edits, whose kept
regions do (SSIM, by 0.1).

Sheets and evaluations draw with the guidance of the rollouts; for the student say --guidance=1.

Stated in the report: guidance in the rollout alone, the policy loss on the conditional branch, a subset of steps biased to high noise, the sum of
normalised rewards with weights by category, teachers by task. Chosen here, after public trainings of the model's family: groups, steps, SDE, window,
Guard's ratio, whose mean does not drift with the rounding of bfloat16, clip range and learning rate.

What it costs, by rehearsal on a v5p-256 (128 chips; docs/post_training.md has the commands): a step of 1,152 pictures at least 41 s, of edits 50 s,
98 and 116 s if nothing overlaps, and 59 and 71 of 95.7 GiB. Nothing ran.

Data sets `rl_t2i` and `rl_ti2i` hold prompts with their truth; the pictures in them are not learned from. DIR is the generator's folder.

Command:
  python -m launch.train --config=configs/rl_7b.py:diffusers:DIR:JUDGE --distributed=auto --workdir=bucket/RUN --config.data_dir=bucket/DATA
"""

import functools

from ml_collections import ConfigDict

from configs import base, lora, pretrain, sizes

POLICY = dict(group=24, num_steps=10, guidance=4.0, sampler="flow", eta=1.2, window=2, window_end=5, num_train_steps=2, step_bias=1.0,
              objective="guard", clip=2e-6, deviation="group", num_minibatches=2, chunks=3)


def get_config(arg: str = "") -> ConfigDict:
  """The three stages on a v5p-256; `arg` is "smoke", or diffusers:DIR:JUDGE, "" for folders of these names.

  Raises:
    ValueError: another word.
  """
  kind, _, folders = (arg or "diffusers:DIR:JUDGE").partition(":")
  folder, _, judging = folders.rpartition(":")
  if arg != "smoke" and (kind != "diffusers" or not folder or not judging):
    raise ValueError(f"--config=configs/rl_7b.py:{arg} is not understood: say diffusers:DIR:JUDGE, the folders of generator and judge, or smoke.")
  source, judge = f"diffusers:{folder}", functools.partial(rubric, judging)
  cfg = base.base()
  cfg.mesh = ConfigDict(dict(data=1, fsdp=16, context=1, tensor=8))
  cfg.rules, cfg.data_dir, cfg.tokenizer = "fsdp_tensor", "data", source
  cfg.num_tokens, cfg.prompt_classes, cfg.num_workers = 1024, (), 8
  cfg.model, cfg.encoder, cfg.vae = sizes.mmdit_7b(), sizes.qwen3_vl("8B"), sizes.vae_f16c64(image_channels=4)
  cfg.model.remat = "dots"
  cfg.sampling.guidance = POLICY["guidance"]
  cfg.stages = (
      reinforce("rl_t2i", source, "t2i", dict(
          follow=judge("prompt_following", text=0.3, portrait=0.4, other=0.6), beauty=judge("aesthetics", text=0.2, portrait=0.2, other=0.4),
          face=judge("portrait", portrait=0.4, other=0.0), text=dict(kind="ocr", weight=dict(text=0.5, other=0.0))),
          falls={"reward/beauty": dict(by=0.3, rising="reward/follow")}),
      reinforce("rl_edit", source, "ti2i", dict(
          follow=judge("instruction", other=0.5), restraint=judge("over_editing", other=0.3), natural=judge("naturalness", other=0.2),
          kept=dict(tolerance=12, weight=0.0)),
          falls={"reward/kept": dict(by=0.1, rising="reward/follow")}),
      base.stage("distill", "distillation", start_from=source, algorithm=dict(num_steps=10, guidance=4.0, num_train_steps=2, ema_decay=0.0),
                 frozen=frozen(source) | dict(teacher_t2i="stage:rl_t2i", teacher_ti2i="stage:rl_edit"), **common(accumulate=3),
                 mixture=(base.part("rl_t2i", 0.7), base.part("rl_ti2i", 0.3, "ti2i"))),
  )
  if arg == "smoke":
    return smoke(cfg)
  lora.from_folder(cfg, source)  # its networks and times, where it is here
  return cfg


def rubric(folder: str, name: str, **weight: float) -> dict:
  """A rubric of the judge in a folder, and what it counts in each category."""
  return dict(kind="judge", pretrained=folder, rubric=name, side_px=512, num_tokens=1536, weight=weight)


def frozen(source: str) -> dict[str, str]:
  """Where the networks that are not trained come from."""
  return dict(encoder=source, vae=source)


def common(accumulate: int) -> dict:
  """What all stages have; `accumulate` micro-batches of an update."""
  return dict(num_steps=1000, caption_dropout=0.0, evaluation=dict(num_samples=1024), log_every_steps=1, eval_every_steps=100,
              sample_every_steps=20, save_every_steps=20, resolutions=(dict(base_px=1024, batch_size=48, ratios=pretrain.RATIOS, weight=1.0),),
              optimizer=dict(learning_rate=1e-5, warmup_steps=10, accumulate=accumulate, weight_decay=1e-3, clip_norm=1.0))


def reinforce(name: str, source: str, task: str, rewards: dict, falls: dict) -> ConfigDict:
  """A specialist of one task; `falls` are those that end its stage, see `qimg2.training.watch`."""
  return base.stage(name, "flow_grpo", start_from=source, frozen=frozen(source), algorithm=POLICY, rewards=rewards,
                    watch=dict(bands={"pictures/dark": (0.0, 0.6), "pictures/entropy": (2.5, 6.01)}, falls=falls, patience=3),
                    mixture=(base.part(f"rl_{task}", 1.0, task),), **common(accumulate=9))


def smoke(cfg: ConfigDict) -> ConfigDict:
  """Two steps of the first two stages on the embedded glyphs, rewarded for them, without a judge."""
  cfg.tokenizer, cfg.data_dir, cfg.num_workers, cfg.num_tokens = "default", "runs/data", 0, 64
  cfg.stages = cfg.stages[:2]
  for stage in cfg.stages:
    stage.start_from, stage.frozen = "scratch", ConfigDict(dict(encoder="scratch", vae="scratch"))
    stage.rewards, stage.watch.bands, stage.watch.falls = ConfigDict(dict(glyph=dict(weight=1.0))), ConfigDict({}), ConfigDict({})
    stage.algorithm.update(dict(group=2, num_steps=2, window=1, window_end=1, num_train_steps=1, chunks=1))
    stage.resolutions[0].ratios = ("1:1",)
    stage.mixture[0].name = "glyphs"
  return base.smoke(cfg)
