"""Shapes share a few programs at the least price, and what that costs is said."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from made_up import TOKENIZER, World, plain_index, world_of

from benchmarks import mixture as made_up_web
from data_pipelines import arrangement, programs
from data_pipelines.buckets import RATIOS, bucket_size, crop_fraction, shown_whole
from data_pipelines.cache import Cache
from data_pipelines.loader import load_source
from data_pipelines.mixture import Mixture
from data_pipelines.programs import PENALTIES, Chooser, Family, Group, assign, costs
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.transforms import encode_png
from qimg2.runtime.caching.latents import _of_dataset

SQUARES = Family(((64, 64),), (), (10, 20, 40), ((0.0, 0.0),))


def family(ratios, **changes):
  sizes = tuple(bucket_size(512, ratio) for ratio in ratios)
  return dataclasses.replace(Family(sizes, sizes, (64,), ((0.0, 0.0),) * len(sizes)), **changes)


def test_a_longer_prompt_class_costs_its_padding_and_a_shorter_one_is_never_enough():
  shapes = np.array([[0, 0], [0, 1], [0, 2]])
  tokens = 4 * 4 + np.array([10, 20, 40])  # a picture of 64 px has sixteen tokens
  expected = np.where(np.arange(3)[:, None] > np.arange(3), np.inf, 1 - tokens[:, None] / tokens)
  np.testing.assert_allclose(costs(SQUARES, shapes, shapes, 0.2), expected)


def test_another_target_costs_what_is_cut_off_and_no_more_than_that_is_allowed():
  some, shapes = family(("1:1", "5:4", "2:1")), np.array([[0, 0], [1, 0], [2, 0]])
  heights, widths = np.array(some.targets).T
  cut = crop_fraction(heights[:, None], widths[:, None], heights, widths)
  cost = costs(some, shapes, shapes, 0.25)
  np.testing.assert_allclose(cost[cut <= 0.25], cut[cut <= 0.25])
  assert np.isinf(cost[cut > 0.25]).all() and (cut > 0.25).sum() == 4


def test_pictures_beyond_their_own_target_cannot_go_as_far_the_other_way():
  """Those nearest to 5:4 are as wide as 1.35: a square would cut 26 % off, though of 5:4 itself 22 %."""
  reach = np.log(1.35 / (bucket_size(512, "5:4")[1] / bucket_size(512, "5:4")[0]))
  shapes = np.array([[0, 0], [1, 0]])
  for far, allowed in ((0.0, True), (reach, False)):
    some = family(("1:1", "5:4"), reach=((0.0, 0.0), (0.0, far)))
    assert np.isfinite(costs(some, shapes, shapes, 0.24)[1, 0]) == allowed


def test_condition_images_may_go_to_any_size_in_any_place_and_latents_to_none():
  some = family(("1:1", "2:1", "1:2"))
  shapes = np.array([(0, *pair, 0) for pair in itertools.product(range(3), repeat=2)])
  assert np.isfinite(costs(some, shapes, shapes, 0.1)).all()
  assert (np.isfinite(costs(dataclasses.replace(some, rigid=True), shapes, shapes, 0.1)) == np.eye(9, dtype=bool)).all()


def choose(groups, num, max_crop, level=0):
  """The programs of each group at a level of penalties."""
  return Chooser(groups, num, max_crop)(np.full(groups[0].members.shape[1], PENALTIES[level]))


def group_of(family, shapes, weights, dataset=0, num_datasets=1):
  """A group whose records are all of one data set, as often as their weights say."""
  return Group(family, shapes, weights, np.outer(weights / weights.sum(), np.eye(num_datasets)[dataset]))


def best_by_trying_all(group, num, max_crop):
  cost = np.minimum(costs(group.family, group.shapes, group.shapes, max_crop), 3.0) * group.weights[:, None]
  return min(cost[:, list(some)].min(axis=1).sum() for some in itertools.combinations(range(len(group.shapes)), num))


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_nearly_the_best_that_there_is(seed):
  rng = np.random.default_rng(seed)
  some = family(RATIOS[:6], prompts=(64, 256))
  shapes = np.array(list(itertools.product(range(6), range(2))))
  group = group_of(some, shapes, rng.dirichlet(np.ones(12)))
  chosen, = choose([group], 5, 0.6)
  found = np.minimum(costs(some, shapes, chosen, 0.6), 3.0).min(axis=1) @ group.weights
  assert len(chosen) == 5 and found <= 1.1 * best_by_trying_all(group, 5, 0.6)


def test_enough_programs_are_the_shapes_themselves():
  shapes = np.array([[0, 0], [1, 0], [2, 0]])
  group = group_of(family(("1:1", "3:1", "1:3")), shapes, np.array([0.5, 0.3, 0.2]))
  assert choose([group], 3, 0.2)[0] is group.shapes and len(choose([group], 2, 0.2)[0]) == 2


def test_a_data_set_with_a_small_share_is_not_what_is_left_out():
  """One batch in a thousand is of edits: a program fewer for the pictures costs more rows, but no data set."""
  some = family(RATIOS)
  pictures = group_of(some, np.array([(i, 0) for i in range(15)]), np.full(15, 0.999 / 15), 0, 2)
  edits = group_of(some, np.array([(i, i, 0) for i in range(15)]), np.full(15, 0.001 / 15), 1, 2)
  first, second = choose([pictures, edits], 20, 0.2, 4)
  for group, chosen in ((pictures, first), (edits, second)):
    assert np.isfinite(costs(some, group.shapes, chosen, 0.2)).any(axis=1).all()
  assert len(first) + len(second) == 20 and len(first) > len(second)


def test_shapes_too_many_to_be_moved_about_are_not_forgotten(monkeypatch):
  """The rarest target comes with so many condition images that none of its shapes is among the frequent ones."""
  monkeypatch.setattr(programs, "_MOST_SHAPES", 20)
  monkeypatch.setattr(programs, "_MOST_CANDIDATES", 5)
  some = family(("1:1", "2:1", "3:1"))
  shapes = np.array([(target, *images, 0) for target in range(3) for images in itertools.product(range(3), repeat=3)])
  weights = np.where(shapes[:, 0] == 2, 0.1, 1.0) / len(shapes)
  chosen, = choose([group_of(some, shapes, weights)], 3, 0.1, 3)
  assert set(chosen[:, 0]) == {0, 1, 2}


def test_cells_too_small_for_a_batch_join_others_where_nothing_is_lost():
  shapes, programs = np.array([[0, 0], [0, 1], [0, 2]]), np.array([[0, 0], [0, 1], [0, 2]])
  home = lambda counts, enough, required, family=SQUARES: assign(family, shapes, np.array(counts), programs, 0.2, enough, required).tolist()
  near = dataclasses.replace(SQUARES, prompts=(10, 12, 40))  # the second costs 2 of 28 tokens, the third 28 of 56
  assert home([5, 9, 9], 8, 0, near) == [1, 1, 2] and home([9, 5, 9], 8, 0, near) == [0, 1, 2], "28 of 56 tokens are too much"
  assert home([5, 2, 9], 8, 0, near) == [1, 1, 2], "seven different rows are better than five"
  assert home([5, 300, 900], 1000, 0, near) == [1, 1, 2] and home([70, 300, 900], 1000, 0, near) == [0, 1, 2], "seventy are enough to begin with"
  assert home([9, 9, 2], 8, 0) == [0, 1, 2], "the longest prompts have nowhere to go, and stay"
  assert home([9, 9, 2], 8, 3) == [0, 2, 2], "unless others come to them"
  assert home([9, 2, 9], 0, 3) == [0, 2, 2] and home([1, 1, 1], 0, 0) == [0, 1, 2]


@pytest.mark.parametrize("counts, expected", [([17, 13, 10], [0, 2, 2]), ([15, 14, 11], [2, 2, 2]), ([60, 30, 10], [0, 2, 2]), ([5, 4, 3], [-1] * 3)])
def test_records_are_not_given_up_while_others_can_come_to_them(counts, expected):
  """The longest prompts have nowhere to go; before they are left out, shorter ones share their program."""
  programs = np.array([[0, 0], [0, 1], [0, 2]])
  assert assign(SQUARES, programs, np.array(counts), programs, 0.2, 0, 16).tolist() == expected


# ---- a whole mixture -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web(tmp_path_factory):
  """A stage as it meets the web: 20,000 pictures, 6,000 edits with one to three condition images, two resolutions."""
  tokenizer = made_up_web.train_tokenizer(["a red ball"], 300)
  folder = lambda: str(tmp_path_factory.mktemp("index"))
  made = {"t2i": made_up_web.make_index(20_000, False, tokenizer, folder()), "ti2i": made_up_web.make_index(6000, True, tokenizer, folder())}
  specs = (DatasetSpec("", "a", weight=0.7), DatasetSpec("", "b", weight=0.3, task="ti2i"))
  resolutions = (Resolution(512, 64, RATIOS), Resolution(1024, 32, RATIOS))
  build = lambda specs=specs, resolutions=resolutions, **more: Mixture(
      specs, resolutions, **(dict(num_tokens=1024, tokenizer=tokenizer, seed=0, prompt_classes=(128, 256, 512), max_programs=64,
                                  find=lambda spec: (None, made[spec.task], None, ())) | more))
  return build, made


def test_a_stage_meets_its_budget_and_says_what_that_costs(web):
  build, made = web
  mixture, every = build(), build(max_programs=0)
  facts, before = mixture.merging, every.merging
  assert facts.shapes == before.shapes == before.buckets == len(every.buckets) > 1000
  assert len(mixture.buckets) == facts.buckets <= 64 and facts.left_out <= 0.01 and before.left_out == before.padding == 0
  assert abs(before.cut_off - facts.own_cut_off) < 0.002 and facts.own_cut_off < facts.cut_off < 0.1 and 0 < facts.padding < 0.2
  kept = collections.Counter()
  for cell in mixture.cells:
    bucket, index = mixture.buckets[cell.bucket], made[mixture.datasets[cell.dataset].task]
    assert (crop_fraction(index["height"][cell.records], index["width"][cell.records], bucket.height, bucket.width) <= 0.2).all()
    assert ((index["source_sizes"][cell.records, :, 0] > 0).sum(axis=1) == len(bucket.source_sizes)).all()
    assert (np.diff(cell.records.astype(int)) > 0).all()
    images = sum(height * width // 1024 for height, width in bucket.source_sizes)
    assert (index["caption_tokens"][cell.records] <= bucket.num_tokens - images).all()
    kept[cell.dataset, cell.resolution] += len(cell.records)
  for (dataset, _), num in kept.items():
    assert num >= 0.985 * (made["ti2i" if dataset else "t2i"]["height"] > 0).sum()
  assert sum(count.kept for count in mixture.counts) == sum(kept.values()) and sum(count.moved for count in mixture.counts) > 0
  assert sum(count.records - count.kept - count.cropped for count in mixture.counts) == sum(count.rare for count in mixture.counts)


def test_held_out_batches_have_the_stages_shapes_and_little_filler(web):
  build, made = web
  training = build()
  small = tuple(dataclasses.replace(one, batch_size=16) for one in training.resolutions)
  for task in ("t2i", "ti2i"):
    spec, = (spec for spec in training.datasets if spec.task == task)
    held_out = build((spec,), small, max_programs=0, programs=training.programs)
    shape = lambda bucket: dataclasses.replace(bucket, batch_size=0)
    assert {shape(bucket) for bucket in held_out.buckets} <= {shape(bucket) for bucket in training.buckets}
    rows = dict(held_out.held_out(512))
    size = lambda bucket: held_out.buckets[bucket].batch_size
    batches = sum(-(-len(some) // size(bucket)) for bucket, some in rows.items())
    assert 900 < sum(map(len, rows.values())) <= 1024 and 16 * batches < 1.1 * sum(map(len, rows.values()))
    assert len([some for some in rows.values() if some]) > 10
    places = [cell.records[place] for some in rows.values() for cell, place in some]
    assert abs(np.mean(places) / len(made[task]["height"]) - 0.5) < 0.06, "they are from all over the source"


def test_all_held_out_records_are_taken_where_there_are_not_more():
  sizes = lambda mixture, num=None: [len(some) for _, some in mixture.held_out(num)]
  make = lambda first, second, batch=4: world_of(plain_index([(64, 64)] * first + [(64, 128)] * second),
                                                 [Resolution(64, batch, ("1:1", "2:1"), multiple=16)]).build()
  mixture = make(9, 3)
  assert sizes(mixture) == sizes(mixture, 12) == [9, 3] and mixture.held_out(12) == mixture.held_out() == mixture.held_out(99)
  assert sizes(mixture, 11) == [8, 3], "whole batches, then what is left"
  assert sizes(mixture, 2) == [4, 0], "at least one"
  assert sizes(make(400, 401, 512), 800) == [0, 401] and sizes(make(400, 401, 512), 801) == [400, 401]
  assert sizes(make(300, 300, 64), 128) == [64, 64]


def test_held_out_records_of_many_small_buckets_are_of_all_of_them():
  """No bucket fills a batch: nearly as many records as asked for are looked at, not one bucket alone."""
  shapes = [(64, 64)] * 40 + [(64, 128)] * 40 + [(128, 64)] * 40 + [(64, 96)] * 40
  mixture = world_of(plain_index(shapes), [Resolution(64, 48, ("1:1", "2:1", "1:2", "3:2"), multiple=16)]).build()
  assert sorted(len(some) for _, some in mixture.held_out(130)) == [0, 40, 40, 40]


def test_a_record_at_two_resolutions_of_one_area_is_looked_at_once():
  mixture = world_of(plain_index([(64, 64)] * 10), [Resolution(64, 4, ("1:1",)), Resolution(64, 4, ("1:1",), weight=2.0)]).build()
  (_, rows), = mixture.held_out()
  assert len(mixture.cells) == 2 and sorted(cell.records[place] for cell, place in rows) == list(range(10))


def test_tiny_cells_join_others_only_under_a_budget():
  sizes = lambda first, second, **more: [len(cell.records) for cell in world_of(
      plain_index([(64, 64)] * (first + second), tokens=[20] * first + [60] * second), [Resolution(64, 8, ("1:1",))], prompt_classes=(50,),
      **more).build().cells]
  assert sizes(17, 3) == sizes(17, 3, max_programs=2) == [17, 3], "longer prompts fit nowhere else"
  assert sizes(3, 17) == [3, 17] and sizes(3, 17, max_programs=2) == [20]


def test_records_that_share_a_bucket_have_the_weights_of_their_own_ratios():
  """Five in a hundred of 5:4, each a hundredth as often: under a budget of one bucket they weigh no more."""
  index = plain_index([(64, 64)] * 50 + [(64, 80)] * 50)
  make = lambda **more: world_of(index, [Resolution(256, 4, ("1:1", "5:4"), ratio_weights=(1.0, 0.01)), Resolution(64, 4, ("1:1",))], **more).build()
  share = lambda mixture: sum(share for cell, share in zip(mixture.cells, mixture.shares) if cell.resolution == 0)
  assert share(make()) == pytest.approx(50.5 / 150.5) and len(make(max_programs=2).cells) == 2
  assert share(make(max_programs=2)) == pytest.approx(50.5 / 150.5)


def test_too_few_programs_are_refused_by_records_and_not_by_weights():
  index = plain_index([(64, 64)] * 60 + [(64, 192)] * 40)
  few = world_of(index, [Resolution(256, 4, ("1:1", "3:1"), ratio_weights=(1.0, 0.001))], max_programs=1)
  with pytest.raises(ValueError, match=r"With max_programs=1, 40.0% of the records of data set 'd0' \(t2i\) would be in no batch; .* have 2 shapes"):
    few.build()


def test_no_order_of_data_sets_hides_what_is_left_out():
  """The second data set's pictures go farther from their sizes than the first one's, whose reach must not stand for both."""
  rng = np.random.default_rng(0)
  exact = plain_index([bucket_size(512, ratio) for ratio in RATIOS] * 100)
  wide = plain_index(np.rint(512 * np.exp(np.outer(rng.uniform(-0.55, 0.55, 1500), (-1, 1)))).astype(int))
  for order in (("a", "b"), ("b", "a")):
    world = World(tuple(DatasetSpec("", name) for name in order), (Resolution(512, 4, RATIOS),), {"a": exact, "b": wide},
                  dict(max_crop=0.25, max_programs=7))
    try:
      mixture = world.build()
    except ValueError as error:
      assert "would be in no batch" in str(error)
    else:
      assert mixture.merging.left_out <= 0.01


def test_a_group_reaches_as_far_as_the_pictures_of_any_of_its_data_sets(monkeypatch):
  seen = []
  monkeypatch.setattr(arrangement, "Chooser", lambda groups, *_: seen.extend(groups) or Chooser(groups, *_))
  near, far = plain_index([(64, 64)] * 20), plain_index([(64, 64)] * 10 + [(64, 72)] * 10 + [(70, 64)] * 10)
  World((DatasetSpec("", "a"), DatasetSpec("", "b")), (Resolution(64, 4, ("1:1",)),), {"a": near, "b": far}, {}).build()
  np.testing.assert_allclose(seen[0].family.reach, [(np.log(70 / 64), np.log(72 / 64))], atol=1e-9)


def test_as_few_programs_as_there_are_may_leave_a_resolution_without():
  """A record that has a bucket at one of two resolutions is not lost."""
  mixture = world_of(plain_index([(64, 64)] * 20), [Resolution(64, 4, ("1:1",)), Resolution(128, 4, ("1:1",))], max_programs=1).build()
  assert len(mixture.buckets) == 1 and mixture.merging.left_out == 0.5


def test_a_mixture_says_where_batches_differ():
  index = plain_index([(64, 64)] * 20 + [(64, 128)] * 20)
  make = lambda index=index, **more: world_of(index, [Resolution(64, 4, ("1:1", "2:1"), multiple=16)], **more).build()
  assert make().digest == make().digest
  others = [make(seed=1), make(index | {"height": index["height"][::-1], "width": index["width"][::-1]}), make(prompt_classes=(40,)),
            make(plain_index([(64, 64)] * 21 + [(64, 128)] * 19))]
  assert len({make().digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize("num, batch", [(20, 16), (60, 32), (200, 32)])
def test_few_pictures_make_batches_of_different_ones(num, batch, tmp_path):
  """Of so few, each with a shape of its own, a budget of 64 buckets must not make as many."""
  tokenizer = made_up_web.train_tokenizer(["a red ball"], 300)
  index = made_up_web.make_index(num, False, tokenizer, str(tmp_path))
  make = lambda **more: Mixture((DatasetSpec("", "a"),), (Resolution(512, batch, RATIOS),), 128, tokenizer, 0, (32, 64), 0.4,
                                find=lambda spec: (None, index | {"caption_tokens": np.minimum(index["caption_tokens"], 128)}, None, ()), **more)
  distinct = lambda mixture: np.mean([len(np.unique(mixture.plan(k).places)) for k in range(200)]) / batch
  merged, apart = make(max_programs=64), make()
  assert distinct(merged) > max(1.25 * distinct(apart), 0.4) and merged.merging.left_out == 0 and len(merged.buckets) < len(apart.buckets) / 2


def test_latents_for_which_there_is_no_bucket_are_refused_with_the_way_out():
  index = plain_index([(64, 64)] * 20, tokens=[20] * 10 + [60] * 10, base_px=np.full(20, 64))
  states = Cache("float16", 4, 16, feature_width=0, num_system_tokens=1)
  def make(shapes, **more):
    found = (None, index, states, shapes)
    return Mixture((DatasetSpec("", "a"),), (Resolution(64, 4, ("1:1",)),), 64, TOKENIZER, 0, (24,), find=lambda _: found, **more)
  short, long = (("t2i", 64, (64, 64), (), tokens) for tokens in (24, 64))
  assert len(make((short, long), max_programs=2).buckets) == len(make((short, long)).buckets) == 2 and len(make((long,)).buckets) == 1
  for budget in (0, 64):
    with pytest.raises(ValueError, match="50.0% of the records of data set 'a' .t2i. fit none of the buckets that their latents were cached for"):
      make((short,), max_programs=budget)
  with pytest.raises(ValueError, match="latent caches of the mixture are made for 2 buckets, and max_programs=1: raise it"):
    make((short, long), max_programs=1)
  assert len(make((), max_programs=1).buckets) == 1, "of an older version: prompts alone can be merged"


def test_data_sets_share_programs():
  pictures = plain_index([(64, 64)] * 40 + [(64, 128)] * 40)
  specs = (DatasetSpec("", "a"), DatasetSpec("", "b"))
  mixture = World(specs, (Resolution(64, 4, ("1:1", "2:1"), multiple=16),), {"a": pictures, "b": pictures}, dict(max_programs=2)).build()
  assert len(mixture.buckets) == 2 and len(mixture.cells) == 4


# ---- condition images ------------------------------------------------------------------------------


@pytest.mark.parametrize("sides, size, whole", [
    ((64, 64), (64, 64), None), ((60, 64), (64, 64), None), ((32, 128), (64, 64), (16, 64)), ((128, 32), (64, 64), (64, 16)),
    ((100, 300), (64, 128), (43, 128)), ((1, 1000), (64, 64), (1, 64))])
def test_a_condition_image_is_cut_a_little_or_shown_whole(sides, size, whole):
  assert shown_whole(*sides, size, 0.2) == whole


def test_what_is_shown_whole_lies_on_white_paper():
  picture = np.zeros((30, 120, 3), np.uint8)
  picture[:, 60:] = (255, 0, 0)
  record = {"source_height": [30], "source_width": [120], "sources": [encode_png(picture)]}
  shown = load_source(record, 0, (64, 64), 0.2, "sample 1")
  assert shown.shape == (64, 64, 3) and (shown[:24] == 255).all() and (shown[40:] == 255).all()
  assert (shown[24:40, :28] == 0).all() and (shown[24:40, 36:] == (255, 0, 0)).all()
  filled = load_source(record, 0, (64, 64), 0.9, "sample 1")
  assert (filled[:, :20] == 0).all() and (filled[:, 44:] == (255, 0, 0)).all()


# ---- latents -----------------------------------------------------------------------------------------


def cached(pixels, spec, index, options):
  """The index of a latent cache of a data set, made for the stage of a mixture, and the shapes that it is made for."""
  chosen, shapes = _of_dataset(pixels, spec.name, pixels.resolutions)
  mixture = Mixture([spec], pixels.resolutions, **options, programs=chosen, every=True, find=lambda _: (None, index, None, ()))
  places = np.concatenate([cell.records for cell in mixture.cells])
  buckets = [mixture.buckets[cell.bucket] for cell in mixture.cells for _ in cell.records]
  columns = {name: index[name][places] for name in ("quality", "sample_id", "stage", "has_text", "num_captions", "caption_language", "caption_kind",
                                                     "caption_tokens")}  # one caption each
  most = max(len(bucket.source_sizes) for bucket in buckets)
  sources = [[*bucket.source_sizes, *[(0, 0)] * (most - len(bucket.source_sizes))] for bucket in buckets]
  return index | columns | {
      "height": np.array([bucket.height for bucket in buckets]), "width": np.array([bucket.width for bucket in buckets]),
      "source_sizes": np.array(sources, np.int32).reshape(len(buckets), most, 2),
      "own_height": index["height"][places], "own_width": index["width"][places],
      "base_px": np.array([pixels.resolutions[cell.resolution].base_px for cell in mixture.cells for _ in cell.records])}, tuple(
          (task, base_px, tuple(target), tuple(map(tuple, images)), tokens) for task, base_px, target, images, tokens in shapes)


@pytest.mark.parametrize("change", [{}, {"min_bucket_records": 60}, {"max_programs": 30, "batch_size": 256}, {"ratio_weights": (1.0, 3.0, 0.5) * 5},
                                    {"max_enlarge": 1.1}], ids=["budget", "rare", "small cells", "ratio weights", "enlarged"])
def test_a_stage_on_latents_has_the_batches_of_its_pixels(change, tmp_path):
  tokenizer = made_up_web.train_tokenizer(["a red ball"], 300)
  made = {}
  for seed, (name, num, edits) in enumerate((("a", 3000, False), ("b", 800, True)), 1):
    (tmp_path / name).mkdir()
    made[name] = made_up_web.make_index(num, edits, tokenizer, str(tmp_path / name), seed)
  made["a"]["quality"][::7] = 0.1
  # A fifth has no English caption.
  made["a"] |= {"caption_language": (np.arange(3000) % 5 == 0).astype(np.uint16), "language_names": np.array(["en", "de"])}
  change = dict(change)
  batch, ratio_weights = change.pop("batch_size", 32), change.pop("ratio_weights", ())
  most = change.pop("max_enlarge", 0.0)
  specs = (DatasetSpec("", "a", weight=0.7, min_quality=0.5, languages=("en",), max_enlarge=most), DatasetSpec("", "b", weight=0.3, task="ti2i"))
  common = dict(num_tokens=1024, tokenizer=tokenizer, seed=0, prompt_classes=(128, 256), max_crop=0.3)
  resolutions = tuple(Resolution(base_px, batch, RATIOS, ratio_weights=ratio_weights) for base_px in (512, 1024))
  build = lambda find: Mixture(specs, resolutions, **common, **({"max_programs": 40} | change), find=find)
  pixels = build(lambda spec: (None, made[spec.name], None, ()))
  caches = {spec.name: cached(pixels, spec, made[spec.name], common) for spec in specs}
  states = Cache("float16", 4, 16, feature_width=0, num_system_tokens=1)
  latents = build(lambda spec: (None, caches[spec.name][0], states, caches[spec.name][1]))
  assert [dataclasses.replace(bucket, cache=None) for bucket in latents.buckets] == list(pixels.buckets)
  assert 1 < len(pixels.buckets) <= 40 and latents.shares == pixels.shares
  for k in range(60):
    one, other = pixels.plan(k), latents.plan(k)
    np.testing.assert_array_equal(pixels.sample_ids(one.dataset, one.records), latents.sample_ids(other.dataset, other.records))
