"""Published tensors <-> our trees.

A name table maps each path of a model's specs to the published tensor(s) that hold it. PyTorch stores a linear weight as [out, in] and a
convolution as [out, in, h, w]; we store [in..., out...] and [h, w, in, out], and stack the layers that `jax.lax.scan` runs over. Both
directions are strict: a tensor that is missing, left over or of another shape is an error that names it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from qimg2 import params as P


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


def import_tensors(specs: dict, table: Table, names: set[str], read: Callable[[str], np.ndarray]) -> dict:
  """Numpy params for `specs`, read tensor by tensor.

  Args:
    specs: the model's tree of `Param`.
    table: path -> `Entry`, exactly the paths of `specs`.
    names: all tensor names that the published files hold.
    read: `read(name)`, the tensor of a name.

  Raises:
    ValueError: a tensor is missing, left over, or has another shape than `specs` says.
  """
  _check_table(specs, table)
  expected = {name for path, p in P.flatten(specs).items() for name in _tensor_names(table[path], p)}
  _check_names(expected, names)
  return P.map_with_path(lambda path, p: _import_one(p, table[path], read), specs)


def export_tensors(params: dict, specs: dict, table: Table) -> Iterator[tuple[str, np.ndarray]]:
  """(published name, tensor) of every weight of `params`; the inverse of `import_tensors`."""
  _check_table(specs, table)
  leaves = P.flatten(params)
  for path, p in P.flatten(specs).items():
    entry, x = table[path], np.asarray(leaves[path])
    layers = x if "{}" in entry.name else [x]
    for name, layer in zip(_tensor_names(entry, p), layers):
      yield name, np.ascontiguousarray(entry.to_published(layer))


def _tensor_names(entry: Entry, p: P.Param) -> list[str]:
  return [entry.name.format(i) for i in range(p.shape[0])] if "{}" in entry.name else [entry.name]


def _import_one(p: P.Param, entry: Entry, read: Callable[[str], np.ndarray]) -> np.ndarray:
  ours = p.shape[1:] if "{}" in entry.name else p.shape
  layers = []
  for name in _tensor_names(entry, p):
    x = read(name)
    if x.shape != entry.shape(ours):
      raise ValueError(f"Tensor {name} has shape {x.shape}, but the config asks for {entry.shape(ours)}: the files and the config differ.")
    layers.append(entry.to_ours(x, ours))
  return np.stack(layers) if "{}" in entry.name else layers[0]


def _check_table(specs: dict, table: Table) -> None:
  odd = set(P.flatten(specs)) ^ set(table)
  assert not odd, f"name table and specs differ: {sorted(odd)}"


def _check_names(expected: set[str], names: set[str]) -> None:
  missing, extra = sorted(expected - names), sorted(names - expected)
  if missing:
    raise ValueError(f"The files lack {len(missing)} tensor(s), first {missing[0]}: they are incomplete or the config is for another model.")
  if extra:
    raise ValueError(f"The files hold {len(extra)} tensor(s) that the config does not know, first {extra[0]}: it is for another model.")
