"""Each method of post-training on the quickstart's glyphs: from a generator that is half trained to one that a reward, a pair or a teacher improved.

The argument is METHOD, METHOD:RUN or METHOD+lora:RUN. RUN is the --workdir of the run to start from, whose last generator is taken: by default
runs/half, which the method "half" makes, a generator that draws three of five glyphs right. With +lora an adapter is trained and the generator stays.

  half     flow matching at 32 px on glyphs and edits, on the VAE of the quickstart (RUN: runs/quickstart)
  grpo     Flow-GRPO         guard  GRPO-Guard        dppo  Flow-DPPO: policy gradients on the steps of an SDE
  nft      DiffusionNFT: good and bad pictures of its own, by the forward process
  dpo      preference optimisation on the best and the worst of its own pictures of a prompt
  distill  on-policy distillation: drawing without guidance what the same generator draws with it; or, as distill:RUN:T2I:TI2I, what the last
           generators of two runs draw, each for its task
  sft      flow matching on clean pictures, which is what the others are measured against
  edits    the same on edits, a specialist for them

What to expect. Held-out prompts, drawn without guidance as the rewards are; docs/post_training.md has the curves and what was measured. The reward is
"glyph", the right shape by the nearest of all clean renders, and for a quarter each that ink and paper are right, else they get worse. A band
on the darkness of pictures ends a stage whose reward was hacked.

What it costs. 64 to 96 pictures a step: a few seconds on one CPU core. docs/post_training.md says how long each run took.

Commands:
  make quickstart
  python -m launch.train --config=configs/post_training.py:half --workdir=runs/half
  python -m launch.train --config=configs/post_training.py:grpo --workdir=runs/grpo
  python -m launch.evaluate --workdir=runs/grpo --suite=glyphs --num_prompts=200 --out=runs/grpo/scores
"""

import pathlib

from ml_collections import ConfigDict

from configs import base, lora, quickstart

# All pictures of a group begin with one noise and the SDE draws most of the way, so that what is learned from is all that tells them apart.
POLICY = dict(group=8, num_steps=10, guidance=1.0, shared_noise=True, eta=1.0, window=7, window_end=7, num_train_steps=4, num_minibatches=2)
# method -> (name in `qimg2.runtime.methods`, settings, learning rate, steps, prompts of a step)
METHODS = {
    "grpo": ("flow_grpo", dict(POLICY, clip=3e-3), 5e-4, 200, 12),
    "guard": ("flow_grpo", dict(POLICY, objective="guard", clip=1e-3), 5e-4, 200, 12),
    "dppo": ("flow_grpo", dict(POLICY, objective="dppo", clip=1e-4), 5e-4, 200, 12),
    "nft": ("diffusion_nft", dict(group=4, num_steps=10, num_train_times=2, reference=0.0, advantage_limit=2.0), 5e-4, 200, 16),
    "dpo": ("online_dpo", dict(group=8, num_steps=10, guidance=1.0, beta=100.0), 5e-4, 400, 12),
    "distill": ("distillation", dict(teachers=("t2i",), num_steps=10, guidance=3.0, num_train_steps=2), 5e-4, 400, 16),
    "sft": ("flow_matching", {}, 4e-4, 300, 16),
    "edits": ("flow_matching", {}, 2e-3, 800, 16),
}
BOTH = (base.part("glyphs", 0.7), base.part("glyphs", 0.3, "ti2i"))
TASKS = ("t2i", "ti2i")
AVERAGED = 0.9  # decay of the averaged weights, which draw
REWARDS = {"glyph": 1.0, "ink": 0.5, "paper": 0.5}  # part of a glyph -> weight
REWARDED = ("grpo", "guard", "dppo", "nft", "dpo")
LORA = "+lora"


def get_config(arg: str = "") -> ConfigDict:
  """The run that `arg` names, see above; "smoke" is two steps of GRPO on a generator drawn from the seed, METHOD:smoke those of METHOD.

  Raises:
    ValueError: no such method or run.
  """
  name, _, rest = arg.partition(":")
  source, *teachers = rest.split(":")
  name, source = ("grpo", "smoke") if name == "smoke" else (name, source)
  method = name.removesuffix(LORA)
  if method not in (*METHODS, "half") or name == f"half{LORA}" or len(teachers) not in ((0, len(TASKS)) if method == "distill" else (0,)):
    raise ValueError(f"--config=configs/post_training.py:{arg} is not understood: say METHOD, METHOD{LORA} or either with :RUN behind it, or "
                     f"distill:RUN:T2I:TI2I; METHOD is one of half, {', '.join(METHODS)}.")
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
  for run in (folder, *teachers):
    if not (pathlib.Path(run) / "config.json").is_file():
      first = "make quickstart" if method == "half" else "launch.train --config=configs/post_training.py:half"
      raise ValueError(f"There is no run in {run}: train it first by {first}, or name another one with METHOD:RUN.")
  if method == "half":
    own.frozen.update(encoder=f"{folder}/frozen/encoder", vae=f"{folder}/vae")
    cfg.tokenizer = f"{folder}/tokenizer.json"
  else:
    start(cfg, folder)
  if teachers:
    own.algorithm.update(dict(teachers=TASKS, guidance=1.0))
    own.frozen.update({f"teacher_{task}": lora.weights_of(run) for task, run in zip(TASKS, teachers)})
    own.mixture = BOTH
  return cfg


def half() -> ConfigDict:
  """The quickstart's first stages of the generator, at the lower resolution and stopped early."""
  return base.stage("half", "flow_matching", algorithm=dict(ema_decay=0.0), num_steps=1400, mixture=BOTH,
                    resolutions=(dict(base_px=32, batch_size=16, ratios=("1:1",), weight=1.0),),
                    optimizer=dict(learning_rate=2e-3, warmup_steps=30), eval_every_steps=350, sample_every_steps=350, save_every_steps=100)


def improve(method: str) -> ConfigDict:
  """The stage of a method."""
  name, settings, rate, num_steps, num_prompts = METHODS[method]
  stage = base.stage(method, name, algorithm=dict(settings, ema_decay=AVERAGED), num_steps=num_steps, caption_dropout=0.0,
                     resolutions=(dict(base_px=32, batch_size=num_prompts, ratios=("1:1",), weight=1.0),),
                     optimizer=dict(learning_rate=rate, warmup_steps=5, weight_decay=0.0), log_every_steps=5, eval_every_steps=100,
                     sample_every_steps=50, save_every_steps=50, evals_every_steps=100, evals_num_prompts=50)
  if method in REWARDED:
    stage.rewards = ConfigDict({part: dict(kind="glyph", parts=(part,), weight=weight) for part, weight in REWARDS.items()})
    stage.watch.update(bands={"pictures/dark": (0.0, 0.6)}, every_steps=10, patience=2)
  if method == "distill":
    stage.frozen.update(teacher_t2i="scratch")
  if method == "edits":
    stage.mixture = BOTH[1:]
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
