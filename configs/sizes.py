"""Sizes of the three networks, as sections for `cfg.model`, `cfg.encoder` and `cfg.vae`. What is not named keeps the dataclass default."""

from ml_collections import ConfigDict

IMAGE_TOKEN = 6  # of the tokenizers that are trained with the embedded data sets; a run reads it from its tokenizer


def mmdit_7b() -> ConfigDict:
  """The published generator: 32 layers of width 4096, 7,115,124,736 weights."""
  return ConfigDict(dict(latent_channels=64, width=4096, num_layers=32, num_heads=32, head_dim=128, mlp_ratio=3, context_width=4096,
                         rope_dims=(16, 56, 56), attention="block_causal", condition_time="zero", attention_backend="auto",
                         remat="dots", dtype="bfloat16"))


def mmdit_1b() -> ConfigDict:
  """The published generator at half the width, 18 layers deep, for an encoder of 2B: 1,015,814,656 weights."""
  return ConfigDict(dict(mmdit_7b(), width=2048, num_layers=18, num_heads=16, context_width=2048))


def mmdit_tiny() -> ConfigDict:
  """A generator that learns the embedded data sets on two CPU cores in minutes."""
  return ConfigDict(dict(latent_channels=32, width=192, num_layers=4, num_heads=4, head_dim=48, mlp_ratio=3, context_width=64,
                         rope_dims=(8, 20, 20), attention="block_causal", condition_time="zero", attention_backend="auto",
                         remat="none", dtype="float32"))


def qwen3_vl(size: str = "8B") -> ConfigDict:
  """A published condition encoder: Qwen3-VL of 2B, 4B, 8B or 32B."""
  width, num_layers, num_heads, mlp_width, tied = {
      "2B": (2048, 28, 16, 6144, True), "4B": (2560, 36, 32, 9728, True),
      "8B": (4096, 36, 32, 12288, False), "32B": (5120, 64, 64, 25600, False)}[size]
  small, large = dict(width=1024, num_layers=24, mlp_width=4096, deepstack_layers=(5, 11, 17)), dict(width=1152, num_layers=27, mlp_width=4304,
                                                                                                     deepstack_layers=(8, 16, 24))
  return ConfigDict(dict(vocab_size=151936, width=width, num_layers=num_layers, num_heads=num_heads, num_kv_heads=8, head_dim=128,
                         mlp_width=mlp_width, mrope_sections=(24, 20, 20), tie_embeddings=tied,
                         vision=dict(num_heads=16, out_width=width, **(small if tied else large)), attention_backend="auto",
                         dtype="bfloat16"))


def qwen3_vl_tiny() -> ConfigDict:
  """A language model of two layers and a vision tower of two, with random weights: enough to tell prompts apart."""
  return ConfigDict(dict(vocab_size=1024, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=128,
                         mrope_sections=(6, 5, 5), image_token_id=IMAGE_TOKEN, tie_embeddings=False, vision=vision_tiny(64), attention_backend="auto",
                         dtype="float32"))


def vision_tiny(out_width: int) -> ConfigDict:
  """The vision tower of the embedded encoders, for a language model of width `out_width`."""
  return ConfigDict(dict(width=32, num_layers=2, num_heads=2, mlp_width=64, num_positions=64, out_width=out_width, deepstack_layers=(0,)))


def vae_f16c64(image_channels: int = 3) -> ConfigDict:
  """The published VAE: 79M and 259M weights; RGB as in the 2.0 report, or RGBA as released."""
  return ConfigDict(dict(base_dim=96, decoder_base_dim=144, latent_channels=64, dim_mult=(1, 2, 4, 8, 8), image_channels=image_channels,
                         dtype="bfloat16"))


def vae_tiny() -> ConfigDict:
  """The same architecture at a twelfth of the width and half the depth, with half the latent channels; RGBA, so that diffusers can edit with it."""
  return ConfigDict(dict(base_dim=8, decoder_base_dim=8, latent_channels=32, dim_mult=(1, 2, 4, 8, 8), num_res_blocks=1, image_channels=4,
                         latents_mean=(0.0,) * 32, latents_std=(1.0,) * 32, dtype="float32"))
