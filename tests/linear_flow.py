"""A flow that is linear in its weights, for losses whose value and gradient are known in numpy."""

import jax.numpy as jnp
import numpy as np

from qimg2.flow import Schedule

SCHEDULE = Schedule(shift="none")
SHAPE = (6, 2, 3, 4)


class Linear:
  """Networks whose velocity is x a + b + t c for channels a, b and a scalar c, and whose pictures are their own latents."""

  def velocity(self, params, x_t, t, cond):
    per_channel = lambda x: x[None, None, None]
    return x_t * per_channel(params["a"]) + per_channel(params["b"]) + cond + t[:, None, None, None] * params["c"]

  def target_latents(self, params, batch):
    return batch["latents"] if "latents" in batch else batch["target"]

  def condition(self, params, batch):
    return batch["prompt"][:, None, None, None]

  def shared(self, params, cond, num=1):
    return jnp.repeat(cond, num, axis=0)


def draw(seed):
  """Two sets of weights, two batches of latents, times, and a noise for each row."""
  rng = np.random.default_rng(seed)
  weights = lambda scale: {"a": scale * rng.normal(size=4), "b": scale * rng.normal(size=4), "c": scale * rng.normal()}
  return weights(0.5), weights(0.5), rng.normal(size=SHAPE), rng.normal(size=SHAPE), rng.uniform(0.05, 0.95, 6), rng.normal(size=SHAPE)
