"""Drawing and editing against the published pipeline: same weights, prompts, images and noise, same latents and pixels."""

import dataclasses
import functools
import shutil
import tempfile

import jax
import numpy as np
import pytest
import reference
import torch
from commands import launch, process
from PIL import Image

from qimg2.runtime import masks, phases
from qimg2.runtime.generator import Generator, Size, load_condition_image
from qimg2.runtime.phases import NETWORK, Phases
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.rehearsal import drawing
from qimg2.runtime.sampling import Request, pretrained_defaults, sample

NUM_STEPS, RESOLUTION, NUM_TOKENS = 8, 64, 96
PROMPTS = ("a poster", 'make the word "blue" red,\nplease 蓝 🦊', "")
SOURCE_SIZES = ((90, 60), (64, 64), (50, 120))  # width, height in px
LATENTS_TOLERANCE, PIXELS_TOLERANCE = 1e-4, 1 / 255


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """`folder(seed)`: the published folder of a tiny random pipeline."""
  root = tmp_path_factory.mktemp("published")
  @functools.cache
  def folder(seed):
    reference.tiny_pipeline(seed).save_pretrained(root / str(seed))
    return root / str(seed)
  return folder


@functools.cache
def pictures(num):
  rng = np.random.default_rng(num)
  return [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in SOURCE_SIZES[:num]]


def run_published(folder, prompt, noise, images=(), guidance=1.0, negative_prompt="", **options):
  """(latents [h, w, C], pixels [H, W, 4] in [0, 1]) of one prompt by the published pipeline."""
  last = {}
  def keep(pipe, step, t, values):
    last.update(values)
    return values
  height, width, channels = noise.shape
  packed = torch.from_numpy(noise).reshape(1, -1, channels)
  out = reference.pipeline(folder)(prompt, image=list(images) or None, latents=packed, height=16 * height, width=16 * width, output_type="np",
                                   negative_prompt=negative_prompt if guidance != 1 else None, true_cfg_scale=guidance, output_resolution=RESOLUTION,
                                   callback_on_step_end=keep, **({"num_inference_steps": NUM_STEPS} | options))
  return last["latents"].numpy().reshape(noise.shape), out.images[0]


@functools.cache
def generator(folder, num_sources, guidance, cache=True, num_devices=1, height=64, width=96):
  """(networks, generator of a batch of three prompts)."""
  source = Pretrained(folder, devices=jax.devices()[:num_devices])
  sizes = tuple(load(image, source).shape[:2] for image in pictures(num_sources))
  return source, Generator(source, Size(height, width, NUM_TOKENS, sizes, 3), NUM_STEPS, guidance, cache=cache)


def load(image, source):
  """A PIL picture through the file that a user would give."""
  with tempfile.NamedTemporaryFile(suffix=".png") as file:
    image.save(file.name)
    return load_condition_image(file.name, RESOLUTION, source.nets.vae.image_channels)


@functools.cache
def weights_of(folder, num_devices=1):
  return Pretrained(folder, devices=jax.devices()[:num_devices]).load()


def compare(first, folder, seed, num_sources, guidance, rows=(0, 1, 2), cache=True, num_devices=1):
  """Draws a batch of three prompts of different length and compares `rows` of it with the pipeline, which draws each alone."""
  source, draw = generator(first, num_sources, guidance, cache, num_devices)
  images = pictures(num_sources)
  noise = np.random.default_rng(seed).standard_normal((3, 4, 6, 8)).astype(np.float32)
  latents, pixels = draw.draw(weights_of(folder, num_devices), PROMPTS, images=[np.stack([load(image, source)] * 3) for image in images],
                              negative_prompt="blue", noise=noise)
  for row in rows:
    theirs, picture = run_published(folder, PROMPTS[row], noise[row], images, guidance, "blue")
    assert np.std(theirs) > 0.1
    assert reference.relative_error(latents[row], theirs) <= LATENTS_TOLERANCE
    assert np.abs(pixels[row] / 255 - picture).max() <= PIXELS_TOLERANCE


# No condition image to three, guided and not; one of them is below. To compile what draws takes most of the time: these cases share it.
@pytest.mark.parametrize("num_sources, guidance", [(0, 3.0), pytest.param(3, 1.0, marks=pytest.mark.slow)])
def test_latents_and_pixels_equal_the_pipeline(folders, num_sources, guidance):
  compare(folders(0), folders(0), 0, num_sources, guidance)


@pytest.mark.slow
@pytest.mark.parametrize("num_sources, guidance", [(0, 3.0), (2, 3.0), (3, 1.0)])
def test_three_seeds_equal_the_pipeline(folders, num_sources, guidance):
  for seed in range(3):
    compare(folders(0), folders(seed), seed, num_sources, guidance, rows=(seed % 3,))


@pytest.mark.slow
@pytest.mark.parametrize("cache, num_devices", [(True, 8), (False, 1)])
def test_eight_devices_give_the_same_and_so_does_one_without_a_cache(folders, cache, num_devices):
  compare(folders(0), folders(0), 1, 1, 2.0, rows=(1,), cache=cache, num_devices=num_devices)


@pytest.mark.slow
def test_own_sampling_times_and_a_static_shift(folders, tmp_path, one_device):
  """The turbo form: eight given times, static shift, no terminal stretch."""
  times = [1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568]
  pipe = reference.tiny_pipeline(3, use_dynamic_shifting=False, shift=1.0, shift_terminal=None)
  pipe.register_to_config(sample_sigmas=times)
  pipe.save_pretrained(tmp_path / "turbo")
  source = Pretrained(tmp_path / "turbo")
  assert pretrained_defaults(source)["sigmas"] == tuple(times)
  noise = np.random.default_rng(0).standard_normal((4, 4, 8)).astype(np.float32)
  np.save(tmp_path / "noise.npy", noise)
  request = Request(("a poster",), height=64, width=64, noise=str(tmp_path / "noise.npy"))
  latents, _, _ = sample(source, source.load, request, pretrained_defaults(source))
  theirs, _ = run_published(tmp_path / "turbo", "a poster", noise, num_inference_steps=3)  # the folder's own times win
  assert reference.relative_error(latents[0], theirs) <= LATENTS_TOLERANCE


@pytest.mark.parametrize("size", [(90, 60), (33, 200), (1000, 700), (64, 64)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_condition_images_are_prepared_as_published(folders, tmp_path, size, mode):
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)).convert(mode)
  image.save(tmp_path / "image.png")
  ours = load_condition_image(tmp_path / "image.png", RESOLUTION, 4)
  processor, area = reference.pipeline(folders(0)).image_processor, RESOLUTION**2
  width = (area * size[0] / size[1]) ** 0.5
  sides = [round(side / 32) * 32 for side in (width * size[1] / size[0], width)]
  theirs = np.array(processor.resize(image.convert("RGBA"), *sides))
  assert ours.shape[:2] == theirs.shape[:2] == tuple(sides)
  np.testing.assert_array_equal(ours, theirs[..., :ours.shape[-1]])
  assert ours.shape[-1] == 4 or (theirs[..., 3] == 255).all()
  opaque = load_condition_image(tmp_path / "image.png", RESOLUTION, 3)
  assert opaque.shape == (*sides, 3)


@pytest.mark.slow
def test_transparent_images_equal_the_pipeline(folders):
  source = Pretrained(folders(0), devices=jax.devices()[:1])
  image = Image.fromarray(np.random.default_rng(5).integers(0, 2, (64, 64, 4), dtype=np.uint8) * 255)  # half of the pixels see-through
  pixels = load(image, source)
  noise = np.random.default_rng(6).standard_normal((4, 4, 8)).astype(np.float32)
  draw = Generator(source, Size(64, 64, NUM_TOKENS, (pixels.shape[:2],), 1), NUM_STEPS)
  latents, picture = draw.draw(weights_of(folders(0)), ["make it red"], images=[pixels[None]], noise=noise[None])
  theirs, their_picture = run_published(folders(0), "make it red", noise, [image])
  assert reference.relative_error(latents[0], theirs) <= LATENTS_TOLERANCE
  assert np.abs(picture[0] / 255 - their_picture).max() <= PIXELS_TOLERANCE


@pytest.mark.slow
def test_the_size_of_an_edit_is_the_pipelines(folders, tmp_path):
  """From the original's aspect ratio, not from that of the resized image, which rounds another way."""
  image = Image.fromarray(np.random.default_rng(7).integers(0, 256, (53, 90, 3), dtype=np.uint8))
  image.save(tmp_path / "image.png")
  source = Pretrained(folders(0), devices=jax.devices()[:1])
  defaults = pretrained_defaults(source) | {"num_steps": 1}
  request = Request(("x",), images=(str(tmp_path / "image.png"),), output_resolution=RESOLUTION + 7)  # rounded down, and that is said
  _, pictures, _ = sample(source, lambda: weights_of(folders(0)), request, defaults)
  theirs = reference.pipeline(folders(0))("x", image=[image], num_inference_steps=2, output_resolution=RESOLUTION, output_type="np").images[0]
  assert pictures[0].shape == theirs.shape


# Memory.


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  """A folder of the real one's types: generator and encoder in bfloat16, VAE in float32."""
  pipe = reference.tiny_pipeline(4)
  pipe.transformer.to(torch.bfloat16)
  pipe.text_encoder.to(torch.bfloat16)
  folder = tmp_path_factory.mktemp("mixed")
  pipe.save_pretrained(folder)
  return folder


def test_images_of_another_number_or_size_are_refused(folders):
  _, draw = generator(folders(0), 1, 1.0)
  height, width = draw._given[0]
  with pytest.raises(ValueError, match="0 condition image.s. were given where size.source_sizes has 1: give one for each"):
    draw.draw({}, ["x"])
  with pytest.raises(ValueError, match=f"An image of {height + 32} x {width} px was given where size.source_sizes has {height} x {width}"):
    draw.draw({}, ["x"], images=[np.zeros((1, height + 32, width, 3), np.uint8)])


def bytes_on_devices():
  return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())


def test_weights_stay_in_the_type_of_their_files_which_also_computes(mixed):
  source = Pretrained(mixed, devices=jax.devices()[:1])
  assert source.nets.compute_dtypes() == {"mmdit": "bfloat16", "qwen3_vl": "bfloat16", "vae": "float32"}
  weights, expected = source.load(), source.abstract()
  assert {name: {str(x.dtype) for x in jax.tree.leaves(tree)} for name, tree in weights.items()} == {
      "mmdit": {"bfloat16"}, "qwen3_vl": {"bfloat16"}, "vae": {"float32"}}
  assert jax.tree.map(lambda x: (x.shape, x.dtype), weights) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
  assert set(Pretrained(mixed, "float32").nets.compute_dtypes().values()) == {"float32"}


@pytest.mark.slow
def test_offloaded_networks_are_on_the_device_one_at_a_time_and_draw_the_same_bits(mixed, monkeypatch):
  """And a prompt with its images is encoded once, however many pictures are drawn of it."""
  source = Pretrained(mixed, devices=jax.devices()[:1])
  weights, image = source.load(), np.asarray(pictures(2)[1])
  size = Size(64, 64, NUM_TOKENS, (image.shape[:2],), 2)
  job = dict(prompts=[PROMPTS[0], PROMPTS[0], PROMPTS[1]], images=[np.stack([image] * 3)], negative_prompt="blue")
  whole = Generator(source, size, 2, 2.0).draw(weights, **job)
  sizes = {name: sum(x.nbytes for x in jax.tree.leaves(tree)) for name, tree in weights.items()}
  monkeypatch.setattr(phases, "LAYOUT_PLATFORMS", ("cpu",))  # as on a TPU
  draw, before, seen = Generator(source, size, 2, 2.0), bytes_on_devices(), []
  for phase, network in NETWORK.items():
    def watched(self, params, *arguments, phase=phase, network=network, run=getattr(Phases, phase), **settings):
      seen.append(phase)
      # Other networks, states and latents are not there; on a CPU noise is, of 1 KiB, which the host shares until its arrays are collected.
      assert abs(bytes_on_devices() - before - sizes[network]) <= 4096 < min(sizes.values()) / 10
      return run(self, params, *arguments, **settings)
    monkeypatch.setattr(Phases, phase, watched)
  offloaded = source.offloaded()
  parts = draw.draw(offloaded, **job)
  for ours, theirs in zip(parts, whole):
    np.testing.assert_array_equal(ours, theirs)
  assert abs(bytes_on_devices() - before) <= 4096
  # Three texts in batches of two, one image, and two batches of pictures.
  assert seen == ["encode_text"] * 2 + ["encode_image"] + ["denoise"] * 2 + ["decode_image"] * 2
  again = draw.draw(offloaded, **job)
  assert seen[7:] == ["denoise"] * 2 + ["decode_image"] * 2
  np.testing.assert_array_equal(again[0], whole[0])
  monkeypatch.setattr(source, "_load", lambda network, load=source._load: jax.tree.map(lambda x: 2 * x, load(network)))  # other weights
  assert (draw.draw(source.offloaded(), **job)[0] != whole[0]).any() and seen[11:14] == ["encode_text"] * 2 + ["encode_image"]


def test_a_plan_counts_bytes_without_a_weight(mixed, tmp_path, monkeypatch):
  shutil.copytree(mixed, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors*"))
  pictures(2)[1].save(tmp_path / "image.png")
  arguments = ("--prompt=x", f"--image={tmp_path}/image.png", "--height=64", "--width=64", f"--output_resolution={RESOLUTION}", "--num_steps=2",
               "--vae_tile=64", "--plan")
  result = launch("launch.sample", f"--pretrained={tmp_path}/configs", *arguments)
  assert result.returncode == 1 and "There are no weights in" in result.stderr  # whose type says what computes
  found, plan = [], drawing.plan
  monkeypatch.setattr(drawing, "plan", lambda *given: found.append(plan(*given)) or found[0])
  result = launch("launch.sample", f"--pretrained={tmp_path}/configs", "--dtype=float32", *arguments)
  assert result.returncode == 0 and "peak with --offload --vae_tile=64: " in result.stdout, result.stderr
  phases, limit = found[0]
  sizes = {name: sum(x.size * 4 for x in jax.tree.leaves(tree)) for name, tree in Pretrained(mixed, "float32").abstract().items()}
  assert limit is None and [phase.name for phase in phases] == list(NETWORK)  # none is larger than a tile
  assert all(phase.beside * jax.device_count() >= sum(sizes.values()) - sizes[NETWORK[phase.name]] for phase in phases)
  assert all(phase.arguments > 0 and phase.temporaries >= 0 for phase in phases)
  phases = [drawing.Phase("encode_text", 5, 1, 9), drawing.Phase("denoise", 4, 3, 8), drawing.Phase("decode_image", 1, 7, 11),
            drawing.Phase("decode_image", 1, 2, 11, True)]
  totals = {key: phase.total(key[0]) for key, phase in drawing.peaks(phases).items()}
  assert totals == {(False, False): 19, (False, True): 15, (True, False): 8, (True, True): 7}  # (offload, tiles)
  text = drawing.describe([dataclasses.replace(phase, arguments=phase.arguments * 2**30) for phase in phases], 4.5 * 2**30, 64)
  assert "peak with --offload --vae_tile=64: 5.00 GiB in encode_text, does not fit in 4.50" in text


# Masks and sizes.


@pytest.mark.slow
def test_a_mask_keeps_pixels_bit_for_bit_at_the_image_s_own_size(folders, tmp_path, one_device):
  image = np.random.default_rng(11).integers(0, 256, (53, 70, 3), dtype=np.uint8)
  mask = np.zeros((53, 70), np.uint8)
  mask[20:40, 30:52] = 255
  Image.fromarray(image).save(tmp_path / "image.png")
  Image.fromarray(mask).save(tmp_path / "mask.png")
  result = launch("launch.sample", f"--pretrained={folders(0)}", "--prompt=a", f"--image={tmp_path}/image.png", f"--output_resolution={RESOLUTION}",
                  "--num_steps=2", f"--mask={tmp_path}/mask.png", f"--save_latents={tmp_path}/latents.npy", f"--out={tmp_path}/out.png")
  assert result.returncode == 0, result.stderr
  drawn, opaque = np.asarray(Image.open(tmp_path / "out.png")), np.concatenate([image, np.full_like(image[..., :1], 255)], -1)
  assert drawn.shape == (53, 70, 4)
  np.testing.assert_array_equal(drawn[mask == 0], opaque[mask == 0])
  assert (drawn[mask == 255][..., :3] != image[mask == 255]).mean() > 0.9
  # Latents that no pixel of the mask touches are those of the padded image.
  padded = np.pad(image, ((0, 11), (0, 26), (0, 0)), "reflect")[None]
  source = Pretrained(folders(0), devices=jax.devices()[:1])
  kept = np.asarray(jax.jit(source.nets.encode)(weights_of(folders(0))["vae"], padded))[0]
  latents, free = np.load(tmp_path / "latents.npy"), np.zeros((4, 6), bool)
  free[1:3, 1:4] = True
  assert latents.shape == (4, 6, 8) and reference.relative_error(latents[~free], kept[~free]) < 1e-5
  assert np.abs(latents - kept)[free].max(axis=-1).min() > 1e-3


def test_grey_of_a_mask_mixes_and_an_rgb_source_is_opaque():
  source, picture = np.full((1, 1, 3, 3), 10, np.uint8), np.array([0, 210, 210, 55], np.uint8) * np.ones((1, 1, 3, 1), np.uint8)
  mixed = masks.paste(source, picture, np.array([[[0, 51, 255]]], np.uint8))
  np.testing.assert_array_equal(mixed[0, 0], [[10, 10, 10, 255], [8, 50, 50, 215], [0, 210, 210, 55]])  # a fifth of the way


# The command.


@pytest.mark.slow
def test_the_command_edits_with_a_published_folder(folders, tmp_path):
  image = pictures(1)[0]
  image.save(tmp_path / "source.png")
  noise = np.random.default_rng(9).standard_normal((4, 4, 8)).astype(np.float32)
  np.save(tmp_path / "noise.npy", noise)
  result = process("launch.sample", f"--pretrained={folders(0)}", "--prompt=make it red", f"--image={tmp_path}/source.png", "--negative_prompt=blue",
                  "--guidance=3", "--height=64", "--width=64", f"--output_resolution={RESOLUTION}", f"--num_steps={NUM_STEPS}",
                  f"--noise={tmp_path}/noise.npy", f"--save_latents={tmp_path}/latents.npy", f"--out={tmp_path}/out.png")
  assert result.returncode == 0, result.stderr
  theirs, picture = run_published(folders(0), "make it red", noise, [image], 3.0, "blue")
  assert reference.relative_error(np.load(tmp_path / "latents.npy"), theirs) <= LATENTS_TOLERANCE
  assert np.abs(np.asarray(Image.open(tmp_path / "out.png")) / 255 - picture).max() <= PIXELS_TOLERANCE


@pytest.mark.slow
def test_several_pictures_per_prompt_and_bfloat16(folders, tmp_path, one_device):
  result = launch("launch.sample", f"--pretrained={folders(0)}", "--prompt=a poster", "--prompt=a red word", "--num_images_per_prompt=2",
                  "--height=47", "--width=64", "--dtype=bfloat16", "--nocache", "--sigmas=1.0,0.8,0.3", f"--out={tmp_path}/out.jpg",
                  f"--pictures={tmp_path}/each", f"--save_latents={tmp_path}/latents.npy")
  assert result.returncode == 0 and "4 pictures" in result.stdout, result.stderr
  assert "--height=47 is drawn at 32: it must be a multiple of 32." in result.stderr and Image.open(tmp_path / "out.jpg").format == "JPEG"
  assert sorted(path.name for path in (tmp_path / "each").iterdir()) == [f"000{i}.png" for i in range(4)]
  latents = np.load(tmp_path / "latents.npy")
  assert latents.shape == (4, 2, 4, 8) and all((latents[i] != latents[j]).any() for i in range(4) for j in range(i))


@pytest.mark.parametrize("arguments, message", [
    ((), "Give either --workdir"), (("--workdir=a", "--pretrained=b"), "Give either --workdir"),
    (("--workdir=a", "--transformer=b"), "--transformer names the generator alone: give --pretrained too"),
    (("--pretrained={folder}", "--transformer=/nowhere.gguf"), "There is no file /nowhere.gguf: name a .safetensors or .gguf file of weights"),
    (("--pretrained=/nowhere",), "/nowhere"), (("--pretrained={folder}", "--image=/nowhere.png"), "There is no image /nowhere.png"),
    (("--pretrained={folder}", "--image={folder}/half.png"), "half.png (100 bytes): "),
    (("--pretrained={folder}", "--noise=/nowhere.npy"), "/nowhere.npy cannot be read"),
    (("--pretrained={folder}", "--noise={folder}/empty.npy"), "empty.npy cannot be read"),
    (("--pretrained={folder}", "--noise={folder}/noise.npy"), "The noise has shape (1, 2, 2, 8), but 1 picture(s) of 1024 x 1024 px need"),
    (("--pretrained={folder}", "--out={folder}"), "is a folder: name a PNG file"),
    (("--pretrained={folder}", "--stage=sft"), "leave them out with --pretrained"),
    (("--pretrained={folder}", "--negative_prompt=x"), "only read with guidance"),
    (("--pretrained={folder}", "--sigmas=1,0.5", "--num_steps=3"), "--num_steps=3 does not go with the 2 sampling times that --sigmas gives"),
    (("--pretrained={folder}", "--sigmas=1,x"), "--sigmas=1,x is not understood"),
    (("--pretrained={folder}", "--sigmas=0.5,0.9"), "must fall from at most 1"),
    (("--pretrained={folder}", "--height=20", "--width=64"), "--height=20 is too small: it must be at least 32"),
    (("--pretrained={folder}", "--out={folder}/x.tiff"), "x.tiff does not say what kind of picture it is: let it end in .png, .jpg, .jpeg, .webp."),
    (("--pretrained={folder}", "--keep_size"), "--keep_size is for edits: give the picture to edit with --image."),
    (("--pretrained={folder}", "--keep_size", "--image={folder}/image.png", "--height=64"), "leave --height and --width out"),
    (("--pretrained={folder}", "--mask={folder}/black.png", "--image={folder}/image.png"), "black.png is all black, so nothing may change"),
    (("--pretrained={folder}", "--mask={folder}/small.png", "--image={folder}/image.png"), "has 3 x 4 px, but the image that is edited has 64 x 64"),
    (("--pretrained={folder}", "--mask={folder}/image.png", "--image={folder}/image.png"), "image.png has colours: save it as grey"),
    (("--pretrained={folder}", "--vae_tile=100"), "Tiles of 100 px do not fit the autoencoder"),
    (("--pretrained={folder}", "--plan=v9:1x1"), "Topology 'v9:1x1' is not understood"),
    (("--pretrained={folder}", "--image={folder}/image.png", "--output_resolution=4096"), "16777216 px at output_resolution 4096"),
])
def test_mistakes_end_in_one_sentence(folders, arguments, message, monkeypatch):
  """And before the weights are read, which takes minutes."""
  monkeypatch.setattr(Pretrained, "load", None)
  pictures(2)[1].save(folders(0) / "image.png")
  for name, shape in {"black": (64, 64), "small": (3, 4)}.items():
    Image.fromarray(np.zeros(shape, np.uint8)).save(folders(0) / f"{name}.png")
  np.save(folders(0) / "noise.npy", np.zeros((2, 2, 8), np.float32))
  (folders(0) / "half.png").write_bytes((folders(0) / "image.png").read_bytes()[:100])
  (folders(0) / "empty.npy").touch()
  result = launch("launch.sample", "--prompt=x", *(text.format(folder=folders(0)) for text in arguments))
  assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr and result.stderr.count("\n") == 1, result.stderr
