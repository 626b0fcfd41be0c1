"""Every back end gives what the definition gives, forward and gradient, for every kind of mask; none holds a square of the sequence."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax._src.cudnn import fused_attention_stablehlo

from benchmarks.attention import compare, make_inputs
from qimg2 import attention, layers, sharding
from qimg2.attention import Mask, chunked, cudnn, splash
from qimg2.attention import xla as definition

# Float32 sums in another order: 24 bits, a few dozen terms.
TOLERANCE = 1e-5
PREFIX, TARGET = 21, 16


def layout(runs, true_length):
  """(block, valid) of one row; `runs` are (block, length) in the prefix."""
  prefix = np.repeat([block for block, _ in runs], [length for _, length in runs])
  block = np.concatenate([prefix, np.full(TARGET, prefix.max() + 1)])
  return block, np.concatenate([np.arange(PREFIX) < true_length, np.ones(TARGET, bool)])


def rows(*layouts):
  return (jnp.asarray(np.stack(parts)) for parts in zip(*layouts))


# Images of 4 and 5 tokens at other places in each row, and padding of other lengths.
MIXED = [layout([(0, 2), (1, 4), (0, 1), (2, 5), (0, 9)], 15), layout([(0, 5), (1, 4), (2, 5), (0, 7)], 14),
         layout([(1, 4), (0, 3), (2, 5), (0, 9)], 21), layout([(0, 1), (1, 4), (0, 6), (2, 5), (0, 5)], 16)]
TEXT = [layout([(0, PREFIX)], length) for length in (21, 3, 1, 12)]


def mask_of(layouts, longest):
  block, valid = rows(*layouts)
  return attention.block_causal(block, valid, PREFIX, longest)


MASKS = {
    "text": (mask_of(TEXT, 0), PREFIX + TARGET), "images": (mask_of(MIXED, 9), PREFIX + TARGET),
    "prefix alone": (attention.block_causal(*(x[:, :PREFIX] for x in rows(*MIXED)), PREFIX, 9), PREFIX),
    "target alone": (Mask(valid=list(rows(*MIXED))[1]), TARGET), "full": (Mask(valid=list(rows(*TEXT))[1]), PREFIX + TARGET),
    "causal": (attention.causal(4, 30), 30), "everything": (Mask(), 19),
}


def arrays(mask, num_queries, heads=4, groups=2, dim=12, dtype=jnp.float32, rows=4):
  """(query, key, value, weight [B, S, 1, 1] of each query in the loss: 0 at padding)."""
  num_keys = num_queries if mask.valid is None else mask.valid.shape[1]
  shapes = (rows, num_queries, heads, dim), (rows, num_keys, groups, dim), (rows, num_keys, groups, dim), (rows, num_queries, heads, dim)
  q, k, v, w = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes))
  real = jnp.ones((rows, num_queries), bool) if mask.valid is None else mask.valid[:, -num_queries:]
  return q, k, v, w * real[..., None, None]


def both(run, mask, arguments):
  """(output where queries are real, gradients) of `run(query, key, value, mask)`."""
  @jax.jit
  def compute(q, k, v, w, mask):
    out, pull = jax.vjp(lambda q, k, v: run(q, k, v, mask), q, k, v)
    return jnp.where(w != 0, out, 0), pull(w)
  return compute(*arguments, mask)


def close(ours, theirs, tolerance=TOLERANCE):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert reference.relative_error(a.astype(jnp.float32), b.astype(jnp.float32)) < tolerance


def xla(q, k, v, mask):
  return attention.attention(q, k, v, mask, "xla")


@functools.cache
def expected(case):
  """What the definition gives for one of the MASKS."""
  mask, num_queries = MASKS[case]
  return jax.device_get(both(xla, mask, arrays(mask, num_queries)))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_the_definition_equals_numpy(num_kv_heads):
  q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 5, 4, 8), (2, 7, num_kv_heads, 8), (2, 7, num_kv_heads, 8)]))
  mask = jax.random.bernoulli(jax.random.key(3), 0.6, (2, 5, 7)).at[:, :, 0].set(True)
  ours = definition.dot_product(q, k, v, mask)
  for b in range(2):
    for h in range(4):
      g = h // (4 // num_kv_heads)
      logits = np.where(mask[b], np.asarray(q[b, :, h] @ k[b, :, g].T) / np.sqrt(8), -np.inf)
      weights = np.exp(logits - logits.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      np.testing.assert_allclose(ours[b, :, h], weights @ np.asarray(v[b, :, g]), atol=1e-5)


def test_block_causal_is_before_or_same_image():
  block, valid = rows(*MIXED)
  place = np.arange(block.shape[1])
  block, valid = np.asarray(block), np.asarray(valid)
  same = (block[:, :, None] == block[:, None, :]) & (block > 0)[:, None, :]
  expected = valid[:, None] & ((place[:, None] >= place) | same)
  found = mask_of(MIXED, 9)
  np.testing.assert_array_equal(attention.dense(found, len(place)), expected)
  assert (np.asarray(found.last)[:, :PREFIX] <= np.minimum(place[:PREFIX] + found.reach, PREFIX - 1)).all()


@pytest.mark.parametrize("backend", ["chunked", "splash", "ring", "cudnn"])
@pytest.mark.parametrize("case", MASKS)
def test_equals_the_definition(case, backend, monkeypatch):
  monkeypatch.setattr(chunked, "CHUNK", 8)  # several, of which the last is padded
  mask, num_queries = MASKS[case]
  arguments = arrays(mask, num_queries)
  # What is there of cuDNN without a GPU: which calls are made, not the kernel.
  run = functools.partial(cudnn.attend, implementation="xla") if backend == "cudnn" else functools.partial(
      attention.attention, backend=backend)
  close(both(run, mask, arguments), expected(case))


@pytest.mark.parametrize("case", MASKS)
def test_cudnn_is_asked_for_nothing_that_it_refuses(case, monkeypatch):
  """A mask that is an array has even lengths: the kernel's backward pass refuses odd ones."""
  run, masks = jax.nn.dot_product_attention, []
  monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, **options: masks.append(options.get("mask")) or run(*args, **options))
  mask, num_queries = MASKS[case]
  cudnn.attend(*arrays(mask, num_queries)[:3], mask, implementation="xla")
  shapes = [one.shape for one in masks if one is not None]
  assert masks and all(size % 2 == 0 for shape in shapes for size in shape[2:])
  assert bool(shapes) == (mask.last is not None and mask.num_prefix > 0 and mask.reach > 0)


@pytest.mark.parametrize("backend", ["splash", "ring", "chunked"])
def test_float32_is_float32_backwards_too(backend):
  """Kernels have backward passes of their own, which know nothing of where the network said so."""
  mask, num_queries = MASKS["images"]
  q, k, v, _ = arrays(mask, num_queries)
  network = layers.full_precision(lambda cfg, *args: jnp.sum(jnp.sin(attention.attention(*args, mask, backend))))
  for dtype, precise in (("float32", True), ("bfloat16", False)):
    config, args = types.SimpleNamespace(dtype=dtype), [x.astype(dtype) for x in (q, k, v)]
    text = str(jax.make_jaxpr(jax.grad(lambda *args: network(config, *args), (0, 1, 2)))(*args))
    products = text.split("dot_general[")[1:]
    assert len(products) >= 6 and {"HIGHEST" in one.partition("] ")[0] for one in products} == {precise}


MESHES = [({"context": 4, "tensor": 2}, "fsdp_tensor"), ({"data": 2, "fsdp": 2, "context": 2}, "fsdp_context"), ({"data": 2, "fsdp": 4}, "fsdp")]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "chunked", "splash", "ring"])
@pytest.mark.parametrize("sizes, rules", MESHES)
def test_parts_equal_the_whole(sizes, rules, backend):
  """37 tokens divide over no mesh axis."""
  mesh = sharding.make_mesh(sizes)
  shard = sharding.make_shard(mesh, sharding.find_rules(rules, mesh))
  for case in ("images", "target alone"):
    mask, num_queries = MASKS[case]
    twice = lambda tree: jax.tree.map(lambda x: np.concatenate([x, x]), tree)
    run = functools.partial(attention.attention, backend=backend, shard=shard)
    close(both(run, twice(mask), twice(arrays(mask, num_queries))), twice(expected(case)))


def test_few_key_heads_stay_whole_with_their_queries():
  shard = sharding.make_shard(sharding.make_mesh({"data": 2, "tensor": 4}), sharding.RULES["fsdp_tensor"])
  mask, num_queries = MASKS["images"]
  arguments = arrays(mask, num_queries)  # 4 heads divide, 2 key heads do not
  close(both(functools.partial(attention.attention, backend="ring", shard=shard), mask, arguments), expected("images"))


@pytest.mark.slow
def test_long_sequences(monkeypatch):
  """Several blocks per row and column, with blocks that are skipped, and of two parts each in the kernel; bfloat16 has 8 bits, and results are
  rounded to it."""
  monkeypatch.setattr(splash, "COMPUTE", 128)
  length, longest = 700, 200
  block = jnp.zeros((2, length), jnp.int32).at[:, 100:300].set(1).at[:, 400:].set(2)
  valid = jnp.arange(length)[None] < jnp.array([310, 400])[:, None]
  mask = attention.block_causal(block, valid | (block == 2), 400, longest)
  arguments = arrays(mask, length, heads=2, groups=1, dtype=jnp.bfloat16, rows=2)
  exact = tuple(x.astype(jnp.float32) for x in arguments)
  theirs = both(xla, mask, exact)
  assert splash.block_sizes(length, length, 400, longest - 1, 12) == (256, 256)
  close(both(functools.partial(attention.attention, backend="splash"), mask, exact), theirs)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(splash, "BLOCKS", (128,))  # six blocks of keys, two at a time backwards
    close(both(functools.partial(attention.attention, backend="splash"), mask, exact), theirs)
  for backend in ("splash", "ring", "chunked"):
    close(both(functools.partial(attention.attention, backend=backend), mask, arguments), theirs, 0.02)


@pytest.mark.parametrize("policy, products", [("none", 7), ("attention", 7), ("dots", 7), ("full", 9)])
def test_chunks_are_computed_as_often_as_said(policy, products):
  """Logits and values, logits again, four for the gradients; a policy that keeps nothing runs the chunk once more."""
  def layer(x, _):
    return x + attention.attention(x, x, x, Mask(), "chunked"), None
  def loss(x):
    return jnp.sum(jax.lax.scan(layers.checkpoint_layer(layer, policy), x, None, length=2)[0])
  text = jax.jit(jax.grad(loss)).lower(jnp.ones((1, 16, 2, 8))).as_text()
  assert text.count("dot_general") == products


def test_the_kernel_skips_what_the_prefix_cannot_see():
  kernel = splash.make_kernel(2, 1024, 1024, 512, 0, 128, 128, 128, 128, True, True)
  visited = int((kernel.fwd_mask_info.block_mask > 0).sum())
  assert visited == 4 * 5 // 2 + 4 * 8  # a triangle, and the target's rows


@pytest.mark.parametrize("queries, keys, prefix, reach, width, blocks", [
    (17408, 17408, 1024, 0, 128, (1024, 1024)),  # 1,024 prompt tokens and a picture of 2048 px
    (2048, 2048, 1024, 0, 128, (512, 512)),  # larger ones would compute a sixth more: much of the prompt's triangle
    (1538, 1538, 1282, 255, 128, (128, 256)),  # an edit of 256 px: padding to 512 would cost a third
    (4096, 4700, 0, 0, 128, (1024, 1024)),  # a target with its cache, 4,700 keys padded to 5,120
    (4096, 4700, 0, 0, 512, (128, 128)),  # heads that fill the vector memory
    (37, 37, 20, 0, 64, (128, 128)),
    (576, 1152, attention.ANYWHERE, attention.ANYWHERE, 128, (128, 256)),  # a device's own queries, where tokens are split
    (5120, 10240, attention.ANYWHERE, attention.ANYWHERE, 128, (1024, 1024)),
])
def test_blocks_are_as_large_as_an_eighth_more_work_allows(queries, keys, prefix, reach, width, blocks):
  assert splash.block_sizes(queries, keys, prefix, reach, width) == blocks


def shapes(jaxpr):
  """Shapes of everything that a program computes, those inside kernels and loops included."""
  for equation in jaxpr.eqns:
    yield from (x.aval.shape for x in equation.outvars)
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from shapes(inner)


def test_chunks_hold_no_square_either():
  block, valid = jnp.zeros((1, 1536), jnp.int32).at[:, 512:].set(1), jnp.ones((1, 1536), bool)
  def loss(q):
    return jnp.sum(attention.attention(q, q, q, attention.block_causal(block, valid, 512, 0), "chunked"))
  found = [sorted(shape)[-2:] for shape in shapes(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((1, 1536, 1, 128))).jaxpr) if len(shape) > 1]
  assert [342, 1536] in found and [256, 512] in found and max(small for small, _ in found) <= chunked.CHUNK


@pytest.mark.parametrize("backend", ["splash", "ring"])
def test_no_square_of_the_sequence_is_held(backend):
  length = 2048
  shard = sharding.make_shard(sharding.make_mesh({"context": 8}), sharding.RULES["fsdp_context"])
  block, valid = jnp.zeros((1, length), jnp.int32).at[:, 512:].set(1), jnp.ones((1, length), bool)
  def loss(q):
    return jnp.sum(attention.attention(q, q, q, attention.block_causal(block, valid, 512, 0), backend, shard))
  found = list(shapes(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((1, length, 1, 128))).jaxpr))
  assert len(found) > 100
  assert not [shape for shape in found if sum(size >= length // 2 for size in shape) > 1]


def test_kernels_are_not_differentiated_forward():
  mask, num_queries = MASKS["images"]
  q, k, v, _ = arrays(mask, num_queries)
  out, tangent = jax.jvp(lambda q: xla(q, k, v, mask), (q,), (jnp.ones_like(q),))
  assert out.shape == tangent.shape and jnp.isfinite(tangent).all()
  close(jax.jvp(lambda q: attention.attention(q, k, v, mask, "chunked"), (q,), (jnp.ones_like(q),)), (out, tangent))
  for backend in ("splash", "ring"):
    with pytest.raises(TypeError, match="custom_vjp"):
      jax.jvp(lambda q: attention.attention(q, k, v, mask, backend), (q,), (jnp.ones_like(q),))


@pytest.mark.parametrize("platform, dtype, head_dim, parts, expected", [
    ("cpu", "float32", 128, 1, "xla"), ("cpu", "bfloat16", 128, 4, "xla"), ("tpu", "bfloat16", 128, 1, "splash"), ("tpu", "float32", 72, 4, "splash"),
    ("cuda", "bfloat16", 128, 1, "cudnn"), ("gpu", "bfloat16", 128, 4, "ring"),
    ("gpu", "float32", 128, 1, "xla"), ("gpu", "bfloat16", 768, 1, "xla")])
def test_auto_follows_the_platform(platform, dtype, head_dim, parts, expected):
  assert attention.resolve("auto", platform, dtype, head_dim, parts) == expected
  assert attention.resolve("auto", platform, dtype, head_dim, parts, 2**18) == ("chunked" if (platform, parts) == ("cpu", 1) else expected)


@pytest.mark.parametrize("backend, platform, dtype, parts, message", [
    ("flash", "cpu", "float32", 1, "Unknown attention_backend 'flash': choose one of auto, xla, chunked, splash, cudnn, ring"),
    ("splash", "gpu", "bfloat16", 1, "is a TPU kernel, but this is a gpu"), ("cudnn", "cpu", "bfloat16", 1, "needs an NVIDIA GPU, but this is a cpu"),
    ("cudnn", "gpu", "float32", 1, "needs a 16-bit dtype"),
    ("cudnn", "gpu", "bfloat16", 2, "and a whole sequence, but there are bfloat16, 64 and 2")])
def test_unusable_back_ends_are_refused(backend, platform, dtype, parts, message):
  with pytest.raises(ValueError, match=message):
    attention.resolve(backend, platform, dtype, 64, parts)


# Rematerialisation.


@pytest.mark.parametrize("policy, times", [("none", 1), ("attention", 1), ("dots", 1), ("full", 2)])
def test_the_kernel_for_gpus_runs_as_often_as_said(policy, times, monkeypatch):
  """Traced, not run: once for the prefix and once for the target, unless a policy keeps nothing."""
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91900)
  monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
  mask = attention.block_causal(jnp.zeros((1, 32), jnp.int32), jnp.arange(32)[None] != 7, 8, 0)

  def layer(x, weight):
    return x + attention.cudnn.attend(layers.linear(x, weight), x, x, mask), None
  def loss(weights):
    return jnp.sum(jax.lax.scan(layers.checkpoint_layer(layer, policy), jnp.ones((1, 32, 2, 64), jnp.bfloat16), weights)[0].astype(jnp.float32))
  text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 64, 64))))
  assert text.count("= dot_product_attention_fwd_wrapper[") == 2 * times and text.count("= dot_product_attention_bwd_wrapper[") == 2


def test_keys_are_put_back_without_atomic_sums():
  mask = Mask(valid=jnp.arange(16)[None] != 5)
  run = jax.jit(jax.grad(lambda k, q: jnp.sum(cudnn.attend(q, k, k, mask, implementation="xla"))))
  text = run.lower(*(jax.random.normal(jax.random.key(seed), (1, 16, 2, 8)) for seed in range(2))).as_text()
  assert text.count('"stablehlo.scatter"(') == text.count("unique_indices = true") > 0


@functools.cache
def gradient(policy, backend):
  """Of three layers that attend, by their weights."""
  mask, num_queries = MASKS["images"]
  q, _, _, w = arrays(mask, num_queries, groups=4)

  def layer(x, weight):
    return x + attention.attention(x @ weight, x, jnp.sin(x @ weight), mask, backend), None
  weights = jax.random.normal(jax.random.key(9), (3, 12, 12)) / 4
  return jax.jit(jax.grad(lambda ws: jnp.sum(w * jax.lax.scan(layers.checkpoint_layer(layer, policy), q, ws)[0])))(weights)


@pytest.mark.slow
@pytest.mark.parametrize("policy, backend", [(policy, backend) for policy in layers.POLICIES for backend in ("xla", "chunked", "ring", "splash")
                                             if (policy, backend) != ("none", "xla")])
def test_policies_change_memory_and_not_numbers(policy, backend, monkeypatch):
  monkeypatch.setattr(chunked, "CHUNK", 8)
  close(gradient(policy, backend), gradient("none", "xla"))


def test_unknown_policies_are_refused():
  with pytest.raises(ValueError, match="Unknown remat policy 'some': choose one of none, full, dots, attention, offload"):
    layers.checkpoint_layer(None, "some")


@pytest.mark.slow
def test_the_benchmark_compares_what_runs_here(capsys):
  rows = compare(*make_inputs(1, 64, 32, 2, 8, "float32"), rounds=1)
  assert [row["name"] for row in rows] == ["xla", "chunked", "splash", "ring"] and "cudnn: " in capsys.readouterr().out
  assert all(row["ms"] > 0 and row["out"] < TOLERANCE and row["gradient"] < TOLERANCE for row in rows)


@pytest.mark.parametrize("kind, products, streamed", [("fwd", 2, 256), ("dkv", 5, 128), ("dq", 3, 256), ("dkv_apart", 4, 128)])
def test_what_a_call_of_the_splash_kernel_costs(kind, products, streamed):
  """Three of 4 x 2 blocks of 32 x 128: 4 heads, 128 queries, 256 keys of width 64, two bytes each."""
  kind, apart = kind.removesuffix("_apart"), "_apart" if kind in ("dq", "dkv_apart") else ""
  text = f'splash_mha_{kind}_segmented.1 metadata={{op_name="jit(step)/splash_3of4x2_3of4x2{apart}/pallas_call"}}'
  operations, again = attention.splash_cost(text, [((4, 128, 64), 2), ((4, 256, 64), 2), ((4, 256, 64), 2)])
  assert operations == products * 2 * 4 * 3 * 32 * 128 * 64
  block = 128 if streamed == 256 else 32
  assert again == max(0, 4 * 3 * 2 * block * 64 * 2 - 2 * 4 * streamed * 64 * 2)
  assert attention.splash_cost("fusion.3 splash_3of4x2_3of4x2", []) is None


def test_the_scope_of_the_kernel_counts_its_blocks():
  mask, _ = MASKS["text"]
  q, k, v, _ = arrays(mask, PREFIX + TARGET)
  lowered = jax.jit(lambda q, k, v: attention.attention(q, k, v, mask, "splash")).lower(q, k, v)
  assert "splash_1of1x1_1of1x1" in lowered.as_text(debug_info=True)
