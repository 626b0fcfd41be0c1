"""An exact velocity lands on the data; guidance is the formula; noise belongs to its sample."""

import jax
import jax.numpy as jnp
import numpy as np

from qimg2 import sampler
from qimg2.flow import Schedule

SIGMAS = Schedule().sigmas(7, 12)


def test_an_exact_velocity_lands_on_the_data():
  data, noise = (jax.random.normal(jax.random.key(i), (3, 2, 4, 5)) for i in (0, 1))
  net = lambda params, x, t, cond: (x - cond) / t[:, None, None, None]  # the velocity when the data is one point
  np.testing.assert_allclose(sampler.sample(net, {}, noise, data, SIGMAS), data, atol=1e-5)


def test_euler_error_falls_with_the_steps():
  # dx/dt = x has the solution x(0) = x(1)/e.
  net = lambda params, x, t, cond: x
  error = [abs(float(sampler.sample(net, {}, jnp.ones((1, 1, 1, 1)), None, np.linspace(1, 0, n + 1))[0, 0, 0, 0]) - np.exp(-1)) for n in (8, 16, 64)]
  assert error[0] > 1.8 * error[1] > 6 * error[2]


def test_guidance_extrapolates_and_at_most_one_runs_no_second_pass():
  shapes = []
  def net(params, x, t, cond):
    shapes.append(x.shape)
    return cond * jnp.ones_like(x)
  noise = jnp.zeros((2, 1, 1, 1))
  cond, uncond = jnp.array([3.0, 5.0]).reshape(2, 1, 1, 1), jnp.ones((2, 1, 1, 1))
  guided = sampler.sample(net, {}, noise, jnp.concatenate([cond, uncond]), SIGMAS, guidance=4.0)
  np.testing.assert_allclose(guided.ravel(), [-(1 + 4 * 2), -(1 + 4 * 4)], rtol=1e-5)
  for none in (1.0, 0.5, 0.0):  # model cards say 0 as well as 1
    plain = sampler.sample(net, {}, noise, cond, SIGMAS, guidance=none)
    np.testing.assert_allclose(plain.ravel(), [-3, -5], rtol=1e-5)
  assert set(shapes) == {(4, 1, 1, 1), (2, 1, 1, 1)}


def test_what_stays_is_on_its_own_path_at_every_step_and_the_original_at_the_end():
  original, data, noise = (np.asarray(jax.random.normal(jax.random.key(i), (2, 2, 3, 4))) for i in range(3))
  free, seen = np.arange(12).reshape(2, 2, 3, 1) % 3 == 0, []
  def net(params, x, t, cond):
    seen.append((np.asarray(x), float(t[0])))
    return (x - cond) / t[:, None, None, None]
  with jax.disable_jit():
    x = np.asarray(sampler.sample(net, {}, noise, data, SIGMAS, original=jnp.asarray(original), free=jnp.asarray(free)))
  kept = np.broadcast_to(~free, x.shape)
  for x_t, t in seen:
    np.testing.assert_allclose(x_t[kept], ((1 - t) * original + t * noise)[kept], atol=1e-6)
  np.testing.assert_array_equal(x[kept], original[kept])
  np.testing.assert_allclose(x[~kept], data[~kept], atol=1e-5)


def test_noise_belongs_to_its_sample():
  key = jax.random.key(0)
  some = sampler.sample_noise(key, jnp.array([5, 9, 2]), (4, 4, 8))
  np.testing.assert_array_equal(some[1], sampler.sample_noise(key, jnp.array([9]), (4, 4, 8))[0])
  assert (some[0] != some[1]).any() and abs(float(some.std()) - 1) < 0.1
