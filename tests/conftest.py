"""Eight simulated devices on the CPU, a kept cache of compiled programs, and a run of the smoke config that several tests look at.

QIMG2_TEST_CACHE: folder of compiled programs, `.cache/tests` of the checkout by default. It may be removed at any time.
QIMG2_TEST_SLOWNESS: by how much this machine is slower than two idle cores, 1 by default; `make` says 4. A test that is not marked `slow` fails if
it takes more than ten seconds times that.
"""

import gc
import itertools
import os
import pathlib
import re
import shutil

ROOT = pathlib.Path(__file__).parent.parent
CACHE = pathlib.Path(os.environ.get("QIMG2_TEST_CACHE") or ROOT / ".cache" / "tests")
MAX_CACHE_BYTES = 2 * 2**30
MEMORY, ROOM_BYTES = pathlib.Path("/dev/shm"), 8 * 2**30  # where the tests' own folders are, if it has room
EXPENSIVE = {"smoke_run", "caches"}  # fixtures
# The groups that take longest, longest first.
LONG = ("smoke_run", "test_methods", "test_sharded_equality", "published", "test_rehearse", "test_launched_runs", "test_processes", "test_attention",
        "test_benchmarks", "emoji", "pretrain", "test_curation", "test_mixture", "test_products", "test_cache", "test_state", "test_train", "bucket",
        "test_bucket", "test_faults", "test_flax_module", "test_transforms", "test_checkpoint")
NUMBERS = itertools.count()
LIMIT_S = 10 * float(os.environ.get("QIMG2_TEST_SLOWNESS", 1))

gc.disable()  # until all is imported, of which nothing is garbage
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs here run for milliseconds but take minutes to compile: skip what makes them fast, in this process and in those that it starts. Measured on
# a gradient of the VAE: 5.8 s with LLVM's first level of optimisation, 3.0 s without, 1.4 s without fused code and LLVM's dearer passes as well. Cut
# into 32 pieces, a program can be compiled by many threads; with two workers on two cores the pieces are a fifth of the work, for nothing.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true "
                      "--xla_cpu_parallel_codegen_split_count=1")
# Here and in processes that tests start, whatever is compiled is read by the next test. A file that two write at once is read whole or not at all,
# and its name holds all that the program depends on.
os.environ["JAX_COMPILATION_CACHE_DIR"], os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(CACHE), "0"
# Arrays of different ranks are only combined where the code says how.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np
import pytest
import warm
from jax._src import cache_key
from jax._src import compilation_cache as jax_cache
from jax._src.lib import xla_client

from configs import quickstart
from launch import cli
from qimg2.runtime.curriculum import train
from qimg2.training import trainer

cli.collect_rarely()


def share_programs_of_one_device():
  """Names a program of one device in the cache as a process that has one device does: JAX hashes all devices of the process into the name, and
  would compile it again in every notebook and command that goes on with a run of these tests."""
  only, hash_devices = np.array(xla_client.make_cpu_client(num_devices=1).devices()), cache_key._hash_accelerator_config
  cache_key._hash_accelerator_config = lambda hashed, devices: hash_devices(hashed, only if devices.size == 1 else devices)


def keep_programs():
  """Keeps loaded what this process has loaded from the cache: to read a program again takes a tenth of a second, and every run of a loop makes its
  own."""
  read, loaded = jax_cache.get_executable_and_time, {}

  def get(key, options, backend, devices):
    name = key, tuple(device.id for device in devices)
    if name not in loaded:
      found = read(key, options, backend, devices)
      if found[0] is None:
        return found
      loaded[name] = found
    return loaded[name]
  jax_cache.get_executable_and_time = get


share_programs_of_one_device()
keep_programs()


def pytest_configure(config):
  """Puts the folders of the tests into memory, where a save waits for no disk; forgets the oldest compiled programs once there are too many. In the
  process that starts the others."""
  if hasattr(config, "workerinput"):
    return
  if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
  if CACHE.is_dir():
    programs = sorted(((path.stat(), path) for path in CACHE.iterdir() if path.is_file()), key=lambda pair: pair[0].st_mtime, reverse=True)
    kept = 0
    for stat, path in programs:
      kept += stat.st_size
      if kept > MAX_CACHE_BYTES:
        path.unlink()


def group_of(item):
  """Tests that share an expensive fixture run in one process: those of a file, and all that look at the smoke run. Those that look at the published
  classes do too, because importing these takes long."""
  if "smoke_run" in item.fixturenames:
    return "smoke_run"
  return next((mark.args[0] for mark in item.iter_markers("apart")), "published" if hasattr(item.module, "torch") else item.path.stem)


def pytest_collection_modifyitems(items):
  """The longest groups come first, so that no worker is left with one of them at the end."""
  rank = {group: number for number, group in enumerate(LONG)}
  items.sort(key=lambda item: rank.get(group_of(item), len(LONG)))


def pytest_collection_finish():
  """From here on Python looks for garbage, but not in what all tests import."""
  gc.freeze()
  gc.enable()


def pytest_itemcollected(item):
  """Gives each test its group. What takes a fixture that trains for minutes is slow."""
  item.add_marker(pytest.mark.xdist_group(group_of(item)))
  if EXPENSIVE.intersection(item.fixturenames):
    item.add_marker("slow")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
  """Fails a test that takes long and does not say so. Fixtures do not count: they are shared. Of the clock's time and the processor's the smaller one
  counts, which other work on the machine changes least."""
  begin, forked_s = os.times(), warm.Process.cpu_s
  outcome = yield
  end = os.times()
  took = min(end.elapsed - begin.elapsed, sum(end[:4]) - sum(begin[:4]) + warm.Process.cpu_s - forked_s)
  if took > LIMIT_S and not item.get_closest_marker("slow") and outcome.excinfo is None:
    outcome.force_exception(AssertionError(f"It took {took:.0f} s, and only tests that are marked `slow` may take more than {LIMIT_S:.0f}: make it "
                                           "quicker, mark it, or set QIMG2_TEST_SLOWNESS where the machine is slow."))


@pytest.fixture
def tmp_path(request, tmp_path_factory):
  """A folder of a test's own, under a name that no other test of this process has, though those that passed are removed: what the process keeps by
  path, such as open files and fsspec's memory, would be taken for its own."""
  failed, name = request.session.testsfailed, re.sub(r"\W", "_", request.node.name)[:30]
  path = tmp_path_factory.mktemp(f"{name}-{next(NUMBERS)}", numbered=False)
  yield path
  if request.session.testsfailed == failed:
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def compilation_cache():
  """The folder of compiled programs, for commands that want one."""
  return str(CACHE)


@pytest.fixture(scope="session", autouse=True)
def explicit_transfers():
  """Between the steps of a training loop, nothing goes to the device that was not put there on purpose."""
  loop, hooks = trainer._loop, trainer._run_hooks

  def guarded(*arguments):
    with jax.transfer_guard_host_to_device("disallow"):
      return loop(*arguments)

  def free(*arguments):
    with jax.transfer_guard_host_to_device("allow"):
      return hooks(*arguments)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "_loop", guarded)
    patch.setattr(trainer, "_run_hooks", free)
    yield


def use_one_device(patch):
  """Runs use one device from here on: programs for eight take several times as long to compile and to run."""
  devices = jax.devices()[:1]
  patch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture
def one_device(monkeypatch):
  """As `use_one_device` says, for one test."""
  use_one_device(monkeypatch)


@pytest.fixture(scope="module")
def one_device_in_module():
  """As `use_one_device` says, for the tests and fixtures of a module."""
  with pytest.MonkeyPatch.context() as patch:
    use_one_device(patch)
    yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """Where prepared data sets are, for all workers of these tests."""
  own = tmp_path_factory.getbasetemp()
  return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "data"


@pytest.fixture(scope="session")
def smoke_config(data_dir):
  """The quickstart's smoke config."""
  cfg = quickstart.get_config("smoke")
  cfg.data_dir = str(data_dir)
  return cfg


@pytest.fixture(scope="session")
def smoke_run(smoke_config, tmp_path_factory):
  """The quickstart's smoke run, trained on one device. Commands that read it have eight; none may change what it says."""
  timed = []
  listen = lambda event, _, **__: timed.append(event)
  jax.monitoring.register_event_duration_secs_listener(listen)
  with pytest.MonkeyPatch.context() as patch:
    use_one_device(patch)
    run = train(smoke_config, tmp_path_factory.mktemp("smoke"))
  jax.monitoring.unregister_event_duration_listener(listen)
  run.num_compilations = sum(event.endswith("backend_compile_duration") for event in timed)
  results = {path: path.read_bytes() for path in run.workdir.rglob("*.json*") if "checkpoints" not in path.parts}
  yield run
  changed = [str(path) for path, content in results.items() if path.read_bytes() != content]
  assert not changed, f"A test wrote into the run that all share: {changed}."


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
  """A small random published folder, as diffusers writes it; tests copy it before they change it."""
  import reference
  path = tmp_path_factory.mktemp("published") / "tiny"
  reference.tiny_pipeline(0).save_pretrained(path)
  return path
