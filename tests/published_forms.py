"""Published folders that a test changes, and what is read from them."""

import json

import jax
import numpy as np
import safetensors.torch

from qimg2 import networks
from qimg2.published.folder import load_weights, open_folder


def change_tensors(file, change):
  """Rewrites a safetensors file with what `change` made of its tensors."""
  found = dict(safetensors.torch.load_file(file))
  change(found)
  safetensors.torch.save_file(found, file)


def change_json(file, remove=(), **values):
  """Rewrites a JSON file with other values, and without some."""
  content = json.loads(file.read_text()) | values
  file.write_text(json.dumps({name: x for name, x in content.items() if name not in remove}))


def read_network(path, network="qwen3_vl", **settings):
  """The weights of a network of a folder, opened with the settings."""
  opened = open_folder(path, **settings)
  return load_weights(opened, network, networks.Networks(opened.model, opened.encoder, opened.vae, 14).specs()[network])


def assert_trees_equal(found, expected):
  """Both hold the same numbers."""
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
