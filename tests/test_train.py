"""The main job: every stage trains, and nothing that happens to a run changes its numbers."""

import copy
import json
import shutil
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from kill_points import arrays, assert_same_bits, last_arrays
from marks import needs_emoji
from ml_collections import ConfigDict

from configs import base, emoji, folder, pretrain
from data_pipelines.mixture import Mixture
from data_pipelines.tokenizer import train_tokenizer
from qimg2.published.folder import has_head, open_folder
from qimg2.runtime import curriculum, lock
from qimg2.runtime.curriculum import train, train_one
from qimg2.runtime.evaluating import of_run
from qimg2.runtime.exporting import export
from qimg2.runtime.run import Run, load_run
from qimg2.training import faults, manifest, trainer
from qimg2.training.metrics import read_rows
from qimg2.training.optim import learning_rate, make_rate

FIRST_NEEDED = Mixture.first_needed


def files(run):
  return {str(path.relative_to(run.workdir)) for path in run.workdir.rglob("*") if path.is_file()}


def test_smoke_writes_what_it_promises(smoke_run):
  names = files(smoke_run)
  assert {"config.json", "tokenizer.json", "report.html", "evaluation.json", "evaluation.png"} <= names
  for stage in smoke_run.cfg.stages:
    assert {f"{stage.name}/metrics.jsonl", f"{stage.name}/timing.jsonl", f"{stage.name}/samples/00000002.png"} <= names
    rows = read_rows(smoke_run.workdir / stage.name / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert any("val_loss" in row for row in rows)
    edits = "ti2i" in {part.task for part in stage.mixture}
    assert edits == any("ti2i/ema/val_loss" in row for row in rows) == (f"{stage.name}/samples/00000002_ti2i.png" in names)
  result = json.loads((smoke_run.workdir / "evaluation.json").read_text())
  shares = {name: suite["shares"] for name, suite in result["suites"].items()}
  assert result["suites"]["glyphs"]["num_prompts"] == result["suites"]["glyph_edits"]["num_prompts"] == 8
  assert {"glyph", "ink", "paper"} <= set(shares["glyphs"]) and {"edit: everything", "edit: change"} <= set(shares["glyph_edits"])


def test_training_again_changes_nothing_and_reads_nothing(smoke_run, smoke_config, tmp_path, one_device, monkeypatch):
  cfg, workdir = copy.deepcopy(smoke_config), shutil.copytree(smoke_run.workdir, tmp_path / "run")
  for name in ("loader", "evaluation_batches", "frozen_weights"):  # which take minutes where data and networks are large
    monkeypatch.setattr(Run, name, None)
  train(cfg, workdir)
  for name in ("evaluation.json", *(f"{stage.name}/metrics.jsonl" for stage in cfg.stages)):
    assert (workdir / name).read_bytes() == (smoke_run.workdir / name).read_bytes()
  drawn = []
  monkeypatch.setattr(of_run, "evaluate", lambda run: drawn.append(run.cfg.sampling.guidance) or smoke_run)
  monkeypatch.setattr(curriculum, "describe", str)
  cfg.sampling.guidance = 1.5
  train(cfg, workdir)
  assert drawn == [1.5]  # other pictures
  shutil.rmtree(workdir / "sft" / "checkpoints")
  with pytest.raises(TypeError):  # there is no loader
    train(cfg, workdir)
  assert not (workdir / "evaluation.json").exists()  # it was of weights that are gone
  assert not (workdir / lock.NAME).exists()
  monkeypatch.setattr(lock, "BEAT_S", 0.1)
  with lock.RunLock(workdir, print), pytest.raises(ValueError, match="is being trained by process"):
    train(cfg, workdir)


@pytest.mark.parametrize("steps, left", [((4, 8), ["evaluation_4", "evaluation_8"]), ((4,), ["evaluation_4"]), ((), [])])
def test_evaluations_of_steps_that_are_trained_again_go(steps, left, tmp_path):
  """The stage was to go on from an earlier step, or from none."""
  class Begins(Exception):
    pass
  def begin(stage):
    raise Begins
  for step in steps:
    (tmp_path / "sft" / "checkpoints" / str(step)).mkdir(parents=True)
  (tmp_path / "sft").mkdir(exist_ok=True)
  for name in ("evaluation", "sft/evaluation_4", "sft/evaluation_8", "sft/evaluation_of_mine"):
    for ending in ("json", "png"):
      (tmp_path / f"{name}.{ending}").touch()
  with pytest.raises(Begins):
    train_one(types.SimpleNamespace(workdir=tmp_path, read_outside=begin), types.SimpleNamespace(name="sft"))
  assert sorted(path.name for path in (tmp_path / "sft").glob("*.*")) == [
      f"{name}.{ending}" for name in [*left, "evaluation_of_mine"] for ending in ("json", "png")]
  assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.slow
def test_when_a_program_is_compiled_changes_no_number(smoke_run, smoke_config, tmp_path, one_device, monkeypatch):
  """Two buckets, of which the second is compiled while the first one trains; the step that needs it waits."""
  cfg, order = copy.deepcopy(smoke_config), []
  cfg.compile, cfg.evals = "background", ConfigDict()
  monkeypatch.setattr(Mixture, "first_needed", lambda mixture, *args: order.append(FIRST_NEEDED(mixture, *args)) or order[-1])
  run = Run(cfg, tmp_path)
  train_one(run, run.stages["vae"])
  rows = [read_rows(workdir / "vae" / "metrics.jsonl") for workdir in (tmp_path, smoke_run.workdir)]
  assert rows[0] == rows[1] and len(order) == 1 and len(order[0]) > 1


@pytest.mark.parametrize("gone, damaged, trained, hashed", [
    ((), (), [], set()),
    ((), ("vae", "low_resolution", "sft"), [], set()),  # nobody reads them now
    (("sft",), ("low_resolution",), ["sft"], {"vae", "high_resolution"}),
    (("sft",), ("high_resolution",), ["high_resolution", "sft"], {"vae", "high_resolution"}),
    (("sft",), ("vae",), ["vae", "sft"], {"vae", "high_resolution"}),
    (("evaluation.json",), (), [], {"vae", "sft"}),
    (("evaluation.json",), ("sft",), ["sft"], {"vae", "sft"})])
def test_of_a_finished_stage_only_what_is_needed_is_read(smoke_run, smoke_config, tmp_path, one_device, monkeypatch, gone, damaged, trained, hashed):
  """What is needed is read once, and trained again where it is damaged."""
  workdir = shutil.copytree(smoke_run.workdir, tmp_path / "run")
  for name in gone:
    shutil.rmtree(workdir / name) if (workdir / name).is_dir() else (workdir / name).unlink()
  for name in damaged:
    path = max((workdir / name / "checkpoints" / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(bytes(path.stat().st_size))
  begun, read, digest = [], [], manifest._digest
  monkeypatch.setattr(manifest, "_digest", lambda file, *like: read.append(file.path) or digest(file, *like))
  monkeypatch.setattr(curriculum, "train_one", lambda run, stage, *_: begun.append(stage.name))
  monkeypatch.setattr(curriculum, "evaluation", lambda run: {})
  train(copy.deepcopy(smoke_config), workdir)
  assert begun == trained and {path.relative_to(workdir).parts[0] for path in read} == hashed and len(read) == len(set(read))
  if "sft" in gone and not set(damaged) & hashed:
    run = Run(copy.deepcopy(smoke_config), workdir)
    run.start_weights(run.stages["sft"]), run.frozen_weights(run.stages["sft"])
    assert len(read) == len(set(read))  # not again


def test_each_stage_starts_from_the_one_it_names(smoke_run):
  stage = smoke_run.stages["sft"]
  started, averages = smoke_run.start_weights(stage)
  previous = smoke_run.stage_weights("high_resolution")["model"]
  jax.tree.map(np.testing.assert_array_equal, started["model"], previous)
  jax.tree.map(np.testing.assert_array_equal, averages["ema"], smoke_run.stage_weights("high_resolution")["ema"])
  frozen = smoke_run.frozen_weights(stage)
  jax.tree.map(np.testing.assert_array_equal, frozen["vae"], smoke_run.stage_weights("vae")["vae"])
  assert np.std(frozen["vae"]["statistics"]["std"]) > 0  # measured, not the initial ones


def test_what_a_stage_takes_over_and_what_begins_anew(smoke_run):
  """Seen in the first of two steps, which all three stages of the generator saved: the weights of the stage before, not their average, and that
  average, which does not ramp up again; moments, updates and schedule from 0."""
  weights = smoke_run.random_weights(smoke_run.stages["low_resolution"], "model")
  before = {"params.model": weights, "average.ema": weights}
  for name in ("low_resolution", "high_resolution", "sft"):
    stage, first = smoke_run.stages[name], arrays(smoke_run.workdir / name, 1)
    rates = [float(learning_rate(make_rate(stage.optimizer, stage.num_steps), n)) for n in range(2)]
    rows = [row for row in read_rows(smoke_run.workdir / name / "metrics.jsonl") if "loss" in row]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], rates, rtol=1e-6)
    opt, = first["optimizer"]["opt"].values()
    assert opt["count"] == 1 and all(leaf == 1 for leaf in jax.tree.leaves(opt["adam"]) if np.ndim(leaf) == 0)
    moves = np.concatenate([np.ravel(new - old) for new, old in zip(jax.tree.leaves(first["params.model"]), jax.tree.leaves(before["params.model"]))])
    assert 0.9 * rates[0] < np.abs(moves).max() < 1.02 * rates[0]  # as AdamW's first update, whose moments are of one gradient
    share = 1 - (0.1 if name == "low_resolution" else stage.algorithm.settings["ema_decay"])
    mixed = jax.tree.map(lambda old, new, share=share: old + share * (new - old), before["average.ema"], first["params.model"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), first["average.ema"], mixed)
    before = last_arrays(smoke_run.workdir / name)


def test_a_restart_between_two_stages_changes_no_bit(smoke_run, smoke_config, tmp_path, one_device, monkeypatch):
  """The last stage begins anew beside those before it, with the batches that its name, the seed and the step give, whatever stages there are."""
  cfg, workdir, trained = copy.deepcopy(smoke_config), shutil.copytree(smoke_run.workdir, tmp_path / "run"), []
  shutil.rmtree(workdir / "sft")
  put = trainer.put_batch
  monkeypatch.setattr(trainer, "put_batch", lambda batch, *mesh: trained.append(batch["sample_id"].tolist()) or put(batch, *mesh))
  monkeypatch.setattr(curriculum, "evaluation", lambda run: {})
  monkeypatch.setattr(curriculum, "DRAWERS", {})  # pictures change nothing
  train(cfg, workdir)
  assert_same_bits(smoke_run.workdir, workdir)
  cfg.stages, cfg.evals = cfg.stages[3:], ConfigDict()
  cfg.stages[0].start_from, cfg.stages[0].frozen.vae = "scratch", "default"
  ids = lambda run: [run.loader(run.cfg.stages[0]).batch(k)[1]["sample_id"].tolist() for k in range(2)]
  assert trained == ids(Run(cfg, tmp_path / "alone"))
  cfg.stages[0].name = "another"
  assert trained != ids(Run(cfg, tmp_path / "alone"))


def test_weights_can_come_from_another_run(smoke_run, smoke_config, tmp_path, one_device):
  cfg = copy.deepcopy(smoke_config)
  stage = cfg.stages[1]
  stage.frozen.encoder, stage.frozen.vae = str(smoke_run.workdir / "frozen" / "encoder"), str(smoke_run.workdir / "vae")
  stage.start_from = str(smoke_run.workdir / "sft")
  run = Run(cfg, tmp_path)
  stage = run.stages[stage.name]
  frozen, (started, averages) = run.frozen_weights(stage), run.start_weights(stage)
  assert run.frozen_steps(stage) == {"vae": (str(smoke_run.workdir / "vae"), 2)}  # the encoder's folder holds weights alone
  theirs = smoke_run.frozen_weights(smoke_run.stages["sft"])
  jax.tree.map(np.testing.assert_array_equal, frozen, theirs)
  jax.tree.map(np.testing.assert_array_equal, started["model"], smoke_run.stage_weights("sft")["model"])
  jax.tree.map(np.testing.assert_array_equal, averages["ema"], smoke_run.stage_weights("sft")["ema"])
  with pytest.raises(ValueError, match="There is no stage 'nowhere'"):
    run.stage_weights("nowhere")


def test_a_changed_config_is_refused(smoke_run, smoke_config):
  cfg = copy.deepcopy(smoke_config)
  cfg.model.num_layers = 3
  with pytest.raises(ValueError, match="started with another config: config.model.num_layers was 2 and is 3"):
    train(cfg, smoke_run.workdir)


@pytest.fixture(scope="module")
def published(smoke_run, tmp_path_factory):
  """A folder in the published layout, of the networks of the smoke run."""
  return export(smoke_run, tmp_path_factory.mktemp("published") / "pipeline", dtype="float32")


def test_a_stage_can_start_from_a_published_folder(smoke_run, smoke_config, published, tmp_path, one_device):
  cfg = copy.deepcopy(smoke_config)
  cfg.stages, cfg.evals, cfg.tokenizer = cfg.stages[2:], ConfigDict(), f"diffusers:{published}"
  cfg.stages[0].start_from = f"diffusers:{published}"
  for stage in cfg.stages:
    stage.frozen.vae = "default"  # with the encoder, from where the chain of start_from begins
  run = Run(cfg, tmp_path)
  theirs = smoke_run.frozen_weights(smoke_run.stages["sft"])
  for stage in run.cfg.stages:
    jax.tree.map(np.testing.assert_array_equal, run.frozen_weights(stage), theirs)
  started, averages = run.start_weights(run.cfg.stages[0])
  jax.tree.map(np.testing.assert_array_equal, started["model"], smoke_run.stage_weights("sft")["ema"])
  assert not averages
  cfg.model.mlp_ratio = 2
  with pytest.raises(ValueError, match="config.model.mlp_ratio is 2, but the pipeline in .* has 3"):
    run = Run(cfg, tmp_path)
    run.start_weights(run.cfg.stages[0])


@pytest.fixture
def incomplete(smoke_run, published, tmp_path):
  """(folder, file): a published folder without its generator, which is in ComfyUI's file, without the encoder's head, and with a processor that is
  not ours."""
  folder = shutil.copytree(published, tmp_path / "incomplete")
  (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
  encoder = folder / "text_encoder/model.safetensors"
  weights = safetensors.numpy.load_file(encoder)
  del weights["lm_head.weight"]
  safetensors.numpy.save_file(weights, encoder)
  (folder / "processor/chat_template.jinja").write_text("{{ messages }}")
  (folder / "processor/special_tokens_map.json").write_text("{}")
  pictures = folder / "processor/processor_config.json"
  settings = json.loads(pictures.read_text())
  settings["image_processor"]["size"] = {"shortest_edge": 1024, "longest_edge": 4096}
  pictures.write_text(json.dumps(settings))
  return folder, export(smoke_run, tmp_path / "comfyui.safetensors", dtype="float32", comfyui=True)


@pytest.mark.slow
def test_training_goes_on_from_a_published_folder(smoke_run, smoke_config, incomplete, tmp_path, one_device):
  """Nothing that trains or draws needs the head; what it exports keeps the processor of the encoder's folder."""
  folder, file = incomplete
  cfg = copy.deepcopy(smoke_config)
  cfg.stages, cfg.evals, cfg.random_frozen = cfg.stages[3:], ConfigDict(), False
  base.published(cfg, f"vae:diffusers:{folder}").stages[0].start_from = f"diffusers:{folder},transformer={file}"
  started = Run(cfg, tmp_path / "none").start_weights(Run(cfg, tmp_path / "none").cfg.stages[0])[0]
  jax.tree.map(np.testing.assert_array_equal, started["model"], smoke_run.stage_weights("sft")["ema"])
  train(cfg, tmp_path / "run")
  assert [row["step"] for row in read_rows(tmp_path / "run" / "sft" / "metrics.jsonl") if "loss" in row] == [1, 2]
  out = export(load_run(tmp_path / "run"), tmp_path / "again", dtype="float32")
  for path in (folder / "processor").iterdir():
    assert (out / "processor" / path.name).read_bytes() == path.read_bytes()
  assert len(list((out / "processor").iterdir())) == len(list((folder / "processor").iterdir())) == 5
  opened = open_folder(out)
  assert opened.image_pixels == (1024, 4096) and not has_head(opened) and not opened.encoder.tie_embeddings
  shutil.copy(published_tokenizer(tmp_path), folder / "processor/tokenizer.json")  # of a folder with another tokenizer
  other = export(load_run(tmp_path / "run"), tmp_path / "other", dtype="float32")
  assert (other / "processor/tokenizer.json").read_bytes() == (out / "processor/tokenizer.json").read_bytes()
  assert (other / "processor/chat_template.jinja").read_text() == "{{ messages }}" and open_folder(other).image_pixels == (1024, 4096)
  assert not (other / "processor/special_tokens_map.json").exists()


def published_tokenizer(folder):
  """A tokenizer.json of other words than those of the smoke run."""
  train_tokenizer(["other words", "than those"], 280).save(folder / "tokenizer.json")
  return folder / "tokenizer.json"


def misspell(stage):
  with stage.resolutions[0].unlocked():
    stage.resolutions[0].multipel = 16


@pytest.mark.parametrize("change, message", [
    (misspell, r"\[sft\].resolutions\[0\] has no key 'multipel': did you mean 'multiple'"),
    (lambda stage: stage.algorithm.update(name="flow"), r"\[sft\].algorithm.name is 'flow': choose one of flow_matching, "),
    (lambda stage: stage.algorithm.update(ema_dekay=0.5), r"\[sft\].algorithm has no key 'ema_dekay': did you mean 'ema_decay'"),
    (lambda stage: stage.optimizer.update(schedule="step"), r"\[sft\].optimizer.schedule is 'step'"),
    (lambda stage: stage.update(start_from="hig_resolution"), r"\[sft\].start_from is 'hig_resolution', .*did you mean 'stage:high_resolution'"),
    (lambda stage: stage.frozen.__delitem__("vae"), r"\[sft\].frozen lacks 'vae'"),
    (lambda stage: stage.mixture[0].update(wait=1.0), r"\[sft\].mixture\[0\] has no key 'wait': did you mean 'weight'"),
    (lambda stage: stage.frozen.update(vae="stage:sft"), r"frozen.vae is 'stage:sft', but no earlier stage \(vae, "),
])
def test_mistakes_of_any_stage_are_named_before_the_first_one_trains(smoke_config, tmp_path, change, message):
  cfg = copy.deepcopy(smoke_config)
  with cfg.unlocked():
    change(cfg.stages[3])
  with pytest.raises(ValueError, match=message):
    train(cfg, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_frozen_network_is_drawn_from_the_seed_only_where_the_config_says_so(smoke_config, tmp_path, one_device):
  cfg = copy.deepcopy(smoke_config)
  cfg.random_frozen, cfg.data_dir, folder = False, str(tmp_path), tmp_path / "weights"
  folder.mkdir()
  for part in (part for stage in cfg.stages for part in stage.mixture):
    part.name = "mine"
  refused = lambda: pytest.raises(ValueError, match=expected)
  expected = (r"config.stages\[low_resolution\].frozen.encoder is 'default', which would draw its weights from the seed: name a folder .*"
              r"--config.stages\[1\].frozen.encoder=diffusers:DIR \(.*--config.random_frozen=True")
  with refused():
    train(cfg, tmp_path / "run")
  for stage in cfg.stages[1:]:
    stage.frozen.encoder = f"diffusers:{folder}"
  cfg.stages[2].frozen.vae = "scratch"
  expected = r"config.stages\[high_resolution\].frozen.vae is 'scratch'"
  with refused():
    train(cfg, tmp_path / "run")
  cfg.stages[2].frozen.vae, expected = "stage:vae", "There is no data set 'mine'"  # which is what a run looks for next
  with refused():
    train(cfg, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("module, trained", [
    pytest.param(pretrain, {1}, marks=pytest.mark.apart("pretrain")), (folder, {1}),
    pytest.param(emoji, {2}, marks=[needs_emoji, pytest.mark.apart("emoji")])])
def test_smoke_of_the_other_configs(module, trained, data_dir, tmp_path, one_device, monkeypatch):
  """A stage of the generator is trained. All of the others is built, and programs that no stage had before are lowered, not compiled or run."""
  cfg = module.get_config("smoke")
  cfg.data_dir = str(data_dir)
  Run(cfg, tmp_path)  # whose stages start from each other as they should
  later = tuple(stage for number, stage in enumerate(cfg.stages) if number not in trained)
  cfg.stages = tuple(stage for number, stage in enumerate(cfg.stages) if number in trained)
  cfg.stages[-1].start_from, cfg.stages[-1].frozen.vae = "scratch", "default"
  run = train(cfg, tmp_path)
  for stage in cfg.stages:
    assert [row["step"] for row in read_rows(tmp_path / stage.name / "metrics.jsonl") if "loss" in row] == [1, 2]
  assert (run.workdir / "report.html").is_file()
  traced = []
  monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, **_: traced.append(self))
  for stage in later:
    if stage.start_from != "scratch":
      stage.start_from = f"stage:{cfg.stages[-1].name}"
    if "vae" in stage.frozen:
      stage.frozen.vae = "default"
  run = Run({**cfg, "stages": (*cfg.stages, *later)}, tmp_path) if later else run
  programs = lambda stage: {(str(stage.algorithm), bucket) for bucket in run.loader(run.stages[stage.name]).buckets}
  known, num_programs = programs(cfg.stages[-1]), 0
  for stage in later:
    if programs(stage) <= known:  # networks and sizes are those of a stage before: the same step
      continue
    answers = iter((False, True))  # asked before the programs are compiled, and after
    with pytest.raises(faults.Preempted, match=f"{stage.name} was asked to stop before its first step"):
      train_one(run, run.stages[stage.name], stop=lambda step, answers=answers: step is not None and next(answers))
    known |= programs(stage)
    num_programs += len(programs(stage))
    assert len(traced) == num_programs
