"""LoRA files of the generator, read and written: pairs of small matrices by the names of the published class's linear maps.

  X.lora_A.weight [r, in], X.lora_B.weight [out, r]     what diffusers and PEFT write, X with the prefix `transformer.`
  X.lora_down.weight, X.lora_up.weight, X.alpha         what kohya and ComfyUI write, X with `diffusion_model.`, or `lora_unet_` and _ for each dot

The weight is then W + s B A, with s = alpha / r where the file says alpha, beside the pair or in the metadata `lora_adapter_metadata` of PEFT, and
else 1. Readers differ in where they look for alpha, so files that we write have s in B and say none: every reader takes them alike.
ComfyUI's generator has the gate and the projection of its MLP as one map `img_mlp.gate_up`; a pair of that is read as two, and written as one whose B
is block-diagonal.

Left out, and named when a file has it: DoRA, LoHa, LoKr, biases, and maps of other networks, such as the text encoder.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from qimg2 import adapters, sharding
from qimg2 import params as P
from qimg2.models import mmdit
from qimg2.published.export import check_dtype, renamed_at_the_end, write_file
from qimg2.published.files import Tensor, open_file
from qimg2.published.names import mmdit as names
from qimg2.published.tensors import Entry, one_device, place

PREFIXES = ("transformer.", "model.diffusion_model.", "diffusion_model.", "base_model.model.", "lora_unet_", "lora_transformer_", "lycoris_")
ENDINGS = {f".{name}{ending}": part for part, words in (("a", ("lora_A", "lora_down", "lora.down")), ("b", ("lora_B", "lora_up", "lora.up")))
           for name in words for ending in (".weight", ".default.weight")} | {".alpha": "alpha"}
METADATA = "lora_adapter_metadata"
WEIGHT = ".weight"
FUSED, PARTS = names.FUSED.removesuffix(WEIGHT), tuple(part.removesuffix(WEIGHT) for part in names.PARTS)


@dataclasses.dataclass(frozen=True)
class Pair:
  """The factors of one map: a [r, in], b [out, r], and the scale of their product."""
  a: Tensor
  b: Tensor
  scale: float


@dataclasses.dataclass(frozen=True)
class LoraFile:
  """An open LoRA file of a generator: `pairs` by the published names of maps, without ".weight". No large tensor is read yet."""
  path: pathlib.Path
  cfg: mmdit.Config
  pairs: Mapping[str, Pair]

  def specs(self) -> dict:
    """The declared weights of the adapter: maps of one path have the largest of their ranks, and those of layers without a pair are zero."""
    network, tree = P.flatten(mmdit.specs(self.cfg)), {}
    for path, numbered in self._by_path().items():
      adapters.place_at(tree, path, adapters.low_rank(network[path], max(pair.a.shape[0] for pair in numbered.values())))
    return tree

  def lacking(self) -> list[str]:
    """Names of the maps of which the file has no pair, or one of a lower rank, while `specs` declares one, because other layers have it."""
    declared = P.flatten(self.specs())
    rank = lambda path: declared[f"{path}/b"].shape[names.table(self.cfg)[path].stacked]
    return [module for module, (path, _) in _modules(self.cfg).items()
            if f"{path}/b" in declared and (module not in self.pairs or self.pairs[module].a.shape[0] < rank(path))]

  def load(self, shardings: dict | None = None, scale: float = 1.0) -> dict:
    """The adapter as `specs` declares it, for a product that is scaled by `scale`; None for `shardings` puts it onto the first device."""
    where, network, tree = P.flatten(shardings) if shardings else {}, P.flatten(mmdit.specs(self.cfg)), {}
    table, declared = names.table(self.cfg), P.flatten(self.specs())
    for path, numbered in self._by_path().items():
      shape = network[path].shape[table[path].stacked:]
      both = {name: np.zeros(declared[f"{path}/{name}"].shape, np.float32) for name in ("a", "b")}
      for number, pair in numbered.items():
        layer = (number,) if table[path].stacked else ()
        for name, x in _to_ours(pair, table[path], shape, pair.scale / scale).items():
          rank = x.shape[-1 if name == "a" else 0]
          both[name][layer + ((..., slice(rank)) if name == "a" else (slice(rank),))] = x
      adapters.place_at(tree, path, {name: place(x, where.get(f"{path}/{name}", one_device())) for name, x in both.items()})
    return tree

  def _by_path(self) -> dict[str, dict[int, Pair]]:
    """Path of our weight -> {layer, 0 for a weight that is not stacked: pair}."""
    found: dict[str, dict[int, Pair]] = {}
    for module, (path, number) in _modules(self.cfg).items():
      if module in self.pairs:
        found.setdefault(path, {})[number] = self.pairs[module]
    return found


def open_lora(path: str | pathlib.Path, cfg: mmdit.Config) -> LoraFile:
  """A LoRA file for a generator; names and shapes are all checked.

  Raises:
    ValueError: no or a damaged file, one that is no LoRA, or of another network or size, or with something in it that is not read.
  """
  files = open_file(path)
  maps, found = _maps(cfg), {}
  for name, tensor in files.tensors.items():
    module, part = _parse(name, maps, files.folder)
    if part in found.setdefault(module, {}):
      raise ValueError(f"{path} holds {part} of {module} twice, once as {name}: remove one of them.")
    found[module][part] = tensor
  if not found:
    raise ValueError(f"{path} holds no tensors: it is no LoRA.")
  settings, pairs = _peft_settings(files.metadata, path), {}
  for module, parts in found.items():
    if not {"a", "b"} <= set(parts):
      raise ValueError(f"{path} has only one of the two matrices of {module}: it is incomplete.")
    pairs |= _split(module, Pair(parts["a"], parts["b"], _scale(module, parts, settings)))
  lora = LoraFile(pathlib.Path(path), cfg, pairs)
  _check_shapes(lora)
  return lora


def _modules(cfg: mmdit.Config) -> dict[str, tuple[str, int]]:
  """Published name of each linear map, without ".weight" -> (path of our weight, its layer or 0)."""
  found = {}
  for path, p in P.flatten(mmdit.specs(cfg)).items():
    entry = names.table(cfg)[path]
    for number in range(p.shape[0] if entry.stacked else 1) if p.num_inputs else ():
      found[entry.name.format(number).removesuffix(WEIGHT)] = path, number
  return found


def _maps(cfg: mmdit.Config) -> dict[str, str]:
  """What files may call a map, without a prefix -> its published name, or that of two that are fused."""
  modules = list(_modules(cfg))
  fused = [module.removesuffix(PARTS[0]) + FUSED for module in modules if module.endswith(PARTS[0])]
  return {written: module for module in (*modules, *fused) for written in (module, module.replace(".", "_"))}


def _parse(name: str, maps: Mapping[str, str], path: pathlib.Path) -> tuple[str, str]:
  """(map, "a", "b" or "alpha") of a tensor's name."""
  ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
  written = name.removesuffix(ending) if ending else ""
  prefix = next((prefix for prefix in PREFIXES if written.startswith(prefix)), "")
  if written.removeprefix(prefix) in maps:
    return maps[written.removeprefix(prefix)], ENDINGS[ending]
  for word, what in (("dora_scale", "DoRA"), ("magnitude_vector", "DoRA"), ("hada_", "LoHa"), ("lokr_", "LoKr"), (".bias", "a bias")):
    if word in name:
      raise ValueError(f"{path} holds {name}, which is {what}: only plain LoRA files are read.")
  raise ValueError(f"{path} holds {name}, which is no part of a LoRA of this generator: it is for another model, or changes other networks too.")


def _peft_settings(metadata: Mapping[str, str], path: str | pathlib.Path) -> dict[str, Any]:
  """What PEFT wrote of ranks and alphas, under the names of `LoraConfig`; {} where it wrote nothing."""
  try:
    written = json.loads(metadata.get(METADATA, "{}"))
    settings = {key.removeprefix(PREFIXES[0]): value for key, value in written.items()}
  except (ValueError, AttributeError) as error:
    raise ValueError(f"The metadata {METADATA} of {path} cannot be understood ({error}): fetch the file again.") from error
  if settings.get("use_dora"):
    raise ValueError(f"{path} says that it is DoRA: only plain LoRA files are read.")
  return settings


def _scale(module: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
  rank = parts["a"].shape[0]
  if "alpha" in parts:
    return float(np.reshape(parts["alpha"].read(slice(None)), ())) / rank
  if "lora_alpha" not in settings:
    return 1.0
  own = [alpha for pattern, alpha in (settings.get("alpha_pattern") or {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", module)]
  return float((own or [settings["lora_alpha"]])[0]) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _split(module: str, pair: Pair) -> dict[str, Pair]:
  """A pair of one map, or of fused ones as theirs: these share A, and each has its rows of B."""
  if not module.endswith(FUSED):
    return {module: pair}
  return {module.removesuffix(FUSED) + part: dataclasses.replace(pair, b=pair.b.part(number, len(PARTS))) for number, part in enumerate(PARTS)}


def _check_shapes(lora: LoraFile) -> None:
  network = P.flatten(mmdit.specs(lora.cfg))
  for module, (path, _) in _modules(lora.cfg).items():
    if module in lora.pairs:
      entry, pair = names.table(lora.cfg)[path], lora.pairs[module]
      num_out, num_in = entry.shape(network[path].shape[entry.stacked:])
      found, rank = (tuple(pair.a.shape), tuple(pair.b.shape)), pair.a.shape[0]
      if found != ((rank, num_in), (num_out, rank)):
        raise ValueError(f"{lora.path} has matrices of shapes {found[0]} and {found[1]} for {module}, whose weight is {num_out} x {num_in}: it is "
                         "for another model.")


def _to_ours(pair: Pair, entry: Entry, shape: tuple[int, ...], scale: float) -> dict[str, np.ndarray]:
  """{"a" [in..., r], "b" [r, out...]} of a map whose weight we hold as `shape`."""
  a, b = (np.asarray(x.read(slice(None)), np.float32) for x in (pair.a, pair.b))
  return {"a": a.T.reshape(*shape[:entry.num_inputs], -1), "b": scale * b.T.reshape(-1, *shape[entry.num_inputs:])}


# Writing.


def export_lora(out: str | pathlib.Path, cfg: mmdit.Config, adapter: dict, scale: float, dtype: str = "bfloat16",
                comfyui: bool = False) -> pathlib.Path:
  """Writes an adapter of the generator to the file `out`, and returns its path.

  Args:
    out: a .safetensors file that is not there yet.
    cfg: the generator.
    adapter: its weights, as `adapters.specs`; they may be sharded over the devices of this process.
    scale: of their product; it is written as part of B.
    dtype: of the file, "float32" or "bfloat16".
    comfyui: whether it has the names of ComfyUI's generator, and its fused maps, in place of those of diffusers, which ComfyUI takes since it knows
      this model.

  Raises:
    ValueError: `out` exists or has another ending, or an unknown dtype.
  """
  check_dtype(dtype)
  if pathlib.Path(out).suffix != ".safetensors":
    raise ValueError(f"The file {out} must end in .safetensors.")
  pairs = dict(_published(cfg, sharding.to_host(adapter), scale))
  written = dict(_named(_fused(pairs) if comfyui else pairs, *(("diffusion_model.", "lora_down", "lora_up") if comfyui else
                                                                (PREFIXES[0], "lora_A", "lora_B"))))
  with renamed_at_the_end(out) as part:
    typed = ((name, np.ascontiguousarray(x.astype(jax.numpy.dtype(dtype)))) for name, x in written.items())
    write_file(part, {name: x.shape for name, x in written.items()}, typed, dtype, {"format": "pt"})
  return pathlib.Path(out)


def _published(cfg: mmdit.Config, adapter: dict, scale: float) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
  """(published map, (A [r, in], s B [out, r])) of each map that has a pair."""
  leaves, table = P.flatten(adapter), names.table(cfg)
  for module, (path, number) in _modules(cfg).items():
    if f"{path}/a" in leaves:
      a, b = (np.asarray(leaves[f"{path}/{name}"][number] if table[path].stacked else leaves[f"{path}/{name}"], np.float32) for name in ("a", "b"))
      yield module, (a.reshape(-1, a.shape[-1]).T, scale * b.reshape(b.shape[0], -1).T)


def _fused(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """The pairs with ComfyUI's fused maps: A of both parts one under the other, B block-diagonal. A part without a pair has zeros."""
  found = {}
  for module, pair in pairs.items():
    stem = next((module.removesuffix(part) for part in PARTS if module.endswith(part)), None)
    if stem is None:
      found[module] = pair
    elif stem + FUSED not in found:
      parts = [pairs.get(stem + part, (pair[0][:0], np.zeros((pair[1].shape[0], 0), np.float32))) for part in PARTS]
      ranks, rows = [a.shape[0] for a, _ in parts], pair[1].shape[0]
      b = np.zeros((rows * len(PARTS), sum(ranks)), np.float32)
      for number, (_, one) in enumerate(parts):
        b[number * rows:(number + 1) * rows, sum(ranks[:number]):sum(ranks[:number + 1])] = one
      found[stem + FUSED] = np.concatenate([a for a, _ in parts]), b
  return found


def _named(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], prefix: str, *endings: str) -> Iterator[tuple[str, np.ndarray]]:
  for module, pair in pairs.items():
    yield from ((f"{prefix}{module}.{ending}{WEIGHT}", x) for ending, x in zip(endings, pair))
