"""Texts of files that a user may have written: prompts, captions, manifests. A line ends at a line feed alone: texts in JSON may hold other signs
that Unicode calls the end of a line, as U+2028.
"""

import pathlib
from collections.abc import Iterator


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
