"""What takes long to work out, kept on this machine's disk for the next start and for the other processes of the machine.

An entry is a folder whose name says what it was made of:

  <folder>/<key>/facts        what was found, and what the columns are; beside it a file for each column
  <folder>/<key>.part         the same while it is made: renamed when it is complete
  <folder>/<key>.lock         held by the process that looks for the entry or makes it, so that of several one makes it and the others find it

A process holds a lock on the facts that it uses until it ends. Entries that nobody uses go, the longest unused first, when all together have more
than `MOST_BYTES`. What a killed process leaves half made goes when the next entry is made. Of a column the length and 256 pages are looked at
before it is used, not every byte: to read gigabytes would cost as much as to make them.
"""

import fcntl
import fractions
import hashlib
import io
import os
import pathlib
import pickle
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from data_pipelines.buckets import Bucket
from data_pipelines.cache import Cache
from data_pipelines.columns import Column, is_free, new_column, sampled_digest
from data_pipelines.sorting import Count, Merging

MOST_BYTES = 64 * 10**9  # of all entries of a folder together, but for those that are in use
_DIGEST_BYTES = hashlib.sha256().digest_size
_in_use: list[io.BufferedReader] = []  # locked until this process ends

New = Callable[[str, int, Any], np.ndarray]  # (name, number of rows, type) -> a column to be filled


def folder_of(word: str) -> str:
  """Returns the folder that config.order_dir means: "default" is qimg2/orders in this user's folder for caches, "none" is none, ""."""
  if word == "default":
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "qimg2", "orders")
  return "" if word == "none" else os.path.expanduser(word)


def check_folder(word: str) -> None:
  """Raises `ValueError` where nothing can be written to a folder that config.order_dir names: large data sets, perhaps of a later stage, need it."""
  if word in ("default", "none"):
    return
  try:
    os.makedirs(folder_of(word), exist_ok=True)
    tempfile.TemporaryFile(dir=folder_of(word)).close()
  except OSError as error:
    raise ValueError(f"config.order_dir is {word!r}, where nothing can be written ({error}): name a folder on a disk of this machine, or "
                     "\"none\".") from error


def keep(folder: str | os.PathLike, key: str, make: Callable[[New], Any]) -> tuple[Any, dict[str, np.ndarray]]:
  """Returns (facts, columns by name, memory-mapped) of an entry, which is made unless it is there.

  Args:
    folder: of all entries; made where it is missing.
    key: names everything that the entry depends on.
    make: fills the columns that it asks for and returns the facts: numbers, texts, fractions, buckets, and tuples, lists and dicts of such.

  Raises:
    OSError: the folder cannot be written.
  """
  place = pathlib.Path(folder) / key
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{place}.lock", "wb") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      found = _read(place)
      if found is None:
        _write(place, make)
        _make_room(place)
        found = _read(place)
  except OSError as error:
    raise OSError(f"The order of the records cannot be kept in {place.parent} ({error}): name a folder on a disk of this machine that has room, "
                  "config.order_dir=DIR, or \"none\", which sorts the index anew at every start.") from error
  return found


def _read(place: pathlib.Path) -> tuple[Any, dict[str, np.ndarray]] | None:
  """Returns an entry, which is in use from now on; None where there is none, and with a warning where it is broken."""
  try:
    file = open(place / "facts", "rb")
  except FileNotFoundError:
    return None
  fcntl.flock(file, fcntl.LOCK_SH)
  try:
    digest, body = file.read(_DIGEST_BYTES), file.read()
    if hashlib.sha256(body).digest() != digest:
      raise ValueError("its facts are not those that were written")
    facts, abouts = _Unpickler(io.BytesIO(body)).load()
    columns = {name: _column(place / name, **about) for name, about in abouts.items()}
  except (ValueError, FileNotFoundError, pickle.UnpicklingError) as error:
    file.close()
    logging.warning("The kept order %s is broken (%s): it is made anew.", place, error)
    return None
  os.utime(file.name)
  _in_use.append(file)
  return facts, columns


def _column(path: pathlib.Path, dtype: str, num: int, pages: str) -> np.ndarray:
  """Returns a column of an entry; `ValueError` where the file is another than was written."""
  size, wanted = path.stat().st_size, num * np.dtype(dtype).itemsize
  if size != wanted:
    raise ValueError(f"{path.name} has {size} bytes, not {wanted}")
  if sampled_digest(path) != pages:
    raise ValueError(f"{path.name} is not what was written")
  return Column(path, dtype, "r", 0, (num,)) if num else np.empty(0, dtype)


def _write(place: pathlib.Path, make: Callable[[New], Any]) -> None:
  """Makes an entry; it is in its place when it is whole."""
  part, made = pathlib.Path(f"{place}.part"), {}
  shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
  part.mkdir()

  def new(name: str, num: int, dtype: Any) -> np.ndarray:
    made[name] = new_column(part / name, num, dtype)
    return made[name]

  try:
    facts, abouts = make(new), {}
    for name, column in made.items():
      if len(column):
        column.flush()
      abouts[name] = {"dtype": column.dtype.str, "num": len(column), "pages": sampled_digest(part / name)}
    body = pickle.dumps((facts, abouts))
    with open(part / "facts", "wb") as file:
      file.write(hashlib.sha256(body).digest() + body)
      file.flush()
      os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)  # a broken one
    part.rename(place)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _make_room(newest: pathlib.Path) -> None:
  """Removes what killed processes left half made, and the entries that are too many; not the newest one."""
  for part in newest.parent.glob("*.part"):
    with open(part.with_suffix(".lock"), "ab") as file:
      if is_free(file):
        shutil.rmtree(part, ignore_errors=True)
  facts = sorted(newest.parent.glob("*/facts"), key=lambda path: (path.parent == newest, path.stat().st_mtime), reverse=True)
  total = 0
  for path in facts:
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    if total and total + size > MOST_BYTES:
      with open(path, "r+b") as file:
        if is_free(file):
          logging.info("The kept order %s goes, to make room.", path.parent)
          shutil.rmtree(path.parent)
          continue
    total += size


class _Unpickler(pickle.Unpickler):
  """Reads facts and nothing else: a file cannot have it call what it likes."""

  def find_class(self, module: str, name: str) -> Any:
    known = {(one.__module__, one.__qualname__): one for one in (Bucket, Cache, Count, Merging, fractions.Fraction)}
    if (module, name) not in known:
      raise pickle.UnpicklingError(f"its facts name {module}.{name}")
    return known[module, name]
