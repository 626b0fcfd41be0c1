"""Folders that we write, loaded by the published pipeline and by ourselves; and what cannot be written."""

import contextlib
import dataclasses
import json
import struct
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import safetensors
import safetensors.numpy
import torch
from commands import launch
from PIL import Image

from data_pipelines.tokenizer import PromptTokenizer, train_tokenizer
from qimg2 import flow, networks, sharding
from qimg2 import params as P
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.models.qwen3_vl_vision import VisionConfig
from qimg2.published import tensors
from qimg2.published.export import export_pipeline, export_transformer
from qimg2.published.files import open_file
from qimg2.published.folder import load_weights, open_folder
from qimg2.published.names import mmdit as mmdit_names
from qimg2.published.names import qwen3_vl as qwen3_vl_names
from qimg2.published.names import vae as vae_names
from qimg2.runtime.exporting import export, model_card

PARTS = {"mmdit": "transformer", "qwen3_vl": "text_encoder", "vae": "vae"}  # network -> of the pipeline
FIELDS = {"mmdit": "model", "qwen3_vl": "encoder", "vae": "vae"}  # network -> its config in what was opened
TABLES = {"mmdit": mmdit_names.table, "qwen3_vl": qwen3_vl_names.table, "vae": vae_names.table}
PROMPTS = ["", " ", "a red poster", 'the word "make it blue",\n in\ttwo  lines\n', "蓝色的海报，写着“你好”", "🦊🏔️ e\u0301 it's 1234", " spaces, "]
SCHEDULE = flow.Schedule(base_shift=0.4, terminal=None)


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer(["a red poster with the word make it blue", "<image1> <image2>"] * 3, 300)


@pytest.fixture(scope="module")
def nets(tokenizer):
  model = mmdit.Config(latent_channels=8, width=64, num_layers=2, num_heads=4, head_dim=16, context_width=64, rope_dims=(4, 6, 6))
  vision = VisionConfig(width=48, num_layers=3, num_heads=4, mlp_width=96, num_positions=64, out_width=64, deepstack_layers=(0, 2))
  encoder = qwen3_vl.Config(vocab_size=320, width=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=96,
                            mrope_sections=(6, 5, 5), image_token_id=tokenizer.image_token_id, vision=vision)
  autoencoder = vae.Config(base_dim=4, decoder_base_dim=6, latent_channels=8, num_res_blocks=1, latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8)
  return networks.Networks(model, encoder, autoencoder, tokenizer.num_system_tokens)


@pytest.fixture(scope="module")
def weights(nets):
  """Random weights, every one of them, with statistics that are not those of the config."""
  def draw(path, p):
    rng = np.random.default_rng(len(path) + p.size)
    return jnp.asarray((rng.normal(size=p.shape) / np.prod(p.shape[:-1]) ** 0.5 + (len(p.shape) == 1)).astype(np.float32))
  drawn = {network: P.map_with_path(draw, specs) for network, specs in nets.specs().items()}
  drawn["vae"]["statistics"]["std"] = jnp.abs(drawn["vae"]["statistics"]["std"]) + 1 / 3
  return drawn


def tokenizer_json(tokenizer, tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  tokenizer.save(path)
  return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def write(nets, weights, tokenizer, tmp_path_factory):
  """`write(**changes)` exports and returns the folder."""
  text = tokenizer_json(tokenizer, tmp_path_factory)
  def call(out=None, model=nets.model, encoder=nets.encoder, autoencoder=nets.vae, weights=weights, tokenizer_json=text, **settings):
    out = out or tmp_path_factory.mktemp("export") / "out"
    settings = {"dtype": "float32"} | settings
    return export_pipeline(out, model, encoder, autoencoder, weights, SCHEDULE, tokenizer_json, **settings)
  return call


@pytest.fixture(scope="module")
def exported(write):
  return write()


@pytest.fixture(scope="module")
def pipeline(exported):
  from diffusers import QwenImage21Pipeline
  reference.tiny_tokenizer()  # the import of transformers that this needs is safe only through `reference`
  return QwenImage21Pipeline.from_pretrained(exported)


def tensors_of(nets, weights, network, dtype=None):
  """Our weights under their published names."""
  specs = {name: p for name, p in nets.specs()[network].items() if name != "statistics"}
  return dict(tensors.export_tensors({name: weights[network][name] for name in specs}, specs, TABLES[network](getattr(nets, FIELDS[network])), dtype))


def assert_same(module, expected):
  found = {name: x.float().numpy() for name, x in module.state_dict().items()}
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x.astype(np.float32), err_msg=name)


def read_back(path, shardings=None):
  opened = open_folder(path)
  specs = networks.Networks(opened.model, opened.encoder, opened.vae, 1).specs()
  return {network: load_weights(opened, network, specs[network], shardings and shardings[network]) for network in PARTS}


def assert_trees_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.slow
@pytest.mark.parametrize("network", PARTS)
def test_diffusers_loads_the_same_tensors(pipeline, nets, weights, network):
  assert_same(getattr(pipeline, PARTS[network]), tensors_of(nets, weights, network))


def test_we_read_back_the_same_bits_and_configs(exported, nets, weights):
  assert_trees_equal(read_back(exported), weights)
  opened = open_folder(exported)
  assert (opened.model, opened.encoder, opened.schedule) == (nets.model, nets.encoder, SCHEDULE)
  statistics = {"latents_mean": opened.vae.latents_mean, "latents_std": opened.vae.latents_std}
  assert opened.vae == dataclasses.replace(nets.vae, **statistics)
  assert PromptTokenizer.load(opened.processor).num_system_tokens == nets.num_system_tokens


def test_statistics_survive_json_to_the_bit(exported, pipeline, weights):
  for name, values in weights["vae"]["statistics"].items():
    stored = json.loads((exported / "vae" / "config.json").read_text())[f"latents_{name}"]
    np.testing.assert_array_equal(np.float32(stored), values)
    np.testing.assert_array_equal(torch.tensor(getattr(pipeline.vae.config, f"latents_{name}")).numpy(), values)


@pytest.mark.slow
def test_bfloat16_files(write, nets, weights):
  from diffusers import QwenImage21Pipeline
  out = write(dtype="bfloat16")
  pipeline = QwenImage21Pipeline.from_pretrained(out, dtype=torch.bfloat16)
  for network, name in PARTS.items():
    assert getattr(pipeline, name).dtype == torch.bfloat16
    assert_same(getattr(pipeline, name), tensors_of(nets, weights, network, jnp.bfloat16))
  rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32), weights)
  rounded["vae"]["statistics"] = weights["vae"]["statistics"]
  assert_trees_equal(read_back(out), rounded)


@pytest.mark.slow
def test_sharded_weights_to_several_files(write, nets, weights):
  from diffusers import QwenImage21Pipeline
  mesh, rules = sharding.make_mesh({"fsdp": 4, "tensor": 2}), sharding.RULES["fsdp_tensor"]
  shardings = {network: sharding.param_shardings(specs, mesh, rules) for network, specs in nets.specs().items()}
  out = write(weights=jax.device_put(weights, shardings), max_shard_bytes=200_000)
  assert_trees_equal(read_back(out, shardings), weights)
  pipeline = QwenImage21Pipeline.from_pretrained(out)
  for network, name in PARTS.items():
    assert_same(getattr(pipeline, name), tensors_of(nets, weights, network))
    index = json.loads(next((out / name).glob("*.index.json")).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in tensors_of(nets, weights, network).values())
    for file in set(index["weight_map"].values()):
      sizes = [x.nbytes for x in safetensors.numpy.load_file(out / name / file).values()]
      assert len(sizes) == 1 or sum(sizes) <= 200_000


def test_transformer_alone(nets, weights, tmp_path):
  out = export_transformer(tmp_path / "one.safetensors", nets.model, weights["mmdit"], "float32")
  with safetensors.safe_open(out, framework="np") as file:
    assert mmdit_names.config(json.loads(file.metadata()["config"])) == nets.model
  expected = tensors_of(nets, weights, "mmdit")
  found = safetensors.numpy.load_file(out)
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x)
  assert struct.unpack("<Q", out.read_bytes()[:8])[0] % 8 == 0  # tensors are aligned


def covers(theirs, ours):
  """True when `theirs` says the same of everything that is in the JSON `ours`."""
  if isinstance(ours, dict):
    return all(name in theirs and covers(theirs[name], x) for name, x in ours.items())
  return theirs == ours


@pytest.mark.slow
def test_a_published_folder_goes_through_unchanged(tmp_path):
  from diffusers import QwenImage21Pipeline
  published = reference.tiny_pipeline(3, tied=True, causal_condition=False)
  published.save_pretrained(tmp_path / "in")
  opened = open_folder(tmp_path / "in")
  export_pipeline(tmp_path / "out", opened.model, opened.encoder, opened.vae, read_back(tmp_path / "in"), opened.schedule,
                  (opened.processor / "tokenizer.json").read_text(encoding="utf-8"), "float32")
  again = QwenImage21Pipeline.from_pretrained(tmp_path / "out")
  for name in PARTS.values():
    assert_same(getattr(again, name), reference.tensors(getattr(published, name)))
  for file in ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
    ours, theirs = (json.loads((tmp_path / part / file).read_text()) for part in ("out", "in"))
    if file.startswith("text"):
      ours["text_config"] = {name: x for name, x in ours["text_config"].items() if name not in ("max_position_embeddings", "tie_word_embeddings")}
    if file.startswith("vae"):  # float32 numbers where they had more digits
      for name in ("latents_mean", "latents_std"):
        np.testing.assert_array_equal(np.float32(ours.pop(name)), np.float32(theirs[name]))
    assert covers(theirs, ours), (file, ours, theirs)
  assert again._drop_idx == published._drop_idx and again.processor.tokenizer.get_vocab() == published.processor.tokenizer.get_vocab()


# Processor.


def ids_of(pipeline, prompt, images):
  """The ids that the pipeline itself hands to its text encoder."""
  seen = {}
  def record(*args, **kwargs):
    seen.update(kwargs)
    raise StopIteration
  with unittest.mock.patch.object(pipeline.text_encoder, "forward", record), contextlib.suppress(StopIteration):
    pipeline._get_qwen_prompt_embeds([prompt], images or None, "cpu")
  return seen["input_ids"][0].tolist()


@pytest.mark.parametrize("sizes", [[], [(64, 32)], [(64, 96), (32, 32)]])
def test_processor_gives_our_tokens(pipeline, tokenizer, sizes):
  images = [Image.new("RGB", (width, height), (200, 10, 60)) for height, width in sizes]
  for prompt in PROMPTS:
    ours = tokenizer.encode(prompt, [(height // 32, width // 32) for height, width in sizes])
    assert list(ids_of(pipeline, prompt, images)) == ours, prompt


@pytest.mark.parametrize("sizes", [[], [(64, 96), (32, 32)]])
def test_our_tokenizer_gives_the_published_processors_tokens(sizes, tmp_path):
  published = reference.tiny_pipeline(0)
  published.processor.save_pretrained(tmp_path)
  ours = PromptTokenizer.load(tmp_path)
  images = [Image.new("RGB", (width, height)) for height, width in sizes]
  for prompt in PROMPTS:
    assert list(ids_of(published, prompt, images)) == ours.encode(prompt, [(h // 32, w // 32) for h, w in sizes]), prompt
  assert published._drop_idx == ours.num_system_tokens


def test_system_turn_is_dropped_whole(pipeline, tokenizer):
  assert pipeline._drop_idx == tokenizer.num_system_tokens
  assert pipeline._img_token_id == tokenizer.image_token_id
  assert pipeline.processor.tokenizer.pad_token_id == tokenizer.pad_id
  messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]
  assert pipeline.processor.apply_chat_template(messages, add_generation_prompt=True) == (
      "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n")


def test_pipeline_draws_what_we_draw(pipeline, exported, tokenizer):
  opened = open_folder(exported)
  nets = networks.Networks(opened.model, opened.encoder, opened.vae, tokenizer.num_system_tokens)
  ours = read_back(exported)
  noise = np.random.default_rng(0).standard_normal((1, 4, 6, 8), np.float32)
  theirs = pipeline("a red poster", height=64, width=96, num_inference_steps=3, latents=torch.from_numpy(noise.reshape(1, 24, 8)),
                    output_type="latent").images.numpy()
  tokens, token_count = tokenizer.encode_batch(["a red poster"], 48)
  batch = {"target": np.zeros((1, 64, 96, 3), np.uint8), "sources": (), "tokens": tokens, "token_count": token_count}
  cond = jax.jit(nets.condition)(ours, batch)
  velocity, x, sigmas = jax.jit(nets.velocity), jnp.asarray(noise), opened.schedule.sigmas(3, 24)
  for sigma, sigma_next in zip(sigmas, sigmas[1:]):
    x = x + (sigma_next - sigma) * velocity(ours["mmdit"], x, jnp.full(1, sigma), cond)
  assert reference.relative_error(noise.reshape(1, 24, 8), theirs) > 0.1
  assert reference.relative_error(x.reshape(1, 24, 8), theirs) < 1e-4


def test_distilled_times_and_the_card(write):
  out = write(sample_sigmas=(1.0, 0.5), card="# mine\n")
  assert open_folder(out).sample_sigmas == (1.0, 0.5)
  assert (out / "README.md").read_text() == "# mine\n"


# Refusals.


@pytest.mark.parametrize("changes, message", [
    ({"model": {"attention": "full"}}, "model.attention is 'full', but the published QwenImage21Transformer2DModel knows only 'block_causal'"),
    ({"model": {"width": 48}}, "model.width is 48, but the published .* knows only 64"),
    ({"model": {"time_dim": 128}}, "model.time_dim is 128"),
    ({"model": {"rope_theta": 1e5}}, "model.rope_theta is 100000.0"),
    ({"encoder": {"vision": None}}, "encoder.vision is None, but the published text encoder always has a vision part"),
    ({"encoder": {"image_token_id": 7}}, "encoder.image_token_id is 7, but the tokenizer's"),
    ({"autoencoder": {"temporal_weights": False}}, "vae.temporal_weights is False, but the published autoencoder has weights over time"),
    ({"autoencoder": {"dim_mult": (1, 2, 4, 4), "temporal_downsample": (False, True, True)}}, "A latent stands for 8 px"),
    ({"dtype": "float16"}, "cannot be exported as 'float16': choose one of float32, bfloat16"),
    ({"tokenizer_json": '{"added_tokens": []}'}, "The tokenizer has no token <|image_pad|>"),
])
def test_what_cannot_be_published_is_refused(write, nets, tmp_path, changes, message):
  configs = {"model": nets.model, "encoder": nets.encoder, "autoencoder": nets.vae}
  changes = {name: dataclasses.replace(configs[name], **x) if name in configs else x for name, x in changes.items()}
  with pytest.raises(ValueError, match=message.replace("|", "\\|") if "<|" in message else message):
    write(out=tmp_path / "out", **changes)
  assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_written(write, nets, weights, tmp_path, monkeypatch):
  (tmp_path / "there").mkdir()
  with pytest.raises(ValueError, match="there exists already"):
    write(out=tmp_path / "there")
  with pytest.raises(ValueError, match="must end in .safetensors"):
    export_transformer(tmp_path / "one.bin", nets.model, weights["mmdit"])
  (tmp_path / ".out.part").mkdir()  # an earlier export that was killed
  monkeypatch.setattr("qimg2.published.export.published_schedule", lambda schedule: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    write(out=tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["there"]


# The launcher.


def test_run_is_exported_with_its_card(smoke_run, tmp_path, one_device):
  from diffusers import QwenImage21Pipeline
  out = export(smoke_run, tmp_path / "pipeline", dtype="float32")
  pipeline = QwenImage21Pipeline.from_pretrained(out)
  assert pipeline("a large green K", num_inference_steps=2, output_resolution=64).images[0].size == (64, 64)
  last = smoke_run.cfg.stages[-1].name
  averaged = smoke_run.stage_weights(last)["ema"]
  assert_same(pipeline.transformer, tensors_of(smoke_run.nets, {"mmdit": averaged}, "mmdit"))
  card = (out / "README.md").read_text()
  assert all(f"| {stage.name} | {stage.algorithm.name} |" in card for stage in smoke_run.cfg.stages)
  bucket = smoke_run.loader(smoke_run.stages[last]).buckets[0]
  assert f"height={bucket.height}, width={bucket.width}" in card
  early = model_card(smoke_run, "low_resolution", "ema", "float32", "x")
  assert "| low_resolution |" in early and "| sft |" not in early and "Evaluation of stage" not in early
  result = {"stage": last, "step": 1, "suites": {"glyphs": {"num_prompts": 3, "shares": {"ink": 1 / 3}}}}
  of_step = smoke_run.workdir / last / "evaluation_1.json"  # that of an earlier step, which is not the run's newest
  of_step.write_text(json.dumps(result))
  earlier, newest = (model_card(smoke_run, last, "ema", "float32", "x", step) for step in (1, 2))
  of_step.unlink()
  assert "Evaluation of stage sft on 3 held-out prompts of glyphs: ink right 33.3%." in earlier and "3 held-out prompts" not in newest + card
  assert "Evaluation of stage sft on 8 held-out prompts" in newest
  assert "ema/val_loss |" in card and "Evaluation of stage" in card and "from_pretrained" in card and "jax " in card
  assert pipeline._drop_idx == smoke_run.nets.num_system_tokens
  for dtype, folder in (("float32", out), ("bfloat16", export(smoke_run, tmp_path / "half"))):
    found = {"__name__": "card"}
    for part in (folder / "README.md").read_text().split("```python\n")[1:]:  # what it says runs as it stands
      exec(part.split("```")[0].replace(f'"{folder.name}"', repr(str(folder))), found)
    assert {str(found["pipe"].components[name].dtype) for name in ("transformer", "text_encoder", "vae")} == {f"torch.{dtype}"}
    assert found["image"].size == (bucket.width, bucket.height) and found["pictures"].shape[:3] == (1, bucket.height, bucket.width)


def test_command_line(smoke_run, tmp_path):
  out = tmp_path / "model.safetensors"
  first = next(stage.name for stage in smoke_run.cfg.stages if stage.algorithm.name == "flow_matching")
  result = launch("launch.export", f"--workdir={smoke_run.workdir}", f"--out={out}", f"--stage={first}", "--average=none", "--dtype=float32",
                  "--comfyui")
  assert result.returncode == 0, result.stderr
  expected = tensors_of(smoke_run.nets, {"mmdit": smoke_run.stage_weights(first)["model"]}, "mmdit")
  assert all(name.startswith("model.diffusion_model.") for name in safetensors.numpy.load_file(out))
  found = mmdit_names.published_tensors(open_file(out))
  assert found.shapes.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found.read(name), x)
  result = launch("launch.export", f"--workdir={smoke_run.workdir}", f"--out={out}", "--transformer_only")
  assert result.returncode == 1 and "exists already" in result.stderr and "Traceback" not in result.stderr
