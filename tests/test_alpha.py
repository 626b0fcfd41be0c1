"""Transparency is kept where a data set's spec asks for it: from file to batch, and nowhere else."""

import io

import jax
import numpy as np
import pytest
from made_up import plain_index, world_of
from PIL import Image

from configs import base, quickstart
from data_pipelines import embedded, records
from data_pipelines.loader import Loader
from data_pipelines.mixture import Mixture
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.transforms import encode_png, load_picture
from qimg2.runtime import run as run_module
from qimg2.runtime.caching.latents import cache_latents
from qimg2.runtime.caching.networks import Options
from qimg2.runtime.config import parse
from qimg2.runtime.curriculum import description
from qimg2.runtime.run import Run
from qimg2.runtime.sampling import run_defaults


def square(side):
  """A red square, half transparent on its right, on clear green; and nothing else."""
  pixels = np.zeros((side, side, 4), np.uint8)
  pixels[..., 1] = 255
  inner = slice(side // 4, -side // 4)
  pixels[inner, inner] = (255, 0, 0, 255)
  pixels[inner, side // 2:-side // 4, 3] = 128
  return pixels


def noise(seed, channels=4):
  pixels = np.random.default_rng(seed).integers(1, 256, (64, 64, channels), dtype=np.uint8)
  pixels[:9, :, 3:] = 0
  return pixels


def kept(pixels):
  """What is to become of RGBA pixels that need no scaling."""
  return np.where(pixels[..., 3:] == 0, np.array([255, 255, 255, 0], np.uint8), pixels)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_known_pixels_come_back_and_clear_ones_are_white(kind):
  buffer = io.BytesIO()
  Image.fromarray(noise(0)).save(buffer, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
  assert (load_picture(buffer.getvalue(), 64, 64, alpha=True) == kept(noise(0))).all()
  assert load_picture(buffer.getvalue(), 64, 64).shape == (64, 64, 3)


@pytest.mark.parametrize("colour", [(9, 80, 200), 77])
def test_a_picture_without_transparency_is_opaque(colour):
  picture = encode_png(np.full((40, 40) + (3,) * isinstance(colour, tuple), colour, np.uint8))
  assert (load_picture(picture, 32, 32, alpha=True) == np.append(np.broadcast_to(colour, 3), 255)).all()


@pytest.mark.parametrize("side", [16, 47, 90, 200], ids="{} px".format)
def test_the_colour_of_clear_pixels_does_not_bleed(side):
  pixels = load_picture(encode_png(square(96)), side, side, alpha=True).astype(int)
  shown = pixels[..., 3] > 16
  assert 0.2 < shown.mean() < 0.4
  assert pixels[shown, 0].min() >= 240 and pixels[shown, 1].max() <= 5 and pixels[shown, 2].max() <= 5
  assert (pixels[pixels[..., 3] == 0] == (255, 255, 255, 0)).all()
  row = pixels[side // 2, :, 3]
  assert abs(row[side * 3 // 8] - 255) <= 3 and abs(row[side * 5 // 8] - 128) <= 3 and row[0] == 0  # edges stay where they are


def write(folder, monkeypatch, name="glyphs", edits=True):
  """A data set of edits of one picture with alpha each, whose second condition image has none; or of pictures alone."""
  def examples(split, num_examples, seed):
    for i in range(4):
      sources = [encode_png(square(64)), encode_png(np.full((64, 64, 3), 40, np.uint8))]
      yield {"image": encode_png(noise(i)), "height": 64, "width": 64, "quality": 1.0, "sample_id": i + (100 if split == "validation" else 0),
             "captions": ["join them"], "languages": ["en"], "attributes": "{}", "sources": sources if edits else [],
             "source_height": [64, 64] if edits else [], "source_width": [64, 64] if edits else []}
  with monkeypatch.context() as patch:
    patch.setitem(embedded.SOURCES, name, embedded.Source(examples, vocab_size=300))
    embedded.prepare(name, folder, num_examples=4)
  return folder


def test_batches_hold_what_was_written(tmp_path, monkeypatch):
  folders = [write(tmp_path / name, monkeypatch) for name in "ab"]
  tokenizer = records.load_tokenizer(folders[0], "glyphs")
  make = lambda *alphas: Loader([DatasetSpec(str(folder), "glyphs", task="ti2i", alpha=alpha) for folder, alpha in zip(folders, alphas)],
                                [Resolution(64, 2, ("1:1",))], 64, tokenizer, 0)
  mixed, opaque = make(True, False), make(False, False)
  assert mixed.mixture.digest == opaque.mixture.digest  # it is no matter of order
  seen = set()
  for k in range(8):
    plan, (number, batch), (_, before) = mixed.mixture.plan(k), mixed.batch(k), opaque.batch(k)
    assert {name: [one.shape for one in value] for name, value in batch.items()} == {
        name: [one.shape for one in value] for name, value in mixed.example(mixed.buckets[number]).items()}
    seen.add(plan.dataset)
    for row, sample_id in enumerate(batch["sample_id"]):
      assert batch["sources"][1][row].tolist() == np.full((64, 64, 4), (40, 40, 40, 255)).tolist()
      if plan.dataset == 0:
        assert (batch["target"][row] == kept(noise(sample_id % 100))).all() and (batch["sources"][0][row] == kept(square(64))).all()
      else:
        assert (batch["target"][row, ..., :3] == before["target"][row]).all() and (batch["target"][row, ..., 3] == 255).all()
        assert (batch["sources"][0][row, ..., 3] == 255).all()
    assert before["target"].shape[-1] == before["sources"][0].shape[-1] == 3
  assert seen == {0, 1}


def test_a_stage_from_before_there_was_alpha_goes_on():
  """What its checkpoints say of it is the same, and so are its buckets."""
  cfg = quickstart.get_config("smoke")
  cfg.stages[0].mixture = (base.part("glyphs"), base.part("glyphs", alpha=True))
  run = parse(cfg)
  assert [part.alpha for part in run.stages[0].mixture] == [False, True]
  assert ["alpha" in part for part in description(run, run.stages[0])["mixture"]] == [False, True]
  assert not any(bucket.alpha for bucket in world_of(plain_index([(64, 64)] * 4)).build(Mixture).buckets)


def test_alpha_wants_a_vae_of_four_channels(tmp_path):
  cfg = quickstart.get_config("smoke")
  cfg.data_dir, cfg.prepare.num_examples, cfg.vae.image_channels = str(tmp_path), 96, 3
  cfg.stages = cfg.stages[:1]
  cfg.stages[0].mixture = (base.part("glyphs", alpha=True),)
  with pytest.raises(ValueError, match=r"keeps the alpha of data set 'glyphs', but config.vae.image_channels is 3: choose a VAE of 4"):
    Run(cfg, tmp_path / "run")


@pytest.mark.slow
def test_a_stage_learns_alpha_beside_a_task_without(tmp_path, monkeypatch, one_device):
  """Held-out batches of both tasks have the channels of the training batches. A step of the VAE on one lowers its loss, and alpha matters."""
  monkeypatch.setattr(run_module, "EMBEDDED", ())
  write(tmp_path / "data", monkeypatch)
  cfg = quickstart.get_config("smoke")
  cfg.data_dir, cfg.num_tokens, cfg.stages = str(write(tmp_path / "data", monkeypatch, "emoji", edits=False)), 64, cfg.stages[:2]
  for stage in cfg.stages:
    stage.resolutions = (dict(base_px=32, batch_size=2, ratios=("1:1",), weight=1.0, multiple=16, ratio_weights=()),)
    stage.mixture = (base.part("glyphs", task="ti2i", alpha=True), base.part("emoji"))
  run = Run(cfg, tmp_path / "run")
  stage = run.stages["vae"]
  training = run.loader(stage)
  held_out = run.evaluation_batches(stage, training)
  assert list(held_out) == ["ti2i", "t2i"]
  assert {batch["target"].shape[-1] for some in held_out.values() for _, batch in some.loader.evaluation_batches()} == {4}
  of_glyphs = next(k for k in range(20) if training.mixture.plan(k).dataset == 0)
  batch = run.put(training.batch(of_glyphs)[1])
  assert batch["target"].shape == (2, 32, 32, 4)
  update = run.algorithm(stage).updates[0]
  step = jax.jit(jax.value_and_grad(lambda trained, batch: update.loss(trained, trained, run.nets, batch, jax.random.key(0))[0].mean()))
  weights = {"vae": run.random_weights(stage, "vae")}
  loss, gradient = step(weights, batch)
  after, _ = step(jax.tree.map(lambda x, slope: x - 0.02 * slope, weights, gradient), batch)
  opaque, _ = step(weights, batch | {"target": batch["target"].at[..., 3].set(255)})
  assert 0 < after < loss and abs(opaque - loss) > 1e-2
  assert run_defaults(run, "low_resolution")["alpha"]


@pytest.mark.slow
def test_a_latent_cache_is_of_the_pixels_with_their_alpha(tmp_path, monkeypatch):
  monkeypatch.setattr(run_module, "EMBEDDED", ())
  cfg = quickstart.get_config("smoke")
  cfg.data_dir, cfg.num_tokens = str(write(tmp_path / "data", monkeypatch)), 64
  cfg.stages = (base.stage("draw", "flow_matching", frozen=dict(encoder="default", vae="default"), num_steps=1,
                           resolutions=(dict(base_px=64, batch_size=2, ratios=("1:1",), weight=1.0, multiple=32),),
                           mixture=(base.part("glyphs", task="ti2i", alpha=True),)),)
  cache_latents(cfg, "draw", tmp_path / "run", options=Options(dtype="float32"))
  run = Run(cfg, tmp_path / "run")
  stage, weights = run.stages["draw"], run.frozen_weights(run.stages["draw"])["vae"]
  latents = {int(record["sample_id"]): record for record in records.open_split(cfg.data_dir, "glyphs_latents", "train")[0]}
  _, batch = run.loader(stage).batch(0)
  encode = jax.jit(run.nets.encode)
  for pixels, stored in ((batch["target"], lambda one: one["latents"]), (batch["sources"][0], lambda one: one["source_latents"][0])):
    wanted, opaque = encode(weights, pixels), encode(weights, np.concatenate([pixels[..., :3], np.full_like(pixels[..., 3:], 255)], axis=-1))
    cached = np.stack([np.frombuffer(stored(latents[int(number)]), np.float32).reshape(wanted.shape[1:]) for number in batch["sample_id"]])
    np.testing.assert_allclose(cached, wanted, atol=1e-4)
    assert np.abs(cached - opaque).max() > 1e-2
  cfg.stages[0].mixture = (base.part("glyphs_latents", task="ti2i"),)
  with pytest.raises(ValueError, match="was cached with alpha=True, but stage 'draw' has alpha=False"):
    Run(cfg, tmp_path / "other")
