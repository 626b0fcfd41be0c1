"""Emoji are drawn once each, named in many languages and split by combination."""

import json

import numpy as np
import pytest
from marks import needs_emoji
from PIL import Image

from data_pipelines import embedded, records
from data_pipelines.arrangement import usable_captions
from data_pipelines.embedded import emoji, emoji_pairs
from data_pipelines.specs import DatasetSpec
from data_pipelines.transforms import decode_image

pytestmark = pytest.mark.apart("emoji")  # one process lists and draws them all


def test_missing_packages_are_named(monkeypatch, tmp_path):
  monkeypatch.setattr(emoji, "FONT", str(tmp_path / "none.ttf"))
  with pytest.raises(ValueError, match="apt-get install fonts-noto-color-emoji unicode-cldr-core"):
    emoji.find_files()


@pytest.mark.slow
@needs_emoji
def test_every_emoji_is_one_drawn_character():
  characters, facts = emoji.list_emoji(), emoji.describe()
  assert len(set(characters)) == len(characters) == facts["emoji"] > 1000 and facts["languages"] > 90
  assert facts["skipped_sequences"] > 0 and facts["skipped_not_in_font"] > 0
  assert all(len(character) == 1 for character in characters)
  with pytest.raises(ValueError, match="does not draw"):
    emoji.render("\U0010ffff", "white")


@needs_emoji
def test_pictures_are_centred_on_their_paper():
  image = emoji.render("🦊", "light blue")
  assert image.shape == (96, 96, 3)
  paper = np.array(emoji.PAPERS["light blue"])
  assert all((edge == paper).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1]))
  rows, columns = np.nonzero((image != paper).any(2))
  assert abs(rows.min() + rows.max() - 95) <= 2 and abs(columns.min() + columns.max() - 95) <= 2


@needs_emoji
def test_captions_name_emoji_and_paper_in_every_language():
  texts, languages = emoji.captions("🦊", "pink")
  assert texts[0] == "fox, on pink paper" and languages[0] == "en" and texts[1].startswith("fox: ")
  named = dict(zip(languages[::-1], texts[::-1]))
  assert named["fr"] == "renard, on pink paper" and named["zh"] == "狐狸, on pink paper"
  assert len(texts) == len(languages) and all(text.endswith(", on pink paper") for text in texts)


@needs_emoji
def test_splits_share_emoji_but_no_picture():
  train, validation = emoji.combinations("train"), emoji.combinations("validation")
  assert not set(train) & set(validation)
  assert len(train) + len(validation) == len(emoji.list_emoji()) * len(emoji.PAPERS)
  assert {character for character, _ in validation} <= {character for character, _ in train}
  assert 0.08 < len(validation) / (len(train) + len(validation)) < 0.12


@needs_emoji
def test_the_asked_emoji_is_the_nearest_at_another_size():
  candidates = emoji.list_emoji()[::40]
  for i, character in enumerate(candidates):
    small = Image.fromarray(emoji.render(character, "pink")).resize((64, 64), Image.Resampling.LANCZOS)
    assert emoji.nearest_emoji(np.array(small), candidates, "pink") == i


@needs_emoji
def test_a_small_set_is_prepared(tmp_path):
  facts = embedded.prepare("emoji", tmp_path, num_examples=18, vocab_size=600)
  assert (facts["train"], facts["train_edits"], facts["validation_edits"]) == (27, 9, 1)
  assert facts["validation"] - 1 == len(emoji.combinations("validation", 18, 0)) in (2, 3, 4)
  assert facts["pairs_skin_tone"] > 1000
  source, index = records.open_split(tmp_path, "emoji", "train")
  assert len(set(index["sample_id"].tolist())) == 27
  attributes = json.loads(source[3]["attributes"])
  assert source[3]["sample_id"] == ord(attributes["emoji"]) * 8 + list(emoji.PAPERS).index(attributes["paper"])
  english, none = (usable_captions(index, DatasetSpec(str(tmp_path), "emoji", languages=(name,))) for name in ("en", "xx"))
  owner = np.repeat(np.arange(27), index["num_captions"])
  assert set(owner[english]) == set(range(27)) and 0 < english.sum() < len(english) and not none.any()


@needs_emoji
def test_a_part_has_whole_emoji_and_its_own_held_out_prompts():
  train, validation = (emoji.combinations(split, 500, seed=2) for split in records.SPLITS)
  kept = {character for character, _ in train}
  assert len(train) == 500 and 80 < len(kept) < 100 and {character for character, _ in validation} <= kept
  full = emoji.combinations("train")
  assert set(train) <= set(full) and sum(character in kept for character, _ in full) - 500 < 6
  prompts = emoji.held_out_prompts(30, 1, 500, 2)
  assert {(character, list(emoji.PAPERS).index(paper)) for _, character, paper in prompts} <= set(validation)


@needs_emoji
def test_too_many_examples_are_refused(tmp_path):
  with pytest.raises(ValueError, match="fewer than num_examples=1000000"):
    embedded.prepare("emoji", tmp_path, num_examples=10**6)


@needs_emoji
def test_held_out_prompts_are_of_different_emoji():
  prompts = emoji.held_out_prompts(100, seed=1)
  assert prompts == emoji.held_out_prompts(120, seed=1)[:100] != emoji.held_out_prompts(100, seed=2)
  assert len({character for _, character, _ in prompts}) == 100
  held_out = {(character, list(emoji.PAPERS)[paper]) for character, paper in emoji.combinations("validation")}
  assert all((character, paper) in held_out and caption == emoji.captions(character, paper)[0][0] for caption, character, paper in prompts)
  with pytest.raises(ValueError, match="fewer than 5000"):
    emoji.held_out_prompts(5000, seed=0)


# Editing pairs.


@needs_emoji
def test_pairs_change_tone_gender_or_direction():
  pairs = {pair[:2]: pair[2:4] for split in records.SPLITS for pair in emoji_pairs.list_pairs(split)}
  assert pairs["👋", "👋🏿"] == ("skin tone", "dark") and pairs["👋🏿", "👋🏻"] == ("skin tone", "light")
  assert pairs["👈", "👉"] == ("direction", "right") and pairs["👦", "👧"] == ("gender", "girl") and pairs["👩‍🚒", "👨‍🚒"] == ("gender", "man")
  assert ("👋🏿", "👋") not in pairs  # no tone is named for a yellow hand
  assert {change for change, _ in pairs.values()} == {"skin tone", "gender", "direction"}


@needs_emoji
def test_sequences_are_drawn_as_one_picture_and_differ():
  pictures = [emoji.render(sequence, "white") for sequence in ("👋", "👋🏻", "👋🏿", "👩‍🚒", "👨‍🚒")]
  for i, one in enumerate(pictures):
    assert one.shape == (96, 96, 3) and all((one != other).any() for other in pictures[:i])
  # The same hand in two tones: the outline agrees, the colour does not.
  light, dark = pictures[1].astype(int), pictures[2].astype(int)
  shape = [(picture < 250).any(2) for picture in (light, dark)]
  assert (shape[0] == shape[1]).mean() > 0.97 and dark[shape[1]].mean() < light[shape[0]].mean() - 50
  assert emoji.draw("\U0010ffff\u200d👋") is None


@needs_emoji
def test_no_pair_shows_a_held_out_paper_in_training():
  train, validation = (emoji_pairs.list_pairs(split) for split in records.SPLITS)
  assert len(train) > 4 * len(validation) > 400
  assert all(paper not in (emoji.held_out_paper(source), emoji.held_out_paper(target)) for source, target, _, _, paper in train)
  assert all(paper == emoji.held_out_paper(target) for _, target, _, _, paper in validation)
  assert not {row[:2] for row in train} & {row[:2] for row in validation}
  ids = [record["sample_id"] for split in records.SPLITS for record in emoji_pairs.examples(split, 400, 0)]
  assert len(set(ids)) == len(ids) and max(ids) < 2**31


@needs_emoji
def test_a_pair_lies_on_one_paper_and_says_what_changes():
  record = emoji_pairs.example("👋", "👋🏿", "skin tone", "dark", list(emoji.PAPERS).index("pink"))
  source, target = decode_image(record["sources"][0]), decode_image(record["image"])
  assert (source[0, 0] == emoji.PAPERS["pink"]).all() and (target[0, 0] == source[0, 0]).all() and (source != target).any()
  assert record["captions"][0] == "change the skin tone to dark" and record["source_height"] == [96]


@needs_emoji
def test_held_out_edits_bring_their_candidates():
  edits = emoji_pairs.held_out_edits(40, seed=1)
  assert edits == emoji_pairs.held_out_edits(50, seed=1)[:40]
  for i, (text, source, target, paper, candidates) in enumerate(edits):
    assert source in candidates and target in candidates and len(set(candidates)) == len(candidates) >= 2 and text
    right = emoji.render(target, paper, 64)
    assert candidates[emoji.nearest_emoji(right, candidates, paper)] == target, (i, source, target)
  with pytest.raises(ValueError, match="held-out emoji edits, fewer than 100000"):
    emoji_pairs.held_out_edits(100_000, seed=0)
