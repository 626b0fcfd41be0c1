"""The attention back ends that can run here, beside each other: how far each is from the definition in float32, how long it takes, forward and
backward, and what it needs of the device's memory.

  python -m benchmarks.attention [--length=4096] [--prefix=1024] [--heads=32] [--head_dim=128] [--batch=1] [--dtype=bfloat16] [--rounds=5]
    [--json=F]

The sequence is what an edit has: a causal prompt with one image in it, padding, then the target. Rounds take turns, so that what else the machine
does falls on all of them alike; the table has medians. On a CPU splash runs interpreted, which says nothing of its speed.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import timing
from launch import cli
from qimg2 import attention
from qimg2.attention import Mask


def make_inputs(batch: int, length: int, prefix: int, heads: int, head_dim: int, dtype: str) -> tuple[tuple[jax.Array, ...], Mask]:
  """((query, key, value [B, S, H, K], weight of each query in the loss [B, S, 1, 1]), who sees whom)."""
  image = slice(prefix // 8, prefix // 8 + prefix // 2)
  block = np.zeros((batch, length), np.int32)
  block[:, image], block[:, prefix:] = 1, 2
  valid = np.ones((batch, length), bool)
  valid[:, prefix - prefix // 8:prefix] = False
  mask = attention.block_causal(jnp.asarray(block), jnp.asarray(valid), prefix, image.stop - image.start)
  arrays = (jax.random.normal(jax.random.key(i), (batch, length, heads, head_dim)).astype(dtype) for i in range(3))
  return (*arrays, jnp.asarray(valid, jnp.float32)[..., None, None]), mask


def make_step(backend: str, mask: Mask):
  """Jitted function of (query, key, value, weight) -> (output where queries are real, gradients of its weighted sum of squares)."""
  def loss(query, key, value, weight):
    out = attention.attention(query, key, value, mask, backend).astype(jnp.float32) * weight
    return jnp.sum(jnp.square(out)), out

  @jax.jit
  def step(*arrays):
    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    return out, gradients
  return step


def compare(arrays: tuple[jax.Array, ...], mask: Mask, rounds: int) -> list[dict]:
  """A row for each back end that can run on this device: name, ms, GiB, and the largest distances from the definition in float32, relative to the
  largest value."""
  exact = jax.device_get(make_step("xla", mask)(*(x.astype(jnp.float32) for x in arrays)))
  platform, rows = jax.default_backend(), []
  for name in attention.BACKENDS:
    if name == "auto":
      continue
    try:
      attention.resolve(name, platform, arrays[0].dtype, arrays[0].shape[-1])
    except ValueError as error:
      print(f"{name}: {error}")
      continue
    compiled = make_step(name, mask).lower(*arrays).compile()
    distance = lambda x, y: float(np.max(np.abs(np.asarray(x, np.float32) - y)) / np.max(np.abs(y)))
    far = jax.tree.map(distance, jax.device_get(compiled(*arrays)), exact)
    memory = compiled.memory_analysis()
    rows.append({"name": name, "run": functools.partial(compiled, *arrays), "times": [], "out": far[0], "gradient": max(far[1]),
                 "gib": memory.temp_size_in_bytes / 2**30 if memory else float("nan")})
  for _ in range(rounds):
    for row in rows:
      start = time.perf_counter()
      jax.block_until_ready(row["run"]())
      row["times"].append(1e3 * (time.perf_counter() - start))
  return [{"name": row["name"], "ms": statistics.median(row["times"]), **{key: row[key] for key in ("gib", "out", "gradient")}} for row in rows]


def define_flags() -> None:
  """The flags of this benchmark."""
  flags.DEFINE_integer("batch", 1, "Examples.", lower_bound=1)
  flags.DEFINE_integer("length", 4096, "Tokens of the sequence.", lower_bound=16)
  flags.DEFINE_integer("prefix", 1024, "Tokens before the target.", lower_bound=8)
  flags.DEFINE_integer("heads", 32, "Heads.", lower_bound=1)
  flags.DEFINE_integer("head_dim", 128, "Their width.", lower_bound=1)
  flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of queries, keys and values.")
  flags.DEFINE_integer("rounds", 5, "Timed calls of each back end.", lower_bound=1)
  flags.DEFINE_string("json", "", "File for the rows.")


def main(_) -> None:
  """Prints the table."""
  args = flags.FLAGS
  arrays, mask = make_inputs(args.batch, args.length, args.prefix, args.heads, args.head_dim, args.dtype)
  print(f"{jax.devices()[0].device_kind}: {args.batch} x {args.length} tokens, {args.prefix} of them before the target, {args.heads} heads of "
        f"{args.head_dim}, {args.dtype}")
  print(f"{'back end':10}{'ms':>10}{'GiB':>8}{'output off by':>16}{'gradient off by':>17}")
  rows = compare(arrays, mask, args.rounds)
  for row in rows:
    print(f"{row['name']:10}{row['ms']:10.2f}{row['gib']:8.2f}{row['out']:16.1e}{row['gradient']:17.1e}")
  timing.write_json(args.json, rows)


if __name__ == "__main__":
  cli.run(main, define_flags)
