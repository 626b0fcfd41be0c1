"""The pictures of an evaluation: which program draws which task, and what draws them, a chunk at a time.

A chunk is what one call of a compiled program draws: tasks of one size with one seed. Its pictures depend on nothing outside it, so chunks can be
drawn in any order, by any process, and again after a kill.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.buckets import Bucket, bucket_size, crop_fraction, nearest_bucket
from data_pipelines.specs import SLOT_PX, source_grids
from data_pipelines.transforms import composite_on_white, fit_source, resize_crop
from qimg2.evaluation import Task
from qimg2.runtime.generator import Generator, Size, Source, pad_size, resize_condition_image
from qimg2.runtime.run import Run
from qimg2.runtime.sampling import MAX_BATCH, TOKEN_STEP


@dataclasses.dataclass(frozen=True)
class Group:
  """Tasks that one program draws.

  Attributes:
    size: the program's shapes.
    tasks: numbers of the tasks, in order. The place of one among them tells its noise from that of the others.
    fit: (condition image, its place in the prompt) -> the image as the program takes it.
  """
  size: Size
  tasks: tuple[int, ...]
  fit: Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Tasks that are drawn together: their group's number, the places in it, and the seed of the noise."""
  group: int
  places: tuple[int, ...]
  seed: int


def groups_of_buckets(buckets: Sequence[Bucket], tasks: Sequence[Task], max_crop: float, tokenizer: Any) -> list[Group]:
  """Groups by the nearest bucket of a stage: pictures have its size, and condition images are cut as training cuts them."""
  nearest, groups = [_nearest(buckets, task) for task in tasks], []
  for number, bucket in enumerate(buckets):
    mine = tuple(i for i, found in enumerate(nearest) if found == number)
    if mine:
      num_tokens = _num_tokens(tokenizer, [tasks[i] for i in mine], bucket.source_sizes, bucket.num_tokens)
      fit = functools.partial(_fit_bucket, bucket.source_sizes, max_crop)
      groups.append(Group(Size(bucket.height, bucket.width, num_tokens, bucket.source_sizes), mine, fit))
  return groups


def groups_of_sizes(tasks: Sequence[Task], tokenizer: Any, multiple: int, output_resolution: int = 0) -> list[Group]:
  """Groups by the size that each task asks for, as the published pipeline draws it: sides are rounded down to `multiple` px, and condition images
  take the area `output_resolution`² at their own ratio, or the task's area where that is 0."""
  found: dict[tuple, list[int]] = {}
  for number, task in enumerate(tasks):
    height, width = task.size
    if output_resolution:
      height, width = bucket_size(output_resolution, width / height, multiple)
    side = output_resolution or max(SLOT_PX, round((height * width) ** 0.5))
    sources = tuple(bucket_size(side, image.shape[1] / image.shape[0], SLOT_PX) for image in task.sources)
    size = tuple(max(multiple, px // multiple * multiple) for px in (height, width))
    found.setdefault((size, sources), []).append(number)
  groups = []
  for (size, sources), mine in found.items():
    num_tokens = _num_tokens(tokenizer, [tasks[i] for i in mine], sources)
    groups.append(Group(Size(*size, num_tokens, sources), tuple(mine), functools.partial(_fit_size, sources)))
  return groups


def chunks_of(groups: Sequence[Group], seeds: Sequence[int], batch_size: int) -> list[Chunk]:
  """Everything that is to be drawn: group by group, in pieces of at most `batch_size`, each with all seeds in turn, so that a program is compiled and
  a prompt is encoded once."""
  return [Chunk(number, tuple(range(start, min(start + batch_size, len(group.tasks)))), seed)
          for number, group in enumerate(groups) for start in range(0, len(group.tasks), batch_size) for seed in seeds]


class Painter:
  """Draws chunks. A group's program is compiled when its first chunk is drawn."""

  def __init__(self, source: Source, weights: Callable[[], Mapping], tasks: Sequence[Task], groups: Sequence[Group], settings: Mapping[str, Any],
               batch_size: int = 0, make: Callable[[Size], Generator] | None = None):
    """Args: networks and tokenizer; what gives the weights, called for each chunk; all tasks and their groups; arguments of
    `Generator` beside the size; pictures at a time, 0 for `MAX_BATCH`, rounded up to what the devices share evenly; what makes the generators in
    place of `Generator`."""
    rows = source.mesh.shape["data"] * source.mesh.shape["fsdp"]
    self.batch_size = -(-(batch_size or MAX_BATCH) // rows) * rows
    self._tasks, self._groups = tasks, groups
    self._weights, self._make = weights, make or (lambda size: Generator(source, size, **settings))
    self._made: tuple[int, Generator] | None = None  # chunks come group by group

  def chunks(self, seeds: Sequence[int]) -> list[Chunk]:
    """All chunks for these seeds, in order."""
    return chunks_of(self._groups, seeds, self.batch_size)

  def tasks_of(self, chunk: Chunk) -> list[int]:
    """Numbers of a chunk's tasks."""
    return [self._groups[chunk.group].tasks[place] for place in chunk.places]

  def draw(self, chunk: Chunk) -> list[np.ndarray | str]:
    """One picture [H, W, 3] uint8 for each task of a chunk; in place of one that is not finite stands why. All processes call it alike, and all get
    them."""
    group, tasks = self._groups[chunk.group], [self._tasks[number] for number in self.tasks_of(chunk)]
    sources = [np.stack([group.fit(task.sources[slot], slot) for task in tasks]) for slot in range(len(group.size.source_sizes))]
    _, pictures, wrong = self._generator(chunk.group).draw_each(self._weights(), [task.prompt for task in tasks], chunk.seed, images=sources,
                                                                numbers=chunk.places)
    return [why or (picture if picture.shape[-1] == 3 else composite_on_white(picture)) for picture, why in zip(pictures, wrong)]

  def _generator(self, number: int) -> Generator:
    if self._made is None or self._made[0] != number:
      group = self._groups[number]
      self._made = number, self._make(dataclasses.replace(group.size, batch_size=min(self.batch_size, len(group.tasks))))
    return self._made[1]


def painter_of_run(run: Run, stage_name: str, weights: Callable[[], Mapping], tasks: Sequence[Task], settings: Mapping[str, Any] | None = None,
                   batch_size: int = 0) -> Painter:
  """What draws tasks with a stage of a run, at the sizes of its buckets; `settings` in place of the run's for sampling."""
  stage = run.stages[stage_name]
  groups = groups_of_buckets(run.loader(stage).buckets, tasks, stage.max_crop, run.tokenizer)
  if settings is None:
    return Painter(run, weights, tasks, groups, {}, batch_size, run.generator)
  return Painter(run, weights, tasks, groups, settings, batch_size)


def learned(buckets: Sequence[Bucket], tasks: Sequence[Task]) -> bool:
  """Whether a stage with these buckets learned to draw with as many condition images as each of these tasks has."""
  return {len(task.sources) for task in tasks} <= {len(bucket.source_sizes) for bucket in buckets}


def _num_tokens(tokenizer: Any, tasks: Sequence[Task], sizes: Sequence[tuple[int, int]], usual: int = 0) -> int:
  """What the longest prompt needs: the usual number of tokens if it is enough, else one that is a multiple of `TOKEN_STEP`."""
  grids = source_grids(tuple(map(pad_size, sizes)))
  longest = max(len(tokenizer.encode(task.prompt, grids)) for task in tasks)
  return usual if longest <= usual else -(-longest // TOKEN_STEP) * TOKEN_STEP


def _fit_bucket(sizes: Sequence[tuple[int, int]], max_crop: float, image: np.ndarray, slot: int) -> np.ndarray:
  return fit_source(functools.partial(resize_crop, image), image.shape[:2], sizes[slot], max_crop)


def _fit_size(sizes: Sequence[tuple[int, int]], image: np.ndarray, slot: int) -> np.ndarray:
  return resize_condition_image(image, *sizes[slot])


def _nearest(buckets: Sequence[Bucket], task: Task) -> int:
  """Index of the bucket nearest in aspect ratio among those with as many condition images, and of such the one that cuts least of these."""
  own = [i for i, bucket in enumerate(buckets) if len(bucket.source_sizes) == len(task.sources)]
  nearest = buckets[own[int(nearest_bucket(*task.size, tuple(buckets[i] for i in own)))]]
  same = [i for i in own if (buckets[i].height, buckets[i].width) == (nearest.height, nearest.width)]
  lost = lambda i: sum(round(float(crop_fraction(*image.shape[:2], *size)), 9) for image, size in zip(task.sources, buckets[i].source_sizes))
  return min(same, key=lost)
