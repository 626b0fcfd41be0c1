"""The contract of a batch: what the loader makes is what the table says, and grids are read from pixels and from a cache alike."""

import re

import numpy as np
import pytest

from data_pipelines.buckets import Bucket
from data_pipelines.cache import Cache
from data_pipelines.loader import Loader
from qimg2 import batch

NUM, FACTOR, SYSTEM = 3, 16, 2
CACHE = {"dtype": "float16", "channels": 8, "factor": FACTOR, "feature_width": 0, "num_system_tokens": SYSTEM}
FEATURES = CACHE | {"feature_width": 5}


def example(cache=None):
  """A batch of the loader: targets of 64 x 96 px, two condition images, 20 prompt tokens."""
  fields = {name: (cache or CACHE).get(name) for name in Cache.__dataclass_fields__}
  return Loader.example(Bucket("ti2i", 64, 96, ((32, 64), (96, 32)), Cache(**fields) if cache else None, num_tokens=20, batch_size=NUM,
                               pairs=True, weighted=True))


@pytest.mark.parametrize("cache", [None, CACHE, FEATURES])
def test_grids_are_the_same_for_pixels_and_latents(cache):
  made = example(cache)
  assert batch.num_rows(made) == NUM
  assert batch.target_grid(made, FACTOR) == (4, 6)
  assert batch.source_grids(made, FACTOR) == ((2, 4), (6, 2))
  assert batch.source_grids({"target": made.get("target")}, FACTOR) == ()


def test_the_loader_makes_what_the_table_says():
  rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", batch.__doc__, re.MULTILINE))
  batches = {name: example(cache) for name, cache in {"pixels": None, "latents": CACHE, "features": FEATURES}.items()}
  assert rows.keys() == set().union(*batches.values()) | {"weight", "tasks", "category"}
  ranks = {"B": 1, "B M": 2, "B M' E": 3, "B H W C": 4, "B h w C": 4, "tuple of B h w C": 4}
  for made in batches.values():
    for name, value in made.items():
      shape, dtype = re.fullmatch(r"((?:tuple of )?B[ A-Za-z']*?)( u?int\d+| float32)? *", rows[name]).groups()
      assert isinstance(value, tuple) == shape.startswith("tuple")
      for array in value if isinstance(value, tuple) else (value,):
        assert array.ndim == ranks[shape] and len(array) == NUM
        assert array.dtype == np.dtype((dtype or CACHE["dtype"]).strip())
  assert batches["features"]["features"].shape[1] == batches["pixels"]["tokens"].shape[1] - SYSTEM
  assert not batches["features"]["sources"] and len(batches["latents"]["sources"]) == 2
