"""Captions fix the picture, the split is clean, and the score can tell right from wrong."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines.embedded import glyph_edits, glyphs
from data_pipelines.embedded.glyphs import Attributes
from data_pipelines.transforms import decode_image


def all_attributes():
  for values in itertools.product(glyphs.GLYPHS, glyphs.INKS, glyphs.PAPERS, glyphs.SIZES, glyphs.POSITIONS):
    yield Attributes(*values)


def random_attributes(num, seed=0):
  rng = np.random.default_rng(seed)
  return [glyphs.sample_attributes(rng) for _ in range(num)]


def test_distinct_attributes_have_distinct_captions():
  meaning = {}
  for attributes in all_attributes():
    for template in range(len(glyphs.TEMPLATES)):
      assert meaning.setdefault(glyphs.caption(attributes, template), attributes) == attributes
  # The eight wordings differ from each other as well.
  assert len(meaning) == 8 * len(set(meaning.values())) == 8 * 25 * 6 * 6 * 2 * 3


def test_captions_are_tidy():
  for attributes in random_attributes(200):
    for template in range(len(glyphs.TEMPLATES)):
      text = glyphs.caption(attributes, template)
      assert "  " not in text and " ," not in text and text == text.strip() and "{" not in text


def test_renders_are_distinct_and_inside_the_canvas():
  for height, width in glyphs.CANVASES:
    for size, position in itertools.product(glyphs.SIZES, glyphs.POSITIONS):
      seen = set()
      for glyph in glyphs.GLYPHS:
        image = glyphs.render(Attributes(glyph, "black", "white", size, position), height, width)
        assert image.shape == (height, width, 3) and image.dtype == np.uint8
        edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (edge == 255).all() and image.min() < 60
        seen.add(image.tobytes())
      assert len(seen) == len(glyphs.GLYPHS)


def test_position_is_where_the_ink_is():
  for position, (down, right) in glyphs.POSITIONS.items():
    ink = glyphs.render(Attributes("W", "black", "white", "medium", position), 64, 128)[..., 0] < 128
    rows, columns = np.nonzero(ink)
    assert np.sign(np.round(rows.mean() - 31.5, -1)) == down and np.sign(np.round(columns.mean() - 63.5, -1)) == right


def test_inks_and_papers_share_no_name_or_colour():
  assert not set(glyphs.INKS) & set(glyphs.PAPERS)
  for ink, paper in itertools.product(glyphs.INKS.values(), glyphs.PAPERS.values()):
    assert np.linalg.norm(np.subtract(ink, paper)) > 80


@pytest.mark.parametrize("canvas,size", [((96, 96), (64, 64)), ((64, 128), (48, 96)), ((128, 64), (128, 64))])
def test_clean_pictures_score_right_after_a_resize(canvas, size):
  right = 0
  for attributes in random_attributes(300):
    image = Image.fromarray(glyphs.render(attributes, *canvas)).resize(size[::-1], Image.Resampling.LANCZOS)
    right += all(glyphs.score(np.array(image), attributes).values())
  assert right > 0.99 * 300


def test_score_equals_a_brute_force_search():
  rng = np.random.default_rng(0)
  for attributes in random_attributes(4):
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    distance = {}
    for glyph, ink, paper in itertools.product(glyphs.GLYPHS, glyphs.INKS, glyphs.PAPERS):
      clean = glyphs.render(Attributes(glyph, ink, paper, attributes.size, attributes.position), 32, 32)
      distance[glyph, ink, paper] = ((image.astype(float) - clean) ** 2).sum()
    glyph, ink, paper = min(distance, key=distance.get)
    assert all(glyphs.score(image, dataclasses.replace(attributes, glyph=glyph, ink=ink, paper=paper)).values())


@pytest.mark.parametrize("change", ["glyph", "ink", "paper"])
def test_wrong_pictures_score_wrong(change):
  other = {"glyph": "B", "ink": "green", "paper": "pink"}[change]
  asked = Attributes("E", "blue", "white")
  shown = glyphs.render(dataclasses.replace(asked, **{change: other}), 64, 64)
  assert glyphs.score(shown, asked) == {"glyph": True, "ink": True, "paper": True} | {change: False}


def test_a_misplaced_glyph_and_plain_noise_do_not_pass():
  asked = Attributes("E", "blue", "white", "medium", "top left")
  shown = glyphs.render(dataclasses.replace(asked, position="bottom right"), 64, 64)
  assert not all(glyphs.score(shown, asked).values())
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  assert sum(all(glyphs.score(noise, attributes).values()) for attributes in random_attributes(200)) < 5


def test_splits_share_no_triple():
  triples = collections.defaultdict(set)
  for split in ("train", "validation"):
    for record in glyphs.examples(split, 500, seed=0):
      a = Attributes(**json.loads(record["attributes"]))
      triples[split].add((a.glyph, a.ink, a.paper))
      assert glyphs.is_validation(a.glyph, a.ink, a.paper) == (split == "validation")
  assert triples["train"] and triples["validation"] and not triples["train"] & triples["validation"]
  share = np.mean([glyphs.is_validation(*t) for t in itertools.product(glyphs.GLYPHS, glyphs.INKS, glyphs.PAPERS)])
  assert 0.08 < share < 0.12


def test_each_example_is_a_function_of_seed_and_id():
  many = list(glyphs.examples("train", 40, seed=3))
  assert many[7] == glyphs.example(7, seed=3) == list(glyphs.examples("train", 8, seed=3))[7]
  assert many[7]["image"] != glyphs.example(7, seed=4)["image"]


def test_clean_examples_are_the_render_and_spoiled_ones_say_so():
  records = list(glyphs.examples("train", 200, seed=0))
  for record in records + list(glyphs.examples("validation", 200, seed=0)):
    attributes = Attributes(**json.loads(record["attributes"]))
    clean = glyphs.render(attributes, record["height"], record["width"])
    assert (decode_image(record["image"]) == clean).all() == (record["quality"] == 1.0)
    assert all(text in {glyphs.caption(attributes, i) for i in range(len(glyphs.TEMPLATES))} for text in record["captions"])
  assert 0.15 < np.mean([record["quality"] < 1 for record in records]) < 0.35
  assert min(record["quality"] for record in records) >= 0.3


def test_held_out_prompts_come_from_validation():
  prompts = glyphs.held_out_prompts(50, seed=1)
  assert prompts == glyphs.held_out_prompts(60, seed=1)[:50] != glyphs.held_out_prompts(50, seed=2)
  for text, a, height, width in prompts:
    assert glyphs.is_validation(a.glyph, a.ink, a.paper) and (height, width) in glyphs.CANVASES
    assert text in [glyphs.caption(a, i) for i in range(len(glyphs.TEMPLATES))]


# Editing pairs.


@pytest.mark.parametrize("split", ["train", "validation"])
def test_pairs_differ_in_the_one_attribute_that_is_named(split):
  seen = collections.Counter()
  for record in glyph_edits.examples(split, 400 if split == "train" else 5000, seed=0):
    about = json.loads(record["attributes"])
    source, target = Attributes(**about["source"]), Attributes(**about["target"])
    assert [f.name for f in dataclasses.fields(Attributes) if getattr(source, f.name) != getattr(target, f.name)] == [about["change"]]
    assert (decode_image(record["image"]) == glyphs.render(target, record["height"], record["width"])).all()
    assert (decode_image(record["sources"][0]) == glyphs.render(source, record["source_height"][0], record["source_width"][0])).all()
    assert all(str(getattr(target, about["change"])) in caption and "{" not in caption for caption in record["captions"])
    assert glyphs.is_validation(target.glyph, target.ink, target.paper) == (split == "validation")
    assert split == "validation" or not glyphs.is_validation(source.glyph, source.ink, source.paper)
    seen[about["change"]] += 1
  assert len(seen) == 4 and min(seen.values()) > 0.15 * seen.total()


def test_ids_of_pairs_meet_no_other():
  ids = [record["sample_id"] for split in ("train", "validation") for part in (glyphs, glyph_edits) for record in part.examples(split, 60, 0)]
  assert len(set(ids)) == len(ids) == 60 + 30 + 2 + 2 and max(ids) < 2**31


def test_held_out_edits_come_from_validation():
  edits = glyph_edits.held_out_edits(30, seed=1)
  assert edits == glyph_edits.held_out_edits(40, seed=1)[:30] != glyph_edits.held_out_edits(30, seed=2)
  for text, source, target, height, width in edits:
    assert glyphs.is_validation(target.glyph, target.ink, target.paper) and (height, width) in glyphs.CANVASES
    changed = [name for name in glyph_edits.CHOICES if getattr(source, name) != getattr(target, name)]
    assert len(changed) == 1 and str(getattr(target, changed[0])) in text
