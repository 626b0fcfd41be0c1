"""Sources of weights that hold an adapter: the checkpoints of a stage with one, which hold nothing else, and `diffusers:DIR,lora=FILE`.

A stage with an adapter that starts from such a source goes on with that adapter, on the same base. Everything else that reads a generator from it,
such as a stage that trains all weights, a teacher or a reference that the config names, gets both merged.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import logging

from qimg2 import adapters, sharding
from qimg2 import params as P
from qimg2.algorithms.adapter import ADAPTER, BASE
from qimg2.places import Place
from qimg2.published.lora import open_lora
from qimg2.runtime.config import StageConfig
from qimg2.runtime.config.sources import Source, parse_source
from qimg2.training.changes import saved_description
from qimg2.training.checkpoint import newest_step


@dataclasses.dataclass(frozen=True)
class Held:
  """An adapter that a source holds: `specs`, what it declares; `base`, the source of the weights that it is for; and `read`, a function of the scale
  of the product for which its factors are to be given. `settings` are those of the stage that trained it, None for a file; `lacking`, the maps of
  which a file has no factors, or some of a lower rank."""
  specs: dict
  base: Source
  read: Callable[[float], dict]
  settings: adapters.Settings | None = None
  lacking: Sequence[str] = ()

  @property
  def scale(self) -> float:
    """That of the product as it is stored; a file's is part of its factors."""
    return self.settings.scale if self.settings else 1.0

  def merge_into(self, weights: dict) -> dict:
    """`weights`, those of `base`, with the adapter in them; the ones that were given are gone."""
    return adapters.merge(adapters.adapt(weights, self.read(self.scale), self.scale))


class HeldAdapters:
  """What `qimg2.runtime.weights.StageWeights` knows of sources with adapters; see there for its attributes."""

  def held_adapter(self, source: Source, network: str) -> Held | None:
    """The adapter of a network that a source holds; None where it holds none."""
    if source.lora:
      lora = open_lora(source.lora, self.nets.model)
      specs = lora.specs()
      place = lambda scale: lora.load(sharding.param_shardings(specs, self.mesh, self.rules), scale)
      return Held(specs, dataclasses.replace(source, lora=""), place, lacking=lora.lacking())
    settings = self._adapter_settings(source)
    if not settings.rank:
      return None
    specs = adapters.specs(self.nets.specs()[network], settings)
    item = f"average.{source.average}" if source.average else f"params.{ADAPTER}"
    *_, root = self.adapter_chain(source)
    return Held(specs, dataclasses.replace(root, lora=""), lambda scale: self._item(source, item, specs), settings)

  def adapter_chain(self, source: Source) -> Iterator[Source]:
    """`source`, what its stage started from where that is one with an adapter, and so on to the weights that have none of their own."""
    yield source
    while self._adapter_settings(source).rank:
      source = self._start_of(source)
      yield source

  def start_adapter(self, stage: StageConfig, source: Source) -> dict | None:
    """The adapter that a stage with one goes on with; None where its source holds none. Maps that a file lacks begin as those of a new adapter, which
    the log says. Raises as `check_start_adapter`."""
    held = self.check_start_adapter(stage, source)
    if held is None:
      return None
    weights = held.read(stage.adapter.scale)
    if not held.lacking:
      return weights
    logging.warning("Stage %s goes on with the adapter of %s, which has no factors, or some of a lower rank, of %d linear maps, such as %s: what is "
                    "missing there begins as a new adapter does.", stage.name, source.lora, len(held.lacking), held.lacking[0])
    fill = jax.jit(functools.partial(adapters.filled, held.specs), out_shardings=sharding.param_shardings(held.specs, self.mesh, self.rules))
    return fill(weights, self.random_weights(stage, ADAPTER))

  def check_start_adapter(self, stage: StageConfig, source: Source) -> Held | None:
    """What `start_adapter` would read.

    Raises:
      ValueError: it has another rank, alpha or other targets than the stage's; or the stage's method compares with what it starts from, and that
        would be the base without the adapter.
    """
    algorithm = self.algorithm(stage)
    network = algorithm.roles[BASE].network
    held, specs, where = self.held_adapter(source, network), self.role_specs(stage)[ADAPTER], source.lora or source.name
    if held is None:
      return None
    if algorithm.switched_off:
      role = algorithm.switched_off[0]
      raise ValueError(f"config.stages[{stage.name}] goes on with the adapter of {where}, and its {role!r} would be the generator without any "
                       f"adapter, not what the stage starts from: set frozen.{role} to what start_from is, {stage.start_from!r}.")
    if held.settings not in (None, stage.adapter):
      raise ValueError(f"config.stages[{stage.name}].adapter is {stage.adapter}, but that of {where} is {held.settings}: make them equal to go on "
                       "with it, or export the merged weights with launch.export and start from these.")
    ours, theirs = ({path: p.shape for path, p in P.flatten(tree).items()} for tree in (specs, held.specs))
    if odd := sorted(path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path)):
      raise ValueError(f"config.stages[{stage.name}].adapter gives {odd[0]} the shape {ours.get(odd[0])}, but that of {where} has "
                       f"{theirs.get(odd[0])}: set adapter.rank and adapter.targets as there.")
    return held

  def _adapter_settings(self, source: Source) -> adapters.Settings:
    """Those of the stage that a source names, of rank 0 for any other source."""
    if source.kind == "stage":
      return self.stages[source.name].adapter
    said = self._description(self._folder(source)) if source.kind == "folder" else {}
    return adapters.Settings(**said.get("adapter", {}))

  def _start_of(self, source: Source) -> Source:
    """Where the weights of a stage come from; those of another run's stage as seen from here."""
    if source.kind == "stage":
      return parse_source(self.stages[source.name].start_from)
    folder = self._folder(source)
    start = parse_source(self._description(folder)["start_from"])
    if start.kind == "scratch":
      raise ValueError(f"The adapter in {folder} is for weights that were drawn from the seed of its run: it cannot be used in another.")
    return Source("folder", str(folder.parent / start.name), start.average) if start.kind == "stage" else start

  def _description(self, folder: Place) -> dict:
    """What the newest checkpoint of a stage's folder says of its stage; {} where there is none."""
    step = newest_step(folder / "checkpoints") if folder.is_dir() else None
    return {} if step is None else saved_description(folder / "checkpoints" / str(step))
