"""The columns of an index, read from where they lie: nothing is loaded but the rows that are looked at, and the processes of a host share them."""

import mmap
import os
import pathlib
import tempfile
import weakref
import zipfile
from typing import Any

import numpy as np

from data_pipelines.tally import pieces

LARGE = 2**22  # bytes, from which on a column that is made is in a file
_HEADER_BYTES = 30  # of a member of a ZIP file, before its name and its extra field, whose lengths are the last four bytes


class Column(np.memmap):
  """Rows of a file, memory-mapped. Another process to which it is sent maps them too, in place of getting them."""

  def __reduce_ex__(self, protocol: int) -> tuple:
    if self._mmap is None or not self.flags.c_contiguous:  # made out of rows of a file, and in none itself
      return np.array(self).__reduce_ex__(protocol)
    begin = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY  # of what is mapped, in the file
    offset = begin + self.ctypes.data - np.frombuffer(self._mmap, np.uint8).ctypes.data
    return Column, (self.filename, self.dtype, "r", offset, self.shape)


def scratch(num: int, dtype: Any) -> np.ndarray:
  """Returns a new column of `num` rows. A large one is in a temporary file, so that worker processes can map it; it goes with the last name of the
  column, or with this process unless that is killed.

  Raises:
    OSError: there is no room for it.
  """
  num_bytes = num * np.dtype(dtype).itemsize
  if num_bytes < LARGE:
    return np.empty(num, dtype)
  handle, path = tempfile.mkstemp(prefix="qimg2-order-")
  try:
    os.posix_fallocate(handle, 0, num_bytes)  # a disk that is full says so here, not by a signal when a page is written
  except OSError as error:
    os.unlink(path)
    raise OSError(f"The order of the records takes {num_bytes / 1e9:.1f} GB in the folder of temporary files, {os.path.dirname(path)} ({error}): "
                  "name one with more room by TMPDIR.") from error
  finally:
    os.close(handle)
  column = Column(path, dtype, "r+", 0, (num,))
  weakref.finalize(column._mmap, _remove, path, os.getpid())
  return column


def _remove(path: str, owner: int) -> None:
  if os.getpid() == owner:  # not one that was forked from it
    pathlib.Path(path).unlink(missing_ok=True)


def nearby(column: np.ndarray) -> np.ndarray:
  """Returns a copy of a column as `scratch` gives it: its rows will be read one by one from anywhere, and its file may be on a mounted bucket."""
  copy = scratch(len(column), column.dtype)
  for piece in pieces(len(column)):
    copy[piece] = column[piece]
  return copy


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
