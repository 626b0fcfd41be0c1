"""Words that are spelt: a picture follows from its word, held-out words are never drawn, and what a picture shows is told without OCR."""

import zlib

import numpy as np
import pytest

from configs import rendered_text
from data_pipelines.text_rendering import letters, stored
from data_pipelines.text_rendering.settings import Settings
from data_pipelines.text_rendering.source import RenderedText
from qimg2.runtime.evaluating.registry import make_suite

SETTINGS = dict(languages={"en": 1.0}, font_folders=("/none",), kinds={"letters": 1.0}, edits={}, base_px=48, ratios=("2:1",), min_px=7.0,
                max_tokens=40, fonts=("DejaVu Sans Mono Bold", "DejaVu Serif Bold"))


@pytest.fixture(scope="module")
def source():
  return RenderedText(Settings(**SETTINGS), "train", 64)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
  out = tmp_path_factory.mktemp("words")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stored, "NUM_SLOTS", {"train": 32, "validation": 4})
    patch.setattr(stored, "_TRAINED_ON", 50)
    stored.prepare(Settings(**SETTINGS), out, "words", vocab_size=400)
  return make_suite("words", {"folder": str(out / "words"), "num_prompts": 6})


def drawn(word, page):
  return np.asarray(letters.set_word(word, page.typefaces, page.corpus.language, 32, 64, 7.0)[0].picture)


def test_words_that_are_held_out_are_never_drawn(source):
  words = [source.truth(source.record(number))["texts"][0] for number in range(60)]
  assert {len(word) for word in words} == {2, 3, 4, 5} and len(set("".join(words))) > 20
  assert not any(zlib.crc32(word.encode()) % letters.HELD_OUT == 0 for word in words)
  page = source.page(0)
  assert all(zlib.crc32(letters.draw_word(np.random.default_rng(number), page, True).text.encode()) % letters.HELD_OUT == 0 for number in range(20))


def test_a_picture_follows_from_its_word(source):
  for number in range(8):
    record = source.record(number)
    truth = source.truth(record)
    block, page = truth["blocks"][0], source.page(number)
    word = letters.Word(block["text"], block["font"], block["colour"], truth["paper"]["colour"])
    assert (record["image"] == drawn(word, page)).all() and record["image"].shape == (32, 64, 3) and block["contrast"] >= 4.5
    assert all(f'"{word.text}"' in text and word.font in text for text in record["captions"][1:])
    assert word.text not in record["captions"][0]


def test_letters_are_told_by_what_other_words_would_look_like(source):
  page, word = source.page(0), letters.Word("KMNUH", "DejaVu Sans Mono Bold", "navy", "orange")
  clean = drawn(word, page)
  noisy = np.clip(clean + np.random.default_rng(0).normal(0, 60, clean.shape), 0, 255).astype(np.uint8)
  assert letters.spelt(clean, word, page.typefaces, page) == letters.spelt(noisy, word, page.typefaces, page) == [True] * 5
  assert letters.spelt(drawn(word._replace(text="KXNUI"), page), word, page.typefaces, page) == [True, False, True, True, False]
  assert not all(letters.spelt(drawn(word._replace(text="KMNU"), page), word, page.typefaces, page))
  assert not any(letters.spelt(drawn(word._replace(text="XXXXX"), page), word, page.typefaces, page))
  assert sum(letters.spelt(np.full_like(clean, 128), word, page.typefaces, page)) <= 1


def test_the_suite_asks_for_held_out_words_and_counts_letters(suite):
  made, num = suite
  tasks = made.tasks(num, 7)
  assert len(tasks) == 6 and made.tasks(3, 7) == tasks[:3] and all(task.size == (32, 64) for task in tasks)
  page = RenderedText(Settings(**SETTINGS), "train", 64).page(0)
  for task in tasks[:2]:
    assert f'"{task.truth.text}"' in task.prompt and zlib.crc32(task.truth.text.encode()) % letters.HELD_OUT == 0
    right = made.score(task, drawn(task.truth, page))
    assert right["words"] == 1 and right["letters right"] == right["letters"] == len(task.truth.text) and right["chance"] < 0.2
    wrong = made.score(task, drawn(task.truth._replace(text="?" + task.truth.text[1:]), page))
    assert wrong["words"] == 0 and wrong["letters right"] < right["letters"] and wrong["right"].startswith("·")


@pytest.mark.parametrize("wrong, sentence", [
    (dict(letters=(3, 2)), "give two numbers from 1 on"), (dict(alphabet="A"), "at least two letters"), (dict(max_tokens=8), "16 \\(or 0\\)"),
    (dict(edits={"word": 1.0}), "64, 5 and 128 .*without edits")])
def test_settings_of_words_that_make_no_sense_are_refused(wrong, sentence):
  with pytest.raises(ValueError, match=sentence):
    Settings(**SETTINGS | wrong)


def test_a_font_that_is_not_there_is_one_sentence():
  with pytest.raises(ValueError, match="fonts=.'Papyrus',. has none that sets en: choose among DejaVu"):
    RenderedText(Settings(**SETTINGS | dict(fonts=("Papyrus",))), "train", 4).record(0)


@pytest.mark.parametrize("arg", ["signs", "word", "words"])
def test_the_variants_of_the_config_are_settings(arg):
  cfg = {key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in rendered_text.get_config(arg).items()}
  assert Settings(**{key: value for key, value in cfg.items() if key != "tokenizer"}).base_px == (256 if arg == "signs" else 48)
  with pytest.raises(ValueError, match="say one of signs, word, words"):
    rendered_text.get_config("letters")
