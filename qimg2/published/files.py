"""Tensors in files, read one at a time: safetensors (one file, or several with an index) and GGUF.

Opening reads headers only. A tensor is read from its place when it is asked for, so host memory holds what is being read and no mapping of a file.
Formats: https://github.com/huggingface/safetensors, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Pickled weights (.bin, .pt) are never
opened: reading one can run any code.
"""

import dataclasses
import functools
import json
import math
import pathlib
import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

# Safetensors types that a weight can have. float8 becomes float32, which holds every one of its values.
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
FLOATS8 = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}
NUMPY = FLOATS | FLOATS8 | {"F64": np.float64, "U8": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GGUF = ".gguf"
ALL = slice(None)
MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors library
Raw = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor that can be read, whole or in part.

  Attributes:
    file: where it is.
    shape: its shape.
    kind: name of its type in the file, such as "BF16" or "Q4_K".
    read: `read(rows)`, the tensor of these rows, a slice of the first dimension.
  """
  file: pathlib.Path
  shape: tuple[int, ...]
  kind: str
  read: Callable[[slice], np.ndarray]

  def part(self, number: int, num_parts: int) -> "Tensor":
    """One of `num_parts` equal parts of the rows."""
    rows = self.shape[0] // num_parts
    return dataclasses.replace(self, shape=(rows, *self.shape[1:]), read=lambda _: self.read(slice(number * rows, (number + 1) * rows)))


@dataclasses.dataclass(frozen=True)
class TensorFiles:
  """The tensors of a folder of files, or of one file.

  Attributes:
    folder: the folder or the file.
    tensors: name -> tensor.
    metadata: what the file says beside its tensors; empty for several files.
  """
  folder: pathlib.Path
  tensors: Mapping[str, Tensor]
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape."""
    return {name: tensor.shape for name, tensor in self.tensors.items()}

  def read(self, name: str) -> np.ndarray:
    """The tensor `name` as float32, float16 or bfloat16.

    Raises:
      ValueError: its file was changed or removed since it was opened.
    """
    return self.tensors[name].read(ALL)

  def main_dtype(self) -> str:
    """The type in which a weight of these files is kept where nobody says otherwise: that of most of their numbers; bfloat16 where that is float8 or
    a type of few bits."""
    sizes: dict[str, int] = {}
    for tensor in self.tensors.values():
      dtype = jnp.dtype(FLOATS.get(tensor.kind, jnp.bfloat16)).name
      sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=sizes.get)

  def without(self, names: Collection[str]) -> "TensorFiles":
    """The same files without the tensors `names`, which then count neither as read nor as left over."""
    return dataclasses.replace(self, tensors={name: tensor for name, tensor in self.tensors.items() if name not in names})

  def renamed(self, rename: Callable[[str], str]) -> "TensorFiles":
    """The same files with other names of tensors.

    Raises:
      ValueError: two of them get the same name.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in self.tensors.items():
      if rename(name) in tensors:
        raise ValueError(f"{self.folder} holds the tensor {rename(name)} twice, once as {name}: remove one of them.")
      tensors[rename(name)] = tensor
    return dataclasses.replace(self, tensors=tensors)


# A folder.


def open_tensors(folder: str | pathlib.Path, stem: str) -> TensorFiles:
  """The tensors of `<stem>.safetensors`, or of the files that `<stem>.safetensors.index.json` lists; where there is neither, those of the only
  variant, such as `<stem>.fp16.safetensors` or `<stem>.safetensors.index.fp16.json`.

  Raises:
    ValueError: no such files, only pickled ones, both forms, several variants, a damaged file, or an index that does not agree with its files.
  """
  folder = pathlib.Path(folder)
  single, index = _find_weights(folder, stem)
  if index is None:
    return open_file(single)
  listed = _weight_map(index)
  if single is not None and set(listed.values()) != {single.name}:
    raise ValueError(f"{folder} holds both {single.name} and {index.name}: remove the one that is not meant.")
  return _open_sharded(folder, index, listed)


def _find_weights(folder: pathlib.Path, stem: str) -> tuple[pathlib.Path | None, pathlib.Path | None]:
  """(single file, index) of a folder; not both are None."""
  single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
  if single.is_file() or index.is_file():
    return tuple(path if path.is_file() else None for path in (single, index))
  singles = {path.name.removeprefix(f"{stem}.").removesuffix(".safetensors"): path for path in folder.glob(f"{stem}.*.safetensors")}
  singles = {variant: path for variant, path in singles.items() if "-of-" not in variant}
  indices = {path.name.removeprefix(f"{stem}.safetensors.index.").removesuffix(".json"): path
             for path in folder.glob(f"{stem}.safetensors.index.*.json")}
  variants = sorted({*singles, *indices})
  if len(variants) == 1:
    return singles.get(variants[0]), indices.get(variants[0])
  if variants:
    raise ValueError(f"{folder} holds weights in the variants {', '.join(variants)} only: keep one of them, or fetch {single.name}.")
  raise ValueError(_no_weights(folder, single, index))


def _no_weights(folder: pathlib.Path, single: pathlib.Path, index: pathlib.Path) -> str:
  names = sorted(path.name for path in folder.glob("*"))
  for suffixes, say in (((".safetensors",), "has {}, but neither {} nor {}: fetch the file that is missing, or rename the one that is there."),
                        (PICKLES, "holds pickled weights only, such as {}: they are never read, as a pickle can run any code; convert them to {}."),
                        ((GGUF,), "holds {}: a GGUF file is named by itself, beside a folder that has the encoder and the VAE.")):
    found = [name for name in names if name.endswith(suffixes)]
    if found:
      return f"{folder} {say.format(found[0], single.name, index.name)}"
  return f"There are no weights in {folder}: it has neither {single.name} nor {index.name}."


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  listed = read_json(index).get("weight_map")
  if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
    raise ValueError(f"{index} has no weight_map from tensor names to files: fetch it again.")
  return listed


def _open_sharded(folder: pathlib.Path, index: pathlib.Path, listed: Mapping[str, str]) -> TensorFiles:
  shards = {}
  for file in sorted(set(listed.values())):
    if not (folder / file).is_file():
      raise ValueError(f"{index} names the file {file}, which is not in {folder}: fetch it.")
    shards[file] = open_file(folder / file).tensors
  for name, file in listed.items():
    if name not in shards[file]:
      raise ValueError(f"{index} says that the tensor {name} is in {file}, but it is not: fetch both again.")
  for file, tensors in shards.items():
    odd = sorted(name for name in tensors if listed.get(name) != file)
    if odd:
      raise ValueError(f"{folder / file} holds the tensor {odd[0]}, which {index.name} does not list there: fetch both again.")
  return TensorFiles(folder, {name: shards[file][name] for name, file in listed.items()})


# One file.


def open_file(path: str | pathlib.Path) -> TensorFiles:
  """The tensors of a .safetensors or .gguf file.

  Raises:
    ValueError: no such file, a damaged one, or one of another kind.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"There is no file {path}: name a .safetensors or {GGUF} file of weights.")
  if path.suffix == GGUF:
    return _open_gguf(path)
  if path.suffix in PICKLES:
    raise ValueError(f"{path} is a pickle, which is never read, since it can run any code: convert it to .safetensors.")
  return _open_safetensors(path)


def _open_safetensors(path: pathlib.Path) -> TensorFiles:
  try:
    with safetensors.safe_open(path, framework="np"):  # which checks that the file is whole
      pass
    with open(path, "rb") as file:
      length, = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise ValueError(f"{path} is cut off, damaged or unreadable ({error}): fetch it again.") from error
  metadata = header.pop("__metadata__", {})
  return TensorFiles(path, {name: _safetensor(path, 8 + length, entry) for name, entry in header.items()}, metadata)


def _safetensor(path: pathlib.Path, start: int, entry: Mapping[str, Any]) -> Tensor:
  shape, kind, begin = tuple(entry["shape"]), entry["dtype"], start + entry["data_offsets"][0]
  dtype = np.dtype(NUMPY.get(kind, np.uint8))  # nobody reads a type that is not there
  return _stored(path, shape, kind, begin, dtype.itemsize * math.prod(shape[1:]), functools.partial(_from_bytes, dtype=dtype))


def _from_bytes(raw: np.ndarray, dtype: np.dtype) -> np.ndarray:
  return raw.view(dtype).astype(np.float32 if dtype.itemsize == 1 and dtype.kind not in "iu" else dtype, copy=False)


def _stored(path: pathlib.Path, shape: tuple[int, ...], kind: str, begin: int, row_bytes: int, decode: Raw) -> Tensor:
  """A tensor whose rows stand one after the other from the byte `begin` on; `decode` makes numbers [num_rows, ...] of bytes [num_rows, row_bytes]."""
  def read(rows: slice) -> np.ndarray:
    first, last, _ = rows.indices(shape[0] if shape else 1)
    try:
      raw = np.fromfile(path, np.uint8, (last - first) * row_bytes, offset=begin + first * row_bytes)
    except OSError as error:
      raise ValueError(f"{path} is unreadable ({error}): it was changed or removed since it was opened.") from error
    if raw.size != (last - first) * row_bytes:
      raise ValueError(f"{path} ends within a tensor: it was changed since it was opened, or is cut off.")
    return decode(raw.reshape(last - first, row_bytes)).reshape((last - first, *shape[1:]) if shape else ())
  return Tensor(path, shape, kind, read)


# GGUF.


def _open_gguf(path: pathlib.Path) -> TensorFiles:
  try:
    import gguf
  except ImportError as error:
    raise ValueError(f"To read {path} install what knows GGUF files: pip install gguf.") from error
  try:
    reader = gguf.GGUFReader(path)
    shapes = {one.name: _gguf_shape(reader, one) for one in reader.tensors}
    tensors = {one.name: _gguf_tensor(path, one, shapes[one.name]) for one in reader.tensors}
    fields = {name: reader.fields[name].contents() for name in reader.fields if name.startswith("general.")}
  except (ValueError, IndexError, KeyError, TypeError, OSError) as error:
    raise ValueError(f"{path} is no readable GGUF file, or is cut off ({error}): fetch it again.") from error
  return TensorFiles(path, tensors, {name: str(value) for name, value in fields.items()})


def _gguf_shape(reader: Any, one: Any) -> tuple[int, ...]:
  """A tensor's shape as PyTorch has it: GGUF counts dimensions from the last one. Writers reshape what their blocks do not divide, and note it."""
  field = reader.fields.get(f"comfy.gguf.orig_shape.{one.name}")
  return tuple(int(size) for size in (field.contents() if field else reversed(one.shape)))


def _gguf_tensor(path: pathlib.Path, one: Any, shape: tuple[int, ...]) -> Tensor:
  import gguf.quants
  kind, blocks = one.tensor_type, gguf.GGML_QUANT_SIZES[one.tensor_type]
  if path.stat().st_size < one.data_offset + one.n_bytes:
    raise ValueError(f"it ends within the tensor {one.name}")
  try:
    gguf.quants.dequantize(np.zeros((1, blocks[1]), np.uint8), kind)
  except NotImplementedError as error:
    raise ValueError(f"the package gguf cannot read the type {kind.name} of the tensor {one.name}") from error
  def decode(raw: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(raw, kind)
  if math.prod(shape[1:]) % blocks[0]:  # rows of another shape than the file's: such a tensor is read whole
    whole = _stored(path, (1, math.prod(shape)), kind.name, one.data_offset, int(one.n_bytes), decode)
    return Tensor(path, shape, kind.name, lambda rows: whole.read(ALL).reshape(shape)[rows])
  return _stored(path, shape, kind.name, one.data_offset, math.prod(shape[1:]) // blocks[0] * blocks[1], decode)


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
