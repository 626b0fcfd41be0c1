"""Editing pairs of the embedded data set: a picture, an instruction, and the picture after it.

Source and target differ in one attribute (ink, paper, glyph or position). The instruction names the new value, some wordings the glyph too;
everything else has to be read from the source.

Held out as in `glyphs`: no training pair shows a held-out (glyph, ink, paper) triple on either side, and the target of every validation pair is
one. So a right edit is neither remembered nor guessed.
"""

import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from data_pipelines.embedded import glyphs
from data_pipelines.embedded.glyphs import Attributes
from data_pipelines.transforms import encode_png

CHOICES = {"ink": tuple(glyphs.INKS), "paper": tuple(glyphs.PAPERS), "glyph": glyphs.GLYPHS, "position": tuple(glyphs.POSITIONS)}
TEMPLATES = {
    "ink": ("make it {ink}", "change the ink to {ink}", "recolor the {glyph} in {ink}"),
    "paper": ("put it on {paper} paper", "change the paper to {paper}", "{paper} paper instead"),
    "glyph": ("replace it with {glyph}", "change the {old} to {glyph}", "draw {glyph} instead"),
    "position": ("move it to the {position}", "place the {glyph} at the {position}", "{position} instead"),
}
_FIRST_ID = {"train": 2**29, "validation": 2**30 + 2**29}


def instruction(source: Attributes, target: Attributes, change: str, template_index: int) -> str:
  """Returns the words of one template for a pair that differs in the attribute `change`."""
  values = dataclasses.asdict(target) | {"old": source.glyph}
  return TEMPLATES[change][template_index].format(**values)


def sample_pair(rng: np.random.Generator, split: str) -> tuple[Attributes, Attributes, str]:
  """Returns (source, target, the attribute in which they differ) of a split; source, attribute and new value are each drawn uniformly."""
  while True:
    source, change = glyphs.sample_attributes(rng), list(CHOICES)[rng.integers(len(CHOICES))]
    others = [value for value in CHOICES[change] if value != getattr(source, change)]
    target = dataclasses.replace(source, **{change: others[rng.integers(len(others))]})
    held_out = [glyphs.is_validation(a.glyph, a.ink, a.paper) for a in (source, target)]
    if held_out[1] if split == "validation" else not any(held_out):
      return source, target, change


def examples(split: str, num_examples: int | None, seed: int) -> Iterator[dict]:
  """Returns the pairs of a split in order: half as many as `glyphs.examples` gives pictures in training, as many in validation."""
  num = glyphs.num_records(split, num_examples) // (2 if split == "train" else 1)
  return (example(_FIRST_ID[split] + i, split, seed) for i in range(num))


def example(sample_id: int, split: str, seed: int) -> dict:
  """Returns one record, a function of (seed, sample_id) alone."""
  rng = np.random.default_rng((seed, sample_id))
  (source, target, change), (height, width) = sample_pair(rng, split), glyphs.sample_canvas(rng)
  captions = [instruction(source, target, change, i) for i in range(len(TEMPLATES[change]))]
  attributes = {"change": change, "source": dataclasses.asdict(source), "target": dataclasses.asdict(target)}
  return {"image": encode_png(glyphs.render(target, height, width)), "height": height, "width": width, "quality": 1.0, "sample_id": sample_id,
          "captions": captions, "languages": ["en"] * len(captions), "attributes": json.dumps(attributes),
          "sources": [encode_png(glyphs.render(source, height, width))], "source_height": [height], "source_width": [width]}


def held_out_edits(num: int, seed: int) -> list[tuple[str, Attributes, Attributes, int, int]]:
  """Returns `num` edits that no training pair shows: (instruction, source attributes, target attributes, height, width in px)."""
  edits = []
  for number in range(num):
    rng = np.random.default_rng((seed, 3, number))
    source, target, change = sample_pair(rng, "validation")
    edits.append((instruction(source, target, change, int(rng.integers(len(TEMPLATES[change])))), source, target, *glyphs.sample_canvas(rng)))
  return edits
