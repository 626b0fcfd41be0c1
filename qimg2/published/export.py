"""Weights written as a folder that the published pipeline (`QwenImage21Pipeline.from_pretrained` of diffusers) loads as it is.

Weights may be sharded over the mesh of one process. They go to the files one tensor at a time, so host memory holds a few tensors whatever the
size of the model. A safetensors file is eight bytes with the length of the header, the header (JSON) and the bytes of the tensors, without
gaps (https://github.com/huggingface/safetensors). Everything is written under a hidden name beside the target, which is renamed at the end: a
folder that is there is whole.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from qimg2 import flow
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.models.qwen3_vl_vision import VisionConfig
from qimg2.published import tensors
from qimg2.published.folder import COMPONENTS, PIPELINE_CLASS, PROCESSOR, PROCESSOR_FILES, SCHEDULER_CLASS, published_schedule
from qimg2.published.names import mmdit as mmdit_names
from qimg2.published.names import qwen3_vl as qwen3_vl_names
from qimg2.published.names import vae as vae_names

DIFFUSERS_VERSION = "0.42.1"  # the release whose layout this is
FILE_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
PX_PER_LATENT = 16  # fixed in the published pipeline
# Bounds of an image for the processor, in px in all: the smallest is one token, the largest that of Qwen3-VL.
MIN_PIXELS, MAX_PIXELS = 32 * 32, 4096 * 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "Qwen3VLProcessor", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>",
    "clean_up_tokenization_spaces": False, "model_max_length": qwen3_vl_names.MAX_POSITIONS}
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
DEFAULT_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---

An image generator written by qimg2; `QwenImage21Pipeline.from_pretrained` of diffusers loads this folder.
"""


def export_pipeline(out: str | pathlib.Path, model: mmdit.Config, encoder: qwen3_vl.Config, autoencoder: vae.Config, weights: dict[str, dict],
                    schedule: flow.Schedule, tokenizer_json: str, dtype: str = "bfloat16", max_shard_bytes: float = 5e9, card: str = "",
                    sample_sigmas: Sequence[float] | None = None, processor_files: Mapping[str, bytes] = MappingProxyType({})) -> pathlib.Path:
  """Writes the folder `out` and returns its path.

  Args:
    out: a folder that is not there yet.
    model, encoder, autoencoder: configs of the networks.
    weights: {"mmdit", "qwen3_vl", "vae"}: trees as the specs of `networks.Networks`, jax arrays on the devices of this process. An encoder whose
      tree has no head is written without one, which no pipeline reads. The latent
      statistics among the VAE's weights go to its config.json as exact float32 numbers, whatever `dtype` is.
    schedule: gives the sampling times.
    tokenizer_json: text of the tokenizer.json.
    dtype: of the files, "float32" or "bfloat16".
    max_shard_bytes: largest size of one file's tensors; a component that needs more gets several files and an index.
    card: text of README.md; empty for two lines.
    sample_sigmas: sampling times before the shift that a distilled model needs, from 1 down, without the last 0.
    processor_files: files of the processor/ of the folder that the encoder is from, name -> content; they stand in place of ours.

  Raises:
    ValueError: `out` exists, an unknown dtype, or networks that the published pipeline cannot express. Nothing is written then.
  """
  check_dtype(dtype)
  statistics = {name: tuple(float(x) for x in np.asarray(weights["vae"]["statistics"][name], np.float32)) for name in ("mean", "std")}
  autoencoder = dataclasses.replace(autoencoder, latents_mean=statistics["mean"], latents_std=statistics["std"])
  configs = {"mmdit": mmdit_names.published_config(model),
             "qwen3_vl": qwen3_vl_names.published_config(encoder, special_tokens(tokenizer_json)) | {"dtype": dtype},
             "vae": vae_names.published_config(autoencoder)}
  _check_pipeline(encoder.vision, autoencoder)
  networks = {"mmdit": (mmdit.specs(model), mmdit_names.table(model)), "qwen3_vl": (qwen3_vl.specs(encoder), qwen3_vl_names.table(encoder)),
              "vae": (vae.specs(autoencoder), vae_names.table(autoencoder))}
  with renamed_at_the_end(out) as part:
    part.mkdir()
    for network, (specs, table) in networks.items():
      if network == "qwen3_vl" and "head" not in weights[network]:
        specs, table = ({name: x for name, x in whole.items() if name != "head"} for whole in (specs, table))
      folder, params = part / COMPONENTS[network].folder, {name: weights[network][name] for name in specs}
      _write_json(folder / "config.json", configs[network])
      exported = tensors.export_tensors(params, specs, table, dtype)
      _write_component(folder, COMPONENTS[network].stem, tensors.published_shapes(specs, table), exported, dtype, max_shard_bytes)
    _write_json(part / "model_index.json", _model_index(sample_sigmas))
    _write_json(part / "scheduler" / "scheduler_config.json", published_schedule(schedule))
    _write_processor(part / PROCESSOR, encoder.vision, tokenizer_json, processor_files)
    (part / "README.md").write_text(card or DEFAULT_CARD, encoding="utf-8")
  return pathlib.Path(out)


def export_transformer(out: str | pathlib.Path, model: mmdit.Config, weights: dict, dtype: str = "bfloat16", comfyui: bool = False) -> pathlib.Path:
  """Writes the generator alone to the file `out`, its published config as JSON under "config" in the file's metadata; returns the path.

  Args:
    out: a .safetensors file that is not there yet.
    model: config of the generator.
    weights: its tree, as `mmdit.specs(model)`.
    dtype: of the file, "float32" or "bfloat16".
    comfyui: whether its tensors have the names of ComfyUI's single files, and some are fused as there; else those of the published class.

  Raises:
    ValueError: `out` exists or has another ending, an unknown dtype, or a generator that the published class cannot express.
  """
  check_dtype(dtype)
  if pathlib.Path(out).suffix != ".safetensors":
    raise ValueError(f"The file {out} must end in .safetensors.")
  specs, table = mmdit.specs(model), mmdit_names.table(model)
  metadata = {"format": "pt", "config": json.dumps(mmdit_names.published_config(model))}
  with renamed_at_the_end(out) as part:
    write_file(part, tensors.published_shapes(specs, table), tensors.export_tensors(weights, specs, table, dtype), dtype, metadata,
                mmdit_names.comfyui_place if comfyui else _own_place)
  return pathlib.Path(out)


def special_tokens(tokenizer_json: str) -> dict[str, int]:
  """Text -> id of the special tokens of a tokenizer.json (its text)."""
  return {token["content"]: token["id"] for token in json.loads(tokenizer_json)["added_tokens"]}


def check_dtype(dtype: str) -> None:
  """Raises a `ValueError` for a type that files are not written in."""
  if dtype not in FILE_DTYPES:
    raise ValueError(f"Weights cannot be exported as {dtype!r}: choose one of {', '.join(FILE_DTYPES)}.")


def _check_pipeline(vision: VisionConfig, autoencoder: vae.Config) -> None:
  if not autoencoder.temporal_weights:
    raise ValueError("vae.temporal_weights is False, but the published autoencoder has weights over time: this autoencoder cannot be exported.")
  if autoencoder.spatial_factor != PX_PER_LATENT or vision.token_px != 2 * PX_PER_LATENT:
    raise ValueError(f"A latent stands for {autoencoder.spatial_factor} px and an image token for {vision.token_px} px, but the published "
                     f"pipeline knows only {PX_PER_LATENT} and {2 * PX_PER_LATENT}: these networks cannot be exported.")


@contextlib.contextmanager
def renamed_at_the_end(out: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """A hidden path beside `out` that is renamed to it when all went well, and removed when not."""
  out = pathlib.Path(out)
  if out.exists():
    raise ValueError(f"{out} exists already: name one that does not, or remove it.")
  out.parent.mkdir(parents=True, exist_ok=True)
  part = out.with_name(f".{out.name}.part")
  _remove(part)  # of an export that was killed
  try:
    yield part
    part.rename(out)
  finally:
    _remove(part)


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


# Files.


def _json_text(value: dict[str, Any]) -> str:
  return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.parent.mkdir(exist_ok=True)
  path.write_text(_json_text(value), encoding="utf-8")


def _write_component(folder: pathlib.Path, stem: str, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[tuple[str, np.ndarray]],
                     dtype: str, max_shard_bytes: float) -> None:
  itemsize = jnp.dtype(dtype).itemsize
  shards: list[dict[str, tuple[int, ...]]] = [{}]
  room = max_shard_bytes
  for name, shape in shapes.items():
    size = math.prod(shape) * itemsize
    if size > room and shards[-1]:
      shards.append({})
      room = max_shard_bytes
    shards[-1][name] = shape
    room -= size
  names = [f"{stem}.safetensors"] if len(shards) == 1 else [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  for name, shard in zip(names, shards):
    write_file(folder / name, shard, tensors, dtype, {"format": "pt"})
  if len(shards) > 1:
    total = sum(math.prod(shape) * itemsize for shape in shapes.values())
    _write_json(folder / f"{stem}.safetensors.index.json", {
        "metadata": {"total_size": total}, "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard}})


def _own_place(name: str) -> tuple[str, int, int]:
  return name, 0, 1


def write_file(path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[tuple[str, np.ndarray]], dtype: str,
                metadata: Mapping[str, str], place: Callable[[str], tuple[str, int, int]] = _own_place) -> None:
  """Writes the next tensors of `tensors`, which must be those of `shapes` in order. `place` gives (name in the file, which part of its rows, number
  of parts) of each; parts of a tensor have equal shapes."""
  header: dict[str, Any] = {"__metadata__": dict(metadata)}
  begins, end = {}, 0
  for name, shape in shapes.items():
    stored, number, num_parts = place(name)
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    if stored not in header:
      begin, end = end, end + num_parts * size
      header[stored] = {"dtype": FILE_DTYPES[dtype], "shape": [num_parts * shape[0], *shape[1:]], "data_offsets": [begin, end]}
    begins[name] = header[stored]["data_offsets"][0] + number * size
  raw = json.dumps(header).encode()
  raw += b" " * (-len(raw) % 8)  # tensors start at a multiple of eight
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(raw)) + raw)
    for expected, shape in shapes.items():
      name, x = next(tensors)
      assert (name, x.shape, x.dtype) == (expected, shape, jnp.dtype(dtype)), (name, x.shape, x.dtype, expected, shape)
      file.seek(8 + len(raw) + begins[name])
      file.write(x.reshape(-1).view(np.uint8).data)


def _model_index(sample_sigmas: Sequence[float] | None) -> dict[str, Any]:
  index = {part.folder: [part.library, part.name] for part in COMPONENTS.values()}
  return {"_class_name": PIPELINE_CLASS, "_diffusers_version": DIFFUSERS_VERSION, **index, "processor": ["transformers", "Qwen3VLProcessor"],
          "scheduler": ["diffusers", SCHEDULER_CLASS],
          "sample_sigmas": None if sample_sigmas is None else [float(sigma) for sigma in sample_sigmas]}


def _write_processor(folder: pathlib.Path, vision: VisionConfig, tokenizer_json: str, given: Mapping[str, bytes]) -> None:
  folder.mkdir()
  ours = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": _json_text(TOKENIZER_CONFIG)}
  if not any(name in given for name in PROCESSOR_FILES):
    ours[PROCESSOR_FILES[0]] = _json_text(_processor_config(vision))
  if not any(name in given for name in CHAT_TEMPLATES) and b'"chat_template"' not in given.get("tokenizer_config.json", b""):
    ours[CHAT_TEMPLATES[0]] = CHAT_TEMPLATE
  for name, content in ({name: text.encode() for name, text in ours.items()} | dict(given)).items():
    (folder / name).write_bytes(content)


def _processor_config(vision: VisionConfig) -> dict[str, Any]:
  pixels = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
            "merge_size": vision.merge, "patch_size": vision.patch_px, "temporal_patch_size": vision.num_frames, "resample": 3,
            "rescale_factor": 1 / 255, "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}}
  return {"processor_class": "Qwen3VLProcessor", "image_processor": {**pixels, "image_processor_type": "Qwen2VLImageProcessor"},
          "video_processor": {**pixels, "video_processor_type": "Qwen3VLVideoProcessor"}}
