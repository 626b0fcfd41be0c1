"""A published folder, ready to draw: its networks and tokenizer, and its weights on a mesh."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from data_pipelines.tokenizer import PromptTokenizer
from qimg2 import networks, sharding
from qimg2 import params as P
from qimg2.published.folder import load_vision, load_weights, open_folder, stored_dtypes
from qimg2.runtime.offload import Offloaded

COMPUTE = {"bfloat16": "bfloat16"}  # type of files -> what computes by default; float16 has too small a range for these networks


class Pretrained:
  """Networks, schedule and tokenizer of a folder in the published layout; see `qimg2.runtime.generator.Source`."""

  def __init__(self, folder: str | pathlib.Path, dtype: str | None = None, rules: str = "fsdp_tensor",
               devices: Sequence[Any] | None = None, transformer: str | pathlib.Path = ""):
    """Args:
      folder: with model_index.json, transformer/, vae/, text_encoder/, processor/ and scheduler/.
      dtype: compute type of all networks, in which the weights are also kept. None: weights are kept in the type of their files, and a network
        computes in bfloat16 where that is bfloat16, else in float32.
      rules: sharding rules.
      devices: over which weights and rows are spread; all of them when None.
      transformer: file with the generator's weights in place of the folder's, see `qimg2.published.folder.open_folder`.

    Raises:
      ValueError: the folder is no such pipeline, or has no weights whose type could be taken, or the file none of such a generator.
    """
    self.folder = open_folder(folder, dtype=dtype or "float32", transformer=transformer)
    stored = stored_dtypes(self.folder) if dtype is None else {}
    if stored:
      model, encoder, vae = (dataclasses.replace(config, dtype=COMPUTE.get(stored[name], "float32")) for name, config in (
          ("mmdit", self.folder.model), ("qwen3_vl", self.folder.encoder), ("vae", self.folder.vae)))
      self.folder = dataclasses.replace(self.folder, model=model, encoder=encoder, vae=vae)
    self.mesh, self.rules = sharding.make_mesh({"fsdp": -1}, devices), sharding.RULES[rules]
    self.schedule, self.sample_sigmas = self.folder.schedule, self.folder.sample_sigmas
    self.tokenizer = PromptTokenizer.load(self.folder.processor)
    self.nets = networks.Networks(self.folder.model, self.folder.encoder, self.folder.vae, self.tokenizer.num_system_tokens,
                                      sharding.make_shard(self.mesh, self.rules))
    if self.tokenizer.image_token_id != self.folder.encoder.image_token_id:
      raise ValueError(f"The tokenizer in {folder} gives image slots the id {self.tokenizer.image_token_id}, its text encoder "
                       f"{self.folder.encoder.image_token_id}: they are of different models.")
    self._kept = {name: narrower(stored.get(name), compute) for name, compute in self.nets.compute_dtypes().items()}

  def load(self) -> dict[str, dict]:
    """{network: weights}, read tensor by tensor onto the mesh; without the encoder's head, which nothing that draws reads."""
    return {network: self._load(network) for network in self.nets.specs()}

  def load_vision(self) -> dict:
    """The weights of the encoder's vision tower alone: of a large encoder a small part is read."""
    specs = self._specs("qwen3_vl")["vision"]
    return load_vision(self.folder, specs, sharding.param_shardings(specs, self.mesh, self.rules))

  def offloaded(self) -> Offloaded:
    """The weights of `load`, each network read onto the mesh whenever it is needed. The system keeps the files in memory while it has room."""
    return Offloaded({network: lambda network=network: self._load(network) for network in self.nets.specs()})

  def abstract(self) -> dict[str, dict]:
    """{network: tree of ShapeDtypeStruct} of what `load` would give. No weight is read."""
    found = {}
    for network in self.nets.specs():
      specs = self._specs(network)
      found[network] = P.abstract(specs, sharding.param_shardings(specs, self.mesh, self.rules))
    return found

  def _specs(self, network: str) -> dict:
    declared = self.nets.specs()[network]
    return P.with_dtype({name: tree for name, tree in declared.items() if (network, name) != ("qwen3_vl", "head")}, self._kept[network])

  def _load(self, network: str) -> dict:
    specs = self._specs(network)
    return load_weights(self.folder, network, specs, sharding.param_shardings(specs, self.mesh, self.rules))


def narrower(stored: str | None, compute: str) -> str:
  """The type that weights are kept in: that of most numbers in the files, or that of the computation, to which they would be rounded."""
  return stored if stored and jnp.dtype(stored).itemsize < jnp.dtype(compute).itemsize else compute
