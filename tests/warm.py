"""Processes that begin with JAX and the project imported: one process imports them, and forks for each command. A process that imports them itself
takes three seconds of processor time to begin, and the tests start a hundred.

Before a fork no JAX back end exists and nothing has been computed. A command sees its own arguments, environment and folder, and ends as every
process does. `commands.process` starts one that imports for itself, as a user's.

  python tests/warm.py    reads one JSON request per line from stdin, writes one JSON answer per line to stdout
"""

import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).parent.parent
IMPORTED = ("launch.train", "launch.sample", "launch.evaluate", "tests.jobs.toy")


class Process:
  """`python arguments` in a folder, with an environment; stdout and stderr are kept until `communicate`. As far as it goes, a `subprocess.Popen`."""
  _server = None

  def __init__(self, arguments, cwd, env):
    self.returncode, self._folder = None, tempfile.TemporaryDirectory()
    self._texts = [pathlib.Path(self._folder.name, name) for name in ("stdout", "stderr")]
    self.pid = self._ask(arguments=[str(one) for one in arguments], cwd=str(cwd), env=env, texts=[str(path) for path in self._texts])

  @classmethod
  def _ask(cls, **request):
    if cls._server is None:
      cls._server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    print(json.dumps(request), file=cls._server.stdin, flush=True)
    return json.loads(cls._server.stdout.readline())

  def poll(self):
    """The exit code, minus the signal's number where one ended it; None while the process runs."""
    if self.returncode is None:
      self.returncode = self._ask(poll=self.pid)
    return self.returncode

  def send_signal(self, number):
    """Sends a signal to a process that runs."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    """Ends it at once."""
    self.send_signal(9)

  def communicate(self, timeout):
    """(stdout, stderr), when it has ended."""
    limit = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > limit:
        raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
      time.sleep(0.01)
    return tuple(path.read_text(encoding="utf-8") for path in self._texts)


def serve():
  """Forks for each request; returns a request in the process that is to fulfil it. Ends when nobody asks any more."""
  for module in IMPORTED:
    importlib.import_module(module)
  assert threading.active_count() == 1, "A thread is lost in a fork."
  for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
      pid, status = os.waitpid(request["poll"], os.WNOHANG)
      answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
      answer = os.fork()
      if not answer:
        return request
    print(json.dumps(answer), flush=True)
  sys.exit()


def become(arguments, cwd, env, texts):
  """Turns this process into the one that is asked for, and runs its module or script."""
  import jax
  for number, path in ((0, os.devnull), *zip((1, 2), texts)):
    file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, number)
    os.close(file)
  sys.stdin = open(0, encoding="utf-8")
  for name, value in env.items():  # JAX reads its own when it is imported
    if name.startswith("JAX_") and os.environ.get(name) != value:
      kind = type(jax.config.values[name.lower()])
      assert kind in (int, float, str), f"{name} is no number or word: it cannot be another one here than in the tests."
      jax.config.update(name.lower(), kind(value))
  os.environ.clear()
  os.environ.update(env)
  os.chdir(cwd)
  if arguments[0] == "-m":
    module, sys.argv, sys.path[0] = arguments[1], arguments[1:], str(cwd)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  else:
    sys.argv, sys.path[0] = arguments, str(pathlib.Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
  sys.path[0] = str(ROOT)
  become(**serve())
