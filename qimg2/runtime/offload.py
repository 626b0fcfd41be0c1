"""Weights that are read when they are asked for, and such as are on the devices only while their network runs, for devices that cannot hold all three
networks at once."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np


class Loaded(Mapping):
  """Weights by name, loaded at each look-up. Which names there are is known without."""

  def __init__(self, loaders: Mapping[str, Callable[[], Any]]):
    """Args: name -> what loads its weights."""
    self._loaders = dict(loaders)

  def __getitem__(self, name: str) -> Any:
    return self._loaders[name]()

  def __contains__(self, name: object) -> bool:
    return name in self._loaders  # that of Mapping would load it

  def __iter__(self) -> Iterator[str]:
    return iter(self._loaders)

  def __len__(self) -> int:
    return len(self._loaders)


class Offloaded(Loaded):
  """{network: weights}; each look-up puts the weights onto the devices anew, and keeps nothing of them: from files, which the system keeps in memory
  while it has room, or from the host."""


def from_host(arrays: Mapping[str, Any], shardings: Mapping[str, Any]) -> Offloaded:
  """Weights {network: tree of numpy arrays} that go onto the devices with `shardings`, trees of the same structure."""
  place = lambda x, where: jax.make_array_from_callback(np.shape(x), where, lambda index: x[index])
  return Offloaded({name: lambda name=name: jax.tree.map(place, arrays[name], shardings[name]) for name in arrays})
