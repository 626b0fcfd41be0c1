"""Records of runs: the config in config.json, as it is written now and as earlier programs wrote it."""

import copy
import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from configs import quickstart
from data_pipelines import embedded
from data_pipelines.identity import identify
from data_pipelines.records import checksum
from data_pipelines.specs import Resolution
from data_pipelines.tokenizer import PromptTokenizer
from qimg2.runtime import curriculum
from qimg2.runtime import run as run_module
from qimg2.runtime.config import parse, plain
from qimg2.runtime.config.records import FORMAT, read_record
from qimg2.runtime.kept_data import data_changes, run_tokenizer
from qimg2.runtime.run import FREE, load_run, save_config
from qimg2.training.changes import ORDER_KEYS


def old_stage(name, start_from, frozen, algorithm):
  """A stage as the first format wrote it, without the keys that came later."""
  return {
      "algorithm": algorithm, "caption_dropout": 0.1, "eval_every_steps": 2, "evaluation": {"num_samples": 64, "split": "validation"},
      "faults": {"max_skipped": 10, "on_save_error": "stop", "spike_factor": 10.0}, "frozen": frozen, "keep": 2, "log_every_steps": 1,
      "max_crop": 0.2, "max_faulty": 0.01, "min_bucket_records": 0,
      "mixture": [{"caption_weights": {}, "languages": [], "min_quality": 0.0, "min_stage": 0, "name": "glyphs", "split": "train", "task": "t2i",
                   "weight": 1.0}],
      "name": name, "num_steps": 2,
      "optimizer": {"accumulate": 1, "b1": 0.9, "b2": 0.95, "clip_norm": 1.0, "final_ratio": 0.02, "learning_rate": 0.002, "mu_dtype": "float32",
                    "schedule": "cosine", "warmup_steps": 20, "weight_decay": 0.001},
      "resolutions": [{"base_px": 32, "batch_size": 8, "ratios": ["1:1"], "weight": 1.0}],
      "sample_every_steps": 2, "save_every_steps": 1, "start_from": start_from}


FLOW = {"ema_decay": 0.99, "name": "flow_matching"}
OLD = {"config": {
    "check": {"name": "", "num_candidates": 0, "num_prompts": 8}, "data_dir": "runs/data_smoke",
    "encoder": {"attention_backend": "auto", "dtype": "float32", "head_dim": 16, "image_token_id": 6, "mlp_width": 64, "mrope_sections": [4, 2, 2],
                "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "tie_embeddings": False,
                "vision": {"deepstack_layers": [0], "mlp_width": 64, "num_heads": 2, "num_layers": 2, "num_positions": 64, "out_width": 32,
                           "width": 32}, "vocab_size": 1024, "width": 32},
    "mesh": {"context": 1, "data": 1, "fsdp": -1, "tensor": 1},
    "model": {"attention": "block_causal", "attention_backend": "auto", "condition_time": "zero", "context_width": 32, "dtype": "float32",
              "head_dim": 8, "latent_channels": 8, "mlp_ratio": 3, "num_heads": 4, "num_layers": 2, "remat": "none", "rope_dims": [4, 2, 2],
              "width": 32},
    "num_tokens": 31, "num_workers": 0, "prepare": {"num_examples": 4800, "seed": 0}, "prompt_classes": [], "rules": "fsdp_tensor",
    "sampling": {"guidance": 3.0, "num_images": 8, "num_steps": 2, "sigmas": []},
    "schedule": {"density": "logit_normal", "shift": "resolution", "terminal": 0.02}, "seed": 0,
    "stages": [
        old_stage("vae", "", {}, {"ema_decay": 0.0, "l1_weight": 0.1, "l2_weight": 1.0, "name": "reconstruction"}),
        old_stage("low_resolution", "", {"encoder": "", "vae": "vae"}, FLOW),
        old_stage("high_resolution", "low_resolution:ema", {"encoder": "/else/frozen/encoder", "vae": "vae"}, FLOW),
        old_stage("sft", "diffusers:/published", {"encoder": "", "vae": ""}, FLOW)],
    "tokenizer": "",
    "vae": {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 2, 4, 8, 8], "dtype": "float32", "image_channels": 4, "latent_channels": 8,
            "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8, "num_res_blocks": 1}},
    "versions": {"jax": "0.10.2"}, "device_kind": "cpu", "num_devices": 1}


def written(folder, record):
  path = folder / "config.json"
  path.write_text(record if isinstance(record, str) else json.dumps(record))
  return path


def test_a_record_of_the_first_format_is_translated(tmp_path):
  cfg = read_record(written(tmp_path, OLD))
  assert (cfg.tokenizer, cfg.evals, cfg.seed, cfg.num_tokens) == ("default", {}, 0, 31)
  assert [stage.start_from for stage in cfg.stages] == ["scratch", "scratch", "stage:low_resolution:ema", "diffusers:/published"]
  assert [stage.frozen for stage in cfg.stages] == [{}, {"encoder": "default", "vae": "stage:vae"},
                                                    {"encoder": "/else/frozen/encoder", "vae": "stage:vae"}, {"encoder": "default", "vae": "default"}]
  assert cfg.stages[0].algorithm.settings == {"l1_weight": 0.1, "l2_weight": 1.0, "kl_weight": 0.0, "ema_decay": 0.0}
  assert cfg.stages[0].optimizer.eps == 1e-8 and cfg.stages[0].resolutions == (Resolution(32, 8, ("1:1",)),)


@pytest.mark.parametrize("check, evals", [
    ({"name": "none", "num_prompts": 0, "num_candidates": 0}, {}),
    ({"name": "glyphs", "num_prompts": 200, "num_candidates": 0}, {"glyphs": {"num_prompts": 200}, "glyph_edits": {"num_prompts": 100}}),
    ({"name": "emoji", "num_prompts": 90, "num_candidates": 100},
     {"emoji": {"num_prompts": 90, "num_candidates": 100}, "emoji_edits": {"num_prompts": 90}})])
def test_a_check_of_the_second_format_is_the_suites_that_it_drew(check, evals, tmp_path):
  config = json.loads(json.dumps(plain(parse(quickstart.get_config("smoke")))))
  del config["evals"]
  assert read_record(written(tmp_path, {"config": config | {"check": check}, "format": 2})).evals == evals


def test_an_old_run_goes_on_under_a_record_of_today(tmp_path):
  cfg = read_record(written(tmp_path, OLD))
  save_config(cfg, tmp_path)
  record = json.loads((tmp_path / "config.json").read_text())
  assert record["format"] == FORMAT == 5 and record["config"]["stages"][2]["start_from"] == "stage:low_resolution:ema"
  assert read_record(tmp_path / "config.json") == cfg and {stage.max_programs for stage in cfg.stages} == {0}, "as many buckets as before"
  save_config(dataclasses.replace(cfg, stages=tuple(dataclasses.replace(stage, max_programs=64) for stage in cfg.stages)), tmp_path)
  with pytest.raises(ValueError, match=r"was started with another config: config.stages\[2\].start_from was 'stage:low_resolution:ema' and is 'scr"):
    stages = (*cfg.stages[:2], dataclasses.replace(cfg.stages[2], start_from="scratch"), cfg.stages[3])
    save_config(dataclasses.replace(cfg, stages=stages), tmp_path)


def test_a_run_of_the_fourth_format_summed_gradients_as_its_networks_compute(tmp_path):
  cfg = parse(quickstart.get_config("smoke"))
  config = json.loads(json.dumps(plain(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype="bfloat16")))))
  for stage in config["stages"]:
    del stage["optimizer"]["gradient_dtype"]
  read = lambda version: [stage.optimizer.gradient_dtype for stage in read_record(written(tmp_path, {"config": config, "format": version})).stages]
  assert read(4) == ["float32", "bfloat16", "bfloat16", "bfloat16"] and read(5) == ["float32"] * 4  # the first is the VAE's


def test_a_run_of_the_fourth_format_may_have_drawn_its_frozen_networks(tmp_path):
  cfg = dataclasses.replace(parse(quickstart.get_config("smoke")), random_frozen=False)
  config = json.loads(json.dumps(plain(cfg)))
  del config["random_frozen"], config["compile"]
  assert read_record(written(tmp_path, {"config": config, "format": 4})).random_frozen is True
  save_config(cfg, tmp_path)  # one that names them now goes on


def test_an_allowed_change_of_the_config_is_printed(tmp_path, capsys):
  def config(weight, num_steps):
    cfg = quickstart.get_config("smoke")
    cfg.stages[0].mixture[0].weight, cfg.stages[0].num_steps = weight, num_steps
    return parse(cfg)
  save_config(config(0.65, 1), tmp_path)
  save_config(config(0.65, 2), tmp_path)  # may change
  with pytest.raises(ValueError, match="weight was 0.65 and is 0.8. Use another --workdir"):
    save_config(config(0.8, 2), tmp_path)
  assert capsys.readouterr().err == ""
  save_config(config(0.8, 2), tmp_path, allow_change=True)
  assert capsys.readouterr().err == "config.stages[0].mixture[0].weight was 0.65 and is 0.8\n"
  save_config(config(0.8, 2), tmp_path, allow_change=True)
  assert capsys.readouterr().err == ""


def test_other_versions_are_refused_or_said_and_recorded(tmp_path, capsys, monkeypatch):
  """Of packages that the record has, too; libtpu need not be installed."""
  cfg, path, versions = parse(quickstart.get_config("smoke")), tmp_path / "config.json", {"jax": "1", "libtpu": "1", "grain": "1", "optax": "1"}
  monkeypatch.setattr(run_module, "_installed_versions", lambda: versions)
  record = lambda: json.loads(path.read_text())["versions"]
  save_config(cfg, tmp_path)
  versions = {"jax": "2", "jaxlib": "2", "grain": "2", "optax": "2"}
  begun = path.read_bytes()
  with pytest.raises(ValueError, match="trained with other packages: jax was 1 and is 2; grain was 1 and is 2. Install .* or --allow_version_change"):
    save_config(cfg, tmp_path, allow_change=True)
  assert path.read_bytes() == begun and capsys.readouterr().err == ""
  save_config(cfg, tmp_path, allow_version_change=True)
  assert capsys.readouterr().err == "jax was 1 and is 2\ngrain was 1 and is 2\n" and record() == versions | {"libtpu": "1"}
  versions = versions | {"libtpu": "2"}
  with pytest.raises(ValueError, match="packages: libtpu was 1 and is 2. Install"):  # which another machine did not have
    save_config(cfg, tmp_path)
  path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "versions"}))
  save_config(cfg, tmp_path)
  assert record() == versions


def test_processes_with_other_packages_than_the_first_are_refused(monkeypatch):
  mine = {"jax": "1", "optax": "1", "flax": "1"}
  monkeypatch.setattr(run_module, "_installed_versions", lambda: mine)
  run_module.check_versions()
  monkeypatch.setattr(run_module, "from_first", lambda what, text: json.dumps(mine | {"optax": "2", "grain": "3"}))
  with pytest.raises(ValueError, match=r"has other packages than process 0: optax 1 \(2 there\), grain is missing \(3 there\)\. Install"):
    run_module.check_versions()


def test_versions_are_those_that_are_installed(monkeypatch):
  found = run_module._installed_versions()
  assert "libtpu" not in found  # it is here for rehearsals alone
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  found = run_module._installed_versions()
  assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__ and set(run_module.FIXED) - set(found) <= {"libtpu"}
  assert set(run_module.FIXED) < set(run_module.PACKAGES)


@pytest.mark.parametrize("place, free", [
    ("num_workers", True), ("random_frozen", True), ("sampling.num_steps", True), ("mesh.fsdp", True), ("micro_batches", False),
    ("local_copies.folder", True), ("order_dir", True),
    ("stages[1].num_steps", True),
    ("stages[1].keep", True), ("stages[1].faults.max_skipped", True), ("evals.glyphs.num", True), ("stages[1].algorithm.num_steps", False),
    ("stages[1].optimizer.faults", False), ("model.num_layers", False), ("stages[1].resolutions[0].keep", False), ("seed", False),
])
def test_what_may_change_is_a_place_and_not_a_name(place, free):
  """A setting of a method that is called as a free key is not free."""
  parts = f"config.{place}".split(".")
  assert any(FREE(".".join(parts[:end])) for end in range(1, len(parts) + 1)) == free


def test_a_stage_that_another_builds_on_keeps_its_length(tmp_path):
  """Else the later one would go on, or draw, with weights that it never saw."""
  def config(number, num_steps):
    cfg = quickstart.get_config("smoke")
    cfg.stages[number].num_steps = num_steps
    return parse(cfg)
  save_config(config(0, 2), tmp_path)
  save_config(config(0, 3), tmp_path)
  (tmp_path / "low_resolution" / "checkpoints").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"config.stages\[0\].num_steps was 3 and is 4, and stage low_resolution has begun with the weights that"):
    save_config(config(0, 4), tmp_path)
  cfg = config(0, 3)
  save_config(dataclasses.replace(cfg, stages=(cfg.stages[0], dataclasses.replace(cfg.stages[1], num_steps=9), *cfg.stages[2:])), tmp_path)


def test_a_checkpoint_of_an_old_run_is_not_told_that_its_data_changed(tmp_path):
  cfg = read_record(written(tmp_path, OLD))
  for now, old in zip(cfg.stages, OLD["config"]["stages"]):
    said = json.loads(json.dumps(curriculum.description(cfg, now)))
    before = {"seed": 0, "num_tokens": 31, "prompt_classes": []} | old
    keys = set(ORDER_KEYS) - {"order", "max_programs", "batches"}  # it is told, in one line, that its batches come in another order
    assert {key: said[key] for key in keys} == {key: before[key] for key in keys} and said["order"] == 2 and "max_programs" not in old


def spoiled(*path, value):
  """The old record with another value at a path of keys of its config; None takes the key out."""
  record = copy.deepcopy(OLD)
  section = record["config"]
  for key in path[:-1]:
    section = section[key]
  section[path[-1]] = value
  if value is None:
    del section[path[-1]]
  return record


@pytest.mark.parametrize("record, message", [
    ("{", "is no JSON file"), ("[]", "lacks the key 'config'"), ({"config": 3}, "lacks the key 'config'"),
    (OLD | {"format": 6}, "has the key 'format' at 6, but this program reads 1 to 5"),
    (OLD | {"format": 2}, "cannot be understood: config.check.name is '': it was one of none, glyphs, emoji."),
    (spoiled("check", "num_prompts", value="8"), "cannot be understood: config.check is {"),
    (spoiled("stages", 1, "start_from", value=7), "cannot be understood: config.stages[low_resolution].start_from is 7: give a text."),
    (spoiled("stages", 1, "frozen", value="vae"), "cannot be understood: config.stages[1] is no stage"),
    (spoiled("sigma", value=7), "cannot be understood: config has no key 'sigma'"),
    (spoiled("sampling", value=None), "cannot be understood: config lacks 'sampling'")])
def test_a_record_that_cannot_be_understood_names_file_and_key(record, message, tmp_path):
  path = written(tmp_path, record)
  with pytest.raises(ValueError) as caught:
    load_run(tmp_path)
  assert str(path) in str(caught.value) and message in str(caught.value)


def test_data_made_anew_under_their_name_are_refused_or_said(tmp_path, capsys, caplog):
  """The run goes on with its own tokenizer, and draws without any data; a copy, or the same data prepared again, are the same data."""
  def config(place, num=4, seed=0):
    cfg = quickstart.get_config("smoke")
    cfg.data_dir, cfg.stages = str(tmp_path / place), cfg.stages[:1]
    embedded.prepare("glyphs", cfg.data_dir, num, seed)
    return parse(cfg)
  run, first = tmp_path / "run", config("data")
  fingerprint = PromptTokenizer.load(tmp_path / "data" / "glyphs").fingerprint
  begin = lambda cfg, **allowed: save_config(cfg, run, tokenizer=run_tokenizer(cfg, run, trained=False), **allowed)
  begin(first)
  begin(config("again"))
  other = config("other", 6, seed=1)
  assert PromptTokenizer.load(tmp_path / "other" / "glyphs").fingerprint != fingerprint
  begun = (run / "config.json").read_bytes()
  said = r"data set 'glyphs' has other training records \(6 then, 9 now\) and other held-out records \(2 then, 2 now\) and another tokenizer"
  with pytest.raises(ValueError, match=rf"The data of the run in .* are not what they were: {said}. Put them back, .* --allow_data_change"):
    begin(other, allow_change=True, allow_version_change=True)
  assert (run / "config.json").read_bytes() == begun and capsys.readouterr().err == ""
  begin(other, allow_data_change=True)
  assert re.fullmatch(f"{said}\n", capsys.readouterr().err)
  begin(other)  # it is the run's now
  shutil.rmtree(tmp_path / "other")
  assert run_tokenizer(other, run, trained=True).fingerprint == fingerprint
  # a run of an earlier version
  (run / "tokenizer.json").unlink()
  assert run_tokenizer(first, run, trained=True).fingerprint == fingerprint and "kept no tokenizer: it is read from" in caplog.text
  with pytest.raises(ValueError, match="kept no tokenizer, and that of its data is gone .*other/glyphs.: put the data set back, or its"):
    run_tokenizer(other, run, trained=True)


@pytest.mark.parametrize("binding", [lambda data: {"data": identify(data, "glyphs")},
                                     lambda data: {"dataset_sha256": checksum(data / "glyphs" / "dataset.json")}], ids=["now", "earlier version"])
def test_a_latent_cache_is_of_the_data_set_that_it_was_made_of(tmp_path, binding):
  cfg = quickstart.get_config("smoke")
  cfg.data_dir, cfg.stages, cfg.stages[0].mixture[0].name = str(tmp_path), cfg.stages[:1], "glyphs_latents"
  cfg, found = parse(cfg), lambda: list(data_changes(cfg, PromptTokenizer.load(tmp_path / "glyphs"), {}, {"glyphs_latents": {}}))
  embedded.prepare("glyphs", tmp_path, 4)
  (tmp_path / "glyphs_latents").mkdir()
  meta = {"request": {"dataset": "glyphs", **binding(tmp_path)}, "facts": {}, "cache": {}}
  (tmp_path / "glyphs_latents" / "dataset.json").write_text(json.dumps(meta))
  assert found() == []
  shutil.rmtree(tmp_path / "glyphs")
  embedded.prepare("glyphs", tmp_path, 6)
  sentence, = found()
  assert re.match("data set 'glyphs_latents' holds latents of data set 'glyphs' as it was when .*, and this has (other|another) ", sentence)
