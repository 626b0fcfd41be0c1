"""The evaluation suite of sets of pictures: how far they are from a reference set, and how different the pictures of one prompt are."""

import pathlib
from collections.abc import Callable

import numpy as np

from data_pipelines.transforms import decode_image
from qimg2.evaluation import Suite, Task
from qimg2.evaluation.features import Features, OnnxConfig, OnnxFeatures
from qimg2.evaluation.reference_set import ReferenceSet, make_reference
from qimg2.evaluation.vision_features import VisionFeatures
from qimg2.networks import fingerprint
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.reconstruction import folder_pictures


def fidelity_suite(reference: str, network: str, prompts: str = "", keep: str = "", side_px: int = 1024, input_px: int = 299, mean: str = "0.5",
                   std: str = "0.5", layout: str = "nchw", output: str = "", batch_size: int = 32) -> Suite:
  """FID, KID, CMMD, precision, recall, density, coverage and diversity of pictures, see `qimg2.evaluation.fidelity`.

  A picture has no score of its own. Diversity needs several seeds.

  Args:
    reference: folder of pictures, or the .npz file that `keep` wrote.
    network: an .onnx file; or a published folder, whose vision tower is taken.
    prompts: text file of a prompt a line; "" for the captions beside the pictures of the folder, NAME.txt beside NAME.png.
    keep: .npz file to write the reference's features into, "" for none.
    side_px: side of the pictures that are drawn.
    input_px: side of the network's input; the vision tower takes a multiple of 32.
    mean, std: of pixels in 0..1, one number or three with + or a comma between; of an ONNX network.
    layout, output: "nchw" or "nhwc", and the name of the output that is taken, "" for the first; of an ONNX network.
    batch_size: pictures that the network sees at a time.

  Raises:
    ValueError: files or settings that do not fit, a reference of another network, or fewer than two pictures in it.
  """
  texts = _read_prompts(prompts) if prompts else _captions(reference)
  features, identity = _features(network, input_px, mean, std, layout, output, batch_size)
  found = _reference(reference, features, identity)
  if len(found.features) < 2:
    raise ValueError(f"The reference {reference} has one picture: distances between sets need at least two.")
  if keep:
    found.save(keep)

  def tasks(num: int, seed: int) -> list[Task]:
    if num > len(texts):
      raise ValueError(f"{num} prompts are asked for, but {prompts or reference} has {len(texts)}: ask for fewer, or give more.")
    order = np.random.default_rng(seed).permutation(len(texts))[:num] if num else range(len(texts))
    return [Task(texts[i], (side_px, side_px), name=f"{i:06d}") for i in order]
  return Suite(tasks, score=_no_scores, features=features, of_set=found.figures)


def _no_scores(task: Task, picture: np.ndarray) -> dict[str, float]:
  """A picture has no score of its own."""
  del task, picture
  return {}


def _features(network: str, input_px: int, mean: str, std: str, layout: str, output: str, batch_size: int) -> tuple[Features, str]:
  """(features, what names them)."""
  if not pathlib.Path(network).is_dir():
    made = OnnxFeatures(OnnxConfig(network, input_px, input_px, _numbers(mean, "mean"), _numbers(std, "std"), layout, output, batch_size))
    return made, made.identity
  pretrained = Pretrained(network)
  vision = pretrained.nets.encoder.vision
  if vision is None:
    raise ValueError(f"The encoder of {network} has no vision tower: give an .onnx file, or another folder.")
  params = pretrained.offloaded()["qwen3_vl"]["vision"]
  made = VisionFeatures(vision, params, input_px, pretrained.nets.encoder.dtype, batch_size, pretrained.nets.shard)
  return made, f"qwen3_vl vision {fingerprint(params)} {input_px} px"


def _numbers(text: str, name: str) -> tuple[float, float, float]:
  parts = str(text).replace("+", ",").split(",")
  try:
    found = tuple(float(part) for part in parts)
  except ValueError as error:
    raise ValueError(f"The {name} of a feature network is {text!r}: give one number, or three with + between.") from error
  if len(found) not in (1, 3):
    raise ValueError(f"The {name} of a feature network is {text!r}: give one number, or three with + between.")
  return found if len(found) == 3 else found * 3


def _reference(place: str, features: Callable[..., np.ndarray], identity: str) -> ReferenceSet:
  if pathlib.Path(place).is_dir():
    return make_reference((decode_image(one.read(), one.name) for one in folder_pictures(place)), features, identity)
  found = ReferenceSet.load(place)
  found.check_network(identity)
  return found


def _read_prompts(path: str) -> list[str]:
  if not pathlib.Path(path).is_file():
    raise ValueError(f"There is no file of prompts {path}: give a text file of a prompt a line.")
  found = [line.strip() for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
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
    found.append(path.read_text(encoding="utf-8").strip())
  return found
