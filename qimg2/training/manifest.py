"""How damaged checkpoints are found: a manifest with the checksum of every file, written when all of them are there.

Orbax commits a checkpoint by renaming its folder. The manifest is written into the folder before that, so a process that is killed at any moment
leaves either no checkpoint or one with its manifest. A folder without one therefore lost files, or was written by another program: it counts as
damaged. `write_manifest` accepts such a folder as it is.

Where several processes write one checkpoint, each computes the checksums of its own files before the first one writes the manifest (`write_part`):
a machine that is about to be taken away has seconds, and all of it may be 100 GB.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib

NAME = "manifest.json"
METADATA = "_CHECKPOINT_METADATA"  # Orbax writes the time of the commit into it after the manifest; the rest of it is compared
LATE = (NAME, METADATA, "commit_success.txt")
TEMPORARY = ".orbax-checkpoint-tmp"  # what Orbax appends to the name of a folder, and of those in it, until its save is complete
OWN = "ocdbt.process_"  # Orbax: <item>/ocdbt.process_<index>/ holds what one process wrote, and no other changes it
_PART = "digests."
_TIME = "commit_timestamp_nsecs"
_NUM_THREADS = 8
_known: dict[tuple, tuple[list, str]] = {}  # (folder, share) -> (sizes and times of the files, what was found)


def write_part(folder: pathlib.Path, index: int) -> None:
  """Writes down the checksums of the files that process `index` wrote into a folder that has no manifest yet.

  Raises:
    OSError: the folder cannot be read or written.
  """
  folder = pathlib.Path(folder)
  measured = _measure(folder, sorted(path for path in folder.rglob(f"{OWN}{index}/**/*") if path.is_file()))
  _write(folder / f"{_PART}{index}", {name.replace(TEMPORARY, ""): found for name, found in measured.items()})


def write_manifest(folder: pathlib.Path) -> None:
  """Writes the manifest of a folder with what it holds now. The checksums that `write_part` left are taken over, the others computed.

  Raises:
    OSError: the folder cannot be read or written.
  """
  folder = pathlib.Path(folder)
  parts = sorted(folder.glob(f"{_PART}*"))
  recorded = {name: found for part in parts for name, found in json.loads(part.read_text(encoding="utf-8")).items()}
  paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_late(path, folder)}
  files = {name: recorded[name] for name, path in paths.items() if name in recorded and recorded[name][0] == path.stat().st_size}
  files |= _measure(folder, [path for name, path in paths.items() if name not in files])
  content = {"files": files, "metadata": _metadata(folder)}
  _write(folder / NAME, {"content": content, "sha256": _digest_of(content)})
  for part in parts:
    part.unlink()


def find_fault(folder: pathlib.Path, share: tuple[int, int] = (0, 1)) -> str:
  """What is damaged in a folder with a manifest, in words that name the file; "" when nothing does.

  Reads every file, once for as long as none of them changes.

  Args:
    folder: a step of a checkpoint, or weights.
    share: (i, n): reads the content of every n-th file only, from the i-th on, so that n processes can share the reading.

  Raises:
    OSError: a disk or a network that fails, which says nothing of the files.
  """
  folder = pathlib.Path(folder)
  try:
    signature = sorted((path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*"))
  except FileNotFoundError:
    return "files vanish while it is read"
  known = _known.get((folder, share))
  if known is None or known[0] != signature:
    known = _known[folder, share] = (signature, _find_fault(folder, share))
  return known[1]


def _find_fault(folder: pathlib.Path, share: tuple[int, int]) -> str:
  try:
    record = json.loads((folder / NAME).read_text(encoding="utf-8"))
    content = record["content"]
    if _digest_of(content) != record["sha256"]:
      return f"{NAME} was changed"
  except FileNotFoundError:
    return f"it has no {NAME}"
  except (ValueError, KeyError, TypeError):
    return f"{NAME} cannot be read"
  try:
    if _metadata(folder) != content["metadata"]:
      return f"{METADATA} was changed"
  except ValueError:
    return f"{METADATA} cannot be read"
  files = sorted(content["files"].items())
  for name, (size, _) in files:
    path = folder / name
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != size:
      return f"{name} has {path.stat().st_size} bytes and had {size}"
  check = lambda item: _check_content(folder / item[0], *item)
  with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    return next((fault for fault in pool.map(check, files[share[0]::share[1]]) if fault), "")


def _check_content(path: pathlib.Path, name: str, expected: list) -> str:
  try:
    return "" if _digest(path) == expected[1] else f"the content of {name} was changed"
  except FileNotFoundError:
    return f"{name} is missing"


def _metadata(folder: pathlib.Path) -> dict | None:
  """What Orbax says of the checkpoint, without the time of its commit; None where it says nothing.

  Raises:
    ValueError: it is not what Orbax writes.
  """
  path = folder / METADATA
  if not path.exists():
    return None
  metadata = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(metadata, dict) or not isinstance(metadata.pop(_TIME, None), int | None):
    raise ValueError(f"{path} is not what Orbax writes.")
  return metadata


def _is_late(path: pathlib.Path, folder: pathlib.Path) -> bool:
  return path.parent == folder and (path.name in LATE or path.name.startswith(_PART) or path.name == f"{NAME}.part")


def _measure(folder: pathlib.Path, paths: list[pathlib.Path]) -> dict[str, list]:
  """Name -> [size, checksum]."""
  with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    digests = list(pool.map(_digest, paths))
  return {path.relative_to(folder).as_posix(): [path.stat().st_size, digest] for path, digest in zip(paths, digests)}


def _write(path: pathlib.Path, record: dict) -> None:
  part = path.with_name(f"{path.name}.part")
  with open(part, "w", encoding="utf-8") as file:
    json.dump(record, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  part.replace(path)


def _digest(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: dict) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
