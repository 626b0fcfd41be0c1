"""Deterministic validation: the same held-out samples, noise and times every time, so that two runs can be compared to the last bit.

Every example gives one value per metric and belongs to a bin (for flow matching one of eight times). The result is the mean of the bins'
means, as in MLPerf's text-to-image benchmark: an unequal number of examples per bin does not move it. Bins that none of a few held-out examples
falls into are left out, always the same ones; the log says so once.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qimg2.algorithms import Algorithm
from qimg2.sharding import to_host


def bin_sums(algorithm: Algorithm, nets: Any) -> Callable[[dict, dict], tuple[dict, jax.Array]]:
  """What an evaluation compiles for each batch shape: a function of the weights of all roles and a held-out batch, with its `weight` [B], that gives
  ({metric: sums [bins]}, examples [bins])."""
  def sums(params, batch):
    metrics, bins = algorithm.validation(params, nets, batch, jax.random.key(0))
    member = jax.nn.one_hot(bins, algorithm.num_bins) * batch["weight"][:, None]  # B bins
    # By default a TPU would round the losses to bfloat16 before it adds them.
    return {name: jnp.matmul(values, member, precision="highest") for name, values in metrics.items()}, jnp.sum(member, axis=0)
  return sums


class Evaluator:
  """Runs an algorithm's validation over fixed batches; compiles once per batch shape."""

  def __init__(self, algorithm: Algorithm, nets: Any, batches: Iterable[dict]):
    """Args: batches of global arrays, which can be gone through again and again, with a `weight` [B] of 1 for a real row and 0 for filler.

    Raises:
      ValueError: there is nothing to evaluate on.
    """
    if not batches:
      raise ValueError("There are no evaluation samples: the evaluation mixture is empty for these buckets.")
    self._num_bins, self._said = algorithm.num_bins, False
    self._batches = batches
    self._sums = jax.jit(bin_sums(algorithm, nets))

  def __call__(self, params: dict) -> dict[str, float]:
    """{"val_<metric>": mean of bin means, "val_<metric>_bin<i>": mean of a bin} for weights of all roles.

    Raises:
      ValueError: no held-out example could be used.
    """
    parts = [jax.tree.map(lambda x: np.asarray(x, np.float64), to_host(self._sums(params, batch))) for batch in self._batches]
    counts = sum(part[1] for part in parts)
    filled = np.flatnonzero(counts)
    if not len(filled):
      raise ValueError("None of the evaluation samples can be used: look at the log for what is wrong with them.")
    if len(filled) < self._num_bins and not self._said:
      logging.warning("The %d evaluation samples fall into %d of %d time bins; the validation loss is the mean of those: hold out more samples.",
                      int(counts.sum()), len(filled), self._num_bins)
      self._said = True
    results = {}
    for name in parts[0][0]:
      means = sum(part[0][name] for part in parts)[filled] / counts[filled]
      results[f"val_{name}"] = float(means.mean())
      if self._num_bins > 1:
        results |= {f"val_{name}_bin{i}": float(mean) for i, mean in zip(filled, means)}
    return results


