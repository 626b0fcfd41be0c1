"""Tables: columns as wide as their cells need, rows on common base lines, with rules, stripes or leaders between them."""

import dataclasses
from collections.abc import Sequence

from data_pipelines.text_rendering import shapes
from data_pipelines.text_rendering.pages import Leader
from data_pipelines.text_rendering.regions import Frame, Misfit, Region, Sheet, Sizes, Text
from data_pipelines.text_rendering.schemes import Ground

_GAP = 1.2  # between columns, in ems
_SAME = 0.7  # ems by which a row of several lines reaches further down than one of a line, at least
_PAD = 0.42  # above and below the texts of a row, in ems
_DOT, _DOTS = 0.09, 0.45  # a leader's dots and their distance, in ems


@dataclasses.dataclass
class Table(Region):
  """Rows of cells. `head` tells whether the first one is above the others; `folds` which columns may take several lines; `lines` is one of
  `templates.LINES`."""
  rows: Sequence[Sequence[Text]]
  folds: Sequence[bool]
  lines: str
  head: bool
  gap: float = _GAP

  def texts(self) -> list[Text]:
    return [cell for row in self.rows for cell in row]

  def _inset(self, sizes: Sizes) -> float:
    """Between the sides of the table and its texts."""
    return (0.6 if self.lines in ("grid", "zebra") or self.head else 0.0) * sizes.em

  def _widths(self, width: float, sizes: Sizes) -> list[float]:
    room = width - 2 * self._inset(sizes) - (len(self.folds) - 1) * self.gap * sizes.em
    usual = [max(row[i].length(sizes) for row in self.rows) * 1.002 + 0.1 for i in range(len(self.folds))]
    slack = room - sum(usual)
    if slack >= 0:
      if self.lines == "leaders" or len(usual) == 2:
        return [usual[0] + slack, *usual[1:]]
      return [own + slack / len(usual) for own in usual]
    fixed = sum(own for own, folds in zip(usual, self.folds) if not folds)
    folded = sum(own for own, folds in zip(usual, self.folds) if folds)
    if room <= fixed or not folded:
      raise Misfit(self.rows[-1][0].role, self.rows[-1][0].factor)
    return [own * (room - fixed) / folded if folds else own for own, folds in zip(usual, self.folds)]

  def _reaches(self, width: float, sizes: Sizes) -> tuple[list[float], list[tuple[float, float]]]:
    """Widths of the columns, and how far each row reaches above and below its first base line."""
    widths = self._widths(width, sizes)
    found = [[cell.reach(own, sizes) for cell, own in zip(row, widths)] for row in self.rows]
    above = max(one[0] for row in found[self.head:] for one in row)
    below = [max(one[1] for one in row) for row in found]
    plain = [one for one in below[self.head:] if one < min(below[self.head:]) + _SAME * sizes.em]
    reaches = [(above, max(plain) if one in plain else one) for one in below]  # rows of one line are equally high
    return widths, [(max(one[0] for one in found[0]), below[0]), *reaches[1:]] if self.head else reaches

  def height(self, width: float, sizes: Sizes) -> float:
    _, reaches = self._reaches(width, sizes)
    return sum(map(sum, reaches)) + 2 * _PAD * sizes.em * len(reaches)

  def place(self, frame: Frame, sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    left, top, right, bottom = frame
    widths, reaches = self._reaches(right - left, sizes)
    spare = max(0.0, bottom - top - self.height(right - left, sizes)) / len(reaches)
    pad, y = _PAD * sizes.em + 0.5 * (min(spare, sizes.em) if self.grow else 0.0), top
    number = len(sheet.structures)
    ends = [y]
    for i, (row, (above, below)) in enumerate(zip(self.rows, reaches)):
      high = above + below + 2 * pad
      own = self._ground(i, (left, y, right, y + high), sheet, ground)
      self._place_row(row, widths, (left, y, right, y + high), pad + above, sizes, sheet, own, number)
      y += high
      ends.append(y)
    self._draw_lines((left, top, right, y), ends, widths, sizes, sheet, ground)
    rows = [[" ".join(cell.paragraphs) for cell in row] for row in self.rows]
    sheet.structures.append({"type": "table", "box": [left, top, right, y], "head": rows[0] if self.head else None, "rows": rows[self.head:]})

  def _ground(self, number: int, frame: Frame, sheet: Sheet, ground: Ground) -> Ground:
    """What a row stands on, which is drawn."""
    is_head = self.head and number == 0
    fill = "accent" if is_head else "panel" if self.lines == "zebra" and (number - self.head) % 2 == 0 else ""
    own = sheet.scheme.ground(fill, ground)
    if fill:
      sheet.draw(shapes.fill_box, frame, own.rgb)
    return own

  def _place_row(self, row: Sequence[Text], widths: Sequence[float], frame: Frame, above: float, sizes: Sizes, sheet: Sheet, ground: Ground,
                 number: int) -> None:
    left, top, right, bottom = frame
    inset = self._inset(sizes)
    rest = (left + inset, top, right - inset, bottom)
    for cell, width in zip(row, widths):
      cell.structure = number
      cell.place(sheet.start(rest, width), sizes, sheet, ground, above)
      rest = sheet.after(rest, width + self.gap * sizes.em)
    if self.lines == "leaders":
      first, second = sheet.blocks[-len(row):][:2]
      first.leader = Leader(second.setting.ink, top + above, _DOTS * sizes.em, max(1.0, _DOT * sizes.em), sheet.scheme.hairline(ground))
      slack = _DOTS * sizes.em  # beyond it the dots would not fit any more
      left, top, right, bottom = second.setting.ink
      second.frame = left - slack, top - slack, right + slack, bottom + slack

  def _draw_lines(self, frame: Frame, ends: Sequence[float], widths: Sequence[float], sizes: Sizes, sheet: Sheet, ground: Ground) -> None:
    left, top, right, bottom = frame
    thin, rgb = max(1.0, 0.05 * sizes.em), sheet.scheme.hairline(ground)
    if self.lines in ("rows", "grid"):
      for y in ends[1:]:
        sheet.draw(shapes.draw_rule, (left, y), right - left, rgb, thin)
    if self.lines == "grid":
      sheet.draw(shapes.stroke_box, (left, top, right, bottom + thin), rgb, thin)
      x = self._inset(sizes) - 0.5 * self.gap * sizes.em
      for width in widths[:-1]:
        x += width + self.gap * sizes.em
        sheet.draw(shapes.draw_rule, (right - x if sheet.is_rtl else left + x, top), bottom - top, rgb, thin, upright=True)
