"""Pairs of pictures from their sources to batches: what is chosen and what is rejected arrives in its place, and nowhere is a half of one lost."""

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
from raw_folder import encoded, picture
from raw_sources import parquet, tar, write

from configs import base, curation, quickstart
from data_pipelines import records
from data_pipelines.curation import encode
from data_pipelines.curation.evaluated import write_pairs
from data_pipelines.curation.reading import Reading
from data_pipelines.curation.sources import look_up, plan_units, read_unit
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.transforms import resize_crop
from data_pipelines.verify import verify
from qimg2.runtime import curriculum, inspection, report
from qimg2.runtime.caching import latents as caching
from qimg2.runtime.caching.networks import Options
from qimg2.runtime.config import plain
from qimg2.runtime.run import Run
from qimg2.training.watch import Ended

NUM = 24
ENCODED = {(i, worse): encoded(picture(100 * worse + i), "PNG") for i in range(NUM) for worse in (False, True)}


def read(source):
  return [sample for unit in plan_units(look_up(str(source), Reading("lines")), 512) for sample in read_unit(unit)]


def in_folder(at, num=3):
  for i in range(num):
    (at / f"{i:02d}.png").write_bytes(ENCODED[i, False])
    (at / f"{i:02d}.rejected.png").write_bytes(ENCODED[i, True])
    (at / f"{i:02d}.txt").write_text(f"picture {i}")
  return at


def rows(give=lambda data, i: data, chosen="chosen", rejected="rejected"):
  return [{chosen: give(ENCODED[i, False], i), rejected: give(ENCODED[i, True], i), "prompt": f"picture {i}"} for i in range(3)]


def in_table(at):
  """A table of a folder, whose rows name both pictures of a pair."""
  for i in range(3):
    for worse in (False, True):
      (at / f"{'bad' if worse else 'good'}{i}.png").write_bytes(ENCODED[i, worse])
  lines = [json.dumps({"file_name": f"good{i}.png", "rejected_path": f"bad{i}.png", "text": f"picture {i}"}) for i in range(3)]
  (at / "metadata.jsonl").write_text("\n".join(lines))
  return at


def in_tar(at):
  members = {f"{i:02d}.{end}": data for i in range(3) for end, data in (
      ("png", ENCODED[i, False]), ("rejected.png", ENCODED[i, True]), ("txt", f"picture {i}".encode()))}
  write(str(at), {"pairs.tar": tar(members)})
  return at / "pairs.tar"


KINDS = {"folder": in_folder, "table": in_table, "tar": in_tar, "parquet": lambda at: parquet(str(at), rows()),
         "pick_a_pic": lambda at: parquet(str(at), [
             {f"jpg_{i % 2}": ENCODED[i, False], f"jpg_{1 - i % 2}": ENCODED[i, True], f"label_{i % 2}": 1.0, f"label_{1 - i % 2}": 0.0,
              "caption": f"picture {i}"} for i in range(3)]),
         "huggingface": lambda at: parquet(str(at), rows(lambda data, i: {"bytes": data, "path": None}, "chosen_image", "rejected_image"))}


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_both_pictures(kind, tmp_path):
  found = read(KINDS[kind](tmp_path))
  assert [(one.error, one.image, one.rejected, [caption.text for caption in one.captions], one.attributes) for one in found] == [
      ("", ENCODED[i, False], ENCODED[i, True], [f"picture {i}"], {}) for i in range(3)]


@pytest.mark.parametrize("record, message", [
    ({"jpg_0": "good0.png", "jpg_1": "bad0.png", "label_0": 0.5, "label_1": 0.5}, "two pictures of the pair are worth the same, 0.5: nothing says"),
    ({"image_path": ["good0.png", "bad0.png", "bad1.png"], "human_preference": [1, 0, 0]}, "is two pictures and two numbers: of more pictures write"),
    ({"image_path": ["good0.png", "bad0.png"], "human_preference": [1, None]}, "`human_preference` are worth what is no number"),
    ({"chosen": "good0.png", "rejected": "good0.png"}, "chosen and the rejected picture of the pair are the same: name two"),
    ({"image": "good0.png", "path1": "good1.png", "path2": "bad0.png"}, "names `image` beside the pair of `path1`, `path2`: remove"),
    ({"path1": "good0.png", "path2": "bad0.png", "rejected": "bad1.png"}, "names `rejected` beside the pair of `path1`, `path2`: remove"),
    ({"chosen": "good0.png"}, "The pair has no rejected picture: name it in `rejected`"),
    ({"chosen": "good0.png", "rejected": None}, "The pair has no rejected picture: name it in `rejected`"),
    ({"image_path": ["bad0.png", "good0.png"], "human_preference": [0, 1]}, ""), ({"path1": "good0.png", "path2": "bad0.png"}, "")])
def test_what_is_no_pair_is_left_out_with_its_reason(record, message, tmp_path):
  in_table(tmp_path)
  (tmp_path / "metadata.jsonl").write_text(json.dumps(record | {"prompt": "a"}))
  one, = [one for one in read(tmp_path / "metadata.jsonl")]
  assert message in one.error and bool(message) == bool(one.error)
  if not message:
    assert (one.image, one.rejected, one.attributes) == (ENCODED[0, False], ENCODED[0, True], {})


def test_a_pair_of_two_shapes_is_refused(tmp_path):
  in_folder(tmp_path, 1)
  (tmp_path / "00.rejected.png").write_bytes(encoded(picture(7, 72, 120), "PNG"))
  one, = read(tmp_path)
  with pytest.raises(ValueError, match="pair 00.png are 72 x 96 and 72 x 120 px: give both one aspect ratio"):
    _ = one.rejected_pixels
  (tmp_path / "00.rejected.png").write_bytes(encoded(picture(7, 36, 48), "PNG"))
  assert read(tmp_path)[0].rejected_pixels.shape == (36, 48, 3)


def evaluated(at, *scores, **more):
  """An evaluation's folder with a picture for each (prompt, seed, score); None for one that has none."""
  (at / "pictures").mkdir(parents=True, exist_ok=True)
  lines = []
  for prompt, seed, score in scores:
    (at / "pictures" / f"{prompt}_{seed}.png").write_bytes(ENCODED[prompt, bool(seed)])
    given = {"error": "no letters"} if score is None else {"metrics": {"glyph": score, "other": 0.0}}
    lines.append(json.dumps({"suite": "glyphs", "cluster": str(prompt), "prompt": f"picture {prompt}", "seed": seed,
                             "file": f"pictures/{prompt}_{seed}.png"} | given | more))
  (at / "scores.jsonl").write_text("\n".join(lines))
  return at


@pytest.mark.parametrize("by, better", [("glyph", 0), ("glyphs/glyph", 0), ("-glyph", 1)])
def test_the_best_and_the_worst_picture_of_a_prompt_become_a_pair(by, better, tmp_path):
  folder = evaluated(tmp_path / "scores", (0, 0, 0.9), (0, 1, 0.2), (1, 0, 0.5), (1, 1, 0.5), (2, 0, 1.0), (2, 1, None))
  table = tmp_path / "pairs.jsonl"
  assert write_pairs(folder, by, table) == {"pairs": 1, "tied": 1, "single": 1}
  made = table.stat().st_mtime_ns
  write_pairs(folder, by, table)
  assert table.stat().st_mtime_ns == made, "the same source"
  found = look_up(str(table), Reading("lines", picture_root=str(folder)))
  one, = [sample for unit in plan_units(found, 512) for sample in read_unit(unit)]
  assert (one.error, one.image, one.rejected) == ("", ENCODED[0, bool(better)], ENCODED[0, not better])
  assert [caption.text for caption in one.captions] == ["picture 0"] and one.attributes["chosen_worth"] > one.attributes["rejected_worth"]


@pytest.mark.parametrize("by, more, message", [
    ("clarity", {}, "has no metric 'clarity': choose one of glyphs/glyph, glyphs/other; a - before"),
    ("other", {}, "gives no pair by other: 0 of 1 prompts have one picture, and 1 only such as are worth the same"),
    ("glyph", {"num_sources": 1}, "suite glyphs are edits, whose condition images an evaluation does not keep")])
def test_what_gives_no_pairs_is_said(by, more, message, tmp_path):
  folder = evaluated(tmp_path, (0, 0, 0.9), (0, 1, 0.2), **more)
  with pytest.raises(ValueError, match=message):
    write_pairs(folder, by, tmp_path / "pairs.jsonl")
  with pytest.raises(ValueError, match="nowhere has no scores.jsonl: name the --out of launch.evaluate"):
    write_pairs(tmp_path / "nowhere", by, tmp_path / "pairs.jsonl")


def build(out, name, samples):
  """A data set of samples as curation writes their records, the last quarter of them held out."""
  made = [encode.record(one, plain(curation.get_config("small"))["encode"], 6) | {"sample_id": i} for i, one in enumerate(samples)]
  parts = dict(zip(records.SPLITS, (made[:-NUM // 4], made[-NUM // 4:])))
  columns = {split: records.Columns() for split in parts}
  shards = {split: [records.write_shard(out / split, columns[split].watch(some))] for split, some in parts.items()}
  tokenizer = train_tokenizer([f"picture {i}" for i in range(NUM)], 300)
  records.finish(out / name, name, shards, {split: one.arrays(tokenizer) for split, one in columns.items()}, tokenizer, {}, {})


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A data set of pairs, and one of the same pictures without their rejected ones."""
  out = tmp_path_factory.mktemp("pairs")
  samples = read(in_folder(tmp_path_factory.mktemp("raw"), NUM))
  build(out, "pairs", samples)
  build(out, "plain", [dataclasses.replace(one, rejected=b"") for one in samples])
  return out


def loader(data_dir, name="pairs", px=64, pairs=True, **options):
  spec = DatasetSpec(str(data_dir), name, **options)
  return Loader([spec], (Resolution(px, 4, ("4:3",), multiple=16),), 64, records.load_tokenizer(data_dir, name), 0, pairs=pairs)


def test_a_batch_has_the_rejected_picture_of_its_own_row(data_dir):
  facts = records.read_meta(data_dir / "pairs")["facts"]
  assert facts["train_pairs"] == facts["train"] == 18 and facts["validation_pairs"] == facts["validation"] == 6
  assert "train_pairs" not in records.read_meta(data_dir / "plain")["facts"]
  made = loader(data_dir)
  by_id = {int(one["sample_id"]): one for one in records.open_split(data_dir, "pairs", "train")[0]}
  _, batch = made.batch(3)
  assert {name: x.shape for name, x in batch.items() if name in ("target", "rejected")} == dict.fromkeys(("target", "rejected"), (4, 48, 80, 3))
  for row, i in enumerate(batch["sample_id"]):
    number = int(by_id[int(i)]["captions"][0].decode().split()[-1])
    for name, worse in (("target", False), ("rejected", True)):
      expected = resize_crop(np.asarray(picture(100 * worse + number)), 48, 80)
      assert np.abs(batch[name][row].astype(int) - expected).mean() < 2
  example = made.example(made.buckets[0])
  assert {name: x.dtype for name, x in example.items() if name != "sources"} == {name: x.dtype for name, x in batch.items() if name != "sources"}
  assert "rejected" not in loader(data_dir, pairs=False, ignore_rejected=True).batch(0)[1]


def test_a_data_set_of_pairs_is_verified(data_dir):
  assert verify(data_dir, "pairs")["records"] == NUM
  made = records.open_split(data_dir, "pairs", "train")
  lying = made[1] | {"has_rejected": ~np.array(made[1]["has_rejected"])}
  with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="another rejected picture than the index says"):
    patch.setattr(records, "open_split", lambda *_: (made[0], lying))
    verify(data_dir, "pairs")


def test_records_without_a_rejected_picture_are_left_out_and_said(data_dir):
  with pytest.raises(ValueError, match=r"of \d+: \d+ no_rejected"):
    loader(data_dir, "plain")


def test_a_weight_of_the_loss_is_in_the_batches_of_its_data_set(data_dir):
  specs = [DatasetSpec(str(data_dir), "plain"), DatasetSpec(str(data_dir), "pairs", loss_weight=0.25, ignore_rejected=True)]
  made = Loader(specs, (Resolution(64, 4, ("4:3",), multiple=16),), 64, records.load_tokenizer(data_dir, "plain"), 0)
  for k in range(6):
    expected = 0.25 if made.mixture.datasets[made.mixture.plan(k).dataset].name == "pairs" else 1.0
    np.testing.assert_array_equal(made.batch(k)[1]["loss_weight"], np.full(4, expected, np.float32))
  assert "loss_weight" not in loader(data_dir, pairs=False).batch(0)[1]
  with pytest.raises(ValueError, match="loss_weight=0.0: give a positive one"):
    loader(data_dir, loss_weight=0.0)


# ---- stages ----


def config(data_dir, method="dpo", **part):
  cfg = quickstart.get_config("smoke")
  cfg.data_dir, cfg.num_tokens = str(data_dir), 40
  stage = base.stage("pairs", method, frozen=dict(encoder="default", vae="default"), num_steps=2, mixture=(base.part(**({"name": "pairs"} | part)),),
                     resolutions=(dict(base_px=64, batch_size=8, ratios=("4:3",), multiple=16),),
                     evaluation=dict(split="validation", num_samples=None))
  cfg.evals, cfg.stages = {}, (stage,)
  return cfg


def test_a_stage_and_its_data_agree_on_pairs(data_dir, tmp_path):
  with pytest.raises(ValueError, match="learns from pairs, but no record of data set 'plain' has a rejected picture"):
    Run(config(data_dir, name="plain"), tmp_path)
  with pytest.raises(ValueError, match=r"\d+ records of data set 'pairs' have a rejected picture, which the method 'flow_matching'"):
    Run(config(data_dir, "flow_matching"), tmp_path)
  Run(config(data_dir, "flow_matching", ignore_rejected=True), tmp_path)


def test_a_stage_that_its_watch_ends_is_reported(data_dir, tmp_path, monkeypatch):
  reported = []
  monkeypatch.setattr(curriculum, "train_one", mock.Mock(side_effect=Ended("the watch")))
  monkeypatch.setattr(report, "write_report", reported.append)
  with pytest.raises(Ended, match="the watch"):
    curriculum.train(config(data_dir), tmp_path)
  assert len(reported) == 1


def test_the_sheet_of_inspect_data_shows_both(data_dir):
  data = inspection.open_data(config(data_dir))
  both = inspection.sheet(data, 0, 1, 2)
  one = inspection.sheet(inspection.open_data(config(data_dir, "flow_matching", ignore_rejected=True)), 0, 1, 2)
  assert both.shape[1] > one.shape[1]


def cells(pixels, factor, channels):
  """What stands for the VAE here: the mean colour of each cell, in all channels."""
  rows, height, width, _ = pixels.shape
  means = pixels.reshape(rows, height // factor, factor, width // factor, factor, 3).mean(axis=(2, 4, 5), dtype=np.float32)
  return np.repeat(means[..., None], channels, axis=-1)


class Means:
  """In place of an encoder, whose networks would be compiled: `cells` of the pictures."""
  fingerprints = {"vae": "0"}

  def __init__(self, run, weights, options):
    del weights, options
    self._shape = run.nets.vae.spatial_factor, run.nets.vae.latent_channels

  def latents(self, pixels, num, name):
    del name
    return [one.tobytes() for one in cells(pixels, *self._shape)[:num]]


def test_a_latent_cache_holds_the_latents_of_both(data_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(caching, "Encoder", Means)
  monkeypatch.setattr(Run, "frozen_weights", lambda self, stage, *_: dict.fromkeys(self.algorithm(stage).frozen))
  cfg = config(data_dir)
  caching.cache_latents(cfg, "pairs", tmp_path, "cached", Options(False, "float32", shard_records=100))
  run, cached = Run(cfg, tmp_path), Run(config(data_dir, name="cached"), tmp_path)
  (_, pixels), (_, latents) = (one.loader(one.cfg.stages[0]).batch(0) for one in (run, cached))
  np.testing.assert_array_equal(pixels["sample_id"], latents["sample_id"])
  assert "rejected" not in latents and "target" not in latents
  for key, name in (("target", "latents"), ("rejected", "rejected_latents")):
    np.testing.assert_array_equal(latents[name], cells(pixels[key], run.nets.vae.spatial_factor, run.nets.vae.latent_channels))
