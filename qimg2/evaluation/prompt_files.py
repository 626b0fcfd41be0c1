"""Texts of files that a user may have written: prompts, captions, manifests. A line ends at a line feed alone: texts in JSON may hold other signs
that Unicode calls the end of a line, as U+2028.
"""

import collections
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any


def read_text(path: str | pathlib.Path, wanted: str) -> str:
  """The text of a file in UTF-8, with or without a byte order mark.

  Args: the file; what should be given in its place, in words.

  Raises:
    ValueError: no such file, or one in another encoding, with its first line that shows it.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"There is no file of prompts {path}: give {wanted}.")
  return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, path: str) -> str:
  """The text of a file's content in UTF-8, with or without a byte order mark.

  Raises:
    ValueError: another encoding, with its first line that shows it; it names `path`.
  """
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = data[:error.start].count(b"\n") + 1
    raise ValueError(f"{path}, line {line}, is not UTF-8 ({error.reason}): save the file as UTF-8.") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
  """(number from 1, line) of the lines that are not blank, without spaces, tabs and carriage returns at their ends."""
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      yield number, line.strip(" \t\r")


def parse_json(text: str, where: str) -> Any:
  """What a text in JSON says.

  Raises:
    ValueError: it is none, has a half of a surrogate pair, which no file in UTF-8 can hold, or nests thousands of lists; the sentence begins with
      `where`.
  """
  try:
    found = json.loads(text)
    if "\\u" in text:
      json.dumps(found, ensure_ascii=False).encode()
  except RecursionError as error:
    raise ValueError(f"{where} nests too many lists or objects: mend it or copy the file again.") from error
  except UnicodeEncodeError as error:
    raise ValueError(f"{where} holds {error.object[error.start]!a}, half of a character: write characters themselves, in UTF-8.") from error
  except ValueError as error:
    raise ValueError(f"{where} is no JSON ({error}): mend it or copy the file again.") from error
  return found


def first_repeated(names: Iterable[str]) -> str | None:
  """The first of the names that is there again; None where none is."""
  return next((name for name, num in collections.Counter(names).items() if num > 1), None)
