"""Captions without a picture: which of their tags are left, which of them decides on a bucket, which are left out."""

import numpy as np
import pytest
from made_up import TOKENIZER, plain_index, world_of

from data_pipelines import pieces
from data_pipelines.cache import Cache
from data_pipelines.mixture import Mixture
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.tags import vary

DEFAULT = (Resolution(64, 8, ("1:1",), multiple=16),)
TAGS = ("shuffle_tags", "drop_tags", "keep_tags", "tag_separator")


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
