"""What methods that learn from their own pictures share: prompts, noise, pictures, and rows to train on.

A batch has P prompts; a rollout draws a group of G pictures for each, side by side. A prompt and its condition images are encoded once, and its G
samples carry the states (`features`, `source_latents`) into the update, which so needs neither text encoder nor VAE: bfloat16 states of M tokens of
width E are 2 M E bytes per sample, 2 MiB for 256 tokens of the 8B encoder. Where the generator lets the prefix be computed apart
(`Networks.shared`), a rollout computes it once for a prompt, and an update once for a sample, whatever the number of steps.

`Rollout.chunks`, parts of the prompts that are drawn one after another, bounds the activations of sampling.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qimg2 import flow, sampler
from qimg2.algorithms import Rewards, advantages
from qimg2.batch import unconditional


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a method draws its own pictures.

  Attributes:
    schedule: gives the times.
    group: G, pictures of each prompt.
    num_steps: T.
    guidance: scale of classifier-free guidance; at most 1 is none.
    shared_noise: whether the pictures of a group begin with the same noise, for an SDE, whose later noise tells them apart.

  Raises:
    ValueError: a number that is out of its range.
  """
  schedule: flow.Schedule
  group: int
  num_steps: int
  guidance: float = 1.0
  shared_noise: bool = False

  def __post_init__(self):
    if self.group < 1 or self.num_steps < 2:
      raise ValueError(f"group={self.group} must be at least 1, and num_steps={self.num_steps} at least 2.")

  @property
  def is_guided(self) -> bool:
    """Whether batches need the unconditional prompt."""
    return self.guidance > 1

  def sigmas(self, latents: Any) -> np.ndarray:
    """[T + 1] times for latents of the shape [..., h, w, C]."""
    return self.schedule.sigmas(self.num_steps, latents.shape[-3] * latents.shape[-2])

  def rows(self, params: dict, nets: Any, batch: dict, key: jax.Array) -> dict:
    """What the P G samples begin with: "prompts", encoded, of P rows; "noise" [P G, h, w, C], a function of the key and of a sample's number, or its
    prompt's; "ids" [P G] int32, these numbers."""
    encode = lambda some: nets.encoded(_frozen(params), some)
    prompts = encode(batch)
    if self.is_guided:
      shared = {name: x for name, x in prompts.items() if name == "source_latents"}
      prompts |= {f"null_{name}": x for name, x in encode({**unconditional(batch), **shared}).items() if name not in shared}
    num, *shape = jax.eval_shape(lambda: nets.target_latents(params, batch)).shape
    ids = jnp.arange(num * self.group)
    begins = ids // self.group if self.shared_noise else ids
    return {"prompts": prompts, "noise": sampler.sample_noise(key, begins, tuple(shape)), "ids": ids}

  def condition(self, params: dict, nets: Any, prompts: dict, latents: jax.Array, guided: bool) -> Any:
    """The condition of encoded prompts for `latents` [B, h, w, C]; of 2B rows, the unconditional ones last, where it is to be `guided`."""
    one = lambda some: nets.condition(_frozen(params), {**some, "latents": latents})
    cond = one(prompts)
    return jax.tree.map(lambda *both: jnp.concatenate(both), cond, one(unconditional(prompts))) if guided else cond

  def begin(self, params: dict, nets: Any, weights: dict, rows: dict, guided: bool) -> Any:
    """The condition of the P G samples of `rows` under the generator's `weights`; `guided` as in `condition`."""
    num = rows["noise"].shape[0] // self.group
    return nets.shared(weights, self.condition(params, nets, rows["prompts"], rows["noise"][:num], guided), self.group)

  def draw(self, params: dict, nets: Any, role: str, batch: dict, key: jax.Array) -> dict:
    """Samples of the ODE under the weights of `role`: "prompts", without the unconditional ones, "latents" [P G, h, w, C] float32 and "pictures"
    [P G, H, W, C] uint8."""
    rows = self.rows(params, nets, batch, key)
    cond = self.begin(params, nets, params[role], rows, self.is_guided)
    latents = sampler.sample(nets.velocity, params[role], rows["noise"], cond, self.sigmas(rows["noise"]), self.guidance)
    return {"prompts": repeat_rows(conditional(rows["prompts"]), self.group), "latents": latents, "pictures": nets.decode(params["vae"], latents)}


@dataclasses.dataclass(frozen=True)
class Scoring:
  """How rewards become advantages, and which samples are trained on; see `qimg2.algorithms.advantages`.

  Attributes:
    rewards: those of the stage.
    group: G.
    deviation: where it is taken, "group" or "batch".
    limit: of advantages on either side.
    min_spread: the spread of rewards that a group must exceed.
    oversample: at least 1; P / oversample groups are trained, rounded down.
    num_minibatches: K.

  Raises:
    ValueError: a setting that is none, or a number out of its range.
  """
  rewards: Rewards
  group: int
  deviation: str
  limit: float
  min_spread: float
  oversample: float
  num_minibatches: int

  def __post_init__(self):
    if self.deviation not in advantages.OVER:
      raise ValueError(f"deviation is {self.deviation!r}: choose one of {', '.join(advantages.OVER)}.")
    if self.group < 2:
      raise ValueError(f"group is {self.group}: an advantage needs at least 2 pictures of a prompt.")
    if self.limit <= 0 or self.min_spread < 0 or self.oversample < 1 or self.num_minibatches < 1:
      raise ValueError("limit must be above 0, min_spread not negative, and oversample and num_minibatches at least 1.")

  def trained(self, samples: dict, names: tuple[str, ...]) -> dict:
    """The rows to train on, of P' groups: `names` of the samples, "advantage" and "weight" [P' G], and, the same in all rows, the shares of the P'
    groups that were "replaced" and that are still "without_spread".

    Args:
      samples: with "rewards", "weight" [P G] and, where rewards count by category, "category" [P G].
      names: of trees of rows.
    """
    grouped = lambda x: x.reshape(-1, self.group, *x.shape[1:])
    rewards = {name: grouped(samples["rewards"][name]) for name in self.rewards.names}
    weight = grouped(samples["weight"])
    category = grouped(samples["category"])[:, 0] if "category" in samples else None
    counts = advantages.weigh(self.rewards.weights, len(rewards), category, weight.shape[0])
    advantage, spread = advantages.combine(rewards, weight, counts, self.deviation, limit=self.limit, threshold=self.min_spread)
    weight, num = weight * spread[:, None], int(weight.shape[0] / self.oversample)
    if num < 1:
      raise ValueError(f"Of {weight.shape[0]} prompts in a batch oversample={self.oversample} leaves none to train on: change it or the batch size.")
    groups, replaced = advantages.choose_groups(spread, num)
    # Where all groups are trained they stay where they are: a gather over devices would move them.
    chosen = lambda x: grouped(x)[groups].reshape(-1, *x.shape[1:]) if num < spread.shape[0] else x
    rows = {name: samples[name] for name in names} | {"advantage": advantage.reshape(-1), "weight": weight.reshape(-1)}
    figures = {"replaced": replaced / num, "without_spread": 1 - jnp.mean(spread[groups])}
    return jax.tree.map(chosen, rows) | {name: jnp.full(num * self.group, x) for name, x in figures.items()}

  def minibatches(self, rows: dict) -> dict:
    """[K, B / K, ...] of `rows` [B, ...], and "first": in the first minibatch the number of those with a row to learn from, over which metrics are
    means, and 0 in the others. Sample s is in minibatch s mod K, with all its steps.

    Raises:
      ValueError: a number of samples that K does not divide.
    """
    num = rows["weight"].shape[0]
    if num % self.num_minibatches:
      raise ValueError(f"{num} samples cannot be divided into num_minibatches={self.num_minibatches}: change it, group or the batch size.")
    data = jax.tree.map(lambda x: x.reshape(-1, self.num_minibatches, *x.shape[1:]).swapaxes(0, 1), rows)  # each is spread over all devices
    some = jnp.sum(jnp.any(data["weight"] > 0, axis=1)).astype(jnp.float32)
    return {**data, "first": jnp.broadcast_to(jnp.where(jnp.arange(self.num_minibatches) == 0, some, 0.0)[:, None], data["weight"].shape)}


def repeat_rows(tree: Any, num: int) -> Any:
  """A tree of arrays [B num, ...] of one [B, ...], with `num` rows side by side in the place of each."""
  return jax.tree.map(lambda x: jnp.repeat(x, num, axis=0), tree)


def of_steps(tree: Any) -> tuple[Any, Callable[[jax.Array], jax.Array]]:
  """(a tree of [B, n, ...] as one of [B n, ...]; the function that takes the means [B] over the n steps of what such rows give)."""
  n = jax.tree.leaves(tree)[0].shape[1]
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree), lambda x: jnp.mean(x.reshape(-1, n), axis=1)


def conditional(prompts: dict) -> dict:
  """Encoded prompts without the unconditional ones, which an update without guidance does not read."""
  return {name: x for name, x in prompts.items() if not name.startswith("null_")}


def _frozen(params: dict) -> dict:
  return {"qwen3_vl": params["encoder"], "vae": params["vae"]}
