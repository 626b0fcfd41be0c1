"""Launcher commands inside this process, where JAX is imported and programs are compiled already: a process of its own costs five seconds.

Each module has one command that runs as a process of its own too, most of them with `process`, as a user starts it.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import runpy
import subprocess
import sys
import warnings
from unittest import mock

from absl import app, logging
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Result:
  """What a command ended with."""
  returncode: int
  stdout: str
  stderr: str


def launch(module: str, *arguments: str) -> Result:
  """`python -m module arguments`: the module is run anew as __main__, and the flags that it defines are forgotten afterwards.

  Warnings and absl's log are on stderr, as in a process. Not for what ends a process, or changes JAX's settings.
  """
  out, err, code = io.StringIO(), io.StringIO(), 0
  app.define_help_flags()  # absl does it once in a process
  handler = logging.get_absl_handler().python_handler
  with contextlib.ExitStack() as stack:
    stack.enter_context(flagsaver.flagsaver())
    stack.enter_context(mock.patch.object(sys, "argv", [module, *arguments]))
    stack.enter_context(mock.patch.object(handler, "stream", err))
    stack.enter_context(warnings.catch_warnings())
    warnings.resetwarnings()  # Python's own filters, not pytest's
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
      warnings.simplefilter("ignore", category)
    warnings.showwarning = lambda message, category, *_: print(f"{category.__name__}: {message}", file=err)
    stack.enter_context(contextlib.chdir(ROOT))
    stack.enter_context(contextlib.redirect_stdout(out))
    stack.enter_context(contextlib.redirect_stderr(err))
    if imported := sys.modules.pop(module, None):  # by a test: a new process has not
      stack.callback(sys.modules.__setitem__, module, imported)
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
      code = stopped.code
      if isinstance(code, str):
        print(code, file=err)
  return Result(int(isinstance(code, str)) or code or 0, out.getvalue(), err.getvalue())


def process(module: str, *arguments: str, num_devices: int = 1) -> subprocess.CompletedProcess:
  """`python -m module arguments` as a user starts it."""
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(num_devices)}
  return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
