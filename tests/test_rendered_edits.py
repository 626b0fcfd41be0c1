"""Edits of rendered text, of pages and of signs: source and target differ where the instruction says alone, and the truth holds on both sides."""

import collections
import dataclasses
import unicodedata

import numpy as np
import pytest
from PIL import Image

from benchmarks import text_rendering
from data_pipelines import records
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.text_rendering import captions, compositional, edits, languages, stored, words
from data_pipelines.text_rendering.pages import Leader
from data_pipelines.text_rendering.settings import EDITED, EDITS, Settings
from data_pipelines.text_rendering.source import RenderedText
from data_pipelines.transforms import decode_image

SETTINGS = dict(languages={"en": 1.0, "de": 1.0, "ru": 1.0, "ar": 1.0, "he": 1.0}, font_folders=("/none",))


SMALLER = {"pure": {}, "complex": {"base_px": 224}, "compositional": {"base_px": 160}}
ALL = [(kind, change) for kind, changes in EDITED.items() for change in changes]


def source_of(change, kind="pure", **options):
  return RenderedText(Settings(edits={change: 1.0}, edit_kinds={kind: 1.0}, **SETTINGS | SMALLER[kind] | options), "train", 64, are_edits=True)


def differing(record):
  return (record["image"] != record["sources"][0]).any(2)


@pytest.mark.parametrize("kind, change", ALL)
def test_nothing_else_changes(kind, change):
  source, layouts = source_of(change, kind), collections.Counter()
  for number in range(16 if kind == "pure" else 4):
    record = source.record(number)
    truth, outside = source.truth(record), differing(record)
    assert (truth["kind"], truth["page"], truth["change"]) == ("edits", kind, change) and outside.any()
    layouts[truth["layout"]] += 1
    for left, top, right, bottom in sum(truth["boxes"].values(), []):
      assert 0 <= left < right <= record["width"] and 0 <= top < bottom <= record["height"]
      outside[top:bottom, left:right] = False
    assert not outside.any()
    before, after = truth["source"]["blocks"], truth["blocks"]
    kept = [block for block in before if block in after]
    assert len(kept) == min(len(before), len(after)) - (len(before) == len(after))
    assert all(kept[i] == block for i, block in enumerate(block for block in after if block in before))
    _check_structures(truth.get("structures", []), truth["source"].get("structures", []), before, after)
  assert len(layouts) > (kind == "pure")


def _check_structures(structures, of_source, before, after):
  """Tables, charts and code say what their blocks say, on both sides, and are alike in all else."""
  for blocks, some in ((after, structures), (before, of_source)):
    for number, one in enumerate(some):
      said = [text for row in [one["head"] or [], *one["rows"]] for text in row] if one["type"] == "table" else (
          [text for pair in zip(one["labels"], one["texts"]) for text in pair] if one["type"] == "chart" else
          ["\n".join(one["lines"])] if one["type"] == "code" else [one["tex"]])
      assert said == [block["text"] for block in blocks if block.get("structure") == number]
  shapes = [[{key: one[key] for key in one if key not in ("head", "rows", "labels", "lines")} for one in some] for some in (structures, of_source)]
  assert shapes[0] == shapes[1]  # the values of charts are those that are drawn


@pytest.mark.parametrize("kind, change", ALL)
def test_the_truth_is_what_was_asked(kind, change):
  source = source_of(change, kind)
  for number in range(16, 28 if kind == "pure" else 19):
    record = source.record(number)
    truth = source.truth(record)
    values, sides = truth["values"], (truth["source"]["blocks"], truth["blocks"])
    old, new = ([block for block in side if block not in other] for side, other in (sides, sides[::-1]))
    said = [values[key] for key in ("old", "new", "text") if key in values]
    assert all(text in caption for text in said for caption in record["captions"]) and len(set(record["captions"])) == 3
    if change in ("word", "number"):
      assert [old[0]["text"].replace(values["old"], values["new"])] == [new[0]["text"]]
      assert kind == "compositional" or old[0]["size_px"] == new[0]["size_px"]  # a sign is nearer at one side
      assert "\n".join(truth["source"]["texts"]).count(values["old"]) == 1
    elif change == "translate":
      assert old[0]["text"] == values["text"] != new[0]["text"]
      assert kind == "compositional" or new[0]["size_px"] == old[0]["size_px"] or kind == "pure"
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


def test_figures_keep_their_typeface():  # they look alike in many
  source = source_of("font", "complex", templates={"receipt": 1.0}, ratios=("1:1",), languages={"en": 1.0})
  for number in range(8):
    text = source.truth(source.record(number))["values"]["text"]
    assert any(map(str.isalpha, text)), text


@pytest.mark.parametrize("name, change", [("menu", "number"), ("menu", "word"), ("survey", "translate")])
def test_tables_and_charts_change_with_their_texts(name, change):
  source, seen = source_of(change, "complex", templates={name: 1.0}, ratios=("1:1",), languages={"en": 1.0, "de": 1.0}), 0
  for number in range(6):
    record = source.record(number)
    truth = source.truth(record)
    _check_structures(truth["structures"], truth["source"]["structures"], truth["source"]["blocks"], truth["blocks"])
    sides = [[*one.get("rows", []), *([label] for label in one.get("labels", []))] for some in (truth["source"], truth) for one in some["structures"]]
    half = len(sides) // 2
    changed = [(a, b) for old, new in zip(sides[:half], sides[half:], strict=True) for a, b in zip(old, new, strict=True) if a != b]
    seen += len(changed)
    for a, b in changed:
      assert len(a) == len(b) and sum(one != other for one, other in zip(a, b)) == 1
      if name == "menu" and change == "word":  # the dots beside a dish follow it: they are in its box
        price = next(block for block in truth["blocks"] if block["text"] == a[1])
        assert truth["boxes"]["source"][0][2] >= price["box"][0] - 1 and truth["boxes"]["target"][0][2] >= price["box"][0] - 1
  assert seen


def test_leaders_follow_a_word_that_is_longer():
  leader = Leader((80, 0, 100, 10), 10.0, 4.0, 1.0, (0, 0, 0))
  dots = []
  for end in (20, 40):
    picture = Image.new("RGB", (100, 12), "white")
    leader.draw(picture, (0, 0, end, 10))
    columns = np.nonzero((np.asarray(picture)[..., 0] < 128).any(0))[0]
    dots.append(set(columns.tolist()))
    assert end < columns.min() <= end + 8 and 72 <= columns.max() < 80 and leader.box((0, 0, end, 10))[::2] == (end, 80)
  assert dots[1] < dots[0]  # the others stay where they were


def test_signs_are_painted_again_as_they_were():
  settings = Settings(**SETTINGS, kinds={"compositional": 1.0}, base_px=160)
  page = dataclasses.replace(RenderedText(settings, "train", 8).page(1), num_characters=40)
  for seed in range(12):
    composed = compositional.compose(np.random.default_rng(seed), page)
    assert (composed.picture(composed.blocks) == composed.pixels).all()


def test_edits_are_of_the_kinds_that_there_are():
  own = {**SETTINGS, "base_px": 128}
  assert Settings(**own, kinds={"complex": 2.0, "letters": 1.0}).edit_shares == {"complex": 2.0} and not Settings(**own, edits={}).edit_shares
  with pytest.raises(ValueError, match=r"edits=.* cannot be made of the kinds letters: give edit_kinds among pure, complex, compositional, other"):
    Settings(**own, kinds={"letters": 1.0})
  with pytest.raises(ValueError, match=r"edits=\{'move': 1.0\} cannot be made of the kinds complex"):
    Settings(**own, kinds={"complex": 1.0}, edits={"move": 1.0})
  with pytest.raises(ValueError, match="edit_kinds has 'letters': choose among pure, complex, compositional"):
    Settings(**own, edit_kinds={"letters": 1.0})
  with pytest.raises(ValueError, match=r"edit_kinds=\{'pure': 1.0\} says of what edits are made, but edits is empty"):
    Settings(**own, edit_kinds={"pure": 1.0}, edits={})
  with pytest.raises(ValueError, match=r"edit_kinds=\{'pure': 0\}: give numbers above 0"):
    Settings(**own, edit_kinds={"pure": 0})
  for odd in ("x", True, float("inf")):
    with pytest.raises(ValueError, match="edits=.* give numbers above 0"):
      Settings(**own, edits={"word": odd})
  with pytest.raises(ValueError, match=r"edits=\{'translate': 1.0\} needs two languages, but languages=\{'en': 1.0\}: add one"):
    Settings(languages={"en": 1.0}, edits={"translate": 1.0})


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
  with pytest.raises(ValueError, match=r"No edit \(remove\) can be made of pages of .* of the kinds pure: allow more edits, kinds, layouts"):
    source.record(0)
  with pytest.raises(ValueError, match="edits has 'crop': choose among word, number"):
    Settings(edits={"crop": 1.0})
  assert len(edits.KINDS) == len(source_of("word").record(1)["captions"])
