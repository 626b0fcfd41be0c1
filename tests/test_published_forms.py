"""Published folders as others write them: what is left out, left over or written by an older or newer version."""

import json
import shutil

import numpy as np
import pytest
import reference
import safetensors.numpy

from qimg2 import flow, networks
from qimg2.published.folder import check_sampling, load_weights, open_folder
from qimg2.runtime.pretrained import Pretrained

HEAD = "lm_head.weight"
ENCODER = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("forms") / "tiny"
  reference.tiny_pipeline(0).save_pretrained(path)
  return path


def change_encoder(path, change):
  tensors = dict(safetensors.numpy.load_file(path / ENCODER))
  change(tensors)
  safetensors.numpy.save_file(tensors, path / ENCODER)


def read_encoder(path):
  opened = open_folder(path)
  specs = networks.Networks(opened.model, opened.encoder, opened.vae, 14).specs()["qwen3_vl"]
  return load_weights(opened, "qwen3_vl", specs)


def test_the_head_is_read_where_it_is_asked_for(folder, tmp_path):
  """An encoder without one draws; one that is tied to the embedding may have one left over, as transformers allows."""
  whole = Pretrained(folder).load()["qwen3_vl"]
  assert "head" in read_encoder(folder) and "head" not in whole and "embed" in whole
  path = shutil.copytree(folder, tmp_path / "headless")
  change_encoder(path, lambda x: x.pop(HEAD))
  np.testing.assert_array_equal(Pretrained(path).load()["qwen3_vl"]["embed"], whole["embed"])
  with pytest.raises(ValueError, match=HEAD):
    read_encoder(path)
  config = json.loads((path / "text_encoder/config.json").read_text())
  (path / "text_encoder/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
  change_encoder(path, lambda x: x.update({HEAD: np.zeros((3, 3), np.float32)}))
  np.testing.assert_array_equal(read_encoder(path)["embed"], whole["embed"])


@pytest.mark.parametrize("newer, bounds", [
    ({"image_processor": {"size": {"shortest_edge": 100, "longest_edge": 900}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}}, (100, 900)),
    ({"processor_class": "Qwen3VLProcessor"}, (7, 70)),  # of transformers 4: it says nothing of images
])
def test_of_two_processor_files_the_newer_counts(folder, tmp_path, newer, bounds):
  path = shutil.copytree(folder, tmp_path / "both")
  nulls = dict.fromkeys(("crop_size", "do_center_crop", "min_pixels", "max_pixels", "resample"))
  older = {**nulls, "size": {"shortest_edge": 7, "longest_edge": 70}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
  (path / "processor/preprocessor_config.json").write_text(json.dumps(older))
  (path / "processor/processor_config.json").write_text(json.dumps(newer))
  assert open_folder(path).image_pixels == bounds


def test_a_name_on_the_hub_is_no_folder():
  with pytest.raises(ValueError, match="fetched first: hf download Qwen/Qwen-Image-2.1 --local-dir=DIR"):
    open_folder("Qwen/Qwen-Image-2.1")
  with pytest.raises(ValueError, match="has no model_index.json.$"):
    open_folder("/nowhere/at/all")


def test_a_few_step_folder_names_the_keys_to_set(tmp_path):
  turbo = reference.tiny_pipeline(3, use_dynamic_shifting=False, shift=2.0, shift_terminal=None)
  turbo.register_to_config(sample_sigmas=[1.0, 0.5])
  turbo.save_pretrained(tmp_path / "turbo")
  opened = open_folder(tmp_path / "turbo")
  with pytest.raises(ValueError) as caught:
    check_sampling(opened, flow.Schedule(), ())
  assert str(caught.value).endswith("set config.schedule.shift='static', config.schedule.static_shift=2.0, config.schedule.terminal=None, "
                                    "config.sampling.sigmas=(1.0, 0.5).")
  check_sampling(opened, flow.Schedule(shift="static", static_shift=2.0, terminal=None, base_shift=0.7), (1.0, 0.5))
