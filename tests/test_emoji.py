"""Emoji are drawn once each, named in many languages and split by combination."""

import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines import emoji, records

try:
  emoji.find_files()
  MISSING = ""
except ValueError as error:
  MISSING = str(error)
needs_packages = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def test_missing_packages_are_named(monkeypatch, tmp_path):
  monkeypatch.setattr(emoji, "FONT", str(tmp_path / "none.ttf"))
  with pytest.raises(ValueError, match="apt-get install fonts-noto-color-emoji unicode-cldr-core"):
    emoji.find_files()


@needs_packages
def test_every_emoji_is_one_drawn_character():
  characters, facts = emoji.list_emoji(), emoji.describe()
  assert len(set(characters)) == len(characters) == facts["emoji"] > 1000 and facts["languages"] > 90
  assert facts["skipped_sequences"] > 0 and facts["skipped_not_in_font"] > 0
  assert all(len(character) == 1 for character in characters)
  with pytest.raises(ValueError, match="does not draw"):
    emoji.render("\U0010ffff", "white")


@needs_packages
def test_pictures_are_centred_on_their_paper():
  image = emoji.render("🦊", "light blue")
  assert image.shape == (96, 96, 3)
  paper = np.array(emoji.PAPERS["light blue"])
  assert all((edge == paper).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1]))
  rows, columns = np.nonzero((image != paper).any(2))
  assert abs(rows.min() + rows.max() - 95) <= 2 and abs(columns.min() + columns.max() - 95) <= 2


@needs_packages
def test_captions_name_emoji_and_paper_in_every_language():
  texts, languages = emoji.captions("🦊", "pink")
  assert texts[0] == "fox, on pink paper" and languages[0] == "en" and texts[1].startswith("fox: ")
  named = dict(zip(languages[::-1], texts[::-1]))
  assert named["fr"] == "renard, on pink paper" and named["zh"] == "狐狸, on pink paper"
  assert len(texts) == len(languages) and all(text.endswith(", on pink paper") for text in texts)


@needs_packages
def test_splits_share_emoji_but_no_picture():
  train, validation = emoji._combinations("train"), emoji._combinations("validation")
  assert not set(train) & set(validation)
  assert len(train) + len(validation) == len(emoji.list_emoji()) * len(emoji.PAPERS)
  assert {character for character, _ in validation} <= {character for character, _ in train}
  assert 0.08 < len(validation) / (len(train) + len(validation)) < 0.12


@needs_packages
def test_the_check_finds_the_asked_emoji_at_another_size():
  candidates = emoji.list_emoji()[::40]
  for i, character in enumerate(candidates):
    small = Image.fromarray(emoji.render(character, "pink")).resize((64, 64), Image.Resampling.LANCZOS)
    assert emoji.nearest_emoji(np.array(small), candidates, "pink") == i


@needs_packages
def test_a_small_set_is_prepared(tmp_path):
  facts = records.prepare("emoji", tmp_path, num_examples=18, vocab_size=600)
  assert (facts["train"], facts["validation"]) == (18, 2)
  source, index = records.open_split(tmp_path, "emoji", "train")
  assert len(set(index["sample_id"].tolist())) == 18
  attributes = json.loads(source[3]["attributes"])
  assert source[3]["sample_id"] == ord(attributes["emoji"]) * 8 + list(emoji.PAPERS).index(attributes["paper"])
  english = records.has_language(index, ("en",))
  assert english.all() and not records.has_language(index, ("xx",)).any()


@needs_packages
def test_too_many_examples_are_refused(tmp_path):
  with pytest.raises(ValueError, match="fewer than num_examples=1000000"):
    records.prepare("emoji", tmp_path, num_examples=10**6)


@needs_packages
def test_held_out_prompts_are_of_different_emoji():
  prompts = emoji.held_out_prompts(100, seed=1)
  assert prompts == emoji.held_out_prompts(120, seed=1)[:100] != emoji.held_out_prompts(100, seed=2)
  assert len({character for _, character, _ in prompts}) == 100
  held_out = {(character, list(emoji.PAPERS)[paper]) for character, paper in emoji._combinations("validation")}
  assert all((character, paper) in held_out and caption == emoji.captions(character, paper)[0][0] for caption, character, paper in prompts)
  with pytest.raises(ValueError, match="fewer than 5000"):
    emoji.held_out_prompts(5000, seed=0)
