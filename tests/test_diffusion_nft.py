"""DiffusionNFT: its gradient by hand and by sign, and its old weights."""

import jax
import jax.numpy as jnp
import numpy as np

from qimg2.algorithms.diffusion_nft import contrast, old_decay

RNG = np.random.default_rng(0)
X_0, X_T, V, OLD = RNG.normal(size=(4, 5, 2, 2, 3))
T, GOOD = RNG.uniform(0.2, 1, 5), np.array([0.0, 0.3, 0.5, 0.8, 1.0])
single = lambda *arrays: [jnp.float32(x) for x in arrays]


def test_the_loss_and_its_gradient_are_those_by_hand():
  beta, wide = 0.4, T[:, None, None, None]
  plus, minus = beta * V + (1 - beta) * OLD, (1 + beta) * OLD - beta * V
  total, slope = np.zeros(5), np.zeros_like(V)
  for velocity, share, sign in ((plus, GOOD, 1), (minus, 1 - GOOD, -1)):
    away = X_T - wide * velocity - X_0
    weight = np.abs(away).mean(axis=(1, 2, 3))
    total += share * (away**2).mean(axis=(1, 2, 3)) / weight / beta
    slope += sign * (share / weight)[:, None, None, None] * 2 * away / away[0].size * -wide
  loss = lambda v: contrast(*single(X_0, X_T, T), v, *single(OLD, GOOD), beta)
  np.testing.assert_allclose(loss(jnp.float32(V)), total, rtol=1e-5)
  np.testing.assert_allclose(jax.grad(lambda v: loss(v).sum())(jnp.float32(V)), slope, rtol=1e-4, atol=1e-6)


def test_at_the_old_policy_good_pulls_and_bad_pushes_alike():
  """There the gradient is (2 r - 1) times that of the flow-matching error; none at r = 1/2, in any step of the velocity."""
  gradient = np.asarray(jax.grad(lambda v: contrast(*single(X_0, X_T, T), v, *single(OLD, GOOD), 0.4).sum())(jnp.float32(OLD)))
  np.testing.assert_allclose(gradient[2], 0, atol=1e-7)
  away = X_T - T[:, None, None, None] * OLD - X_0
  pull = -2 * T[:, None, None, None] * away / 12 / np.abs(away).mean(axis=(1, 2, 3))[:, None, None, None]
  np.testing.assert_allclose(gradient, (2 * GOOD - 1)[:, None, None, None] * pull, rtol=1e-4, atol=1e-6)


def test_a_picture_that_is_hit_exactly_gives_no_nan():
  zero = jnp.zeros((5, 2, 2, 3))
  loss, gradient = jax.value_and_grad(lambda v: contrast(*single(X_0, X_0, T), v, zero, jnp.float32(GOOD), 1.0).sum())(zero)
  assert float(loss) == 0.0 and float(jnp.abs(gradient).max()) == 0.0


def test_old_weights_copy_first_and_then_follow():
  decays = [float(old_decay(jnp.int32(step), 75, 0.0075, 0.999)) for step in (0, 75, 76, 175, 10_000)]
  np.testing.assert_allclose(decays, [0, 0, 0.0075, 0.75, 0.999], rtol=1e-6)
