"""The mesh always has four axes, and a weight that cannot be placed says why."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qimg2 import params as P
from qimg2 import sharding

RULES = sharding.RULES["fsdp_tensor"]


def test_mesh_fills_one_axis():
  mesh = sharding.make_mesh({"fsdp": -1, "tensor": 2})
  assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
  assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 4
  assert dict(sharding.make_mesh({}, jax.devices()[:1]).shape) == dict.fromkeys(sharding.MESH_AXES, 1)


@pytest.mark.parametrize("sizes, message", [
    ({"fdsp": 8}, "Unknown mesh axis 'fdsp'"),
    ({"data": -1, "fsdp": -1}, "only one axis"),
    ({"data": 3}, "asks for 3 devices, but there are 8"),
    ({"data": 3, "fsdp": -1}, "asks for 6 devices, but there are 8"),
])
def test_mesh_errors(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(sizes)


def test_partition_spec():
  assert sharding.partition_spec(("layer", "embed", "heads", None), RULES) == PartitionSpec(None, "fsdp", "tensor", None)
  assert sharding.partition_spec(("batch", "token", None), RULES) == PartitionSpec(("data", "fsdp"), "context", None)


@pytest.mark.parametrize("axes, message", [(("embed", "speed"), "w: logical axis 'speed' has no sharding rule"),
                                           (("embed", "batch"), "mesh axis 'fsdp' is used for two")])
def test_partition_errors(axes, message):
  with pytest.raises(ValueError, match=message):
    sharding.partition_spec(axes, RULES, "w")


def test_what_does_not_divide_is_named():
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  specs = {"blocks": {"w": P.Param((6, 8), ("embed", "mlp"))}}
  with pytest.raises(ValueError, match=r"blocks/w of shape \(6, 8\): dimension 0 \(embed\) is not divisible by the 4 parts"):
    sharding.param_shardings(specs, mesh, RULES)


def test_batches_are_split_by_rows():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  batch = sharding.put_batch({"x": np.arange(24).reshape(8, 3), "sources": ()}, mesh, RULES)
  assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}
  np.testing.assert_array_equal(batch["x"], np.arange(24).reshape(8, 3))


def test_a_run_of_many_devices_is_read_onto_those_there_are():
  assert sharding.make_mesh({"fsdp": 64, "tensor": 2}, strict=False).shape["fsdp"] == 8
  assert sharding.make_mesh({"fsdp": 2, "tensor": 4}, strict=False).shape["tensor"] == 4
