"""Flow matching: regress the velocity of the straight path between data and noise (equations 1 and 2 of `qimg2.flow`).

  loss = mean over examples of w(t) mean over dimensions of (v(x_t, t, c) - (noise - x_0))²,   t from the schedule's density

The loss covers target tokens alone; prompt and condition images enter clean. w is 1 unless `weighting` says otherwise (equations 5 and 6 of
`qimg2.flow`). Validation is deterministic and knows no weights: noise and time bin of a held-out sample are functions of its `sample_id`, and the
mean of eight per-bin means is the figure to compare (protocol of MLPerf's text-to-image benchmark).

Prior preservation (arXiv 2208.12242) needs nothing here: a data set of pictures that the model drew before is part of the mixture, and its
`loss_weight` is the weight of their loss (data_pipelines/specs.py).
"""

import jax
import jax.numpy as jnp

from qimg2 import flow
from qimg2.algorithms import COMPUTE, Algorithm, Average, Role, Update
from qimg2.sampler import sample_noise

NUM_TIME_BINS = 8
VALIDATION_SEED = 20_2


def flow_matching(schedule: flow.Schedule, ema_decay: float = 0.999, weighting: str = "none") -> Algorithm:
  """The algorithm that trains role "model" with frozen "encoder" and "vae".

  Args:
    schedule: gives the times of training and validation.
    ema_decay: decay per step of the averaged weights "ema"; 0 keeps none.
    weighting: of the loss by time, one of `qimg2.flow.WEIGHTINGS`.

  Raises:
    ValueError: another weighting.
  """
  flow.check_weighting(weighting)

  def loss(trained, params, nets, batch, key):
    key_time, key_noise = jax.random.split(key)
    x_0, cond = latents_and_condition(params, nets, batch)
    t = schedule.training_times(key_time, x_0.shape[0], x_0.shape[1] * x_0.shape[2])
    noise = jax.random.normal(key_noise, x_0.shape)
    error = squared_error(nets, trained["model"], x_0, cond, t, noise)
    return (error if weighting == "none" else flow.time_weights(weighting, t) * error), {"latent_std": jnp.std(x_0)}

  def validation(params, nets, batch, key):
    del key  # every draw depends on sample_id alone
    x_0, cond = latents_and_condition(params, nets, batch)
    bins = time_bins(batch["sample_id"])
    t = schedule.validation_times(bins, NUM_TIME_BINS, x_0.shape[1] * x_0.shape[2])
    noise = sample_noise(jax.random.key(VALIDATION_SEED), batch["sample_id"], x_0.shape[1:])
    return {"loss": squared_error(nets, params["model"], x_0, cond, t, noise)}, bins

  return Algorithm(generator_roles(), (Update(("model",), loss),), model_averages(ema_decay), validation=validation, num_bins=NUM_TIME_BINS,
                   deploy=deploy_generator)


def generator_roles(*references: str) -> dict[str, Role]:
  """The roles of a method that trains the generator: "model", frozen ones that start as it, and the frozen "encoder" and "vae"."""
  start = {name: Role("mmdit", start="model", dtype=COMPUTE) for name in references}
  return {"model": Role("mmdit"), **start, "encoder": Role("qwen3_vl", dtype=COMPUTE), "vae": Role("vae")}


def model_averages(ema_decay: float) -> dict[str, Average]:
  """The averaged weights "ema" of the model; none for a decay of 0."""
  return {"ema": Average("model", ema_decay)} if ema_decay else {}


def deploy_generator(weights: dict) -> dict:
  """{network: weights}: the averaged generator where there is one, and the frozen networks; see `Algorithm.deploy`."""
  return {"mmdit": weights["ema" if "ema" in weights else "model"], "qwen3_vl": weights["encoder"], "vae": weights["vae"]}


def time_bins(sample_id: jax.Array) -> jax.Array:
  """[B] int32 time bin of each held-out sample: the digit sum of its id in base 8, modulo 8.

  Eight neighbouring ids fill all bins once, and ids with a structure of their own (such as a picture's number times eight plus a variant)
  still spread over them. `sample_id` [B] is an integer in [0, 2^31).
  """
  digits = sample_id[:, None] >> (3 * jnp.arange(11))[None] & 7
  return (jnp.sum(digits, axis=1) % NUM_TIME_BINS).astype(jnp.int32)


def latents_and_condition(params: dict, nets, batch: dict):
  """(x_0 [B, h, w, C], condition) of a batch, both without gradients."""
  return nets.target_latents(params, batch), nets.condition({"qwen3_vl": params["encoder"], "vae": params["vae"]}, batch)


def squared_error(nets, model: dict, x_0: jax.Array, cond, t: jax.Array, noise: jax.Array) -> jax.Array:
  """[B] mean squared error of the velocity of each example under the generator's weights `model`."""
  velocity = nets.velocity(model, flow.interpolate(x_0, noise, t), t, cond)
  return jnp.mean(jnp.square(velocity - flow.velocity_target(x_0, noise)), axis=(1, 2, 3))
