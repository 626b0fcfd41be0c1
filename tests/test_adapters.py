"""Adapters: what they declare, what they compute, and any method with one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qimg2 import adapters, flow, layers, sharding
from qimg2 import params as P
from qimg2.algorithms import COMPUTE, Algorithm, Average, Rewards, Role, Update
from qimg2.algorithms.adapter import with_adapter
from qimg2.models import mmdit, qwen3_vl
from qimg2.published.lora import export_lora, open_lora
from qimg2.published.names import mmdit as mmdit_names
from qimg2.published.names import qwen3_vl as qwen3_vl_names
from qimg2.runtime import methods
from tests.jobs import toy
from tests.jobs.toy_methods import METHODS, Nets, dmd, dpo

CFG = mmdit.Config(latent_channels=4, width=32, num_layers=2, num_heads=4, head_dim=8, rope_dims=(4, 2, 2), context_width=16)
SPECS = mmdit.specs(CFG)
ALL = adapters.Settings(3, 6.0, "*")


def draw(specs, seed):
  """Weights in which nothing is zero."""
  leaves, tree = jax.tree.flatten(specs, is_leaf=P.is_param)
  return tree.unflatten([0.2 * jax.random.normal(jax.random.key(100 * seed + i), p.shape) for i, p in enumerate(leaves)])


def test_what_an_adapter_declares():
  found = P.flatten(adapters.specs(SPECS, adapters.Settings(2, targets="blocks/attn/*, modulation")))
  assert {path: (p.shape, p.axes) for path, p in found.items()} == {
      **{f"blocks/attn/{name}/a": ((2, 32, 2), ("layer", "embed", None)) for name in "qkv"},
      **{f"blocks/attn/{name}/b": ((2, 2, 4, 8), ("layer", None, "heads", None)) for name in "qkv"},
      "blocks/attn/out/a": ((2, 4, 8, 2), ("layer", "heads", None, None)), "blocks/attn/out/b": ((2, 2, 32), ("layer", None, "embed")),
      "modulation/a": ((32, 2), ("embed", None)), "modulation/b": ((2, 4, 32), (None, None, None))}
  drawn = P.init(adapters.specs(SPECS, adapters.Settings(64, targets="blocks/mlp/out")), jax.random.key(0))["blocks"]["mlp"]["out"]
  np.testing.assert_allclose(np.std(drawn["a"]), (1 / (3 * 96)) ** 0.5, rtol=0.05)  # PEFT's
  assert not np.any(drawn["b"]) and not np.array_equal(drawn["a"][0], drawn["a"][1])


@pytest.mark.parametrize("specs, table", [(SPECS, mmdit_names.table(CFG)), (
    qwen3_vl.specs(qwen3_vl.Config(vocab_size=64, image_token_id=1)), qwen3_vl_names.table(qwen3_vl.Config()))])
def test_inputs_are_declared_as_they_are_published(specs, table):
  declared = {path: p.num_inputs for path, p in P.flatten(specs).items() if p.num_inputs}
  assert declared and declared == {path: table[path].num_inputs for path in declared}
  blocks = lambda paths: {path for path in paths if path.startswith("blocks")}
  assert blocks(declared) == blocks(path for path in table if table[path].kind == "linear")


@pytest.mark.parametrize("settings, message", [
    (dict(rank=2, targets="blocks/attn/z"), "adapter.targets names 'blocks/attn/z'.*did you mean 'blocks/attn/.'"),
    (dict(rank=2, targets="blocks/attn/norm_q"), "no linear map of the network has such a path"),
    (dict(rank=-1), "adapter.rank is -1"), (dict(rank=1, targets="blocks/*,"), "adapter.targets is 'blocks/.,'")])
def test_what_cannot_be_adapted_is_named(settings, message):
  with pytest.raises(ValueError, match=message):
    adapters.specs(SPECS, adapters.Settings(**settings))


def generator_inputs():
  key = jax.random.key(5)
  draw_one = lambda number, shape: jax.random.normal(jax.random.fold_in(key, number), shape)
  layout = mmdit.Layout(index=jnp.tile(jnp.arange(3), (2, 1)), positions=jnp.zeros((2, 7, 3), jnp.int32) + jnp.arange(7)[None, :, None],
                        block=jnp.tile(jnp.array([0, 0, 0, 1, 1, 1, 1]), (2, 1)), valid=jnp.ones((2, 7), bool))
  return draw_one(0, (2, 4, 4)), jnp.array([0.3, 0.9]), draw_one(1, (2, 3, 16)), None, layout


def velocity(weights, shard=sharding.identity):
  return mmdit.apply(CFG, weights, *generator_inputs(), shard=shard)


def test_merged_equals_unmerged_in_the_whole_generator_and_zero_is_the_base():
  base, low = draw(SPECS, 1), draw(adapters.specs(SPECS, ALL), 2)
  adapted = adapters.adapt(base, low, ALL.scale)
  apply = jax.jit(velocity)
  plain, on = apply(base), apply(adapted)
  assert np.abs(on - plain).max() > 0.1 * np.abs(plain).max()
  zero = {path: np.zeros(x.shape, x.dtype) if path.endswith("/b") else x for path, x in P.flatten(low).items()}
  tree = {}
  for path, x in zero.items():
    adapters.place_at(tree, path, x)
  np.testing.assert_array_equal(apply(adapters.adapt(base, tree, ALL.scale)), plain)
  assert jax.tree.all(jax.tree.map(np.array_equal, adapters.taken(adapted), low))
  merged = adapters.merge(jax.tree.map(jnp.copy, adapted))
  np.testing.assert_allclose(merged["blocks"]["attn"]["out"][1],
                             base["blocks"]["attn"]["out"][1] + 2 * np.tensordot(low["blocks"]["attn"]["out"]["a"][1],
                                                                                low["blocks"]["attn"]["out"]["b"][1], 1), atol=1e-5)
  np.testing.assert_allclose(apply(merged), on, atol=2e-5)


def test_a_file_that_lacks_layers_is_filled_up_and_learns_everywhere(tmp_path):
  """The first layer's q has no pair, and the second one's k half the rank. The product stays, and what was idle is as in a new adapter."""
  specs = adapters.specs(SPECS, adapters.Settings(2, 2.0, "blocks/attn/q,blocks/attn/k"))
  whole, drawn = draw(specs, 1), P.init(specs, jax.random.key(0))
  pairs = safetensors.numpy.load_file(export_lora(tmp_path / "whole.safetensors", CFG, whole, 1.0, "float32"))
  some = {name: x for name, x in pairs.items() if "blocks.0." not in name or "to_q" not in name}
  some |= {name: np.ascontiguousarray(x[:1] if "lora_A" in name else x[:, :1]) for name, x in some.items() if "blocks.1." in name and "to_k" in name}
  safetensors.numpy.save_file(some, tmp_path / "some.safetensors")
  file = open_lora(tmp_path / "some.safetensors", CFG)
  assert len(file.lacking()) == 2 and not open_lora(tmp_path / "whole.safetensors", CFG).lacking()
  filled = jax.jit(functools.partial(adapters.filled, specs))(file.load(), drawn)["blocks"]["attn"]
  read, new = file.load()["blocks"]["attn"], drawn["blocks"]["attn"]
  for name in ("q", "k"):
    np.testing.assert_array_equal(filled[name]["b"], read[name]["b"])
    assert np.all(np.any(filled[name]["a"] != 0, axis=1))  # layers, rank
  np.testing.assert_array_equal(filled["q"]["a"], np.stack([new["q"]["a"][0], read["q"]["a"][1]]))
  np.testing.assert_array_equal(filled["k"]["a"][1], np.stack([read["k"]["a"][1][:, 0], new["k"]["a"][1][:, 1]], axis=1))
  np.testing.assert_array_equal(filled["k"]["a"][0], read["k"]["a"][0])


def test_the_encoder_s_language_layers_take_an_adapter():
  cfg = qwen3_vl.Config(vocab_size=32, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, mrope_sections=(2, 1, 1),
                        image_token_id=1, vision=None)
  specs = qwen3_vl.specs(cfg)
  base, low = draw(specs, 1), draw(adapters.specs(specs, ALL), 2)
  assert set(low) == {"blocks"} and set(low["blocks"]["attn"]) == {"q", "k", "v", "out"}
  apply = jax.jit(lambda weights: qwen3_vl.apply(cfg, weights, jnp.arange(10).reshape(2, 5) + 2, jnp.array([5, 3])))
  adapted = adapters.adapt(base, low, ALL.scale)
  on = apply(adapted)
  assert np.abs(on - apply(base)).max() > 0.1
  np.testing.assert_allclose(apply(adapters.merge(jax.tree.map(jnp.copy, adapted))), on, atol=1e-4)


def test_a_merge_takes_the_memory_of_the_base_and_adapters_add_up():
  specs, x = {"w": P.Param((8, 8), (None, None), num_inputs=1)}, jnp.eye(8)
  base, one, other = draw(specs, 0), draw(adapters.specs(specs, ALL), 1), draw(adapters.specs(specs, ALL), 2)
  adapted = adapters.adapt(adapters.adapt(base, one, 1.0), other, -2.0)
  expected = base["w"] + one["w"]["a"] @ one["w"]["b"] - 2 * other["w"]["a"] @ other["w"]["b"]
  np.testing.assert_allclose(layers.linear(x, adapted["w"]), expected, atol=1e-6)
  np.testing.assert_allclose(adapters.merge(adapted)["w"], expected, atol=1e-6)
  assert base["w"].is_deleted()
  rows = jax.NamedSharding(jax.make_mesh((8,), ("fsdp",)), jax.P("fsdp"))
  spread = adapters.adapt(jax.device_put(draw(specs, 0), rows), one, 1.0)
  assert adapters.merge(spread)["w"].sharding.is_equivalent_to(rows, 2)


def test_the_gradient_reaches_the_factors_alone_in_bfloat16_too():
  """Against numpy, with factors in float32 and activations and the frozen weight in bfloat16."""
  rng = np.random.default_rng(0)
  x, w, a, b, out = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 6), (6, 2, 3), (6, 2), (2, 2, 3), (5, 2, 3)))
  low = jnp.asarray(x, jnp.bfloat16)
  loss = lambda factors: jnp.sum(layers.linear(low, adapters.Adapted(jnp.asarray(w, jnp.bfloat16), *factors, 2.0)).astype(jnp.float32) * out)
  by_a, by_b = jax.grad(loss)((a, b))
  assert by_a.dtype == by_b.dtype == jnp.float32
  flat, cotangent = b.reshape(2, 6), out.reshape(5, 6)
  np.testing.assert_allclose(by_a, 2 * x.T @ (cotangent @ flat.T), rtol=0.1, atol=0.3)
  np.testing.assert_allclose(by_b.reshape(2, 6), 2 * (x @ a).T @ cotangent, rtol=0.1, atol=0.3)


def test_what_is_saved_for_the_backward_pass_grows_by_the_low_rank_alone():
  """Under the policy "dots" the product with the base is not saved beside its sum with the adapter's."""
  base, low = draw(SPECS, 1), draw(adapters.specs(SPECS, adapters.Settings(1, targets="blocks/*")), 2)
  cfg = dataclasses.replace(CFG, remat="dots")
  inputs = generator_inputs()
  def saved(function, *args):
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)) if x.ndim > 3 and x.shape[0] == 2)
  whole = saved(lambda weights: mmdit.apply(cfg, weights, *inputs), base)
  adapted = saved(lambda low: mmdit.apply(cfg, adapters.adapt(base, low, 1.0), *inputs), low)
  assert 0 < adapted < whole


# Any method.


def test_a_method_with_an_adapter_sees_whole_weights():
  seen = {}
  def loss(trained, params, nets, batch, key):
    seen.update(trained=trained["model"]["w"], params=dict(params))
    return jnp.zeros(2), {}
  roles = {"model": Role("linear"), "ref": Role("linear", start="model", dtype=COMPUTE), "teacher": Role("linear", start="model")}
  whole = Algorithm(roles, (Update(("model",), loss),), {"ema": Average("model", 0.9)}, deploy=lambda weights: {"linear": weights["ema"]})
  method = with_adapter(whole, adapters.Settings(2, 8.0, "w"), own=("teacher",))
  assert method.trained == ("adapter",) and set(method.roles) == {"adapter", "model", "teacher"} and method.averages["ema"].role == "adapter"
  assert method.roles["adapter"].network == "lora/linear" and method.updates[0].name == "model"
  linear = {"w": P.Param((4, 3), (None, None), P.normal(1.0), num_inputs=1), "v": P.Param((3,), (None,))}
  specs = method.specs({"linear": linear}, {"linear": "bfloat16"})
  assert specs["model"]["w"].dtype == jnp.bfloat16 and specs["adapter"]["w"]["a"].dtype == jnp.float32
  params = {role: P.init(tree, jax.random.key(1)) for role, tree in specs.items()} | {"ema": P.init(specs["adapter"], jax.random.key(2))}
  method.updates[0].loss({"adapter": params["adapter"]}, params, None, {}, None)
  assert seen["trained"].base is params["model"]["w"] is seen["params"]["ref"]["w"] and seen["trained"].scale == 4.0
  assert seen["params"]["teacher"] is params["teacher"] and seen["params"]["ema"]["w"].a is params["ema"]["w"]["a"]
  assert method.deployed(params)["linear"]["w"].a is params["ema"]["w"]["a"]
  assert set(method.deployed({name: params[name] for name in ("model", "ema")})["linear"]) == {"w", "v"}, "others are not read"


@pytest.mark.parametrize("make", [dpo, dmd])
def test_the_losses_of_the_first_step_are_those_of_all_weights(make):
  """The adapter is zero, and every role but the trained one that starts as it is the base."""
  nets, batch = Nets(), {name: x[:4] for name, x in toy.points(np.random.default_rng(0)).items()}
  whole = make()
  adapted = with_adapter(whole, adapters.Settings(2, targets="hidden"), own=("fake",))
  losses = []
  for method in (whole, adapted):
    draw = lambda role, tree: P.init(tree, jax.random.key(1)) if role == "adapter" else toy.drawn(tree, 1)
    params = {role: draw(role, tree) for role, tree in method.specs(nets.specs(), {}).items()}
    loss = lambda update: update.loss({role: params[role] for role in update.roles}, params, nets, batch, jax.random.key(2))[0]
    losses.append([loss(update) for update in method.updates])
  np.testing.assert_array_equal(*losses)
  assert set(whole.roles) - set(adapted.roles) == ({"ref"} if make is dpo else {"teacher"})


@pytest.mark.parametrize("name", [name for name, method in methods.METHODS.items() if method.kind == "generator"])
def test_every_method_of_a_generator_takes_an_adapter(name):
  whole = methods.make_algorithm(name, {}, flow.Schedule(), Rewards(("right",), lambda pictures, tasks: {}))
  method = with_adapter(whole, ALL)
  assert method.trained == ("adapter",) and "ref" not in method.roles and "model" in method.frozen and "encoder" in method.frozen
  assert {one.role for one in method.averages.values()} <= {"adapter"} and method.averages.keys() == whole.averages.keys()
  assert set(method.deployed({name: name for name in (*method.roles, *method.averages)} | {"model": {}})) == {"mmdit", "qwen3_vl", "vae"}


@pytest.mark.parametrize("method, message", [
    (METHODS["supervised"](), "sets weights after its last step"), (METHODS["adapter"](), "takes the place of the trained role 'model'")])
def test_what_an_adapter_cannot_do_is_named(method, message):
  with pytest.raises(ValueError, match=message):
    with_adapter(method, adapters.Settings(2, targets="hidden"))
