"""Where a run keeps its files: a folder of this machine, or gs://BUCKET/FOLDER of Google Cloud Storage.

Either is a path with the methods of pathlib; that of a bucket is one of `etils.epath`, as Orbax uses it. What differs stands here. An object of a
bucket appears whole or not at all, so it needs no second name while it is written; nothing can be appended to it; nothing but names that begin alike
makes a folder; and a listing tells the checksum of everything in it, so that no byte has to be read for that.
"""

import base64
import concurrent.futures
import contextlib
import fcntl
import io
import itertools
import logging as python_logging
import os
import pathlib
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import fsspec
from absl import logging
from etils import epath

Place = pathlib.Path | epath.Path
COMMITTED = "commit_success.txt"  # Orbax writes it into a folder of a bucket when a save is complete; on a disk it renames the folder
UPLOAD_S = 60  # seconds between two uploads of a file that grows
_CLIENTS = ("gcsfs", "aiohttp", "google", "tensorflow")  # packages that raise what is no OSError
_FOR_GOOD = (400, 401, 403, 404, 412)  # answers that come again
CHECKSUM = "crc32c:"  # what the checksums that a bucket tells begin with
_SCRATCH, _YOUNG_S = "qimg2.", 60


class BucketError(OSError):
  """A bucket does not answer, or says that it cannot now: the same command may go on later."""


class File(NamedTuple):
  """What a listing tells of a file: its path, bytes, a mark that changes with its content, and "crc32c:..." or "" where a disk knows none."""
  path: Place
  size: int
  mark: int
  checksum: str


def find_place(place: str | os.PathLike, what: str) -> Place:
  """Returns the path of a folder that may be in a bucket.

  Raises:
    ValueError: a URL of another kind, or without a folder, or gcsfs is missing; it calls the place `what`.
  """
  scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", os.fspath(place))
  if not scheme:
    return pathlib.Path(place)
  if scheme[1] != "gs":
    raise ValueError(f"{what} is {os.fspath(place)}, but {scheme[1]}:// is neither a folder of this machine nor gs://BUCKET/FOLDER: give "
                     "one of them.")
  text = f"gs://{scheme[2].rstrip('/')}"
  if not re.fullmatch(r"gs://[^/]+(/[^/]+)+", text):
    raise ValueError(f"{what} is {os.fspath(place)}, which names no folder: give gs://BUCKET/FOLDER.")
  try:
    import gcsfs  # noqa: F401  what epath and TensorBoard's readers need for gs://
  except ImportError as error:
    raise ValueError(f"{what} is {text}, and without gcsfs nothing can be read there: pip install gcsfs.") from error
  conf = fsspec.config.conf.setdefault("gcs", {})
  conf["use_listings_cache"] = False  # listings that are kept would not know what TensorStore and other processes write
  if "STORAGE_EMULATOR_HOST" in os.environ:
    conf.pop("token", None)
  else:
    conf.setdefault("token", "google_default")  # or it would go on as nobody where the credentials cannot be had for a moment
  python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL)  # what fails in the end is raised, too
  return epath.Path(text)


def is_remote(place: str | os.PathLike) -> bool:
  """Whether a place is in a bucket."""
  return os.fspath(place).startswith("gs://")


def as_absolute(place: str | os.PathLike) -> Place:
  """The same place, whatever becomes of the working directory."""
  return epath.Path(place) if is_remote(place) else pathlib.Path(place).absolute()


def write_file(place: Place, content: str | bytes) -> None:
  """Writes a whole file, which is on the disk when this returns; whoever reads it sees the old one or the new one. Its folder is made.

  Raises:
    OSError: it cannot be written, as on a full disk: it names the file, and nothing of it stays.
  """
  content, place = content.encode() if isinstance(content, str) else content, as_absolute(place)
  if is_remote(place):
    place.write_bytes(content)
    return
  place.parent.mkdir(parents=True, exist_ok=True)
  part = place.with_name(f"{place.name}.{uuid.uuid4().hex}.part")  # processes of two machines may have one number
  with opened_part(part, place) as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  part.replace(place)


@contextlib.contextmanager
def opened_part(part: pathlib.Path, place: pathlib.Path) -> Iterator[io.BufferedWriter]:
  """Opens the file that is to become `place`. Where it cannot be written, as on a full disk, nothing of it stays, and the `OSError` names `place`."""
  try:
    with open(part, "wb") as file:
      yield file
  except OSError as error:
    with contextlib.suppress(OSError):
      part.unlink()
    raise OSError(error.errno, error.strerror, os.fspath(place)) from error


def leftovers(folder: Place, below: Sequence[str]) -> list[Place]:
  """Files in a folder, and anywhere below those of its folders that are named, that `write_file` had not completed when its process ended, and those
  that it is at; a bucket has none."""
  if is_remote(folder):
    return []
  found = itertools.chain(folder.glob("*.part"), *((folder / name).rglob("*.part") for name in below))
  return [path for path in found if re.fullmatch(r".*\.[0-9a-f]{32}\.part", path.name)]


def list_files(folder: Place) -> dict[str, File]:
  """All files below a folder by their names in it, sorted; none where it does not exist."""
  if not is_remote(folder):
    found = [(path, path.stat()) for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {path.relative_to(folder).as_posix(): File(path, stat.st_size, stat.st_mtime_ns, "") for path, stat in found}
  root = os.fspath(folder).removeprefix("gs://")
  listed = _bucket(folder).find(root, detail=True)
  names = {name.removeprefix(f"{root}/"): facts for name, facts in sorted(listed.items())}
  return {name: File(folder / name, facts["size"], int(facts["generation"]), CHECKSUM + facts["crc32c"]) for name, facts in names.items()}


def crc32c(path: Place) -> str:
  """The checksum of a file as `list_files` tells those of a bucket: the file is read.

  Raises:
    ValueError: the package that computes it is not there.
  """
  try:
    import google_crc32c
  except ImportError as error:
    raise ValueError(f"{path} came from a bucket, whose checksums google-crc32c computes: pip install gcsfs, which brings it.") from error
  checksum = google_crc32c.Checksum()
  with path.open("rb") as file:
    while block := file.read(1 << 20):
      checksum.update(block)
  return CHECKSUM + base64.b64encode(checksum.digest()).decode()


def is_complete(folder: Place) -> bool:
  """Whether Orbax has completed a folder. On a disk one that is not has another name."""
  return (folder / COMMITTED).exists() if is_remote(folder) else folder.is_dir()


def _bucket(place: Place) -> fsspec.AbstractFileSystem:
  return fsspec.core.url_to_fs(os.fspath(place))[0]


class Growing:
  """A folder with files that grow, which are written to `local`. On a disk that is the place itself. In a bucket nothing can be appended to, so
  `local` is a temporary folder, and the files that changed are uploaded whole: by `push`, and about once in `UPLOAD_S` seconds by `push_soon`."""

  def __init__(self, place: Place):
    """Args: the place, which is made."""
    self._place, self._pushed, self._due, self._pool, self._running = place, {}, time.monotonic() + UPLOAD_S, None, None
    self.local = place
    if not is_remote(place):
      place.mkdir(parents=True, exist_ok=True)
      return
    self.local, self._lock = _scratch()
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "upload")

  def push(self) -> None:
    """Returns when the place holds what the files hold now.

    Raises:
      OSError: it cannot be written to.
    """
    if self._pool:
      self._pool.submit(self._upload).result()

  def push_soon(self, now: bool = False) -> None:
    """Begins an upload where the last one is `UPLOAD_S` ago, or `now`; one that fails is said in the log, and tried again a minute later."""
    if self._pool and (now or time.monotonic() >= self._due) and (self._running is None or self._running.done()):
      self._running = self._pool.submit(self._try)

  def close(self) -> None:
    """Uploads what is left, and ends. Where that fails, the log says where the files stay."""
    if not self._pool:
      return
    try:
      self.push()
      shutil.rmtree(self.local.parent)
    except OSError as error:
      pathlib.Path(self._lock.name).unlink(missing_ok=True)  # so that it stays
      logging.warning("%s What was not uploaded is in %s.", error, self.local)
    self._lock.close()
    self._pool.shutdown()
    self._pool = None

  def _try(self) -> None:
    try:
      self._upload()
    except OSError as error:
      self._due = time.monotonic() + UPLOAD_S
      logging.warning("%s It is tried again.", error)

  def _upload(self) -> None:
    for path in sorted(self.local.rglob("*")):
      name, size = path.relative_to(self.local).as_posix(), path.stat().st_size
      if path.is_dir() or self._pushed.get(name) == size:
        continue
      content = path.read_bytes()
      with named_failures(self._place / name):
        write_file(self._place / name, content)
      self._pushed[name] = len(content)
    self._due = time.monotonic() + UPLOAD_S


def _scratch() -> tuple[pathlib.Path, io.IOBase]:
  """Returns (a new folder in that of temporary files, its lock, which this process holds until it ends). Those of processes that were killed, whose
  locks nobody holds, go: what they had not uploaded comes after the last checkpoint. One that is only seconds old may not hold its own yet.

  (`data_pipelines.columns.scratch` does the same with columns; neither package may import the other.)
  """
  folder = pathlib.Path(tempfile.mkdtemp(prefix=_SCRATCH))
  for path in folder.parent.glob(f"{_SCRATCH}*/lock"):
    with contextlib.suppress(FileNotFoundError, PermissionError, BlockingIOError), open(path, "r+b") as file:  # gone, another user's, in use
      if path.stat().st_mtime < time.time() - _YOUNG_S:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path.parent, ignore_errors=True)
  lock = open(folder / "lock", "wb")
  fcntl.flock(lock, fcntl.LOCK_EX)
  (folder / "files").mkdir()
  return folder / "files", lock


@contextlib.contextmanager
def named_failures(place: Place) -> Iterator[None]:
  """Whatever fails inside, for each library has errors of its own, comes out as an `OSError` that names the place, if that is in a bucket."""
  try:
    yield
  except Exception as error:
    if not is_remote(place):
      raise
    raise _kind(error)(f"{place} could not be written {_why(error)}") from error


@contextlib.contextmanager
def client_failures() -> Iterator[None]:
  """What only the clients of buckets raise comes out as an `OSError`."""
  try:
    yield
  except Exception as error:
    if type(error).__module__.partition(".")[0] not in _CLIENTS:
      raise
    raise _kind(error)(f"The bucket could not be read or written {_why(error)}") from error


def check_rights(place: Place) -> None:
  """Asks a bucket for what Orbax asks it for when it first removes an old checkpoint, which would be hours later: its own record.

  Raises:
    OSError: this machine may not read it.
  """
  if is_remote(place):
    from google.cloud import storage
    name = os.fspath(place).split("/")[2]
    try:
      storage.Client().get_bucket(name)
    except Exception as error:
      raise _kind(error)(f"The record of the bucket {name}, which Orbax reads, cannot be read {_why(error)} The roles storage.objectUser and "
                         "storage.legacyBucketReader are needed.") from error


def _kind(error: Exception) -> type[OSError]:
  """`BucketError` where another time something else may come of it."""
  is_final = isinstance(error, FileNotFoundError | PermissionError) or "auth" in type(error).__module__
  return OSError if is_final or getattr(error, "code", None) in _FOR_GOOD else BucketError


def _why(error: Exception) -> str:
  text = " ".join(str(error).split())
  return (f"({type(error).__name__}: {text[:200]}{'...' * (len(text) > 200)}): does this machine reach the bucket, and may it read and write "
          "there? Outside of Google's cloud: gcloud auth application-default login.")
