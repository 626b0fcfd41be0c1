"""The language part of the condition encoder against the published class, and its properties; names and sizes of the whole encoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from configs import sizes
from qimg2 import params as P
from qimg2 import sharding
from qimg2.models import qwen3_vl
from qimg2.models.qwen3_vl_vision import VisionConfig
from qimg2.published import tensors
from qimg2.published.names import qwen3_vl as names
from qimg2.runtime.config import from_section

TOLERANCE = 2e-5
SIZES = {size: dataclasses.replace(from_section(qwen3_vl.Config, sizes.qwen3_vl(size), "config.encoder"), dtype="float32")
         for size in ("2B", "4B", "8B", "32B")}
PUBLISHED_COUNT = {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696, "32B": 33_357_390_064}
RANDOM = qwen3_vl.Config(vocab_size=300, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=192,
                         mrope_sections=(4, 2, 2), image_token_id=299, vision=None)


@functools.cache
def oracle(seed, tied=False):
  """(the published class, its config and weights read by our names)."""
  model = reference.tiny_qwen3_vl(seed, tied)
  cfg = names.config(model.config.to_dict())
  published = reference.tensors(model)
  if tied:
    del published["lm_head.weight"]  # the published files of tied models hold the embedding once
  return model, cfg, tensors.import_tensors(qwen3_vl.specs(cfg), names.table(cfg), set(published), published.__getitem__)


@torch.no_grad()
def run_oracle(model, **inputs):
  """(state before the final norm, logits): transformers 5 returns the state after it."""
  states = []
  hook = model.model.language_model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
  logits = model(**inputs).logits
  hook.remove()
  return states[0].numpy(), logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def run(cfg, params, tokens, token_count, images=()):
  state = qwen3_vl.apply(cfg, params, tokens, token_count, images)
  return state, qwen3_vl.logits(cfg, params, state)


@jax.jit
def random_params(seed):
  return P.init(qwen3_vl.specs(RANDOM), jax.random.key(seed, impl="rbg"))  # compiles faster than the default


def prompts(seed, counts, num_tokens, vocab_size=290):
  tokens = np.random.RandomState(seed).randint(0, vocab_size, (len(counts), num_tokens)).astype(np.int32)
  return tokens, np.asarray(counts, np.int32)


@pytest.mark.parametrize("seed,tied", [(seed, seed % 2 == 1) for seed in range(3)])
def test_state_and_logits_equal_published_class(seed, tied):
  model, cfg, params = oracle(seed, tied)
  tokens, token_count = prompts(seed, [23, 9, 1, 16], 23)
  real = np.arange(23) < token_count[:, None]
  theirs = run_oracle(model, input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(real).long())
  for our, their in zip(run(cfg, params, tokens, token_count), theirs):
    assert reference.relative_error(np.asarray(our)[real], their[real]) <= TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
def test_names_map_strictly_both_ways(tied):
  model, cfg, params = oracle(0, tied)
  published = reference.tensors(model)
  exported = dict(tensors.export_tensors(params, qwen3_vl.specs(cfg), names.table(cfg)))
  assert set(published) - set(exported) == ({"lm_head.weight"} if tied else set())
  for name, x in exported.items():
    np.testing.assert_array_equal(x, published[name], strict=True)
  with pytest.raises(ValueError, match="lack"):
    tensors.import_tensors(qwen3_vl.specs(cfg), names.table(cfg), set(exported) - {"model.visual.patch_embed.proj.bias"}, exported.get)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_count_of_published_size(size):
  assert qwen3_vl.Config() == SIZES["8B"]
  cfg = SIZES[size]
  assert P.count(qwen3_vl.specs(cfg)) == PUBLISHED_COUNT[size]
  assert sum(p.numel() for p in on_meta_device(cfg).parameters()) == PUBLISHED_COUNT[size]


def on_meta_device(cfg):
  from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
  vision = cfg.vision
  rope = dict(rope_type="default", rope_theta=cfg.rope_theta, mrope_section=list(cfg.mrope_sections))
  published = Qwen3VLConfig(
      tie_word_embeddings=cfg.tie_embeddings,
      text_config=dict(vocab_size=cfg.vocab_size, hidden_size=cfg.width, num_hidden_layers=cfg.num_layers,
                       num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, head_dim=cfg.head_dim,
                       intermediate_size=cfg.mlp_width, rope_parameters=rope, tie_word_embeddings=cfg.tie_embeddings),
      vision_config=dict(depth=vision.num_layers, hidden_size=vision.width, intermediate_size=vision.mlp_width, num_heads=vision.num_heads,
                         out_hidden_size=vision.out_width, deepstack_visual_indexes=list(vision.deepstack_layers)))
  assert names.config(published.to_dict()) == cfg
  with torch.device("meta"):
    return Qwen3VLForConditionalGeneration(published)


def test_config_reads_the_older_form_and_refuses_other_models():
  published = reference.tiny_qwen3_vl(0).config.to_dict()
  expected = names.config(published, dtype="bfloat16")
  rope = published["text_config"].pop("rope_parameters")
  published["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
  assert names.config(published, dtype="bfloat16") == expected
  with pytest.raises(ValueError, match="lacks the field 'vision_config'"):
    names.config({name: x for name, x in published.items() if name != "vision_config"})
  with pytest.raises(ValueError, match="model_type"):
    names.config(published | {"model_type": "llama"})


def test_padding_changes_nothing():
  _, cfg, params = oracle(0)
  tokens, _ = prompts(3, [11], 11)
  alone, _ = run(cfg, params, tokens, np.array([11], np.int32))
  for pad in (0, 7, cfg.image_token_id):
    padded, _ = run(cfg, params, np.pad(tokens, ((0, 0), (0, 6)), constant_values=pad), np.array([11], np.int32))
    np.testing.assert_allclose(padded[:, :11], alone, atol=1e-6 * np.abs(alone).max())
    assert not np.any(padded[:, 11:])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_random_init_tells_tokens_and_contexts(seed):
  params = random_params(seed)
  tokens, token_count = prompts(seed, [24] * 32, 24)
  state = np.asarray(run(RANDOM, params, tokens, token_count)[0])
  unit = state / np.linalg.norm(state, axis=-1, keepdims=True)
  embed = np.asarray(params["embed"]) / np.linalg.norm(params["embed"], axis=-1, keepdims=True)
  assert np.all((unit @ embed.T).argmax(-1) == tokens)  # each state is nearest to its own token's embedding
  change = functools.partial(relative_change, params, tokens, state)
  assert change(lambda t: np.where(np.arange(24) == 5, (t + 1) % 290, t)) > 0.03  # one earlier token
  assert change(lambda t: np.concatenate([t[:, :8][:, ::-1], t[:, 8:]], axis=1)) > 0.03  # the order of earlier tokens
  assert 0.2 < change(lambda t: np.concatenate([(t[:, :-1] + 1) % 290, t[:, -1:]], axis=1)) < 0.6  # all earlier tokens


def relative_change(params, tokens, state, edit):
  """Mean relative change of the last token's state when earlier tokens are edited."""
  other = np.asarray(run(RANDOM, params, edit(tokens).astype(np.int32), np.full(len(tokens), 24, np.int32))[0])
  return np.mean(np.linalg.norm(other[:, -1] - state[:, -1], axis=-1) / np.linalg.norm(state[:, -1], axis=-1))


def test_remat_policy_reaches_the_layers():
  tokens, token_count = prompts(0, [8, 5], 8)

  def rematerialises(remat):
    cfg = dataclasses.replace(RANDOM, remat=remat)
    loss = lambda params: jnp.sum(qwen3_vl.apply(cfg, params, tokens, token_count))
    return "prevent_cse=False" in str(jax.make_jaxpr(loss)(P.abstract(qwen3_vl.specs(cfg))))
  assert [rematerialises(remat) for remat in ("none", "full", "dots")] == [False, True, True]


def test_bfloat16_is_near_float32():
  _, cfg, params = oracle(0)
  tokens, token_count = prompts(0, [12, 7], 12)
  exact, _ = run(cfg, params, tokens, token_count)
  rough, logits = run(dataclasses.replace(cfg, dtype="bfloat16"), params, tokens, token_count)
  assert rough.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  assert reference.relative_error(rough.astype(jnp.float32), np.asarray(exact)) < 0.05


def test_every_weight_has_a_sharding():
  for path, p in P.flatten(qwen3_vl.specs(SIZES["8B"])).items():
    sharding.partition_spec(p.axes, sharding.RULES["fsdp_tensor"], path)


@pytest.mark.parametrize("fields,message", [
    (dict(num_kv_heads=3), "multiple of num_kv_heads"),
    (dict(mrope_sections=(4, 2, 1)), "sum to half"),
    (dict(mrope_sections=(2, 3, 3)), "a third"),
    (dict(dtype="float16"), "Unknown dtype"),
    (dict(vision=VisionConfig(out_width=32)), "must equal the width"),
    (dict(vision=VisionConfig(out_width=64)), "are more than the 2 language layers"),
    (dict(vision=VisionConfig(out_width=64, deepstack_layers=()), image_token_id=300), "in the vocabulary"),
])
def test_config_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(RANDOM, **fields)
