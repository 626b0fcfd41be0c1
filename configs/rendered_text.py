"""Rendered text: pictures of text in sixteen languages, drawn when training reads them.

What to expect. Nothing is stored but a few megabytes that say what may be drawn: no picture comes twice. With --num_examples=N pictures are stored
instead. Pictures have the sizes of batches at `base_px`, so that letters are never scaled: prepare one data set for each resolution, by --name.

Commands:
  apt-get install fonts-noto-core fonts-noto-cjk
  python -m launch.prepare_data --dataset=rendered_text --out=data --config=configs/rendered_text.py
  python -m launch.prepare_data --dataset=rendered_text --name=rendered_text_512 --out=data --config=configs/rendered_text.py --config.base_px=512
  python -m launch.prepare_data --dataset=rendered_text --name=signs --out=data --config=configs/rendered_text.py:signs --config.pictures=FOLDER
A stage draws a twentieth of its batches from it by part("rendered_text", weight=0.05).
"""

from ml_collections import ConfigDict

_LETTERS = dict(base_px=48, ratios=("2:1",), languages=dict(en=1.0), kinds=dict(letters=1.0), edits={}, min_px=7.0, max_tokens=24)  # 64x32 px
# What --config=configs/rendered_text.py:ARG changes.
CHANGES = {"": {}, "signs": dict(kinds=dict(compositional=1.0)), "word": dict(_LETTERS, fonts=("DejaVu Sans Mono Bold",)),
           "words": dict(_LETTERS, fonts=("DejaVu Sans Mono Bold", "DejaVu Serif Bold", "DejaVu Sans Bold", "DejaVu Sans Mono Bold Oblique"))}


def get_config(arg: str = "") -> ConfigDict:
  """All settings with their defaults; `arg` is "", "signs" for the compositional kind alone with its edits, or "word" or "words" for what
  configs/typography.py learns from.

  Raises:
    ValueError: another word.
  """
  if arg not in CHANGES:
    raise ValueError(f"--config=...:{arg} is unknown: leave :{arg} out, or say one of {', '.join(filter(None, CHANGES))}.")
  cfg = ConfigDict()
  cfg.base_px = 256  # about the square root of a picture's area
  cfg.ratios = ("1:1", "1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")  # each as often as it is listed
  cfg.languages = ConfigDict()  # code -> how often, such as {"en": 3.0, "ja": 1.0}; empty for all languages alike
  cfg.kinds = ConfigDict(dict(pure=0.5, complex=0.5))  # kind of pictures -> how often; compositional and letters are further ones
  cfg.layouts = ConfigDict(dict(single=0.25, lines=0.2, paragraph=0.3, columns=0.1, list=0.15))  # of the pure kind -> how often
  # Change of an edit -> how often; empty for no edits. Signs and complex pages have all but move.
  cfg.edits = ConfigDict(dict(word=2.0, number=1.0, colour=1.0, font=1.0, move=1.0, remove=1.0, add=1.0, translate=1.0))
  cfg.edit_kinds = ConfigDict()  # pure, complex or compositional, of which edits are made -> how often; empty for those of kinds
  cfg.templates = ConfigDict()  # of the complex kind -> how often, such as {"menu": 1.0}; empty for all alike
  cfg.template_folders = ()  # where your own are, one JSON file each
  cfg.min_px = 10.0  # least size of Latin letters; others are as much larger as they need to be
  cfg.max_tokens = 0  # of a caption, 128 at least, or 16 of the letters kind alone; 0 for one per px of base_px
  # code -> a file of your own paragraphs, with empty lines between them, or the texts of a Debian package, such as "debian:fortunes"; or several.
  cfg.texts = ConfigDict()
  cfg.fonts = ()  # names of faces, such as ("DejaVu Sans Mono Bold",); empty for all
  cfg.letters = (2, 5)  # of a word of the letters kind, least and most
  cfg.alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the letters kind
  cfg.pictures = ""  # a folder of pictures, or one that prepare_data wrote, for the compositional kind; empty for scenes that are made here
  cfg.font_folders = ()  # where fonts are looked for; empty for the usual places
  cfg.tokenizer = ""  # a tokenizer.json or its folder; empty to train one on the captions
  for key, value in CHANGES[arg].items():
    cfg[key] = ConfigDict(value) if isinstance(value, dict) else value
  return cfg
