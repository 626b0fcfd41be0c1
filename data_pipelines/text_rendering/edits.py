"""Edits of pages of the pure kind: a source picture, an instruction, and the picture after it.

Eight changes: another *word* or *number* in a line; another *colour* or *font* of a text; *move* it to a free place; *remove* it, or *add* it;
*translate* a name or a date, whose translations CLDR has. Whatever the instruction does not speak of keeps its place: a line whose word changes is
set anew at its size and none of the others is, and an edit for which there is no room is not made. So source and target are equal to the pixel
outside of the boxes that the truth names. An instruction quotes a text that stands once on the page.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.text_rendering import languages, pure
from data_pipelines.text_rendering.captions import PLACES, place_of
from data_pipelines.text_rendering.colours import draw_ink
from data_pipelines.text_rendering.drawing import Paper, draw_on
from data_pipelines.text_rendering.fonts import Typeface
from data_pipelines.text_rendering.languages import Language
from data_pipelines.text_rendering.layout import Style, fit, reset_line
from data_pipelines.text_rendering.pages import TRIES, Block, Page, joined, outwards, put, truth_of
from data_pipelines.text_rendering.settings import draw_key
from data_pipelines.text_rendering.words import lesser_number, like, names_of, number_tokens, translations, word_tokens

_MORE_TEXT = 4  # a page has at most so many times the characters that an instruction may quote
_MARGIN = 0.04  # of the shorter side
_CLEARANCE = 0.25  # between texts, as a share of the size of their letters
_MULTILINE_ROOM = 1.06  # width of the frame in which a text of several lines is set anew, as a multiple of its own
_QUOTED = ("old", "new", "text")
_NUM_ENGLISH = 2  # instructions in English, beside one in the language of the page
KINDS = (0,) * (_NUM_ENGLISH + 1)  # of the instructions, places in `records.KINDS`
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class _Edit:
  """The texts of a page before and after, the boxes in which these differ, and what the instruction speaks of, see `languages`."""
  source: list[Block]
  target: list[Block]
  boxes: tuple[list[Box], list[Box]]
  values: dict[str, Any]


def render(rng: np.random.Generator, page: Page) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
  """Returns (the picture after the edit H W 3 uint8, its truth, the picture before it H W 3 uint8).

  The truth is what `pages.truth_of` says of the picture after the edit, and beside it: change; values, what the instruction speaks of; source, the
  same truth of the picture before; boxes, of "source" and "target" those (left, top, right, bottom) in px outside of which both are equal.

  Raises:
    ValueError: no edit that is wanted can be made of such pages.
  """
  change, shares = draw_key(rng, page.settings.edits), page.settings.edits
  longer = dataclasses.replace(page, num_characters=int(page.num_characters * rng.integers(1, _MORE_TEXT + 1)), is_simple=False)
  for number in range(2 * TRIES):
    change = change if number < TRIES else draw_key(rng, shares)
    paper, layout, blocks = pure.compose(rng, longer)
    edit = _CHANGES[change](rng, page, paper, blocks)
    if edit:
      break
  else:
    raise ValueError(f"No edit ({', '.join(shares)}) can be made of pages of {page.corpus.language.name} of {page.height}x{page.width} px with the "
                     f"layouts {', '.join(page.settings.layouts)}: allow more of both.")
  sides = []
  for texts in (edit.source, edit.target):
    picture = paper.picture.copy()
    for block in texts:
      draw_on(picture, block.setting, block.ink[1])
    sides.append((np.asarray(picture), truth_of("edits", layout, texts, paper, page)))
  (before, source), (after, target) = sides
  boxes = {side: [outwards(box) for box in some] for side, some in zip(("source", "target"), edit.boxes)}
  return after, {**target, "change": change, "values": edit.values, "source": source, "boxes": boxes}, before


def captions(rng: np.random.Generator, truth: Mapping[str, Any], language: Language) -> dict[str, list[str]]:
  """Returns the instructions of an edit as columns of a record: captions, languages, kinds. Two in English and one in the language of the page."""
  english, change = languages.load("en"), truth["change"]
  of_english, own = english.edits[change], language.edits[change]
  *some, last = rng.permutation(len(of_english))[:len(KINDS)].tolist()
  said = [_fill(of_english[i], truth["values"], english) for i in some] + [_fill(own[last % len(own)], truth["values"], language)]
  return {"captions": said, "languages": ["en"] * _NUM_ENGLISH + [language.code], "kinds": ["general"] * len(KINDS)}


def _fill(template: str, values: Mapping[str, Any], language: Language) -> str:
  said = {"colour": language.colours.get, "place": language.places.get, "language": lambda code: names_of(language, code),
          "looks": lambda looks: ("、" if language.breaking == "cjk" else ", ").join(language.looks[one] for one in looks)}
  return template.format(**{key: value if key in _QUOTED else said[key](value) for key, value in values.items()})


# ---- changes of a line --------------------------------------------------------------------------------


def _word(rng: np.random.Generator, page: Page, paper: Paper, blocks: list[Block]) -> _Edit | None:
  known = page.corpus.language.words
  return _in_a_line(rng, page, blocks, lambda text: word_tokens(text, page.corpus.language), lambda old: like(known[rng.integers(len(known))], old))


def _number(rng: np.random.Generator, page: Page, paper: Paper, blocks: list[Block]) -> _Edit | None:
  return _in_a_line(rng, page, blocks, number_tokens, lambda old: lesser_number(rng, old))


def _in_a_line(rng: np.random.Generator, page: Page, blocks: list[Block], tokens: Callable[[str], list[tuple[int, int]]],
               draw: Callable[[str], str | None]) -> _Edit | None:
  """Puts what `draw` returns in the place of one of the `tokens` (begin, end) of a line."""
  places = [(number, row, *token) for number, block in enumerate(blocks) for row, one in enumerate(block.setting.placed)
            for token in tokens(one.line.text)]
  for choice in rng.permutation(len(places))[:TRIES].tolist():
    number, row, begin, end = places[choice]
    block, one = blocks[number], blocks[number].setting.placed[row]
    old = one.line.text[begin:end]
    new, texts = draw(old), "\n".join(map(joined, blocks)).lower()
    if len(old) > page.num_characters or new is None or new.lower() in texts or texts.count(old.lower()) != 1:
      continue
    whole = block.paragraphs[one.paragraph]
    if old not in [whole[first:last] for first, last in tokens(whole)]:  # a line was broken inside the word
      continue
    paragraphs = [text.replace(old, new) if i == one.paragraph else text for i, text in enumerate(block.paragraphs)]
    setting = reset_line(block.setting, row, one.line.text[:begin] + new + one.line.text[end:])
    if setting is None:
      continue
    target = [*blocks[:number], dataclasses.replace(block, paragraphs=paragraphs, setting=setting), *blocks[number + 1:]]
    boxes = block.setting.box(one), setting.box(setting.placed[row])
    others = [box for i, box in enumerate(_line_boxes(blocks)) if i != sum(len(some.setting.placed) for some in blocks[:number]) + row]
    if _is_free(boxes[1], others, page, 0.0):
      return _Edit(blocks, target, tuple([box] for box in boxes), {"old": old, "new": new})
  return None


# ---- changes of a text --------------------------------------------------------------------------------


def _colour(rng: np.random.Generator, page: Page, paper: Paper, blocks: list[Block]) -> _Edit | None:
  number = _pick(rng, page, blocks)
  ink = next((ink for ink in (draw_ink(rng, paper.extremes) for _ in range(TRIES)) if number is not None and ink[0] != blocks[number].ink[0]), None)
  if ink is None:
    return None
  return _replaced(page, blocks, number, dataclasses.replace(blocks[number], ink=ink), {"text": joined(blocks[number]), "colour": ink[0]})


def _font(rng: np.random.Generator, page: Page, paper: Paper, blocks: list[Block]) -> _Edit | None:
  number = _pick(rng, page, blocks)
  if number is None:
    return None
  block, style = blocks[number], blocks[number].setting.style
  others = [one for one in page.typefaces if _looks(style.typeface, one)]
  if not others:
    return None
  typeface = others[rng.integers(len(others))]
  changed = _set_anew(page, blocks, number, block.paragraphs, dataclasses.replace(style, typeface=typeface))
  return changed and _replaced(page, blocks, number, changed, {"text": joined(block), "looks": _looks(style.typeface, typeface)})


def _looks(before: Typeface, after: Typeface) -> list[str]:
  """In which words a typeface differs from another."""
  face, known = after.main, before.main
  found = [(face.is_bold, known.is_bold, "bold" if face.is_bold else "regular"),
           (face.is_italic, known.is_italic, "slanted" if face.is_italic else "upright"), (face.kind, known.kind, face.kind)]
  return [word for new, old, word in found if new != old]


def _move(rng: np.random.Generator, page: Page, paper: Paper, blocks: list[Block]) -> _Edit | None:
  number = _pick(rng, page, blocks)
  if number is None:
    return None
  block, frame = blocks[number], _frame(page)
  places = [(place, column / 2, row / 2) for row, some in enumerate(PLACES) for column, place in enumerate(some)
            if place != place_of(outwards(block.setting.ink), page.height, page.width)]
  for choice in rng.permutation(len(places)).tolist():
    place, across, down = places[choice]
    changed = dataclasses.replace(block, setting=put(block.setting, frame, across, down))
    if place_of(outwards(changed.setting.ink), page.height, page.width) == place:
      found = _replaced(page, blocks, number, changed, {"text": joined(block), "place": place})
      if found:
        return found
  return None


def _remove(rng: np.random.Generator, page: Page, paper: Paper, blocks: list[Block]) -> _Edit | None:
  number = _pick(rng, page, blocks) if len(blocks) > 1 else None
  if number is None:
    return None
  return _Edit(blocks, blocks[:number] + blocks[number + 1:], ([blocks[number].setting.ink], []), {"text": joined(blocks[number])})


def _add(rng: np.random.Generator, page: Page, paper: Paper, blocks: list[Block]) -> _Edit | None:
  number = _pick(rng, page, blocks)
  if number is None:
    return None
  block = blocks[number]
  values = {"text": joined(block), "colour": block.ink[0], "place": place_of(outwards(block.setting.ink), page.height, page.width)}
  return _Edit(blocks[:number] + blocks[number + 1:], blocks, ([], [block.setting.ink]), values)


def _translate(rng: np.random.Generator, page: Page, paper: Paper, blocks: list[Block]) -> _Edit | None:
  number, own = _pick(rng, page, blocks), page.corpus.language
  others = [code for code in page.others if code != own.code]
  if number is None or not others or blocks[number].setting.style.vertical:
    return None
  code = others[rng.integers(len(others))]
  other, style = languages.load(code), blocks[number].setting.style
  before, after = translations(rng, own, other)
  texts = [joined(block).lower() for i, block in enumerate(blocks) if i != number]
  if before.lower() == after.lower() or any(text.lower() in known for text in (before, after) for known in texts):
    return None
  alike = [one for one in page.others[code] if not _looks(style.typeface, one)] or page.others[code]
  source = _set_anew(page, blocks, number, [before], dataclasses.replace(style, breaks="phrases"))
  if source is None or not style.typeface.covers(before):
    return None
  texts = [*blocks[:number], source, *blocks[number + 1:]]
  target = _set_anew(page, texts, number, [after], Style(alike[rng.integers(len(alike))], other, style.leading, style.align, breaks="phrases"))
  return target and _replaced(page, texts, number, target, {"text": before, "language": code}, with_source=True)


_CHANGES: dict[str, Callable[..., _Edit | None]] = {"word": _word, "number": _number, "colour": _colour, "font": _font, "move": _move,
                                                    "remove": _remove, "add": _add, "translate": _translate}


# ---- what changes share -------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, page: Page, blocks: Sequence[Block]) -> int | None:
  """The number of a text that can be quoted: short enough, no list, and nowhere else on the page."""
  texts = [joined(block).lower() for block in blocks]
  fit = [i for i, block in enumerate(blocks) if block.what != "list" and len(texts[i]) <= page.num_characters
         and not any(texts[i] in text for j, text in enumerate(texts) if j != i)]
  return fit[rng.integers(len(fit))] if fit else None


def _replaced(page: Page, blocks: list[Block], number: int, changed: Block, values: dict[str, Any], with_source: bool = False) -> _Edit | None:
  """The edit by which a text becomes another one; None where that would come near other texts or an edge, or, `with_source`, the text itself."""
  before, after = blocks[number].setting.ink, changed.setting.ink
  others = [block.setting.ink for i, block in enumerate(blocks) if i != number]
  near = _CLEARANCE * changed.setting.size if before != after else 0.0
  if not _is_free(after, others, page, near) or with_source and not _is_free(before, others, page, near):
    return None
  return _Edit(blocks, [*blocks[:number], changed, *blocks[number + 1:]], ([before], [after]), values)


def _set_anew(page: Page, blocks: Sequence[Block], number: int, paragraphs: list[str], style: Style) -> Block | None:
  """A text with other words or in another style where it stands: as large as it was, or smaller where there is no room for that."""
  setting = blocks[number].setting
  room, least = _room(page, blocks, number), page.settings.min_px * style.language.min_em
  if setting.size < least or not all(map(style.typeface.covers, paragraphs)):
    return None
  width, height = room[2] - room[0], room[3] - room[1]
  found = fit(paragraphs, style, width, height, (setting.size,) * 2) or fit(paragraphs, style, width, height, (least, setting.size))
  if found is None:
    return None
  left, top, right, bottom = setting.ink
  across, down = ((a - low) / max(1e-6, a - low + high - b) for a, b, low, high in ((left, right, room[0], room[2]), (top, bottom, room[1], room[3])))
  return dataclasses.replace(blocks[number], paragraphs=list(paragraphs), setting=put(found, room, across, down))


def _room(page: Page, blocks: Sequence[Block], number: int) -> Box:
  """The frame in which a text may be set anew: as high as there is nothing else above and below it, and as wide as the page; where it has several
  lines about as wide as it is, so that they are broken alike."""
  setting = blocks[number].setting
  left, top, right, bottom = setting.ink
  low, high = _frame(page)[1], _frame(page)[3]
  near = _CLEARANCE * setting.size
  for i, block in enumerate(blocks):
    if i != number:
      low = max(low, block.setting.ink[3] + near) if block.setting.ink[3] <= top else low
      high = min(high, block.setting.ink[1] - near) if block.setting.ink[1] >= bottom else high
  first, last = _frame(page)[::2]
  if len(setting.placed) > 1:
    more = (right - left) * (_MULTILINE_ROOM - 1) / 2
    first, last = max(first, left - more), min(last, right + more)
  return min(first, left), min(low, top), max(last, right), max(high, bottom)


def _frame(page: Page) -> Box:
  margin = _MARGIN * min(page.height, page.width)
  return margin, margin, page.width - margin, page.height - margin


def _is_free(box: Box, others: Sequence[Box], page: Page, near: float) -> bool:
  """Whether a box lies in the picture and comes not nearer than `near` px to others."""
  left, top, right, bottom = box
  inside = left >= 0 and top >= 0 and right <= page.width and bottom <= page.height
  return inside and not any(left - near < b and a < right + near and top - near < d and c < bottom + near for a, c, b, d in others)


def _line_boxes(blocks: Sequence[Block]) -> list[Box]:
  return [block.setting.box(one) for block in blocks for one in block.setting.placed]
