"""The autoencoder against the published PyTorch class, and its own properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from qimg2 import params as P
from qimg2 import sharding
from qimg2.models import vae, vae_tiling
from qimg2.published import tensors
from qimg2.published.names import vae as names

TOLERANCE = 2e-5


def small(**fields):
  channels = fields.setdefault("latent_channels", 6)
  statistics = {"latents_mean": tuple(0.1 * i for i in range(channels)), "latents_std": tuple(1.0 + 0.1 * i for i in range(channels))}
  return vae.Config(**({"base_dim": 4, "decoder_base_dim": 6, "num_res_blocks": 1} | statistics | fields))


def published_class():
  from diffusers import AutoencoderKLQwenImage21
  return AutoencoderKLQwenImage21


def make_reference(cfg, seed=0):
  torch.manual_seed(seed)
  kwargs = {k: v for k, v in names.published_config(cfg).items() if k != "_class_name"}
  module = published_class()(**kwargs)
  return reference.randomize(reference.rescale(module, seed), seed)


def load(cfg, module):
  published = reference.tensors(module)
  return tensors.import_tensors(vae.specs(cfg), names.table(cfg), set(published), published.__getitem__)


def random_params(cfg, seed=0):
  # Fresh biases are zero and gains one: draw every weight, so that each one matters.
  rng = np.random.default_rng(seed)
  return P.map_with_path(lambda path, p: np.float32(rng.normal(len(p.shape) == 1 and "bias" not in path, 0.2 if len(p.shape) == 1 else
                                                              np.prod(p.shape[:-1]) ** -0.5, p.shape)), vae.specs(cfg))


def random_image(cfg, height, width, batch=2, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, cfg.image_channels)).astype(np.float32)


encode = jax.jit(vae.encode, static_argnums=0)
decode = jax.jit(vae.decode, static_argnums=0, static_argnames="clamp")

CASES = {
    "rgba": (small(image_channels=4), 0, (48, 80)),
    "rgb": (small(image_channels=3), 1, (32, 16)),
    "two_blocks": (small(dim_mult=(1, 2, 2), temporal_downsample=(False, True), num_res_blocks=2, base_dim=6), 2, (4, 12)),
    "no_time": (small(dim_mult=(1, 2, 4, 4), temporal_downsample=(False,) * 3), 4, (8, 24)),
    "time_first": (small(dim_mult=(1, 2, 2, 4, 4), temporal_downsample=(True, False, True, False)), 5, (16, 48)),
    "fourfold": (small(dim_mult=(1, 4, 4), temporal_downsample=(True, True)), 6, (12, 4)),
    "fourfold_no_time": (small(dim_mult=(1, 1, 4, 4), temporal_downsample=(False,) * 3), 7, (8, 24)),
    "narrower_end": (small(dim_mult=(1, 2, 1), temporal_downsample=(True, False)), 8, (8, 12)),
}


@pytest.mark.parametrize("case, seed", [*((case, seed) for case, (_, seed, _) in CASES.items()), *(("rgba", seed) for seed in (1, 2))])
def test_matches_the_published_class(case, seed):
  cfg, _, (height, width) = CASES[case]
  module = make_reference(cfg, seed)
  params, image = load(cfg, module), random_image(cfg, height, width, seed=seed)
  latents = np.random.default_rng(seed).normal(size=(2, height // cfg.spatial_factor, width // cfg.spatial_factor, 6)).astype(np.float32)
  with torch.no_grad():
    moments = module._encode(torch.from_numpy(image).permute(0, 3, 1, 2)[:, :, None])[:, :, 0].permute(0, 2, 3, 1).numpy()
    decoded = module.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)[:, :, None]).sample[:, :, 0].permute(0, 2, 3, 1).numpy()
  posterior = encode(cfg, params, image)
  assert reference.relative_error(posterior.mean, moments[..., :6]) < TOLERANCE
  assert reference.relative_error(posterior.logvar, moments[..., 6:]) < TOLERANCE
  ours = decode(cfg, params, latents)
  assert np.mean(np.abs(decoded) < 1.0) > 0.5  # the clamp must not hide the comparison
  assert reference.relative_error(ours, decoded) < TOLERANCE


def test_tiles_match_the_published_class():
  """Sides that end within a tile, within the overlap and with the picture; each shape of a tile is one program."""
  cfg, tile, shapes = small(image_channels=3, dim_mult=(1, 2, 2), temporal_downsample=(False, True), base_dim=6), 16, set()
  module = make_reference(cfg, 3)
  module.enable_tiling(tile, tile, vae_tiling.tile_stride(tile, 4), vae_tiling.tile_stride(tile, 4))
  params, image = load(cfg, module), random_image(cfg, 28, 40, 1, seed=3)
  latents = np.random.default_rng(3).normal(size=(1, 7, 10, 6)).astype(np.float32)
  encoded = lambda: module._encode(torch.from_numpy(image).permute(0, 3, 1, 2)[:, :, None])[:, :6, 0].permute(0, 2, 3, 1).numpy()
  with torch.no_grad():
    moments = encoded()
    decoded = module.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)[:, :, None]).sample[:, :, 0].permute(0, 2, 3, 1).numpy()
    module.use_tiling = False
    assert reference.relative_error(encoded(), moments) > 1e-3  # that of tiles is another one
  def run(function, x):
    shapes.add(x.shape)
    return function(cfg, params, x)
  ours = vae_tiling.over_tiles(lambda x: run(encode, x).mean, image, 16, 12, lambda n: n // 4)
  assert reference.relative_error(ours, moments) < TOLERANCE
  ours = vae_tiling.over_tiles(lambda x: run(functools.partial(decode, clamp=False), x), latents, 4, 3, lambda n: n * 4)
  assert reference.relative_error(np.clip(ours, -1, 1), decoded) < TOLERANCE
  assert {shape[1:3] for shape in shapes if shape[3] == 3} == {(height, width) for height in (16, 4) for width in (16, 4)}
  with pytest.raises(ValueError, match="Tiles of 100 px do not fit the autoencoder: their side must be a positive multiple of 64 px, such as 256"):
    vae_tiling.tile_stride(100, 16)


def test_export_gives_back_the_published_tensors():
  cfg = small()
  module = make_reference(cfg)
  published = reference.tensors(module)
  exported = dict(tensors.export_tensors(load(cfg, module), vae.specs(cfg), names.table(cfg)))
  assert exported.keys() == published.keys()
  for name, x in published.items():
    np.testing.assert_array_equal(exported[name], x, err_msg=name)


def test_import_names_the_odd_tensor():
  cfg = small()
  published = reference.tensors(make_reference(cfg))
  with pytest.raises(ValueError, match="time_conv"):
    without = dataclasses.replace(cfg, temporal_weights=False)
    tensors.import_tensors(vae.specs(without), names.table(without), set(published), published.__getitem__)
  with pytest.raises(ValueError, match="quant_conv.bias"):
    tensors.import_tensors(vae.specs(cfg), names.table(cfg), set(published) - {"quant_conv.bias"}, published.__getitem__)


def test_full_size_counts_and_shapes():
  specs = vae.specs(vae.Config())
  assert (P.count(specs["encoder"]), P.count(specs["decoder"])) == (78_692_192, 259_048_212)
  assert P.count(specs) - P.count(vae.specs(vae.Config(temporal_weights=False))) == 6_753_216
  with torch.device("meta"):
    module = published_class()()
  table, leaves = names.table(vae.Config()), P.flatten(specs)
  assert {e.name: e.shape(leaves[path].shape) for path, e in table.items()} == {n: tuple(x.shape) for n, x in module.state_dict().items()}
  assert names.config({"_class_name": "AutoencoderKLQwenImage21"} | dict(module.config)) == vae.Config()


def test_full_size_abstract_forward():
  cfg = vae.Config(dtype="bfloat16", remat="full")
  params = P.abstract(vae.specs(cfg))
  image = jax.ShapeDtypeStruct((1, 1024, 512, 4), jnp.float32)
  posterior = jax.eval_shape(lambda p, x: vae.encode(cfg, p, x), params, image)
  assert (posterior.mean.shape, posterior.mean.dtype) == ((1, 64, 32, 64), jnp.float32)
  decoded = jax.eval_shape(lambda p, z: vae.decode(cfg, p, z), params, posterior.mean)
  assert (decoded.shape, decoded.dtype) == (image.shape, jnp.float32)


def test_published_config_round_trip():
  cfg = small(image_channels=3)
  assert names.config(names.published_config(cfg)) == cfg
  assert names.config(names.published_config(cfg), dtype="bfloat16").dtype == "bfloat16"
  published = names.published_config(cfg)
  changes = [({"_class_name": "AutoencoderKL"}, "AutoencoderKL"), ({"is_residual": False}, "shortcut"), ({"out_channels": 4}, "4 out")]
  for change, message in changes:
    with pytest.raises(ValueError, match=message):
      names.config(published | change)
  with pytest.raises(ValueError, match="z_dim"):
    names.config({k: v for k, v in published.items() if k != "z_dim"})


def test_published_statistics():
  cfg = vae.Config()
  assert (cfg.spatial_factor, len(cfg.latents_mean), len(cfg.latents_std)) == (16, 64, 64)
  z = np.random.default_rng(0).normal(size=(2, 3, 5, 64)).astype(np.float32)
  normal = vae.normalize_latents(z * np.float32(cfg.latents_std) + np.float32(cfg.latents_mean), cfg.latents_mean, cfg.latents_std)
  np.testing.assert_allclose(normal, z, atol=1e-5)
  raw = vae.denormalize_latents(normal, cfg.latents_mean, cfg.latents_std)
  np.testing.assert_allclose(raw, z * np.float32(cfg.latents_std) + np.float32(cfg.latents_mean), atol=1e-5)


def test_pixels_round_trip():
  pixels = np.arange(256, dtype=np.uint8).repeat(4).reshape(1, 16, 16, 4)
  x = vae.pixels_to_float(pixels, 4)
  assert (x.dtype, float(x.min()), float(x.max())) == (jnp.float32, -1.0, 1.0)
  np.testing.assert_array_equal(vae.float_to_pixels(x), pixels)
  np.testing.assert_array_equal(vae.float_to_pixels(jnp.asarray([-3.0, 7.0, 2 * 0.5 / 255 - 1])), [0, 255, 0])  # clipped, half to even
  opaque = vae.pixels_to_float(pixels[..., :3], 4)
  np.testing.assert_array_equal(opaque[..., :3], x[..., :3])
  np.testing.assert_array_equal(opaque[..., 3], 1.0)
  assert vae.pixels_to_float(pixels[..., :3], 3).shape == (1, 16, 16, 3)
  with pytest.raises(ValueError, match="composite"):
    vae.pixels_to_float(pixels, 3)
  with pytest.raises(ValueError, match="float32"):
    vae.pixels_to_float(np.zeros((1, 2, 2, 3), np.float32), 3)


def test_posterior():
  mean = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 3)), jnp.float32)
  posterior = vae.Posterior(mean, jnp.full_like(mean, np.log(0.25)))
  samples = jax.vmap(posterior.sample)(jax.random.split(jax.random.key(0), 20_000))
  np.testing.assert_allclose(samples.mean(0), mean, atol=0.02)
  np.testing.assert_allclose(samples.std(0), 0.5, atol=0.01)
  np.testing.assert_array_equal(posterior.mode, mean)
  np.testing.assert_allclose(vae.Posterior(mean, jnp.zeros_like(mean)).kl(), 0.5 * jnp.sum(mean**2, (1, 2, 3)), rtol=1e-5)
  expected = np.sum(np.log(2.0) + (0.25 + np.square(mean)) / 2 - 0.5, axis=(1, 2, 3))
  np.testing.assert_allclose(posterior.kl(), expected, rtol=1e-5)


@pytest.mark.parametrize("fields, message", [
    ({"base_dim": 0}, "at least 1"), ({"temporal_downsample": (True,)}, "temporal_downsample"),
    ({"latents_mean": (0.0,)}, "one per latent channel"),
    ({"latents_std": (0.0,) * 6}, "positive"), ({"remat": "some"}, "remat"), ({"dtype": "int8"}, "int8"),
    ({"dim_mult": (1, 2, 4, 4, 3)}, "encoder level 4"),
    ({"dim_mult": (1, 1, 1, 1, 3), "temporal_downsample": (False,) * 4}, "encoder level 4"),
    ({"dim_mult": (1, 1, 3, 3), "temporal_downsample": (True,) * 3}, "encoder level 2"),
    ({"dim_mult": (1, 1, 8, 8), "temporal_downsample": (False, False, True)}, "decoder level 2")])
def test_config_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    small(**fields)


def test_input_errors():
  cfg = small()
  params = P.abstract(vae.specs(cfg))
  for shape, message in [((1, 32, 40, 4), "multiples of 16"), ((1, 32, 32, 3), r"\[B, H, W, 4\]"), ((32, 32, 4), r"\[B, H, W, 4\]")]:
    with pytest.raises(ValueError, match=message):
      vae.encode(cfg, params, jnp.zeros(shape))
  with pytest.raises(ValueError, match=r"\[B, h, w, 6\]"):
    vae.decode(cfg, params, jnp.zeros((1, 2, 2, 5)))


@functools.partial(jax.jit, static_argnums=0)
def loss_gradient(cfg, params, image):
  def loss(p):
    return jnp.mean(jnp.square(vae.decode(cfg, p, vae.encode(cfg, p, image).mode, clamp=False) - image))
  return jax.grad(loss)(params)


def shallow(**fields):
  return small(**({"image_channels": 3, "dim_mult": (1, 2, 2), "temporal_downsample": (False, True)} | fields))


def shallower():
  return shallow(dim_mult=(2, 2), temporal_downsample=(True,), decoder_base_dim=4)


@pytest.mark.slow
def test_fresh_network_is_sane_and_every_weight_but_time_learns():
  cfg = shallower()
  image = random_image(cfg, 8, 8)
  image[0] = 0.0  # a constant example is where a norm without eps gives NaN
  fresh = P.init(vae.specs(cfg), jax.random.key(0))
  mode = encode(cfg, fresh, image).mode
  assert 0.1 < np.std(mode[1]) < 3.0
  assert np.abs(decode(cfg, fresh, mode, clamp=False)).max() < 2.0
  # Residual branches start at zero, so what lies inside them learns from the second step on.
  first = loss_gradient(cfg, fresh, image)
  gradient = P.flatten(jax.device_get(loss_gradient(cfg, jax.tree.map(lambda p, g: p - 0.1 * g, fresh, first), image)))
  assert all(np.isfinite(g).all() for g in gradient.values())
  assert {path for path, g in gradient.items() if not np.any(g)} == {path for path in gradient if "/time/" in path}


@pytest.mark.slow
def test_remat_changes_nothing():
  cfg = shallower()
  params, image = random_params(cfg), random_image(cfg, 8, 8)
  plain, remat = (loss_gradient(c, params, image) for c in (cfg, dataclasses.replace(cfg, remat="full")))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, remat)


def test_bfloat16_is_close():
  cfg = shallow()
  params, image = random_params(cfg), random_image(cfg, 8, 8)
  exact = encode(cfg, params, image).mean
  rough = encode(dataclasses.replace(cfg, dtype="bfloat16"), params, image).mean
  assert rough.dtype == jnp.float32
  assert 0 < reference.relative_error(rough, exact) < 0.05


def test_clamp_flag():
  cfg = shallow()
  params, latents = random_params(cfg), 3.0 * jnp.ones((1, 2, 2, 6))
  params["decoder"]["conv_out"]["bias"] += 2.0
  wide, clamped = decode(cfg, params, latents, clamp=False), decode(cfg, params, latents)
  assert float(wide.max()) > 1.0
  np.testing.assert_array_equal(clamped, jnp.clip(wide, -1.0, 1.0))


@pytest.mark.slow
def test_sharded_equals_unsharded():
  cfg = shallow(base_dim=128, decoder_base_dim=128)
  mesh, rules = sharding.make_mesh({"data": 2, "fsdp": 4}), sharding.RULES["fsdp_tensor"]
  params, image = random_params(cfg), random_image(cfg, 8, 4, batch=8)
  shardings = sharding.param_shardings(vae.specs(cfg), mesh, rules)
  assert any("fsdp" in s.spec for s in jax.tree.leaves(shardings))

  def apply(p, x, shard):
    return vae.decode(cfg, p, vae.encode(cfg, p, x, shard).mode, shard)
  whole = jax.jit(lambda p, x: apply(p, x, sharding.identity))(params, image)
  placed = jax.device_put(params, shardings), jax.device_put(image, sharding.batch_sharding(mesh, rules))
  parts = jax.jit(lambda p, x: apply(p, x, sharding.make_shard(mesh, rules)))(*placed)
  assert reference.relative_error(parts, whole) < TOLERANCE
