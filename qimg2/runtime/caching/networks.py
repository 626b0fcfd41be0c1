"""What a latent cache is computed with: how it is asked for, and the frozen networks as functions from pictures and captions to stored bytes."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.cache import DTYPES
from data_pipelines.specs import source_grids
from qimg2 import networks
from qimg2.runtime.caching import MADE_BY
from qimg2.runtime.run import Run


@dataclasses.dataclass(frozen=True)
class Options:
  """How to cache.

  Attributes:
    features: whether to store the condition encoder's states.
    dtype: of what is stored, one of `data_pipelines.cache.DTYPES`.
    batch_size: pictures at a time, rounded up to what the mesh divides; 0 takes that of the stage's resolutions.
    shard_records: records of the original per shard.
    part: (i, n): write only every n-th shard, from the i-th on, and leave it at that; None writes all and finishes.

  Raises:
    ValueError: a value out of its range.
  """
  features: bool = False
  dtype: str = "float16"
  batch_size: int = 0
  shard_records: int = 1024
  part: tuple[int, int] | None = None

  def __post_init__(self):
    if self.dtype not in DTYPES:
      raise ValueError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}.")
    if self.batch_size < 0 or self.shard_records < 1:
      raise ValueError(f"batch_size={self.batch_size} and shard_records={self.shard_records}: give at least 1.")
    if self.part is not None and not 0 <= self.part[0] < self.part[1]:
      raise ValueError(f"part={self.part[0]}/{self.part[1]}: give i/n with i from 0 to n - 1.")


class Encoder:
  """From decoded pictures and captions to the arrays of a cache; compiled once per picture size, and per set of source sizes for states."""

  def __init__(self, run: Run, weights: dict, options: Options):
    nets = run.nets
    self.fingerprints = {name: networks.fingerprint(weights[network]) for name, network in list(MADE_BY.items())[:2 if options.features else 1]}
    self._run, self._weights, self._options = run, weights, options
    self._dtype = np.dtype(options.dtype).newbyteorder("<")
    self._latents = jax.jit(nets.encode)
    self._states = jax.jit(lambda encoder, batch: nets.text_states({"qwen3_vl": encoder}, batch).astype(jnp.float32))

  def latents(self, pixels: np.ndarray, num: int, name: str) -> list[bytes]:
    """The stored latents of the first `num` of B pictures [B, H, W, 3] uint8."""
    x = jax.device_get(self._latents(self._weights["vae"], self._run.put({"pixels": pixels})["pixels"]))
    return [self._stored(row, f"the latents of {name}") for row in x[:num]]

  def states(self, captions: Sequence[Sequence[str]], sources: Sequence[np.ndarray], sizes: tuple, batch_size: int, name: str) -> list[list[bytes]]:
    """The stored states of each record's captions, and last those of the empty prompt.

    Args: captions of each record; condition images [B, h, w, 3] with the records' in the first rows; their sizes in px; B; for messages.
    """
    tokenizer, longest, grids = self._run.tokenizer, self._run.cfg.num_tokens, source_grids(sizes)
    own = [[(row if grids else 0, text) for text in (*texts, "")] for row, texts in enumerate(captions)]
    # Without condition images equal prompts have equal states.
    wanted = list(dict.fromkeys(prompt for prompts in own for prompt in prompts))
    counts = tokenizer.count([text for _, text in wanted], bool(grids))
    stored = {prompt: b"" for prompt, count in zip(wanted, counts) if count > longest}
    fitting = [prompt for prompt in wanted if prompt not in stored]
    for start in range(0, len(fitting), batch_size):
      some = fitting[start:start + batch_size]
      rows = [some[min(i, len(some) - 1)] for i in range(batch_size)]
      tokens, token_count = tokenizer.encode_batch([text for _, text in rows], longest + tokenizer.num_image_tokens(grids), grids)
      seen = tuple(source[[row for row, _ in rows]] for source in sources)
      batch = self._run.put({"tokens": tokens, "token_count": token_count, "sources": seen})
      states = jax.device_get(self._states(self._weights["qwen3_vl"], batch))
      for prompt, row, count in zip(some, states, token_count - tokenizer.num_system_tokens):
        stored[prompt] = self._stored(row[:count], f"the states of {name}")
    return [[stored[prompt] for prompt in prompts] for prompts in own]

  def _stored(self, x: np.ndarray, name: str) -> bytes:
    with np.errstate(over="ignore"):
      array = np.asarray(x, self._dtype)
    if not np.isfinite(array).all():
      raise ValueError(f"There are numbers in {name} that {self._options.dtype} cannot hold, the largest {np.abs(x).max()}: "
                       + ("use --dtype=float32." if np.isfinite(x).all() else "the network computes no finite numbers."))
    return array.tobytes()
