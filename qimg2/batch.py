"""What a batch is: a dict of arrays, one row per example, with the same static shapes on every host and in every batch of a bucket.

| key | shape, dtype | meaning |
|---|---|---|
| `target` | B H W C uint8 | image to learn, RGB or RGBA |
| `sources` | tuple of B h w C uint8 | condition images in prompt order; empty for text-to-image |
| `tokens` | B M int32 | prompt ids of the condition encoder, system turn included, right-padded; an image slot per 32 x 32 px of a source |
| `token_count` | B int32 | number of real tokens |
| `sample_id` | B int64 | stable id: validation noise and time are functions of it |
| `weight` | B float32 | only in evaluation batches: 1, or 0 for a row that fills the last batch or stands for a broken record |

| `rejected` | B H W C uint8 | only for methods that learn from pairs: the worse picture of the same prompt, fitted as `target` is |
| `loss_weight` | B float32 | only where a data set of the mixture has one: what the loss of a row is multiplied by |
| `tasks` | tuple of B mappings | only where rewards ask for it, and on the host alone: prompt, category and truth of each row |
| `category` | B int32 | only where rewards count by category: an index of `qimg2.algorithms.Rewards.weights` |

The loaders here give these, and the runtime makes `category` of `tasks`. A method may learn from other arrays: the trainer asks for `sample_id`
alone, takes `weight` where there is one, and `loss_mask` B M bool is the name for the tokens that a language model learns to say.

A method that needs guidance inside its step asks for the unconditional prompt (`qimg2.algorithms.Algorithm.unconditional`): `null_tokens`,
`null_token_count` and, where there are `features`, `null_features` are the empty prompt around the same condition images, shaped as without
"null_". `unconditional` puts them in the prompt's place.

A data set that is a latent cache gives arrays of the cache's type, float16 or float32, in place of what they were computed from:

| key | shape | takes the place of |
|---|---|---|
| `latents` | B h w C | `target`: normalised latents of the VAE |
| `rejected_latents` | B h w C | `rejected` |
| `source_latents` | tuple of B h w C | what the VAE makes of `sources`; these stay, for the condition encoder's eyes, unless there are `features` |
| `features` | B M' E | what the condition encoder makes of `tokens` and `sources`; M' is M without the system turn; zero at padding |

B counts the rows of the global batch on devices, and those of one process in the loader. A *bucket* is (task, target size, source sizes, M).
"""

from collections.abc import Mapping
from typing import Any

Grid = tuple[int, int]  # (rows, columns) of latents
HOST_ONLY = ("tasks",)  # keys of a batch that never go to a device


def num_rows(batch: Mapping[str, Any]) -> int:
  """B, the number of examples."""
  return batch["tokens"].shape[0]


def target_grid(batch: Mapping[str, Any], factor: int) -> Grid:
  """(h, w) of the targets in latents; `factor` is the number of pixels per latent along each side."""
  return _grid(batch["latents"]) if "latents" in batch else _grid(batch["target"], factor)


def source_grids(batch: Mapping[str, Any], factor: int) -> tuple[Grid, ...]:
  """(h, w) of each condition image in latents, in prompt order; `factor` as in `target_grid`."""
  if "source_latents" in batch:
    return tuple(_grid(x) for x in batch["source_latents"])
  return tuple(_grid(x, factor) for x in batch.get("sources", ()))


def unconditional(batch: Mapping[str, Any]) -> dict[str, Any]:
  """`batch` with the unconditional prompt in place of its own."""
  return {**batch, **{name.removeprefix("null_"): x for name, x in batch.items() if name.startswith("null_")}}


def for_device(batch: Mapping[str, Any]) -> dict[str, Any]:
  """`batch` without what stays on the host."""
  return {name: x for name, x in batch.items() if name not in HOST_ONLY}


def some_rows(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
  """Some rows of a batch, on the host or inside a compiled function."""
  cut = lambda name, x: tuple(one[rows] for one in x) if isinstance(x, tuple) and name not in HOST_ONLY else x[rows]
  return {name: cut(name, x) for name, x in batch.items()}


def _grid(x: Any, factor: int = 1) -> Grid:
  height, width = x.shape[1:3]
  return height // factor, width // factor
