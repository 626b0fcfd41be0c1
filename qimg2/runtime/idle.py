"""Frozen networks that no step reads, because the data hold what they give (`launch.cache_latents`): kept in the host's memory while a stage trains.

With `stages[i].offload_frozen` they are on the devices only while sheets and evaluation suites are drawn, one network at a time, beside what training
keeps there. So the generator of 7B with an adapter trains on one chip that its encoder of 8B alone would fill.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from data_pipelines.buckets import Bucket
from qimg2 import sharding
from qimg2.algorithms import Algorithm
from qimg2.runtime.caching import MADE_BY
from qimg2.runtime.config import StageConfig
from qimg2.runtime.offload import Loaded, Offloaded, from_host


def idle_roles(config: StageConfig, algorithm: Algorithm, buckets: Sequence[Bucket]) -> tuple[str, ...]:
  """Frozen roles of a stage that are to be in the host's memory: none unless `config.offload_frozen`.

  Raises:
    ValueError: it is set, but some of the data hold no latents, so that every step reads all networks.
  """
  if not config.offload_frozen:
    return ()
  held = set(MADE_BY).intersection(*(bucket.cache.roles if bucket.cache else () for bucket in buckets))
  if not held:
    raise ValueError(f"config.stages[{config.name}].offload_frozen is for data that hold what frozen networks give, but a data set of the stage "
                     "holds pixels: write it anew with launch.cache_latents --features, or set it to False.")
  networks = {MADE_BY[name] for name in held} - ({"vae"} if algorithm.rollout else set())  # which draws what is scored
  return tuple(role for role in algorithm.frozen if algorithm.roles[role].network in networks)


def take_off(frozen: Mapping[str, Any], roles: Sequence[str], deployed: Callable[[dict], dict]) -> tuple[dict, Callable[[dict], Mapping]]:
  """(weights for the steps, in which `roles` have none; what gives {network: weights} that draw, of the weights that hooks get).

  Args: weights of all frozen roles; which of them leave the devices; the method's `deployed`.
  """
  place = {role: jax.tree.map(lambda x: x.sharding, frozen[role]) for role in roles}
  off = {role: _OnHost(from_host({role: sharding.to_host(frozen[role])}, {role: place[role]}), role) for role in roles}

  def drawing(weights: dict) -> Mapping:
    found = deployed({**weights, **off})
    return Loaded({network: tree.put if isinstance(tree, _OnHost) else lambda tree=tree: tree for network, tree in found.items()})
  return {role: {} if role in roles else tree for role, tree in frozen.items()}, drawing if roles else deployed


class _OnHost:
  """Weights of a role in the host's memory; `put` gives them on the devices, anew each time."""

  def __init__(self, weights: Offloaded, role: str):
    self.put = lambda: weights[role]
