"""Policy gradients on the steps of an SDE: Flow-GRPO (arXiv 2505.05470), GRPO-Guard (2510.22319) and Flow-DPPO (2606.11025), by `objective`.

A step of training draws a group of pictures of each prompt. Some steps of the way are drawn by an SDE (`qimg2.sde`): `window` of them at a place
drawn per prompt among the first `window_end` (MixGRPO, arXiv 2507.21802), the others are the ODE's. Of these `num_train_steps` are learned from, more
often those of more noise. The losses are in `qimg2.algorithms.policy_losses`, the advantages in `qimg2.algorithms.advantages`.

What is learned under guidance. Pictures are drawn by the guided velocity v = v_u + w (v_c - v_u), with two policies to choose from:

  guidance_in_loss=True   the policy that drew, N(mean(v), c²), as Flow-GRPO does: both branches are computed and differentiated in the update.
  guidance_in_loss=False  the conditional one, N(mean(v_c), c²), for the weights that drew and those that learn, as the 2.0-RL report does (arXiv
                          2606.27608): guidance is in the rollout only, and an update costs one pass. It did not draw: its e in equation 6 of
                          `qimg2.sde`, what it would have had to draw, holds what guidance added, and good pictures pull it that way.

Why the ratio is 1. A ratio compares one policy under the weights of the rollout and under those of now, from the velocities of both at the same
latents, never from two rounded densities (equation 6 of `qimg2.sde`). In the first minibatch of a step no weight has moved: there the velocity of
now, without gradient, is taken for the old one, so that the ratio is exactly 1 and the divergence exactly 0 in any type. Later minibatches compare
with the velocity that the rollout computed. Rollout and update are different programs and round differently: `TYPE_off` is how far the two velocities
are apart in the first minibatch, relative and root mean square. A step where it exceeds 1e-3 with float32 or 0.1 with bfloat16, or where the ratio
is not 1, ends the stage, because rollout and update do not compute the same policy. The reference's velocity is computed beside the model's.

Rounding in later minibatches. Velocities of D numbers that are `TYPE_off` apart by rounding give log r a spread of about |b| TYPE_off rms(v) / (c
sqrt(D)), without the c for Guard. `ratio_by_rounding` is its size in the first minibatch, `clipped_by_rounding` the share of rows that it alone would
clip: keep `clip` above the former (docs/post_training.md has a measurement). The old velocity of the update's own program would hardly help, because
weights that moved a little are rounded anew everywhere.

Memory: a sample keeps, per step that is learned from, three arrays of its latents in float32 (`qimg2.sde.Path`): 3 MiB at 1,024 px with 64 x 64
latents of 64 channels, so 3.4 GiB per step of 48 groups of 24 over all devices; besides its picture in uint8 and the prompt's states
(`qimg2.algorithms.rollouts`). It keeps no other part of the way. What joins the chunks and what cuts minibatches hold all of it twice for a moment.
`chunks` parts of the prompts are drawn one after another, which bounds the activations of sampling. With `oversample` above 1 the groups that are
trained are gathered over devices.

Left out: recomputing the old velocity in the update's program, see above; other guidance than of one scale.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qimg2 import flow, sampler, sde
from qimg2.algorithms import Algorithm, Rewards, Update
from qimg2.algorithms.flow_matching import NUM_TIME_BINS, deploy_generator, flow_matching, generator_roles, model_averages
from qimg2.algorithms.policy_losses import KL_FORMS, OBJECTIVES, reference_divergence
from qimg2.algorithms.rollouts import Sampling, Scoring, conditional, of_steps, repeat_rows

LIMITS = {"ratio_off": 0.0, "float32_off": 1e-3, "bfloat16_off": 0.1}


def flow_grpo(schedule: flow.Schedule, rewards: Rewards, group: int = 24, num_steps: int = 10, guidance: float = 4.0, guidance_in_loss: bool = False,
              shared_noise: bool = False, sampler: str = "flow", eta: float = 0.7, window: int = 2, window_end: int = 5, num_train_steps: int = 2,
              step_bias: float = 1.0, objective: str = "grpo", clip: float = 1e-5, kl: float = 0.0, kl_form: str = "gaussian",
              num_minibatches: int = 2, deviation: str = "batch", advantage_limit: float = 5.0, min_spread: float = 0.0, oversample: float = 1.0,
              chunks: int = 1, ema_decay: float = 0.0) -> Algorithm:
  """Policy gradient of role "model" on its own pictures.

  Args:
    schedule: gives the times of sampling.
    rewards: of the stage.
    group, num_steps, guidance: pictures of a prompt, sampling steps and guidance scale, see `Sampling`.
    guidance_in_loss: whether the guided policy learns, see above.
    shared_noise: whether the pictures of a prompt begin with the same noise (arXiv 2505.07818), so that what the SDE draws alone tells them apart;
      for windows that cover most of the steps.
    sampler, eta: the SDE, see `sde.SDE`.
    window, window_end: steps that the SDE draws, and how many of the first ones they may be; at most num_steps - 1, which is all but the last.
    num_train_steps, step_bias: how many of them are learned from, drawn in proportion to time^step_bias.
    objective: "grpo", "guard" or "dppo".
    clip: clip range of the ratio, or the threshold of the divergence for "dppo".
    kl, kl_form: weight and form of the divergence from the stage's start, see `reference_divergence`; at 0 there is no reference.
    num_minibatches: updates per rollout. With one the ratio is always 1.
    deviation, advantage_limit, min_spread, oversample: see `Scoring`.
    chunks: parts of a rollout, see `Rollout`.
    ema_decay: of averaged weights "ema", which then draw; 0 keeps none.

  Raises:
    ValueError: a setting that is none, or a number out of its range.
  """
  recipe = _Recipe(Sampling(schedule, group, num_steps, guidance, shared_noise),
                   Scoring(rewards, group, deviation, advantage_limit, min_spread, oversample, num_minibatches), sde.SDE(sampler, eta), window,
                   window_end, num_train_steps, step_bias, guidance_in_loss, objective, clip, kl, kl_form)
  return Algorithm(generator_roles(*(["ref"] if kl else [])), (Update(("model",), recipe.loss, limits=LIMITS),), model_averages(ema_decay),
                   rewards.rollout(recipe.generate, recipe.minibatches, num_minibatches, chunks), flow_matching(schedule).validation, NUM_TIME_BINS,
                   deploy=deploy_generator, unconditional=recipe.sampling.is_guided)


@dataclasses.dataclass(frozen=True)
class _Recipe:
  """The settings of `flow_grpo`, and the functions of its algorithm."""
  sampling: Sampling
  scoring: Scoring
  process: sde.SDE
  window: int
  window_end: int
  num_train_steps: int
  step_bias: float
  guidance_in_loss: bool
  objective: str
  clip: float
  kl: float
  kl_form: str

  def __post_init__(self):
    if self.objective not in OBJECTIVES:
      raise ValueError(f"objective is {self.objective!r}: choose one of {', '.join(OBJECTIVES)}.")
    if self.kl_form not in KL_FORMS:
      raise ValueError(f"kl_form is {self.kl_form!r}: choose one of {', '.join(KL_FORMS)}.")
    if self.kl and self.kl_form == "flow_grpo" and self.process.kind == "cps":
      raise ValueError("kl_form 'flow_grpo' is that of the samplers 'flow' and 'dance': take 'gaussian' with 'cps'.")
    if not 1 <= self.num_train_steps <= self.window <= self.window_end < self.sampling.num_steps:
      raise ValueError(f"num_train_steps={self.num_train_steps}, window={self.window}, window_end={self.window_end} and "
                       f"num_steps={self.sampling.num_steps} must rise in this order, the last of them strictly, from at least 1.")
    if self.clip <= 0 or self.kl < 0:
      raise ValueError(f"clip={self.clip} must be above 0, and kl={self.kl} not negative.")

  def generate(self, params: dict, nets: Any, batch: dict, key: jax.Array) -> dict:
    """Pictures of a batch's prompts, and what is kept of the ways there; see `Rollout.generate`."""
    key_noise, key_path, key_window, key_choice = jax.random.split(key, 4)
    rows = self.sampling.rows(params, nets, batch, key_noise)
    steps, group = self.process.steps(self.sampling.sigmas(rows["noise"])), self.sampling.group
    drawn = sde.draw_windows(key_window, rows["ids"].shape[0] // group, self.sampling.num_steps, self.window, self.window_end)
    learned = sde.choose_steps(key_choice, drawn, steps.sigma, self.num_train_steps, self.step_bias)

    cond = self.sampling.begin(params, nets, params["model"], rows, self.sampling.is_guided)

    def policy(x, sigma):
      v, v_cond = sampler.guided_branches(nets.velocity, params["model"], x, sigma, cond, self.sampling.guidance)
      return v, v if self.guidance_in_loss else v_cond

    x, path = sde.sample(policy, rows["noise"], steps, *repeat_rows((drawn, learned), group), key_path, rows["ids"])
    prompts = rows["prompts"] if self.guidance_in_loss else conditional(rows["prompts"])
    return {"prompts": repeat_rows(prompts, group), "path": path, "pictures": nets.decode(params["vae"], x)}

  def minibatches(self, samples: dict, key: jax.Array) -> dict:
    """One row for each sample; see `Rollout.minibatches`."""
    del key  # nothing is drawn: every minibatch has samples of each prompt
    return self.scoring.minibatches(self.scoring.trained(samples, ("prompts", "path")))

  def loss(self, trained: dict, params: dict, nets: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
    """The objective of each sample, the mean over its steps, and the divergence from the reference; see `Update.loss`."""
    del key
    n, guided = batch["path"].x.shape[1], self.guidance_in_loss and self.sampling.is_guided
    cond = self.sampling.condition(params, nets, batch["prompts"], batch["path"].x[:, 0], guided)
    path, over_steps = of_steps(batch["path"])
    x, (first, advantage) = path.x, repeat_rows((batch["first"], batch["advantage"]), n)
    step = self.process.steps(self.sampling.sigmas(x)).at(path.step)
    velocity = lambda weights: sampler.guided_velocity(nets.velocity, weights, x, step.sigma, nets.shared(weights, cond, n),
                                                       self.sampling.guidance if guided else 1.0)
    v = velocity(trained["model"])
    now, slope = jax.lax.stop_gradient(v), flow.expand(step.slope, x)
    difference = slope * (jnp.where(flow.expand(first > 0, x), now, path.velocity) - v)
    compare = lambda difference: OBJECTIVES[self.objective](step, difference, path.noise, advantage, self.clip)
    loss, ratio, is_bounded = compare(difference)
    _, rounded, is_bounded_by_rounding = compare(slope * (path.velocity - now))
    divergence = sde.divergence(difference, step.deviation)
    at_first = lambda value: jnp.where(first > 0, first * value, 0.0)  # so that the mean over minibatches is that of the first
    off = sde.row_mean(jnp.square(now - path.velocity))
    off = jnp.where(off == 0, 0.0, jnp.sqrt(off / sde.row_mean(jnp.square(path.velocity))))  # a velocity of 0 may be met exactly
    metrics = {"ratio": ratio, "clipped": is_bounded, "divergence": divergence, "ratio_off": at_first(jnp.abs(ratio - 1) + divergence),
               f"{nets.compute_dtypes()['mmdit']}_off": at_first(off), "ratio_by_rounding": at_first(jnp.abs(rounded - 1)),
               "clipped_by_rounding": at_first(is_bounded_by_rounding), "advantage": jnp.abs(advantage)}
    if self.kl:
      away = slope * (v - jax.lax.stop_gradient(velocity(params["ref"])))
      metrics["kl"] = reference_divergence(step, away, self.kl_form)
      loss += self.kl * metrics["kl"]
    of_samples = {name: over_steps(value.astype(jnp.float32)) for name, value in metrics.items()}
    return over_steps(loss), of_samples | {name: batch[name] for name in ("replaced", "without_spread")}
