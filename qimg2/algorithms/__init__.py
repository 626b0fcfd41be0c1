"""Training methods, one file each. A method is an `Algorithm` value; the trainer knows nothing else about it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Metrics = dict[str, jax.Array]
LossFn = Callable[[dict, Any, dict, jax.Array], tuple[jax.Array, Metrics]]
ValidationFn = Callable[[dict, Any, dict, jax.Array], tuple[Metrics, jax.Array]]
FinishFn = Callable[[dict, Any, list[dict]], dict]
ExperienceFn = Callable[[dict, Any, dict, jax.Array], dict]


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """A training method as a value.

  Attributes:
    losses: trained role -> `loss(params, nets, batch, key) -> (scalar, metrics)`. `params` maps every role, trained or frozen, to its weights.
    frozen: roles that are read and never updated.
    validation: `validation(params, nets, batch, key) -> (metrics, bins)`: per-example metrics [B] and the bin [B] int32 of each example. The
      evaluator averages inside each bin, then over bins.
    num_bins: number of bins; 1 for a plain mean.
    track: name -> (role, decay): slow copies, such as {"ema": ("model", 0.999)}.
    every: role -> n: update the role on each n-th step only; every step when absent.
    experience: maps a loader batch to the batch to train on, inside the step; online methods sample here. None: the batch itself.
    finish: `finish(params, nets, batches) -> params`, once after the last step over the evaluation batches; also applied to slow copies.
  """
  losses: Mapping[str, LossFn]
  frozen: tuple[str, ...] = ()
  validation: ValidationFn | None = None
  num_bins: int = 1
  track: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
  every: Mapping[str, int] = dataclasses.field(default_factory=dict)
  experience: ExperienceFn | None = None
  finish: FinishFn | None = None
