"""An optional open-world data set: colour emoji with their names in many languages.

Pictures come from Debian's fonts-noto-color-emoji (bitmaps of 136x128 px), names and keywords from unicode-cldr-core.
One record is one emoji on one paper colour; its captions are, per language, "<name>, on white paper" and "<name>:
<keyword>, <keyword>, on white paper", with as many keywords as keep it short. The paper is said in English everywhere.
For most emoji one paper is held out for validation: the emoji and the colour are known from training, the two together
are not.

Left out: emoji of several code points (flags, families, skin tones), some of which `emoji_pairs` shows, and characters the
font does not draw; `describe` counts both.
"""

import functools
import glob
import io
import json
import os
import xml.etree.ElementTree
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.transforms import encode_png

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ANNOTATIONS = "/usr/share/unicode/cldr/common/annotations"

PAPERS = {"white": (255, 255, 255), "light gray": (208, 208, 208), "light yellow": (255, 245, 170),
          "light blue": (190, 225, 255), "light green": (205, 245, 195), "pink": (255, 205, 220)}

SIDE_PX = 96
_DRAWN_PX = 84  # the bitmap's larger side, which leaves a margin
_FONT_SIZE = 109  # the only size the bitmaps of this font exist in
_MAX_KEYWORDS = 5
_MAX_CHARACTERS = 40  # of name and keywords: few enough for short prompts
_VARIATION = "\ufe0f"  # asks for a colour picture, which is all that this font has
_MIN_NAMES = 100  # a language with fewer names is a stub of CLDR


def find_files() -> tuple[str, str]:
  """Returns (font file, folder of CLDR annotations); `ValueError` with the mend if one is not installed."""
  if not os.path.isfile(FONT) or not os.path.isdir(ANNOTATIONS):
    raise ValueError("The emoji data set needs the Debian packages fonts-noto-color-emoji and unicode-cldr-core: "
                     "apt-get install fonts-noto-color-emoji unicode-cldr-core.")
  return FONT, ANNOTATIONS


@functools.cache
def annotations() -> dict[str, dict[str, tuple[str, tuple[str, ...]]]]:
  """Returns language -> character -> (name, keywords). Regional files, such as de_CH, only amend: left out."""
  table = {}
  for path in sorted(glob.glob(os.path.join(find_files()[1], "*.xml"))):
    language = os.path.basename(path).removesuffix(".xml").replace("_", "-")
    named = read_annotations(path)
    # Subtags of four letters are scripts, those of two or three are regions.
    is_regional = any(len(subtag) < 4 for subtag in language.split("-")[1:])
    if len(named) >= _MIN_NAMES and not is_regional:
      table[language] = named
  if "en" not in table:
    raise ValueError(f"{ANNOTATIONS} has no usable en.xml: reinstall the Debian package unicode-cldr-core.")
  return table


def read_annotations(path: str) -> dict[str, tuple[str, tuple[str, ...]]]:
  """Returns emoji -> (name, keywords) of one CLDR file."""
  names, keywords = {}, {}
  for element in xml.etree.ElementTree.parse(path).iter("annotation"):
    character, text = element.get("cp"), (element.text or "").strip()
    if element.get("type") == "tts":
      names[character] = text
    else:
      keywords[character] = tuple(word.strip() for word in text.split("|"))
  return {c: (name, keywords.get(c, ())[:_MAX_KEYWORDS]) for c, name in names.items()}


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
  return ImageFont.truetype(find_files()[0], _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _tables() -> tuple[dict[int, str], dict[tuple[str, ...], str], dict]:
  """Returns (glyph of each code point, glyph of each sequence of glyphs, bitmap of each glyph) of the font."""
  font = TTFont(find_files()[0], lazy=True)
  ligatures = {}
  for lookup in font["GSUB"].table.LookupList.Lookup:
    for table in lookup.SubTable:
      for first, joined in getattr(table, "ligatures", {}).items():
        ligatures |= {(first, *ligature.Component): ligature.LigGlyph for ligature in joined}
  return font.getBestCmap(), ligatures, font["CBDT"].strikeData[0]


@functools.lru_cache(maxsize=8192)
def draw(character: str) -> Image.Image | None:
  """Returns the emoji as drawn, cut to what is visible, RGBA; None if the font does not draw it as one.

  A sequence of code points is looked up in the font's table of ligatures, so no shaping library is needed.
  """
  if len(character) == 1:
    image = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    ImageDraw.Draw(image).text((0, 0), character, font=_font(), embedded_color=True)
  else:
    glyph_of, ligatures, bitmaps = _tables()
    glyphs = tuple(glyph_of.get(ord(c)) for c in character if c != _VARIATION)
    name = ligatures.get(glyphs) if len(glyphs) > 1 else glyphs[0]
    if name not in bitmaps:
      return None
    image = Image.open(io.BytesIO(bitmaps[name].imageData)).convert("RGBA")
  box = image.getbbox()
  return image.crop(box) if box else None


@functools.cache
def list_emoji() -> tuple[str, ...]:
  """Returns every character that CLDR names in English and the font draws alone."""
  return tuple(c for c in annotations()["en"] if len(c) == 1 and draw(c))


def describe() -> dict[str, int]:
  """Returns counts: emoji, languages, and named characters left out as sequences or as not in the font."""
  named = annotations()["en"]
  sequences = sum(len(c) > 1 for c in named)
  emoji = len(list_emoji())
  return {"emoji": emoji, "languages": len(annotations()), "skipped_sequences": sequences,
          "skipped_not_in_font": len(named) - sequences - emoji}


def render(character: str, paper: str, side_px: int = SIDE_PX) -> np.ndarray:
  """Returns the clean picture of an emoji centred on paper, uint8 side_px side_px 3; `ValueError` if there is none."""
  drawn = draw(character)
  if drawn is None:
    raise ValueError(f"{FONT} does not draw {character!r} as one emoji: choose one of list_emoji().")
  if paper not in PAPERS:
    raise ValueError(f"Unknown paper {paper!r}: choose one of {', '.join(PAPERS)}.")
  scale = _DRAWN_PX / SIDE_PX * side_px / max(drawn.size)
  width, height = (round(side * scale) for side in drawn.size)
  drawn = drawn.resize((width, height), Image.Resampling.LANCZOS)
  canvas = Image.new("RGBA", (side_px, side_px), PAPERS[paper])
  canvas.alpha_composite(drawn, ((side_px - width) // 2, (side_px - height) // 2))
  return np.array(canvas.convert("RGB"))


def nearest_emoji(image: np.ndarray, candidates: Sequence[str], paper: str) -> int:
  """Returns the index of the candidate whose clean render on the asked paper correlates best with a square image."""
  side_px = image.shape[0]
  if image.shape[1] != side_px:
    raise ValueError(f"nearest_emoji needs a square image, not {image.shape[0]}x{image.shape[1]}: crop it first.")
  return int(np.argmax(_unit_renders(tuple(candidates), paper, side_px) @ _unit(image)))


@functools.lru_cache(maxsize=8)
def _unit_renders(candidates: tuple[str, ...], paper: str, side_px: int) -> np.ndarray:
  return np.stack([_unit(render(character, paper, side_px)) for character in candidates])


def _unit(image: np.ndarray) -> np.ndarray:
  centred = image.reshape(-1).astype(np.float32) - image.mean(dtype=np.float64).astype(np.float32)
  return centred / max(float(np.linalg.norm(centred)), 1e-6)


@functools.cache
def _languages() -> tuple[str, ...]:
  return tuple(sorted(annotations(), key=lambda code: (code != "en", code)))


def captions(character: str, paper: str) -> tuple[list[str], list[str]]:
  """Returns (captions, the language of each), English first, then the languages by code."""
  texts, languages = [], []
  for language in _languages():
    if character in annotations()[language]:
      name, keywords = annotations()[language][character]
      texts.append(f"{name}, on {paper} paper")
      languages.append(language)
      while keywords and len(f"{name}: {', '.join(keywords)}") > _MAX_CHARACTERS:
        keywords = keywords[:-1]
      if keywords:
        texts.append(f"{name}: {', '.join(keywords)}, on {paper} paper")
        languages.append(language)
  return texts, languages


def tokenizer_texts(texts: Iterable[str]) -> Iterator[str]:
  """Yields each of the captions on one paper only: the other papers would repeat its words at six times the cost."""
  parts = {text.rpartition(", on ")[::2] for text in texts}
  papers = sorted({paper for _, paper in parts})
  for i, words in enumerate(sorted({words for words, _ in parts})):
    yield f"{words}, on {papers[i % len(papers)]}"


def held_out_paper(character: str) -> int:
  """Returns the place in PAPERS of the paper kept for validation, or one past the end or more for none."""
  return zlib.crc32(character.encode()) % 10


def combinations(split: str, num_examples: int | None = None, seed: int = 0) -> list[tuple[str, int]]:
  """Returns the (emoji, place in PAPERS) of each record of a split.

  All of them, or those of a part of the emoji that the seed draws: whole emoji one after the other until training has `num_examples` pictures;
  validation then has the held-out papers of these emoji. `ValueError` if there are fewer.
  """
  emojis = list_emoji()
  train = [(character, paper) for character in emojis for paper in range(len(PAPERS)) if paper != held_out_paper(character)]
  if num_examples is not None:
    if num_examples > len(train):
      raise ValueError(f"The emoji data set has {len(train)} training examples, fewer than num_examples={num_examples}: ask for fewer or leave "
                       "it out.")
    rank = {emojis[i]: place for place, i in enumerate(np.random.default_rng((seed, 3)).permutation(len(emojis)))}
    train = sorted(train, key=lambda row: (rank[row[0]], row[1]))[:num_examples]
    emojis = tuple(dict.fromkeys(character for character, _ in train))
  held_out = [(character, held_out_paper(character)) for character in emojis if held_out_paper(character) < len(PAPERS)]
  return train if split == "train" else held_out


def held_out_prompts(num: int, seed: int, num_examples: int | None = None, data_seed: int = 0) -> list[tuple[str, str, str]]:
  """Returns `num` prompts of different emoji that no training picture answers: (English caption, emoji, paper).

  `num_examples` and `data_seed` are those of the data set. Raises `ValueError` if so many emoji have no held-out paper.
  """
  rows = combinations("validation", num_examples, data_seed)
  if num > len(rows):
    raise ValueError(f"There are {len(rows)} emoji with a held-out paper, fewer than {num}: ask for fewer prompts.")
  chosen = np.random.default_rng((seed, 4)).permutation(len(rows))[:num]
  prompts = []
  for character, paper_index in (rows[i] for i in chosen):
    paper = list(PAPERS)[paper_index]
    prompts.append((captions(character, paper)[0][0], character, paper))
  return prompts


def examples(split: str, num_examples: int | None, seed: int) -> Iterator[dict]:
  """Returns the records of a split, see `combinations`."""
  return (example(character, paper) for character, paper in combinations(split, num_examples, seed))


def example(character: str, paper_index: int) -> dict:
  """Returns one record. Its id is made of the code point and the paper, so it never changes."""
  paper = list(PAPERS)[paper_index]
  texts, languages = captions(character, paper)
  attributes = {"emoji": character, "name": annotations()["en"][character][0], "paper": paper}
  return {"image": encode_png(render(character, paper)), "height": SIDE_PX, "width": SIDE_PX, "quality": 1.0,
          "sample_id": ord(character) * 8 + paper_index, "captions": texts, "languages": languages,
          "attributes": json.dumps(attributes, ensure_ascii=False)}
