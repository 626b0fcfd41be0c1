"""How much of a picture an autoencoder keeps: PSNR, SSIM, LPIPS, and whether what is written in it can still be read.

The text metric is that of OmniDoc-TokenBench: NED = 1 - edit distance / longer length, of what one OCR reads in the original and in the
reconstruction. It says nothing of text that the OCR cannot read in the original either; a picture without text has no NED, and is left out of that
figure alone.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from qimg2.evaluation import Figure, images
from qimg2.evaluation.text_benchmarks import omnidoc_ned

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]  # LPIPS [B] of pictures [B, H, W, 3] uint8
FIGURES: Mapping[str, Figure] = {
    "psnr": Figure("psnr", is_share=False), "psnr_luma": Figure("psnr_luma", is_share=False), "ssim": Figure("ssim", is_share=False),
    "ssim_luma": Figure("ssim_luma", is_share=False), "lpips": Figure("lpips", is_share=False, lower_is_better=True), "ned": Figure("ned")}


def score(original: np.ndarray, reconstruction: np.ndarray, distance: Distance | None = None,
          read: Callable[[np.ndarray], str] | None = None) -> dict[str, float | str]:
  """{"psnr", "psnr_luma", "ssim", "ssim_luma"}, and where their functions are given "lpips" and "ned" with the texts "original_text" and
  "text"; without "ned" where nothing is read in the original.

  Args:
    original, reconstruction: [H, W, 3] uint8, of one size.
    distance: LPIPS of batches of pictures.
    read: (picture [H, W, 3] uint8) -> its text.

  Raises:
    ValueError: shapes that differ, or a picture too small for SSIM or LPIPS.
  """
  found: dict[str, float | str] = dict(images.compare(original, reconstruction))
  if distance is not None:
    found["lpips"] = float(distance(original[None], reconstruction[None])[0])
  if read is not None:
    texts = read(original), read(reconstruction)
    found |= dict(zip(("original_text", "text"), texts))
    if texts[0]:
      found["ned"] = omnidoc_ned(*texts)
  return found


def resolution(height: int, width: int) -> str:
  """The class of a picture's size: the power of two nearest to the side of the square of its area, in octaves, such as "512 px"."""
  return f"{2 ** round(math.log2(math.sqrt(height * width)))} px"
