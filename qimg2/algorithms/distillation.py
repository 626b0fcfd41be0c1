"""On-policy distillation: a student follows its own way from noise to a picture, and a teacher says at points of it what it would have done (2.0-RL
report, arXiv 2606.27608: teachers for drawing and for editing, trained apart by reinforcement, become one model).

With the student's states x_n at the times sigma_n, v its velocity without guidance, v_T the teacher's with classifier-free guidance:

  form "velocity"   loss = mean over steps n and dimensions of (v(x_n) - v_T(x_n))²,   x_n on the student's ODE                            (1)
  form "kl"         loss = mean over steps n of KL(N(mean(v), c²), N(mean(v_T), c²)),  x_n on the student's SDE                            (2)

A step of the SDE has the mean x + b v + ..., linear in v (`qimg2.sde`), so that (2) is (1) with the weight b² / (2 c²) of its step: it asks for more
where a step decides more. The report's sum over all steps is a mean over `num_train_steps` of them here, drawn for each row in proportion to
sigma^step_bias. States are constants: no gradient flows through the way there. As the student learns to follow a guided teacher without guidance of
its own, it draws without guidance ever after: set sampling.guidance to 1.

A batch has one task, drawing (t2i) or editing (ti2i: it has condition images), and each task its teacher: role "teacher_<task>", frozen, whose
weights `frozen` of the stage names, such as frozen=dict(teacher_t2i="stage:rl_t2i:ema", ...). Without such a word a teacher is what the student
starts from. Left out: rewards, which methods with a rollout have; teachers of another architecture than the student's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qimg2 import flow, sampler, sde
from qimg2.algorithms import Algorithm, Update
from qimg2.algorithms.flow_matching import (
  NUM_TIME_BINS,
  VALIDATION_SEED,
  deploy_generator,
  generator_roles,
  model_averages,
  time_bins,
)
from qimg2.algorithms.rollouts import Sampling, of_steps

TASKS = ("t2i", "ti2i")
FORMS = ("velocity", "kl")


def distillation(schedule: flow.Schedule, teachers: tuple[str, ...] = TASKS, form: str = "velocity", num_steps: int = 10, guidance: float = 4.0,
                 num_train_steps: int = 2, step_bias: float = 0.0, kind: str = "flow", eta: float = 0.7, ema_decay: float = 0.999) -> Algorithm:
  """The algorithm that trains role "model" to do without guidance what teachers do with it.

  Args:
    schedule: gives the times of sampling.
    teachers: the tasks that have one, of `TASKS`; the mixture has these tasks alone.
    form: "velocity", equation 1, or "kl", equation 2.
    num_steps: T, of the student's way.
    guidance: the teachers' scale; at most 1 is none.
    num_train_steps: points of the way that a step learns from; the last, to t = 0, is none of them for "kl", because it draws nothing.
    step_bias: 0 draws all points alike, larger ones those of more noise.
    kind, eta: the SDE of form "kl", see `sde.SDE`.
    ema_decay: decay per step of the averaged weights "ema"; 0 keeps none.

  Raises:
    ValueError: a setting that is none, or a number out of its range.
  """
  recipe = _Recipe(Sampling(schedule, 1, num_steps, guidance), sde.SDE(kind, eta), tuple(teachers), form, num_train_steps, step_bias)
  return Algorithm(generator_roles(*(f"teacher_{task}" for task in teachers)), (Update(("model",), recipe.loss),), model_averages(ema_decay),
                   validation=recipe.validation, num_bins=NUM_TIME_BINS, deploy=deploy_generator, unconditional=recipe.sampling.is_guided)


@dataclasses.dataclass(frozen=True)
class _Recipe:
  """The settings of `distillation`, and the functions of its algorithm."""
  sampling: Sampling
  process: sde.SDE
  teachers: tuple[str, ...]
  form: str
  num_train_steps: int
  step_bias: float

  def __post_init__(self):
    if not self.teachers or not set(self.teachers) <= set(TASKS) or len(set(self.teachers)) < len(self.teachers):
      raise ValueError(f"algorithm.teachers is {self.teachers}: give the tasks that have one, of {', '.join(TASKS)}.")
    if self.form not in FORMS:
      raise ValueError(f"algorithm.form is {self.form!r}: choose one of {', '.join(FORMS)}.")
    most = self.sampling.num_steps - (self.form == "kl")
    if not 1 <= self.num_train_steps <= most:
      raise ValueError(f"algorithm.num_train_steps is {self.num_train_steps}: give 1 to {most} of the {self.sampling.num_steps} steps.")

  def loss(self, trained: dict, params: dict, nets: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
    """Equation 1 or 2 of each row, and the squared distance of the velocities by task; see `Update.loss`."""
    key_noise, key_path, key_choice = jax.random.split(key, 3)
    rows = self.sampling.rows(params, nets, batch, key_noise)
    steps = self._steps(rows["noise"])
    possible = jnp.broadcast_to((jnp.arange(self.sampling.num_steps) < self.sampling.num_steps - (self.form == "kl"))[None],
                                (rows["noise"].shape[0], self.sampling.num_steps))
    learned = sde.choose_steps(key_choice, possible, steps.sigma, self.num_train_steps, self.step_bias)
    path, over_steps = of_steps(self._walk(params, nets, rows, steps, possible & (self.form == "kl"), learned, key_path))
    at = steps.at(path.step)
    distance = self._distance(trained["model"], params, nets, batch, rows["prompts"], path.x, at)
    weight = jnp.square(at.slope) / (2 * jnp.square(at.deviation)) if self.form == "kl" else jnp.ones_like(at.sigma)
    return over_steps(weight * distance), {f"distance_{task_of(batch)}": over_steps(distance)}

  def validation(self, params: dict, nets: Any, batch: dict, key: jax.Array) -> tuple[dict, jax.Array]:
    """Equation 1 on held-out prompts, at one point of the ODE each, which the bin of the sample's id gives; see `Algorithm.validation`."""
    bins = time_bins(batch["sample_id"])
    rows = self.sampling.rows(params, nets, batch, key)
    rows["noise"] = sampler.sample_noise(jax.random.key(VALIDATION_SEED), batch["sample_id"], rows["noise"].shape[1:])
    steps, learned = self._steps(rows["noise"]), (bins * self.sampling.num_steps // NUM_TIME_BINS)[:, None]
    path, _ = of_steps(self._walk(params, nets, rows, steps, jnp.zeros((bins.shape[0], self.sampling.num_steps), bool), learned, key))
    return {"loss": self._distance(params["model"], params, nets, batch, rows["prompts"], path.x, steps.at(path.step))}, bins

  def _steps(self, latents: jax.Array) -> sde.Steps:
    return self.process.steps(self.sampling.sigmas(latents))

  def _walk(self, params: dict, nets: Any, rows: dict, steps: sde.Steps, drawn: jax.Array, learned: jax.Array, key: jax.Array) -> sde.Path:
    """The student's states at the steps `learned` [B, n]; the SDE draws the steps `drawn` [B, T]. No gradient flows into them."""
    student = jax.lax.stop_gradient(params["model"])
    cond = self.sampling.begin(params, nets, student, rows, False)

    def policy(x, sigma):
      v = sampler.guided_velocity(nets.velocity, student, x, sigma, cond)
      return v, v
    return sde.sample(policy, rows["noise"], steps, drawn, learned, key, rows["ids"])[1]

  def _distance(self, model: dict, params: dict, nets: Any, batch: dict, prompts: dict, x: jax.Array, at: sde.Steps) -> jax.Array:
    """[B n] mean squared distance of the velocity under `model` from that of the task's teacher, at n states `x` [B n, h, w, C] of each row."""
    task = task_of(batch)
    if task not in self.teachers:
      raise ValueError(f"The mixture has the task {task}, for which algorithm.teachers, {', '.join(self.teachers)}, has no teacher: add it, or leave "
                       "the data set out.")
    num, teacher = batch["sample_id"].shape[0], params[f"teacher_{task}"]
    cond = lambda weights, guided: nets.shared(weights, self.sampling.condition(params, nets, prompts, x[:num], guided), x.shape[0] // num)
    taught = sampler.guided_velocity(nets.velocity, teacher, x, at.sigma, cond(teacher, self.sampling.is_guided), self.sampling.guidance)
    own = nets.velocity(model, x, at.sigma, cond(model, False))
    return sde.row_mean(jnp.square(own - jax.lax.stop_gradient(taught)))


def task_of(batch: dict) -> str:
  """The task of a batch, one of `TASKS`: with condition images, or their latents, it is editing."""
  return "ti2i" if batch.get("sources") or batch.get("source_latents") else "t2i"
