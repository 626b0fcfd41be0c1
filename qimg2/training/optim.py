"""Optimizers: AdamW on float32 weights with moments in float32, the first in bfloat16 if wanted; clipped by the global norm, under a schedule."""

import dataclasses

import jax
import optax

from qimg2 import params as P

SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of one stage's optimizer.

  Attributes:
    learning_rate: peak rate.
    warmup_steps: steps of linear rise from 0.
    schedule: "constant" after warm-up, or "cosine" or "linear" down to `final_ratio` of the peak at the stage's last step.
    b1, b2, eps, weight_decay: AdamW (arXiv 1711.05101); weight decay is decoupled and leaves vectors (norm weights, biases) alone.
    mu_dtype: type in which the first moment is kept, "float32" or "bfloat16"; the second stays in float32.
    clip_norm: largest global norm of the gradient.
    accumulate: micro-batches per step; each row of a batch belongs to one of them.

  Raises:
    ValueError: an unknown schedule or type, or a number out of its range.
  """
  learning_rate: float = 1e-4
  warmup_steps: int = 0
  schedule: str = "constant"
  final_ratio: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.001
  mu_dtype: str = "float32"
  clip_norm: float = 1.0
  accumulate: int = 1

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(f"optimizer.schedule is {self.schedule!r}: choose one of {', '.join(SCHEDULES)}.")
    if self.mu_dtype not in ("float32", "bfloat16"):
      raise ValueError(f"optimizer.mu_dtype is {self.mu_dtype!r}: choose 'float32' or 'bfloat16'.")
    if self.learning_rate <= 0 or self.clip_norm <= 0 or self.accumulate < 1:
      raise ValueError("optimizer.learning_rate and clip_norm must be above 0 and accumulate at least 1.")


def learning_rate(cfg: Config, num_steps: int) -> optax.Schedule:
  """The rate as a function of the step, for a stage of `num_steps`."""
  rest = max(1, num_steps - cfg.warmup_steps)
  final = cfg.final_ratio * cfg.learning_rate
  after = {
      "constant": lambda: optax.constant_schedule(cfg.learning_rate),
      "cosine": lambda: optax.cosine_decay_schedule(cfg.learning_rate, rest, cfg.final_ratio),
      "linear": lambda: optax.linear_schedule(cfg.learning_rate, final, rest),
  }[cfg.schedule]()
  if not cfg.warmup_steps:
    return after
  # The first step already moves: rate (step + 1) / warmup_steps.
  warmup = optax.linear_schedule(cfg.learning_rate / cfg.warmup_steps, cfg.learning_rate, cfg.warmup_steps - 1 or 1)
  return optax.join_schedules([warmup, after], [cfg.warmup_steps])


def make_optimizer(cfg: Config, num_steps: int, specs: dict) -> optax.GradientTransformation:
  """The optimizer of one role with weights `specs`, for a stage of `num_steps`."""
  decayed = jax.tree.map(lambda p: sum(axis != "layer" for axis in p.axes) > 1, specs, is_leaf=P.is_param)
  return optax.chain(
      optax.clip_by_global_norm(cfg.clip_norm),
      optax.adamw(learning_rate(cfg, num_steps), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decayed,
                  mu_dtype=cfg.mu_dtype))
