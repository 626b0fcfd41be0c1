"""Reads the text of a compiled program (HLO): what each device sends, moves through memory and computes in one call.

XLA's own cost analysis counts the body of a loop once; here every instruction counts as often as it runs: the trip counts of all loops around
it multiplied. Bytes that a device sends in a group of n, with b bytes of operands (the ring algorithms, whatever the compiler does):

  all-gather (n - 1) b     reduce-scatter, all-to-all (n - 1)/n b     all-reduce 2 (n - 1)/n b     collective-permute, send b          (1)

Memory: an instruction reads its operands and writes its results; a fusion is one instruction, a slice reads what it cuts out, an update in
place writes what it changes. Arrays in a memory space other than the main one (`S(1)` in a layout: on-chip memory) do not count.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qimg2.attention import splash_cost

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast", "send")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id", "replica-id",
         "iota", "opt-barrier", "domain", "add-dependency"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # dimensions, permutation
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a type: dtype name, dimensions, and memory space (0 is the main one)."""
  dtype: str
  shape: tuple[int, ...]
  space: int = 0

  @property
  def num_bytes(self) -> int:
    """Bytes without padding."""
    found = re.match(r"[a-z]+(\d+)", self.dtype)
    bits = _BITS[self.dtype] if self.dtype in _BITS else int(found[1])
    return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `types` are the arrays of its result, grouped as in the outermost tuple; `operands` are names; `attributes` is the rest."""
  name: str
  opcode: str
  types: tuple[tuple[Array, ...], ...]
  operands: tuple[str, ...]
  attributes: str
  is_root: bool
  text: str

  @property
  def arrays(self) -> tuple[Array, ...]:
    """All arrays of the result."""
    return tuple(array for group in self.types for array in group)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A message pattern: `kind`; `dtype` of what is sent, such as "bf16"; `groups` [G, n] of indices in the device order; bytes that a device sends per
  call (1); calls per step. What sends arrays of two types at once is two of them."""
  kind: str
  dtype: str
  groups: np.ndarray
  num_bytes: float
  times: int


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device does in one call of the program.

  Attributes:
    collectives: all of them, each with its number of calls.
    hbm_bytes: read and written.
    flops: of products and convolutions, recomputation counted.
    unknown_loops: names of loops whose trip count is not in the text; their bodies count once.
  """
  collectives: tuple[Collective, ...]
  hbm_bytes: float
  flops: float
  unknown_loops: tuple[str, ...]


def total(parts: Sequence[tuple[Traffic, int]]) -> Traffic:
  """What programs do together, each of them called so many times."""
  added = lambda key: sum(times * getattr(traffic, key) for traffic, times in parts)
  messages = tuple(dataclasses.replace(one, times=one.times * times) for traffic, times in parts for one in traffic.collectives)
  return Traffic(messages, added("hbm_bytes"), added("flops"), tuple(name for traffic, _ in parts for name in traffic.unknown_loops))


def analyze(text: str, num_devices: int) -> Traffic:
  """The traffic of `compiled.as_text()`; `num_devices` is the size of the mesh that it was compiled for.

  Raises:
    ValueError: text without an entry computation.
  """
  walker = _Walker(parse(text), num_devices)
  walker.visit(walker.entry, 1)
  return Traffic(tuple(walker.collectives), walker.hbm_bytes, walker.flops, tuple(walker.unknown))


def mesh_axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
  """Names of the mesh axes along which the devices of a group differ, in mesh order; groups are indices in the mesh's row-major order."""
  places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())), axis=-1)  # G n axes
  return tuple(name for number, name in enumerate(mesh_shape) if np.ptp(places[..., number], axis=1).any())


def out_of_memory(message: str) -> tuple[float, float] | None:
  """(bytes that the program needs, bytes that there are) of a compiler's out-of-memory message; None for any other message."""
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  size = r"([\d.]+)([KMGT]?)i?B?"
  for pattern in (rf"Used {size} of {size} hbm", rf"\({size}\) exceeds available HBM \({size}\)", rf"{size} exceeds .*?HBM.*?{size}"):
    if found := re.search(pattern, message):
      unit = lambda letter: 1024 ** " KMGT".index(letter or " ")
      return float(found[1]) * unit(found[2]), float(found[3]) * unit(found[4])
  return None


# The text.


def parse(text: str) -> dict[str, list[Instruction]]:
  """Name of each computation -> its instructions; the entry computation has the name "ENTRY"."""
  computations: dict[str, list[Instruction]] = {}
  current: list[Instruction] | None = None
  for line in re.sub(r'\n(?=["}]\S)', " ", text).splitlines():  # what a kernel says of itself comes on lines of its own
    if current is None or not line.startswith(" "):
      header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
      if header and not line.startswith("HloModule"):
        current = computations["ENTRY" if header[1] else header[2]] = []
      continue
    if instruction := _instruction(line):
      current.append(instruction)
  if "ENTRY" not in computations:
    raise ValueError("This is not the text of a compiled program: it has no ENTRY computation.")
  return computations


def _instruction(line: str) -> Instruction | None:
  found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
  if not found:
    return None
  start = found.end()
  end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
  opcode = re.match(r"\s*([\w\-]+)\(", line[end:])
  if not opcode:
    return None
  opening = end + opcode.end() - 1
  closing = _closing(line, opening)
  operands = re.findall(r"%([\w.\-]+)", line[opening:closing + 1])
  return Instruction(found[2], opcode[1], _types(line[start:end]), tuple(operands), line[closing + 1:], bool(found[1]), line[opening + 1:closing])


def _closing(text: str, opening: int) -> int:
  depth = 0
  for found in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.start()
  return len(text) - 1


def _types(text: str) -> tuple[tuple[Array, ...], ...]:
  if not text.startswith("("):
    return (_arrays(text),)
  groups, depth, start = [], 0, 1
  for place, letter in enumerate(text):
    depth += (letter in "([{") - (letter in ")]}")
    if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
      groups.append(_arrays(text[start:place]))
      start = place + 1
  return tuple(groups)


def _arrays(text: str) -> tuple[Array, ...]:
  found = re.finditer(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text)
  space = lambda layout: int(match[1]) if (match := re.search(r"S\((\d+)\)", layout or "")) else 0
  return tuple(Array(one[1], tuple(int(n.lstrip("<=")) for n in one[2].split(",") if n), space(one[3])) for one in found)


def _called(instruction: Instruction) -> list[str]:
  names = re.findall(r"(?:calls|to_apply|called_computation)=%?([\w.\-]+)", instruction.attributes)
  if lists := re.search(r"(?:branch_computations|called_computations)=\{([^}]*)\}", instruction.attributes):
    names += re.findall(r"[\w.\-]+", lists[1])
  return names + re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)


# Counting.


class _Walker:
  """Adds up what the entry computation and all that it calls do."""

  def __init__(self, computations: dict[str, list[Instruction]], num_devices: int):
    self._computations, self._num_devices = computations, num_devices
    self._named = {name: {one.name: one for one in body} for name, body in computations.items()}
    self.entry = "ENTRY"
    self.collectives: list[Collective] = []
    self.hbm_bytes = self.flops = 0.0
    self.unknown: list[str] = []

  def visit(self, name: str, times: int, inside: bool = False, seen: set[str] | None = None) -> None:
    """Counts a computation `times` times; `inside` a fusion nothing goes through memory. `seen` are the channels that the caller has used: the
    TPU compiler writes a collective that runs beside products into the fusion that starts it, those that it runs beside, and the last one."""
    named = self._named[name]
    seen = set() if seen is None or not inside else seen
    for one in self._computations[name]:
      kind = one.opcode.removesuffix("-start")
      if kind in COLLECTIVES:
        channel = str((kind, [array.shape for array in one.arrays], re.findall(r"channel_id=\d+", one.attributes)))
        if not inside or channel not in seen:
          self._collect(one, kind, named, times, name)
        seen.add(channel)
      elif kind in ("dot", "convolution"):
        self.flops += times * _flops(one, named)
      elif kind == "custom-call":
        arrays = [array for operand in one.operands if operand in named for array in named[operand].arrays]
        operands = [array for array in arrays if "f" in array.dtype and array.num_bytes]
        cost = splash_cost(f"{one.name} {one.attributes}", [(array.shape, array.num_bytes // math.prod(array.shape)) for array in operands])
        self.flops, self.hbm_bytes = (total + times * more for total, more in zip((self.flops, self.hbm_bytes), cost or (0, 0)))
      if not inside and one.opcode not in _FREE and not one.opcode.endswith(("-done", "-update")):
        self.hbm_bytes += times * self._memory(one, named)
      if one.opcode == "while":
        self.visit(re.search(r"body=%?([\w.\-]+)", one.attributes)[1], times * self._trips(one))
      elif one.opcode in ("fusion", "call", "conditional", "async-start", "custom-call"):
        for called in _called(one):
          self.visit(called, times, inside or one.opcode in ("fusion", "async-start", "custom-call"), seen)

  def _collect(self, one: Instruction, kind: str, named: dict, times: int, computation: str) -> None:
    num_bytes = collections.Counter()
    for array in (array for name in one.operands if name in named for array in named[name].arrays):
      num_bytes[array.dtype] += array.num_bytes
    groups = _groups(one.attributes, self._num_devices)
    n = groups.shape[1]
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"  # the TPU compiler writes it as an all-reduce whose result is cut
    if n > 1:
      factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(kind, 1 if kind in ("collective-permute", "send") else (n - 1) / n)
      self.collectives += [Collective(kind, dtype, groups, factor * size, times) for dtype, size in num_bytes.items()]

  def _trips(self, one: Instruction) -> int:
    """The trip count that the compiler wrote down, or the one constant that the loop's condition compares with."""
    if found := re.search(r'known_trip_count[":{\s]+n[":\s]+(\d+)', one.attributes):
      return int(found[1])
    condition = self._computations[re.search(r"condition=%?([\w.\-]+)", one.attributes)[1]]
    limits = [int(line.text) for line in condition if line.opcode == "constant" and re.fullmatch(r"\d+", line.text)]
    if len(limits) == 1:
      return limits[0]
    self.unknown.append(one.name)
    return 1

  def _memory(self, one: Instruction, named: dict) -> float:
    reads = [[array for array in named[name].arrays] if name in named else [] for name in one.operands]
    if one.opcode in _SLICES:
      return 2 * _main(one.arrays)
    if one.opcode == "dynamic-update-slice":
      return 2 * _main(reads[1])
    if one.opcode == "fusion":
      read, written = self._fusion(_called(one)[0])
      factors = [_main(arrays) if i not in read else min(read[i], _main(arrays)) for i, arrays in enumerate(reads)]
      return sum(factors) + (_main(one.arrays) if written is None else min(written, _main(one.arrays)))
    if one.opcode.endswith("-start"):
      result = one.types[0 if one.opcode == "copy-start" else min(1, len(one.types) - 1)]
      moved = _main(result)
      sliced = one.opcode in ("async-start", "slice-start")
      return moved + (sum(min(_all(arrays), _all(result)) if sliced else _main(arrays) for arrays in reads))
    return sum(map(_main, reads)) + _main(one.arrays)

  @functools.cache
  def _fusion(self, name: str) -> tuple[dict[int, int], int | None]:
    """(operand number -> bytes read, for operands of which only slices are read or that are updated in place; bytes written if fewer than all)."""
    body, named = self._computations[name], self._named[name]
    users: dict[str, list[Instruction]] = {}
    for one in body:
      for operand in one.operands:
        users.setdefault(operand, []).append(one)
    read = {}
    for one in body:
      if one.opcode == "parameter" and one.text.isdigit() and (uses := list(_uses(one, users))):
        amounts = [self._read_by(use, operand) for use, operand in uses]
        if None not in amounts:
          read[int(one.text)] = sum(amounts)
    roots = [one for one in body if one.is_root]
    if roots and roots[0].opcode == "tuple":
      roots = [named[operand] for operand in roots[0].operands]
    written, cut = 0, False
    for root in roots:
      while root.opcode == "bitcast" and root.operands[0] in named:
        root = named[root.operands[0]]
      in_place = root.opcode == "dynamic-update-slice" and root.operands[1] in named
      cut |= in_place
      written += _all(named[root.operands[1]].arrays) if in_place else _main(root.arrays)
    return read, written if cut else None


  def _read_by(self, use: Instruction, operand: str) -> int | None:
    """Bytes that an instruction in a fusion reads of an operand; None for all of it."""
    if use.opcode in _SLICES:
      return _all(use.arrays)
    if use.opcode == "dynamic-update-slice" and use.operands[0] == operand:
      return 0
    if use.opcode == "fusion":
      amounts = [self._fusion(_called(use)[0])[0].get(place) for place, name in enumerate(use.operands) if name == operand]
      return None if None in amounts else sum(amounts)
    return None


def _uses(one: Instruction, users: dict) -> Iterator[tuple[Instruction, str]]:
  for use in users.get(one.name, ()):
    if use.opcode == "bitcast":
      yield from _uses(use, users)
    else:
      yield use, one.name


def _main(arrays: Any) -> int:
  return sum(array.num_bytes for array in arrays if array.space == 0)


def _all(arrays: Any) -> int:
  return sum(array.num_bytes for array in arrays)


def _groups(attributes: str, num_devices: int) -> np.ndarray:
  """[G, n] of device indices, from any of the ways in which groups are written."""
  if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?\s*)*)\}", attributes):
    pairs = np.array([int(n) for n in re.findall(r"\d+", found[1])], np.int64).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return pairs if len(pairs) else np.zeros((1, 1), np.int64)
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[[\d,]*\](?:<=)?(.*?)\))? \{([^}]*)\}", attributes):
    return _groups_of_axes(found[1], found[2], found[3])
  if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", attributes):
    return _order(found[2], found[3]).reshape([-1, int(found[1].split(",")[-1])])
  if found := re.search(r"replica_groups=\{((?:\{[\d,]+\},?\s*)+)\}", attributes):
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])], np.int64)
  if re.search(r"replica_groups=(?!\{\})", attributes):
    raise ValueError(f"The groups of a collective are written in a way that qimg2/analysis/hlo.py does not read: {attributes.strip(', ')[:200]}.")
  return np.arange(num_devices)[None]


def _groups_of_axes(mesh: str, order: str | None, axes: str) -> np.ndarray:
  """Groups along some axes of a mesh such as "'x'=2,'y'=4"; "'y':(2)2" is the part of size 2 of y that lies inside its outermost 2 parts."""
  sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)}
  chosen = [(name, int(outer or 1), int(size or sizes[name])) for name, outer, size in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", axes)]
  factors = []  # (size, whether a group spans it), outermost first
  for name, size in sizes.items():
    done = 1
    for _, outer, part in sorted(one for one in chosen if one[0] == name):
      factors += [(outer // done, False), (part, True)]
      done = outer * part
    factors.append((size // done, False))
  dims = re.match(rf"{_IOTA}", order) if order else None
  places = _order(dims[1], dims[2]) if dims else np.arange(math.prod(sizes.values()))
  places = places.reshape([size for size, _ in factors])
  inside = [number for number, (_, spanned) in enumerate(factors) if spanned]
  outside = [number for number in range(len(factors)) if number not in inside]
  return places.transpose(outside + inside).reshape(-1, math.prod(factors[number][0] for number in inside))


def _order(dims: str, permutation: str | None) -> np.ndarray:
  """The numbers 0, 1, ... in an array of `dims`, transposed, in one row."""
  order = np.arange(math.prod(map(int, dims.split(",")))).reshape([int(n) for n in dims.split(",")])
  return (order.transpose([int(n) for n in permutation.split(",")]) if permutation else order).reshape(-1)


def _flops(one: Instruction, named: dict) -> float:
  out, sides = math.prod(one.arrays[0].shape), [named[name].arrays[0].shape for name in one.operands[:2] if name in named]
  if len(sides) < 2:
    return 0.0
  if one.opcode == "dot":
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    return 2.0 * out * math.prod(sides[0][int(n)] for n in dims[1].split(",") if n) if dims else 0.0
  return 2.0 * _convolution(one, sides)


def _convolution(one: Instruction, sides: list[tuple[int, ...]]) -> float:
  """Multiply-adds of a convolution: batch x features in x features out x (output position, tap) pairs that meet a true input."""
  lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", found[1])) if (found := re.search(r"window=\{([^}]*)\}", one.attributes)) else {}
  total = one.arrays[0].shape[out.index("b")] * one.arrays[0].shape[out.index("f")] * sides[1][rhs.index("i")]
  for dim in range(len(lhs) - 2):
    value = lambda key, default, dim=dim: int(window[key].split("x")[dim]) if key in window else default
    low = int(window["pad"].split("x")[dim].split("_")[0]) if "pad" in window else 0
    stride, base, taps = value("stride", 1), value("lhs_dilate", 1), value("rhs_dilate", 1)
    size, num_taps, places = (shape[labels.index(str(dim))] for shape, labels in ((sides[0], lhs), (sides[1], rhs), (one.arrays[0].shape, out)))
    at = np.arange(places)[:, None] * stride + np.arange(num_taps)[None] * taps - low
    total *= int(((at >= 0) & (at < (size - 1) * base + 1) & (at % base == 0)).sum())
  return float(total)
