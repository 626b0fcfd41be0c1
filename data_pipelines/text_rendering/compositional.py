"""The compositional kind: signs, boards, paper, screens and labels with texts, on a user's pictures or in scenes that are drawn here.

A picture has one object or two, or letters that stand on the picture itself. An object is a plane that is turned in space (`warping`), so what is
straight on it stays straight in the picture, but for paper and cans, which are bent. Texts are set flat on it and seen with it; their size is such
that letters have at least the least size where the object is furthest away. How they get there is said in `inking`. A user's picture without an even
part that is large enough is passed over and counted, as one is that is broken.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from data_pipelines.text_rendering import objects_said, surfaces, walls
from data_pipelines.text_rendering.captions import place_of
from data_pipelines.text_rendering.inking import Part, add_grain, draw_grain, extremes, paint, paint_object, paint_text
from data_pipelines.text_rendering.layout import fit
from data_pipelines.text_rendering.pages import TRIES, Block, Box, Composition, Page, describe, draw_new, draw_style, outwards, put, short_style
from data_pipelines.text_rendering.pictures import Pictures, find_regions
from data_pipelines.text_rendering.settings import draw_key
from data_pipelines.text_rendering.surfaces import SURFACES, Surface
from data_pipelines.text_rendering.warping import place
from data_pipelines.text_rendering.words import shortened

captions = objects_said.captions
DIRECT = Surface((0.4, 6.0), (), "", 0.0, 0.0, (9, 5, 4), 0.0, "stands")  # letters without an object
_DIRECT_SHARE = 0.3
_CAPTION = 160  # characters that a user's caption has at most where the whole one is too long
_UNBROKEN = 5  # characters of a text that stays in one line
LEAST_EMS = (7.0, 3.0)  # width and height of what has room for an object, in letters of the least size
_TEXTS = {"single": 0.5, "stack": 0.3, "paragraph": 0.2}


@dataclasses.dataclass(frozen=True)
class Ground:
  """What there is before objects come in: pixels, what it is called in English, the user's captions by language, frames with room, the noise of its
  pixels in levels, where it is from, and how many pictures were passed over."""
  pixels: np.ndarray
  name: str
  captions: dict[str, str]
  frames: Sequence[tuple[float, float, float, float]]
  noise: float
  source: str
  skipped: int


def render(rng: np.random.Generator, page: Page) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns (the picture H W 3 uint8, its truth).

  The truth is that of `pages.truth_of` but for `paper`, and has `ground` (what is behind, the file of a user's picture, how many of these had no room
  or were broken before it was found, and their captions). Blocks have `object`, its `object_colour`, `object_quad`, the `angle` in degrees by which
  the text is turned clockwise, and `quad`, also of each line: the corners of its ink in px, from the top left of the text on clockwise. `box` is the
  upright one around it, `size_px` the least size of its letters in the picture.

  Raises:
    ValueError: nothing fits, or no picture of the user has room.
  """
  found = compose(rng, page)
  return found.pixels, found.truth("compositional", found.blocks)


@dataclasses.dataclass(frozen=True)
class _Composition(Composition):
  """Texts on objects, the noise of the picture, and the picture with all of them."""
  ground: Ground
  parts: Sequence[Part]
  grain: np.ndarray | None
  pixels: np.ndarray

  def picture(self, blocks: Sequence[Block]) -> np.ndarray | None:
    picture = self.ground.pixels.copy()
    for number, part in enumerate(self.parts):
      paint_object(picture, part)
      if not all(paint_text(picture, part, block) for block in blocks if block.part == number):
        return None
    _add_grain(picture, self.ground, self.parts, self.grain)
    return picture

  def truth(self, kind: str, blocks: Sequence[Block]) -> dict[str, Any]:
    described = [_describe(self.page, self.parts[block.part], block) for block in blocks]
    return {"kind": kind, "layout": self.layout, "language": self.page.corpus.language.code,
            "texts": [block["text"] for block in described], "blocks": described,
            "ground": {"name": self.ground.name, "file": self.ground.source, "skipped": self.ground.skipped, "captions": self.ground.captions}}

  def extremes(self, block: Block) -> Sequence[Sequence[float]]:
    left, top, right, bottom = self.reach(block)
    behind = self.picture([one for one in self.blocks if one is not block])[top:bottom, left:right]
    return extremes(behind, np.ones(behind.shape[:2], bool))

  def reach(self, block: Block, box: Box | None = None) -> Box:
    return self.parts[block.part].reach(box or block.setting.ink, self.pixels)

  def scale(self, block: Block) -> float:
    return self.parts[block.part].warp.scale(block.setting.ink)


def compose(rng: np.random.Generator, page: Page) -> Composition:
  """Returns texts in their places on objects, with the picture; errors as `render`."""
  pictures = Pictures.open(page.settings.pictures) if page.settings.pictures else None
  page = dataclasses.replace(page, typefaces=[one for one in page.typefaces if not one.main.is_thin] or page.typefaces)
  skipped = 0
  for number in range(TRIES):
    short = dataclasses.replace(page, num_characters=max(1, int(page.num_characters * 0.7**number)), is_simple=page.is_simple or number > TRIES // 2)
    ground = _users(rng, short, pictures) if pictures else _drawn(rng, short)
    if ground is None:
      skipped += 1
      continue
    picture = ground.pixels.copy()
    parts = _place_all(rng, short, picture, ground)
    if parts:
      grain = draw_grain(rng, page.height, page.width, ground.noise)
      _add_grain(picture, ground, parts, grain)
      return _Composition(page, "picture" if ground.source else "scene", None, [block for part in parts for block in part.blocks],
                          dataclasses.replace(ground, skipped=skipped), parts, grain, picture)
  if pictures and skipped == TRIES:
    raise ValueError(f"None of {TRIES} pictures of {page.settings.pictures} has an even part with room for letters of {page.least_px:.0f} px at "
                     f"{page.height}x{page.width} px: give other pictures or smaller letters.")
  raise ValueError(f"No text of {page.corpus.language.name} fits on a sign in {page.height}x{page.width} px at {page.settings.min_px} px: give "
                   "smaller letters.")


# ---- what is behind -----------------------------------------------------------------------------------


def _drawn(rng: np.random.Generator, page: Page) -> Ground:
  """A scene, with a frame or two."""
  pixels, name = walls.draw_scene(rng, page.height, page.width)
  edge = 0.04 * min(page.height, page.width)
  left, top, right, bottom = edge, edge, page.width - edge, page.height - edge
  frames = [(left, top, right, bottom)]
  if not page.is_simple and rng.random() < 0.35 and max(page.height, page.width) > 2.3 * LEAST_EMS[0] * page.least_px:
    cut = rng.uniform(0.42, 0.58)
    frames = ([(left, top, cut * page.width - edge, bottom), (cut * page.width + edge, top, right, bottom)] if page.width >= page.height else
              [(left, top, right, cut * page.height - edge), (left, cut * page.height + edge, right, bottom)])
  return Ground(pixels, name, {}, [_part_of(rng, frame) for frame in frames], float(rng.uniform(0, 3.5)), "", 0)


def _part_of(rng: np.random.Generator, frame: Sequence[float]) -> tuple[float, float, float, float]:
  """Most of a frame, somewhere in it."""
  left, top, right, bottom = frame
  width, height = ((right - left) * rng.uniform(0.7, 1.0), (bottom - top) * rng.uniform(0.6, 1.0))
  x, y = left + (right - left - width) * rng.random(), top + (bottom - top - height) * rng.random()
  return float(x), float(y), float(x + width), float(y + height)


def _inset(frame: Sequence[float]) -> tuple[float, float, float, float]:
  """A frame without its edge, which may be that of the picture."""
  left, top, right, bottom = frame
  edge = 0.05 * min(right - left, bottom - top)
  return left + edge, top + edge, right - edge, bottom - edge


def _users(rng: np.random.Generator, page: Page, pictures: Pictures) -> Ground | None:
  """One of the user's pictures with its even parts; None where it is broken or has none with room."""
  number = int(rng.integers(len(pictures)))
  pixels = pictures.load(number, page.height, page.width)
  if pixels is None:
    return None
  gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
  frames = find_regions(rng, gray, *(side * page.least_px for side in LEAST_EMS), 1 if page.is_simple else 2)
  if not frames:
    return None
  frames = [_inset(frame) for frame in frames]
  known = pictures.captions(number)
  if page.is_simple:
    known = {language: shortened(text, _CAPTION) for language, text in known.items()}
  return Ground(pixels, "", known, frames, _noise(gray, frames[0]), pictures.name(number), 0)


def _noise(gray: np.ndarray, frame: Sequence[float]) -> float:
  """Standard deviation of the noise in a frame of a picture, in levels (Immerkaer 1996, doi 10.1006/cviu.1996.0060)."""
  left, top, right, bottom = map(int, frame)
  mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
  return float(np.abs(cv2.filter2D(gray[top:bottom, left:right], cv2.CV_32F, mask)).mean() * np.sqrt(np.pi / 2) / 6)


# ---- objects ------------------------------------------------------------------------------------------


def _place_all(rng: np.random.Generator, page: Page, picture: np.ndarray, ground: Ground) -> list[Part]:
  """Draws objects with texts into a picture and returns them in the order in which they are read; none where nothing fits."""
  parts, light, share = [], rng.uniform((-1, 0.4), (1, 1)), page.num_characters // len(ground.frames)
  frames = sorted(ground.frames, key=lambda frame: (frame[1] // (page.height / 2), frame[0] * (-1 if page.corpus.language.is_rtl else 1)))
  for frame in frames:
    own = dataclasses.replace(page, num_characters=max(1, share))
    for _ in range(TRIES // 2):
      part = _place(rng, own, frame, ground, [block.paragraphs[0] for part in parts for block in part.blocks])
      trial = picture.copy()
      part = part and paint(rng, trial, part, light)
      if part:
        picture[:] = trial
        for block in part.blocks:
          block.part = len(parts)
        parts.append(part)
        break
  return parts


def _add_grain(picture: np.ndarray, ground: Ground, parts: Sequence[Part], grain: np.ndarray | None) -> None:
  """Adds noise to a scene, or to the objects on a user's picture, which has its own."""
  add_grain(grain, picture, [part.warp for part in parts if part.face] if ground.source else None)


def _place(rng: np.random.Generator, page: Page, frame: Sequence[float], ground: Ground, known: Sequence[str]) -> Part | None:
  """An object in a frame with texts on it; None where they do not fit."""
  wide = (frame[2] - frame[0]) / (frame[3] - frame[1])
  direct = rng.random() < _DIRECT_SHARE and ground.name != "blurred room"
  fit_in = [name for name, one in SURFACES.items() if one.ratios[0] / 1.9 < wide < one.ratios[1] * 1.9]
  if ground.source or len(ground.frames) > 1 or ground.name == "blurred room":
    fit_in = [name for name in fit_in if name != "label"]  # which stands on a shelf
  name = ("picture" if ground.source else "wall") if direct or not fit_in else fit_in[rng.integers(len(fit_in))]
  surface = SURFACES.get(name, DIRECT)
  calm = 0.4 if page.is_simple else 1.0
  turns = [calm * most * rng.uniform(-1, 1) for most in surface.turns]
  angle = surface.angle if surface.material == "can" else surface.angle * rng.random() * (rng.random() < 0.5)
  bow = float(rng.uniform(0.05, 0.11)) if surface.material == "can" else float(rng.uniform(-0.08, 0.08)) if angle else 0.0
  if surface.material == "can":  # and its lid
    frame = (frame[0], frame[1] + 0.15 * (frame[2] - frame[0]), frame[2], frame[3] - 0.03 * (frame[3] - frame[1]))
  warp = place(frame, float(np.clip(wide * rng.uniform(0.8, 1.2), *surface.ratios)), turns, angle, bow)
  if surface is DIRECT:
    face, inside = None, (0.02 * warp.width, 0.02 * warp.height, 0.98 * warp.width, 0.98 * warp.height)
  else:
    face = surfaces.draw_face(rng, surface, warp.height, warp.width)
    inside = face.frame
  blocks = _set_texts(rng, page, inside, page.least_px / warp.scale(inside), surface, known)
  return Part(name, face, warp, blocks) if blocks else None


def _set_texts(rng: np.random.Generator, page: Page, frame: Sequence[float], least: float, surface: Surface, known: Sequence[str]) -> list[Block]:
  """A text, a heading with a line below it, or a heading with sentences, in a frame of a plane; none where they do not fit.

  `least` is the least size of letters in units of the plane, `known` texts are not written again.
  """
  left, top, right, bottom = frame
  width, height = right - left, bottom - top
  kind = "single" if page.is_simple or page.num_characters < 16 else draw_key(rng, _TEXTS)
  if kind == "paragraph" and (surface.material not in ("paper", "screen", "slate") or page.num_characters < 50):
    kind = "stack"
  if kind == "single":
    vertical = height > 1.2 * width and rng.random() < 0.4 and page.corpus.language.vertical > 0
    draw = (page.corpus.word, page.corpus.heading, page.corpus.line)[0 if page.num_characters < 10 else rng.integers(3)]
    found = [_block(rng, page, frame, draw_new(draw, rng, known), "heading", least, 0.6, vertical)]
  else:
    cut = top + height * rng.uniform(0.42, 0.6)
    heading = _block(rng, page, (left, top, right, cut - 0.07 * height), draw_new(page.corpus.heading, rng, known), "heading", least, 0.5)
    if heading is None:
      return []
    rest, used = (left, cut, right, bottom), heading.setting.style.typeface
    most = 0.8 * heading.setting.size / height
    if kind == "paragraph":
      text = page.corpus.paragraphs(rng, 1, page.num_characters - len(heading.paragraphs[0]))[0]
    else:
      text = draw_new(page.corpus.figures if rng.random() < 0.6 else page.corpus.line, rng, [*known, heading.paragraphs[0]])
    line = _block(rng, page, rest, text, "paragraph" if kind == "paragraph" else "line", least, most, typeface=used)
    found = [heading, line]
    if line:
      _gather(found, top, bottom)
  return found if all(found) else []


def _gather(blocks: Sequence[Block], top: float, bottom: float) -> None:
  """Moves texts that stand below each other together, to the middle between top and bottom."""
  gap = 0.8 * min(block.setting.size for block in blocks)
  heights = [block.setting.ink[3] - block.setting.ink[1] for block in blocks]
  y = top + max(0.0, bottom - top - sum(heights) - gap * (len(blocks) - 1)) / 2
  for block, height in zip(blocks, heights):
    block.setting = block.setting.moved(0.0, y - block.setting.ink[1])
    y += height + gap


def _block(rng: np.random.Generator, page: Page, frame: Sequence[float], text: str, what: str, least: float, most: float, vertical: bool = False,
           typeface: Any = None) -> Block | None:
  """A text in the middle of a frame of a plane, at most `most` of its height in size."""
  left, top, right, bottom = frame
  style = draw_style(rng, page, "middle", vertical=vertical)
  style = dataclasses.replace(style, typeface=typeface or style.typeface)
  if what != "paragraph":
    style = short_style(style, "middle", text)
    leading = style.leading if what == "heading" else style.language.leading[0]
    style = dataclasses.replace(style, leading=leading, breaks="never" if len(text) <= _UNBROKEN else style.breaks)
  setting = fit([text], style, right - left, bottom - top, (least, max(least, most * (bottom - top))))
  if setting is None:
    return None
  setting = put(setting, frame, 0.5, 0.5)
  ink = setting.ink
  is_inside = ink[0] >= left - 1 and ink[1] >= top - 1 and ink[2] <= right + 1 and ink[3] <= bottom + 1
  return Block([text], setting, what, frame=frame) if is_inside else None


# ---- truth --------------------------------------------------------------------------------------------


def _describe(page: Page, part: Part, block: Block) -> dict[str, Any]:
  warp, setting = part.warp, block.setting
  box = _clipped(warp.hull(setting.ink), page)
  lines = [{"text": one.line.text, "box": _clipped(warp.hull(setting.box(one)), page), "quad": _rounded(warp.quad(setting.box(one)))}
           for one in setting.placed]
  return describe(block, page) | {
      "box": box, "quad": _rounded(warp.quad(setting.ink)), "lines": lines, "place": place_of(box, page.height, page.width),
      "size_px": round(setting.size * warp.scale(setting.ink), 2), "object": part.name, "object_colour": part.face.colour if part.face else "",
      "object_quad": _rounded(warp.corners), "angle": round(warp.angle_of(setting.ink), 1)}


def _clipped(box: Sequence[float], page: Page) -> list[int]:
  left, top, right, bottom = outwards(box)
  return [max(0, left), max(0, top), min(page.width, right), min(page.height, bottom)]


def _rounded(quad: np.ndarray) -> list[list[float]]:
  return np.round(quad, 1).tolist()
