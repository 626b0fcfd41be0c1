"""How many floating-point operations a train step asks for: counted from the configs alone, the same for every mesh and compiler.

A product [m, k] x [k, n] counts 2 m k n. Per example, with the letters of `qimg2` (S = joint sequence, P = its prefix, I = latents of all
condition images, E = context width):

  generator  L (2 S (4 D H K + 3 D F) + 4 (P² + N S) H K)                  blocks; the prefix sees itself, the N target tokens see all;
                                                                           with model.attention "full" S² in place of P² + N S
             + 2 (N + I) C D + 2 (M E D + M D D) + 2 N D C                 latents in, text in, latents out
             + 2 R (T D + D D + 5 D D)                                     time embedding and modulation, R = 2 times (0 and t)      (1)
  encoder    L (2 M (2 D H K + 2 D G K + 3 D F) + 4 M² H K)                decoder layers over all M tokens of the prompt
             + per condition image of N patches and n = N / merge² tokens:
               2 N (3 px² D) + L (2 N (4 D² + 2 D F) + 4 N² D) + (1 + J) 2 n (D' D' + D' E),  D' = merge² D                          (2)
  VAE        2 h w k² C_in C_out per convolution with an output of h x w   edges count like the middle
             + 4 (h w)² C of the one attention                                                                                      (3)

A step counts the forward pass three times for a trained role (once forward, twice backward) and once for a frozen one. For an adapter it counts that
of its network once, for the gradient by activations that passes through the frozen weights. The adapter's own products, about rank / D of these, are
not counted, and so are norms, rotary embeddings, softmax, the optimizer and everything that rematerialisation computes again. These are the "model
FLOPs" of MFU.
"""

import math
from collections.abc import Mapping
from typing import Any

from qimg2.adapters import PREFIX
from qimg2.batch import num_rows, source_grids, target_grid
from qimg2.layout import LATENTS_PER_SLOT
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.models.qwen3_vl_vision import VisionConfig

Size = tuple[int, int]
TRAINED, FROZEN, ADAPTER = 3, 1, 1  # forward passes


def step_flops(nets: Any, trained: Mapping[str, str], frozen: Mapping[str, str], batch: dict) -> dict[str, int]:
  """Role -> model FLOPs of one step over the whole global batch; micro-batches change nothing.

  Args:
    nets: `networks.Networks`, of which the configs are read.
    trained, frozen: role -> network, of the roles that the stage trains and of those that it only reads.
    batch: arrays or abstract arrays, as the loader makes them. What a latent cache holds is not computed and does not count.

  Raises:
    ValueError: a network that has no formula.
  """
  counts = {}
  for roles, passes in ((trained, TRAINED), (frozen, FROZEN)):
    for role, name in roles.items():
      network = name.removeprefix(PREFIX)
      times = passes if name == network else ADAPTER
      if network not in _FORWARD:
        raise ValueError(f"There is no FLOP count for network {network!r} of role {role!r}: add one to qimg2/analysis/flops.py.")
      counts[role] = times * num_rows(batch) * _FORWARD[network](nets, batch, times == TRAINED)
  return counts


def generator_forward(cfg: mmdit.Config, num_text: int, num_target: int, num_source: int = 0) -> int:
  """Equation 1 for one example: M text tokens with image slots and padding but without the system turn, N target and I source latents."""
  D, C, E, HK = cfg.width, cfg.latent_channels, cfg.context_width, cfg.num_heads * cfg.head_dim
  S = num_text + num_source - num_source // LATENTS_PER_SLOT + num_target
  seen = S * S if cfg.attention == "full" else (S - num_target) ** 2 + num_target * S
  blocks = cfg.num_layers * (2 * S * (4 * D * HK + 3 * D * D * cfg.mlp_ratio) + 4 * seen * HK)
  borders = 2 * (num_target + num_source) * C * D + 2 * num_text * (E * D + D * D) + 2 * num_target * D * C
  return blocks + borders + 2 * 2 * (cfg.time_dim * D + D * D + (mmdit.NUM_MODULATIONS + 1) * D * D)


def encoder_forward(cfg: qwen3_vl.Config, num_tokens: int, source_sizes: tuple[Size, ...] = ()) -> int:
  """Equation 2 for one prompt of M tokens, padding counted, with condition images of (height, width) px."""
  D, HK, GK = cfg.width, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
  layer = 2 * num_tokens * (2 * D * HK + 2 * D * GK + 3 * D * cfg.mlp_width) + 4 * num_tokens * num_tokens * HK
  return cfg.num_layers * layer + sum(_vision_forward(cfg.vision, *size) for size in source_sizes if cfg.vision is not None)


def _vision_forward(cfg: VisionConfig, height: int, width: int) -> int:
  D, patches, joined = cfg.width, height * width // cfg.patch_px**2, cfg.width * cfg.merge**2
  layer = 2 * patches * (4 * D * D + 2 * D * cfg.mlp_width) + 4 * patches * patches * D
  merger = 2 * (patches // cfg.merge**2) * (joined * joined + joined * cfg.out_width)
  return 2 * patches * cfg.num_channels * cfg.patch_px**2 * D + cfg.num_layers * layer + (1 + len(cfg.deepstack_layers)) * merger


def vae_encode(cfg: vae.Config, height: int, width: int) -> int:
  """Equation 3 for the encoder on one image of `height` x `width` px."""
  dim = cfg.base_dim * cfg.dim_mult[-1]
  total = _conv(height, width, 3, cfg.image_channels, cfg.base_dim)
  for level in cfg.encoder_levels:
    total += _blocks(height, width, level.num_in, level.num_out, cfg.num_res_blocks)
    if level.space > 1:
      height, width = height // level.space, width // level.space
      total += _conv(height, width, 3, level.num_out, level.num_out)
  moments = 2 * cfg.latent_channels
  return total + _middle(height, width, dim) + _conv(height, width, 3, dim, moments) + _conv(height, width, 1, moments, moments)


def vae_decode(cfg: vae.Config, height: int, width: int) -> int:
  """Equation 3 for the decoder to one image of `height` x `width` px."""
  height, width = height // cfg.spatial_factor, width // cfg.spatial_factor
  first, channels = cfg.decoder_levels[0].num_in, cfg.latent_channels
  total = _conv(height, width, 1, channels, channels) + _conv(height, width, 3, channels, first) + _middle(height, width, first)
  for level in cfg.decoder_levels:
    total += _blocks(height, width, level.num_in, level.num_out, cfg.num_res_blocks + 1)
    if level.space > 1:
      height, width = height * level.space, width * level.space
      total += _conv(height, width, 3, level.num_out, level.num_out)
  return total + _conv(height, width, 3, cfg.decoder_levels[-1].num_out, cfg.image_channels)


def _conv(height: int, width: int, window: int, num_in: int, num_out: int) -> int:
  return 2 * height * width * window**2 * num_in * num_out


def _blocks(height: int, width: int, num_in: int, num_out: int, num: int) -> int:
  first = _conv(height, width, 3, num_in, num_out) + _conv(height, width, 3, num_out, num_out)
  shortcut = _conv(height, width, 1, num_in, num_out) if num_in != num_out else 0
  return first + shortcut + (num - 1) * 2 * _conv(height, width, 3, num_out, num_out)


def _middle(height: int, width: int, dim: int) -> int:
  attention = _conv(height, width, 1, dim, 4 * dim) + 4 * (height * width)**2 * dim
  return _blocks(height, width, dim, dim, 2) + attention


# Per example of a batch.


def _generator(nets: Any, batch: dict, trained: bool) -> int:
  del trained
  factor = nets.vae.spatial_factor
  num_target, num_source = math.prod(target_grid(batch, factor)), sum(map(math.prod, source_grids(batch, factor)))
  return generator_forward(nets.model, batch["tokens"].shape[1] - nets.num_system_tokens, num_target, num_source)


def _encoder(nets: Any, batch: dict, trained: bool) -> int:
  del trained
  if "features" in batch:
    return 0
  return encoder_forward(nets.encoder, batch["tokens"].shape[1], tuple(x.shape[1:3] for x in batch.get("sources", ())))


def _vae(nets: Any, batch: dict, trained: bool) -> int:
  if trained:
    return vae_encode(nets.vae, *batch["target"].shape[1:3]) + vae_decode(nets.vae, *batch["target"].shape[1:3])
  pictures = [] if "latents" in batch else [batch["target"]]
  pictures += [] if "source_latents" in batch else batch.get("sources", ())
  return sum(vae_encode(nets.vae, *picture.shape[1:3]) for picture in pictures)


_FORWARD = {"mmdit": _generator, "qwen3_vl": _encoder, "vae": _vae}
