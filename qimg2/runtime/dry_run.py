"""What a training would need and meet, found out before it begins: `launch.train --dry_run`.

Everything is looked at that costs seconds: sources of weights, data sets, which of their records the stages would use, latent caches, names and
shapes of published weights, how batches divide over the devices, whether a run that has begun has another config, data or versions, rights of a
folder or bucket, other runs whose weights are taken, and the disk space that checkpoints take. All that is wrong is found, not the first alone; only
a config that cannot be understood, and data without a tokenizer, hide the rest. No weight is read, nothing is compiled, no folder is made, and the
run's lock is not taken: where one is there, it takes up to half a minute to see whether its holder lives. What is not looked at: pictures, the bytes
of checkpoints, and whether a step fits the devices' memory, which `launch.rehearse` says.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax

from data_pipelines.kept import folder_of
from qimg2 import sharding
from qimg2.places import Place, check_rights, client_failures, find_place, is_remote
from qimg2.runtime.config import RunConfig, StageConfig, parse, plain
from qimg2.runtime.lock import check_free
from qimg2.runtime.micro_batches import variants
from qimg2.runtime.run import EMBEDDED, Run, check_versions, compare_config
from qimg2.training.checkpoint import is_done
from qimg2.training.state import abstract_state, make_optimizers
from qimg2.training.tracker import check_package


class _Plan(Run):
  """A run that makes nothing and checks nothing by itself. Its mesh is that of the devices that are there, where the config's does not fit them."""

  def _ensure_data(self, *stages: StageConfig) -> None:
    """Nothing: data that are not there are found by `_data`."""


class _Found:
  """What is to be said: `lines`, and `wrong`, a sentence each."""

  def __init__(self):
    self.lines: list[str] = []
    self.wrong: list[str] = []

  @contextlib.contextmanager
  def part(self) -> Iterator[None]:
    """A mistake that is found inside is written down."""
    try:
      with client_failures():
        yield
    except (ValueError, OSError) as error:
      sentence = " ".join(str(error).split())
      if sentence not in self.wrong:
        self.wrong.append(sentence)


def dry_run(cfg: Any, workdir: str | Place, allow_config_change: bool = False, allow_version_change: bool = False, allow_data_change: bool = False,
            tracker: str = "none") -> tuple[list[str], list[str]]:
  """(lines that sum up what would be trained, sentences that say what is wrong).

  Args: as `qimg2.runtime.curriculum.train`.

  Raises:
    ValueError: a config that cannot be understood.
  """
  cfg, workdir, found = parse(cfg), find_place(workdir, "--workdir"), _Found()
  with found.part():
    check_versions()
  with found.part():
    if tracker != "none":
      check_package()
  with found.part():
    sharding.make_mesh(plain(cfg.mesh))
  with found.part():
    if is_remote(workdir):
      check_rights(workdir)
  with found.part():
    if workdir.is_dir():
      check_free(workdir)
  with found.part():
    if cfg.order_dir not in ("default", "none") and (reason := _unwritable(pathlib.Path(folder_of(cfg.order_dir)))):
      raise ValueError(f"config.order_dir is {cfg.order_dir!r}, where nothing can be written, because {reason}: name a folder on a disk of this "
                       "machine, or \"none\".")
  missing = _missing_data(cfg, found)
  run = None
  with found.part():
    if missing and not (workdir / "tokenizer.json").is_file() and cfg.tokenizer == "default" and cfg.stages[0].mixture[0].name in missing:
      found.lines.append("The tokenizer comes with the data that are not there yet: stages are looked at when they are.")
    else:
      run = _Plan(dataclasses.replace(cfg, order_dir="none"), workdir, trained=True)
  if run is not None:
    for check in run.source_checks():
      with found.part():
        check()
    for stage in cfg.stages:
      _stage(run, stage, missing, found, allow_config_change)
    with found.part():
      if not missing:
        compare_config(cfg, workdir, allow_config_change, allow_version_change, run.tokenizer, allow_data_change)
    with found.part():
      _disk(run, workdir, found)
  return found.lines, found.wrong


def _missing_data(cfg: RunConfig, found: _Found) -> set[str]:
  """Names of data sets that are not there; those that are not embedded are written down."""
  names = sorted({part.name for stage in cfg.stages for part in stage.mixture})
  missing = {name for name in names if not (pathlib.Path(cfg.data_dir) / name).is_dir()}
  for name in sorted(missing):
    if name in EMBEDDED:
      found.lines.append(f"Data set {name} is not in {cfg.data_dir} yet: training makes it.")
    else:
      found.wrong.append(f"There is no data set {name!r} in {cfg.data_dir}: write it with launch.prepare_data, or set config.data_dir.")
  return missing


def _stage(run: Run, stage: StageConfig, missing: set[str], found: _Found, allow_change: bool) -> None:
  """Looks at a stage: its published weights, and its data where they are there."""
  if is_done(run.workdir / stage.name / "checkpoints", stage.num_steps, intact=False):
    found.lines.append(f"Stage {stage.name} is done.")
    return
  algorithm = run.algorithm(stage)
  for role in (*algorithm.trained, *algorithm.frozen):
    with found.part():
      run.check_published(stage, role)
  with found.part():
    run.check_others(stage, allow_change)
  if missing & {part.name for part in stage.mixture}:
    return
  with found.part():
    run.check_data(stage)
    loader = run.loader(stage)
    usage, sizes = loader.mixture.usage, sorted({bucket.batch_size for bucket in loader.buckets})
    parts = run.nets.shard.parts("batch")
    used, records = (sum(one[name] for one in usage) for name in ("used", "records"))
    found.lines.append(f"Stage {stage.name}: {stage.num_steps} steps of {stage.algorithm.name}; {used} of {records} records are used, in "
                       f"{len(loader.buckets)} buckets; {', '.join(map(str, sizes))} rows in a batch, "
                       f"over {parts} parts of the mesh.")
    for size in sizes:
      if size % parts:
        raise ValueError(f"Stage {stage.name}: {size} rows of a batch do not divide over the {parts} parts of the mesh that take rows: choose a "
                         "batch_size that is a multiple, or another mesh.")
      if not run.cfg.micro_batches and size % stage.optimizer.accumulate:
        raise ValueError(f"Stage {stage.name}: {size} rows of a batch cannot be divided into {stage.optimizer.accumulate} micro-batches: change "
                         "batch_size or optimizer.accumulate.")
    if algorithm.rollout is None:
      variants(run.cfg, stage, loader.buckets, run.nets)
    run.evaluation_batches(stage, loader)


def _disk(run: Run, workdir: Place, found: _Found) -> None:
  """Compares what the checkpoints of all stages take with the space that is free."""
  wanted, words = 0, []
  for stage in run.cfg.stages:
    algorithm, specs = run.algorithm(stage), run.role_specs(stage)
    optimizers = make_optimizers(algorithm, specs, stage.optimizer, stage.num_steps, stage.optimizers)
    each = sum(math.prod(x.shape) * (4 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize)
               for x in jax.tree.leaves(abstract_state(algorithm, optimizers, specs, run.mesh, run.rules)))
    most = math.ceil(stage.num_steps / stage.save_every_steps)
    for_good = stage.num_steps // stage.keep_every_steps if stage.keep_every_steps else 0
    by_time = stage.keep if stage.save_every_s else 0
    num = min(most + by_time, stage.keep + by_time + for_good + 1)  # one is written before another goes
    there = _bytes(workdir / stage.name / "checkpoints")
    wanted += max(0, num * each - there)
    words.append(f"{stage.name} {num} x {_size(each)}")
  found.lines.append(f"Checkpoints: {', '.join(words)}; {_size(wanted)} beside what is there.")
  if is_remote(workdir):
    return
  if reason := _unwritable(pathlib.Path(workdir)):
    raise ValueError(f"--workdir={workdir} cannot be written, because {reason}: name another folder, or change its rights.")
  free = shutil.disk_usage(_nearest(pathlib.Path(workdir))).free
  found.lines.append(f"The disk of {workdir} has {_size(free)} free.")
  if free < wanted:
    raise ValueError(f"Checkpoints take up to {_size(wanted)}, but the disk of {workdir} has {_size(free)} free: free some, name another --workdir, "
                     "or keep fewer (config.stages[i].keep, keep_every_steps).")


def _nearest(path: pathlib.Path) -> pathlib.Path:
  """The folder itself, or the one in which it would be made."""
  return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _unwritable(path: pathlib.Path) -> str:
  """Why nothing can be written to a folder of this machine, which may not be there yet; "" where it can."""
  place = _nearest(path)
  if not place.is_dir():
    return f"{place} is a file"
  return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} may not be written"


def _bytes(folder: Place) -> int:
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if not is_remote(folder) and folder.is_dir() else 0


def _size(num_bytes: float) -> str:
  return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
