"""Published folders read by us: the tensors as they are, on one device or many, with little memory; and every way a folder can be wrong."""

import copy
import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import safetensors.numpy
import safetensors.torch
import torch

from qimg2 import flow, networks, sharding
from qimg2 import params as P
from qimg2.layout import make_layout
from qimg2.models import mmdit
from qimg2.published import files, tensors
from qimg2.published.folder import check_configs, load_vision, load_weights, open_folder, published_schedule, read_schedule
from qimg2.published.names import mmdit as mmdit_names
from qimg2.published.names import qwen3_vl as qwen3_vl_names
from qimg2.published.names import vae as vae_names

ROOT = pathlib.Path(__file__).parent.parent
PARTS = {"mmdit": "transformer", "qwen3_vl": "text_encoder", "vae": "vae"}  # network -> of the pipeline
FIELDS = {"mmdit": "model", "qwen3_vl": "encoder", "vae": "vae"}  # network -> its config in what was opened
TABLES = {"mmdit": mmdit_names.table, "qwen3_vl": qwen3_vl_names.table, "vae": vae_names.table}


@pytest.fixture(scope="module")
def pipeline():
  return reference.tiny_pipeline(0)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
  path = tmp_path_factory.mktemp("published") / "tiny"
  pipeline.save_pretrained(path)
  return path


@pytest.fixture
def broken(folder, tmp_path):
  """A copy that a test may damage."""
  shutil.copytree(folder, tmp_path / "tiny")
  return tmp_path / "tiny"


def specs_of(opened):
  return networks.Networks(opened.model, opened.encoder, opened.vae, 14).specs()


def load(path, network, shardings=None):
  opened = open_folder(path)
  return load_weights(opened, network, specs_of(opened)[network], shardings)


def published(path, network):
  """Our weights under their published names."""
  opened = open_folder(path)
  specs, params = specs_of(opened)[network], load(path, network)
  specs.pop("statistics", None)
  return dict(tensors.export_tensors(params, specs, TABLES[network](getattr(opened, FIELDS[network]))))


def assert_holds(found, module, dtype=torch.float32):
  expected = {name: x.to(dtype).float().numpy() for name, x in module.state_dict().items()}
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.mark.parametrize("network", PARTS)
def test_tensors_are_those_of_the_pipeline(pipeline, folder, network):
  found = published(folder, network)
  assert_holds(found, getattr(pipeline, PARTS[network]))
  assert all(x.dtype == np.float32 for x in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_become_float32_weights(pipeline, broken, dtype):
  for network, name in PARTS.items():
    copy.deepcopy(getattr(pipeline, name)).to(dtype).save_pretrained(broken / name)
    found = published(broken, network)
    assert all(x.dtype == np.float32 for x in found.values())
    assert_holds(found, getattr(pipeline, name), dtype)


def test_shards_hold_the_same(pipeline, tmp_path):
  pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
  for network, name in PARTS.items():
    assert len(list((tmp_path / "sharded" / name).glob("*-of-*.safetensors"))) > 2
    assert_holds(published(tmp_path / "sharded", network), getattr(pipeline, name))


def test_tied_embeddings_are_read_once(tmp_path):
  pipeline = reference.tiny_pipeline(1, tied=True)
  pipeline.save_pretrained(tmp_path / "tied")
  assert open_folder(tmp_path / "tied").encoder.tie_embeddings
  found, expected = published(tmp_path / "tied", "qwen3_vl"), reference.tensors(pipeline.text_encoder)
  np.testing.assert_array_equal(found["model.language_model.embed_tokens.weight"], expected.pop("lm_head.weight"))
  assert found.keys() == expected.keys()


def test_eight_devices_hold_parts_of_the_same(folder):
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  specs = specs_of(open_folder(folder))
  for network in PARTS:
    shardings = sharding.param_shardings(specs[network], mesh, sharding.RULES["fsdp_tensor"])
    parts, whole = load(folder, network, shardings), load(folder, network)
    assert jax.tree.map(lambda x: x.sharding, parts) == shardings
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts), jax.device_get(whole))
  assert P.flatten(load(folder, "mmdit", sharding.param_shardings(specs["mmdit"], mesh, sharding.RULES["fsdp_tensor"])))[
      "blocks/mlp/gate"].addressable_shards[0].data.shape == (2, 16, 96)


def test_weights_over_time_are_left_unread_where_they_are_not_declared(folder):
  opened = open_folder(folder)
  without = dataclasses.replace(opened, vae=dataclasses.replace(opened.vae, temporal_weights=False))
  small, whole = load_weights(without, "vae", specs_of(without)["vae"]), load(folder, "vae")
  small, whole = P.flatten(small), P.flatten(whole)
  assert {path.split("/")[-2] for path in set(whole) - set(small)} == {"time"}
  for path, x in small.items():
    np.testing.assert_array_equal(x, whole[path])


def test_the_vision_tower_is_read_alone(folder, monkeypatch):
  opened, read = open_folder(folder), []
  read_one = files.TensorFiles.read
  monkeypatch.setattr(files.TensorFiles, "read", lambda self, name: read.append(name) or read_one(self, name))
  tower = load_vision(opened, specs_of(opened)["qwen3_vl"]["vision"])
  assert read and all(name.startswith("model.visual.") for name in read)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(tower), jax.device_get(load(folder, "qwen3_vl")["vision"]))


def test_weights_take_the_declared_type(folder):
  opened = open_folder(folder, dtype="bfloat16")
  for network, declared in specs_of(opened).items():
    specs = jax.tree.map(lambda p: dataclasses.replace(p, dtype=jnp.bfloat16), declared, is_leaf=P.is_param)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), load(folder, network))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(load_weights(opened, network, specs)), rounded)


def test_statistics_come_from_the_config(pipeline, folder):
  statistics = load(folder, "vae")["statistics"]
  np.testing.assert_array_equal(statistics["mean"], torch.tensor(pipeline.vae.config.latents_mean).numpy())
  np.testing.assert_array_equal(statistics["std"], torch.tensor(pipeline.vae.config.latents_std).numpy())


MEMORY = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from qimg2 import params
from qimg2.models import mmdit
from qimg2.published import export, files, quantised, tensors
from qimg2.published.names import mmdit as names

def status(key):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def peak(fn):
  open("/proc/self/clear_refs", "w").write("5")  # forgets the highest resident size so far
  start = status("VmRSS")
  return jax.block_until_ready(fn()), status("VmHWM") - start

folder = pathlib.Path(sys.argv[1])
cfg = names.config(json.loads((folder / "config.json").read_text()))
specs, table = mmdit.specs(cfg), names.table(cfg)
jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(8)))  # the compiler is loaded before anything is measured
stored = lambda: quantised.plain(files.open_tensors(folder, "diffusion_pytorch_model"))
load = lambda: tensors.load_tensors(names.published_tensors(stored()), specs, table)
weights, loading = peak(load)
_, writing = peak(lambda: export.export_transformer(folder / "out.safetensors", cfg, weights))
print(json.dumps({"weights": 4 * params.count(specs), "loading": loading, "writing": writing}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", ["float32", "scaled float8, fused"])
def test_host_memory_stays_near_the_weights(tmp_path, form):
  cfg = mmdit.Config(width=1024, num_layers=6, num_heads=8, context_width=1024)
  shapes = tensors.published_shapes(mmdit.specs(cfg), mmdit_names.table(cfg))
  draw = np.random.default_rng(0).standard_normal
  parts = {}
  for name, shape in shapes.items():
    stored, number, num_parts = mmdit_names.comfyui_place(name) if "fused" in form else (name, 0, 1)
    parts.setdefault(stored, [None] * num_parts)[number] = torch.from_numpy(draw(shape, np.float32))
  arrays = {name: torch.cat(part) for name, part in parts.items()}
  if "float8" in form:
    scales = {f"{name}_scale": torch.full((len(x), 1), 0.5) for name, x in arrays.items()}
    arrays = {name: x.to(torch.float8_e4m3fn) for name, x in arrays.items()} | scales
  safetensors.torch.save_file(arrays, tmp_path / "diffusion_pytorch_model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(mmdit_names.published_config(cfg)))
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  result = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], env=env, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  used, largest = json.loads(result.stdout), 4 * max(map(math.prod, shapes.values()))
  print({name: f"{size / 1e6:.0f} MB" for name, size in (used | {"largest": largest}).items()})
  assert used["weights"] > 20 * largest
  assert used["loading"] <= used["weights"] + 10 * largest  # half of it is the compiler; a second copy would be 20 times the largest or more
  assert used["writing"] <= 6 * largest


# Configs.


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_config_goes_both_ways(causal):
  config = reference.tiny_transformer(0, causal_condition=causal).config
  published = {name: x for name, x in config.items() if not name.startswith("_")} | {"_class_name": mmdit_names.CLASS}
  cfg = mmdit_names.config(published, dtype="bfloat16")
  assert (cfg.condition_time, cfg.dtype, cfg.width) == ("zero" if causal else "shared", "bfloat16", 64)
  assert mmdit_names.published_config(cfg) == published | {"axes_dims_rope": [4, 6, 6]}


@pytest.mark.slow
def test_shared_condition_time_is_what_causal_condition_false_does():
  """The published class still masks block-causally; only the time of the condition tokens changes."""
  module = reference.tiny_transformer(0, causal_condition=False)
  published = dict(module.config) | {"_class_name": mmdit_names.CLASS}
  cfg = mmdit_names.config(published)
  rng = np.random.default_rng(0)
  tokens, grids = np.array([[1, 9, 9, 2, 3]]), [(2, 4)]
  text, images, target = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 5, 64), (1, 8, 8), (1, 16, 8)))
  layout = make_layout(jnp.asarray(tokens), jnp.array([5]), 9, grids, (4, 4))
  arrays = reference.tensors(module)
  params = tensors.import_tensors(mmdit.specs(cfg), mmdit_names.table(cfg), arrays, arrays.__getitem__)
  with torch.no_grad():
    theirs = module(torch.from_numpy(np.concatenate([images, target], 1)), torch.from_numpy(text), torch.tensor([0.4]),
                    [[(1, 2, 4), (1, 4, 4)]], torch.tensor([[*(tokens[0] == 9), *[True] * 4]])).sample[:, -16:].numpy()
  run = jax.jit(mmdit.apply, static_argnums=0)
  error = lambda cfg: reference.relative_error(run(cfg, params, target, jnp.array([0.4]), text, images, layout), theirs)
  assert error(cfg) < 2e-5
  for wrong in ({"condition_time": "zero"}, {"attention": "full"}):
    assert error(dataclasses.replace(cfg, **wrong)) > 1e-3


@pytest.mark.parametrize("settings", [{}, {"shift_terminal": None}, {"use_dynamic_shifting": False, "shift": 3.0},
                                      {"use_dynamic_shifting": False, "shift_terminal": None}])
def test_schedule_gives_the_schedulers_times(settings):
  from diffusers import FlowMatchEulerDiscreteScheduler
  scheduler = FlowMatchEulerDiscreteScheduler(**(dict(
      use_dynamic_shifting=True, time_shift_type="exponential", base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9,
      shift_terminal=0.02) | settings))
  schedule = read_schedule(dict(scheduler.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"})
  for num_tokens in (16, 4096, 16384):
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10), mu=flow.Schedule().mu(num_tokens))
    np.testing.assert_allclose(schedule.sigmas(10, num_tokens), scheduler.sigmas.numpy(), atol=1e-6)
  assert read_schedule(published_schedule(schedule)) == schedule


def test_folder_says_what_the_pipeline_is(folder, pipeline, broken):
  opened = open_folder(folder, dtype="bfloat16", remat="full")
  assert (opened.model.dtype, opened.encoder.dtype, opened.vae.dtype, opened.model.remat) == ("bfloat16",) * 3 + ("full",)
  assert opened.schedule == flow.Schedule() and opened.sample_sigmas is None
  assert opened.processor.is_dir() and opened.encoder.image_token_id == pipeline._img_token_id
  edit(broken, "model_index.json", sample_sigmas=[1.0, 0.75, 0.5])
  assert open_folder(broken).sample_sigmas == (1.0, 0.75, 0.5)


@pytest.mark.parametrize("network, fields, message", [
    ("mmdit", {"num_layers": 3}, "config.model.num_layers is 3, but the pipeline in .* has 2: make them equal"),
    ("mmdit", {"attention": "full"}, "config.model.attention is 'full'"),
    ("mmdit", {"condition_time": "shared"}, "config.model.condition_time is 'shared'"),
    ("qwen3_vl", {"eps": 1e-5}, "config.encoder.eps is 1e-05"),
    ("qwen3_vl", {"vision": None}, "config.encoder.vision is None"),
    ("vae", {"num_res_blocks": 2}, "config.vae.num_res_blocks is 2"),
])
def test_a_run_must_have_the_folders_architecture(folder, network, fields, message):
  opened = open_folder(folder)
  configs = {name: dataclasses.replace(getattr(opened, FIELDS[name]), dtype="bfloat16") for name in PARTS}
  configs["vae"] = dataclasses.replace(configs["vae"], temporal_weights=False, latents_mean=(0.0,) * 8, remat="full")
  configs["mmdit"] = dataclasses.replace(configs["mmdit"], remat="full")
  check_configs(opened, *configs.values())
  check_configs(opened, *[None if name == network else config for name, config in configs.items()])
  configs[network] = dataclasses.replace(configs[network], **fields)
  with pytest.raises(ValueError, match=message):
    check_configs(opened, *configs.values())


def test_a_nested_difference_is_named(folder):
  opened = open_folder(folder)
  encoder = dataclasses.replace(opened.encoder, vision=dataclasses.replace(opened.encoder.vision, mlp_width=97))
  with pytest.raises(ValueError, match="config.encoder.vision.mlp_width is 97, but the pipeline in .* has 96"):
    check_configs(opened, opened.model, encoder, opened.vae)


# Mistakes.


def edit(folder, file, remove=(), **values):
  path = folder / file
  content = {**json.loads(path.read_text()), **values}
  path.write_text(json.dumps({name: x for name, x in content.items() if name not in remove}))


def rename_in_index(folder, change):
  path = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
  content = json.loads(path.read_text())
  change(content["weight_map"])
  path.write_text(json.dumps(content))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def rewrite(folder, change):
  tensors = dict(safetensors.numpy.load_file(folder / WEIGHTS))
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / WEIGHTS)


def pickled(folder):
  (folder / WEIGHTS).unlink()
  (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / WEIGHTS).unlink(), "There are no weights in .*transformer: it has neither diffusion_pytorch_model.safetensors nor"),
    (pickled, "pickled weights only, such as diffusion_pytorch_model.bin: they are never read"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "is cut off, damaged or unreadable"),
    (lambda f: (f / WEIGHTS).write_bytes(b"no tensors"), "is cut off, damaged or unreadable"),
    (lambda f: (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": {}}'), "holds both"),
    (lambda f: rewrite(f, lambda x: x.pop("img_in.weight")), r"lack 1 tensor\(s\), first img_in.weight"),
    (lambda f: rewrite(f, lambda x: x.update(more=np.ones(1, np.float32))), r"hold 1 tensor\(s\) that the config does not know, first more"),
    (lambda f: rewrite(f, lambda x: x.update({"img_in.weight": np.ones((8, 64), np.float32)})), r"img_in.weight has shape \(8, 64\), but"),
    (lambda f: rewrite(f, lambda x: x.update({"img_in.weight": np.ones((64, 8), np.int8)})), "img_in.weight as I8: taken are float32, "),
])
def test_damaged_weights_are_named(broken, damage, message):
  damage(broken)
  with pytest.raises(ValueError, match=message) as error:
    load(broken, "mmdit")
  assert str(error.value).count(". ") == 0


@pytest.mark.parametrize("change, message", [
    (lambda x: x.update({"img_in.weight": "nowhere.safetensors"}), "names the file nowhere.safetensors, which is not in"),
    (lambda x: x.update({"more": x["img_in.weight"]}), "says that the tensor more is in .*safetensors, but it is not"),
    (lambda x: x.pop("img_in.weight"), "holds the tensor img_in.weight, which .* does not list there"),
    (lambda x: x.update({"img_in.weight": 3}), "has no weight_map"),
])
def test_an_index_must_agree_with_its_files(pipeline, tmp_path, change, message):
  pipeline.save_pretrained(tmp_path / "tiny", max_shard_size="300KB")
  rename_in_index(tmp_path / "tiny", change)
  with pytest.raises(ValueError, match=message):
    load(tmp_path / "tiny", "mmdit")


def test_names_and_shapes_are_checked_before_anything_is_read(broken, monkeypatch):
  rewrite(broken, lambda x: x.update({"proj_out.weight": np.ones((8, 8), np.float32)}))
  monkeypatch.setattr(files.TensorFiles, "read", lambda self, name: pytest.fail(f"{name} was read"))
  with pytest.raises(ValueError, match="proj_out.weight has shape"):
    load(broken, "mmdit")


def test_a_config_of_another_network_is_named(folder):
  opened = open_folder(folder)
  other = dataclasses.replace(opened, vae=dataclasses.replace(opened.vae, num_res_blocks=2))
  with pytest.raises(ValueError, match="are of different networks: only one of them has the weight"):
    load_weights(opened, "vae", specs_of(other)["vae"])


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "model_index.json").unlink(), "is no pipeline folder: it has no model_index.json"),
    (lambda f: edit(f, "model_index.json", _class_name="FluxPipeline"), "of class 'FluxPipeline': it must be 'QwenImage21Pipeline'"),
    (lambda f: edit(f, "model_index.json", vae=["diffusers", "AutoencoderKL"]), r"the vae is \['diffusers', 'AutoencoderKL'\]: it must be"),
    (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is no JSON"),
    (lambda f: (f / "model_index.json").write_text("[]"), "holds a JSON list"),
    (lambda f: (f / "transformer/config.json").unlink(), "The file .*transformer/config.json is missing"),
    (lambda f: (f / "processor/tokenizer.json").unlink(), "The file .*processor/tokenizer.json is missing"),
    (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "The file .*scheduler_config.json is missing"),
    (lambda f: edit(f, "transformer/config.json", _class_name="FluxTransformer"), "of class 'FluxTransformer': it must be"),
    (lambda f: edit(f, "transformer/config.json", ["num_layers"]), "The transformer's config.json lacks the field 'num_layers'"),
    (lambda f: edit(f, "transformer/config.json", patch_size=2), "only patch size 1"),
    (lambda f: edit(f, "vae/config.json", ["z_dim"]), "The autoencoder's config.json lacks the field 'z_dim'"),
    (lambda f: edit(f, "text_encoder/config.json", ["image_token_id"]), "The text encoder's config.json lacks the field 'image_token_id'"),
    (lambda f: edit(f, "scheduler/scheduler_config.json", _class_name="DDIM"), "of class 'DDIM': it must be 'FlowMatchEuler"),
    (lambda f: edit(f, "scheduler/scheduler_config.json", time_shift_type="linear"), "time_shift_type is 'linear'"),
    (lambda f: edit(f, "scheduler/scheduler_config.json", use_karras_sigmas=True), "use_karras_sigmas is True: only False is supported"),
    (lambda f: edit(f, "scheduler/scheduler_config.json", ["max_shift"]), "lacks the field 'max_shift'"),
])
def test_a_folder_that_is_no_such_pipeline_is_refused(broken, damage, message):
  damage(broken)
  with pytest.raises(ValueError, match=message):
    open_folder(broken)
