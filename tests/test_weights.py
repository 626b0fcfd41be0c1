"""Where a run's weights come from, and what they take."""

import dataclasses
import json
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pretrain
from qimg2 import adapters, networks, sharding
from qimg2 import params as P
from qimg2.algorithms import Algorithm, Average, Role, Update
from qimg2.algorithms.adapter import with_adapter
from qimg2.runtime import weights as weights_module
from qimg2.runtime.config import parse
from qimg2.runtime.methods import make_algorithm
from qimg2.runtime.weights import LazyWeights, StageWeights, choose_average
from qimg2.training import checkpoint, manifest, optim, state
from tests.jobs import toy
from tests.jobs.toy_methods import METHODS, Nets

METHOD = Algorithm({"model": Role("mlp"), "fake": Role("mlp", start="model"), "ref": Role("mlp", start="model")},
                   (Update(("model",), None), Update(("fake",), None)), {"ema": Average("model", 0.9), "slow": Average("model", 0.99)},
                   deploy=lambda weights: {"mlp": weights["ema"]})
SPECS = {"w": P.Param((4, 2), ("embed", "mlp"), P.normal(1.0))}


def test_a_published_encoder_is_stored_in_half_the_bytes():
  """In the type that it computes in: 17.5 GB where float32 takes 35."""
  cfg = parse(pretrain.get_config())
  nets = networks.Networks(cfg.model, cfg.encoder, cfg.vae, 0)
  stage = cfg.stages[-1]
  specs = make_algorithm(stage.algorithm.name, stage.algorithm.settings, cfg.schedule).specs(nets.specs(), nets.compute_dtypes())
  size = lambda role: sum(p.size * jnp.dtype(p.dtype).itemsize for p in P.flatten(specs[role]).values())
  assert size("encoder") == 2 * 8_767_123_696 and size("model") == 4 * 7_115_124_736
  assert {jnp.dtype(p.dtype) for p in P.flatten(specs["vae"]).values()} == {jnp.dtype("float32")}


def test_weights_that_were_saved_in_float32_are_restored_in_fewer_bits(tmp_path):
  saved = P.init(SPECS, jax.random.key(0))
  checkpoint.save_weights(tmp_path / "w", saved)
  mesh = sharding.make_mesh({"fsdp": -1}, jax.devices()[:1])
  half = P.with_dtype(SPECS, "bfloat16")
  restored = checkpoint.restore_weights(tmp_path / "w", P.abstract(half, sharding.param_shardings(half, mesh, sharding.RULES["fsdp"])))
  assert restored["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(restored["w"], saved["w"].astype(jnp.bfloat16))


def test_averages_of_older_checkpoints_are_read(tmp_path):
  """They were called slow.NAME."""
  mesh, rules = sharding.make_mesh({"fsdp": -1}, jax.devices()[:1]), sharding.RULES["fsdp"]
  method = dataclasses.replace(METHOD, averages={"ema": Average("model", 0.9)})
  specs = dict.fromkeys(method.roles, SPECS)
  optimizers = state.make_optimizers(method, specs, optim.Config(), 10)
  abstract = state.abstract_state(method, optimizers, specs, mesh, rules)
  params = {role: P.init(SPECS, jax.random.key(number)) for number, role in enumerate(method.trained)}
  real = state.init_state(method, optimizers, params, {"ema": P.init(SPECS, jax.random.key(7))}, jax.random.key(3))
  writer = checkpoint.Checkpoints(tmp_path, keep=2)
  writer.save(jax.device_put(real, jax.tree.map(lambda x: x.sharding, abstract)), {})
  writer.close()
  (tmp_path / "0" / "average.ema").rename(tmp_path / "0" / "slow.ema")
  (tmp_path / "0" / manifest.NAME).unlink()
  manifest.write_manifest(tmp_path / "0")
  reader = checkpoint.Checkpoints(tmp_path)
  assert "average.ema" in reader.items(0)
  np.testing.assert_array_equal(reader.restore_item("average.ema", abstract.params["model"], 0)["w"], real.averages["ema"]["w"])


def chosen(average):
  read = []
  names = (*METHOD.roles, *METHOD.averages)
  weights = LazyWeights({name: lambda name=name: read.append(name) or name for name in names})
  found = choose_average(METHOD, weights, "sft", average)
  return METHOD.deployed(found)["mlp"], found["model"], found["fake"], read


def test_the_average_that_draws_is_chosen_and_nothing_else_is_read():
  assert chosen("deployed") == ("ema", "model", "fake", ["ema", "model", "fake"])  # what the method deploys
  assert chosen("none") == ("model", "model", "fake", ["model", "fake"])
  assert chosen("slow") == ("slow", "slow", "fake", ["slow", "fake"])
  with pytest.raises(ValueError, match="Stage sft keeps no averaged weights 'fast': choose ema, slow, none \\(the weights themselves\\) or deployed"):
    chosen("fast")


# What a stage starts from, on the toy job.


class Run(StageWeights):
  """What `StageWeights` needs of a run, for the toy networks. Stage "toy" is trained; `method` follows it."""
  rules, cfg, _trained = sharding.RULES["fsdp_tensor"], None, True
  nets = types.SimpleNamespace(specs=Nets().specs, compute_dtypes=dict, configs=dict)

  def __init__(self, workdir, method):
    self.workdir, self.mesh = workdir, sharding.make_mesh({"fsdp": -1}, jax.devices()[:1])
    stage = lambda name, method, start_from: types.SimpleNamespace(name=name, method=method, start_from=start_from, frozen={},
                                                                   save_every_steps=4, keep=2, keep_every_steps=0, rewards={},
                                                                   adapter=adapters.Settings())
    self.stages = {"toy": stage("toy", "supervised", "scratch"), "next": stage("next", method, "stage:toy")}

  def algorithm(self, stage):
    method = METHODS[stage.method]()
    return with_adapter(dataclasses.replace(method, finalize=None), stage.adapter, stage.frozen) if stage.adapter.rank else method

  def key(self, name):
    return jax.random.key(len(name))

  def random_weights(self, stage, role):
    return toy.weights(None, role, self.algorithm(stage), self.mesh, self.rules)  # the toy networks are drawn by numpy


def equal(one, other):
  return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, other)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(folder of a toy run with a model and its average, its last state)."""
  folder = tmp_path_factory.mktemp("toy")
  return folder, toy.run(toy.Job("supervised", num_devices=1), folder)


def test_a_stage_takes_over_the_weights_and_the_average_of_the_one_before(trained):
  folder, state = trained
  run = Run(folder, "supervised")
  started, averages = run.start_weights(run.stages["next"])
  assert equal(started["model"], state.params["model"]) and equal(averages["ema"], state.averages["ema"])
  assert not equal(started["model"], averages["ema"])
  run.stages["next"].start_from = "stage:toy:ema"  # the averaged weights begin, and their average begins anew
  started, averages = run.start_weights(run.stages["next"])
  assert equal(started["model"], state.averages["ema"]) and not averages


def test_a_role_that_starts_as_another_reads_the_other_s_weights(trained):
  folder, state = trained
  run = Run(folder, "dmd")
  stage = run.stages["next"]
  started, _ = run.start_weights(stage)
  frozen = run.frozen_weights(stage)
  assert set(frozen) == {"teacher"} and set(started) == {"fake", "model"}
  assert all(equal(tree, state.params["model"]) for tree in (frozen["teacher"], started["fake"], started["model"]))
  stage.frozen["teacher"] = "stage:toy:ema"  # a source of its own
  assert equal(run.frozen_weights(stage)["teacher"], state.averages["ema"])
  stage.start_from, stage.frozen = "scratch", {}
  assert equal(run.frozen_weights(stage)["teacher"], run.random_weights(stage, "model"))


def test_what_draws_is_what_the_method_deploys(trained):
  folder, state = trained
  run = Run(folder, "supervised")
  assert equal(run.deployed_weights("toy")["mlp"], state.averages["ema"])
  assert equal(run.deployed_weights("toy", "none")["mlp"], state.params["model"])
  with pytest.raises(ValueError, match="There is no stage 'nowhere': choose one of toy, next"):
    run.stage_weights("nowhere")
  np.testing.assert_array_equal(run.stage_weights("toy")["model"]["hidden"], state.params["model"]["hidden"])


def test_weights_of_an_earlier_step(trained):
  """Of the steps 4, 8 and 12 the two newest are kept."""
  folder, state = trained
  run = Run(folder, "supervised")
  assert equal(run.deployed_weights("toy", step=12)["mlp"], state.averages["ema"])
  earlier = run.stage_weights("toy", 8)
  abstract = run._abstract(run.role_specs(run.stages["toy"])["model"])
  saved = checkpoint.Checkpoints(folder / "toy" / "checkpoints").restore_item("params.model", abstract, 8)
  assert equal(earlier["model"], saved) and not equal(earlier["model"], state.params["model"])
  assert run.frozen_weights(run.stages["toy"]) == {}
  there = "There are those of the steps 8, 12: choose one of them, or leave --step out for the newest."
  with pytest.raises(ValueError, match=f"no checkpoint of step 4: it was removed when newer ones came, because keep=2 and .*=0. {there}"):
    run.stage_weights("toy", 4)
  with pytest.raises(ValueError, match=f"no checkpoint of step 9: none was saved there, but every 4 steps and at the last one. {there}"):
    run.deployed_weights("toy", step=9)


def test_other_runs_are_looked_at_before_a_stage_begins_or_goes_on(trained, tmp_path):
  """A folder of theirs without a checkpoint; one that was trained on since this stage began. What is not there at all is said elsewhere."""
  folder, _ = trained
  run = Run(tmp_path, "dmd")
  stage = run.stages["next"]
  stage.start_from, stage.frozen = str(folder / "toy"), {"teacher": str(folder / "toy")}
  run.check_others(stage)
  (tmp_path / "empty").mkdir()
  for change in ({"start_from": str(tmp_path / "empty")}, {"frozen": {"teacher": str(tmp_path / "empty")}}):
    changed = types.SimpleNamespace(**vars(stage) | change)
    with pytest.raises(ValueError, match=f"There is no checkpoint of '{tmp_path}/empty' at {tmp_path}/empty: train it first"):
      run.check_others(changed)
  stage.start_from = str(tmp_path / "nowhere")
  run.check_others(stage)
  meta = tmp_path / "next" / "checkpoints" / "4" / "meta" / "metadata"
  meta.parent.mkdir(parents=True)
  for path in (folder / "toy" / "checkpoints" / "12").iterdir():
    if path.is_file():
      shutil.copy(path, meta.parent.parent)
  meta.write_text(json.dumps({"stage": {"frozen_steps": {"teacher": [str(folder / "toy"), 8]}}}))
  stage.start_from = str(tmp_path / "empty")  # it is not read any more
  with pytest.raises(ValueError, match=f"Stage next was trained with teacher of step 8 of {folder}/toy, which has step 12 now"):
    run.check_others(stage)
  run.check_others(stage, allow_change=True)
  meta.write_text("")
  with pytest.raises(ValueError, match="checkpoints/4 is damaged"):
    run.check_others(stage)


# Stages with an adapter.

LORA = adapters.Settings(2, 4.0, "hidden")


@pytest.fixture(scope="module")
def adapted(trained, tmp_path_factory):
  """(folder of a run with stage "toy" and "lora", which trained an adapter of the former's average, the latter's last state)."""
  folder = tmp_path_factory.mktemp("lora")
  method = with_adapter(dataclasses.replace(METHODS["supervised"](), finalize=None), LORA)
  job = toy.Job("supervised", num_devices=1, algorithm=method, description={"adapter": dataclasses.asdict(LORA), "start_from": "stage:toy:ema"})
  last = toy.run(job, folder)
  (folder / "toy").rename(folder / "lora")
  shutil.copytree(trained[0] / "toy", folder / "toy")
  return folder, last


def lora_run(folder, **next_stage):
  run = Run(folder, "supervised")
  vars(run.stages["next"]).update(start_from="stage:lora", **next_stage)
  run.stages["lora"] = types.SimpleNamespace(**vars(run.stages["next"]) | {"name": "lora", "start_from": "stage:toy:ema", "adapter": LORA,
                                                                          "method": "supervised", "frozen": {}})
  return run


def merged(state, adapter):
  hidden = state.averages["ema"]["hidden"] + 2 * adapter["hidden"]["a"] @ adapter["hidden"]["b"]
  return {**state.averages["ema"], "hidden": hidden}


def test_a_stage_with_an_adapter_begins_on_the_frozen_weights_of_another(trained, adapted):
  folder, _ = adapted
  run = lora_run(folder)
  started, averages = run.start_weights(run.stages["lora"])
  assert set(started) == {"adapter"} and not averages and not np.any(started["adapter"]["hidden"]["b"]), "an average of all weights is none of it"
  assert equal(run.frozen_weights(run.stages["lora"])["model"], trained[1].averages["ema"])
  assert run.read_stages(run.stages["lora"]) == {"toy"}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_adapter_goes_on_with_that_of_the_stage_before_on_the_same_base(trained, adapted, elsewhere):
  folder, last = adapted
  run = lora_run(folder, adapter=LORA)
  stage = run.stages["next"]
  if elsewhere:
    run.workdir, stage.start_from = folder / "another", str(folder / "lora")
  started, averages = run.start_weights(stage)
  assert equal(started["adapter"], last.params["adapter"]) and equal(averages["ema"], last.averages["ema"])
  assert equal(run.frozen_weights(stage)["model"], trained[1].averages["ema"])
  assert run.frozen_steps(stage) == ({"model": (str(folder / "toy"), 12)} if elsewhere else {})
  assert run.read_stages(stage) == (set() if elsewhere else {"lora", "toy"})
  stage.start_from += ":ema"
  assert equal(run.start_weights(stage)[0]["adapter"], last.averages["ema"])


def test_a_stage_of_all_weights_and_a_reference_begin_with_what_is_merged(trained, adapted):
  folder, last = adapted
  run = lora_run(folder)
  run.stages["next"].method = "dpo"
  expected = merged(trained[1], last.params["adapter"])
  for started in (run.start_weights(run.stages["next"])[0]["model"], run.frozen_weights(run.stages["next"])["ref"]):
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6), started, expected)
  vars(run.stages["next"]).update(adapter=LORA, frozen={"ref": "stage:lora"})
  frozen = run.frozen_weights(run.stages["next"])
  assert equal(frozen["model"], trained[1].averages["ema"])
  np.testing.assert_allclose(frozen["ref"]["hidden"], expected["hidden"], atol=1e-6)


def test_what_a_stage_with_an_adapter_deploys(trained, adapted):
  folder, last = adapted
  run = lora_run(folder)
  drawn = run.deployed_weights("lora")["mlp"]
  assert drawn["hidden"].scale == 2.0 and equal(drawn["hidden"].base, trained[1].averages["ema"]["hidden"])
  assert equal(drawn["hidden"].a, last.averages["ema"]["hidden"]["a"])
  assert equal(run.deployed_weights("lora", "none")["mlp"]["hidden"].b, last.params["adapter"]["hidden"]["b"])
  assert equal(run.deployed_adapter("lora"), last.averages["ema"]) and equal(run.deployed_adapter("lora", "none"), last.params["adapter"])
  offloaded = run.offloaded_weights("lora")["mlp"]
  assert equal(offloaded["hidden"].a, drawn["hidden"].a) and equal(offloaded["in"], drawn["in"])


def test_an_adapter_of_other_settings_is_refused(adapted):
  run = lora_run(adapted[0], adapter=dataclasses.replace(LORA, alpha=2.0))
  with pytest.raises(ValueError, match=r"stages\[next\].adapter is Settings\(rank=2, alpha=2.0.*make them equal.*or export the merged weights"):
    run.start_weights(run.stages["next"])


def test_a_reference_without_the_adapter_that_goes_on_is_refused(adapted):
  run = lora_run(adapted[0], adapter=LORA)
  run.stages["next"].method = "dpo"
  with pytest.raises(ValueError, match=r"stages\[next\] goes on with the adapter .*'ref' would be .* without any adapter.*set frozen.ref"):
    run.start_weights(run.stages["next"])
  run.stages["next"].frozen = {"ref": "stage:lora"}
  run.start_weights(run.stages["next"])


# A frozen encoder of a published folder.


@pytest.fixture
def headless(tmp_path, monkeypatch):
  """(run whose encoder comes from a folder without a head, how often that was looked at)."""
  method = Algorithm({"model": Role("mlp"), "encoder": Role("qwen3_vl")}, (Update(("model",), None),), {},
                     deploy=lambda weights: {"mlp": weights["model"], "qwen3_vl": weights["encoder"]})
  looked = []
  monkeypatch.setattr(weights_module, "open_folder", lambda path: path)
  monkeypatch.setattr(weights_module, "has_head", lambda folder: looked.append(folder))  # None: it has none
  run = Run(tmp_path, "supervised")
  run.nets = types.SimpleNamespace(specs=lambda: {"mlp": SPECS, "qwen3_vl": {**SPECS, "head": SPECS["w"]}}, compute_dtypes=dict)
  run.algorithm = lambda stage: method
  (tmp_path / "folder").mkdir()
  run.stages["next"].frozen = {"encoder": f"diffusers:{tmp_path / 'folder'}"}
  return run, looked


def test_the_files_of_an_encoder_are_looked_at_once(headless, tmp_path):
  run, looked = headless
  for _ in range(3):
    assert set(run.role_specs(run.stages["next"])["encoder"]) == {"w"}
  assert len(looked) == 1
  os.utime(tmp_path / "folder", (7, 7))  # another folder of that name
  assert set(run.abstract_weights("next")["qwen3_vl"]) == {"w"} and len(looked) == 2


def test_a_headless_encoder_is_offloaded(headless, monkeypatch):
  run, _ = headless
  held = {role: {"w": np.full((4, 2), number, np.float32)} for number, role in enumerate(("model", "encoder"))}
  monkeypatch.setattr(run, "stage_weights", lambda name, step: LazyWeights({role: lambda role=role: held[role] for role in held}))
  offloaded = run.offloaded_weights("next")
  assert set(offloaded) == {"mlp", "qwen3_vl"} and "head" not in offloaded and len(offloaded) == 2
  for network, role in (("mlp", "model"), ("qwen3_vl", "encoder")):
    assert equal(offloaded[network], held[role]) and offloaded[network]["w"] is not offloaded[network]["w"]
