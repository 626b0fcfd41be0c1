"""Colours of a page: its paper, panels and accents on it, and inks that can be read on each of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.text_rendering.colours import CONTRAST, GRAPHIC_CONTRAST, RGB, contrast, draw_ink, draw_near, luminance
from data_pipelines.text_rendering.drawing import Paper

Rgb = tuple[int, int, int]
_TINT = (0.08, 0.16)  # how far a panel's colour is from its ground's to the accent
_ALIKE = ("cream", "navy", "grey")  # to others, side by side
_BRIGHT = 0.18  # luminance above which a ground is light


@dataclasses.dataclass(frozen=True)
class Ground:
  """What texts stand on: the name of its colour, its levels, and the darkest and lightest colour on it."""
  name: str
  rgb: Rgb
  extremes: tuple[tuple[float, ...], ...]


class Scheme:
  """Colours drawn once for a page; texts of one role on one ground have one ink."""

  def __init__(self, rng: np.random.Generator, paper: Paper):
    self._rng, self._inks, self._panels = rng, {}, {}
    self.paper = Ground(paper.name, paper.rgb, paper.extremes)
    self._share = float(rng.uniform(*_TINT))
    fit = [name for name in RGB if name not in ("black", "white", "cream", "grey", paper.name) and self._apart(name, self.paper) >= CONTRAST + 0.5]
    self._accent = str(rng.choice(fit)) if fit else ("white" if luminance(paper.rgb) < _BRIGHT else "black")
    self._accent_rgb = draw_near(rng, self._accent)
    self._colourful = rng.random() < 0.5
    self.coats = [draw_near(rng, name) for name in rng.permutation(["red", "blue", "green", "purple", "orange", "brown", "navy"])]  # of people

  @staticmethod
  def _apart(name: str, ground: Ground) -> float:
    return min(contrast(RGB[name], one) for one in ground.extremes)

  def ground(self, fill: str, below: Ground) -> Ground:
    """The ground that a box makes on another: "panel", "accent" or "" for the same."""
    if not fill:
      return below
    if fill == "accent":
      name, rgb = (self._accent, self._accent_rgb) if below.name != self._accent else (self.paper.name, self.paper.rgb)
    else:
      rgb = tuple(round(a + self._share * (b - a)) for a, b in zip(below.rgb, self._accent_rgb))
      name = f"tinted {below.name}"
    return Ground(name, rgb, (rgb,))

  def ink(self, role: str, ground: Ground, accent: bool = False) -> tuple[str, Rgb, float]:
    """Name, levels and contrast of the colour of letters; in that of accents where that is allowed and the page is colourful."""
    if accent and self._colourful:
      ratio = min(contrast(self._accent_rgb, one) for one in ground.extremes)
      if ratio >= CONTRAST:
        return self._accent, self._accent_rgb, ratio
    if ground not in self._inks:
      plain = [(name, RGB[name], self._apart(name, ground)) for name in ("black", "white", "navy", "brown", "cream")]
      fit = [one for one in plain if one[2] >= CONTRAST + 2]
      self._inks[ground] = fit[self._rng.integers(min(2, len(fit)))] if fit else draw_ink(self._rng, ground.extremes)
    return self._inks[ground]

  def graphic(self, ground: Ground) -> Rgb:
    """The colour of lines and bars on a ground."""
    apart = min(contrast(self._accent_rgb, one) for one in ground.extremes)
    return self._accent_rgb if apart >= GRAPHIC_CONTRAST else self.ink("", ground)[1]

  def hairline(self, ground: Ground) -> Rgb:
    """The colour of thin rules, between that of the ground and that of its ink."""
    return tuple(round(a + 0.45 * (b - a)) for a, b in zip(ground.rgb, self.ink("", ground)[1]))

  def series(self, ground: Ground, num: int) -> list[tuple[str, Rgb]]:
    """Names and levels of at most `num` colours that differ from the ground and each other, for the parts of a chart."""
    fit = [name for name in RGB if name not in _ALIKE and self._apart(name, ground) >= GRAPHIC_CONTRAST]
    chosen: Sequence[str] = [fit[i] for i in self._rng.permutation(len(fit))[:num]]
    return [(name, draw_near(self._rng, name)) for name in chosen]
