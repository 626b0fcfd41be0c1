"""The pure kind: words, lines and paragraphs on paper.

Five layouts. *single*: a word or a heading, as large as it may be. *lines*: two to four short texts below each other, each with a place, and
in one of two typefaces. *paragraph*: sentences that fill the page, in half of the cases below a heading. *columns*: the same in two columns.
*list*: numbered lines. In Japanese and traditional Chinese some texts run from top to bottom.

Everything is drawn from the given generator. A text that does not fit is drawn anew, shorter each time.
"""

import dataclasses
from typing import Any

import numpy as np

from data_pipelines.text_rendering import captions as said
from data_pipelines.text_rendering.colours import draw_ink
from data_pipelines.text_rendering.drawing import make_paper
from data_pipelines.text_rendering.layout import fit
from data_pipelines.text_rendering.pages import TRIES, Block, Composition, Page, draw_new, draw_style, is_vertical, margins, put, short_style
from data_pipelines.text_rendering.settings import draw_key

captions = said.captions
_SHORTER = 0.7  # of the characters of the try before
_NARROW = 1.3  # a page needs to be so much wider than it is high for two columns


def render(rng: np.random.Generator, page: Page) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns (the picture H W 3 uint8, its truth), see `pages`.

  Raises:
    ValueError: nothing fits, however short.
  """
  found = compose(rng, page)
  return found.picture(found.blocks), found.truth("pure", found.blocks)


def compose(rng: np.random.Generator, page: Page) -> Composition:
  """Returns the texts in their places, not yet drawn; errors as `render`."""
  drawn = "single" if page.is_simple else draw_key(rng, page.settings.layouts)
  paper = make_paper(rng, page.height, page.width)
  for number in range(TRIES):
    layout = drawn if number < TRIES // 2 else "single"
    blocks = _SETTERS[layout](rng, dataclasses.replace(page, num_characters=max(1, int(page.num_characters * _SHORTER**number))))
    if blocks:
      break
  else:
    raise ValueError(f"No text of {page.corpus.language.name} fits on {page.height}x{page.width} px at {page.settings.min_px} px: give smaller "
                     "letters.")
  ink = draw_ink(rng, paper.extremes)
  for block in blocks:
    own = layout == "lines" and rng.random() < 0.6 or block.what == "heading" and rng.random() < 0.3
    block.ink = draw_ink(rng, paper.extremes) if own else ink
  return Composition(page, layout, paper, blocks)


# ---- layouts ------------------------------------------------------------------------------------------


def _single(rng: np.random.Generator, page: Page) -> list[Block] | None:
  what = "word" if rng.random() < 0.5 or page.num_characters < 12 else "heading"
  text = page.corpus.word(rng) if what == "word" else page.corpus.heading(rng)
  left, top, right, bottom = margins(rng, page)
  style = short_style(draw_style(rng, page, "middle", vertical=is_vertical(rng, page)), "middle", text)
  share = rng.uniform(0.4, 1.0)
  setting = fit([text], style, (right - left) * share, (bottom - top) * share, (page.least_px, 0.6 * min(page.height, page.width)))
  if setting is None:
    return None
  return [Block([text], put(setting, (left, top, right, bottom), *rng.uniform(0, 1, 2)), what)]


def _lines(rng: np.random.Generator, page: Page) -> list[Block] | None:
  left, top, right, bottom = margins(rng, page)
  most = int(min(4, (bottom - top) // (2.2 * page.least_px)))
  if most < 2:
    return None
  ends = np.linspace(top, bottom, int(rng.integers(2, most + 1)) + 1)
  styles, blocks = [draw_style(rng, page, "middle") for _ in range(2)], []
  for above, below in zip(ends, ends[1:]):
    text, frame = draw_new(page.corpus.line, rng, [block.paragraphs[0] for block in blocks]), (left, above, right, below - 0.12 * (below - above))
    share = rng.uniform(0.5, 1.0)
    style = short_style(styles[rng.integers(2)], "middle", text)
    setting = fit([text], style, (right - left) * share, frame[3] - frame[1], (page.least_px, 0.25 * min(page.height, page.width)))
    if setting is None:
      return None
    blocks.append(Block([text], put(setting, frame, rng.choice((0.0, 0.5, 1.0)), 0.5), "line"))
  return blocks


def _paragraph(rng: np.random.Generator, page: Page, columns: int = 1) -> list[Block] | None:
  left, top, right, bottom = margins(rng, page)
  vertical = columns == 1 and is_vertical(rng, page)
  style = draw_style(rng, page, _alignment(rng, page), columns=columns, vertical=vertical)
  blocks = []
  if rng.random() < 0.5 and not vertical:
    heading = page.corpus.heading(rng)
    most = min(0.16 * (bottom - top), 0.11 * page.width)
    found = fit([heading], short_style(style, "middle" if style.align == "middle" else "start", heading), right - left, 0.28 * (bottom - top),
                (page.least_px, max(page.least_px, most)))
    if found is None:
      return None
    found = found.moved(left, top)
    blocks, top = [Block([heading], found, "heading")], found.ink[3] + 0.6 * found.size
  paragraphs = _sentences(rng, page, (right - left) * (bottom - top), figures=not vertical)
  if style.align == "middle" or vertical:
    paragraphs = paragraphs[:1]
  elif len(paragraphs) > 1 or columns > 1:
    style = dataclasses.replace(style, indent=page.corpus.language.indent)
  sizes = (page.least_px, max(page.least_px, 0.12 * min(page.height, page.width)))
  if blocks:
    sizes = (sizes[0], max(sizes[0], min(sizes[1], 0.85 * blocks[0].setting.size)))
  setting = fit(paragraphs, style, right - left, bottom - top, sizes)
  if setting is not None and setting.is_torn:
    setting = fit(paragraphs, dataclasses.replace(style, align="start", breaks="anywhere"), right - left, bottom - top, sizes)
  if setting is None:
    return None
  return [*blocks, Block(paragraphs, put(setting, (left, top, right, bottom), None, 0.0 if blocks else rng.choice((0.0, 0.5))), "paragraph")]


def _columns(rng: np.random.Generator, page: Page) -> list[Block] | None:
  return _paragraph(rng, page, 2 if page.width > _NARROW * page.height or page.width > 60 * page.settings.min_px else 1)


def _list(rng: np.random.Generator, page: Page) -> list[Block] | None:
  left, top, right, bottom = margins(rng, page)
  num = int(rng.integers(3, 8))
  corpus, short = page.corpus, rng.random() < 0.5
  lines = []
  for _ in range(num):
    lines.append(draw_new(corpus.word if short else corpus.line, rng, lines))
  if sum(map(len, lines)) > max(page.num_characters, 24):
    return None
  lines = [f"{number}. {line}" for number, line in enumerate(lines, 1)]
  style = dataclasses.replace(draw_style(rng, page, "start"), breaks="never")
  setting = fit(lines, style, right - left, bottom - top, (page.least_px, 0.12 * min(page.height, page.width)))
  return None if setting is None else [Block(lines, put(setting, (left, top, right, bottom), None, 0.5), "list")]


_SETTERS = {"single": _single, "lines": _lines, "paragraph": _paragraph, "columns": _columns, "list": _list}


def _alignment(rng: np.random.Generator, page: Page) -> str:
  """How a paragraph is set. Lines of Chinese and Japanese are always full."""
  if page.corpus.language.breaking == "cjk":
    return "justified"
  return ("justified", "start", "middle")[rng.choice(3, p=(0.4, 0.45, 0.15))]


def _sentences(rng: np.random.Generator, page: Page, area: float, figures: bool) -> list[str]:
  """At most three paragraphs with about as many characters as the area holds at a size somewhat above the least."""
  size, wide = page.least_px * rng.uniform(1.05, 2.2), page.corpus.language.breaking == "cjk"
  room = int(min(page.num_characters, 0.8 * area / (size**2 * np.mean(page.corpus.language.leading) * (1.0 if wide else 0.52))))
  num = int(rng.integers(1, 4)) if room > (60 if wide else 160) else 1
  return page.corpus.paragraphs(rng, num, max(1, room // num), figures)
