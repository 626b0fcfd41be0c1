"""The columns of an index, read from where they lie: nothing is loaded but the rows that are looked at, and the processes of a host share them."""

import contextlib
import ctypes
import fcntl
import hashlib
import io
import mmap
import os
import pathlib
import shutil
import signal
import tempfile
import time
import weakref
import zipfile
from typing import Any

import numpy as np

LARGE = 2**22  # bytes, from which on a column that is made is in a file
_SCRATCH = "qimg2-order-"
_YOUNG_S = 60
_PAGE, _PAGES = 4096, 256
_BLOCK_BYTES = 2**24
_HEADER_BYTES = 30  # of a member of a ZIP file, before its name and its extra field, whose lengths are the last four bytes


_mapped: set[str] = set()  # folders of the files of columns


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end_in_a_sentence(_: int) -> None:
  """What the system calls in the middle of reading a page that is not to be had. Python's own handlers would wait until that has been read."""
  sentence = ("error: A file that is mapped cannot be read (SIGBUS), because its disk or mount fails, it became shorter while it was in use, "
              "or /dev/shm, through which loader workers send their batches, is full (containers have 64 MB by default: --shm-size). "
              f"Mapped are files in {', '.join(sorted(_mapped))}. Mend it; the same command goes on where it was.\n")
  os.write(2, sentence.encode())
  os._exit(1)


class Column(np.memmap):
  """Rows of a file, memory-mapped. Another process to which it is sent maps them too, in place of getting them. Where they cannot be read when they
  are looked at, the process ends with 1 and a sentence."""

  def __new__(cls, path: str | os.PathLike, *args, **options):
    _mapped.add(os.path.dirname(os.path.abspath(path)))
    ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGBUS), _end_in_a_sentence)  # again each time: others set theirs when they are loaded
    return super().__new__(cls, path, *args, **options)

  def __reduce_ex__(self, protocol: int) -> tuple:
    if self._mmap is None or not self.flags.c_contiguous:  # made out of rows of a file, and in none itself
      return np.array(self).__reduce_ex__(protocol)
    begin = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY  # of what is mapped, in the file
    offset = begin + self.ctypes.data - np.frombuffer(self._mmap, np.uint8).ctypes.data
    return Column, (self.filename, self.dtype, "r", offset, self.shape)


def new_column(path: str | os.PathLike, num: int, dtype: Any) -> np.ndarray:
  """Returns a new column of `num` rows in a new file, to be filled.

  Raises:
    OSError: there is no room for it.
  """
  with open(path, "xb") as file:
    _allocate(file.fileno(), num * np.dtype(dtype).itemsize)
  return Column(path, dtype, "r+", 0, (num,)) if num else np.empty(0, dtype)


def _allocate(handle: int, num_bytes: int) -> None:
  """Gives a file its bytes on the disk: one that is full says so here, not by a signal when a page is written."""
  if hasattr(os, "posix_fallocate"):
    os.posix_fallocate(handle, 0, num_bytes or 1)
    os.ftruncate(handle, num_bytes)
    return
  for begin in range(0, num_bytes, _BLOCK_BYTES):  # macOS
    os.write(handle, bytes(min(_BLOCK_BYTES, num_bytes - begin)))


def scratch(num: int, dtype: Any) -> np.ndarray:
  """Returns a new column of `num` rows. A large one is in a temporary file, so that worker processes can map it; it goes with the last name of the
  column. That of a process that was killed goes when another process makes one.

  Raises:
    OSError: there is no room for it.
  """
  num_bytes = num * np.dtype(dtype).itemsize
  if num_bytes < LARGE:
    return np.empty(num, dtype)
  folder = tempfile.mkdtemp(prefix=_SCRATCH)
  _sweep(pathlib.Path(folder))
  lock = open(os.path.join(folder, "lock"), "wb")
  fcntl.flock(lock, fcntl.LOCK_EX)
  try:
    column = new_column(os.path.join(folder, "column"), num, dtype)
  except OSError as error:
    _remove(folder, os.getpid(), lock)
    raise OSError(f"What is sorted or joined of an index takes {num_bytes / 1e9:.1f} GB in the folder of temporary files, {os.path.dirname(folder)} "
                  f"({error}): name one with more room by TMPDIR.") from error
  weakref.finalize(column._mmap, _remove, folder, os.getpid(), lock)
  return column


def _remove(folder: str, owner: int, lock: io.IOBase) -> None:
  lock.close()
  if os.getpid() == owner:  # not one that was forked from it
    shutil.rmtree(folder, ignore_errors=True)


def _sweep(newest: pathlib.Path) -> None:
  """Removes the columns of processes that were killed: nobody holds their locks. One that is only seconds old may not hold its own yet."""
  for path in newest.parent.glob(f"{_SCRATCH}*/lock"):
    with contextlib.suppress(FileNotFoundError, PermissionError), open(path, "r+b") as file:  # gone in the meantime, or another user's
      if path.stat().st_mtime < time.time() - _YOUNG_S and is_free(file):
        shutil.rmtree(path.parent, ignore_errors=True)


def is_free(file: io.IOBase) -> bool:
  """Returns whether no other process holds the lock of an open file, which is held from now on until that is closed."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def sampled_digest(path: str | os.PathLike) -> str:
  """Returns the SHA-256 of a file's length and of 256 pages from all over it, the first and the last among them: to read all may take minutes."""
  size, digest = os.path.getsize(path), hashlib.sha256()
  last = max(0, size - _PAGE)
  digest.update(str(size).encode())
  with open(path, "rb") as file:
    for begin in sorted({last * i // (_PAGES - 1) for i in range(_PAGES)}):
      file.seek(begin)
      digest.update(file.read(_PAGE))
  return digest.hexdigest()


def map_columns(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the arrays of an .npz file as `np.savez` writes it, memory-mapped; those without a dimension or without rows are read.

  Raises:
    ValueError: it is no such file.
  """
  columns = {}
  try:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
      for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
          raise ValueError(f"{member.filename} in it is compressed")
        file.seek(member.header_offset)
        header = file.read(_HEADER_BYTES)
        file.seek(int.from_bytes(header[-4:-2], "little") + int.from_bytes(header[-2:], "little"), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, column_major, dtype = read(file)
        if len(shape) and np.prod(shape):
          array = Column(path, dtype, "r", file.tell(), shape, "F" if column_major else "C")
        else:
          array = np.fromfile(file, dtype, int(np.prod(shape))).reshape(shape)
        columns[member.filename.removesuffix(".npy")] = array
  except (zipfile.BadZipFile, ValueError, EOFError) as error:
    raise ValueError(f"{path} is no index of a data set ({error}): copy it again, or remove the data set and prepare it anew.") from error
  return columns
