"""Published tensor names of the generator (`QwenImage21Transformer2DModel` in diffusers), and its published config.

The published class always attends block-causally. Its `causal_condition` says at which time text and condition images are modulated: True at
t = 0, False at the target's own time.

ComfyUI's single files hold the same tensors under a prefix, and the two maps of the gated MLP as one, the rows of the gate first.
"""

import dataclasses
from typing import Any

from qimg2.models import mmdit
from qimg2.published.files import TensorFiles
from qimg2.published.tensors import Entry, Table

CLASS = "QwenImage21Transformer2DModel"
CONFIG_FIELDS = {
    "latent_channels": "in_channels", "num_layers": "num_layers", "num_heads": "num_attention_heads", "head_dim": "attention_head_dim",
    "context_width": "context_in_dim", "mlp_ratio": "mlp_ratio", "rope_dims": "axes_dims_rope", "eps": "eps",
}
# What the published class has no field for.
FIXED = {"attention": "block_causal", "rope_theta": 10_000.0, "time_dim": 256}
CONDITION_TIMES = {True: "zero", False: "shared"}
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of single files; we write the first
FUSED, PARTS = "img_mlp.gate_up.weight", ("img_mlp.gate_layer.weight", "img_mlp.proj.weight")


def table(cfg: mmdit.Config) -> Table:
  """Path of `mmdit.specs(cfg)` -> published name."""
  del cfg  # every size has the same names
  return {
      "img_in": Entry("img_in.weight"),
      "txt_in/norm": Entry("txt_in.text_norm.weight", "plain"),
      "txt_in/in": Entry("txt_in.in_layer.weight"),
      "txt_in/out": Entry("txt_in.out_layer.weight"),
      "time/in": Entry("time_text_embed.timestep_embedder.linear_1.weight"),
      "time/out": Entry("time_text_embed.timestep_embedder.linear_2.weight"),
      "modulation": Entry("modulation.1.weight"),
      "blocks/attn/q": Entry("transformer_blocks.{}.attn.to_q.weight"),
      "blocks/attn/k": Entry("transformer_blocks.{}.attn.to_k.weight"),
      "blocks/attn/v": Entry("transformer_blocks.{}.attn.to_v.weight"),
      "blocks/attn/out": Entry("transformer_blocks.{}.attn.to_out.0.weight", num_inputs=2),
      "blocks/attn/norm_q": Entry("transformer_blocks.{}.attn.norm_q.weight", "plain"),
      "blocks/attn/norm_k": Entry("transformer_blocks.{}.attn.norm_k.weight", "plain"),
      "blocks/mlp/gate": Entry("transformer_blocks.{}.img_mlp.gate_layer.weight"),
      "blocks/mlp/proj": Entry("transformer_blocks.{}.img_mlp.proj.weight"),
      "blocks/mlp/out": Entry("transformer_blocks.{}.img_mlp.out.weight"),
      "norm_out": Entry("norm_out.linear.weight"),
      "proj_out": Entry("proj_out.weight"),
  }


def published_tensors(files: TensorFiles) -> TensorFiles:
  """`files` under the names of the published class: without the prefix of single files, and with fused tensors as their parts.

  Raises:
    ValueError: a whole checkpoint, with tensors of other networks beside those of the prefix, or a tensor that is there in both forms.
  """
  prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in files.tensors)), "")
  others = sorted(name for name in files.tensors if not name.startswith(prefix))
  if others:
    raise ValueError(f"{files.folder} holds {others[0]} beside the tensors {prefix}...: only files of the generator alone are taken.")
  files = files.renamed(lambda name: name.removeprefix(prefix))
  parts = {name.removesuffix(FUSED) + part: tensor.part(number, len(PARTS)) for name, tensor in files.tensors.items() if name.endswith(FUSED)
           for number, part in enumerate(PARTS)}
  twice = sorted(set(parts) & set(files.tensors))
  if twice:
    raise ValueError(f"{files.folder} holds the tensor {twice[0]} twice, once as part of {FUSED}: remove one of them.")
  return dataclasses.replace(files, tensors=parts | {name: tensor for name, tensor in files.tensors.items() if not name.endswith(FUSED)})


def comfyui_place(name: str) -> tuple[str, int, int]:
  """(name in ComfyUI's single file, which part of its rows, number of parts) of a published tensor; the inverse of `published_tensors`."""
  for number, part in enumerate(PARTS):
    if name.endswith(part):
      return PREFIXES[0] + name.removesuffix(part) + FUSED, number, len(PARTS)
  return PREFIXES[0] + name, 0, 1


def config(published: dict[str, Any], **overrides: Any) -> mmdit.Config:
  """The `Config` of a published `config.json` (its dict), with fields such as `dtype` or `remat` set by `overrides`.

  Raises:
    ValueError: the dict is of another model, lacks a field, or asks for something that this generator does not do.
  """
  if published.get("_class_name") != CLASS:
    raise ValueError(f"The transformer's config.json is of class {published.get('_class_name')!r}: it must be {CLASS!r}.")
  try:
    fields = {ours: published[name] for ours, name in CONFIG_FIELDS.items()}
    num_out, patch, causal = published["out_channels"], published["patch_size"], published["causal_condition"]
  except KeyError as error:
    raise ValueError(f"The transformer's config.json lacks the field {error}.") from error
  if patch != 1 or (num_out or fields["latent_channels"]) != fields["latent_channels"] or not isinstance(causal, bool):
    raise ValueError(f"The transformer's config.json asks for patch_size {patch}, {fields['latent_channels']} channels in, {num_out} out and "
                     f"causal_condition {causal!r}: only patch size 1, as many channels out as in, and true or false are supported.")
  fields |= {"width": fields["num_heads"] * fields["head_dim"], "rope_dims": tuple(fields["rope_dims"]), **FIXED}
  return mmdit.Config(**{**fields, "condition_time": CONDITION_TIMES[causal], **overrides})


def published_config(cfg: mmdit.Config) -> dict[str, Any]:
  """The published `config.json` of `cfg`, as a dict; the inverse of `config`.

  Raises:
    ValueError: `cfg` is something that the published class cannot express.
  """
  for name, value in {**FIXED, "width": cfg.num_heads * cfg.head_dim}.items():
    if getattr(cfg, name) != value:
      raise ValueError(f"model.{name} is {getattr(cfg, name)!r}, but the published {CLASS} knows only {value!r} here: this generator cannot be "
                       "exported.")
  fields = {name: getattr(cfg, ours) for ours, name in CONFIG_FIELDS.items()}
  causal = {time: causal for causal, time in CONDITION_TIMES.items()}[cfg.condition_time]
  return {"_class_name": CLASS, **fields, "axes_dims_rope": list(cfg.rope_dims), "out_channels": cfg.latent_channels, "patch_size": 1,
          "causal_condition": causal}
