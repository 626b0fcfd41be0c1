"""LoRA files against PEFT, diffusers and ComfyUI's rule: both sides draw the same; and `qimg2.adapters` against PEFT's layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import safetensors.numpy
import torch

from qimg2 import adapters, layers
from qimg2 import params as P
from qimg2.models import mmdit
from qimg2.published import lora as lora_files
from qimg2.published.export import export_transformer
from qimg2.published.folder import open_folder
from qimg2.runtime.loras import Loras, parse_lora
from qimg2.runtime.offload import Offloaded
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.rehearsal.drawing import Drawer
from qimg2.runtime.sampling import Request, sample

EVERY = adapters.Settings(3, 6.0, "*")
REQUEST = Request(("a red poster",), num_steps=3, height=64, width=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny published folder."""
  path = tmp_path_factory.mktemp("published") / "tiny"
  reference.tiny_pipeline(3).save_pretrained(path)
  return path


@functools.cache
def model(folder):
  return open_folder(folder).model


@pytest.fixture
def adapter(folder):
  """An adapter of every linear map of the generator, none of whose factors is zero."""
  specs = adapters.specs(mmdit.specs(model(folder)), EVERY)
  leaves, tree = jax.tree.flatten(specs, is_leaf=P.is_param)
  return tree.unflatten([0.1 * jax.random.normal(jax.random.key(i), p.shape) for i, p in enumerate(leaves)])


def noise():
  return np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)


def theirs(folder):
  """[h, w, C] latents by the published pipeline as it is now."""
  last = {}
  def keep(pipe, step, t, values):
    last.update(values)
    return values
  reference.pipeline(folder)(REQUEST.prompts[0], latents=torch.from_numpy(noise()).reshape(1, -1, 8), height=64, width=96, num_inference_steps=3,
                             true_cfg_scale=1.0, callback_on_step_end=keep, output_type="latent")
  return last["latents"].numpy().reshape(4, 6, 8)


def ours(folder, tmp_path, *loras):
  """The same by qimg2."""
  np.save(tmp_path / "noise.npy", noise())
  opened = Drawer(str(folder), loras=loras).open(jax.devices()[:1])
  request = Request(**vars(REQUEST) | {"noise": str(tmp_path / "noise.npy"), "guidance": 1.0})
  return sample(opened.source, opened.load, request, opened.defaults)[0][0]


def test_what_we_write_draws_the_same_in_diffusers(folder, adapter, tmp_path):
  file = lora_files.export_lora(tmp_path / "x.safetensors", model(folder), adapter, EVERY.scale, "float32")
  plain = theirs(folder)
  reference.pipeline(folder).load_lora_weights(file)
  drawn = theirs(folder)
  reference.pipeline(folder).unload_lora_weights()
  assert np.abs(drawn - plain).max() > 0.1
  assert reference.relative_error(ours(folder, tmp_path, str(file)), drawn) <= 1e-4
  back = lora_files.open_lora(file, model(folder)).load(scale=EVERY.scale)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), back, adapter)
  assert jax.tree.map(lambda p: p.shape, lora_files.open_lora(file, model(folder)).specs(), is_leaf=P.is_param) == jax.tree.map(np.shape, adapter)


def test_what_peft_writes_draws_the_same_here(folder, tmp_path):
  """Ranks and alphas that differ by map, said in the metadata."""
  from diffusers import QwenImage21Pipeline
  from peft import LoraConfig
  from peft.utils import get_peft_model_state_dict
  transformer = reference.pipeline(folder).transformer
  config = LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "img_mlp.out", "modulation.1"], rank_pattern={"1.attn.to_q": 2},
                      alpha_pattern={"img_mlp.out": 3})
  torch.manual_seed(0)
  transformer.add_adapter(config, "made")
  with torch.no_grad():
    for name, p in transformer.named_parameters():
      if "lora_B" in name:
        p.copy_(0.2 * torch.randn(p.shape))
  drawn, state = theirs(folder), get_peft_model_state_dict(transformer, adapter_name="made")
  QwenImage21Pipeline.save_lora_weights(tmp_path, state, transformer_lora_adapter_metadata=config.to_dict())
  transformer.delete_adapters("made")
  file = tmp_path / "pytorch_lora_weights.safetensors"
  assert reference.relative_error(ours(folder, tmp_path, str(file)), drawn) <= 1e-4
  assert lora_files.open_lora(file, model(folder)).specs()["blocks"]["attn"]["q"]["a"].shape == (2, 64, 4), "layer 1 has rank 2"


def test_the_layer_and_its_gradients_are_peft_s():
  from peft import LoraConfig
  from peft.tuners.lora import Linear
  rng = np.random.default_rng(0)
  x, w, a, b, out = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 6), (4, 6), (2, 6), (4, 2), (5, 4)))
  base = torch.nn.Linear(6, 4, bias=False)
  layer = Linear(base, "x", LoraConfig(r=2, lora_alpha=7), r=2, lora_alpha=7)
  with torch.no_grad():
    for theirs, ours in ((base.weight, w), (layer.lora_A["x"].weight, a), (layer.lora_B["x"].weight, b)):
      theirs.copy_(torch.from_numpy(ours))
  given = torch.from_numpy(x).requires_grad_()
  y = layer(given)
  y.backward(torch.from_numpy(out))
  apply = lambda x, a, b: layers.linear(x, adapters.Adapted(jnp.asarray(w.T), a, b, adapters.Settings(2, 7.0).scale))
  found, pull = jax.vjp(apply, x, a.T, b.T)
  expected = (given.grad, layer.lora_A["x"].weight.grad.T, layer.lora_B["x"].weight.grad.T)
  for mine, its in zip((found, *pull(jnp.asarray(out))), (y, *expected)):
    np.testing.assert_allclose(mine, its.detach().numpy(), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(adapters.merged(adapters.Adapted(jnp.asarray(w.T), a.T, b.T, 3.5)).T,
                             w + layer.get_delta_weight("x").detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["*", "blocks/mlp/proj,blocks/mlp/out"])
def test_the_form_of_comfyui_changes_its_single_file_as_a_merge_does(folder, adapter, tmp_path, targets):
  """ComfyUI adds alpha / rank (1 without an alpha) times lora_up lora_down to the weight of the same name."""
  cfg, weights = model(folder), Pretrained(folder, devices=jax.devices()[:1]).load()["mmdit"]
  wanted, some = adapters.find_targets(mmdit.specs(cfg), adapters.Settings(1, targets=targets)), {}
  for path in wanted:
    adapters.place_at(some, path, {name: P.flatten(adapter)[f"{path}/{name}"] for name in ("a", "b")})
  file = lora_files.export_lora(tmp_path / "x.safetensors", cfg, some, EVERY.scale, "float32", comfyui=True)
  export_transformer(tmp_path / "plain.safetensors", cfg, weights, "float32", comfyui=True)
  export_transformer(tmp_path / "merged.safetensors", cfg, adapters.adapt(weights, some, EVERY.scale), "float32", comfyui=True)
  plain, merged, lora = (safetensors.numpy.load_file(path) for path in (tmp_path / "plain.safetensors", tmp_path / "merged.safetensors", file))
  names = {name.removesuffix(".lora_up.weight") for name in lora if name.endswith(".lora_up.weight")}
  assert len(lora) == 2 * len(names) and any(name.endswith("img_mlp.gate_up") for name in names)
  for name, x in plain.items():
    module = name.removeprefix("model.").removesuffix(".weight")
    change = lora[f"{module}.lora_up.weight"] @ lora[f"{module}.lora_down.weight"] if module in names else 0
    np.testing.assert_allclose(x + change, merged[name], rtol=1e-5, atol=1e-5)
  back = lora_files.open_lora(file, cfg)
  tree = adapters.adapt(weights, back.load(), 1.0)
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
               *(jax.tree.map(adapters.merged, x, is_leaf=adapters.is_adapted) for x in (tree, adapters.adapt(weights, some, EVERY.scale))))


def kohya(name):
  """A published name as kohya's scripts write it."""
  module, ending = name.removeprefix("transformer.").split(".lora_")
  return f"lora_unet_{module.replace('.', '_')}." + {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[ending]


def test_names_of_other_writers_and_their_alphas(folder, adapter, tmp_path):
  file = lora_files.export_lora(tmp_path / "x.safetensors", model(folder), {"blocks": adapter["blocks"]}, 2.0, "float32")
  tensors = safetensors.numpy.load_file(file)
  forms = {"kohya": {kohya(name): x for name, x in tensors.items()},
           "peft": {f"base_model.model.{name.removeprefix('transformer.')}": x for name, x in tensors.items()},
           "default": {name.replace(".weight", ".default.weight"): x for name, x in tensors.items()}}
  alphas = {f"{name.removesuffix('.lora_down.weight')}.alpha": np.array(1.5, np.float32) for name in forms["kohya"] if "lora_down" in name}
  for name, form in forms.items():
    safetensors.numpy.save_file(form | (alphas if name == "kohya" else {}), tmp_path / f"{name}.safetensors")
    found = lora_files.open_lora(tmp_path / f"{name}.safetensors", model(folder)).load()
    expected = adapter["blocks"]["attn"]["out"]["b"] * (1.0 if name == "kohya" else 2.0)  # alpha / rank is a half
    np.testing.assert_allclose(found["blocks"]["attn"]["out"]["b"], expected, rtol=1e-6)


QUERY = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize("changed, metadata, message", [
    ({f"{QUERY}.lora_magnitude_vector": (4,)}, {}, "holds .*magnitude_vector, which is DoRA: only plain LoRA"),
    ({}, {"lora_adapter_metadata": '{"transformer.use_dora": true}'}, "says that it is DoRA"),
    ({}, {"lora_adapter_metadata": "{"}, "lora_adapter_metadata of .* cannot be understood"),
    ({f"{QUERY}.lora_B.bias": (64,)}, {}, "which is a bias"), ({f"{QUERY}.lokr_w1": (4, 4)}, {}, "which is LoKr"),
    ({f"{QUERY}.lora_B.weight": None}, {}, "only one of the two matrices of transformer_blocks.0.attn.to_q"),
    ({"transformer.single_blocks.0.linear1.lora_A.weight": (4, 64)}, {}, "holds transformer.single_blocks.*no part of a LoRA of this generator"),
    ({"text_encoder.layers.0.self_attn.q_proj.lora_A.weight": (4, 64)}, {}, "no part of a LoRA of this generator"),
    ({f"{QUERY}.lora_A.weight": (4, 32)}, {}, r"matrices of shapes \(4, 32\) and \(64, 4\) for .*to_q, whose weight is 64 x 64"),
    ({"diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 64)}, {}, "holds a of transformer_blocks.0.attn.to_q twice")])
def test_what_is_no_lora_of_this_generator_is_named(folder, tmp_path, changed, metadata, message):
  shapes = {f"{QUERY}.lora_A.weight": (4, 64), f"{QUERY}.lora_B.weight": (64, 4)} | changed
  tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape}
  safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"} | metadata)
  with pytest.raises(ValueError, match=message) as error:
    lora_files.open_lora(tmp_path / "x.safetensors", model(folder))
  assert str(tmp_path) in str(error.value)


def test_a_lora_on_weights_that_come_and_go_and_on_shapes_alone(folder, adapter, tmp_path):
  file = lora_files.export_lora(tmp_path / "x,y.safetensors", model(folder), {"modulation": adapter["modulation"]}, 1.0)
  source = Pretrained(folder, devices=jax.devices()[:1])
  loras = Loras(source, (str(file), f"{file},-0.5"))
  offloaded = loras.on_offloaded(source.offloaded())
  assert isinstance(offloaded, Offloaded) and set(offloaded) == {"mmdit", "qwen3_vl", "vae"}
  weight = offloaded["mmdit"]["modulation"]
  assert (weight.scale, weight.base.scale) == (-0.5, 1.0) and not adapters.is_adapted(weight.base.base)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(loras.on(source.abstract(), abstract=True)["mmdit"]) == shapes(offloaded["mmdit"])
  assert parse_lora("a,b.safetensors") == ("a,b.safetensors", 1.0) and parse_lora("a,b.safetensors,0.25") == ("a,b.safetensors", 0.25)


def test_a_file_is_written_once_and_as_safetensors(folder, adapter, tmp_path):
  (tmp_path / "x.safetensors").touch()
  for name, message in (("x.safetensors", "x.safetensors exists already"), ("x.pt", "must end in .safetensors")):
    with pytest.raises(ValueError, match=message):
      lora_files.export_lora(tmp_path / name, model(folder), adapter, 1.0)
  with pytest.raises(ValueError, match="cannot be exported as 'int8'"):
    lora_files.export_lora(tmp_path / "y.safetensors", model(folder), adapter, 1.0, "int8")
