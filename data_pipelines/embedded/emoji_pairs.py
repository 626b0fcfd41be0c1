"""Editing pairs of the emoji data set: the same emoji in another skin tone, gender or direction.

CLDR's English names say which emoji belong together: names that become each other by changing the tone ("waving hand: dark skin tone"), the
gender ("man detective", "woman detective") or the direction ("backhand index pointing left") are a pair, and the instruction names the new
value. Both pictures of a pair are on the same paper, and a paper that is held out for either emoji in the
text-to-image records is held out here too.

Left out: instructions in other languages, for which CLDR has no words, and pairs that the font does not draw; `describe` counts these.
"""

import functools
import json
import os
import re
import zlib
from collections.abc import Iterator

import numpy as np

from data_pipelines.embedded import emoji
from data_pipelines.transforms import encode_png

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
DIRECTIONS = ("left", "right", "up", "down")
GENDERS = {"man": "woman", "men": "women", "boy": "girl", "boys": "girls"}
TEMPLATES = {
    "skin tone": ("change the skin tone to {value}", "make the skin tone {value}", "with {value} skin tone instead"),
    "gender": ("make it a {value}", "show a {value} instead", "change the person to a {value}"),
    "direction": ("turn it {value}", "make it point {value}", "let it face {value}"),
}
_FIRST_ID = 2**26  # above every text-to-image id


@functools.cache
def _names() -> dict[str, str]:
  """Returns English name -> emoji, sequences included."""
  path = os.path.join(os.path.dirname(emoji.find_files()[1]), "annotationsDerived", "en.xml")
  if not os.path.isfile(path):
    raise ValueError(f"{path} is missing: reinstall the Debian package unicode-cldr-core.")
  names = {name: character for character, (name, _) in emoji.annotations()["en"].items()}
  return names | {name: character for character, (name, _) in emoji.read_annotations(path).items()}


def _variants(name: str) -> Iterator[tuple[str, str, str]]:
  """Yields (name, what changes, its new value) of every emoji that `name` may become."""
  base, _, tone = name.removesuffix(" skin tone").partition(": ")
  if name.endswith(" skin tone") and tone in TONES:
    yield from ((f"{base}: {other} skin tone", "skin tone", other) for other in TONES if other != tone)
  elif ":" not in name:
    yield from ((f"{name}: {tone} skin tone", "skin tone", tone) for tone in TONES)
  for old, new in (*GENDERS.items(), *((b, a) for a, b in GENDERS.items())):
    if re.search(rf"\b{old}\b", base):
      yield re.sub(rf"\b{old}\b", new, name), "gender", {"men": "man", "women": "woman", "boys": "boy", "girls": "girl"}.get(new, new)
  for old in DIRECTIONS:
    if re.search(rf"\b{old}\b", base):
      yield from ((re.sub(rf"\b{old}\b", new, name), "direction", new) for new in DIRECTIONS if new != old)


@functools.cache
def _pairs() -> tuple[tuple[tuple[str, str, str, str], ...], int]:
  """Returns (all drawn pairs as (source, target, what changes, new value), the number of pairs that the font does not draw)."""
  names = _names()
  pairs = [(names[name], names[other], change, value) for name in sorted(names) for other, change, value in _variants(name) if other in names]
  drawn = tuple(pair for pair in pairs if emoji.draw(pair[0]) and emoji.draw(pair[1]))
  return drawn, len(pairs) - len(drawn)


def list_pairs(split: str) -> list[tuple[str, str, str, str, int]]:
  """Returns (source, target, what changes, new value, place in PAPERS) of each record of a split, one paper per pair.

  A pair belongs to validation if its target's held-out paper exists and a stable fifth of the pairs is drawn; else it is training, on a
  paper held out for neither of its emoji.
  """
  rows = []
  for source, target, change, value in _pairs()[0]:
    draw_number = zlib.crc32(f"{source}>{target}".encode())
    held_out = emoji.held_out_paper(source), emoji.held_out_paper(target)
    if draw_number % 5 == 0 and held_out[1] < len(emoji.PAPERS):
      paper, where = held_out[1], "validation"
    else:
      free = [paper for paper in range(len(emoji.PAPERS)) if paper not in held_out]
      paper, where = free[draw_number // 5 % len(free)], "train"
    if where == split:
      rows.append((source, target, change, value, paper))
  return rows


def examples(split: str, num_examples: int | None, seed: int) -> Iterator[dict]:
  """Returns the pairs of a split: all, or half of `num_examples` in training and an eighteenth of it in validation."""
  rows = list_pairs(split)
  if num_examples is not None:
    num = min(len(rows), num_examples // (2 if split == "train" else 18))
    rows = [rows[i] for i in np.sort(np.random.default_rng((seed, 5)).permutation(len(rows))[:num])]
  return (example(*row) for row in rows)


def example(source: str, target: str, change: str, value: str, paper_index: int) -> dict:
  """Returns one record; its id is a stable hash of the pair and the paper."""
  paper = list(emoji.PAPERS)[paper_index]
  captions = [template.format(value=value) for template in TEMPLATES[change]]
  pictures = [encode_png(emoji.render(character, paper)) for character in (source, target)]
  side = emoji.SIDE_PX
  return {"image": pictures[1], "height": side, "width": side, "quality": 1.0,
          "sample_id": _FIRST_ID + zlib.crc32(f"{source}>{target}|{paper}".encode()) % 2**30,
          "captions": captions, "languages": ["en"] * len(captions),
          "attributes": json.dumps({"change": change, "source": source, "target": target, "paper": paper}, ensure_ascii=False),
          "sources": [pictures[0]], "source_height": [side], "source_width": [side]}


def held_out_edits(num: int, seed: int) -> list[tuple[str, str, str, str, tuple[str, ...]]]:
  """Returns `num` edits that training does not show: (instruction, source, target, paper, candidates).

  The candidates are the source and every emoji that any instruction could turn it into, the target among them. Raises `ValueError` if there
  are fewer edits.
  """
  rows = list_pairs("validation")
  if num > len(rows):
    raise ValueError(f"There are {len(rows)} held-out emoji edits, fewer than {num}: ask for fewer.")
  edits = []
  for i in np.random.default_rng((seed, 6)).permutation(len(rows))[:num]:
    source, target, change, value, paper = rows[i]
    candidates = dict.fromkeys((source, *(other for start, other, _, _ in _pairs()[0] if start == source)))
    edits.append((TEMPLATES[change][0].format(value=value), source, target, list(emoji.PAPERS)[paper], tuple(candidates)))
  return edits


def describe() -> dict[str, int]:
  """Returns the counts of `emoji.describe`, and of pairs by what changes and of pairs that the font does not draw."""
  drawn, skipped = _pairs()
  kinds = [change for _, _, change, _ in drawn]
  return emoji.describe() | {f"pairs_{change.replace(' ', '_')}": kinds.count(change) for change in TEMPLATES} | {"skipped_pairs": skipped}
