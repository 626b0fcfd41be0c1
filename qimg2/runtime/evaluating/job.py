"""Draws the pictures of suites, scores them, and writes it all into a folder (`qimg2.runtime.evaluating.folder`).

The work is cut into chunks. What a chunk is depends on the request alone, and a chunk that is done is not done again, so an evaluation that was
killed goes on, and parts of it may be other jobs' (`Share`). Processes of one job draw together, and each scores its own chunks.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import data_pipelines
import qimg2
from qimg2.evaluation import ERROR, Suite, Task
from qimg2.places import Place, leftovers, write_file
from qimg2.runtime import processes
from qimg2.runtime.evaluating import folder as files
from qimg2.runtime.evaluating.drawing import Painter
from qimg2.runtime.evaluating.folder import Folder
from qimg2.runtime.evaluating.page import write_page
from qimg2.runtime.evaluating.scoring import Pending, Scorer
from qimg2.runtime.evaluating.summary import Missing, clusters, row_of, summarise
from qimg2.runtime.sheets import save_picture

IMAGES_AT_ONCE = 32  # of a folder of pictures, a chunk
AHEAD = 4  # chunks that are drawn while the scores of an earlier one are under way
BLOCK = 1024  # rows of features at a time
PACKAGES = ("jax", "numpy", "scipy", "Pillow", "onnxruntime", "rapidocr", "rapidfuzz")


@dataclasses.dataclass(frozen=True)
class Share:
  """Chunks `index`, `index` + `num`, ... are this job's."""
  index: int = 0
  num: int = 1


@dataclasses.dataclass(frozen=True)
class Work:
  """A suite with its tasks, and what gives their pictures.

  Attributes:
    name: of the suite.
    suite, tasks: the tasks that are asked for.
    chunks: [(task, seed)] of each chunk.
    draw: number of a chunk -> its pictures [H, W, 3] uint8, in place of one that is none why; None where files are read.
    path: (task, seed) -> the file of a picture.
    missing: what a folder of pictures lacks, see `summary.Missing`.
    notes: what was left out of a manifest.
  """
  name: str
  suite: Suite
  tasks: Sequence[Task]
  chunks: Sequence[Sequence[tuple[int, int]]]
  draw: Callable[[int], Sequence[np.ndarray | str]] | None
  path: Callable[[int, int], Place]
  missing: Missing = Missing()
  notes: Sequence[str] = ()

  @functools.cached_property
  def names(self) -> list[str]:
    """What each task is called in files."""
    return files.task_names(self.name, self.tasks)

  @functools.cached_property
  def clusters(self) -> list[str]:
    """For each task the prompt that it is of, see `summary.clusters`: it looks at every condition image."""
    return clusters(self.names, self.tasks)


def work_of_painter(out: Folder, name: str, suite: Suite, tasks: Sequence[Task], painter: Painter, seeds: Sequence[int]) -> Work:
  """What is drawn."""
  chunks, names = painter.chunks(seeds), files.task_names(name, tasks)
  return Work(name, suite, tasks, [[(task, chunk.seed) for task in painter.tasks_of(chunk)] for chunk in chunks],
              lambda number: painter.draw(chunks[number]), lambda task, seed: out.picture(name, names[task], seed))


def work_of_images(images: Place, name: str, suite: Suite, tasks: Sequence[Task], seeds: Sequence[int] = ()) -> Work:
  """Pictures that are there, by their manifest: of these seeds, or all.

  Raises:
    ValueError: as `folder.read_manifest`.
  """
  found, notes = files.read_manifest(images, name, tasks, seeds)
  nums = collections.Counter(task for task, _, _ in found)
  wanted = len(seeds) or max(nums.values())
  missing = Missing(len(tasks) - len(nums), sum(num < wanted for num in nums.values()), wanted * len(tasks) - len(found))
  places = {(task, seed): path for task, seed, path in found}
  chunks = [[(task, seed) for task, seed, _ in found[start:start + IMAGES_AT_ONCE]] for start in range(0, len(found), IMAGES_AT_ONCE)]
  return Work(name, suite, tasks, chunks, None, lambda task, seed: places[task, seed], missing, notes)


def evaluate_into(out: Folder, request: Mapping[str, Any], works: Sequence[Work], share: Share = Share(), num_workers: int = 0) -> dict | None:
  """The summary of all works, written with everything else into `out`; None while chunks of other shares are missing.

  Args: the folder; what identifies this evaluation, see `Folder.begin`; the suites; which chunks are this job's; processes of the pool, see `Scorer`.

  Raises:
    ValueError: the folder holds another evaluation, or processes do not see one folder.
  """
  if processes.is_first():
    out.begin(request)
  _check_shared(out)
  for work in works:
    _do(out, work, share, num_workers)
  processes.barrier("scored")
  if _is_finished(out) or not any(_num_missing(out, work) for work in works):
    if processes.is_first():
      try:
        if not _is_finished(out):
          _finish(out, request, works)
      except FileNotFoundError:  # another job was faster, and has taken the parts away
        if not _is_finished(out):
          raise
      _sweep(out, works)
    processes.barrier("summary")
    return out.summary()
  return None


def _is_finished(out: Folder) -> bool:
  return (out.place / files.SUMMARY).exists()


def _check_shared(out: Folder) -> None:
  """Whether all processes write into the same folder."""
  if jax.process_count() == 1:
    return
  token = processes.from_first("folder", uuid.uuid4().hex)
  if processes.is_first():
    write_file(out.place / f".{token}", "")
  processes.barrier("folder")
  if not (out.place / f".{token}").exists():
    raise ValueError(f"Process {jax.process_index()} does not see what process 0 writes into --out={out.place}: give a folder that all machines "
                     "share, such as gs://BUCKET/FOLDER.")
  processes.barrier("folder seen")
  if processes.is_first():
    (out.place / f".{token}").unlink()


def _do(out: Folder, work: Work, share: Share, num_workers: int) -> None:
  """Draws and scores the chunks of a share that are not done."""
  if json.loads(processes.from_first("finished", json.dumps(_is_finished(out)))):
    return
  _measure_reference(out, work, share)
  left = sorted(set(range(share.index, len(work.chunks), share.num)) - out.done_parts(work.name))
  left = json.loads(processes.from_first("chunks", json.dumps(left)))
  num, ahead, pending = jax.process_count(), AHEAD if work.suite.is_slow else 0, []
  with Scorer(work.suite, num_workers) as scorer:
    for place, number in enumerate(tqdm(left, desc=work.name, unit="chunk", disable=None if processes.is_first() else True)):
      is_mine = place % num == jax.process_index()
      pictures = _pictures(work, number, is_mine)
      if is_mine:
        pending.append((number, scorer.begin([work.tasks[task] for task, _ in work.chunks[number]], pictures)))
      if place % num == num - 1:  # each process has drawn one that is its own: all score at the same time
        while len(pending) > ahead:
          _keep(out, work, *pending.pop(0))
    for number, begun in pending:
      _keep(out, work, number, begun)
  work.suite.release()  # the next suite needs the memory


def _measure_reference(out: Folder, work: Work, share: Share) -> None:
  """Keeps the features of this process's blocks of the reference; no process waits for another one there."""
  if work.suite.reference is None:
    return
  own = range(share.index + share.num * jax.process_index(), work.suite.reference.num_blocks, share.num * jax.process_count())
  paths = {number: out.reference_part(work.name, work.suite.reference.name, number) for number in own}
  left = [number for number, path in paths.items() if not path.exists()]
  for number in tqdm(left, desc=f"{work.name}, reference", unit="block", disable=None if processes.is_first() else True):
    files.write_array(paths[number], work.suite.reference.block(number))


def _num_missing(out: Folder, work: Work) -> int:
  """Chunks and blocks of the reference that are not done."""
  missing = len(set(range(len(work.chunks))) - out.done_parts(work.name))
  return missing + sum(not path.exists() for path in _reference_parts(out, work))


def _reference_parts(out: Folder, work: Work) -> list[Place]:
  reference = work.suite.reference
  return [out.reference_part(work.name, reference.name, number) for number in range(reference.num_blocks)] if reference else []


def _pictures(work: Work, number: int, is_mine: bool) -> list[np.ndarray | str]:
  """The pictures of a chunk, drawn unless all are there; in place of one that is none, or cannot be read, stands why. Other processes' are none of
  this one's."""
  paths = [work.path(task, seed) for task, seed in work.chunks[number]]
  if work.draw is None:
    return [_read(path) for path in paths] if is_mine else []
  found: list[np.ndarray | str] = []
  if jax.process_count() == 1 and all(path.exists() for path in paths):  # of several processes none draws alone
    found = [_read(path) for path in paths]
  if not found or any(isinstance(picture, str) for picture in found):
    found = list(work.draw(number))
    if is_mine:
      for path, picture in zip(paths, found):
        if not isinstance(picture, str):
          save_picture(picture, path)
  return found


def _read(path: Place) -> np.ndarray | str:
  try:
    return files.read_picture(path)
  except (ValueError, OSError) as error:
    return " ".join(str(error).split())


def _keep(out: Folder, work: Work, number: int, begun: Pending) -> None:
  """Waits for the scores of a chunk and writes them."""
  scores, features = begun.finish()
  if features is not None:
    scores = [found if ERROR in found or np.isfinite(one).all() else {ERROR: "its features are not finite"} for found, one in zip(scores, features)]
  out.write_part(work.name, number, [
      row_of(work.name, work.names[task], work.tasks[task], seed, _file(out, work.path(task, seed)), found, work.clusters[task])
      for (task, seed), found in zip(work.chunks[number], scores)], features)


def _file(out: Folder, path: Place) -> str:
  """How a line names a picture: relative to the folder where it is in it."""
  return path.relative_to(out.place).as_posix() if path.is_relative_to(out.place) else os.fspath(path)


# When all is scored.


def _finish(out: Folder, request: Mapping[str, Any], works: Sequence[Work]) -> None:
  """Writes the files that stay. The summary comes last: with it the evaluation is finished."""
  rows, summaries = [], {}
  for work in works:
    mine, features = _merged(out, work)
    rows += mine
    summaries[work.name] = summarise(work.suite, mine, work.missing)
    if work.notes:
      summaries[work.name]["left_out_of_manifest"] = list(work.notes)
    if features is not None and work.suite.of_set is not None:
      if parts := _reference_parts(out, work):
        work.suite.reference.take(np.concatenate([files.read_array(path) for path in parts]))
      summaries[work.name]["of_set"] = _of_set(work.suite, mine, features)
  write_file(out.place / files.SCORES, files.lines(rows))
  if any(work.draw is not None for work in works):
    write_file(out.place / files.MANIFEST, files.lines([{key: row[key] for key in ("file", "suite", "task", "prompt", "seed")} for row in rows]))
  summary = {"request": request, "versions": versions(), "suites": summaries}
  write_page(out, summary, rows, {work.name: (work.suite, work.tasks) for work in works})
  write_file(out.place / files.SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False))


def _sweep(out: Folder, works: Sequence[Work]) -> None:
  """Removes what nobody needs of an evaluation that is finished: the parts, and files that were being written when something was killed."""
  for path in leftovers(out.place, (files.PICTURES, files.PARTS, files.FEATURES)):
    path.unlink(missing_ok=True)
  for work in works:
    of_reference = out.reference_part(work.name, "", 0).parent.glob("*") if work.suite.reference else ()  # those of changed pictures, too
    for path in [*out.part(work.name, 0).parent.glob("*"), *of_reference]:
      path.unlink(missing_ok=True)


def _of_set(suite: Suite, rows: Sequence[Mapping[str, Any]], features: np.ndarray) -> dict[str, Any]:
  """The figures of the whole set; of one that has none, such as too few pictures, why."""
  try:
    return {"num_pictures": sum(ERROR not in row for row in rows), **suite.of_set(_blocks(rows, features))}
  except ValueError as error:
    return {ERROR: " ".join(str(error).split())}


def _merged(out: Folder, work: Work) -> tuple[list[dict[str, Any]], np.ndarray | None]:
  """(rows, features or None) of all pictures in the order of the tasks and seeds. Features stay on the disk: they may be larger than the memory."""
  rows = [row for number in range(len(work.chunks)) for row in files.read_lines(out.part(work.name, number))]
  keys = [key for chunk in work.chunks for key in chunk]
  order = sorted(range(len(keys)), key=lambda i: keys[i])
  if work.suite.features is None:
    return [rows[i] for i in order], None
  places = np.argsort(order)
  blocks = (files.read_array(out.part(work.name, number).with_suffix(".npy")) for number in range(len(work.chunks)))
  ends = itertools.accumulate(len(chunk) for chunk in work.chunks)
  pieces = ((places[end - len(block):end], block) for end, block in zip(ends, blocks))
  return [rows[i] for i in order], out.write_features(work.name, len(keys), pieces)


def _blocks(rows: Sequence[Mapping[str, Any]], features: np.ndarray) -> Iterator[tuple[list[str], np.ndarray]]:
  """(names of the tasks, features) of pictures that have some."""
  good = [i for i, row in enumerate(rows) if ERROR not in row and np.isfinite(features[i]).all()]
  for start in range(0, len(good), BLOCK):
    some = good[start:start + BLOCK]
    yield [rows[i]["task"] for i in some], np.asarray(features[some])


def versions() -> dict[str, str]:
  """{package: version} of what draws and scores; of this one a digest of its code."""
  found = {name: next(importlib.metadata.distributions(name=name), None) for name in PACKAGES}
  return {"qimg2": _code()} | {name: one.version for name, one in found.items() if one}


@functools.cache  # of what this process has read, whatever becomes of the files
def _code() -> str:
  found = hashlib.sha256()
  for package in (qimg2, data_pipelines):
    root = pathlib.Path(package.__file__).parent
    for path in sorted(root.rglob("*.py")):
      found.update(f"{root.name}/{path.relative_to(root).as_posix()} ".encode() + path.read_bytes())
  return found.hexdigest()[:16]
