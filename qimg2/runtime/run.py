"""A run: its config turned into dataclasses once, its mesh, its networks, its data, and the weights in its folder.

  workdir/
    config.json                  the resolved config, package versions, what the data sets are, device kind
    tokenizer.json               see qimg2.runtime.kept_data
    frozen/<role>/               weights of frozen roles that were drawn from the seed
    <stage>/checkpoints/<step>/  see qimg2.training.checkpoint
    <stage>/metrics.jsonl ...    see qimg2.training.metrics
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from data_pipelines.cache import check_use, check_weights, open_cache
from data_pipelines.embedded import prepare
from data_pipelines.kept import check_folder, folder_of
from data_pipelines.loader import Loader
from data_pipelines.records import list_splits, read_meta
from data_pipelines.specs import DatasetSpec
from data_pipelines.tokenizer import PromptTokenizer
from qimg2 import networks, sharding
from qimg2.algorithms import Algorithm
from qimg2.places import Place, find_place, named_failures, write_file
from qimg2.runtime import micro_batches, rewards
from qimg2.runtime.caching import MADE_BY
from qimg2.runtime.config import RunConfig, StageConfig, parse, plain
from qimg2.runtime.config.records import FORMAT, read_record, read_section
from qimg2.runtime.config.rewards import declare
from qimg2.runtime.config.sources import check_source
from qimg2.runtime.generator import Generator, Size
from qimg2.runtime.kept_data import KEPT, data_changes, identify_data, run_tokenizer, tokenizer_path
from qimg2.runtime.methods import stage_algorithm
from qimg2.runtime.processes import barrier, from_first, in_turn, is_first
from qimg2.runtime.weights import StageWeights
from qimg2.training.changes import differences

EMBEDDED = ("glyphs", "emoji")
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
# Those of which another version may compute other numbers, read other batches, or not read what was saved. Of optax only the layout of the states is
# used, and a checkpoint of another layout is refused when it is read; of flax only classes of plain data.
FIXED = ("jax", "jaxlib", "libtpu", "numpy", "grain", "orbax-checkpoint")
# What may change while a run goes on: it does not change what a step computes, or is a wish for longer training. With another budget of buckets the
# order of batches may be another one, and the log says so.
FREE = re.compile(r"config\.(mesh|data_dir|local_copies|num_workers|compile|random_frozen|order_dir|sampling|evals|"
                  r"stages\[\d+\]\.((log|eval|evals|sample|save)_every_steps|evals_num_prompts|save_every_s|keep|keep_every_steps|num_steps|faults|"
                  r"max_programs|offload_frozen|reward_workers|watch|mixture\[\d+\]\.data_dir))").fullmatch


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Held-out batches as global arrays, the same ones each time. They are read anew: kept, they would take memory of the devices for a whole stage."""
  loader: Loader
  num_samples: int
  put: Callable[[dict], dict]

  def __iter__(self) -> Iterator[dict]:
    for _, batch in self.loader.evaluation_batches(self.num_samples):
      yield self.put(batch)

  def __len__(self) -> int:
    return self.loader.num_evaluation_batches(self.num_samples)


class Run(StageWeights):
  """A config and a folder, and what both together give."""

  def __init__(self, cfg: Any, workdir: str | Place, trained: bool = False, devices: Sequence[Any] | None = None):
    """Args: a `RunConfig`, or what a config file returns; folder; trained, whether the run is only read, so that what its stages started from may
    be gone; devices of the mesh, all of them when None.

    Raises:
      ValueError: a config that does not fit together.
    """
    self.cfg, self.workdir = parse(cfg), find_place(workdir, "--workdir")
    cfg = self.cfg
    self.mesh = sharding.make_mesh(plain(cfg.mesh), devices, strict=not trained)
    self.rules = sharding.find_rules(cfg.rules, self.mesh)
    self.schedule = cfg.schedule
    self.stages = {stage.name: stage for stage in cfg.stages}
    self._trained = trained
    if not trained:
      self._check_sources()
      check_folder(cfg.order_dir)
    self._found: set[str] = set()
    self._generators: dict[Size, Generator] = {}
    self._judges: dict[str, rewards.StageJudge | None] = {}
    self._scorer: rewards.Scorer | None = None
    if not trained or not workdir or not (self.workdir / "config.json").is_file():
      self._ensure_data(*cfg.stages)
    elif cfg.tokenizer == "default" and cfg.stages[0].mixture[0].name in EMBEDDED and not (self.workdir / KEPT).is_file():
      self._ensure_data(cfg.stages[0])  # an earlier version kept no tokenizer, and that of an embedded data set can be had again
    self.tokenizer = run_tokenizer(cfg, self.workdir if workdir else None, trained)
    if self.tokenizer.vocab_size > cfg.encoder.vocab_size:
      raise ValueError(f"The tokenizer of {tokenizer_path(cfg)} has {self.tokenizer.vocab_size} tokens, but config.encoder.vocab_size is "
                       f"{cfg.encoder.vocab_size}: raise it.")
    encoder = dataclasses.replace(cfg.encoder, image_token_id=self.tokenizer.image_token_id)
    self.nets = networks.Networks(cfg.model, encoder, cfg.vae, self.tokenizer.num_system_tokens, sharding.make_shard(self.mesh, self.rules))
    for stage in () if trained else cfg.stages:
      self.check_data(stage)

  def _check_sources(self) -> None:
    """Finds weights that are not there, of all stages, before the first one trains."""
    for check in self.source_checks():
      check()

  def source_checks(self) -> Iterator[Callable[[], None]]:
    """For each source of weights, of all stages, what raises a `ValueError` where it is not there or must not be."""
    names = list(self.stages)
    for number, stage in enumerate(self.cfg.stages):
      where = f"config.stages[{stage.name}]"
      yield functools.partial(check_source, stage.start_from, f"{where}.start_from", names[:number], names, may_be_default=False)
      for role, text in stage.frozen.items():
        yield functools.partial(check_source, text, f"{where}.frozen.{role}", names[:number], names, may_be_default=True)
      for role in () if self.cfg.random_frozen else self.algorithm(stage).frozen:
        yield functools.partial(self._check_drawn, number, stage, role)

  def _check_drawn(self, number: int, stage: StageConfig, role: str) -> None:
    if self.is_drawn(stage, role):
      raise ValueError(f"config.stages[{stage.name}].frozen.{role} is {stage.frozen.get(role, 'default')!r}, which would draw its weights from the "
                       f"seed: name a folder in the published layout, --config.stages[{number}].frozen.{role}=diffusers:DIR "
                       "(configs/pretrain.py:PLAN:diffusers:DIR names it in all stages and for the tokenizer), or set --config.random_frozen=True to "
                       "train on a random network.")

  def _ensure_data(self, *stages: StageConfig) -> None:
    """Makes the embedded data sets of some stages where they are missing, and looks for the others."""
    for name in sorted({part.name for stage in stages for part in stage.mixture} - self._found):
      self._found.add(name)
      if name in EMBEDDED:
        in_turn(f"data {name}", lambda: prepare(name, self.cfg.data_dir, self.cfg.prepare.num_examples, self.cfg.prepare.seed))
      elif not (pathlib.Path(self.cfg.data_dir) / name).is_dir():
        raise ValueError(f"There is no data set {name!r} in {self.cfg.data_dir}: write it with launch.prepare_data, or set config.data_dir.")

  def check_data(self, stage: StageConfig, weights: dict | None = None) -> None:
    """Finds data sets whose alpha the VAE cannot take, or without the truth that a stage's rewards need, and the latent caches of a stage that it
    cannot train on; with its frozen weights, those that were made by others."""
    nets, sizes = self.nets, [(one.base_px, one.ratios, one.multiple) for one in stage.resolutions]
    needs = {"channels": nets.vae.latent_channels, "factor": nets.vae.spatial_factor, "feature_width": nets.encoder.width,
             "num_system_tokens": nets.num_system_tokens, "tokenizer": self.tokenizer.fingerprint, "num_tokens": self.cfg.num_tokens}
    for part in stage.mixture:
      if part.alpha and nets.vae.image_channels != 4:
        raise ValueError(f"Stage {stage.name!r} keeps the alpha of data set {part.name!r}, but config.vae.image_channels is "
                         f"{nets.vae.image_channels}: choose a VAE of 4, or leave alpha out.")
      self._check_pairs(stage, part)
      cache = open_cache(part.data_dir, part.name)
      if cache and stage.kind == "autoencoder":
        raise ValueError(f"Stage {stage.name!r} trains a VAE, but data set {part.name!r} holds latents: name the data set that it was made from.")
      if cache:
        check_use(part.data_dir, part.name, stage.name, sizes, needs | {"alpha": part.alpha, "truncate": stage.truncates})
      if cache and weights:
        made_by = {self.algorithm(stage).roles[role].network: tree for role, tree in weights.items()}
        check_weights(part.data_dir, part.name, stage.name, {name: networks.fingerprint(made_by[MADE_BY[name]]) for name in cache.roles})
    rewards.check_rewards(stage)
    self.judge(stage)

  def _check_pairs(self, stage: StageConfig, part: DatasetSpec) -> None:
    """Raises a `ValueError` for a stage that learns from pairs where a data set has none, or the other way round."""
    number, pairs = read_meta(pathlib.Path(part.data_dir) / part.name)["facts"].get(f"{part.split}_pairs", 0), self.algorithm(stage).pairs
    if pairs and not number:
      raise ValueError(f"Stage {stage.name!r} learns from pairs, but no record of data set {part.name!r} has a rejected picture: take one that was "
                       "prepared from pairs (docs/data.md), or a method without.")
    if number and not pairs and not part.ignore_rejected:
      raise ValueError(f"{number} records of data set {part.name!r} have a rejected picture, which the method {stage.algorithm.name!r} of stage "
                       f"{stage.name!r} does not look at: set ignore_rejected=True in its part of the mixture to train on the others alone, or take "
                       "a method that learns from pairs.")

  # Data.

  def loader(self, stage: StageConfig, process: tuple[int, int] | None = None) -> Loader:
    """The training data of a stage, as `process` (its index, how many there are) sees it; None for this one."""
    return self._loader(stage, stage.mixture, stage.caption_dropout, process, min_bucket_records=stage.min_bucket_records,
                        max_programs=stage.max_programs, tasks=bool(stage.rewards) or self.algorithm(stage).tasks)

  def evaluation_batches(self, stage: StageConfig, training: Loader) -> dict[str, "HeldOut"]:
    """Task -> held-out batches of the stage's data sets; tasks in the order of the mixture. A batch has the shape of one of `training`'s, which is
    the stage's loader, and the rows of one of the micro-batches of squares with prompts of the longest class, for which there is room."""
    batches = {}
    for task in dict.fromkeys(part.task for part in stage.mixture):
      parts = {part.name: dataclasses.replace(part, split=self._held_out(part.name, stage), weight=1.0, min_quality=0.0, loss_weight=1.0)
               for part in stage.mixture if part.task == task}
      rows = lambda one: micro_batches.held_out_rows(self.cfg, stage, task, one, self.tokenizer.num_image_tokens, self.nets.shard.parts("batch"))
      smaller = tuple(dataclasses.replace(one, batch_size=rows(one)) for one in stage.resolutions)
      loader = self._loader(dataclasses.replace(stage, resolutions=smaller), list(parts.values()), 0.0, programs=training.mixture.programs)
      if not loader.mixture.cells and not any("rare" in one["left_out"] for one in loader.mixture.usage):
        usage = loader.mixture.usage
        reasons = sorted({reason for one in usage for reason in one["left_out"]}) or ["there is none of this task"]
        raise ValueError(f"Stage {stage.name}: of the {sum(one['records'] for one in usage)} held-out records of the task {task} none can be used ("
                         f"{', '.join(reasons)}): hold out more of them (validation_share of launch.prepare_data), let the stage take them, "
                         f"or validate on the pictures that it trains on with --config.stages[{list(self.stages).index(stage.name)}]"
                         ".evaluation.split=train.")
      if not loader.mixture.cells:
        logging.warning("Stage %s: no held-out record of the task %s fits a bucket of its training data, so these have buckets of their own.",
                        stage.name, task)
        loader = self._loader(dataclasses.replace(stage, resolutions=smaller), list(parts.values()), 0.0, max_programs=stage.max_programs)
      if loader.mixture.merging.left_out:
        logging.warning("Stage %s: %.2f%% of the held-out records of the task %s fit none of its buckets and are not looked at.", stage.name,
                        100 * loader.mixture.merging.left_out, task)
      batches[task] = HeldOut(loader, stage.evaluation.num_samples, self.put)
    return batches

  def _held_out(self, name: str, stage: StageConfig) -> str:
    """The held-out split that a stage is validated on; its training split, with a warning in the log, where nothing was held out."""
    if stage.evaluation.split in list_splits(self.cfg.data_dir, name):
      return stage.evaluation.split
    logging.warning("Data set %r has no split %r: stage %s is validated on the pictures that it trains on, which says nothing of others.", name,
                    stage.evaluation.split, stage.name)
    return "train"

  def _loader(self, stage: StageConfig, datasets: Sequence[DatasetSpec], caption_dropout: float, process: tuple[int, int] | None = None,
              **buckets: Any) -> Loader:
    """A loader of some data sets of a stage; all of its batches have as many channels, validation by task too."""
    self._ensure_data(stage)
    index, count = process or sharding.local_parts(self.mesh, self.rules)
    classes = () if stage.kind == "autoencoder" else self.cfg.prompt_classes  # a VAE reads no prompt, so its buckets do not differ by them
    return Loader(datasets, stage.resolutions, self.cfg.num_tokens, self.tokenizer, seed=fold_name(self.cfg.seed, stage.name),
                  caption_dropout=caption_dropout, max_crop=stage.max_crop, prompt_classes=classes, max_faulty=stage.max_faulty,
                  process_index=index, process_count=count, num_workers=self.cfg.num_workers, order_dir=folder_of(self.cfg.order_dir),
                  alpha=any(part.alpha for part in stage.mixture), unconditional=self.algorithm(stage).unconditional, truncate=stage.truncates,
                  captions=stage.kind != "autoencoder", pairs=self.algorithm(stage).pairs, **buckets)

  def put(self, batch: dict) -> dict:
    """This process's rows as global arrays on the mesh."""
    return sharding.put_batch(batch, self.mesh, self.rules)

  def batch_shapes(self, stage: StageConfig, loader: Loader) -> tuple[dict, ...]:
    """The abstract global batch of each bucket of a stage."""
    rows = sharding.batch_sharding(self.mesh, self.rules)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=rows)
    more = lambda bucket: rewards.added_shapes(declare(stage.rewards), self.judge(stage), bucket)
    return tuple(jax.tree.map(shape, loader.example(bucket, loader.unconditional) | more(bucket)) for bucket in loader.buckets)

  # Methods.

  def algorithm(self, stage: StageConfig) -> Algorithm:
    """The stage's algorithm; with the judge of its rewards, but in a run that is only read."""
    judge = lambda *arguments: self.judge(stage).score(*arguments)
    declared = declare(stage.rewards, self._score, judge)
    made = stage_algorithm(stage, self.schedule, declared)
    return rewards.with_judge(made) if declared and declared.judged and not self._trained else made

  def judge(self, stage: StageConfig) -> rewards.StageJudge | None:
    """The judge of a stage's rewards, None where it has none; `ValueError` where its folder is not what it should be."""
    if stage.name not in self._judges:
      self._judges[stage.name] = rewards.open_judge(stage)
    return self._judges[stage.name]

  @contextlib.contextmanager
  def scoring(self, stage: StageConfig) -> Iterator[None]:
    """A context in which the pictures of a stage can be scored by its rewards, where it has some.

    Raises:
      ValueError: a process that scores cannot begin.
    """
    if not stage.rewards:
      yield
      return
    with rewards.make_scorer(stage) as self._scorer:
      self._scorer.start()
      yield
    self._scorer = None

  def _score(self, pictures: np.ndarray, tasks: Sequence[dict]) -> dict[str, np.ndarray]:
    return self._scorer(rewards.on_paper(pictures), tasks)

  def sampler_settings(self) -> dict[str, Any]:
    """num_steps, guidance and base_times for `qimg2.runtime.generator.Generator`, as the config says."""
    return self.cfg.sampling.settings()

  def generator(self, size: Size) -> Generator:
    """What draws pictures of a size as the config says: one for all stages, so that its programs are traced and compiled once."""
    if size not in self._generators:
      self._generators[size] = Generator(self, size, **self.sampler_settings())
    return self._generators[size]

  def key(self, name: str) -> jax.Array:
    """The PRNG key of a stage or of a role's initialisation: the run's seed and the name alone decide it."""
    return jax.random.key(fold_name(self.cfg.seed, name))


def fold_name(seed: int, name: str) -> int:
  """A seed below 2**31 that depends on `seed` and `name`."""
  return zlib.crc32(f"{seed}/{name}".encode()) & 0x7FFFFFFF


# The record of a run.


def save_config(cfg: RunConfig, workdir: Place, allow_change: bool = False, allow_version_change: bool = False,
                tokenizer: PromptTokenizer | None = None, allow_data_change: bool = False) -> None:
  """Writes config.json and, if it is given, the tokenizer, by process 0. What is there already must agree, apart from lengths, logging and the mesh;
  what `allow_change`, `allow_version_change` and `allow_data_change` let pass is printed to stderr, a line per difference.

  Raises:
    ValueError: the config changed in a way that matters, a package of `FIXED` has another version than the run began with, or a data set is not what
      it was, and the argument that lets it pass is False.
  """
  path, changes = workdir / "config.json", compare_config(cfg, workdir, allow_change, allow_version_change, tokenizer, allow_data_change)
  kept, datasets = read_section(path, "datasets"), identify_data(cfg) if tokenizer else {}
  barrier("config")  # all have compared it with the old record
  if not is_first():
    return
  for change in changes:
    print(change, file=sys.stderr)
  if path.exists() and tokenizer and not kept:
    logging.warning("The run in %s is of an earlier version, which did not record its data: from now on those that are there count.", workdir)
  versions = {**read_section(path, "versions"), **_installed_versions()}
  record = {"format": FORMAT, "config": _as_json(cfg), "versions": versions, "datasets": {**kept, **datasets},
            "device_kind": jax.devices()[0].device_kind, "num_devices": jax.device_count()}
  with named_failures(path):
    if tokenizer:
      write_file(workdir / KEPT, tokenizer.to_bytes())
    write_file(path, json.dumps(record, indent=1))


def compare_config(cfg: RunConfig, workdir: Place, allow_change: bool = False, allow_version_change: bool = False,
                   tokenizer: PromptTokenizer | None = None, allow_data_change: bool = False) -> list[str]:
  """What differs from the run that began in a folder, a line each, where the arguments let it pass; as `save_config`, which writes nothing if this
  raises."""
  path, config = workdir / "config.json", _as_json(cfg)
  before = _as_json(read_record(path)) if path.exists() else config
  changes = [*differences(before, config, "config", FREE), *_other_lengths(before["stages"], config["stages"], workdir)]
  if changes and not allow_change:
    raise ValueError(f"The run in {workdir} was started with another config: {'; '.join(changes[:5])}. Use another --workdir, or "
                     "--allow_config_change to go on with the new one.")
  recorded, versions = read_section(path, "versions"), _installed_versions()
  both = [name for name in FIXED if name in recorded and name in versions]
  others = [f"{name} was {recorded[name]} and is {versions[name]}" for name in both if recorded[name] != versions[name]]
  if others and not allow_version_change:
    raise ValueError(f"The run in {workdir} was trained with other packages: {'; '.join(others)}. Install those that it had, or "
                     "--allow_version_change to go on with these, which may compute other numbers.")
  moved = list(data_changes(cfg, tokenizer, read_section(path, "datasets"), identify_data(cfg))) if tokenizer else []
  if moved and not allow_data_change:
    raise ValueError(f"The data of the run in {workdir} are not what they were: {'; '.join(moved[:5])}. Put them back, write caches anew with "
                     "launch.cache_latents, use another --workdir, or --allow_data_change to go on with what is there and the run's own tokenizer.")
  return [*changes, *others, *moved]


def check_versions() -> None:
  """Whether all processes have the same packages.

  Raises:
    ValueError: this one has others than process 0.
  """
  mine = _installed_versions()
  first = json.loads(from_first("versions", json.dumps(mine)))
  others = [name for name in PACKAGES if mine.get(name) != first.get(name)]
  if others:
    each = ", ".join(f"{name} {mine.get(name, 'is missing')} ({first.get(name, 'missing')} there)" for name in others)
    raise ValueError(f"Process {jax.process_index()} has other packages than process 0: {each}. Install the same on all machines, such as those of "
                     "requirements.lock.")


def _installed_versions() -> dict[str, str]:
  """{package: version} of those of `PACKAGES` that are installed; libtpu where it computes, elsewhere it only rehearses."""
  found = {name: next(importlib.metadata.distributions(name=name), None) for name in PACKAGES}
  return {name: one.version for name, one in found.items() if one and (name != "libtpu" or jax.default_backend() == "tpu")}


def _other_lengths(old: Sequence[dict], new: Sequence[dict], workdir: Place) -> Iterator[str]:
  """Stages that are to become longer or shorter although a later one has begun: that would go on over other weights than it began with."""
  for number, (before, after) in enumerate(zip(old, new)):
    begun = [stage["name"] for stage in new[number + 1:] if (workdir / stage["name"] / "checkpoints").is_dir()]
    if before["num_steps"] != after["num_steps"] and begun:
      yield (f"config.stages[{number}].num_steps was {before['num_steps']} and is {after['num_steps']}, and stage {begun[0]} has begun with the "
             "weights that it had")


def _as_json(cfg: RunConfig) -> dict:
  return json.loads(json.dumps(plain(cfg)))


def load_run(workdir: str | Place, dtype: str | None = None, devices: Sequence[Any] | None = None) -> Run:
  """The run that was trained in a folder, with another compute type where `dtype` names one, and on these devices alone where some are given.

  Raises:
    ValueError: the folder holds no run, or its config cannot be understood.
  """
  path = find_place(workdir, "--workdir") / "config.json"
  if not path.is_file():
    raise ValueError(f"There is no run in {workdir}: {path} is missing. Give the --workdir of launch.train.")
  cfg = read_record(path)
  if dtype:
    cfg = dataclasses.replace(cfg, **{role: dataclasses.replace(getattr(cfg, role), dtype=dtype) for role in ("model", "encoder", "vae")})
  return Run(cfg, workdir, trained=True, devices=devices)
