"""Sampling: the ODE dx/dt = velocity from noise (t = 1) to data (t = 0) by Euler steps, as one `jax.lax.scan`.

  x <- x + (sigma_next - sigma) v                                                                                            (1)
  v = v_uncond + w (v_cond - v_uncond) under classifier-free guidance with scale w (arXiv 2207.12598)                         (2)

At w <= 1 the unconditional pass is not run, as in the published pipeline. Both passes of a guided step are one batch of twice the rows.
"Unconditional" may be the empty prompt or a negative one. Where only a part of a picture may change, the rest is put back onto the path of the
original after every step (RePaint, arXiv 2201.09865, without its jumps back):

  x <- m x + (1 - m) ((1 - sigma_next) x_0 + sigma_next noise)                                                                (3)

A step is a function of its own, so that a method which samples inside its loss or its
rollout takes the same ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qimg2.flow import interpolate

Net = Callable[[dict, jax.Array, jax.Array, Any], jax.Array]


def sample(net: Net, params: dict, noise: jax.Array, cond: Any, sigmas: np.ndarray, guidance: float = 1.0,
           original: jax.Array | None = None, free: jax.Array | None = None) -> jax.Array:
  """Latents at t = 0, of the shape of `noise`, float32.

  Args:
    net: `net(params, x, t, cond)`, the velocity.
    params: weights for `net`.
    noise: [B, h, w, C] standard normal.
    cond: condition tree of the B rows; with guidance, of 2B rows, the unconditional ones after the conditional ones.
    sigmas: [T + 1] times from 1 down to 0, see `flow.Schedule.sigmas`.
    guidance: scale w; at most 1 is none.
    original: [B, h, w, C] latents x_0 of what stays where `free` says so, equation 3; None lets everything change.
    free: [B, h, w, 1] bool, True where the latents may change.
  """
  noise = noise.astype(jnp.float32)

  def step(x, pair):
    sigma, sigma_next = pair
    x = euler_step(x, guided_velocity(net, params, x, sigma, cond, guidance), sigma, sigma_next)
    return x if original is None else jnp.where(free, x, interpolate(original, noise, jnp.full(x.shape[:1], sigma_next))), None

  times = jnp.asarray(sigmas, jnp.float32)
  x, _ = jax.lax.scan(step, noise, (times[:-1], times[1:]))
  return x


def guided_velocity(net: Net, params: dict, x: jax.Array, sigma: jax.Array, cond: Any, guidance: float = 1.0) -> jax.Array:
  """The velocity at `x` [B, ...] and the time `sigma`, one number or [B], equation 2; `cond` and `guidance` as in `sample`."""
  return guided_branches(net, params, x, sigma, cond, guidance)[0]


def guided_branches(net: Net, params: dict, x: jax.Array, sigma: jax.Array, cond: Any, guidance: float = 1.0) -> tuple[jax.Array, jax.Array]:
  """(the velocity, that of the conditional branch alone); without guidance they are one. Arguments as in `guided_velocity`."""
  t = jnp.broadcast_to(sigma, x.shape[:1])
  if guidance <= 1.0:
    v = net(params, x, t, cond)
    return v, v
  v_cond, v_uncond = jnp.split(net(params, jnp.concatenate([x, x]), jnp.concatenate([t, t]), cond), 2)
  return v_uncond + guidance * (v_cond - v_uncond), v_cond


def euler_step(x: jax.Array, v: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
  """`x` at the time `sigma_next`, from `x` and the velocity `v` at `sigma`, equation 1."""
  return x + (sigma_next - sigma) * v


def sample_noise(key: jax.Array, sample_ids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B, *shape] standard normal noise; each row depends on the key and on its own id alone, never on the batch it is in.

  Args:
    key: PRNG key.
    sample_ids: [B] int32 or uint32.
    shape: of one sample.
  """
  return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(sample_ids)
