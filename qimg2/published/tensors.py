"""Published tensors <-> our trees.

A name table maps each path of a model's specs to the published tensor(s) that hold it. PyTorch stores a linear weight as [out, in] and a
convolution as [out, in, h, w]; we store [in..., out...] and [h, w, in, out], and stack the layers that `jax.lax.scan` runs over. Both
directions are strict: a tensor that is missing, left over or of another shape is an error that names it.

Both directions also stream. Reading holds one published tensor at a time in host memory and writes it into weights that are already on the
devices; writing takes one layer at a time from them.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from qimg2 import params as P
from qimg2.adapters import merged
from qimg2.published.files import TensorFiles


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one of our weights is published.

  Attributes:
    name: published tensor name. For a weight stacked over layers it holds "{}", which stands for the layer's number.
    kind: "linear" for [out, in] -> ours [in..., out...]; "conv" for [out, in, *window] -> [*window, in, out]; "plain" for the same order of
      elements. Dimensions are then split or joined to our shape.
    num_inputs: for "linear", how many leading dimensions of our shape (without the layer) are inputs.
    published_shape: for "plain", the published shape where it differs from ours (such as (C, 1, 1) for our (C,)).
  """
  name: str
  kind: str = "linear"
  num_inputs: int = 1
  published_shape: tuple[int, ...] | None = None

  @property
  def stacked(self) -> bool:
    """True when our weight holds one published tensor per layer."""
    return "{}" in self.name

  def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The published shape of one layer's tensor when ours, without the layer, is `ours`."""
    if self.kind == "linear":
      return int(np.prod(ours[self.num_inputs:])), int(np.prod(ours[:self.num_inputs]))
    if self.kind == "conv":
      return (ours[-1], ours[-2], *ours[:-2])
    return self.published_shape or ours

  def to_ours(self, x: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
    """A published tensor in our order and shape."""
    if self.kind == "linear":
      return x.T.reshape(ours)
    if self.kind == "conv":
      return np.moveaxis(x, (0, 1), (-1, -2))
    return x.reshape(ours)

  def to_published(self, x: np.ndarray) -> np.ndarray:
    """Our weight (one layer) in the published order and shape."""
    if self.kind == "linear":
      return x.reshape(int(np.prod(x.shape[:self.num_inputs])), -1).T
    if self.kind == "conv":
      return np.moveaxis(x, (-1, -2), (0, 1))
    return x.reshape(self.shape(x.shape))


Table = Mapping[str, Entry]


# Reading.


def load_tensors(files: TensorFiles, specs: dict, table: Table, shardings: dict | None = None, label: str = "", read: bool = True) -> dict:
  """The weights of `specs` from files; names and shapes are all checked before the first tensor is read, and without `read` none is: {}. See
  `import_tensors`."""
  shapes = published_shapes(specs, table)
  _check_names(set(shapes), set(files.shapes), f"The weights in {files.folder}")
  for name, shape in shapes.items():
    _check_shape(name, files.shapes[name], shape)
  return import_tensors(specs, table, files.shapes, files.read, shardings, label) if read else {}


def import_tensors(specs: dict, table: Table, names: Collection[str], read: Callable[[str], np.ndarray], shardings: dict | None = None,
                   label: str = "") -> dict:
  """The weights of `specs`, in the types that it declares, read tensor by tensor. A bar shows the progress on a terminal.

  Args:
    specs: the model's tree of `Param`.
    table: path -> `Entry`, exactly the paths of `specs`.
    names: all tensor names that the published files hold.
    read: `read(name)`, the tensor of a name.
    shardings: a tree of shardings, as `qimg2.sharding.param_shardings`; None puts everything on the first device.
    label: what the progress bar says.

  Raises:
    ValueError: a tensor is missing, left over, or has another shape than `specs` says.
  """
  _check_names(set(published_shapes(specs, table)), set(names), "The files")
  where = P.flatten(shardings) if shardings is not None else {}
  first = one_device()
  with tqdm(total=len(names), desc=label, unit="tensor", disable=None, leave=False) as bar:
    def one(path, p):
      return _import_one(p, table[path], read, where.get(path, first), bar)
    return P.map_with_path(one, specs)


def _import_one(p: P.Param, entry: Entry, read: Callable[[str], np.ndarray], sharding: Sharding, bar: tqdm) -> jax.Array:
  if not entry.stacked:
    x = _read_one(entry.name, p.shape, entry, read).astype(p.dtype, copy=False)
    bar.update()
    return place(x, sharding)
  stacked = jnp.zeros(p.shape, p.dtype, device=sharding)
  for number, name in enumerate(_tensor_names(entry, p)):
    layer = place(_read_one(name, p.shape[1:], entry, read), _of_layer(sharding))
    # Waiting keeps no more than one layer on its way to the devices.
    stacked = _set_layer(stacked, layer, number, sharding).block_until_ready()
    bar.update()
  return stacked


def _read_one(name: str, ours: tuple[int, ...], entry: Entry, read: Callable[[str], np.ndarray]) -> np.ndarray:
  x = read(name)
  _check_shape(name, x.shape, entry.shape(ours))
  return entry.to_ours(x, ours)


def place(x: np.ndarray, sharding: Sharding) -> jax.Array:
  """`x`, of which every process holds all, as an array with `sharding`."""
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def one_device() -> Sharding:
  """The sharding of arrays on this process's first device."""
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _of_layer(sharding: Sharding) -> Sharding:
  return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])) if isinstance(sharding, NamedSharding) else sharding


@functools.partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _set_layer(stacked: jax.Array, layer: jax.Array, number: int, sharding: Sharding) -> jax.Array:
  stacked = jax.lax.dynamic_update_index_in_dim(stacked, layer.astype(stacked.dtype), number, 0)
  return jax.lax.with_sharding_constraint(stacked, sharding)


@functools.partial(jax.jit, static_argnames="dtype")
def _take_layer(stacked: Any, number: int, dtype: Any) -> jax.Array:
  return merged(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stacked), dtype)


# Writing.


def export_tensors(params: dict, specs: dict, table: Table, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
  """(published name, tensor) of every weight of `params`, in the order of `published_shapes`; the inverse of `import_tensors`.

  Args:
    params: numpy or jax arrays as `specs`, sharded or not; one layer at a time is brought to the host, with its adapter merged where it has one.
    specs: the model's tree of `Param`.
    table: path -> `Entry`.
    dtype: type of the tensors; None keeps that of the weights.
  """
  _check_table(specs, table)
  leaves = P.flatten(params)
  for path, p in P.flatten(specs).items():
    entry, x = table[path], jax.tree.map(jnp.asarray, leaves[path])
    assert x.shape == p.shape, f"{path} has shape {x.shape}, but specs say {p.shape}"
    kind = jnp.dtype(dtype or x.dtype)
    for number, name in enumerate(_tensor_names(entry, p)):
      layer = np.asarray(_take_layer(x, number, kind) if entry.stacked else merged(x, kind))
      yield name, np.ascontiguousarray(entry.to_published(layer))


def published_shapes(specs: dict, table: Table) -> dict[str, tuple[int, ...]]:
  """Published name -> published shape of every tensor that `specs` needs."""
  _check_table(specs, table)
  shapes = {}
  for path, p in P.flatten(specs).items():
    entry = table[path]
    shapes |= dict.fromkeys(_tensor_names(entry, p), tuple(entry.shape(p.shape[1:] if entry.stacked else p.shape)))
  return shapes


def _tensor_names(entry: Entry, p: P.Param) -> list[str]:
  return [entry.name.format(i) for i in range(p.shape[0])] if entry.stacked else [entry.name]


def _check_table(specs: dict, table: Table) -> None:
  odd = set(P.flatten(specs)) ^ set(table)
  assert not odd, f"name table and specs differ: {sorted(odd)}"


def _check_names(expected: set[str], names: set[str], where: str) -> None:
  missing, extra = sorted(expected - names), sorted(names - expected)
  if missing:
    raise ValueError(f"{where} lack {len(missing)} tensor(s), first {missing[0]}: they are incomplete or the config is for another model.")
  if extra:
    raise ValueError(f"{where} hold {len(extra)} tensor(s) that the config does not know, first {extra[0]}: it is for another model.")


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
  if tuple(found) != tuple(expected):
    raise ValueError(f"Tensor {name} has shape {tuple(found)}, but the config asks for {tuple(expected)}: the files and the config differ.")
