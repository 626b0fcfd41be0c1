"""Sizes of the three networks, as sections for `cfg.model`, `cfg.encoder` and `cfg.vae`. What is not named keeps the dataclass default."""

from ml_collections import ConfigDict


def mmdit_7b() -> ConfigDict:
  """The published generator: 32 layers of width 4096, 7,115,124,736 weights."""
  return ConfigDict(dict(latent_channels=64, width=4096, num_layers=32, num_heads=32, head_dim=128, mlp_ratio=3, context_width=4096,
                         rope_dims=(16, 56, 56), attention="block_causal", condition_time="zero", remat="dots", dtype="bfloat16"))


def mmdit_tiny() -> ConfigDict:
  """A generator that learns the embedded data sets on two CPU cores in minutes."""
  return ConfigDict(dict(latent_channels=32, width=192, num_layers=4, num_heads=4, head_dim=48, mlp_ratio=3, context_width=64,
                         rope_dims=(8, 20, 20), attention="block_causal", condition_time="zero", remat="none", dtype="float32"))


def qwen3_vl_8b() -> ConfigDict:
  """The published condition encoder, Qwen3-VL-8B."""
  return ConfigDict(dict(vocab_size=151936, width=4096, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=12288,
                         dtype="bfloat16"))


def qwen3_vl_tiny() -> ConfigDict:
  """A language model of two layers with random weights: enough to tell prompts apart."""
  return ConfigDict(dict(vocab_size=1024, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=128,
                         mrope_sections=(6, 5, 5), vision=None, dtype="float32"))


def vae_f16c64(image_channels: int = 3) -> ConfigDict:
  """The published VAE: 79M and 259M weights; RGB as in the 2.0 report, or RGBA as released."""
  return ConfigDict(dict(base_dim=96, decoder_base_dim=144, latent_channels=64, dim_mult=(1, 2, 4, 8, 8), image_channels=image_channels,
                         dtype="bfloat16"))


def vae_tiny() -> ConfigDict:
  """The same architecture at a twelfth of the width and half the depth, with half the latent channels."""
  return ConfigDict(dict(base_dim=8, decoder_base_dim=8, latent_channels=32, dim_mult=(1, 2, 4, 8, 8), num_res_blocks=1, image_channels=3,
                         latents_mean=(0.0,) * 32, latents_std=(1.0,) * 32,
                         temporal_weights=False, dtype="float32"))
