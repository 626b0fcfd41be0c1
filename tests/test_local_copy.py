"""Copies on the machines' own disks: whole or not taken, bit for bit, and never those of another run."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qimg2.sharding import make_mesh
from qimg2.training.local_copy import LocalCopies, _sources
from qimg2.training.state import TrainState

ODD = np.array([-0.0, np.nan, np.inf, 1e-45, 1.5, -2, 3, 4], np.float32)


@dataclasses.dataclass(frozen=True)
class Device:
  """A device that belongs to a process."""
  process_index: int


@pytest.fixture(scope="module")
def state():
  """Function of a step: a state whose arrays are divided, replicated and both."""
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
  params = {"divided": place(ODD, ("fsdp", "tensor")), "both": place(ODD.reshape(4, 2), None, "fsdp"),
            "half": place(jnp.asarray(ODD, jnp.bfloat16))}
  return lambda step: TrainState(place(np.int32(step)), {"model": params}, {}, {}, {}, place(jax.random.key(3)))


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(state):
  raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
  return jax.tree.map(raw, state)


def copied(state, tmp_path, steps, workdir="run"):
  with LocalCopies(str(tmp_path / "disk"), 60.0, tmp_path / workdir) as copies:
    for step in steps:
      copies.save(state(step), {"loader_step": step})
  return copies._folder


def newest(state, tmp_path, after=0, before=100, workdir="run"):
  with LocalCopies(str(tmp_path / "disk"), 60.0, tmp_path / workdir) as copies:
    return copies.newest(abstract(state(0)), after, before)


def test_the_newest_whole_one_is_taken_bit_for_bit(state, tmp_path, caplog):
  folder = copied(state, tmp_path, (2, 3, 5, 8))
  assert sorted(path.name for path in folder.iterdir()) == ["3", "5", "8"]
  found, meta = newest(state, tmp_path)
  assert bits(found) == bits(state(8)) and meta == {"loader_step": 8}
  assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, state(8))
  assert newest(state, tmp_path, after=8) is None and newest(state, tmp_path, workdir="another") is None and not caplog.records
  part = max((folder / "8" / "0").glob("*.npy"), key=lambda path: path.stat().st_size)
  part.write_bytes(bytes(part.stat().st_size))
  assert int(newest(state, tmp_path)[0].step) == 5
  assert f"leaves out the copy {folder / '8' / '0'}: the content of" in caplog.text
  assert "The copies of step 8 cannot be used and are removed: process 0 has no whole one" in caplog.text
  copied(state, tmp_path, (6,))
  assert sorted(path.name for path in folder.iterdir()) == ["3", "5", "6"] and newest(state, tmp_path, before=6)[1] == {"loader_step": 5}
  with LocalCopies(str(tmp_path / "disk"), 60.0, tmp_path / "run") as copies:
    copies.clear()
  assert not folder.exists() and newest(state, tmp_path) is None


def test_arrays_of_another_shape_are_not_taken(state, tmp_path):
  copied(state, tmp_path, (3,))
  changed = abstract(state(0))
  changed.params["model"]["half"] = jax.ShapeDtypeStruct((9,), jnp.bfloat16, sharding=changed.step.sharding)
  with LocalCopies(str(tmp_path / "disk"), 60.0, tmp_path / "run") as copies:
    assert copies.newest(changed, 0, 100) is None


def test_a_disk_that_cannot_be_written_is_said_and_training_goes_on(state, tmp_path, caplog):
  (tmp_path / "disk").write_text("no folder")
  copied(state, tmp_path, (3, 4))
  assert caplog.text.count("Process 0 has no new copy in") == 2


def test_without_a_folder_nothing_is_due():
  with LocalCopies("", 60.0, None) as copies:
    assert not copies.is_due() and copies.newest(None, 0, 9) is None
    copies.clear()


@pytest.mark.parametrize("have, expected", [([True] * 4, [0, 1]), ([True, True, True, False], [0, 1]), ([False, True, True, True], [2, 1]),
                                            ([False, True, False, True], [None, 1])])
def test_each_part_comes_from_the_first_process_that_has_it(have, expected):
  """Four processes of one device; two halves, each on two of them."""
  devices = [Device(i) for i in range(4)]
  places = {device: (slice(4 * (i % 2), 4 * (i % 2) + 4),) for i, device in enumerate(devices)}
  sharding = types.SimpleNamespace(devices_indices_map=lambda shape: places, mesh=types.SimpleNamespace(devices=np.array(devices)))
  found = _sources(types.SimpleNamespace(shape=(8,), sharding=sharding), have)
  assert [device and device.process_index for device in found.values()] == expected
