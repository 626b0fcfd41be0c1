"""The evaluation suite of sets of pictures: how far they are from a reference set, and how different the pictures of one prompt are."""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.transforms import decode_image
from qimg2.evaluation import Reference, Suite, Task
from qimg2.evaluation.features import Features, OnnxConfig, OnnxFeatures
from qimg2.evaluation.prompt_files import numbered_lines, read_text
from qimg2.evaluation.reference_set import ReferenceSet, make_reference
from qimg2.evaluation.vision_features import VisionFeatures
from qimg2.networks import fingerprint
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.reconstruction import folder_pictures

BLOCK = 32  # reference pictures that a process has in memory at a time
_TOO_FEW = "The reference {} has one picture: distances between sets need at least two."


def fidelity_suite(reference: str, network: str, prompts: str = "", keep: str = "", side_px: int = 1024, input_px: int = 299, mean: str = "0.5",
                   std: str = "0.5", layout: str = "nchw", output: str = "", batch_size: int = 32) -> Suite:
  """FID, KID, CMMD, precision, recall, density, coverage and diversity of pictures, see `qimg2.evaluation.fidelity`.

  A picture has no score of its own. Diversity needs several seeds.

  Args:
    reference: folder of pictures, or the .npz file that `keep` wrote. Features of a folder are `Suite.reference`; where nothing computes it in parts,
      `of_set` does.
    network: an .onnx file; or a published folder, whose vision tower is taken.
    prompts: text file of a prompt a line; "" for the captions beside the pictures of the folder, NAME.txt beside NAME.png.
    keep: .npz file to write the reference's features into, "" for none.
    side_px: side of the pictures that are drawn.
    input_px: side of the network's input; the vision tower takes a multiple of 32.
    mean, std: of pixels in 0..1, one number or three with + or a comma between; of an ONNX network.
    layout, output: "nchw" or "nhwc", and the name of the output that is taken, "" for the first; of an ONNX network.
    batch_size: pictures that the network sees at a time; for the vision tower rounded up to a multiple of this process's devices.

  Raises:
    ValueError: files or settings that do not fit, or fewer than two pictures in the reference. At the first picture also one of another network.
  """
  texts = _read_prompts(prompts) if prompts else _captions(reference)
  features, identity, release = _features(network, input_px, mean, std, layout, output, batch_size)
  kept = None if pathlib.Path(reference).is_dir() else ReferenceSet.load(reference)
  taken: list[np.ndarray] = []
  parts = _parts(reference, features, taken.append) if kept is None else None
  if kept is not None and len(kept.features) < 2:
    raise ValueError(_TOO_FEW.format(reference))

  @functools.cache  # not before it is needed: what is finished needs no network
  def found() -> ReferenceSet:
    made = kept or make_reference(taken or map(parts.block, range(parts.num_blocks)), identity())
    made.check_network(identity())
    if keep:
      made.save(keep)
    return made

  def measure(some: Sequence[Task], pictures: Sequence[np.ndarray]) -> np.ndarray:
    if kept is not None:
      found()
    return features(some, pictures)

  def of_set(blocks: Iterable[tuple[Sequence[str], np.ndarray]]) -> Mapping[str, Any]:
    return found().figures(blocks)

  def tasks(num: int, seed: int) -> list[Task]:
    if num > len(texts):
      raise ValueError(f"{num} prompts are asked for, but {prompts or reference} has {len(texts)}: ask for fewer, or give more.")
    order = np.random.default_rng(seed).permutation(len(texts))[:num or None]
    return [Task(texts[i], (side_px, side_px), name=f"{i:06d}") for i in order]

  if kept is not None and isinstance(features, OnnxFeatures):  # both are at hand
    found()
  return Suite(tasks, score=_no_scores, features=measure, of_set=of_set, release=release, reference=parts)


def _no_scores(task: Task, picture: np.ndarray) -> dict[str, float]:
  """A picture has no score of its own."""
  del task, picture
  return {}


def _features(network: str, input_px: int, mean: str, std: str, layout: str, output: str,
              batch_size: int) -> tuple[Features, Callable[[], str], Callable[[], None]]:
  """(features, what names them, what gives back device memory). Each process has a vision tower of its own, on its own devices."""
  if not pathlib.Path(network).is_dir():
    made = OnnxFeatures(OnnxConfig(network, input_px, input_px, _numbers(mean, "mean"), _numbers(std, "std"), layout, output, batch_size))
    return made, lambda: made.identity, lambda: None
  pretrained = Pretrained(network, devices=jax.local_devices())
  vision = pretrained.nets.encoder.vision
  if vision is None:
    raise ValueError(f"The encoder of {network} has no vision tower: give an .onnx file, or another folder.")
  weights = functools.cache(pretrained.load_vision)
  rows = pretrained.mesh.shape["data"] * pretrained.mesh.shape["fsdp"]
  tower = VisionFeatures(vision, weights, input_px, pretrained.nets.encoder.dtype, -(-batch_size // rows) * rows, pretrained.nets.shard)
  return tower, lambda: f"qwen3_vl vision {fingerprint(weights())} {input_px} px", weights.cache_clear


def _numbers(text: str, name: str) -> tuple[float, float, float]:
  parts = str(text).replace("+", ",").split(",")
  try:
    found = tuple(float(part) for part in parts)
  except ValueError as error:
    raise ValueError(f"The {name} of a feature network is {text!r}: give one number, or three with + between.") from error
  if len(found) not in (1, 3):
    raise ValueError(f"The {name} of a feature network is {text!r}: give one number, or three with + between.")
  return found if len(found) == 3 else found * 3


def _parts(folder: str, features: Features, take: Callable[[np.ndarray], None]) -> Reference:
  """The pictures of a folder in blocks. Their names and sizes tell a folder from one that was changed meanwhile."""
  found = list(folder_pictures(folder))
  if len(found) < 2:
    raise ValueError(_TOO_FEW.format(folder))
  digest = hashlib.sha256(repr([(one.name, (pathlib.Path(folder) / one.name).stat().st_size) for one in found]).encode())

  def block(number: int) -> np.ndarray:
    some = [decode_image(one.read(), one.name) for one in found[number * BLOCK:(number + 1) * BLOCK]]
    return features([None] * len(some), some)
  return Reference(digest.hexdigest()[:16], -(-len(found) // BLOCK), block, take)


def _read_prompts(path: str) -> list[str]:
  found = [line for _, line in numbered_lines(read_text(path, "a text file of a prompt a line"))]
  if not found:
    raise ValueError(f"The file {path} has no prompt: write one a line.")
  return found


def _captions(folder: str) -> list[str]:
  """The texts beside the pictures of a folder."""
  if not pathlib.Path(folder).is_dir():
    raise ValueError(f"The reference {folder} is no folder with captions: give prompts, a text file of a prompt a line.")
  found = []
  for one in folder_pictures(folder):
    path = (pathlib.Path(folder) / one.name).with_suffix(".txt")
    if not path.is_file():
      raise ValueError(f"The picture {one.name} of {folder} has no caption {path.name} beside it: write one, or give prompts, a text file of a "
                       "prompt a line.")
    found.append(read_text(path, "the caption").strip())
  return found
