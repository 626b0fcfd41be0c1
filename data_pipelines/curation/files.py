"""Files that several processes or machines share: local ones, and remote ones (gs://...) through fsspec. A file appears whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator

import fsspec


def is_remote(path: str) -> bool:
  """Whether a path names another file system than the local one."""
  return "://" in path


def join(*parts: str) -> str:
  """The parts as one path."""
  return "/".join([parts[0].rstrip("/"), *parts[1:]])


def write(path: str, data: bytes) -> None:
  """Writes a whole file; its folder is made."""
  if is_remote(path):
    fsspec.core.url_to_fs(path)[0].pipe_file(path, data)
    return
  os.makedirs(os.path.dirname(path), exist_ok=True)
  partial = f"{path}.{uuid.uuid4().hex}.part"  # a process of an earlier, killed run may still be writing
  with open(partial, "wb") as file:
    file.write(data)
  os.replace(partial, path)


def read(path: str) -> bytes:
  """The bytes of a file."""
  with fsspec.open(path, "rb") as file:
    return file.read()


def exists(path: str) -> bool:
  """Whether there is a file or folder."""
  file_system, place = fsspec.core.url_to_fs(path)
  return file_system.exists(place)


def names(folder: str) -> set[str]:
  """Names of the files in a folder; none if it does not exist."""
  file_system, place = fsspec.core.url_to_fs(folder)
  return {os.path.basename(name) for name in file_system.ls(place, detail=False)} if file_system.exists(place) else set()


def move(source: str, target: str) -> None:
  """Moves a file from here to a place here or elsewhere."""
  if is_remote(target):
    copy(source, target)
    os.remove(source)
  else:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.move(source, target)


@contextlib.contextmanager
def nearby(path: str, folder: str) -> Iterator[str]:
  """Gives the path of a file that can be read here: its own, or that of a copy in a folder, which goes afterwards."""
  if not is_remote(path):
    yield path
    return
  file_system, place = fsspec.core.url_to_fs(path)
  copied = os.path.join(folder, uuid.uuid4().hex)
  file_system.get_file(place, copied)
  yield copied
  os.remove(copied)


def copy(source: str, target: str) -> None:
  """Copies a file, of here or there, to a remote place."""
  file_system = fsspec.core.url_to_fs(target)[0]
  if is_remote(source):
    file_system.copy(source, target)
  else:
    file_system.put_file(source, target)


def remove_file(path: str) -> None:
  """Removes a file, if it is there."""
  file_system, place = fsspec.core.url_to_fs(path)
  if file_system.exists(place):
    file_system.rm_file(place)


def remove_folder(path: str) -> None:
  """Removes a folder and all in it, if it is there."""
  if is_remote(path):
    file_system, place = fsspec.core.url_to_fs(path)
    if file_system.exists(place):
      file_system.rm(place, recursive=True)
  else:
    shutil.rmtree(path, ignore_errors=True)
