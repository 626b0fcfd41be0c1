"""The pictures that a suite compares with: those of another evaluation, or of a folder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from qimg2.evaluation import Task
from qimg2.places import Place, find_place
from qimg2.runtime.evaluating import folder as files


class Rivals:
  """Finds the picture of a task that was drawn with one seed."""

  def __init__(self, folder: str, seed: int):
    """Args:
      folder: of an evaluation, or pictures/<suite> in one; any folder with a manifest.jsonl; or, without a manifest, a folder of pictures
        <name of the task>_<seed>.png. It may be in a bucket.
      seed: of the pictures.

    Raises:
      ValueError: no such folder, or a manifest that has not the fields of one.
    """
    self._place, self._seed, self._named = find_place(folder, "rivals"), seed, folder
    if not self._place.is_dir():
      raise ValueError(f"There is no folder {folder} of pictures to compare with: name that of another evaluation.")
    self._manifest = self._read_manifest()

  def read(self, task: Task) -> np.ndarray:
    """The picture [H, W, 3] uint8 for a task's prompt.

    Raises:
      ValueError: there is none, it was drawn for another prompt, several are of this prompt and none has the task's name, or it cannot be read.
    """
    path = self._place / f"{task.name}_{self._seed}.png" if self._manifest is None else self._find(task, *self._manifest)
    if path is None or not path.is_file():
      raise ValueError(f"{self._named} has no picture of this prompt with seed {self._seed} to compare with")
    return files.read_picture(path)

  def _find(self, task: Task, by_prompt: Mapping[str, Sequence[tuple[str, Place]]], by_name: Mapping[str, str]) -> Place | None:
    """The picture of the same prompt: the first of this name, or the only one."""
    found = by_prompt.get(task.prompt, ())
    named = [path for name, path in found if name == task.name]
    if not found and task.name in by_name:
      raise ValueError(f"the picture {task.name} of {self._named} was drawn for another prompt, {by_name[task.name]!r}")
    if len(found) > 1 and not named:
      raise ValueError(f"{self._named} has {len(found)} pictures of this prompt with seed {self._seed}, and none has the name {task.name}")
    return (named or [path for _, path in found] or [None])[0]

  def _read_manifest(self) -> tuple[dict[str, list[tuple[str, Place]]], dict[str, str]] | None:
    """({prompt: [(name, picture)]}, {name: prompt}) of the pictures with this seed; None without a manifest."""
    in_evaluation = self._place.parent.name == "pictures"
    roots = (self._place, self._place.parent.parent) if in_evaluation else (self._place,)
    root = next((one for one in roots if (one / files.MANIFEST).is_file()), None)
    if root is None:
      logging.warning("%s has no %s, so that nothing says for which prompts its pictures were drawn: they are taken by their names.", self._named,
                      files.MANIFEST)
      return None
    by_prompt: dict[str, list[tuple[str, Place]]] = {}
    by_name: dict[str, str] = {}
    for number, row in files.numbered_rows(root / files.MANIFEST):
      path = files.picture_place(root, _text(row, "file", root, number), f"Line {number} of {root / files.MANIFEST}")
      prompt, name = _text(row, "prompt", root, number), str(row.get("task", ""))
      if (row.get("seed") or 0) == self._seed and path.is_relative_to(self._place):
        by_prompt.setdefault(prompt, []).append((name, path))
        by_name.setdefault(name, prompt)
    return by_prompt, by_name


def _text(row: Mapping[str, Any], field: str, root: Place, number: int) -> str:
  if not isinstance(row.get(field), str):
    raise ValueError(f"Line {number} of {root / files.MANIFEST} has no text in the field {field!r}: mend it.")
  return row[field]
