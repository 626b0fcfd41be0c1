"""Sampling by an SDE, as methods that learn from their own samples need it: each step draws from a normal distribution whose density is known.

Every step here is an Euler step of the ODE that gives back a part of the noise the velocity predicts, and draws as much anew:

  mean = x + (sigma_next - sigma) v + q noise(x, v),   noise(x, v) = x + (1 - sigma) v                                         (1)
  x <- mean + c e,   e ~ N(0, 1)                                                                                             (2)

Kinds differ in q and c; dt = sigma_next - sigma < 0, and a is the setting `eta`:

  "flow"   c = s sqrt(-dt), q = s² dt / (2 sigma), s = a sqrt(sigma / (1 - sigma))                Flow-GRPO, arXiv 2505.05470  (3)
  "dance"  as "flow" with s = a                                                                 DanceGRPO, arXiv 2505.07818  (4)
  "cps"    c = sigma_next sin(a pi / 2), q = sqrt(sigma_next² - c²) - sigma_next                        arXiv 2509.05952  (5)

With q = c = 0 it is the ODE's step (`qimg2.sampler`), to the bit. "flow" and "dance" keep the ODE's marginals as steps get small. "cps" keeps the
level of noise, (sigma_next + q)² + c² = sigma_next², however long a step is, and the marginals only where the data is known for certain. At
sigma = 1, where (3) is singular, 1 - sigma is that of the second time. The last step, to sigma_next = 0, is the ODE's in all kinds: its noise would
stay in the picture, and its density is the sharpest.

Log-densities are means over dimensions, so that they do not grow with the picture: of D dimensions they are 1/D of the true ones. So are the
logarithms of their ratios. All of it is float32. With m the mean under other weights, d = mean - m and b = dt + q (1 - sigma), the slope of (1):

  log N(x'; m, c²) - log N(x'; mean, c²) = -avg(d²) / (2 c²) - avg(d e) / c,   d = b (v - v_other)                             (6)

which is exactly 0 where the velocities are the same, and keeps all its digits where they nearly are: a difference of two log-densities would be
rounded at 1e-7, next to clip ranges of 1e-5. The published code of "cps" leaves 1/(2 c²) out of its log-densities; here all kinds have the true one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qimg2 import sampler
from qimg2.flow import expand

KINDS = ("flow", "dance", "cps")
Policy = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class Steps:
  """Numbers of steps, float32 and all of one shape: [T] for a grid of times, [B] for a step of each row.

  Attributes:
    sigma, sigma_next: the times of a step.
    returned: q, the share of the predicted noise that is given back, at most 0.
    deviation: c, of what is drawn anew.
  """
  sigma: jax.Array
  sigma_next: jax.Array
  returned: jax.Array
  deviation: jax.Array

  def at(self, index: Any) -> "Steps":
    """The steps of these numbers, an integer or an int array."""
    return jax.tree.map(lambda x: x[index], self)

  def where(self, drawn: jax.Array) -> "Steps":
    """The same, but the ODE's where `drawn`, bool of the same shape, is False."""
    return self.replace(returned=jnp.where(drawn, self.returned, 0.0), deviation=jnp.where(drawn, self.deviation, 0.0))

  @property
  def slope(self) -> jax.Array:
    """b, the derivative of `mean` by the velocity."""
    return self.sigma_next - self.sigma + self.returned * (1 - self.sigma)

  def mean(self, x: jax.Array, v: jax.Array) -> jax.Array:
    """The mean of a step from `x` with the velocity `v`, both [B, ...], equation 1."""
    noise = x + expand(1 - self.sigma, x) * v
    return sampler.euler_step(x, v, expand(self.sigma, x), expand(self.sigma_next, x)) + expand(self.returned, x) * noise


@dataclasses.dataclass(frozen=True)
class SDE:
  """A kind of SDE and its a, `eta`.

  Raises:
    ValueError: an unknown kind, an `eta` that is not positive, or above 1 for "cps".
  """
  kind: str = "flow"
  eta: float = 0.7

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"The sampler is {self.kind!r}: choose one of {', '.join(KINDS)}.")
    if self.eta <= 0 or (self.kind == "cps" and self.eta > 1):
      raise ValueError(f"eta is {self.eta}: it must be above 0, and at most 1 for 'cps', where 1 draws all noise anew.")

  def steps(self, sigmas: np.ndarray) -> Steps:
    """The steps on a grid of times [T + 1] from 1 down to 0, see `flow.Schedule.sigmas`; the numbers [T] are computed in float64."""
    sigma, after = np.asarray(sigmas[:-1], np.float64), np.asarray(sigmas[1:], np.float64)
    if self.kind == "cps":
      deviation = after * np.sin(self.eta * np.pi / 2)
      returned = np.sqrt(np.maximum(after**2 - deviation**2, 0)) - after
    else:
      room = 1 - np.where(sigma < 1, sigma, after)  # equation 3 at its singular step
      s = self.eta * (np.sqrt(sigma / room) if self.kind == "flow" else np.ones_like(sigma))
      deviation, returned = s * np.sqrt(sigma - after), s**2 * (after - sigma) / (2 * sigma)
    last = after == 0
    return Steps(*(jnp.asarray(x, jnp.float32) for x in (sigma, after, np.where(last, 0, returned), np.where(last, 0, deviation))))


def log_probability(x_next: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
  """[B] log-density of `x_next` [B, ...] under N(mean, deviation²), the mean over dimensions; `deviation` [B] is positive."""
  scale = expand(deviation, mean)
  return row_mean(-0.5 * jnp.square((x_next - mean) / scale) - jnp.log(scale) - 0.5 * np.float32(np.log(2 * np.pi)))


def log_ratio(difference: jax.Array, noise: jax.Array, deviation: jax.Array) -> jax.Array:
  """[B] logarithm of the ratio of two densities, the mean over dimensions, equation 6.

  Args:
    difference: [B, ...] d, the mean that drew minus the mean of which the ratio is wanted.
    noise: [B, ...] e, what was drawn: (x_next - mean) / deviation.
    deviation: [B], positive.
  """
  return -divergence(difference, deviation) - row_mean(difference * noise) / deviation


def divergence(difference: jax.Array, deviation: jax.Array) -> jax.Array:
  """[B] Kullback-Leibler divergence of two normal distributions whose means differ by `difference` [B, ...], the mean over dimensions."""
  return row_mean(jnp.square(difference)) / (2 * jnp.square(deviation))


def row_mean(x: jax.Array) -> jax.Array:
  """[B] the mean over the other dimensions."""
  return jnp.mean(x, axis=tuple(range(1, x.ndim)))


# Which steps are drawn by the SDE, and which are learned from.


def draw_windows(key: jax.Array, num_rows: int, num_steps: int, window: int, last: int) -> jax.Array:
  """[B, T] bool, True for the `window` consecutive steps of each row that the SDE draws, anywhere among the first `last` (MixGRPO, arXiv 2507.21802).

  Args:
    key: PRNG key.
    num_rows: B.
    num_steps: T.
    window: number of steps, 0 to `last`; 0 leaves the ODE.
    last: number of the first steps that a window may cover, below T: the last step is the ODE's.
  """
  start = jax.random.randint(key, (num_rows, 1), 0, last - window + 1)
  step = jnp.arange(num_steps)[None]
  return (step >= start) & (step < start + window)


def choose_steps(key: jax.Array, drawn: jax.Array, sigmas: jax.Array, num: int, bias: float) -> jax.Array:
  """[B, num] int32 numbers of the steps to learn from, in the order of time, without repetition.

  Args:
    key: PRNG key.
    drawn: [B, T] bool, the steps to choose from; each row has at least `num`.
    sigmas: [T] their times.
    num: how many.
    bias: a step is drawn in proportion to sigma^bias: 0 for all alike, larger for more noise.
  """
  odds = bias * jnp.log(sigmas)[None] + jax.random.gumbel(key, drawn.shape)  # the largest of these are a draw without repetition, arXiv 1903.06059
  return jnp.sort(jax.lax.top_k(jnp.where(drawn, odds, -jnp.inf), num)[1], axis=1).astype(jnp.int32)


@flax.struct.dataclass
class Path:
  """What is kept of a path to learn from, for n steps of each row: 12 bytes for each number of the latents and step.

  Attributes:
    x: [B, n, h, w, C] float32, where a step begins.
    velocity: [B, n, h, w, C] float32, the policy's there.
    noise: [B, n, h, w, C] float32, what the policy would have had to draw to get where the step ended; for the policy that drew, what it drew.
    step: [B, n] int32 number of the step.
  """
  x: jax.Array
  velocity: jax.Array
  noise: jax.Array
  step: jax.Array


def sample(policy: Policy, noise: jax.Array, steps: Steps, drawn: jax.Array, learned: jax.Array, key: jax.Array,
           ids: jax.Array) -> tuple[jax.Array, Path]:
  """(latents at t = 0 [B, h, w, C], what is kept of the way there), both float32.

  Args:
    policy: `policy(x, sigma) -> (v, velocity)`: the velocity that steps, and the one whose policy is learned; they differ where the guided one steps
      and the conditional branch learns.
    noise: [B, h, w, C] standard normal.
    steps: [T].
    drawn: [B, T] bool, which steps the SDE draws; False at the last.
    learned: [B, n] int32, which of these are kept.
    key: PRNG key of what is drawn.
    ids: [B] int32, unlike for rows that are to draw unlike noise.
  """
  zeros = jnp.zeros((*learned.shape, *noise.shape[1:]), jnp.float32)

  def step(carry, number):
    x, kept = carry
    v, velocity = policy(x, steps.sigma[number])
    own = jax.tree.map(lambda value: jnp.full(x.shape[:1], value), steps.at(number)).where(drawn[:, number])
    e = sampler.sample_noise(jax.random.fold_in(key, number), ids, x.shape[1:])
    # A choice, as x + 0 y may be rounded otherwise than x, once the compiler has fused it.
    x_next = jnp.where(expand(drawn[:, number], x), own.mean(x, v) + expand(own.deviation, x) * e,
                       sampler.euler_step(x, v, steps.sigma[number], steps.sigma_next[number]))
    away = expand(own.slope / jnp.where(drawn[:, number], own.deviation, 1.0), x) * (v - velocity)
    here = learned == number
    keep = lambda old, new: jnp.where(here.reshape(*here.shape, *[1] * (x.ndim - 1)), new[:, None], old)
    return (x_next, tuple(map(keep, kept, (x, velocity, e + away)))), None

  (x, kept), _ = jax.lax.scan(step, (noise.astype(jnp.float32), (zeros,) * 3), jnp.arange(steps.sigma.shape[0]))
  return x, Path(*kept, learned)
