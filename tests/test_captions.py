"""What a batch shows of captions: tags that vary with the sample and the epoch, and pictures without any."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from made_up import TOKENIZER, plain_index, world_of

from data_pipelines import embedded, pieces, records
from data_pipelines.cache import Cache
from data_pipelines.embedded import glyphs
from data_pipelines.loader import Loader
from data_pipelines.mixture import Mixture
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.tags import vary
from qimg2.runtime import left_out

DEFAULT = (Resolution(64, 8, ("1:1", "1:2", "2:1"), multiple=16),)
NUM_TRAIN = 48
TAGS = ("shuffle_tags", "drop_tags", "keep_tags", "tag_separator")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  embedded.prepare("glyphs", folder, num_examples=NUM_TRAIN, seed=0)
  return folder


@pytest.fixture(scope="module")
def tokenizer(data):
  return records.load_tokenizer(data, "glyphs")


def test_tags_vary_with_the_sample_and_the_epoch_alone(data, tokenizer):
  spec = DatasetSpec(str(data), "glyphs", **dict(zip(TAGS, (True, 0.2, 2, " "))))
  make = lambda one, **options: Loader([one], DEFAULT, 64, tokenizer, 0, caption_dropout=0.0, **options)
  loader, parts = make(spec), [make(spec, process_index=i, process_count=2) for i in range(2)]
  prompts = lambda batch: list(map(tokenizer.decode_prompt, batch["tokens"]))
  by_epoch = collections.defaultdict(dict)
  for k in range(16):
    plan, batch = loader.mixture.plan(k), loader.batch(k)[1]
    for row, text in enumerate(prompts(batch)):
      captions, epoch = glyphs.example(int(batch["sample_id"][row]), seed=0)["captions"], int(plan.epochs[row])
      varied = {vary(caption, spec, (0, 5, int(batch["sample_id"][row]), epoch)): caption for caption in captions}
      assert text in varied and text.split()[:2] == varied[text].split()[:2] and set(text.split()) <= set(varied[text].split())
      by_epoch[int(batch["sample_id"][row]), varied[text]][epoch] = text
    assert prompts(batch) == [text for part in parts for text in prompts(part.batch(k)[1])]
  assert any(len(set(texts.values())) > 1 for texts in by_epoch.values())
  held_out = dataclasses.replace(spec, split="validation")
  plain = dataclasses.replace(held_out, shuffle_tags=False, drop_tags=0.0)
  assert np.array_equal(*(next(make(one).evaluation_batches(8))[1]["tokens"] for one in (held_out, plain))), "as they are written"


def test_tags_whose_order_would_be_too_long_are_as_they_are_written(data, tokenizer):
  captions = {i: glyphs.example(i, seed=0)["captions"] for i in range(NUM_TRAIN)}
  longest = max(int(tokenizer.count(some).max()) for some in captions.values())
  spec = DatasetSpec(str(data), "glyphs", shuffle_tags=True, tag_separator=" ")
  loader = Loader([spec], DEFAULT, longest, tokenizer, 0, caption_dropout=0.0)
  seen = collections.Counter()
  for k in range(16):
    plan, (_, batch) = loader.mixture.plan(k), loader.batch(k)
    for i, epoch, tokens in zip(batch["sample_id"].tolist(), plan.epochs.tolist(), batch["tokens"]):
      text, varied = tokenizer.decode_prompt(tokens), {caption: vary(caption, spec, (0, 5, i, epoch)) for caption in captions[i]}
      was_too_long = text in varied and varied[text] != text
      assert int(tokenizer.count([varied[text]])[0]) > longest if was_too_long else text in varied.values()
      seen[was_too_long] += 1
  assert seen[True] and seen[False] and not loader.faults


def test_a_caption_that_is_cut_varies_too(data, tokenizer):
  """What stands behind the cut would never be seen otherwise."""
  spec, seen = DatasetSpec(str(data), "glyphs", shuffle_tags=True, tag_separator=" "), collections.defaultdict(set)
  loader = Loader([spec], DEFAULT, int(tokenizer.count(["large"])[0]) + 1, tokenizer, 0, caption_dropout=0.0, truncate=True)
  for k in range(24):
    batch = loader.batch(k)[1]
    for i, tokens in zip(batch["sample_id"].tolist(), batch["tokens"]):
      seen[i].add(tokenizer.decode_prompt(tokens))
  as_written = lambda i, text: any(caption.startswith(text) for caption in glyphs.example(i, seed=0)["captions"])
  assert sum(not as_written(i, text) for i, texts in seen.items() for text in texts) > 20 and not loader.faults


def test_a_source_that_has_tags_or_keys_of_its_own_is_named_as_it_named_its_samples():
  ours = {"key": "a/1.png", "tags": []}
  for attributes in (ours, {"tags": "red", "curation": ours}, {"key": 7, "curation": {"key": 1, "tags": 2}, "curation_": ours}):
    record = {"attributes": json.dumps(attributes), "captions": [b"x"]}
    assert left_out._names(record) == {"key": "a/1.png", "captions": ["x"]}


def test_which_tags_are_left_and_in_which_order():
  spec = lambda *values: DatasetSpec("", "", **dict(zip(TAGS, values)))
  tags = [f"tag {i}" for i in range(20)]
  text = " , ".join(tags)
  assert vary(text, spec(False, 0.0, 0, ","), (1,)) == ", ".join(tags) and vary("a cat on a mat", spec(True, 1.0, 0, ","), (1,)) == "a cat on a mat"
  assert vary("a b  c", spec(False, 1.0, 1, " "), (1,)) == "a" and vary("a; b, c;", spec(False, 1.0, 2, ";"), (1,)) == "a; b, c"
  orders = [vary(text, spec(True, 0.0, 3, ","), (7, i)).split(", ") for i in range(300)]
  assert all(order[:3] == tags[:3] and sorted(order) == sorted(tags) for order in orders) and len({tuple(order) for order in orders}) == 300
  assert {order[3] for order in orders} == set(tags[3:]) and vary(text, spec(True, 0.5, 3, ","), (7,)) == vary(text, spec(True, 0.5, 3, ","), (7,))
  left = [vary(text, spec(False, 0.3, 3, ","), (7, i)).split(", ") for i in range(300)]
  assert all(some == [tag for tag in tags if tag in some] and some[:3] == tags[:3] for some in left)
  # 5100 draws: the share's standard deviation is 0.0064.
  assert abs(sum(len(some) - 3 for some in left) / (300 * 17) - 0.7) < 0.03
  for words, values in {"drop_tags=1.5": (True, 1.5, 0, ","), "keep_tags=-1": (True, 0.5, -1, ","), "tag_separator=''": (True, 0.5, 0, "")}.items():
    with pytest.raises(ValueError, match=words):
      world_of(plain_index([(64, 64)]), spec=dict(zip(TAGS, values))).build()
  find = lambda width: lambda spec: (None, plain_index([(64, 64)]), Cache("float16", 8, 8, width, 5), ())
  with pytest.raises(ValueError, match="holds the encoder's states of its captions as they are written.*without --features"):
    Mixture((spec(True, 0.0, 0, ","),), DEFAULT, 64, TOKENIZER, 0, find=find(32))


def test_records_without_captions_are_for_stages_that_read_none():
  num = np.array([1, 0, 1, 0, 0, 1], np.int32)
  index = plain_index([(64, 64)] * 6, num_captions=num, **{f"caption_{name}": np.full(3, value, dtype) for name, value, dtype in (
      ("language", 1, np.uint16), ("kind", 0, np.uint8), ("tokens", 30, np.int32))})
  for captions, expected in ((True, (3, 3)), (False, (6, 0))):
    count, = world_of(index).build(captions=captions).counts
    assert (count.kept, count.no_caption) == expected
  bare = {"captions": [], "languages": [], "kinds": [], "sample_id": 1}
  vae, other = (world_of(index).build(Loader, captions=captions) for captions in (False, True))
  assert vae._pick_caption(bare, vae.mixture.datasets[0], None) is None
  with pytest.raises(ValueError, match="no caption of the wanted languages"):
    other._pick_caption(bare, other.mixture.datasets[0], None)


def test_the_longest_of_the_usable_captions_decides():
  index = plain_index([(64, 64)]) | {"num_captions": np.array([3]), "caption_tokens": np.array([22, 30, 50]),
                                     "caption_language": np.array([1, 0, 2]), "caption_kind": np.zeros(3, int)}
  length = lambda **spec: world_of(index, prompt_classes=(24, 40), spec=spec).build().buckets[0].num_tokens
  assert [length(languages=languages) for languages in (("en",), ("en", "de"), ())] == [24, 40, 64]


def test_of_many_records_that_are_left_out_the_first_are_named_and_all_are_counted(monkeypatch):
  monkeypatch.setattr(pieces, "PIECE", 700)
  index = plain_index([(64, 64)] * 3000, tokens=[65, 20] * 1500)
  usage, = world_of(index).build().usage
  assert (usage["records"], usage["used"], usage["left_out"]) == (3000, 1500, {"too_long": 1500})
  assert usage["named"] == tuple((i, "too_long") for i in range(0, 2000, 2))
  usage, = (mixture := world_of(index, truncate=True, prompt_classes=(24,)).build()).usage
  assert (usage["used"], usage["left_out"], usage["named"]) == (3000, {}, ())
  assert [(mixture.buckets[cell.bucket].num_tokens, len(cell.records)) for cell in mixture.cells] == [(24, 1500), (64, 1500)]
