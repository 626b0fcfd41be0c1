"""DiffusionNFT (arXiv 2509.16117): learning from good and bad pictures by the forward process, without densities of the way that drew them.

A step draws a group of pictures of each prompt by the ODE, under the averaged weights "old", and keeps them alone. An advantage A becomes the
probability that a picture is good, r = clip(A / (2 limit) + 1/2, 0, 1). At some of the times of sampling, with fresh noise, x_t on the path to the
picture x_0, velocities v, v_old and v_ref, and avg the mean over dimensions:

  v+ = v_old + beta (v - v_old),   v- = v_old - beta (v - v_old),   x+- = x_t - t v+-                                        (1)
  w+- = max(avg |x+- - x_0|, 1e-5), without gradient                                                                         (2)
  L = (limit / beta) [r avg (x+ - x_0)² / w+  +  (1 - r) avg (x- - x_0)² / w-]  +  reference avg (v - v_ref)²                (3)

Pictures that are good pull v towards what leads to them, bad ones push it as far to the other side. Where v = v_old, L's gradient is proportional to
2 r - 1: none at r = 1/2. After a step the old weights follow: old <- d old + (1 - d) model, d = min(rate max(step - flat, 0), cap), where `step`
counts from 0. d = 0 copies.

Settings of the published code: beta 1 for one reward, 0.1 for several or OCR; (flat, rate, cap) = (0, 0.001, 0.5) or (75, 0.0075, 0.999); learning
rate 3e-4 with an adapter of rank 32; no guidance; all 10 times. Its averaged weights have decay 0.9. It computes (2) in float64, this in float32.

Memory: a sample keeps its latents in float32, 1 MiB at 1,024 px with 64 x 64 latents of 64 channels, its picture in uint8 and the prompt's states;
the update has as many rows as times. The old weights are a copy of what is trained, in float32, and the reference one of the model.

Left out: solvers of higher order in the rollout. Not for models that were distilled to few steps: on the path to a picture they were taught nothing.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qimg2 import flow, sde
from qimg2.algorithms import Algorithm, Average, Rewards, Update
from qimg2.algorithms.flow_matching import NUM_TIME_BINS, deploy_generator, flow_matching, generator_roles, model_averages
from qimg2.algorithms.rollouts import Sampling, Scoring, of_steps, repeat_rows


def diffusion_nft(schedule: flow.Schedule, rewards: Rewards, group: int = 24, num_steps: int = 10, guidance: float = 1.0, num_train_times: int = 10,
                  beta: float = 1.0, reference: float = 1e-4, old_flat: int = 0, old_rate: float = 0.001, old_cap: float = 0.5, old_every: int = 1,
                  num_minibatches: int = 1, deviation: str = "batch", advantage_limit: float = 5.0, min_spread: float = 0.0, oversample: float = 1.0,
                  chunks: int = 1, ema_decay: float = 0.9) -> Algorithm:
  """DiffusionNFT of role "model" on pictures of its average "old".

  Args:
    schedule: gives the times.
    rewards: of the stage.
    group, num_steps, guidance: pictures of a prompt, sampling steps and guidance scale, see `Sampling`.
    num_train_times: at how many of the num_steps times a picture is learned from, drawn for each picture without repetition.
    beta: how far (1) looks to both sides.
    reference: weight of the distance from the stage's start; at 0 there is no reference.
    old_flat, old_rate, old_cap: of the decay of the old weights, see above.
    old_every: they move at every so many steps.
    num_minibatches: updates per rollout.
    deviation, advantage_limit, min_spread, oversample: see `Scoring`.
    chunks: parts of a rollout, see `Rollout`.
    ema_decay: of averaged weights "ema", which then draw; 0 keeps none.

  Raises:
    ValueError: a setting that is none, or a number out of its range.
  """
  recipe = _Recipe(Sampling(schedule, group, num_steps, guidance),
                   Scoring(rewards, group, deviation, advantage_limit, min_spread, oversample, num_minibatches), num_train_times, beta, reference)
  if not (0 <= old_cap < 1 and old_rate >= 0 and old_flat >= 0 and old_every >= 1):
    raise ValueError(f"old_flat={old_flat} and old_rate={old_rate} must not be negative, old_cap={old_cap} must be in [0, 1) and "
                     f"old_every={old_every} at least 1.")
  old = Average("model", functools.partial(old_decay, flat=old_flat, rate=old_rate, cap=old_cap), old_every, ramp=False)
  return Algorithm(generator_roles(*(["ref"] if reference else [])), (Update(("model",), recipe.loss),), {"old": old, **model_averages(ema_decay)},
                   rewards.rollout(recipe.generate, recipe.minibatches, num_minibatches, chunks), flow_matching(schedule).validation, NUM_TIME_BINS,
                   deploy=deploy_generator, unconditional=recipe.sampling.is_guided)


def old_decay(step: jax.Array, flat: int, rate: float, cap: float) -> jax.Array:
  """d of the old weights after the step of that number, counted from 0."""
  return jnp.minimum(rate * jnp.maximum(step - flat, 0), cap)


def contrast(x_0: jax.Array, x_t: jax.Array, t: jax.Array, v: jax.Array, old: jax.Array, good: jax.Array, beta: float) -> jax.Array:
  """[B] the bracket of equation 3 over beta.

  Args:
    x_0, x_t: [B, ...] a picture's latents, and the point on its path at the time `t` [B].
    v, old: [B, ...] velocities there, under the weights that learn and the old ones.
    good: [B] r, in [0, 1].
    beta: above 0.
  """
  def error(velocity):
    away = flow.predict_x_0(x_t, velocity, t) - x_0
    return sde.row_mean(jnp.square(away)) / jnp.maximum(sde.row_mean(jnp.abs(jax.lax.stop_gradient(away))), 1e-5)

  side = beta * (v - old)
  return (good * error(old + side) + (1 - good) * error(old - side)) / beta


@dataclasses.dataclass(frozen=True)
class _Recipe:
  """The settings of `diffusion_nft`, and the functions of its algorithm."""
  sampling: Sampling
  scoring: Scoring
  num_train_times: int
  beta: float
  reference: float

  def __post_init__(self):
    if not 1 <= self.num_train_times <= self.sampling.num_steps:
      raise ValueError(f"num_train_times is {self.num_train_times}: it must be from 1 to num_steps={self.sampling.num_steps}.")
    if self.beta <= 0 or self.reference < 0:
      raise ValueError(f"beta={self.beta} must be above 0, and reference={self.reference} not negative.")

  def generate(self, params: dict, nets: Any, batch: dict, key: jax.Array) -> dict:
    """Pictures of a batch's prompts under the old weights; see `Rollout.generate`."""
    return self.sampling.draw(params, nets, "old", batch, key)

  def minibatches(self, samples: dict, key: jax.Array) -> dict:
    """One row for each sample; see `Rollout.minibatches`."""
    rows = self.scoring.trained(samples, ("prompts", "latents"))
    sigmas = jnp.asarray(self.sampling.sigmas(rows["latents"])[:-1], jnp.float32)
    everywhere = jnp.ones((rows["weight"].shape[0], sigmas.shape[0]), bool)
    return self.scoring.minibatches({**rows, "t": sigmas[sde.choose_steps(key, everywhere, sigmas, self.num_train_times, bias=0.0)]})

  def loss(self, trained: dict, params: dict, nets: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
    """Equation 3 of each sample, the mean over its times; see `Update.loss`."""
    limit, n = self.scoring.limit, self.num_train_times
    cond = self.sampling.condition(params, nets, batch["prompts"], batch["latents"], guided=False)
    t, over_times = of_steps(batch["t"])
    x_0, advantage = repeat_rows((batch["latents"], batch["advantage"]), n)
    x_t = flow.interpolate(x_0, jax.random.normal(key, x_0.shape), t)
    velocity = lambda weights: nets.velocity(weights, x_t, t, nets.shared(weights, cond, n))
    v, old = velocity(trained["model"]), jax.lax.stop_gradient(velocity(params["old"]))
    good = jnp.clip(advantage / (2 * limit) + 0.5, 0, 1)
    loss = limit * contrast(x_0, x_t, t, v, old, good, self.beta)
    metrics = {"away_from_old": sde.row_mean(jnp.square(v - old)), "good": good, "advantage": jnp.abs(advantage)}
    if self.reference:
      away = sde.row_mean(jnp.square(v - jax.lax.stop_gradient(velocity(params["ref"]))))
      loss, metrics = loss + self.reference * away, metrics | {"away_from_reference": away}
    return over_times(loss), {name: over_times(x) for name, x in metrics.items()} | {name: batch[name] for name in ("replaced", "without_spread")}
