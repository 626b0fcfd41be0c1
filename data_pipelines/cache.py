"""Latent caches: data sets that hold what frozen networks compute, in place of what they compute it from.

A cached record is one picture in one bucket of one resolution. It has `latents`, the VAE's normalised latents of the target, and for an edit
`source_latents`, one per condition image; `height`, `width` and the source sizes are those of the bucket, and the index has the column
`base_px`. With features it also has `features`, the condition encoder's states without the system turn: one array per caption, and last that
of the empty prompt; no bytes for a caption longer than num_tokens. Without features the condition images stay in the record as pixels of the
bucket's size, because the encoder looks at them too. Arrays are raw little-endian bytes, and dataset.json says their type:

  "cache": {"dtype": "float16", "channels": 64, "factor": 16, "feature_width": 4096, "num_system_tokens": 14, "made_with": {...}}

made_with says what it can be used for: base_px, and for each the `sizes` of its buckets; the fingerprints of the weights of `vae`, `encoder` and
of the `tokenizer`, `num_tokens`, where the weights came from (`weights_from`), the version of `decoding` of its pictures,
and whether their `alpha` was kept.

A pair has `rejected_latents`, of the shape of `latents`, in place of its rejected picture.

In a batch, `latents` B h w C and `source_latents` (a tuple of B h w C) take the place of `target`; with features `features` B M' E (M' the
prompt without the system turn, zeros after its end) takes that of `sources`, which is then empty.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from data_pipelines.buckets import Bucket, bucket_size
from data_pipelines.records import read_meta
from data_pipelines.transforms import DECODING, load_picture

DTYPES = ("float16", "float32")  # float16 has 11 bits of precision; what goes beyond its largest number, 65504, is refused when it is written
_AGAIN = "write it again with launch.cache_latents for this stage"


@dataclasses.dataclass(frozen=True)
class Cache:
  """How the arrays of a cache are stored: type, latent channels, px per latent, width of the states (0: none are stored), and the system
  turn's length, which the states leave out."""
  dtype: str
  channels: int
  factor: int
  feature_width: int
  num_system_tokens: int

  @property
  def has_features(self) -> bool:
    """Whether the condition encoder's states are stored."""
    return self.feature_width > 0

  @property
  def roles(self) -> tuple[str, ...]:
    """The networks whose results are stored."""
    return ("vae", "encoder") if self.has_features else ("vae",)

  def empty(self, num: int, bucket: Bucket) -> dict:
    """Returns the arrays of `num` rows of a bucket, not filled; states are zeros."""
    grid = lambda size: (num, size[0] // self.factor, size[1] // self.factor, self.channels)
    sources = () if self.has_features else bucket.source_sizes
    arrays = {"latents": np.empty(grid((bucket.height, bucket.width)), self.dtype),
              "source_latents": [np.empty(grid(size), self.dtype) for size in bucket.source_sizes],
              "sources": [np.empty((num, *size, 3), np.uint8) for size in sources]}
    if bucket.pairs:
      arrays["rejected_latents"] = np.empty_like(arrays["latents"])
    if self.has_features:
      arrays["features"] = np.zeros((num, bucket.num_tokens - self.num_system_tokens, self.feature_width), self.dtype)
    return arrays

  def read(self, arrays: dict, row: int, record: dict, bucket: Bucket, name: str) -> None:
    """Writes a record into a row of the arrays; `ValueError` if it is not of the bucket's shape."""
    arrays["latents"][row] = self._array(record["latents"], arrays["latents"].shape[1:], name)
    if bucket.pairs:
      arrays["rejected_latents"][row] = self._array(record["rejected_latents"], arrays["latents"].shape[1:], f"the rejected picture of {name}")
    for slot, array in enumerate(arrays["source_latents"]):
      array[row] = self._array(record["source_latents"][slot], array.shape[1:], f"condition image {slot + 1} of {name}")
    for slot, array in enumerate(arrays["sources"]):
      array[row] = load_picture(record["sources"][slot], *bucket.source_sizes[slot], f"condition image {slot + 1} of {name}")

  def read_features(self, rows: np.ndarray, records: Sequence[dict], captions: Sequence[int | None]) -> None:
    """Writes the states of the chosen caption of each record (None: of the empty prompt) into rows of zeros."""
    for row, (record, number) in enumerate(zip(records, captions)):
      stored = record["features"][-1 if number is None else number]
      if not stored:
        raise ValueError(f"A caption of sample {record['sample_id']} was too long to be cached: leave the record out by num_tokens, or {_AGAIN}.")
      states = self._array(stored, (-1, self.feature_width), f"the states of sample {record['sample_id']}")
      rows[row, :len(states)] = states

  def _array(self, data: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
    try:
      return np.frombuffer(data, np.dtype(self.dtype).newbyteorder("<")).reshape(shape)
    except ValueError as error:
      raise ValueError(f"The cached array of {name} has {len(data)} bytes, which do not make the shape {shape}: write the cache anew.") from error


def open_cache(data_dir: str | os.PathLike, name: str) -> Cache | None:
  """Returns how a data set's arrays are stored, or None if it holds pixels."""
  meta = read_meta(os.path.join(data_dir, name))
  if "cache" not in meta:
    return None
  return Cache(**{field.name: meta["cache"][field.name] for field in dataclasses.fields(Cache)})


def cached_shapes(data_dir: str | os.PathLike, name: str) -> tuple:
  """Returns the shapes of the buckets that a latent cache was made for, each as (task, base_px, target size, sizes of condition images, prompt
  tokens); none where an older version made it."""
  size = lambda sides: tuple(map(int, sides))
  return tuple((task, base_px, size(target), tuple(map(size, images)), tokens)
               for task, base_px, target, images, tokens in _made_with(data_dir, name).get("shapes", ()))


def check_use(data_dir: str | os.PathLike, name: str, stage: str, resolutions: Sequence[tuple[int, tuple, int]],
              needs: Mapping[str, Any]) -> None:
  """Checks that a stage can train on a latent cache; pixels always pass. The log warns of one whose pictures were decoded otherwise than today.

  Args:
    data_dir, name: the data set.
    stage: name of the stage, for the message.
    resolutions: (base_px, ratios, multiple) of each resolution of the stage.
    needs: channels, factor, alpha (whether its pictures keep theirs), feature_width, num_system_tokens, tokenizer (its fingerprint), num_tokens
      and truncate (whether captions are cut) of the stage. All but the first three matter where states are stored.

  Raises:
    ValueError: the cache was made for something else.
  """
  cache = open_cache(data_dir, name)
  if cache is None:
    return
  made_with = _made_with(data_dir, name)
  _warn_of_decoding(str(data_dir), name, made_with.get("decoding"))
  has = {"alpha": False} | made_with | dataclasses.asdict(cache)
  for key in ("channels", "factor", "alpha") + (("feature_width", "num_system_tokens", "tokenizer") if cache.has_features else ()):
    if has[key] != needs[key]:
      raise ValueError(f"Data set {name!r} was cached with {key}={has[key]}, but stage {stage!r} has {key}={needs[key]}: {_AGAIN}.")
  if cache.has_features and needs["num_tokens"] > has["num_tokens"]:
    raise ValueError(f"Data set {name!r} holds states of prompts of at most num_tokens={has['num_tokens']}, but stage {stage!r} has "
                     f"num_tokens={needs['num_tokens']}: {_AGAIN}.")
  if cache.has_features and needs.get("truncate"):
    raise ValueError(f"Data set {name!r} holds no states of captions that are longer than num_tokens, but stage {stage!r} has too_long='truncate': "
                     "choose 'drop', or cache without --features.")
  for base_px, ratios, multiple in resolutions:
    offered = {bucket_size(base_px, ratio, multiple) for ratio in ratios}
    cached = made_with["sizes"].get(str(base_px))
    if cached is None:
      raise ValueError(f"Data set {name!r} was cached for base_px={', '.join(made_with['sizes'])}, but stage {stage!r} asks for {base_px}: {_AGAIN}.")
    lacking = [f"{height} x {width}" for height, width in cached if (height, width) not in offered]
    if lacking:
      raise ValueError(f"Data set {name!r} has pictures of {lacking[0]} px, for which stage {stage!r} has no bucket at base_px={base_px}: give it "
                       f"the ratios and the multiple of the cache, or {_AGAIN}.")


def check_weights(data_dir: str | os.PathLike, name: str, stage: str, fingerprints: Mapping[str, str]) -> None:
  """Checks that a latent cache was made by a stage's frozen weights, given as role -> fingerprint; `ValueError` if it was not. Pixels pass."""
  cache = open_cache(data_dir, name)
  if cache is None:
    return
  made_with = _made_with(data_dir, name)
  for role in cache.roles:
    if made_with[role] != fingerprints[role]:
      origin = made_with["weights_from"][role]
      raise ValueError(f"Data set {name!r} was cached with other weights of the {role} than stage {stage!r} has (from {origin!r} then, fingerprint "
                       f"{made_with[role]}, and {fingerprints[role]} now): {_AGAIN}, or give the stage those weights as frozen.{role}.")


@functools.cache
def _warn_of_decoding(data_dir: str, name: str, decoding: int | None) -> None:
  """Warns once per process of a cache that was made with another version of decoding; None: made before pictures with a profile became sRGB."""
  if decoding != DECODING:
    logging.warning("Data set %r in %s was cached by another version of decoding (%s, now %s): the colours of its pictures that had an ICC profile "
                    "may be other than those of pixels; where it has such pictures, remove it and %s.", name, data_dir, decoding, DECODING, _AGAIN)


def _made_with(data_dir: str | os.PathLike, name: str) -> dict:
  return read_meta(os.path.join(data_dir, name))["cache"]["made_with"]
