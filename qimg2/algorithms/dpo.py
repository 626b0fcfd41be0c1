"""Direct preference optimisation of a flow: of two pictures of one prompt, the better one w and the worse one l (Qwen-Image report, arXiv 2508.02324;
Diffusion-DPO, arXiv 2311.12908).

One time t and one noise for both sides of a pair. With v^k = noise - x_0^k and the frozen reference r, which is the model at the stage's start:

  e_θ^k = mean over dimensions of (v_θ(x_t^k, t, c) - v^k)²,   k = w, l, and e_r^k the same of the reference                  (1)
  reward^k = -β/2 (e_θ^k - e_r^k)                                                                                           (2)
  loss = -log sigmoid(reward^w - reward^l)                                                                                   (3)

β belongs to the mean over dimensions: with the sum it would be smaller by their number. Public trainings that take the mean have 100 to 2,000, with
the factor 1/2 as here, which the report's formula has not. At the start all rewards are 0 and the loss is log 2 (up to rounding, where the reference
is stored in bfloat16). It falls as well where both errors grow, that of w less: watch `error_chosen`.

Where a pair comes from is the difference between the two methods here. `dpo` reads it from the data set ("rejected", or "rejected_latents", of a
batch). `online_dpo` draws a group of pictures for each prompt by the ODE, with guidance in the rollout alone, and takes the best and the worst of
them by the stage's rewards. A prompt whose best picture is not better than its worst has weight 0; a step with no pair at all skips its update. Left
out: a term of supervised learning on w.
"""

import jax
import jax.numpy as jnp

from qimg2 import flow
from qimg2.algorithms import Algorithm, Rewards, Update, advantages
from qimg2.algorithms.flow_matching import (
  NUM_TIME_BINS,
  VALIDATION_SEED,
  deploy_generator,
  flow_matching,
  generator_roles,
  latents_and_condition,
  model_averages,
  squared_error,
  time_bins,
)
from qimg2.algorithms.rollouts import Sampling
from qimg2.sampler import sample_noise


def dpo(schedule: flow.Schedule, beta: float = 2000.0, ema_decay: float = 0.999) -> Algorithm:
  """The algorithm that trains role "model" on stored pairs, with frozen "ref", "encoder" and "vae".

  Args:
    schedule: gives the times of training and validation.
    beta: β of equation 2, above 0; a lower one lets the model go further from the reference.
    ema_decay: decay per step of the averaged weights "ema"; 0 keeps none.

  Raises:
    ValueError: β is not above 0.
  """
  check_beta(beta)

  def compare(model, params, nets, batch, t_of, noise_of):
    """(loss [B], metrics) under the generator's weights `model`; `t_of` and `noise_of` draw for latents of a shape."""
    x_0, cond = latents_and_condition(params, nets, batch)
    x_l = nets.target_latents(params, rejected(batch))
    return preference(nets, model, params["ref"], x_0, x_l, cond, t_of(x_0.shape), noise_of(x_0.shape), beta)

  def loss(trained, params, nets, batch, key):
    key_time, key_noise = jax.random.split(key)
    return compare(trained["model"], params, nets, batch, lambda shape: schedule.training_times(key_time, shape[0], shape[1] * shape[2]),
                   lambda shape: jax.random.normal(key_noise, shape))

  def validation(params, nets, batch, key):
    del key  # every draw depends on sample_id alone
    bins, ids = time_bins(batch["sample_id"]), batch["sample_id"]
    loss, metrics = compare(params["model"], params, nets, batch, lambda shape: schedule.validation_times(bins, NUM_TIME_BINS, shape[1] * shape[2]),
                            lambda shape: sample_noise(jax.random.key(VALIDATION_SEED), ids, shape[1:]))
    return {"loss": loss, **metrics}, bins

  return Algorithm(generator_roles("ref"), (Update(("model",), loss),), model_averages(ema_decay), validation=validation, num_bins=NUM_TIME_BINS,
                   deploy=deploy_generator, pairs=True)


def online_dpo(schedule: flow.Schedule, rewards: Rewards, group: int = 8, num_steps: int = 10, guidance: float = 4.0, beta: float = 2000.0,
               num_minibatches: int = 1, min_spread: float = 0.0, chunks: int = 1, ema_decay: float = 0.999) -> Algorithm:
  """The algorithm that trains role "model" on pairs of its own pictures.

  Args:
    schedule: gives the times of training, sampling and validation.
    rewards: of the stage. What a pair is chosen by is the sum of the rewards, each normalised in the group and weighted (`advantages.combine`).
    group, num_steps, guidance: pictures of a prompt, sampling steps and guidance scale, see `rollouts.Sampling`.
    chunks: parts of a rollout, see `Rollout`.
    beta, ema_decay: as of `dpo`.
    num_minibatches: updates per rollout, each with its share of the prompts.
    min_spread: rewards of a group that differ by no more make no pair.

  Raises:
    ValueError: a number out of its range.
  """
  check_beta(beta)
  if group < 2 or num_minibatches < 1 or min_spread < 0:
    raise ValueError(f"algorithm.group is {group}, num_minibatches {num_minibatches} and min_spread {min_spread}: give at least 2, 1 and 0.")
  sampling = Sampling(schedule, group, num_steps, guidance)

  def generate(params, nets, batch, key):
    return sampling.draw(params, nets, "model", batch, key)

  def minibatches(samples, key):
    del key
    pairs = best_and_worst(rewards, samples, group, min_spread)
    num = pairs["weight"].shape[0]
    if num % num_minibatches:
      raise ValueError(f"{num} prompts cannot be divided into num_minibatches={num_minibatches}: change it or the batch size.")
    return jax.tree.map(lambda x: x.reshape(-1, num_minibatches, *x.shape[1:]).swapaxes(0, 1), pairs)  # each is spread over all devices

  def loss(trained, params, nets, batch, key):
    key_time, key_noise = jax.random.split(key)
    x_w, x_l = batch["latents"], batch["rejected_latents"]
    cond = sampling.condition(params, nets, batch["prompts"], x_w, False)
    t = schedule.training_times(key_time, x_w.shape[0], x_w.shape[1] * x_w.shape[2])
    value, metrics = preference(nets, trained["model"], params["ref"], x_w, x_l, cond, t, jax.random.normal(key_noise, x_w.shape), beta)
    return value, {**metrics, "without_spread": jnp.mean(batch["weight"] == 0)}

  return Algorithm(generator_roles("ref"), (Update(("model",), loss),), model_averages(ema_decay),
                   rewards.rollout(generate, minibatches, num_minibatches, chunks), flow_matching(schedule).validation, NUM_TIME_BINS,
                   deploy=deploy_generator, unconditional=sampling.is_guided)


def best_and_worst(rewards: Rewards, samples: dict, group: int, min_spread: float = 0.0) -> dict:
  """A pair of each prompt's samples: "prompts", "latents" [P, h, w, C] of the best, "rejected_latents" of the worst, and "weight" [P], 1 where the
  rewards of the prompt's samples differ by more than `min_spread`, else 0.

  Args:
    rewards: what counts.
    samples: of P x `group` rows: "prompts", "latents", "rewards", "weight" and, where rewards count by category, "category"; see `Rollout`. Those of
      weight 0, without a reward, are in no pair.
    group: samples of a prompt, side by side.
    min_spread: in the rewards' own unit.
  """
  grouped = lambda x: x.reshape(-1, group, *x.shape[1:])
  weight = grouped(samples["weight"])
  category = grouped(samples["category"])[:, 0] if "category" in samples else None
  counts = advantages.weigh(rewards.weights, len(rewards.names), category, weight.shape[0])
  score, spread = advantages.combine({name: grouped(samples["rewards"][name]) for name in rewards.names}, weight, counts, limit=jnp.inf,
                                     threshold=min_spread)
  best = jnp.argmax(jnp.where(weight > 0, score, -jnp.inf), axis=1)
  worst = jnp.argmin(jnp.where(weight > 0, score, jnp.inf), axis=1)
  taken = lambda x, place: grouped(x)[jnp.arange(place.shape[0]), place]
  is_better = taken(score.reshape(-1), best) > taken(score.reshape(-1), worst)
  return {"prompts": jax.tree.map(lambda x: taken(x, best), samples["prompts"]), "latents": taken(samples["latents"], best),
          "rejected_latents": taken(samples["latents"], worst), "weight": (spread & is_better).astype(jnp.float32)}


def preference(nets, model: dict, reference: dict, x_w: jax.Array, x_l: jax.Array, cond, t: jax.Array, noise: jax.Array,
               beta: float) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(loss [B] of equation 3, metrics [B]) of pairs of latents `x_w`, `x_l` [B, h, w, C] at times `t` [B] with one `noise` [B, h, w, C] for both.

  The metrics: `reward_chosen` and `reward_rejected`, equation 2; their difference `margin`; `accuracy`, 1 where that is above 0; the model's own
  errors, equation 1, `error_chosen` and `error_rejected`.
  """
  def errors(weights):
    shared = nets.shared(weights, cond)  # by both sides
    return [squared_error(nets, weights, x_0, shared, t, noise) for x_0 in (x_w, x_l)]

  (chosen, rejected), before = errors(model), jax.lax.stop_gradient(errors(reference))
  reward_w, reward_l = (-beta / 2 * (now - then) for now, then in zip((chosen, rejected), before))
  margin = reward_w - reward_l
  metrics = {"reward_chosen": reward_w, "reward_rejected": reward_l, "margin": margin, "accuracy": (margin > 0).astype(jnp.float32),
             "error_chosen": chosen, "error_rejected": rejected}
  return -jax.nn.log_sigmoid(margin), metrics


def rejected(batch: dict) -> dict:
  """`batch` with its rejected pictures, or their latents, in the place of the target."""
  return {"latents": batch["rejected_latents"]} if "rejected_latents" in batch else {"target": batch["rejected"]}


def check_beta(beta: float) -> None:
  """Raises a `ValueError` unless β is above 0."""
  if not beta > 0:
    raise ValueError(f"algorithm.beta is {beta}: give a number above 0, such as 2000.")
