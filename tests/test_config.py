"""A run's config: parsed once and whole, every mistake named with its place, every default in one place."""

import ast
import dataclasses
import importlib
import inspect
import json
import pathlib
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import base, colab, emoji, folder, pretrain, pretrain_1b, quickstart, sizes, typography
from data_pipelines.buckets import bucket_size
from data_pipelines.specs import DatasetSpec
from qimg2 import flow
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.runtime import config, curriculum, methods, weight_table
from qimg2.runtime.config import MeshConfig, RunConfig, StageConfig, parse, plain
from qimg2.runtime.config.sources import Source, check_source, parse_source
from qimg2.runtime.config.suites import SETTINGS
from qimg2.runtime.evaluating import registry
from qimg2.training import faults, optim

ROOT = pathlib.Path(__file__).parent.parent
# Keys that records of earlier programs do not have.
LATER = {"optimizers", "micro_batches", "save_every_s", "local_copies", "order_dir", "too_long", "keep_every_steps", "evals_every_steps",
         "evals_num_prompts", "rewards", "reward_workers", "watch", "adapter", "offload_frozen"}


def smoke():
  return quickstart.get_config("smoke")


# Parsing.


@pytest.mark.parametrize("module", [quickstart, pretrain, pretrain_1b, folder, emoji, colab, typography])
@pytest.mark.parametrize("argument", ["", "smoke"])
def test_a_config_is_parsed_whole_and_can_be_written(module, argument):
  cfg = parse(module.get_config(argument))
  assert isinstance(cfg, RunConfig) and all(isinstance(stage, StageConfig) for stage in cfg.stages) and parse(cfg) is cfg
  assert parse(json.loads(json.dumps(plain(cfg)))) == cfg
  assert all(part.data_dir == cfg.data_dir for stage in cfg.stages for part in stage.mixture) and "data_dir" not in plain(cfg.stages[0].mixture[0])


def test_the_folder_config_takes_the_name_of_a_data_set():
  cfg = folder.get_config("cats")
  assert {part.name for stage in cfg.stages for part in stage.mixture} == {"cats"} and cfg.stages[0].num_steps == 1000


def test_values_have_the_types_of_their_fields():
  cfg = smoke()
  cfg.stages[1].optimizer.warmup_steps, cfg.stages[1].max_crop = 5, 1.0
  values = plain(cfg)
  values["sampling"] = values["sampling"] | {"guidance": 3, "sigmas": [1, 0.5]}
  parsed = parse(values)
  assert type(parsed.sampling.guidance) is float and parsed.sampling.sigmas == (1.0, 0.5) and type(parsed.sampling.sigmas[0]) is float
  assert parsed.stages[1].resolutions[0].ratios == ("1:1",) and parsed.encoder.vision.deepstack_layers == (0,)
  with pytest.raises(dataclasses.FrozenInstanceError):
    parsed.seed = 1


def test_every_key_can_be_given_on_the_command_line(monkeypatch):
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  changes = {"stages[1].faults.max_skipped": 3, "stages[1].optimizer.eps": 1e-7, "stages[1].resolutions[0].multiple": 16,
             "stages[0].algorithm.kl_weight": 0.1, "schedule.logit_mean": 0.5, "evals.glyphs.num_prompts": 50,
             "stages[2].start_from": "stage:low_resolution:ema"}
  monkeypatch.setattr("sys.argv", ["x", f"--config={ROOT}/configs/quickstart.py:smoke", *(f"--config.{k}={v}" for k, v in changes.items())])
  values(sys.argv)
  parsed = parse(values.config)
  assert parsed.stages[1].faults.max_skipped == 3 and parsed.stages[1].optimizer.eps == 1e-7 and parsed.stages[1].resolutions[0].multiple == 16
  assert parsed.stages[0].algorithm.settings["kl_weight"] == 0.1 and parsed.schedule.logit_mean == 0.5
  assert parsed.evals == {"glyphs": {"num_prompts": 50}, "glyph_edits": {"num_prompts": 8}}
  assert parse_source(parsed.stages[2].start_from) == Source("stage", "low_resolution", "ema")


def test_a_text_only_encoder_and_all_held_out_samples_are_none():
  values = plain(smoke())
  values["encoder"]["vision"] = None
  values["stages"][3]["evaluation"]["num_samples"] = None
  parsed = parse(values)
  assert parsed.encoder.vision is None and parsed.stages[3].evaluation.num_samples is None


def put(path, value):
  """A change of a config, a dict, at a path of keys."""
  def change(values):
    for key in path[:-1]:
      values = values[key]
    values[path[-1]] = value
  return change


def drop(*path):
  def change(values):
    for key in path[:-1]:
      values = values[key]
    del values[path[-1]]
  return change


SFT = ("stages", 3)


@pytest.mark.parametrize("change, message", [
    (put(["sede"], 1), "config has no key 'sede': did you mean 'seed'?"),
    (put(["mesh", "fsbp"], 1), "config.mesh has no key 'fsbp': did you mean 'fsdp'?"),
    (put(["encoder", "vision", "widht"], 1), "config.encoder.vision has no key 'widht': did you mean 'width'?"),
    (put([*SFT, "num_stepz"], 1), "config.stages[sft] has no key 'num_stepz': did you mean 'num_steps'?"),
    (put([*SFT, "optimizer", "learning_rat"], 1), "config.stages[sft].optimizer has no key 'learning_rat': did you mean 'learning_rate'?"),
    (put([*SFT, "optimizers"], {"fake": {"wait_decay": 1.0}}),
     "config.stages[sft].optimizers[fake] has no key 'wait_decay': did you mean 'weight_decay'?"),
    (put([*SFT, "resolutions", 0, "multipel"], 1), "config.stages[sft].resolutions[0] has no key 'multipel': did you mean 'multiple'?"),
    (put([*SFT, "mixture", 1, "wait"], 1), "config.stages[sft].mixture[1] has no key 'wait': did you mean 'weight'?"),
    (put([*SFT, "faults", "max_skiped"], 1), "config.stages[sft].faults has no key 'max_skiped': did you mean 'max_skipped'?"),
    (put([*SFT, "algorithm", "ema_dekay"], 1.0), "config.stages[sft].algorithm has no key 'ema_dekay': did you mean 'ema_decay'?"),
    (put([*SFT, "frozen", "vea"], "default"), "config.stages[sft].frozen has no key 'vea': did you mean 'vae'?"),
    (drop(*SFT, "frozen", "vae"), "config.stages[sft].frozen lacks 'vae': say where these weights come from"),
    (drop("schedule"), "config lacks 'schedule': give it a section"),
    (put([*SFT, "num_steps"], -5), "config.stages[sft].num_steps is -5: give at least 1."),
    (put([*SFT, "resolutions", 0, "batch_size"], 0),
     "config.stages[sft].resolutions[0]: base_px=48, batch_size=0 and multiple=32 must be at least 1."),
    (drop(*SFT, "num_steps"), "config.stages[sft] lacks 'num_steps': give it a whole number; configs/base.py has every key."),
    (drop(*SFT, "mixture", 0, "name"), "config.stages[sft].mixture[0] lacks 'name': give it a text"),
    (put(["seed"], "zero"), "config.seed is 'zero': give a whole number."),
    (put(["seed"], 0.5), "config.seed is 0.5: give a whole number."),
    (put(["num_tokens"], True), "config.num_tokens is True: give a whole number."),
    (put(["data_dir"], None), "config.data_dir is None: give a text."),
    (put(["prompt_classes"], 32), "config.prompt_classes is 32: give a tuple."),
    (put(["prompt_classes"], (32, "64")), "config.prompt_classes[1] is '64': give a whole number."),
    (put(["model", "rope_dims"], (4, 4)), "config.model.rope_dims is (4, 4): give a tuple of 3."),
    (put(["encoder", "tie_embeddings"], 1), "config.encoder.tie_embeddings is 1: give True or False."),
    (put(["prepare", "num_examples"], "all"), "config.prepare.num_examples is 'all': give a whole number or None."),
    (put(["schedule", "terminal"], "late"), "config.schedule.terminal is 'late': give a number or None."),
    (put(["sampling"], 40), "config.sampling is 40: give a section with the keys num_steps, guidance, sigmas, num_images."),
    (put([*SFT, "optimizer", "learning_rate"], "fast"), "config.stages[sft].optimizer.learning_rate is 'fast': give a number."),
    (put([*SFT, "optimizer", "gradient_dtype"], "bfloat16"),
     "config.stages[sft].optimizer.gradient_dtype is 'bfloat16', but the network computes in float32"),
    (put([*SFT, "algorithm", "ema_decay"], "slow"), "config.stages[sft].algorithm.ema_decay is 'slow': give a number."),
    (put([*SFT, "resolutions", 0, "ratios"], "1:1"), "config.stages[sft].resolutions[0].ratios is '1:1': give a tuple."),
    (put([*SFT, "mixture", 0, "caption_weights"], {"text": "often"}),
     "config.stages[sft].mixture[0].caption_weights.text is 'often': give a number."),
    (put([*SFT, "mixture"], "glyphs"), "config.stages[sft].mixture is 'glyphs': give a tuple."),
    (put([*SFT, "optimizer", "schedule"], "step"), "config.stages[sft].optimizer.schedule is 'step': choose one of constant"),
    (put([*SFT, "optimizers"], {"fake": {"accumulate": 2}}),
     "config.stages[sft].optimizers[fake].accumulate is 2, but micro-batches are those of the"),
    (put([*SFT, "faults", "stop_after"], "lunch"), "config.stages[sft].faults.stop_after is 'lunch': choose one of step, micro_batch."),
    (put(["local_copies", "every_s"], 0.0), "config.local_copies: every_s is 0.0: give seconds above 0, or no folder for no copies."),
    (put([*SFT, "faults", "on_save_error"], "cry"), "config.stages[sft].faults.on_save_error is 'cry': choose one of stop, continue."),
    (put([*SFT, "algorithm", "name"], "flow"), "config.stages[sft].algorithm.name is 'flow': choose one of flow_matching, reconstruction"),
    (put([*SFT, "watch", "bands"], {"loss": (1.0, 0.0)}), "config.stages[sft].watch.bands.loss is (1.0, 0.0): give the lower number first."),
    (put([*SFT, "watch", "falls"], {"loss": {"rise": "x"}}), "config.stages[sft].watch.falls.loss has no key 'rise': did you mean 'rising'?"),
    (put([*SFT, "algorithm", "weighting"], "bel"), "config.stages[sft].algorithm.weighting is 'bel': choose one of none, sigma_sqrt, cosmap, bell."),
    (put([*SFT, "name"], "vae"), "config.stages: two stages have the same name"),
    (put([*SFT, "name"], "s:ft"), "config.stages[s:ft].name is 's:ft': it is a folder's name"),
    (put(["stages", 3], "sft"), "config.stages[3] is 'sft': give a section."),
    (put(["evals", "glyps"], {"num_prompts": 8}), "config.evals has no key 'glyps': did you mean 'glyphs'?"),
    (put(["evals", "glyphs", "num_prompts"], "8x"), "config.evals.glyphs.num_prompts is '8x': give a whole number."),
    (put(["evals", "glyphs", "num_prompts"], 0), "config.evals.glyphs.num_prompts is 0: give at least 1."),
    (put(["evals", "glyphs", "num_prompts"], 0.5), "config.evals.glyphs.num_prompts is 0.5: give a whole number."),
    (put(["evals", "glyphs", "num_candidates"], 8), "config.evals.glyphs has no key 'num_candidates'"),
    (put(["tokenizer"], ""), "config.tokenizer is empty: say \"default\""),
    (put([*SFT, "keep"], 0), "config.stages[sft].keep is 0: give at least 1."),
    (put([*SFT, "keep_every_steps"], -1), "config.stages[sft].keep_every_steps is -1, but checkpoints are at multiples of save_every_steps, 1:"),
    (put([*SFT, "save_every_s"], -1.0), "config.stages[sft].save_every_s is -1.0: give seconds, or 0 for no checkpoint by time."),
    (put(["mesh", "tensor"], 0), "config.mesh.tensor is 0: give at least 1, or -1 for the devices that are left."),
    (put(["mesh", "tensor"], -1), "only one axis may be -1."),
    (put(["model", "width"], 64), None),
    (put(["model", "context_width"], 16), "config.model.context_width is 16, but config.encoder.width is 32: make them equal."),
    (put(["model", "attention"], "none"), "config.model.attention is 'none': choose 'block_causal' or 'full'."),
    (put(["stages"], ()), "--config is none of a run: it has no stages; take one such as configs/quickstart.py."),
])
def test_a_mistake_is_one_sentence_that_names_its_place(change, message):
  values = as_lists(plain(smoke()))
  change(values)
  if message is None:
    assert parse(values).model.width == 64
    return
  with pytest.raises(ValueError) as caught:
    parse(values)
  assert message in str(caught.value) and "\n" not in str(caught.value)


def as_lists(value):
  """With lists in place of tuples, so that parts of them can be changed."""
  if isinstance(value, dict):
    return {key: as_lists(item) for key, item in value.items()}
  return [as_lists(item) for item in value] if isinstance(value, tuple) and value and isinstance(value[0], dict) else value


def test_a_config_of_something_else_is_refused():
  with pytest.raises(ValueError, match="--config is none of a run: it has no stages"):
    parse(ConfigDict({"operators": ()}))


def test_an_update_may_have_an_optimizer_of_its_own():
  cfg = smoke()
  cfg.stages[3].optimizers = ConfigDict({"model": {"learning_rate": 0.5, "schedule": "constant"}})
  stage = parse(cfg).stages[3]
  assert stage.optimizers == {"model": dataclasses.replace(stage.optimizer, learning_rate=0.5, schedule="constant")}
  assert stage.optimizer.schedule == "cosine" and parse(plain(parse(cfg))).stages[3] == stage
  cfg.stages[3].optimizers = ConfigDict({"modle": {}})
  with pytest.raises(ValueError, match=r"config.stages\[sft\].optimizers has no key 'modle': did you mean 'model'"):
    parse(cfg)


def test_the_kind_of_a_stage_is_that_of_its_method():
  assert [stage.kind for stage in parse(smoke()).stages] == ["autoencoder", "generator", "generator", "generator"]
  assert {method.kind for method in methods.METHODS.values()} == set(methods.KINDS) == set(curriculum.DRAWERS)


# One place for each value.


def test_only_the_config_package_knows_what_a_config_file_returns():
  for path in (ROOT / "qimg2").rglob("*.py"):
    if (ROOT / "qimg2" / "runtime" / "config") in path.parents:
      continue
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)} | {
        alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not names & {"ml_collections", "ConfigDict"}, path


def defaults_of(cls):
  return {field.name for field in dataclasses.fields(cls) if (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)}


def test_no_default_stands_twice():
  """A section has the defaults of its class where it has some, and configs/base.py has those of all other keys."""
  run, stage = base.base(), base.stage("one", "flow_matching")
  for section, value in ((run.schedule, flow.Schedule()), (stage.faults, faults.Settings()), (stage.optimizer, optim.Config())):
    assert plain(section) == plain(value)
  assert base.part("one") == plain(DatasetSpec("", "one"))
  assert base.part("one", 0.5, min_stage=3, text=2.0) == plain(DatasetSpec("", "one", weight=0.5, min_stage=3, caption_weights={"text": 2.0}))
  assert base.part("one", keep_tags=2, tag_separator=";") == plain(DatasetSpec("", "one", keep_tags=2, tag_separator=";"))
  for section, cls in ((run, RunConfig), (stage, StageConfig), (run.mesh, MeshConfig), (run.prepare, config.PrepareConfig),
                       (run.sampling, config.SamplingConfig), (stage.evaluation, config.EvaluationConfig)):
    assert set(section) == {field.name for field in dataclasses.fields(cls)} and defaults_of(cls) <= LATER, cls
  text = ast.parse((ROOT / "configs" / "base.py").read_text(encoding="utf-8"))
  written = {node.arg for node in ast.walk(text) if isinstance(node, ast.keyword)}
  assert not written & (defaults_of(flow.Schedule) | defaults_of(faults.Settings) | defaults_of(optim.Config) - {"schedule"})


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_stage_has_every_setting_of_its_method(method):
  hints, defaults = methods.METHODS[method].settings()
  assert plain(base.stage("one", method).algorithm) == {"name": method} | defaults and set(hints) == set(defaults)


@pytest.mark.parametrize("section, cls, apart", [
    (sizes.mmdit_7b(), mmdit.Config, {"remat", "dtype"}), (sizes.qwen3_vl("8B"), qwen3_vl.Config, {"vision", "dtype"}),
    (sizes.vae_f16c64(4), vae.Config, {"dtype"})])
def test_the_published_sizes_are_the_defaults_of_their_classes(section, cls, apart):
  assert {key: value for key, value in plain(section).items() if key not in apart} == {
      key: getattr(cls(), key) for key in section if key not in apart}


def test_a_misspelt_key_in_a_config_file_is_named():
  with pytest.raises(ValueError, match="A stage has no key 'num_stepz': it has "):
    base.stage("one", "flow_matching", num_stepz=1)
  with pytest.raises(ValueError, match="The section 'faults' of a stage has no key 'max_skiped': it has max_skipped, "):
    base.stage("one", "flow_matching", faults=dict(max_skiped=1))
  with pytest.raises(ValueError, match="There is no method 'flow': choose one of flow_matching, "):
    base.stage("one", "flow")


# Where weights come from.


@pytest.mark.parametrize("text, source", [
    ("scratch", Source("scratch")), ("default", Source("default")), ("stage:vae", Source("stage", "vae")),
    ("stage:sft:ema", Source("stage", "sft", "ema")), ("diffusers:a/b:c", Source("diffusers", "a/b:c")),
    ("diffusers:a/b,transformer=c,d.gguf", Source("diffusers", "a/b", transformer="c,d.gguf")),
    ("runs/a/sft", Source("folder", "runs/a/sft")), ("runs/a/sft:ema", Source("folder", "runs/a/sft", "ema")),
    ("/odd:ly/named", Source("folder", "/odd:ly/named"))])
def test_sources_are_words(text, source):
  assert parse_source(text) == source


@pytest.mark.parametrize("text, message", [
    ("hig_resolution", "config.x is 'hig_resolution', which is neither \"scratch\", \"stage:NAME\" of an earlier stage (vae, high_resolution), "
     "\"diffusers:DIR\" nor a folder: did you mean 'stage:high_resolution'?"),
    ("vae", "did you mean 'stage:vae'?"), ("vea:ema", "did you mean 'stage:vae:ema'?"),
    ("stage:hig_resolution", "no earlier stage (vae, high_resolution) has this name: did you mean 'stage:high_resolution'?"),
    ("stage:sft", "no earlier stage (vae, high_resolution) has this name."),
    ("diffusers:vae,transformer=no.gguf", "but there is no file 'no.gguf': give the generator's weights as .safetensors or .gguf."),
    ("diffusers:nowhere", "there is no folder 'nowhere': give one in the published layout."),
    ("default", "which is neither \"scratch\""), ("", "config.x is '', which is neither \"scratch\""), ("/no/where", "nor a folder.")])
def test_a_source_that_is_not_there_is_one_sentence(text, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "vae").mkdir()  # a stage's name is no folder, unless it is written as ./vae
  ask = lambda text, default=False: check_source(text, "config.x", ["vae", "high_resolution"], ["vae", "high_resolution", "sft"], default)
  with pytest.raises(ValueError) as caught:
    ask(text)
  assert message in str(caught.value)
  for good in ("scratch", "stage:vae", "stage:vae:ema", "./vae", str(tmp_path), f"{tmp_path}:ema", f"diffusers:{tmp_path}"):
    ask(good)
  ask("default", True)


def test_a_published_folder_gives_the_encoder_and_the_vae_of_the_published_curriculum():
  cfg = parse(pretrain.get_config("v5p-128:diffusers:a/b:c"))
  assert cfg.tokenizer == "diffusers:a/b:c" and cfg.mesh.fsdp == 32
  assert [(stage.name, dict(stage.frozen)) for stage in cfg.stages][:2] == [
      ("vae", {}), ("pretrain_256_t2i", {"encoder": "diffusers:a/b:c", "vae": "stage:vae"})]
  whole = parse(pretrain.get_config("v5p-128:vae:diffusers:a"))
  assert [stage.name for stage in whole.stages] == [stage.name for stage in cfg.stages[1:]] and whole.stages[0].start_from == "scratch"
  assert all(stage.frozen == {"encoder": "diffusers:a", "vae": "diffusers:a"} for stage in whole.stages)
  for argument, message in (("v5p-128:a", "=...:a is unknown: say diffusers:DIR"), ("v5p-128:vae:diffusers:", "=...:vae:diffusers: is unknown"),
                            ("diffusers:a", "knows no 'diffusers:a': choose one of smoke, "), ("smoke:diffusers:a", "knows no 'smoke:diffusers:a'")):
    with pytest.raises(ValueError, match=message):
      pretrain.get_config(argument)


def test_each_stage_of_the_published_curriculum_takes_what_passed_its_data_stage():
  cfg = parse(pretrain.get_config())
  assert {stage.name: {part.min_stage for part in stage.mixture} for stage in cfg.stages} == {
      "vae": {1}, "pretrain_256_t2i": {1}, "pretrain_256": {2}, "pretrain_512": {3}, "cpt_1024": {4}, "cpt_2048": {5}, "sft": {6}}
  assert [part.name for part in cfg.stages[-1].mixture] == ["t2i_curated", "ti2i_curated"]
  # None that has the pixels of its resolution, and of which `max_crop` may be cut off, is enlarged too much.
  for stage in cfg.stages:
    areas = [height * width / one.base_px**2 for one in stage.resolutions for height, width in
             [bucket_size(one.base_px, ratio, one.multiple) for ratio in one.ratios]]
    assert {part.max_enlarge for part in stage.mixture} == {1.25} and max(areas) / (1 - stage.max_crop) < 1.25**2


# What else reads a config.


def test_every_suite_can_be_named_with_its_settings():
  assert list(SETTINGS) == list(registry.SUITES)
  for name, make in registry.SUITES.items():
    make = getattr(importlib.import_module(make.module), make.name) if hasattr(make, "module") else make
    assert {*SETTINGS[name]} == {"num_prompts", *inspect.signature(make).parameters} - {"prepare", "source"}


@pytest.mark.parametrize("sizes, num_devices, message", [
    (dict(fsdp=3), 8, "asks for 3 devices, but there are 8"), (dict(fsdp=-1, tensor=3), 8, "8 devices cannot be divided by the 3 of the others"),
    (dict(fsdp=64, tensor=2), 256, "asks for 128 devices, but there are 256")])
def test_describe_refuses_a_mesh_that_does_not_fit_the_devices(sizes, num_devices, message):
  cfg = quickstart.get_config()
  cfg.mesh.update(sizes)
  with pytest.raises(ValueError, match=message):
    weight_table.describe(cfg, num_devices)


def test_describe_counts_what_a_run_holds():
  found = weight_table.describe(quickstart.get_config(), 4)
  assert found["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
  rows = {row["path"]: row for row in found["weights"]}
  assert rows["vae/statistics/mean"]["count"] == rows["vae/statistics/std"]["count"] == 32
  assert found["totals"]["vae"] == sum(row["count"] for path, row in rows.items() if path.startswith("vae/"))
  assert weight_table.describe(quickstart.get_config())["mesh"]["fsdp"] == 1
