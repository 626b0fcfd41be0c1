"""Emoji: real pictures with real captions, at 64 px, for two CPU cores and at most half an hour.

Needs the Debian packages fonts-noto-color-emoji (pictures) and unicode-cldr-core (names and keywords in 100+ languages).
What to expect. The network learns which picture belongs to which name: the evaluation draws 100 emoji on a paper colour that training never
showed with that emoji, and counts how often the picture is nearest, by pixel correlation, to the right one of the 100 (chance 1 %). The last
stage learns to edit, too: skin tone, gender, direction. Half an hour is enough for a part of the emoji; set config.prepare.num_examples=None,
another config.data_dir and more steps for all of them.

Command:
  python -m launch.train --config=configs/emoji.py --workdir=runs/emoji
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """The emoji run; `arg` is "" or "smoke"."""
  cfg = base.base()
  cfg.evals = ConfigDict(dict(emoji=dict(num_prompts=100, num_candidates=100), emoji_edits=dict(num_prompts=100)))
  cfg.encoder.vocab_size = 16_384
  cfg.num_tokens = 54
  cfg.random_frozen = True  # a tiny encoder tells these prompts apart without training
  cfg.sampling.guidance = 4.0
  cfg.prepare.num_examples = 1300  # about 240 of the 1367 emoji
  square = dict(base_px=64, batch_size=32, ratios=("1:1",), weight=1.0)
  pictures, edits = base.part("emoji", languages=("en",)), base.part("emoji", 0.5, "ti2i")
  cfg.stages = (
      base.stage("vae", "reconstruction", num_steps=700, resolutions=(dict(square, batch_size=16),), mixture=(pictures,),
                 optimizer=dict(learning_rate=3e-3, schedule="cosine", warmup_steps=20)),
      base.stage("generator", "flow_matching", num_steps=3000, resolutions=(square,), mixture=(pictures,),
                 optimizer=dict(learning_rate=2e-3, schedule="cosine", final_ratio=0.05, warmup_steps=50),
                 eval_every_steps=1000, sample_every_steps=1000, save_every_steps=500),
      base.stage("edit", "flow_matching", start_from="stage:generator", num_steps=300, resolutions=(square,),
                 mixture=(dict(pictures, weight=0.5), edits),
                 optimizer=dict(learning_rate=5e-4, schedule="cosine", final_ratio=0.05), eval_every_steps=100, sample_every_steps=300),
  )
  base.chosen(cfg, arg)
  if arg:
    cfg.prepare.num_examples = 200
  return cfg
