"""The published PyTorch classes, imported safely and made small and random.

`diffusers` and `transformers` ask for torchvision, whose CPU build may be missing. Install it with `pip install --no-deps torchvision`: its
Python code is enough once the two operators that it expects have a schema. A whole torchvision defines them itself, and ends the process if it finds
them defined, so it is loaded first.
"""

import functools
import importlib.util
import pathlib

import numpy as np
import torch


def _load_torchvision():
  """The operators of torchvision, as far as its library can be loaded here; what then is missing as a schema."""
  for folder in importlib.util.find_spec("torchvision").submodule_search_locations:
    for library in pathlib.Path(folder).glob("_C*.so"):
      try:
        torch.ops.load_library(library)
        return None
      except OSError:  # of another build of torch
        continue
  made = torch.library.Library("torchvision", "FRAGMENT")
  for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):  # by this file under its other name
      made.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  return made


_torchvision = _load_torchvision()


def qwen_image_transformer():
  """The published class of the generator."""
  from diffusers import QwenImage21Transformer2DModel
  return QwenImage21Transformer2DModel


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


def tiny_qwen3_vl(seed, tied=False, vocab_size=320, image_token_id=300, text=None, vision=None, **token_ids):
  """A small random `Qwen3VLForConditionalGeneration`: width 64, vision taps that are not evenly spaced, special tokens from 300 on; `text` and
  `vision` hold other sizes of the two parts."""
  from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
  text_sizes = dict(vocab_size=vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                    head_dim=32, max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=tied,
                    rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=[6, 5, 5])) | (text or {})
  vision_sizes = dict(depth=5, hidden_size=48, intermediate_size=96, num_heads=4, in_channels=3, patch_size=16, spatial_merge_size=2,
                      temporal_patch_size=2, out_hidden_size=text_sizes["hidden_size"], num_position_embeddings=64,
                      deepstack_visual_indexes=[0, 1, 3]) | (vision or {})
  others = dict(video_token_id=301, vision_start_token_id=302, vision_end_token_id=303) | token_ids
  config = Qwen3VLConfig(text_config=text_sizes, vision_config=vision_sizes, tie_word_embeddings=tied, image_token_id=image_token_id, **others)
  return randomize(rescale(Qwen3VLForConditionalGeneration(config), seed), seed, scale=0.2)


# A whole pipeline.

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                "<|video_pad|>"]
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
                 "{{ c['text'] if c['type'] == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}"
                 "{{ '<|im_end|>\n' }}{% endfor %}")


def tiny_tokenizer():
  """A small byte-level BPE tokenizer of Qwen's form (splitting rule, NFC, special tokens) as transformers wraps it."""
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.normalizer = normalizers.NFC()
  bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(QWEN_WORDS), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  bpe.decoder = decoders.ByteLevel()
  words = ["system user assistant Comprehend and analyze the provided prompt. <image1> <image2> a red poster with the word make it blue"]
  bpe.train_from_iterator(words * 20, trainers.BpeTrainer(vocab_size=400, special_tokens=QWEN_SPECIAL, show_progress=False,
                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def tiny_vae(seed, channels=8, image_channels=4, **sizes):
  """A small random `AutoencoderKLQwenImage21` with statistics that are no one's default; `sizes` in place of its own."""
  from diffusers import AutoencoderKLQwenImage21
  torch.manual_seed(seed)
  statistics = dict(latents_mean=[0.1 * i - 0.3 for i in range(channels)], latents_std=[1 + 0.1 * i for i in range(channels)])
  sizes = dict(base_dim=8, decoder_base_dim=12, num_res_blocks=1) | sizes
  return randomize(AutoencoderKLQwenImage21(z_dim=channels, in_channels=image_channels, out_channels=image_channels, **sizes, **statistics), seed)


def tiny_transformer(seed, num_layers=2, channels=8, causal_condition=True, **sizes):
  """A small random `QwenImage21Transformer2DModel` of width 64 for the encoder of `tiny_qwen3_vl`; `sizes` in place of its own."""
  from diffusers import QwenImage21Transformer2DModel
  torch.manual_seed(seed)
  sizes = dict(attention_head_dim=16, num_attention_heads=4, context_in_dim=64, axes_dims_rope=(4, 6, 6)) | sizes
  module = QwenImage21Transformer2DModel(in_channels=channels, out_channels=channels, num_layers=num_layers, causal_condition=causal_condition,
                                         **sizes)
  return randomize(rescale(module, seed), seed, scale=0.2)


def tiny_pipeline(seed=0, num_layers=2, channels=8, tied=False, causal_condition=True, sizes=None, **scheduler):
  """A small random `QwenImage21Pipeline` that stands in for a published checkpoint; `save_pretrained(folder)` writes its folder.

  Args:
    seed: of all weights.
    num_layers: of the transformer.
    channels: of the latents.
    tied: whether the encoder's head is its embedding.
    causal_condition: of the transformer.
    sizes: "transformer", "vae", "text", "vision" -> sizes of these in place of the tiny ones.
    scheduler: settings in place of the published ones.
  """
  from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline
  from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor
  tokenizer, sizes = tiny_tokenizer(), {"transformer": {}, "vae": {}, "text": None, "vision": None} | (sizes or {})
  ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in [
      ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"), ("vision_start_token_id", "<|vision_start|>"),
      ("vision_end_token_id", "<|vision_end|>")]}
  grid = dict(patch_size=16, merge_size=2, temporal_patch_size=2)
  processor = Qwen3VLProcessor(
      image_processor=Qwen2VLImageProcessor(**grid, min_pixels=32 * 32, max_pixels=2048 * 2048, image_mean=[0.5] * 3, image_std=[0.5] * 3),
      tokenizer=tokenizer, video_processor=Qwen3VLVideoProcessor(**grid), chat_template=CHAT_TEMPLATE)
  settings = dict(use_dynamic_shifting=True, time_shift_type="exponential", base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192,
                  max_shift=0.9, shift_terminal=0.02)
  return QwenImage21Pipeline(
      FlowMatchEulerDiscreteScheduler(**(settings | scheduler)), tiny_vae(seed, channels, **sizes["vae"]),
      tiny_qwen3_vl(seed, tied, len(tokenizer), text=sizes["text"], vision=sizes["vision"], **ids), processor,
      tiny_transformer(seed, num_layers, channels, causal_condition, **sizes["transformer"]))


@functools.cache
def pipeline(folder):
  """The published pipeline of a folder."""
  from diffusers import QwenImage21Pipeline
  pipe = QwenImage21Pipeline.from_pretrained(folder)
  pipe.set_progress_bar_config(disable=True)
  return pipe
