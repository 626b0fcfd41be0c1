"""The words that say where weights come from: `start_from` of a stage and the values of its section `frozen`.

  scratch             drawn from the seed
  default             for frozen roles: from the diffusers folder that the chain of stages started from, or else as "scratch"
  stage:NAME          the last checkpoint of an earlier stage; stage:NAME:ema its averaged weights
  diffusers:DIR       a folder in the published layout; diffusers:DIR,transformer=FILE has the generator's weights from a file of their own, and
                      diffusers:DIR,lora=FILE an adapter of them: a stage with an adapter goes on with it, for any other it is added to them
  FOLDER, FOLDER:ema  a stage's folder in another run; or a folder of weights alone, such as another run's frozen/<role>
"""

import dataclasses
import difflib
from collections.abc import Sequence

from data_pipelines.folders import local_folder
from qimg2.places import Place, find_place

DIFFUSERS, STAGE = "diffusers:", "stage:"
TRANSFORMER, LORA = ",transformer=", ",lora="  # in this order


@dataclasses.dataclass(frozen=True)
class Source:
  """Where weights come from.

  Attributes:
    kind: "scratch", "default", "stage", "diffusers" or "folder".
    name: of the stage or the folder.
    average: name of the averaged weights to take, "" for the weights themselves.
    transformer: file of the generator's weights, "" for those of the folder.
    step: of a stage's checkpoint, None for the newest.
    lora: file of an adapter of the generator, "" for none.
  """
  kind: str
  name: str = ""
  average: str = ""
  transformer: str = ""
  step: int | None = None
  lora: str = ""


def parse_source(text: str) -> Source:
  """The source that `text` states. Whether it is there is asked by `check_source`."""
  if text in ("scratch", "default"):
    return Source(text)
  if text.startswith(DIFFUSERS):
    rest, _, lora = text.removeprefix(DIFFUSERS).partition(LORA)
    name, _, transformer = rest.partition(TRANSFORMER)
    return Source("diffusers", name, transformer=transformer, lora=lora)
  kind, rest = ("stage", text.removeprefix(STAGE)) if text.startswith(STAGE) else ("folder", text)
  name, colon, average = rest.rpartition(":")
  return Source(kind, name, average) if colon and "/" not in average else Source(kind, rest)


def _find(source: Source, where: str) -> Place:
  """The place of a folder; a published one is on this machine, because safetensors maps its files."""
  return find_place(source.name, where) if source.kind == "folder" else local_folder(source.name, where)


def check_source(text: str, where: str, earlier: Sequence[str], names: Sequence[str], may_be_default: bool) -> None:
  """Asks whether there is what `text` names.

  Args: the text; its place in the config; names of the stages before, and of all stages; whether "default" is a choice.

  Raises:
    ValueError: it names neither a stage before this one nor a folder, with what it may have meant.
  """
  source = parse_source(text)
  if source.kind == "scratch" or (source.kind == "default" and may_be_default):
    return
  if source.kind == "stage" and source.name in earlier:
    return
  # A word that is a stage's name is never taken for a folder: those can be written as ./NAME.
  if source.transformer and not local_folder(source.transformer, where).is_file():
    raise ValueError(f"{where} is {text!r}, but there is no file {source.transformer!r}: give the generator's weights as .safetensors or .gguf.")
  if source.lora and not local_folder(source.lora, where).is_file():
    raise ValueError(f"{where} is {text!r}, but there is no file {source.lora!r}: give a LoRA as .safetensors.")
  if source.kind in ("folder", "diffusers") and source.name not in ("", *names) and _find(source, where).is_dir():
    return
  near = difflib.get_close_matches(source.name, earlier, 1) if source.kind in ("stage", "folder") and "/" not in source.name else []
  meant = f"{STAGE}{near[0]}{':' * bool(source.average)}{source.average}" if near else ""
  if source.kind == "diffusers":
    raise ValueError(f"{where} is {text!r}, but there is no folder {source.name!r}: give one in the published layout.")
  known = ", ".join(earlier) or "none"
  if source.kind == "stage":
    raise ValueError(f"{where} is {text!r}, but no earlier stage ({known}) has this name" + (f": did you mean {meant!r}?" if meant else "."))
  choices = ["\"scratch\"", *(["\"default\""] if may_be_default else []), f"\"stage:NAME\" of an earlier stage ({known})", "\"diffusers:DIR\""]
  raise ValueError(f"{where} is {text!r}, which is neither {', '.join(choices)} nor a folder" + (f": did you mean {meant!r}?" if meant else "."))
