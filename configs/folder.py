"""Your own pictures, from a folder with captions: a VAE and a generator from nothing, at 64 px, for two CPU cores and a quarter of an hour.

What to expect. A few hundred pictures are learned by heart: prompts that are captions give back their pictures, and new combinations of known
words something between. That shows that the whole way works for your data; for pictures worth looking at, start from published weights:

  --config.stages[1].start_from=diffusers:DIR with the sizes, the tokenizer and the resolutions of configs/pretrain.py

The argument is the name that launch.prepare_data gave the data set, "mine" if there is none.

Commands:
  python -m launch.prepare_data --source=FOLDER --name=mine --out=runs/data --config=configs/curation.py:small
  python -m launch.train --config=configs/folder.py:mine --workdir=runs/mine
  python -m launch.sample --workdir=runs/mine --prompt="one of your captions" --out=runs/mine/picture.png
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
  """A run on the data set that `arg` names; "smoke" is two steps on the glyphs."""
  cfg = base.base()
  cfg.encoder.vocab_size = 8192
  cfg.random_frozen = True  # a tiny encoder tells these prompts apart without training
  cfg.num_tokens, cfg.prompt_classes = 128, (32, 64)
  cfg.sampling.guidance = 3.0
  pictures = base.part("glyphs" if arg == "smoke" else arg or "mine")
  sizes = dict(base_px=64, batch_size=16, ratios=("1:1", "3:2", "2:3"), weight=1.0, multiple=16)  # 64x64, 80x48, 48x80
  common = dict(mixture=(pictures,), max_crop=0.4, min_bucket_records=16, evaluation=dict(num_samples=64))
  cfg.stages = (
      base.stage("vae", "reconstruction", num_steps=1000, resolutions=(sizes,),
                 optimizer=dict(learning_rate=3e-3, schedule="cosine", warmup_steps=20), eval_every_steps=500, sample_every_steps=500, **common),
      base.stage("generator", "flow_matching", num_steps=3000, resolutions=(sizes,),
                 optimizer=dict(learning_rate=2e-3, schedule="cosine", final_ratio=0.05, warmup_steps=50),
                 eval_every_steps=1000, sample_every_steps=1000, save_every_steps=500, **common),
  )
  return base.smoke(cfg) if arg == "smoke" else cfg
