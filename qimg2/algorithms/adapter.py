"""Any method with an adapter in place of a network's own weights (LoRA, `qimg2.adapters`).

The role that the method trains is frozen, stored in the type that it computes in, and an adapter of it is trained. The method does not know: what
it reads as that role's weights, in losses, rollouts, validation and `deploy`, is the base with the adapter on, and its averages of the role are
averages of the adapter, each on the same base. A frozen role that starts as the trained one, such as "ref", is the base with the adapter off: no
second copy is kept. Where the config names other weights for such a role it stays a role of its own.

Left out: methods that set weights after the last step (`finalize`), which an adapter cannot hold.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from qimg2 import adapters
from qimg2.algorithms import COMPUTE, Algorithm, Role, Rollout, Update

ADAPTER, BASE = "adapter", "model"  # the role that is trained, and the one that methods train without it


def with_adapter(algorithm: Algorithm, settings: adapters.Settings, own: Collection[str] = (), role: str = BASE) -> Algorithm:
  """`algorithm` that trains an adapter of `role`, as role "adapter" of network "lora/NETWORK".

  Args:
    algorithm: a method that trains all weights of `role`.
    settings: rank, alpha and targets; the rank is at least 1.
    own: frozen roles for which the config names weights of their own, so that they are not the base.
    role: the trained role whose weights become the frozen base.

  Raises:
    ValueError: the method trains no such role, has a role "adapter", or sets weights after the last step.
  """
  if role not in algorithm.trained or ADAPTER in algorithm.roles:
    raise ValueError(f"An adapter takes the place of the trained role {role!r}, but the method trains {', '.join(algorithm.trained)}: set "
                     "adapter.rank to 0.")
  if algorithm.finalize is not None:
    raise ValueError("The method sets weights after its last step, which an adapter cannot hold: set adapter.rank to 0.")
  network = algorithm.roles[role].network
  bases = (role, *(name for name, one in algorithm.roles.items() if name not in own and _is_copy(algorithm, name, one, role)))
  seen = lambda params: _Seen(params, role, bases[1:], algorithm, settings.scale)
  roles = {name: one for name, one in algorithm.roles.items() if name not in bases}
  roles |= {ADAPTER: Role(adapters.PREFIX + network, adapter=settings), role: Role(network, start=algorithm.roles[role].start or role, dtype=COMPUTE)}
  averages = {name: dataclasses.replace(one, role=_renamed(one.role, role)) for name, one in algorithm.averages.items()}
  return dataclasses.replace(
      algorithm, roles=roles, updates=tuple(_with_base(update, role, settings.scale, seen) for update in algorithm.updates), averages=averages,
      rollout=algorithm.rollout and _rollout(algorithm.rollout, seen), validation=_seeing(algorithm.validation, seen),
      deploy=lambda weights: algorithm.deployed(seen(weights)), switched_off=bases[1:])


def _is_copy(algorithm: Algorithm, name: str, one: Role, role: str) -> bool:
  """Whether a frozen role starts with the weights of `role`."""
  return name in algorithm.frozen and one.start == role and one.network == algorithm.roles[role].network


def _renamed(name: str, role: str) -> str:
  return ADAPTER if name == role else name


class _Seen(Mapping):
  """The weights of all roles and averages as the method knows them, each put together when it is asked for."""

  def __init__(self, params: Mapping[str, Any], role: str, off: Collection[str], algorithm: Algorithm, scale: float):
    self._params, self._role, self._off, self._scale = params, role, off, scale
    self._on = {role: ADAPTER} | {name: name for name, average in algorithm.averages.items() if average.role == role}
    self._names = [name for name in (*algorithm.roles, *algorithm.averages) if self._source(name) in params]

  def _source(self, name: str) -> str:
    return self._role if name in self._off else self._on.get(name, name)

  def __getitem__(self, name: str) -> Any:
    weights = self._params[self._source(name)]
    return adapters.adapt(self._params[self._role], weights, self._scale) if name in self._on else weights

  def __contains__(self, name: object) -> bool:
    return name in self._names  # that of Mapping would read the weights

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def _with_base(update: Update, role: str, scale: float, seen: Callable[[Mapping], Mapping]) -> Update:
  """`update` with the adapter in place of `role`, under the same name."""
  def loss(trained, params, nets, batch, key):
    own = {name: weights for name, weights in trained.items() if name != ADAPTER}
    if ADAPTER in trained:
      own[role] = adapters.adapt(params[role], trained[ADAPTER], scale)
    return update.loss(own, seen(params), nets, batch, key)
  return dataclasses.replace(update, roles=tuple(_renamed(name, role) for name in update.roles), loss=loss)


def _rollout(rollout: Rollout, seen: Callable[[Mapping], Mapping]) -> Rollout:
  score = _seeing(rollout.score, seen) if rollout.on_device else rollout.score
  return dataclasses.replace(rollout, generate=_seeing(rollout.generate, seen), score=score, judge=_seeing(rollout.judge, seen))


def _seeing(function: Callable | None, seen: Callable[[Mapping], Mapping]) -> Callable | None:
  """`function(params, ...)`, given the weights as the method knows them; None for None."""
  return function and (lambda params, *rest: function(seen(params), *rest))
