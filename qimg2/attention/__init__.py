"""Attention behind one function, with a back end for each kind of device.

Who sees whom is described once, by `Mask`; each back end makes of it what it needs, and has a file of its own with a function `attend`.

  xla      the definition, on every device; with chunked the only one that can be differentiated forward (jax.jvp)
  chunked  for long sequences on CPUs
  splash   the Pallas kernel for TPUs
  cudnn    the fused kernel for NVIDIA GPUs, in 16-bit types
  ring     for sequences split over the mesh axis `context`

With a mesh, each back end but xla runs on a device's own rows, heads and tokens (`jax.shard_map`); splash gathers keys and values over
`context`, ring passes them on. Letters: B batch, S queries, T keys, H heads, G key/value heads, K head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from qimg2 import layers
from qimg2.attention import chunked, cudnn, ring, splash, xla
from qimg2.attention.mask import Mask, block_causal, causal, dense
from qimg2.attention.splash import splash_cost
from qimg2.sharding import Shard, identity, parts_of

__all__ = ["BACKENDS", "Mask", "attention", "block_causal", "causal", "check_backend", "dense", "resolve", "splash_cost"]

BACKENDS = ("auto", "xla", "chunked", "splash", "cudnn", "ring")
GPUS = ("gpu", "cuda")
ANYWHERE = 2**29  # beyond every index


def check_backend(name: str) -> str:
  """`name`, if there is such a back end.

  Raises:
    ValueError: there is none.
  """
  if name not in BACKENDS:
    raise ValueError(f"Unknown attention_backend {name!r}: choose one of {', '.join(BACKENDS)}.")
  return name


def resolve(backend: str, platform: str, dtype: Any, head_dim: int, parts: int = 1, num_logits: int = 0) -> str:
  """The back end that runs: "auto" is splash on a TPU; on a GPU ring for a split sequence, else cudnn where it can; on a CPU chunked where a head
  has many logits; else xla.

  Args:
    backend: one of `BACKENDS`.
    platform: "cpu", "gpu", "cuda" or "tpu".
    dtype: of queries, keys and values.
    head_dim: K.
    parts: over how many devices the sequence is split.
    num_logits: queries times keys.

  Raises:
    ValueError: an unknown back end, or one that cannot run here.
  """
  fused = cudnn.fits(dtype, head_dim)
  if check_backend(backend) == "auto":
    on_gpu = "ring" if parts > 1 else "cudnn" if fused else "xla"
    on_cpu = "chunked" if num_logits >= chunked.MIN_LOGITS and parts == 1 else "xla"
    return {"tpu": "splash", "cpu": on_cpu}.get(platform, on_gpu if platform in GPUS else "xla")
  if backend == "splash" and platform not in ("tpu", "cpu"):
    raise ValueError(f"attention_backend 'splash' is a TPU kernel, but this is a {platform}: choose 'auto', 'xla' or 'cudnn'.")
  if backend == "cudnn" and platform not in GPUS:
    raise ValueError(f"attention_backend 'cudnn' needs an NVIDIA GPU, but this is a {platform}: choose 'auto' or 'xla'.")
  if backend == "cudnn" and (parts > 1 or not fused):
    raise ValueError("attention_backend 'cudnn' needs a 16-bit dtype, a head dim that is a multiple of 8 and at most "
                     f"{cudnn.MAX_HEAD_DIM}, and a whole sequence, but there are {jnp.dtype(dtype).name}, {head_dim} and {parts} parts: choose "
                     "'auto', 'xla' or 'ring'.")
  return backend


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask = Mask(), backend: str = "auto", shard: Shard = identity) -> jax.Array:
  """Scaled dot-product attention [B, S, H, K] with scale 1/sqrt(K) and softmax in float32.

  What a query gets that sees no key at all is finite and otherwise undefined.

  Args:
    query: [B, S, H, K].
    key, value: [B, T, G, K]; G divides H, and each of them serves H/G query heads.
    mask: who sees whom.
    backend: one of `BACKENDS`.
    shard: constrains activations to the mesh; knows how the arrays are sharded.

  Raises:
    ValueError: as `resolve`.
  """
  mesh = getattr(shard, "mesh", None)
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  parts = parts_of(shard, "token")
  name = resolve(backend, platform, query.dtype, query.shape[-1], parts, query.shape[1] * key.shape[1])
  if name == "xla":
    out = xla.attend(query, key, value, mask, shard)
  else:
    local = {"chunked": chunked.attend, "splash": functools.partial(splash.attend, interpret=platform == "cpu"), "cudnn": cudnn.attend,
             "ring": ring.attend}[name]
    local = _exact(local) if query.dtype == jnp.float32 and name in ("splash", "ring") else local
    out = local(query, key, value, mask) if mesh is None else _on_each_device(local, query, key, value, mask, shard, name == "ring")
  return checkpoint_name(out, layers.ATTENTION_OUTPUT)


def _exact(attend):
  """`attend` with a backward pass in float32. Kernels have one of their own, which is traced where the gradient is taken: outside of the network, and
  so of what `layers.full_precision` says."""
  def exact(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, **options) -> jax.Array:
    run = jax.custom_vjp(lambda query, key, value, mask: attend(query, key, value, mask, **options))

    def backward(back, cotangent):
      with jax.default_matmul_precision("highest"):
        return *back(cotangent), None
    run.defvjp(lambda query, key, value, mask: jax.vjp(lambda *three: attend(*three, mask, **options), query, key, value), backward)
    return run(query, key, value, mask)
  return exact


def _on_each_device(local, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, shard: Shard, split_keys: bool) -> jax.Array:
  """`local` on the rows, heads and tokens of each device; keys are replicated there, or split as the queries are if `split_keys`."""
  parts, S = shard.parts("token"), query.shape[1]
  if parts > 1:
    last = jnp.full(query.shape[:2], key.shape[1] - 1, jnp.int32) if mask.last is None else mask.last
    valid = jnp.ones(key.shape[:2], bool) if mask.valid is None else mask.valid
    # Which blocks nobody sees differs from device to device: leave it to `last` alone.
    mask = Mask(layers.pad(last, parts), layers.pad(valid, parts if split_keys else 1), ANYWHERE, ANYWHERE)
    query, key, value = layers.pad(query, parts), *(layers.pad(x, parts if split_keys else 1) for x in (key, value))
  rows, tokens, heads, _ = shard.spec(query.shape, "batch", "token", "heads", None)
  if shard.spec(key.shape, None, None, "kv_heads", None)[2] != heads:
    heads = None
  keys = tokens if split_keys else None
  of_query, of_key = PartitionSpec(rows, tokens, heads), PartitionSpec(rows, keys, heads)
  of_mask = mask.replace(last=None if mask.last is None else PartitionSpec(rows, tokens),
                         valid=None if mask.valid is None else PartitionSpec(rows, keys))
  if split_keys:
    local = functools.partial(local, axis=tokens, parts=parts)
  run = jax.shard_map(local, mesh=shard.mesh, in_specs=(of_query, of_key, of_key, of_mask), out_specs=of_query, check_vma=False)
  return run(query, key, value, mask)[:, :S]
