"""A run's metrics and pictures in Weights & Biases, beside TensorBoard, for those who ask for it.

One run of wandb belongs to one workdir: its id is in `wandb_id` there, and a training that goes on continues it. Keys have the name of the stage
before them, and each stage its own axis of steps, `<stage>/step`, because every stage counts from 0. Rows that a training which was killed had
logged after its last checkpoint are logged again. WANDB_PROJECT, WANDB_MODE=offline and its other variables are honoured.
"""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from qimg2.places import Place, is_remote, write_file

TRACKERS = ("none", "wandb")
ID = "wandb_id"
FINISH_S = 30.0  # what is not sent by then stays on this machine: who was asked to stop has little time


class Tracker:
  """A run in wandb. What fails after it has begun is said once, and training goes on without it."""

  def __init__(self, workdir: Place, config: Mapping[str, Any]):
    """Args: folder of the run; its config, JSON-serialisable.

    Raises:
      ValueError: wandb is not installed, or does not begin.
    """
    check_package()
    import wandb
    path = workdir / ID
    if not path.exists():
      write_file(path, uuid.uuid4().hex[:8])
    folder = tempfile.gettempdir() if is_remote(workdir) else os.fspath(workdir)
    try:
      self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", "qimg2"), id=path.read_text(encoding="utf-8").strip(), resume="allow",
                             name=os.environ.get("WANDB_NAME", workdir.name), dir=folder, config=dict(config),
                             settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_S))
    except Exception as error:  # it has many of its own
      raise ValueError(f"wandb does not begin ({' '.join(str(error).split())[:200]}): log in with `wandb login`, set WANDB_MODE=offline, or leave "
                       "--tracker out.") from error
    self._picture, self._histogram, self._stages = wandb.Image, wandb.Histogram, set()

  def log(self, stage: str, step: int, scalars: Mapping[str, float]) -> None:
    """Logs numbers of a step of a stage."""
    self._try(lambda run: run.log({f"{stage}/{name}": value for name, value in scalars.items()} | self._axis(run, stage, step)))

  def log_image(self, stage: str, step: int, name: str, image: np.ndarray) -> None:
    """Logs an [H, W, 3] uint8 picture of a step of a stage."""
    self._try(lambda run: run.log({f"{stage}/{name}": self._picture(image)} | self._axis(run, stage, step)))

  def log_histogram(self, stage: str, step: int, name: str, values: np.ndarray) -> None:
    """Logs the histogram of finite numbers of a step of a stage."""
    self._try(lambda run: run.log({f"{stage}/{name}": self._histogram(values)} | self._axis(run, stage, step)))

  def close(self, failed: bool = False) -> None:
    """Ends it when all is sent, or after `FINISH_S` seconds; `failed` where training did not come to its end."""
    self._try(lambda run: run.finish(exit_code=int(failed)))
    self._run = None

  def _axis(self, run: Any, stage: str, step: int) -> dict[str, int]:
    if stage not in self._stages:
      self._stages.add(stage)
      run.define_metric(f"{stage}/step", hidden=True)
      run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return {f"{stage}/step": step}

  def _try(self, act: Callable[[Any], Any]) -> None:
    if self._run is None:
      return
    try:
      act(self._run)
    except Exception as error:  # whatever it is, it is no reason to lose a training
      self._run = None
      logging.warning("wandb failed (%s: %s): training goes on without it, and TensorBoard has everything.", type(error).__name__,
                      " ".join(str(error).split())[:200])


def check_package() -> None:
  """Raises a `ValueError` where wandb is not installed."""
  try:
    import wandb  # noqa: F401
  except ImportError as error:
    raise ValueError("--tracker=wandb needs the package wandb, which is not installed: pip install wandb, or leave --tracker out.") from error


@contextlib.contextmanager
def tracking(name: str, workdir: Place, config: Mapping[str, Any]) -> Iterator[Tracker | None]:
  """The tracker of a name, one of `TRACKERS`, until the end; None for "none", and where a run goes on whose tracker does not begin again.

  Raises:
    ValueError: as `Tracker`, where a run begins.
  """
  tracker, goes_on = None, (workdir / ID).exists()
  try:
    tracker = Tracker(workdir, config) if name != "none" else None
  except ValueError as error:
    if not goes_on:
      raise
    logging.warning("%s Training goes on without it.", error)
  try:
    yield tracker
  except BaseException:
    if tracker is not None:
      tracker.close(failed=True)
    raise
  if tracker is not None:
    tracker.close()
