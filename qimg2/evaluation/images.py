"""PSNR and SSIM of two pictures, on RGB and on the luma.

  PSNR = 10 log10(255² / MSE),  MSE the mean over pixels and channels                                                            (1)
  SSIM = (2 μx μy + C1)(2 σxy + C2) / ((μx² + μy² + C1)(σx² + σy² + C2)),  C1 = (0.01·255)², C2 = (0.03·255)²                     (2)

μ, σ² and σxy are moments under a gaussian window of 11 x 11 px with a deviation of 1.5 px, and the covariances are those of the population (divided
by the sum of the weights). SSIM on RGB is the mean of the three channels. The mean is taken over windows, and packages differ in which:

  border="inside"   windows that lie wholly inside the picture, so that the five pixels along each border are centres of none: scikit-image
                    (`gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255`) and the paper. The default.
  border="reflect"  a window at every pixel of a picture that is continued by reflection, the border's own pixels once: torchmetrics
                    (`data_range=255`).

The luma is the Y of JPEG, 0.299 R + 0.587 G + 0.114 B in 0..255, not rounded. Papers on super-resolution often take the studio range 16..235 instead
and give a PSNR that is about 1.3 dB higher.

The arithmetic is float32 around the middle grey: a window is right to 5e-6, and the mean over a picture to 1e-7.

Equal pictures have no PSNR that is a number: `psnr` gives `MAX_PSNR`, and no more for any pair, so that a mean over pictures stays one.

Source: SSIM, Wang et al. 2004 (doi 10.1109/TIP.2003.819861).
"""

import functools

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
MAX_PSNR = 100.0  # dB; what comes so near is equal but for one level in 154,000 numbers
RADIUS = 5  # px from the centre of a window to its border
_SIGMA, _C1, _C2 = 1.5, (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Rows and columns that one product filters: so few that it stays below what BLAS shares among threads, which would wait for each other.
_ROWS, _COLUMNS, _WIDE = 16, 64, 1024


def luma(picture: np.ndarray) -> np.ndarray:
  """The luma [H, W] float32 in 0..255 of a picture [H, W, 3] uint8."""
  return picture.astype(np.float32) @ LUMA


def psnr(one: np.ndarray, other: np.ndarray, mask: np.ndarray | None = None) -> float:
  """Peak signal-to-noise ratio in dB (equation 1), `MAX_PSNR` at most.

  Args:
    one, other: pictures of one shape [H, W, ...], levels in 0..255.
    mask: [H, W] bool, the pixels that count; None for all.

  Raises:
    ValueError: shapes that differ, or a mask without a pixel.
  """
  _check(one, other)
  square = np.square(one.astype(np.float32) - other.astype(np.float32))
  if mask is not None:
    if mask.shape != one.shape[:2] or not mask.any():
      raise ValueError(f"A mask of shape {mask.shape} with {int(mask.sum())} px picks no pixel of pictures of shape {one.shape}.")
    square = square[mask]
  error = float(square.mean(dtype=np.float64))
  return min(MAX_PSNR, float(10 * np.log10(255**2 / error))) if error else MAX_PSNR


def ssim(one: np.ndarray, other: np.ndarray, border: str = "inside") -> float:
  """Structural similarity, -1..1 (equation 2), of pictures [H, W] or [H, W, C] with levels in 0..255.

  Raises:
    ValueError: shapes that differ, a side below 11 px, or another rule for the border than "inside" and "reflect".
  """
  if border not in ("inside", "reflect"):
    raise ValueError(f"There is no rule {border!r} for the border of SSIM: choose inside or reflect.")
  if border == "reflect":
    one, other = (np.pad(x, ((RADIUS, RADIUS), (RADIUS, RADIUS), (0, 0))[:x.ndim], "reflect") for x in (one, other))
  return float(ssim_map(one, other).mean(dtype=np.float64))


def ssim_map(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Equation 2 for every window, [H - 10, W - 10, ...] float32; arguments and errors as in `ssim`. Its first entry is centred at pixel (5, 5)."""
  _check(one, other)
  if min(one.shape[:2]) < 2 * RADIUS + 1:
    raise ValueError(f"SSIM has windows of {2 * RADIUS + 1} px, but a picture has {one.shape[0]} x {one.shape[1]} px: give a larger one.")
  # Around the middle grey, where the squares of float32 numbers are exact and their moments lose least.
  channels = [np.moveaxis(np.atleast_3d(x).astype(np.float32) - np.float32(128), -1, 0) for x in (one, other)]
  height, width = one.shape[0] - 2 * RADIUS, one.shape[1] - 2 * RADIUS
  found = np.empty((len(channels[0]), height, width), np.float32)
  for channel, (x, y) in enumerate(zip(*channels)):
    for top in range(0, height, _ROWS):
      rows = slice(top, min(top + _ROWS, height) + 2 * RADIUS)
      found[channel, top:top + _ROWS] = _similarity(x[rows], y[rows])
  return np.moveaxis(found, 0, -1).reshape(height, width, *one.shape[2:])


def compare(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
  """{"psnr", "psnr_luma", "ssim", "ssim_luma"} of two pictures [H, W, 3] uint8; errors as in `ssim`."""
  _check(one, other)
  grey = luma(one), luma(other)
  return {"psnr": psnr(one, other), "psnr_luma": psnr(*grey), "ssim": ssim(one, other), "ssim_luma": ssim(*grey)}


def _check(one: np.ndarray, other: np.ndarray) -> None:
  if one.shape != other.shape:
    raise ValueError(f"Pictures of shapes {one.shape} and {other.shape} cannot be compared pixel by pixel: bring them to one size and one number of "
                     "channels.")


def _similarity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Equation 2 for a strip of rows around 128: [h + 10, W] -> [h, W - 10]."""
  mean_x, mean_y, squares, products = _filtered(np.stack([x, y, x * x + y * y, x * y]))
  between, within = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
  top = 2 * (products - between) + np.float32(_C2)
  bottom = squares - within + np.float32(_C2)
  shift = np.float32(128) * (mean_x + mean_y) + np.float32(128**2)  # the means themselves are 128 more
  top *= 2 * (between + shift) + np.float32(_C1)
  bottom *= within + 2 * shift + np.float32(_C1)
  return top / bottom


def _filtered(x: np.ndarray) -> np.ndarray:
  """The gaussian mean of every window, [4, h + 10, W] -> [4, h, W - 10]: down the columns, then along the rows, as products with band matrices,
  which take half the time of `scipy.ndimage.correlate1d`."""
  height, width = x.shape[1] - 2 * RADIUS, x.shape[2] - 2 * RADIUS
  down = _band()[:height, :height + 2 * RADIUS]
  x = np.concatenate([down @ x[:, :, left:left + _WIDE] for left in range(0, x.shape[2], _WIDE)], axis=2)
  found = np.empty((len(x), height, width), np.float32)
  for left in range(0, width, _COLUMNS):
    num = min(_COLUMNS, width - left)
    np.matmul(x[:, :, left:left + num + 2 * RADIUS], _band()[:num, :num + 2 * RADIUS].T, out=found[:, :, left:left + num])
  return found


@functools.cache
def _band() -> np.ndarray:
  """[64, 74]: row i holds the window's weights from column i on."""
  weights = np.exp(-np.square(np.arange(-RADIUS, RADIUS + 1)) / (2 * _SIGMA**2))
  band = np.zeros((_COLUMNS, _COLUMNS + 2 * RADIUS))
  for i in range(_COLUMNS):
    band[i, i:i + 2 * RADIUS + 1] = weights / weights.sum()
  return band.astype(np.float32)
