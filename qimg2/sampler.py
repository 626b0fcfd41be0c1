"""Sampling: the ODE dx/dt = velocity from noise (t = 1) to data (t = 0) by Euler steps, as one `jax.lax.scan`.

  x <- x + (sigma_next - sigma) v,   v = v_uncond + w (v_cond - v_uncond) under classifier-free guidance with scale w (arXiv 2207.12598)

At w = 1 the unconditional pass is not run. Both passes of a guided step are one batch of twice the rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Net = Callable[[dict, jax.Array, jax.Array, Any], jax.Array]


def sample(net: Net, params: dict, noise: jax.Array, cond: Any, sigmas: np.ndarray, uncond: Any = None, guidance: float = 1.0) -> jax.Array:
  """Latents at t = 0, of the shape of `noise`, float32.

  Args:
    net: `net(params, x, t, cond)`, the velocity.
    params: weights for `net`.
    noise: [B, h, w, C] standard normal.
    cond: condition tree, rows first.
    sigmas: [T + 1] times from 1 down to 0, see `flow.Schedule.sigmas`.
    uncond: condition tree of the empty prompt; needed when guidance is not 1.
    guidance: scale w.

  Raises:
    ValueError: guidance without `uncond`.
  """
  if guidance != 1.0 and uncond is None:
    raise ValueError(f"guidance is {guidance}, which needs the condition of the empty prompt: give uncond, or guidance 1.")
  both = None if guidance == 1.0 else jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, uncond)

  def velocity(x, sigma):
    if both is None:
      return net(params, x, jnp.full(x.shape[:1], sigma), cond)
    t = jnp.full((2 * x.shape[0],), sigma)
    v_cond, v_uncond = jnp.split(net(params, jnp.concatenate([x, x]), t, both), 2)
    return v_uncond + guidance * (v_cond - v_uncond)

  def step(x, pair):
    sigma, sigma_next = pair
    return x + (sigma_next - sigma) * velocity(x, sigma), None

  times = jnp.asarray(sigmas, jnp.float32)
  x, _ = jax.lax.scan(step, noise.astype(jnp.float32), (times[:-1], times[1:]))
  return x


def sample_noise(key: jax.Array, sample_ids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B, *shape] standard normal noise; each row depends on the key and on its own id alone, never on the batch it is in.

  Args:
    key: PRNG key.
    sample_ids: [B] int32 or uint32.
    shape: of one sample.
  """
  return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(sample_ids)


