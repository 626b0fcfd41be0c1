"""Edits: a source picture, an instruction, and the picture after it, of pages of the pure and the complex kind and of signs.

Eight changes: another *word* or *number* in a line; another *colour* or *font* of a text; *move* it to a free place; *remove* it, or *add* it;
*translate* a name or a date, whose translations CLDR has. `settings.EDITED` says which of them a kind has. Whatever the instruction does not speak of
keeps its place: a line whose word changes is set anew at its size and none of the others is, and an edit for which there is no room is not made. So
source and target are equal to the pixel outside of the boxes that the truth names. An instruction quotes a text that stands once on the page.

A kind gives a `pages.Composition`, which draws the same page with other texts. Where something is drawn around a text, such as a table, a balloon or
a sign, the text has a frame (`Block.frame`): what is set anew stays in it, as large as it was, in no more lines and on the same base line. What a bar
or a sector shows keeps its number.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.text_rendering import languages
from data_pipelines.text_rendering.captions import PLACES, place_of
from data_pipelines.text_rendering.colours import draw_ink
from data_pipelines.text_rendering.fonts import Typeface
from data_pipelines.text_rendering.languages import Language
from data_pipelines.text_rendering.layout import OVERHANG, Setting, Style, fit, lay, reset_line
from data_pipelines.text_rendering.pages import TRIES, Block, Box, Composition, Page, joined, outwards, put
from data_pipelines.text_rendering.settings import EDITED, draw_key
from data_pipelines.text_rendering.words import lesser_number, like, names_of, number_tokens, translations, word_tokens

_MORE_TEXT = 4  # a page has at most so many times the characters that an instruction may quote
_MORE_OF = {"complex": 4}  # and so many times as many, of a kind
_MARGIN = 0.04  # of the shorter side
_CLEARANCE = 0.25  # between texts, as a share of the size of their letters
_MULTILINE_ROOM = 1.06  # width of the frame in which a text of several lines is set anew, as a multiple of its own
_QUOTED = ("old", "new", "text")
_NUM_ENGLISH = 2  # instructions in English, beside one in the language of the page
KINDS = (0,) * (_NUM_ENGLISH + 1)  # of the instructions, places in `records.KINDS`


@dataclasses.dataclass(frozen=True)
class _Edit:
  """The texts of a page before and after, the boxes in which these differ, and what the instruction speaks of, see `languages`."""
  source: list[Block]
  target: list[Block]
  boxes: tuple[list[Box], list[Box]]
  values: dict[str, Any]


def render(rng: np.random.Generator, page: Page) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
  """Returns (the picture after the edit H W 3 uint8, its truth, the picture before it H W 3 uint8).

  The truth is what the kind says of the picture after the edit, and beside it: page, the kind; change; values, what the instruction speaks of;
  source, the same truth of the picture before; boxes, of "source" and "target" those (left, top, right, bottom) in px outside of which both are
  equal.

  Raises:
    ValueError: no edit that is wanted can be made of such pages.
  """
  change, shares = draw_key(rng, page.settings.edits), page.settings.edits
  more = int(rng.integers(1, _MORE_TEXT + 1))
  for number in range(2 * TRIES):
    change = change if number < TRIES else draw_key(rng, shares)
    kinds = {kind: share for kind, share in page.settings.edit_shares.items() if change in EDITED[kind]}
    if not kinds:
      change = draw_key(rng, shares)
      continue
    kind = draw_key(rng, kinds) if len(kinds) > 1 else next(iter(kinds))
    longer = dataclasses.replace(page, num_characters=page.num_characters * more * _MORE_OF.get(kind, 1), is_simple=False)
    composed = importlib.import_module(f"{__package__}.{kind}").compose(rng, longer)
    edit = _CHANGES[change](rng, page, composed)
    found = edit and _drawn(composed, edit)
    if found:
      break
  else:
    raise ValueError(f"No edit ({', '.join(shares)}) can be made of pages of {page.corpus.language.name} of {page.height}x{page.width} px of the "
                     f"kinds {', '.join(page.settings.edit_shares)}: allow more edits, kinds, layouts or templates, or larger pages.")
  before, after, boxes = found
  source, target = (composed.truth("edits", texts) for texts in (edit.source, edit.target))
  return after, {**target, "page": kind, "change": change, "values": edit.values, "source": source, "boxes": boxes}, before


def _drawn(composed: Composition, edit: _Edit) -> tuple[np.ndarray, np.ndarray, dict[str, list[list[int]]]] | None:
  """Returns the pictures before and after an edit, and the boxes in which they differ; None where a text cannot be read on what is behind it, or
  where they differ elsewhere too, as those of signs may whose texts overlap when they are turned."""
  before, after = composed.picture(edit.source), composed.picture(edit.target)
  if before is None or after is None:
    return None
  height, width = before.shape[:2]
  boxes = {side: [_inside(box, height, width) for box in some] for side, some in zip(("source", "target"), edit.boxes)}
  differ = (before != after).any(2)
  if not differ.any():
    return None
  for left, top, right, bottom in (box for some in boxes.values() for box in some):
    differ[top:bottom, left:right] = False
  return None if differ.any() else (before, after, boxes)


def _inside(box: Box, height: int, width: int) -> list[int]:
  left, top, right, bottom = outwards(box)
  return [max(0, left), max(0, top), min(width, right), min(height, bottom)]


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


def _word(rng: np.random.Generator, page: Page, composed: Composition) -> _Edit | None:
  language = page.corpus.language
  return _in_a_line(rng, page, composed, lambda block, text: word_tokens(text, language) if block.what != "code" else [],
                    lambda old: like(language.words[rng.integers(len(language.words))], old))


def _number(rng: np.random.Generator, page: Page, composed: Composition) -> _Edit | None:
  return _in_a_line(rng, page, composed, lambda _, text: number_tokens(text), lambda old: lesser_number(rng, old))


def _in_a_line(rng: np.random.Generator, page: Page, composed: Composition, tokens: Callable[[Block, str], list[tuple[int, int]]],
               draw: Callable[[str], str | None]) -> _Edit | None:
  """Puts what `draw` returns in the place of one of the `tokens` (begin, end) of a line."""
  blocks = composed.blocks
  places = [(number, row, *token) for number, block in enumerate(blocks) if block.what != "formula" and not block.is_fixed
            for row, one in enumerate(block.setting.placed) for token in tokens(block, one.line.text)]
  for choice in rng.permutation(len(places))[:TRIES].tolist():
    number, row, begin, end = places[choice]
    block, one = blocks[number], blocks[number].setting.placed[row]
    old = one.line.text[begin:end]
    new, texts = draw(old), "\n".join(map(joined, blocks)).lower()
    if len(old) > page.num_characters or new is None or new.lower() in texts or texts.count(old.lower()) != 1:
      continue
    whole = block.paragraphs[one.paragraph]
    if old not in [whole[first:last] for first, last in tokens(block, whole)]:  # a line was broken inside the word
      continue
    paragraphs = [text.replace(old, new) if i == one.paragraph else text for i, text in enumerate(block.paragraphs)]
    setting = reset_line(block.setting, row, one.line.text[:begin] + new + one.line.text[end:])
    if setting is None:
      continue
    changed = dataclasses.replace(block, paragraphs=paragraphs, setting=setting)
    boxes = block.setting.box(one), setting.box(setting.placed[row])
    others = [other.setting.box(line) for i, other in enumerate(blocks) if other.part == block.part
              for j, line in enumerate(other.setting.placed) if (i, j) != (number, row)]
    if _is_free(boxes[1], others, changed, page, 0.0):
      reaches = tuple([composed.reach(side, box)] for side, box in zip((block, changed), boxes))
      return _Edit(blocks, [*blocks[:number], changed, *blocks[number + 1:]], reaches, {"old": old, "new": new})
  return None


# ---- changes of a text --------------------------------------------------------------------------------


def _colour(rng: np.random.Generator, page: Page, composed: Composition) -> _Edit | None:
  number = _pick(rng, page, composed.blocks)
  if number is None:
    return None
  block, behind = composed.blocks[number], composed.extremes(composed.blocks[number])
  ink = next((ink for ink in (draw_ink(rng, behind) for _ in range(TRIES)) if ink[0] != block.ink[0]), None)
  if ink is None:
    return None
  return _replaced(page, composed, composed.blocks, number, dataclasses.replace(block, ink=ink), {"text": joined(block), "colour": ink[0]})


def _font(rng: np.random.Generator, page: Page, composed: Composition) -> _Edit | None:
  number = _pick(rng, page, composed.blocks, lambda block: not block.is_fixed and block.what != "code" and any(map(str.isalpha, joined(block))))
  if number is None:
    return None
  block, style = composed.blocks[number], composed.blocks[number].setting.style
  others = [one for one in composed.page.typefaces if _looks(style.typeface, one)]
  if not others:
    return None
  typeface = others[rng.integers(len(others))]
  changed = _set_anew(composed, composed.blocks, number, block.paragraphs, dataclasses.replace(style, typeface=typeface))
  said = {"text": joined(block), "looks": _looks(style.typeface, typeface)}
  return changed and _replaced(page, composed, composed.blocks, number, changed, said)


def _looks(before: Typeface, after: Typeface) -> list[str]:
  """In which words a typeface differs from another."""
  face, known = after.main, before.main
  found = [(face.is_bold, known.is_bold, "bold" if face.is_bold else "regular"),
           (face.is_italic, known.is_italic, "slanted" if face.is_italic else "upright"), (face.kind, known.kind, face.kind)]
  return [word for new, old, word in found if new != old]


def _move(rng: np.random.Generator, page: Page, composed: Composition) -> _Edit | None:
  number = _pick(rng, page, composed.blocks)
  if number is None:
    return None
  block, frame = composed.blocks[number], _frame(page)
  places = [(place, column / 2, row / 2) for row, some in enumerate(PLACES) for column, place in enumerate(some)
            if place != place_of(outwards(block.setting.ink), page.height, page.width)]
  for choice in rng.permutation(len(places)).tolist():
    place, across, down = places[choice]
    changed = dataclasses.replace(block, setting=put(block.setting, frame, across, down))
    if place_of(outwards(changed.setting.ink), page.height, page.width) == place:
      found = _replaced(page, composed, composed.blocks, number, changed, {"text": joined(block), "place": place})
      if found:
        return found
  return None


def _remove(rng: np.random.Generator, page: Page, composed: Composition) -> _Edit | None:
  number = _pick_free(rng, page, composed) if len(composed.blocks) > 1 or composed.paper is None else None
  if number is None:
    return None
  blocks = composed.blocks
  return _Edit(blocks, blocks[:number] + blocks[number + 1:], ([composed.reach(blocks[number])], []), {"text": joined(blocks[number])})


def _add(rng: np.random.Generator, page: Page, composed: Composition) -> _Edit | None:
  number = _pick_free(rng, page, composed)
  if number is None:
    return None
  blocks, reach = composed.blocks, composed.reach(composed.blocks[number])
  values = {"text": joined(blocks[number]), "colour": blocks[number].ink[0], "place": place_of(outwards(reach), page.height, page.width)}
  return _Edit(blocks[:number] + blocks[number + 1:], blocks, ([], [reach]), values)


def _pick_free(rng: np.random.Generator, page: Page, composed: Composition) -> int | None:
  """The number of a text that can come and go: of no table, chart or code."""
  return _pick(rng, page, composed.blocks, lambda block: block.structure is None)


def _translate(rng: np.random.Generator, page: Page, composed: Composition) -> _Edit | None:
  number = _pick(rng, page, composed.blocks, _could_be_a_name)
  others = [code for code in page.others if code != page.corpus.language.code]
  if number is None or not others or composed.blocks[number].setting.style.vertical:
    return None
  tries = 1 if composed.blocks[number].frame is None else TRIES  # on paper there is room for most names
  return next(filter(None, (_translated(rng, page, composed, number, others) for _ in range(tries))), None)


def _translated(rng: np.random.Generator, page: Page, composed: Composition, number: int, others: Sequence[str]) -> _Edit | None:
  """The edit by which a name in the place of a text becomes that of one of other languages; None where one of them does not fit."""
  blocks, own, code = composed.blocks, page.corpus.language, others[rng.integers(len(others))]
  other, style = languages.load(code), blocks[number].setting.style
  before, after = translations(rng, own, other)
  texts = [joined(block).lower() for i, block in enumerate(blocks) if i != number]
  if before.lower() == after.lower() or any(text.lower() in known for text in (before, after) for known in texts):
    return None
  alike = [one for one in page.others[code] if not _looks(style.typeface, one)] or page.others[code]
  source = _set_anew(composed, blocks, number, [before], dataclasses.replace(style, breaks="phrases"))
  if source is None or not style.typeface.covers(before):
    return None
  texts = [*blocks[:number], source, *blocks[number + 1:]]
  of_other = Style(alike[rng.integers(len(alike))], other, style.leading, style.align, breaks="phrases")
  target = _set_anew(composed, texts, number, [after], of_other)
  return target and _replaced(page, composed, texts, number, target, {"text": before, "language": code}, with_source=True)


def _could_be_a_name(block: Block) -> bool:
  """Whether a name or a date may stand where a text does: anywhere on paper; else where there is one line of letters, no number or piece of code."""
  if block.frame is None:
    return True
  is_line = len(block.setting.placed) == 1 and not any(map(str.isdigit, joined(block)))
  return is_line and not block.is_fixed and block.what not in ("code", "big", "button", "body", "balloon", "quote")


_CHANGES: dict[str, Callable[..., _Edit | None]] = {"word": _word, "number": _number, "colour": _colour, "font": _font, "move": _move,
                                                    "remove": _remove, "add": _add, "translate": _translate}


# ---- what changes share -------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, page: Page, blocks: Sequence[Block], suits: Callable[[Block], bool] = lambda block: True) -> int | None:
  """The number of a text that can be quoted: short enough, no list or formula, and nowhere else on the page; of those that suit."""
  texts = [joined(block).lower() for block in blocks]
  fit = [i for i, block in enumerate(blocks) if block.what not in ("list", "formula") and suits(block) and len(texts[i]) <= page.num_characters
         and not any(texts[i] in text for j, text in enumerate(texts) if j != i)]
  return fit[rng.integers(len(fit))] if fit else None


def _replaced(page: Page, composed: Composition, blocks: list[Block], number: int, changed: Block, values: dict[str, Any],
              with_source: bool = False) -> _Edit | None:
  """The edit by which a text becomes another one; None where that would come near other texts or an edge, or, `with_source`, the text itself."""
  before, after = blocks[number].setting.ink, changed.setting.ink
  others = [block.setting.ink for i, block in enumerate(blocks) if i != number and block.part == changed.part]
  near = _CLEARANCE * changed.setting.size if before != after else 0.0
  if not _is_free(after, others, changed, page, near) or with_source and not _is_free(before, others, blocks[number], page, near):
    return None
  reaches = tuple([composed.reach(block)] for block in (blocks[number], changed))
  return _Edit(blocks, [*blocks[:number], changed, *blocks[number + 1:]], reaches, values)


def _set_anew(composed: Composition, blocks: Sequence[Block], number: int, paragraphs: list[str], style: Style) -> Block | None:
  """A text with other words or in another style where it stands: as large as it was, or, on paper, smaller where there is no room for that."""
  block, setting = blocks[number], blocks[number].setting
  least = composed.page.settings.min_px * style.language.min_em / composed.scale(block)
  if setting.size < least or not all(map(style.typeface.covers, paragraphs)):
    return None
  found = _in_room(composed.page, blocks, number, paragraphs, style, least) if block.frame is None else _in_frame(block, paragraphs, style)
  return found and dataclasses.replace(block, paragraphs=list(paragraphs), setting=found)


def _in_frame(block: Block, paragraphs: list[str], style: Style) -> Setting | None:
  """A text set anew in its frame, on the same base line and in no more lines."""
  (left, _, right, _), setting = block.frame, block.setting
  found = None if style.vertical else lay(paragraphs, style, right - left, setting.size)
  if found is None or found.is_torn or len(found.placed) > len(setting.placed):
    return None
  return found.moved(left, setting.placed[0].y - found.placed[0].y)


def _in_room(page: Page, blocks: Sequence[Block], number: int, paragraphs: list[str], style: Style, least: float) -> Setting | None:
  """A text set anew where there is room on paper, with as much of what is left over on each side as before."""
  setting, room = blocks[number].setting, _room(page, blocks, number)
  width, height = room[2] - room[0], room[3] - room[1]
  found = fit(paragraphs, style, width, height, (setting.size,) * 2) or fit(paragraphs, style, width, height, (least, setting.size))
  if found is None:
    return None
  left, top, right, bottom = setting.ink
  across, down = ((a - low) / max(1e-6, a - low + high - b) for a, b, low, high in ((left, right, room[0], room[2]), (top, bottom, room[1], room[3])))
  return put(found, room, across, down)


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


def _is_free(box: Box, others: Sequence[Box], block: Block, page: Page, near: float) -> bool:
  """Whether the ink of a text lies in its frame, or in the picture, and comes not nearer than `near` to others."""
  left, top, right, bottom = box
  slack = OVERHANG * block.setting.size if block.frame else 0.0
  first, low, last, high = block.frame or (0, 0, page.width, page.height)
  inside = left >= first - slack and top >= low - slack and right <= last + slack and bottom <= high + slack
  return inside and not any(left - near < b and a < right + near and top - near < d and c < bottom + near for a, c, b, d in others)
