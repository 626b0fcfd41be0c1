"""A step of a whole stage gives the same on eight devices as on one, whatever the rules, the mesh and the attention back end.

The stage is the generator's: drawing or editing with prompts of different lengths, AdamW with decay and clipping, EMA. In some cases the
frozen encoder with its vision part and the frozen VAE run in the step; in the others, to save the time of compiling them, the batch holds what
they make. Loss (forward), first moments (the clipped gradients) and weights after the step are compared.

Tolerance: everything is float32, and devices add up the same terms in another order. An addition rounds by 6e-8; sums over at most a few
thousand terms and ten layers stay below 1e-5 of a tensor's largest value. Adam divides a gradient by its own size, which would blow up the
rounding of gradients near zero: its eps is set above them, as no test could hold otherwise.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from qimg2 import flow, sharding
from qimg2 import params as P
from qimg2.algorithms.flow_matching import flow_matching
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.models.qwen3_vl_vision import VisionConfig
from qimg2.networks import Networks
from qimg2.training import optim, state

TOLERANCE = 1e-5
SLOT, NUM_SYSTEM, ROWS = 5, 2, 8
CASES = {  # mesh, rules, back end, remat, batch
    "fsdp": ({"data": 2, "fsdp": 4}, "fsdp", "xla", "none", "latents"),
    "all axes": ({"fsdp": 2, "context": 2, "tensor": 2}, "fsdp_sequence", "ring", "attention", "pixels"),
    "text to image": ({"fsdp": 2, "context": 2, "tensor": 2}, "fsdp_tensor", "xla", "none", "text"),
    "sequence": ({"fsdp": 2, "tensor": 4}, "fsdp_sequence", "xla", "dots", "latents"),
    "context 4": ({"fsdp": 2, "context": 4}, "fsdp_context", "ring", "none", "latents"),
    "context gathered": ({"fsdp": 4, "context": 2}, "fsdp_context", "xla", "full", "latents"),
    "context splash": ({"data": 2, "context": 4}, "fsdp_context", "splash", "none", "latents"),
    "replicated": ({"data": 4, "context": 2}, "replicated", "xla", "none", "text"),
}


def networks(backend="xla", remat="none", shard=sharding.identity):
  model = mmdit.Config(latent_channels=8, width=32, num_layers=2, num_heads=4, head_dim=8, context_width=32, rope_dims=(4, 2, 2),
                       attention_backend=backend, remat=remat)
  vision = VisionConfig(width=32, num_layers=2, num_heads=2, mlp_width=64, num_positions=64, out_width=32, deepstack_layers=(0,))
  encoder = qwen3_vl.Config(vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=64,
                            mrope_sections=(4, 2, 2), image_token_id=SLOT, vision=vision, attention_backend=backend)
  autoencoder = vae.Config(base_dim=4, decoder_base_dim=4, num_res_blocks=1, latent_channels=8, image_channels=3, latents_mean=(0.0,) * 8,
                           latents_std=(1.0,) * 8)
  return Networks(model, encoder, autoencoder, NUM_SYSTEM, shard)


def make_batch(kind):
  """Rows with prompts of 9 to 14 tokens, the image slots at other places in each; 64 px targets and condition images, or what becomes of them."""
  rng = np.random.default_rng(0)
  counts = np.array([13, 9, 14, 11, 13, 10, 12, 14])
  tokens = rng.integers(10, 60, (ROWS, 15))
  for row, count in enumerate(counts if kind != "text" else ()):
    start = NUM_SYSTEM + row % (count - NUM_SYSTEM - 3)
    tokens[row, start:start + 4] = SLOT
  batch = {"tokens": tokens.astype(np.int32), "token_count": counts.astype(np.int32)}
  normal = lambda *shape: rng.normal(size=(ROWS, *shape)).astype(np.float32)
  if kind != "pixels":
    sources = {"source_latents": (normal(4, 4, 8),)} if kind == "latents" else {}
    return batch | {"latents": normal(4, 4, 8), "features": normal(13, 32), **sources}
  image = lambda: rng.integers(0, 256, (ROWS, 64, 64, 3)).astype(np.uint8)
  return batch | {"target": image(), "sources": (image(),)}


ALGORITHM = flow_matching(flow.Schedule(), ema_decay=0.9)
OPTIMIZER = optim.Config(learning_rate=0.1, weight_decay=0.01, eps=1e-2, clip_norm=1.0, warmup_steps=0)


def role_specs(nets):
  return ALGORITHM.specs(nets.specs(), nets.compute_dtypes())


@functools.cache
def weights():
  """All roles, random everywhere: a fresh generator predicts zero, and only its last layer has a gradient. To draw networks as they start takes as
  long to compile as a step."""
  rng = np.random.default_rng(3)
  draw = lambda path, p: (0.15 * rng.normal(size=p.shape) + ("norm" in path or "statistics" in path)).astype(p.dtype)
  return {role: P.map_with_path(draw, specs) for role, specs in role_specs(networks()).items()}


def one_step(nets, mesh, rules, kind="latents", accumulate=1, optimizer=OPTIMIZER):
  """(state, metrics) after a step on a mesh, with everything placed as the trainer does."""
  specs = role_specs(nets)
  optimizers = state.make_optimizers(ALGORITHM, {"model": specs["model"]}, optimizer, 10)
  abstract = state.abstract_state(ALGORITHM, optimizers, specs, mesh, rules)
  fresh = state.init_state(ALGORITHM, optimizers, {"model": weights()["model"]}, {}, jax.random.key(7))
  placed = jax.tree.map(lambda x, where: jax.device_put(x, where.sharding), fresh, abstract)
  frozen = {role: jax.device_put(weights()[role], sharding.param_shardings(specs[role], mesh, rules)) for role in ALGORITHM.frozen}
  batch = sharding.put_batch(make_batch(kind), mesh, rules)
  step = jax.jit(state.make_step(ALGORITHM, optimizers, nets, accumulate), out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), None))
  compiled = step.lower(placed, frozen, batch).compile(compiler_options=sharding.compile_options(mesh))
  return jax.block_until_ready(compiled(placed, frozen, batch))  # before another one starts: eight devices wait for each other on two cores


def on_mesh(sizes, rules, backend="xla", remat="none", kind="latents", **options):
  mesh = sharding.make_mesh(sizes)
  rules = sharding.find_rules(rules, mesh)
  return one_step(networks(backend, remat, sharding.make_shard(mesh, rules)), mesh, rules, kind, **options)


@functools.cache
def alone(kind):
  """The same step on one device, without constraints."""
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  return jax.device_get(one_step(networks(), mesh, sharding.RULES["replicated"], kind))


def compare(ours, theirs, tolerance=TOLERANCE):
  for path, theirs_leaf in jax.tree.leaves_with_path(theirs):
    ours_leaf = functools.reduce(lambda tree, key: tree[getattr(key, "key", getattr(key, "idx", None))], path, ours)
    if np.abs(theirs_leaf).max() > 0:
      assert reference.relative_error(ours_leaf, theirs_leaf) < tolerance, jax.tree_util.keystr(path)


def moments(now):
  """The first moments of the generator: a tenth of its clipped gradients."""
  return next(x.mu for x in jax.tree.leaves(now.opt["model"], is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sharded_equals_unsharded(case):
  (now, metrics), (expected, expected_metrics) = on_mesh(*CASES[case]), alone(CASES[case][-1])
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(moments(expected)))  # every weight has a gradient to compare
  for name, value in expected_metrics.items():
    assert float(metrics[name]) == pytest.approx(float(value), rel=TOLERANCE), name
  compare(moments(now), moments(expected))
  compare(now.params, expected.params)
  compare(now.averages, expected.averages)


@pytest.mark.slow
def test_micro_batches_and_a_short_first_moment():
  """Accumulation changes the draws of noise, so it is compared with itself; the first moment in bfloat16 keeps 8 bits of the gradient."""
  options = {"accumulate": 2, "optimizer": optim.Config(learning_rate=0.1, eps=1e-2, mu_dtype="bfloat16", warmup_steps=0)}
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  (now, metrics), (expected, expected_metrics) = on_mesh({"data": 2, "fsdp": 4}, "fsdp", **options), one_step(
      networks(), mesh, sharding.RULES["replicated"], **options)
  assert {x.dtype for x in jax.tree.leaves(moments(now))} == {jnp.dtype("bfloat16")}
  assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=TOLERANCE)
  compare(*(jax.tree.map(lambda x: np.asarray(x, np.float32), moments(one)) for one in (now, expected)), 2**-7)


@pytest.mark.parametrize("rules, sizes", [("fsdp", {"data": 2, "fsdp": 4}), ("fsdp_context", {"fsdp": 4, "context": 2}),
                                          ("fsdp_tensor", {"fsdp": 4, "tensor": 2})])
def test_nothing_large_is_held_twice(rules, sizes):
  """Weights, both moments, EMA and frozen networks: each device holds its part of every matrix of the layers."""
  mesh = sharding.make_mesh(sizes)
  specs = role_specs(networks())
  optimizers = state.make_optimizers(ALGORITHM, {"model": specs["model"]}, OPTIMIZER, 10)
  abstract = state.abstract_state(ALGORITHM, optimizers, specs, mesh, sharding.RULES[rules])
  frozen = P.abstract(specs["encoder"], sharding.param_shardings(specs["encoder"], mesh, sharding.RULES[rules]))
  for tree in (abstract.params, abstract.opt, abstract.averages, frozen):
    large = [x for x in jax.tree.leaves(tree) if x.size >= 32 * 32 and x.ndim >= 3]  # matrices of all layers
    assert large and all(np.prod(x.sharding.shard_shape(x.shape)) <= x.size / 4 for x in large)
