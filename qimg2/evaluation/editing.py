"""What an edit kept: PSNR and SSIM of the region that should not change, how far the picture drifted, and whether what was asked is there.

For edits whose clean source and clean result are known, such as those that the embedded data sets render. The region that should not change is where
both are equal, without a margin along its border. PSNR is that of its pixels, SSIM the mean over the windows of 11 px that lie wholly in it.

The drift (y, x) is the translation that best explains the edited picture, by the peak of the phase correlation of both lumas,

  r = IFT(A B* / |A B*|),  A, B the Fourier transforms                                                                            (1)

found to the pixel, then to a hundredth of a pixel by evaluating (1) on a fine grid around the peak (Guizar-Sicairos et al. 2008, doi
10.1364/OL.33.000156). It is cyclic and blind to edits that are small beside what stays. A picture of one colour has no drift: that is counted, and is
no 0.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from qimg2.evaluation import Figure, images

MARGIN_PX = 4
FINENESS = 100  # steps per pixel of a drift
# For `Suite.figures` of a suite whose scores hold those of `kept_scores`.
FIGURES = {"kept_psnr": Figure("kept_psnr", is_share=False), "kept_ssim": Figure("kept_ssim", is_share=False),
           "drift_px": Figure("drift_px", "drift_known", is_share=False, lower_is_better=True), "drift_known": Figure("drift_known")}


def kept_region(source: np.ndarray, target: np.ndarray, margin_px: int = MARGIN_PX) -> np.ndarray:
  """[H, W] bool: where the clean pictures [H, W, C] before and after an edit are equal, and further than `margin_px` (in rows and in columns) from
  where they are not. The border of the picture is no border of the region.

  Raises:
    ValueError: shapes that differ, or no pixel is left.
  """
  if source.shape != target.shape:
    raise ValueError(f"Clean pictures of shapes {source.shape} and {target.shape} cannot be compared pixel by pixel: render both at one size.")
  side = 2 * margin_px + 1
  region = ~ndimage.maximum_filter((source != target).any(axis=-1), size=side, mode="constant", cval=False)
  if not region.any():
    raise ValueError(f"The edit may change every pixel within a margin of {margin_px} px: nothing is left that it should keep.")
  return region


def outside_of_box(source: np.ndarray, target: np.ndarray, margin_px: int = MARGIN_PX) -> np.ndarray:
  """[H, W] bool: what is further than `margin_px` from the smallest upright box around all pixels in which the clean pictures [H, W, C] before and
  after an edit differ. For text: between the letters of an edited word nothing is asked to stay, because they may have other shapes.

  Raises:
    ValueError: shapes that differ, pictures that are equal, or no pixel is left.
  """
  if source.shape != target.shape:
    raise ValueError(f"Clean pictures of shapes {source.shape} and {target.shape} cannot be compared pixel by pixel: render both at one size.")
  rows, columns = np.nonzero((source != target).any(axis=-1))
  if not len(rows):
    raise ValueError("The clean pictures before and after the edit are equal: nothing is asked to change.")
  region = np.ones(source.shape[:2], bool)
  region[max(0, rows.min() - margin_px):rows.max() + 1 + margin_px, max(0, columns.min() - margin_px):columns.max() + 1 + margin_px] = False
  if not region.any():
    raise ValueError(f"The edit may change every pixel within a margin of {margin_px} px: nothing is left that it should keep.")
  return region


def scores_where_kept(picture: np.ndarray, source: np.ndarray, target: np.ndarray,
                      region_of: Callable[[np.ndarray, np.ndarray], np.ndarray] = kept_region) -> dict[str, float]:
  """`kept_scores` in the region that `region_of(source, target)` gives; {} for an edit that leaves none large enough: it has no such figures."""
  try:
    return kept_scores(picture, source, region_of(source, target))
  except ValueError:
    return {}


def kept_scores(picture: np.ndarray, source: np.ndarray, region: np.ndarray) -> dict[str, float]:
  """{"kept_psnr" dB, "kept_ssim", "drift_px", "drift_known"} of an edited picture against its condition image.

  "kept_ssim" is of RGB. "drift_px" is the length of the drift in px where "drift_known" is 1, and 0 where that is 0: its figure is a ratio of sums
  (`FIGURES`).

  Args:
    picture, source: [H, W, 3] uint8, what was drawn and what it was drawn from.
    region: [H, W] bool, from `kept_region`.

  Raises:
    ValueError: shapes that differ, or a region that holds no window of 11 px.
  """
  windows = ndimage.minimum_filter(region, size=2 * images.RADIUS + 1, mode="constant", cval=False)
  windows = windows[images.RADIUS:-images.RADIUS, images.RADIUS:-images.RADIUS]
  if not windows.any():
    raise ValueError(f"The region that should not change, {int(region.sum())} px, holds no window of {2 * images.RADIUS + 1} px: SSIM is not defined "
                     "there.")
  found = drift(picture, source)
  return {"kept_psnr": images.psnr(picture, source, region), "kept_ssim": float(images.ssim_map(picture, source)[windows].mean(dtype=np.float64)),
          "drift_px": math.hypot(*found) if found else 0.0, "drift_known": float(found is not None)}


def drift(picture: np.ndarray, source: np.ndarray) -> tuple[float, float] | None:
  """(rows, columns) in px by which `picture` lies below and to the right of `source`, both [H, W, 3] uint8, cyclically, to 1/100 px: between -H/2 and
  H/2 and between -W/2 and W/2. None where one of them is of one colour.

  Raises:
    ValueError: shapes that differ.
  """
  if picture.shape != source.shape:
    raise ValueError(f"Pictures of shapes {picture.shape} and {source.shape} have no drift: bring them to one size.")
  grey = [images.luma(x).astype(np.float64) for x in (picture, source)]
  if min(np.ptp(x) for x in grey) < 1e-3:
    return None
  product = np.multiply(*(transform(np.fft.fft2(x)) for transform, x in zip((lambda x: x, np.conj), grey)))
  # What is only rounding has no phase.
  size = np.abs(product)
  phases = product / np.maximum(size, 100 * np.finfo(np.float64).eps)
  peak = np.unravel_index(np.argmax(np.abs(np.fft.ifft2(phases))), phases.shape)
  coarse = [int(place) - num if place > num // 2 else int(place) for place, num in zip(peak, phases.shape)]
  return _refine(phases, coarse)


def _refine(phases: np.ndarray, coarse: Sequence[int]) -> tuple[float, float]:
  """The highest point of (1) within 3/4 px of `coarse`, on a grid of 1 / `FINENESS` px: the inverse transform as two products."""
  fine = np.arange(-math.ceil(0.75 * FINENESS), math.ceil(0.75 * FINENESS) + 1) / FINENESS
  waves = [np.exp(2j * np.pi * np.outer(place + fine, np.fft.fftfreq(num))) for place, num in zip(coarse, phases.shape)]
  peak = np.unravel_index(np.argmax(np.abs(waves[0] @ phases @ waves[1].T)), (len(fine), len(fine)))
  return tuple(float(place + fine[step]) for place, step in zip(coarse, peak))


def nearest(picture: np.ndarray, candidates: Sequence[np.ndarray]) -> int:
  """Index of the clean picture of the smallest squared distance to `picture`, all of one shape; of equal ones the first.

  Success of an edit with a known answer: the candidates are the clean result, the clean source, and whatever else could have been drawn.

  Raises:
    ValueError: no candidate, or one of another shape.
  """
  if not candidates or any(one.shape != picture.shape for one in candidates):
    raise ValueError(f"A picture of shape {picture.shape} is compared with candidates of its shape, but these have "
                     f"{sorted({one.shape for one in candidates}) or 'none'}.")
  return int(np.argmin([np.square(picture.astype(np.float32) - one).sum(dtype=np.float64) for one in candidates]))
