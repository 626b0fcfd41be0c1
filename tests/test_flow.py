"""Times of training, validation and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qimg2 import flow
from qimg2.algorithms.flow_matching import flow_matching
from qimg2.flow import Schedule


@pytest.mark.parametrize("num_tokens, mu, sigmas", [
    (1024, 0.538710, (1, .9849, .8334, .6230, .3489, .0616, .0200)),
    (4096, 0.693548, (1, .9870, .8529, .6567, .3819, .0679, .0200)),
    (16384, 1.312903, (1, .9926, .9117, .7724, .5206, .1022, .0200)),
    (16512, 1.319355, (1, .9927, .9121, .7735, .5220, .1027, .0200)),
])
def test_published_sampling_times(num_tokens, mu, sigmas):
  schedule = Schedule()
  assert schedule.mu(num_tokens) == pytest.approx(mu, abs=1e-6)
  ours = schedule.sigmas(40, num_tokens)
  assert len(ours) == 41 and ours[-1] == 0
  np.testing.assert_allclose(ours[[0, 1, 10, 20, 30, 38, 39]], sigmas, atol=5.1e-5)


@pytest.mark.apart("published")
def test_sampling_times_equal_the_published_scheduler():
  from diffusers import FlowMatchEulerDiscreteScheduler
  theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential", base_image_seq_len=256, base_shift=0.5,
                                           max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02)
  for num_steps, num_tokens in ((2, 9), (4, 300), (40, 4096), (50, 20_000)):
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=Schedule().mu(num_tokens))
    np.testing.assert_allclose(Schedule().sigmas(num_steps, num_tokens), theirs.sigmas.numpy(), atol=1e-6)


def test_one_step_goes_from_noise_to_data():
  np.testing.assert_array_equal(Schedule().sigmas(1, 9), [1.0, 0.0])  # the published stretch divides by zero here


def test_distilled_times_pass_through():
  times = (1.0, .978453, .95418, .926626, .89508, .845148, .704534, .414568)
  ours = Schedule(shift="static", static_shift=1.0, terminal=None).sigmas(8, 4096, times)
  np.testing.assert_allclose(ours, (*times, 0.0))


def test_path():
  x_0, noise = (jax.random.normal(jax.random.key(i), (3, 2, 2, 4)) for i in (0, 1))
  t = jnp.array([0.0, 0.3, 1.0])
  x_t, velocity = flow.interpolate(x_0, noise, t), flow.velocity_target(x_0, noise)
  np.testing.assert_array_equal(x_t[0], x_0[0])
  np.testing.assert_array_equal(x_t[2], noise[2])
  np.testing.assert_allclose(flow.predict_x_0(x_t, velocity, t), x_0, atol=1e-6)
  later = flow.interpolate(x_0, noise, t + 0.01)
  np.testing.assert_allclose((later - x_t) / 0.01, velocity, atol=1e-3)


@pytest.mark.parametrize("density", flow.DENSITIES)
@pytest.mark.parametrize("shift", flow.SHIFTS)
def test_training_times_are_times(density, shift):
  t = Schedule(density=density, shift=shift, static_shift=3.0).training_times(jax.random.key(0), 4000, 1024)
  assert t.shape == (4000,) and 0 <= float(t.min()) < 0.2 and 0.8 < float(t.max()) <= 1
  plain = Schedule(density=density, shift="none").training_times(jax.random.key(0), 4000, 1024)
  assert (float(t.mean()) > float(plain.mean()) + 0.05) == (shift != "none")


def test_densities_have_their_means():
  mean = lambda **fields: float(Schedule(shift="none", **fields).training_times(jax.random.key(0), 20_000, 9).mean())
  assert mean() == pytest.approx(0.5, abs=0.01)
  assert mean(logit_mean=1.0) > 0.68
  assert mean(density="uniform") == pytest.approx(0.5, abs=0.01)
  spread = lambda **fields: float(Schedule(shift="none", **fields).training_times(jax.random.key(0), 20_000, 9).std())
  assert spread(density="uniform") == pytest.approx(12**-0.5, abs=0.01) and spread() < 0.23


def test_validation_times_are_the_middles_of_bins():
  t = Schedule(shift="none").validation_times(jnp.arange(8), 8, 9)
  np.testing.assert_allclose(t, (np.arange(8) + 0.5) / 8)
  assert (Schedule().validation_times(jnp.arange(8), 8, 4096) > t).all()


@pytest.mark.parametrize("fields, message", [({"density": "normal"}, "schedule.density is 'normal'"), ({"shift": "some"}, "schedule.shift is 'some'"),
                                             ({"terminal": 0.0}, "schedule.terminal is 0.0")])
def test_schedule_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    Schedule(**fields)


def test_sampling_errors():
  with pytest.raises(ValueError, match="at least one step"):
    Schedule().sigmas(0, 9)
  with pytest.raises(ValueError, match="2 sampling times were given for 3 steps"):
    Schedule().sigmas(3, 9, (1.0, 0.5))


def test_weights_over_time_are_the_published_ones():
  """Those of SD3 as diffusers has them; the bell over its thousand times is a sum, and over [0, 1] an integral."""
  t = np.linspace(0.001, 1, 1000)
  weights = {name: np.asarray(flow.time_weights(name, jnp.asarray(t, jnp.float32)), np.float64) for name in flow.WEIGHTINGS}
  np.testing.assert_array_equal(weights["none"], 1)
  np.testing.assert_allclose(weights["sigma_sqrt"], t**-2.0, rtol=1e-5)
  np.testing.assert_allclose(weights["cosmap"], 2 / (np.pi * (1 - 2 * t + 2 * t**2)), rtol=1e-5)
  y = np.exp(-2 * ((1000 * t - 500) / 1000) ** 2)
  y -= y.min()
  np.testing.assert_allclose(weights["bell"], y * 1000 / y.sum(), atol=3e-3)
  assert weights["bell"].mean() == pytest.approx(1, abs=2e-3) and abs(weights["bell"][-1]) < 1e-6
  assert float(flow.time_weights("sigma_sqrt", jnp.zeros(1))[0]) == pytest.approx(1e6)


def test_a_weighting_that_there_is_not_is_refused():
  with pytest.raises(ValueError, match="algorithm.weighting is 'bel': choose one of none, sigma_sqrt, cosmap, bell"):
    flow_matching(Schedule(), weighting="bel")
