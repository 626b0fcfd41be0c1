"""Steps of an SDE: the published formulas, the marginals of Gaussian data, densities, windows, and what is kept of a path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qimg2 import sampler, sde
from qimg2.flow import Schedule

SIGMAS = Schedule().sigmas(8, 12)
ALL = [("flow", 0.7), ("dance", 0.3), ("cps", 0.8)]


def published(kind, a, sigma, after, x, v):
  """(mean, deviation) as the papers write a step, in float64; the first step takes 1 - sigma of the second time."""
  dt, x_0, noise = after - sigma, x - sigma * v, x + (1 - sigma) * v
  if kind == "cps":
    c = after * np.sin(a * np.pi / 2)
    return (1 - after) * x_0 + np.sqrt(after**2 - c**2) * noise, c
  if kind == "dance":
    return x + (v + 0.5 * a**2 * (x - (1 - sigma) * x_0) / sigma**2) * dt, a * np.sqrt(-dt)
  s = a * np.sqrt(sigma / (1 - (after if sigma == 1 else sigma)))
  return x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt, s * np.sqrt(-dt)


@pytest.mark.parametrize("kind, eta", ALL)
def test_steps_are_the_published_ones(kind, eta):
  steps, rng = sde.SDE(kind, eta).steps(SIGMAS), np.random.default_rng(0)
  x, v = rng.normal(size=(2, 3, 2, 2, 4))
  for i in range(7):
    mean, deviation = published(kind, eta, SIGMAS[i], SIGMAS[i + 1], x, v)
    own = steps.at(jnp.full(3, i))
    np.testing.assert_allclose(own.mean(jnp.float32(x), jnp.float32(v)), mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(own.deviation, np.full(3, deviation), rtol=1e-6)
    np.testing.assert_allclose(own.slope[0], (published(kind, eta, SIGMAS[i], SIGMAS[i + 1], x, v + 1)[0] - mean).mean(), rtol=1e-5)
  assert float(steps.deviation[-1]) == float(steps.returned[-1]) == 0.0  # the last step is the ODE's
  if kind == "cps":
    np.testing.assert_allclose((steps.sigma_next + steps.returned) ** 2 + steps.deviation**2, steps.sigma_next**2, rtol=1e-6)


def test_settings_that_are_none_are_refused():
  with pytest.raises(ValueError, match="choose one of flow, dance, cps"):
    sde.SDE("sde")
  with pytest.raises(ValueError, match="eta is 1.2: .* at most 1 for 'cps'"):
    sde.SDE("cps", 1.2)


@pytest.mark.parametrize("kind, eta, spread, num_steps", [("flow", 0.7, 0.5, 96), ("dance", 0.3, 0.5, 96), ("cps", 0.8, 0.0, 8)])
def test_gaussian_data_keeps_its_marginals(kind, eta, spread, num_steps):
  """The exact velocity of N(1.5, spread²). The noise is redrawn whole several times, so that what is there in the end was drawn by the SDE."""
  centre, num = 1.5, 600
  def policy(x, t):
    variance = (1 - t) ** 2 * spread**2 + t**2
    v = -centre + (t - (1 - t) * spread**2) / variance * (x - (1 - t) * centre)
    return v, v
  sigmas, middle = np.linspace(1, 0, num_steps + 1), 5 * num_steps // 8
  drawn, learned = jnp.arange(num_steps)[None].repeat(num, 0) < num_steps - 1, jnp.full((num, 1), middle, jnp.int32)
  start, steps = jax.random.normal(jax.random.key(0), (num, 2, 2, 4)), sde.SDE(kind, eta).steps(sigmas)
  x, path = jax.jit(lambda: sde.sample(policy, start, steps, drawn, learned, jax.random.key(1), jnp.arange(num)))()
  for values, t in ((x, 0.0), (path.x[:, 0], sigmas[middle])):
    spread_t = np.sqrt((1 - t) ** 2 * spread**2 + t**2)
    assert abs(float(values.mean()) - (1 - t) * centre) < 0.03 and abs(float(values.std()) - spread_t) < 0.03 * spread_t + 1e-5


def test_densities_are_those_of_scipy():
  rng = np.random.default_rng(0)
  x, mean, other, deviation = *rng.normal(size=(3, 5, 2, 2, 4)), rng.uniform(0.1, 2, 5)
  wide = deviation[:, None, None, None]
  found = sde.log_probability(*map(jnp.float32, (x, mean, deviation)))
  density = lambda m: stats.norm.logpdf(x, m, wide).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(found, density(mean), rtol=1e-5)
  ratio = sde.log_ratio(jnp.float32(mean - other), jnp.float32((x - mean) / wide), jnp.float32(deviation))
  np.testing.assert_allclose(ratio, density(other) - density(mean), rtol=1e-5, atol=1e-6)
  grid = np.linspace(-12, 12, 4001)
  p, q = stats.norm.pdf(grid, 0.3, 0.8), stats.norm.pdf(grid, -0.2, 0.8)
  np.testing.assert_allclose(sde.divergence(jnp.full((1, 3), 0.5), jnp.array([0.8])), [np.trapezoid(p * np.log(p / q), grid)], rtol=1e-5)
  assert float(jnp.abs(sde.log_ratio(jnp.zeros((5, 3)), jnp.float32(x.reshape(5, -1)[:, :3]), jnp.float32(deviation))).max()) == 0.0


def net(params, x, t, cond):
  return jnp.tanh(1.3 * x + t[:, None, None, None] - cond)


def test_without_a_window_it_is_the_ode_to_the_bit():
  noise, cond = jax.random.normal(jax.random.key(0), (2, 6, 2, 2, 4))
  policy = lambda x, t: (sampler.guided_velocity(net, {}, x, t, cond),) * 2
  drawn = sde.draw_windows(jax.random.key(1), 6, 8, 0, 7)
  learned, steps = jnp.zeros((6, 0), jnp.int32), sde.SDE().steps(SIGMAS)
  x, path = jax.jit(lambda: sde.sample(policy, noise, steps, drawn, learned, jax.random.key(2), jnp.arange(6)))()
  np.testing.assert_array_equal(x, jax.jit(lambda: sampler.sample(net, {}, noise, cond, SIGMAS))())
  assert path.x.shape == (6, 0, 2, 2, 4)


def test_windows_are_anywhere_and_steps_are_biased_to_noise():
  drawn = np.asarray(sde.draw_windows(jax.random.key(0), 3000, 8, 2, 5))
  assert (drawn.sum(axis=1) == 2).all() and not drawn[:, 5:].any()
  starts = np.bincount(drawn.argmax(axis=1), minlength=8)
  assert (starts[:4] > 600).all() and (drawn[np.arange(3000), drawn.argmax(axis=1) + 1]).all()
  times = jnp.array([1.0, 0.5, 0.25, 0.1])
  some = np.asarray(sde.choose_steps(jax.random.key(1), jnp.array([[True, True, False, True]] * 4000), times, 1, 1.0))
  np.testing.assert_allclose(np.bincount(some[:, 0], minlength=4) / 4000, np.array([1, 0.5, 0, 0.1]) / 1.6, atol=0.03)
  two = np.asarray(sde.choose_steps(jax.random.key(1), jnp.ones((500, 4), bool), times, 2, 0.0))
  assert (two[:, 0] < two[:, 1]).all() and len({tuple(row) for row in two}) == 6


def test_a_kept_path_gives_back_each_step_under_the_policy_that_learns():
  """A guided velocity steps, the conditional one learns: the kept noise leads from its mean to where the step ended."""
  noise, cond = jax.random.normal(jax.random.key(0), (2, 4, 2, 2, 3))
  policy = lambda x, t: (3 * net({}, x, jnp.full(4, t), cond), net({}, x, jnp.full(4, t), cond))
  steps, learned = sde.SDE().steps(SIGMAS), jnp.array([[2, 3], [1, 2], [2, 3], [3, 4]])
  drawn = (jnp.arange(8)[None] >= learned[:, :1]) & (jnp.arange(8)[None] <= learned[:, 1:])
  _, path = sde.sample(policy, noise, steps, drawn, learned, jax.random.key(3), jnp.arange(4))
  own = steps.at(path.step[:, 0])
  ended = own.mean(path.x[:, 0], path.velocity[:, 0]) + own.deviation[:, None, None, None] * path.noise[:, 0]
  np.testing.assert_allclose(ended, path.x[:, 1], atol=2e-6)
  np.testing.assert_array_equal(path.velocity[2, 1], net({}, path.x[:, 1], steps.sigma[path.step[:, 1]], cond)[2])
  assert np.abs(np.asarray(path.x[:, 0] - path.x[:, 1])).max() > 0.1
