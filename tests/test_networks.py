"""The networks of a run: conditions have the same shapes whatever a batch brings, fingerprints know values, and transparency is white."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import FEATURES, LATENTS, NETS, PIXELS, abstract_batch, is_field

from qimg2 import networks
from qimg2 import params as P


@pytest.mark.parametrize("cached", [LATENTS, FEATURES])
def test_a_cache_changes_no_shape(cached):
  def shapes(fields):
    batch = abstract_batch(fields, 3)
    run = lambda params, batch: (NETS.condition(params, batch), NETS.target_latents(params, batch))
    return jax.eval_shape(run, P.abstract(NETS.specs()), batch)

  cond, target = shapes({name: field for name, field in cached.items() if name != "target"})
  assert (cond, target) == shapes(PIXELS)
  assert target.shape == (3, 4, 2, 4) and target.dtype == jnp.float32
  assert cond.text.shape == (3, 10, 16) and cond.images.shape == (3, 4 + 16, 4)
  assert cond.layout.valid.shape == (3, 10 - 5 + 20 + 8)  # five slots of the prompt give way to 20 latents; the target comes last


def test_no_gradient_flows_into_latents_and_conditions():
  """Not even into networks that a method trains beside the generator."""
  batch = jax.tree.map(lambda field: jnp.ones((1, *field[0]), field[1]), PIXELS, is_leaf=is_field)
  def total(params):
    found = NETS.target_latents(params, batch), NETS.condition(params, batch)
    return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating))
  specs = {name: tree for name, tree in NETS.specs().items() if name != "mmdit"}
  params = jax.tree.map(lambda p: np.full(p.shape, 0.1, np.float32), specs, is_leaf=P.is_param)
  assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(total))(params)))


def test_a_fingerprint_knows_values_and_not_their_type():
  params = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(3)}}
  name = networks.fingerprint(params)
  assert networks.fingerprint(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)) == name
  others = [params | {"a": params["a"].at[0, 1].set(1.5)}, params | {"a": params["a"][:, ::-1]}, params | {"a": params["a"].reshape(3, 2)},
            {"a": params["a"], "d": params["b"]}]
  assert len({name, *map(networks.fingerprint, others)}) == 1 + len(others)


def test_the_statistics_of_latents_start_as_the_config_says():
  found = P.init(networks.vae_specs(NETS.vae)["statistics"], jax.random.key(0))
  np.testing.assert_array_equal(found["mean"], [0.5] * 4)
  np.testing.assert_array_equal(found["std"], [2.0] * 4)


def test_transparency_becomes_white_paper():
  pixels = np.array([[[[200, 100, 0, 255], [200, 100, 0, 0], [0, 0, 0, 51]]]], np.uint8)
  np.testing.assert_array_equal(networks.on_white(jnp.asarray(pixels))[0, 0], [[200, 100, 0], [255, 255, 255], [204, 204, 204]])


def test_a_fingerprint_knows_values_and_not_where_they_lie():
  rng, mesh = np.random.default_rng(0), jax.make_mesh((8,), ("fsdp",))
  drawn = {"conv": {"w": rng.normal(size=(3, 16, 8)), "b": np.zeros(8)}, "out": rng.normal(size=(8, 4)).astype(np.float16)}
  place = lambda tree, *axes: jax.device_put(tree, jax.NamedSharding(mesh, jax.P(*axes)))
  weights = {"conv": place(drawn["conv"]), "out": place(drawn["out"], "fsdp")}
  name = networks.fingerprint(weights)
  assert networks.fingerprint(jax.device_get(weights)) == name
  leaves, tree = jax.tree.flatten(jax.device_get(weights))
  big = max(range(len(leaves)), key=lambda i: leaves[i].size)
  swapped = leaves[big].copy()
  first, last = np.flatnonzero(swapped)[[0, -1]]
  swapped.flat[[first, last]] = swapped.flat[[last, first]]
  assert networks.fingerprint(jax.tree.unflatten(tree, leaves[:big] + [swapped] + leaves[big + 1:])) != name
