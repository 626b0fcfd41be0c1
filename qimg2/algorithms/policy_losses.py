"""Losses of policy gradients on single steps of an SDE, as functions of what two policies say of one step (`qimg2.sde`).

With d the mean of the policy that drew minus that of the one that learns, e what was drawn, c the deviation and A the advantage, per sample and step,
where avg is the mean over dimensions and sg stops the gradient:

  log r = -avg(d²) / (2 c²) - avg(d e) / c,   k = avg(d²) / (2 c²)                                                           (1)

  "grpo"   L = max(-A r, -A clip(r, 1 - eps, 1 + eps))                                             Flow-GRPO, arXiv 2505.05470  (2)
  "guard"  L = max(-A r', -A clip(r', 1 - eps, 1 + eps)) / (-dt),   log r' = c (log r + k) = -avg(d e)
                                                                                                GRPO-Guard, arXiv 2510.22319  (3)
  "dppo"   L = -A r, but 0 where k >= eps and r has left 1 in the direction that A asks for         Flow-DPPO, arXiv 2606.11025  (4)

In (2) k makes r drift below 1 and the spread of log r goes with 1/c, so that one eps clips some steps and never others; (3) takes both away, for each
sample by itself. Means over dimensions make log r small, hence eps of 1e-4 to 1e-6 where a picture has 10^5 latents.

The divergence of the policy that learns from a reference, whose means differ by d_ref, is the closed form k of d_ref ("gaussian"), or that times -dt
("flow_grpo", what the published code of Flow-GRPO computes for "flow": it leaves dt out of c², and so weighs the long steps near the data no less).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from qimg2 import sde

KL_FORMS = ("gaussian", "flow_grpo")
Loss = Callable[[sde.Steps, jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array, jax.Array]]


def grpo(step: sde.Steps, difference: jax.Array, noise: jax.Array, advantage: jax.Array, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(loss [B], ratio r [B], whether it is clipped [B] bool), equation 2.

  Args:
    step: the step of each row, [B]; its deviation is positive.
    difference: [B, ...] d.
    noise: [B, ...] e.
    advantage: [B] A.
    eps: of the clip range.
  """
  return _clipped(jnp.exp(sde.log_ratio(difference, noise, step.deviation)), advantage, eps)


def guard(step: sde.Steps, difference: jax.Array, noise: jax.Array, advantage: jax.Array, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(loss [B], ratio r' [B], whether it is clipped [B] bool), equation 3; arguments as in `grpo`."""
  loss, ratio, is_clipped = _clipped(jnp.exp(-sde.row_mean(difference * noise)), advantage, eps)
  return loss / (step.sigma - step.sigma_next), ratio, is_clipped


def dppo(step: sde.Steps, difference: jax.Array, noise: jax.Array, advantage: jax.Array, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(loss [B], ratio r [B], whether the row is left out [B] bool), equation 4; arguments as in `grpo`, with the threshold of k as `eps`."""
  ratio = jnp.exp(sde.log_ratio(difference, noise, step.deviation))
  away = sde.divergence(difference, step.deviation) >= eps
  is_masked = away & (((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0)))
  return jnp.where(is_masked, 0.0, -advantage * ratio), ratio, is_masked


def reference_divergence(step: sde.Steps, difference: jax.Array, form: str) -> jax.Array:
  """[B] divergence from a reference whose mean differs by `difference` [B, ...], the mean over dimensions; `form` is one of `KL_FORMS`."""
  k = sde.divergence(difference, step.deviation)
  return k if form == "gaussian" else k * (step.sigma - step.sigma_next)


def _clipped(ratio: jax.Array, advantage: jax.Array, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  whole, bounded = -advantage * ratio, -advantage * jnp.clip(ratio, 1 - eps, 1 + eps)
  return jnp.maximum(whole, bounded), ratio, bounded > whole


OBJECTIVES: Mapping[str, Loss] = {"grpo": grpo, "guard": guard, "dppo": dppo}
