"""Evaluation suites: prompts whose right answer is known, and how a picture is scored against it.

A suite is a value. `tasks(num, seed)` gives the same tasks for the same arguments, and the first of many are those of few. `score(task, picture)`
looks at one picture alone, so that figures of a suite are means over its pictures; `figures` says which, where they are not plain means. What only a
set of pictures has, such as a distance between distributions, is a function of `features` of each of them. Nothing here draws, reads a config or
needs jax: `qimg2.runtime.evaluating` runs suites.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

ERROR = "error"  # the key of a score that says why a picture has no metrics


@dataclasses.dataclass(frozen=True)
class Task:
  """One picture to draw.

  Attributes:
    prompt: the text.
    size: (height, width) of the canvas in px; a picture is drawn at the size of the nearest bucket of the stage.
    sources: condition images [h, w, 3] uint8 in the order of the prompt, none for text to image: a tuple, or a sequence that reads them when they are
      looked at.
    truth: what the score compares with; only the suite reads it.
    name: what the task is called in files, unique in its suite, of letters, digits, - and _; "" for its number.
    category: figures are given for each category too, where a suite has more than one.
  """
  prompt: str
  size: tuple[int, int]
  sources: Sequence[np.ndarray] = ()
  truth: Any = None
  name: str = ""
  category: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure of a suite: the sum of one metric over pictures, divided by the sum of another or by their number.

  Attributes:
    numerator: a metric that `Suite.score` gives.
    denominator: another, such as the number of words that were asked for; "" for the number of pictures.
    is_share: whether it lies in 0..1 and is printed in per cent.
    lower_is_better: whether less of it is better.
    null: what it would be if nothing were to be found, such as 1/2 of two models that are alike: a sign test over prompts is stated beside it; None
      for no test.
  """
  numerator: str
  denominator: str = ""
  is_share: bool = True
  lower_is_better: bool = False
  null: float | None = None


def show(task: Task, picture: np.ndarray, scores: Mapping[str, Any]) -> list[tuple[np.ndarray, str]]:
  """(picture, caption) of what stands on a sheet for a task: its condition images, then what was drawn, with the metrics that are 0."""
  wrong = [name for name, value in metrics_of(scores).items() if value == 0]
  caption = task.prompt + (f" [wrong: {', '.join(wrong)}]" if wrong else "")
  return [(source, "(source)") for source in task.sources] + [(picture, caption)]


@dataclasses.dataclass(frozen=True)
class Reference:
  """Pictures that a set is compared with. Their features are computed once for an evaluation, in blocks that its jobs and processes share.

  Attributes:
    name: of letters and digits, another one for other pictures: blocks that are kept under another name are not taken.
    num_blocks: how many there are.
    block: number of a block -> the features [n, D] float32 of its pictures. `ValueError` for one that cannot be read.
    take: takes the features [N, D] of all blocks, before `Suite.of_set` is called.
  """
  name: str
  num_blocks: int
  block: Callable[[int], np.ndarray]
  take: Callable[[np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Suite:
  """Prompts and the scores of pictures.

  Attributes:
    tasks: (number, seed) -> the tasks, all with as many condition images; all there are for 0, where a suite has an end. `ValueError` if there are
      fewer.
    score: (task, picture [H, W, 3] uint8) -> {metric: number}, the same metrics for each task. What is no number, a text or a list, is kept beside
      the metrics and is in no figure. A picture that cannot be scored gives {"error": why} alone: it is left out and counted, never a 0. The name
      of a metric that states what chance would give ends in "chance".
    show: (task, picture, its scores) -> [(picture, caption)] for a sheet.
    figures: {name: figure}; none for the mean of each metric, as shares.
    score_batch: in place of `score`, for what looks at many pictures at a time, such as a judge on the device: (tasks, pictures) -> scores.
    is_slow: whether `score` takes long on the host and runs in a pool of processes; it is a function of a module then, or a partial of one.
    features: (tasks, pictures) -> [n, D] float32, kept for `of_set`.
    release: gives back device memory that scoring holds, such as a judge's weights; the next score fetches them again.
    of_set: blocks of (names of tasks, features), all pictures once and in the order of the tasks -> figures of the whole set, and texts that say what
      must be known of them. It raises nothing for what pictures look like.
    reference: what `of_set` compares with, where it is still to be computed.
  """
  tasks: Callable[[int, int], Sequence[Task]]
  score: Callable[[Task, np.ndarray], Mapping[str, Any]] | None = None
  show: Callable[[Task, np.ndarray, Mapping[str, Any]], list[tuple[np.ndarray, str]]] = show
  figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
  score_batch: Callable[[Sequence[Task], Sequence[np.ndarray]], Sequence[Mapping[str, Any]]] | None = None
  is_slow: bool = False
  features: Callable[[Sequence[Task], Sequence[np.ndarray]], np.ndarray] | None = None
  of_set: Callable[[Iterable[tuple[Sequence[str], np.ndarray]]], Mapping[str, float | str]] | None = None
  reference: Reference | None = None
  release: Callable[[], None] = lambda: None


def metrics_of(scores: Mapping[str, Any]) -> dict[str, float]:
  """Of what `Suite.score` gave, what is a number."""
  return {name: float(value) for name, value in scores.items() if isinstance(value, (bool, int, float, np.number))}
