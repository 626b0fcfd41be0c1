"""A reward of the user's: module:function, a function of a picture and its task.

  def darkness(picture, task):
    return 1 - picture.mean() / 255

It is called in processes of their own, one picture [H, W, C] uint8 at a time, with the task that `qimg2.rewards` describes, and returns a number, or
raises `ValueError` for a picture that has none. What a process needs for it, such as a network, the function's attribute `setup` makes, which is
called once in each process, without arguments, before any picture and with a time-out of its own. An object of a class serves as well:

  class Taste:
    def setup(self):
      self.net = load_net()

    def __call__(self, picture, task):
      return float(self.net(picture))

  taste = Taste()

The function must be pure: no clock, no random numbers, no state that a picture changes.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import numpy as np

from qimg2.rewards import Reward, Task

Function = Callable[[np.ndarray, Task], float]


def own(function: str, setup_timeout_s: float = 600.0) -> Reward:
  """What a function of the user's says.

  Args:
    function: "module:function", of a module that can be imported where the run is started.
    setup_timeout_s: seconds that its `setup` may take in a process, where it has one.

  Raises:
    ValueError: it is written otherwise, or no seconds.
  """
  if not 0 < setup_timeout_s < math.inf:
    raise ValueError(f"setup_timeout_s is {setup_timeout_s}: give seconds above 0.")
  module, _, name = function.partition(":")
  if not all(part.isidentifier() for part in (*module.split("."), name)):
    raise ValueError(f"function is {function!r}: write module:function, such as my_rewards:darkness for that of my_rewards.py.")
  return Reward(Lazy(function), check_machine=functools.partial(_find_module, function), sees_pictures=True,
                setup_timeout_s=setup_timeout_s, files=functools.partial(_file_of, function))


class Lazy:
  """A function by its name: imported where it is called, or where a process gets it; this one does not import what it needs."""

  def __init__(self, function: str):
    self._function = function

  def __call__(self, picture: np.ndarray, task: Task) -> float:
    return load(self._function)(picture, task)

  def __reduce__(self) -> tuple:
    return load, (self._function,)


def load(function: str) -> Function:
  """The function of "module:function"; `ValueError` where the module has none of this name."""
  module, _, name = function.partition(":")
  _find_module(function)
  found = getattr(importlib.import_module(module), name, None)
  if not callable(found):
    raise ValueError(f"the module {module} has no function {name!r}")
  return found


def _file_of(function: str) -> tuple[str, ...]:
  """The file of its module; what this imports, or loads in `setup`, is not known."""
  origin = _find_module(function).origin
  return (origin,) if origin else ()


def _find_module(function: str) -> ModuleSpec:
  module = function.partition(":")[0]
  try:
    known = importlib.util.find_spec(module)
  except ModuleNotFoundError:  # of the package that it is in
    known = None
  if known is None:
    raise ValueError(f"there is no module {module!r} for the function {function!r}: start the run where it lies, or set PYTHONPATH.")
  return known
