"""Checkpoints with Orbax: one folder per step, one item per thing that may be wanted alone.

  <stage>/checkpoints/<step>/params.<role>   weights of a trained role
                             average.<name>  averaged weights
                             optimizer       optimizer states, step, key, states of the averages
                             meta            JSON: the loader's position, the stage's description, what the loop remembers
                             manifest.json   the checksum of every file, see qimg2.training.manifest

A later stage, sampling or export reads the one item it needs. Saving is asynchronous and atomic: a folder without a finished save does not
count as a checkpoint. Reading is strict: another shape or a missing weight is an error. Before anything is read from a step, all of the step is
compared with its manifest: a damaged one is named in the log and the one before it is read instead; where none is intact, that is an error.
"""

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from qimg2.places import COMMITTED, Place, as_absolute, is_complete, is_remote, write_file
from qimg2.sharding import broadcast_from_first
from qimg2.training import manifest
from qimg2.training.faults import exchange
from qimg2.training.state import TrainState

_ALL_WRITTEN = "async_write_complete"  # Orbax's barrier between the writing of all processes and what the first one does with it
_RENAMED = re.compile(r"^slow\.")  # items of older checkpoints
OLDER = (". If an older version of this program left the stage unfinished, it cannot go on, because that kept other optimizer states: move the "
         "checkpoint away to train the stage anew; finished stages can be started from, sampled and exported")
MEND = "; where you move a damaged folder away, launch.train makes it anew"
ACCEPT = "qimg2.training.manifest.write_manifest(FOLDER) accepts it as it is"


class SaveError(OSError):
  """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
  """The checkpoints of one stage."""

  def __init__(self, folder: Place, keep: int | None = None, every: int = 1, keep_every: int = 0):
    """Args: folder; keep, how many of the newest to keep, and as many of the newest whose step is a multiple of `every`, which makes the folder if it
    is missing, None only to read; all whose step is a multiple of `keep_every` stay, 0 for none.

    With `keep`, damaged steps that are newer than the newest intact one are renamed to <step>.damaged, so that they can be saved again.

    Raises:
      ValueError: with `keep`, there are checkpoints but none is intact.
    """
    self.folder, self._keep = as_absolute(folder), keep
    self._every, self._keep_every = every, keep_every
    self._saving, self._is_broken = 0, False  # the step of the save that was started last; whether one failed
    if keep is not None:
      _finish_or_remove(self.folder)
      _set_aside(self.folder, self.latest_step())
    self._manager = self._open()

  def latest_step(self) -> int | None:
    """Step of the newest intact checkpoint, None when there are no checkpoints at all.

    Raises:
      ValueError: there are checkpoints but none is intact.
    """
    faults = []
    for step in _agreed_steps(self.folder):
      fault = _agreed_fault(self.folder / str(step))
      if not fault:
        if faults:
          logging.warning("%s The checkpoint before it, of step %d, is used instead%s.", " ".join(faults), step, MEND if self._keep is None else "")
        return step
      if (self.folder / str(step)).is_dir():  # not one that a run has just replaced by a newer one
        faults.append(f"The checkpoint {self.folder / str(step)} is damaged: {fault}.")
    if faults:
      raise ValueError(f"{' '.join(faults)} No other in {self.folder} is intact: put back a copy of one, or move the folder away to begin the stage "
                       f"again; if a checkpoint is known to be good, {ACCEPT}.")
    return None

  def save(self, state: TrainState, meta: dict) -> None:
    """Starts to save `state` and the JSON-serialisable `meta` under the state's step; returns once the device memory may be reused. The newest step
    is not saved again.

    Raises:
      SaveError: this save could not be started, or the one before it failed.
    """
    if self._is_broken:
      self._guard(self._reopen)
    self.wait()
    if self._manager.latest_step() == int(state.step):
      return
    items = {name: ocp.args.StandardSave(tree) for name, tree in items_of(state).items()}
    self._saving = int(state.step)
    self._guard(lambda: self._manager.save(self._saving, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)))

  def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict]:
    """(state, meta) of a step that `latest_step` gave, laid out as the shardings in `abstract` say.

    Raises:
      ValueError: the checkpoint does not hold what `abstract` asks for, or is damaged.
    """
    args = {name: ocp.args.StandardRestore(tree) for name, tree in items_of(abstract).items()}
    restored = self._read(step, ocp.args.Composite(meta=ocp.args.JsonRestore(), **args), OLDER)
    return state_of(restored, abstract), restored["meta"]

  def items(self, step: int | None) -> list[str]:
    """Names of the weights and averages in the checkpoint of a step, such as "params.model"; `FileNotFoundError` for None."""
    if step is None:
      raise FileNotFoundError(f"There is no checkpoint in {self.folder}: train that stage first.")
    return sorted(_RENAMED.sub("average.", path.name) for path in (self.folder / str(step)).iterdir() if path.is_dir() and "." in path.name)

  def restore_item(self, name: str, abstract: Any, step: int | None = None) -> Any:
    """One item, such as "params.model" or "average.ema", of a step (default: the newest intact one).

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: no such item, one that does not fit `abstract`, a damaged step, or no intact one.
    """
    step = self.latest_step() if step is None else step
    if name not in self.items(step):
      raise ValueError(f"The checkpoint {self.folder / str(step)} holds no {name!r}: it has {', '.join(self.items(step))}.")
    if not (self.folder / str(step) / name).is_dir():
      name = name.replace("average.", "slow.")  # as written by older versions
    return self._read(step, ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)}))[name]

  @contextlib.contextmanager
  def kept_on_failure(self) -> Iterator[None]:
    """Where something fails inside, the save that is under way is completed; with several processes it is cut off, because others may be gone."""
    try:
      yield
    except Exception:
      if jax.process_count() == 1:
        with contextlib.suppress(SaveError):
          self.wait()
      raise

  def wait(self) -> None:
    """Returns when the save under way is on the disk.

    Raises:
      SaveError: it failed.
    """
    if not self._is_broken:
      self._guard(self._manager.wait_until_finished)

  def close(self) -> None:
    """Waits for the save under way and ends.

    Raises:
      SaveError: it failed.
    """
    self.wait()
    self._manager.close()

  def _open(self) -> ocp.CheckpointManager:
    if self._keep is None:
      return ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(create=False))
    asynchronous = _with_manifest(lambda: self.folder / str(self._saving))
    kept = _Kept(self._keep, self._every, self._keep_every)
    options = ocp.CheckpointManagerOptions(preservation_policy=kept, create=True, cleanup_tmp_directories=True,
                                           async_options=asynchronous, step_name_format=_Agreed(_agreed_steps(self.folder)))
    return ocp.CheckpointManager(self.folder, options=options)

  def _reopen(self) -> None:
    """Removes what a save that failed has left, and begins anew."""
    _remove_parts(self.folder)
    self._manager, self._is_broken = self._open(), False

  def _guard(self, save: Callable[[], Any]) -> None:
    """Runs a part of a save. After one that failed, what it left is removed and saving can begin anew; if that fails too, at the next save."""
    try:
      done = save()
    except Exception as error:  # whatever the file system raises, in Orbax's threads too
      if jax.process_count() == 1:  # several would have to fail together
        self._is_broken = True
        try:
          self._reopen()
        except Exception as again:
          logging.warning("What a failed save left in %s is still there (%s).", self.folder, _first_line(again))
      raise SaveError(f"The checkpoint {self.folder / str(self._saving)} could not be written ({_first_line(error)}); those before it are kept: "
                      "free some space or mend the disk.") from error
    if done is False:
      raise SaveError(f"The checkpoint {self.folder / str(self._saving)} was not written because there is a newer one: use another folder.")

  def _read(self, step: int, args: ocp.args.Composite, hint: str = "") -> Any:
    path = self.folder / str(step)
    fault = _agreed_fault(path)
    if fault:
      raise ValueError(f"The checkpoint {path} is damaged: {fault}: read another step, or put back a copy.")
    try:
      return self._manager.restore(step, args=args)
    except (ValueError, KeyError, FileNotFoundError) as error:
      raise ValueError(f"The checkpoint {path} does not fit the config: {_first_line(error)}{hint}") from error


class _Kept:
  """Orbax's preservation policy of the newest `num` checkpoints, and the newest `num` at multiples of `every`: those by time, which are close to each
  other, would soon have pushed out all that are far apart. All at multiples of `for_good` stay, 0 for none."""

  def __init__(self, num: int, every: int, for_good: int):
    self._num, self._every, self._for_good = num, every, for_good

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    """Of each checkpoint, oldest first, whether it is kept."""
    del context
    steps = [one.step for one in checkpoints]
    kept = {*steps[-self._num:], *[step for step in steps if step % self._every == 0][-self._num:]}
    return [step in kept or bool(self._for_good) and step % self._for_good == 0 for step in steps]


class _Agreed(ocp.path.step.NameFormat[ocp.path.step.Metadata]):
  """Orbax's names of steps, and the steps that there are when it begins. Whether a step is saved, and which go, follows from them: were each process
  to list them for itself, one that sees an older listing would save what another does not, and wait for it for ever."""

  def __init__(self, steps: Sequence[int]):
    self._steps, self._standard = steps, ocp.path.step.standard_name_format()

  def build_name(self, step: int) -> str:
    """The name of a step's folder."""
    return self._standard.build_name(step)

  def find_all(self, base_path: epath.PathLike) -> Iterator[ocp.path.step.Metadata]:
    """The agreed steps."""
    return (ocp.path.step.Metadata(step=step, path=epath.Path(base_path) / self.build_name(step)) for step in self._steps)

  def find_step(self, base_path: epath.PathLike, step: int) -> ocp.path.step.Metadata:
    """A step that was completed; `ValueError` if it was not."""
    return self._standard.find_step(base_path, step)


def newest_step(folder: Place) -> int | None:
  """The step of the newest checkpoint in a folder, None when there is none. Nothing but names is looked at, so it may be damaged."""
  return next(iter(_agreed_steps(as_absolute(folder))), None)


def saved_steps(folder: Place) -> list[int]:
  """The steps whose checkpoints are in a folder, ascending. Nothing but names is looked at, so they may be damaged."""
  return _agreed_steps(as_absolute(folder))[::-1]


def is_done(folder: Place, num_steps: int, intact: bool = True) -> bool:
  """Whether the newest checkpoint in a folder is of step `num_steps` or later, and with `intact` also undamaged, for which all of its bytes are read,
  once in a process."""
  folder = as_absolute(folder)
  newest = newest_step(folder) or 0
  return newest >= num_steps and not (intact and _agreed_fault(folder / str(newest)))


def save_weights(folder: Place, params: dict) -> None:
  """Writes weights that no stage trains (a frozen role) to a folder of their own; waits until they are there."""
  folder = as_absolute(folder)
  with ocp.StandardCheckpointer(async_options=_with_manifest(lambda: folder)) as checkpointer:
    checkpointer.save(folder, params, force=is_remote(folder))  # what a process that was killed left in a bucket


def restore_weights(folder: Place, abstract: dict) -> dict:
  """Weights written by `save_weights`.

  Raises:
    ValueError: they are damaged, or do not fit `abstract`.
  """
  folder = as_absolute(folder)
  fault = _agreed_fault(folder)
  if fault:
    raise ValueError(f"The weights in {folder} are damaged: {fault}: put back a copy, or remove the folder if the run drew them from its seed, which "
                     f"draws the same again; if they are known to be good, {ACCEPT}.")
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      return checkpointer.restore(folder, abstract)
    except (ValueError, KeyError) as error:
      raise ValueError(f"The weights in {folder} do not fit the config: {_first_line(error)}") from error


def state_of(items: Mapping[str, Any], abstract: TrainState) -> TrainState:
  """The state, of the roles and averages of `abstract`, that `items_of` took apart."""
  train = items["optimizer"]
  params = {role: items[f"params.{role}"] for role in abstract.params}
  averages = {name: items[f"average.{name}"] for name in abstract.averages}
  return TrainState(train["step"], params, train["opt"], averages, train["average_states"], jax.random.wrap_key_data(train["key"]))


def items_of(state: TrainState) -> dict[str, Any]:
  """The items of a checkpoint by their names: trees of arrays, abstract ones where the state is abstract."""
  key = jax.eval_shape(jax.random.key_data, state.key) if isinstance(state.key, jax.ShapeDtypeStruct) else jax.random.key_data(state.key)
  if isinstance(key, jax.ShapeDtypeStruct):
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=state.step.sharding)
  return {
      **{f"params.{role}": tree for role, tree in state.params.items()},
      **{f"average.{name}": tree for name, tree in state.averages.items()},
      "optimizer": {"opt": state.opt, "step": state.step, "key": key, "average_states": state.average_states},
  }


# Intact and damaged.


def _steps(folder: Place) -> list[int]:
  """The steps whose save was completed, newest first, damaged or not."""
  paths = [path for path in folder.iterdir() if path.name.isdecimal() and is_complete(path)] if folder.is_dir() else []
  return sorted((int(path.name) for path in paths), reverse=True)


def _finish_or_remove(folder: Place) -> None:
  """Looks at what in a bucket Orbax has not marked as complete, and would remove. What is whole, such as a copy of a folder that has no marks, is
  marked; what a killed process left is removed, here, because Orbax fails where nothing else is in the folder: it is gone with it."""
  if is_remote(folder) and jax.process_index() == 0 and folder.is_dir():
    for path in folder.iterdir():
      if not path.name.isdecimal() or is_complete(path):
        continue
      if manifest.find_fault(path):
        path.rmtree()
      else:
        write_file(path / COMMITTED, "")


def _remove_parts(folder: Place) -> None:
  """Removes what a failed save left, until nothing new comes: other threads of it may still write for a moment. In a bucket Orbax does."""
  quiet = 0
  for _ in range(50):
    parts = list(folder.glob(f"*{manifest.TEMPORARY}*"))
    for part in parts:
      shutil.rmtree(part, ignore_errors=True)
    quiet = 0 if parts else quiet + 1
    if quiet == 3:
      return
    time.sleep(0.1)


def _agreed_steps(folder: Place) -> list[int]:
  """`_steps` as the first process sees them: the others may see an older listing.

  Raises:
    ValueError: a step that this process does not see at all.
  """
  steps = _steps(folder)
  if jax.process_count() == 1:
    return steps
  found = np.zeros(int(broadcast_from_first(np.int32(len(steps)))), np.int32)
  found[:len(steps)] = steps[:len(found)]
  steps = broadcast_from_first(found).tolist() if len(found) else []
  for step in steps:
    if not (folder / str(step)).is_dir():
      raise ValueError(f"Process {jax.process_index()} does not see the checkpoint {folder / str(step)}, which process 0 does: all processes need "
                       "one shared --workdir.")
  return steps


def _with_manifest(find_folder: Callable[[], Place]) -> ocp.AsyncOptions:
  """Lets Orbax call `manifest.write_manifest` on the first process when a save is complete but for the renaming of its folder, which `find_folder`
  gives; and `manifest.write_part` on each of several processes when it has written its own files and is about to wait for the others."""
  wait = ocp.multihost.get_barrier_sync_fn()

  def temporary() -> Place:
    folder = find_folder()
    path = folder.with_name(folder.name + manifest.TEMPORARY)
    return path if path.is_dir() else folder

  def barrier(*, key: str, timeout_ms: int) -> None:
    if _ALL_WRITTEN in key:
      manifest.write_part(temporary(), jax.process_index())
    wait(key=key, timeout_ms=timeout_ms)

  return ocp.AsyncOptions(post_finalization_callback=lambda: manifest.write_manifest(temporary()), barrier_sync_fn=barrier)


def _agreed_fault(folder: Place) -> str:
  """What is damaged in a folder, "" for nothing. Several processes read a part of it each and come to the same end; of a bucket, where hardly
  anything is read, the first one looks."""
  if is_remote(folder):
    return exchange(manifest.find_fault(folder) if jax.process_index() == 0 else "")[0]
  index, count = jax.process_index(), jax.process_count()
  fault = manifest.find_fault(folder, (index, count))
  if count > 1 and multihost_utils.process_allgather(np.array(bool(fault))).any():
    return fault or "another process found a damaged file"
  return fault


def _set_aside(folder: Place, intact: int | None) -> None:
  """Renames the steps after the newest intact one, all of them damaged."""
  for step in _steps(folder) if jax.process_index() == 0 and intact is not None else ():
    if step <= intact:
      break
    names = [f"{step}.damaged", *(f"{step}.damaged{number}" for number in range(2, 1000))]
    (folder / str(step)).rename(next(folder / name for name in names if not (folder / name).exists()))
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__)
