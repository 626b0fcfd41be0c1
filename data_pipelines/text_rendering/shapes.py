"""What is drawn beside texts: boxes, lines, polygons, sectors and balloons with smooth edges.

A shape is filled at `_FINE` times its size in a mask of its own, which is averaged. Sides of plain boxes and rules lie on whole pixels, so that they
are crisp. Points are (x, y) in px, boxes (left, top, right, bottom).
"""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

Rgb = Sequence[int]
Point = tuple[float, float]
_FINE = 4
_DASH = 3.0  # length of a dash and of the gap behind it, in widths of its line


def fill_box(picture: Image.Image, box: Sequence[float], rgb: Rgb, radius: float = 0.0) -> None:
  """Fills a box, with round corners of a radius in px."""
  left, top, right, bottom = map(round, box)
  if radius < 1:
    picture.paste(tuple(rgb), (left, top, max(left + 1, right), max(top + 1, bottom)))
    return
  _paste(picture, (left, top, right, bottom), rgb, lambda draw, at: draw.rounded_rectangle(
      (*at((left, top)), *(c - 1 for c in at((right, bottom)))), radius * _FINE, fill=255))


def stroke_box(picture: Image.Image, box: Sequence[float], rgb: Rgb, width: float, radius: float = 0.0) -> None:
  """Draws the sides of a box inside of it, `width` px wide."""
  left, top, right, bottom = map(round, box)
  thick = max(1, round(width))
  _paste(picture, (left, top, right, bottom), rgb, lambda draw, at: draw.rounded_rectangle(
      (*at((left, top)), *(c - 1 for c in at((right, bottom)))), radius * _FINE, outline=255, width=thick * _FINE))


def fill_polygon(picture: Image.Image, points: Sequence[Point], rgb: Rgb) -> None:
  """Fills a polygon."""
  _paste(picture, _bounds(points), rgb, lambda draw, at: draw.polygon([at(one) for one in points], fill=255))


def fill_ellipse(picture: Image.Image, box: Sequence[float], rgb: Rgb) -> None:
  """Fills the ellipse in a box."""
  _paste(picture, box, rgb, lambda draw, at: draw.ellipse((*at(box[:2]), *at(box[2:])), fill=255))


def fill_sector(picture: Image.Image, center: Point, radius: float, ends: tuple[float, float], rgb: Rgb) -> None:
  """Fills a sector of a circle between two angles in turns, clockwise from the top."""
  x, y = center
  box = (x - radius, y - radius, x + radius, y + radius)
  _paste(picture, box, rgb, lambda draw, at: draw.pieslice((*at(box[:2]), *at(box[2:])), *(360 * end - 90 for end in ends), fill=255))


def draw_path(picture: Image.Image, points: Sequence[Point], rgb: Rgb, width: float) -> None:
  """Draws a line through points, `width` px wide, with round joints and ends."""
  wide = max(1, round(width * _FINE))

  def draw_on(draw: ImageDraw.ImageDraw, at) -> None:
    draw.line([at(one) for one in points], fill=255, width=wide)
    for x, y in map(at, points):
      draw.ellipse((x - wide / 2, y - wide / 2, x + wide / 2, y + wide / 2), fill=255)

  left, top, right, bottom = _bounds(points)
  _paste(picture, (left - width, top - width, right + width, bottom + width), rgb, draw_on)


def draw_rule(picture: Image.Image, begin: Point, length: float, rgb: Rgb, width: float, dashed: bool = False, upright: bool = False) -> None:
  """Draws a rule from a point on rightwards, or downwards where it is upright; its upper or left side lies on the point."""
  thick = max(1, round(width))
  step = 2 * _DASH * thick if dashed else length
  for number in range(max(1, math.ceil(length / max(1.0, step)))):
    a = round(number * step)
    b = round(min(length, a + (_DASH * thick if dashed else length)))
    x, y = round(begin[0]), round(begin[1])
    fill_box(picture, (x, y + a, x + thick, y + b) if upright else (x + a, y, x + b, y + thick), rgb)


def draw_arrow(picture: Image.Image, begin: Point, end: Point, rgb: Rgb, width: float) -> None:
  """Draws an arrow, its shaft `width` px wide."""
  length = math.dist(begin, end)
  along = ((end[0] - begin[0]) / length, (end[1] - begin[1]) / length)
  head = min(3.2 * width, 0.6 * length)
  neck = (end[0] - along[0] * head, end[1] - along[1] * head)
  aside = lambda point, far: (point[0] - along[1] * far, point[1] + along[0] * far)
  wide, thin = 0.55 * head, width / 2
  sides = (aside(begin, thin), aside(neck, thin), aside(neck, wide)), (aside(neck, -wide), aside(neck, -thin), aside(begin, -thin))
  fill_polygon(picture, [*sides[0], end, *sides[1]], rgb)


def _bounds(points: Sequence[Point]) -> tuple[float, float, float, float]:
  across, down = zip(*points)
  return min(across), min(down), max(across), max(down)


def _paste(picture: Image.Image, box: Sequence[float], rgb: Rgb, draw_on) -> None:
  """Pastes a colour through what `draw_on(draw, at)` fills, where `at` takes a point of the picture to one of the fine mask."""
  left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
  right, bottom = min(picture.width, math.ceil(box[2])), min(picture.height, math.ceil(box[3]))
  if right <= left or bottom <= top:
    return
  mask = Image.new("L", ((right - left) * _FINE, (bottom - top) * _FINE))
  draw_on(ImageDraw.Draw(mask), lambda point: ((point[0] - left) * _FINE, (point[1] - top) * _FINE))
  picture.paste(tuple(rgb), (left, top, right, bottom), mask.reduce(_FINE))
