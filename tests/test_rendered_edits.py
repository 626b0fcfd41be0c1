"""Edits of rendered text: source and target differ where the instruction says and nowhere else, and the truth holds on both sides."""

import collections
import unicodedata

import numpy as np
import pytest

from benchmarks import text_rendering
from data_pipelines import records
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.text_rendering import captions, edits, languages, stored, words
from data_pipelines.text_rendering.settings import EDITS, Settings
from data_pipelines.text_rendering.source import RenderedText
from data_pipelines.transforms import decode_image

SETTINGS = dict(languages={"en": 1.0, "de": 1.0, "ru": 1.0, "ar": 1.0, "he": 1.0}, font_folders=("/none",))


def source_of(change, **options):
  return RenderedText(Settings(edits={change: 1.0}, **SETTINGS | options), "train", 64, are_edits=True)


def differing(record):
  return (record["image"] != record["sources"][0]).any(2)


@pytest.mark.parametrize("change", EDITS)
def test_nothing_else_changes(change):
  source, layouts = source_of(change), collections.Counter()
  for number in range(16):
    record = source.record(number)
    truth, outside = source.truth(record), differing(record)
    assert truth["change"] == change and outside.any()
    layouts[truth["layout"]] += 1
    for left, top, right, bottom in sum(truth["boxes"].values(), []):
      assert 0 <= left < right <= record["width"] and 0 <= top < bottom <= record["height"]
      outside[top:bottom, left:right] = False
    assert not outside.any()
    before, after = truth["source"]["blocks"], truth["blocks"]
    kept = [block for block in before if block in after]
    assert len(kept) == min(len(before), len(after)) - (len(before) == len(after))
    assert all(kept[i] == block for i, block in enumerate(block for block in after if block in before))
  assert len(layouts) > 1


@pytest.mark.parametrize("change", EDITS)
def test_the_truth_is_what_was_asked(change):
  source = source_of(change)
  for number in range(16, 28):
    record = source.record(number)
    truth = source.truth(record)
    values, sides = truth["values"], (truth["source"]["blocks"], truth["blocks"])
    old, new = ([block for block in side if block not in other] for side, other in (sides, sides[::-1]))
    said = [values[key] for key in ("old", "new", "text") if key in values]
    assert all(text in caption for text in said for caption in record["captions"]) and len(set(record["captions"])) == 3
    if change in ("word", "number"):
      assert [old[0]["text"].replace(values["old"], values["new"])] == [new[0]["text"]] and old[0]["size_px"] == new[0]["size_px"]
      assert "\n".join(truth["source"]["texts"]).count(values["old"]) == 1
    elif change == "translate":
      assert old[0]["text"] == values["text"] != new[0]["text"]
      assert new[0]["direction"] == ("rtl" if languages.load(values["language"]).is_rtl else "ltr")
    else:
      assert all(block["text"] == values["text"] for block in (*old, *new))
      assert (len(old), len(new)) == {"remove": (1, 0), "add": (0, 1)}.get(change, (1, 1))
    if change in ("colour", "add"):
      assert new[0]["colour"] == values["colour"] and new[0]["contrast"] >= 4.5
    if change in ("move", "add"):
      assert new[0]["place"] == values["place"]
    if change == "move":
      assert old[0]["place"] != values["place"] and old[0]["size_px"] == new[0]["size_px"]
    if change == "font":
      assert values["looks"] and old[0]["font"] != new[0]["font"]
      assert ("bold" in values["looks"]) == (new[0]["weight"] == "bold" != old[0]["weight"])
      assert ("slanted" in values["looks"]) == (new[0]["slanted"] and not old[0]["slanted"])


def test_a_mixture_takes_edits(tmp_path, monkeypatch):
  monkeypatch.setattr(stored, "NUM_SLOTS", {"train": 16, "validation": 4})
  monkeypatch.setattr(stored, "NUM_EDITS", {"train": 8, "validation": 4})
  monkeypatch.setattr(stored, "_TRAINED_ON", 40)
  settings = Settings(languages={"en": 1.0}, ratios=("1:1",), font_folders=("/none",))
  facts = stored.prepare(settings, tmp_path, vocab_size=1500)
  assert (facts["train"], facts["train_edits"], facts["validation_edits"]) == (24, 8, 4)
  tokenizer = records.load_tokenizer(tmp_path, stored.NAME)
  loader = Loader([DatasetSpec(str(tmp_path), stored.NAME, task="ti2i")], [Resolution(256, 4)], 300, tokenizer, 0)
  alone, seen = RenderedText(settings, "train", 8, tokenizer, are_edits=True), set()
  for k in range(4):
    plan, (_, batch) = loader.mixture.plan(k), loader.batch(k)
    assert not loader.faults and [one.shape for one in batch["sources"]] == [(4, 256, 256, 3)]
    for row, (place, epoch) in enumerate(zip(plan.records, plan.epochs)):
      record = alone[int(place) - 16 + 8 * int(epoch)]
      assert batch["sample_id"][row] == record["sample_id"] == 2**29 + place - 16
      assert (batch["target"][row] == decode_image(record["image"])).all() and (batch["sources"][0][row] == decode_image(record["sources"][0])).all()
      seen.add(record["sources"][0])
  assert len(seen) == 16  # two epochs of eight, none twice
  assert len(Loader([DatasetSpec(str(tmp_path), stored.NAME)], [Resolution(256, 4)], 300, tokenizer, 0).mixture.cells[0].records) == 16


def test_a_pods_processes_read_no_picture_twice_and_miss_none():
  assert "1536 slots, none twice, none missed in 3 epochs" in text_rendering.count_pod(1024)


def test_every_language_says_every_edit():
  fields = {"word": {"old", "new"}, "number": {"old", "new"}, "colour": {"text", "colour"}, "font": {"text", "looks"}, "move": {"text", "place"},
            "remove": {"text"}, "add": {"text", "colour", "place"}, "translate": {"text", "language"}}
  for code in languages.codes():
    language = languages.load(code)
    assert list(language.edits) == list(EDITS)
    for change, templates in language.edits.items():
      assert len(set(templates)) == len(templates) > 1
      for template in templates:
        assert all(template.count("{%s}" % field) == 1 for field in fields[change]) and template.count("{") == len(fields[change])
    assert set(language.looks) == {"regular", "bold", "upright", "slanted", "serif", "sans-serif", "monospaced"}
    assert all(words.names_of(language, other) for other in languages.codes())
    assert {place for row in captions.PLACES for place in row} == set(language.places)


def test_numbers_become_less_in_their_own_digits():
  rng = np.random.default_rng(0)
  for number in ("14:30", "1.234,50", "٣١", "२०२४", "29"):
    new = {words.lesser_number(rng, number) for _ in range(20)}
    assert len(new) > 3 and all(len(one) == len(number) and one != number for one in new)
    script = lambda text: {unicodedata.name(c).split()[0] for c in text if c.isdigit()}
    assert script("".join(new)) == script(number)
  assert words.lesser_number(rng, "10:05") is None
  assert [("a 12:30 b٣٤, 7"[i:j]) for i, j in words.number_tokens("a 12:30 b٣٤, 7")] == ["12:30", "٣٤"]


def test_what_cannot_be_edited_is_said():
  source = source_of("remove", layouts={"single": 1.0})
  with pytest.raises(ValueError, match=r"No edit \(remove\) can be made of pages of .* with the layouts single: allow more of both"):
    source.record(0)
  with pytest.raises(ValueError, match="edits has 'crop': choose among word, number"):
    Settings(edits={"crop": 1.0})
  assert len(edits.KINDS) == len(source_of("word").record(1)["captions"])
