"""Pictures through an autoencoder and back: what is measured, what is left out, and why."""

import types

import jax
import numpy as np
import pytest

from data_pipelines.transforms import decode_image, encode_png
from qimg2 import networks, sharding
from qimg2 import params as P
from qimg2.evaluation import images, reconstruction
from qimg2.models import vae
from qimg2.runtime.reconstruction import folder_pictures, in_words, lpips_distance, reconstruct, summary

SIZES = {"photos/a.png": (32, 32), "photos/b.png": (25, 30), "slides/c.png": (32, 32), "slides/d.png": (32, 32), "e.png": (64, 64)}


@pytest.fixture(scope="module")
def source():
  """A source with a small VAE, and weights that are no identity."""
  cfg = vae.Config(base_dim=4, decoder_base_dim=4, latent_channels=4, dim_mult=(1, 1), temporal_downsample=(False,), num_res_blocks=1,
                   latents_mean=(0.1,) * 4, latents_std=(2.0,) * 4, temporal_weights=False)
  nets = networks.Networks(None, None, cfg, 0)
  mesh, rules = sharding.make_mesh({"fsdp": -1}, jax.devices()[:1]), sharding.RULES["fsdp_tensor"]
  rng = np.random.default_rng(0)
  weights = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), networks.vae_specs(cfg), is_leaf=P.is_param)
  weights["statistics"] = {"mean": np.full(4, 0.1, np.float32), "std": np.full(4, 2.0, np.float32)}
  return types.SimpleNamespace(nets=nets, mesh=mesh, rules=rules), weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("pictures")
  for number, (name, size) in enumerate(SIZES.items()):
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(encode_png(np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)))
  (path / "slides" / "broken.png").write_bytes(b"\x89PNG no more")
  (path / "slides" / "thin.png").write_bytes(encode_png(np.zeros((8, 32, 3), np.uint8)))
  (path / "slides" / "notes.txt").write_text("no picture")
  return path


@pytest.fixture(scope="module")
def rows(source, folder):
  return list(reconstruct(*source, folder_pictures(folder), batch_size=2))


def test_figures_are_those_of_encode_and_decode(source, folder, rows):
  nets, weights = source[0].nets, source[1]
  found = {row["task"]: row for row in rows}
  assert set(found) == {*SIZES, "slides/broken.png", "slides/thin.png"} and len(rows) == 7
  run = jax.jit(lambda x: nets.decode(weights, nets.encode(weights, x)))
  for name in ("photos/a.png", "photos/b.png"):
    pixels = decode_image((folder / name).read_bytes())
    height, width = SIZES[name]
    padded = np.pad(pixels, ((0, 32 - height), (0, 32 - width), (0, 0)), "reflect")
    back = np.asarray(run(padded[None]))[0].astype(float)
    on_white = np.round(back[..., :3] * (back[..., 3:] / 255) + 255 * (1 - back[..., 3:] / 255)).astype(np.uint8)[:height, :width]
    # Rounding on white may differ by a level.
    assert found[name]["metrics"] == pytest.approx(images.compare(pixels, on_white), abs=0.02)
    assert found[name]["category"] == "photos" and found[name]["details"] == {"size": [height, width]}


def test_what_cannot_be_scored_says_why(rows):
  errors = {row["task"]: row["error"] for row in rows if "error" in row}
  assert set(errors) == {"slides/broken.png", "slides/thin.png"}
  assert "Cannot decode slides/broken.png" in errors["slides/broken.png"] and "windows of 11 px" in errors["slides/thin.png"]
  assert not any("metrics" in row for row in rows if "error" in row)


@pytest.mark.parametrize("tile", (0, 16))
def test_what_is_not_finite_is_no_reconstruction(source, folder, tile):
  weights = jax.tree.map(lambda x: x * np.float32(np.inf), source[1])
  one = [original for original in folder_pictures(folder) if original.name == "photos/a.png"]
  assert [row["error"] for row in reconstruct(source[0], weights, one, batch_size=2, vae_tile=tile)] == ["the VAE gave pixels that are not finite"]


def test_the_summary_is_by_kind_and_by_resolution(rows):
  found = summary(rows)
  assert (found["num_pictures"], found["num_left_out"]) == (5, 2)
  assert set(found["categories"]) == {"", "photos", "slides"} and set(found["resolutions"]) == {"32 px", "64 px"}
  psnr = {row["task"]: row["metrics"]["psnr"] for row in rows if "metrics" in row}
  assert found["figures"]["psnr"]["value"] == pytest.approx(np.mean(list(psnr.values())))
  assert found["categories"]["slides"]["psnr"]["value"] == pytest.approx((psnr["slides/c.png"] + psnr["slides/d.png"]) / 2)
  assert found["resolutions"]["64 px"]["psnr"]["value"] == pytest.approx(psnr["e.png"])
  assert "lpips" not in found["figures"] and "ned" not in found["figures"]
  said = in_words(found).splitlines()
  assert said[0].startswith("5 pictures: psnr ") and said[1].startswith("  beside the folders: psnr") and len(said) == 7
  assert said[-1].startswith("2 left out; 1 of them: ")
  with pytest.raises(ValueError, match="None of 2 pictures could be scored; the first: Cannot decode"):
    summary([row for row in rows if "error" in row])


def test_text_is_compared_with_what_was_read_in_the_original():
  one, other = (np.full((16, 16, 3), level, np.uint8) for level in (10, 20))
  found = reconstruction.score(one, other, read=lambda picture: {10: "Menü 12", 20: "Menu 12"}[int(picture[0, 0, 0])])
  assert found["ned"] == pytest.approx(1 - 1 / 7) and (found["original_text"], found["text"]) == ("Menü 12", "Menu 12")
  assert "ned" not in reconstruction.score(one, other, read=lambda picture: "")
  found = reconstruction.score(one, other, distance=lambda x, y: np.float32([x.shape[0] / 4]))
  assert found["lpips"] == 0.25 and set(found) == {"psnr", "psnr_luma", "ssim", "ssim_luma", "lpips"}


def test_resolutions_are_octaves():
  assert [reconstruction.resolution(*size) for size in ((512, 512), (362, 363), (360, 362), (1024, 1024), (2048, 512), (700, 800))] == [
      "512 px", "512 px", "256 px", "1024 px", "1024 px", "1024 px"]


def test_folders_and_files_that_are_not_there(tmp_path):
  with pytest.raises(ValueError, match="There is no picture below"):
    next(folder_pictures(tmp_path))
  with pytest.raises(ValueError, match="There is no file"):
    lpips_distance(tmp_path / "none.safetensors")
