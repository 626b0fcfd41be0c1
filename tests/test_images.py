"""PSNR and SSIM of pictures whose figures are known by hand."""

import math

import numpy as np
import pytest

from qimg2.evaluation import images


def flat(level, height=16, width=20):
  return np.full((height, width, 3), level, np.uint8)


def test_psnr_by_hand():
  assert images.psnr(flat(0), flat(255)) == 0
  assert images.psnr(flat(100), flat(110)) == pytest.approx(10 * math.log10(255**2 / 100))
  assert images.psnr(flat(7), flat(7)) == images.MAX_PSNR == 100
  one = flat(7)
  one[3, 4, 1] += 1  # one level in 960 numbers
  assert images.psnr(one, flat(7)) == pytest.approx(10 * math.log10(255**2 * 960))


def test_psnr_of_a_region_sees_nothing_else():
  one, mask = flat(50), np.zeros((16, 20), bool)
  one[8:], mask[:8] = 200, True
  assert images.psnr(one, flat(50), mask) == 100
  assert images.psnr(one, flat(60), mask) == pytest.approx(10 * math.log10(255**2 / 100))
  with pytest.raises(ValueError, match="with 0 px picks no pixel"):
    images.psnr(one, one, np.zeros((16, 20), bool))


@pytest.mark.parametrize("border", ["inside", "reflect"])
def test_ssim_of_flat_pictures_is_their_luminance_term(border):
  one, other, c1 = 100.0, 120.0, 2.55**2
  expected = (2 * one * other + c1) / (one**2 + other**2 + c1)
  assert images.ssim(flat(100), flat(120), border) == pytest.approx(expected, abs=5e-6)
  assert images.ssim(flat(255), flat(255), border) == 1
  assert images.ssim(flat(0), flat(255), border) == pytest.approx(c1 / (255**2 + c1), abs=5e-6)


def test_ssim_of_the_negative_is_negative():
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  assert images.ssim(noise, 255 - noise) < -0.8


@pytest.mark.parametrize("size", [(11, 11), (75, 11), (138, 139), (20, 1040)])
def test_each_window_is_the_formula(size):
  """Blocks of rows and columns leave no seam: every entry of the map is equation 2 of its window."""
  rng = np.random.default_rng(size[0])
  one, other = (rng.integers(0, 256, (*size, 2), dtype=np.uint8) for _ in range(2))
  found = images.ssim_map(one, other)
  assert found.shape == (size[0] - 10, size[1] - 10, 2)
  weights = np.exp(-np.square(np.arange(-5, 6)) / 4.5)
  weights = np.outer(weights, weights) / weights.sum()**2
  for y, x in {(0, 0), (size[0] - 11, size[1] - 11), ((size[0] - 10) // 2, (size[1] - 10) // 2), (min(64, size[0] - 11), min(64, size[1] - 11)),
               (min(16, size[0] - 11), min(1024, size[1] - 11))}:
    for channel in range(2):
      a, b = (image[y:y + 11, x:x + 11, channel].astype(float) for image in (one, other))
      mean = lambda values: (weights * values).sum()
      covariance = mean(a * b) - mean(a) * mean(b)
      spread = mean(a * a) - mean(a)**2 + mean(b * b) - mean(b)**2
      expected = (2 * mean(a) * mean(b) + 6.5025) * (2 * covariance + 58.5225) / ((mean(a)**2 + mean(b)**2 + 6.5025) * (spread + 58.5225))
      assert found[y, x, channel] == pytest.approx(expected, abs=5e-6)


def test_what_cannot_be_compared_is_refused():
  with pytest.raises(ValueError, match="cannot be compared pixel by pixel"):
    images.compare(flat(0), flat(0, 17))
  with pytest.raises(ValueError, match="windows of 11 px, but a picture has 16 x 10"):
    images.ssim(flat(0, 16, 10), flat(0, 16, 10))
  with pytest.raises(ValueError, match="choose inside or reflect"):
    images.ssim(flat(0), flat(0), "wrap")
