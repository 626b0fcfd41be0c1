"""The fastest that a compiled step can be on a chip: its operations, bytes and messages over the chip's published rates.

  step time >= max(operations / peak, HBM bytes / HBM bandwidth, busiest ICI axis, DCN bytes / DCN bandwidth)                       (1)
  MFU       <= model FLOPs / (peak · step time)                                                                                    (2)

It is a bound, not a forecast: everything overlaps perfectly and every unit runs at its published peak. "Serial" is the other end: the four times
one after the other. Messages of a mesh axis travel over the torus axes that its devices differ on, each at the rate of one link per direction:
both directions where a group spans a torus axis that is closed to a ring, one where it is a line. Mesh axes that lie on the same torus axis wait
for each other.

Rates: Google Cloud TPU documentation, per chip. ICI is published as the sum over all links and both directions; a link has that over 4 (2-D
torus) or 6 (3-D torus), half of it each way.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

GIB, GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published rates of one device as JAX counts them: a chip, or half of one where a chip shows as two.

  Attributes:
    peak_flops: bfloat16 operations per second.
    hbm_bytes: what the compiler lets a program use of the memory, bytes.
    hbm_bandwidth: bytes per second.
    link_bandwidth: one ICI link, one direction, bytes per second.
    torus: number of torus axes.
    ring_multiple: a torus axis is closed to a ring when its size is a multiple of this.
    dcn_bandwidth: data-centre network, bytes per second; None where no figure is published.
  """
  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  torus: int
  ring_multiple: int
  dcn_bandwidth: float | None = None


CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 800 * GIB, 50 * GB, 2, 16),
    "v5p": Chip(459e12, 95.73 * GIB, 2765 * GB, 100 * GB, 3, 4, 50e9 / 8),
    "v6e": Chip(918e12, 31.24 * GIB, 1638 * GB, 100 * GB, 2, 16, 100e9 / 8),
    "tpu7x": Chip(2307e12 / 2, 94.74 * GIB, 7380 * GB / 2, 50 * GB, 3, 4, 100e9 / 8 / 2),
}


def device_memory(device: Any) -> int | None:
  """Bytes that JAX may use of the memory of one of its devices; None where it does not say, and on a CPU, whose memory is not its own."""
  return (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None


@dataclasses.dataclass(frozen=True)
class Route:
  """How the messages inside the groups of a collective travel.

  Attributes:
    torus_axes: numbers of the torus axes that they use.
    bandwidth: bytes per second that leave a device over ICI; 0 when none do.
    num_slices, per_slice: how many slices a group spans, and its devices in one of them.
  """
  torus_axes: tuple[int, ...]
  bandwidth: float
  num_slices: int = 1
  per_slice: int = 1


NETWORK = Route((), 0.0, num_slices=2)  # of a message that leaves its slice


def route(chip: Chip, devices: Sequence[Any], groups: np.ndarray) -> Route:
  """The route of a collective over `groups` [G, n] of indices into `devices`, the mesh in row-major order.

  `devices` have `coords` and, with several slices, `slice_index`. Only the first group is looked at: the others are its translates.
  """
  size = [max(d.coords[axis] for d in devices) + 1 for axis in range(chip.torus)]
  slices = [getattr(devices[i], "slice_index", 0) for i in groups[0]]
  members = [devices[i] for i, one in zip(groups[0], slices) if one == slices[0]]
  bandwidth, axes = 0.0, []
  for axis in range(chip.torus):
    places = len({d.coords[axis] for d in members})
    if places > 1:
      ring = places == size[axis] and places % chip.ring_multiple == 0 and (chip.torus < 3 or min(size) >= chip.ring_multiple)
      bandwidth += (2 if ring else 1) * chip.link_bandwidth
      axes.append(axis)
  return Route(tuple(axes), bandwidth, len(set(slices)), len(members))


def interconnect_seconds(chip: Chip, messages: Sequence[tuple[Route, float]]) -> tuple[float, float]:
  """(seconds on the busiest ICI axis, seconds on the data-centre network) of (route, bytes that a device sends).

  What crosses slices is taken to be gathered and scattered inside each slice, so that over the network a device sends only its own share.
  """
  busy, dcn = [0.0] * chip.torus, 0.0
  for way, num_bytes in messages:
    if way.num_slices > 1 and chip.dcn_bandwidth:
      dcn += num_bytes / way.per_slice / chip.dcn_bandwidth
    for axis in way.torus_axes:
      busy[axis] += num_bytes / way.bandwidth
  return max(busy), dcn


def bound(chip: Chip, model_flops: float, executed_flops: float, hbm_bytes: float, messages: Sequence[tuple[Route, float]]) -> dict[str, float]:
  """{"compute_s", "hbm_s", "ici_s", "dcn_s", "step_s", "mfu", "serial_mfu"} by equations 1 and 2.

  Args:
    chip: rates.
    model_flops: per device and step, recomputation not counted.
    executed_flops: per device and step, all that the program computes.
    hbm_bytes: per device and step, read and written.
    messages: (route, bytes that a device sends per step) of every collective.
  """
  ici, dcn = interconnect_seconds(chip, messages)
  times = {"compute_s": max(model_flops, executed_flops) / chip.peak_flops, "hbm_s": hbm_bytes / chip.hbm_bandwidth, "ici_s": ici, "dcn_s": dcn}
  ideal, step = model_flops / chip.peak_flops, max(times.values())
  return {**times, "step_s": step, "mfu": ideal / step, "serial_mfu": ideal / sum(times.values())}
