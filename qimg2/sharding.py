"""The device mesh, and over which mesh axis each logical axis of an array is sharded.

Mesh axes, outermost first: `data` (replicas; slices of a multi-slice job), `fsdp` (weights gathered at use), `context` (the token axis)
and `tensor` (heads and MLP width). All four always exist, most of size one, so that one program runs on one device and on a pod. Axes are
`AxisType.Auto`: the compiler propagates, and `shard` states what the model means.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qimg2 import params as P

MESH_AXES = ("data", "fsdp", "context", "tensor")
REPLICATED_WARN_BYTES = 2**30  # per device: more in weights that the mesh does not divide is worth a warning

Rules = Mapping[str, tuple[str, ...]]
Shard = Callable[..., jax.Array]

_REPLICATED: Rules = dict.fromkeys(("token", "residual", "embed", "heads", "kv_heads", "mlp", "vocab", "channel", "layer"), ())
_FSDP_TENSOR: Rules = {
    **_REPLICATED, "batch": ("data", "fsdp"), "token": ("context",), "residual": ("context",), "embed": ("fsdp",), "channel": ("fsdp",),
    "heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",),
}

# "residual" are the tokens between the products of a network, "token" those inside. What a rule set does not name is replicated.
# Optimizer state, averaged weights and frozen networks are sharded as the weights are.
RULES: dict[str, Rules] = {
    # Weights over fsdp alone, gathered layer by layer: for models and sequences of which one row fits a device.
    "fsdp": {**_REPLICATED, "batch": ("data", "fsdp"), "embed": ("fsdp",), "channel": ("fsdp",)},
    # Heads and MLP width over tensor too; a context axis splits the tokens.
    "fsdp_tensor": _FSDP_TENSOR,
    # The same with sequence parallelism (arXiv 2205.05198): norms, residual sums and what is saved of them are divided over tensor too.
    "fsdp_sequence": {**_FSDP_TENSOR, "residual": ("context", "tensor")},
    # For pictures of 2048 px, 16K tokens and more: tokens over context, over which the weights are sharded too, because it would hold replicas.
    "fsdp_context": {
        **_REPLICATED, "batch": ("data", "fsdp"), "token": ("context",), "residual": ("context",), "embed": ("fsdp", "context"),
        "channel": ("fsdp", "context"),
    },
    # Weights on every device: for small networks.
    "replicated": {**_REPLICATED, "batch": ("data", "fsdp"), "token": ("context",), "residual": ("context",)},
}


def find_rules(name: str, mesh: Mesh) -> Rules:
  """The rule set `name`, for a mesh.

  Raises:
    ValueError: there is none, or it leaves an axis of the mesh unused, whose devices would all compute the same.
  """
  if name not in RULES:
    raise ValueError(f"config.rules is {name!r}: choose one of {', '.join(RULES)}.")
  used = {axis for axes in RULES[name].values() for axis in axes}
  idle = [axis for axis in MESH_AXES if mesh.shape[axis] > 1 and axis not in used]
  if idle:
    fitting = [other for other, rules in RULES.items() if set(idle) <= {axis for axes in rules.values() for axis in axes}]
    raise ValueError(f"config.rules {name!r} leaves mesh axis {idle[0]!r} of size {mesh.shape[idle[0]]} without work: set it to 1 or choose "
                     f"{' or '.join(fitting)}.")
  return RULES[name]


def identity(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x` unchanged: the `shard` argument of a model that runs without a mesh."""
  del axes
  return x


def parts_of(shard: Shard, axis: str) -> int:
  """Over how many devices `shard` splits a logical axis: 1 without a mesh."""
  return 1 if getattr(shard, "mesh", None) is None else shard.parts(axis)


def gather_tokens(x: jax.Array, shard: Shard) -> jax.Array:
  """`x` [B, S, D] between the products, as what goes into them; the gradient is divided again."""
  return shard(shard(x, "batch", "residual", None), "batch", "token", None)


def divide_tokens(x: jax.Array, shard: Shard) -> jax.Array:
  """`x` [B, S, D] that came from products, as what is between them; the gradient is gathered before it goes back into one."""
  return shard(shard(x, "batch", "token", None), "batch", "residual", None)


def on_one_cpu(shard: Shard) -> bool:
  """Whether all lies on a single CPU device: the mesh of `shard` has no other, or without a mesh this process has none."""
  mesh = getattr(shard, "mesh", None)
  devices = jax.devices() if mesh is None else mesh.devices.flat
  return len(devices) == 1 and devices[0].platform == "cpu"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None, strict: bool = True) -> Mesh:
  """The mesh of a run. `sizes` maps mesh axes to sizes; at most one may be -1, which takes the devices that are left.

  Where `strict` is False, sizes that do not fit the devices give way to all devices on `fsdp`: what was trained on many is read on few.
  Devices of several slices (those with different `slice_index`) are split over `data`, the only axis that crosses the data-centre network.

  Raises:
    ValueError: an unknown axis, or sizes that do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  unknown = sorted(set(sizes) - set(MESH_AXES))
  if unknown:
    raise ValueError(f"Unknown mesh axis {unknown[0]!r}: the axes are {', '.join(MESH_AXES)}.")
  shape = [sizes.get(axis, 1) for axis in MESH_AXES]
  if shape.count(-1) > 1:
    raise ValueError(f"Mesh {dict(sizes)}: only one axis may be -1.")
  if -1 in shape:
    shape[shape.index(-1)] = max(1, len(devices) // -math.prod(shape))
  if math.prod(shape) != len(devices) and not strict:
    return make_mesh({"fsdp": -1}, devices)
  if math.prod(shape) != len(devices):
    raise ValueError(f"Mesh {dict(zip(MESH_AXES, shape))} asks for {math.prod(shape)} devices, but there are {len(devices)}: "
                     "set one axis to -1 or change the sizes.")
  return Mesh(_arrange(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(shape: list[int], devices: list[Any]) -> np.ndarray:
  num_slices = len({getattr(d, "slice_index", 0) for d in devices})
  if num_slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  if shape[0] % num_slices:
    raise ValueError(f"The data axis has size {shape[0]}, which {num_slices} slices do not divide: make it a multiple of the slices.")
  inner = [shape[0] // num_slices, *shape[1:]]
  return mesh_utils.create_hybrid_device_mesh(inner, [num_slices, 1, 1, 1], devices, allow_split_physical_axes=True)


def partition_spec(axes: Sequence[str | None], rules: Rules, name: str = "array") -> PartitionSpec:
  """The PartitionSpec of an array with logical `axes`.

  Raises:
    ValueError: a logical axis without a rule, or a mesh axis used for two dimensions.
  """
  used: set[str] = set()
  entries = []
  for axis in axes:
    if axis is not None and axis not in rules:
      raise ValueError(f"{name}: logical axis {axis!r} has no sharding rule; the rules know {', '.join(sorted(rules))}.")
    mesh_axes = rules[axis] if axis is not None else ()
    twice = used & set(mesh_axes)
    if twice:
      raise ValueError(f"{name}: mesh axis {sorted(twice)[0]!r} is used for two of the dimensions {tuple(axes)}.")
    used |= set(mesh_axes)
    entries.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
  return PartitionSpec(*entries)


def array_sharding(mesh: Mesh, axes: Sequence[str | None], rules: Rules, shape: Sequence[int] | None = None, name: str = "array") -> NamedSharding:
  """The NamedSharding of an array with logical `axes`; given its `shape`, dimensions that their mesh axes do not divide are not sharded.

  Raises:
    ValueError: as `partition_spec`.
  """
  spec = partition_spec(axes, rules, name)
  if shape is not None:
    spec = PartitionSpec(*(entry if size % _num_parts(mesh, entry) == 0 else None for size, entry in zip(shape, spec, strict=True)))
  return NamedSharding(mesh, spec)


def _num_parts(mesh: Mesh, entry: str | tuple[str, ...] | None) -> int:
  return math.prod(mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def param_shardings(specs: dict, mesh: Mesh, rules: Rules) -> dict:
  """A tree of NamedSharding for the weights in `specs`. Dimensions that the mesh does not divide are not sharded, with a warning if
  such weights are many: on 128 devices and more the odd widths of a VAE or a vision tower do not divide."""
  unsharded = []

  def place(path, p):
    sharding = array_sharding(mesh, p.axes, rules, p.shape, path)
    if sharding.spec != partition_spec(p.axes, rules, path):
      unsharded.append((math.prod(sharding.shard_shape(p.shape)) * jnp.dtype(p.dtype).itemsize, path))
    return sharding
  placed = P.map_with_path(place, specs)
  if (size := sum(size for size, _ in unsharded)) > REPLICATED_WARN_BYTES:
    _warn_once(f"{len(unsharded)} weights have sizes that mesh {dict(mesh.shape)} does not divide and take {size / 2**30:.1f} GiB on every device, "
               f"{max(unsharded)[1]} most.")
  return placed


@functools.cache
def _warn_once(text: str) -> None:
  logging.warning(text)


class Placement:
  """`shard(x, *axes)`: constrains an activation to the layout of its logical axes. Knows the mesh, for what runs on each device by itself."""

  def __init__(self, mesh: Mesh, rules: Rules):
    self.mesh, self.rules = mesh, rules

  def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
    spec = partition_spec(axes, self.rules, f"activation {x.shape}")
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

  def parts(self, axis: str) -> int:
    """Over how many devices the logical `axis` is split."""
    return math.prod(self.mesh.shape[name] for name in self.rules[axis])

  def spec(self, shape: Sequence[int], *axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an activation of `shape`; dimensions that their mesh axes do not divide are not sharded."""
    return array_sharding(self.mesh, axes, self.rules, shape).spec


def make_shard(mesh: Mesh, rules: Rules) -> Placement:
  """The `shard` argument of a model that runs on a mesh."""
  return Placement(mesh, rules)


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
  """The sharding of every array of a batch: rows over `data` and `fsdp`, other dimensions not sharded."""
  return NamedSharding(mesh, partition_spec(("batch",), rules))


def stacked_batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
  """The sharding of arrays [K, B, ...] of K minibatches: each one's rows over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(None, *partition_spec(("batch",), rules)))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of a replicated array."""
  return NamedSharding(mesh, PartitionSpec())


def local_parts(mesh: Mesh, rules: Rules) -> tuple[tuple[int, ...], int]:
  """This process's share of every batch: (the parts that its devices hold, ascending; into how many equal parts rows are divided).

  Processes whose devices differ along `context` or `tensor` alone hold the same rows. One process holds all rows as one part.
  """
  if jax.process_count() == 1:
    return (0,), 1
  num = math.prod(mesh.shape[axis] for axis in rules["batch"])
  places = batch_sharding(mesh, rules).addressable_devices_indices_map((num,)).values()
  return tuple(sorted({rows.start or 0 for rows, in places})), num


def put_batch(batch: dict, mesh: Mesh, rules: Rules) -> dict:
  """A batch of numpy arrays (this process's rows, see `local_parts`) as global arrays, rows sharded over the batch axes."""
  sharding, (parts, num) = batch_sharding(mesh, rules), local_parts(mesh, rules)

  def put(x):
    x = np.asarray(x)
    return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] // len(parts) * num, *x.shape[1:]))
  return jax.tree.map(put, batch)


def local_rows(tree: Any) -> Any:
  """This process's share of the rows of global arrays, as numpy arrays, in the order in which `put_batch` takes them."""
  def own(x):
    if jax.process_count() == 1:
      return jax.device_get(x)
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
  return jax.tree.map(own, tree)


def first_of_equal_rows(x: np.ndarray, mesh: Mesh, rules: Rules) -> np.ndarray:
  """`x` [rows of this process], in which every part of a batch that several processes hold is what the first of them has. All must call it alike.

  Processes whose devices differ along `context` or `tensor` hold the same rows, and what they computed on their hosts need not be equal.
  """
  if jax.process_count() == 1:
    return x
  parts, _ = local_parts(mesh, rules)
  everybody = multihost_utils.process_allgather((np.asarray(parts, np.int32), x.reshape(len(parts), -1)))
  first = {}
  for owned, rows in zip(*map(np.asarray, everybody)):
    for part, some in zip(owned.tolist(), rows):
      first.setdefault(part, some)
  return np.concatenate([first[part] for part in parts]).astype(x.dtype)


def put_global_batch(batch: dict, mesh: Mesh, rules: Rules) -> dict:
  """A batch of numpy arrays with the rows of all processes, the same on each, as global arrays, rows sharded over the batch axes."""
  sharding = batch_sharding(mesh, rules)
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)


def to_host(tree: Any) -> Any:
  """`tree` as numpy arrays of global shape on every process. All processes must call it alike: what is sharded over several is gathered."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  gather = lambda x: np.asarray(x) if x.is_fully_addressable or x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)
  return jax.tree.map(lambda x: gather(x) if isinstance(x, jax.Array) else np.asarray(x), tree)


def broadcast_from_first(x: np.ndarray) -> np.ndarray:
  """What process 0 holds, on every process. All must call it alike, with one shape and at most 32 bits."""
  return x if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(x))


def gather_ids(ids: Sequence) -> np.ndarray:
  """The sample ids of all processes' rows, each once, from those of this one's. All must call it alike."""
  ids = np.asarray(ids, np.int64)
  if jax.process_count() == 1:
    return ids
  halves = multihost_utils.process_allgather(ids.view(np.int32))  # 64 bits would be cut
  return np.unique(np.ascontiguousarray(halves).view(np.int64))


# Compilation.

# Names and values as in the XLA of jax 0.10; unknown ones are an error when a program is compiled.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    # Weights are gathered and gradients scattered while something else computes. Async collective fusion is left to the compiler, which
    # refuses it on TPU v5p. A product is never cut into one per device of an axis, each of which would read and write all of the sum again.
    "tpu": {"xla_tpu_enable_latency_hiding_scheduler": True, "xla_enable_async_all_gather": True, "xla_tpu_overlap_compute_collective_tc": True,
            "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "cpu": {},
}


def compile_options(mesh: Mesh) -> dict[str, Any]:
  """`compiler_options` for `jax.stages.Lowered.compile`, by the platform of the mesh's devices: the same in training and in rehearsal."""
  platform = {"cuda": "gpu"}.get(platform := mesh.devices.flat[0].platform, platform)
  return dict(COMPILE_OPTIONS.get(platform, {}))
