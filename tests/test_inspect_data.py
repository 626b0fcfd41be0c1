"""What is shown is what training will see."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from commands import launch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_up import TOKENIZER, plain_index, world_of
from PIL import Image

from configs import quickstart
from data_pipelines import mixture as mixtures
from data_pipelines.cache import Cache
from data_pipelines.embedded import glyph_edits, glyphs
from data_pipelines.loader import Loader
from qimg2.runtime import inspection, sheets
from qimg2.runtime.inspection import open_data

STAGE = "high_resolution"  # draws and edits


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  cfg = quickstart.get_config("smoke")
  cfg.data_dir, cfg.prepare.num_examples = str(tmp_path_factory.mktemp("data")), 120
  cfg.stages[2].max_crop = 0.6
  cfg.stages[2].resolutions[0].ratios = ("1:1", "1:2")
  return cfg


@pytest.fixture(scope="module")
def data(config):
  return open_data(config, STAGE)


def changed(config, **changes):
  cfg = copy.deepcopy(config)
  cfg.stages[2].update(changes)
  return cfg


def drawn(monkeypatch, *arguments):
  """The rows that a sheet is drawn from, and the sheet."""
  rows, real = [], inspection.strips
  monkeypatch.setattr(inspection, "strips", lambda some, side: rows.extend(some) or real(some, side))
  return rows, inspection.sheet(*arguments)


def test_the_plan_is_what_the_loader_loads(data):
  rows = json.loads(json.dumps(list(inspection.plan(data, 0, 24))))
  assert [row["batch"] for row in rows] == list(range(24)) and {row["task"] for row in rows} == {"t2i", "ti2i"}
  assert {(row["bucket"]["height"], row["bucket"]["width"]) for row in rows} == {(64, 64), (64, 32)}
  for row in rows:
    number, batch = data.loader.batch(row["batch"])
    bucket = row["bucket"]
    assert (row["stage"], row["dataset"], row["task"]) == (STAGE, "glyphs", data.loader.buckets[number].task)
    assert row["sample_ids"] == batch["sample_id"].tolist() and batch["tokens"].shape == (bucket["batch_size"], bucket["num_tokens"])
    assert batch["target"].shape[1:3] == (bucket["height"], bucket["width"])
    assert [list(source.shape[1:3]) for source in batch["sources"]] == bucket["source_sizes"]
  assert list(inspection.plan(data, 5, 3)) == rows[5:8]


def test_processes_divide_the_plan(config, data):
  parts = [open_data(config, STAGE, (i, 4)) for i in range(4)]
  for whole, *rows in zip(inspection.plan(data, 7, 5), *(inspection.plan(part, 7, 5) for part in parts)):
    assert all(len(row["sample_ids"]) == 2 for row in rows)
    assert [number for row in rows for number in row["sample_ids"]] == whole["sample_ids"]


def test_the_truth_of_each_row_is_that_of_its_record(data):
  made = {"t2i": lambda number: glyphs.example(number, 0), "ti2i": lambda number: glyph_edits.example(number, "train", 0)}
  for row in inspection.plan(data, 0, 8):
    expected = [json.loads(made[row["task"]](number)["attributes"]) for number in row["sample_ids"]]
    assert inspection.truths(data, row["batch"]) == expected


def test_no_weights_and_no_mesh_of_the_config_are_needed(config):
  cfg = copy.deepcopy(config)
  cfg.mesh.fsdp, cfg.stages[0].start_from = 1024, "a stage that is nowhere"
  before = len(jax.live_arrays())
  some = open_data(cfg)
  assert some.stage == "vae" and len(list(inspection.plan(some, 0, 2))) == 2
  inspection.summary(some)
  assert len(jax.live_arrays()) == before and cfg.mesh.fsdp == 1024


def test_the_sheet_holds_pictures_and_prompts_of_the_batches(data, monkeypatch):
  rows, sheet = drawn(monkeypatch, data, 3, 6, 5)
  assert sheet.dtype == np.uint8 and sheet.shape[2] == 3 and len(rows) == 6
  captions = set()
  for k, (heading, tiles) in enumerate(rows, 3):
    number, batch = data.loader.batch(k)
    assert heading.startswith(f"batch {k}: glyphs, {data.loader.buckets[number].task}, ") and len(tiles) == 5
    for i, (images, caption) in enumerate(tiles):
      assert len(images) == len(batch["sources"]) + 1
      np.testing.assert_array_equal(images[-1], batch["target"][i])
      assert all((image == source[i]).all() for image, source in zip(images, batch["sources"]))
      text = data.tokenizer.decode(batch["tokens"][i, :batch["token_count"][i]])
      assert f"user\n{caption}<" in text or f"<|vision_end|>{caption}<" in text or caption == "(empty)"
      captions.add(caption)
  assert len(captions) > 10 and len({len(images) for _, tiles in rows for images, _ in tiles}) == 2


def test_a_dropped_caption_is_marked(config, monkeypatch):
  for dropout in (0.0, 1.0):
    rows, _ = drawn(monkeypatch, open_data(changed(config, caption_dropout=dropout), STAGE), 0, 2)
    assert {caption == "(empty)" for _, tiles in rows for _, caption in tiles} == {dropout == 1.0}
    assert all(len(tiles) == 8 for _, tiles in rows)


class Ramp(Cache):
  """A cache of latents that rise from left to right in the first channel, and fall in the second."""

  def read(self, arrays, row, record, bucket, name):
    for latents in (arrays["latents"][row], *(array[row] for array in arrays["source_latents"])):
      ramp = np.linspace(-3, 3, latents.shape[1])
      latents[:] = 0
      latents[..., 0], latents[..., 1] = ramp, -ramp

  def read_features(self, arrays, records, captions):
    pass


def test_a_latent_cache_shows_its_first_channels(config, monkeypatch):
  monkeypatch.setattr(mixtures, "cached_shapes", lambda data_dir, name: ())
  monkeypatch.setattr(mixtures, "open_cache", lambda data_dir, name: Ramp("float16", 4, 16, feature_width=8, num_system_tokens=1))
  rows, sheet = drawn(monkeypatch, open_data(config, STAGE), 0, 20)
  assert sheet.shape[0] > 20 * sheets.LINE_PX
  images = [image for _, tiles in rows for some, _ in tiles for image in some]
  assert {len(some) for _, tiles in rows for some, _ in tiles} == {1, 2} and {image.shape for image in images} == {(4, 4, 3), (4, 2, 3), (2, 4, 3)}
  for image in images:
    assert (image[0, 0] == (0, 255, 128)).all() and (image[0, -1] == (255, 0, 128)).all()
  gray = inspection._visible(np.full((1, 2, 2, 1), 3.0))
  assert gray.shape == (1, 2, 2, 3) and (gray == 255).all()


@pytest.mark.slow
def test_the_summary_agrees_with_the_batches(config):
  some = open_data(changed(config, caption_dropout=0.3), STAGE)
  facts = json.loads(json.dumps(inspection.summary(some)))
  buckets = some.loader.buckets
  assert facts["num_steps"] == len(buckets) == 5 and len(facts["records"]) == len(some.loader.counts)
  np.testing.assert_allclose([row["share"] for row in facts["datasets"]], [0.65, 0.35])
  np.testing.assert_allclose([row["share"] for row in facts["tasks"]], [0.65, 0.35])
  assert [row["task"] for row in facts["tasks"]] == ["t2i", "ti2i"]
  plans = [some.loader.mixture.plan(k).bucket for k in range(1000)]
  np.testing.assert_allclose([row["share"] for row in facts["buckets"]], [plans.count(number) / 1000 for number in range(5)], atol=0.01)
  assert sum(row["records"] for row in facts["buckets"]) == sum(row["kept"] for row in facts["records"])
  counts = {number: [] for number in range(5)}
  for k in range(240):
    number, batch = some.loader.batch(k)
    counts[number] += batch["token_count"].tolist()
  for number, row in enumerate(facts["buckets"]):
    assert abs(1 - np.mean(counts[number]) / buckets[number].num_tokens - row["padding"]) < 0.03 and len(counts[number]) >= 80
  text = inspection.table(facts)
  assert "5 compiled steps" in text and "65.00%" in text and "64x64" in text and max(map(len, text.splitlines())) < 160


def test_padding_knows_how_often_each_kind_of_caption_is_drawn(monkeypatch):
  index = plain_index([(64, 64)]) | {"num_captions": np.array([4]), "caption_tokens": np.array([20, 30, 60, 64]),
                                     "caption_language": np.ones(4, int), "caption_kind": np.array([0, 0, 1, 2])}
  world = world_of(index, spec=dict(caption_weights={"general": 3.0, "text": 1.0}))
  monkeypatch.setattr(inspection, "open_split", lambda *_: (None, index))
  facts = inspection.summary(inspection.Data("s", world.build(Loader), TOKENIZER, 0.2))
  mean = 0.8 * (0.75 * 25 + 0.25 * 60) + 0.2 * TOKENIZER.count([""])[0]
  assert facts["buckets"][0]["padding"] == pytest.approx(1 - mean / 64)


def test_padding_is_unknown_with_another_tokenizer(data):
  tokenizer = copy.copy(data.tokenizer)
  tokenizer.fingerprint = "another"
  other = dataclasses.replace(data, tokenizer=tokenizer)
  assert {row["padding"] for row in inspection.summary(other)["buckets"]} == {None}
  assert "unknown" in inspection.table(inspection.summary(other))


@pytest.mark.parametrize("change, message", [
    (dict(stage="nope"), "There is no stage 'nope' in this config: it has vae, low_resolution, high_resolution, sft"),
    (dict(process=(4, 4)), "process_id=4 must be one of num_processes=4 processes"),
    (dict(process=(0, 3)), "batch_size=8 at 48 px does not divide over 3 processes"),
    (dict(process=(0, 0)), "process_id=0 must be one of num_processes=0"),
])
def test_mistakes_are_named(config, change, message):
  with pytest.raises(ValueError, match=message):
    open_data(config, **{"stage": STAGE} | change)


def test_nothing_to_draw_is_named(data):
  with pytest.raises(ValueError, match="nothing to draw in 0 batches of 8 tiles"):
    inspection.sheet(data, 0, 0)


def test_the_command(config, data, tmp_path):
  inspect = lambda *arguments: launch("launch.inspect_data", "--config=configs/quickstart.py:smoke", f"--config.data_dir={config.data_dir}",
                                      "--config.prepare.num_examples=120", *arguments)
  result = inspect("--stage=sft", "--num_batches=3", "--start=2", "--num_processes=4", "--process_id=1", "--summary", "--truth",
                   f"--out={tmp_path}/sheets/a.png")
  assert result.returncode == 0, result.stderr
  rows = [json.loads(line) for line in result.stdout.splitlines()]
  assert [row["batch"] for row in rows] == [2, 3, 4]
  assert all(row["stage"] == "sft" and len(row["sample_ids"]) == len(row["truth"]) == 2 for row in rows)
  assert "compiled steps" in result.stderr
  assert Image.open(tmp_path / "sheets" / "a.png").size[1] > 3 * 128
  result = inspect("--stage=nope")
  assert result.returncode == 1 and result.stdout == "" and "There is no stage 'nope'" in result.stderr and "Traceback" not in result.stderr


# ---- text on sheets --------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@example("小さな赤いボール" * 40, 128)
@example("שלום עולם مرحبا بالعالم नमस्ते 🦊👨‍👩‍👧 \x00\ud800", 90)
@given(st.text(max_size=200), st.integers(1, 200))
@pytest.mark.slow
def test_any_text_is_wrapped_and_drawn(text, width):
  lines = sheets.wrap(text, width)
  assert len(lines) <= sheets.MAX_LINES and all(line.strip() for line in lines)
  assert all(sheets.font().getlength(line) <= width + sheets.TEXT_PX for line in lines if len(line) > 2)
  image = np.zeros((4, 6, 3), np.uint8)
  assert sheets.strips([(text, [([image, image], text)] * 2), ("", [])]).shape[2] == 3
  assert sheets.grid([image], 1, [text], scale=8).shape[1] == 6 * 8 + 2 * sheets.MARGIN_PX


def test_wrapping_loses_no_word_and_long_text_ends_in_an_ellipsis():
  text = "a large red ball on the grass beside a small blue cube"
  assert " ".join(sheets.wrap(text, 100)) == text and len(sheets.wrap(text, 100)) > 2
  assert "".join(sheets.wrap("x" * 60, 100)) == "x" * 60
  long = sheets.wrap("word " * 500, 100)
  assert len(long) == sheets.MAX_LINES and long[-1].endswith("…")


def test_sheet_sizes():
  small, large, wide = (np.full((*size, 3), 7, np.uint8) for size in ((16, 16), (1000, 500), (40, 400)))
  for image, size in ((small, (128, 128)), (large, (128, 64)), (wide, (12, 128))):
    assert sheets._fit(image, 128).size == size[::-1]
