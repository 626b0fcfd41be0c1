"""Checkpoints with Orbax: one folder per step, one item per thing that may be wanted alone.

  <stage>/checkpoints/<step>/params.<role>   weights of a trained role
                             slow.<name>     a slow copy
                             optimizer       optimizer states, step, key
                             meta            JSON: the loader's position, the stage's description

A later stage, sampling or export reads the one item it needs. Saving is asynchronous and atomic: a folder without a finished save does not
count as a checkpoint. Reading is strict: another shape or a missing weight is an error.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from qimg2.state import TrainState


class Checkpoints:
  """The checkpoints of one stage."""

  def __init__(self, folder: pathlib.Path, keep: int = 2):
    """Args: folder, made if missing; keep, how many of the newest to keep."""
    self.folder = pathlib.Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  def latest_step(self) -> int | None:
    """Step of the newest whole checkpoint, None when there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, meta: dict) -> None:
    """Starts to save `state` and the JSON-serialisable `meta` under the state's step; returns once the device memory may be reused."""
    items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
    self._manager.save(int(state.step), args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))

  def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict]:
    """(state, meta) of a step, laid out as the shardings in `abstract` say.

    Raises:
      ValueError: the checkpoint does not hold what `abstract` asks for.
    """
    args = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}
    restored = _read(self._manager, step, ocp.args.Composite(meta=ocp.args.JsonRestore(), **args), self.folder)
    train = restored["optimizer"]
    params = {role: restored[f"params.{role}"] for role in abstract.params}
    slow = {name: restored[f"slow.{name}"] for name in abstract.slow}
    return TrainState(train["step"], params, train["opt"], slow, jax.random.wrap_key_data(train["key"])), restored["meta"]

  def items(self, step: int) -> list[str]:
    """Names of the weights and slow copies in the checkpoint of a step, such as "params.model"."""
    return sorted(path.name for path in (self.folder / str(step)).iterdir() if path.is_dir() and "." in path.name)

  def restore_item(self, name: str, abstract: Any, step: int | None = None) -> Any:
    """One item, such as "params.model" or "slow.ema", of a step (default: the newest).

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: no such item, or one that does not fit `abstract`.
    """
    step = self.latest_step() if step is None else step
    if step is None:
      raise FileNotFoundError(f"There is no checkpoint in {self.folder}: train that stage first.")
    if name not in self.items(step):
      raise ValueError(f"The checkpoint {self.folder / str(step)} holds no {name!r}: it has {', '.join(self.items(step))}.")
    return _read(self._manager, step, ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)}), self.folder)[name]

  def wait(self) -> None:
    """Returns when the save under way is on the disk; raises what went wrong in it."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save under way and ends."""
    self._manager.wait_until_finished()
    self._manager.close()


def save_weights(folder: pathlib.Path, params: dict) -> None:
  """Writes weights that no stage trains (a frozen role) to a folder of their own; waits until they are there."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(pathlib.Path(folder).absolute(), params)


def restore_weights(folder: pathlib.Path, abstract: dict) -> dict:
  """Weights written by `save_weights`.

  Raises:
    ValueError: they do not fit `abstract`.
  """
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      return checkpointer.restore(pathlib.Path(folder).absolute(), abstract)
    except (ValueError, KeyError) as error:
      raise ValueError(f"The weights in {folder} do not fit the config: {_first_line(error)}") from error


def _items(state: TrainState) -> dict[str, Any]:
  key = jax.eval_shape(jax.random.key_data, state.key) if isinstance(state.key, jax.ShapeDtypeStruct) else jax.random.key_data(state.key)
  if isinstance(key, jax.ShapeDtypeStruct):
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=state.step.sharding)
  return {
      **{f"params.{role}": tree for role, tree in state.params.items()},
      **{f"slow.{name}": tree for name, tree in state.slow.items()},
      "optimizer": {"opt": state.opt, "step": state.step, "key": key},
  }


def _read(manager: ocp.CheckpointManager, step: int, args: ocp.args.Composite, folder: pathlib.Path) -> Any:
  try:
    return manager.restore(step, args=args)
  except (ValueError, KeyError, FileNotFoundError) as error:
    raise ValueError(f"The checkpoint {folder / str(step)} does not fit the config or is damaged: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__)
