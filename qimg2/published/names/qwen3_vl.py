"""Published names of Qwen3-VL (`Qwen3VLForConditionalGeneration`), and its published config."""

from collections.abc import Mapping
from typing import Any

from qimg2.models import qwen3_vl
from qimg2.models.qwen3_vl_vision import VisionConfig
from qimg2.published.files import TensorFiles
from qimg2.published.tensors import Entry

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
VISION_ROOT = "model.visual."
CLASS, HEADLESS_CLASS, HEAD = "Qwen3VLForConditionalGeneration", "Qwen3VLModel", "lm_head.weight"
# Beginnings of names that transformers 4 wrote, or a model saved without its head, and what transformers 5 writes. The first that fits counts.
OLDER = {
    "language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model.", "language_model.": "model.language_model.",
    "model.layers.": "model.language_model.layers.", "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.norm.": "model.language_model.norm.", "visual.": "model.visual.",
}
BUFFER = "inv_freq"  # computed from the config; old files hold it
TEXT_FIELDS = {
    "vocab_size": "vocab_size", "width": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "mlp_width": "intermediate_size", "eps": "rms_norm_eps",
}
VISION_FIELDS = {
    "width": "hidden_size", "num_layers": "depth", "num_heads": "num_heads", "mlp_width": "intermediate_size", "num_channels": "in_channels",
    "patch_px": "patch_size", "num_frames": "temporal_patch_size", "merge": "spatial_merge_size", "num_positions": "num_position_embeddings",
    "out_width": "out_hidden_size",
}
VISION_ACTIVATION = "gelu_pytorch_tanh"
SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
MAX_POSITIONS = 262_144  # the published context; rotary positions have no table, so nothing depends on it


def table(cfg: qwen3_vl.Config) -> dict[str, Entry]:
  """The published tensor of every path of `qwen3_vl.specs(cfg)`. With tied embeddings the files hold no `lm_head.weight`."""
  entries = {
      "embed": Entry("model.language_model.embed_tokens.weight", "plain"),
      "norm": Entry("model.language_model.norm.weight", "plain"),
  }
  if not cfg.tie_embeddings:
    entries["head"] = Entry(HEAD)
  layer = "model.language_model.layers.{}."
  entries |= {f"blocks/{path}": Entry(f"{layer}{name}.weight", num_inputs=n) for path, (name, n) in LANGUAGE.items()}
  entries |= {f"blocks/{path}": Entry(f"{layer}{name}.weight", "plain") for path, name in LANGUAGE_NORMS.items()}
  return entries | (_vision_table(cfg.vision) if cfg.vision else {})


def published_tensors(files: TensorFiles) -> TensorFiles:
  """`files` under the names of transformers 5, without the buffers that old files hold.

  Raises:
    ValueError: a tensor that is there under an old and under its new name.
  """
  def rename(name: str) -> str:
    older = next((older for older in OLDER if name.startswith(older)), "")
    return OLDER.get(older, "") + name.removeprefix(older)
  return files.without({name for name in files.tensors if name.split(".")[-1] == BUFFER}).renamed(rename)


def _vision_table(cfg: VisionConfig) -> dict[str, Entry]:
  root = VISION_ROOT
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
    fields |= {"tie_embeddings": published.get("tie_word_embeddings", False), "image_token_id": published["image_token_id"]}
  except KeyError as error:
    raise ValueError(f"The text encoder's config.json lacks the field {error}.") from error
  return qwen3_vl.Config(**{**fields, **overrides})


def _language_fields(text: dict[str, Any]) -> dict[str, Any]:
  rope = text.get("rope_parameters") or text.get("rope_scaling") or {}  # transformers 5, transformers 4
  if text.get("attention_bias") or text.get("hidden_act", "silu") != "silu" or rope.get("rope_type", "default") != "default":
    raise ValueError("The text encoder's config.json asks for attention biases, an activation other than silu or scaled rope: unsupported.")
  theta = rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"]
  return {ours: text[name] for ours, name in TEXT_FIELDS.items()} | {"rope_theta": theta, "mrope_sections": tuple(rope["mrope_section"])}


def _vision_config(vision: dict[str, Any]) -> VisionConfig:
  if vision.get("hidden_act", VISION_ACTIVATION) != VISION_ACTIVATION:
    raise ValueError(f"The text encoder's config.json asks for the vision activation {vision['hidden_act']!r}: only {VISION_ACTIVATION!r} is "
                     "supported.")
  theta = (vision.get("rope_parameters") or {}).get("rope_theta", VisionConfig.rope_theta)
  return VisionConfig(**{ours: vision[name] for ours, name in VISION_FIELDS.items()}, rope_theta=theta,
                      deepstack_layers=tuple(vision["deepstack_visual_indexes"]))


def published_config(cfg: qwen3_vl.Config, token_ids: Mapping[str, int]) -> dict[str, Any]:
  """The published `config.json` of `cfg`, as a dict in the form of transformers 5; the inverse of `config`.

  Args:
    cfg: the encoder.
    token_ids: ids of the special tokens by their text, at least those of SPECIAL_TOKENS.

  Raises:
    ValueError: `cfg` has no vision part, or an epsilon or image token that the published class or the tokenizer does not have.
  """
  if cfg.vision is None:
    raise ValueError("encoder.vision is None, but the published text encoder always has a vision part: this encoder cannot be exported.")
  if cfg.vision.eps != VisionConfig.eps:
    raise ValueError(f"encoder.vision.eps is {cfg.vision.eps}, but the published class knows only {VisionConfig.eps}: this encoder cannot be "
                     "exported.")
  missing = [text for text in SPECIAL_TOKENS.values() if text not in token_ids]
  if missing:
    raise ValueError(f"The tokenizer has no token {missing[0]}, which the published text encoder's config names: take Qwen-VL's tokenizer.")
  if cfg.image_token_id != token_ids[SPECIAL_TOKENS["image_token_id"]]:
    raise ValueError(f"encoder.image_token_id is {cfg.image_token_id}, but the tokenizer's {SPECIAL_TOKENS['image_token_id']} is "
                     f"{token_ids[SPECIAL_TOKENS['image_token_id']]}: make them equal.")
  ids = {name: token_ids[text] for name, text in SPECIAL_TOKENS.items()}
  return {"architectures": [CLASS], "model_type": "qwen3_vl", "text_config": _published_text(cfg),
          "vision_config": _published_vision(cfg.vision), "tie_word_embeddings": cfg.tie_embeddings, **ids}


def _published_text(cfg: qwen3_vl.Config) -> dict[str, Any]:
  rope = {"rope_type": "default", "rope_theta": cfg.rope_theta, "mrope_interleaved": True, "mrope_section": list(cfg.mrope_sections)}
  return {"model_type": "qwen3_vl_text", **{name: getattr(cfg, ours) for ours, name in TEXT_FIELDS.items()}, "hidden_act": "silu",
          "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": MAX_POSITIONS, "rope_parameters": rope,
          "tie_word_embeddings": cfg.tie_embeddings}


def _published_vision(cfg: VisionConfig) -> dict[str, Any]:
  rope = {"rope_type": "axial", "rope_theta": cfg.rope_theta}
  return {"model_type": "qwen3_vl_vision", **{name: getattr(cfg, ours) for ours, name in VISION_FIELDS.items()},
          "hidden_act": VISION_ACTIVATION, "deepstack_visual_indexes": list(cfg.deepstack_layers), "rope_parameters": rope}
