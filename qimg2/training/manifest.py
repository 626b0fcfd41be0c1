"""How damaged checkpoints are found: a manifest with the checksum of every file, written when all of them are there.

Orbax commits a checkpoint by renaming its folder. The manifest is written into the folder before that, so a process that is killed at any moment
leaves either no checkpoint or one with its manifest. A folder without one therefore lost files, or was written by another program: it counts as
damaged. `write_manifest` accepts such a folder as it is.

Where several processes write one checkpoint, each computes the checksums of its own files before the first one writes the manifest (`write_part`):
a machine that is about to be taken away has seconds, and all of it may be 100 GB. A bucket tells the checksums (CRC32C) of what it holds, and no byte
is read for them. A checkpoint that was copied from a disk to a bucket, or from there to a disk, is compared by reading it.
"""

import concurrent.futures
import hashlib
import json

from qimg2.places import CHECKSUM, COMMITTED, File, Place, as_absolute, crc32c, is_remote, list_files, write_file

NAME = "manifest.json"
METADATA = "_CHECKPOINT_METADATA"  # Orbax writes the time of the commit into it after the manifest; the rest of it is compared
LATE = (NAME, METADATA, COMMITTED)
TEMPORARY = ".orbax-checkpoint-tmp"  # what Orbax appends to the name of a folder, and of those in it, until its save is complete
OWN = "ocdbt.process_"  # Orbax: <item>/ocdbt.process_<index>/ holds what one process wrote, and no other changes it
_PART = "digests."
_TIME = "commit_timestamp_nsecs"
_NUM_THREADS = 8
_known: dict[tuple, tuple[list, str]] = {}  # (folder, share) -> (sizes and times of the files, what was found)


def write_part(folder: Place, index: int) -> None:
  """Writes down the checksums of the files that process `index` wrote into a folder that has no manifest yet. Nothing in a bucket, which knows them.

  Raises:
    OSError: the folder cannot be read or written.
  """
  folder = as_absolute(folder)
  if is_remote(folder):
    return
  parts = list(folder.rglob(f"{OWN}{index}"))  # and nothing else, because others still write theirs: a file that is listed may be gone
  own = {(part / name).relative_to(folder).as_posix(): file for part in parts for name, file in list_files(part).items()}
  write_file(folder / f"{_PART}{index}", json.dumps({name.replace(TEMPORARY, ""): found for name, found in _measure(own).items()}))


def write_manifest(folder: Place) -> None:
  """Writes the manifest of a folder with what it holds now. The checksums that `write_part` left are taken over, the others computed.

  Raises:
    OSError: the folder cannot be read or written.
  """
  folder = as_absolute(folder)
  parts = sorted(folder.glob(f"{_PART}*"))
  recorded = {name: found for part in parts for name, found in json.loads(part.read_text(encoding="utf-8")).items()}
  listed = {name: file for name, file in list_files(folder).items() if not _is_late(name)}
  files = {name: recorded[name] for name, file in listed.items() if name in recorded and recorded[name][0] == file.size}
  files |= _measure({name: file for name, file in listed.items() if name not in files})
  content = {"files": files, "metadata": _metadata(folder)}
  write_file(folder / NAME, json.dumps({"content": content, "sha256": _digest_of(content)}, indent=1))
  for part in parts:
    part.unlink()


def identity(folder: Place) -> str:
  """What tells the content of a checkpoint from that of others: the digest of its manifest; "" where it has none. No other file is read."""
  path = folder / NAME
  return json.loads(path.read_text(encoding="utf-8"))["sha256"] if path.is_file() else ""


def find_fault(folder: Place, share: tuple[int, int] = (0, 1)) -> str:
  """What is damaged in a folder with a manifest, in words that name the file; "" when nothing does.

  Reads every file of a disk, once for as long as none of them changes, and of a bucket none but the manifest.

  Args:
    folder: a step of a checkpoint, or weights.
    share: (i, n): reads the content of every n-th file only, from the i-th on, so that n processes can share the reading.

  Raises:
    OSError: a disk or a network that fails, which says nothing of the files.
  """
  folder = as_absolute(folder)
  try:
    listed = list_files(folder)
  except FileNotFoundError:
    return "files vanish while it is read"
  signature = [(name, file.size, file.mark) for name, file in listed.items()]
  known = _known.get((folder, share))
  if known is None or known[0] != signature:
    known = _known[folder, share] = (signature, _find_fault(folder, listed, share))
  return known[1]


def _find_fault(folder: Place, listed: dict[str, File], share: tuple[int, int]) -> str:
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
    if name not in listed:
      return f"{name} is missing"
    if listed[name].size != size:
      return f"{name} has {listed[name].size} bytes and had {size}"
  check = lambda item: _check_content(listed[item[0]], *item)
  with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    return next((fault for fault in pool.map(check, files[share[0]::share[1]]) if fault), "")


def _check_content(file: File, name: str, expected: list) -> str:
  try:
    return "" if _digest(file, expected[1]) == expected[1] else f"the content of {name} was changed"
  except FileNotFoundError:
    return f"{name} is missing"


def _metadata(folder: Place) -> dict | None:
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


def _is_late(name: str) -> bool:
  return name in LATE or name.startswith(_PART) or name.startswith(f"{NAME}.")


def _measure(listed: dict[str, File]) -> dict[str, list]:
  """Name -> [size, checksum]."""
  with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    digests = list(pool.map(lambda file: file.checksum or _digest(file), listed.values()))
  return {name: [file.size, digest] for (name, file), digest in zip(listed.items(), digests)}


def _digest(file: File, like: str = "") -> str:
  """The checksum of a file, of the kind that `like` is."""
  if not like.startswith(CHECKSUM):
    with file.path.open("rb") as opened:
      return hashlib.file_digest(opened, "sha256").hexdigest()
  return file.checksum or crc32c(file.path)


def _digest_of(content: dict) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
