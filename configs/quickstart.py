"""Quickstart: a whole curriculum on the embedded glyphs, on two CPU cores in 16 to 52 minutes.

What to expect. Prompts such as "a large green K on yellow paper, centered" and edits such as "make it red": the last stage draws the right
glyph, ink and paper nearly always, for triples that training never saw, and gets most edits right. The run evaluates that itself (200 held-out
prompts and 100 held-out edits, nearest clean render) and writes the figures into report.html.

Command:
  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """The quickstart run; `arg` is "" or "smoke"."""
  cfg = base.base()
  cfg.evals = ConfigDict(dict(glyphs=dict(num_prompts=200), glyph_edits=dict(num_prompts=100)))
  cfg.num_tokens = 31
  cfg.random_frozen = True  # a tiny encoder tells these prompts apart without training
  cfg.sampling.guidance = 3.0
  small = dict(base_px=32, batch_size=16, ratios=("1:1",), weight=1.0)
  several = dict(base_px=48, batch_size=16, ratios=("1:1", "2:1", "1:2"), weight=1.0)  # 64x64, 64x32, 32x64
  mixed = (base.part("glyphs", 0.65), base.part("glyphs", 0.35, "ti2i"))
  clean = tuple(dict(one, min_quality=1.0) for one in mixed)
  cfg.stages = (
      base.stage("vae", "reconstruction", algorithm=dict(l1_weight=0.1, l2_weight=1.0), num_steps=1800,
                 resolutions=(small, dict(several, batch_size=8)),
                 optimizer=dict(learning_rate=2e-3, schedule="cosine", final_ratio=0.02), eval_every_steps=300, sample_every_steps=600),
      base.stage("low_resolution", "flow_matching", algorithm=dict(ema_decay=0.99), num_steps=2000, resolutions=(small,),
                 optimizer=dict(learning_rate=2e-3, warmup_steps=30), eval_every_steps=500, sample_every_steps=1000, save_every_steps=500),
      base.stage("high_resolution", "flow_matching", algorithm=dict(ema_decay=0.99), start_from="stage:low_resolution", num_steps=4000,
                 resolutions=(several,), mixture=mixed, optimizer=dict(learning_rate=2e-3, schedule="linear", final_ratio=0.2),
                 eval_every_steps=500, sample_every_steps=2000, save_every_steps=500),
      base.stage("sft", "flow_matching", algorithm=dict(ema_decay=0.98), start_from="stage:high_resolution", num_steps=400,
                 resolutions=(several,), mixture=clean, optimizer=dict(learning_rate=4e-4, schedule="cosine", final_ratio=0.05)),
  )
  return base.chosen(cfg, arg)
