"""A vision-language model of its own in a folder, as transformers saves it: `Qwen3VLForConditionalGeneration` with its head and tokenizer.

  config.json  model.safetensors, or several files with an index  tokenizer.json, or vocab.json and merges.txt  preprocessor_config.json
  chat_template.jinja, chat_template.json or the field chat_template of tokenizer_config.json

The folder of a pipeline serves too, if its text_encoder/ holds the head; its tokenizer is in processor/.
"""

import dataclasses
import pathlib
import re

from qimg2.models import qwen3_vl
from qimg2.published import quantised, tensors
from qimg2.published.files import TensorFiles, open_tensors, read_json
from qimg2.published.folder import COMPONENTS, PROCESSOR, TOKENIZER_FILES, read_image_pixels
from qimg2.published.names import qwen3_vl as names

TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # the first that is there counts
_REPLY = re.compile(r"<\|im_start\|>assistant(?:\\+n|\n)<think>")  # where a template ends that lets the model reason before it replies


@dataclasses.dataclass(frozen=True)
class LanguageFolder:
  """What the configs of such a folder say.

  Attributes:
    path: the folder.
    weights: folder of config.json and the weights.
    processor: folder of the tokenizer's files.
    config: sizes of the model.
    image_pixels: (fewest, most) px of a picture that the published processor feeds to the model as it is; it resizes others.
  """
  path: pathlib.Path
  weights: pathlib.Path
  processor: pathlib.Path
  config: qwen3_vl.Config
  image_pixels: tuple[int, int]


def open_language(path: str | pathlib.Path, dtype: str = "float32") -> LanguageFolder:
  """The configs of a folder; weights are not read.

  Args: the folder; compute type.

  Raises:
    ValueError: no such folder, another model, a missing or broken file, a model that reasons before it replies, or something unsupported.
  """
  path = pathlib.Path(path)
  part = COMPONENTS["qwen3_vl"].folder
  weights, processor = (path / part, path / PROCESSOR) if (path / part / "config.json").is_file() else (path, path)
  if not (weights / "config.json").is_file():
    fetch = f" A model of the hub is fetched first: hf download {path} --local-dir=DIR" if len(path.parts) == 2 and not path.exists() else ""
    raise ValueError(f"{path} is no folder of a vision-language model: it has no config.json.{fetch}")
  if not any(all((processor / name).is_file() for name in some) for some in TOKENIZER_FILES):
    raise ValueError(f"The file {processor / TOKENIZER_FILES[0][0]} is missing, and so {' or '.join(TOKENIZER_FILES[1])}.")
  try:
    config = names.config(read_json(weights / "config.json"), dtype=dtype)
    pixels = read_image_pixels(processor, config.vision)
  except (TypeError, AttributeError) as error:
    raise ValueError(f"A config in {path} holds a value of the wrong type ({error}): fetch the folder again.") from error
  template = next((processor / name for name in TEMPLATES if (processor / name).is_file()), None)
  if template is not None and _REPLY.search(template.read_text(encoding="utf-8")):
    raise ValueError(f"{template} lets the model reason before it replies, so that the first token says nothing: take an Instruct model.")
  return LanguageFolder(path, weights, processor, config, pixels)


def main_dtype(folder: LanguageFolder) -> str:
  """The type that most numbers of the files have, such as "bfloat16". Reads headers only."""
  return _files(folder).main_dtype()


def load_language(folder: LanguageFolder, specs: dict, shardings: dict | None = None) -> dict:
  """The weights, the head among them, read tensor by tensor onto the devices.

  Args:
    folder: the opened folder.
    specs: `qwen3_vl.specs(folder.config)`, perhaps in another type.
    shardings: a tree of shardings for `specs`; None puts everything on the first device.

  Raises:
    ValueError: no or damaged files, no head, or tensors that differ from `specs`; checked before the first one is read.
  """
  files = _files(folder)
  if "head" not in specs:  # tied to the embedding; some files hold it all the same
    files = files.without({names.HEAD})
  elif names.HEAD not in files.tensors:
    raise ValueError(f"The weights in {folder.weights} lack {names.HEAD}, without which nothing can answer: take the folder of a whole "
                     f"{names.CLASS}.")
  return tensors.load_tensors(files, specs, names.table(folder.config), shardings, "qwen3_vl")


def _files(folder: LanguageFolder) -> TensorFiles:
  return names.published_tensors(quantised.plain(open_tensors(folder.weights, COMPONENTS["qwen3_vl"].stem)))
