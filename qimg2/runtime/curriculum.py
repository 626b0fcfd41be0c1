"""Trains the stages of a config, one after the other, and goes on where an earlier call was stopped. See `launch.train`."""

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from data_pipelines.specs import DatasetSpec, Resolution
from qimg2.places import Place, find_place
from qimg2.runtime import left_out, processes, report
from qimg2.runtime.config import RunConfig, StageConfig, parse, plain
from qimg2.runtime.config.rewards import declare
from qimg2.runtime.evaluating.of_run import describe, evaluation, last_generator, recorded_evaluation, suites_hook
from qimg2.runtime.generator import Size
from qimg2.runtime.idle import idle_roles, take_off
from qimg2.runtime.kept_data import identify_data
from qimg2.runtime.lock import hold
from qimg2.runtime.micro_batches import variants
from qimg2.runtime.rewards import RewardedLoader
from qimg2.runtime.run import HeldOut, Run, check_versions, save_config
from qimg2.runtime.sheets import grid, save_picture
from qimg2.sharding import to_host
from qimg2.training import faults
from qimg2.training.changes import ORDER
from qimg2.training.checkpoint import is_done, newest_step
from qimg2.training.metrics import MetricsWriter
from qimg2.training.stage import Stage
from qimg2.training.state import make_optimizers
from qimg2.training.tracker import Tracker, check_package, tracking
from qimg2.training.trainer import train_stage
from qimg2.training.validation import Evaluator
from qimg2.training.watch import Ended

LATER = ("multiple", "ratio_weights", "max_enlarge", "alpha",  # keys of resolutions and data sets that the first checkpoints did not have
         "shuffle_tags", "drop_tags", "keep_tags", "tag_separator", "loss_weight", "ignore_rejected")
PREFIXES = {"t2i": "", "ti2i": "ti2i/"}  # of metrics, per task


def train(cfg: Any, workdir: str | Place, allow_config_change: bool = False,
          profile: tuple[int, int] | None = None, allow_version_change: bool = False, allow_data_change: bool = False,
          tracker: str = "none") -> Run:
  """Trains every stage that is not finished, writes the report, evaluates the last stage on the config's suites unless that was done before, and
  returns the run.

  Args: a `RunConfig`, or what a config file returns; folder of the run; whether a changed config is taken; first and last step of each
  stage to trace; whether packages of other versions than the run's are taken; whether data sets are that are not what the run began with; what tracks
  the run beside TensorBoard, one of `qimg2.training.tracker.TRACKERS`.

  Raises:
    qimg2.training.faults.Preempted: SIGTERM or SIGINT came; what is trained is saved, and the same call goes on with it.
    qimg2.training.watch.Ended: a rule of a stage's watch ended it; the same call ends there again.
  """
  cfg, workdir, began = parse(cfg), find_place(workdir, "--workdir"), time.monotonic()
  check_versions()
  if tracker != "none":
    check_package()
  processes.agree("config", json.dumps(plain(cfg), sort_keys=True))
  with contextlib.ExitStack() as locked:
    with faults.PreemptionNotice() as stop:
      run = Run(cfg, workdir)
      locked.enter_context(hold(workdir))
      processes.agree("data", json.dumps(identify_data(cfg)))
      save_config(cfg, workdir, allow_config_change, allow_version_change, run.tokenizer, allow_data_change)
      tracked = locked.enter_context(tracking(tracker if processes.is_first() else "none", workdir, plain(cfg)))
      left = unfinished(run)
      for stage in cfg.stages:
        if stage.name not in left:
          continue  # its data and weights, which may take minutes to read, are not needed any more
        try:
          train_one(run, stage, stop, began, profile, allow_config_change, tracked)
        except Ended:
          if processes.is_first():
            report.write_report(run)  # which says why
          raise
        gc.collect()  # or what only its own cycles hold of this stage would share the devices with the next one
        if processes.is_first():
          report.write_report(run)
        began = time.monotonic()
    result = evaluation(run) if cfg.evals else None
    if processes.is_first():
      if result:
        print(describe(result))
      report.write_report(run)
  return run


def unfinished(run: Run) -> set[str]:
  """Names of the stages that have something to train.

  A stage is finished when it has a checkpoint of its last step. One whose weights are read now, because a later stage begins with them, needs them
  frozen, or is to be evaluated, must be intact too, or it trains again from the checkpoint before. Of any other nothing but its folder is looked at.
  """
  def find(read: set[str]) -> set[str]:
    left = set()
    for stage in reversed(run.cfg.stages):  # a stage reads earlier ones alone
      if not is_done(run.workdir / stage.name / "checkpoints", stage.num_steps, intact=stage.name in read):
        left.add(stage.name)
        read = read | run.read_stages(stage)
    return left

  evaluated = last_generator(run) if run.cfg.evals else ""
  if not evaluated:
    return find(set())
  left = find(set()) if recorded_evaluation(run) is not None else {evaluated}
  # Where any stage trains, what was evaluated is no longer that of this run.
  return find({evaluated, *run.read_stages(run.stages[evaluated])}) if left else left


def train_one(run: Run, config: StageConfig, stop: Callable[[int | None], bool] = lambda step: False, began: float | None = None,
              profile: tuple[int, int] | None = None, allow_config_change: bool = False,
              tracker: Tracker | None = None) -> None:
  """Trains one stage; one that is done is read and left as it is, see `unfinished`.

  `stop` and `began` are as for `qimg2.training.trainer.train_stage`, `profile` and `allow_config_change` as for `train`, `tracker` as for `Stage`.
  """
  _forget_evaluations(run, config.name)
  outside = run.read_outside(config)  # before it is read, so that a step which is saved meanwhile is noticed, not missed
  without_places = [{what: held for what, (_, held) in some.items()} for some in outside.values()]  # a machine may keep them elsewhere
  processes.agree(f"weights and rewards of stage {config.name}", json.dumps(without_places))
  algorithm = run.algorithm(config)
  loader, specs = run.loader(config), run.role_specs(config)
  processes.agree("order of batches", loader.mixture.digest)
  frozen, deployed = take_off(run.frozen_weights(config), idle_roles(config, algorithm, loader.buckets), algorithm.deployed)
  batches = run.evaluation_batches(config, loader)
  hooks = [(config.eval_every_steps, evaluation_hook(run, config, batches))] if algorithm.validation else []
  if config.kind in DRAWERS:
    hooks += [(config.sample_every_steps, picture_hook(run, config, task, some, deployed)) for task, some in batches.items()]
  if config.kind == "generator" and config.evals_every_steps and run.cfg.evals:
    hooks.append((config.evals_every_steps, suites_hook(run, config, deployed)))
  stage = Stage(
      config.name, algorithm, make_optimizers(algorithm, specs, config.optimizer, config.num_steps, config.optimizers), specs, config.num_steps,
      run.batch_shapes(config, loader), tuple(hooks), config.optimizer.accumulate, config.log_every_steps, config.save_every_steps, config.keep,
      config.faults, {**description(run.cfg, config), **outside, "batches": loader.mixture.digest}, profile,
      variants(run.cfg, config, loader.buckets, run.nets) if algorithm.rollout is None else (), config.save_every_s,
      (lambda start: loader.mixture.first_needed(start, config.num_steps)) if run.cfg.compile == "background" else None,
      (run.cfg.local_copies.folder, run.cfg.local_copies.every_s), config.keep_every_steps, tracker, config.watch, allow_config_change)
  if processes.is_first():
    report.save_counts(run, config, loader)
    left_out.say(config, loader, run.workdir / config.name)
  fed = RewardedLoader(loader, declare(config.rewards), run.judge(config)) if config.rewards else loader
  with run.scoring(config):
    train_stage(stage, run.nets, fed, run.mesh, run.rules, run.workdir, run.key(config.name), lambda: run.start_weights(config), frozen,
                lambda: next(iter(batches.values())), stop, began)


def _forget_evaluations(run: Run, name: str) -> None:
  """Removes the results of weights that are about to change: the run's, and those of steps of a stage that it comes to again; called by all
  processes."""
  begin = newest_step(run.workdir / name / "checkpoints") or 0  # which all processes ask together
  if not processes.is_first():
    return
  (run.workdir / "evaluation.json").unlink(missing_ok=True)
  for path in list((run.workdir / name).glob("evaluation_*")):
    step = path.stem.removeprefix("evaluation_")
    if step.isdecimal() and int(step) > begin and path.is_file():
      path.unlink()


def description(cfg: RunConfig, config: StageConfig) -> dict[str, Any]:
  """What checkpoints say of a stage. Keys of resolutions and data sets that older ones did not have are left out at their default, so that a stage
  that goes on from one is not told that its data changed."""
  later = {field.name: field.default for cls in (Resolution, DatasetSpec) for field in dataclasses.fields(cls) if field.name in LATER}
  data = {name: [{key: value for key, value in plain(one).items() if key not in later or value != later[key]} for one in getattr(config, name)]
          for name in ("resolutions", "mixture")}
  run = {"order": ORDER, "seed": cfg.seed, "num_tokens": cfg.num_tokens, "prompt_classes": cfg.prompt_classes}
  return {**run, **plain(config), **data}


def evaluation_hook(run: Run, config: StageConfig, batches: dict[str, HeldOut]):
  """A hook that logs the validation metrics of the weights and of each average; those of editing have the prefix "ti2i/"."""
  algorithm = run.algorithm(config)
  evaluators = {PREFIXES[task]: Evaluator(algorithm, run.nets, some) for task, some in batches.items()}

  def hook(weights: dict, step: int, writer: MetricsWriter) -> dict[str, float]:
    del step, writer
    scalars = {}
    for prefix, evaluator in evaluators.items():
      scalars |= {f"{prefix}{key}": value for key, value in evaluator(weights).items()}
      for name, average in algorithm.averages.items():
        scalars |= {f"{prefix}{name}/{key}": value for key, value in evaluator({**weights, average.role: weights[name]}).items()}
    return scalars
  return hook


def picture_hook(run: Run, config: StageConfig, task: str, batches: HeldOut, deployed: Callable[[dict], Mapping]):
  """A hook that draws held-out samples, with what `deployed` gives, beside what they should be: reconstructions, pictures for the prompts, or edits
  after their sources.

  Where a latent cache holds no pixels, they are decoded from its latents.
  """
  batch = next(iter(batches))
  first, cached = to_host(batch), "latents" in batch
  num = min(run.cfg.sampling.num_images, int(first["weight"].sum()))  # not those that only fill the batch
  decode = jax.jit(lambda weights, latents: run.nets.decode(weights, latents.astype(jnp.float32)))
  factor = run.nets.vae.spatial_factor if cached else 1
  shapes = [[side * factor for side in rows.shape[1:3]]
            for rows in ((first["latents"], *first["source_latents"]) if cached else (first["target"], *first["sources"]))]

  def pictures(weights: dict) -> tuple[np.ndarray, list[np.ndarray]]:
    """(targets, condition images), the first rows of each."""
    some = lambda latents: to_host(decode(weights["vae"], latents))[:num]
    target = some(batch["latents"]) if cached else first["target"][:num]
    unseen = cached and not first["sources"]
    return target, list(map(some, batch["source_latents"])) if unseen else [source[:num] for source in first["sources"]]

  draw, captions = DRAWERS[config.kind](run, batch, first, shapes, num)

  def hook(weights: dict, step: int, writer: MetricsWriter) -> dict[str, float]:
    weights = deployed(weights)
    targets, sources = pictures(weights)
    rows = [image for row in zip(*sources, draw(weights, sources), targets) for image in row]
    per_row = len(sources) + 2
    sheet = grid(rows, max(1, 8 // per_row) * per_row, captions, scale=max(1, 96 // targets.shape[1]))
    if processes.is_first():
      name = f"{step:08d}.png" if task == "t2i" else f"{step:08d}_{task}.png"
      save_picture(sheet, run.workdir / config.name / "samples" / name)
      writer.write_image(step, f"{PREFIXES[task]}samples", sheet)
    return {}
  return hook


def _draw_reconstructions(run: Run, batch: dict, first: dict, shapes: list, num: int) -> tuple[Callable, Sequence[str]]:
  """(function of deployed weights and condition images that gives pictures, captions) of a VAE: what becomes of the targets."""
  del first, shapes
  rebuild = jax.jit(lambda weights, pixels: run.nets.decode(weights, run.nets.encode(weights, pixels)))
  return lambda weights, _: to_host(rebuild(weights["vae"], batch["target"]))[:num], ()


def _draw_samples(run: Run, batch: dict, first: dict, shapes: list, num: int) -> tuple[Callable, Sequence[str]]:
  """(function of deployed weights and condition images that gives pictures, captions) of a generator: what it draws for the prompts."""
  del batch
  prompts = [run.tokenizer.decode_prompt(tokens) for tokens in first["tokens"][:num]]
  size = Size(*shapes[0], first["tokens"].shape[1], tuple(map(tuple, shapes[1:])), num)
  generator = run.generator(size)
  captions = [caption for prompt in prompts for caption in ("(source)",) * len(shapes[1:]) + (prompt, "(as rendered)")]

  def draw(weights: dict, sources: list[np.ndarray]) -> np.ndarray:
    _, pictures, wrong = generator.draw_each(weights, prompts, images=sources)
    if any(wrong):
      logging.warning("%d of %d samples are no pictures: %s.", sum(map(bool, wrong)), num, next(filter(None, wrong)))
    return pictures
  return draw, captions


DRAWERS = {"autoencoder": _draw_reconstructions, "generator": _draw_samples}  # kinds of stages that have sheets of pictures
