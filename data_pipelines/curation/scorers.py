"""Scores by models that the user brings: an ONNX file, or a Python callable.

None comes with this package, since a threshold means something only with the model that it was set for. `model` is one of:
  "/path/model.onnx"  run by onnxruntime on one CPU thread. Its pictures are float32 1 3 input_px input_px in RGB: scaled to cover the square,
                      cut around the centre, (value / 255 - mean) / std.
  "module:callable"   `callable(sample) -> float`, imported in each process at the first sample; for everything else, a GPU included.
Models are loaded once per process. A missing model, a missing file or a score that is no finite number is a `ValueError`, never a pass.
"""

import copy
import dataclasses
import functools
import importlib
import importlib.util
import math
import os
from typing import Callable

import numpy as np
import onnxruntime
import tokenizers

from data_pipelines.curation.sample import Caption, Sample
from data_pipelines.transforms import resize_crop


@dataclasses.dataclass(frozen=True)
class ImageScorer:
  """A number for a picture.

  Attributes:
    model: see the module.
    input_px: side of the square that an ONNX model takes.
    mean: per channel, of values 0 to 1; (0.5, 0.5, 0.5) is SigLIP's, CLIP has (0.481, 0.458, 0.408).
    std: per channel; (0.5, 0.5, 0.5) is SigLIP's, CLIP has (0.269, 0.261, 0.276).
    output: name of the ONNX output that holds the score; "" for the first.
    index: which number of that output; -1 if it holds one only.
    softmax: whether the output is logits of classes that must become shares first.
  """
  model: str = ""
  input_px: int = 224
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  output: str = ""
  index: int = -1
  softmax: bool = False

  def __post_init__(self):
    check_model(self.model)

  def score(self, sample: Sample) -> float:
    """Returns the model's number for the target; `ValueError` if it is not finite."""
    if is_callable(self.model):
      return _finite(_load_callable(self.model)(sample), self.model, sample.key)
    session = _load_session(self.model)
    inputs = session.get_inputs()
    if len(inputs) != 1:
      raise ValueError(f"{self.model} takes {len(inputs)} inputs, not one picture: export the image model alone.")
    return self._run(session, {inputs[0].name: self._picture(sample)}, sample.key)

  def _picture(self, sample: Sample) -> np.ndarray:
    pixels = resize_crop(sample.pixels, self.input_px, self.input_px).astype(np.float32) / 255
    scaled = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])

  def _run(self, session, feeds: dict[str, np.ndarray], key: str) -> float:
    names = [output.name for output in session.get_outputs()]
    if self.output and self.output not in names:
      raise ValueError(f"{self.model} has no output {self.output!r}: it has {', '.join(names)}.")
    try:
      values = np.asarray(session.run([self.output or names[0]], feeds)[0], np.float64).ravel()
    except Exception as error:  # onnxruntime has one class per cause and no parent of them all.
      raise ValueError(f"{self.model} cannot score {key}: {error}; check input_px and the model's inputs.") from error
    if not -1 <= self.index < values.size or self.index == -1 and values.size != 1:
      raise ValueError(f"{self.model} gives {values.size} numbers per sample: set index to the one that is the score, 0 to {values.size - 1}.")
    if self.softmax:
      shares = np.exp(values - values.max())
      values = shares / shares.sum()
    return _finite(values[self.index], self.model, key)


@dataclasses.dataclass(frozen=True)
class TextImageScorer(ImageScorer):
  """A number for a picture with one caption, such as CLIP's or SigLIP's.

  A callable gets a sample that holds that caption alone. An ONNX file holds both towers: one float input for pixels, one integer input for
  token ids (1 L), and if it wants, another with "mask" in its name; exports of CLIP by Hugging Face are such files, with
  output="logits_per_image".

  Attributes:
    text_tokenizer: the model's tokenizer.json.
    max_tokens: longer captions are cut, as these models were trained.
    pad_id: what fills ids up to max_tokens, as SigLIP wants; -1 fills nothing.
  """
  text_tokenizer: str = ""
  max_tokens: int = 77
  pad_id: int = -1

  def __post_init__(self):
    super().__post_init__()
    if not is_callable(self.model) and not os.path.isfile(self.text_tokenizer):
      raise ValueError(f"wants text_tokenizer, the tokenizer.json of {self.model}: there is no file {self.text_tokenizer!r}.")

  def score_caption(self, sample: Sample, caption: Caption) -> float:
    """Returns the model's number for the target and one caption; `ValueError` if it is not finite."""
    if is_callable(self.model):
      single = copy.copy(sample)  # keeps decoded pixels
      single.captions = [caption]
      return _finite(_load_callable(self.model)(single), self.model, sample.key)
    session = _load_session(self.model)
    return self._run(session, self._feeds(session, sample, caption.text), sample.key)

  def _feeds(self, session, sample: Sample, text: str) -> dict[str, np.ndarray]:
    encoding = _load_tokenizer(self.text_tokenizer, self.max_tokens, self.pad_id).encode(text)
    feeds, kinds = {}, []
    for one in session.get_inputs():
      kinds.append("pixels" if "float" in one.type else "mask" if "mask" in one.name else "ids")
      ids = encoding.attention_mask if kinds[-1] == "mask" else encoding.ids
      feeds[one.name] = self._picture(sample) if kinds[-1] == "pixels" else np.array([ids], np.int32 if "int32" in one.type else np.int64)
    if sorted(set(kinds) - {"mask"}) != ["ids", "pixels"] or len(set(kinds)) != len(kinds):
      raise ValueError(f"{self.model} takes {', '.join(feeds)}: export it with one input of pixels, one of token ids and at most one mask.")
    return feeds


def check_model(model: str) -> None:
  """Raises `ValueError`, worded to follow the operator's name, if `model` is empty or names nothing on this machine."""
  if not model:
    raise ValueError('wants a model: set model to "/path/model.onnx" or "module:callable", or take the operator out of the list.')
  if not is_callable(model):
    if not os.path.isfile(model):
      raise ValueError(f"wants the model {model}, which is no file on this machine: correct the path or fetch the model.")
  elif not _module_exists(model.partition(":")[0]):
    raise ValueError(f"wants the model {model}, but no such module can be imported: correct the name or add its folder to PYTHONPATH.")


def is_callable(model: str) -> bool:
  """Whether `model` names a callable and not a file."""
  module, colon, name = model.partition(":")
  return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _module_exists(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of the package that should hold it
    return False


@functools.cache
def _load_callable(model: str) -> Callable[[Sample], float]:
  module, _, name = model.partition(":")
  function = getattr(importlib.import_module(module), name, None)
  if not callable(function):
    raise ValueError(f"The module {module} has no callable {name!r}: correct model={model!r}.")
  return function


@functools.cache
def _load_session(path: str) -> onnxruntime.InferenceSession:
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = options.inter_op_num_threads = 1  # curation runs one process per core
  try:
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
  except Exception as error:  # onnxruntime has one class per cause and no parent of them all.
    raise ValueError(f"{path} is no ONNX model that onnxruntime can load ({error}): export it again.") from error


@functools.cache
def _load_tokenizer(path: str, max_tokens: int, pad_id: int) -> tokenizers.Tokenizer:
  try:
    tokenizer = tokenizers.Tokenizer.from_file(path)
  except Exception as error:  # The Rust library raises this bare type for every kind of broken file.
    raise ValueError(f"{path} is not a tokenizer.json ({error}): fetch it again.") from error
  tokenizer.enable_truncation(max_tokens)
  if pad_id >= 0:
    tokenizer.enable_padding(length=max_tokens, pad_id=pad_id)
  return tokenizer


def _finite(score: float, model: str, key: str) -> float:
  try:
    number = float(score)
  except (TypeError, ValueError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(f"The model {model} gives {score!r} for {key}: a score must be a finite number, mend the model or drop the sample.")
  return number
