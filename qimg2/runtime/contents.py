"""What files hold, in short: digests that tell weights, tokenizers and programs from others of the same name.

Of a large file pieces are read that are spread evenly over it: weights of another training differ in nearly all of them.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Mapping

SMALL_BYTES, PIECE_BYTES, NUM_PIECES = 1 << 20, 1 << 12, 1024  # all of a small file is read, pieces of others
MODEL_FILES = (".safetensors", ".gguf", ".json", ".jinja", ".txt")  # endings of what is read of a published folder


def digest_of_file(path: pathlib.Path) -> str:
  """A digest of a file's size and content; of more than `SMALL_BYTES`, of pieces of it."""
  size, found = path.stat().st_size, hashlib.sha256()
  found.update(str(size).encode())
  with open(path, "rb") as file:
    starts = range(0, size, max(PIECE_BYTES, size // NUM_PIECES)) if size > SMALL_BYTES else range(0, size, PIECE_BYTES)
    for start in starts:
      file.seek(start)
      found.update(file.read(PIECE_BYTES))
  return found.hexdigest()


def digest_of_files(files: Mapping[str, pathlib.Path]) -> str:
  """A digest of the names that `files` gives and of what each holds, see `digest_of_file`."""
  found = hashlib.sha256()
  for name, path in files.items():
    found.update(f"{name} {digest_of_file(path)}".encode())
  return found.hexdigest()


def digest_of_folder(folder: pathlib.Path) -> str:
  """A digest of names and contents of all files below a folder."""
  return digest_of_files({path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()})


def digest_of_model(folders: Iterable[pathlib.Path]) -> str:
  """A digest of what is read of published folders: configs, tokenizers and weights, not notes and hidden files beside them."""
  paths = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in MODEL_FILES and path.is_file()]
  return digest_of_files({f"{path.parent.name}/{path.name}": path for path in paths})
