"""Processes that begin with JAX and the project imported: a server imports them, and forks for each command. A process that imports them itself takes
three seconds of processor time to begin, and the tests start a hundred.

Before a fork no JAX back end exists and nothing has been computed. A command sees its own arguments, environment and folder, and ends as every
process does. Two servers take turns, so that the processes of one job differ in the order of their sets, as processes do. `commands.process` starts
one that imports for itself, as a user's.

  python tests/warm.py    reads one JSON request per line from stdin, writes one JSON answer per line to stdout
"""

import gc
import importlib
import itertools
import json
import os
import pathlib
import runpy
import select
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).parent.parent
IMPORTED = ("launch.train", "launch.sample", "launch.evaluate", "tests.jobs.toy")


class Server:
  """A process that forks; started when it is first asked."""

  def __init__(self):
    self._process = None

  def ask(self, **request):
    """The answer to one request. Raises RuntimeError where there is none."""
    if self._process is None:
      self._process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    print(json.dumps(request), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline() if select.select([self._process.stdout], [], [], 120)[0] else ""
    if not line:
      ended, self._process = self._process, None
      ended.kill()
      raise RuntimeError(f"tests/warm.py gave no answer to {request} and ended with {ended.wait()}.")
    return json.loads(line)


class Process:
  """`python arguments` in a folder, with an environment; stdout and stderr are kept until `communicate`. As far as it goes, a `subprocess.Popen`."""
  _servers = itertools.cycle([Server(), Server()])
  cpu_s = 0.0  # of all that ended, as the rule of ten seconds counts it

  def __init__(self, arguments, cwd, env):
    self.returncode, self._folder, self._server = None, tempfile.TemporaryDirectory(), next(self._servers)
    self._texts = [pathlib.Path(self._folder.name, name) for name in ("stdout", "stderr")]
    self.pid = self._server.ask(arguments=[str(one) for one in arguments], cwd=str(cwd), env=env, texts=[str(path) for path in self._texts])

  def poll(self):
    """The exit code, minus the signal's number where one ended it; None while the process runs."""
    if self.returncode is None:
      self.returncode, cpu_s = self._server.ask(poll=self.pid)
      Process.cpu_s += cpu_s
    return self.returncode

  def send_signal(self, number):
    """Sends a signal to a process that runs."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    """Ends it at once."""
    self.send_signal(9)

  def communicate(self, timeout=0):
    """(stdout, stderr), when it has ended."""
    limit = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > limit:
        raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
      time.sleep(0.01)
    return tuple(path.read_text(encoding="utf-8") for path in self._texts)


def serve():
  """Forks for each request; returns a request in the process that is to fulfil it. Ends when nobody asks any more."""
  gc.disable()  # nothing of what is imported goes again
  for module in IMPORTED:
    importlib.import_module(module)
  gc.enable()
  gc.freeze()  # so that no process looks through it for garbage, at its end at the latest, and copies all that it touches
  from jax._src import xla_bridge
  assert threading.active_count() == 1 and not xla_bridge.backends_are_initialized(), "Threads and back ends are lost in a fork."
  for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
      pid, status, used = os.wait4(request["poll"], os.WNOHANG)
      answer = (os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime) if pid else (None, 0.0)
    else:
      answer = os.fork()
      if not answer:
        return request
    print(json.dumps(answer), flush=True)
  sys.exit()


def become(arguments, cwd, env, texts):
  """Turns this process into the one that is asked for, and runs its module or script."""
  import jax
  import numpy as np
  np.random.seed()  # one of its own, as Python's generator has after a fork
  for number, path in ((0, os.devnull), *zip((1, 2), texts)):
    file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, number)
    os.close(file)
  sys.stdin = open(0, encoding="utf-8")
  for name, value in env.items():  # JAX reads its own when it is imported
    if name.startswith("JAX_") and os.environ.get(name) != value:
      kind = type(jax.config.values[name.lower()])
      assert kind in (int, float, str, type(None)), f"{name} is no number or word: it cannot be another one here than in the tests."
      jax.config.update(name.lower(), value if kind is type(None) else kind(value))
  os.environ.clear()
  os.environ.update(env)
  os.chdir(cwd)
  if arguments[0] == "-m":
    module, sys.argv, sys.path[0] = arguments[1], arguments[1:], str(cwd)
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  else:
    sys.argv, sys.path[0] = arguments, str(pathlib.Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
  sys.path[0] = str(ROOT)
  become(**serve())
