"""Optimizers: AdamW on float32 weights with moments in float32, the first in bfloat16 if wanted; clipped by the global norm, under a schedule.

What sets the learning rate is in the optimizer's state, not in the program: runs and stages that differ in rates alone share one compiled
step. The rate of the n-th update, n from 0, with a peak p, W steps of warm-up, R = max(1, N - W) steps after it and a final share f:

  n < W       p (n + 1) / W                                               the first update already moves
  constant    p
  linear      p + (p f - p) min(n - W, R) / R
  cosine      p ((1 - f) (1 + cos(pi min(n - W, R) / R)) / 2 + f)
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from qimg2 import params as P

SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of one optimizer.

  Attributes:
    learning_rate: peak rate.
    warmup_steps: updates of linear rise from 0.
    schedule: "constant" after warm-up, or "cosine" or "linear" down towards `final_ratio` of the peak, where the update after the last would be.
    b1, b2, eps, weight_decay: AdamW (arXiv 1711.05101); weight decay is decoupled and leaves vectors (norm weights, biases) alone.
    mu_dtype: type in which the first moment is kept, "float32" or "bfloat16"; the second stays in float32.
    gradient_dtype: type in which the gradients of matrices are summed over devices, "float32", or "bfloat16" for half the bytes and a rounding of
      each device's part.
    clip_norm: largest global norm of the gradient.
    accumulate: micro-batches per step; each row of a batch belongs to one of them. One number for all updates of a stage.

  Raises:
    ValueError: an unknown schedule or type, or a number out of its range.
  """
  learning_rate: float = 1e-3
  warmup_steps: int = 20
  schedule: str = "constant"
  final_ratio: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.001
  mu_dtype: str = "float32"
  gradient_dtype: str = "float32"
  clip_norm: float = 1.0
  accumulate: int = 1

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(f"optimizer.schedule is {self.schedule!r}: choose one of {', '.join(SCHEDULES)}.")
    for key in ("mu_dtype", "gradient_dtype"):
      if getattr(self, key) not in ("float32", "bfloat16"):
        raise ValueError(f"optimizer.{key} is {getattr(self, key)!r}: choose 'float32' or 'bfloat16'.")
    if self.learning_rate <= 0 or self.clip_norm <= 0 or self.accumulate < 1 or self.warmup_steps < 0:
      raise ValueError("optimizer.learning_rate and clip_norm must be above 0, accumulate at least 1 and warmup_steps not negative.")


@flax.struct.dataclass
class Rate:
  """A schedule as numbers: `peak`, `warmup` and `rest` (W and R above), `final_ratio`, all float32, and `schedule`, its index in SCHEDULES, int32."""
  peak: jax.Array
  warmup: jax.Array
  rest: jax.Array
  final_ratio: jax.Array
  schedule: jax.Array


@flax.struct.dataclass
class OptState:
  """State of one optimizer: `count`, the updates that it made, int32; its rate; and that of optax's chain, whose second part is AdamW's."""
  count: jax.Array
  rate: Rate
  adam: optax.OptState


def make_rate(cfg: Config, num_updates: int) -> Rate:
  """The schedule of a stage in which the optimizer makes `num_updates`."""
  numbers = (cfg.learning_rate, cfg.warmup_steps, max(1, num_updates - cfg.warmup_steps), cfg.final_ratio)
  return Rate(*(jnp.asarray(number, jnp.float32) for number in numbers), jnp.asarray(SCHEDULES.index(cfg.schedule), jnp.int32))


def learning_rate(rate: Rate, count: jax.Array) -> jax.Array:
  """The rate of the update after `count` others, a float32 scalar."""
  n = jnp.asarray(count, jnp.float32)
  done = jnp.clip(n - rate.warmup, 0, rate.rest) / rate.rest
  cosine = (1 - rate.final_ratio) * (0.5 * (1 + jnp.cos(jnp.pi * done))) + rate.final_ratio
  linear = 1 + (rate.final_ratio - 1) * done
  shape = jnp.select([rate.schedule == SCHEDULES.index("cosine"), rate.schedule == SCHEDULES.index("linear")], [cosine, linear], 1.0)
  return rate.peak * jnp.where(n < rate.warmup, (n + 1) / jnp.maximum(rate.warmup, 1), shape)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The optimizer of one update: pure functions of its state.

  Attributes:
    cfg, num_updates: settings, and how many updates the stage asks of it.
    matrices: {role: tree of bool}, the weights that are no vectors: they decay.
    chain: optax's clipping, AdamW and decay, which `update` computes in one pass. The state has its layout, in checkpoints too.
  """
  cfg: Config
  num_updates: int
  matrices: dict
  chain: optax.GradientTransformation

  def init(self, weights: dict) -> OptState:
    """The state before the first update of `weights`, {role: tree}."""
    return OptState(jnp.zeros((), jnp.int32), make_rate(self.cfg, self.num_updates), self.chain.init(weights))

  def seen(self, weights: dict) -> dict:
    """`weights`, {role: tree}, as a loss is to see them: matrices in the type in which their gradients are summed (`qimg2.products`)."""
    return jax.tree.map(lambda w, is_matrix: w.astype(self.cfg.gradient_dtype) if is_matrix else w, weights, self.matrices)

  def update(self, grads: dict, loss: jax.Array, state: OptState, weights: dict) -> tuple[dict, OptState, dict, jax.Array]:
    """AdamW (arXiv 1711.05101) on the clipped gradient, in one pass over the weights.

    Args:
      grads: the gradient, {role: tree}.
      loss: what it is the gradient of.
      state: the optimizer's.
      weights: {role: tree}.

    Returns:
      (weights, state, metrics, whether the update was made). Where the loss or the gradient's norm is not finite, the first two are the old ones, to
      the bit; the metrics, float32 scalars, are those of the update that was or would have been made.
    """
    cfg, rate = self.cfg, learning_rate(state.rate, state.count)
    clipping, adam, decay = state.adam
    count = adam.count + 1
    norm = global_norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(loss)
    numbers = {"clip": jnp.minimum(1.0, cfg.clip_norm / norm), "rate": rate, "mean": 1 - cfg.b1 ** count, "square": 1 - cfg.b2 ** count}
    leaves, tree = jax.tree.flatten(weights)
    parts = [tree.flatten_up_to(one) for one in (grads, adam.mu, adam.nu, self.matrices)]
    each = [_adamw(cfg.b1, cfg.b2, cfg.eps, cfg.weight_decay if decays else 0.0, good, numbers, w, *moments)
            for w, *moments, decays in zip(leaves, *parts, strict=True)]
    new, mu, nu = (tree.unflatten(leaf[i] for leaf in each) for i in range(3))
    metrics = {"grad_norm": norm, "update_norm": jnp.sqrt(sum(leaf[3] for leaf in each)), "param_norm": jnp.sqrt(sum(leaf[4] for leaf in each)),
               "learning_rate": rate}
    add = lambda x: jnp.where(good, x + 1, x)
    return new, OptState(add(state.count), state.rate, (clipping, optax.ScaleByAdamState(add(adam.count), mu, nu), decay)), metrics, good

  def as_configured(self, state: OptState) -> OptState:
    """`state` with the rate of this optimizer's settings, whatever a checkpoint held."""
    return state.replace(rate=jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), make_rate(self.cfg, self.num_updates), state.rate))


def make_optimizer(cfg: Config, num_updates: int, specs: dict) -> Optimizer:
  """The optimizer of weights declared by `specs`, {role: specs}, for a stage in which it makes `num_updates`."""
  matrices = jax.tree.map(lambda p: sum(axis != "layer" for axis in p.axes) > 1, specs, is_leaf=P.is_param)
  return Optimizer(cfg, num_updates, matrices, optax.chain(
      optax.clip_by_global_norm(cfg.clip_norm), optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.mu_dtype),
      optax.add_decayed_weights(cfg.weight_decay, matrices)))


def global_norm(tree: dict) -> jax.Array:
  """The root of the sum of all squares, float32."""
  return jnp.sqrt(sum(map(_sum_of_squares, jax.tree.leaves(tree))))


# Arrays of one shape share what these are traced and lowered to: a step has one call per array in place of thirty operations.


@jax.jit
def _sum_of_squares(x: jax.Array) -> jax.Array:
  return jnp.sum(jnp.square(x.astype(jnp.float32)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _adamw(b1: float, b2: float, eps: float, decay: float, good: jax.Array, numbers: dict[str, jax.Array], w: jax.Array, g: jax.Array, mu: jax.Array,
           nu: jax.Array) -> tuple[jax.Array, ...]:
  """(weights, first and second moment, sum of the squares of what was added, and of the weights) of one array."""
  g = g * numbers["clip"]
  mean, square = (1 - b1) * g + b1 * mu.astype(jnp.float32), (1 - b2) * jnp.square(g) + b2 * nu
  step = mean / numbers["mean"] / (jnp.sqrt(square / numbers["square"]) + eps)
  step = -numbers["rate"] * (step + decay * w if decay else step)
  new = w + step
  keep = lambda x, old: jnp.where(good, x.astype(old.dtype), old)
  return keep(new, w), keep(mean, mu), keep(square, nu), _sum_of_squares(step), _sum_of_squares(new)
