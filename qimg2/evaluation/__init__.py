"""Evaluation suites: prompts whose right answer is known, and how a picture is scored against it.

A suite is two functions. `tasks(num, seed)` gives the same tasks for the same arguments, and the first of many are those of few.
`score(task, picture)` looks at one picture alone, so that figures of a suite are means over its tasks. Nothing here draws, reads a config or needs
jax: `qimg2.runtime.suites` has the suites of the embedded data sets and runs them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Task:
  """One picture to draw.

  Attributes:
    prompt: the text.
    size: (height, width) of the canvas in px; a picture is drawn at the size of the nearest bucket of the stage.
    sources: condition images [h, w, 3] uint8 in the order of the prompt; none for text to image.
    truth: what the score compares with; only the suite reads it.
  """
  prompt: str
  size: tuple[int, int]
  sources: tuple[np.ndarray, ...] = ()
  truth: Any = None


def show(task: Task, picture: np.ndarray, scores: Mapping[str, float]) -> list[tuple[np.ndarray, str]]:
  """(picture, caption) of what stands on a sheet for a task: its condition images, then what was drawn, with the metrics that are 0."""
  wrong = [name for name, value in scores.items() if value == 0]
  caption = task.prompt + (f" [wrong: {', '.join(wrong)}]" if wrong else "")
  return [(source, "(source)") for source in task.sources] + [(picture, caption)]


@dataclasses.dataclass(frozen=True)
class Suite:
  """Held-out prompts and their scores.

  Attributes:
    tasks: (number, seed) -> the tasks, all with as many condition images. `ValueError` if there are fewer.
    score: (task, picture [H, W, 3] uint8) -> {metric: share in 0..1}, the same metrics for each task; 1 is right. The name of a metric that
      states what chance would give ends in "chance".
    show: (task, picture, its scores) -> [(picture, caption)] for a sheet.
  """
  tasks: Callable[[int, int], Sequence[Task]]
  score: Callable[[Task, np.ndarray], Mapping[str, float]]
  show: Callable[[Task, np.ndarray, Mapping[str, float]], list[tuple[np.ndarray, str]]] = show


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """{metric: mean over tasks} of the scores of at least one task."""
  return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}
