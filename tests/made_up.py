"""Mixtures of made-up data sets: indices without records, drawn by hand or at random, for tests of the order of batches."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import strategies as st

from data_pipelines import mixture as mixtures
from data_pipelines.buckets import bucket_size
from data_pipelines.mixture import Mixture
from data_pipelines.records import KINDS
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.tokenizer import train_tokenizer

LANGUAGES = ("de", "en", "zh")
TOKENIZER = train_tokenizer(["a red ball", "make it blue"], 300)


def make_index(rng, num, edits=0.0, known_tokenizer=True):
  """An index as `open_split` gives it, of records that are nowhere."""
  num_captions = np.where(rng.random(num) < 0.1, 0, rng.integers(1, 5, num))
  num_sources = np.where(rng.random(num) < edits, rng.choice([1, 1, 1, 2], num), 0)
  sides = np.rint(100 * np.exp(rng.uniform(-0.7, 0.7, (num, 3, 2)))).astype(np.int32)  # ratios from 1:4 to 4:1, most of them tame
  source_sizes = sides[:, 1:] * (np.arange(2) < num_sources[:, None])[..., None]
  total = int(num_captions.sum())
  return {"height": sides[:, 0, 0], "width": sides[:, 0, 1], "quality": rng.choice([0.2, 0.5, 1.0], num, p=(0.1, 0.1, 0.8)).astype(np.float32),
          "sample_id": rng.permutation(10 * num)[:num].astype(np.int64), "stage": rng.choice([2, 4, 6], num, p=(0.1, 0.1, 0.8)).astype(np.uint8),
          "has_text": np.zeros(num, bool), "source_sizes": source_sizes.astype(np.int32), "num_captions": num_captions.astype(np.int32),
          "caption_language": rng.integers(0, 3, total).astype(np.uint16), "language_names": np.array(LANGUAGES),
          "caption_kind": rng.integers(0, 4, total).astype(np.uint8), "caption_tokens": rng.integers(20, 67, total).astype(np.int32),
          "tokenizer": np.array(TOKENIZER.fingerprint if known_tokenizer else "another")}


def plain_index(sizes, tokens=30, **columns):
  """An index of good records of (height, width) px with one English caption each."""
  num = len(sizes)
  one = make_index(np.random.default_rng(0), num)
  return one | {"height": np.array(sizes)[:, 0], "width": np.array(sizes)[:, 1], "quality": np.ones(num, np.float32),
                "sample_id": np.arange(num, dtype=np.int64), "stage": np.full(num, 6, np.uint8), "source_sizes": np.zeros((num, 0, 2), np.int32),
                "num_captions": np.ones(num, np.int32), "caption_language": np.ones(num, np.uint16), "caption_kind": np.zeros(num, np.uint8),
                "caption_tokens": np.broadcast_to(np.array(tokens, np.int32), num)} | columns


@dataclasses.dataclass(frozen=True)
class World:
  """A mixture to be made, and the indices of its data sets by name."""
  specs: tuple
  resolutions: tuple
  indices: dict
  options: dict

  def build(self, cls=Mixture, **more):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(mixtures, "open_dataset", lambda spec: (None, self.indices[spec.name], None, ()))
      return cls(self.specs, self.resolutions, tokenizer=TOKENIZER, **(dict(num_tokens=64, seed=0) | self.options | more))


def world_of(index, resolutions=(Resolution(64, 4, ("1:1",)),), max_crop=0.2, spec=None, **options):
  return World((DatasetSpec("", "d0", **(spec or {})),), tuple(resolutions), {"d0": index}, dict(options, max_crop=max_crop))


@st.composite
def worlds(draw):
  """Up to three data sets, up to two resolutions, everything else as it comes."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  weights = st.sampled_from([0.1, 0.25, 1.0, 1.5, 3.0])
  kinds = st.one_of(st.just({}), st.dictionaries(st.sampled_from(KINDS), st.sampled_from([0.0, 0.5, 2.0]), min_size=3))
  specs, indices = [], {}
  for d in range(draw(st.integers(1, 3))):
    task = draw(st.sampled_from(["t2i", "ti2i"]))
    specs.append(DatasetSpec("", f"d{d}", "train", draw(weights), task, draw(st.sampled_from([0.0, 0.5, 0.6])), draw(st.integers(0, 4)),
                             draw(st.sampled_from([(), (), ("en", "de"), ("zh",)])), draw(kinds)))
    indices[f"d{d}"] = make_index(rng, draw(st.integers(3, 250)), draw(st.sampled_from([0.3, 1.0] if task == "ti2i" else [0.0, 0.3])),
                                  draw(st.sampled_from([True, True, False])))
  resolutions = []
  for base_px in draw(st.sampled_from([(64,), (128,), (96, 128), (64, 64)])):
    others = draw(st.lists(st.sampled_from(("3:2", "2:3", "2:1", "1:2", "3:1", "1:3")), max_size=4, unique=True))
    ratios = (*others, draw(st.sampled_from(["1:1", "1:1", "5:4"])))
    resolutions.append(Resolution(base_px, draw(st.sampled_from([4, 8, 12])), ratios, draw(weights), draw(st.sampled_from([16, 32])),
                                  tuple(draw(weights) for _ in ratios) if draw(st.booleans()) else ()))
  options = dict(num_tokens=64, seed=draw(st.integers(0, 2**31)), max_crop=draw(st.sampled_from([0.15, 0.3, 0.6])),
                 prompt_classes=draw(st.sampled_from([(), (30,), (24, 40, 64)])), min_bucket_records=draw(st.sampled_from([0, 1, 5, 15])),
                 truncate=draw(st.booleans()))
  return World(tuple(specs), tuple(resolutions), indices, options)


# ---- what becomes of a record, told record by record ------------------------------------------------


def crop(height, width, to_height, to_width):
  change = width * to_height / (height * to_width)
  return 1 - min(change, 1 / change)


def nearest(height, width, sizes):
  return min(sizes, key=lambda size: round(abs(math.log(width / height) - math.log(size[1] / size[0])), 9))


def caption_lengths(world, spec, i):
  """Lengths of the usable captions of record i, by the rules."""
  index = world.indices[spec.name]
  first, found = int(index["num_captions"][:i].sum()), []
  for j in range(first, first + int(index["num_captions"][i])):
    language, kind = LANGUAGES[index["caption_language"][j]], KINDS[index["caption_kind"][j]]
    if (not spec.languages or language in spec.languages) and (not spec.caption_weights or spec.caption_weights.get(kind, 0) > 0):
      most, length = world.options["num_tokens"], int(index["caption_tokens"][j])
      known = index["tokenizer"] == TOKENIZER.fingerprint
      found.append(most if not known or length > most and world.options.get("truncate") else length)
  return found


def source_sizes_of(world, spec, i):
  return [tuple(map(int, size)) for size in world.indices[spec.name]["source_sizes"][i] if size[0]]


def fate(world, spec, resolution, i):
  """Why record i is left out before any merging, "" if it is not, None if it is of another task."""
  index, lengths, sources = world.indices[spec.name], caption_lengths(world, spec, i), source_sizes_of(world, spec, i)
  if bool(sources) != (spec.task == "ti2i"):
    return None
  height, width = int(index["height"][i]), int(index["width"][i])
  targets = [bucket_size(resolution.base_px, ratio, resolution.multiple) for ratio in resolution.ratios]
  lost = crop(height, width, *nearest(height, width, targets))
  tests = {"low_quality": float(index["quality"][i]) < float(np.float32(spec.min_quality)), "low_stage": index["stage"][i] < spec.min_stage,
           "no_caption": not lengths, "too_long": max(lengths, default=0) > world.options["num_tokens"],
           "cropped": lost > world.options["max_crop"]}
  return next((name for name, test in tests.items() if test), "")


def usable(world, spec, resolution):
  return [i for i in range(len(world.indices[spec.name]["height"])) if fate(world, spec, resolution, i) == ""]
