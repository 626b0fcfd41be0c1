"""Colours by name, and whether text in one can be read on another: the contrast ratio of WCAG 2.2.

With sRGB levels c in 0..1 linearised to c_l, the relative luminance is L = 0.2126 R_l + 0.7152 G_l + 0.0722 B_l, and the ratio of two colours
(L_1 + 0.05) / (L_2 + 0.05), the lighter one above: 1 to 21. WCAG asks for 4.5, and for 3 of graphics and large letters.
"""

import functools
from collections.abc import Sequence

import numpy as np

from data_pipelines.text_rendering.settings import draw_key

RGB = {"black": (22, 22, 24), "white": (252, 252, 250), "grey": (88, 90, 94), "red": (190, 24, 34), "orange": (236, 120, 18),
       "yellow": (250, 214, 70), "green": (20, 102, 52), "blue": (30, 92, 200), "navy": (20, 34, 88), "purple": (108, 40, 140),
       "brown": (98, 60, 34), "cream": (247, 238, 216), "pink": (250, 196, 208)}
CONTRAST, GRAPHIC_CONTRAST = 4.5, 3.0  # of letters, and of what is drawn beside them
_PAPERS = {"white": 5, "cream": 4, "yellow": 1, "pink": 1, "grey": 0.6, "black": 1.2, "navy": 1.2, "green": 0.6, "blue": 0.6, "red": 0.6,
           "brown": 0.6, "purple": 0.6, "orange": 0.6}
GRAIN_PX = 1024  # side of the tile of `grain`
_JITTER = 7  # of a channel, by which a colour may differ from the one of its name


def luminance(rgb: Sequence[float]) -> float:
  """Relative luminance, 0 to 1, of an sRGB colour in 0..255."""
  linear = [c / 3294.6 if c <= 10.31475 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]  # 255 12.92 and 255 0.04045
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: Sequence[float], second: Sequence[float]) -> float:
  """Contrast ratio of two sRGB colours in 0..255: 1 for equal ones to 21 for black and white."""
  return _ratio(luminance(first), luminance(second))


def _ratio(first: float, second: float) -> float:
  return (max(first, second) + 0.05) / (min(first, second) + 0.05)


@functools.cache
def _luminances() -> dict[str, float]:
  return {name: luminance(rgb) for name, rgb in RGB.items()}


def draw_paper(rng: np.random.Generator) -> tuple[str, tuple[int, int, int]]:
  """Name and levels of a colour for paper; light ones are more frequent."""
  name = draw_key(rng, _PAPERS)
  return name, draw_near(rng, name)


def draw_ink(rng: np.random.Generator, papers: Sequence[Sequence[float]], least: float = CONTRAST) -> tuple[str, tuple[int, int, int], float]:
  """Name, levels and contrast of a colour that can be read on each of some colours of paper: of those with a contrast of `least`, black and white as
  often as all others together; else the better of black and white."""
  behind = [luminance(paper) for paper in papers]
  worst = {name: min(_ratio(own, one) for one in behind) for name, own in _luminances().items()}
  fit = [name for name in RGB if worst[name] >= least + 0.5]  # room for the jitter
  plain = [name for name in fit if name in ("black", "white")]
  others = [name for name in fit if name not in plain]
  some = plain if plain and (not others or rng.random() < 0.5) else others
  name = some[rng.integers(len(some))] if some else max(("black", "white"), key=worst.get)
  rgb = draw_near(rng, name)
  ratio = min(_ratio(luminance(rgb), one) for one in behind)
  return (name, rgb, ratio) if ratio >= least else (name, RGB[name], worst[name])


def draw_near(rng: np.random.Generator, name: str) -> tuple[int, int, int]:
  """Levels of a colour, a little other than those of its name."""
  return tuple(min(255, max(0, level + change)) for level, change in zip(RGB[name], rng.integers(-_JITTER, _JITTER + 1, 3).tolist()))


@functools.cache
def grain() -> np.ndarray:
  """A tile of smooth noise, [GRAIN_PX, GRAIN_PX] uint8 about 128, the same in every process; its edges meet."""
  rng, side = np.random.default_rng(7), GRAIN_PX
  frequency, total = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]), np.zeros((side, side))
  for width, weight in ((0.25, 1.0), (0.02, 1.5)):
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * np.exp(-(frequency / width) ** 2), s=(side, side))
    total += weight * noise / noise.std()
  return (128.5 + np.clip(total / total.std(), -2.5, 2.5) * 127 / 2.5).astype(np.uint8)
