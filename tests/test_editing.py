"""What an edit kept, on pictures whose answer is known; the drift against scikit-image."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.registration import phase_cross_correlation

from qimg2.evaluation import editing


def textured(seed=0, height=48, width=60):
  x = ndimage.gaussian_filter(np.random.default_rng(seed).uniform(0, 255, (height, width, 3)), (0.8, 0.8, 0), mode="wrap")
  return np.clip((x - x.mean()) * 2 + 128, 0, 255).astype(np.uint8)


@pytest.fixture
def edit():
  """(source, target): a square of 10 px in the middle becomes red."""
  source = textured()
  target = source.copy()
  target[20:30, 25:35] = 255, 0, 0
  return source, target


def test_the_region_is_what_is_equal_without_a_margin(edit):
  region = editing.kept_region(*edit, margin_px=3)
  expected = np.ones((48, 60), bool)
  expected[17:33, 22:38] = False
  np.testing.assert_array_equal(region, expected)
  assert editing.kept_region(edit[0], edit[0]).all()


def test_only_the_region_counts(edit):
  source, target = edit
  region = editing.kept_region(*edit)
  scores = editing.kept_scores(target, source, region)
  assert scores.pop("drift_px") <= 0.02 and scores == {"kept_psnr": 100, "kept_ssim": 1, "drift_known": 1}
  worse = np.clip(target.astype(int) + 10, 0, 255).astype(np.uint8)
  scores = editing.kept_scores(worse, source, region)
  assert 28 < scores["kept_psnr"] < 28.6 and 0.9 < scores["kept_ssim"] < 1
  wild = target.copy()
  wild[18:32, 23:37] = np.random.default_rng(1).integers(0, 256, (14, 14, 3))  # within the margin
  scores = editing.kept_scores(wild, source, region)
  assert scores["kept_psnr"] == 100 and scores["kept_ssim"] == 1


@pytest.mark.parametrize("shift", [(0, 0), (3, -5), (-20, 29), (0.5, 0.25), (-1.37, 2.61)])
def test_drift_is_the_shift_and_that_of_scikit_image(shift):
  source = textured(2, 49, 61)  # odd sides have no Nyquist frequency, which a shift by parts of a pixel cannot turn
  spectrum = np.fft.fft2(source.astype(float), axes=(0, 1))
  moved = np.fft.ifft2(ndimage.fourier_shift(spectrum, (*shift, 0)), axes=(0, 1)).real
  moved = np.clip(np.round(moved), 0, 255).astype(np.uint8)
  found = editing.drift(moved, source)
  assert found == pytest.approx(shift, abs=0.02)
  theirs, *_ = phase_cross_correlation(editing.images.luma(moved).astype(float), editing.images.luma(source).astype(float), upsample_factor=100)
  assert found == pytest.approx(tuple(theirs), abs=0.0101)


def test_drift_shows_through_an_edit(edit):
  source, target = edit
  found = editing.drift(np.roll(target, (2, 1), (0, 1)), source)
  assert found == pytest.approx((2, 1), abs=0.02)


def test_a_plain_picture_has_no_drift_and_is_still_scored(edit):
  source, target = edit
  plain = np.full_like(source, 90)
  assert editing.drift(plain, source) is None and editing.drift(source, plain) is None
  scores = editing.kept_scores(plain, source, editing.kept_region(*edit))
  assert (scores["drift_px"], scores["drift_known"]) == (0, 0) and 5 < scores["kept_psnr"] < 30 and scores["kept_ssim"] < 0.2


def test_what_has_no_answer_is_refused(edit):
  source, _ = edit
  with pytest.raises(ValueError, match="nothing is left that it should keep"):
    editing.kept_region(source, 255 - source)
  region = np.zeros((48, 60), bool)
  region[:10] = True
  with pytest.raises(ValueError, match="600 px, holds no window"):
    editing.kept_scores(source, source, region)
  with pytest.raises(ValueError, match="no drift"):
    editing.drift(source, source[:40])


def test_the_nearest_candidate(edit):
  source, target = edit
  assert editing.nearest(np.clip(target.astype(int) + 3, 0, 255).astype(np.uint8), [source, target]) == 1
  assert editing.nearest(source, [source, source]) == 0
  with pytest.raises(ValueError, match="none"):
    editing.nearest(source, [])
