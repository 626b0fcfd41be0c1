"""A LoRA on a run of launch.train, as configs/lora.py makes it: trained, drawn, exported, and drawn from its file."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from configs import base, lora
from qimg2 import adapters
from qimg2.runtime.config import parse
from qimg2.runtime.curriculum import train
from qimg2.runtime.exporting import export
from qimg2.runtime.methods import stage_algorithm
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.rehearsal.drawing import Drawer
from qimg2.runtime.run import load_run
from qimg2.runtime.sampling import Request, sample
from qimg2.training.metrics import read_rows


def two_steps(cfg, data_dir):
  """The run at two steps, on a data set that is there."""
  cfg.data_dir = data_dir
  own = cfg.stages[0]
  own.num_steps = own.eval_every_steps = own.sample_every_steps = own.save_every_steps = 2
  own.log_every_steps, own.evaluation.num_samples, own.resolutions[0].ratios = 1, 16, own.resolutions[0].ratios[:1]
  own.optimizer.learning_rate, own.adapter.targets = 0.1, "*"  # two steps have not opened the gates of the blocks
  cfg.sampling.num_images = 2
  return cfg


def draw(drawer):
  opened = drawer.open(jax.devices()[:1])
  return sample(opened.source, opened.load, Request(("a red K",), num_steps=2, guidance=1.0), opened.defaults)[0]


@pytest.mark.slow
def test_a_lora_of_a_run_is_trained_and_draws_the_same_from_its_file(smoke_run, smoke_config, tmp_path, one_device):
  theirs = smoke_run.workdir
  cfg = two_steps(lora.get_config(f"glyphs:run:{theirs}"), smoke_config.data_dir)
  assert cfg.stages[0].start_from == f"{theirs}/sft:ema" and cfg.stages[0].frozen.vae == f"{theirs}/vae"
  run = train(cfg, tmp_path / "lora")
  rows = [row for row in read_rows(run.workdir / "lora" / "metrics.jsonl") if "loss" in row]
  assert len(rows) == 2 and all(np.isfinite(value) for row in rows for value in row.values())
  items = {path.name for path in (run.workdir / "lora" / "checkpoints" / "2").iterdir()}
  assert {"params.adapter", "average.ema"} <= items and "params.model" not in items
  assert (run.workdir / "lora" / "samples" / "00000002.png").is_file()
  meta = json.loads((run.workdir / "lora" / "checkpoints" / "2" / "meta" / "metadata").read_text(encoding="utf-8"))
  assert meta["stage"]["frozen_steps"]["model"] == [f"{theirs}/sft", 2] and meta["stage"]["adapter"]["rank"] == 32

  file = export(run, tmp_path / "x.safetensors", dtype="float32", lora=True)
  drawn, plain = draw(Drawer(workdir=str(run.workdir))), draw(Drawer(workdir=str(theirs)))
  assert np.abs(drawn - plain).max() > 1e-3
  np.testing.assert_allclose(draw(Drawer(workdir=str(theirs), loras=(str(file),))), drawn, atol=1e-4)
  folder = export(run, tmp_path / "folder", dtype="float32")
  written = Pretrained(folder, devices=jax.devices()[:1]).load()["mmdit"]
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), written, adapters.merge(run.deployed_weights("lora")["mmdit"]))
  assert "flow_matching, LoRA of rank 32" in (folder / "README.md").read_text(encoding="utf-8")
  with pytest.raises(ValueError, match="'sft' trained all weights of its generator, not an adapter"):
    export(load_run(theirs), tmp_path / "y.safetensors", lora=True)


def test_pairs_are_learned_from_by_preference(tmp_path):
  cfg = parse(lora.get_config("dpo@smoke"))
  stage, = cfg.stages
  method = stage_algorithm(stage, cfg.schedule)
  assert method.pairs and method.switched_off == ("ref",) and method.trained == ("adapter",)
  for arg in ("dpo@", "dpo@:run:x", "dpo@a+b:diffusers:x"):
    with pytest.raises(ValueError, match=f"lora.py:{re.escape(arg)} is not understood: say .*, dpo@NAME for pairs, or smoke"):
      lora.get_config(arg)
  with pytest.raises(ValueError, match=f"There is no run in {tmp_path}: name the --workdir of a launch.train that trained a generator"):
    lora.get_config(f"mine:run:{tmp_path}")


def test_the_config_follows_its_argument(smoke_run):
  cfg = parse(lora.get_config("mine+class:v5p-4-512"))
  stage, = cfg.stages
  assert [(part.name, part.loss_weight) for part in stage.mixture] == [("mine", 1.0), ("class", lora.PRIOR_WEIGHT)]
  assert (cfg.mesh.fsdp, stage.resolutions[0].base_px) == (4, 512)
  assert stage.adapter == adapters.Settings(32, 32.0, "blocks/*") and stage.frozen == {"encoder": "default", "vae": "default"}
  assert parse(lora.get_config("smoke")).stages[0].num_steps == 2
  for arg in ("mine", "", "mine:v7-1:diffusers:DIR", "mine:somewhere"):
    with pytest.raises(ValueError, match=f"configs/lora.py:{arg} is not understood: say NAME:diffusers:DIR or NAME:run:RUN, with one of v6e-1-512"):
      lora.get_config(arg)
  own = parse(lora.get_config(f"mine:run:{smoke_run.workdir}"))
  record = smoke_run.cfg
  assert (own.model, own.encoder, own.vae, own.schedule) == (record.model, record.encoder, record.vae, record.schedule)
  assert own.tokenizer == f"{smoke_run.workdir}/tokenizer.json" and pathlib.Path(own.stages[0].frozen["encoder"]).is_dir()


@pytest.mark.parametrize("changed, message", [
    (dict(adapter=dict(rank=2, targets="blocks/atn/*")), r"stages\[lora\]: adapter.targets names 'blocks/atn/\*'.*did you mean"),
    (dict(adapter=dict(rank=-1)), r"stages\[lora\].adapter.rank is -1"), (dict(adapter=dict(rnk=1)), "has no key 'rnk': did you mean 'rank'"),
    (dict(frozen=dict(encoder="default", vae="default", model="stage:x")), "has no key 'model'")])
def test_what_a_stage_cannot_adapt_is_named(changed, message):
  cfg = lora.get_config("smoke")
  with pytest.raises(ValueError, match=message):
    for name, value in changed.items():
      if name == "frozen":
        cfg.stages[0].frozen = base.ConfigDict(value)
      else:
        cfg.stages[0][name] = base.ConfigDict(cfg.stages[0][name].to_dict() | value)
    parse(cfg)


def test_an_adapter_of_random_weights_is_refused():
  cfg = lora.get_config("smoke")
  cfg.random_frozen = False
  with pytest.raises(ValueError, match=r"stages\[lora\].start_from is 'scratch', but an adapter needs weights that it adapts"):
    parse(cfg)
