"""The generator against the published class, and the properties that hold whatever the weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from qimg2 import networks, sharding
from qimg2 import params as P
from qimg2.layout import make_layout
from qimg2.models import mmdit
from qimg2.published import tensors
from qimg2.published.names import mmdit as names

CFG = mmdit.Config(latent_channels=6, width=48, num_layers=3, num_heads=2, head_dim=24, context_width=20, rope_dims=(8, 8, 8))
SLOT = 9
TOLERANCE = 2e-5
apply, compiled_layout = jax.jit(mmdit.apply, static_argnums=0), jax.jit(make_layout, static_argnums=(2, 3, 4))


def make_reference(cfg, seed=0):
  from diffusers import QwenImage21Transformer2DModel
  torch.manual_seed(seed)
  module = QwenImage21Transformer2DModel(
      in_channels=cfg.latent_channels, out_channels=cfg.latent_channels, num_layers=cfg.num_layers, attention_head_dim=cfg.head_dim,
      num_attention_heads=cfg.num_heads, context_in_dim=cfg.context_width, axes_dims_rope=cfg.rope_dims,
      causal_condition=cfg.attention == "block_causal")
  return reference.randomize(reference.rescale(module, seed), seed, 0.2)


def load(cfg, module):
  published = reference.tensors(module)
  return tensors.import_tensors(mmdit.specs(cfg), names.table(cfg), set(published), published.__getitem__)


@functools.cache
def random_params(cfg, seed=0):
  leaves = lambda path, p: 0.15 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), len(path)), p.shape) + ("norm_" in path)
  return jax.jit(lambda: P.map_with_path(leaves, mmdit.specs(cfg)))()


def inputs(cfg, ids, grids, target, seed=0, length=None):
  """(arguments of apply after params, prompt ids) of one sample; places after the prompt hold garbage."""
  rng = np.random.default_rng(seed)
  length = length or len(ids)
  tokens = np.zeros((1, length), np.int32)
  tokens[0, :len(ids)] = ids
  text = rng.normal(size=(1, 64, cfg.context_width)).astype(np.float32)[:, :length]
  text[:, len(ids):] = 1e3
  latents = rng.normal(size=(1, target[0] * target[1], cfg.latent_channels)).astype(np.float32)
  images = rng.normal(size=(1, sum(h * w for h, w in grids), cfg.latent_channels)).astype(np.float32) if grids else None
  layout = compiled_layout(tokens, np.array([len(ids)]), SLOT, tuple(grids), target)
  return latents, jnp.array([(0.37 + 0.1 * seed) % 1], jnp.float32), text, images, layout


CASES = {
    "text": ([1, 2, 3, 4, 5], [], (4, 6)),
    "one_image": ([1, SLOT, SLOT, 2, 3], [(2, 4)], (4, 4)),
    "two_images": ([1, 2, *[SLOT] * 3, 2, *[SLOT] * 2, 5, 6], [(6, 2), (2, 4)], (2, 6)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_matches_the_published_class(case, seed):
  ids, grids, target = CASES[case]
  module = make_reference(CFG, seed)
  latents, t, text, images, layout = inputs(CFG, ids, grids, target, seed)
  slots = [token == SLOT for token in ids] + [True] * (target[0] * target[1] // 4)
  states = latents if images is None else np.concatenate([images, latents], axis=1)
  with torch.no_grad():
    shapes = [[(1, *grid) for grid in (*grids, target)]]
    theirs = module(torch.from_numpy(states), torch.from_numpy(text), torch.from_numpy(np.array(t)), shapes, torch.tensor([slots])).sample
    theirs = theirs.numpy()[:, -latents.shape[1]:]
  ours = apply(CFG, load(CFG, module), latents, t, text, images, layout)
  assert np.std(theirs) > 0.1
  assert reference.relative_error(ours, theirs) < TOLERANCE


@functools.partial(jax.jit, static_argnums=0)
def gradient(cfg, params, *arguments):
  return jax.grad(lambda p: jnp.mean(jnp.square(mmdit.apply(cfg, p, *arguments))))(params)


def loop(body, carry, inputs):
  """What `jax.lax.scan` stands for."""
  outputs = []
  for i in range(len(jax.tree.leaves(inputs)[0])):
    carry, output = body(carry, jax.tree.map(lambda x: x[i], inputs))
    outputs.append(output)
  return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)


@pytest.mark.parametrize("seed", range(3))
def test_loss_gradient_matches_autograd(seed):
  ids, grids, target = list(CASES.values())[seed % len(CASES)]
  module = make_reference(CFG, seed)
  latents, t, text, images, layout = inputs(CFG, ids, grids, target, seed)
  states = torch.from_numpy(latents if images is None else np.concatenate([images, latents], axis=1))
  slots = [token == SLOT for token in ids] + [True] * (latents.shape[1] // 4)
  shapes = [[(1, *grid) for grid in (*grids, target)]]
  out = module(states, torch.from_numpy(text), torch.from_numpy(np.array(t)), shapes, torch.tensor([slots])).sample
  out[:, -latents.shape[1]:].square().mean().backward()
  ours = jax.device_get(gradient(CFG, load(CFG, module), latents, t, text, images, layout))
  for name, x in tensors.export_tensors(ours, mmdit.specs(CFG), names.table(CFG)):
    theirs = module.get_parameter(name).grad.numpy()
    assert reference.relative_error(x, theirs) < 1e-4, name


def test_export_gives_back_the_published_tensors():
  module = make_reference(CFG)
  published = reference.tensors(module)
  exported = dict(tensors.export_tensors(load(CFG, module), mmdit.specs(CFG), names.table(CFG)))
  assert exported.keys() == published.keys()
  for name, x in published.items():
    np.testing.assert_array_equal(exported[name], x, err_msg=name)


def test_full_size_count_and_shapes():
  from diffusers import QwenImage21Transformer2DModel
  cfg = mmdit.Config()
  specs = mmdit.specs(cfg)
  assert P.count(specs) == 7_115_124_736
  with torch.device("meta"):
    module = QwenImage21Transformer2DModel()
  shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
  leaves = P.flatten(specs)
  for path, entry in names.table(cfg).items():
    stacked = "{}" in entry.name
    ours = leaves[path].shape[1:] if stacked else leaves[path].shape
    for i in range(cfg.num_layers if stacked else 1):
      assert shapes.pop(entry.name.format(i)) == entry.shape(ours)
  assert not shapes


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["block_causal", "full"])
@pytest.mark.parametrize("condition_time", ["zero", "shared"])
def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(attention, condition_time):
  cfg = dataclasses.replace(CFG, attention=attention, condition_time=condition_time)
  params = random_params(cfg)
  prompts = [[1, 2], [1, 2, 3, 4, 5, 6], [1, 2, 3]]
  alone = [inputs(cfg, ids, [], (2, 4), seed) for seed, ids in enumerate(prompts)]
  padded = [inputs(cfg, ids, [], (2, 4), seed, length=9) for seed, ids in enumerate(prompts)]
  batch = jax.tree.map(lambda *rows: np.concatenate(rows), *padded)
  together = apply(cfg, params, *batch)
  for row in (0, 1):  # the shortest and the longest
    assert reference.relative_error(together[row], apply(cfg, params, *alone[row])[0]) < 1e-5


def test_prefix_never_sees_the_target(monkeypatch):
  """Block-causal: nothing that the target holds, nor its time, reaches a text token; so a prefix cache is exact."""
  ids, grids, target = CASES["one_image"]
  latents, t, text, images, layout = inputs(CFG, ids, grids, target)
  params = random_params(CFG)
  monkeypatch.setattr(jax.lax, "scan", loop)  # so that what each layer says can be handed out

  @jax.jit
  def states(latents, t):
    seen = []
    mmdit.apply(CFG, params, latents, t, text, images, layout, shard=lambda x, *axes: seen.append(x) or x)
    return seen
  first, second = states(latents, t), states(latents + 1.0, t + 0.3)
  assert len(first) > 3 * CFG.num_layers and any((np.asarray(a)[:, 11:] != np.asarray(b)[:, 11:]).any() for a, b in zip(first, second))
  for a, b in zip(first, second, strict=True):
    np.testing.assert_allclose(a[:, :11], b[:, :11], atol=1e-5)  # 3 text tokens and 8 latents


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_cached_prefix_gives_the_same_velocity(case):
  ids, grids, target = CASES[case]
  params = random_params(CFG)
  batch = [inputs(CFG, ids, grids, target, seed, length=len(ids) + 3) for seed in range(2)]
  latents, t, text, images, layout = jax.tree.map(lambda *rows: np.concatenate(rows), *batch)
  cache = jax.jit(mmdit.prefix_cache, static_argnums=0)(CFG, params, text, images, layout)
  assert cache.key.shape == (CFG.num_layers, 2, layout.index.shape[1], CFG.num_heads, CFG.head_dim)
  cached = jax.jit(mmdit.apply_cached, static_argnums=0)
  for step in (0.0, 0.2):  # one cache for all times and latents
    now = latents + step, t - step
    assert reference.relative_error(cached(CFG, params, *now, cache, layout), apply(CFG, params, *now, text, images, layout)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case, attention", [("text", "block_causal"), ("two_images", "block_causal"), ("one_image", "full")])
def test_rows_that_share_a_prefix_have_the_velocity_and_gradient_of_rows_with_their_own(case, attention):
  """Three rows of each of two prompts; where the prefix sees the target, it is computed for each."""
  ids, grids, target = CASES[case]
  nets = networks.Networks(dataclasses.replace(CFG, attention=attention), None, None, 0)
  batch = [inputs(CFG, ids, grids, target, seed, length=len(ids) + 3) for seed in range(2)]
  _, _, text, images, layout = jax.tree.map(lambda *rows: jnp.concatenate(rows), *batch)
  cond, rng = networks.Condition(text, images, layout), np.random.default_rng(0)
  x, pull = rng.normal(size=(2, 6, *target, CFG.latent_channels)).astype(np.float32)
  t = jnp.linspace(0.1, 0.9, 6)

  def gradient(condition):
    run = lambda params: (lambda v: (jnp.sum(v * pull), v))(nets.velocity(params, x, t, condition(params)))
    return jax.jit(jax.grad(run, has_aux=True))(random_params(CFG))
  (found, v), (wanted, each) = gradient(lambda params: nets.shared(params, cond, 3)), gradient(
      lambda params: jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), cond))
  assert (nets.shared(random_params(CFG), cond).cache is None) == (attention == "full")
  assert reference.relative_error(v, each) < 1e-5
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert np.abs(one - other).max() < 1e-4 * np.abs(other).max()


def test_a_prefix_that_sees_the_target_is_not_cached():
  _, _, text, images, layout = inputs(CFG, *CASES["text"])
  for change in ({"attention": "full"}, {"condition_time": "shared"}):
    with pytest.raises(ValueError, match="can only be cached with"):
      mmdit.prefix_cache(dataclasses.replace(CFG, **change), {}, text, images, layout)


@pytest.mark.slow
def test_scan_equals_a_loop_and_remat_changes_nothing(monkeypatch):
  arguments = inputs(CFG, *CASES["one_image"])
  params = random_params(CFG)
  whole = apply(CFG, params, *arguments)
  plain = gradient(CFG, params, *arguments)
  for remat in ("full", "dots"):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max())),
                 gradient(dataclasses.replace(CFG, remat=remat), params, *arguments), plain)
  with monkeypatch.context() as patch:
    patch.setattr(jax.lax, "scan", loop)
    np.testing.assert_allclose(jax.jit(lambda p: mmdit.apply(CFG, p, *arguments))(params), whole, rtol=1e-4, atol=1e-4)


def test_fresh_network_predicts_zero_and_learns_in_the_output_first():
  arguments = inputs(CFG, *CASES["text"])
  params = P.init(mmdit.specs(CFG), jax.random.key(0))
  assert not apply(CFG, params, *arguments).any()
  learns = jax.jit(jax.grad(lambda p: jnp.sum((mmdit.apply(CFG, p, *arguments) - 1.0) ** 2)))(params)
  assert float(jnp.abs(learns["proj_out"]).max()) > 0


@pytest.mark.slow
def test_sharded_equals_unsharded():
  cfg = dataclasses.replace(CFG, width=64, num_heads=4, head_dim=16, rope_dims=(4, 6, 6), latent_channels=8)
  mesh, rules = sharding.make_mesh({"fsdp": 2, "context": 2, "tensor": 2}), sharding.RULES["fsdp_tensor"]
  ids, grids, target = CASES["one_image"]
  arguments = jax.tree.map(lambda x: jnp.concatenate([x, x]), inputs(cfg, ids[:-1] + [3, 4, 4], grids, target))
  params = random_params(cfg)
  whole = apply(cfg, params, *arguments)
  placed = jax.device_put(params, sharding.param_shardings(mmdit.specs(cfg), mesh, rules))
  parts = jax.jit(lambda p, a: mmdit.apply(cfg, p, *a, shard=sharding.make_shard(mesh, rules)))(placed, arguments)
  assert reference.relative_error(parts, whole) < TOLERANCE


@pytest.mark.parametrize("fields, message", [
    ({"rope_dims": (8, 8, 10)}, "must be even and sum to"), ({"attention": "causal"}, "model.attention is 'causal'"),
    ({"condition_time": "one"}, "model.condition_time is 'one'")])
def test_config_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CFG, **fields)
