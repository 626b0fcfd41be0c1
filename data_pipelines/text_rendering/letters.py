"""The letters kind: one word of a few letters in the middle of plain paper, for small networks that learn to spell.

A word is any letters of an alphabet, each alike, so that nothing is gained by knowing words. The picture follows from the word, its typeface, ink and
paper: letters have one size and one base line, and get smaller only where a word is too wide. So what a picture shows can be told without OCR, by
comparing it with what other words would look like (`spelt`). One word in `HELD_OUT` is never drawn: evaluations ask for those.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipelines import records
from data_pipelines.text_rendering.captions import KINDS, capital, own_block, own_stop, pick
from data_pipelines.text_rendering.colours import RGB, contrast, draw_ink, draw_paper
from data_pipelines.text_rendering.drawing import Paper, draw_on
from data_pipelines.text_rendering.fonts import Typeface
from data_pipelines.text_rendering.languages import Language
from data_pipelines.text_rendering.layout import Style, fit
from data_pipelines.text_rendering.pages import Block, Page, draw_typeface, truth_of

HELD_OUT = 8
_SIZE, _WIDE, _CAPITAL = 0.62, 0.94, 0.72  # size of letters to the paper's height, a word to its width at most, height of a capital in ems
_SAYS = ("the word \"{text}\" in {ink} {font} on {paper} paper", "\"{text}\" in {ink} {font} on {paper} paper",
         "{ink} {font} letters on {paper} paper: \"{text}\"", "{paper} paper that says \"{text}\" in {ink} {font}")
_GENERAL = "a word in {ink} letters on {paper} paper"


class Word(NamedTuple):
  """What a picture shows: its letters, the name of a face, and the names of two colours."""
  text: str
  font: str
  ink: str
  paper: str


def draw_word(rng: np.random.Generator, page: Page, held_out: bool = False) -> Word:
  """A word of as many letters as the settings allow, of those that are held out or of the others."""
  least, most = page.settings.letters
  while True:
    text = "".join(page.settings.alphabet[i] for i in rng.integers(len(page.settings.alphabet), size=rng.integers(least, most + 1)))
    if (zlib.crc32(text.encode()) % HELD_OUT == 0) == held_out:
      break
  paper = draw_paper(rng)[0]
  ink = draw_ink(rng, [RGB[paper]])[0]
  return Word(text, draw_typeface(rng, page).main.name, ink, paper)


def set_word(word: Word, typefaces: Sequence[Typeface], language: Language, height: int, width: int, min_px: float) -> tuple[Paper, Block]:
  """Returns (plain paper of height x width px with a word on it, the word in its place).

  Raises:
    ValueError: it is too wide at the least size, or there is no such face.
  """
  face = next((one for one in typefaces if one.main.name == word.font), None)
  if face is None:
    raise ValueError(f"This machine has no font {word.font!r} that sets {language.name}: install it, or name another in `fonts`.")
  style = Style(face, language, 1.0, "start", breaks="never")
  setting = fit([word.text], style, _WIDE * width, float(height), (min_px, max(min_px, _SIZE * height)))
  if setting is None:
    raise ValueError(f"{word.text!r} does not fit on {width}x{height} px at {min_px} px: give fewer or smaller letters, or wider pictures.")
  left, _, right, _ = setting.ink
  setting = setting.moved((width - left - right) / 2, (height + _CAPITAL * setting.size) / 2 - setting.placed[0].y)
  ink = word.ink, RGB[word.ink], contrast(RGB[word.ink], RGB[word.paper])
  paper = Paper(word.paper, RGB[word.paper], "plain", Image.new("RGB", (width, height), RGB[word.paper]), (RGB[word.paper],))
  draw_on(paper.picture, setting, ink[1])
  return paper, Block([word.text], setting, "word", ink)


def render(rng: np.random.Generator, page: Page) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns (the picture H W 3 uint8, its truth), see `pages`."""
  paper, block = set_word(draw_word(rng, page), page.typefaces, page.corpus.language, page.height, page.width, page.least_px)
  return np.asarray(paper.picture), truth_of("letters", "word", [block], paper, page)


def captions(rng: np.random.Generator, truth: Mapping[str, Any], language: Language) -> dict[str, list[str]]:
  """Returns the captions of a picture as columns of a record: captions, languages, kinds. Always three: in English without the word, in English with
  it, and in the language with it."""
  block, paper = truth["blocks"][0], truth["paper"]["colour"]
  word = Word(block["text"], block["font"], block["colour"], paper)
  own = say(rng, word)
  if language.code != "en":
    paper_said = language.captions["paper"][0].format(paper=language.colours[paper])
    own = own_stop(language).join(map(capital, (paper_said, own_block(block, language)))) + own_stop(language).strip()
  return {"captions": [_GENERAL.format(ink=word.ink, paper=paper), say(rng, word), own], "languages": ["en", "en", language.code],
          "kinds": [records.KINDS[kind] for kind in KINDS]}


def say(rng: np.random.Generator, word: Word) -> str:
  """A caption of a word, in English."""
  return pick(rng, _SAYS).format(**word._asdict())


def spelt(picture: np.ndarray, word: Word, typefaces: Sequence[Typeface], page: Page) -> list[bool]:
  """Returns of each letter of a word whether a picture [H, W, 3] uint8 shows it.

  It does if the picture is nearer, by squared distance of pixels, to the word than to any that has another letter of the alphabet there, or none.
  """
  size = picture.shape[:2]

  def far(text: str) -> float:
    paper, _ = set_word(word._replace(text=text), typefaces, page.corpus.language, *size, page.least_px)
    return float(np.square(picture.astype(np.int32) - np.asarray(paper.picture)).sum())

  own, found = far(word.text), []
  for place, letter in enumerate(word.text):
    others = [one for one in page.settings.alphabet if one != letter] + [""] * (len(word.text) > 1)
    found.append(own < min(far(word.text[:place] + one + word.text[place + 1:]) for one in others))
  return found
