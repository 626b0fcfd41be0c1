"""Copies of a stage's state on disks of the machines themselves, for machines that are taken away without a notice.

A checkpoint in the run's folder is safe, and slow to write. A copy is quick: each process writes the shards of its own devices, and no process waits
for another. It is worth something as long as all shards are still there:

  <folder>/<id>/<step>/<process>/<number>.npy   one shard of one array, as unsigned integers of its size
                                 record.json    which shards of which arrays these are, and what a checkpoint has as `meta`
                                 manifest.json  see qimg2.training.manifest

The id is drawn when a stage first has copies and kept in its folder, so that nothing is taken from another run. On start the newest step is taken of
which every shard is on some disk, if it is newer than the newest checkpoint. A process whose disk is new gets its shards from the others, where the
mesh replicates them (axis `data`, or weights that are not divided); where it does not, all go on from the checkpoint.

Orbax has such copies (`experimental.emergency`). They are not used: that manager needs a mesh with at least two replicas of everything, takes the
place of the manager of the checkpoints, and is declared experimental.
"""

import concurrent.futures
import functools
import json
import math
import pathlib
import shutil
import uuid
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from qimg2.places import Place, write_file
from qimg2.training import manifest
from qimg2.training.checkpoint import items_of, state_of
from qimg2.training.faults import SaveClock, exchange
from qimg2.training.state import TrainState

KEEP = 3  # a process may be two steps behind: one that it writes while the others have begun the next
RECORD = "record.json"


class LocalCopies:
  """The copies of one stage on this machine: `with LocalCopies(...) as copies`. Every process has one, and all call it alike."""

  def __init__(self, folder: str, every_s: float, stage_folder: Place):
    """Args: folder on a disk of this machine, "" for no copies; seconds from a copy to the next one; folder of the stage in the run's folder."""
    self._clock = SaveClock(every_s if folder else 0.0)
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._writing: concurrent.futures.Future | None = None
    self._folder = pathlib.Path(folder).absolute() / _identity(stage_folder) if folder else None

  def __enter__(self):
    self._clock.__enter__()
    return self

  def __exit__(self, *failure):
    self._pool.shutdown()
    self.wait()
    self._clock.__exit__(*failure)

  def is_due(self, by_number: bool | None = False) -> bool:
    """Whether all processes copy after this step; see `SaveClock`."""
    return self._clock(by_number)

  def save(self, state: TrainState, meta: dict, sync: Callable[[], None] = lambda: None) -> None:
    """Starts to copy, after `sync` has brought the rows of metrics up to the state to their place; returns once the device memory may be reused. A
    copy that cannot be written, or whose rows cannot, is named in the log, and those before it stay."""
    self.wait()
    try:
      sync()
    except OSError as error:
      logging.warning("There is no copy of step %d: %s", int(state.step), error)
      return
    step, shards, leaves = int(state.step), {}, _leaves(items_of(state))
    for name, x in leaves.items():
      for shard in x.addressable_shards:
        shards.setdefault((name, _key(shard.index, x.shape)), shard.data).copy_to_host_async()
    found = {key: np.array(x).view(_bits(x.dtype)) for key, x in shards.items()}  # the next step writes into the device's memory
    self._writing = self._pool.submit(self._write, step, found, {"arrays": _describe(leaves), "meta": meta})

  def wait(self) -> None:
    """Returns when the copy under way is written."""
    if self._writing is not None:
      try:
        self._writing.result()
      except OSError as error:
        logging.warning("Process %d has no new copy in %s (%s): if a machine is lost now, the run goes on from an older one or from a checkpoint.",
                        jax.process_index(), self._folder, error)
      self._writing = None

  def clear(self) -> None:
    """Removes the copies, which a stage that is done does not need."""
    self.wait()
    if self._folder is not None:
      shutil.rmtree(self._folder, ignore_errors=True)

  def newest(self, abstract: TrainState, after: int, before: int) -> tuple[TrainState, dict] | None:
    """(state, meta) of the newest step between `after` and `before` of which all shards that `abstract` asks for are on some disk; None if there is
    none. Newer copies are removed: the run makes them anew, and those of two attempts are not to be mixed."""
    if self._folder is None:
      return None
    leaves = _leaves(items_of(abstract))
    steps = [int(path.name) for path in self._folder.glob("*") if path.name.isdecimal() and after < int(path.name) < before]
    taken, found = after, None
    for step in sorted({step for text in exchange(json.dumps(steps)) for step in json.loads(text)}, reverse=True):
      paths, meta = self._read(step, leaves)
      texts = exchange(json.dumps(meta))
      have = [text != "null" for text in texts]
      if any(have) and all(_is_covered(x, have) for x in leaves.values()):
        arrays = {name: _assemble(x, have, functools.partial(_load, paths, name)) for name, x in leaves.items()}
        tree = jax.tree.unflatten(jax.tree.structure(items_of(abstract)), list(arrays.values()))
        taken, found = step, (state_of(tree, abstract), json.loads(texts[have.index(True)]))
        break
      logging.warning("The copies of step %d cannot be used and are removed: process %s has no whole one, and nobody else has the same shards.", step,
                      ", ".join(str(i) for i, whole in enumerate(have) if not whole))
    for path in self._folder.glob("*"):
      if int(path.name) > taken:
        shutil.rmtree(path, ignore_errors=True)
    return found

  def _write(self, step: int, shards: dict[tuple[str, str], np.ndarray], record: dict) -> None:
    own = self._folder / str(step) / str(jax.process_index())
    part = own.with_name(f"{own.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for number, x in enumerate(shards.values()):
      np.save(part / f"{number}.npy", x)
    (part / RECORD).write_text(json.dumps(record | {"shards": list(shards)}), encoding="utf-8")
    manifest.write_manifest(part)
    shutil.rmtree(own, ignore_errors=True)
    part.rename(own)
    whole = sorted(int(path.parent.name) for path in self._folder.glob(f"*/{jax.process_index()}"))
    for path in self._folder.glob("*"):
      if int(path.name) < min(whole[-KEEP:]):
        shutil.rmtree(path, ignore_errors=True)

  def _read(self, step: int, leaves: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict[tuple[str, str], pathlib.Path], dict | None]:
    """(where each intact shard of a step is on this disk, meta); meta is None if this process lacks one that its devices need."""
    paths, meta = {}, None
    for folder in self._folder.glob(f"{step}/*"):
      if folder.suffix == ".part":
        continue
      if fault := _fault(folder):
        logging.warning("Process %d leaves out the copy %s: %s.", jax.process_index(), folder, fault)
        continue
      record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
      if record["arrays"] == _describe(leaves):
        paths |= {tuple(key): folder / f"{number}.npy" for number, key in enumerate(record["shards"])}
        meta = record["meta"]
    needed = {(name, _key(index, x.shape)) for name, x in leaves.items() for index in x.sharding.addressable_devices_indices_map(x.shape).values()}
    return paths, meta if needed <= paths.keys() else None


def _identity(folder: Place) -> str:
  """The id of a stage's copies, the same on all processes: the first one keeps it in the stage's folder."""
  path, text = folder / "local_copies_id", ""
  if jax.process_index() == 0:
    if not path.exists():
      write_file(path, uuid.uuid4().hex)
    text = path.read_text(encoding="utf-8")
  return exchange(text)[0]


def _leaves(items: dict[str, Any]) -> dict[str, Any]:
  return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(items)[0]}


def _describe(leaves: dict[str, Any]) -> dict[str, list]:
  return {name: [list(x.shape), x.dtype.name] for name, x in leaves.items()}


def _fault(folder: pathlib.Path) -> str:
  """What is wrong with a copy, "" for nothing."""
  try:
    return manifest.find_fault(folder)
  except OSError as error:  # a disk that fails is as one that is new
    return str(error)


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
  """A name of a part of an array."""
  return ",".join("{}:{}".format(*one.indices(size)) for one, size in zip(index, shape))


def _bits(dtype: Any) -> np.dtype:
  return np.dtype(f"uint{8 * dtype.itemsize}")


def _load(paths: dict[tuple[str, str], pathlib.Path], name: str, key: str) -> np.ndarray:
  return np.load(paths[name, key])


# Every shard from the first device, in the order of the mesh, whose process has it.


def _sources(x: jax.ShapeDtypeStruct, have: list[bool]) -> dict[str, Any]:
  """Name of a part -> the device that gives it, None where no process can."""
  found = {}
  places = x.sharding.devices_indices_map(x.shape)
  for device in x.sharding.mesh.devices.flat:
    key = _key(places[device], x.shape)
    found[key] = found.get(key) or (device if have[device.process_index] else None)
  return found


def _is_covered(x: jax.ShapeDtypeStruct, have: list[bool]) -> bool:
  return None not in _sources(x, have).values()


def _assemble(x: jax.ShapeDtypeStruct, have: list[bool], load: Any) -> jax.Array:
  """An array of which each part is that of its source: of its replicas one holds the bits and the others zeros, and they are added."""
  mesh, sources = x.sharding.mesh, _sources(x, have)
  divided = {axis for axes in x.sharding.spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
  others = tuple(axis for axis in mesh.axis_names if axis not in divided)
  num, pieces = math.prod(mesh.shape[axis] for axis in others), []
  for device, index in x.sharding.addressable_devices_indices_map(x.shape).items():
    key = _key(index, x.shape)
    part = load(key) if sources[key] == device else np.zeros(x.sharding.shard_shape(x.shape), _bits(x.dtype))
    pieces.append(jax.device_put(part[None], device))
  stacked = jax.make_array_from_single_device_arrays((num, *x.shape), NamedSharding(mesh, PartitionSpec(others, *x.sharding.spec)), pieces)
  return _joined(x.dtype, x.sharding)(stacked)


@functools.cache
def _joined(dtype: Any, sharding: NamedSharding) -> Any:
  join = lambda stacked: jax.lax.bitcast_convert_type(jnp.sum(stacked, axis=0, dtype=stacked.dtype), dtype)
  return jax.jit(join, out_shardings=sharding)
