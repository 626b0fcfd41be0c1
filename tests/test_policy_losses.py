"""Losses of policy gradients and their gradients against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qimg2 import sde
from qimg2.algorithms.policy_losses import OBJECTIVES, reference_divergence
from qimg2.flow import Schedule

SCHEDULE = Schedule(shift="none", terminal=None)


@pytest.fixture(scope="module")
def one():
  """A step of six rows, and in float64 what two policies say of it."""
  rng = np.random.default_rng(0)
  sigma = np.linspace(0.9, 0.4, 6)
  step = sde.Steps(*map(jnp.float32, (sigma, sigma - 0.1, np.zeros(6), np.linspace(0.2, 0.5, 6))))
  return step, 0.1 * rng.normal(size=(6, 2, 2, 3)), rng.normal(size=(6, 2, 2, 3)), np.array([1.0, -1.0, 2.0, -0.5, 0.3, -2.0])


def by_hand(name, step, d, e, advantage, eps):
  """(loss, derivative of the loss by d) of each row in numpy."""
  c, dt, num = np.asarray(step.deviation, np.float64), np.asarray(step.sigma_next - step.sigma, np.float64), d[0].size
  avg, wide = lambda x: x.mean(axis=(1, 2, 3)), c[:, None, None, None]
  k = avg(d**2) / (2 * c**2)
  log_r, slope = -k - avg(d * e) / c, -(d / wide**2 + e / wide) / num
  if name == "guard":
    log_r, slope = c * (log_r + k), slope * wide + d / wide / num  # as the paper writes it
  r = np.exp(log_r)
  if name == "dppo":
    free = ~((k >= eps) & (((r > 1) & (advantage > 0)) | ((r < 1) & (advantage < 0))))
    loss = np.where(free, -advantage * r, 0)
  else:
    bounded = np.clip(r, 1 - eps, 1 + eps)
    loss = np.maximum(-advantage * r, -advantage * bounded)
    free = (r == bounded) | (loss > -advantage * bounded)
  scale = 1 / -dt if name == "guard" else np.ones(6)
  return loss * scale, (-advantage * r * free * scale)[:, None, None, None] * slope


@pytest.mark.parametrize("name, eps", [("grpo", 0.02), ("guard", 0.003), ("dppo", 0.03)])
def test_losses_and_their_gradients_are_those_by_hand(name, eps, one):
  step, d, e, advantage = one
  loss = lambda d: OBJECTIVES[name](step, d, jnp.float32(e), jnp.float32(advantage), eps)
  found, ratio, is_bounded = loss(jnp.float32(d))
  wanted, slope = by_hand(name, step, d, e, advantage, eps)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  np.testing.assert_allclose(jax.grad(lambda d: jnp.sum(loss(d)[0]))(jnp.float32(d)), slope, rtol=1e-4, atol=1e-6)
  assert 0 < int(is_bounded.sum()) < 6 and ratio.shape == (6,)
  zero = OBJECTIVES[name](step, jnp.zeros_like(jnp.float32(d)), jnp.float32(e), jnp.float32(advantage), eps)
  np.testing.assert_array_equal(zero[1], 1.0)


def test_the_ratio_of_guard_has_no_drift_and_one_spread_at_every_step():
  """Over what is drawn, the mean of log r is -k and its spread goes with 1/c; regulated, they are 0 and the root of avg(d²)/D."""
  num, rng = 4000, np.random.default_rng(0)
  d, e = jnp.broadcast_to(0.1 * jnp.float32(rng.normal(size=(1, 8))), (num, 8)), jnp.float32(rng.normal(size=(num, 8)))
  for c in (0.05, 0.5):
    step = sde.Steps(*(jnp.full(num, x) for x in (0.5, 0.4, 0.0, c)))
    logs = {name: np.log(OBJECTIVES[name](step, d, e, jnp.ones(num), 0.1)[1]) for name in ("grpo", "guard")}
    k, spread = float(jnp.mean(d[0] ** 2)) / (2 * c**2), float(jnp.sqrt(jnp.mean(d[0] ** 2) / 8))
    for name, mean, deviation in (("grpo", -k, spread / c), ("guard", 0.0, spread)):
      assert abs(logs[name].mean() - mean) < 4 * deviation / num**0.5 and abs(logs[name].std() / deviation - 1) < 0.05


def test_the_divergence_from_a_reference_is_that_of_the_velocities():
  """The closed form of Flow-GRPO's appendix, |dt|/2 (1/s + s (1 - sigma)/(2 sigma))² |v - v_ref|²; the published code leaves |dt| out of c²."""
  steps, index = sde.SDE("flow", 0.7).steps(SCHEDULE.sigmas(8, 1)), np.array([2, 4, 6])
  sigma, dt = (np.asarray(x, np.float64)[index] for x in (steps.sigma, steps.sigma_next - steps.sigma))
  gap, s = np.random.default_rng(0).normal(size=(3, 4)), 0.7 * np.sqrt(sigma / (1 - sigma))
  own = steps.at(jnp.array(index))
  closed = -dt / 2 * (1 / s + s * (1 - sigma) / (2 * sigma)) ** 2 * (gap**2).mean(axis=1)
  difference = own.slope[:, None] * jnp.float32(gap)
  np.testing.assert_allclose(reference_divergence(own, difference, "gaussian"), closed, rtol=1e-5)
  np.testing.assert_allclose(reference_divergence(own, difference, "flow_grpo"), (np.asarray(difference) ** 2).mean(axis=1) / (2 * s**2), rtol=1e-5)
