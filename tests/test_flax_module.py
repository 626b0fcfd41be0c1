"""The Flax face of the generator: the tree, the function and the gradients of `mmdit`, to the bit, in linen and in nnx."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from qimg2 import params as P
from qimg2.flax_module import MMDiT
from qimg2.layout import make_layout
from qimg2.models import mmdit

CFG = mmdit.Config(latent_channels=6, width=48, num_layers=2, num_heads=2, head_dim=24, context_width=20, rope_dims=(8, 8, 8))
SLOT = 9
pytestmark = pytest.mark.slow  # nnx and linen initialise op by op


def inputs(seed=0):
  """Arguments of apply after params: one condition image of 2 x 4 latents in the prompt, a target of 4 x 4."""
  keys = jax.random.split(jax.random.key(seed), 3)
  layout = make_layout(jnp.array([[1, SLOT, SLOT, 2, 3]]), jnp.array([5]), SLOT, [(2, 4)], (4, 4))
  return (jax.random.normal(keys[0], (1, 16, 6)), jnp.array([0.4]), jax.random.normal(keys[1], (1, 5, 20)),
          jax.random.normal(keys[2], (1, 8, 6)), layout)


def moved(params, seed=1):
  """Every weight off its start: some start at zero, which makes blocks the identity."""
  return P.map_with_path(lambda path, x: x + 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), len(path)), x.shape), params)


def loss(velocity):
  return jnp.mean(jnp.square(velocity - 1))


def assert_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), ours, theirs)))


def init(model):
  return jax.jit(model.init)(jax.random.key(0), *inputs())


@pytest.fixture(scope="module")
def variables():
  return init(MMDiT(CFG))


def test_init_gives_the_declared_tree(variables):
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
  assert shapes == {"params": P.abstract(mmdit.specs(CFG))}
  query = variables["params"]["blocks"]["attn"]["q"]
  assert float(jnp.std(query)) == pytest.approx(48**-0.5, rel=0.05) and not variables["params"]["proj_out"].any()


def test_linen_computes_what_the_functions_do(variables):
  model, arguments, params = MMDiT(CFG), inputs(), moved(variables["params"])
  apply = jax.jit(mmdit.apply, static_argnums=0)
  assert_equal(jax.jit(model.apply)({"params": params}, *arguments), apply(CFG, params, *arguments))
  ours = jax.jit(jax.grad(lambda params: loss(model.apply({"params": params}, *arguments))))(params)
  theirs = jax.jit(jax.grad(lambda params: loss(mmdit.apply(CFG, params, *arguments))))(params)
  assert_equal(ours, theirs)
  assert all(bool(x.any()) for x in jax.tree.leaves(ours))


def test_nnx_takes_it():
  arguments = inputs()
  module = nnx.jit(lambda *arguments: nnx.bridge.ToNNX(MMDiT(CFG), rngs=nnx.Rngs(0)).lazy_init(*arguments))(*arguments)
  params = moved(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
  nnx.update(module, params)
  theirs = jax.jit(mmdit.apply, static_argnums=0)(CFG, params, *arguments)
  assert_equal(nnx.jit(lambda module, *arguments: module(*arguments))(module, *arguments), theirs)
  ours = nnx.jit(nnx.grad(lambda module, *arguments: loss(module(*arguments))))(module, *arguments)
  theirs = jax.jit(jax.grad(lambda params, *arguments: loss(mmdit.apply(CFG, params, *arguments))))(params, *arguments)
  assert_equal(nnx.to_pure_dict(ours), theirs)


def test_a_declared_weight_appears_and_moves_no_other_draw(variables, monkeypatch):
  declared = mmdit.specs
  monkeypatch.setattr(mmdit, "specs", lambda cfg: {"added": {"weight": P.Param((3, 2), ("embed", None), P.ones)}, **declared(cfg)})
  assert_equal(init(MMDiT(CFG))["params"], {"added": {"weight": jnp.ones((3, 2))}, **variables["params"]})
  with pytest.raises(flax.errors.ScopeParamNotFoundError, match="added"):
    MMDiT(CFG).apply(variables, *inputs())


def test_boxes_name_the_logical_axes(variables):
  model = MMDiT(CFG, boxed=True)
  boxed = init(model)
  axes = jax.tree.map(lambda p: jax.sharding.PartitionSpec(*p.axes), mmdit.specs(CFG), is_leaf=P.is_param)
  assert nn.get_partition_spec(boxed)["params"] == axes
  assert_equal(nn.unbox(boxed), variables)
  run = jax.jit(model.apply)
  assert_equal(run(boxed, *inputs()), run(variables, *inputs()))
