"""The published size table, and fitting pictures to it."""

import fractions

import numpy as np
import pytest

from data_pipelines import buckets

# width x height at 256, 512, 1024, 2048 px.
TABLE = {
    "1:1": "256x256 512x512 1024x1024 2048x2048", "3:2": "320x224 640x416 1248x832 2496x1664",
    "4:3": "288x224 576x448 1184x896 2368x1760", "5:4": "288x224 576x448 1152x928 2304x1824",
    "16:9": "352x192 672x384 1376x768 2720x1536", "2:1": "352x192 736x352 1440x736 2912x1440",
    "21:9": "384x160 768x320 1568x672 3136x1344", "3:1": "448x160 896x288 1760x576 3552x1184"}


@pytest.mark.parametrize("ratio", TABLE)
def test_sizes_follow_the_table_and_its_transpose(ratio):
  flipped = ":".join(reversed(ratio.split(":")))
  for base_px, text in zip((256, 512, 1024, 2048), TABLE[ratio].split()):
    width, height = map(int, text.split("x"))
    assert buckets.bucket_size(base_px, ratio) == (height, width)
    assert buckets.bucket_size(base_px, flipped) == (width, height)


def test_ratio_list_is_the_table_with_transposes():
  assert set(buckets.RATIOS) == set(TABLE) | {":".join(reversed(ratio.split(":"))) for ratio in TABLE}


def test_equal_sizes_make_one_bucket():
  made = buckets.make_buckets("t2i", 256, buckets.RATIOS, 64, 8)
  sizes = [(bucket.height, bucket.width) for bucket in made]
  assert len(set(sizes)) == len(sizes) == 11 and (224, 288) in sizes
  assert all(bucket.batch_size == 8 and bucket.num_tokens == 64 and bucket.source_sizes == () for bucket in made)


def test_nearest_is_by_log_ratio():
  made = buckets.make_buckets("t2i", 64, ("1:1", "2:1", "1:2"), 8, 1, multiple=16)
  # The geometric mean of 1 and 2 parts the two, not the arithmetic one.
  nearest = buckets.nearest_bucket(np.array([100, 100, 145, 200, 5]), np.array([140, 145, 100, 100, 5]), made)
  assert nearest.tolist() == [0, 1, 2, 2, 0]
  assert int(buckets.nearest_bucket(128, 64, made)) == 2


def test_crop_fraction_is_the_lost_area():
  assert buckets.crop_fraction(100, 200, 64, 128) == 0
  assert np.isclose(buckets.crop_fraction(100, 200, 64, 64), 0.5)
  assert np.allclose(buckets.crop_fraction(np.array([300, 100]), np.array([100, 300]), 64, 64), 2 / 3)


@pytest.mark.parametrize("ratio", ["wide", "1:0", "0:1", -1, "1:2:3", None, float("inf")])
def test_bad_ratios_are_named(ratio):
  with pytest.raises(ValueError, match="Ratio"):
    buckets.bucket_size(256, ratio)


def test_too_small_area_is_named():
  with pytest.raises(ValueError, match="3:1.*16 px"):
    buckets.bucket_size(16, "3:1")


def test_the_nearest_is_found_among_ties():
  """Against the definition, in exact arithmetic: a < b as distances of logarithms if the larger quotient of the one is below that of the other."""
  rng = np.random.default_rng(0)
  for trial in range(40):
    sides = [tuple(map(int, rng.integers(1, 9, 2))) for _ in range(rng.integers(1, 7))]
    made = tuple(buckets.Bucket("t2i", *pair, num_tokens=1, batch_size=1) for pair in sides + [(b, a) for a, b in sides])
    height, width = rng.integers(1, 40, (2, 300))
    found = buckets.nearest_bucket(height, width, made)
    for h, w, place in zip(height.tolist(), width.tolist(), found.tolist()):
      apart = [max(q, 1 / q) for q in (fractions.Fraction(w * one.height, h * one.width) for one in made)]
      assert place == apart.index(min(apart)), (sides, h, w)
