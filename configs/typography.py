"""Typography: a network learns to spell, from nothing, on two CPU cores.

What to expect. Prompts such as 'the word "KMNUH" in navy DejaVu Sans Mono Bold on orange paper', pictures of 64x32 px. A VAE, then words of two to
five capitals in one typeface, then in four. Words are random letters, so nothing but spelling helps, and one word in eight is never drawn: the run
asks for those at its end, and says how many words and letters came out right, told without OCR. docs/text_on_pictures.md says what came out: 99 %
of the words in one typeface, 64 % in four.

What it costs. It took an hour on two CPU cores that other work used, too.

Commands:
  python -m launch.prepare_data --dataset=rendered_text --name=words --out=runs/data --vocab_size=400 --config=configs/rendered_text.py:words
  python -m launch.prepare_data --dataset=rendered_text --name=word --out=runs/data --config=configs/rendered_text.py:word \\
    --config.tokenizer=runs/data/words
  python -m launch.train --config=configs/typography.py --workdir=runs/typography
"""

from ml_collections import ConfigDict

from configs import base

DATA = "runs/data"
CHANNELS = 16  # of a latent


def get_config(arg: str = "") -> ConfigDict:
  """The typography run; `arg` is "" or "smoke"."""
  cfg = base.base()
  cfg.data_dir = DATA
  cfg.evals = ConfigDict(dict(words=dict(folder=f"{DATA}/words", num_prompts=200)))
  cfg.random_frozen = True  # a tiny encoder tells these prompts apart without training
  cfg.sampling.guidance = 3.0
  # A latent for each 8x8 px, not 16x16: letters are 6 px wide, and three levels learn to give them back in half the steps of four.
  cfg.vae.update(dict(dim_mult=(1, 2, 4, 4), temporal_downsample=(False, True, True), latent_channels=CHANNELS, latents_mean=(0.0,) * CHANNELS,
                      latents_std=(1.0,) * CHANNELS))
  cfg.model.latent_channels = CHANNELS
  wide = dict(base_px=48, batch_size=32, ratios=("2:1",), weight=1.0)  # 64x32
  one, several = base.part("word", text=1.0), base.part("words", text=1.0)  # of captions those that quote the word
  cfg.stages = (
      base.stage("vae", "reconstruction", algorithm=dict(l1_weight=0.1, l2_weight=1.0), num_steps=1500, mixture=(several,),
                 resolutions=(dict(wide, batch_size=16),), optimizer=dict(learning_rate=2e-3, schedule="cosine", final_ratio=0.02),
                 eval_every_steps=300, sample_every_steps=500),
      base.stage("one_font", "flow_matching", algorithm=dict(ema_decay=0.99), num_steps=3500, mixture=(one,), resolutions=(wide,),
                 optimizer=dict(learning_rate=2e-3, warmup_steps=50), eval_every_steps=500, sample_every_steps=500, save_every_steps=500),
      base.stage("fonts", "flow_matching", algorithm=dict(ema_decay=0.99), start_from="stage:one_font", num_steps=2500,
                 mixture=(several, dict(one, weight=0.25)), resolutions=(wide,),
                 optimizer=dict(learning_rate=1.5e-3, schedule="linear", final_ratio=0.05, warmup_steps=30), eval_every_steps=500,
                 sample_every_steps=500, save_every_steps=500),
  )
  return base.chosen(cfg, arg)
