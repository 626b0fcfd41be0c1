"""Commands that run as several processes on this machine, for tests."""

import os
import pathlib
import socket
import time

import warm

ROOT = pathlib.Path(__file__).parent.parent
HEARTBEAT_S = 20  # for tests in which one is lost; beside other tests a process may be silent for several seconds
UNHURRIED_S = 100  # where none is
PATIENCE_S = 120  # for the survivors: the heartbeat, twice, and a busy machine


def free_port():
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    return one.getsockname()[1]


def start(num, *arguments, extra=lambda i: (), num_devices=1, heartbeat_s=HEARTBEAT_S, **environment):
  """`num` processes of one command, of `num_devices` devices each, which count one of them as lost when it is silent for `heartbeat_s`."""
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
         **environment}
  meet = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={num}", f"--heartbeat_timeout={heartbeat_s}"] if num > 1 else []
  return [warm.Process([*arguments, *meet, *([f"--process_id={i}"] if num > 1 else []), *extra(i)], ROOT, env) for i in range(num)]


def wait_for(happened, started, timeout=900):
  """Returns when `happened()`; fails when a process ends before."""
  limit = time.monotonic() + timeout
  while not happened():
    assert all(one.poll() is None for one in started), [one.communicate() for one in started if one.poll() is not None]
    assert time.monotonic() < limit
    time.sleep(0.005)


def ends(started, timeout):
  """(exit code, stdout, stderr) of each; kills what does not end."""
  try:
    texts = [one.communicate(timeout=timeout) for one in started]
  finally:
    for one in started:
      one.kill()
  return [(one.returncode, *text) for one, text in zip(started, texts)]


def together(num, *arguments, timeout=1800, **options):
  """What the processes printed, after all have ended well."""
  results = ends(start(num, *arguments, **options), timeout)
  for code, _, stderr in results:
    assert code == 0, stderr[-3000:]
  return ["".join(line for line in stdout.splitlines(keepends=True) if not line.startswith("[Gloo]")) for _, stdout, _ in results]


def train(config, workdir, cache, *more):
  return ["-m", "launch.train", f"--config={config}", f"--workdir={workdir}", f"--compilation_cache={cache}", *more]


def toy(workdir, *more):
  """The arguments of the toy job, tests/jobs/toy.py."""
  return ["-m", "tests.jobs.toy", f"--workdir={workdir}", *more]


def error_lines(stderr):
  return [line for line in stderr.splitlines() if line.startswith("error:")]
