"""A process of `qimg2.rewards.pool`: python -m qimg2.rewards.worker CONNECTION LIFE, two file descriptors.

It is no child of `multiprocessing`, whose children import the program that started them, and jax with it. CONNECTION is a pipe: first the functions
come, name -> function, and None goes back, or what is wrong with them, and the same again when those that have a `setup` are set up. Then, for each
picture, (names, picture, task) comes, and for each name a `Scored` goes back. LIFE is a pipe that ends with the process at its other end, and this
process with it.
"""

import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from qimg2.rewards import Scored, Task, missing, scored


def main() -> None:
  """Scores what comes until nothing comes any more."""
  threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
  connection = Connection(int(sys.argv[1]))
  try:
    functions = connection.recv()
  except Exception as error:  # whatever the modules of the functions raise when they are imported
    connection.send(_sentence(error))
    return
  connection.send(None)
  try:
    for function in functions.values():
      if hasattr(function, "setup"):
        function.setup()
  except Exception as error:  # whatever a user's loading raises
    connection.send(f"setup: {_sentence(error)}")
    return
  connection.send(None)
  while True:
    try:
      names, picture, task = connection.recv()
    except EOFError:
      return
    for name in names:
      connection.send(score(functions[name], picture, task))


def score(function: Callable[[np.ndarray, Task], float], picture: np.ndarray, task: Task) -> Scored:
  """The number of a picture, or why there is none."""
  try:
    return scored(float(function(picture, task)))
  except (ValueError, OSError) as error:  # what the contract calls a picture that cannot be scored
    return missing(" ".join(str(error).split()))
  except Exception as error:  # a mistake in a user's function, which must end no training run of days
    return missing(_sentence(error))


def _sentence(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _end_with(life: int) -> Any:
  """Ends this process as soon as the other end of a pipe is closed, whatever it is at."""
  os.read(life, 1)
  os._exit(1)


if __name__ == "__main__":
  main()
