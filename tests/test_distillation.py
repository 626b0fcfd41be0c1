"""On-policy distillation: what is compared where, with which teacher, and that a student becomes its teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_flow import SCHEDULE, Linear, draw

from qimg2.algorithms.distillation import distillation
from qimg2.training.metrics import read_rows
from tests.jobs import toy

GUIDANCE = 3.0


class Prompted(Linear):
  """`Linear` with prompts that are numbers, and the empty one, 0.5."""

  def encoded(self, params, batch):
    return {"prompt": batch["prompt"]}

  def compute_dtypes(self):
    return {"mmdit": "float32"}


def params_of(seed=0):
  some = lambda tree: jax.tree.map(jnp.float32, tree)
  (model, drawing, *_), (editing, *_) = draw(seed), draw(seed + 1)
  return {"model": some(model), "teacher_t2i": some(drawing), "teacher_ti2i": some(editing), "encoder": {}, "vae": {}}


def batch_of(**more):
  return {"latents": jnp.zeros((6, 2, 3, 4)), "prompt": jnp.linspace(-1, 1, 6), "null_prompt": jnp.full(6, 0.5), "sample_id": jnp.arange(6)} | more


def velocity(p, x, t, prompt):
  return x * p["a"] + p["b"] + prompt[:, None, None, None] + t * p["c"]


EDIT = {"source_latents": (jnp.zeros((6, 2, 3, 4)),)}


@pytest.mark.parametrize("form, more, teacher", [("velocity", {}, "teacher_t2i"), ("velocity", EDIT, "teacher_ti2i"), ("kl", {}, "teacher_t2i")])
def test_the_loss_and_its_gradient_are_those_by_hand(form, more, teacher):
  """All steps of a way are learned from; the noise of the ODE's way is found from the loss's own key."""
  num_steps = 4
  n = num_steps - (form == "kl")
  algorithm = distillation(SCHEDULE, form=form, num_steps=num_steps, guidance=GUIDANCE, num_train_steps=n)
  params, batch, key = params_of(), batch_of(**more), jax.random.key(3)
  loss = lambda weights: algorithm.updates[0].loss({"model": weights}, params, Prompted(), batch, key)
  (_, (per_row, metrics)), gradient = jax.value_and_grad(lambda w: (jnp.mean(loss(w)[0]), loss(w)), has_aux=True)(params["model"])

  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  prompt, null = (np.asarray(batch[name], np.float64) for name in ("prompt", "null_prompt"))
  key_noise, key_path, _ = jax.random.split(key, 3)
  normal = lambda key: np.stack([jax.random.normal(jax.random.fold_in(key, i), (2, 3, 4)) for i in range(6)]).astype(np.float64)
  x, sigmas = normal(key_noise), SCHEDULE.sigmas(num_steps, 6)
  total, slopes = np.zeros(6), {"a": np.zeros(4), "b": np.zeros(4), "c": 0.0}
  for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:])):
    v, dt = velocity(p["model"], x, sigma, prompt), after - sigma
    guided = velocity(p[teacher], x, sigma, null) + GUIDANCE * (velocity(p[teacher], x, sigma, prompt) - velocity(p[teacher], x, sigma, null))
    weight, x_next = 1.0, x + dt * v
    if form == "kl":
      s = 0.7 * np.sqrt(sigma / (1 - (sigma if sigma < 1 else after)))
      slope, c = (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt, s * np.sqrt(-dt)
      weight = slope**2 / (2 * c**2)
      x_next = x * (1 + s**2 / (2 * sigma) * dt) + v * slope + c * normal(jax.random.fold_in(key_path, i))
    if i < n:
      off = v - guided
      total += weight * (off**2).mean(axis=(1, 2, 3)) / n
      outer = 2 * weight * off / off[0].size / n / 6
      here = {"a": (outer * x).sum(axis=(0, 1, 2)), "b": outer.sum(axis=(0, 1, 2)), "c": (outer * sigma).sum()}
      slopes = {name: slope + here[name] for name, slope in slopes.items()}
    x = x_next
  np.testing.assert_allclose(per_row, total, rtol=2e-5)
  for name, slope in slopes.items():
    np.testing.assert_allclose(gradient[name], slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max())
  assert list(metrics) == [f"distance_{teacher.removeprefix('teacher_')}"]


def test_at_the_teachers_own_weights_without_guidance_there_is_nothing_to_learn():
  algorithm = distillation(SCHEDULE, guidance=1.0, num_steps=3)
  params = params_of()
  params["model"] = params["teacher_t2i"]
  loss, _ = algorithm.updates[0].loss({"model": params["model"]}, params, Prompted(), batch_of(), jax.random.key(0))
  np.testing.assert_array_equal(loss, 0)
  assert not algorithm.unconditional and distillation(SCHEDULE).unconditional


def test_validation_depends_on_the_sample_alone():
  algorithm, params, batch = distillation(SCHEDULE, num_steps=8), params_of(), batch_of()
  whole, bins = algorithm.validation(params, Prompted(), batch, jax.random.key(0))
  order = np.array([4, 0, 5])
  some, _ = algorithm.validation(params, Prompted(), {name: x[order] for name, x in batch.items()}, jax.random.key(7))
  np.testing.assert_allclose(some["loss"], whole["loss"][order], rtol=1e-6)


def test_settings_that_are_none_are_refused():
  for settings, sentence in (({"teachers": ("t2v",)}, "algorithm.teachers is"),
                             ({"form": "mse"}, "algorithm.form is 'mse': choose one of velocity, kl"),
                             ({"form": "kl", "num_steps": 4, "num_train_steps": 4}, "give 1 to 3 of the 4 steps")):
    with pytest.raises(ValueError, match=sentence):
      distillation(SCHEDULE, **settings)
  algorithm, params = distillation(SCHEDULE, teachers=("t2i",), num_steps=3), params_of()
  with pytest.raises(ValueError, match="the task ti2i, for which algorithm.teachers, t2i, has no teacher"):
    algorithm.updates[0].loss({"model": params["model"]}, params, Prompted(), batch_of(**EDIT), jax.random.key(0))


def test_a_student_comes_near_its_guided_teacher(tmp_path):
  algorithm = distillation(SCHEDULE, teachers=("t2i",), num_steps=4, guidance=2.0, ema_decay=0.0)
  settings = dataclasses.replace(toy.SETTINGS, learning_rate=0.01, schedule="constant", weight_decay=0.0)
  toy.run(toy.Job("pictures", 60, algorithm=algorithm, num_devices=1, settings=settings, save_every=100, eval_every=60), tmp_path)
  rows = read_rows(tmp_path / "toy" / "metrics.jsonl")
  distance = [row["distance_t2i"] for row in rows if "distance_t2i" in row]
  assert np.mean(distance[-10:]) < 0.2 * np.mean(distance[:3])
