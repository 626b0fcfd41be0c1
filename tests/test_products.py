"""Gradients by weights are float32 where activations are bfloat16, in every product and in every weight of the networks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from test_sharded_equality import make_batch, networks

from qimg2 import params as P
from qimg2 import products

CASES = {
    "linear": (functools.partial(products.linear, num_dims=1), (3, 5, 8), (8, 6)),
    "two dimensions": (functools.partial(products.linear, num_dims=2), (3, 5, 2, 4), (2, 4, 6)),
    "window": (functools.partial(products.convolve, stride=1), (2, 6, 4, 8), (3, 3, 8, 6)),
    "window of stride 2": (functools.partial(products.convolve, stride=2), (2, 6, 4, 8), (3, 3, 8, 6)),
}
draw = lambda shape, seed, dtype: jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture(params=CASES)
def case(request):
  product, shape, weight_shape = CASES[request.param]
  return product, draw(shape, 0, jnp.bfloat16), draw(weight_shape, 1, jnp.float32)


def test_the_gradient_is_that_of_the_same_numbers_in_float32(case):
  product, x, weight = case
  y, back = jax.vjp(product, x, weight)
  cotangent = draw(y.shape, 2, jnp.bfloat16)
  by_x, by_weight = back(cotangent)
  exact, exact_back = jax.vjp(product, x.astype(jnp.float32), weight.astype(jnp.bfloat16).astype(jnp.float32))
  exact_by_x, exact_by_weight = exact_back(cotangent.astype(jnp.float32))
  assert (y.dtype, by_x.dtype, by_weight.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  assert reference.relative_error(by_weight, exact_by_weight) < 1e-6  # a rounding to bfloat16 is 2e-3
  assert reference.relative_error(y, exact) < 5e-3 and reference.relative_error(by_x, exact_by_x) < 5e-3


def test_forwards_twice_and_in_batches(case):
  """All that JAX can do with a plain product, with the same numbers."""
  product, x, weight = case
  plain = lambda x, weight: product(x, weight.astype(jnp.bfloat16))
  loss = lambda product: lambda x, weight: jnp.sum(jnp.sin(product(x, weight).astype(jnp.float32)))
  slope = lambda f: lambda x, weight: jax.jvp(f, (x, weight), (x, weight))[1]
  for use in (slope, lambda f: jax.grad(slope(f), 1), lambda f: slope(lambda *args: jnp.sum(jax.grad(f, 1)(*args).astype(jnp.float32) ** 2)),
              lambda f: lambda x, weight: jax.vmap(jax.grad(f, 1), (0, None))(jnp.stack([x, 2 * x]), weight)):
    found, expected = use(loss(product))(x, weight), use(loss(plain))(x, weight)
    assert reference.relative_error(found, expected) < 2e-2
  assert "linear" not in str(jax.make_jaxpr(product)(x.astype(jnp.float32), weight))  # nothing to mend: XLA's own


@pytest.mark.parametrize("stride", [1, 2])
def test_a_large_picture_has_the_gradient_of_a_small_one(stride, monkeypatch):
  """On a CPU by another way: the numbers of XLA's own; another platform's program has no loop in it."""
  monkeypatch.setattr(products, "LARGE", 2 * 32 * 65)
  x, kernel = draw((2, stride * 32, stride * 65, 3), 0, jnp.float32), draw((3, 3, 3, 2), 1, jnp.float32)
  padding = ((1, 1) if stride == 1 else (0, 1),) * 2
  plain = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
  gradient = lambda product: jax.grad(lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel))), (0, 1))
  slope = lambda product: jax.jit(lambda *args: jax.jvp(gradient(product), args, args))  # with the gradient, of which it is the slope
  found, expected = (slope(product)(x, kernel) for product in (functools.partial(products.convolve, stride=stride), plain))
  assert all(reference.relative_error(a, b) < 1e-5 for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)))
  traced = jax.jit(jax.grad(lambda k: jnp.sum(jnp.sin(products.convolve(x, k, stride))))).trace(kernel)
  assert ["while" in traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")] == [True, False, False]


@pytest.mark.slow
def test_no_gradient_of_a_network_is_rounded():
  """Every weight's gradient has numbers that bfloat16 has not; a rounded one has none, whatever was added to it in float32 is seen."""
  nets = networks()
  nets = dataclasses.replace(nets, vae=dataclasses.replace(nets.vae, dim_mult=(2, 2), temporal_downsample=(True,)))
  nets = dataclasses.replace(nets, **{name: dataclasses.replace(getattr(nets, name), dtype="bfloat16") for name in ("model", "encoder", "vae")})
  batch = make_batch("latents")
  noise = np.random.default_rng(3)  # in a fresh network some weights have no gradient
  drawn_by_name = lambda path, p: (0.1 * noise.normal(size=p.shape) + ("norm" in path or "statistics" in path)).astype(p.dtype)
  params = {name: P.map_with_path(drawn_by_name, specs) for name, specs in nets.specs().items()}

  def drawn(weights):
    cond = nets.condition(params, batch)
    return jnp.mean(jnp.square(nets.velocity(weights, batch["latents"], jnp.full(8, 0.5), cond)))

  def rebuilt(weights):
    reconstruction, original, posterior = nets.autoencode(weights, make_batch("pixels")["target"][:2, :8, :8])
    return jnp.mean(jnp.square(reconstruction - original)) + 1e-3 * jnp.mean(posterior.kl())

  for name, loss in (("mmdit", drawn), ("vae", rebuilt)):
    gradient = P.flatten(jax.device_get(jax.jit(jax.grad(loss))(params[name])))
    learning = {path: g for path, g in gradient.items() if np.any(g)}
    assert len(learning) > 10
    rounded = [path for path, g in learning.items() if np.array_equal(g, g.astype(jnp.bfloat16).astype(np.float32))]
    assert not rounded


def test_float32_is_float32_wherever_the_program_runs():
  """A product that says nothing is rounded to bfloat16 on a TPU and to TF32 on a GPU."""
  nets = networks()
  latents, t = jnp.zeros((8, 4, 4, 8)), jnp.zeros(8)
  batch = make_batch("latents")
  precise = {}
  for dtype in ("float32", "bfloat16"):
    own = dataclasses.replace(nets, **{name: dataclasses.replace(getattr(nets, name), dtype=dtype) for name in ("model", "encoder", "vae")})
    specs = {name: P.abstract(tree) for name, tree in own.specs().items()}
    programs = [
        jax.jit(jax.grad(lambda p: jnp.sum(own.velocity(p, latents, t, own.condition({**specs, "mmdit": p}, batch))))).lower(specs["mmdit"]),
        jax.jit(own.decode).lower(specs["vae"], latents), jax.jit(own.encode).lower(specs["vae"], jnp.zeros((8, 64, 64, 3), jnp.uint8)),
        jax.jit(lambda p: own.text_states({"qwen3_vl": p}, make_batch("text"))).lower(specs["qwen3_vl"])]
    lines = [line for program in programs for line in program.as_text().splitlines() if "dot_general" in line or "stablehlo.convolution(" in line]
    precise[dtype] = len(lines), sum("HIGHEST" in line for line in lines)
  assert precise["float32"][0] == precise["float32"][1] > 40
  assert precise["bfloat16"] == (precise["float32"][0], 0)
