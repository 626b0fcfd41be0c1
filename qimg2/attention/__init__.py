"""Attention behind one function, with a back end for each kind of device.

Who sees whom is described once, in memory that grows with the sequence and not with its square, by `Mask`: the last key that each query sees
and which keys are real. Block-causal attention has this form, because text is causal and an image lies in one run of places: a text token
sees up to itself, an image token up to the end of its image, the target everything. Each back end makes of it what it needs.

  xla      the definition, on every device; the only one that can be differentiated forward (jax.jvp)
  splash   the Pallas kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention); it skips blocks that nobody sees and never holds
           all logits. On a CPU it runs interpreted: for tests
  cudnn    the fused kernel for NVIDIA GPUs, in 16-bit types; prefix and target are two calls
  ring     for sequences split over the mesh axis `context`: keys and values go round the devices while a running softmax adds up
           (arXiv 2310.01889), and go round again in the backward pass

With a mesh, each back end but xla runs on a device's own rows, heads and tokens (`jax.shard_map`); splash gathers keys and values over
`context`, ring passes them on. Letters: B batch, S queries, T keys, H heads, G key/value heads, K head dim.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding, PartitionSpec

from qimg2 import layers
from qimg2.sharding import Shard, identity

BACKENDS = ("auto", "xla", "splash", "cudnn", "ring")
SAVED = "attention"  # name of the result, and of the softmax's normaliser, for rematerialisation policies
LANES = 128  # of a TPU's vector unit
GPUS = ("gpu", "cuda")
CUDNN_HEAD_DIM = 128
ANYWHERE = 2**29  # beyond every place
HIDDEN = float(jnp.finfo(jnp.float32).min)  # the logit of what a query does not see


@flax.struct.dataclass
class Mask:
  """Who sees whom: query s sees key t if t <= last[s] and valid[t]. Without arguments everyone sees everything.

  Attributes:
    last: [B, S] int32, place of the last key that a query sees; None: all keys.
    valid: [B, T] bool, False for padding; None: no padding.
    num_prefix: so many queries at the start see keys before `num_prefix` only; those after them see all. 0 without `last`.
    reach: `last` of a query in the prefix is at most its own place plus this; 0 for causal attention.
  """
  last: jax.Array | None = None
  valid: jax.Array | None = None
  num_prefix: int = flax.struct.field(pytree_node=False, default=0)
  reach: int = flax.struct.field(pytree_node=False, default=0)


def causal(batch: int, length: int) -> Mask:
  """Every token sees itself and what comes before it. Padding on the right needs nothing more."""
  return Mask(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)), None, length, 0)


def block_causal(block: jax.Array, valid: jax.Array, num_prefix: int, longest: int) -> Mask:
  """A token sees what comes before it and all of its own block; padding is seen by nobody.

  Args:
    block: [B, S] int32, number of the block, 0 for text; a block lies in one run, and all after `num_prefix` is one.
    valid: [B, S] bool.
    num_prefix: tokens before the target.
    longest: bound on the length of a block in the prefix, at most which is skipped; 0 or 1 for text alone.
  """
  place = jnp.arange(block.shape[1], dtype=jnp.int32)
  ends = jnp.concatenate([block[:, 1:] != block[:, :-1], jnp.ones_like(block[:, :1], bool)], axis=1)
  last = jax.lax.cummin(jnp.where(ends | (block == 0), place, block.shape[1]), axis=1, reverse=True)
  return Mask(last, valid, num_prefix, max(0, longest - 1))


def dense(mask: Mask, num_keys: int) -> jax.Array | None:
  """`mask` as a bool array [B, S or 1, T], True where a query sees a key; None if everyone sees everything."""
  seen = None if mask.last is None else jnp.arange(num_keys)[None, None] <= mask.last[:, :, None]
  if mask.valid is None:
    return seen
  return mask.valid[:, None] if seen is None else seen & mask.valid[:, None]


def check_backend(name: str) -> str:
  """`name`, if there is such a back end.

  Raises:
    ValueError: there is none.
  """
  if name not in BACKENDS:
    raise ValueError(f"Unknown attention_backend {name!r}: choose one of {', '.join(BACKENDS)}.")
  return name


def resolve(backend: str, platform: str, dtype: Any, head_dim: int, parts: int = 1) -> str:
  """The back end that runs: "auto" is splash on a TPU; on a GPU ring for a split sequence, else cudnn where it can; else xla.

  Args:
    backend: one of `BACKENDS`.
    platform: "cpu", "gpu", "cuda" or "tpu".
    dtype: of queries, keys and values.
    head_dim: K.
    parts: over how many devices the sequence is split.

  Raises:
    ValueError: an unknown back end, or one that cannot run here.
  """
  fused = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= CUDNN_HEAD_DIM
  if check_backend(backend) == "auto":
    on_gpu = "ring" if parts > 1 else "cudnn" if fused else "xla"
    return "splash" if platform == "tpu" else on_gpu if platform in GPUS else "xla"
  if backend == "splash" and platform not in ("tpu", "cpu"):
    raise ValueError(f"attention_backend 'splash' is a TPU kernel, but this is a {platform}: choose 'auto', 'xla' or 'cudnn'.")
  if backend == "cudnn" and platform not in GPUS:
    raise ValueError(f"attention_backend 'cudnn' needs an NVIDIA GPU, but this is a {platform}: choose 'auto' or 'xla'.")
  if backend == "cudnn" and (parts > 1 or not fused):
    raise ValueError(f"attention_backend 'cudnn' needs a 16-bit dtype, a head dim that is a multiple of 8 and at most {CUDNN_HEAD_DIM}, and a whole "
                     f"sequence, but there are {jnp.dtype(dtype).name}, {head_dim} and {parts} parts: choose 'auto', 'xla' or 'ring'.")
  return backend


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask = Mask(), backend: str = "auto", shard: Shard = identity) -> jax.Array:
  """Scaled dot-product attention [B, S, H, K] with scale 1/sqrt(K) and softmax in float32.

  What a query gets that sees no key at all is finite and otherwise undefined.

  Args:
    query: [B, S, H, K].
    key, value: [B, T, G, K]; G divides H, and each of them serves H/G query heads.
    mask: who sees whom.
    backend: one of `BACKENDS`.
    shard: constrains activations to the mesh; says where the arrays lie.

  Raises:
    ValueError: as `resolve`.
  """
  mesh = getattr(shard, "mesh", None)
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  parts = 1 if mesh is None else shard.parts("token")
  name = resolve(backend, platform, query.dtype, query.shape[-1], parts)
  if name == "xla":
    if parts > 1:
      whole = NamedSharding(mesh, shard.spec(key.shape, "batch", None, "kv_heads", None))
      key, value = (jax.lax.with_sharding_constraint(x, whole) for x in (key, value))
    out = layers.attention(query, key, value, dense(mask, key.shape[1]))
  else:
    local = {"splash": functools.partial(_splash, interpret=platform == "cpu"), "cudnn": _cudnn, "ring": _ring}[name]
    out = local(query, key, value, mask) if mesh is None else _on_each_device(local, query, key, value, mask, shard, name == "ring")
  return checkpoint_name(out, SAVED)


def _on_each_device(local, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, shard: Shard, ring: bool) -> jax.Array:
  """`local` on the rows, heads and tokens of each device; keys are whole there, or split as the queries are if `ring`."""
  parts, S = shard.parts("token"), query.shape[1]
  if parts > 1:
    last = jnp.full(query.shape[:2], key.shape[1] - 1, jnp.int32) if mask.last is None else mask.last
    valid = jnp.ones(key.shape[:2], bool) if mask.valid is None else mask.valid
    # Which blocks nobody sees differs from device to device: leave it to `last` alone.
    mask = Mask(_pad(last, parts), _pad(valid, parts if ring else 1), ANYWHERE, ANYWHERE)
    query, key, value = _pad(query, parts), *(_pad(x, parts if ring else 1) for x in (key, value))
  rows, tokens, heads, _ = shard.spec(query.shape, "batch", "token", "heads", None)
  if shard.spec(key.shape, None, None, "kv_heads", None)[2] != heads:
    heads = None
  keys = tokens if ring else None
  of_query, of_key = PartitionSpec(rows, tokens, heads), PartitionSpec(rows, keys, heads)
  of_mask = mask.replace(last=None if mask.last is None else PartitionSpec(rows, tokens),
                         valid=None if mask.valid is None else PartitionSpec(rows, keys))
  if ring:
    local = functools.partial(local, axis=tokens, parts=parts)
  run = jax.shard_map(local, mesh=shard.mesh, in_specs=(of_query, of_key, of_key, of_mask), out_specs=of_query, check_vma=False)
  return run(query, key, value, mask)[:, :S]


def _pad(x: jax.Array, multiple: int, axis: int = 1) -> jax.Array:
  """`x` with zeros behind it along `axis`, up to a multiple."""
  return jnp.pad(x, [(0, -n % multiple if dim == axis else 0) for dim, n in enumerate(x.shape)])


# TPU.


class _Bound(splash_mask.Mask):
  """For the kernel: query s sees at most the keys up to bound[s]. Which of them it sees is computed in the kernel from `q_sequence`."""
  def __init__(self, bound: np.ndarray, num_keys: int):
    self.q_sequence, self.mask_function, self._num_keys = bound, _not_after, num_keys

  @property
  def shape(self) -> tuple[int, int]:
    return len(self.q_sequence), self._num_keys

  def __getitem__(self, index) -> np.ndarray:
    queries, keys = index
    return np.arange(self._num_keys)[keys] <= self.q_sequence[queries][:, None]

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Bound) and self.shape == other.shape and np.array_equal(self.q_sequence, other.q_sequence)

  def __hash__(self) -> int:
    return hash((self.shape, self.q_sequence.tobytes()))


def _not_after(last, place):
  return place <= last


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, interpret: bool) -> jax.Array:
  (B, S, H, K), T = query.shape, key.shape[1]
  block_q, block_k = _block_size(S, K), _block_size(T, K)
  query = (query.astype(jnp.float32) / math.sqrt(K)).astype(query.dtype)
  query = _pad(_pad(query, LANES, 3), block_q).swapaxes(1, 2)  # B H S K
  key, value = (_pad(_pad(x, LANES, 3), block_k).swapaxes(1, 2) for x in (key, value))
  kernel = _splash_kernel(H, query.shape[2], key.shape[2], 0 if mask.last is None else mask.num_prefix, mask.reach, block_q, block_k, interpret)
  last = None if mask.last is None else _pad(mask.last, block_q)
  valid = mask.valid if mask.valid is not None or key.shape[2] == T else jnp.ones((B, T), bool)
  segments = None if valid is None else splash_kernel.SegmentIds(jnp.ones((B, query.shape[2]), jnp.int32), _pad(valid.astype(jnp.int32), block_k))

  def one(query, key, value, last, segments):
    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    if last is not None:
      infos = tuple(info._replace(q_sequence=last) for info in infos)
    return splash_kernel.SplashAttentionKernel(*infos, **kernel.kwargs)(query, key, value, segments)

  visited = np.count_nonzero(kernel.fwd_mask_info.block_mask)
  with jax.named_scope(f"splash_{visited}of{query.shape[2] // block_q}x{key.shape[2] // block_k}"):  # for `splash_cost`
    return jax.vmap(one)(query, key, value, last, segments).swapaxes(1, 2)[:, :S, :, :K]


def _block_size(length: int, head_dim: int) -> int:
  """The largest block whose padding adds at most an eighth; small ones for wide heads, which must fit the vector memory."""
  sizes = (512, 256) if head_dim <= 256 else ()
  return next((size for size in sizes if length + -length % size <= length * 9 / 8), LANES)


@functools.lru_cache(maxsize=256)
def _splash_kernel(num_heads: int, num_queries: int, num_keys: int, num_prefix: int, reach: int, block_q: int, block_k: int, interpret: bool):
  """The kernel with the blocks that it visits, as numpy arrays: making it looks at every block once."""
  place = np.arange(num_queries, dtype=np.int32)
  bound = np.where(place < num_prefix, np.minimum(num_prefix - 1, place + reach), num_keys - 1).astype(np.int32)
  mask = _Bound(bound, num_keys) if num_prefix else splash_mask.FullMask((num_queries, num_keys))
  sizes = splash_kernel.BlockSizes(block_q=block_q, block_kv=block_k, block_q_dkv=block_q, block_kv_dkv=block_k, block_q_dq=block_q,
                                   block_kv_dq=block_k)
  with jax.ensure_compile_time_eval():
    kernel = splash_kernel.make_splash_mha(splash_mask.MultiHeadMask([mask] * num_heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                           residual_checkpoint_name=SAVED, interpret=interpret)
    return jax.tree.map(np.asarray, kernel)


def splash_cost(text: str, operands: Sequence[tuple[tuple[int, ...], int]]) -> tuple[float, float] | None:
  """(operations, bytes read more than once) of a call of the kernel in a compiled program, which says nothing of either; None for another call.

  The forward kernel multiplies each visited block twice (logits, output), that for dq three times, that for dk and dv four times. It holds one
  block of queries and reads those of keys and values that they see; that for dk and dv holds keys and reads queries and output gradients.

  Args:
    text: of the instruction, with its name and the scope that `_splash` puts it in.
    operands: (shape, bytes per element) of its floating-point operands, of which the first three are queries, keys and values.
  """
  found = re.search(r"splash_mha_(fwd|dq|dkv).*splash_(\d+)of(\d+)x(\d+)", text, re.DOTALL)
  if not found:
    return None
  kind, (visited, num_q, num_k) = found[1], map(int, found.groups()[1:])
  (*heads, S, K), item = operands[0]
  num, (keys, values), query = math.prod(heads), (math.prod(shape) * item for shape, item in operands[1:3]), math.prod(operands[0][0]) * item
  block = S / num_q * operands[1][0][-2] / num_k
  streamed, once = (2 * S / num_q, 2 * query) if kind == "dkv" else (2 * operands[1][0][-2] / num_k, keys + values)
  return {"fwd": 2, "dq": 3, "dkv": 4}[kind] * 2.0 * num * visited * block * K, max(0.0, num * visited * streamed * K * item - once)


# GPU.


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, implementation: str = "cudnn") -> jax.Array:
  """The target sees all real keys, in whatever order: moved to the front they are a length. The prefix sees only itself."""
  attend, P = functools.partial(jax.nn.dot_product_attention, implementation=implementation), 0 if mask.last is None else mask.num_prefix
  parts = []
  if P:
    here = Mask(mask.last[:, :P], None if mask.valid is None else mask.valid[:, :P])
    seen = {"is_causal": True} if mask.reach == 0 else {"mask": dense(here, P)[:, None]}  # padding of a causal prefix is on its right
    parts.append(attend(query[:, :P], key[:, :P], value[:, :P], **seen))
  if P < query.shape[1]:
    lengths = {}
    if mask.valid is not None:
      order = jnp.argsort(~mask.valid, axis=1, stable=True)[:, :, None, None]
      key, value = (jnp.take_along_axis(x, order, axis=1) for x in (key, value))
      lengths["key_value_seq_lengths"] = jnp.sum(mask.valid, axis=1, dtype=jnp.int32)
    parts.append(attend(query[:, P:], key, value, **lengths))
  return jnp.concatenate(parts, axis=1)


# A sequence that is split over devices.


def _ring(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, axis: str | None = None, parts: int = 1) -> jax.Array:
  (B, S, H, K), (T, G) = query.shape, key.shape[1:3]
  last = jnp.full((B, S), parts * T - 1, jnp.int32) if mask.last is None else mask.last
  valid = jnp.ones((B, T), bool) if mask.valid is None else mask.valid
  return _rotate(axis, parts, query.reshape(B, S, G, H // G, K), key, value, last, valid).reshape(B, S, H, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate(axis, parts, query, key, value, last, valid):
  return _rotate_forward(axis, parts, query, key, value, last, valid)[0]


def _rotate_forward(axis, parts, query, key, value, last, valid):
  """Per step one block of keys: what was added up so far shrinks when a larger logit turns up."""
  B, S, G, R, K = query.shape
  total, weight, largest = jnp.zeros((B, S, G, R, K), jnp.float32), jnp.zeros((B, G, R, S)), jnp.full((B, G, R, S), HIDDEN)
  block = key, value, valid
  for step in range(parts):
    logits = _logits(query, block[0], last, block[2], _first_place(axis, parts, step, key.shape[1]))
    new = jnp.maximum(largest, jnp.max(logits, axis=-1))
    shrink, p = jnp.exp(largest - new), jnp.exp(logits - new[..., None])
    total = total * _per_query(shrink) + jnp.einsum("bgrst,btgk->bsgrk", p.astype(value.dtype), block[1], preferred_element_type=jnp.float32)
    weight, largest = weight * shrink + jnp.sum(p, axis=-1), new
    block = _pass_on(block, axis, parts) if step + 1 < parts else block
  out = checkpoint_name((total / _per_query(weight)).astype(query.dtype), SAVED)
  normaliser = checkpoint_name(largest + jnp.log(weight), SAVED)
  return out, (query, key, value, last, valid, out, normaliser)


def _rotate_backward(axis, parts, saved, d_out):
  """The gradient of a block of keys travels with it, and is home after a whole turn."""
  query, key, value, last, valid, out, normaliser = saved
  d_out = d_out.astype(jnp.float32)
  scale, common = 1 / math.sqrt(query.shape[-1]), jnp.einsum("bsgrk,bsgrk->bgrs", d_out, out.astype(jnp.float32))
  d_query, d_key, d_value = (jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
  block = key, value, valid
  for step in range(parts):
    logits = _logits(query, block[0], last, block[2], _first_place(axis, parts, step, key.shape[1]))
    p = jnp.exp(logits - normaliser[..., None])
    d_p = jnp.einsum("bsgrk,btgk->bgrst", d_out.astype(value.dtype), block[1], preferred_element_type=jnp.float32)
    d_logits = (p * (d_p - common[..., None]) * scale).astype(query.dtype)
    d_query += jnp.einsum("bgrst,btgk->bsgrk", d_logits, block[0], preferred_element_type=jnp.float32)
    d_key += jnp.einsum("bgrst,bsgrk->btgk", d_logits, query, preferred_element_type=jnp.float32)
    d_value += jnp.einsum("bgrst,bsgrk->btgk", p.astype(value.dtype), d_out.astype(value.dtype), preferred_element_type=jnp.float32)
    d_key, d_value = _pass_on((d_key, d_value), axis, parts)
    block = _pass_on(block, axis, parts) if step + 1 < parts else block
  return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def _logits(query, key, last, valid, first) -> jax.Array:
  # B G R S T; `first` is the place of the first of these keys in the whole sequence.
  seen = (first + jnp.arange(key.shape[1]) <= last[:, :, None]) & valid[:, None]
  logits = jnp.einsum("bsgrk,btgk->bgrst", query, key, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
  return jnp.where(seen[:, None, None], logits, HIDDEN)


def _first_place(axis, parts, step, length):
  return 0 if parts == 1 else (jax.lax.axis_index(axis) - step) % parts * length


def _pass_on(arrays, axis, parts):
  if parts == 1:
    return arrays
  return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % parts) for i in range(parts)]), arrays)


def _per_query(x: jax.Array) -> jax.Array:
  return jnp.moveaxis(x, 3, 1)[..., None]  # B G R S -> B S G R 1
