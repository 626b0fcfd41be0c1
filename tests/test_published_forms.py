"""Published folders as others write them: of the hub, of older and newer versions, with what they leave out and leave over."""

import json
import shutil

import jax
import numpy as np
import pytest
import reference
import safetensors.numpy
import safetensors.torch
import tokenizers
import torch
from published_forms import assert_trees_equal, change_json, change_tensors, read_network

from data_pipelines.tokenizer import PromptTokenizer
from qimg2 import flow
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.models.qwen3_vl_vision import VisionConfig
from qimg2.published import tensors
from qimg2.published.folder import check_sampling, open_folder
from qimg2.published.names import mmdit as mmdit_names
from qimg2.published.names import qwen3_vl as qwen3_vl_names
from qimg2.published.names import vae as vae_names
from qimg2.published.quantised import FOREIGN
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.sampling import pretrained_defaults

HEAD = "lm_head.weight"
ENCODER = "text_encoder/model.safetensors"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TURBO_SIGMAS = (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568)


@pytest.fixture(scope="module")
def folder(tiny_folder):
  return tiny_folder


@pytest.fixture(scope="module")
def whole(folder):
  """The weights of `folder`."""
  return Pretrained(folder, "float32").load()


@pytest.fixture
def copied(folder, tmp_path):
  """A copy that a test may change."""
  return shutil.copytree(folder, tmp_path / "copied")


# Folders of the hub.


def shapes_of(model, names, cfg):
  return tensors.published_shapes(model.specs(cfg), names.table(cfg))


def index_bytes(shapes, stem, num_files, total):
  files = {name: f"{stem}-00001-of-{num_files:05d}.safetensors" for name in shapes}
  return len(json.dumps({"metadata": total, "weight_map": files}, indent=2, sort_keys=True) + "\n")


def test_names_are_those_of_the_released_files():
  """Their number, and to the byte the size of the released index files."""
  model, encoder = shapes_of(mmdit, mmdit_names, mmdit.Config()), shapes_of(qwen3_vl, qwen3_vl_names, qwen3_vl.Config(vision=VisionConfig()))
  assert (len(model), len(encoder), len(shapes_of(vae, vae_names, vae.Config()))) == (297, 750, 238)
  assert not [name for name in (*model, *encoder) for part in FOREIGN if part in name]
  numbers = [sum(int(np.prod(shape)) for shape in shapes.values()) for shapes in (model, encoder)]
  assert numbers[0] == 7_115_124_736 and HEAD in encoder
  assert index_bytes(model, "diffusion_pytorch_model", 2, {"total_size": 2 * numbers[0]}) == 30_283
  assert index_bytes(encoder, "model", 4, {"total_size": 2 * numbers[1], "total_parameters": numbers[1]}) == 67_795


def split(file, num_files, pattern="{stem}-{number:05d}-of-{num:05d}.safetensors", index="{stem}.safetensors.index.json"):
  """Replaces a file by several and their index."""
  found, stem = safetensors.torch.load_file(file), file.stem
  shards = [dict(list(found.items())[i::num_files]) for i in range(num_files)]
  names = [pattern.format(stem=stem, number=i + 1, num=num_files) for i in range(num_files)]
  for name, shard in zip(names, shards):
    safetensors.torch.save_file(shard, file.with_name(name))
  listed = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
  file.with_name(index.format(stem=stem)).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
  file.unlink()


def bfloat16(x):
  return {name: tensor.bfloat16() for name, tensor in x.items()}


def round_file(file):
  change_tensors(file, lambda x: x.update(bfloat16(x)))


def as_released(path):
  """Makes a folder what that of Qwen/Qwen-Image-2.1 is."""
  for file, num in ((TRANSFORMER, 2), (ENCODER, 4)):
    round_file(path / file)
    split(path / file, num)
  change_json(path / "model_index.json", ["sample_sigmas"], _diffusers_version="0.37.0.dev0")
  config = json.loads((path / "text_encoder/config.json").read_text())
  text, vision = config["text_config"], config["vision_config"]
  rope = text.pop("rope_parameters")
  text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "dtype": "bfloat16"}
  vision.pop("rope_parameters", None)
  change_json(path / "text_encoder/config.json", text_config=text, vision_config=vision | {"model_type": "qwen3_vl"},
              transformers_version="4.57.0.dev0", dtype="bfloat16")
  nulls = dict.fromkeys(("crop_size", "data_format", "device", "disable_grouping", "do_center_crop", "do_pad", "input_data_format", "max_pixels",
                         "min_pixels", "pad_size", "return_tensors"))
  known = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
           "image_processor_type": "Qwen2VLImageProcessorFast", "merge_size": 2, "patch_size": 16, "temporal_patch_size": 2, "resample": 3,
           "rescale_factor": 0.00392156862745098, "size": {"longest_edge": 16777216, "shortest_edge": 65536}}
  (path / "processor/processor_config.json").unlink()
  (path / "processor/preprocessor_config.json").write_text(json.dumps(nulls | known))


def as_links(path):
  """Makes a folder what a snapshot in the hub's cache is: links to files with other names."""
  blobs = path.with_name("blobs")
  blobs.mkdir()
  for number, file in enumerate(file for file in sorted(path.rglob("*")) if file.is_file()):
    file.rename(blobs / str(number))
    file.symlink_to(blobs / str(number))


def test_the_released_folder_is_taken_as_it_is(copied, folder, whole):
  as_released(copied)
  as_links(copied)
  assert {len(list((copied / name).glob("*.safetensors"))) for name in ("transformer", "text_encoder", "vae")} == {2, 4, 1}
  opened, expected = Pretrained(copied, "float32"), open_folder(folder)
  assert (opened.folder.model, opened.folder.encoder, opened.folder.vae) == (expected.model, expected.encoder, expected.vae)
  assert (opened.folder.image_pixels, opened.sample_sigmas, opened.schedule) == ((65_536, 16_777_216), None, flow.Schedule())
  rounded = jax.tree.map(lambda x: np.asarray(x).astype(jax.numpy.bfloat16).astype(np.float32), {name: whole[name] for name in ("mmdit", "qwen3_vl")})
  assert_trees_equal(opened.load(), rounded | {"vae": whole["vae"]})


def test_the_turbo_folder_is_taken_as_it_is(copied, whole):
  change_json(copied / "model_index.json", sample_sigmas=list(TURBO_SIGMAS))
  change_json(copied / "scheduler/scheduler_config.json", use_dynamic_shifting=False, shift=1.0, shift_terminal=None)
  round_file(copied / "vae/diffusion_pytorch_model.safetensors")
  opened = Pretrained(copied, "float32")
  assert pretrained_defaults(opened)["sigmas"] == TURBO_SIGMAS
  np.testing.assert_allclose(opened.schedule.sigmas(8, 4096, TURBO_SIGMAS), (*TURBO_SIGMAS, 0.0), rtol=1e-6)
  assert_trees_equal(opened.load()["vae"]["decoder"],
                     jax.tree.map(lambda x: np.asarray(x).astype(jax.numpy.bfloat16).astype(np.float32), whole["vae"]["decoder"]))


# Names.


def test_the_head_is_read_where_it_is_asked_for(copied, whole):
  """An encoder without one draws; one that is tied to the embedding may have one left over, as transformers allows."""
  assert "head" in read_network(copied) and "head" not in whole["qwen3_vl"] and "embed" in whole["qwen3_vl"]
  change_tensors(copied / ENCODER, lambda x: x.pop(HEAD))
  assert_trees_equal(Pretrained(copied, "float32").load()["qwen3_vl"], whole["qwen3_vl"])
  with pytest.raises(ValueError, match=HEAD):
    read_network(copied)
  change_json(copied / "text_encoder/config.json", tie_word_embeddings=True)
  change_tensors(copied / ENCODER, lambda x: x.update({HEAD: torch.zeros(3, 3)}))
  assert_trees_equal(read_network(copied), whole["qwen3_vl"])


@pytest.mark.parametrize("new, old", [
    ({"model.language_model.": "language_model.", "model.visual.": "visual."}, "of Qwen3VLModel, without a head"),
    ({"model.language_model.": "model.", "model.visual.": "visual."}, "of transformers 4"),
    ({"model.language_model.": "language_model.model.", "model.visual.": "visual.", "lm_head.": "language_model.lm_head."}, "of its nested classes"),
])
def test_encoders_with_older_names(copied, folder, new, old):
  def rename(x):
    if "without" in old:
      del x[HEAD]
    for name in list(x):
      older = next((older for newer, older in new.items() if name.startswith(newer)), "")
      newer = next((newer for newer in new if name.startswith(newer)), "")
      x[older + name.removeprefix(newer)] = x.pop(name)
    x["visual.rotary_pos_emb.inv_freq"] = torch.ones(4)  # a buffer that old versions wrote
  change_tensors(copied / ENCODER, rename)
  if "without" in old:
    change_json(copied / "model_index.json", text_encoder=["transformers", "Qwen3VLModel"])
  assert "model.language_model.norm.weight" not in safetensors.numpy.load_file(copied / ENCODER)
  assert_trees_equal(Pretrained(copied, "float32").load()["qwen3_vl"], {name: x for name, x in read_network(folder).items() if name != "head"})
  change_tensors(copied / ENCODER, lambda x: x.update({"model.visual.pos_embed.weight": torch.ones(64, 48)}))
  with pytest.raises(ValueError, match="holds the tensor model.visual.pos_embed.weight twice"):
    read_network(copied)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variants_are_read_where_nothing_else_is(copied, whole, variant):
  for file in (TRANSFORMER, "vae/diffusion_pytorch_model.safetensors"):
    (copied / file).rename(copied / file.replace(".safetensors", f".{variant}.safetensors"))
  split(copied / ENCODER, 2, f"{{stem}}.{variant}-{{number:05d}}-of-{{num:05d}}.safetensors", f"{{stem}}.safetensors.index.{variant}.json")
  assert_trees_equal(Pretrained(copied, "float32").load(), whole)
  other = copied / TRANSFORMER.replace(".safetensors", ".other.safetensors")
  other.write_bytes(b"no tensors")
  with pytest.raises(ValueError, match=rf"in the variants {variant}, other only: keep one of them"):
    Pretrained(copied, "float32").load()
  shutil.copy(copied / TRANSFORMER.replace(".safetensors", f".{variant}.safetensors"), copied / TRANSFORMER)
  assert_trees_equal(Pretrained(copied, "float32").load()["mmdit"], whole["mmdit"])  # the plain name counts


def test_an_index_may_list_the_one_file_beside_it(copied, whole):
  names = safetensors.numpy.load_file(copied / ENCODER)
  (copied / f"{ENCODER}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
  assert_trees_equal(Pretrained(copied, "float32").load()["qwen3_vl"], whole["qwen3_vl"])


def shard_without_index(path):
  split(path / TRANSFORMER, 2)
  (path / f"{TRANSFORMER}.index.json").unlink()


def test_shards_without_their_index_are_named(copied):
  shard_without_index(copied)
  with pytest.raises(ValueError, match="has diffusion_pytorch_model-00001-of-00002.safetensors, but neither .* fetch the file that is missing"):
    Pretrained(copied, "float32").load()


# Tokenizers.


def as_pair(processor, added):
  """Replaces a tokenizer.json by one whose special tokens come after its vocabulary, as Qwen's, and that by vocab.json and merges.txt; returns it."""
  content = json.loads((processor / "tokenizer.json").read_text())
  special = [token["content"] for token in content["added_tokens"]]
  words = sorted((word for word in content["model"]["vocab"] if word not in special), key=content["model"]["vocab"].get)
  content["model"]["vocab"] = {word: number for number, word in enumerate(words)}
  for number, token in enumerate(content["added_tokens"]):
    token["id"] = len(words) + number
  (processor / "tokenizer.json").unlink()
  (processor / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
  pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
  (processor / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
  ids = {token["content"]: token["id"] for token in content["added_tokens"]}
  if added == "added_tokens.json":
    (processor / added).write_text(json.dumps(ids))
    (processor / "tokenizer_config.json").unlink(missing_ok=True)
  else:
    (processor / added).write_text(json.dumps({"added_tokens_decoder": {str(number): {"content": text} for text, number in ids.items()}}))
  return PromptTokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


@pytest.mark.parametrize("added", ["added_tokens.json", "tokenizer_config.json"])
def test_vocabulary_and_merges_stand_for_a_tokenizer_json(copied, added):
  expected = as_pair(copied / "processor", added)
  found = PromptTokenizer.load(open_folder(copied).processor)
  for prompt in ("", "a red poster", 'the word "make it blue",\n  in\ttwo  lines', "蓝色的海报", "🦊 e\u0301 it's 1234 <|im_end|>"):
    assert found.encode(prompt, [(2, 3)]) == expected.encode(prompt, [(2, 3)])
  assert (found.vocab_size, found.image_token_id) == (expected.vocab_size, expected.image_token_id)
  assert PromptTokenizer.from_bytes(found.to_bytes()).fingerprint == found.fingerprint  # as a run keeps it
  last = expected.pad_id
  change_json(copied / "processor/vocab.json", one_more=last)
  with pytest.raises(ValueError, match=rf"the added token <\|endoftext\|> the id {last}, but after vocab.json it would be {last + 1}"):
    PromptTokenizer.load(copied / "processor")


# Configs.


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
