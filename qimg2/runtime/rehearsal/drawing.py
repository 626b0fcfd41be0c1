"""What drawing a request would take of a device's memory, phase by phase, by compiling the programs that draw: see `launch.sample --plan`.

A phase's total is its program's peak, the weights that it reads included, and what else is on the device: the weights of the other networks, unless
they are offloaded. The VAE's phases are compiled whole and in tiles.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from qimg2.analysis import roofline
from qimg2.runtime.generator import Source
from qimg2.runtime.loras import Loras
from qimg2.runtime.phases import DENOISE, LAYOUT_PLATFORMS, NETWORK
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.rehearsal import table, topology
from qimg2.runtime.rehearsal.measure import Child, ChildProcess, bytes_of, measure
from qimg2.runtime.run import load_run
from qimg2.runtime.sampling import Request, prepare, pretrained_defaults, run_defaults, sampling_stage
from qimg2.runtime.weights import DEPLOYED
from qimg2.training.programs import Part

HERE = "here"  # in place of a topology: the devices of this machine
TILE_PX = 256


@dataclasses.dataclass(frozen=True)
class Drawer:
  """Where networks come from: a published folder, with a file of the generator's weights or its own, or a run's, a stage, average and step of the
  run; the compute type or None for the default; and LoRA files on top, see `qimg2.runtime.loras.parse_lora`."""
  pretrained: str = ""
  workdir: str = ""
  stage: str = ""
  average: str = DEPLOYED
  dtype: str | None = None
  transformer: str = ""
  step: int | None = None
  loras: tuple[str, ...] = ()

  def open(self, devices: Sequence[Any] | None = None) -> "Opened":
    """What draws, on these devices or on all. No weights are read.

    Raises:
      ValueError: there is no such folder, run, stage or LoRA.
    """
    opened = self._open(devices)
    if not self.loras:
      return opened
    loras = Loras(opened.source, self.loras)
    return dataclasses.replace(opened, load=lambda: loras.on(opened.load()), offloaded=lambda: loras.on_offloaded(opened.offloaded()),
                               abstract=lambda: loras.on(opened.abstract(), abstract=True))

  def _open(self, devices: Sequence[Any] | None) -> "Opened":
    if self.pretrained:
      source = Pretrained(self.pretrained, self.dtype, devices=devices, transformer=self.transformer)
      return Opened(source, self.transformer or self.pretrained, pretrained_defaults(source), source.load, source.offloaded, source.abstract)
    run = load_run(self.workdir, self.dtype, devices)
    name = sampling_stage(run, self.stage)
    return Opened(run, f"stage {name}", run_defaults(run, name), lambda: run.deployed_weights(name, self.average, self.step),
                  lambda: run.offloaded_weights(name, self.average, self.step), lambda: run.abstract_weights(name))


@dataclasses.dataclass(frozen=True)
class Opened:
  """What draws: `source`, what messages call it, the `defaults` of `sampling.prepare`, and three ways to its weights by network: on the devices,
  brought there when they are needed, and as shapes alone."""
  source: Source
  where: str
  defaults: dict
  load: Callable[[], Mapping]
  offloaded: Callable[[], Mapping]
  abstract: Callable[[], Mapping]


@dataclasses.dataclass(frozen=True)
class Phase:
  """A phase's bytes on each device: `arguments`, its network's weights among them, what its program reserves beside these (`temporaries`, results
  included), and `beside`, the weights of the other networks. `tiled` says whether it is the program of a VAE's tile, `only` which of "resident" and
  "offload" it runs with, "" for both."""
  name: str
  arguments: float
  temporaries: float
  beside: float
  tiled: bool = False
  only: str = ""

  def total(self, offload: bool) -> float:
    """Bytes, with the weights of the other networks on the device or not."""
    return self.arguments + self.temporaries + (0.0 if offload else self.beside)


def plan(drawer: Drawer, request: Request, where: str) -> tuple[list[Phase], float | None]:
  """(the phases in order, bytes of a device's memory or None where there is no limit). Nothing is read or run.

  Args: what draws; what to draw; a topology such as "v5e:1x1", or `HERE`.

  Raises:
    ValueError: as `Drawer.open`, `sampling.prepare` and `topology.find_devices`.
  """
  devices, chip, child = None, None, None
  if where != HERE:
    devices, chip = topology.find_devices(where)
    child = ChildProcess(where) if chip else None
  limit = chip.hbm_bytes if chip else roofline.device_memory(jax.devices()[0] if devices is None else devices[0])
  phases, parts = [], _parts(drawer, request, devices)
  for number, (name, tiled, only, part) in enumerate(parts):
    own = child and Child(child, f"the phase {name}", _answer, (drawer, request, number))
    peak = measure(part, len(devices or jax.devices()), limit, child=own)["peak_bytes"]
    arguments = bytes_of(part.arguments)
    phases.append(Phase(name, arguments, max(0.0, peak - arguments), bytes_of(part.beside), tiled, only))
  return phases, limit


def _parts(drawer: Drawer, request: Request, devices: Sequence[Any] | None) -> list[tuple[str, bool, str, Part]]:
  """(phase, whether it is a tile's, `Phase.only`, program): all phases whole, those of the VAE that are larger than a tile in tiles, too, and the
  generator's with offloaded weights where these have layouts of their own."""
  opened = drawer.open(devices)
  parts = lambda tile, resident: prepare(opened.source, dataclasses.replace(request, vae_tile=tile), opened.defaults).generator.parts(
      opened.abstract(), bool(request.mask), resident)
  tile = request.vae_tile or TILE_PX
  found = []
  for (name, whole), (_, tiled), (_, alone) in zip(parts(0, True), parts(tile, True), parts(0, False)):
    other = name == DENOISE and opened.source.mesh.devices.flat[0].platform in LAYOUT_PLATFORMS
    found.append((name, False, "resident" if other else "", whole))
    if other:
      found.append((name, False, "offload", alone))
    if NETWORK[name] == "vae" and _shapes(whole) != _shapes(tiled):
      found.append((name, True, "", tiled))
  return found


def _shapes(part: Part) -> list[tuple[int, ...]]:
  return [x.shape for x in jax.tree.leaves(part.arguments)]


def _answer(devices: Sequence[Any], chip: roofline.Chip | None, drawer: Drawer, request: Request, number: int) -> dict:
  """What a process of its own measures."""
  return measure(_parts(drawer, request, devices)[number][-1], len(devices), chip.hbm_bytes if chip else None)


def peaks(phases: Sequence[Phase]) -> dict[tuple[bool, bool], Phase]:
  """{(offload, tiles): the phase with the highest total}."""
  tiled = {phase.name for phase in phases if phase.tiled}
  of = lambda offload, tiles: [phase for phase in phases if phase.tiled == (tiles and phase.name in tiled)
                               and phase.only in ("", "offload" if offload else "resident")]
  return {(offload, tiles): max(of(offload, tiles), key=lambda phase: phase.total(offload)) for offload in (False, True) for tiles in (False, True)}


def describe(phases: Sequence[Phase], limit: float | None, tile_px: int) -> str:
  """The phases as a table in GiB = 2^30 bytes, and the peak with and without --offload and --vae_tile."""
  gib = lambda num: f"{num / roofline.GIB:,.2f}"
  lines = [["phase", "arguments", "temporaries", "total", "other weights", "total with them"]]
  for phase in phases:
    name = phase.name + ", a tile" * phase.tiled + f", {phase.only}" * bool(phase.only)
    alone, together = ("-" if phase.only == other else gib(phase.total(offload)) for other, offload in (("resident", True), ("offload", False)))
    lines.append([name, gib(phase.arguments), gib(phase.temporaries), alone, gib(phase.beside), together])
  text = "GiB on each device:\n" + table.columns(lines, 1) + "\n"
  for (offload, tiles), phase in peaks(phases).items():
    flags = " ".join(["--offload"] * offload + [f"--vae_tile={tile_px or TILE_PX}"] * tiles) or "neither"
    total = phase.total(offload)
    fits = "" if limit is None else f", {'fits' if total <= limit else 'does not fit'} in {gib(limit)}"
    text += f"\npeak with {flags}: {gib(total)} GiB in {phase.name}{fits}"
  return text
