"""Published tensors <-> our trees.

A name table maps each path of a model's specs to the published tensor(s) that hold it. PyTorch stores a linear weight as [out, in] and a
convolution as [out, in, h, w]; we store [in..., out...] and [h, w, in, out], and stack the layers that `jax.lax.scan` runs over. Both
directions are strict: a tensor that is missing, left over or of another shape is an error that names it.

Both directions also stream. Reading holds one published tensor at a time in host memory and writes it into weights that are already on the
devices; writing takes one layer at a time from them. Pickled weights (.bin, .pt) are never opened: reading one can run any code.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from qimg2 import params as P

DTYPES = ("F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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


# Files.


@dataclasses.dataclass(frozen=True)
class TensorFiles:
  """The tensors of one folder of safetensors files, read one at a time.

  Attributes:
    folder: where the files are.
    files: tensor name -> file.
    shapes: tensor name -> shape.
  """
  folder: pathlib.Path
  files: Mapping[str, pathlib.Path]
  shapes: Mapping[str, tuple[int, ...]]

  def read(self, name: str) -> np.ndarray:
    """The tensor `name` in its stored type: float32, float16 or bfloat16.

    Raises:
      ValueError: its file was changed or removed since it was opened.
    """
    # A file is opened anew for each tensor: pages of a mapping that stays open would count as our memory until the whole file is in it.
    with _opened(self.files[name]) as file:
      return file.get_tensor(name)

  def without(self, names: Collection[str]) -> "TensorFiles":
    """The same files without the tensors `names`, which then count neither as read nor as left over."""
    keep = [name for name in self.files if name not in names]
    return TensorFiles(self.folder, {name: self.files[name] for name in keep}, {name: self.shapes[name] for name in keep})


def open_tensors(folder: str | pathlib.Path, stem: str) -> TensorFiles:
  """The tensors of `<stem>.safetensors`, or of the files that `<stem>.safetensors.index.json` lists. Reads headers only.

  Raises:
    ValueError: no such files, only pickled ones, both forms, a damaged file, or an index that does not agree with its files.
  """
  folder = pathlib.Path(folder)
  single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
  if single.is_file() and index.is_file():
    raise ValueError(f"{folder} holds both {single.name} and {index.name}: remove the one that is not meant.")
  if index.is_file():
    return _open_sharded(folder, index)
  if single.is_file():
    shapes = _header(single)
    return TensorFiles(folder, dict.fromkeys(shapes, single), shapes)
  pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
  if pickled:
    raise ValueError(f"{folder} holds pickled weights only, such as {pickled[0]}: they are never read, since a pickle can run any code; convert "
                     f"them to {single.name}.")
  raise ValueError(f"There are no weights in {folder}: it has neither {single.name} nor {index.name}.")


def _open_sharded(folder: pathlib.Path, index: pathlib.Path) -> TensorFiles:
  listed = read_json(index).get("weight_map")
  if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
    raise ValueError(f"{index} has no weight_map from tensor names to files: fetch it again.")
  headers = {}
  for file in sorted(set(listed.values())):
    if not (folder / file).is_file():
      raise ValueError(f"{index} names the file {file}, which is not in {folder}: fetch it.")
    headers[file] = _header(folder / file)
  for name, file in listed.items():
    if name not in headers[file]:
      raise ValueError(f"{index} says that the tensor {name} is in {file}, but it is not: fetch both again.")
  for file, shapes in headers.items():
    odd = sorted(name for name in shapes if listed.get(name) != file)
    if odd:
      raise ValueError(f"{folder / file} holds the tensor {odd[0]}, which {index.name} does not list there: fetch both again.")
  shapes = {name: headers[file][name] for name, file in listed.items()}
  return TensorFiles(folder, {name: folder / file for name, file in listed.items()}, shapes)


def _header(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  with _opened(path) as file:
    slices = {name: file.get_slice(name) for name in file.keys()}
    for name, x in slices.items():
      if x.get_dtype() not in DTYPES:
        raise ValueError(f"{path} stores the tensor {name} as {x.get_dtype()}: only {', '.join(DTYPES)} are read.")
    return {name: tuple(x.get_shape()) for name, x in slices.items()}


def _opened(path: pathlib.Path) -> Any:
  try:
    return safetensors.safe_open(path, framework="np")
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{path} is cut off, damaged or unreadable ({error}): fetch it again.") from error


def read_json(path: pathlib.Path) -> dict:
  """The object in a JSON file.

  Raises:
    ValueError: no such file, or it holds no JSON object.
  """
  if not path.is_file():
    raise ValueError(f"The file {path} is missing.")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:  # both broken JSON and broken UTF-8
    raise ValueError(f"{path} is no JSON ({error}): fetch it again.") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds a JSON {type(value).__name__}, but must hold an object: fetch it again.")
  return value


# Reading.


def load_tensors(files: TensorFiles, specs: dict, table: Table, shardings: dict | None = None, label: str = "", read: bool = True) -> dict:
  """The weights of `specs` from files; names and shapes are all checked before the first tensor is read, and without `read` none is: {}. See
  `import_tensors`."""
  shapes = published_shapes(specs, table)
  _check_names(set(shapes), set(files.shapes), f"The files in {files.folder}")
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
def _take_layer(stacked: jax.Array, number: int, dtype: Any) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stacked, number, keepdims=False).astype(dtype)


# Writing.


def export_tensors(params: dict, specs: dict, table: Table, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
  """(published name, tensor) of every weight of `params`, in the order of `published_shapes`; the inverse of `import_tensors`.

  Args:
    params: numpy or jax arrays as `specs`, sharded or not; one layer at a time is brought to the host.
    specs: the model's tree of `Param`.
    table: path -> `Entry`.
    dtype: type of the tensors; None keeps that of the weights.
  """
  _check_table(specs, table)
  leaves = P.flatten(params)
  for path, p in P.flatten(specs).items():
    entry, x = table[path], jnp.asarray(leaves[path])
    assert x.shape == p.shape, f"{path} has shape {x.shape}, but specs say {p.shape}"
    kind = jnp.dtype(dtype or x.dtype)
    for number, name in enumerate(_tensor_names(entry, p)):
      layer = np.asarray(_take_layer(x, number, kind) if entry.stacked else x).astype(kind, copy=False)
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
