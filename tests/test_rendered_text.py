"""Rendered text as a data set: any picture by its number, and the folder by which a mixture names it."""

import contextlib
import dataclasses
import functools
import itertools
import json
import pickle

import hypothesis
import numpy as np
import pytest
from absl import flags
from hypothesis import strategies as st

from configs import rendered_text
from data_pipelines import identity, records
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.text_rendering import captions, languages, source, stored, words
from data_pipelines.text_rendering.fonts import find_faces, typefaces
from data_pipelines.text_rendering.settings import LAYOUTS, Settings
from data_pipelines.text_rendering.source import RenderedText
from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.transforms import decode_image
from data_pipelines.verify import verify
from launch import prepare_data

# With the fonts that Matplotlib brings, so that every machine draws the same.
SETTINGS = dict(languages={"en": 2.0, "ru": 1.0}, font_folders=("/none",))


@pytest.fixture(scope="module")
def tokenizer():
  source = RenderedText(Settings(**SETTINGS), "train", 100)
  return train_tokenizer([text for number in range(100) for text in source.record(number)["captions"]], 2000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("rendered")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stored, "NUM_SLOTS", {"train": 64, "validation": 8})
    patch.setattr(stored, "NUM_EDITS", {"train": 32, "validation": 4})
    patch.setattr(stored, "_TRAINED_ON", 100)
    stored.prepare(Settings(**SETTINGS), out, vocab_size=2000)
    assert stored.prepare(Settings(**SETTINGS), out, vocab_size=2000)["reused"]
    with pytest.raises(ValueError, match="seed=0, not seed=1"):
      stored.prepare(Settings(seed=1, **SETTINGS), out, vocab_size=2000)
  return out


def test_a_picture_is_a_function_of_its_number(tokenizer):
  source = RenderedText(Settings(**SETTINGS), "train", 64, tokenizer)
  other = pickle.loads(pickle.dumps(source))  # as a worker process gets it
  numbers = [7, 10**9, 3, 7 + 64]
  assert [other[number] for number in numbers[::-1]] == [source[number] for number in numbers][::-1]
  assert len({source[number]["image"] for number in numbers}) == 4
  assert RenderedText(Settings(seed=1, **SETTINGS), "train", 64, tokenizer)[7] != source[7] != RenderedText(Settings(**SETTINGS), "validation", 64)[7]


def test_the_index_holds_for_every_epoch(tokenizer):
  source = RenderedText(Settings(**SETTINGS), "train", 16, tokenizer)
  index = source.index()
  for number in range(48):
    record, slot = source[number], number % 16
    own = slice(len(captions.KINDS) * slot, len(captions.KINDS) * (slot + 1))
    assert (record["height"], record["width"], record["sample_id"]) == tuple(index[name][slot] for name in ("height", "width", "sample_id"))
    assert decode_image(record["image"]).shape == (record["height"], record["width"], 3)
    assert [one.decode() for one in record["languages"]] == index["language_names"][index["caption_language"][own]].tolist()
    assert [records.KINDS.index(one.decode()) for one in record["kinds"]] == index["caption_kind"][own].tolist()
    assert (tokenizer.count([one.decode() for one in record["captions"]]) <= index["caption_tokens"][own]).all()


@functools.cache
def typefaces_of(code):
  return typefaces(find_faces(()), languages.load(code))


own_texts = st.lists(st.text(min_size=1, max_size=60).map(words.clean).filter(lambda text: text.strip() and not set(text) & set('\n"')), max_size=4)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.integers(0, 2**40 - 1), st.sampled_from(sorted(LAYOUTS)), st.sampled_from((160, 208, 256)),
                  st.sampled_from(("en", "ru", "he", "ar")), own_texts, st.floats(6, 10))
@hypothesis.example(39683, "paragraph", 160, "en", ["¡"], 6.0)
def test_truth_is_what_is_drawn_and_captions_quote_it(number, layout, base_px, code, own, min_px):
  own = tuple(text for text in own if all(one.covers(text) for one in typefaces_of(code)))
  settings = Settings(base_px=base_px, languages={code: 1.0}, kinds={"pure": 1.0}, layouts={layout: 1.0}, min_px=min_px, texts={code: own},
                      font_folders=("/none",))
  record = RenderedText(settings, "train", 64).record(number)
  truth, image = json.loads(record["attributes"]), record["image"].astype(int)
  boxes = [line["box"] for block in truth["blocks"] for line in block["lines"]]
  assert all(0 <= left < right <= image.shape[1] and 0 <= top < bottom <= image.shape[0] for left, top, right, bottom in boxes)
  outer = [block["box"] for block in truth["blocks"]]
  assert all(min(a[2], b[2]) - max(a[0], b[0]) <= 1 or min(a[3], b[3]) - max(a[1], b[1]) <= 1 for a, b in itertools.combinations(outer, 2))
  for block in truth["blocks"]:
    left, top, right, bottom = block["box"]
    apart = [np.abs(one - block["rgb"]).sum(-1).min() for one in (image[top:bottom, left:right], np.array(truth["paper"]["rgb"]))]
    assert block["size_px"] < 12 or apart[0] < apart[1] / 2  # a lone stroke, a little more than 1 px wide, may fill no pixel
    assert block["contrast"] >= 4.5 and all(f'"{block["text"]}"' in text for text in record["captions"][1:2])
    assert block["text"] in record["captions"][2] and block["text"] in truth["texts"]
    drawn = "".join(line["text"] for line in block["lines"])
    assert "".join(drawn.replace("-", "").split()) == "".join(block["text"].replace("-", "").split())
  for box in boxes:  # nothing is drawn outside the boxes
    image[box[1]:box[3], box[0]:box[2]] = truth["paper"]["rgb"]
  assert np.abs(image - truth["paper"]["rgb"]).max() <= 14


def test_a_mixture_draws_new_pictures_in_every_epoch(folder):
  tokenizer = records.load_tokenizer(folder, stored.NAME)
  loader = Loader([DatasetSpec(str(folder), stored.NAME)], [Resolution(256, 4)], 200, tokenizer, 0)
  seen = {}
  for k in (0, 1, 2, 3, 10**6):
    plan, (_, batch) = loader.mixture.plan(k), loader.batch(k)
    assert batch["sample_id"].tolist() == plan.records.tolist() and not loader.faults
    for row, epoch in enumerate(plan.epochs):
      seen[int(plan.records[row]), int(epoch)] = batch["target"][row].tobytes()
      image = decode_image(loader.mixture.sources[0][int(plan.records[row] + epoch * 96)]["image"])
      assert (batch["target"][row] == image).all()
  assert len(set(seen.values())) == len(seen) == 20
  assert sum(len(batch["target"]) for _, batch in loader.evaluation_batches(8)) >= 8
  assert verify(folder, stored.NAME)["records"] == 108


WORKERS = 2


@pytest.mark.slow
def test_workers_of_two_processes_draw_what_one_process_draws(folder):
  flags.FLAGS.mark_as_parsed()
  tokenizer = records.load_tokenizer(folder, stored.NAME)
  make = lambda **options: Loader([DatasetSpec(str(folder), stored.NAME), DatasetSpec(str(folder), stored.NAME, task="ti2i")], [Resolution(256, 4)],
                                  300, tokenizer, 0, **options)
  shares, alone = [], list(itertools.islice(make().iterate(7), WORKERS + 2))
  for process in range(2):
    with contextlib.closing(make(process_index=process, process_count=2, num_workers=WORKERS).iterate(7)) as batches:
      shares.append(list(itertools.islice(batches, WORKERS + 2)))
  assert {bool(batch["sources"]) for _, batch in alone} == {True, False}
  for (bucket, whole), *parts in zip(alone, *shares, strict=True):
    assert [one for one, _ in parts] == [bucket] * 2 and [len(part["target"]) for _, part in parts] == [2, 2]
    for key in ("target", "tokens", "token_count", "sample_id"):
      assert (np.concatenate([part[key] for _, part in parts]) == whole[key]).all()
    for place, pictures in enumerate(whole["sources"]):
      assert (np.concatenate([part["sources"][place] for _, part in parts]) == pictures).all()


def test_no_caption_passes_the_limit(monkeypatch):
  """Pages at 1024 px, whose captions would have more than 128 tokens by far, in a tokenizer that makes them long."""
  settings = Settings(base_px=1024, kinds={"complex": 1.0}, ratios=("1:1",), **SETTINGS)
  small = train_tokenizer(["A text in English."], 300)  # about a token a byte
  monkeypatch.setattr(source, "_OVERHEAD", 0)
  for tokens in (1024, 300):
    some = RenderedText(dataclasses.replace(settings, max_tokens=tokens), "train", 64, small)
    counts = [small.count(some.record(number)["captions"]) - small.count([""])[0] for number in range(3)]
    assert 0.2 * tokens < np.max(counts) <= tokens
    assert all(np.max(one) <= some.slot(number).tokens for number, one in enumerate(counts))


def test_a_folder_of_before_there_were_edits_has_none(folder):
  path = folder / stored.NAME
  meta = records.read_meta(path)
  new = stored.open_source(path, "train", meta, 96)
  edits = stored.open_source(path, "train", meta, 96)._edits.settings
  assert edits.edit_shares == {"pure": 0.5, "complex": 0.5}
  del meta[records.RENDERED]["settings"]["edit_kinds"]  # before they were of other kinds
  assert stored.open_source(path, "train", meta, 96)._edits.settings.edit_shares == {"pure": 1.0}
  del meta[records.RENDERED]["edits"]
  old = stored.open_source(path, "train", meta, 64)
  assert len(old) == 64 and old[3] == new[3] and not old[63]["sources"]


def test_other_fonts_are_other_data(folder, monkeypatch):
  before = identity.identify(folder, stored.NAME)
  assert before["train"]["records"] == 96 and before["fonts"]["digest"] == RenderedText(Settings(**SETTINGS), "train", 1).fonts
  assert identity.differences(before, before | {"fonts": {"digest": "0"}}) == "other fonts"
  monkeypatch.setattr(RenderedText, "fonts", "0123")
  with pytest.raises(ValueError, match="with other fonts than this machine has"):
    records.open_split(folder, stored.NAME, "train")


def test_pictures_can_be_stored(tmp_path):
  cfg = rendered_text.get_config()
  cfg.languages, cfg.font_folders = SETTINGS["languages"], SETTINGS["font_folders"]
  facts = prepare_data.prepare_rendered(str(tmp_path), cfg, "texts", num_examples=25, vocab_size=1000)
  assert (facts["train"], facts["train_edits"], facts["validation_edits"]) == (37, 12, 1) and verify(tmp_path, "texts")["records"] == 39
  record = records.open_split(tmp_path, "texts", "train")[0][3]
  assert (decode_image(record["image"]) == RenderedText(Settings(**SETTINGS), "train", 25).record(3)["image"]).all()


@pytest.mark.parametrize("wrong, sentence", [
    (dict(languages={"xx": 1.0}), "languages has 'xx': choose among ar, de"), (dict(base_px=8), "at least 0, 64"),
    (dict(layouts={"single": 0.0}), "give numbers above 0"), (dict(layouts={"sheet": 1.0}), "choose among single"),
    (dict(kinds={"plain": 1.0}), "choose among pure")])
def test_settings_that_make_no_sense_are_refused(wrong, sentence):
  with pytest.raises(ValueError, match=sentence):
    Settings(**wrong)
