"""Frozen networks that no step reads are in the host's memory while a stage trains, and come back to draw."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import lora
from data_pipelines.buckets import Bucket
from data_pipelines.cache import Cache
from qimg2.algorithms import Algorithm, Role, Update
from qimg2.runtime.config import parse
from qimg2.runtime.idle import idle_roles, take_off
from qimg2.runtime.rehearsal.steps import Rehearsal

ROLES = {"model": Role("mmdit"), "encoder": Role("qwen3_vl"), "vae": Role("vae")}
METHOD = Algorithm(ROLES, (Update(("model",), None),), deploy=lambda weights: {role.network: weights[name] for name, role in ROLES.items()})


def bucket(feature_width=None):
  cache = None if feature_width is None else Cache("float16", 4, 16, feature_width, 12)
  return Bucket("t2i", 64, 64, (), cache, num_tokens=32, batch_size=8)


def stage(**changes):
  return dataclasses.replace(parse(lora.get_config("smoke")).stages[0], **changes)


def test_who_is_idle_follows_from_what_all_data_hold():
  offloading = stage(offload_frozen=True)
  assert idle_roles(offloading, METHOD, [bucket(8), bucket(8)]) == ("encoder", "vae")
  assert idle_roles(offloading, METHOD, [bucket(8), bucket(0)]) == ("vae",)  # the second holds no states
  assert idle_roles(stage(), METHOD, [bucket(8)]) == ()
  with pytest.raises(ValueError, match=r"stages\[lora\].offload_frozen is for data .* holds pixels: write it anew with launch.cache_latents"):
    idle_roles(offloading, METHOD, [bucket(8), bucket()])


def test_what_is_off_the_devices_comes_back_to_draw():
  weights = {role: {"w": jax.numpy.full(3, number)} for number, role in enumerate(ROLES)}
  frozen = {role: weights[role] for role in ("encoder", "vae")}
  left, drawing = take_off(frozen, ("encoder",), METHOD.deployed)
  assert left["encoder"] == {} and left["vae"] is frozen["vae"]
  drawn = drawing({**left, "model": weights["model"]})
  assert set(drawn) == {"mmdit", "qwen3_vl", "vae"} and drawn["mmdit"] is weights["model"] and drawn["vae"] is frozen["vae"]
  np.testing.assert_array_equal(drawn["qwen3_vl"]["w"], frozen["encoder"]["w"])
  assert drawn["qwen3_vl"]["w"] is not drawn["qwen3_vl"]["w"] and drawn["qwen3_vl"]["w"].sharding == frozen["encoder"]["w"].sharding
  same, deployed = take_off(frozen, (), METHOD.deployed)
  assert same == frozen and set(deployed({**same, "model": weights["model"]})) == set(drawn)


def test_a_rehearsal_takes_the_data_as_cached_and_what_is_idle_as_gone():
  cfg = lora.get_config("smoke")
  cfg.stages[0].offload_frozen = True
  rehearsal = Rehearsal(cfg, jax.devices()[:1])
  config, = rehearsal.cfg.stages
  found, *_ = rehearsal.buckets(config)
  assert found.cache.has_features and set(rehearsal._batch(rehearsal.cfg.stages[0], found, False)) >= {"features", "latents"}
  state, frozen = rehearsal._arrays(rehearsal._stage(config, found, "step"))
  assert frozen["encoder"] == frozen["vae"] == {} and jax.tree.leaves(frozen["model"]) and set(state.params) == {"adapter"}
