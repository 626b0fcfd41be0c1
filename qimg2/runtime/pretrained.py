"""A published folder, ready to draw: its networks and tokenizer, and its weights on a mesh."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from data_pipelines.tokenizer import PromptTokenizer
from qimg2 import networks, sharding
from qimg2 import params as P
from qimg2.published.folder import load_weights, open_folder


class Pretrained:
  """Networks, schedule and tokenizer of a folder in the published layout; see `qimg2.runtime.generator.Source`."""

  def __init__(self, folder: str | pathlib.Path, dtype: str = "float32", rules: str = "fsdp_tensor",
               devices: Sequence[Any] | None = None, transformer: str | pathlib.Path = ""):
    """Args:
      folder: with model_index.json, transformer/, vae/, text_encoder/, processor/ and scheduler/.
      dtype: compute type, in which the weights are also kept.
      rules: sharding rules.
      devices: over which weights and rows are spread; all of them when None.
      transformer: file with the generator's weights in place of the folder's, see `qimg2.published.folder.open_folder`.

    Raises:
      ValueError: the folder is no such pipeline, or the file none of such a generator.
    """
    self.folder = open_folder(folder, dtype=dtype, transformer=transformer)
    self.mesh, self.rules = sharding.make_mesh({"fsdp": -1}, devices), sharding.RULES[rules]
    self.schedule, self.sample_sigmas = self.folder.schedule, self.folder.sample_sigmas
    self.tokenizer = PromptTokenizer.load(self.folder.processor)
    self.nets = networks.Networks(self.folder.model, self.folder.encoder, self.folder.vae, self.tokenizer.num_system_tokens,
                                      sharding.make_shard(self.mesh, self.rules))
    self._dtype = jnp.dtype(dtype)
    if self.tokenizer.image_token_id != self.folder.encoder.image_token_id:
      raise ValueError(f"The tokenizer in {folder} gives image slots the id {self.tokenizer.image_token_id}, its text encoder "
                       f"{self.folder.encoder.image_token_id}: they are of different models.")

  def load(self) -> dict[str, dict]:
    """{network: weights}, read tensor by tensor onto the mesh; without the encoder's head, which nothing that draws reads."""
    weights = {}
    for network, declared in self.nets.specs().items():
      specs = P.with_dtype({name: tree for name, tree in declared.items() if (network, name) != ("qwen3_vl", "head")}, self._dtype)
      weights[network] = load_weights(self.folder, network, specs, sharding.param_shardings(specs, self.mesh, self.rules))
    return weights
