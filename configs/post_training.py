"""Each method of post-training on the quickstart's glyphs: from a generator that is half trained to one that a reward, a pair or a teacher improved.

The argument is METHOD, METHOD:RUN or METHOD+lora:RUN. RUN is the --workdir of the run to start from, whose last generator is taken: by default
runs/half, which the method "half" makes, a generator that draws about every second glyph. With +lora an adapter is trained and the generator stays.

  half     flow matching for a few hundred steps at 32 px, on the VAE of the quickstart (RUN: runs/quickstart)
  grpo     Flow-GRPO         guard  GRPO-Guard        dppo  Flow-DPPO: policy gradients on the steps of an SDE
  nft      DiffusionNFT: good and bad pictures of its own, by the forward process
  dpo      preference optimisation on the best and the worst of its own pictures of a prompt
  distill  on-policy distillation: drawing without guidance what the same generator draws with it
  sft      flow matching on clean pictures, which is what the others are measured against

What to expect. Held-out prompts, drawn without guidance as the rewards are; docs/post_training.md has the curves and what was measured. The reward is
"glyph": the right shape by the nearest of all clean renders. Ink and paper are watched and not learned from: they should stay. A band on the
darkness of pictures ends a stage whose reward was hacked.

What it costs. Eight prompts of eight pictures a step: seconds a step on two CPU cores. docs/post_training.md says how long each run took.

Commands:
  make quickstart
  python -m launch.train --config=configs/post_training.py:half --workdir=runs/half
  python -m launch.train --config=configs/post_training.py:grpo --workdir=runs/grpo
  python -m launch.evaluate --workdir=runs/grpo --suite=glyphs --num_prompts=200 --out=runs/grpo/scores
"""

import pathlib

from ml_collections import ConfigDict

from configs import base, lora, quickstart

POLICY = dict(group=8, num_steps=10, guidance=1.0, window=2, window_end=5, num_train_steps=2, num_minibatches=2, ema_decay=0.0)
# method -> (name in `qimg2.runtime.methods`, settings, learning rate, steps)
METHODS = {
    "grpo": ("flow_grpo", dict(POLICY, clip=1e-3), 2e-4, 300),
    "guard": ("flow_grpo", dict(POLICY, objective="guard", clip=2e-4), 2e-4, 300),
    "dppo": ("flow_grpo", dict(POLICY, objective="dppo", clip=1e-4), 2e-4, 300),
    "nft": ("diffusion_nft", dict(group=8, num_steps=10, num_train_times=2, ema_decay=0.0), 3e-4, 300),
    "dpo": ("online_dpo", dict(group=8, num_steps=10, guidance=1.0, beta=100.0, ema_decay=0.0), 2e-4, 300),
    "distill": ("distillation", dict(teachers=("t2i",), num_steps=10, guidance=3.0, num_train_steps=2, ema_decay=0.0), 3e-4, 300),
    "sft": ("flow_matching", dict(ema_decay=0.98), 4e-4, 300),
}
REWARDED = ("grpo", "guard", "dppo", "nft", "dpo")
LORA = "+lora"


def get_config(arg: str = "") -> ConfigDict:
  """The run that `arg` names, see above; "smoke" is two steps of GRPO on a generator drawn from the seed, METHOD:smoke those of METHOD.

  Raises:
    ValueError: no such method or run.
  """
  name, _, source = arg.partition(":")
  name, source = ("grpo", "smoke") if name == "smoke" else (name, source)
  method = name.removesuffix(LORA)
  if method not in (*METHODS, "half") or name == f"half{LORA}":
    raise ValueError(f"--config=configs/post_training.py:{arg} is not understood: say METHOD, METHOD{LORA} or either with :RUN behind it; METHOD "
                     f"is one of half, {', '.join(METHODS)}.")
  cfg = quickstart.get_config()
  cfg.evals, cfg.sampling.guidance = ConfigDict(dict(glyphs=dict(num_prompts=200))), 1.0
  cfg.stages = (half() if method == "half" else improve(method),)
  own = cfg.stages[0]
  if name.endswith(LORA):
    own.adapter.update(dict(rank=16, alpha=16.0))
    own.optimizer.learning_rate *= 5
  if source == "smoke":
    return smoke(cfg)
  folder = source or ("runs/quickstart" if method == "half" else "runs/half")
  if not (pathlib.Path(folder) / "config.json").is_file():
    first = "make quickstart" if method == "half" else "launch.train --config=configs/post_training.py:half"
    raise ValueError(f"There is no run in {folder}: train it first by {first}, or name another one with METHOD:RUN.")
  if method == "half":
    own.frozen.update(encoder=f"{folder}/frozen/encoder", vae=f"{folder}/vae")
    cfg.tokenizer = f"{folder}/tokenizer.json"
  else:
    start(cfg, folder)
  return cfg


def half() -> ConfigDict:
  """The quickstart's first stage of the generator, stopped early."""
  return base.stage("half", "flow_matching", algorithm=dict(ema_decay=0.0), num_steps=700,
                    resolutions=(dict(base_px=32, batch_size=16, ratios=("1:1",), weight=1.0),),
                    optimizer=dict(learning_rate=2e-3, warmup_steps=30), eval_every_steps=350, sample_every_steps=350, save_every_steps=100)


def improve(method: str) -> ConfigDict:
  """The stage of a method."""
  name, settings, rate, num_steps = METHODS[method]
  stage = base.stage(method, name, algorithm=settings, num_steps=num_steps, caption_dropout=0.0,
                     resolutions=(dict(base_px=32, batch_size=8, ratios=("1:1",), weight=1.0),),
                     optimizer=dict(learning_rate=rate, warmup_steps=5, weight_decay=0.0), log_every_steps=5, eval_every_steps=100,
                     sample_every_steps=50, save_every_steps=50, evals_every_steps=100, evals_num_prompts=50)
  if method in REWARDED:
    stage.rewards = ConfigDict({part: dict(kind="glyph", parts=(part,), weight=float(part == "glyph")) for part in ("glyph", "ink", "paper")})
    stage.watch.update(bands={"pictures/dark": (0.0, 0.6)}, every_steps=10, patience=2)
  if method == "distill":
    stage.frozen.update(teacher_t2i="scratch")
  return stage


def start(cfg: ConfigDict, workdir: str) -> None:
  """Starts from the last generator of a run, at the size of its first resolution."""
  own = cfg.stages[0]
  px, rate = own.resolutions[0].to_dict(), own.optimizer.learning_rate
  lora.from_run(cfg, workdir)
  cfg.sampling.guidance = 1.0
  own.resolutions[0].update(px)
  own.optimizer.learning_rate = rate
  if "teacher_t2i" in own.frozen:
    own.frozen.teacher_t2i = own.start_from


def smoke(cfg: ConfigDict) -> ConfigDict:
  """Two steps, on networks drawn from the seed."""
  own = cfg.stages[0]
  own.frozen.update({role: "scratch" for role in own.frozen})
  for key, value in dict(group=2, num_steps=2, window=1, window_end=1, num_train_steps=1, num_train_times=1).items():
    if key in own.algorithm:
      own.algorithm[key] = value
  return base.smoke(cfg)
