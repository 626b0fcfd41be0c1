"""The vision part of the condition encoder, and images inside prompts: against the published class, and their properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from qimg2 import params as P
from qimg2 import sharding
from qimg2.models import qwen3_vl, qwen3_vl_vision
from qimg2.published import tensors
from qimg2.published.names import qwen3_vl as names

TOLERANCE = 2e-5
IMAGE, NUM_TOKENS = 300, 60
SIZES_PX = ((64, 96), (160, 32), (96, 256))  # height, width; the position table is 8 x 8 patches of 16 px


@functools.cache
def oracle(seed):
  """(the published class, its config and weights read by our names)."""
  model = reference.tiny_qwen3_vl(seed)
  cfg, published = names.config(model.config.to_dict()), reference.tensors(model)
  return model, cfg, tensors.import_tensors(qwen3_vl.specs(cfg), names.table(cfg), set(published), published.__getitem__)


@functools.cache
def processor():
  from transformers import Qwen2VLImageProcessor
  half = [0.5] * 3
  return Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, do_resize=False, image_mean=half, image_std=half)


def process(images):
  """The published processor's (pixel_values, image_grid_thw) of uint8 images [h, w, 3]."""
  out = processor()([torch.tensor(np.asarray(x)).permute(2, 0, 1) for x in images], return_tensors="pt")
  return out["pixel_values"], out["image_grid_thw"]


def random_images(seed, num_rows, sizes=SIZES_PX):
  r = np.random.RandomState(seed)
  return tuple(r.randint(0, 256, (num_rows, h, w, 3)).astype(np.uint8) for h, w in sizes)


def random_prompts(seed, texts, sizes=SIZES_PX, num_tokens=NUM_TOKENS):
  """(tokens [B, M], token_count [B]); row b has texts[b][i] text tokens before image i, and texts[b][-1] after the last."""
  r, rows = np.random.RandomState(seed), []
  for row in texts:
    parts = [r.randint(0, 290, row[0])]
    for (height, width), num_text in zip(sizes, row[1:], strict=True):
      parts += [np.full(height * width // 32**2, IMAGE), r.randint(0, 290, num_text)]
    rows.append(np.concatenate(parts))
  counts = np.asarray([len(x) for x in rows], np.int32)
  return np.stack([np.pad(x, (0, num_tokens - len(x))) for x in rows]).astype(np.int32), counts


@torch.no_grad()
def run_oracle(model, tokens, token_count, images):
  """(state before the final norm, logits) of the published class."""
  states, real = [], np.arange(tokens.shape[1]) < token_count[:, None]
  pixels, grid = process([image[b] for b in range(len(tokens)) for image in images])
  hook = model.model.language_model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
  logits = model(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(real).long(), pixel_values=pixels, image_grid_thw=grid,
                 mm_token_type_ids=torch.tensor(tokens == IMAGE).int()).logits
  hook.remove()
  return states[0].numpy(), logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def run(cfg, params, tokens, token_count, images):
  state = qwen3_vl.apply(cfg, params, tokens, token_count, images)
  return state, qwen3_vl.logits(cfg, params, state)


@functools.partial(jax.jit, static_argnums=0)
def look(cfg, params, image):
  return qwen3_vl_vision.vision_apply(cfg, params, image)


def test_patches_equal_published_processor():
  _, cfg, _ = oracle(0)
  image, = random_images(0, 1, [(64, 96)])
  pixels, grid = process(image)
  ours = qwen3_vl_vision.split_patches(cfg.vision, jnp.asarray(image))  # B N p p C
  theirs = pixels.numpy().reshape(-1, 3, 2, 16, 16)
  assert grid.tolist() == [[1, 4, 6]]
  for frame in range(2):  # an image is a clip of two equal frames
    np.testing.assert_allclose(ours[0].transpose(0, 3, 1, 2), theirs[:, :, frame], atol=1e-6)


@pytest.mark.parametrize("seed,size_px", [(seed, ((64, 96), (32, 32), (160, 352))[seed % 3]) for seed in range(3)])
def test_tokens_and_deepstack_equal_published_class(seed, size_px):
  model, cfg, params = oracle(seed)
  image, = random_images(seed, 2, [size_px])
  ours = look(cfg.vision, params["vision"], image)
  pixels, grid = process(image)
  with torch.no_grad():
    out = model.model.visual(pixels, grid_thw=grid)
  theirs = [out.pooler_output, *out.deepstack_features]
  assert ours.shape == (len(theirs), 2, size_px[0] * size_px[1] // 32**2, cfg.width)
  for our, their in zip(ours, theirs):
    assert reference.relative_error(our.reshape(-1, cfg.width), their) <= TOLERANCE


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_state_and_logits_equal_published_class(num_images, seed):
  model, cfg, params = oracle(seed)
  sizes = SIZES_PX[:num_images]
  texts = [(3, 2, 4, 5)[:num_images + 1], (9, 1, 1, 2)[:num_images + 1]]  # rows differ in length and in where their images are
  (tokens, token_count), images = random_prompts(seed, texts, sizes), random_images(seed, 2, sizes)
  real = np.arange(NUM_TOKENS) < token_count[:, None]
  theirs = run_oracle(model, tokens, token_count, images)
  for our, their in zip(run(cfg, params, tokens, token_count, images), theirs):
    assert reference.relative_error(np.asarray(our)[real], their[real]) <= TOLERANCE


def test_positions_by_hand():
  cfg = oracle(0)[1]
  tokens = np.array([[5, 6, IMAGE, IMAGE, 7, IMAGE, IMAGE, IMAGE, 8, 0]], np.int32)
  positions, ordinal, visual = qwen3_vl.prompt_positions(cfg, tokens, np.array([9], np.int32), [(1, 2), (3, 1)])
  np.testing.assert_array_equal(positions[0, 0, :9], [0, 1, 2, 2, 4, 5, 5, 5, 8])
  np.testing.assert_array_equal(positions[1, 0, :9], [0, 1, 2, 2, 4, 5, 6, 7, 8])
  np.testing.assert_array_equal(positions[2, 0, :9], [0, 1, 2, 3, 4, 5, 5, 5, 8])
  np.testing.assert_array_equal(np.nonzero(visual[0])[0], [2, 3, 5, 6, 7])
  np.testing.assert_array_equal(ordinal[0][visual[0]], np.arange(5))


def test_rows_with_fewer_images_are_plain_text():
  _, cfg, params = oracle(0)
  tokens, token_count = random_prompts(0, [(3, 2)], SIZES_PX[:1])
  text = np.where(tokens == IMAGE, 11, tokens)
  state, _ = run(cfg, params, np.concatenate([tokens, text]), np.tile(token_count, 2), random_images(0, 2, SIZES_PX[:1]))
  alone, _ = run(cfg, params, text, token_count, ())
  np.testing.assert_allclose(state[1], alone[0], atol=2e-6 * np.abs(alone).max())
  assert not np.allclose(state[0], alone[0], atol=0.1)


def test_padding_and_neighbours_change_nothing():
  _, cfg, params = oracle(0)
  (tokens, token_count), images = random_prompts(0, [(3, 2, 4), (9, 1, 1)], SIZES_PX[:2]), random_images(0, 2, SIZES_PX[:2])
  together, _ = run(cfg, params, tokens, token_count, images)
  for b, count in enumerate(token_count):
    alone, _ = run(cfg, params, tokens[b:b + 1], token_count[b:b + 1], tuple(x[b:b + 1] for x in images))
    np.testing.assert_allclose(together[b, :count], alone[0, :count], atol=2e-6 * np.abs(alone).max())
  padded = np.where(np.arange(NUM_TOKENS) < token_count[:, None], tokens, IMAGE)  # padding that looks like images
  np.testing.assert_array_equal(run(cfg, params, padded, token_count, images)[0], together)


def test_an_image_changes_only_what_follows():
  _, cfg, params = oracle(0)
  (tokens, token_count), images = random_prompts(0, [(3, 2, 4)], SIZES_PX[:2]), random_images(0, 1, SIZES_PX[:2])
  before, _ = run(cfg, params, tokens, token_count, images)
  after, _ = run(cfg, params, tokens, token_count, (images[0], 255 - images[1]))
  start = 3 + 6 + 2
  np.testing.assert_array_equal(before[:, :start], after[:, :start])
  assert np.all(np.abs(before - after)[0, start:token_count[0]].max(axis=-1) > 1e-3)


@pytest.mark.slow
def test_sharded_equals_unsharded():
  _, cfg, params = oracle(0)
  (tokens, token_count), images = random_prompts(0, [(3, 2), (9, 1)], SIZES_PX[:1]), random_images(0, 2, SIZES_PX[:1])
  mesh, rules = sharding.make_mesh({"fsdp": 2, "context": 2, "tensor": 2}), sharding.RULES["fsdp_tensor"]
  placed = jax.device_put(params, sharding.param_shardings(qwen3_vl.specs(cfg), mesh, rules))
  apply = jax.jit(lambda *inputs: qwen3_vl.apply(cfg, *inputs, shard=sharding.make_shard(mesh, rules)))
  ours = apply(placed, *sharding.put_batch((tokens, token_count, images), mesh, rules))
  assert reference.relative_error(ours, run(cfg, params, tokens, token_count, images)[0]) < TOLERANCE


@pytest.mark.slow
def test_random_init_tells_images():
  _, cfg, _ = oracle(0)
  params = jax.jit(lambda key: P.init(qwen3_vl_vision.vision_specs(cfg.vision), key))(jax.random.key(0, impl="rbg"))
  tokens = look(cfg.vision, params, random_images(0, 4, [(64, 64)])[0])[0].reshape(16, -1)
  distance = np.linalg.norm(tokens[:, None] - tokens[None], axis=-1) + 1e3 * np.eye(16)
  assert distance.min() > 0.3 * np.linalg.norm(tokens, axis=-1).mean()


@pytest.mark.parametrize("shape,message", [((1, 64, 80, 3), "multiples of 32 px"), ((1, 64, 64, 4), "composite RGBA"),
                                           ((1, 256, 320, 3), "longer prompt bucket")])
def test_apply_refuses(shape, message):
  _, cfg, params = oracle(0)
  with pytest.raises(ValueError, match=message):
    run(cfg, params, np.zeros((1, NUM_TOKENS), np.int32), np.array([NUM_TOKENS], np.int32), (np.zeros(shape, np.uint8),))


@pytest.mark.parametrize("fields,message", [(dict(num_heads=5), "head dim"), (dict(num_positions=50), "square"),
                                            (dict(deepstack_layers=(3, 1)), "increasing"), (dict(deepstack_layers=(27,)), "below")])
def test_vision_config_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    qwen3_vl_vision.VisionConfig(**fields)
