"""What can be measured on a picture without a learned model: complexity, sharpness, noise, light, compression, likeness, orientation, QR codes.

Gray pictures are uint8 H W in luma, colour pictures uint8 H W 3 in RGB. Every measure is deterministic and works down to one pixel.
"""

import functools
import io
import math

import cv2
import imagehash
import numpy as np
from PIL import ExifTags, Image

# Curation runs one process per core, which OpenCV's own threads would only fight over.
cv2.setNumThreads(0)

HASH_BITS = 64
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG may hold it
_DARK = 26  # a tenth of the range: the hue and saturation of darker pixels are noise
_EDGE = 32  # gray levels; steps between JPEG blocks are smaller, lines of a design are larger
# Immerkaer's mask: the difference of two Laplacians, blind to straight edges and ramps.
_NOISE_MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)


def perceptual_hash(pixels: np.ndarray) -> int:
  """Returns 64 bits that hardly change when a picture is scaled or encoded again: the DCT hash of the `imagehash` library.

  Mirrored, cropped or rotated copies get other hashes. Flat pictures have no structure to hash and may all look alike.
  """
  return int(str(imagehash.phash(Image.fromarray(pixels))), 16)


def shrink(gray: np.ndarray, side_px: int) -> np.ndarray:
  """Returns the picture averaged down to a shorter side of `side_px`; pictures that are smaller stay as they are, never enlarged."""
  scale = side_px / min(gray.shape)
  if scale >= 1:
    return gray
  rows, columns = (max(1, round(side * scale)) for side in gray.shape)
  return cv2.resize(gray, (columns, rows), interpolation=cv2.INTER_AREA)


def histogram_entropy(gray: np.ndarray) -> float:
  """Returns the Shannon entropy of the gray levels in bits, 0 for a flat picture, 8 if all 256 levels are equally frequent."""
  counts = np.bincount(gray.ravel(), minlength=256)
  shares = counts[counts > 0] / gray.size
  return float(abs(np.sum(shares * np.log2(shares))))


def texture_entropy(gray: np.ndarray) -> float:
  """Returns in bits how unlike its neighbours a pixel is: 0 for a flat picture, 3 to 6 for photographs, 8 for white noise.

  The entropy of what remains after predicting every pixel from those to the left and above, with the median predictor of lossless JPEG-LS
  (Weinberger, Seroussi, Sapiro 2000), modulo 256. About what lossless compression spends per pixel. Noise of few levels, such as black and
  white dots, stays low: its pixels carry few bits.
  """
  padded = np.pad(gray.astype(np.int16), ((1, 0), (1, 0)), "edge")
  left, above, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
  low, high = np.minimum(left, above), np.maximum(left, above)
  predicted = np.clip(left + above - corner, low, high)
  return histogram_entropy((padded[1:, 1:] - predicted).astype(np.uint8))


def laplacian_variance(gray: np.ndarray) -> float:
  """Returns the variance of the Laplacian in squared gray levels: below about 20 for blur, hundreds for sharp photographs."""
  return float(cv2.Laplacian(gray, cv2.CV_32F).var())


def noise_sigma(gray: np.ndarray) -> float:
  """Returns the standard deviation of the noise in gray levels, 0 for a clean picture (Immerkaer, Fast noise variance estimation, 1996).

  Taken in 8 x 8 tiles and reported as the lower quartile of those that are not clipped white or black: texture, which the mask takes for
  noise, fills the upper ones.
  """
  response = np.abs(cv2.filter2D(gray, cv2.CV_32F, _NOISE_MASK)) * (math.sqrt(math.pi / 2) / 6)
  # Area averaging to 8 x 8 gives the mean of each tile.
  sigmas, lights = (cv2.resize(values, (8, 8), interpolation=cv2.INTER_AREA) for values in (response, gray.astype(np.float32)))
  usable = sigmas[(lights > 5) & (lights < 250)]
  return float(np.quantile(usable, 0.25)) if usable.size else 0.0


def technical_quality(gray: np.ndarray) -> tuple[float, float, float]:
  """Returns (quality 0 to 1, sharpness in squared gray levels, noise sigma in gray levels).

  quality = sharpness / (sharpness + 50) / (1 + (sigma / 15)^2), with sharpness the variance of the Laplacian less what the noise adds to it.
  A formula of our own with constants set by eye, no learned opinion score: it finds enlarged, blurred and noisy pictures and knows nothing
  of composition, exposure or content. Pictures that are soft on purpose (fog, shallow focus) score low too.
  """
  sigma = noise_sigma(gray)
  # White noise of variance s^2 adds 20 s^2: the sum of the squared weights of the Laplacian's mask.
  sharpness = max(0.0, laplacian_variance(gray) - 20 * sigma ** 2)
  return sharpness / (sharpness + 50) / (1 + (sigma / 15) ** 2), sharpness, sigma


def mean_saturation(pixels: np.ndarray) -> float:
  """Returns the mean HSV saturation, 0 for gray to 1 for pure colours; pixels darker than a tenth of the range count as gray."""
  hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
  return float(np.where(hsv[..., 2] < _DARK, 0, hsv[..., 1]).mean() / 255)


def blockiness(gray: np.ndarray) -> float:
  """Returns how much larger the steps at every eighth pixel are than those in between: 1 without JPEG blocks, 1.7 to 4 with heavy ones.

  Photographs saved at quality 70 have 1.1 to 1.6, at quality 5 at least 1.7; busy ones at 10, and slides at any, go unseen.

  Looks for blocks that start at the top left corner, at the scale of the file: a picture that was scaled after compression looks clean.
  Steps of 32 gray levels and more are left out, since designs are often drawn on a grid of eight pixels.
  """
  ratios = [_step_ratio(gray), _step_ratio(gray.T)]
  return float(max(ratios))


def _step_ratio(gray: np.ndarray) -> float:
  """Returns the mean step onto columns 8, 16, ... over the mean step onto the others; 1 if there are none."""
  steps = np.abs(np.diff(gray.astype(np.int16), axis=1))
  small = steps < _EDGE
  sums, counts = (steps * small).sum(axis=0), small.sum(axis=0)
  border = np.arange(1, gray.shape[1]) % 8 == 0
  at, inside = (sums[where].sum() / max(1, counts[where].sum()) for where in (border, ~border))
  # One level more on both sides: in smooth skies half a level between blocks would be a large ratio, and cannot be seen.
  return (at + 1) / (inside + 1) if border.any() else 1.0


def jpeg_quality(data: bytes) -> int | None:
  """Returns the quality 1 to 100 that a JPEG was saved with, None for other formats.

  Read off the luma quantisation table: exact for the Independent JPEG Group's encoder (libjpeg, Pillow), the nearest such quality for other
  encoders. It tells of the last save only: a bad JPEG that was saved again at 95 says 95, see `blockiness`.
  """
  image = Image.open(io.BytesIO(data))
  if image.format not in ("JPEG", "MPO") or not image.quantization:
    return None
  total = sum(image.quantization[min(image.quantization)])
  return int(np.argmin(np.abs(_table_sums() - total))) + 1


@functools.cache
def _table_sums() -> np.ndarray:
  """Returns the sum of the luma quantisation table for each quality 1 to 100, by the IJG's scaling of its quality-50 table."""
  buffer = io.BytesIO()
  Image.new("L", (8, 8)).save(buffer, "JPEG", quality=50)
  table = np.array(Image.open(buffer).quantization[0])
  scales = [5000 // quality if quality < 50 else 200 - 2 * quality for quality in range(1, 101)]
  return np.array([np.clip((table * scale + 50) // 100, 1, 255).sum() for scale in scales])


def exif_orientation(data: bytes) -> int:
  """Returns the EXIF orientation of an encoded picture: 1 upright, 2 to 8 turned or mirrored, 0 unknown; 1 if the file has none.

  Other numbers are invalid, and decoders leave such pictures as they are.
  """
  # Pillow decodes all of a PNG to look for a chunk behind the pixels, so look whether there can be one.
  if data.startswith(b"\x89PNG") and not any(chunk in data for chunk in _PNG_EXIF):
    return 1
  value = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
  return value if isinstance(value, int) else -1


def read_qr_code(gray: np.ndarray) -> str:
  """Returns what a QR code in the picture says, "" if none is found that can be read."""
  if min(gray.shape) < 21:  # modules of the smallest code
    return ""
  return cv2.QRCodeDetector().detectAndDecode(gray)[0]
