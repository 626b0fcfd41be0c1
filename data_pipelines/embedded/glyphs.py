"""The embedded data set: one letter, digit or shape on plain paper, with captions that fix every pixel.

A picture is drawn from its attributes alone: with the coverage m of the glyph (0 to 1 per pixel), ink colour c and
paper colour p,

  picture = m c + (1 - m) p                                                                                          (1)

so an image can be judged without a network: `score` finds the nearest of all clean renders. Expanding the squared
distance of an image x to (1) needs, per glyph, only the sums of m x, m^2 and m, whatever the number of colours:

  |x - m c - (1-m) p|^2 = |x|^2 - 2 c.Sum(m x) - 2 p.Sum((1-m) x)
                          + c.c Sum(m^2) + p.p Sum((1-m)^2) + 2 c.p Sum(m (1-m))                                     (2)

Held out: about a tenth of the (glyph, ink, paper) triples never occur in training, and all validation pictures show
these. A model that draws them right has learned what a glyph, an ink and a paper are, not a list of pictures.

A quarter of the training pictures is slightly spoiled and says so in `quality`; the captions do not mention it.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFilter

from data_pipelines.embedded import drawing
from data_pipelines.transforms import encode_png

# Few enough for two CPU cores to learn in minutes, and no two alike.
LETTERS = tuple("ABEHKMRSTXZ")
DIGITS = tuple("234579")
SHAPES = tuple(drawing.SHAPES)
GLYPHS = LETTERS + DIGITS + SHAPES

INKS = {"black": (20, 20, 20), "red": (215, 25, 30), "green": (20, 130, 50), "blue": (30, 60, 215),
        "purple": (135, 35, 165), "orange": (245, 125, 0)}
PAPERS = {"white": (255, 255, 255), "yellow": (255, 238, 95), "pink": (255, 195, 210), "cyan": (165, 240, 250),
          "lime": (200, 250, 150), "gray": (190, 190, 190)}

# Shares of the canvas' shorter side.
SIZES = {"medium": 0.6, "large": 0.8}
# (down, right)
POSITIONS = {"center": (0, 0), "top left": (-1, -1), "bottom right": (1, 1)}
CANVASES = ((96, 96), (64, 128), (128, 64))

NUM_TRAIN = 20000
_CAPTIONS_PER_RECORD = 4
_SPOILED_SHARE = 0.25
_FIRST_VALIDATION_ID = 2**30


@dataclasses.dataclass(frozen=True)
class Attributes:
  """What a picture shows."""

  glyph: str
  ink: str
  paper: str
  size: str = "medium"
  position: str = "center"


# Names in braces are always said; those ending in "_" stay unsaid at their default (medium, center).
TEMPLATES = (
    "a {size} {ink} {glyph} on {paper} paper, {where}",
    "{ink} {glyph} on {paper}{in_size_}{_where_}",
    "{paper} paper with a {size_}{ink} {glyph}, {where}",
    "{where}: {size} {ink} {glyph} on {paper}",
    "{glyph}, {ink}, {paper} paper{in_size_}{_where_}",
    "{glyph} in {ink}, {size}, {where}, on {paper}",
    "{paper} picture of {ink} {glyph}{in_size_}{_where_}",
    "draw a {size} {ink} {glyph} on {paper}, {where}",
)


def caption(attributes: Attributes, template_index: int) -> str:
  """Returns a caption in the words of one template. Equal captions mean equal attributes."""
  a = attributes
  where = "centered" if a.position == "center" else a.position
  return TEMPLATES[template_index].format(
      glyph=a.glyph, ink=a.ink, paper=a.paper, size=a.size, where=where, size_=f"{a.size} " if a.size != "medium" else "",
      in_size_=f", {a.size}" if a.size != "medium" else "", _where_=f", {where}" if a.position != "center" else "")


def is_validation(glyph: str, ink: str, paper: str) -> bool:
  """Returns whether a triple is held out of training: a stable tenth of them, the same in every version and seed."""
  return zlib.crc32(f"{glyph}|{ink}|{paper}".encode()) % 10 == 0


def sample_attributes(rng: np.random.Generator) -> Attributes:
  """Returns uniformly drawn attributes, of either split."""
  glyph = GLYPHS[rng.integers(len(GLYPHS))]
  ink, paper = list(INKS)[rng.integers(len(INKS))], list(PAPERS)[rng.integers(len(PAPERS))]
  size, position = list(SIZES)[rng.integers(len(SIZES))], list(POSITIONS)[rng.integers(len(POSITIONS))]
  return Attributes(glyph, ink, paper, size, position)


def _sample_of_split(rng: np.random.Generator, split: str) -> Attributes:
  while True:
    attributes = sample_attributes(rng)
    if is_validation(attributes.glyph, attributes.ink, attributes.paper) == (split == "validation"):
      return attributes


def render(attributes: Attributes, height: int, width: int) -> np.ndarray:
  """Returns the clean picture by equation (1), uint8 height width 3."""
  a = attributes
  mask = _mask(a.glyph, a.size, a.position, height, width)[..., None] / np.float32(255)
  ink, paper = np.array(INKS[a.ink], np.float32), np.array(PAPERS[a.paper], np.float32)
  return np.rint(paper + mask * (ink - paper)).astype(np.uint8)


@functools.lru_cache(maxsize=8192)
def _mask(glyph: str, size: str, position: str, height: int, width: int) -> np.ndarray:
  """Returns the coverage of a glyph, uint8 height width; 255 is ink."""
  down, right = POSITIONS[position]
  return drawing.draw_mask(glyph, SIZES[size] * min(height, width), down, right, height, width)


def score(image: np.ndarray, attributes: Attributes) -> dict[str, bool]:
  """Returns whether the picture shows the asked glyph, ink and paper: {"glyph": bool, "ink": bool, "paper": bool}.

  The nearest by equation (2) of all clean renders (glyph x ink x paper) at the asked size and position is what
  the picture shows. `image` is uint8 H W 3 of any size with the aspect ratio of the canvas.
  """
  a, (height, width) = attributes, image.shape[:2]
  masks, moments = _all_masks(a.size, a.position, height, width)
  x = image.reshape(-1, 3).astype(np.float32) / 255
  ink, paper = (np.array(list(colours.values())) / 255 for colours in (INKS, PAPERS))
  covered = masks @ x  # G 3
  rest = x.sum(0, dtype=np.float64) - covered
  m2, r2, mr = (moment[:, None, None] for moment in moments)
  distance = (
      -2 * (covered @ ink.T)[:, :, None] - 2 * (rest @ paper.T)[:, None, :] + m2 * (ink**2).sum(1)[:, None]
      + r2 * (paper**2).sum(1) + 2 * mr * (ink @ paper.T))  # G I P
  glyph, i, p = np.unravel_index(np.argmin(distance), distance.shape)
  return {"glyph": GLYPHS[glyph] == a.glyph, "ink": list(INKS)[i] == a.ink, "paper": list(PAPERS)[p] == a.paper}


@functools.lru_cache(maxsize=256)
def _all_masks(size: str, position: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (masks of all glyphs G H*W float32 in 0..1, their sums of m^2, (1-m)^2 and m (1-m), 3 G float64)."""
  masks = np.stack([_mask(glyph, size, position, height, width).reshape(-1) for glyph in GLYPHS]).astype(np.float32) / 255
  m = masks.astype(np.float64)
  return masks, np.stack([(m * m).sum(1), ((1 - m) ** 2).sum(1), (m * (1 - m)).sum(1)])


def held_out_prompts(num: int, seed: int) -> list[tuple[str, Attributes, int, int]]:
  """Returns `num` prompts no training picture answers: (caption, attributes, height, width in px)."""
  prompts = []
  for number in range(num):
    rng = np.random.default_rng((seed, 2, number))
    attributes = _sample_of_split(rng, "validation")
    height, width = sample_canvas(rng)
    prompts.append((caption(attributes, int(rng.integers(len(TEMPLATES)))), attributes, height, width))
  return prompts


def sample_canvas(rng: np.random.Generator) -> tuple[int, int]:
  """Returns (height, width) in px: square in half of the cases."""
  return CANVASES[rng.choice(3, p=(0.5, 0.25, 0.25))]


def num_records(split: str, num_examples: int | None) -> int:
  """Returns the number of pictures of a split; `num_examples` counts training, validation has a 25th of it."""
  num_train = NUM_TRAIN if num_examples is None else num_examples
  return num_train if split == "train" else max(1, num_train // 25)


def examples(split: str, num_examples: int | None, seed: int) -> Iterator[dict]:
  """Returns the records of a split in order, as many as `num_records` says."""
  first = 0 if split == "train" else _FIRST_VALIDATION_ID
  return (example(first + i, seed) for i in range(num_records(split, num_examples)))


def example(sample_id: int, seed: int) -> dict:
  """Returns one record, a function of (seed, sample_id) alone. Ids from 2^30 on are validation."""
  split = "validation" if sample_id >= _FIRST_VALIDATION_ID else "train"
  rng = np.random.default_rng((seed, sample_id))
  attributes, (height, width) = _sample_of_split(rng, split), sample_canvas(rng)
  image, quality = render(attributes, height, width), 1.0
  if split == "train" and rng.random() < _SPOILED_SHARE:
    image, quality = _spoil(image, rng)
  templates = rng.permutation(len(TEMPLATES))[:_CAPTIONS_PER_RECORD]
  captions = [caption(attributes, int(i)) for i in templates]
  return {"image": encode_png(image), "height": height, "width": width, "quality": quality, "sample_id": sample_id,
          "captions": captions, "languages": ["en"] * len(captions),
          "attributes": json.dumps(dataclasses.asdict(attributes))}


def _spoil(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
  """Returns (the picture with one slight fault, its quality: 0.9 for the faintest to 0.3 for the strongest)."""
  strength, kind = rng.random(), rng.integers(4)
  if kind == 0:
    noisy = image + rng.normal(0, 6 + 24 * strength, image.shape)
    spoiled = np.clip(np.rint(noisy), 0, 255)
  elif kind == 1:
    spoiled = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.6 + 1.2 * strength))
  elif kind == 2:
    spoiled = np.rint(image.mean((0, 1)) + (image - image.mean((0, 1))) * (0.85 - 0.4 * strength))
  else:
    # The corner pixel is paper, which fills what the shift uncovers.
    spoiled = np.full_like(image, image[0, 0])
    down, right = rng.integers(1, 3 + int(3 * strength), 2)
    spoiled[down:, right:] = image[:-down, :-right]
  return np.asarray(spoiled).astype(np.uint8), float(np.float32(0.9 - 0.6 * strength))
