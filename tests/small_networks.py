"""The smallest networks that have all parts, and batches for them: of pixels, of a cache of latents, and of one of text states as well."""

import jax

from qimg2 import networks
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.models.qwen3_vl_vision import VisionConfig

VISION = VisionConfig(width=16, num_layers=1, num_heads=2, mlp_width=16, num_positions=16, out_width=16, deepstack_layers=())
NETS = networks.Networks(
    mmdit.Config(latent_channels=4, width=16, num_layers=1, num_heads=2, head_dim=8, context_width=16, rope_dims=(4, 2, 2)),
    qwen3_vl.Config(vocab_size=12, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16, mrope_sections=(2, 1, 1),
                    image_token_id=9, vision=VISION),
    vae.Config(base_dim=8, decoder_base_dim=8, latent_channels=4, dim_mult=(1, 1, 1, 1, 1), num_res_blocks=1, latents_mean=(0.5,) * 4,
               latents_std=(2.0,) * 4), num_system_tokens=2)
PIXELS = {"target": ((64, 32, 3), "uint8"), "sources": (((32, 32, 3), "uint8"), ((64, 64, 3), "uint8")), "tokens": ((12,), "int32"),
          "token_count": ((), "int32")}
LATENTS = PIXELS | {"latents": ((4, 2, 4), "float16"), "source_latents": (((2, 2, 4), "float16"), ((4, 4, 4), "float16"))}
FEATURES = LATENTS | {"features": ((10, 16), "float16"), "sources": ()}


def is_field(x):
  """Whether it is the (shape of a row, type) of an array."""
  return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], str)


def abstract_batch(fields, num_rows):
  """A batch of such fields as shapes."""
  return jax.tree.map(lambda field: jax.ShapeDtypeStruct((num_rows, *field[0]), field[1]), fields, is_leaf=is_field)
