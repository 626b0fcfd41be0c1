"""How many micro-batches a step takes, and what it keeps for its backward pass, for each bucket.

Memory grows with the tokens that a device has at once. Buckets differ in them by a factor of twenty, and one number of micro-batches for all is that
of the longest row: all other buckets fetch the weights more often than they must, and leave most of the memory empty. With `micro_batches` in a
config each bucket takes the first entry in which one of its rows finds room, and as many rows as do.
"""

import dataclasses
from collections.abc import Callable, Sequence

from absl import logging

from data_pipelines.buckets import Bucket, bucket_size
from data_pipelines.specs import Resolution, source_grids
from qimg2.networks import Networks
from qimg2.runtime.config import RunConfig, StageConfig


def num_tokens(bucket: Bucket, factor: int) -> int:
  """Tokens of one row in the generator, at most: those of the prompt, and latents, which stand in the places of images, of a pair for each of its
  pictures; `factor` is px per latent."""
  latents = sum((height // factor) * (width // factor) for height, width in (*bucket.source_sizes, (bucket.height, bucket.width)))
  return (bucket.num_tokens - sum(height * width for height, width in source_grids(bucket.source_sizes)) + latents) * (2 if bucket.pairs else 1)


def choose(cfg: RunConfig, stage: StageConfig, bucket: Bucket, parts: int) -> tuple[str, int]:
  """(rematerialisation policy of the generator, number of micro-batches) of a stage's step for one bucket.

  A row that is longer than every entry goes alone, under the last one's policy. Stages of other networks have `optimizer.accumulate`, and so has
  everything without `micro_batches`.

  Args:
    cfg, stage: the config.
    bucket: its rows are those of the global batch.
    parts: over how many devices rows are divided.
  """
  if not cfg.micro_batches or stage.kind != "generator":
    return cfg.model.remat, stage.optimizer.accumulate
  length, rows = num_tokens(bucket, cfg.vae.spatial_factor), max(1, bucket.batch_size // parts)
  entry = next((one for one in cfg.micro_batches if length <= one.tokens), cfg.micro_batches[-1])
  at_once = max((num for num in range(1, rows + 1) if rows % num == 0 and num * length <= entry.tokens), default=1)
  return entry.remat, rows // at_once


def held_out_rows(cfg: RunConfig, stage: StageConfig, task: str, resolution: Resolution, num_image_tokens: Callable[[Sequence[tuple[int, int]]], int],
                  parts: int) -> int:
  """Rows of a global held-out batch of a task at a resolution: those of one micro-batch of the square with prompts of the longest class and, for
  edits, one condition image of its size. `num_image_tokens` gives the prompt tokens of condition images by their grids; the rest as in `choose`."""
  accumulate = stage.optimizer.accumulate  # whatever its buckets are: it need not have a square
  if cfg.micro_batches:
    side = bucket_size(resolution.base_px, "1:1", resolution.multiple)
    sources = (bucket_size(resolution.base_px, "1:1"),) if task == "ti2i" else ()
    num_tokens = cfg.num_tokens + num_image_tokens(source_grids(sources))
    bucket = Bucket(task, *side, sources, num_tokens=num_tokens, batch_size=resolution.batch_size)
    accumulate = choose(cfg, stage, bucket, parts)[1]
  return max(1, resolution.batch_size // accumulate)


def variants(cfg: RunConfig, stage: StageConfig, buckets: Sequence[Bucket], nets: Networks) -> tuple[tuple[Networks, int], ...]:
  """(networks, number of micro-batches) for each bucket, as `qimg2.training.stage.Stage` takes them; empty where all have those of the stage. Says
  in the log when a row is longer than every entry."""
  if not cfg.micro_batches or stage.kind != "generator":
    return ()
  chosen = [choose(cfg, stage, bucket, nets.shard.parts("batch")) for bucket in buckets]
  longest = max(buckets, key=lambda bucket: num_tokens(bucket, cfg.vae.spatial_factor))
  if (length := num_tokens(longest, cfg.vae.spatial_factor)) > cfg.micro_batches[-1].tokens:
    logging.warning("Stage %s: a row of %dx%d px with %d condition images has %d tokens, more than the %d of the last of config.micro_batches: it is "
                    "trained alone, and may not fit.", stage.name, longest.height, longest.width, len(longest.source_sizes), length,
                    cfg.micro_batches[-1].tokens)
  return tuple((with_remat(nets, remat), accumulate) for remat, accumulate in chosen)


def with_remat(nets: Networks, remat: str) -> Networks:
  """`nets` whose generator keeps what the policy `remat` says."""
  return dataclasses.replace(nets, model=dataclasses.replace(nets.model, remat=remat))
