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
  for axis in ("mlp", "vocab", "kv_heads"):
    assert sharding.partition_spec((axis, "embed"), RULES) == PartitionSpec("tensor", "fsdp"), axis
  assert sharding.partition_spec((None, None, "channel", None), RULES) == PartitionSpec(None, None, "fsdp", None)


@pytest.mark.parametrize("axes, message", [(("embed", "speed"), "w: logical axis 'speed' has no sharding rule"),
                                           (("embed", "batch"), "mesh axis 'fsdp' is used for two")])
def test_partition_errors(axes, message):
  with pytest.raises(ValueError, match=message):
    sharding.partition_spec(axes, RULES, "w")


def test_what_does_not_divide_lies_whole_and_is_named_if_it_is_large(monkeypatch, caplog):
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  specs = {"blocks": {"w": P.Param((6, 8), ("embed", "mlp")), "v": P.Param((8, 8), ("embed", "mlp"))}}
  placed = sharding.param_shardings(specs, mesh, RULES)["blocks"]
  assert placed["w"].spec == PartitionSpec(None, "tensor") and placed["v"].spec == PartitionSpec("fsdp", "tensor") and not caplog.records
  monkeypatch.setattr(sharding, "REPLICATED_WARN_BYTES", 4 * 6 * 4 - 1)
  sharding.param_shardings(specs, mesh, RULES)
  assert "1 weights have sizes that mesh" in caplog.text and "blocks/w most" in caplog.text


def test_batches_are_split_by_rows():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  batch = sharding.put_batch({"x": np.arange(24).reshape(8, 3), "sources": ()}, mesh, RULES)
  assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}
  np.testing.assert_array_equal(batch["x"], np.arange(24).reshape(8, 3))


@pytest.mark.parametrize("name", sharding.RULES)
def test_rule_sets_know_the_same_axes(name):
  assert sharding.RULES[name].keys() == RULES.keys()


def test_fsdp_splits_weights_over_fsdp_alone_and_fsdp_context_over_both():
  project, hidden = ("layer", "embed", "heads", None), ("batch", "token", None)
  spec = lambda axes, name: sharding.partition_spec(axes, sharding.RULES[name])
  assert spec(project, "fsdp") == PartitionSpec(None, "fsdp", None, None)
  assert spec(hidden, "fsdp") == PartitionSpec(("data", "fsdp"), None, None)
  assert spec(project, "fsdp_context") == PartitionSpec(None, ("fsdp", "context"), None, None)
  assert spec(hidden, "fsdp_context") == PartitionSpec(("data", "fsdp"), "context", None)
  between = ("batch", "residual", None)
  assert spec(between, "fsdp_sequence") == PartitionSpec(("data", "fsdp"), ("context", "tensor"), None)
  assert all(spec(between, name) == spec(hidden, name) for name in sharding.RULES if name != "fsdp_sequence")
  assert {key: axes for key, axes in sharding.RULES["fsdp_sequence"].items() if key != "residual"} == {
      key: axes for key, axes in RULES.items() if key != "residual"}


def test_rules_that_leave_devices_without_work_are_refused():
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  assert sharding.find_rules("fsdp_tensor", mesh) is RULES
  with pytest.raises(ValueError, match="config.rules 'fsdp' leaves mesh axis 'tensor' of size 2 without work: set it to 1 or choose fsdp_tensor"):
    sharding.find_rules("fsdp", mesh)
  with pytest.raises(ValueError, match="config.rules is 'fdsp': choose one of fsdp, fsdp_tensor"):
    sharding.find_rules("fdsp", mesh)


class Chip:
  """A device of a slice, as far as a mesh looks at it."""
  platform, device_kind, process_index = "any", "chip", 0

  def __init__(self, number, slice_index):
    self.id, self.slice_index = number, slice_index


def test_slices_are_split_over_data_alone():
  chips = [Chip(i, i // 4) for i in range(8)]
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, chips)
  assert [{chip.slice_index for chip in row.flat} for row in mesh.devices] == [{0}, {1}]
  with pytest.raises(ValueError, match="The data axis has size 1, which 2 slices do not divide"):
    sharding.make_mesh({"fsdp": 8}, chips)


def test_activations_that_do_not_divide_stay_whole_where_devices_compute_alone():
  shard = sharding.make_shard(sharding.make_mesh({"data": 2, "context": 2, "tensor": 2}), RULES)
  assert shard.parts("batch") == 2 and shard.parts("token") == 2
  assert shard.spec((4, 7, 2, 8), "batch", "token", "heads", None) == PartitionSpec(("data", "fsdp"), None, "tensor", None)


def test_compile_options_compile():
  mesh = sharding.make_mesh({"fsdp": 8})
  assert sharding.compile_options(mesh) == {}
  # Options of a GPU are parsed on every platform; those of a TPU need its compiler.
  lowered = jax.jit(lambda x: x + 1).lower(1.0)
  assert lowered.compile(compiler_options={**sharding.compile_options(mesh), **sharding.COMPILE_OPTIONS["gpu"]})(1.0) == 2
def test_a_run_of_many_devices_is_read_onto_those_there_are():
  assert sharding.make_mesh({"fsdp": 64, "tensor": 2}, strict=False).shape["fsdp"] == 8
  assert sharding.make_mesh({"fsdp": 2, "tensor": 4}, strict=False).shape["tensor"] == 4
