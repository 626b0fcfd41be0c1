"""A plane in space as a camera sees it: flat, or bent like the label of a can.

A point (u, v) of a plane of w x h units, u rightwards and v downwards, is bent about the vertical axis through the middle and then projected:

  theta = a (2 u / w - 1),   p = w (1 + sin(theta) / sin(a)) / 2,   q = v + b (cos(theta) - cos(a))                              (1)
  (x, y) ~ H (p, q, 1)                                                                                                           (2)

with half the angle a that is seen of the cylinder (0 is flat: p = u), the bow b of its edges, seen from above, and the homography H of a plane that
was turned in space before a pinhole camera. Both have inverses in closed form, so that pixels are read backwards, once.
"""

import dataclasses
import functools
from collections.abc import Sequence

import cv2
import numpy as np

cv2.setNumThreads(0)  # the loader has a process or a thread per core
FINE = 2  # units of a plane per px of a picture, so that letters are sharp where they are read
_DISTANCE = 2.6  # of the camera, in longer sides of the plane
_EDGE = 9  # points of an edge that a hull is taken of


@dataclasses.dataclass(frozen=True)
class Warp:
  """How a plane of width x height units lies in a picture, see (1) and (2)."""
  width: int
  height: int
  homography: np.ndarray
  angle: float = 0.0
  bow: float = 0.0

  def to_picture(self, points: np.ndarray) -> np.ndarray:
    """Places [..., 2] (x, y) in px of points [..., 2] (u, v) of the plane."""
    u, v = points[..., 0], points[..., 1]
    if self.angle:
      theta = self.angle * (2 * u / self.width - 1)
      u, v = self.width * (1 + np.sin(theta) / np.sin(self.angle)) / 2, v + self.bow * (np.cos(theta) - np.cos(self.angle))
    return self.project(np.stack([u, v], -1))

  def project(self, points: np.ndarray) -> np.ndarray:
    """Places [..., 2] in px of points (p, q) of the plane that is not bent."""
    return _projected(self.homography, points)

  def read(self, plane: np.ndarray, box: Sequence[int]) -> np.ndarray:
    """Returns the pixels of a box (left, top, right, bottom) of the picture, read from those of the plane, uint8 [h, w] or [h, w, C]; 0 outside of
    the plane."""
    left, top, right, bottom = box
    x, y = np.arange(left, right, dtype=np.float32) + 0.5, np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5
    inverse = np.linalg.inv(self.homography)
    inverse = (inverse / inverse[2, 2]).astype(np.float32)
    depth = 1 / (inverse[2, 0] * x + inverse[2, 1] * y + inverse[2, 2])
    p, q = ((inverse[i, 0] * x + inverse[i, 1] * y + inverse[i, 2]) * depth for i in range(2))
    if self.angle:
      sine = (2 * p / self.width - 1) * np.float32(np.sin(self.angle))
      inside = np.abs(sine) <= np.sin(self.angle)
      theta = np.arcsin(np.clip(sine, -1, 1))
      p = np.where(inside, self.width * (1 + theta / np.float32(self.angle)) / 2, np.float32(-9))
      q = q - np.float32(self.bow) * (np.cos(theta) - np.float32(np.cos(self.angle)))
    return cv2.remap(plane, p - 0.5, q - 0.5, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)

  @functools.cached_property
  def corners(self) -> np.ndarray:
    """Places [4, 2] in px of its corners: top left, top right, bottom right, bottom left."""
    return self.quad((0, 0, self.width, self.height))

  def quad(self, box: Sequence[float]) -> np.ndarray:
    """Places [4, 2] in px of the corners of a box (left, top, right, bottom) of the plane, from its top left on clockwise."""
    left, top, right, bottom = box
    return self.to_picture(np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float))

  def hull(self, box: Sequence[float]) -> tuple[float, float, float, float]:
    """The upright box in px that a box of the plane fills."""
    return bounds(self.to_picture(_outline(box)))

  def scale(self, box: Sequence[float]) -> float:
    """The least length in px of a unit of the plane, in any direction, in a box of it."""
    points = _outline(box)
    steps = [self.to_picture(points + step) - self.to_picture(points - step) for step in ((0.5, 0), (0, 0.5))]
    return float(np.linalg.svd(np.stack(steps, -1), compute_uv=False).min())

  def angle_of(self, box: Sequence[float]) -> float:
    """By how many degrees the middle of a box is turned, clockwise."""
    left, top, right, bottom = box
    ends = self.to_picture(np.array([(left, (top + bottom) / 2), (right, (top + bottom) / 2)]))
    return float(np.degrees(np.arctan2(*(ends[1] - ends[0])[::-1])))


def _outline(box: Sequence[float]) -> np.ndarray:
  """Points on the edges of a box."""
  left, top, right, bottom = box
  along, down = np.linspace(left, right, _EDGE), np.linspace(top, bottom, _EDGE)
  return np.array([*((x, y) for x in along for y in (top, bottom)), *((x, y) for y in down for x in (left, right))], float)


def bounds(points: np.ndarray) -> tuple[float, float, float, float]:
  """The upright box around points [n, 2], (left, top, right, bottom)."""
  return (*points.min(0).tolist(), *points.max(0).tolist())


def _projected(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
  found = points @ homography[:, :2].T + homography[:, 2]
  return found[..., :2] / found[..., 2:]


def place(frame: Sequence[float], ratio: float, turns: Sequence[float], angle: float = 0.0, bow: float = 0.0) -> Warp:
  """Returns a plane that fills a frame (left, top, right, bottom) of a picture as far as its proportions allow, in the middle.

  Args: the frame in px; width to height of the plane; yaw, pitch and roll in degrees; half the angle of a cylinder in radians, below pi / 2; bow as a
  share of the plane's width.
  """
  yaw, pitch, roll = np.radians(turns)
  spin = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
  tilt = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
  turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
  width, height = (1.0, 1 / ratio) if ratio > 1 else (ratio, 1.0)
  # Of a plane z = 0 that was turned and moved away: the columns of x and of y, and where its middle is.
  homography = np.column_stack([(spin @ tilt @ turn)[:, :2], (0, 0, _DISTANCE)])
  homography = homography @ np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
  unit = Warp(1, 1, homography @ np.diag([width, height, 1]), angle, bow * width / height)
  left, top, right, bottom = unit.hull((0, 0, 1, 1))
  size = min((frame[2] - frame[0]) / (right - left), (frame[3] - frame[1]) / (bottom - top))
  move = [(frame[i] + frame[i + 2]) / 2 - size * (a + b) / 2 for i, (a, b) in enumerate(((left, right), (top, bottom)))]
  sides = np.maximum(1, np.ceil(FINE * size / _DISTANCE * np.array([width, height]))).astype(int)
  whole = np.array([[size, 0, move[0]], [0, size, move[1]], [0, 0, 1]]) @ unit.homography @ np.diag([1 / sides[0], 1 / sides[1], 1])
  return Warp(int(sides[0]), int(sides[1]), whole, angle, bow * int(sides[0]))
