"""Published names of Qwen3-VL (`Qwen3VLForConditionalGeneration`), and its published config."""

from typing import Any

from qimg2.models import qwen3_vl
from qimg2.models.qwen3_vl_vision import VisionConfig
from qimg2.pretrained import Entry

LANGUAGE = {
    "attn/q": ("self_attn.q_proj", 1), "attn/k": ("self_attn.k_proj", 1), "attn/v": ("self_attn.v_proj", 1),
    "attn/out": ("self_attn.o_proj", 2),
    "mlp/gate": ("mlp.gate_proj", 1), "mlp/proj": ("mlp.up_proj", 1), "mlp/out": ("mlp.down_proj", 1),
}
LANGUAGE_NORMS = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm",
}
VISION = {"attn/qkv": ("attn.qkv", 1), "attn/out": ("attn.proj", 2), "mlp/in": ("mlp.linear_fc1", 1), "mlp/out": ("mlp.linear_fc2", 1)}
MERGER = {"mlp/in": ("linear_fc1", 1), "mlp/out": ("linear_fc2", 1)}


def table(cfg: qwen3_vl.Config) -> dict[str, Entry]:
  """The published tensor of every path of `qwen3_vl.specs(cfg)`. With tied embeddings the files hold no `lm_head.weight`."""
  entries = {
      "embed": Entry("model.language_model.embed_tokens.weight", "plain"),
      "norm": Entry("model.language_model.norm.weight", "plain"),
  }
  if not cfg.tie_embeddings:
    entries["head"] = Entry("lm_head.weight")
  layer = "model.language_model.layers.{}."
  entries |= {f"blocks/{path}": Entry(f"{layer}{name}.weight", num_inputs=n) for path, (name, n) in LANGUAGE.items()}
  entries |= {f"blocks/{path}": Entry(f"{layer}{name}.weight", "plain") for path, name in LANGUAGE_NORMS.items()}
  return entries | (_vision_table(cfg.vision) if cfg.vision else {})


def _vision_table(cfg: VisionConfig) -> dict[str, Entry]:
  root = "model.visual."
  return {
      "vision/patch/weight": Entry(f"{root}patch_embed.proj.weight", "conv"),
      "vision/patch/bias": Entry(f"{root}patch_embed.proj.bias", "plain"),
      "vision/positions": Entry(f"{root}pos_embed.weight", "plain", published_shape=(cfg.num_positions, cfg.width)),
      **_with_bias("vision/blocks/", f"{root}blocks.{{}}.", VISION, ("norm1", "norm2")),
      "vision/blocks/attn/qkv/bias": Entry(f"{root}blocks.{{}}.attn.qkv.bias", "plain", published_shape=(3 * cfg.width,)),
      **_with_bias("vision/merger/", f"{root}merger.", MERGER, ("norm",)),
      **_with_bias("vision/deepstack/", f"{root}deepstack_merger_list.{{}}.", MERGER, ("norm",)),
  }


def _with_bias(path: str, published: str, linears: dict[str, tuple[str, int]], norms: tuple[str, ...]) -> dict[str, Entry]:
  entries = {}
  for ours, (name, num_inputs) in linears.items():
    entries[f"{path}{ours}/weight"] = Entry(f"{published}{name}.weight", num_inputs=num_inputs)
    entries[f"{path}{ours}/bias"] = Entry(f"{published}{name}.bias", "plain")
  for name in norms:
    entries |= {f"{path}{name}/{leaf}": Entry(f"{published}{name}.{leaf}", "plain") for leaf in ("weight", "bias")}
  return entries


def config(published: dict[str, Any], **overrides: Any) -> qwen3_vl.Config:
  """The `Config` of a published `config.json` (its dict), with fields such as `dtype` or `remat` set by `overrides`.

  Raises:
    ValueError: the dict is of another model, lacks a field, or asks for something that this encoder does not do.
  """
  if published.get("model_type") != "qwen3_vl":
    raise ValueError(f"The text encoder's config.json is of model_type {published.get('model_type')!r}: it must be 'qwen3_vl'.")
  try:
    fields = _language_fields(published["text_config"]) | {"vision": _vision_config(published["vision_config"])}
  except KeyError as error:
    raise ValueError(f"The text encoder's config.json lacks the field {error}.") from error
  tied = published.get("tie_word_embeddings", False)
  return qwen3_vl.Config(**{**fields, "tie_embeddings": tied, "image_token_id": published["image_token_id"], **overrides})


def _language_fields(text: dict[str, Any]) -> dict[str, Any]:
  rope = text.get("rope_parameters") or text.get("rope_scaling") or {}  # transformers 5, transformers 4
  if text.get("attention_bias") or text.get("hidden_act", "silu") != "silu" or rope.get("rope_type", "default") != "default":
    raise ValueError("The text encoder's config.json asks for attention biases, an activation other than silu or scaled rope: unsupported.")
  return {
      "vocab_size": text["vocab_size"], "width": text["hidden_size"], "num_layers": text["num_hidden_layers"],
      "num_heads": text["num_attention_heads"], "num_kv_heads": text["num_key_value_heads"], "head_dim": text["head_dim"],
      "mlp_width": text["intermediate_size"], "eps": text["rms_norm_eps"],
      "rope_theta": rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"], "mrope_sections": tuple(rope["mrope_section"]),
  }


def _vision_config(vision: dict[str, Any]) -> VisionConfig:
  return VisionConfig(
      width=vision["hidden_size"], num_layers=vision["depth"], num_heads=vision["num_heads"], mlp_width=vision["intermediate_size"],
      num_channels=vision["in_channels"], patch_px=vision["patch_size"], num_frames=vision["temporal_patch_size"],
      merge=vision["spatial_merge_size"], num_positions=vision["num_position_embeddings"], out_width=vision["out_hidden_size"],
      deepstack_layers=tuple(vision["deepstack_visual_indexes"]))
