"""The path between data and noise, and every choice of time along it.

Flow matching on the straight path (arXiv 2210.02747, 2209.03003; Qwen-Image-Flash report, section 2.1):

  x_t = (1 - t) x_0 + t noise        t = 0 is data, t = 1 is noise                                    (1)
  velocity = dx_t/dt = noise - x_0,  so  x_0 = x_t - t velocity,  noise = x_t + (1 - t) velocity       (2)

One `Schedule` gives the times of training, validation and sampling, so that a network is asked at sampling time what it was taught. More
tokens hide less at the same t, so times are shifted towards noise with the number L of target tokens (arXiv 2403.03206, section 5.3.2):

  t' = e^mu / (e^mu + 1/t - 1),   mu(L) = base + (max - base) (L - L_base) / (L_max - L_base), not clamped  (3)

Sampling takes N times linspace(1, 1/N, N), shifts them, stretches them so that the last one is `terminal`, and appends 0:

  sigma' = 1 - (1 - sigma) (1 - terminal) / (1 - sigma_last)                                          (4)

The squared error of the velocity may be weighted by time (`time_weights`):

  none 1,   sigma_sqrt t^-2,   cosmap 2 / (pi (1 - 2t + 2t²)), the density of arXiv 2403.03206, section 3.1      (5)
  bell c (e^(-2 (t - 1/2)²) - e^(-1/2)),  with c for a mean of 1 over t in [0, 1]: both ends count nothing       (6)
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

DENSITIES = ("logit_normal", "uniform", "mode", "cosmap")
SHIFTS = ("resolution", "static", "none")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap", "bell")
LEAST_TIME = 1e-3  # the lowest t that "sigma_sqrt" divides by, so that its weights end at 1e6


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The times of one run; the defaults are the published sampler's and the 1.x report's logit-normal training density.

  Attributes:
    density: of training times before the shift: "logit_normal" (logit_mean, logit_std), "uniform", "mode" (mode_scale) or "cosmap".
    shift: "resolution" for equation 3, "static" for t' = s t / (1 + (s - 1) t) with s = static_shift, or "none".
    base_tokens, base_shift, max_tokens, max_shift: the line mu(L).
    terminal: last non-zero sampling time, equation 4; None keeps the shifted grid.

  Raises:
    ValueError: an unknown name, or a number out of its range.
  """
  density: str = "logit_normal"
  logit_mean: float = 0.0
  logit_std: float = 1.0
  mode_scale: float = 1.29
  shift: str = "resolution"
  static_shift: float = 1.0
  base_tokens: int = 256
  base_shift: float = 0.5
  max_tokens: int = 8192
  max_shift: float = 0.9
  terminal: float | None = 0.02

  def __post_init__(self):
    if self.density not in DENSITIES:
      raise ValueError(f"schedule.density is {self.density!r}: choose one of {', '.join(DENSITIES)}.")
    if self.shift not in SHIFTS:
      raise ValueError(f"schedule.shift is {self.shift!r}: choose one of {', '.join(SHIFTS)}.")
    if self.terminal is not None and not 0 < self.terminal < 1:
      raise ValueError(f"schedule.terminal is {self.terminal}: give a time between 0 and 1, or None.")

  def mu(self, num_tokens: int) -> float:
    """The logarithm of the shift for `num_tokens` target tokens, equation 3."""
    if self.shift == "static":
      return math.log(self.static_shift)
    if self.shift == "none":
      return 0.0
    slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
    return self.base_shift + slope * (num_tokens - self.base_tokens)

  def shifted(self, t, num_tokens: int):
    """Times `t` (array in [0, 1]) after the shift; t = 0 and t = 1 stay."""
    s = math.exp(self.mu(num_tokens))
    return s * t / (1 + (s - 1) * t)

  def training_times(self, key: jax.Array, batch_size: int, num_tokens: int) -> jax.Array:
    """[B] float32 random times of a training batch whose targets have `num_tokens` tokens."""
    if self.density == "logit_normal":
      t = jax.nn.sigmoid(self.logit_mean + self.logit_std * jax.random.normal(key, (batch_size,)))
    else:
      u = jax.random.uniform(key, (batch_size,))
      t = {"uniform": lambda: u,
           "mode": lambda: 1 - u - self.mode_scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u),
           "cosmap": lambda: 1 - 1 / (jnp.tan(jnp.pi / 2 * u) + 1)}[self.density]()
    return self.shifted(t, num_tokens)

  def validation_times(self, bins: jax.Array, num_bins: int, num_tokens: int) -> jax.Array:
    """[B] float32 fixed times: the middle (bin + 1/2)/num_bins of each bin, shifted like the training times."""
    return self.shifted((bins.astype(jnp.float32) + 0.5) / num_bins, num_tokens)

  def sigmas(self, num_steps: int, num_tokens: int, base: Sequence[float] | None = None) -> np.ndarray:
    """[T + 1] float64 sampling times from 1 down to 0, equations 3 and 4.

    Args:
      num_steps: T.
      num_tokens: number of target tokens.
      base: T times before the shift in place of linspace(1, 1/T, T), such as a distilled model's.

    Raises:
      ValueError: T below 1, or `base` of another length.
    """
    if num_steps < 1:
      raise ValueError(f"num_steps is {num_steps}: sampling needs at least one step.")
    times = np.linspace(1.0, 1.0 / num_steps, num_steps) if base is None else np.asarray(base, np.float64)
    if len(times) != num_steps:
      raise ValueError(f"{len(times)} sampling times were given for {num_steps} steps: give one per step.")
    times = self.shifted(times, num_tokens)
    if self.terminal is not None and times[-1] < 1:
      times = 1 - (1 - times) * (1 - self.terminal) / (1 - times[-1])
    return np.append(times, 0.0)


def expand(t: jax.Array, x: jax.Array) -> jax.Array:
  """`t` [B] with as many trailing dimensions of size one as `x` needs."""
  return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(x_0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """x_t on the path at times `t` [B], equation 1."""
  t = expand(t, x_0)
  return (1 - t) * x_0 + t * noise


def velocity_target(x_0: jax.Array, noise: jax.Array) -> jax.Array:
  """noise - x_0, equation 2."""
  return noise - x_0


def time_weights(weighting: str, t: jax.Array) -> jax.Array:
  """[B] float32 weights of the squared error at times `t` [B], equations 5 and 6; `t` is the network's time, after the shift.

  Raises:
    ValueError: no weighting of that name.
  """
  check_weighting(weighting)
  tail = math.exp(-0.5)
  bell_mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - tail
  return {"none": lambda: jnp.ones_like(t),
          "sigma_sqrt": lambda: jnp.maximum(t, LEAST_TIME) ** -2,
          "cosmap": lambda: 2 / (jnp.pi * (1 - 2 * t + 2 * t**2)),
          "bell": lambda: (jnp.exp(-2 * jnp.square(t - 0.5)) - tail) / bell_mean}[weighting]()


def check_weighting(weighting: str) -> None:
  """Raises a `ValueError` for a weighting that there is not."""
  if weighting not in WEIGHTINGS:
    raise ValueError(f"algorithm.weighting is {weighting!r}: choose one of {', '.join(WEIGHTINGS)}.")


def predict_x_0(x_t: jax.Array, velocity: jax.Array, t: jax.Array) -> jax.Array:
  """The data that `velocity` points back to from `x_t`, equation 2."""
  return x_t - expand(t, x_t) * velocity
