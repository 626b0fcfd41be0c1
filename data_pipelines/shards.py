"""Reads records by position from many ArrayRecord files, few of which are open at a time.

Two things go wrong with files of records, and they must not be mistaken for each other. A file may hold other bytes than were written: its reader
refuses the record, again and again, and `ValueError` says so. Or the file system fails: too many open files, an input or output error, a server that
is away. Nothing is known of the record then, so reading is tried again with a fresh reader, and in the end `OSError` stops whoever reads.
"""

import bisect
import collections
import concurrent.futures
import itertools
import re
import resource
import threading
import time
from collections.abc import Sequence

from absl import logging
from array_record.python.array_record_module import ArrayRecordReader

MOST_OPEN = 256  # files of a process that stay open between two reads, of all data sets together
_THREADS = 16  # files that are read at once
_OPTIONS = "readahead_buffer_size:0"  # records are read from anywhere
_BUFFER = 2**15  # bytes
_TRIES, _FIRST_PAUSE_S = 7, 0.5  # a pause is twice the one before: half a minute in all
_SYSTEM_CALL = re.compile(r"\b[a-z]\w*\(\) failed: ")  # how the reader begins what the operating system told it: "pread() failed: ..."


class _Readers:
  """The open files of a process. A reader that somebody uses is not here, so two threads that read one file have one each."""

  def __init__(self):
    self._idle: collections.OrderedDict[str, ArrayRecordReader] = collections.OrderedDict()
    self._lock = threading.Lock()

  def take(self, path: str) -> ArrayRecordReader:
    with self._lock:
      reader = self._idle.pop(path, None)
    return reader or ArrayRecordReader(path, options=_OPTIONS, file_reader_buffer_size=_BUFFER)

  def give(self, path: str, reader: ArrayRecordReader) -> None:
    with self._lock:
      gone = [self._idle.pop(path)] if path in self._idle else []
      self._idle[path] = reader
      while len(self._idle) > MOST_OPEN:
        gone.append(self._idle.popitem(last=False)[1])
    for one in gone:
      one.close()


_READERS = _Readers()


class Shards(Sequence):
  """The records of a split, bytes each, by position."""

  def __init__(self, paths: Sequence[str], lengths: Sequence[int]):
    """Args: the files, and how many records each of them holds.

    Raises:
      OSError: this process may not have as many files open as it would.
    """
    limit, wanted = resource.getrlimit(resource.RLIMIT_NOFILE)[0], min(len(paths), MOST_OPEN)
    if limit != resource.RLIM_INFINITY and limit < 2 * wanted:
      raise OSError(f"This process may have {limit} files open, too few for {wanted} files of records beside its others: allow {4 * MOST_OPEN} with "
                    f"`ulimit -n {4 * MOST_OPEN}`.")
    self._paths, self._ends = tuple(map(str, paths)), list(itertools.accumulate(lengths))

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, position: int) -> bytes:
    return self.__getitems__([position])[0]

  def __getitems__(self, positions: Sequence[int]) -> list[bytes]:
    """Returns the records at these positions, in their order.

    Raises:
      ValueError: a file does not hold what was written.
      OSError: the file system fails, and goes on to.
    """
    by_file, records = collections.defaultdict(list), [b""] * len(positions)
    for i, position in enumerate(positions):
      if not 0 <= position < len(self):
        raise IndexError(f"Position {position} is not one of {len(self)} records.")
      by_file[bisect.bisect_right(self._ends, position)].append(i)

    def read(number: int) -> None:
      first = self._ends[number - 1] if number else 0
      here = by_file[number]
      for i, record in zip(here, _read(self._paths[number], [positions[i] - first for i in here]), strict=True):
        records[i] = record

    if len(by_file) == 1:
      read(*by_file)
    else:
      with concurrent.futures.ThreadPoolExecutor(min(_THREADS, max(1, len(by_file)))) as pool:
        collections.deque(pool.map(read, by_file), 0)  # an error of one is raised here
    return records


def _read(path: str, positions: list[int]) -> list[bytes]:
  for trial in itertools.count(1):
    try:
      return _read_once(path, positions)
    except RuntimeError as error:  # of which kind, its text alone tells
      if not _SYSTEM_CALL.search(str(error)):
        raise ValueError(f"{path}: {error}") from error
      if trial == _TRIES:
        raise OSError(f"The file system fails, and did so {trial} times in a row, so that no more records can be read: {path}: {error}. Mend it; the "
                      "same command goes on where it was.") from error
      logging.warning("The file system fails: %s: %s. It is tried again (%d of %d).", path, error, trial + 1, _TRIES)
    time.sleep(_FIRST_PAUSE_S * 2 ** (trial - 1))


def _read_once(path: str, positions: list[int]) -> list[bytes]:
  reader = _READERS.take(path)
  try:
    records = reader.read(positions)
  except BaseException:
    reader.close()  # one that has failed once goes on failing
    raise
  _READERS.give(path, reader)
  return records
