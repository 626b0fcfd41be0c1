"""The files of a source: where they are, which there are, and how a record's path leads to one."""

import dataclasses
import errno
import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_pipelines.curation.reading import Reading

_EXAMPLES = 5
_WEB = ("http", "https", "ftp")


@dataclasses.dataclass(frozen=True)
class Place:
  """A file or folder of the source: `path` as `fs` spells it, `name` below the source's root, which begins the keys of its samples, and how the
  source is read."""
  fs: fsspec.AbstractFileSystem
  path: str
  name: str
  reading: Reading = Reading()

  @property
  def root(self) -> str:
    """The root of the source."""
    return self.path.removesuffix(self.name).rstrip("/") or "/"

  def open(self) -> BinaryIO:
    """Returns the file, open."""
    return self.fs.open(self.path, "rb")

  def near(self, name: str, folder: str = "") -> bytes:
    """Returns the file that a record names, see `locate`; `ValueError` if it is not there, may not be read, or is where it must not be."""
    fs, base, path = self._located(name, folder)
    return _read(fs, base, path, name)

  def facts(self, name: str) -> dict:
    """Returns what the file system tells of the file that a record names; `ValueError` and `OSError` as `near`."""
    fs, base, path = self._located(name, "")
    return _as_found(fs, base, path, fs.info)

  def locate(self, name: str, folder: str = "") -> str:
    """Returns the path of a file that a record names, relative to `folder`, by default that of this file, or to the root that the user gave;
    `ValueError` if it leads out of there."""
    return self._located(name, folder)[2]

  def _located(self, name: str, folder: str) -> tuple[fsspec.AbstractFileSystem, str, str]:
    if self.reading.picture_root:
      fs, base = open_location(self.reading.picture_root)
      return fs, base, _below(fs, base, base, name, "--picture_root")
    base = folder or posixpath.dirname(self.path)
    return self.fs, base, _below(self.fs, base, self.root if folder else base, name, "")


def open_location(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """Returns (file system, path on it) of a path, or of a URL such as gs://bucket/folder; `ValueError` if that kind of URL is not known."""
  if "://" not in location:
    return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(location))
  try:
    return fsspec.core.url_to_fs(location)
  except (ValueError, ImportError) as error:
    raise ValueError(f"{location} cannot be opened ({error}): install the package for it or copy the files here.") from error


def full_location(fs: fsspec.AbstractFileSystem, path: str) -> str:
  """Returns what `open_location` opens again."""
  return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def read_below(fs: fsspec.AbstractFileSystem, folder: str, name: str) -> bytes:
  """Returns the file `name` of a folder; `ValueError` if it is outside of the folder, missing, or may not be read."""
  return _read(fs, folder, _below(fs, folder, folder, name, ""), name)


def normal(name: str) -> str:
  """Returns a name in the one Unicode normalisation (NFC) in which names are compared: systems differ in which they write."""
  return name if name.isascii() else unicodedata.normalize("NFC", name)


def _below(fs: fsspec.AbstractFileSystem, folder: str, root: str, name: str, flag: str) -> str:
  """Returns the path of `name`, which is relative to `folder`; `ValueError` unless it is below `root`, which `flag` has named, if any."""
  shown = f"{name[:300]!r}"
  protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
  scheme = name.partition("://")[0] if "://" in name else ""
  if scheme in _WEB:
    raise ValueError(f"The picture {shown} is a web address: fetch the pictures first (img2dataset writes tars of them) and write their paths.")
  path = posixpath.normpath(fs._strip_protocol(name) if scheme in protocols else posixpath.join(folder, name))
  if "\0" not in name and path.startswith(root.rstrip("/") + "/"):
    return path
  if flag:
    raise ValueError(f"The path {shown} leads out of {flag}={full_location(fs, root)}: correct it, or name a folder that all pictures are below.")
  if scheme or name.startswith("/"):
    raise ValueError(f"The path {shown} is absolute, and pictures are taken from the source's own folder alone: --picture_root=DIR takes them from "
                     f"below DIR, such as {posixpath.dirname(name)[:300]!r}.")
  raise ValueError(f"The path {shown} leads out of its folder: put the file inside and write its relative path, or name a folder that all pictures "
                   "are below with --picture_root=DIR.")


def _read(fs: fsspec.AbstractFileSystem, folder: str, path: str, name: str) -> bytes:
  try:
    return _as_found(fs, folder, path, fs.cat_file)
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, UnicodeEncodeError) as error:
    raise ValueError(f"The file {name[:300]!r} is missing or may not be read: put it there or remove the record.") from error
  except OSError as error:
    # Anything else, such as a lost connection, is not this sample's fault and must not be recorded as such.
    if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
      raise
    raise ValueError(f"The path {name[:300]!r} cannot be followed: shorten it or remove the record.") from error


def _as_found(fs: fsspec.AbstractFileSystem, folder: str, path: str, act: Callable[[str], Any]) -> Any:
  """Returns act(path); where there is no such file, of the one whose name differs in Unicode normalisation alone."""
  try:
    return act(path)
  except FileNotFoundError:
    spelt = path if path.isascii() else _as_spelt(fs, folder, path)
    if spelt == path:
      raise
    return act(spelt)


def _as_spelt(fs: fsspec.AbstractFileSystem, folder: str, path: str) -> str:
  """Returns the only path below a folder that differs from `path` in Unicode normalisation alone, or `path`."""
  found = folder.rstrip("/")
  usual = {found + unicodedata.normalize(form, path[len(found):]) for form in ("NFC", "NFD")}
  if len(there := list(filter(fs.exists, usual))) == 1:  # what nearly all systems write, without a list of a folder of a million files
    return there[0]
  for part in path[len(found):].strip("/").split("/"):
    step = f"{found}/{part}"
    if not fs.exists(step):
      same = [one for one in map(posixpath.basename, fs.ls(found or "/", detail=False)) if normal(one) == normal(part)]
      if len(same) != 1:
        return path
      step = f"{found}/{same[0]}"
    found = step
  return found


class LeftOut:
  """Counts the files of a source of which no sample is made, by reason, with a few names of each."""

  def __init__(self):
    self._found: dict[str, dict] = {}

  def add(self, reason: str, name: str) -> None:
    """Counts one file, or a folder with all that is in it."""
    entry = self._found.setdefault(reason, {"reason": reason, "count": 0, "examples": []})
    entry["count"] += 1
    if len(entry["examples"]) < _EXAMPLES:
      entry["examples"].append(name.encode("utf-8", "backslashreplace").decode())

  def plain(self) -> list[dict]:
    """As JSON: reason, count and examples, the most frequent first."""
    return sorted(self._found.values(), key=lambda entry: (-entry["count"], entry["reason"]))


def list_files(fs: fsspec.AbstractFileSystem, folder: str, left_out: LeftOut) -> dict[str, int]:
  """Returns the files of a folder, sorted by their names below it, with their sizes in bytes; hidden ones are left out.

  Links to folders are followed, each folder once: what leads to one that is in the source already, as a cycle does, is left out.

  Raises:
    ValueError: a folder may not be read.
  """
  if isinstance(fs, LocalFileSystem):
    return dict(sorted(_walk(folder, left_out)))
  files = {}
  for path, facts in sorted(fs.find(folder, detail=True).items()):
    name = path.removeprefix(folder).lstrip("/")
    if any(part.startswith(".") for part in name.split("/")):
      left_out.add("hidden", name)
    else:
      files[name] = facts["size"]
  return files


def _walk(folder: str, left_out: LeftOut) -> Iterator[tuple[str, int]]:
  """Yields (name, bytes) of the files below a folder of this machine: links to folders come after all that are in their places."""
  todo, links, seen = [(folder, "", False)], [], set()
  while todo or links:
    path, name, is_link = todo.pop() if todo else links.pop(0)
    try:
      facts = os.stat(path)
      entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
      raise ValueError(f"The folder {path} cannot be read ({error.strerror}): let it be read, or move it away.") from error
    if is_link and (facts.st_dev, facts.st_ino) in seen:
      left_out.add("links to folders that are in the source already", name)
      continue
    seen.add((facts.st_dev, facts.st_ino))
    for entry in entries:
      below = f"{name}/{entry.name}" if name else entry.name
      if entry.name.startswith("."):
        left_out.add("hidden", below)
      elif os.path.isdir(entry.path):
        (links if entry.is_symlink() else todo).append((entry.path, below, entry.is_symlink()))
      else:
        # A link to nothing has the size of no file; reading it will say so.
        yield below, os.stat(entry.path).st_size if os.path.exists(entry.path) else 0
