"""Pairs of pictures from their sources to batches: what is chosen and what is rejected arrives in its place, and nowhere is a half of one lost."""

import dataclasses
import json

import numpy as np
import pytest
from raw_folder import encoded, picture
from raw_sources import parquet, tar, write

from configs import base, curation, quickstart
from data_pipelines import records
from data_pipelines.curation import encode
from data_pipelines.curation.reading import Reading
from data_pipelines.curation.sources import look_up, plan_units, read_unit
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.transforms import resize_crop
from qimg2.runtime import inspection
from qimg2.runtime.caching.latents import cache_latents
from qimg2.runtime.caching.networks import Encoder, Options
from qimg2.runtime.config import plain
from qimg2.runtime.run import Run

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
         "huggingface": lambda at: parquet(str(at), rows(lambda data, i: {"bytes": data, "path": None}, "chosen_image", "rejected_image"))}


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_both_pictures(kind, tmp_path):
  found = read(KINDS[kind](tmp_path))
  assert [(one.error, one.image, one.rejected, [caption.text for caption in one.captions], one.attributes) for one in found] == [
      ("", ENCODED[i, False], ENCODED[i, True], [f"picture {i}"], {}) for i in range(3)]


def test_a_pair_of_two_shapes_is_refused(tmp_path):
  in_folder(tmp_path, 1)
  (tmp_path / "00.rejected.png").write_bytes(encoded(picture(7, 72, 120), "PNG"))
  one, = read(tmp_path)
  with pytest.raises(ValueError, match="pair 00.png are 72 x 96 and 72 x 120 px: give both one aspect ratio"):
    _ = one.rejected_pixels
  (tmp_path / "00.rejected.png").write_bytes(encoded(picture(7, 36, 48), "PNG"))
  assert read(tmp_path)[0].rejected_pixels.shape == (36, 48, 3)


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


def test_a_latent_cache_holds_the_latents_of_both(data_dir, tmp_path, one_device_in_module, monkeypatch):
  cfg = config(data_dir)
  vae = Run(cfg, tmp_path).nets.vae
  shape = vae.spatial_factor, vae.latent_channels
  monkeypatch.setattr(Encoder, "latents", lambda self, pixels, num, name: [one.tobytes() for one in cells(pixels, *shape)[:num]])
  cache_latents(cfg, "pairs", tmp_path, "cached", Options(False, "float32", shard_records=100))
  run, cached = Run(cfg, tmp_path), Run(config(data_dir, name="cached"), tmp_path)
  (_, pixels), (_, latents) = (one.loader(one.cfg.stages[0]).batch(0) for one in (run, cached))
  np.testing.assert_array_equal(pixels["sample_id"], latents["sample_id"])
  assert "rejected" not in latents and "target" not in latents
  for key, name in (("target", "latents"), ("rejected", "rejected_latents")):
    np.testing.assert_array_equal(latents[name], cells(pixels[key], *shape))
