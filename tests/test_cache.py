"""Training from a latent cache is training from pixels, and a cache is the same however often its making was interrupted."""

import copy
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kill_points import last_arrays
from ml_collections import ConfigDict

from configs import base, quickstart
from data_pipelines import records
from data_pipelines.cache import check_use
from data_pipelines.transforms import DECODING
from launch import cache_latents as launch_cache_latents
from qimg2.runtime import curriculum
from qimg2.runtime.caching import latents as launcher
from qimg2.runtime.caching.latents import cache_latents
from qimg2.runtime.caching.networks import Encoder, Options
from qimg2.runtime.config import parse
from qimg2.runtime.curriculum import train
from qimg2.runtime.run import Run
from qimg2.training.checkpoint import save_weights
from qimg2.training.metrics import read_rows

STAGE = "high_resolution"
VARIANTS = [("float32", False), ("float32", True), ("float16", True)]  # dtype, features
SHARD = 40  # of 96 + 48 records: four shards of the training split, one of the validation split


def cache_name(dtype, features):
  return f"glyphs_{dtype}{'_features' * features}"


EIGHT = jax.devices()
pytestmark = pytest.mark.usefixtures("one_device_in_module")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """A stage of drawing and editing on few glyphs, at two resolutions. States are cached at the first one alone, to compile less."""
  cfg = quickstart.get_config("smoke")
  cfg.data_dir, cfg.evals, cfg.num_tokens, cfg.prepare.num_examples = str(tmp_path_factory.mktemp("data")), ConfigDict(), 40, 96
  cfg.stages = (base.stage(
      STAGE, "flow_matching", frozen=dict(encoder="default", vae="default"), num_steps=2, caption_dropout=0.3, sample_every_steps=2,
      eval_every_steps=2,
      resolutions=tuple(dict(base_px=px, batch_size=8, ratios=(ratio,), weight=1.0, multiple=32) for px, ratio in ((32, "1:1"), (48, "1:2"))),
      mixture=(base.part("glyphs", 0.5), base.part("glyphs", 0.5, "ti2i")), evaluation=dict(split="train", num_samples=None)),)
  return cfg


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def caches(one_device_in_module, config, workdir):
  """dtype, features -> the cache's facts. The first one is made with eight devices, and must fit what one of them trains."""
  write = lambda dtype, features: cache_latents(with_data(config, "glyphs", small=features), STAGE, workdir, cache_name(dtype, features),
                                                Options(features, dtype, shard_records=SHARD))[0]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *_: EIGHT)
    first = {VARIANTS[0]: write(*VARIANTS[0])}
  return first | {variant: write(*variant) for variant in VARIANTS[1:]}


@pytest.fixture(scope="module")
def run(one_device_in_module, config, workdir):
  return Run(config, workdir)


def with_data(config, name, data_dir=None, small=False):
  """The config with another data set in its mixture, and with its first resolution alone if `small`."""
  cfg = copy.deepcopy(config)
  if small:
    cfg.stages[0].resolutions = cfg.stages[0].resolutions[:1]
  for part in cfg.stages[0].mixture:
    part.name = name
  cfg.data_dir = str(data_dir or cfg.data_dir)
  return cfg


def loader_of(run, config):
  return run.loader(parse(config).stages[0])


@pytest.fixture(scope="module")
def params(run):
  """All weights; those of the generator that start at zero are drawn, so that every input reaches its output."""
  drawn = run.random_weights(run.stages[STAGE], "model")
  rng = np.random.default_rng(0)
  drawn = jax.tree.map(lambda x: jax.device_put(np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(x.dtype), x.sharding), drawn)
  return {**run.frozen_weights(run.stages[STAGE]), "model": drawn}


@pytest.fixture(scope="module")
def loss(run):
  algorithm = run.algorithm(run.stages[STAGE])
  return jax.jit(lambda params, batch, key: jnp.mean(algorithm.updates[0].loss(params, params, run.nets, batch, key)[0]))


@pytest.fixture(scope="module")
def losses(run, params, loss):
  """Gives the tasks and losses of the first three batches of each task of a config at 32 x 32 px."""
  def compute(cfg):
    loader = loader_of(run, with_data(cfg, cfg.stages[0].mixture[0].name, small=True))
    tasks = [loader.buckets[loader.mixture.plan(k).bucket].task for k in range(40)]
    batches = [loader.batch(k) for task in ("t2i", "ti2i") for k in [k for k in range(40) if tasks[k] == task][:3]]
    return ([loader.buckets[bucket].task for bucket, _ in batches],
            [float(loss(params, run.put(batch), jax.random.key(k))) for k, (_, batch) in enumerate(batches)])
  return compute


@pytest.fixture(scope="module")
def pixel_losses(config, losses):
  tasks, values = losses(config)
  assert sorted(tasks) == ["t2i"] * 3 + ["ti2i"] * 3 and len(set(values)) == 6
  return values


@pytest.mark.parametrize("dtype, features", VARIANTS)
def test_losses_are_those_of_pixels(config, caches, losses, pixel_losses, dtype, features):
  _, values = losses(with_data(config, cache_name(dtype, features)))
  np.testing.assert_allclose(values, pixel_losses, rtol=1e-5 if dtype == "float32" else 1e-2)


def test_batches_are_those_of_pixels_at_all_resolutions(run, config, caches):
  pixels, cached = loader_of(run, config), loader_of(run, with_data(config, cache_name("float32", False)))
  seen = set()
  for k in range(20):
    (bucket, batch), (same, found) = pixels.batch(k), cached.batch(k)
    seen.add((pixels.buckets[bucket].task, pixels.buckets[bucket].height))
    assert pixels.buckets[bucket].num_tokens == cached.buckets[same].num_tokens
    for name in ("sample_id", "tokens", "token_count"):
      np.testing.assert_array_equal(found[name], batch[name])
    assert "target" not in found and "features" not in found
    jax.tree.map(np.testing.assert_array_equal, found["sources"], batch["sources"])
    assert len(found["source_latents"]) == len(batch["sources"])
  assert seen == {("t2i", 64), ("ti2i", 64), ("t2i", 32), ("ti2i", 32)}


def test_what_stands_at_padding_changes_nothing(run, config, caches, params, loss):
  loader = loader_of(run, with_data(config, cache_name("float32", True), small=True))
  batch = next(batch for bucket, batch in map(loader.batch, range(20)) if loader.buckets[bucket].task == "ti2i")
  assert "target" not in batch and batch["sources"] == () and len(batch["source_latents"]) == 1
  padding = np.arange(batch["features"].shape[1]) >= (batch["token_count"] - run.tokenizer.num_system_tokens)[:, None]
  assert padding.any() and not batch["features"][padding].any() and batch["features"][~padding].any(axis=1).all()
  spoiled = batch | {"features": np.where(padding[..., None], np.float32(7), batch["features"])}
  one, other = (float(loss(params, run.put(some), jax.random.key(0))) for some in (batch, spoiled))
  assert one == other


def test_a_stage_trains_on_a_cache_and_draws(config, caches, workdir, tmp_path, monkeypatch):
  cfg = with_data(config, cache_name("float16", True), small=True)
  cfg.stages[0].mixture, cfg.sampling.guidance = cfg.stages[0].mixture[1:], 1.0  # edits: their pictures need most of what a cache holds
  train(cfg, workdir)
  rows = read_rows(workdir / STAGE / "metrics.jsonl")
  assert sum("loss" in row for row in rows) == 1 and all(np.isfinite(value) for row in rows for value in row.values())
  assert any("ti2i/val_loss" in row for row in rows)
  assert [path.name for path in (workdir / STAGE / "samples").iterdir()] == ["00000002_ti2i.png"]

  # Off the devices: the same losses, weights and sheets to the bit, and no frozen weight beside the steps.
  cfg.stages[0].offload_frozen, kept, run_stage = True, [], curriculum.train_stage
  monkeypatch.setattr(curriculum, "train_stage", lambda *given: kept.append(given[8]) or run_stage(*given))
  train(cfg, tmp_path)
  assert kept == [{"encoder": {}, "vae": {}}]
  for name in ("metrics.jsonl", "samples/00000002_ti2i.png"):
    assert (tmp_path / STAGE / name).read_bytes() == (workdir / STAGE / name).read_bytes(), name
  jax.tree.map(np.testing.assert_array_equal, last_arrays(tmp_path / STAGE), last_arrays(workdir / STAGE))


# Writing.


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_interrupted_cache_ends_byte_identical(config, caches, workdir, tmp_path, monkeypatch):
  shutil.copytree(f"{config.data_dir}/glyphs", tmp_path / "glyphs")
  cfg, name = with_data(config, "glyphs", tmp_path, small=True), cache_name("float32", True)
  write = lambda **options: cache_latents(cfg, STAGE, workdir, name, Options(True, "float32", shard_records=SHARD, **options))[0]
  work = tmp_path / f".{name}.incomplete"
  assert write(part=(2, 3)) == {"path": None, "shards_done": 1, "shards": 5}

  write_states = Encoder.states
  def stop_in_the_second_shard(self, *arguments):
    if (work / "train-00000.npz").exists():
      raise KeyboardInterrupt
    return write_states(self, *arguments)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Encoder, "states", stop_in_the_second_shard)
    write()
  assert sorted(path.stem for path in work.glob("*.npz")) == ["train-00000", "train-00002"]
  assert not (work / "train-00001").exists()

  with pytest.raises(ValueError, match="holds a latent cache made with dtype=float32, not dtype=float16: remove that folder or choose another"):
    cache_latents(cfg, STAGE, workdir, name, Options(True, "float16", shard_records=SHARD))

  with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
    patch.setattr(launcher.folders, "publish", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    write()
  assert not (tmp_path / name).exists()

  def nothing_left(*_):
    raise AssertionError("all shards were there")
  monkeypatch.setattr(Encoder, "states", nothing_left)
  assert not write()["reused"]
  assert write()["reused"] and not work.exists()
  assert contents(tmp_path / name) == contents(pathlib.Path(config.data_dir) / name)


def test_what_the_cache_keeps_of_its_records(config, caches):
  facts = caches["float32", False]
  original = records.open_split(config.data_dir, "glyphs", "train")
  source, index = records.open_split(config.data_dir, cache_name("float32", False), "train")
  assert facts["train"] == len(source) == len(index["base_px"])
  assert set(index["base_px"].tolist()) == {32, 48}
  by_id = {int(record["sample_id"]): record for record in original[0]}
  assert records.read_meta(pathlib.Path(config.data_dir) / cache_name("float32", False))["cache"]["made_with"]["decoding"] == DECODING
  for position in range(0, len(source), 7):
    record = source[position]
    before = by_id[int(record["sample_id"])]
    assert list(record["captions"]) == list(before["captions"]) and record["attributes"] == before["attributes"]
    assert record["quality"] == before["quality"] == index["quality"][position]
    assert len(record["sources"]) == len(record["source_latents"]) == len(before["sources"]) and not record["image"]
    side = (record["height"] // 16) * (record["width"] // 16)
    assert len(record["latents"]) == side * 8 * 4


@pytest.mark.slow
def test_broken_records_are_left_out_and_named(config, run, workdir, tmp_path, monkeypatch):
  shutil.copytree(f"{run.cfg.data_dir}/glyphs", tmp_path / "glyphs")
  cfg = with_data(config, "glyphs", tmp_path, small=True)
  cfg.stages[0].mixture, cfg.stages[0].max_faulty = cfg.stages[0].mixture[:1], 0.001
  decode = launcher.load_picture
  def spoil(data, height, width, name, alpha):
    if name == "sample 40 of data set 'glyphs'":
      raise ValueError(f"Cannot decode {name}: spoiled.")
    return decode(data, height, width, name, alpha)
  monkeypatch.setattr(launcher, "load_picture", spoil)
  facts = cache_latents(cfg, STAGE, workdir)[0]
  assert facts["left_out"] == 1 and facts["path"].endswith("glyphs_latents")
  named = json.loads((tmp_path / "glyphs_latents" / "dataset.json").read_text())["broken"]
  assert named == ["Cannot decode sample 40 of data set 'glyphs': spoiled."]
  _, index = records.open_split(tmp_path, "glyphs_latents", "train")
  assert 40 not in index["sample_id"]
  monkeypatch.setattr(launcher, "load_picture", lambda *given: spoil(*given[:3], "sample 40 of data set 'glyphs'", given[4]))
  with pytest.raises(ValueError, match="records of data set 'glyphs' could not be cached, more than max_faulty=0.001"):
    cache_latents(cfg, STAGE, workdir, "all_broken")


# Wrong uses.


def train_a_vae(cfg):
  stage = base.stage("x", "reconstruction")
  cfg.stages[0].algorithm, cfg.stages[0].frozen = stage.algorithm, stage.frozen


def test_another_vae_is_refused(config, run, caches, tmp_path):
  weights = run.frozen_weights(run.stages[STAGE])
  cfg = with_data(config, cache_name("float32", False))
  changed = jax.tree.map(lambda x: x, weights["vae"])
  changed["statistics"]["std"] = changed["statistics"]["std"].at[0].multiply(1.001)
  for role, tree in (("vae", changed), ("encoder", weights["encoder"])):
    save_weights(tmp_path / role, tree)
  stage = cfg.stages[0]
  stage.frozen.vae, stage.frozen.encoder = str(tmp_path / "vae"), str(tmp_path / "encoder")
  with pytest.raises(ValueError, match="was cached with other weights of the vae than stage 'high_resolution' has .*frozen.vae"):
    train(cfg, tmp_path / "run")
  stage.frozen.vae = str(run.workdir / "frozen" / "vae")
  again = Run(cfg, tmp_path / "run")
  assert set(again.frozen_weights(again.stages[STAGE])) == {"vae", "encoder"}


@pytest.mark.parametrize("features, change, message", [
    (False, lambda cfg: cfg.stages[0].resolutions[0].update(base_px=64), "was cached for base_px=32, 48, but stage 'high_resolution' asks for 64"),
    (False, lambda cfg: cfg.stages[0].resolutions[0].update(ratios=("3:1",)), "has pictures of 32 x 32 px, for which stage .* at base_px=32"),
    (True, lambda cfg: cfg.update(num_tokens=41), "prompts of at most num_tokens=40, but stage 'high_resolution' has num_tokens=41"),
    (False, lambda cfg: cfg.model.update(latent_channels=4) or cfg.vae.update(latent_channels=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4),
     "channels=8, but stage 'high_resolution' has channels=4"),
    (True, lambda cfg: cfg.stages[0].update(too_long="truncate"), "no states of captions .* has too_long='truncate': choose 'drop'"),
    (False, train_a_vae, "trains a VAE, but data set .* holds latents"),
])
def test_a_cache_for_something_else_is_refused(config, caches, tmp_path, features, change, message):
  cfg = with_data(config, cache_name("float32", features), small=features)
  with cfg.unlocked():
    change(cfg)
  with pytest.raises(ValueError, match=message):
    Run(cfg, tmp_path)


@pytest.mark.parametrize("made_with, warned", [({}, ["by another version of decoding (None, now 1)"]), ({"decoding": DECODING}, [])])
def test_a_cache_of_colours_that_were_not_converted_is_named_once(tmp_path, caplog, made_with, warned):
  facts = {"dtype": "float32", "channels": 4, "factor": 16, "feature_width": 0, "num_system_tokens": 0, "made_with": made_with}
  (tmp_path / "old").mkdir()
  (tmp_path / "old" / "dataset.json").write_text(json.dumps({"request": {}, "facts": {}, "cache": facts}))
  for _ in range(2):
    check_use(tmp_path, "old", STAGE, [], {"channels": 4, "factor": 16, "alpha": False})
  assert len(caplog.messages) == len(warned)
  assert all(words in message and "remove it and write it again" in message for words, message in zip(warned, caplog.messages))


@pytest.mark.parametrize("change, name, message", [
    (train_a_vae, "", "has no frozen VAE whose latents could be cached"),
    (lambda cfg: None, "glyphs", "--name=glyphs is the name of the original data set"),
    (lambda cfg: cfg.stages[0].resolutions[1].update(base_px=32), "", "Two resolutions have base_px=32 and other ratios"),
    (lambda cfg: [part.update(name=cache_name("float32", False)) for part in cfg.stages[0].mixture], "", "is a latent cache itself"),
    (lambda cfg: cfg.stages[0].update(name="other"), "", "The config has no stage 'high_resolution': choose one of other"),
])
def test_mistakes_in_asking_are_one_sentence(config, caches, workdir, change, name, message):
  cfg = copy.deepcopy(config)
  with cfg.unlocked():
    change(cfg)
  with pytest.raises(ValueError, match=message):
    cache_latents(cfg, STAGE, workdir, name)


@pytest.mark.parametrize("change, message", [
    (dict(dtype="int8"), "dtype='int8': choose one of float16, float32"), (dict(shard_records=0), "shard_records=0: give at least 1"),
    (dict(part=(4, 4)), "part=4/4: give i/n with i from 0")])
def test_options_are_checked(change, message):
  with pytest.raises(ValueError, match=message):
    Options(**change)
  with pytest.raises(ValueError, match="--part=1of2 is not understood"):
    launch_cache_latents._parse_part("1of2")


@pytest.mark.slow
def test_numbers_beyond_float16_are_refused(run):
  encoder = Encoder(run, run.frozen_weights(run.stages[STAGE]), Options())
  with pytest.raises(ValueError, match="in the states of x that float16 cannot hold, the largest 70000.0: use --dtype=float32"):
    encoder._stored(np.array([1.0, 7e4], np.float32), "the states of x")
