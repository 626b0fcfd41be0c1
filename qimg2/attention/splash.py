"""The Pallas kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention): it skips blocks that nobody sees and never holds all logits.

Which blocks are skipped is decided when the program is made, from `num_prefix` and `reach` of the mask; what is seen inside a visited block is
computed in the kernel, from `last` and `valid`. One kernel gives all three gradients. It computes logits once where two kernels would twice: five
products in place of seven. What it pays is that each block of keys writes its own part of the queries' gradient, in their type; the parts are summed
after it. Wide heads have small blocks and so many parts that two kernels cost less. On a CPU the kernels run interpreted: for tests.
"""

import functools
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from qimg2.attention.mask import Mask
from qimg2.layers import ATTENTION_OUTPUT, pad

LANES = 128  # of a TPU's vector unit
BLOCKS = (1024, 512, 256, LANES)  # queries or keys that are in the vector memory at once
WIDE_HEAD = 256  # beyond it only the smallest block fits
COMPUTE = 512  # keys of a block that are multiplied at once, or fewer: their logits are in the vector memory, in float32


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


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, interpret: bool) -> jax.Array:
  """Attention [B, S, H, K] by the kernel; `interpret` runs it on a CPU. Arguments as in `qimg2.attention.attention`."""
  (B, S, H, K), T = query.shape, key.shape[1]
  num_prefix = 0 if mask.last is None else mask.num_prefix
  block_q, block_k = block_sizes(S, T, num_prefix, mask.reach, K)
  query = (query.astype(jnp.float32) / math.sqrt(K)).astype(query.dtype)
  query = pad(pad(query, LANES, 3), block_q).swapaxes(1, 2)  # B H S K
  key, value = (pad(pad(x, LANES, 3), block_k).swapaxes(1, 2) for x in (key, value))
  fused = K <= WIDE_HEAD
  # Twice the keys, where that pads nothing, are half as many parts of the queries' gradient.
  held = 2 * block_k if block_k == BLOCKS[0] and key.shape[2] % (2 * block_k) == 0 else block_k
  kernel = make_kernel(H, query.shape[2], key.shape[2], num_prefix, mask.reach, block_q, block_k, held, min(block_k, COMPUTE), fused, interpret)
  last = None if mask.last is None else pad(mask.last, block_q)
  valid = mask.valid if mask.valid is not None or key.shape[2] == T else jnp.ones((B, T), bool)
  segments = None if valid is None else splash_kernel.SegmentIds(jnp.ones((B, query.shape[2]), jnp.int32), pad(valid.astype(jnp.int32), block_k))

  def one(query, key, value, last, segments):
    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    if last is not None:
      infos = tuple(info and info._replace(q_sequence=last) for info in infos)
    return splash_kernel.SplashAttentionKernel(*infos, **kernel.kwargs)(query, key, value, segments)

  blocks = lambda info, size: f"{np.count_nonzero(info.block_mask)}of{query.shape[2] // block_q}x{key.shape[2] // size}"
  scope = f"splash_{blocks(kernel.fwd_mask_info, block_k)}_{blocks(kernel.dkv_mask_info, held)}{'' if fused else '_apart'}"
  with jax.named_scope(scope):  # for `splash_cost`
    return jax.vmap(one)(query, key, value, last, segments).swapaxes(1, 2)[:, :S, :, :K]


def block_sizes(num_queries: int, num_keys: int, num_prefix: int, reach: int, head_dim: int) -> tuple[int, int]:
  """(queries, keys) of a block: the largest with which at most an eighth more is computed than with the smallest, padding included.

  A block of queries is held while all keys that they see come by, and the other way around: larger ones read less.
  """
  sizes = BLOCKS if head_dim <= WIDE_HEAD else BLOCKS[-1:]
  def computed(block_q: int, block_k: int) -> int:
    bound = _bound(num_queries + -num_queries % block_q, num_keys, num_prefix, reach)
    return int(np.sum(bound.reshape(-1, block_q).max(axis=1) // block_k + 1)) * block_q * block_k
  few = computed(LANES, LANES) * 9 / 8
  return max(((q, k) for q in sizes for k in sizes if computed(q, k) <= few), key=lambda pair: (min(pair), pair))


def _bound(num_queries: int, num_keys: int, num_prefix: int, reach: int) -> np.ndarray:
  """The last key that each query may see, by the numbers of the mask that are known when the program is made."""
  place = np.arange(num_queries, dtype=np.int32)
  return np.where(place < num_prefix, np.minimum(min(num_prefix, num_keys) - 1, place + reach), num_keys - 1).astype(np.int32)


@functools.lru_cache(maxsize=256)
def make_kernel(num_heads: int, num_queries: int, num_keys: int, num_prefix: int, reach: int, block_q: int, block_k: int, held: int,
                compute: int, fused: bool, interpret: bool):
  """The kernel with the blocks that it visits, as numpy arrays: making it looks at every block once. Backwards it holds `held` keys."""
  mask = _Bound(_bound(num_queries, num_keys, num_prefix, reach), num_keys) if num_prefix else splash_mask.FullMask((num_queries, num_keys))
  apart = {} if fused else {"block_q_dq": block_q, "block_kv_dq": block_k}
  sizes = splash_kernel.BlockSizes(block_q=block_q, block_kv=block_k, block_kv_compute=compute, block_q_dkv=block_q, block_kv_dkv=held,
                                   block_kv_dkv_compute=compute, use_fused_bwd_kernel=fused, **apart)
  with jax.ensure_compile_time_eval():
    kernel = splash_kernel.make_splash_mha(splash_mask.MultiHeadMask([mask] * num_heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                           residual_checkpoint_name=ATTENTION_OUTPUT, interpret=interpret)
    return jax.tree.map(np.asarray, kernel)


def splash_cost(text: str, operands: Sequence[tuple[tuple[int, ...], int]]) -> tuple[float, float] | None:
  """(operations, bytes read more than once) of a call of the kernel in a compiled program, which says nothing of either; None for another call.

  The forward kernel multiplies each visited block twice (logits, output). It holds one block of queries and reads those of keys and values that they
  see. The backward one multiplies it five times (logits, and for the gradients of weights, queries, keys and values). It holds keys and reads
  queries and output gradients. Two kernels in its place multiply four and three times.

  Args:
    text: of the instruction, with its name and the scope that `attend` puts it in.
    operands: (shape, bytes per element) of its floating-point operands, of which the first three are queries, keys and values.
  """
  found = re.search(r"splash_mha_(fwd|dq|dkv).*splash_(\d+)of(\d+)x(\d+)_(\d+)of(\d+)x(\d+)(_apart)?", text, re.DOTALL)
  if not found:
    return None
  kind = found[1]
  visited, num_q, num_k = map(int, found.groups()[4:7] if kind == "dkv" else found.groups()[1:4])
  (*heads, S, K), item = operands[0]
  num, (keys, values), query = math.prod(heads), (math.prod(shape) * item for shape, item in operands[1:3]), math.prod(operands[0][0]) * item
  block = S / num_q * operands[1][0][-2] / num_k
  streamed, once = (2 * S / num_q, 2 * query) if kind == "dkv" else (2 * operands[1][0][-2] / num_k, keys + values)
  products = {"fwd": 2, "dq": 3, "dkv": 4 if found[8] else 5}[kind]
  return products * 2.0 * num * visited * block * K, max(0.0, num * visited * streamed * K * item - once)
