"""Figures of pictures against the packages that publish them: torchmetrics, scikit-image, lpips."""

import json

import jax
import numpy as np
import pytest
import reference
import safetensors.torch
import torch
from commands import launch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from data_pipelines.transforms import encode_png
from qimg2.evaluation import fidelity, images
from qimg2.evaluation.moments import Moments
from qimg2.models import lpips
from qimg2.published.lpips import load_lpips
from qimg2.runtime.picture_suites import fidelity_suite


def smooth_pair(seed, height=70, width=93):
  """A soft random picture and the same with noise, [H, W, 3] uint8."""
  rng = np.random.default_rng(seed)
  x = ndimage.gaussian_filter(rng.uniform(0, 255, (height, width, 3)), (2, 2, 0))
  x = np.clip((x - x.mean()) * 6 + 128, 0, 255)
  return x.astype(np.uint8), np.clip(x + rng.normal(0, 9, x.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_psnr_and_ssim_are_those_of_scikit_image_and_torchmetrics(seed):
  from torchmetrics.functional.image import peak_signal_noise_ratio as torch_psnr  # after `reference`, since it imports torchvision
  from torchmetrics.functional.image import structural_similarity_index_measure as torch_ssim
  one, other = smooth_pair(seed)
  gauss = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
  ours = images.compare(one, other)
  assert ours["psnr"] == pytest.approx(peak_signal_noise_ratio(one, other), abs=1e-4)
  assert ours["ssim"] == pytest.approx(structural_similarity(one, other, channel_axis=-1, **gauss), abs=1e-6)
  grey = [images.luma(x) for x in (one, other)]
  assert ours["ssim_luma"] == pytest.approx(structural_similarity(*grey, **gauss), abs=1e-6)
  theirs = [torch.tensor(x).permute(2, 0, 1)[None].double() for x in (one, other)]
  assert ours["psnr"] == pytest.approx(float(torch_psnr(*theirs, data_range=255.0)), abs=1e-4)
  assert images.ssim(one, other, "reflect") == pytest.approx(float(torch_ssim(*theirs, data_range=255.0)), abs=1e-6)
  theirs = [torch.tensor(x)[None, None].double() for x in grey]
  assert images.ssim(*grey, "reflect") == pytest.approx(float(torch_ssim(*theirs, data_range=255.0)), abs=1e-6)
  assert ours["psnr_luma"] == pytest.approx(float(torch_psnr(*theirs, data_range=255.0)), abs=1e-4)


def random_lpips(net):
  """The published module with random weights. Its classifiers, which it drops, are not drawn: they are most of it."""
  import lpips as published_lpips  # after `reference`
  with torch.device("meta"):
    module = published_lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False).to_empty(device="cpu")
  module.scaling_layer = published_lpips.ScalingLayer()
  reference.randomize(reference.rescale(module, 3), 3)
  with torch.no_grad():
    for name, x in module.named_parameters():
      x.copy_(x.abs() if name.startswith("lin") else torch.zeros_like(x) + 0.1 if x.ndim == 1 else x)
  return module


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_that_of_its_package(net, tmp_path):
  module = random_lpips(net)
  state = {name: x.contiguous() for name, x in module.state_dict().items() if name.startswith(("net.", "lin")) and not name.startswith("lins.")}
  safetensors.torch.save_file(state, tmp_path / "lpips.safetensors")
  cfg, params = load_lpips(tmp_path / "lpips.safetensors")
  assert cfg.net == net
  one, other = smooth_pair(1, 40, 35)
  pairs = np.stack([one, one, one[::-1]]), np.stack([other, one, other])
  theirs = [torch.tensor(np.array(x)).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in pairs]
  with torch.no_grad():
    expected = module(*theirs).numpy().ravel()
  assert expected[0] > 1e-3 and expected[1] == 0
  ours = jax.jit(lpips.distances, static_argnums=0)(cfg, params, *pairs)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_lpips_files_are_of_one_network_and_pictures_of_one_size(tmp_path):
  safetensors.torch.save_file({"net.slice1.0.weight": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
  with pytest.raises(ValueError, match="lack 14 tensor"):
    load_lpips(tmp_path / "odd.safetensors")
  with pytest.raises(ValueError, match="of at least 31 px"):
    lpips.apply(lpips.Config(), {}, np.zeros((1, 30, 64, 3)), np.zeros((1, 30, 64, 3)))
  with pytest.raises(ValueError, match="no LPIPS network 'squeeze'"):
    lpips.Config("squeeze")


# Sets.


class Given(torch.nn.Module):
  """A feature network that gives what it is given."""
  num_features = 12

  def forward(self, x):
    return x


def test_fid_and_kid_are_those_of_torchmetrics():
  from torchmetrics.image.fid import FrechetInceptionDistance  # after `reference`
  from torchmetrics.image.kid import KernelInceptionDistance
  rng = np.random.default_rng(0)
  real, drawn = (rng.normal(mean, 1 + mean, (50, 12)).astype(np.float32) for mean in (0.0, 0.3))
  theirs = FrechetInceptionDistance(Given()).set_dtype(torch.float64), KernelInceptionDistance(Given(), subsets=1, subset_size=50)
  for metric in theirs:
    metric.update(torch.tensor(real), real=True)
    metric.update(torch.tensor(drawn), real=False)
  assert fidelity.fid(Moments.of(real), Moments.of(drawn)) == pytest.approx(float(theirs[0].compute()), rel=1e-6)
  assert fidelity.kid(real, drawn) == pytest.approx([float(x) for x in theirs[1].compute()], rel=1e-5)


def test_a_published_folder_gives_features(tiny_folder, tmp_path, one_device, monkeypatch):
  monkeypatch.setattr(jax, "local_devices", jax.devices)
  (tmp_path / "prompts.txt").write_text("a red square\n")
  for number in range(2):
    (tmp_path / f"{number}.png").write_bytes(encode_png(smooth_pair(number)[0]))
  suite = fidelity_suite(str(tmp_path), str(tiny_folder), str(tmp_path / "prompts.txt"), input_px=64, batch_size=2)
  found = suite.features([None] * 2, [smooth_pair(number)[0] for number in range(2)])
  assert found.shape == (2, 64) and np.isfinite(found).all() and np.ptp(found, axis=0).max() > 1e-3
  suite.release()  # gives the tower back, which the reference reads anew
  figures = suite.of_set([(["a", "a"], found)])
  assert figures["fid"] == pytest.approx(0, abs=1e-6) and figures["fid_full_rank"] == 0 and figures["diversity"] > 0


def test_the_launcher_reconstructs_a_folder(tiny_folder, tmp_path, one_device):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "one.png").write_bytes(encode_png(smooth_pair(0, 32, 30)[0]))
  (tmp_path / "in" / "two.png").write_bytes(b"no picture")
  result = launch("launch.reconstruct", f"--pretrained={tiny_folder}", f"--pictures={tmp_path}/in", f"--out={tmp_path}/out")
  assert result.returncode == 0 and "1 pictures: psnr " in result.stdout and "1 left out" in result.stdout
  rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
  assert [row["task"] for row in rows] == ["one.png", "two.png"] and "Cannot decode two.png" in rows[1]["error"]
  found = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert found["figures"]["ssim"]["value"] == rows[0]["metrics"]["ssim"] and found["num_left_out"] == 1
  result = launch("launch.reconstruct", f"--pretrained={tiny_folder}", f"--out={tmp_path}/other")
  assert result.returncode == 1 and "which pictures?" in result.stderr
