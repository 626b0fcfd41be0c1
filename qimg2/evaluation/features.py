"""Features of pictures for `qimg2.evaluation.fidelity`, from a network in an ONNX file that the user gives.

A picture is composited on nothing (it is RGB), resized to the network's square (or to its height and width) with Pillow's antialiased bicubic filter,
as clean-fid does (arXiv 2104.11222), scaled to 0..1 and normalised by mean and deviation per channel. What the network gives must be [n, D], or
[n, D, h, w], of which the mean over h and w is taken.

onnxruntime is imported where a network is opened: who needs none of it waits for none.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from qimg2.evaluation import Task

Features = Callable[[Sequence[Task], Sequence[np.ndarray]], np.ndarray]  # (tasks, pictures [H, W, 3] uint8) -> [n, D] float32
LAYOUTS = ("nchw", "nhwc")


@dataclasses.dataclass(frozen=True)
class OnnxConfig:
  """A network in a file and what it takes.

  Attributes:
    path: the .onnx file.
    height, width: of its input in px.
    mean, std: per channel, of pixels in 0..1; a picture becomes (pixel - mean) / std. (0.5,) * 3 for both gives -1..1.
    layout: "nchw" or "nhwc", order of its input's dimensions.
    output: name of the output that is taken, "" for the first.
    batch_size: pictures at a time.

  Raises:
    ValueError: sizes, deviations or a layout that cannot be.
  """
  path: str
  height: int = 299
  width: int = 299
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  layout: str = "nchw"
  output: str = ""
  batch_size: int = 32

  def __post_init__(self):
    if min(self.height, self.width, self.batch_size) < 1:
      raise ValueError(f"A feature network's input of {self.height} x {self.width} px in batches of {self.batch_size} cannot be: give positive "
                       "numbers.")
    if self.layout not in LAYOUTS:
      raise ValueError(f"There is no layout {self.layout!r} of a feature network's input: choose one of {', '.join(LAYOUTS)}.")
    if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
      raise ValueError(f"A feature network needs three means and three positive deviations, not {self.mean} and {self.std}.")


class OnnxFeatures:
  """`Features` of a network in an ONNX file, on the CPU."""

  def __init__(self, cfg: OnnxConfig):
    """Raises:
      ValueError: onnxruntime or the file is missing, the file is no network, or its input does not take what `cfg` says.
    """
    self._cfg, self._session = cfg, _open(cfg.path)
    names = [one.name for one in self._session.get_outputs()]
    if cfg.output and cfg.output not in names:
      raise ValueError(f"The network {cfg.path} has no output {cfg.output!r}: choose one of {', '.join(names)}.")
    self._output = cfg.output or names[0]
    self._input = _check_input(cfg, self._session.get_inputs())

  @property
  def identity(self) -> str:
    """Names the network and how pictures come to it: equal for features that may be compared."""
    what = dataclasses.replace(self._cfg, path="", batch_size=1)
    digest = hashlib.sha256(pathlib.Path(self._cfg.path).read_bytes())
    digest.update(repr(what).encode())
    return f"onnx {pathlib.Path(self._cfg.path).name} {digest.hexdigest()[:16]}"

  def __call__(self, tasks: Sequence[Task], pictures: Sequence[np.ndarray]) -> np.ndarray:
    """[n, D] float32 of n pictures [H, W, 3] uint8, at least one; the tasks are not looked at.

    Raises:
      ValueError: the network fails, or gives no vector per picture.
    """
    blocks = [pictures[start:start + self._cfg.batch_size] for start in range(0, len(pictures), self._cfg.batch_size)]
    return np.concatenate([self._of_block(block) for block in blocks])

  def _of_block(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
    x = np.stack([prepare(self._cfg, picture) for picture in pictures])
    try:
      found, = self._session.run([self._output], {self._input: x})
    except Exception as error:  # onnxruntime's errors share no class of their own
      raise ValueError(f"The network {self._cfg.path} does not take an input of shape {x.shape}: {_first_line(error)}") from error
    found = np.asarray(found)
    if found.ndim == 4:
      found = found.mean(axis=(2, 3))
    if found.ndim != 2 or len(found) != len(x):
      raise ValueError(f"The network {self._cfg.path} gives shape {found.shape} for {len(x)} pictures: its output must be [n, D] or [n, D, h, w]; "
                       "name another output.")
    return found.astype(np.float32)


def prepare(cfg: OnnxConfig, picture: np.ndarray) -> np.ndarray:
  """A picture [H, W, 3] uint8 as the network takes it, [3, height, width] or [height, width, 3] float32."""
  size = (cfg.width, cfg.height)
  # Channel by channel as float32, so that nothing is rounded between the filter's passes.
  channels = [np.asarray(Image.fromarray(picture[..., i].astype(np.float32)).resize(size, Image.Resampling.BICUBIC)) for i in range(3)]
  x = (np.stack(channels, axis=-1).clip(0, 255) / np.float32(255) - np.float32(cfg.mean)) / np.float32(cfg.std)
  return np.ascontiguousarray(x if cfg.layout == "nhwc" else x.transpose(2, 0, 1), np.float32)


def _open(path: str) -> Any:
  try:
    import onnxruntime
  except ImportError as error:
    raise ValueError(f"The feature network {path} needs onnxruntime: pip install onnxruntime.") from error
  if not pathlib.Path(path).is_file():
    raise ValueError(f"There is no feature network {path}: give the path of an .onnx file.")
  try:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
  except Exception as error:  # onnxruntime's errors share no class of their own
    raise ValueError(f"{path} cannot be read as an ONNX network: {_first_line(error)}") from error


def _check_input(cfg: OnnxConfig, inputs: Sequence[Any]) -> str:
  """The name of the one input."""
  if len(inputs) != 1 or inputs[0].type != "tensor(float)":
    raise ValueError(f"The network {cfg.path} must have one input of float32, but it has {', '.join(f'{x.name}: {x.type}' for x in inputs)}.")
  given = (3, cfg.height, cfg.width) if cfg.layout == "nchw" else (cfg.height, cfg.width, 3)
  takes = inputs[0].shape
  # Dimensions that a file leaves open are texts or None.
  if len(takes) != 4 or any(isinstance(own, int) and own != one for own, one in zip(takes[1:], given)):
    raise ValueError(f"The network {cfg.path} takes an input of shape {takes}, but the settings (layout {cfg.layout}, {cfg.height} x {cfg.width} px) "
                     f"give [n, {', '.join(map(str, given))}]: change them.")
  return inputs[0].name


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
