"""The complex kind: slides, posters, tables, menus, comics and other pages, from templates that are filled by rule.

A template (see `templates`) is filled, measured, and set with letters as large as its page allows: one size of running text, to which all others are
in proportion. Where it does not fit, or holds more characters than captions may have, it is drawn anew with less in it; `redrawn` in the truth counts
how often. Where no template fits the page shows a title.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.text_rendering import page_captions, templates
from data_pipelines.text_rendering.building import Builder
from data_pipelines.text_rendering.colours import CONTRAST
from data_pipelines.text_rendering.drawing import Paper, draw_on, make_paper
from data_pipelines.text_rendering.fonts import Typeface
from data_pipelines.text_rendering.languages import Language
from data_pipelines.text_rendering.layout import Setting
from data_pipelines.text_rendering.pages import Block, Box, Composition, Page, joined, margins, outwards
from data_pipelines.text_rendering.regions import Frame, Misfit, Region, Sheet, Sizes
from data_pipelines.text_rendering.schemes import Scheme
from data_pipelines.text_rendering.settings import Settings, draw_key
from data_pipelines.text_rendering.templates import Template
from data_pipelines.text_rendering.words import Corpus

captions = page_captions.captions
_TRIES, _OF_ONE, _OF_LAST = 11, 4, 5  # of templates, of one before another is taken, and of a title
_POORER = 0.6  # richness, from one try to the next
_RICHNESS = (0.55, 1.0)
_STEPS = 5  # of the search for a size
_SMALLER, _SMALLER_TRIES = 0.96, 6  # by which letters are made smaller where lines are further apart than usual, and how often
_CLEARANCE = 0.5  # px between the ink of two texts, at least
_LAST = Template("title", "a title", {"text": "word", "role": "title", "align": "middle", "spread": "middle"}, largest=0.08)


def render(rng: np.random.Generator, page: Page) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns (the picture H W 3 uint8, its truth): that of `pages.truth_of`, whose layout is the template's name; `about`, what the page is;
  `structures`, its tables, charts, code and formulas with their values; `redrawn`.

  Raises:
    ValueError: nothing fits, not even a title.
  """
  found = compose(rng, page)
  return found.picture(found.blocks), found.truth("complex", found.blocks)


@dataclasses.dataclass(frozen=True)
class _Composition(Composition):
  """A page from a template; `redrawn` says how often it was too full."""
  template: Template
  sheet: Sheet
  redrawn: int

  def picture(self, blocks: Sequence[Block]) -> np.ndarray:
    picture = self.paper.picture.copy()
    draw(picture, self.sheet.shapes, blocks)
    return np.asarray(picture)

  def truth(self, kind: str, blocks: Sequence[Block]) -> dict[str, Any]:
    structures = [_with_texts(one, [joined(block) for block in blocks if block.structure == number]) | {"box": outwards(one["box"])}
                  for number, one in enumerate(self.sheet.structures)]
    return super().truth(kind, blocks) | {"about": self.template.about, "structures": structures, "redrawn": self.redrawn}

  def extremes(self, block: Block) -> Sequence[Sequence[float]]:
    return block.ground.extremes

  def reach(self, block: Block, box: Box | None = None) -> Box:
    ink = box or block.setting.ink
    return ink if block.leader is None else tuple(end(*some) for end, *some in zip((min, min, max, max), ink, block.leader.box(ink)))


def _with_texts(structure: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
  """A structure that has the texts of its blocks, which are in the order in which they are read."""
  if structure["type"] == "table":
    wide = len(structure["rows"][0])
    rows = [list(texts[begin:begin + wide]) for begin in range(0, len(texts), wide)]
    return structure | ({"head": rows[0], "rows": rows[1:]} if structure["head"] else {"rows": rows})
  if structure["type"] == "chart":
    return structure | {"labels": list(texts[::2]), "texts": list(texts[1::2])}
  return structure | ({"lines": texts[0].split("\n")} if structure["type"] == "code" else {})


def compose(rng: np.random.Generator, page: Page) -> Composition:
  """Returns everything in its place, not yet drawn; errors as `render`."""
  paper = make_paper(rng, page.height, page.width)
  known = _fit_for(page)
  template, richness = _LAST, 1.0
  for number in range(_TRIES + _OF_LAST):
    if page.is_simple or not known or number >= _TRIES:
      template = _LAST
    elif number % _OF_ONE == 0:
      template, richness = known[draw_key(rng, {name: page.settings.templates.get(name, 1.0) for name in known})], rng.uniform(*_RICHNESS)
    sheet = _place(rng, page, template, richness, paper)
    if sheet is not None:
      break
    richness = richness * _POORER if number % _OF_ONE < _OF_ONE - 2 else 0.0
  else:
    raise ValueError(f"No title of {page.corpus.language.name} fits on {page.height}x{page.width} px at {page.settings.min_px} px: give smaller "
                     "letters.")
  return _Composition(page, template.name, paper, sheet.blocks, template, sheet, number)


def _fit_for(page: Page) -> dict[str, Template]:
  """The templates for a page of this shape."""
  known = templates.load(page.settings.template_folders)
  some = {name: known[name] for name in page.settings.templates or known}
  return {name: one for name, one in some.items() if one.aspect[0] <= page.width / page.height <= one.aspect[1]
          and _least_characters(one, page.corpus.language, page.typefaces[0]) <= page.num_characters}


@functools.lru_cache(maxsize=1024)
def _least_characters(template: Template, language: Language, typeface: Typeface) -> int:
  """About how many characters a page has that holds as little of a template as it may; with whatever typeface."""
  page = Page(Corpus(language), (typeface,), 1, 1, Settings(), 1)
  return _num_characters(Builder(np.random.default_rng(0), page, 0.0).build(template.page))


def _num_characters(region: Region) -> int:
  return sum(len(one) for text in region.texts() for one in text.paragraphs)


def _place(rng: np.random.Generator, page: Page, template: Template, richness: float, paper: Paper) -> Sheet | None:
  """Returns everything in its place; None where that cannot be."""
  region = Builder(rng, page, richness).build(template.page)
  texts = region.texts()
  if _num_characters(region) > page.num_characters and template is not _LAST:
    return None
  if not all(text.style.typeface.covers(one) for text in texts for one in text.paragraphs):
    return None
  frame = margins(rng, page)
  if template.page.get("box", {}).get("fill"):  # which is the page
    frame = (0, 0, page.width, page.height)
  sizes = sizes_of(region, frame, page.least_px, max(page.least_px, template.largest * min(page.height, page.width)))
  if sizes is None:
    return None
  sheet = Sheet(Scheme(rng, paper), page.corpus.language.is_rtl)
  try:
    region.place(frame, sizes, sheet, sheet.scheme.paper)
  except Misfit:
    return None
  return sheet if _is_clean(sheet, page) else None


def sizes_of(region: Region, frame: Frame, least: float, largest: float) -> Sizes | None:
  """Returns the sizes of letters with which a region fills a frame; None where the least are too large."""
  left, top, right, bottom = frame
  low, high = least, largest
  if _tried(region, right - left, bottom - top, Sizes(low, least)) is None:
    return None
  for _ in range(_STEPS):
    em = (low * high) ** 0.5
    low, high = (em, high) if _tried(region, right - left, bottom - top, Sizes(em, least)) else (low, em)
  for number in range(_SMALLER_TRIES):
    found = _tried(region, right - left, bottom - top, Sizes(max(least, low * _SMALLER**number), least, exact=True))
    if found:
      return found
  return None


def _tried(region: Region, width: float, height: float, sizes: Sizes) -> Sizes | None:
  """The sizes, with the letters of some roles smaller where they must be; None where the region is too high."""
  while True:
    try:
      return sizes if region.height(width, sizes) <= height else None
    except Misfit as misfit:
      if not sizes.shrink(misfit.role, misfit.factor):
        return None


def _is_clean(sheet: Sheet, page: Page) -> bool:
  """Whether all texts lie in the page, apart from each other, and can be read."""
  inks = [block.setting.ink for block in sheet.blocks]
  if any(ink[0] < 1 or ink[1] < 1 or ink[2] > page.width - 1 or ink[3] > page.height - 1 for ink in inks):
    return False
  if any(min(a[2], b[2]) - max(a[0], b[0]) > -_CLEARANCE and min(a[3], b[3]) - max(a[1], b[1]) > -_CLEARANCE
         for a, b in itertools.combinations(inks, 2)):
    return False
  return all(block.ink[2] >= CONTRAST for block in sheet.blocks)


def draw(picture: Image.Image, shapes: Sequence[Callable[[Image.Image], None]], blocks: Sequence[Block]) -> None:
  """Draws shapes on a picture, and texts on them."""
  for shape in shapes:
    shape(picture)
  for block in blocks:
    if block.leader:
      block.leader.draw(picture, block.setting.ink)
    if isinstance(block.setting, Setting):
      draw_on(picture, block.setting, block.ink[1])
    else:
      block.setting.draw(picture, block.ink[1])
