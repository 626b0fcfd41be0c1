"""The folder that an evaluation writes, and what of it is already there.

  <out>/request.json     what is evaluated, and on what; another request is refused there
        pictures/<suite>/<task>_<seed>.png
        parts/<suite>/<number>.jsonl .npy      scores and features of a chunk; removed when the files below are written
        parts/<suite>.reference/<name>-<number>.npy      features of a block of reference pictures; likewise
        manifest.jsonl   a line per picture: file, suite, task, prompt, seed. With it, --images=<out> scores the pictures again
        scores.jsonl     a line per picture: suite, task, category, prompt, seed, file, metrics, details; or "error" in place of the last two
        features/<suite>.npy
        summary.json     each figure with its interval, number of prompts and pictures; the sets of prompts, the model, the versions
        report.html

Every file appears whole or not at all, and depends only on the request: not on the order of the chunks, on how many processes did them, or on kills.
"""

import difflib
import io
import json
import os
import pathlib
import posixpath
import shutil
import tempfile
import unicodedata
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.transforms import decode_image
from qimg2.evaluation import ERROR, Task
from qimg2.evaluation.prompt_files import decode_text, first_repeated, numbered_lines, parse_json
from qimg2.places import Place, find_place, is_remote, opened_part, write_file

REQUEST, MANIFEST, SCORES, SUMMARY, REPORT = "request.json", "manifest.jsonl", "scores.jsonl", "summary.json", "report.html"
PICTURES, PARTS, FEATURES = "pictures", "parts", "features"  # folders


class Folder:
  """The files of an evaluation below one place."""

  def __init__(self, place: str | Place):
    """Args: the folder, on this machine or in a bucket; it need not exist."""
    self.place = find_place(place, "--out")

  def begin(self, request: Mapping[str, Any]) -> None:
    """Writes down what is evaluated. One that is finished may be asked for with other "versions" than it was made with: nothing is made again.

    Raises:
      ValueError: the folder holds another evaluation or other files, or cannot be made.
    """
    path = self.place / REQUEST
    make_folder(self.place)
    if not path.exists():
      others = self.place.is_dir() and [one for one in self.place.iterdir() if not one.name.startswith(REQUEST)]
      if others and not path.exists():  # of several jobs another one may have begun meanwhile
        raise ValueError(f"--out={self.place} holds other files, and no evaluation: give a folder of its own.")
      if not path.exists():
        write_file(path, json.dumps(request, indent=1, ensure_ascii=False))
    before, now = read_json(path), json.loads(json.dumps(request))
    if (self.place / SUMMARY).exists():
      before["versions"] = now.get("versions")
    changed = [f"{name} was {_short(old)} and is {_short(new)}" for name, old, new in _changes(before, now)]
    if not changed:
      return
    raise ValueError(f"--out={self.place} holds another evaluation: {'; '.join(changed)}. Give another --out.")

  def picture_of(self, file: str) -> Place:
    """The picture that a line names: relative to the folder, or anywhere."""
    return picture_place(self.place, file, "A line of scores.jsonl")

  def picture(self, suite: str, name: str, seed: int) -> Place:
    """Where a picture is."""
    return self.place / PICTURES / suite / f"{name}_{seed}.png"

  def part(self, suite: str, number: int) -> Place:
    """Where the scores of a chunk are until all are there."""
    return self.place / PARTS / suite / f"{number:06d}.jsonl"

  def features(self, suite: str) -> Place:
    """Where the features of a suite's pictures are."""
    return self.place / FEATURES / f"{suite}.npy"

  def write_part(self, suite: str, number: int, rows: Sequence[Mapping[str, Any]], features: np.ndarray | None) -> None:
    """Keeps what was found of a chunk. Features come first: a part is there when its scores are."""
    path = self.part(suite, number)
    if features is not None:
      write_array(path.with_suffix(".npy"), features)
    write_file(path, lines(rows))

  def write_features(self, suite: str, num: int, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Writes the features [num, D] of a suite from (numbers of rows, rows) that are all of them, and returns them as a file that is looked into. A
    block without a picture that could be read may have no columns: its rows are NaN."""
    path, found = self.features(suite), None
    with tempfile.TemporaryDirectory() as scratch:
      local = (pathlib.Path(scratch) if is_remote(path) else path.parent) / f"{path.name}.{uuid.uuid4().hex}.part"
      local.parent.mkdir(parents=True, exist_ok=True)
      for rows, block in blocks:
        if found is None and block.shape[1]:
          found = _map_of_nan(local, path, num, block.shape[1])
        if block.shape[1]:
          found[rows] = block
      if found is None:
        return np.full((num, 0), np.nan, np.float32)
      found.flush()
      if not is_remote(path):
        local.replace(path)
        return np.load(path, mmap_mode="r")
      with open(local, "rb") as file, path.open("wb") as there:
        shutil.copyfileobj(file, there)
      return np.load(local, mmap_mode="r")  # the file may be gone from its folder, but not while it is looked into

  def reference_part(self, suite: str, name: str, number: int) -> Place:
    """Where the features of a block of a suite's reference are until all are there."""
    return self.place / PARTS / f"{suite}.reference" / f"{name}-{number:06d}.npy"

  def done_parts(self, suite: str) -> set[int]:
    """Numbers of the chunks whose scores are there."""
    folder = self.part(suite, 0).parent
    return {int(path.stem) for path in folder.glob("*.jsonl")} if folder.is_dir() else set()

  def rows(self) -> list[dict[str, Any]]:
    """The lines of scores.jsonl.

    Raises:
      ValueError: the evaluation is not complete, or there is none.
    """
    if not (self.place / SUMMARY).exists() or not (self.place / SCORES).exists():
      raise ValueError(f"{self.place} holds no finished evaluation: run launch.evaluate with --out={self.place} to its end first.")
    found = read_lines(self.place / SCORES)
    if any(not {"suite", "task", "cluster"} <= row.keys() or not {"metrics", ERROR} & row.keys() for row in found):
      raise ValueError(f"{self.place / SCORES} has lines that no evaluation wrote: run launch.evaluate into another --out.")
    return found

  def summary(self) -> dict[str, Any]:
    """summary.json.

    Raises:
      ValueError: the evaluation is not complete, or there is none.
    """
    if not (self.place / SUMMARY).exists():
      raise ValueError(f"{self.place} holds no finished evaluation: run launch.evaluate with --out={self.place} to its end first.")
    found = read_json(self.place / SUMMARY)
    if not isinstance(found, dict) or not {"request", "versions", "suites"} <= found.keys():
      raise ValueError(f"{self.place / SUMMARY} is not that of an evaluation: name a folder that launch.evaluate wrote.")
    return found


def picture_place(folder: Place, file: str, what: str) -> Place:
  """The picture that a line names: relative to the folder, or anywhere. A bucket has no folders, so that .. must be resolved before it is asked.

  Raises:
    ValueError: a URL of another kind than gs://; it calls the line `what`.
  """
  if "://" in file or os.path.isabs(file):
    return find_place(file, what)
  if not is_remote(folder):
    return folder / file
  return find_place(f"gs://{posixpath.normpath(os.path.join(os.fspath(folder).removeprefix('gs://'), file))}", what)


def make_folder(place: Place) -> None:
  """Makes the folder of --out where there is none; in a bucket it comes with its first file.

  Raises:
    ValueError: it, or a part of its path, is a file, or it may not be made there.
  """
  if is_remote(place):
    return
  try:
    place.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError) as error:
    raise ValueError(f"--out={place} cannot be made, because {error.filename} is a file, or below one: name another folder.") from error
  except OSError as error:
    raise ValueError(f"--out={place} cannot be made ({error.strerror}: {error.filename}): name another folder.") from error


def write_array(path: Place, array: np.ndarray) -> None:
  """Writes an .npy file, whole or not at all."""
  content = io.BytesIO()
  np.save(content, array)
  write_file(path, content.getvalue())


def _map_of_nan(part: pathlib.Path, path: Place, num: int, width: int) -> np.ndarray:
  """A new .npy file [num, width] float32, the part of `path`, to be written to. It has its room before: what a full disk does not take of a map ends
  the process.

  Raises:
    OSError: there is no room.
  """
  with opened_part(part, path) as file:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (num, width)})
    for _ in range(num):
      file.write(np.full(width, np.nan, np.float32).tobytes())
  return np.load(part, mmap_mode="r+")


def read_array(path: Place) -> np.ndarray:
  """The array of an .npy file. `FileNotFoundError` where there is none."""
  return np.load(io.BytesIO(path.read_bytes()))


def read_picture(path: Place) -> np.ndarray:
  """[H, W, 3] uint8; what is transparent is laid on white.

  Raises:
    ValueError: the file is missing or is no picture.
  """
  if not path.is_file():
    raise ValueError(f"There is no picture {path}.")
  return decode_image(path.read_bytes(), str(path))


def task_names(suite: str, tasks: Sequence[Task]) -> list[str]:
  """What each task is called in files: its name, or its number.

  Raises:
    ValueError: two tasks have one name.
  """
  names = [task.name or f"{number:05d}" for number, task in enumerate(tasks)]
  twice = first_repeated(names)
  if twice is not None:
    raise ValueError(f"Suite {suite} has two tasks of the name {twice}: each needs its own.")
  return names


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
  """JSON, a row in each line."""
  return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_lines(path: Place) -> list[dict[str, Any]]:
  """The rows of a file that `lines` wrote.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not UTF-8, or a line is no JSON.
  """
  return [row for _, row in numbered_rows(path)]


def numbered_rows(path: Place) -> Iterator[tuple[int, dict[str, Any]]]:
  """(number of the line from 1, row) of each row of a file; raises as `read_lines`."""
  for number, text in numbered_lines(decode_text(path.read_bytes(), str(path))):
    row = parse_json(text, f"Line {number} of {path}")
    if not isinstance(row, dict):
      raise ValueError(f"Line {number} of {path} is {text[:60]!r}: each line must be an object, such as {{\"file\": \"a.png\", \"prompt\": \"a\"}}.")
    yield number, row


def read_json(path: Place) -> dict[str, Any]:
  """A JSON file of an evaluation.

  Raises:
    ValueError: it is none.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is no JSON file ({error}): it was changed; remove it and run the same command again.") from error


def read_manifest(folder: Place, suite: str, tasks: Sequence[Task],
                  seeds: Sequence[int] = ()) -> tuple[list[tuple[int, int, Place]], list[str]]:
  """((number of the task, seed, file) in the order of the tasks and seeds, what was left out and why) of a folder of pictures with a manifest.jsonl.

  A line has "file", relative to the folder, "prompt" or "task" (the task's name), and "seed", 0 where it is missing. Pictures of a prompt that
  several tasks have belong to them in the order of the lines. Where a line names the suite, those that name another one are passed over. Where
  `seeds` are given, pictures of others are left out.

  Raises:
    ValueError: no manifest, a line without a field, more pictures of a prompt and seed than it has tasks, a file that a task has twice, or no line
      that belongs to the suite.
  """
  path = folder / MANIFEST
  if not path.is_file():
    raise ValueError(f"--images={folder} has no {MANIFEST}: give it one with a line for each picture, such as "
                     '{"file": "a.png", "prompt": "a red cat", "seed": 0}.')
  rows = list(numbered_rows(path))
  if any(row.get("suite") == suite for _, row in rows):
    rows = [(number, row) for number, row in rows if row.get("suite", suite) == suite]
  asked, found, files, left_out, unknown = _Asked(suite, tasks), {}, set(), [], []
  for number, row in rows:
    _check_row(row, number, path)
    seed = int(row.get("seed") or 0)
    task = asked.task_of(row, seed, found)
    if task is None:
      unknown.append((number, row.get("prompt") or row.get("task")))
      left_out.append(f"line {number}: {_short(unknown[-1][1])} is no prompt of {suite}")
      continue
    if seeds and seed not in seeds:
      left_out.append(f"line {number}: seed {seed} is none of those that are asked for")
      continue
    if (task, seed) in found:
      raise ValueError(f"Line {number} of {path} is another picture of {_short(tasks[task].prompt)} with seed {seed}: give each its own seed.")
    place = picture_place(folder, row["file"], f"Line {number} of {path}")
    if (task, place) in files:
      raise ValueError(f"Line {number} of {path} names {row['file']} again for {_short(tasks[task].prompt)}: it would count as two pictures.")
    found[task, seed] = place
    files.add((task, place))
  if not found and unknown:
    raise ValueError(f"No line of {path} belongs to suite {suite}{_nearest(unknown, [task.prompt for task in tasks])}. The prompts must be "
                     "those of the suite, word for word.")
  if not found:
    asked_for = ", ".join(map(str, seeds))
    why = f"{len(left_out)} of them have another seed than {asked_for}: give --seeds that are there" if left_out else "it has no line"
    raise ValueError(f"No line of {path} is a picture for suite {suite}; {why}.")
  return [(*key, found[key]) for key in sorted(found)], left_out


def _same(prompt: str) -> str:
  """A prompt as others are compared with it: accents may be written in two ways."""
  return unicodedata.normalize("NFC", prompt)


class _Asked:
  """The tasks of a suite as lines of a manifest name them."""

  def __init__(self, suite: str, tasks: Sequence[Task]):
    self._tasks, self._names = tasks, {name: number for number, name in enumerate(task_names(suite, tasks))}
    self._prompts: dict[str, list[int]] = {}
    self._turns: dict[tuple[str, int], int] = {}  # (prompt, seed) -> how many of its tasks have a picture: those before are not looked at again
    for number, task in enumerate(tasks):
      self._prompts.setdefault(_same(task.prompt), []).append(number)

  def task_of(self, row: Mapping[str, Any], seed: int, found: Mapping) -> int | None:
    """The number of a line's task, of several that ask the same the first that is not `found` with this seed; None where the suite has none."""
    if row.get("task") is not None:
      task = self._names.get(row["task"])
      return None if task is None or (row.get("prompt") is not None and _same(row["prompt"]) != _same(self._tasks[task].prompt)) else task
    prompt = _same(row["prompt"])
    numbers, turn = self._prompts.get(prompt, ()), self._turns.get((prompt, seed), 0)
    while turn < len(numbers) and (numbers[turn], seed) in found:
      turn += 1
    self._turns[prompt, seed] = turn
    return numbers[min(turn, len(numbers) - 1)] if numbers else None


def _nearest(left_out: Sequence[tuple[int, str]], prompts: Sequence[str]) -> str:
  """The first line that belongs to no task, and what it may have meant."""
  if not left_out:
    return ""
  near = difflib.get_close_matches(left_out[0][1], prompts, 1, 0.3)
  return f": line {left_out[0][0]} has {_short(left_out[0][1])}" + (f", whose nearest is {_short(near[0])}" if near else "")


def _check_row(row: Mapping[str, Any], number: int, path: Place) -> None:
  """Whether a line of a manifest has its fields."""
  for names in (("file",), ("prompt", "task")):
    given = [name for name in names if row.get(name) is not None]
    if not given or not all(isinstance(row[name], str) for name in given):
      raise ValueError(f"Line {number} of {path} has no {' or '.join(map(repr, names))}: each needs \"file\" and \"prompt\" (or \"task\").")
  seed = row.get("seed")
  if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
    raise ValueError(f"Line {number} of {path} has the seed {seed!r}: give a whole number.")


def _changes(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
  """(place, what was there, what is there) of what differs in two requests, as deep as it goes."""
  if isinstance(before, dict) and isinstance(now, dict):
    for key in sorted({*before, *now}):
      yield from _changes(before.get(key), now.get(key), f"{name}.{key}" if name else key)
  elif before != now:
    yield name, before, now


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 80 else f"{text[:77]}..."
