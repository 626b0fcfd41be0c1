"""The order of batches for mixtures drawn at random: what a mixture promises, checked against plain loops over made-up indices."""

import collections
import dataclasses
import fractions
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_up import (
  TOKENIZER,
  World,
  caption_lengths,
  crop,
  fate,
  make_index,
  nearest,
  plain_index,
  source_sizes_of,
  usable,
  world_of,
  worlds,
)

from data_pipelines import columns, kinds, pieces
from data_pipelines.buckets import RATIOS, bucket_size
from data_pipelines.loader import Loader
from data_pipelines.order import permute
from data_pipelines.specs import DatasetSpec, Resolution

REASONS = ("low_quality", "low_stage", "no_caption", "too_long", "cropped", "rare")
repeat = lambda num: settings(max_examples=num, deadline=None, derandomize=True, database=None)


def build_or_refuse(world):
  """The mixture, or None where it is right that there is none: then some data set has no bucket worth its step."""
  try:
    return world.build()
  except ValueError as error:
    (spec,) = [spec for spec in world.specs if f"No record of {spec.name!r}" in str(error)]
    if any(usable(world, spec, resolution) for resolution in world.resolutions):
      alone = dataclasses.replace(world, specs=(spec,)).build(min_bucket_records=0)
      assert max(len(cell.records) for cell in cells_of(alone)) < world.options["min_bucket_records"]
    return None


def cells_of(mixture, dataset=None, resolution=None):
  return [cell for cell in mixture.cells if dataset in (None, cell.dataset) and resolution in (None, cell.resolution)]


@pytest.mark.slow
def test_most_random_mixtures_can_be_made():
  """So that the properties below are not about nothing."""
  made = []
  @repeat(200)
  @given(worlds())
  def collect(world):
    made.append(build_or_refuse(world))
  collect()
  some = [mixture for mixture in made if mixture]
  assert len(some) > len(made) // 3 and any(len(mixture.buckets) > 10 for mixture in some) and any(len(mixture.cells) == 1 for mixture in some)
  assert {reason for mixture in some for count in mixture.counts for reason in (*REASONS, "moved") if getattr(count, reason)} == {*REASONS, "moved"}


@pytest.mark.slow
@repeat(30)
@given(worlds())
def test_each_record_comes_once_per_epoch_of_its_cell(world):
  mixture = build_or_refuse(world)
  streams = collections.defaultdict(list)
  for k in range(150 if mixture else 0):
    plan = mixture.plan(k)
    assert len(plan.places) == mixture.buckets[plan.bucket].batch_size and plan.records.dtype == np.int64
    assert (plan.bucket, plan.dataset) == (plan.cell.bucket, plan.cell.dataset)
    streams[id(plan.cell)] += plan.records.tolist()
  for cell in cells_of(mixture) if mixture else ():
    stream, num = streams[id(cell)], len(cell.records)
    for epoch in (stream[first:first + num] for first in range(0, len(stream), num)):
      assert len(set(epoch)) == len(epoch) and set(epoch) <= set(cell.records.tolist())


def test_epochs_are_whole_and_each_has_an_order_of_its_own():
  mixture = world_of(plain_index([(64, 64)] * 37)).build()
  stream = np.concatenate([mixture.plan(k).records for k in range(37)]).reshape(4, 37)
  assert (np.sort(stream) == np.arange(37)).all()
  assert len({tuple(epoch) for epoch in stream}) == 4


@pytest.mark.slow
@repeat(80)
@given(worlds())
def test_counts_add_up_and_name_the_right_reason(world):
  mixture = build_or_refuse(world)
  for d, spec in enumerate(world.specs if mixture else ()):
    for r, resolution in enumerate(world.resolutions):
      cells = cells_of(mixture, d, r)
      kept = sorted(i for cell in cells for i in cell.records.tolist())
      good = usable(world, spec, resolution)
      assert len(set(kept)) == len(kept) and set(kept) <= set(good)
      if world.options["min_bucket_records"] <= 1:
        assert kept == good
      # Counts carry no resolution but its area: two of one area are told apart by their order.
      counts = [count for count in mixture.counts if count.dataset == spec.name and count.base_px == resolution.base_px]
      same = [other for other in world.resolutions if other.base_px == resolution.base_px]
      for count in counts:
        assert count.kept + sum(getattr(count, reason) for reason in REASONS) == count.records and count.moved <= count.kept
        assert (count.height, count.width) in {bucket_size(one.base_px, ratio, one.multiple) for one in same for ratio in one.ratios}
      if len(same) == 1:
        fates = collections.Counter(fate(world, spec, resolution, i) for i in range(len(world.indices[spec.name]["height"])))
        assert sum(count.kept for count in counts) == len(kept)
        for reason in REASONS[:-1]:
          assert sum(getattr(count, reason) for count in counts) == fates[reason]
        assert sum(count.rare for count in counts) == len(good) - len(kept)
    usage, used = mixture.usage[d], {i for cell in cells_of(mixture, d) for i in cell.records.tolist()}
    fates = {i: fate(world, spec, world.resolutions[0], i) for i in range(len(world.indices[spec.name]["height"]))}
    why = {i: reason or "rare" for i, reason in fates.items() if reason is not None and i not in used}
    assert (usage["records"], usage["used"], usage["left_out"]) == (len(why) + len(used), len(used), collections.Counter(why.values()))
    assert dict(usage["named"]) == why and len(usage["named"]) == len(why)


@repeat(80)
@given(worlds())
def test_every_record_fits_its_bucket(world):
  mixture = build_or_refuse(world)
  classes = sorted({*world.options["prompt_classes"], world.options["num_tokens"]})
  for cell in cells_of(mixture) if mixture else ():
    bucket, spec, resolution = mixture.buckets[cell.bucket], world.specs[cell.dataset], world.resolutions[cell.resolution]
    assert bucket.batch_size == resolution.batch_size and bucket.task == spec.task and len(cell.records) >= world.options["min_bucket_records"]
    assert (np.diff(cell.records) > 0).all()
    slots = [(height // 32, width // 32) for height, width in bucket.source_sizes]
    prompt = bucket.num_tokens - TOKENIZER.num_image_tokens(slots)
    assert prompt in classes
    for i in cell.records.tolist():
      index, sources = world.indices[spec.name], source_sizes_of(world, spec, i)
      size = int(index["height"][i]), int(index["width"][i])
      assert crop(*size, bucket.height, bucket.width) <= world.options["max_crop"]
      assert len(sources) == len(bucket.source_sizes)
      longest = max(caption_lengths(world, spec, i))
      assert longest <= prompt
      if world.options["min_bucket_records"] <= 1:  # nothing was merged: the nearest size and the shortest class that fits
        targets = [bucket_size(resolution.base_px, ratio, resolution.multiple) for ratio in resolution.ratios]
        assert (bucket.height, bucket.width) == nearest(*size, targets) and prompt == min(one for one in classes if one >= longest)


@pytest.mark.slow
@repeat(15)
@given(worlds(), st.lists(st.integers(0, 10**12), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_plan_is_a_function_of_k_and_no_host_enters(world, numbers, random):
  if build_or_refuse(world) is None:
    return
  whole = world.build(Loader)
  plans = {k: whole.mixture.plan(k) for k in numbers}
  for count in (1, 2, 4):
    parts = [world.build(Loader, process_index=i, process_count=count) for i in range(count)]
    for k in random.sample(numbers, len(numbers)):
      theirs = [part.mixture.plan(k) for part in parts]
      assert {plan.bucket for plan in theirs} == {plans[k].bucket} and all(part.buckets == whole.buckets for part in parts)
      rows = np.concatenate([plan.records[part.own_rows(len(plan.places))] for plan, part in zip(theirs, parts)])
      np.testing.assert_array_equal(rows, plans[k].records)
  order, needed = whole.mixture.first_needed(numbers[0], numbers[0] + 99), [whole.mixture.plan(numbers[0] + k).bucket for k in range(99)]
  assert order[:len(set(needed))] == list(dict.fromkeys(needed)) and sorted(order) == list(range(len(whole.buckets)))


@st.composite
def small_worlds(draw):
  """At most 8 cells, and weights of any kind."""
  rng, weight = np.random.default_rng(draw(st.integers(0, 2**32))), st.floats(0.01, 20.0)
  specs = tuple(DatasetSpec("", f"d{d}", weight=draw(weight), task=task) for d, task in enumerate(draw(st.sampled_from(
      [("t2i",), ("t2i", "t2i"), ("t2i", "ti2i")]))))
  indices = {spec.name: plain_index(rng.choice([40, 80], (draw(st.integers(30, 90)), 2)), 30) for spec in specs}
  for spec in specs:
    if spec.task == "ti2i":
      indices[spec.name]["source_sizes"] = np.full((len(indices[spec.name]["height"]), 1, 2), 64, np.int32)
  resolutions = tuple(Resolution(base_px, 4, ("2:1", "1:2"), draw(weight), 16, draw(st.sampled_from([(), (draw(weight), 1.0)])))
                      for base_px in draw(st.sampled_from([(64,), (64, 96)])))
  return World(specs, resolutions, indices, dict(num_tokens=64, seed=draw(st.integers(0, 99)), max_crop=0.6))


@pytest.mark.slow
@repeat(5)
@given(small_worlds())
def test_shares_are_the_weights(world):
  mixture, num = world.build(), 3000
  cells = cells_of(mixture)
  plans = collections.Counter((plan.dataset, plan.bucket) for plan in map(mixture.plan, range(num)))
  share = lambda chosen: sum(count for key, count in plans.items() if chosen(*key)) / num
  near = lambda got, wanted: abs(got - wanted) < (math.log2(num) / 3 + 5) / num
  total = sum(spec.weight for spec in world.specs)
  def raw(cell):
    resolution, bucket = world.resolutions[cell.resolution], mixture.buckets[cell.bucket]
    sizes = [bucket_size(resolution.base_px, ratio, resolution.multiple) for ratio in resolution.ratios]
    weights = resolution.ratio_weights or (1.0,) * len(sizes)
    return resolution.weight * weights[sizes.index((bucket.height, bucket.width))] * len(cell.records)
  wanted = collections.Counter()
  for d, spec in enumerate(world.specs):
    assert near(share(lambda dataset, _: dataset == d), spec.weight / total)
    for cell in cells_of(mixture, d):
      wanted[cell.bucket, d] += spec.weight / total * raw(cell) / sum(map(raw, cells_of(mixture, d)))
  for (bucket, d), asked in wanted.items():
    assert near(share(lambda dataset, other: (other, dataset) == (bucket, d)), asked)
  np.testing.assert_allclose(sum(mixture.shares), 1.0)
  for cell, share in zip(cells, mixture.shares):
    np.testing.assert_allclose(share, world.specs[cell.dataset].weight / total * raw(cell) / sum(map(raw, cells_of(mixture, cell.dataset))))


def test_data_sets_are_dealt_as_asked_however_many_cells_they_have():
  """Nine tenths of pictures beside a tenth of edits in dozens of cells, of which most have a handful of records."""
  rng = np.random.default_rng(0)
  edits = make_index(rng, 1500, 1.0)
  world = World((DatasetSpec("", "d0", weight=0.9), DatasetSpec("", "d1", weight=0.1, task="ti2i")), (Resolution(256, 8, RATIOS),),
                {"d0": plain_index([(64, 64)] * 50), "d1": edits}, dict(max_crop=0.6, prompt_classes=(24, 30, 40, 50)))
  mixture = world.build()
  assert len(mixture.cells) > 150
  assert abs(sum(mixture.plan(k).dataset for k in range(4000)) - 400) < 9


def test_records_of_all_cells_come_equally_often():
  world = world_of(make_index(np.random.default_rng(1), 1000), [Resolution(256, 8, RATIOS)], max_crop=0.6, prompt_classes=(24, 30, 40, 50))
  mixture, seen = world.build(), collections.Counter()
  sizes = [len(cell.records) for cell in mixture.cells]
  assert min(sizes) < 8 < max(sizes), "some cells have fewer records than a batch"
  for k in range(6000):  # 48,000 rows of fewer than 1,000 records
    seen.update(mixture.plan(k).records.tolist())
  often = np.array(list(seen.values()))
  assert len(seen) == sum(sizes) and often.max() < 1.5 * often.min()


def test_a_batch_of_two_records_is_planned_soon():
  mixture = world_of(plain_index([(64, 64)] * 2), [Resolution(64, 32_768, ("1:1",))]).build()
  begin = time.process_time()
  for k in (0, 1, 10**11):
    assert np.bincount(mixture.plan(k).places).tolist() == [16_384] * 2
  assert time.process_time() - begin < 2, "it took nine seconds when each epoch was drawn alone"


# ---- permutations ----------------------------------------------------------------------------------


@repeat(60)
@example(1, (0,))
@example(10**6, (1, 2))
@example(2**19 + 1, (3,))
@given(st.one_of(st.integers(1, 3000), st.integers(1, 10**6)), st.tuples(st.integers(0, 2**62), st.integers(0, 2**31)))
def test_permute_is_a_bijection(num, key):
  sampled = np.arange(num) if num <= 3000 or num in (10**6, 2**19 + 1) else np.random.default_rng(num).permutation(num)[:4000]
  image = permute(sampled, num, key)
  assert image.min() >= 0 and image.max() < num and len(np.unique(image)) == len(sampled)


def test_no_memory_grows_with_the_number_of_records():
  num = 10**6
  index = plain_index([(64, 64)]) | {"sample_id": np.arange(num, dtype=np.int64)}
  for name in ("height", "width", "quality", "stage", "has_text", "num_captions", "caption_language", "caption_kind", "caption_tokens"):
    index[name] = np.repeat(index[name][:1], num)
  index["source_sizes"] = np.zeros((num, 0, 2), np.int32)
  mixture = world_of(index).build()
  mixture.plan(0)
  tracemalloc.start()
  for k in range(0, 10**9, 10**8):
    mixture.plan(k)
  permute(np.arange(8), 10**15, (1,))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 100_000, "a plan takes as much memory as there are records"


@pytest.mark.slow
@repeat(40)
@given(worlds(), st.sampled_from([0, 4]))
def test_looking_at_records_in_pieces_changes_nothing(world, max_programs):
  def look():
    try:
      mixture = world.build(max_programs=max_programs)
    except ValueError as error:
      return str(error)
    rounded = {name: round(value, 9) for name, value in dataclasses.asdict(mixture.merging).items()}
    return mixture.digest, mixture.counts, rounded

  whole = look()
  with pytest.MonkeyPatch.context() as patch:
    for module, values in ((pieces, {"PIECE": 7}), (columns, {"LARGE": 1}),  # in files; and ratios are looked up in a table
                           (kinds, {"_MOST_CODES": 0, "FEW": 0, "_BITS": 5, "_CELLS": 14 << 5, "_FIRST": 120 << 5})):
      for name, value in values.items():
        patch.setattr(module, name, value)
    assert look() == whole


# ---- examples --------------------------------------------------------------------------------------


def test_prompt_classes_put_short_captions_into_short_buckets():
  mixture = world_of(plain_index([(64, 64)] * 6, tokens=[20, 24, 25, 40, 41, 64]), prompt_classes=(24, 40)).build()
  assert {mixture.buckets[cell.bucket].num_tokens: cell.records.tolist() for cell in cells_of(mixture)} == {24: [0, 1], 40: [2, 3], 64: [4, 5]}


def test_another_tokenizer_puts_everything_into_the_longest_class():
  index = plain_index([(64, 64)] * 4, tokens=[20, 30, 64, 500], tokenizer=np.array("another"))
  mixture = world_of(index, prompt_classes=(24, 40)).build()
  assert [bucket.num_tokens for bucket in mixture.buckets] == [64]
  assert [(count.kept, count.too_long) for count in mixture.counts] == [(4, 0)]


def test_min_stage_leaves_out_what_did_not_pass():
  index = plain_index([(64, 64)] * 6, stage=np.arange(1, 7).astype(np.uint8))
  mixture = world_of(index, spec=dict(min_stage=4)).build()
  assert cells_of(mixture)[0].records.tolist() == [3, 4, 5] and mixture.counts[0].low_stage == 3


def test_what_a_resolution_would_enlarge_too_much_is_left_out_there_and_counted():
  index = plain_index([(64, 64)] * 4 + [(104, 120), (120, 104)] + [(128, 128)] * 3)  # at 128 px enlarged by 2, 1.23 and 1
  both = [Resolution(64, 4, ("1:1",)), Resolution(128, 4, ("1:1",))]
  made = {most: world_of(index, both, spec=dict(max_enlarge=most)).build() for most in (0.0, 1.15, 1.25, 2.0)}
  assert {most: [(count.kept, count.enlarged) for count in one.counts] for most, one in made.items()} == {
      0.0: [(9, 0), (9, 0)], 1.15: [(9, 0), (3, 6)], 1.25: [(9, 0), (5, 4)], 2.0: [(9, 0), (9, 0)]}
  assert made[2.0].digest == made[0.0].digest == world_of(index, both).build().digest != made[1.25].digest
  assert world_of(index, both, spec=dict(max_enlarge=1.15)).build(every=True).digest == made[0.0].digest  # what a latent cache is made of


def test_few_records_move_to_the_nearest_ratio_or_are_rare():
  sizes = [(64, 64)] * 10 + [(54, 64)] * 3 + [(32, 96)] * 2 + [(64, 54)] * 10
  ratios = ("1:1", "6:5", "3:1", "5:6")
  mixture = world_of(plain_index(sizes), [Resolution(256, 4, ratios)], min_bucket_records=4).build()
  records = {(mixture.buckets[cell.bucket].height, mixture.buckets[cell.bucket].width): cell.records.tolist() for cell in cells_of(mixture)}
  assert records == {(256, 256): list(range(13)), bucket_size(256, "5:6"): list(range(15, 25))}
  counts = {(count.height, count.width): count for count in mixture.counts}
  moved, rare = counts[bucket_size(256, "6:5")], counts[bucket_size(256, "3:1")]
  assert (moved.records, moved.kept, moved.moved, moved.rare) == (3, 3, 3, 0)
  assert (rare.records, rare.kept, rare.moved, rare.rare) == (2, 0, 0, 2)
  assert counts[256, 256].moved == 0 and counts[256, 256].kept == 10


def test_few_records_go_to_a_longer_prompt_class_first():
  index = plain_index([(64, 64)] * 12, tokens=[20] * 2 + [40] * 5 + [60] * 5)
  mixture = world_of(index, prompt_classes=(24, 40), min_bucket_records=3).build()
  assert {mixture.buckets[cell.bucket].num_tokens: len(cell.records) for cell in cells_of(mixture)} == {40: 7, 64: 5}
  # Nothing goes to a shorter class: the others come to the few.
  short = world_of(plain_index([(64, 64)] * 7, tokens=[20] * 5 + [60] * 2), prompt_classes=(24,), min_bucket_records=3).build()
  assert [(bucket.num_tokens, count.kept, count.rare) for bucket, count in zip(short.buckets, short.counts, strict=True)] == [(64, 7, 0)]


def test_ratio_weights_change_the_shares_exactly():
  sizes = [(64, 64)] * 30 + [(45, 90)] * 10
  share = lambda weights: [cell.weight for cell in cells_of(world_of(plain_index(sizes), [Resolution(
      64, 4, ("1:1", "2:1"), multiple=16, ratio_weights=weights)]).build())]
  third = fractions.Fraction(1, 4)
  assert share(()) == share((1.0, 1.0)) == [3 * third, third]
  assert share((1.0, 3.0)) == [fractions.Fraction(1, 2)] * 2
  assert share((0.1, 0.6)) == [fractions.Fraction(1, 3), fractions.Fraction(2, 3)]


def test_caption_kinds_come_in_the_asked_proportion():
  index = plain_index([(64, 64)])
  loader = world_of(index, spec=dict(caption_weights={"general": 3.0, "text": 1.0, "structured": 0.0})).build(Loader, caption_dropout=0.2)
  kinds = [b"general", b"text", b"general", b"knowledge", b"structured"]
  record = {"captions": [b"x"] * 5, "languages": [b"en"] * 5, "kinds": kinds}
  num, draws = 8000, np.random.default_rng(0).random((8000, 3))
  seen = collections.Counter(loader._pick_caption(record, loader.mixture.datasets[0], draw) for draw in draws)
  expected = {None: 0.2, 0: 0.8 * 0.375, 1: 0.8 * 0.25, 2: 0.8 * 0.375}
  assert set(seen) == set(expected)
  # Chi-square with 3 degrees of freedom is above 16.27 once in a thousand.
  assert sum((seen[number] - num * share)**2 / (num * share) for number, share in expected.items()) < 16.27
  only = {"captions": [b"x"] * 2, "languages": [b"en"] * 2, "kinds": [b"text", b"knowledge"]}
  assert {loader._pick_caption(only, loader.mixture.datasets[0], np.array([0.9, y, z])) for y in (0, 0.99) for z in (0, 0.99)} == {0}
