"""The run of the notebooks: a VAE and a generator that draws and edits, from nothing, in under a quarter of an hour on one TPU chip or GPU.

What to expect. As configs/quickstart.py, but on squares alone and in one stage for both tasks, and shorter. No plan has been trained to its end yet,
so how much of it comes out right is not known. Sizes follow the device, so the argument names one of these:

           for                               generator  px  batch  type
  cpu      two CPU cores                     192 x 4    64  16     float32
  small    a T4, or less than 14 GiB         192 x 4    64  64     float32
  medium   v5e (16 GB), L4                   384 x 6    64  64     bfloat16
  large    v6e (32 GB), A100                 512 x 8    96  64     bfloat16

`plan_for` chooses by what JAX says of the device. None of them fills it: what takes the time is two CPU cores that read pictures, and the compiler
(docs/colab.md has the figures). With a name behind a colon, small:mine, it is the run of configs/folder.py on your own pictures at these sizes.

Commands:
  python -m launch.train --config=configs/colab.py:medium --workdir=runs/colab
  python -m launch.rehearse --config=configs/colab.py:medium --topology=v5e:1x1 --whole
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base, folder
from qimg2.analysis.roofline import GIB
from qimg2.runtime.notebook import Device


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a device gets.

  Attributes:
    least_bytes: memory that the device must have for this plan.
    width, num_layers, head_dim: of the generator.
    vae_dim: channels of the VAE's first level, in both halves.
    base_px, batch_size: of the pictures that are learned; the VAE has half as many in a batch.
    dtype: that generator and VAE compute in.
    learning_rate: of the generator.
    vae_steps, steps: of the two stages.
  """
  least_bytes: float
  width: int
  num_layers: int
  head_dim: int
  vae_dim: int
  base_px: int
  batch_size: int
  dtype: str
  learning_rate: float
  vae_steps: int
  steps: int


PLANS = {
    "cpu": Plan(0, 192, 4, 48, 8, 64, 16, "float32", 2e-3, 1000, 2600),
    "small": Plan(0, 192, 4, 48, 8, 64, 64, "float32", 2e-3, 1500, 3000),
    "medium": Plan(14 * GIB, 384, 6, 64, 16, 64, 64, "bfloat16", 1e-3, 1500, 3000),
    "large": Plan(28 * GIB, 512, 8, 64, 16, 96, 64, "bfloat16", 7e-4, 1500, 3000),
}


def plan_for(device: Device) -> str:
  """The name of the plan for a device: the largest that its memory and its types allow, "cpu" for a CPU."""
  allowed = lambda plan: plan.least_bytes <= device.memory_bytes and (device.bfloat16 or plan.dtype == "float32")
  return "cpu" if device.backend == "cpu" else next(name for name in ("large", "medium", "small") if allowed(PLANS[name]))


def get_config(arg: str = "") -> ConfigDict:
  """The run at the size of a plan: `arg` is its name ("" is cpu), or "smoke" for two tiny steps of each stage; ":NAME" behind it takes the data set
  that launch.prepare_data made of your own pictures under that name.

  Raises:
    ValueError: no such plan.
  """
  name, _, own = arg.partition(":")
  if name not in ("", "smoke", *PLANS):
    raise ValueError(f"--config=...:{arg} is unknown: say one of {', '.join(PLANS)} or smoke, and :NAME behind it for a data set of your own.")
  plan = PLANS.get(name, PLANS["cpu"])
  cfg = _sized(folder.get_config(own) if own else _glyphs(plan), plan)
  if name != "smoke":
    return cfg
  data_dir = cfg.data_dir
  cfg = base.smoke(cfg)
  cfg.data_dir = data_dir if own else cfg.data_dir  # where your pictures are
  return cfg


def _glyphs(plan: Plan) -> ConfigDict:
  cfg = base.base()
  cfg.evals = ConfigDict(dict(glyphs=dict(num_prompts=100), glyph_edits=dict(num_prompts=100)))
  cfg.num_tokens = 31
  cfg.random_frozen = True  # a tiny encoder tells these prompts apart without training
  cfg.sampling.guidance = 3.0
  squares = dict(base_px=plan.base_px, ratios=("1:1",), weight=1.0)
  cfg.stages = (
      base.stage("vae", "reconstruction", algorithm=dict(l1_weight=0.1, l2_weight=1.0), resolutions=(squares,),
                 optimizer=dict(learning_rate=2e-3, schedule="cosine", final_ratio=0.02)),
      base.stage("generator", "flow_matching", algorithm=dict(ema_decay=0.99), resolutions=(squares,),
                 mixture=(base.part("glyphs", 0.65), base.part("glyphs", 0.35, "ti2i")),
                 optimizer=dict(schedule="linear", final_ratio=0.1, warmup_steps=30)),
  )
  return cfg


def _sized(cfg: ConfigDict, plan: Plan) -> ConfigDict:
  """The run at the size of a plan. It saves often, because sessions end without a notice."""
  side = plan.head_dim * 5 // 24 * 2  # of the rotary dims, for height and for width; what is left is for the place in the prompt
  cfg.model.update(dict(width=plan.width, num_layers=plan.num_layers, num_heads=plan.width // plan.head_dim, head_dim=plan.head_dim,
                        rope_dims=(plan.head_dim - 2 * side, side, side), dtype=plan.dtype))
  cfg.vae.update(dict(base_dim=plan.vae_dim, decoder_base_dim=plan.vae_dim, dtype=plan.dtype))
  for stage, num_steps in zip(cfg.stages, (plan.vae_steps, plan.steps)):
    stage.num_steps = num_steps
    stage.eval_every_steps = stage.sample_every_steps = stage.save_every_steps = num_steps // 4
    stage.evaluation.num_samples = 64
    for resolution in stage.resolutions:
      resolution.batch_size = plan.batch_size if stage.name == "generator" else plan.batch_size // 2
  cfg.stages[0].optimizer.learning_rate *= (8 / plan.vae_dim) ** 0.5  # wider networks want smaller steps
  cfg.stages[1].optimizer.learning_rate = plan.learning_rate
  return cfg
