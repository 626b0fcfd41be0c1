"""The published PyTorch classes, imported safely and made small and random.

`diffusers` and `transformers` ask for torchvision, whose CPU build may be missing. Install it with `pip install --no-deps torchvision`: its
Python code is enough once the two operators that it expects have a schema.
"""

import contextlib

import numpy as np
import torch

_torchvision = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
  with contextlib.suppress(RuntimeError):  # a full torchvision defines them itself
    _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def randomize(module, seed, scale=0.1):
  """`module` in eval mode with every vector and gain moved off its initial value, so that a swapped name shows."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in module.named_parameters():
      if p.ndim == 1 or name.endswith("gamma"):
        p.add_(scale * torch.randn(p.shape, generator=generator))
  return module.eval()


def tensors(module):
  """The state dict of `module` as numpy arrays."""
  return {name: x.detach().numpy() for name, x in module.state_dict().items()}


def relative_error(ours, theirs):
  """The largest absolute difference over the largest absolute value of `theirs`."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def rescale(module, seed):
  """`module` with unit-variance linear maps: published initialisations are so small that attention is uniform and hides mistakes."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for p in module.parameters():
      if p.ndim > 1:
        p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
  return module


def tiny_qwen3_vl(seed, tied=False):
  """A small random `Qwen3VLForConditionalGeneration`: width 64, image token 300, vision taps that are not evenly spaced."""
  from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
  text = dict(vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
              head_dim=32, max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=tied,
              rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=[6, 5, 5]))
  vision = dict(depth=5, hidden_size=48, intermediate_size=96, num_heads=4, in_channels=3, patch_size=16, spatial_merge_size=2,
                temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 3])
  config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, image_token_id=300, video_token_id=301,
                         vision_start_token_id=302, vision_end_token_id=303)
  return randomize(rescale(Qwen3VLForConditionalGeneration(config), seed), seed, scale=0.2)
