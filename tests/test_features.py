"""Features of pictures and the set that they are compared with. Networks are a few bytes of ONNX, written by hand."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import stats

from data_pipelines.transforms import encode_png
from qimg2 import params as P
from qimg2.evaluation.features import OnnxConfig, OnnxFeatures, prepare
from qimg2.evaluation.reference_set import ReferenceSet, make_reference
from qimg2.evaluation.vision_features import VisionFeatures
from qimg2.models.qwen3_vl_vision import VisionConfig, vision_apply, vision_specs
from qimg2.runtime.picture_suites import fidelity_suite


def _field(number, value):
  """A field of a protocol buffer: a whole number, or bytes with their length."""
  if isinstance(value, int):
    return bytes([number << 3]) + _varint(value)
  value = value.encode() if isinstance(value, str) else value
  return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _varint(value):
  return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _value(name, dims, kind=1):
  shape = b"".join(_field(1, _field(1, d) if isinstance(d, int) else _field(2, d)) for d in dims)
  return _field(1, name) + _field(2, _field(1, _field(1, kind) + _field(2, shape)))


def write_network(path, operator="GlobalAveragePool", dims=("n", 3, 8, 8), out=("n", 3, 1, 1), kind=1):
  """A file with a network of one operator."""
  node = _field(1, "x") + _field(2, "y") + _field(4, operator)
  graph = _field(1, node) + _field(2, "g") + _field(11, _value("x", dims, kind)) + _field(12, _value("y", out, kind))
  path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
  return str(path)


@pytest.fixture
def network(tmp_path):
  return OnnxConfig(write_network(tmp_path / "mean.onnx"), 8, 8, mean=(0.0, 0.5, 0.25), std=(1.0, 0.5, 0.25), batch_size=2)


def flat(*level, height=8, width=8):
  return np.full((height, width, 3), level, np.uint8)


def test_onnx_gives_what_the_network_computes_of_prepared_pixels(network):
  pictures = [flat(0, 0, 0), flat(255, 255, 255, height=20, width=9), flat(51, 102, 204)]
  found = OnnxFeatures(network)([None] * 3, pictures)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, [[0, -1, -1], [1, 1, 3], [0.2, -0.2, 2.2]], atol=1e-6)


def test_maps_of_features_are_averaged(network, tmp_path):
  path = write_network(tmp_path / "same.onnx", "Abs", out=("n", 3, 8, 8))
  picture = flat(0, 51, 255)
  picture[:2] = 255
  found = OnnxFeatures(dataclasses.replace(network, path=path, mean=(0.0,) * 3, std=(1.0,) * 3))([None], [picture])
  np.testing.assert_allclose(found, [[0.25, 0.4, 1]], atol=1e-6)


def test_prepare_is_the_picture_itself_at_its_own_size(network):
  picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
  np.testing.assert_allclose(prepare(network, picture)[1], picture[..., 1] / 127.5 - 1, atol=1e-6)
  np.testing.assert_array_equal(prepare(dataclasses.replace(network, layout="nhwc"), picture).transpose(2, 0, 1), prepare(network, picture))


def test_the_identity_is_of_the_file_and_how_pictures_come_to_it(network, tmp_path):
  made = lambda **changes: OnnxFeatures(dataclasses.replace(network, **changes)).identity
  assert made() == made(batch_size=7) != made(mean=(0.0, 0.0, 0.0))
  assert made() != made(path=write_network(tmp_path / "max.onnx", "GlobalMaxPool"))


def test_what_does_not_fit_is_said(network, tmp_path):
  odd = lambda **changes: OnnxFeatures(dataclasses.replace(network, **changes))
  with pytest.raises(ValueError, match="There is no feature network"):
    odd(path=str(tmp_path / "none.onnx"))
  (tmp_path / "text.onnx").write_text("no network")
  with pytest.raises(ValueError, match="cannot be read as an ONNX network"):
    odd(path=str(tmp_path / "text.onnx"))
  with pytest.raises(ValueError, match=r"takes an input of shape \['n', 3, 8, 8\], but the settings .*give \[n, 3, 8, 9\]"):
    odd(width=9)
  with pytest.raises(ValueError, match=r"give \[n, 8, 8, 3\]"):
    odd(layout="nhwc")
  with pytest.raises(ValueError, match="one input of float32"):
    odd(path=write_network(tmp_path / "int.onnx", "Abs", ("n", 3, 8, 8), ("n", 3, 8, 8), kind=6))
  with pytest.raises(ValueError, match="no output 'z': choose one of y"):
    odd(output="z")
  with pytest.raises(ValueError, match="choose one of nchw, nhwc"):
    odd(layout="chw")
  flat_output = write_network(tmp_path / "size.onnx", "ReduceMax", ("n", 3, 8, 8), (1, 1, 1, 1))
  with pytest.raises(ValueError, match=r"gives shape \(1, 1\) for 2 pictures"):
    odd(path=flat_output)([None] * 2, [flat(1, 1, 1)] * 2)


def test_onnxruntime_may_be_missing(network, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
  with pytest.raises(ValueError, match="needs onnxruntime: pip install"):
    OnnxFeatures(network)


# The reference.


def normal(seed, num, mean=0.0):
  return np.random.default_rng(seed).normal(mean, 1, (num, 4)).astype(np.float32)


def test_a_reference_is_kept_and_compared_with(network, tmp_path):
  rng = np.random.default_rng(0)
  pictures = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(35)]
  features = OnnxFeatures(network)
  reference = make_reference((features([None] * len(some), some) for some in (pictures[:32], pictures[32:])), features.identity)
  np.testing.assert_array_equal(reference.features, features([None] * 35, pictures))
  reference.save(tmp_path / "kept.npz")
  kept = ReferenceSet.load(tmp_path / "kept.npz")
  np.testing.assert_array_equal(kept.features, reference.features)
  kept.check_network(features.identity)
  with pytest.raises(ValueError, match="make the reference anew"):
    kept.check_network("another")
  with pytest.raises(ValueError, match="has no picture"):
    make_reference([], "")


def test_figures_do_not_depend_on_the_blocks():
  reference, drawn = ReferenceSet(normal(1, 50), "n"), normal(2, 40, 0.5)
  names = [f"p{row // 2}" for row in range(40)]
  whole = reference.figures([(names, drawn)])
  parts = reference.figures((names[a:b], drawn[a:b]) for a, b in ((0, 1), (1, 30), (30, 40)))
  assert whole == parts
  assert list(whole) == ["num_pictures", "num_reference", "fid", "fid_full_rank", "kid", "kid_deviation", "cmmd", "precision", "recall", "density",
                         "coverage", "diversity", "diversity_low", "diversity_high", "diverse_prompts", "notes"]
  assert whole["notes"].startswith("Precision and recall: 40 pictures stand against 50;")
  assert [whole[name] for name in ("num_pictures", "num_reference", "fid_full_rank", "diverse_prompts")] == [40, 50, 1, 20]
  assert np.isfinite([value for value in whole.values() if not isinstance(value, str)]).all()
  x = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
  each = 1 - (x[::2] * x[1::2]).sum(1)
  half = stats.t.ppf(0.975, 19) * each.std(ddof=1) / 20 ** 0.5
  np.testing.assert_allclose([whole[name] for name in ("diversity", "diversity_low", "diversity_high")],
                             [each.mean(), each.mean() - half, each.mean() + half], rtol=1e-5)


def test_few_pictures_lose_figures_and_say_so(caplog):
  found = ReferenceSet(normal(1, 50), "n").figures([(["a", "b", "c"], normal(2, 3))])
  assert found["fid_full_rank"] == 0 and "FID is far too large" in caplog.text
  assert not {"precision", "diversity"} & set(found)
  for part in ("FID is far too large", "Precision, recall, density and coverage need more than 3", "Diversity: no prompt has two"):
    assert part in found["notes"]
  assert ReferenceSet(normal(1, 50), "n").figures([(["a"], normal(2, 1))]) == {
      "num_pictures": 1, "num_reference": 50, "notes": "Distances between sets need at least two pictures, but 1 has features: no figures."}


def test_what_pictures_look_like_ends_nothing():
  """Vectors of only zeros, and such as no float32 can multiply: their figures are left out, and others are there."""
  drawn, names = normal(2, 40), ["a", "b"] * 20
  drawn[3] = 0
  found = ReferenceSet(normal(1, 50), "n").figures([(names, drawn)])
  assert not {"cmmd", "diversity", "diverse_prompts"} & set(found) and {"fid", "kid", "precision"} < set(found)
  assert "CMMD: the network gave 1 of" in found["notes"] and "Diversity: the network gave 1 of" in found["notes"]
  reference = normal(1, 50)
  reference[7] = 0
  found = ReferenceSet(reference, "n").figures([(names, normal(2, 40))])
  assert "cmmd" not in found and "diversity" in found
  with np.errstate(all="ignore"):
    found = ReferenceSet(normal(1, 50) * np.float32(1e30), "n").figures([(names, normal(2, 40))])
  assert "kid" not in found and "Not finite, and left out: kid" in found["notes"]


def test_files_that_are_no_reference(tmp_path):
  with pytest.raises(ValueError, match="There is no reference file"):
    ReferenceSet.load(tmp_path / "none.npz")
  (tmp_path / "cut.npz").write_bytes(b"PK\3\4 cut")
  with pytest.raises(ValueError, match="no file of reference features"):
    ReferenceSet.load(tmp_path / "cut.npz")
  np.savez(tmp_path / "other.npz", x=np.zeros(3))
  with pytest.raises(ValueError, match="no file of reference features"):
    ReferenceSet.load(tmp_path / "other.npz")
  np.save(tmp_path / "one.npy", np.zeros(3))
  with pytest.raises(ValueError, match="no file of reference features"):
    ReferenceSet.load(tmp_path / "one.npy")


# Our own tower.


def test_the_tower_gives_the_mean_of_its_tokens_however_pictures_are_batched():
  cfg = VisionConfig(width=16, num_layers=1, num_heads=2, mlp_width=16, num_positions=16, out_width=12, deepstack_layers=())
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), vision_specs(cfg), is_leaf=P.is_param)
  features = VisionFeatures(cfg, lambda: params, side_px=64, batch_size=2)
  pictures = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8) for seed in range(3)]
  found = features([None] * 3, pictures)
  assert found.shape == (3, 12) and found.dtype == np.float32
  tokens = jax.jit(vision_apply, static_argnums=0)(cfg, params, np.stack(pictures))[0]
  np.testing.assert_allclose(found, np.asarray(tokens).mean(axis=1), atol=1e-5)
  np.testing.assert_allclose(features([None], pictures[2:]), found[2:], atol=1e-5)
  with pytest.raises(ValueError, match="positive multiple of 32"):
    VisionFeatures(cfg, lambda: params, side_px=50)


# The suite.


def test_the_suite_reads_captions_and_keeps_the_reference(network, tmp_path):
  folder = tmp_path / "reference"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for number in range(5):
    (folder / f"{number}.png").write_bytes(encode_png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)))
    (folder / f"{number}.txt").write_text(f"picture {number}\n")
  settings = dict(network=network.path, input_px=8, mean="0+0.5+0.25", std="1+0.5+0.25")
  suite = fidelity_suite(str(folder), keep=str(tmp_path / "kept.npz"), side_px=64, **settings)
  assert sorted((task.prompt, task.name, task.size) for task in suite.tasks(0, 7)) == [(f"picture {i}", f"00000{i}", (64, 64)) for i in range(5)]
  assert suite.tasks(3, 7) == suite.tasks(5, 7)[:3] == suite.tasks(0, 7)[:3] and suite.tasks(0, 7) != suite.tasks(0, 8)
  suite.features([None], [np.zeros((8, 8, 3), np.uint8)])
  assert not (tmp_path / "kept.npz").exists()  # pictures need no reference, the figures of the set do
  suite.reference.take(suite.reference.block(0))
  suite.of_set([])
  (tmp_path / "prompts.txt").write_text("o\u2028ne\n\ntwo\r\n", encoding="utf-8-sig", newline="")
  again = fidelity_suite(str(tmp_path / "kept.npz"), prompts=str(tmp_path / "prompts.txt"), **settings)
  assert {task.prompt for task in again.tasks(0, 7)} == {"o\u2028ne", "two"}
  pictures = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(6)]
  names = ["a", "a", "b", "b", "c", "c"]
  figures = [one.of_set([(names, one.features([None] * 6, pictures))]) for one in (suite, again)]
  assert figures[0] == figures[1] and figures[0]["diverse_prompts"] == 3 and figures[0]["fid_full_rank"] == 1
  with pytest.raises(ValueError, match="3 prompts are asked for, but .*prompts.txt has 2"):
    again.tasks(3, 7)
  with pytest.raises(ValueError, match="make the reference anew"):
    fidelity_suite(str(tmp_path / "kept.npz"), prompts=str(tmp_path / "prompts.txt"), **settings | {"mean": "0"})
  with pytest.raises(ValueError, match="is no folder with captions"):
    fidelity_suite(str(tmp_path / "kept.npz"), **settings)
  with pytest.raises(ValueError, match="give one number, or three"):
    fidelity_suite(str(folder), **settings | {"std": "1+2"})
  (folder / "4.png").write_bytes((folder / "3.png").read_bytes() + b" ")
  assert fidelity_suite(str(folder), **settings).reference.name != suite.reference.name  # blocks of other pictures are not taken
  (folder / "3.txt").unlink()
  with pytest.raises(ValueError, match="3.png of .* has no caption 3.txt"):
    fidelity_suite(str(folder), **settings)
