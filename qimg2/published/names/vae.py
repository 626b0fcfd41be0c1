"""Published names of the autoencoder (`AutoencoderKLQwenImage21` in diffusers), and its published config.

Its convolutions are two-dimensional, so kernels have no dimension for time. The gains of norms have one of size 1 per dimension of a
video, or of an image in attention.
"""

from typing import Any

from qimg2.models import vae
from qimg2.published.tensors import Entry

CLASS = "AutoencoderKLQwenImage21"
CONFIG_FIELDS = {
    "base_dim": "base_dim", "decoder_base_dim": "decoder_base_dim", "latent_channels": "z_dim", "dim_mult": "dim_mult",
    "temporal_downsample": "temperal_downsample", "num_res_blocks": "num_res_blocks", "image_channels": "in_channels",
    "latents_mean": "latents_mean", "latents_std": "latents_std",
}


def table(cfg: vae.Config) -> dict[str, Entry]:
  """The published tensor of every path of `vae.specs(cfg)`."""
  return {
      **_half(cfg, "encoder", cfg.encoder_levels, cfg.num_res_blocks, "down_blocks", "downsampler"),
      **_half(cfg, "decoder", cfg.decoder_levels, cfg.num_res_blocks + 1, "up_blocks", "upsampler"),
      **_conv("encoder/quant", "quant_conv"),
      **_conv("decoder/quant", "post_quant_conv"),
  }


def _half(cfg: vae.Config, half: str, levels: tuple[vae.Level, ...], num_blocks: int, blocks: str, resampler: str) -> dict[str, Entry]:
  entries = _conv(f"{half}/conv_in", f"{half}.conv_in") | _conv(f"{half}/conv_out", f"{half}.conv_out")
  entries |= _mid(f"{half}/mid", f"{half}.mid_block", levels[-1].num_out if half == "encoder" else levels[0].num_in)
  entries |= _norm(f"{half}/norm_out", f"{half}.norm_out", levels[-1].num_out)
  for i, level in enumerate(levels):
    ours, published = f"{half}/level_{i}", f"{half}.{blocks}.{i}"
    for j in range(num_blocks):
      entries |= _block(f"{ours}/block_{j}", f"{published}.resnets.{j}", level.num_in if j == 0 else level.num_out, level.num_out)
    if level.space > 1:
      entries |= _conv(f"{ours}/resample", f"{published}.{resampler}.resample.1")
    if level.time > 1 and cfg.temporal_weights:
      entries |= _conv(f"{ours}/time", f"{published}.{resampler}.time_conv")
  return entries


def _mid(ours: str, published: str, width: int) -> dict[str, Entry]:
  attn = f"{published}.attentions.0"
  return {
      **_block(f"{ours}/block_0", f"{published}.resnets.0", width, width),
      **_norm(f"{ours}/attn/norm", f"{attn}.norm", width, num_ones=2),
      **_conv(f"{ours}/attn/qkv", f"{attn}.to_qkv"),
      **_conv(f"{ours}/attn/proj", f"{attn}.proj"),
      **_block(f"{ours}/block_1", f"{published}.resnets.1", width, width),
  }


def _block(ours: str, published: str, num_in: int, num_out: int) -> dict[str, Entry]:
  entries = _norm(f"{ours}/norm1", f"{published}.norm1", num_in) | _norm(f"{ours}/norm2", f"{published}.norm2", num_out)
  entries |= _conv(f"{ours}/conv1", f"{published}.conv1") | _conv(f"{ours}/conv2", f"{published}.conv2")
  return entries if num_in == num_out else entries | _conv(f"{ours}/shortcut", f"{published}.conv_shortcut")


def _conv(ours: str, published: str) -> dict[str, Entry]:
  return {f"{ours}/kernel": Entry(f"{published}.weight", "conv"), f"{ours}/bias": Entry(f"{published}.bias", "plain")}


def _norm(ours: str, published: str, width: int, num_ones: int = 3) -> dict[str, Entry]:
  return {ours: Entry(f"{published}.gamma", "plain", published_shape=(width, *(1,) * num_ones))}


def config(published: dict[str, Any], **overrides: Any) -> vae.Config:
  """The `Config` of a published `config.json` (its dict), with fields such as `dtype` or `remat` set by `overrides`.

  Raises:
    ValueError: the dict is of another model, lacks a field, or asks for something that this autoencoder does not do.
  """
  if published.get("_class_name") != CLASS:
    raise ValueError(f"The autoencoder's config.json is of class {published.get('_class_name')!r}: it must be {CLASS!r}.")
  if published.get("attn_scales") or published.get("patch_size") or not published.get("is_residual", True):
    raise ValueError("The autoencoder's config.json asks for attn_scales, a patch_size or levels without shortcut: not supported.")
  try:
    fields, num_out = {ours: published[name] for ours, name in CONFIG_FIELDS.items()}, published["out_channels"]
  except KeyError as error:
    raise ValueError(f"The autoencoder's config.json lacks the field {error}.") from error
  if fields["image_channels"] != num_out:
    raise ValueError(f"The autoencoder's config.json has {fields['image_channels']} image channels in and {num_out} out: not supported.")
  fields["decoder_base_dim"] = fields["decoder_base_dim"] or fields["base_dim"]
  return vae.Config(**{**{name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}, **overrides})


def published_config(cfg: vae.Config) -> dict[str, Any]:
  """The published `config.json` of `cfg`, as a dict; the inverse of `config`."""
  fields = {name: getattr(cfg, ours) for ours, name in CONFIG_FIELDS.items()}
  fields = {name: list(x) if isinstance(x, tuple) else x for name, x in fields.items()}
  return {"_class_name": CLASS, **fields, "out_channels": cfg.image_channels, "is_residual": True, "attn_scales": [],
          "dropout": 0.0, "patch_size": None, "scale_factor_spatial": cfg.spatial_factor,
          "scale_factor_temporal": 2 ** sum(cfg.temporal_downsample)}
