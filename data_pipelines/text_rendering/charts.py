"""Charts drawn by rule: bars that stand or lie, lines and pies, with labels and values in letters.

Bars and lines begin at zero, so lengths are as the values; a pie's sectors are as its shares. Every value is written at its bar, point or sector.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.text_rendering import shapes
from data_pipelines.text_rendering.regions import Frame, Misfit, Region, Sheet, Sizes, Text
from data_pipelines.text_rendering.schemes import Ground

_THICK = (0.62, 1.5)  # of a bar: share of its place, or of a lying one's ems
_GAP = 0.4  # between a bar and its texts, in ems


@dataclasses.dataclass
class Chart(Region):
  """Labels and values, beside each other in order; `kind` is one of `templates.CHARTS`; `tall` its least height in ems."""
  kind: str
  labels: Sequence[Text]
  values: Sequence[Text]
  numbers: Sequence[float]
  tall: float = 9.0

  def texts(self) -> list[Text]:
    return [text for pair in zip(self.labels, self.values) for text in pair]

  def height(self, width: float, sizes: Sizes) -> float:
    if self.kind in ("rows", "pie"):
      if self.kind == "pie":
        self._widest(self._legend(width, sizes), sizes)
      else:
        self._bar_room(width, sizes)
      return max(self.tall * sizes.em if self.kind == "pie" else 0.0, len(self.labels) * self._pitch(sizes))
    own = self._slot(width)
    for one in (*self.labels, *self.values):
      if one.length(sizes) > own - 0.6 * sizes.em:
        raise Misfit(one.role, one.factor)
    return self.tall * sizes.em

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    number = len(sheet.structures)
    for text in self.texts():
      text.structure = number
    for text in self.values:
      text.is_fixed = True
    colours = sheet.scheme.series(ground, len(self.labels) if self.kind == "pie" else 1)
    if len(colours) < len(self.labels) and self.kind == "pie":
      raise Misfit("label")
    {"bars": self._bars, "rows": self._lying, "lines": self._lines, "pie": self._pie}[self.kind](frame, sizes, sheet, ground, colours)
    names = [name for name, _ in colours]
    sheet.structures.append({
        "type": "chart", "chart": self.kind, "box": list(frame), "labels": [one.paragraphs[0] for one in self.labels],
        "texts": [one.paragraphs[0] for one in self.values], "values": list(self.numbers), "colours": names})

  def _pitch(self, sizes: Sizes) -> float:
    """From one label to the next one below it."""
    return self._above(self.texts(), sizes) + max(one.reach(1e6, sizes)[1] for one in self.texts()) + 0.75 * sizes.em

  def _above(self, texts: Sequence[Text], sizes: Sizes) -> float:
    """How far the letters of texts reach above their base line, so that it is the same of all."""
    return max(one.reach(1e6, sizes)[0] for one in texts)

  def _slot(self, width: float) -> float:
    return width / len(self.labels)

  # ---- standing bars, and lines

  def _base(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> tuple[float, float]:
    """Draws the axis and the labels below it; returns (its y, how far up the greatest value reaches)."""
    left, _, right, bottom = frame
    below = self._above(self.labels, sizes) + max(one.reach(1e6, sizes)[1] for one in self.labels)
    base = bottom - below - _GAP * sizes.em
    thin = max(1.0, 0.07 * sizes.em)
    sheet.draw(shapes.draw_rule, (left, base), right - left, sheet.scheme.hairline(ground), thin)
    return base, base - frame[1] - max(sum(one.reach(1e6, sizes)) for one in self.values) - _GAP * sizes.em

  def _points(self, frame: Frame, base: float, room: float, sheet: Sheet) -> list[tuple[float, float]]:
    """Middles of the places of the labels, and the heights of the values."""
    slot, most = self._slot(frame[2] - frame[0]), max(self.numbers)
    middles = [(i + 0.5) * slot for i in range(len(self.numbers))]
    return [(frame[2] - x if sheet.is_rtl else frame[0] + x, base - room * value / most) for x, value in zip(middles, self.numbers)]

  def _write(self, label: Text, value: Text, x: float, ys: tuple[float, float], slot: float, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    """Puts a label below the axis, on the base line of all of them, and a value above its point; `ys` are their tops."""
    for text, y, above in zip((label, value), ys, (self._above(self.labels, sizes), None)):
      text.place((x - slot / 2, y, x + slot / 2, y + 1e6), sizes, sheet, ground, above)

  def _bars(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground, colours) -> None:
    base, room = self._base(frame, sizes, sheet, ground)
    slot = self._slot(frame[2] - frame[0])
    wide = min(_THICK[0] * slot, 4 * sizes.em)
    for (x, y), label, value in zip(self._points(frame, base, room, sheet), self.labels, self.values):
      sheet.draw(shapes.fill_box, (x - wide / 2, y, x + wide / 2, base), colours[0][1])
      tops = base + _GAP * sizes.em, y - _GAP * sizes.em - sum(value.reach(1e6, sizes))
      self._write(label, value, x, tops, slot, sizes, sheet, ground)

  def _lines(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground, colours) -> None:
    base, room = self._base(frame, sizes, sheet, ground)
    slot, radius = self._slot(frame[2] - frame[0]), 0.32 * sizes.em
    clear = radius + 0.3 * sizes.em
    # The line may rise or fall beside a value's letters: values stand above the higher of their point's line within half a letter's width.
    points = self._points(frame, base, 0.86 * (room - radius), sheet)
    sheet.draw(shapes.draw_path, points, colours[0][1], 0.16 * sizes.em)
    for i, ((x, y), label, value) in enumerate(zip(points, self.labels, self.values)):
      sheet.draw(shapes.fill_ellipse, (x - radius, y - radius, x + radius, y + radius), colours[0][1])
      half = value.length(sizes) / 2 + 0.2 * sizes.em
      near = [y + (other[1] - y) * min(1.0, half / abs(other[0] - x)) for other in (points[max(0, i - 1)], points[min(len(points) - 1, i + 1)])
              if other[0] != x]
      top = min([y, *near]) - clear - sum(value.reach(1e6, sizes))
      if top < frame[1]:
        raise Misfit(value.role, value.factor)
      self._write(label, value, x, (base + _GAP * sizes.em, top), slot, sizes, sheet, ground)

  # ---- lying bars

  def _bar_room(self, width: float, sizes: Sizes) -> tuple[float, float, float]:
    """Widths of labels and values, and of the longest bar."""
    label, value = (max(one.length(sizes) for one in some) * 1.002 + 0.1 for some in (self.labels, self.values))
    room = width - label - value - 2 * _GAP * sizes.em - 0.6 * sizes.em
    if room < 6 * sizes.em:
      raise Misfit(self.labels[0].role, self.labels[0].factor)
    return label, value, room

  def _lying(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground, colours) -> None:
    left, top, right, bottom = frame
    label_wide, value_wide, room = self._bar_room(right - left, sizes)
    pitch = min((bottom - top) / len(self.labels), 1.8 * self._pitch(sizes))
    thick, above = min(_THICK[1] * sizes.em, 0.75 * pitch), self._above(self.texts(), sizes)
    for i, (label, value, number) in enumerate(zip(self.labels, self.values, self.numbers)):
      y = top + (i + 0.5) * pitch
      rest = sheet.after((left, y - pitch / 2, right, y + pitch / 2), label_wide + 2 * _GAP * sizes.em)
      label.place(sheet.start((left, *self._middle(label, y, sizes, right)), label_wide), sizes, sheet, ground, above)
      long = room * number / max(self.numbers)
      bar = sheet.start(rest, long)
      sheet.draw(shapes.fill_box, (bar[0], y - thick / 2, bar[2], y + thick / 2), colours[0][1])
      rest = sheet.after(rest, long + _GAP * sizes.em)
      value.place(sheet.start((rest[0], *self._middle(value, y, sizes, rest[2])), value_wide), sizes, sheet, ground, above)

  def _middle(self, text: Text, y: float, sizes: Sizes, right: float) -> tuple[float, float, float]:
    """(top, right, bottom) of the frame of a line whose letters have their middle at y."""
    above, below = self._above(self.texts(), sizes), text.reach(1e6, sizes)[1]
    top = y - above / 2  # what hangs below the base line does not count
    return top, right, top + above + below

  # ---- pies

  def _legend(self, width: float, sizes: Sizes) -> float:
    """Width of the legend, beside a circle."""
    return width - min(0.5 * width, 1.2 * self.tall * sizes.em) - 1.5 * sizes.em

  def _widest(self, room: float, sizes: Sizes) -> tuple[float, float]:
    label, value = (max(one.length(sizes) for one in some) * 1.002 + 0.1 for some in (self.labels, self.values))
    if label + value + 3 * sizes.em > room:
      raise Misfit(self.labels[0].role, self.labels[0].factor)
    return label, value

  def _pie(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground, colours) -> None:
    left, top, right, bottom = frame
    em, legend = sizes.em, self._legend(right - left, sizes)
    label_wide, value_wide = self._widest(legend, sizes)
    circle = right - left - legend - 1.5 * em
    radius = min(circle, bottom - top) / 2
    middle_y = (top + bottom) / 2
    center_x = (lambda box: (box[0] + box[2]) / 2)(sheet.start(frame, 2 * radius))
    ends = np.cumsum([0.0, *self.numbers]) / sum(self.numbers)
    pitch, above = self._pitch(sizes), self._above(self.texts(), sizes)
    y = middle_y - (len(self.labels) - 1) * pitch / 2
    for i, (label, value) in enumerate(zip(self.labels, self.values)):
      sheet.draw(shapes.fill_sector, (center_x, middle_y), radius, (ends[i], ends[i + 1]), colours[i][1])
      rest = sheet.after((left, 0, right, 0), 2 * radius + 2.2 * em)
      swatch = sheet.start(rest, em)
      sheet.draw(shapes.fill_box, (swatch[0], y - em / 2, swatch[2], y + em / 2), colours[i][1])
      rest = sheet.after(rest, 1.6 * em)
      label.place(sheet.start((rest[0], *self._middle(label, y, sizes, rest[2])), label_wide), sizes, sheet, ground, above)
      rest = sheet.after(rest, label_wide + 0.8 * em)
      value.place(sheet.start((rest[0], *self._middle(value, y, sizes, rest[2])), value_wide), sizes, sheet, ground, above)
      y += pitch
    for end in ends[:-1]:  # sectors are apart
      turn = 2 * np.pi * end
      rim = (center_x + radius * 1.01 * np.sin(turn), middle_y - radius * 1.01 * np.cos(turn))
      sheet.draw(shapes.draw_path, [(center_x, middle_y), rim], ground.rgb, max(1.0, 0.012 * radius))
