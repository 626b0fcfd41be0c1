"""Sections of a config turned into the frozen dataclasses that the program works with, so that a misspelt key fails with a suggestion."""

import dataclasses
import difflib
import functools
import inspect
from typing import Any, TypeVar

from ml_collections import ConfigDict

from qimg2 import flow
from qimg2.algorithms import Algorithm
from qimg2.algorithms.flow_matching import flow_matching
from qimg2.algorithms.reconstruction import reconstruction
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.models.qwen3_vl_vision import VisionConfig

Dataclass = TypeVar("Dataclass")


def plain(value: Any) -> Any:
  """`value` with every ConfigDict as a dict, at any depth."""
  if isinstance(value, (ConfigDict, dict)):
    return {key: plain(item) for key, item in value.items()}
  return tuple(plain(item) for item in value) if isinstance(value, (tuple, list)) else value


def from_section(cls: type[Dataclass], section: Any, where: str) -> Dataclass:
  """A frozen dataclass from a config section.

  Raises:
    ValueError: a key that the dataclass does not have, with the nearest that it has.
  """
  values = plain(section)
  _check_keys(values, [field.name for field in dataclasses.fields(cls)], where)
  return cls(**values)


def _check_keys(values: dict, names: list[str], where: str) -> None:
  for key in values:
    if key not in names:
      near = difflib.get_close_matches(key, names, 1)
      raise ValueError(f"config.{where} has no key {key!r}" + (f": did you mean {near[0]!r}?" if near else f": it has {', '.join(names)}."))


def check_is_run(cfg: ConfigDict) -> None:
  """Raises `ValueError` for a config file that is none of a run."""
  missing = [key for key in ("stages", "model", "data_dir", "mesh") if key not in cfg]
  if missing or not cfg.stages:
    raise ValueError(f"--config is none of a run: it has no {missing[0] if missing else 'stages'}; take one such as configs/quickstart.py.")


def model_configs(cfg: ConfigDict) -> tuple[mmdit.Config, qwen3_vl.Config, vae.Config]:
  """The three networks' configs.

  Raises:
    ValueError: sizes that do not fit each other.
  """
  model = from_section(mmdit.Config, cfg.model, "model")
  encoder = encoder_config(cfg.encoder)
  autoencoder = from_section(vae.Config, cfg.vae, "vae")
  if model.context_width != encoder.width:
    raise ValueError(f"config.model.context_width is {model.context_width}, but config.encoder.width is {encoder.width}: make them equal.")
  if model.latent_channels != autoencoder.latent_channels:
    raise ValueError(f"config.model.latent_channels is {model.latent_channels}, but config.vae.latent_channels is "
                     f"{autoencoder.latent_channels}: make them equal.")
  return model, encoder, autoencoder


def encoder_config(section: ConfigDict) -> qwen3_vl.Config:
  """The condition encoder's config; `vision` is a section of its own, None for a text-only encoder, or absent for the published one."""
  values = dict(plain(section))
  if values.get("vision") is not None:
    values["vision"] = from_section(VisionConfig, values["vision"], "encoder.vision")
  return from_section(qwen3_vl.Config, values, "encoder")


def make_algorithm(section: ConfigDict, schedule: flow.Schedule) -> Algorithm:
  """The algorithm that a stage names, with its settings."""
  settings = dict(plain(section))
  name = settings.pop("name")
  methods = {"flow_matching": functools.partial(flow_matching, schedule), "reconstruction": reconstruction}
  if name not in methods:
    raise ValueError(f"Unknown algorithm {name!r}: choose one of {', '.join(methods)}.")
  _check_keys(settings, list(inspect.signature(methods[name]).parameters), "algorithm")
  return methods[name](**settings)
