"""Deterministic validation: the same held-out samples, noise and times every time, so that two runs can be compared to the last bit.

Every example gives one value per metric and belongs to a bin (for flow matching one of eight times). The result is the mean of the bins'
means, as in MLPerf's text-to-image benchmark: an unequal number of examples per bin does not move it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qimg2.algorithms import Algorithm


class Evaluator:
  """Runs an algorithm's validation over fixed batches; compiles once per batch shape."""

  def __init__(self, algorithm: Algorithm, nets: Any, batches: list[dict]):
    """Args: batches of global arrays with a `weight` [B] of 1 for a real row and 0 for filler.

    Raises:
      ValueError: there is nothing to evaluate on.
    """
    if not batches:
      raise ValueError("There are no evaluation samples: the evaluation mixture is empty for these buckets.")
    self._num_bins = algorithm.num_bins
    self._batches = batches

    def sums(params, batch):
      metrics, bins = algorithm.validation(params, nets, batch, jax.random.key(0))
      member = jax.nn.one_hot(bins, algorithm.num_bins) * batch["weight"][:, None]  # B bins
      return {name: values @ member for name, values in metrics.items()}, jnp.sum(member, axis=0)
    self._sums = jax.jit(sums)

  def __call__(self, params: dict) -> dict[str, float]:
    """{"val_<metric>": mean of bin means, "val_<metric>_bin<i>": mean of a bin} for weights of all roles."""
    parts = [jax.tree.map(lambda x: np.asarray(x, np.float64), self._sums(params, batch)) for batch in self._batches]
    counts = sum(part[1] for part in parts)
    if not counts.all():
      raise ValueError(f"No evaluation sample falls into time bin {int(np.argmin(counts))}: evaluate on more samples.")
    results = {}
    for name in parts[0][0]:
      means = sum(part[0][name] for part in parts) / counts
      results[f"val_{name}"] = float(means.mean())
      if self._num_bins > 1:
        results |= {f"val_{name}_bin{i}": float(mean) for i, mean in enumerate(means)}
    return results


