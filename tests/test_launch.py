"""The launchers as a user meets them."""

import json
import zlib

import jax
import numpy as np
import pytest
from commands import launch, process
from PIL import Image

from configs import pretrain, quickstart
from qimg2 import params as P
from qimg2.runtime import report, weight_table
from qimg2.runtime.config import plain
from qimg2.runtime.generator import Generator, Size
from qimg2.runtime.run import load_run
from qimg2.runtime.sampling import sampling_weights
from qimg2.sampler import sample_noise


@pytest.mark.slow
def test_describe_prints_the_published_counts():
  result = process("launch.describe", "--config=configs/pretrain.py", "--json")
  assert result.returncode == 0, result.stderr
  totals = json.loads(result.stdout)["totals"]
  parts = ("model", "encoder", "vae/encoder", "vae/decoder", "vae/temporal")
  assert [totals[part] for part in parts] == [7_115_124_736, 8_767_123_696, 78_692_192, 259_048_212, 6_753_216]


def test_describe_divides_over_the_mesh():
  cfg = pretrain.get_config()
  one = weight_table.describe(cfg)
  assert one["mesh"] == {"data": 1, "fsdp": 64, "context": 1, "tensor": 2}
  row = next(row for row in one["weights"] if row["path"] == "model/blocks/mlp/gate")
  assert row["shape"] == [32, 4096, 12288] and row["axes"] == ["layer", "embed", "mlp"]
  assert row["bytes_per_device"] * 128 == row["count"] * 4
  text = weight_table.table(one)
  assert "7,115,124,736" in text and "model/blocks/attn/q" in text


def test_quickstart_fits_eight_devices():
  cfg = quickstart.get_config()
  cfg.mesh.update(dict(fsdp=4, tensor=2))
  assert weight_table.describe(cfg)["totals"]["model"] > 1e6


@pytest.mark.parametrize("arguments, code, message", [
    (("launch.train", "--config=configs/quickstart.py", "--workdir=/tmp/x", "--config.stages[1].num_stepz=3"), 2,
     "error: The flags cannot be used: --config.stages[1].num_stepz names no place in the config: 'num_stepz' Did you mean \"num_steps\""),
    (("launch.train", "--config=configs/quickstart.py", "--workdir=/tmp/x", "--config.stages[9].keep=3"), 2,
     "--config.stages[9].keep names no place in the config: tuple index"),
    (("launch.train", "--config=configs/nothing.py", "--workdir=/tmp/x"), 2, "configs/nothing.py"),
    (("launch.train", "--config=configs/quickstart.py"), 2, "workdir"),
    (("launch.train", "--config=configs/pretrain.py:v9", "--workdir=/tmp/x"), 2, "knows no 'v9': choose one of smoke"),
    (("launch.train", "--config=configs/quickstart.py:smok", "--workdir=/tmp/x"), 2, ":smok is unknown"),
    (("launch.train", "--config=configs/emoji.py:smok", "--workdir=/tmp/x"), 2, ":smok is unknown"),
    (("launch.train", "--config=README.md", "--workdir=/tmp/x"), 2, "(README.md, line "),
    (("launch.train", "--config=configs/quickstart.py", "--workdir=/tmp/x", "--profile=9:3"), 1, "--profile=9:3 is not understood"),
    (("launch.sample", "--workdir=/nowhere", "--prompt=x"), 1, "There is no run in /nowhere"),
    (("launch.prepare_data", "--out=/tmp/x", "extra"), 2, "'extra'"),
])
def test_mistakes_end_in_one_sentence(arguments, code, message):
  result = launch(*arguments)
  assert result.returncode == code and message in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.parametrize("module", ["prepare_data", "train", "sample", "describe", "evaluate", "export"])
def test_help(module):
  result = launch(f"launch.{module}", "--help")
  assert "--workdir" in result.stdout or "--config" in result.stdout or "--dataset" in result.stdout
  assert f"python -m launch.{module}" in result.stdout


def test_a_picture_depends_on_its_own_prompt_alone(smoke_run):
  _, weights = sampling_weights(smoke_run)
  prompts = ["red star on white", "a large black K on yellow paper, centered", "blue heart on pink"]
  generator = Generator(smoke_run, Size(64, 96, 31, batch_size=8), num_steps=2, guidance=2.0)
  together = generator(weights, prompts, seed=3)
  assert together.shape == (3, 64, 96, 4) and together.dtype == np.uint8
  other = generator(weights, [prompts[0], prompts[1], "green A"], seed=3)
  assert np.abs(together[:2].astype(int) - other[:2]).max() <= 1
  with pytest.raises(ValueError, match="picture of 64 x 40 px cannot be drawn"):
    Generator(smoke_run, Size(64, 40, 31))
  with pytest.raises(ValueError, match=r"noise has shape \(1, 4, 4, 8\), but 3 picture\(s\) of 64 x 96 px need \(3, 4, 6, 8\)"):
    generator(weights, prompts, noise=np.zeros((1, 4, 4, 8), np.float32))


def test_what_is_not_finite_is_no_picture(smoke_run):
  """It would be black, and a score of it would be that of a bad picture. Of several the others are drawn."""
  _, weights = sampling_weights(smoke_run)
  prompts, noise = ["red star on white", "blue A", "green A"], np.random.default_rng(0).standard_normal((3, 4, 6, 8)).astype(np.float32)
  generator = Generator(smoke_run, Size(64, 96, 31, batch_size=8), num_steps=2, guidance=2.0)
  whole = generator(weights, prompts, noise=noise)
  noise[1, 0, 0, 0] = np.nan
  _, pictures, wrong = generator.draw_each(weights, prompts, noise=noise)
  assert wrong == ["", "the generator gave latents that are not finite", ""]
  np.testing.assert_array_equal(pictures[::2], whole[::2])
  with pytest.raises(FloatingPointError, match="1 of 3 pictures cannot be drawn; that of 'blue A': the generator gave latents that"):
    generator(weights, prompts, noise=noise)
  infinite = {**weights, "vae": jax.tree.map(lambda x: x * np.inf, weights["vae"])}
  assert generator.draw_each(infinite, prompts)[2] == ["the VAE gave pixels that are not finite"] * 3


def test_offloaded_weights_of_a_run_are_those_that_draw(smoke_run):
  name, weights = sampling_weights(smoke_run)
  offloaded, shapes = smoke_run.offloaded_weights(name), smoke_run.abstract_weights(name)
  assert set(offloaded) == set(shapes) == set(weights)
  for network in weights:
    jax.tree.map(np.testing.assert_array_equal, offloaded[network], weights[network])
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y, z: (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding) == (
        z.shape, z.dtype, z.sharding), offloaded[network], weights[network], shapes[network])))


def test_an_edit_sees_its_own_image(smoke_run):
  _, weights = sampling_weights(smoke_run)
  # A fresh modulation of zero hides everything: use weights at which blocks act.
  shake = lambda path, p: 0.2 * jax.random.normal(jax.random.fold_in(jax.random.key(1), len(path)), p.shape) + ("norm_" in path)
  drawn = P.map_with_path(shake, smoke_run.nets.specs()["mmdit"])
  weights = {**weights, "mmdit": jax.device_put(drawn, jax.tree.map(lambda x: x.sharding, weights["mmdit"]))}
  prompts, size = ["make it red", "make it red"], Size(64, 64, 41, ((64, 32),), 8)
  assert size.num_tokens >= 31 + smoke_run.tokenizer.num_image_tokens([(2, 1)])
  generator, rng = Generator(smoke_run, size, num_steps=2), np.random.default_rng(0)
  images, noise = rng.integers(0, 256, (2, 64, 32, 3), np.uint8), np.stack([rng.standard_normal((4, 4, 8)).astype(np.float32)] * 2)
  latents, _ = generator.draw(weights, prompts, images=[images], noise=noise)
  assert np.abs(latents[0] - latents[1]).max() > 1e-2
  swapped, _ = generator.draw(weights, prompts, images=[images[::-1]], noise=noise)
  np.testing.assert_allclose(swapped, latents[::-1], atol=1e-4)
  # Without noise of its own it begins with one that depends on the seed, its number and its image.
  own = sample_noise(jax.random.key(5), np.array([zlib.crc32(image.tobytes(), i) for i, image in enumerate(images)], np.uint32), (4, 4, 8))
  np.testing.assert_array_equal(generator.draw(weights, prompts, 5, [images])[0], generator.draw(weights, prompts, 5, [images], noise=own)[0])


def test_sampling_by_command(smoke_run, tmp_path):
  out = tmp_path / "sheets" / "grid.png"
  result = launch("launch.sample", f"--workdir={smoke_run.workdir}", "--stage=low_resolution", "--prompt=red star on white", "--prompt=blue A",
                  f"--out={out}", "--seed=1", "--num_steps=2", "--guidance=1.5")
  assert result.returncode == 0, result.stderr
  assert "2 pictures of stage low_resolution" in result.stdout
  assert Image.open(out).size[0] > 2 * 48
  result = launch("launch.sample", f"--workdir={smoke_run.workdir}", "--stage=vae", "--prompt=x")
  assert result.returncode == 1 and "no generator to sample from; trained are: low_resolution, high_resolution, sft" in result.stderr


def test_a_run_can_be_loaded_from_its_folder(smoke_run):
  again = load_run(smoke_run.workdir)
  assert plain(again.cfg) == plain(smoke_run.cfg)


def test_report_holds_everything_itself(smoke_run):
  report.write_report(smoke_run)
  text = (smoke_run.workdir / "report.html").read_text(encoding="utf-8")
  for stage in smoke_run.cfg.stages:
    assert stage.name in text
  assert text.count("data:image/png;base64,") >= 8 and "src='http" not in text and 'src="http' not in text
  for word in ("Data", "Config", "samples/s", "time bin", "Edits, each between its source"):
    assert word.lower() in text.lower(), word
