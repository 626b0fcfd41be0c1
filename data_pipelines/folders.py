"""Folders of data sets: they appear whole, and lie on this machine."""

import os
import pathlib
import re
import shutil


def link(source: str, place: str) -> None:
  """Puts a file in a second place as well, without copying it where the file system can; a `move` for `finish` that can be done again."""
  try:
    os.link(source, place)
  except OSError:  # a file system without links
    shutil.copyfile(source, place)


def publish(built: str | os.PathLike, path: str | os.PathLike) -> bool:
  """Moves a complete data set to its place; returns False if another process was faster."""
  try:
    os.rename(built, path)
  except OSError:
    if not os.path.exists(path):
      raise
    return False
  return True


def local_folder(place: str | os.PathLike, what: str) -> pathlib.Path:
  """Returns the path of something on this machine; `ValueError`, which calls it `what`, for a URL: of gs://B/F a path would make a folder "gs:"."""
  if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", os.fspath(place)):
    raise ValueError(f"{what} is {os.fspath(place)}, but {scheme[1]}:// is not a folder of this machine: mount the bucket (docs/pods.md shows it "
                     "with gcsfuse) and give its folder there, or copy what it holds.")
  return pathlib.Path(place)
