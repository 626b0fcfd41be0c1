"""The pure kind: words, lines and paragraphs on paper.

Five layouts. *single*: a word or a heading, as large as it may be. *lines*: two to four short texts below each other, each with a place, and
in one of two typefaces. *paragraph*: sentences that fill the page, in half of the cases below a heading. *columns*: the same in two columns.
*list*: numbered lines. In Japanese and traditional Chinese some texts run from top to bottom.

Everything is drawn from the given generator. A text that does not fit is drawn anew, shorter each time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.text_rendering import captions as said
from data_pipelines.text_rendering.colours import draw_ink
from data_pipelines.text_rendering.drawing import Paper, draw_on, make_paper, worst_contrast
from data_pipelines.text_rendering.fonts import Typeface
from data_pipelines.text_rendering.layout import Setting, Style, fit
from data_pipelines.text_rendering.words import Corpus

LAYOUTS = {"single": 0.25, "lines": 0.2, "paragraph": 0.3, "columns": 0.1, "list": 0.15}  # and how often
_TRIES = 12
_TIGHTER = 0.88  # leading of headings, as a share of the least of running text
_SHORTER = 0.7  # of the characters of the try before
_MARGINS = (0.05, 0.11)  # of the shorter side
_NARROW = 1.3  # a page needs to be so much wider than it is high for two columns


@dataclasses.dataclass(frozen=True)
class Page:
  """What is set: a language's texts and typefaces, sides in px, least size of Latin letters in px, most characters, layout."""
  corpus: Corpus
  typefaces: Sequence[Typeface]
  height: int
  width: int
  min_px: float
  num_characters: int
  layout: str


@dataclasses.dataclass
class _Block:
  """A text in its place, and what it is: a word, heading, line, paragraph or list."""
  paragraphs: list[str]
  setting: Setting
  what: str
  colour: str = ""
  rgb: tuple[int, int, int] = (0, 0, 0)


def render(rng: np.random.Generator, page: Page) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns (the picture H W 3 uint8, its truth), see `truth_of`.

  Raises:
    ValueError: nothing fits, however short.
  """
  paper = make_paper(rng, page.height, page.width)
  for number in range(_TRIES):
    short = dataclasses.replace(page, num_characters=max(1, int(page.num_characters * _SHORTER**number)),
                                layout=page.layout if number < _TRIES // 2 else "single")
    blocks = _SETTERS[short.layout](rng, short)
    if blocks:
      break
  else:
    raise ValueError(f"No text of {page.corpus.language.name} fits on {page.height}x{page.width} px at {page.min_px} px: give smaller letters.")
  ink = draw_ink(rng, paper.extremes)
  for block in blocks:
    own = draw_ink(rng, paper.extremes) if page.layout == "lines" and rng.random() < 0.6 or block.what == "heading" and rng.random() < 0.3 else ink
    block.colour, block.rgb = own[0], own[1]
    draw_on(paper.picture, block.setting, block.rgb)
  return np.asarray(paper.picture), truth_of(blocks, paper, page)


# ---- layouts ------------------------------------------------------------------------------------------


def _single(rng: np.random.Generator, page: Page) -> list[_Block] | None:
  what = "word" if rng.random() < 0.5 or page.num_characters < 12 else "heading"
  text = page.corpus.word(rng) if what == "word" else page.corpus.heading(rng)
  left, top, right, bottom = _margins(rng, page)
  style = _short(_style(rng, page, "middle", vertical=_is_vertical(rng, page)), "middle", text)
  share = rng.uniform(0.4, 1.0)
  setting = fit([text], style, (right - left) * share, (bottom - top) * share, (_least(page), 0.6 * min(page.height, page.width)))
  if setting is None:
    return None
  return [_Block([text], _put(setting, (left, top, right, bottom), *rng.uniform(0, 1, 2)), what)]


def _lines(rng: np.random.Generator, page: Page) -> list[_Block] | None:
  left, top, right, bottom = _margins(rng, page)
  most = int(min(4, (bottom - top) // (2.2 * _least(page))))
  if most < 2:
    return None
  ends = np.linspace(top, bottom, int(rng.integers(2, most + 1)) + 1)
  styles, blocks = [_style(rng, page, "middle") for _ in range(2)], []
  for above, below in zip(ends, ends[1:]):
    text, frame = _new(page.corpus.line, rng, [block.paragraphs[0] for block in blocks]), (left, above, right, below - 0.12 * (below - above))
    share = rng.uniform(0.5, 1.0)
    style = _short(styles[rng.integers(2)], "middle", text)
    setting = fit([text], style, (right - left) * share, frame[3] - frame[1], (_least(page), 0.25 * min(page.height, page.width)))
    if setting is None:
      return None
    blocks.append(_Block([text], _put(setting, frame, rng.choice((0.0, 0.5, 1.0)), 0.5), "line"))
  return blocks


def _paragraph(rng: np.random.Generator, page: Page, columns: int = 1) -> list[_Block] | None:
  left, top, right, bottom = _margins(rng, page)
  vertical = columns == 1 and _is_vertical(rng, page)
  style = _style(rng, page, _alignment(rng, page), columns=columns, vertical=vertical)
  blocks = []
  if rng.random() < 0.5 and not vertical:
    heading = page.corpus.heading(rng)
    most = min(0.16 * (bottom - top), 0.11 * page.width)
    found = fit([heading], _short(style, "middle" if style.align == "middle" else "start", heading), right - left, 0.28 * (bottom - top),
                (_least(page), max(_least(page), most)))
    if found is None:
      return None
    found = found.moved(left, top)
    blocks, top = [_Block([heading], found, "heading")], found.ink[3] + 0.6 * found.size
  paragraphs = _sentences(rng, page, (right - left) * (bottom - top), figures=not vertical)
  if style.align == "middle" or vertical:
    paragraphs = paragraphs[:1]
  elif len(paragraphs) > 1 or columns > 1:
    style = dataclasses.replace(style, indent=page.corpus.language.indent)
  sizes = (_least(page), max(_least(page), 0.12 * min(page.height, page.width)))
  if blocks:
    sizes = (sizes[0], max(sizes[0], min(sizes[1], 0.85 * blocks[0].setting.size)))
  setting = fit(paragraphs, style, right - left, bottom - top, sizes)
  if setting is not None and setting.is_torn:
    setting = fit(paragraphs, dataclasses.replace(style, align="start", breaks="anywhere"), right - left, bottom - top, sizes)
  if setting is None:
    return None
  return [*blocks, _Block(paragraphs, _put(setting, (left, top, right, bottom), None, 0.0 if blocks else rng.choice((0.0, 0.5))), "paragraph")]


def _columns(rng: np.random.Generator, page: Page) -> list[_Block] | None:
  return _paragraph(rng, page, 2 if page.width > _NARROW * page.height or page.width > 60 * page.min_px else 1)


def _list(rng: np.random.Generator, page: Page) -> list[_Block] | None:
  left, top, right, bottom = _margins(rng, page)
  num = int(rng.integers(3, 8))
  corpus, short = page.corpus, rng.random() < 0.5
  lines = []
  for _ in range(num):
    lines.append(_new(corpus.word if short else corpus.line, rng, lines))
  if sum(map(len, lines)) > max(page.num_characters, 24):
    return None
  lines = [f"{number}. {line}" for number, line in enumerate(lines, 1)]
  style = dataclasses.replace(_style(rng, page, "start"), breaks="never")
  setting = fit(lines, style, right - left, bottom - top, (_least(page), 0.12 * min(page.height, page.width)))
  return None if setting is None else [_Block(lines, _put(setting, (left, top, right, bottom), None, 0.5), "list")]


_SETTERS = {"single": _single, "lines": _lines, "paragraph": _paragraph, "columns": _columns, "list": _list}


# ---- what layouts share -------------------------------------------------------------------------------


def _new(draw: Callable[[np.random.Generator], str], rng: np.random.Generator, known: Sequence[str]) -> str:
  """A text that is not among the known ones, in capitals neither."""
  for _ in range(_TRIES):
    text = draw(rng)
    if text.lower() not in map(str.lower, known):
      break
  return text


def _margins(rng: np.random.Generator, page: Page) -> tuple[float, float, float, float]:
  """The frame inside the margins, (left, top, right, bottom) in px."""
  margin = rng.uniform(*_MARGINS) * min(page.height, page.width)
  return margin, margin, page.width - margin, page.height - margin


def _least(page: Page) -> float:
  """The least size of letters, in px."""
  return page.min_px * page.corpus.language.min_em


def _is_vertical(rng: np.random.Generator, page: Page) -> bool:
  return rng.random() * 10 < page.corpus.language.vertical


def _style(rng: np.random.Generator, page: Page, align: str, columns: int = 1, vertical: bool = False) -> Style:
  language = page.corpus.language
  breaks = "hyphenated" if align == "justified" and language.hyphenation else "anywhere"
  return Style(_typeface(rng, page), language, rng.uniform(*language.leading), align, columns, 0.0, breaks, vertical)


def _alignment(rng: np.random.Generator, page: Page) -> str:
  """How a paragraph is set. Lines of Chinese and Japanese are always full."""
  if page.corpus.language.breaking == "cjk":
    return "justified"
  return ("justified", "start", "middle")[rng.choice(3, p=(0.4, 0.45, 0.15))]


def _short(style: Style, align: str, text: str) -> Style:
  """The style of a heading or of another short text; words stay whole."""
  leading, is_word = _TIGHTER * style.language.leading[0], text.lower() in map(str.lower, style.language.words)
  return dataclasses.replace(style, align=align, leading=leading, columns=1, indent=0.0, breaks="never" if is_word else "phrases")


def _typeface(rng: np.random.Generator, page: Page) -> Typeface:
  """A family, all alike, then one of its faces."""
  families = sorted({one.main.family for one in page.typefaces})
  family = families[rng.integers(len(families))]
  some = [one for one in page.typefaces if one.main.family == family]
  return some[rng.integers(len(some))]


def _sentences(rng: np.random.Generator, page: Page, area: float, figures: bool) -> list[str]:
  """At most three paragraphs with about as many characters as the area holds at a size somewhat above the least."""
  size, wide = _least(page) * rng.uniform(1.05, 2.2), page.corpus.language.breaking == "cjk"
  room = int(min(page.num_characters, 0.8 * area / (size**2 * np.mean(page.corpus.language.leading) * (1.0 if wide else 0.52))))
  num = int(rng.integers(1, 4)) if room > (60 if wide else 160) else 1
  return page.corpus.paragraphs(rng, num, max(1, room // num), figures)


def _put(setting: Setting, frame: Sequence[float], across: float | None, down: float) -> Setting:
  """Moves a text into a frame (left, top, right, bottom) in px: `across` and `down` are the shares of what is left over that lie before its ink; None
  for `across` keeps where its lines begin."""
  left, top, right, bottom = setting.ink
  x = frame[0] if across is None else frame[0] - left + across * max(0.0, frame[2] - frame[0] - (right - left))
  return setting.moved(float(x), float(frame[1] - top + down * max(0.0, frame[3] - frame[1] - (bottom - top))))


# ---- truth --------------------------------------------------------------------------------------------


def truth_of(blocks: Sequence[_Block], paper: Paper, page: Page) -> dict[str, Any]:
  """Returns what a picture shows, plain JSON.

  kind "pure"; layout; language; texts: the strings in the order in which they are read; paper: colour, rgb, texture; blocks in the same order, each
  with text (its paragraphs, joined by a space), paragraphs, what, box, lines of text and box, place, font, size_px, colour, rgb, contrast, weight,
  slanted, letters, align, direction. Boxes are (left, top, right, bottom) of ink in px, rounded outwards, and lie in the picture.
  """
  language = page.corpus.language
  found = [_describe(block, paper, page) for block in blocks]
  return {"kind": "pure", "layout": page.layout, "language": language.code, "texts": [block["text"] for block in found],
          "paper": {"colour": paper.name, "rgb": list(paper.rgb), "texture": paper.texture}, "blocks": found}


def _describe(block: _Block, paper: Paper, page: Page) -> dict[str, Any]:
  setting, face, language = block.setting, block.setting.style.typeface.main, page.corpus.language
  whole = _outwards(setting.ink, page)
  return {"text": (" " if language.breaking != "cjk" or block.what == "list" else "").join(block.paragraphs), "paragraphs": block.paragraphs,
          "what": block.what, "box": whole,
          "lines": [{"text": one.line.text, "box": _outwards(setting.box(one), page)} for one in setting.placed],
          "place": said.place_of(whole, page.height, page.width), "font": face.name, "size_px": round(setting.size, 2), "colour": block.colour,
          "rgb": list(block.rgb), "contrast": round(worst_contrast(block.rgb, paper), 2), "weight": "bold" if face.is_bold else "regular",
          "slanted": face.is_italic, "letters": face.kind, "align": setting.style.align,
          "direction": "ttb" if setting.style.vertical else "rtl" if language.is_rtl else "ltr"}


def _outwards(box: Sequence[float], page: Page) -> list[int]:
  left, top, right, bottom = box
  return [int(np.floor(left)), int(np.floor(top)), int(np.ceil(right)), int(np.ceil(bottom))]
