"""Eight simulated devices on the CPU, and a run of the smoke config that several tests look at."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs here run for milliseconds but take minutes to compile: skip LLVM's optimisation, in this process and in those that it starts.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_num_cpu_devices", 8)

import pytest

from configs import quickstart
from qimg2.runtime.curriculum import train


def pytest_itemcollected(item):
  """Tests that share an expensive fixture run in one process: those of a file, and all that look at the smoke run."""
  item.add_marker(pytest.mark.xdist_group("smoke_run" if "smoke_run" in item.fixturenames else item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Programs that one test compiled are read by the next."""
  folder = os.environ.get("QIMG2_TEST_CACHE") or str(tmp_path_factory.mktemp("cache"))
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """Where prepared data sets lie."""
  return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def smoke_config(data_dir):
  """The quickstart's smoke config."""
  cfg = quickstart.get_config("smoke")
  cfg.data_dir = str(data_dir)
  return cfg


@pytest.fixture(scope="session")
def smoke_run(smoke_config, tmp_path_factory):
  """The quickstart's smoke run, trained."""
  return train(smoke_config, tmp_path_factory.mktemp("smoke"))
