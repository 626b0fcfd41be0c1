"""What the reader of compiled programs counts, on programs whose collectives and loops are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from qimg2.analysis import hlo, roofline

LAYERS, WIDTH = 5, 16


@pytest.fixture(scope="module")
def mesh():
  return Mesh(np.array(jax.devices()[:8]).reshape(2, 4, 1), ("data", "fsdp", "tensor"))


def compiled_text(mesh, body, in_specs, *shapes):
  """A function that runs `body(x, weight) -> x` over LAYERS weights in a scan, on every device of the mesh, compiled."""
  @functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(("data", "fsdp")), check_vma=False)
  def run(x, weights):
    return jax.lax.scan(lambda x, w: (body(x, w), None), x, weights)[0]
  return jax.jit(run).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def scanned(mesh, body):
  spec = PartitionSpec(("data", "fsdp")), PartitionSpec(None, "fsdp")
  return compiled_text(mesh, body, spec, (8, WIDTH), (LAYERS, WIDTH, WIDTH))


def summary(text, mesh):
  traffic = hlo.analyze(text, 8)
  assert not traffic.unknown_loops
  return traffic, {(one.kind, hlo.mesh_axes(one.groups, mesh.shape)): (one.num_bytes, one.times) for one in traffic.collectives}


def test_weights_gathered_in_a_scan(mesh):
  traffic, found = summary(scanned(mesh, lambda x, w: jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", axis=0, tiled=True))), mesh)
  shard = WIDTH * WIDTH * 4 / 4
  assert found == {("all-gather", ("fsdp",)): (3 * shard, LAYERS)}
  assert traffic.flops == LAYERS * 2 * 1 * WIDTH * WIDTH  # one row per device


def test_sums_and_rings_in_a_scan(mesh):
  def body(x, w):
    x = x + jnp.sum(w)
    x = jax.lax.psum(x, "data") + jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
    return jnp.sin(jax.lax.psum(jnp.cos(x), ("data", "fsdp")))
  _, found = summary(scanned(mesh, body), mesh)
  row = WIDTH * 4
  assert found == {("all-reduce", ("data",)): (2 * row / 2, LAYERS), ("collective-permute", ("fsdp",)): (row, LAYERS),
                   ("all-reduce", ("data", "fsdp")): (2 * row * 7 / 8, LAYERS)}


def test_loops_multiply(mesh):
  def body(x, w):
    inner = lambda i, y: jnp.sin(jax.lax.psum(y, "fsdp") + i)
    return jax.lax.fori_loop(0, 3, inner, x + jnp.sum(w))
  _, found = summary(scanned(mesh, body), mesh)
  (_, times), = found.values()
  assert times == 3 * LAYERS


def test_memory_of_a_scan_reads_each_layer_once():
  def run(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]
  shapes = jax.ShapeDtypeStruct((4, 256), jnp.float32), jax.ShapeDtypeStruct((20, 256, 256), jnp.float32)
  text = jax.jit(run).lower(*shapes).compile().as_text()
  weights = 20 * 256 * 256 * 4
  assert weights <= hlo.analyze(text, 1).hbm_bytes < 4 * weights  # read, and at most copied; not 20 times the stack


@pytest.mark.parametrize("attributes, expected", [
    ("replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("source_target_pairs={{0,1},{1,0},{2,2}}", [[0, 1], [1, 0]]),
    ("replica_groups=mesh['x'=2,'y'=4] {'y'}, use_global_device_ids=true", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("replica_groups=mesh['x'=4,'y'=2], device_ids=([8]<=[2,4]T(1,0)) {'y'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]])])
def test_groups(attributes, expected):
  np.testing.assert_array_equal(hlo._groups(", " + attributes, 8), expected)


def test_groups_in_an_unknown_form():
  with pytest.raises(ValueError, match="does not read: replica_groups=<8>"):
    hlo._groups("replica_groups=<8>", 8)


def test_a_line_of_a_tpu_program():
  line = ('  ROOT %ag.1 = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p.0), channel_id=3, '
          'replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true')
  one = hlo._instruction(line)
  assert (one.name, one.opcode, one.operands, one.is_root) == ("ag.1", "all-gather-start", ("p.0",), True)
  assert one.types == ((hlo.Array("bf16", (4, 8)),), (hlo.Array("bf16", (16, 8), 1),))
  assert one.arrays[1].num_bytes == 256


def test_convolutions_count_what_they_multiply():
  def run(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  shapes = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32), jax.ShapeDtypeStruct((3, 3, 16, 32), jnp.float32)
  lowered = jax.jit(run).lower(*shapes)
  assert hlo.analyze(lowered.compile().as_text(), 1).flops == 2 * 2 * 22**2 * 16 * 32  # 3 taps at 6 places and 2 at 2, per side
  line = ("  %c = f32[4,8,8]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf")
  one = hlo._instruction(line)
  assert hlo._convolution(one, [(4, 8, 32), (4, 32, 8)]) == 4 * 8 * 8 * 32  # a batched product, as the TPU compiler writes it


def test_a_collective_in_several_fusions_counts_once():
  text = """HloModule m
%start (p: bf16[8,4]) -> bf16[32,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %g = bf16[32,4]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}
%done (q: bf16[8,4]) -> bf16[32,4] {
  %q = bf16[8,4]{1,0} parameter(0)
  ROOT %h = bf16[32,4]{1,0} all-gather(%q), channel_id=7, replica_groups=mesh['x'=4] {'x'}, dimensions={0}
}
ENTRY %main (a: bf16[8,4]) -> bf16[32,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[32,4]{1,0:S(1)} fusion(%a), kind=kCustom, calls=%start
  ROOT %c = bf16[32,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%done
}
"""
  traffic = hlo.analyze(text, 4)
  assert [(one.kind, one.num_bytes, one.times) for one in traffic.collectives] == [("all-gather", 3 * 64, 1)]
  assert traffic.hbm_bytes == 64 + 64 + 256  # what lies in on-chip memory costs nothing


def test_a_layer_cut_out_of_a_stack_in_a_nested_fusion():
  text = """HloModule m
%inner (p: bf16[32,8,4], i: s32[]) -> bf16[1,8,4] {
  %p = bf16[32,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = bf16[1,8,4]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,8,4}
}
%outer (q: bf16[32,8,4], j: s32[]) -> bf16[1,8,4] {
  %q = bf16[32,8,4]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %f = bf16[1,8,4]{2,1,0} fusion(%q, %j), kind=kLoop, calls=%inner
}
ENTRY %main (a: bf16[32,8,4], k: s32[]) -> bf16[1,8,4] {
  %a = bf16[32,8,4]{2,1,0} parameter(0)
  %k = s32[]{:S(6)} parameter(1)
  ROOT %c = bf16[1,8,4]{2,1,0} fusion(%a, %k), kind=kLoop, calls=%outer
}
"""
  assert hlo.analyze(text, 1).hbm_bytes == 2 * 64


@pytest.mark.parametrize("message, expected", [
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA: total memory required for HLO temporaries (163.95G) exceeds available HBM (31.24G)",
     (163.95 * 2**30, 31.24 * 2**30)),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.93G of 15.75G hbm. Exceeded hbm "
     "capacity by 3.18G.", (18.93 * 2**30, 15.75 * 2**30)),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", None), ("INVALID_ARGUMENT: nothing", None)])
def test_out_of_memory(message, expected):
  assert hlo.out_of_memory(message) == pytest.approx(expected)


def test_text_without_a_program():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.analyze("HloModule nothing", 1)


class Place:
  """A device of a made-up 4 x 4 x 8 torus."""

  def __init__(self, number, slice_index=0):
    self.coords, self.slice_index = list(np.unravel_index(number, (4, 4, 8))), slice_index


def test_routes_and_bounds():
  chip, devices = roofline.CHIPS["v5p"], [Place(i) for i in range(128)]
  grid = np.arange(128).reshape(4, 4, 8)
  ring = roofline.route(chip, devices, grid.reshape(16, 8))
  assert ring == roofline.Route((2,), 2e11, 1, 8)
  line = roofline.route(chip, devices, grid.reshape(-1, 2))
  assert line == roofline.Route((2,), 1e11, 1, 2)
  plane = roofline.route(chip, devices, grid.transpose(2, 0, 1).reshape(8, 16))
  assert plane.torus_axes == (0, 1) and plane.bandwidth == 4e11
  assert roofline.interconnect_seconds(chip, [(ring, 2e11), (line, 1e11), (plane, 4e11)])[0] == 2.0
  two = [*devices, *(Place(i, 1) for i in range(128))]
  across = roofline.route(chip, two, np.arange(256).reshape(1, 256))
  assert (across.num_slices, across.per_slice, across.torus_axes) == (2, 128, (0, 1, 2))
  assert roofline.interconnect_seconds(chip, [(roofline.NETWORK, 6.25e9)]) == (0.0, 1.0)
  bound = roofline.bound(chip, 459e12, 2 * 459e12, 2765e9, [(ring, 2e11)])
  assert bound["compute_s"] == bound["step_s"] == 2.0 and bound["hbm_s"] == bound["ici_s"] == 1.0 and bound["mfu"] == 0.5
  assert bound["serial_mfu"] == 0.25
