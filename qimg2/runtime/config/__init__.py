"""A run's config, parsed once into frozen dataclasses: no other module sees a `ConfigDict`.

  config = parse(quickstart.get_config("smoke"))
  config.stages[3].optimizer.learning_rate

Each default stands once. Classes that stand alone (networks, schedule, optimizer, resolutions ...) have their own, and configs/base.py takes them
from there; those of the classes of this file stand in configs/base.py. Changed copies are made with `dataclasses.replace`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipelines.folders import local_folder
from data_pipelines.specs import DatasetSpec, Resolution
from qimg2 import adapters, flow
from qimg2.algorithms.adapter import BASE
from qimg2.layers import POLICIES
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.runtime.config.rewards import RewardConfig, declare, parse_rewards
from qimg2.runtime.config.sections import checked, from_section, placed, plain
from qimg2.runtime.config.sources import parse_source
from qimg2.runtime.config.suites import ALONE, SETTINGS, check_settings
from qimg2.runtime.methods import METHODS, make_algorithm, stage_algorithm
from qimg2.training import faults, optim
from qimg2.training.state import check_due, check_split
from qimg2.training.watch import Settings as WatchSettings

__all__ = ["RunConfig", "StageConfig", "MeshConfig", "from_section", "parse", "plain"]

TOO_LONG = ("drop", "truncate")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes, see `qimg2.sharding`; one of them may be -1, for the devices that are left."""
  data: int
  fsdp: int
  context: int
  tensor: int

  def __post_init__(self):
    sizes = dataclasses.asdict(self)
    for axis, size in sizes.items():
      if size < 1 and size != -1:
        raise ValueError(f"mesh.{axis} is {size}: give at least 1, or -1 for the devices that are left.")
    if list(sizes.values()).count(-1) > 1:
      raise ValueError(f"mesh {sizes}: only one axis may be -1.")


@dataclasses.dataclass(frozen=True)
class MicroBatchConfig:
  """A kind of micro-batch: what the generator's layers keep (`layers.checkpoint_layer`), and how many tokens one has at most, for each part that
  rows are divided into (the devices along `data` and `fsdp`)."""
  remat: str
  tokens: int

  def __post_init__(self):
    if self.remat not in POLICIES:
      raise ValueError(f"remat is {self.remat!r}: choose one of {', '.join(POLICIES)}.")
    if self.tokens < 1:
      raise ValueError(f"tokens is {self.tokens}: give at least 1.")


@dataclasses.dataclass(frozen=True)
class LocalCopiesConfig:
  """Copies of the state on disks of the machines themselves (`qimg2.training.local_copy`): a folder there, "" for none, and seconds from one to the
  next."""
  folder: str = ""
  every_s: float = 60.0

  def __post_init__(self):
    if self.every_s <= 0:
      raise ValueError(f"every_s is {self.every_s}: give seconds above 0, or no folder for no copies.")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """How embedded data sets are made: training pictures, None for the data set's own number, and the seed."""
  num_examples: int | None
  seed: int


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How pictures are drawn: steps; scale of classifier-free guidance; times before the shift in place of an even grid; pictures on a sheet."""
  num_steps: int
  guidance: float
  sigmas: tuple[float, ...]
  num_images: int

  def settings(self) -> dict[str, Any]:
    """num_steps, guidance and base_times for `qimg2.runtime.generator.Generator`."""
    return {"num_steps": len(self.sigmas) or self.num_steps, "guidance": self.guidance, "base_times": self.sigmas or None}


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What a stage is validated on: a split of its data sets, and how many samples of each task; None for all."""
  split: str
  num_samples: int | None


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
  """A method by its name in `qimg2.runtime.methods`, and all of its settings."""
  name: str
  settings: Mapping[str, Any]

  def section(self) -> dict[str, Any]:
    """As it stands in a config."""
    return {"name": self.name, **self.settings}


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One stage of the curriculum; every key is explained in configs/base.py.

  Attributes:
    start_from, frozen: where weights come from, see `qimg2.runtime.config.sources`.
    mixture: the data sets, each with the run's `data_dir`.
    optimizer, optimizers: the settings of every update, and in their place those of the updates that are named.
    watch: rules that end the stage early, see `qimg2.training.watch`.
    rewards: name -> reward of a method that learns from its own pictures.
    adapter: what is trained beside the frozen generator, of rank 0 for none: the generator itself.
  """
  name: str
  algorithm: AlgorithmConfig
  start_from: str
  frozen: Mapping[str, str]
  num_steps: int
  resolutions: tuple[Resolution, ...]
  mixture: tuple[DatasetSpec, ...]
  evaluation: EvaluationConfig
  caption_dropout: float
  max_crop: float
  max_programs: int
  min_bucket_records: int
  max_faulty: float
  optimizer: optim.Config
  faults: faults.Settings
  log_every_steps: int
  eval_every_steps: int
  sample_every_steps: int
  save_every_steps: int
  keep: int
  optimizers: Mapping[str, optim.Config] = dataclasses.field(default_factory=dict)
  save_every_s: float = 0.0
  too_long: str = "drop"
  keep_every_steps: int = 0
  evals_every_steps: int = 0
  evals_num_prompts: int = 16
  watch: WatchSettings = WatchSettings()
  rewards: Mapping[str, RewardConfig] = dataclasses.field(default_factory=dict)
  reward_workers: int = 0
  adapter: adapters.Settings = adapters.Settings()
  offload_frozen: bool = False

  def __post_init__(self):
    for key in ("num_steps", "log_every_steps", "eval_every_steps", "sample_every_steps", "save_every_steps", "keep"):
      if getattr(self, key) < 1:
        raise ValueError(f"config.stages[{self.name}].{key} is {getattr(self, key)}: give at least 1.")
    if self.keep_every_steps < 0 or self.keep_every_steps % self.save_every_steps:
      raise ValueError(f"config.stages[{self.name}].keep_every_steps is {self.keep_every_steps}, but checkpoints are at multiples of "
                       f"save_every_steps, {self.save_every_steps}: give a multiple of it, or 0 for none that stays for good.")
    if self.save_every_s < 0:
      raise ValueError(f"config.stages[{self.name}].save_every_s is {self.save_every_s}: give seconds, or 0 for no checkpoint by time.")
    if self.evals_every_steps < 0 or self.evals_num_prompts < 1:
      raise ValueError(f"config.stages[{self.name}] draws {self.evals_num_prompts} prompts of each suite every {self.evals_every_steps} steps: give "
                       "evals_num_prompts of at least 1, and evals_every_steps 0 for no suites while it trains.")
    if self.too_long not in TOO_LONG:
      raise ValueError(f"config.stages[{self.name}].too_long is {self.too_long!r}: choose one of {', '.join(TOO_LONG)}.")
    if self.reward_workers < 0:
      raise ValueError(f"config.stages[{self.name}].reward_workers is {self.reward_workers}: give a number of processes, or 0 for one per free core.")
    if self.max_programs < 0:
      raise ValueError(f"config.stages[{self.name}].max_programs is {self.max_programs}: give a number of buckets, or 0 for one per shape.")

  @property
  def kind(self) -> str:
    """What the stage trains, one of `qimg2.runtime.methods.KINDS`."""
    return METHODS[self.algorithm.name].kind

  @property
  def truncates(self) -> bool:
    """Whether captions that are longer than num_tokens are cut, and their records used; a VAE reads no captions."""
    return self.too_long == "truncate" or self.kind == "autoencoder"


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A whole run; every key is explained in configs/base.py.

  Raises:
    ValueError: sizes that do not fit each other, no word for the tokenizer, or two stages of one name.
  """
  seed: int
  mesh: MeshConfig
  rules: str
  data_dir: str
  prepare: PrepareConfig
  tokenizer: str
  num_tokens: int
  prompt_classes: tuple[int, ...]
  num_workers: int
  compile: str
  random_frozen: bool
  model: mmdit.Config
  encoder: qwen3_vl.Config
  vae: vae.Config
  schedule: flow.Schedule
  sampling: SamplingConfig
  evals: Mapping[str, Mapping[str, Any]]
  stages: tuple[StageConfig, ...]
  micro_batches: tuple[MicroBatchConfig, ...] = ()
  local_copies: LocalCopiesConfig = LocalCopiesConfig()
  order_dir: str = "default"

  def __post_init__(self):
    if list(self.micro_batches) != sorted(self.micro_batches, key=lambda one: one.tokens):
      raise ValueError("config.micro_batches: give those of few tokens first; a bucket takes the first in which a row of it finds room.")
    if self.model.context_width != self.encoder.width:
      raise ValueError(f"config.model.context_width is {self.model.context_width}, but config.encoder.width is {self.encoder.width}: make them "
                       "equal.")
    if self.model.latent_channels != self.vae.latent_channels:
      raise ValueError(f"config.model.latent_channels is {self.model.latent_channels}, but config.vae.latent_channels is "
                       f"{self.vae.latent_channels}: make them equal.")
    if self.compile not in ("ahead", "background"):
      raise ValueError(f"config.compile is {self.compile!r}: choose 'ahead', all programs of a stage before its first step, or 'background'.")
    if not self.order_dir:
      raise ValueError("config.order_dir is empty: say \"default\", \"none\", or in which folder of this machine the order of the records is kept.")
    if not self.tokenizer:
      raise ValueError("config.tokenizer is empty: say \"default\", \"diffusers:DIR\", or where a tokenizer.json or its folder is.")
    if len({stage.name for stage in self.stages}) != len(self.stages):
      raise ValueError("config.stages: two stages have the same name; give each its own.")


def parse(cfg: Any) -> RunConfig:
  """The config of a run from what a config file returns; a `RunConfig` is given back as it is.

  Raises:
    ValueError: it is none of a run, or a mistake of any stage, named with its place.
  """
  if isinstance(cfg, RunConfig):
    return cfg
  values = plain(cfg)
  missing = [key for key in ("stages", "model", "data_dir", "mesh") if key not in values]
  if missing or not values["stages"]:
    raise ValueError(f"--config is none of a run: it has no {missing[0] if missing else 'stages'}; take one such as configs/quickstart.py.")
  sections = values.pop("stages")
  if not isinstance(sections, tuple):
    raise ValueError(f"config.stages is {sections!r}: give a tuple of sections.")
  run = from_section(RunConfig, values, "config", stages=())
  local_folder(run.data_dir, "config.data_dir")
  local_folder(run.order_dir, "config.order_dir")
  run = dataclasses.replace(run, evals=_check_evals(run.evals))
  return dataclasses.replace(run, stages=tuple(_stage(section, number, run) for number, section in enumerate(sections)))


def _check_evals(evals: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """All settings of each suite.

  Raises:
    ValueError: a suite that is unknown, or as `check_settings`.
  """
  sections = checked(evals, dict.fromkeys(SETTINGS, Mapping[str, Any]), (), "config.evals")
  alone = [name for name in sections if name in ALONE]
  if alone:
    raise ValueError(f"config.evals.{alone[0]} compares with other pictures, which a run's own evaluation does not: leave it to launch.evaluate.")
  return {name: check_settings(name, settings, "config.evals") for name, settings in sections.items()}


def _stage(section: Any, number: int, run: RunConfig) -> StageConfig:
  """A stage of a run whose other keys are parsed."""
  where = f"config.stages[{section.get('name', number) if isinstance(section, dict) else number}]"
  if not isinstance(section, dict):
    raise ValueError(f"{where} is {section!r}: give a section.")
  rest, given = dict(section), {}
  if "algorithm" in rest:
    given["algorithm"] = _algorithm(rest.pop("algorithm"), f"{where}.algorithm")
    given["rewards"] = _rewards(rest.pop("rewards", {}), given["algorithm"].name, f"{where}.rewards")
  if isinstance(rest.get("mixture"), tuple):
    given["mixture"] = tuple(from_section(DatasetSpec, part, f"{where}.mixture[{place}]", data_dir=run.data_dir)
                             for place, part in enumerate(rest.pop("mixture")))
  if "optimizer" in rest:
    given["optimizer"] = from_section(optim.Config, rest.pop("optimizer"), f"{where}.optimizer")
    own = _own_optimizers(given["algorithm"], given["rewards"], run.schedule, where) if "algorithm" in given else {}
    given["optimizers"] = _optimizers(given["optimizer"], own, rest.pop("optimizers", {}), f"{where}.optimizers")
  stage = from_section(StageConfig, rest, where, **given)
  if not stage.name or set(stage.name) & set(":/"):
    raise ValueError(f"{where}.name is {stage.name!r}: it is a folder's name and part of \"stage:NAME:ema\", so give one without : and /.")
  _check_roles(stage, where, run)
  return stage


def _algorithm(section: Any, where: str) -> AlgorithmConfig:
  name = section.get("name") if isinstance(section, dict) else None
  if name not in METHODS:
    raise ValueError(f"{where}.name is {name!r}: choose one of {', '.join(METHODS)}.")
  hints, defaults = METHODS[name].settings()
  settings = {key: value for key, value in section.items() if key != "name"}
  return AlgorithmConfig(name, defaults | checked(settings, hints, [key for key in hints if key not in defaults], where))


def _rewards(sections: Any, method: str, where: str) -> dict[str, RewardConfig]:
  found = parse_rewards(sections, where)
  if found and not METHODS[method].takes_rewards:
    raise ValueError(f"{where} names {', '.join(found)}, but the method {method!r} learns from no rewards: leave them out, or choose another method.")
  if not found and METHODS[method].needs_rewards:
    raise ValueError(f"{where} is empty, but the method {method!r} learns from rewards: give at least one, such as dict(glyph=dict(weight=1.0)).")
  return found


def _own_optimizers(algorithm: AlgorithmConfig, rewards: Mapping[str, RewardConfig], schedule: flow.Schedule, where: str) -> dict[str, optim.Config]:
  """Update -> the settings that its method gives it."""
  made = placed(f"{where}.algorithm", make_algorithm, algorithm.name, algorithm.settings, schedule, declare(rewards))
  return {update.name: update.optimizer for update in made.updates if update.optimizer is not None}


def _optimizers(common: optim.Config, own: Mapping[str, optim.Config], sections: Any, where: str) -> dict[str, optim.Config]:
  """Update -> its settings: those that its method gives it, or else those of the stage, with what its own section changes."""
  if not isinstance(sections, dict):
    raise ValueError(f"{where} is {sections!r}: give a section with the names of updates.")
  found = {}
  for name, section in sections.items():
    place = f"{where}[{name}]"
    found[name] = from_section(optim.Config, plain(own.get(name, common)) | section if isinstance(section, dict) else section, place)
    if found[name].accumulate != common.accumulate:
      raise ValueError(f"{place}.accumulate is {found[name].accumulate}, but micro-batches are those of the step: set optimizer.accumulate.")
  return found


def _check_roles(stage: StageConfig, where: str, run: RunConfig) -> None:
  """Whether the stage says of each frozen role, and of no other, where its weights come from, names optimizers of its own updates alone, sums
  gradients in float32 or the type of the network, cuts no steps that cannot be cut, and empties no prompt that is scored."""
  algorithm = placed(where, stage_algorithm, stage, run.schedule, declare(stage.rewards))
  if (algorithm.tasks or stage.rewards) and stage.caption_dropout:
    raise ValueError(f"{where}.caption_dropout is {stage.caption_dropout}, but pictures are drawn for the prompts and scored by them: set it to 0.0.")
  if algorithm.rollout is not None and any(part.loss_weight != 1 for part in stage.mixture):
    raise ValueError(f"{where}.mixture has a loss_weight, but the method {stage.algorithm.name!r} learns from its own samples: leave it at 1.")
  roles = [role for role in algorithm.frozen if not (stage.adapter.rank and role == BASE)]  # the base is what the stage starts from
  if stage.adapter.rank:
    placed(where, adapters.find_targets, mmdit.specs(run.model), stage.adapter)
    if stage.start_from == "scratch" and not run.random_frozen:
      raise ValueError(f"{where}.start_from is 'scratch', but an adapter needs weights that it adapts: name a stage or a folder.")
  placed(where, check_due, algorithm, stage.num_steps)
  if stage.faults.stop_after == "micro_batch":
    placed(where, check_split, algorithm)
  if len(algorithm.trained) > 1 and parse_source(stage.start_from).average:
    raise ValueError(f"{where}.start_from is {stage.start_from!r}, one set of weights, but {' and '.join(algorithm.trained)} are trained: leave the "
                     "name of the average out.")
  checked(dict.fromkeys(stage.optimizers, ""), {update.name: str for update in algorithm.updates}, (), f"{where}.optimizers")
  checked(stage.frozen, dict.fromkeys(roles, str), (), f"{where}.frozen")
  for role in roles:
    if role not in stage.frozen and not algorithm.roles[role].start:  # that one starts where the stage does
      raise ValueError(f"{where}.frozen lacks {role!r}: say where these weights come from, \"default\" or as in start_from.")
  dtypes = {"mmdit": run.model.dtype, "qwen3_vl": run.encoder.dtype, "vae": run.vae.dtype}
  for update in algorithm.updates:
    wanted = stage.optimizers.get(update.name, stage.optimizer).gradient_dtype
    for dtype in (dtypes.get(algorithm.roles[role].network.removeprefix(adapters.PREFIX), wanted) for role in update.roles):
      if wanted not in ("float32", dtype):
        raise ValueError(f"{where}.optimizer.gradient_dtype is {wanted!r}, but the network computes in {dtype}, and its weights would be rounded: "
                         "say 'float32'.")
