"""Rendered text: pictures of text in sixteen languages, drawn when training reads them.

What to expect. Nothing is stored but a few megabytes that say what may be drawn: no picture comes twice. With --num_examples=N pictures are stored
instead. Pictures have the sizes of batches at `base_px`, so that letters are never scaled: prepare one data set for each resolution, by --name.

Commands:
  apt-get install fonts-noto-core fonts-noto-cjk
  python -m launch.prepare_data --dataset=rendered_text --out=data --config=configs/rendered_text.py
  python -m launch.prepare_data --dataset=rendered_text --name=rendered_text_512 --out=data --config=configs/rendered_text.py --config.base_px=512
A stage draws a twentieth of its batches from it by part("rendered_text", weight=0.05).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """All settings with their defaults."""
  cfg = ConfigDict()
  cfg.base_px = 256  # about the square root of a picture's area
  cfg.ratios = ("1:1", "1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")  # each as often as it is listed
  cfg.languages = ConfigDict()  # code -> how often, such as {"en": 3.0, "ja": 1.0}; empty for all languages alike
  cfg.kinds = ConfigDict(dict(pure=1.0))  # kind of pictures -> how often
  cfg.layouts = ConfigDict(dict(single=0.25, lines=0.2, paragraph=0.3, columns=0.1, list=0.15))  # of the pure kind -> how often
  cfg.min_px = 10.0  # least size of Latin letters; others are as much larger as they need to be
  cfg.max_tokens = 0  # of a caption, 128 at least; 0 for one per px of base_px
  cfg.texts = ConfigDict()  # code -> a file of your own paragraphs, with empty lines between them
  cfg.pictures = ""  # a folder of pictures, or one that prepare_data wrote, for the compositional kind; empty for scenes that are made here
  cfg.font_folders = ()  # where fonts are looked for; empty for the usual places
  cfg.tokenizer = ""  # a tokenizer.json or its folder; empty to train one on the captions
  return cfg
