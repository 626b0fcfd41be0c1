"""Weights are declared once, and everything else follows from the declaration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qimg2 import params as P

SPECS = {"b": {"w": P.Param((3, 4), ("embed", "mlp"), P.fan_in(3)), "g": P.Param((4,), (None,), P.ones)}, "a": P.Param((2,), (None,))}


def test_flatten_and_count():
  assert list(P.flatten(SPECS)) == ["a", "b/g", "b/w"]
  assert P.count(SPECS) == 2 + 4 + 12


def test_another_weight_changes_no_draw():
  first = P.init(SPECS, jax.random.key(0))
  more = P.init({**SPECS, "aa": P.Param((5,), (None,), P.normal(1.0))}, jax.random.key(0))
  np.testing.assert_array_equal(first["b"]["w"], more["b"]["w"])
  renamed = P.init({"c": SPECS["b"]}, jax.random.key(0))
  assert (renamed["c"]["w"] != first["b"]["w"]).any()


def test_abstract_matches_init():
  shapes, params = P.abstract(SPECS), P.init(SPECS, jax.random.key(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_a_deeper_stack_starts_with_the_same_layers():
  two, four = (P.init(P.stack(SPECS["b"], n), jax.random.key(1)) for n in (2, 4))
  assert P.stack(SPECS["b"], 2)["w"].axes == ("layer", "embed", "mlp")
  np.testing.assert_array_equal(two["w"], four["w"][:2])
  assert (two["w"][0] != two["w"][1]).any()


def test_fan_in_keeps_variance():
  w = P.fan_in(1000)(jax.random.key(0), (1000, 50), jnp.float32)
  x = jax.random.normal(jax.random.key(1), (200, 1000))
  assert 0.9 < float(jnp.std(x @ w)) < 1.1


@pytest.mark.parametrize("shape", [(3, 3, 4, 9), (3, 3, 9, 4)])
def test_delta_orthogonal_keeps_length_one_way(shape):
  w = P.delta_orthogonal(1, 1)(jax.random.key(0), shape, jnp.float32)
  assert np.count_nonzero(np.abs(w).sum((2, 3))) == 1
  tap = w[1, 1]
  gram = tap @ tap.T if shape[2] <= shape[3] else tap.T @ tap
  np.testing.assert_allclose(gram, np.eye(4), atol=1e-5)


def test_wrong_rank_is_named():
  with pytest.raises(ValueError, match=r"shape \(2, 3\) names 1 axes"):
    P.Param((2, 3), ("embed",))
