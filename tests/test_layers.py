"""The layers against plain numpy, and rotary embeddings by what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qimg2 import layers, sharding


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("rotate", [layers.rotate_pairs, layers.rotate_halves])
def test_rotary_products_depend_on_distance_alone(rotate):
  q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
  at = lambda position: layers.concat_angles([jnp.full((1, 1), position, jnp.float32)], [8], 100.0)
  product = lambda m, n: float(jnp.sum(rotate(q, at(m)) * rotate(k, at(n))))
  assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
  assert abs(product(7, 3) - product(7, 4)) > 1e-3
  np.testing.assert_allclose(rotate(q, at(0)), q)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_pairs_turn_as_complex_numbers_do(dtype, tolerance):
  """Forward, backward and forward-mode."""
  x, g, angles = normal(2, 3, 4, 8).astype(dtype), normal(2, 3, 4, 8, seed=1).astype(dtype), normal(2, 3, 4, seed=2)
  pairs = lambda y: np.asarray(y, np.float32)[..., ::2] + 1j * np.asarray(y, np.float32)[..., 1::2]
  turn = np.exp(1j * np.asarray(angles))[:, :, None]
  out, pull = jax.vjp(lambda x: layers.rotate_pairs(x, angles), x)
  tangent = jax.jvp(lambda x: layers.rotate_pairs(x, angles), (x,), (g,))[1]
  for ours, theirs in ((out, pairs(x) * turn), (pull(g)[0], pairs(g) * turn.conj()), (tangent, pairs(g) * turn)):
    assert ours.dtype == dtype
    np.testing.assert_allclose(pairs(ours), theirs, atol=tolerance * np.abs(theirs).max())


def test_neighbours_change_places_by_a_product_but_on_a_gpu():
  x = normal(2, 3, 4, 8)
  np.testing.assert_array_equal(layers._swap_places(x), layers._swap_by_product(x))
  np.testing.assert_array_equal(layers._swap_places(x)[..., :2], np.stack([-x[..., 1], x[..., 0]], axis=-1))
  turn = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(layers.rotate_pairs(x, normal(2, 3, 4, seed=2))))))
  products = lambda platform: turn.trace(x).lower(lowering_platforms=(platform,)).as_text().count("dot_general")
  assert products("cuda") == 0 and products("tpu") == products("cpu") == 2


def test_norms():
  x = 5 + 3 * normal(4, 16)
  y = np.asarray(layers.layer_norm(x))
  np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(y.std(-1), 1, atol=1e-4)
  np.testing.assert_allclose(np.square(layers.rms_norm(x, jnp.ones(16))).mean(-1), 1, atol=1e-4)
  assert layers.rms_norm(x.astype(jnp.bfloat16), jnp.ones(16)).dtype == jnp.bfloat16


def test_sinusoid_has_cosines_first():
  features = layers.sinusoid(jnp.array([0.0, 250.0]), 256)
  np.testing.assert_array_equal(features[0], np.repeat([1.0, 0.0], 128))
  angle = 250 * np.exp(-np.log(10_000) * 5 / 128)
  np.testing.assert_allclose(features[1, [5, 133]], [np.cos(angle), np.sin(angle)], atol=1e-4)


def test_remat_policies_change_no_gradient():
  w, x = normal(3, 4, 4), normal(2, 4, seed=1)
  def loss(w, policy):
    step = lambda x, weight: (jnp.tanh(layers.linear(x, weight)), None)
    return jnp.sum(jax.lax.scan(layers.checkpoint_layer(step, policy), x, w)[0])
  plain = jax.grad(loss)(w, "none")
  for policy in ("full", "dots"):
    np.testing.assert_allclose(jax.grad(loss)(w, policy), plain, rtol=1e-5, atol=1e-7)
  with pytest.raises(ValueError, match="Unknown remat policy 'some'"):
    layers.checkpoint_layer(lambda x: x, "some")


@pytest.mark.parametrize("x_shape, shape, num_dims", [((2, 6, 4), (4, 5), 1), ((2, 6, 4), (4, 3, 2), 1), ((2, 6, 3, 2), (3, 2, 5), 2)])
def test_joined_rows_give_the_same_and_copy_no_cotangent(x_shape, shape, num_dims):
  x, w = normal(*x_shape), normal(*shape, seed=1)
  def gradient(join):
    return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(layers.linear(x, w, num_dims, join))), (0, 1)))
  assert layers.linear(x, w, num_dims, True).shape == layers.linear(x, w, num_dims).shape
  for ours, theirs in zip(gradient(True)(x, w), gradient(False)(x, w)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
  text = gradient(True).lower(x, w).compile().as_text()
  assert "lhs_contracting_dims={0}, rhs_contracting_dims={0}" in text  # over the joined rows, as they lie


def test_rows_are_joined_on_a_single_cpu_alone(monkeypatch):
  shard = lambda num: sharding.make_shard(sharding.make_mesh({"fsdp": num}, jax.devices()[:num]), sharding.RULES["fsdp"])
  assert sharding.on_one_cpu(shard(1)) and not sharding.on_one_cpu(shard(2)) and not sharding.on_one_cpu(sharding.identity)
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda: one)
  assert sharding.on_one_cpu(sharding.identity)
