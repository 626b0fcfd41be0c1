"""Files of a generator alone: ComfyUI's, float8, GGUF; and what is not taken."""

import json
import shutil

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from published_forms import assert_trees_equal, change_json, read_network

from qimg2.published.export import export_transformer
from qimg2.published.files import open_file
from qimg2.published.folder import open_folder
from qimg2.published.quantised import plain
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.sampling import Request, pretrained_defaults, sample

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
GATE, PROJ, GATE_UP = (f"transformer_blocks.{{}}.img_mlp.{part}.weight" for part in ("gate_layer", "proj", "gate_up"))


@pytest.fixture(scope="module")
def folder(tiny_folder):
  return tiny_folder


@pytest.fixture(scope="module")
def whole(folder):
  """The generator's weights."""
  return read_network(folder, "mmdit")


# Single files of the generator.


def fuse(x, prefix):
  """Tensors of the published class as ComfyUI has them."""
  for number in range(2):
    x[GATE_UP.format(number)] = torch.cat([x.pop(GATE.format(number)), x.pop(PROJ.format(number))])
  return {prefix + name: tensor for name, tensor in x.items()}


@pytest.fixture(scope="module")
def arrays(folder):
  """The generator's tensors under their published names."""
  return safetensors.torch.load_file(folder / TRANSFORMER)


def without_generator(folder, tmp_path):
  """A copy of a folder that lacks the generator's weights, which a file stands for."""
  rest = shutil.copytree(folder, tmp_path / "rest")
  (rest / TRANSFORMER).unlink()
  return rest


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_comfyui_files_hold_the_same(folder, arrays, whole, tmp_path, prefix):
  rest = without_generator(folder, tmp_path)
  fused = fuse(dict(arrays), prefix)
  safetensors.torch.save_file(fused, tmp_path / "one.safetensors")
  assert_trees_equal(read_network(rest, "mmdit", transformer=tmp_path / "one.safetensors"), whole)
  if prefix:
    safetensors.torch.save_file(fused | {"vae.encoder.conv1.weight": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="holds vae.encoder.conv1.weight beside the tensors .*: only files of the generator alone are taken"):
      read_network(folder, "mmdit", transformer=tmp_path / "more.safetensors")
  else:
    safetensors.torch.save_file(fused | {GATE.format(1): arrays[GATE.format(1)]}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="gate_layer.weight twice, once as part of img_mlp.gate_up.weight"):
      read_network(folder, "mmdit", transformer=tmp_path / "more.safetensors")


def test_a_comfyui_file_is_written_and_draws_the_same(folder, arrays, whole, tmp_path, one_device):
  opened = open_folder(folder)
  for dtype in ("float32", "bfloat16"):
    out = export_transformer(tmp_path / f"{dtype}.safetensors", opened.model, whole, dtype, comfyui=True)
    expected = fuse({name: x.to(getattr(torch, dtype)) for name, x in arrays.items()}, "model.diffusion_model.")
    found = safetensors.torch.load_file(out)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
  request = Request(("a red poster",), height=64, width=64, num_steps=2)
  draw = lambda source: sample(source, source.load, request, pretrained_defaults(source))[:2]
  rest = without_generator(folder, tmp_path)
  assert_trees_equal(draw(Pretrained(rest, "float32", transformer=tmp_path / "float32.safetensors")), draw(Pretrained(folder, "float32")))
  change_json(shutil.copytree(folder, tmp_path / "other") / "transformer/config.json", causal_condition=False)
  with pytest.raises(ValueError, match="is of a generator with model.condition_time 'zero', but the folder .* is of one with 'shared'"):
    open_folder(tmp_path / "other", transformer=tmp_path / "float32.safetensors")


# float8.


EIGHT = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("dtype", EIGHT.values(), ids=EIGHT)
def test_every_value_of_float8_is_read(dtype, tmp_path):
  values = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(16, 16)
  safetensors.torch.save_file({"x.weight": values}, tmp_path / "x.safetensors")
  files = plain(open_file(tmp_path / "x.safetensors"))
  found = files.read("x.weight")
  assert found.dtype == np.float32 and files.main_dtype() == "bfloat16"
  np.testing.assert_array_equal(found, values.float().numpy())


def scaled(x, dtype, form):
  """float8 tensors of the blocks' maps in a form of ComfyUI, and what they stand for."""
  stored, meant = {}, {}
  for number, (name, tensor) in enumerate(x.items()):
    stored[name] = meant[name] = tensor
    if "blocks" in name and tensor.ndim == 2:
      layer, rows = name.removesuffix(".weight"), form == "rows"
      scale = 0.01 + 0.1 * torch.rand(tensor.shape[0], 1) if rows else torch.tensor(0.03 + number / 1000)
      stored[name] = (tensor / scale).to(dtype)
      meant[name] = stored[name].float() * scale
      stored[f"{layer}.{'scale_weight' if form == 'marker' else 'weight_scale'}"] = scale
      stored[f"{layer}.{'scale_input' if form == 'marker' else 'input_scale'}"] = torch.tensor(1.0)
      if form == "rows":
        note = json.dumps({"format": "float8_e4m3fn" if dtype == torch.float8_e4m3fn else "float8_e5m2"})
        stored[f"{layer}.comfy_quant"] = torch.tensor(list(note.encode()), dtype=torch.uint8)
  if form == "marker":
    stored["scaled_fp8"] = torch.zeros(2).to(dtype)
  return stored, meant


@pytest.mark.parametrize("form, dtype", [("marker", EIGHT["e4m3"]), ("marker", EIGHT["e5m2"]), ("rows", EIGHT["e4m3"])])
def test_scaled_float8_is_multiplied_while_read(folder, arrays, tmp_path, form, dtype):
  stored, meant = scaled(fuse(dict(arrays), "model.diffusion_model."), dtype, form)
  safetensors.torch.save_file(stored, tmp_path / "x.safetensors")
  safetensors.torch.save_file(meant, tmp_path / "meant.safetensors")
  found, expected = (read_network(folder, "mmdit", transformer=tmp_path / f"{name}.safetensors") for name in ("x", "meant"))
  assert_trees_equal(found, expected)


@pytest.mark.parametrize("change, message", [
    ({"x.weight_scale": torch.ones(4, 2)}, "x.weight as F8_E4M3 of shape .4, 8., its scale as F32 of shape .4, 2.: taken are float32"),
    ({"x.weight_scale": torch.ones(2)}, "its scale as F32 of shape .2,.: taken are"),
    ({"y.weight_scale": torch.ones(1)}, "holds the scale y.weight_scale, but no tensor y.weight: fetch"),
    ({"x.comfy_quant": {"format": "float8_e4m3fn"}}, "says that x.weight is scaled, but it lacks x.weight_scale: fetch"),
    ({"x.comfy_quant": {"format": "mxfp8"}}, "stores x in ComfyUI's format mxfp8: taken are float32"),
    ({"x.comfy_quant": {"format": "int8_tensorwise", "convrot": True}}, "format int8_tensorwise rotated by ConvRot: taken are"),
    ({"x.comfy_quant": {"format": "float8_e4m3fn", "convrot": True}, "x.weight_scale": torch.ones(4)}, "float8_e4m3fn rotated by ConvRot: taken"),
    ({"x.comfy_quant": [1]}, "in a form that is not understood"),
    ({"x.weight_scale_inv": torch.ones(1, 1)}, "holds float8 with a scale for each block .such as the tensor x.weight_scale_inv.: taken are"),
    ({"metadata": {"x": {"format": "nvfp4"}}}, "stores x in ComfyUI's format nvfp4: taken are"),
])
def test_other_forms_of_few_bits_are_named(tmp_path, change, message):
  metadata = {"_quantization_metadata": json.dumps({"layers": change.pop("metadata")})} if "metadata" in change else None
  notes = {name: torch.tensor(list(json.dumps(x).encode()), dtype=torch.uint8) if isinstance(x, (dict, list)) else x for name, x in change.items()}
  safetensors.torch.save_file({"x.weight": torch.ones(4, 8).to(torch.float8_e4m3fn), **notes}, tmp_path / "x.safetensors", metadata)
  with pytest.raises(ValueError, match=message):
    plain(open_file(tmp_path / "x.safetensors"))


# GGUF.


def write_gguf(path, arrays, kinds, architecture="qwen_image", **fields):
  """`arrays` quantised to `kinds`, or the bytes of blocks as they are."""
  writer = gguf.GGUFWriter(path, architecture)
  for name, shape in fields.items():
    writer.add_array(f"comfy.gguf.orig_shape.{name.replace('_', '.')}", shape)
  for name, x in arrays.items():
    data = x if x.dtype == np.uint8 else gguf.quants.quantize(np.ascontiguousarray(x, np.float32), kinds[name])
    writer.add_tensor(name, data, raw_dtype=kinds[name])
  for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    step()


def test_a_gguf_generator_is_what_its_blocks_say(folder, arrays, tmp_path):
  kinds, meant = {}, {}
  fused = {name: x.numpy() for name, x in fuse(dict(arrays), "").items()}
  for name, x in fused.items():
    kind = gguf.GGMLQuantizationType.F32
    if "blocks" in name and x.ndim == 2:
      kind = gguf.GGMLQuantizationType.Q8_0 if "attn" in name else gguf.GGMLQuantizationType.BF16
    kinds[name], meant[name] = kind, x
    if kind.name == "Q8_0":  # blocks of 32 numbers: a float16 step, the largest number in 127 of it
      blocks = x.reshape(-1, 32)
      step = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
      whole = np.trunc(blocks / step + np.copysign(np.float32(0.5), blocks))
      meant[name] = (whole * step.astype(np.float16).astype(np.float32)).reshape(x.shape)
    elif kind.name == "BF16":
      meant[name] = x.astype(jax.numpy.bfloat16).astype(np.float32)
  write_gguf(tmp_path / "x.gguf", fused, kinds)
  safetensors.numpy.save_file(meant, tmp_path / "meant.safetensors")
  found, expected = (read_network(folder, "mmdit", transformer=tmp_path / name) for name in ("x.gguf", "meant.safetensors"))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-7 * float(np.abs(y).max())), found, expected)
  (tmp_path / "cut.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:-5000])
  with pytest.raises(ValueError, match="cut.gguf is no readable GGUF file, or is cut off"):
    read_network(folder, "mmdit", transformer=tmp_path / "cut.gguf")


def q4_k(block):
  """256 numbers of a block of Q4_K: two float16 factors, 8 pairs of scale and minimum in 6 bits each, 4 bits for each number."""
  d, dmin = np.frombuffer(block[:4].tobytes(), np.float16).astype(np.float32)
  packed, bits, numbers = block[4:16].astype(int), block[16:], []
  for group in range(8):
    if group < 4:
      scale, minimum = packed[group] & 63, packed[group + 4] & 63
    else:
      scale, minimum = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4, packed[group + 4] >> 4 | packed[group] >> 6 << 4
    part = bits[32 * (group // 2):32 * (group // 2) + 32]
    numbers += [d * scale * q - dmin * minimum for q in (part & 15 if group % 2 == 0 else part >> 4).astype(np.float32)]
  return np.array(numbers, np.float32)


def test_types_of_gguf_and_their_shapes(tmp_path):
  rng, kinds, arrays = np.random.default_rng(0), {}, {}
  for kind in (gguf.GGMLQuantizationType[name] for name in ("Q4_K", "Q5_K", "Q6_K", "Q2_K", "IQ4_XS", "Q4_0", "F16")):
    num, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 40, (6, 256 // num * size), np.uint8)  # small, so that the float16 factors in it are numbers
    kinds[f"{kind.name}.weight"], arrays[f"{kind.name}.weight"] = kind, raw
  write_gguf(tmp_path / "x.gguf", arrays, kinds)
  files = open_file(tmp_path / "x.gguf")
  assert set(files.shapes.values()) == {(6, 256)}
  for name, raw in arrays.items():
    expected = gguf.quants.dequantize(raw, kinds[name])
    np.testing.assert_array_equal(files.read(name), expected)
    np.testing.assert_array_equal(files.tensors[name].part(1, 3).read(slice(None)), expected[2:4])
  np.testing.assert_allclose(files.read("Q4_K.weight"), [q4_k(row) for row in arrays["Q4_K.weight"]], rtol=1e-6)
  writer_shape = {"w.weight": gguf.GGMLQuantizationType.Q8_0}
  values = rng.normal(size=(6, 64)).astype(np.float32)
  write_gguf(tmp_path / "y.gguf", {"w.weight": values}, writer_shape, w_weight=(24, 16))
  found = open_file(tmp_path / "y.gguf")
  assert found.shapes == {"w.weight": (24, 16)}  # what was reshaped for the sake of its blocks
  expected = gguf.quants.dequantize(gguf.quants.quantize(values, writer_shape["w.weight"]), writer_shape["w.weight"]).reshape(24, 16)
  np.testing.assert_array_equal(found.read("w.weight"), expected)
  np.testing.assert_array_equal(found.tensors["w.weight"].part(1, 2).read(slice(None)), expected[12:])


def test_without_the_package_the_mend_is_named(tmp_path, monkeypatch):
  (tmp_path / "x.gguf").write_bytes(b"GGUF")
  with pytest.raises(ValueError, match="x.gguf is no readable GGUF file"):
    open_file(tmp_path / "x.gguf")
  monkeypatch.setitem(__import__("sys").modules, "gguf", None)
  with pytest.raises(ValueError, match="x.gguf install what knows GGUF files: pip install gguf"):
    open_file(tmp_path / "x.gguf")


# What is not taken.


@pytest.mark.parametrize("name, what", [
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA"), ("lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight", "a LoRA"),
    ("transformer_blocks.0.attn.to_q.weight.absmax", "weights in 4 bits of bitsandbytes"), ("x.SCB", "weights in 8 bits of bitsandbytes"),
    ("transformer_blocks.0.attn.to_q.wscales", "weights in 4 bits of nunchaku"), ("model.layers.0.mlp.up_proj.qzeros", "of GPTQ or AWQ"),
    ("double_blocks.0.img_attn.qkv.weight", "the weights of FLUX"), ("transformer_blocks.0.img_mod.1.weight", "the weights of Qwen-Image 1"),
    ("model.diffusion_model.input_blocks.0.0.weight", "the weights of Stable Diffusion"),
])
def test_files_of_something_else_are_named(folder, tmp_path, name, what):
  safetensors.torch.save_file({name: torch.ones(2, 2)}, tmp_path / "x.safetensors")
  with pytest.raises(ValueError, match=f"x.safetensors holds .*{what}.* .such as the tensor {name}.: taken are float32") as error:
    read_network(folder, "mmdit", transformer=tmp_path / "x.safetensors")
  assert str(error.value).count(". ") == 0


@pytest.mark.parametrize("name, message", [
    ("x.ckpt", "x.ckpt is a pickle, which is never read, since it can run any code: convert it to .safetensors"),
    ("x.safetensors", "x.safetensors is cut off, damaged or unreadable"), ("nothing.gguf", "There is no file .*nothing.gguf: name a .safetensors or"),
])
def test_a_file_that_cannot_be_read_is_named(folder, tmp_path, name, message):
  if name.startswith("x"):
    (tmp_path / name).write_bytes(b"x")
  with pytest.raises(ValueError, match=message):
    open_folder(folder, transformer=tmp_path / name)
