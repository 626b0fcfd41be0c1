"""Tensors of files as the numbers that they stand for: float8 times its scale; and what a file is that holds something else.

A scaled float8 tensor `X.weight` has its scale beside it, one number or one for each row, as `X.scale_weight` or `X.weight_scale`. ComfyUI also
writes `X.comfy_quant` (JSON as bytes: the format), `X.scale_input` or `X.input_scale` (for products in float8, which no one computes here) and a
tensor `scaled_fp8` that marks the file; or names the formats in the file's metadata, `_quantization_metadata`.
"""

import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from qimg2.published.files import ALL, FLOATS, FLOATS8, GGUF, Tensor, TensorFiles

SCALES = (".scale_weight", ".weight_scale")
FORMAT = ".comfy_quant"
UNUSED = (FORMAT, ".scale_input", ".input_scale")
MARKER = "scaled_fp8"
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
TAKEN = (f"taken are float32, float16, bfloat16 and float8, with or without one scale a tensor or row, in .safetensors, and for the generator {GGUF}")
# Part of a tensor's name -> what its file is.
FOREIGN = {
    ".lora_": "a LoRA, which changes a model and is none", "lora_unet_": "a LoRA, which changes a model and is none",
    ".hada_w1": "a LoHa, which changes a model and is none", ".lokr_w1": "a LoKr, which changes a model and is none",
    ".quant_state.bitsandbytes": "weights in 4 bits of bitsandbytes", ".absmax": "weights in 4 bits of bitsandbytes",
    ".SCB": "weights in 8 bits of bitsandbytes", ".wscales": "weights in 4 bits of nunchaku (SVDQuant)",
    ".smooth_factor": "weights in 4 bits of nunchaku (SVDQuant)", ".qweight": "weights in few bits of GPTQ, AWQ or nunchaku",
    ".qzeros": "weights in few bits of GPTQ or AWQ", ".weight_scale_2": "weights in 4 bits of NVFP4",
    ".weight_scale_inv": "float8 with a scale for each block", ".encoded_exponent": "weights compressed by DFloat11",
    "first_stage_model.": "a whole checkpoint of another model", "cond_stage_model.": "a whole checkpoint of another model",
    "double_blocks.": "the weights of FLUX or of a model like it", "joint_blocks.": "the weights of Stable Diffusion 3",
    "input_blocks.": "the weights of Stable Diffusion", "transformer_blocks.0.img_mod.": "the weights of Qwen-Image 1, another architecture",
    "cap_embedder.": "the weights of Lumina or Z-Image", "patch_embedding.": "the weights of Wan or of a model like it",
}


def plain(files: TensorFiles) -> TensorFiles:
  """`files` with every tensor as what it stands for, and without the tensors that only say how.

  Raises:
    ValueError: a file of something else, which is named; a type or a format that is not taken; a scale that is missing, of no tensor or of another
      shape. Says what would be taken.
  """
  _check_known(files)
  for name, found in _formats(files):
    if found.get("format") not in FORMATS or found.get("convrot"):
      kind = f"{found.get('format')}{' rotated by ConvRot' if found.get('convrot') else ''}"
      raise ValueError(f"{files.folder} stores {name} in ComfyUI's format {kind}: {TAKEN}.")
    if name + FORMAT in files.tensors and not any(name + suffix in files.tensors for suffix in SCALES):
      raise ValueError(f"{files.folder} says that {name}.weight is scaled, but it lacks {name}{SCALES[1]}: fetch it again.")
  scales = {name: name[:-len(suffix)] + ".weight" for name in files.tensors for suffix in SCALES if name.endswith(suffix)}
  tensors = {name: tensor for name, tensor in files.tensors.items()
             if name not in scales and not name.endswith(UNUSED) and name.split(".")[-1] != MARKER}
  for name, of in scales.items():
    if of not in tensors:
      raise ValueError(f"{files.folder} holds the scale {name}, but no tensor {of}: fetch it again.")
    tensors[of] = _scaled(tensors[of], files.tensors[name], of)
  for name, tensor in tensors.items():
    if tensor.file.suffix != GGUF and tensor.kind not in FLOATS | FLOATS8:
      raise ValueError(f"{tensor.file} stores the tensor {name} as {tensor.kind}: {TAKEN}.")
  return dataclasses.replace(files, tensors=tensors)


def _check_known(files: TensorFiles) -> None:
  for name in files.tensors:
    what = next((what for part, what in FOREIGN.items() if part in name), None)
    if what:
      raise ValueError(f"{files.folder} holds {what} (such as the tensor {name}): {TAKEN}.")


def _formats(files: TensorFiles) -> Iterator[tuple[str, dict]]:
  """(layer, what ComfyUI notes of how it is stored) of all layers of which there is a note."""
  notes = {name.removesuffix(FORMAT): tensor.read(ALL).tobytes() for name, tensor in files.tensors.items() if name.endswith(FORMAT)}
  try:
    for name, note in notes.items():
      yield name, dict(json.loads(note))
    for name, note in json.loads(files.metadata.get("_quantization_metadata", "{}")).get("layers", {}).items():
      yield name, {"format": note} if isinstance(note, str) else dict(note)
  except (TypeError, ValueError, AttributeError) as error:
    raise ValueError(f"{files.folder} notes how its tensors are stored in a form that is not understood ({error}): {TAKEN}.") from error


def _scaled(tensor: Tensor, scale: Tensor, name: str) -> Tensor:
  rows = tensor.shape[0] if tensor.shape else 1
  num = int(np.prod(scale.shape))
  if tensor.kind not in FLOATS8 or scale.kind not in FLOATS or num not in (1, rows) or scale.shape[1:] not in ((), (1,)):
    raise ValueError(f"{tensor.file} stores the tensor {name} as {tensor.kind} of shape {tensor.shape}, its scale as {scale.kind} of shape "
                     f"{scale.shape}: {TAKEN}.")
  def read(part: slice) -> np.ndarray:
    factors = scale.read(ALL).astype(np.float32).reshape(-1, *(1,) * (len(tensor.shape) - 1))
    return tensor.read(part) * (factors if num == 1 else factors[part])
  return dataclasses.replace(tensor, read=read)
