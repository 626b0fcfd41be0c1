"""Advantages: how much better a sample is than others of the same prompt, from one or several rewards.

With P prompts (groups) of G samples each, rewards R_k and their weights w_k in the prompt's category (GDPO, arXiv 2601.05242, without its last
normalisation over the batch; the 2.0-RL report, arXiv 2606.27608):

  A = clip(sum_k w_k (R_k - mean_k) / (deviation_k + eps), -limit, limit),   sum_k w_k = 1                                   (1)

The mean is the group's; the deviation is the group's, or that of the whole batch around its own mean (Flow-GRPO's `global_std`). Deviations are those
of a population. A sample of weight 0, whose reward is missing, is in no mean and no deviation, and its advantage is 0.

A group has spread if the largest and the smallest of any reward that counts differ by more than a threshold. One without says nothing about what is
better, and the division by a deviation near 0 would make something of it: its samples get weight 0. So that a step has as many samples as ever, more
groups may be drawn than are trained: those that have spread come first. What is missing even then stays, with weight 0. A group with one sample of
positive weight, or with none, has no spread.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

OVER = ("group", "batch")


def normalise(reward: jax.Array, weight: jax.Array, over: str = "group", eps: float = 1e-4) -> jax.Array:
  """[P, G] (reward - mean of its group) / (deviation + eps), 0 where `weight` is 0.

  Args:
    reward: [P, G] float32, finite.
    weight: [P, G], 0 for samples that are left out, else 1.
    over: where the deviation is taken, "group" or "batch".
    eps: in the reward's own unit.
  """
  away = (reward - _mean(reward, weight, 1)) * weight
  if over == "group":
    deviation = jnp.sqrt(_mean(jnp.square(away), weight, 1))
  else:
    deviation = jnp.sqrt(_mean(jnp.square(reward - _mean(reward, weight, None)), weight, None))
  return away / (deviation + eps)


def has_spread(reward: jax.Array, weight: jax.Array, threshold: float = 0.0) -> jax.Array:
  """[P] bool, whether the largest and the smallest reward of positive weight differ by more than `threshold`; reward and weight are [P, G]."""
  there = weight > 0
  most, least = jnp.max(jnp.where(there, reward, -jnp.inf), axis=1), jnp.min(jnp.where(there, reward, jnp.inf), axis=1)
  return most - least > threshold  # -inf for a group of nothing


def weigh(weights: tuple[tuple[float, ...], ...], num_rewards: int, category: jax.Array | None, num_groups: int) -> jax.Array:
  """[P, number of rewards] what each reward counts in each group: the category's row of `weights` divided by its sum, or all alike without weights.

  A row of zeros stays one.

  Args:
    weights: as in `Rewards.weights`.
    num_rewards: number of rewards.
    category: [P] int32 index of a row; None, or a single row, for the first.
    num_groups: P.
  """
  table = np.asarray(weights or ((1.0,) * num_rewards,), np.float32)
  table = jnp.asarray(table / np.maximum(table.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny))
  return table[jnp.zeros(num_groups, jnp.int32) if category is None or len(table) == 1 else category]


def combine(rewards: Mapping[str, jax.Array], weight: jax.Array, counts: jax.Array, over: str = "group", eps: float = 1e-4, limit: float = 5.0,
            threshold: float = 0.0) -> tuple[jax.Array, jax.Array]:
  """(advantages [P, G], whether each group has spread [P] bool), equation 1.

  Args:
    rewards: name -> [P, G] float32, in the order of `counts`.
    weight: [P, G], 0 for samples that are left out, else 1.
    counts: [P, number of rewards] w, see `weigh`. A reward that counts 0 in a group is not looked at there.
    over, eps: see `normalise`.
    limit: of the advantage on either side.
    threshold: see `has_spread`.
  """
  total, spread = jnp.zeros_like(weight), jnp.zeros(weight.shape[:1], bool)
  for k, reward in enumerate(rewards.values()):
    own = weight * (counts[:, k, None] > 0)  # where it does not count it was not computed, and its 0 is no value
    total += counts[:, k, None] * normalise(reward, own, over, eps)
    spread |= (counts[:, k] > 0) & has_spread(reward, weight, threshold)
  return jnp.clip(total, -limit, limit), spread


def choose_groups(spread: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
  """(numbers [num] int32 of the groups to train, how many of the first `num` were replaced, int32): those with `spread` [P] first, in their order."""
  order = jnp.argsort(~spread, stable=True)[:num].astype(jnp.int32)
  return order, jnp.sum(spread[order]) - jnp.sum(spread[:num])


def _mean(x: jax.Array, weight: jax.Array, axis: int | None) -> jax.Array:
  """The weighted mean along `axis`, which stays, or of everything; 0 where all weights are 0."""
  total = jnp.sum(weight, axis=axis, keepdims=axis is not None)
  return jnp.sum(x * weight, axis=axis, keepdims=axis is not None) / jnp.maximum(total, 1)
