"""Batch k is a function of (seed, mixture, k): of nothing else, and of all of these."""

import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import time
import types

import commands
import numpy as np
import pytest
from absl import flags

from data_pipelines import embedded, records
from data_pipelines.embedded import glyph_edits, glyphs
from data_pipelines.embedded.glyphs import Attributes
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution, source_grids
from data_pipelines.transforms import encode_png
from qimg2.runtime import left_out

RATIOS = ("1:1", "1:2", "2:1")
DEFAULT = (Resolution(64, 8, RATIOS, multiple=16),)
NUM_TRAIN = 90
shared_memory = lambda: {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}  # of other tests, too, who make and remove theirs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Two data sets of 90 training records each, with different pictures."""
  folders = [tmp_path_factory.mktemp(name) for name in "ab"]
  for seed, folder in enumerate(folders):
    embedded.prepare("glyphs", folder, num_examples=NUM_TRAIN, seed=seed)
  return folders


@pytest.fixture(scope="module")
def tokenizer(data):
  return records.load_tokenizer(data[0], "glyphs")


def make(data, tokenizer, seed=0, sets=1, weights=(1.0, 3.0), resolutions=DEFAULT, **options):
  spec_options = {key: options.pop(key) for key in ("min_quality", "languages", "split", "task") if key in options}
  datasets = [DatasetSpec(str(folder), "glyphs", weight=w, **spec_options) for folder, w in zip(data[:sets], weights)]
  return Loader(datasets, resolutions, 64, tokenizer, seed, **options)


def assert_same(first, second):
  assert first[0] == second[0] and first[1].keys() == second[1].keys()
  for name in first[1]:
    np.testing.assert_array_equal(first[1][name], second[1][name])


def test_the_unconditional_prompt_comes_where_it_is_asked_for(data, tokenizer):
  """The empty prompt around each row's own condition images; everything else is as without it."""
  for task in ("t2i", "ti2i"):
    plain, guided = (make(data, tokenizer, task=task, unconditional=wanted) for wanted in (False, True))
    (bucket, batch), (_, more) = plain.batch(3), guided.batch(3)
    assert set(more) - set(batch) == {"null_tokens", "null_token_count"}
    assert_same((bucket, batch), (bucket, {name: more[name] for name in batch}))
    sources = source_grids(guided.buckets[bucket].source_sizes)
    assert len(sources) == (task == "ti2i")
    expected = tokenizer.encode("", sources)
    assert more["null_tokens"].shape == batch["tokens"].shape and (more["null_token_count"] == len(expected)).all()
    assert (more["null_tokens"][:, :len(expected)] == expected).all() and (more["null_tokens"][:, len(expected):] == tokenizer.pad_id).all()
    example = guided.example(guided.buckets[bucket], unconditional=True)
    assert {name: (x.shape, x.dtype) for name, x in example.items() if name.startswith("null")} == {
        name: (x.shape, x.dtype) for name, x in more.items() if name.startswith("null")}


def test_batch_contract(data, tokenizer):
  loader = make(data, tokenizer)
  assert sorted((b.height, b.width) for b in loader.buckets) == [(48, 96), (64, 64), (96, 48)]
  bucket, batch = loader.batch(0)
  shape = loader.buckets[bucket]
  assert batch["target"].shape == (8, shape.height, shape.width, 3) and batch["target"].dtype == np.uint8
  assert batch["sources"] == () and batch["tokens"].shape == (8, 64) and batch["tokens"].dtype == np.int32
  assert batch["token_count"].dtype == np.int32 and batch["sample_id"].dtype == np.int64
  assert set(batch) == {"target", "sources", "tokens", "token_count", "sample_id"}


def test_rows_hold_the_picture_and_a_caption_of_their_sample(data, tokenizer):
  loader = make(data, tokenizer, resolutions=[Resolution(96, 8, RATIOS)], min_quality=1.0, caption_dropout=0.0)
  picked = set()
  for k in range(12):
    _, batch = loader.batch(k)
    for row, sample_id in enumerate(batch["sample_id"]):
      record = glyphs.example(int(sample_id), seed=0)
      assert record["quality"] == 1.0
      text = tokenizer.decode(batch["tokens"][row, :batch["token_count"][row]])
      place = [i for i, caption in enumerate(record["captions"]) if f"user\n{caption}<|im_end|>" in text]
      assert len(place) == 1
      picked.update(place)
      attributes = Attributes(**json.loads(record["attributes"]))
      assert (batch["target"][row] == glyphs.render(attributes, record["height"], record["width"])).all()
  assert picked == {0, 1, 2, 3}


def test_each_record_comes_exactly_once_per_epoch(data, tokenizer):
  loader = make(data, tokenizer)
  streams = collections.defaultdict(list)
  for k in range(120):
    plan = loader.mixture.plan(k)
    streams[plan.bucket] += plan.records.tolist()
  sizes = {(c.height, c.width): c.kept for c in loader.counts}
  assert sum(sizes.values()) == NUM_TRAIN
  union = set()
  for bucket, stream in streams.items():
    num = sizes[loader.buckets[bucket].height, loader.buckets[bucket].width]
    epochs = [stream[i:i + num] for i in range(0, len(stream) - num + 1, num)]
    assert len(epochs) >= 2 and all(len(set(epoch)) == num for epoch in epochs)
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1 and epochs[0] != epochs[1]
    union |= set(epochs[0])
  assert union == set(range(NUM_TRAIN))


def test_shares_follow_the_weights(data, tokenizer):
  loader = make(data, tokenizer, sets=2, resolutions=[
      Resolution(32, 8, ("1:1",), weight=1.0), Resolution(64, 4, ("1:1",), weight=4.0)], max_crop=0.6)
  seen = collections.Counter()
  for k in range(1000):
    plan = loader.mixture.plan(k)
    assert len(plan.records) == loader.buckets[plan.bucket].batch_size
    seen[plan.dataset, loader.buckets[plan.bucket].height] += 1
  shares = {(0, 32): 0.05, (0, 64): 0.2, (1, 32): 0.15, (1, 64): 0.6}
  assert set(seen) == set(shares) and all(abs(seen[key] / 1000 - share) < 0.01 for key, share in shares.items())


def test_hosts_share_the_global_batch(data, tokenizer):
  whole = make(data, tokenizer)
  for count in (2, 4):
    parts = [make(data, tokenizer, process_index=i, process_count=count) for i in range(count)]
    for k in (0, 7, 10**9):
      bucket, expected = whole.batch(k)
      batches = [part.batch(k) for part in parts]
      joined = {name: np.concatenate([b[name] for _, b in batches]) for name in expected if name != "sources"}
      assert {b for b, _ in batches} == {bucket}
      assert_same((bucket, expected), (bucket, joined | {"sources": ()}))


def test_resume_equals_no_interruption_and_seed_matters(data, tokenizer):
  loader = make(data, tokenizer, sets=2)
  whole = list(itertools.islice(loader.iterate(), 9))
  resumed = list(itertools.islice(make(data, tokenizer, sets=2).iterate(5), 4))
  for first, second in zip(whole[5:], resumed, strict=True):
    assert_same(first, second)
  for k, batch in enumerate(whole):
    assert_same(batch, loader.batch(k))
  other = make(data, tokenizer, sets=2, seed=1)
  assert any((other.mixture.plan(k).records != loader.mixture.plan(k).records).any() for k in range(3))


@pytest.mark.slow
def test_worker_processes_change_nothing(data, tokenizer):
  flags.FLAGS.mark_as_parsed()
  plain, before = itertools.islice(make(data, tokenizer).iterate(3), 5), shared_memory()
  with contextlib.closing(make(data, tokenizer, num_workers=2).iterate(3)) as workers:
    kept = list(itertools.islice(workers, 5))
    processes = multiprocessing.active_children()
    assert len(processes) == 2
  for first, second in zip(plain, kept, strict=True):
    assert_same(first, second)
  assert not any(process.is_alive() for process in processes)
  gone_soon(lambda left=shared_memory() - before: left & shared_memory(), "shared memory, although batches are still in use")


FOREVER = """
from absl import flags
from data_pipelines import records
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution
flags.FLAGS.mark_as_parsed()
tokenizer = records.load_tokenizer({folder!r}, "glyphs")
loader = Loader([DatasetSpec({folder!r}, "glyphs")], [Resolution(64, 8, ("1:1",))], 96, tokenizer, 0, num_workers=1)
for _ in loader.iterate():
  print("read", flush=True)
"""


def mapped(pids):
  """Names in /dev/shm of what these processes have in their memory; those of other tests are none of theirs."""
  maps = [path.read_text() for pid in pids if (path := pathlib.Path(f"/proc/{pid}/maps")).exists()]
  return {name for text in maps for name in re.findall(r"/dev/shm/(psm_\w+)", text)}


def gone_soon(left, what):
  """Waits until `left()` is empty."""
  limit = time.monotonic() + 60
  while left():
    assert time.monotonic() < limit, f"There is still {what}: {left()}."
    time.sleep(0.1)


ENDS = """
import atexit, multiprocessing, sys
from data_pipelines import children

def work(queue, fails):
  children.begin_worker()
  atexit.register(print, "taken down piece by piece")
  queue.put(bytes(10**6))
  if fails:
    raise ValueError("a defect")

if __name__ == "__main__":
  context = multiprocessing.get_context("spawn")
  queue = context.Queue()
  for fails in (False, True):
    one = context.Process(target=work, args=(queue, fails))
    one.start()
    print(len(queue.get()), flush=True)
    one.join()
    print("ended with", one.exitcode, flush=True)
"""


def test_a_worker_ends_when_all_is_sent_and_says_what_went_wrong(tmp_path):
  (tmp_path / "ends.py").write_text(ENDS)
  env = {**os.environ, "PYTHONPATH": str(commands.ROOT)}
  result = subprocess.run([sys.executable, tmp_path / "ends.py"], env=env, capture_output=True, text=True, timeout=300)
  assert re.fullmatch(r"1000000\nended with 0\n(1000000\ntaken down .*|taken down .*\n1000000)\nended with 1\n", result.stdout), result
  assert "ValueError: a defect" in result.stderr


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed_and_leave_nothing(data):
  own = set()
  with subprocess.Popen([sys.executable, "-c", FOREVER.format(folder=str(data[0]))], cwd=commands.ROOT, stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True) as one:
    assert one.stdout.readline() == "read\n"
    children = [int(pid) for path in pathlib.Path(f"/proc/{one.pid}/task").glob("*/children") for pid in path.read_text().split()]
    own.update(*(mapped([one.pid, *children]) for _ in range(50)))
    assert len(children) >= 2 and own, "a worker, the tracker of its shared memory, and what that is"
    one.kill()
    gone_soon(lambda: [pid for pid in children if os.path.exists(f"/proc/{pid}")], "a child")
    assert "leaked" not in one.stderr.read()
  gone_soon(lambda: own & shared_memory(), "shared memory")


def test_edits_bring_their_source_and_instruction(data, tokenizer):
  loader = make(data, tokenizer, task="ti2i", caption_dropout=0.0, resolutions=[Resolution(96, 8, RATIOS, multiple=32)])
  assert all(bucket.task == "ti2i" and bucket.source_sizes == ((bucket.height, bucket.width),) for bucket in loader.buckets)
  seen = set()
  for k in range(8):
    b, batch = loader.batch(k)
    bucket = loader.buckets[b]
    (source,) = batch["sources"]
    assert source.shape == batch["target"].shape and source.dtype == np.uint8
    assert bucket.num_tokens == batch["tokens"].shape[1] == 64 + tokenizer.num_image_tokens(source_grids(bucket.source_sizes))
    assert ((batch["tokens"] == tokenizer.image_token_id).sum(1) == bucket.height * bucket.width // 32**2).all()
    for row, sample_id in enumerate(batch["sample_id"]):
      record = glyph_edits.example(int(sample_id), "train", seed=0)
      attributes = json.loads(record["attributes"])
      for image, name in ((source, "source"), (batch["target"], "target")):
        assert (image[row] == glyphs.render(Attributes(**attributes[name]), record["height"], record["width"])).all()
      text = tokenizer.decode(batch["tokens"][row, :batch["token_count"][row]])
      assert any(text.endswith(f"<|vision_end|>{caption}<|im_end|>\n<|im_start|>assistant\n") for caption in record["captions"])
      seen.add(attributes["change"])
  assert seen == {"ink", "paper", "glyph", "position"}


def test_tasks_share_a_data_set_without_overlap(data, tokenizer):
  specs = [DatasetSpec(str(data[0]), "glyphs", weight=weight, task=task) for task, weight in (("t2i", 0.75), ("ti2i", 0.25))]
  loader = Loader(specs, DEFAULT, 64, tokenizer, 0)
  records_of = {task: sum(c.records for c in loader.counts if c.task == task) for task in ("t2i", "ti2i")}
  assert records_of == {"t2i": NUM_TRAIN, "ti2i": NUM_TRAIN // 2}
  tasks = [loader.buckets[loader.mixture.plan(k).bucket].task for k in range(1000)]
  assert abs(tasks.count("ti2i") - 250) < 9


def test_sources_of_another_shape_and_number_make_buckets_of_their_own(data, tokenizer, monkeypatch):
  def examples(split, num_examples, seed):
    for i, shapes in enumerate([((40, 90),), ((40, 90), (64, 64)), ((64, 64), (40, 90)), ((40, 90),)]):
      pictures = [encode_png(np.full((*shape, 3), 40 * (slot + 1), np.uint8)) for slot, shape in enumerate(shapes)]
      yield {"image": pictures[0], "height": 40, "width": 90, "quality": 1.0, "sample_id": i + (100 if split == "validation" else 0),
             "captions": ["join them"], "languages": ["en"], "attributes": "{}", "sources": pictures,
             "source_height": [h for h, _ in shapes], "source_width": [w for _, w in shapes]}
  monkeypatch.setitem(embedded.SOURCES, "glyphs", embedded.Source(examples, vocab_size=300))
  folder = data[0] / "several"
  embedded.prepare("glyphs", folder, num_examples=4)
  loader = Loader([DatasetSpec(str(folder), "glyphs", task="ti2i")], [Resolution(64, 2, RATIOS)], 64, tokenizer, 0, max_crop=0.5)
  wide, square = (32, 96), (64, 64)
  assert {loader.buckets[cell.bucket].source_sizes: len(cell.records) for cell in loader.mixture.cells} == {
      (wide,): 2, (wide, square): 1, (square, wide): 1}
  assert [count.kept for count in loader.counts] == [4]
  for k in range(4):
    b, batch = loader.batch(k)
    assert [image.shape[1:3] for image in batch["sources"]] == list(loader.buckets[b].source_sizes)
    assert [int(image.mean()) for image in batch["sources"]] == [40 * (i + 1) for i in range(len(batch["sources"]))]


@pytest.mark.slow
def test_dropout_empties_the_asked_share_of_captions(data, tokenizer):
  empty = len(tokenizer.encode(""))
  for dropout in (0.0, 0.3, 1.0):
    loader = make(data, tokenizer, caption_dropout=dropout)
    counts = np.concatenate([loader.batch(k)[1]["token_count"] for k in range(40)])
    assert abs((counts == empty).mean() - dropout) < (0.1 if 0 < dropout < 1 else 1e-9)


def test_left_out_records_are_counted(data, tokenizer):
  loader = make(data, tokenizer, min_quality=1.0, resolutions=[Resolution(64, 8, ("1:1", "1:2"), multiple=16)])
  index = records.open_split(data[0], "glyphs", "train")[1]
  for count in loader.counts:
    assert count.records == count.kept + count.low_quality + count.no_caption + count.cropped
  assert sum(c.records for c in loader.counts) == NUM_TRAIN
  assert sum(c.low_quality for c in loader.counts) == (index["quality"] < 1).sum() > 0
  # The wide pictures are nearest to the square and would lose half of their area.
  wide = (index["width"] > index["height"]) & (index["quality"] == 1) & ~index["source_sizes"].any((1, 2))
  assert sum(c.cropped for c in loader.counts) == wide.sum() > 0


def test_evaluation_is_one_pass_with_weights(data, tokenizer):
  loader = make(data, tokenizer, caption_dropout=1.0)
  batches = list(loader.evaluation_batches())
  real = [(b, i) for b, batch in batches for i, w in zip(batch["sample_id"], batch["weight"]) if w == 1]
  assert sorted(i for _, i in real) == list(range(NUM_TRAIN))
  first = [[i for b, i in real if b == bucket][:8] for bucket in range(3)]
  assert any(ids != sorted(ids) for ids in first) and np.mean(sum(first, [])) > NUM_TRAIN / 4, "they are from anywhere"
  for bucket, batch in batches:
    assert batch["target"].shape[0] == batch["weight"].shape[0] == 8 and batch["weight"].dtype == np.float32
    filler = batch["sample_id"][batch["weight"] == 0]
    assert set(filler) <= set(batch["sample_id"][batch["weight"] == 1])
    for row, sample_id in enumerate(batch["sample_id"]):
      first = glyphs.example(int(sample_id), seed=0)["captions"][0]
      assert batch["tokens"][row, :batch["token_count"][row]].tolist() == tokenizer.encode(first)


def test_evaluation_can_be_short_and_shared(data, tokenizer):
  loader = make(data, tokenizer)
  kept = [i for _, b in loader.evaluation_batches(20) for i, w in zip(b["sample_id"], b["weight"]) if w]
  assert 16 <= len(set(kept)) == len(kept) <= 20 and np.mean(kept) > NUM_TRAIN / 4
  halves = [list(make(data, tokenizer, process_index=i, process_count=2).evaluation_batches(20)) for i in (0, 1)]
  for (_, whole), (_, first), (_, second) in zip(loader.evaluation_batches(20), *halves, strict=True):
    for name in ("target", "weight", "sample_id"):
      np.testing.assert_array_equal(whole[name], np.concatenate([first[name], second[name]]))


@pytest.mark.parametrize("options, message", [
    ({"process_count": 3}, "batch_size=8 at 64 px does not divide over 3 processes"),
    ({"process_index": 2, "process_count": 2}, "process_index=2"),
    ({"languages": ("fr",)}, "No record of 'glyphs' .* is left by"),
    ({"min_quality": 1.1}, "No record"),
    ({"split": "test"}, "no split 'test'"),
    ({"task": "video"}, "task='video'"),
    ({"weights": (0.0,)}, "weight=0.0"),
    ({"seed": -1}, "seed=-1"),
    ({"caption_dropout": 2.0}, "caption_dropout=2.0"),
    ({"resolutions": []}, "at least one"),
])
def test_user_errors(data, tokenizer, options, message):
  with pytest.raises(ValueError, match=message):
    make(data, tokenizer, **options)


def test_a_prompt_that_another_tokenizer_makes_too_long_is_replaced(data, tokenizer):
  other = embedded.train_tokenizer(["x"], 300)  # a token for nearly every byte
  lengths = sorted(len(other.encode(caption)) for i in range(NUM_TRAIN) for caption in glyphs.example(i, seed=0)["captions"])
  middle = lengths[len(lengths) // 2]
  loader = Loader([DatasetSpec(str(data[0]), "glyphs")], DEFAULT, middle, other, 0, max_faulty=1.0, caption_dropout=0.0)
  for k in range(6):
    assert loader.batch(k)[1]["token_count"].max() <= middle
  assert loader.faults and all(f"more than the {middle} of the bucket" in fault.sentence for fault in loader.faults)


def test_what_is_left_out_is_one_line_and_their_names_are_in_a_file(data, tokenizer, tmp_path, capsys):
  index = records.open_split(data[0], "glyphs", "train")[1]
  alone = ~index["source_sizes"].any((1, 2))
  longest = np.array([some.max() for some in np.split(np.array(index["caption_tokens"]), np.cumsum(index["num_captions"])[:-1])])
  most = int(np.median(longest[alone]))
  wanted = np.array(index["sample_id"])[alone & (longest > most)].tolist()
  load = lambda **more: Loader([DatasetSpec(str(data[0]), "glyphs")], DEFAULT, most, tokenizer, 0, max_crop=0.9, caption_dropout=0.0, **more)
  tell = lambda loader: left_out.say(types.SimpleNamespace(name="first"), loader, tmp_path / "first")
  tell(load())
  named = tmp_path / "first" / "left_out.jsonl"
  assert 5 < len(wanted) < NUM_TRAIN and capsys.readouterr().out == (
      f"Stage first: {NUM_TRAIN - len(wanted)} of {NUM_TRAIN} records are used, {len(wanted)} are left out: {len(wanted)} with a caption longer than "
      f"num_tokens; raise num_tokens, or set too_long='truncate'. Their names: {named}.\n")
  rows = [json.loads(line) for line in named.read_text().splitlines()]
  assert [row["sample_id"] for row in rows] == wanted and {(row["dataset"], row["reason"]) for row in rows} == {("glyphs", "too_long")}
  assert all(max(len(tokenizer.encode(caption)) for caption in row["captions"]) > most for row in rows)
  cut = load(truncate=True)
  tell(cut)
  assert capsys.readouterr().out == f"Stage first: all {NUM_TRAIN} records are used.\n" and not named.exists()
  batches = [cut.batch(k)[1] for k in range(3 * NUM_TRAIN // 8)]
  seen = {i: tokenizer.decode_prompt(tokens) for batch in batches for i, tokens in zip(batch["sample_id"].tolist(), batch["tokens"])}
  whole = {row["sample_id"]: row["captions"] for row in rows}
  assert not cut.faults and all(any(caption.startswith(seen[i]) for caption in whole[i]) for i in wanted)
  assert any(seen[i] not in whole[i] for i in wanted), "one of them was cut"


def test_no_tensorflow():
  assert "tensorflow" not in sys.modules
