"""The training methods that a stage can name, and what the runtime asks of a method.

A method's kind says what a stage of it makes, and by that which hooks it has, which sheets the report shows and whether it can be sampled from:
an "autoencoder" gives a VAE, a "generator" what draws pictures. Nothing else in the runtime guesses that from the names of roles.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from qimg2 import flow
from qimg2.algorithms import Algorithm, Rewards
from qimg2.algorithms.adapter import with_adapter
from qimg2.algorithms.diffusion_nft import diffusion_nft
from qimg2.algorithms.distillation import distillation
from qimg2.algorithms.dpo import dpo, online_dpo
from qimg2.algorithms.flow_grpo import flow_grpo
from qimg2.algorithms.flow_matching import flow_matching
from qimg2.algorithms.reconstruction import reconstruction

KINDS = ("autoencoder", "generator")
GIVEN = ("schedule", "rewards")  # arguments of a constructor that are the run's, not the stage's


@dataclasses.dataclass(frozen=True)
class Method:
  """A method's kind, one of `KINDS`, and the function that makes its `Algorithm` of a stage's settings."""
  kind: str
  make: Callable[..., Algorithm]

  def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """(name -> type, name -> default) of what a stage may set."""
    hints = typing.get_type_hints(self.make)
    parameters = {name: one for name, one in inspect.signature(self.make).parameters.items() if name not in GIVEN}
    defaults = {name: one.default for name, one in parameters.items() if one.default is not one.empty}
    return {name: hints.get(name, Any) for name in parameters}, defaults

  @property
  def takes_rewards(self) -> bool:
    """Whether a stage of it may have rewards."""
    return "rewards" in inspect.signature(self.make).parameters

  @property
  def needs_rewards(self) -> bool:
    """Whether a stage of it must have some."""
    return self.takes_rewards and inspect.signature(self.make).parameters["rewards"].default is inspect.Parameter.empty


METHODS = {
    "flow_matching": Method("generator", flow_matching),
    "reconstruction": Method("autoencoder", reconstruction),
    "dpo": Method("generator", dpo),
    "online_dpo": Method("generator", online_dpo),
    "distillation": Method("generator", distillation),
    "flow_grpo": Method("generator", flow_grpo),
    "diffusion_nft": Method("generator", diffusion_nft),
}


def make_algorithm(name: str, settings: Mapping[str, Any], schedule: flow.Schedule, rewards: Rewards | None = None) -> Algorithm:
  """The algorithm of the method `name` with a stage's settings, and with the run's schedule and the stage's rewards where it asks for them."""
  make = METHODS[name].make
  given = {"schedule": schedule, "rewards": rewards}
  return make(**{key: value for key, value in given.items() if key in inspect.signature(make).parameters}, **settings)


def stage_algorithm(stage: Any, schedule: flow.Schedule, rewards: Rewards | None = None) -> Algorithm:
  """The algorithm of a stage (`qimg2.runtime.config.StageConfig`) with its rewards, and with its adapter where it has one.

  Raises:
    ValueError: settings that the method refuses, or a method that can have no adapter.
  """
  algorithm = make_algorithm(stage.algorithm.name, stage.algorithm.settings, schedule, rewards)
  return with_adapter(algorithm, stage.adapter, stage.frozen) if stage.adapter.rank else algorithm
