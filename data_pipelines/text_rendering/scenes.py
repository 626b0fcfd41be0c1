"""What is neither running text nor a table: code, balloons above people, arrows, rules and bar codes, each a region."""

import dataclasses
from collections.abc import Sequence

from data_pipelines.text_rendering import shapes
from data_pipelines.text_rendering.regions import Frame, Misfit, Region, Sheet, Sizes, Text
from data_pipelines.text_rendering.schemes import Ground

_BALLOON, _PAD, _LINE = 0.8, 0.75, 0.11  # share of a panel's width; ems inside a balloon; its line in ems
_TAIL = 2.5  # ems from a balloon to a head where there is more room
_PEOPLE = 6.0  # ems for people, at least
_HEADS = (0.2, 0.78)  # where people stand, as shares of the width
_WHITE, _INK = (252, 252, 250), (22, 22, 24)
_SKINS = ((245, 214, 190), (214, 165, 125), (156, 104, 70), (96, 62, 44))


@dataclasses.dataclass
class Code(Region):
  """Lines of code in a language."""
  lines: Text
  language: str

  def texts(self) -> list[Text]:
    return [self.lines]

  def height(self, width: float, sizes: Sizes) -> float:
    return self.lines.height(width, sizes)

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    self.lines.structure = len(sheet.structures)
    self.lines.place(frame, sizes, sheet, ground)
    sheet.structures.append({"type": "code", "box": list(sheet.blocks[-1].setting.ink), "language": self.language, "lines": self.lines.paragraphs})


@dataclasses.dataclass
class Scene(Region):
  """A panel of a comic: balloons, one or two, that speak below each other, and who speaks; `looks` are two numbers below 12 that tell what they look
  like."""
  balloons: Sequence[Text]
  looks: Sequence[int]
  pad: float = 0.7

  def texts(self) -> list[Text]:
    return list(self.balloons)

  def _width(self, width: float, sizes: Sizes) -> float:
    """Of a balloon's text."""
    room = (width - 2 * self.pad * sizes.em) * _BALLOON - 2 * _PAD * sizes.em
    if room < 3 * sizes.em:
      raise Misfit("balloon")
    return room

  def height(self, width: float, sizes: Sizes) -> float:
    room = self._width(width, sizes)
    own = sum(one.height(room, sizes) + (2 * _PAD + 0.5) * sizes.em for one in self.balloons)
    return own + (_PEOPLE + 2 * self.pad) * sizes.em

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    em, (left, top, right, bottom) = sizes.em, frame
    sky = sheet.scheme.ground("panel", ground)
    sheet.draw(shapes.fill_box, frame, sky.rgb)
    room, y = self._width(right - left, sizes), top + self.pad * em
    heights = [one.height(room, sizes) + 2 * _PAD * em for one in self.balloons]
    under = y + sum(heights) + 0.5 * em * len(heights)
    tall = min(bottom - under - 1.4 * em, 0.6 * (right - left))
    head_y = bottom - tall
    y += 0.7 * max(0.0, head_y - under - _TAIL * em)
    heads = [frame[0] + (right - left) * (1 - share if sheet.is_rtl else share) for share in _HEADS]
    floor = bottom - 0.22 * tall
    sheet.draw(shapes.fill_box, (left, floor, right, bottom), sheet.scheme.hairline(sky))
    for number, x in enumerate(heads[:len(self.balloons)]):
      self._draw_person(x, head_y, bottom, self.looks[number], sheet)
    tails = []
    for number, (text, high) in enumerate(zip(self.balloons, heights)):
      inner = (left + self.pad * em, y, right - self.pad * em, y + high)
      wide = room + 2 * _PAD * em
      one = sheet.start(inner, wide) if number == 0 else sheet.after(inner, inner[2] - inner[0] - wide)
      tails.append((one, heads[number], head_y - 0.5 * em))
      y += high + 0.5 * em
    for one, x, tip in tails[::-1]:  # the first balloon's tail passes beside the second, which stands further in
      self._draw_balloon(one, x, tip, em, sheet)
    paper = Ground("white", _WHITE, (_WHITE,))
    for text, (one, _, _) in zip(self.balloons, tails):
      pad = _PAD * em
      text.place((one[0] + pad, one[1] + pad, one[2] - pad, one[3] - pad), sizes, sheet, paper)
    sheet.draw(shapes.stroke_box, frame, _INK, 0.16 * em)

  @staticmethod
  def _draw_balloon(box: Frame, x: float, tip: float, em: float, sheet: Sheet) -> None:
    """A balloon whose tail ends at (x, tip)."""
    line, radius = max(1.0, _LINE * em), 0.9 * em
    foot = min(max(x, box[0] + radius + 0.6 * em), box[2] - radius - 0.6 * em)
    for rgb, inset in ((_INK, 0.0), (_WHITE, line)):
      inner = (box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset)
      half = 0.5 * em - 0.8 * inset
      sheet.draw(shapes.fill_box, inner, rgb, radius - inset)
      sheet.draw(shapes.fill_polygon, [(foot - half, box[3] - 2 * line), (foot + half, box[3] - 2 * line), (x, tip - 2.5 * inset)], rgb)

  @staticmethod
  def _draw_person(x: float, top: float, bottom: float, look: int, sheet: Sheet) -> None:
    """Someone from head to waist, who faces the reader."""
    head = 0.25 * (bottom - top)
    skin, hair = _SKINS[look % 4], ((40, 30, 26), (120, 74, 30), (70, 70, 76))[look % 3]
    coat = sheet.scheme.coats[look % len(sheet.scheme.coats)]
    sheet.draw(shapes.fill_box, (x - 1.15 * head, top + 2.15 * head, x + 1.15 * head, bottom), coat, 0.8 * head)
    sheet.draw(shapes.fill_box, (x - 1.15 * head, bottom - head, x + 1.15 * head, bottom), coat)
    sheet.draw(shapes.fill_box, (x - 0.3 * head, top + 1.7 * head, x + 0.3 * head, top + 2.4 * head), skin, 0.2 * head)
    sheet.draw(shapes.fill_ellipse, (x - 0.92 * head, top - 0.1 * head, x + 0.92 * head, top + 1.7 * head), hair)
    sheet.draw(shapes.fill_ellipse, (x - 0.78 * head, top + 0.2 * head, x + 0.78 * head, top + 2 * head), skin)
    for side in (-1, 1):
      eye = (x + side * 0.32 * head, top + 1.0 * head)
      sheet.draw(shapes.fill_ellipse, (eye[0] - 0.09 * head, eye[1] - 0.12 * head, eye[0] + 0.09 * head, eye[1] + 0.12 * head), _INK)
    mouth = [(x + t * head, top + 1.45 * head + (0.16 - 1.8 * t * t) * head) for t in (-0.28, -0.14, 0.0, 0.14, 0.28)]
    sheet.draw(shapes.draw_path, mouth, _INK, max(1.0, 0.07 * head))


@dataclasses.dataclass
class Arrow(Region):
  """An arrow to what comes next: "down", or "next" to where the following column is."""
  towards: str
  tall: float = 1.5

  def height(self, width: float, sizes: Sizes) -> float:
    return self.tall * sizes.em

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    left, top, right, bottom = frame
    x, y, rgb, thick = (left + right) / 2, (top + bottom) / 2, sheet.scheme.graphic(ground), 0.28 * sizes.em
    if self.towards == "down":
      half = min(bottom - top, 2.2 * sizes.em) / 2
      sheet.draw(shapes.draw_arrow, (x, y - half), (x, y + half), rgb, thick)
    else:
      ends = [(left, y), (right, y)][::-1 if sheet.is_rtl else 1]
      sheet.draw(shapes.draw_arrow, *ends, rgb, thick)


@dataclasses.dataclass
class Rule(Region):
  """A rule across the frame, solid or dashed; upright where the frame stands."""
  dashed: bool = False
  upright: bool = False
  strong: bool = False

  def height(self, width: float, sizes: Sizes) -> float:
    return max(1.0, 0.1 * sizes.em)

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    left, top, right, bottom = frame
    rgb = sheet.scheme.graphic(ground) if self.strong else sheet.scheme.hairline(ground)
    thick = max(1.0, (0.2 if self.strong else 0.06) * sizes.em)
    begin = ((left + right) / 2, top) if self.upright else (left, top)
    sheet.draw(shapes.draw_rule, begin, bottom - top if self.upright else right - left, rgb, thick, self.dashed, self.upright)


@dataclasses.dataclass
class BarCode(Region):
  """Bars and gaps of the given widths, in modules."""
  modules: Sequence[int]
  tall: float = 2.6

  def height(self, width: float, sizes: Sizes) -> float:
    return self.tall * sizes.em

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    left, top, right, bottom = frame
    module = max(1, int(min(right - left, 14 * sizes.em) / sum(self.modules)))
    x, rgb = (left + right - module * sum(self.modules)) / 2, sheet.scheme.ink("", ground)[1]
    for number, wide in enumerate(self.modules):
      if number % 2 == 0 and x + module * wide <= right:
        sheet.draw(shapes.fill_box, (x, top, x + module * wide, bottom), rgb)
      x += module * wide


@dataclasses.dataclass
class Space(Region):
  """Nothing, at least `tall` ems high."""
  tall: float = 0.0

  def height(self, width: float, sizes: Sizes) -> float:
    return self.tall * sizes.em

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    pass
