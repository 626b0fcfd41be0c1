"""Where the weights of a run come from: drawn from its seed, its own checkpoints, another run's, or a published folder.

A stage knows roles, and each role names its network (`qimg2.algorithms`): all that is read here is read as one of a stage's roles. The sources
are those of `qimg2.runtime.config.sources`. A role that starts as another, such as a reference that starts as the model, reads the other's.
"""

import functools
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from qimg2 import adapters, sharding
from qimg2 import params as P
from qimg2.algorithms import Algorithm
from qimg2.algorithms.adapter import BASE
from qimg2.places import Place, find_place, is_complete
from qimg2.published.folder import check_configs, check_sampling, has_head, load_weights, open_folder
from qimg2.runtime import judged
from qimg2.runtime.config import StageConfig
from qimg2.runtime.config.sources import Source, parse_source
from qimg2.runtime.held_adapters import HeldAdapters
from qimg2.runtime.offload import Loaded, Offloaded, from_host
from qimg2.runtime.outside import LANGUAGE, OutsideWeights
from qimg2.training.checkpoint import Checkpoints, newest_step, restore_weights, save_weights, saved_steps

DEPLOYED, NONE = "deployed", "none"  # in place of the name of an average: what the method deploys, and the weights themselves


class StageWeights(OutsideWeights, HeldAdapters):
  """What a `qimg2.runtime.run.Run` knows of weights; see there for its attributes."""

  def role_specs(self, stage: StageConfig) -> dict[str, dict]:
    """{role: declared weights} of a stage, in the types that they are stored in. An encoder that is read from a published folder without a head does
    without it, if it is frozen: nothing reads it then."""
    algorithm = self.algorithm(stage)
    judge = {judged.NETWORK: self.judge(stage).specs} if judged.ROLE in algorithm.roles else {}
    specs = dict(algorithm.specs(self.nets.specs() | judge, self.nets.compute_dtypes()))
    for role in algorithm.frozen:
      if algorithm.roles[role].network == "qwen3_vl" and "head" in specs[role] and self._is_headless(self._frozen_source(stage, role)):
        specs[role] = {name: tree for name, tree in specs[role].items() if name != "head"}
    return specs

  def _is_headless(self, source: Source) -> bool:
    # A finished run draws what it holds when the folder is gone; who reads the encoder is told.
    folder = pathlib.Path(source.name)
    return source.kind == "diffusers" and folder.is_dir() and _is_headless(source.name, folder.stat().st_mtime_ns)

  def encoder_folder(self, name: str) -> str:
    """The published folder that the encoder of a stage is read from; empty if it comes from elsewhere."""
    stage = self.stages[name]
    sources = [self._frozen_source(stage, role) for role in self.algorithm(stage).frozen if self.algorithm(stage).roles[role].network == "qwen3_vl"]
    return next((source.name for source in sources if source.kind == "diffusers"), "")

  def start_weights(self, stage: StageConfig) -> tuple[dict[str, dict], dict[str, dict]]:
    """(weights of each trained role, averages) that a stage starts from: those of `start_from`, or random ones. Averages that the source does not
    hold start as copies of the weights."""
    algorithm, source = self.algorithm(stage), parse_source(stage.start_from)
    params = {role: self._read(stage, role, source) for role in algorithm.trained}
    if source.average or source.kind not in ("stage", "folder"):
      return params, {}
    held, specs = self._items(source), self.role_specs(stage)
    return params, {name: self._item(source, f"average.{name}", specs[average.role])
                    for name, average in algorithm.averages.items() if {f"average.{name}", f"params.{average.role}"} <= set(held)}

  def frozen_weights(self, stage: StageConfig, networks: Collection[str] = ()) -> dict[str, dict]:
    """The weights of the stage's frozen roles, or of those of some networks alone.

    A role without a source of its own that starts as another one is read where the stage's weights start. Any other one comes from the published
    folder that the stage, or the stages before it, started from; without such a folder its weights are drawn from the seed, saved with the run, and
    read from there ever after.

    Raises:
      ValueError: weights that are not there, or a latent cache in the stage's mixture that other weights made.
    """
    algorithm = self.algorithm(stage)
    wanted = [role for role in algorithm.frozen if not networks or algorithm.roles[role].network in networks]
    weights = {role: self._frozen_role(stage, role) for role in wanted}
    if not self._trained:
      self.check_data(stage, weights)
    return weights

  def read_stages(self, stage: StageConfig) -> set[str]:
    """Names of the stages of this run whose weights are read where `stage` begins to train or goes on: those of its frozen roles, and until it has a
    checkpoint of its own that of `start_from`."""
    sources = [self._frozen_source(stage, role) for role in self.algorithm(stage).frozen]
    if newest_step(self.workdir / stage.name / "checkpoints") is None:
      sources.append(parse_source(stage.start_from))
    return {one.name for source in sources for one in self.adapter_chain(source) if one.kind == "stage"}

  def _frozen_source(self, stage: StageConfig, role: str) -> Source:
    if role == judged.ROLE:
      return Source(LANGUAGE)
    source = parse_source(stage.frozen.get(role, "default"))
    if source.kind != "default":
      return source
    return parse_source(stage.start_from) if self.algorithm(stage).roles[role].start else self._published_root(stage, role)

  def is_drawn(self, stage: StageConfig, role: str) -> bool:
    """Whether a frozen role is drawn from the seed, and starts as no other one."""
    return self._frozen_source(stage, role).kind == "scratch" and not self.algorithm(stage).roles[role].start

  def _frozen_role(self, stage: StageConfig, role: str) -> dict:
    if self.is_drawn(stage, role):
      return self._saved_random_weights(stage, role)
    return self._read(stage, role, self._frozen_source(stage, role))

  def stage_weights(self, name: str, step: int | None = None) -> "LazyWeights":
    """All roles and averages of a stage of this run by name, each read when it is asked for: from the newest checkpoint, or that of a step, or where
    frozen ones are.

    Raises:
      ValueError: there is no checkpoint of it, or none of this step.
    """
    if name not in self.stages:
      raise ValueError(f"There is no stage {name!r}: choose one of {', '.join(self.stages)}.")
    stage, source = self.stages[name], Source("stage", name, step=step)
    algorithm, specs = self.algorithm(stage), self.role_specs(stage)
    if step is not None:
      self._check_step(stage, step)
    self._items(source)
    loaders = {role: lambda role=role: self._item(source, f"params.{role}", specs[role]) for role in algorithm.trained}
    loaders |= {role: lambda role=role: self._frozen_role(stage, role) for role in algorithm.frozen}
    loaders |= {average: lambda average=average: self._item(source, f"average.{average}", specs[algorithm.averages[average].role])
                for average in algorithm.averages}
    return LazyWeights(loaders)

  def deployed_weights(self, name: str, average: str = DEPLOYED, step: int | None = None) -> dict[str, dict]:
    """{network: weights} of a stage that draw, are judged and are exported.

    Args:
      name: of the stage.
      average: name of the averaged weights to take, `NONE` for the weights themselves, `DEPLOYED` for the method's choice.
      step: of the checkpoint, None for the newest.

    Raises:
      ValueError: no such average, or no checkpoint.
    """
    algorithm, weights = self.algorithm(self.stages[name]), self.stage_weights(name, step)
    return algorithm.deployed(choose_average(algorithm, weights, name, average))

  def deployed_adapter(self, name: str, average: str = DEPLOYED, step: int | None = None) -> dict:
    """The adapter of a stage's generator, of what `deployed_weights` would give. No other weight is read."""
    algorithm, specs, weights = self.algorithm(self.stages[name]), self.role_specs(self.stages[name]), self.stage_weights(name, step)
    known = LazyWeights({one: (lambda one=one: self._abstract(specs[one])) if one in algorithm.frozen else (lambda one=one: weights[one])
                         for one in weights})
    deployed = algorithm.deployed(choose_average(algorithm, known, name, average))
    return adapters.taken(deployed[algorithm.roles[BASE].network])

  def offloaded_weights(self, name: str, average: str = DEPLOYED, step: int | None = None) -> Offloaded:
    """`deployed_weights` in host memory: read role by role, and put onto the devices network by network, whenever one is needed."""
    algorithm, weights = self.algorithm(self.stages[name]), self.stage_weights(name, step).then(sharding.to_host)
    arrays = algorithm.deployed(choose_average(algorithm, weights, name, average))
    return from_host(arrays, jax.tree.map(lambda x: x.sharding, self.abstract_weights(name)))

  def abstract_weights(self, name: str) -> dict[str, dict]:
    """{network: tree of ShapeDtypeStruct} of `deployed_weights`. Nothing is read."""
    algorithm, specs = self.algorithm(self.stages[name]), self.role_specs(self.stages[name])
    averages = {average: specs[kept.role] for average, kept in algorithm.averages.items()}
    return algorithm.deployed({role: self._abstract(tree) for role, tree in (specs | averages).items()})

  def random_weights(self, stage: StageConfig, role: str) -> dict:
    """A role's weights drawn from the run's seed and its name, or the name of the role that it starts as."""
    specs = self.role_specs(stage)[role]
    key = self.key(self.algorithm(stage).roles[role].start or role)
    return jax.jit(lambda key: P.init(specs, key), out_shardings=self._shardings(specs))(key)

  def _read(self, stage: StageConfig, role: str, source: Source) -> dict:
    """A role of a stage from a source that is not "default"."""
    one, specs = self.algorithm(stage).roles[role], self.role_specs(stage)[role]
    if one.adapter:
      found = self.start_adapter(stage, source)
      return self.random_weights(stage, role) if found is None else found
    name, held = one.start or role, self.held_adapter(source, one.network) if BASE in (role, one.start) else None
    if held:
      base = self._read(stage, role, held.base)
      return base if self._is_base(stage, role) else held.merge_into(base)
    if source.kind == "scratch":
      return self.random_weights(stage, role)
    if source.kind == LANGUAGE:
      return self.judge(stage).load(self._shardings(specs))
    if source.kind == "diffusers":
      return self._published(source, one.network, specs)
    return self._item(source, f"average.{source.average}" if source.average else f"params.{name}", specs)

  def _is_base(self, stage: StageConfig, role: str) -> bool:
    """Whether a role of a stage is what its adapter is for."""
    return bool(stage.adapter.rank) and role == BASE

  def _folder(self, source: Source) -> Place:
    return self.workdir / source.name if source.kind == "stage" else find_place(source.name, "start_from")

  def _item(self, source: Source, item: str, specs: dict) -> dict:
    """An item of the newest checkpoint of a stage, or of the folder of one; or a folder of weights alone."""
    folder = self._folder(source)
    if (folder / "_METADATA").is_file() and item.startswith("params."):
      return restore_weights(folder, self._abstract(specs))
    checkpoints = self._open(source)
    weights = checkpoints.restore_item(item, self._abstract(specs), source.step)
    checkpoints.close()
    return weights

  def _items(self, source: Source) -> list[str]:
    """Names of what the newest checkpoint of a source holds; none for a folder of weights alone."""
    if (self._folder(source) / "_METADATA").is_file():
      return []
    checkpoints = self._open(source)
    items = checkpoints.items(checkpoints.latest_step() if source.step is None else source.step)
    checkpoints.close()
    return items

  def _check_step(self, stage: StageConfig, step: int) -> None:
    """Raises a `ValueError` that names the steps that there are, where there is no checkpoint of `step`."""
    steps = saved_steps(self.workdir / stage.name / "checkpoints")
    if not steps or step in steps:
      return
    was_removed = step < steps[-1] and step % stage.save_every_steps == 0
    why = (f"it was removed when newer ones came, because keep={stage.keep} and keep_every_steps={stage.keep_every_steps}" if was_removed else
           f"none was saved there, but every {stage.save_every_steps} steps and at the last one")
    raise ValueError(f"Stage {stage.name} has no checkpoint of step {step}: {why}. There are those of the steps {', '.join(map(str, steps))}: choose "
                     "one of them, or leave --step out for the newest.")

  def _open(self, source: Source) -> Checkpoints:
    folder = self._folder(source) / "checkpoints"
    if not folder.is_dir():
      raise self._no_checkpoint(source)
    return Checkpoints(folder)

  def _no_checkpoint(self, source: Source) -> ValueError:
    return ValueError(f"There is no checkpoint of {source.name!r} at {self._folder(source)}: train it first, or name one of the stages "
                      f"{', '.join(self.stages)} or a stage's folder.")

  def check_published(self, stage: StageConfig, role: str) -> None:
    """Compares the names and shapes of a role's weights with those of the published folder that it comes from, if it comes from one. None is read.

    Raises:
      ValueError: the folder is not what the config says.
    """
    algorithm = self.algorithm(stage)
    source = parse_source(stage.start_from) if role in algorithm.trained else self._frozen_source(stage, role)
    if algorithm.roles[role].adapter:
      self.check_start_adapter(stage, source)
    elif source.kind == "diffusers":
      self._published(source, algorithm.roles[role].network, self.role_specs(stage)[role], read=False)

  def _published(self, source: Source, network: str, specs: dict, read: bool = True) -> dict:
    """The weights of a network in a published folder."""
    published = open_folder(source.name, transformer=source.transformer)
    check_configs(published, **{name: config for name, config in self.nets.configs().items() if name == network})
    if network == "mmdit":
      check_sampling(published, self.schedule, self.cfg.sampling.sigmas)
    return load_weights(published, network, specs, self._shardings(specs), read)

  def _published_root(self, stage: StageConfig, role: str) -> Source:
    """The diffusers folder at which the chain of `start_from` ends, or "scratch".

    Raises:
      ValueError: it ends in the folder of another run, which has weights of its own for the role.
    """
    source = parse_source(stage.start_from)
    while source.kind == "stage" and source.name in self.stages:
      source = parse_source(self.stages[source.name].start_from)
    if source.kind == "folder":
      raise ValueError(f"config.stages[{stage.name}].frozen.{role} is \"default\", but the stage's weights come from {source.name} and were trained "
                       f"with others than this run's seed gives: name their source, such as {self._folder(source).parent / 'frozen' / role}.")
    return source if source.kind == "diffusers" else Source("scratch")

  def _saved_random_weights(self, stage: StageConfig, role: str) -> dict:
    folder = self.workdir / "frozen" / role
    if sharding.broadcast_from_first(np.int32(not is_complete(folder))):  # all have looked before the first one writes
      save_weights(folder, self.random_weights(stage, role))
    return restore_weights(folder, self._abstract(self.role_specs(stage)[role]))

  def _abstract(self, specs: dict) -> dict:
    return P.abstract(specs, self._shardings(specs))

  def _shardings(self, specs: dict) -> dict:
    return sharding.param_shardings(specs, self.mesh, self.rules)


class LazyWeights(Loaded):
  """Weights by name, each read when it is first asked for, and kept."""

  def __init__(self, loaders: Mapping[str, Callable[[], Any]]):
    """Args: as `Loaded`."""
    super().__init__(loaders)
    self._read: dict[str, Any] = {}

  def then(self, function: Callable[[Any], Any]) -> "LazyWeights":
    """The same weights, each as `function` gives it; what this mapping read already is read again."""
    return LazyWeights({name: lambda load=load: function(load()) for name, load in self._loaders.items()})

  def __getitem__(self, name: str) -> Any:
    if name not in self._read:
      self._read[name] = super().__getitem__(name)
    return self._read[name]


@functools.lru_cache(maxsize=16)
def _is_headless(folder: str, changed_ns: int) -> bool:
  """Whether the encoder of a published folder has no head: to know it, the headers of all of its files are read."""
  del changed_ns  # another one is another folder
  return not has_head(open_folder(folder))


def choose_average(algorithm: Algorithm, weights: Mapping[str, Any], stage: str, average: str) -> Mapping[str, Any]:
  """`weights` in which every role and average that follows it is what `average` says, see `StageWeights.deployed_weights`.

  Raises:
    ValueError: the method keeps no such average.
  """
  if average == DEPLOYED:
    return weights
  if average != NONE and average not in algorithm.averages:
    raise ValueError(f"Stage {stage} keeps no averaged weights {average!r}: choose {', '.join((*algorithm.averages, NONE))} (the weights themselves) "
                     f"or {DEPLOYED} (what the method chooses).")
  role_of = lambda name: algorithm.averages[name].role if name in algorithm.averages else name
  if average == NONE:
    names = {name: role_of(name) for name in weights}
  else:
    names = {name: average if role_of(name) == role_of(average) else name for name in weights}
  return LazyWeights({name: lambda source=source: weights[source] for name, source in names.items()})
