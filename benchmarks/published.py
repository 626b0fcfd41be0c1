"""Random pipelines in the published layout, of the sizes that the benchmarks run: both sides load the same weights from the same folder."""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import jax
import torch

from qimg2.runtime.pretrained import Pretrained
from tests import reference


@dataclasses.dataclass(frozen=True)
class Size:
  """Sizes of a pipeline's networks, in the words of the published configs."""
  num_layers: int = 2
  channels: int = 8
  sizes: dict[str, dict] | None = None  # "transformer", "vae", "text", "vision"


def _sized(num_layers: int, heads: int, head_dim: int, context: int, encoder_layers: int, vae_dim: int) -> Size:
  rope = (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8)
  mrope = dict(rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=[12, 10, 10])
  return Size(num_layers, 16, dict(
      transformer=dict(num_attention_heads=heads, attention_head_dim=head_dim, context_in_dim=context, axes_dims_rope=rope),
      vae=dict(base_dim=vae_dim, decoder_base_dim=vae_dim, num_res_blocks=2),
      text=dict(hidden_size=context, intermediate_size=3 * context, num_hidden_layers=encoder_layers, num_attention_heads=context // 64,
                num_key_value_heads=context // 128, head_dim=64, rope_parameters=mrope),
      vision=dict(depth=6, hidden_size=256, intermediate_size=1024, num_heads=4, num_position_embeddings=256, deepstack_visual_indexes=[1, 3, 5])))


SIZES = {"tiny": Size(), "20M": _sized(8, 6, 64, 512, 8, 24), "100M": _sized(10, 12, 64, 768, 12, 48)}


@functools.cache
def folder(name: str) -> pathlib.Path:
  """A folder with the random pipeline of one of `SIZES`, gone when the process ends."""
  size = SIZES[name]
  kept = tempfile.TemporaryDirectory()
  _KEPT.append(kept)
  path = pathlib.Path(kept.name) / name
  reference.tiny_pipeline(0, size.num_layers, size.channels, sizes=size.sizes).save_pretrained(path)
  return path


_KEPT: list[Any] = []


def device() -> str:
  """Torch's device."""
  return "cuda" if torch.cuda.is_available() else "cpu"


def theirs(name: str, dtype: str = "float32", compiled: bool = False) -> Any:
  """The pipeline of diffusers, its networks eager or compiled."""
  path = folder(name)  # first: the import of transformers that the pipeline needs is safe only through `reference`
  import diffusers
  import transformers
  for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
  pipe = diffusers.QwenImage21Pipeline.from_pretrained(path, dtype=getattr(torch, dtype), low_cpu_mem_usage=False).to(device())
  pipe.set_progress_bar_config(disable=True)
  if compiled:
    pipe.transformer.compile()
    pipe.text_encoder.model.language_model.compile()
    pipe.vae.encode, pipe.vae.decode = torch.compile(pipe.vae.encode), torch.compile(pipe.vae.decode)
  return pipe


def ours(name: str, dtype: str = "float32") -> tuple[Pretrained, dict]:
  """(networks and tokenizer, their weights)."""
  source = Pretrained(folder(name), dtype=dtype, devices=jax.devices()[:1])
  return source, source.load()
