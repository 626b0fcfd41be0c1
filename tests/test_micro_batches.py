"""Which policy and how many micro-batches each bucket's step has, in training, validation and rehearsal."""

import copy
import dataclasses
import types

import jax
import pytest

from configs import quickstart
from data_pipelines.buckets import Bucket
from qimg2.runtime import curriculum, micro_batches
from qimg2.runtime.config import parse
from qimg2.runtime.rehearsal.shapes import Choice
from qimg2.runtime.rehearsal.steps import Rehearsal
from qimg2.runtime.run import Run
from qimg2.training import faults
from qimg2.training import stage as stages


def config(*entries, **changes):
  cfg = quickstart.get_config("smoke")
  cfg.micro_batches = tuple(dict(remat=remat, tokens=tokens) for remat, tokens in entries)
  return dataclasses.replace(parse(cfg), **changes)


def bucket(px, batch_size=64, num_images=0, num_tokens=16):
  slots = num_images * (px // 32)**2  # in the prompt, where the images' latents will stand
  return Bucket("ti2i" if num_images else "t2i", px, px, ((px, px),) * num_images, num_tokens=num_tokens + slots, batch_size=batch_size)


@pytest.mark.parametrize("given, expected", [
    (bucket(64), ("dots", 4)),  # 32 tokens: three would fit, but only two or four divide the eight rows of a part
    (bucket(64, num_tokens=9), ("dots", 2)),  # 25 tokens, four at once
    (bucket(64, batch_size=8), ("dots", 1)),
    (bucket(64, num_images=1), ("dots", 4)),  # 48
    (bucket(128), ("dots", 8)),  # 80
    (bucket(128, num_images=2), ("attention", 8)),  # 208
    (bucket(64, num_images=5, num_tokens=8), ("attention", 4)),  # 104
    (bucket(256, num_images=1), ("attention", 8)),  # 528: longer than all
])
def test_a_bucket_takes_the_first_entry_with_room_and_as_many_rows_as_fit(given, expected):
  cfg = config(("dots", 100), ("attention", 210))
  assert micro_batches.choose(cfg, cfg.stages[-1], given, 8) == expected


def test_the_longest_of_the_rows_without_room_is_named(caplog):
  cfg = config(("dots", 100), ("attention", 210))
  nets = Rehearsal(cfg, jax.devices()).nets
  chosen = micro_batches.variants(cfg, cfg.stages[-1], (bucket(256), bucket(64), bucket(256, num_images=1)), nets)
  assert [(one.model.remat, num) for one, num in chosen] == [("attention", 8), ("dots", 4), ("attention", 8)]
  assert caplog.text.count("more than the 210") == 1 and "256x256 px with 1 condition images has 528 tokens" in caplog.text


def test_without_entries_and_for_other_networks_the_stage_says_it():
  cfg = config()
  stage = dataclasses.replace(cfg.stages[-1], optimizer=dataclasses.replace(cfg.stages[-1].optimizer, accumulate=3))
  assert micro_batches.choose(cfg, stage, bucket(64), 8) == (cfg.model.remat, 3)
  cfg = config(("dots", 100))
  assert cfg.stages[0].kind == "autoencoder" and micro_batches.choose(cfg, cfg.stages[0], bucket(64), 8) == (cfg.model.remat, 1)


@pytest.mark.parametrize("entries, message", [
    ([("dots", 100), ("attention", 50)], "config.micro_batches: give those of few tokens first"),
    ([("some", 100)], r"config.micro_batches\[0\].*remat is 'some': choose one of none, full, dots"),
    ([("dots", 0)], r"config.micro_batches\[0\].*tokens is 0: give at least 1"),
])
def test_mistakes(entries, message):
  with pytest.raises(ValueError, match=message):
    config(*entries)


def test_the_program_of_each_bucket_is_that_of_its_entry(monkeypatch):
  """The rehearsal, and so the trainer, compiles each bucket with its own policy and number of micro-batches, also for a step that is cut."""
  made = []
  monkeypatch.setattr(stages, "make_split_step", lambda algorithm, optimizers, nets, accumulate: made.append((nets.model.remat, accumulate)) or (
      lambda state, *_: (0, {}, state.params), lambda state, frozen, batch, sums: (sums, sums[0]), lambda state, sums: (state, {})))
  monkeypatch.setattr(stages, "make_step", lambda algorithm, optimizers, nets, accumulate: made.append((nets.model.remat, accumulate)) or (
      lambda state, frozen, batch: (state, {})))
  cfg = config(("full", 81), ("attention", 210))
  rehearsal = Rehearsal(cfg, jax.devices())
  squares = tuple(dataclasses.replace(cfg.stages[2].resolutions[0], base_px=px, batch_size=32, ratios=("1:1",)) for px in (32, 128, 160))
  stage = dataclasses.replace(cfg.stages[2], resolutions=squares)
  rows = [rehearsal.row(stage, one) for one in rehearsal.buckets(stage, Choice(tasks=("t2i",)))]
  assert made == [(row.remat, row.accumulate) for row in rows] == [("full", 2), ("attention", 2), ("attention", 4)]
  cut = dataclasses.replace(stage, faults=faults.Settings(stop_after="micro_batch"))
  rehearsal.row(cut, rehearsal.buckets(cut, Choice(tasks=("t2i",)))[2])
  assert made[3:] == [("attention", 4)]


def test_short_prompts_are_rehearsed_where_they_fill_a_micro_batch_more():
  cfg = config(("dots", 100), num_tokens=40, prompt_classes=(30, 4))
  rehearsal = Rehearsal(cfg, jax.devices())
  stage = dataclasses.replace(cfg.stages[1], resolutions=(dataclasses.replace(cfg.stages[1].resolutions[0], base_px=64, batch_size=64),))
  # 40 + 16 tokens, one at once; 30 + 16, two; 4 + 16, four of 20.
  assert [one.num_tokens for one in rehearsal.buckets(stage, Choice(tasks=("t2i",)))] == [40, 30]
  assert [one.num_tokens for one in Rehearsal(config(num_tokens=40, prompt_classes=(30, 4)), jax.devices()).buckets(stage)] == [40]


@pytest.mark.slow
def test_validation_has_as_many_rows_at_once_as_training(monkeypatch, tmp_path, smoke_config):
  made, loader = [], types.SimpleNamespace(mixture=types.SimpleNamespace(cells=(1,), merging=types.SimpleNamespace(left_out=0.0)))
  monkeypatch.setattr(Run, "_loader", lambda self, stage, *_, **__: made.append([one.batch_size for one in stage.resolutions]) or loader)
  cfg = copy.deepcopy(smoke_config)
  cfg.micro_batches = (dict(remat="full", tokens=80),)
  run = Run(cfg, tmp_path)
  stage = run.stages["high_resolution"]
  resolution = dataclasses.replace(stage.resolutions[0], base_px=64, batch_size=64)
  training = types.SimpleNamespace(mixture=types.SimpleNamespace(programs={}))
  run.evaluation_batches(dataclasses.replace(stage, resolutions=(resolution,)), training)
  assert made == [[8], [8]]  # 31 + 16 tokens, and more with an image: one row for each of eight devices
  made.clear()
  run.evaluation_batches(dataclasses.replace(stage, resolutions=(dataclasses.replace(resolution, base_px=32),)), training)
  assert made == [[16], [8]]  # 31 + 4 tokens, and 31 + 2 * 4 and a few words
  loader.mixture.cells, loader.mixture.usage = (), ({"records": 3, "left_out": {"too_long": 3}},)
  with pytest.raises(ValueError, match=r"high_resolution: of the 3 held-out records of the task t2i none can be used \(too_long\): hold out more"):
    run.evaluation_batches(stage, training)


@pytest.mark.slow
def test_training_has_them(monkeypatch, tmp_path, one_device, smoke_config):
  stages = []
  monkeypatch.setattr(curriculum, "train_stage", lambda stage, *arguments: stages.append(stage))
  monkeypatch.setattr(Run, "frozen_weights", lambda self, stage: {})
  monkeypatch.setattr(Run, "evaluation_batches", lambda self, *_: {})
  cfg = copy.deepcopy(smoke_config)
  cfg.micro_batches = (dict(remat="full", tokens=100),)
  cfg.stages[1].frozen.vae = "default"
  run = Run(cfg, tmp_path)
  curriculum.train_one(run, run.stages["low_resolution"])
  (nets, accumulate), = stages[0].variants
  assert nets.model.remat == "full" and accumulate == 4  # 31 + 4 tokens a row, eight rows


@pytest.mark.slow
def test_held_out_records_that_fit_no_bucket_of_training_have_their_own(monkeypatch, tmp_path, smoke_config):
  asked = []
  def loader(self, stage, *_, **buckets):
    asked.append(sorted(buckets))
    cells = () if "programs" in buckets else (1,)
    usage = ({"left_out": {"rare": 5}},)
    return types.SimpleNamespace(mixture=types.SimpleNamespace(cells=cells, usage=usage, merging=types.SimpleNamespace(left_out=0.0)))
  monkeypatch.setattr(Run, "_loader", loader)
  run = Run(smoke_config, tmp_path, trained=True)
  run.evaluation_batches(run.stages["low_resolution"], types.SimpleNamespace(mixture=types.SimpleNamespace(programs={})))
  assert asked == [["programs"], ["max_programs"]]
