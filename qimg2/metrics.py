"""Where a stage writes its numbers.

`metrics.jsonl` holds what training computes and nothing that depends on the clock: an interrupted and resumed run writes the same bytes as
an uninterrupted one. `timing.jsonl` holds samples per second and the like. TensorBoard gets both.
"""

import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import tensorboardX


class MetricsWriter:
  """Appends rows of scalars under a stage's folder; rows after `step` (of a run that was cut off) are dropped, to be written again."""

  def __init__(self, folder: pathlib.Path, step: int, active: bool = True):
    """Args: folder of the stage; step it starts from; active is False on all processes but the first.

    Raises:
      ValueError: a line in the middle of metrics.jsonl that is no JSON.
    """
    self._active = active
    if not active:
      return
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "timing.jsonl"):
      _truncate(folder / name, step)
    self._metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")
    self._timing = open(folder / "timing.jsonl", "a", encoding="utf-8")
    self._events = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1 if step else None)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds a row to metrics.jsonl and to TensorBoard."""
    self._row("_metrics", step, scalars)

  def write_timing(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds a row to timing.jsonl and to TensorBoard."""
    self._row("_timing", step, scalars)

  def write_image(self, step: int, name: str, image: np.ndarray) -> None:
    """Adds an [H, W, 3] uint8 picture to TensorBoard."""
    if self._active:
      self._events.add_image(name, image, step, dataformats="HWC")

  def sync(self) -> None:
    """Returns when all rows so far are on the disk, so that no checkpoint is newer than its metrics."""
    if self._active:
      for file in (self._metrics, self._timing):
        os.fsync(file.fileno())

  def close(self) -> None:
    """Ends writing."""
    if self._active:
      self._metrics.close()
      self._timing.close()
      self._events.close()

  def _row(self, file: str, step: int, scalars: Mapping[str, float]) -> None:
    if not self._active:
      return
    values = {name: float(value) for name, value in scalars.items()}
    getattr(self, file).write(json.dumps({"step": step, **values}) + "\n")
    getattr(self, file).flush()
    for name, value in values.items():
      self._events.add_scalar(name, value, step)


def read_rows(path: pathlib.Path) -> list[dict]:
  """The rows of a .jsonl file; a last line that was cut off is left out.

  Raises:
    ValueError: another line is no JSON.
  """
  if not path.exists():
    return []
  rows, lines = [], path.read_text(encoding="utf-8").splitlines(keepends=True)
  for number, line in enumerate(lines):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number == len(lines) - 1:
        break
      raise ValueError(f"{path}, line {number + 1} is no JSON: the file was edited or damaged; mend or move it away.") from error
  return rows


def _truncate(path: pathlib.Path, step: int) -> None:
  rows = [row for row in read_rows(path) if row["step"] <= step]
  part = path.with_suffix(".part")
  part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  part.replace(path)
