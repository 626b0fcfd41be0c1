"""A folder in the layout of the published pipeline (`QwenImage21Pipeline` of diffusers), read without diffusers.

  model_index.json                       the pipeline's class and its parts, a distilled model's sampling times
  transformer/  text_encoder/  vae/      config.json, safetensors files (one, or several with an index)
  scheduler/scheduler_config.json        the sampling times
  processor/                             tokenizer.json, or vocab.json and merges.txt; preprocessor_config.json or processor_config.json

`open_folder` reads the configs and no weights; `load_weights` streams the weights of one role onto the mesh. Reading is strict: what this
program would not compute exactly like the published pipeline is an error. The generator's weights may come from a file of their own.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qimg2 import flow
from qimg2 import params as P
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.models.qwen3_vl_vision import VisionConfig
from qimg2.published import quantised, tensors
from qimg2.published.files import TensorFiles, open_file, open_tensors, read_json
from qimg2.published.names import mmdit as mmdit_names
from qimg2.published.names import qwen3_vl as qwen3_vl_names
from qimg2.published.names import vae as vae_names

PIPELINE_CLASS = "QwenImage21Pipeline"
SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
SCHEDULE_FIELDS = {"base_tokens": "base_image_seq_len", "base_shift": "base_shift", "max_tokens": "max_image_seq_len", "max_shift": "max_shift"}
# What the published scheduler could do besides, with the one value that we know.
SCHEDULER_FIXED = {"num_train_timesteps": 1000, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
                   "invert_sigmas": False, "stochastic_sampling": False}
PROCESSOR = "processor"
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # two forms
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")  # the newer one counts, if it speaks of images
IMAGE_NORM = [0.5, 0.5, 0.5]
# Fields that say how a network is run, or that come with the weights: they may differ between a run and the folder that it starts from.
NOT_ARCHITECTURE = ("dtype", "remat", "attention_backend", "temporal_weights", "latents_mean", "latents_std")


class Component(NamedTuple):
  """One network of the pipeline: its subfolder, the stem of its files, and the library and class that model_index.json names."""
  folder: str
  stem: str
  library: str
  name: str


COMPONENTS = {
    "mmdit": Component("transformer", "diffusion_pytorch_model", "diffusers", mmdit_names.CLASS),
    "qwen3_vl": Component("text_encoder", "model", "transformers", qwen3_vl_names.CLASS),
    "vae": Component("vae", "diffusion_pytorch_model", "diffusers", vae_names.CLASS),
}


@dataclasses.dataclass(frozen=True)
class PipelineFolder:
  """What the configs of a pipeline folder say.

  Attributes:
    path: the folder.
    model, encoder, vae: configs of the networks.
    schedule: the sampling times. The density of training times is not published and has its default.
    sample_sigmas: sampling times before the shift that a distilled model asks for, from 1 down, without the last 0; None for an even grid.
    processor: folder of the tokenizer's files.
    image_pixels: (fewest, most) px of a condition image that the published image processor feeds to the encoder as it is; it would resize
      others, which is not done here.
    transformer: file that holds the generator's weights in place of the folder; None for those of the folder.
  """
  path: pathlib.Path
  model: mmdit.Config
  encoder: qwen3_vl.Config
  vae: vae.Config
  schedule: flow.Schedule
  sample_sigmas: tuple[float, ...] | None
  processor: pathlib.Path
  image_pixels: tuple[int, int]
  transformer: pathlib.Path | None = None


def open_folder(path: str | pathlib.Path, dtype: str = "float32", remat: str = "none", transformer: str | pathlib.Path = "") -> PipelineFolder:
  """The configs of a pipeline folder.

  Args:
    path: the folder.
    dtype: compute type of all networks.
    remat: rematerialisation policy of the generator.
    transformer: .safetensors or .gguf file with the generator's weights, also in ComfyUI's form; the folder's transformer/ then needs its
      config.json only.

  Raises:
    ValueError: no such folder, another kind of pipeline, a missing or broken file, or something that is not supported.
  """
  path = pathlib.Path(path)
  if not (path / "model_index.json").is_file():
    fetch = f" A model of the hub is fetched first: hf download {path} --local-dir=DIR" if len(path.parts) == 2 and not path.exists() else ""
    raise ValueError(f"{path} is no pipeline folder: it has no model_index.json.{fetch}")
  index = read_json(path / "model_index.json")
  _check_index(index, path)
  configs = {network: read_json(path / part.folder / "config.json") for network, part in COMPONENTS.items()}
  processor = path / PROCESSOR
  if not any(all((processor / name).is_file() for name in names) for names in TOKENIZER_FILES):
    raise ValueError(f"The file {processor / TOKENIZER_FILES[0][0]} is missing, and so {' or '.join(TOKENIZER_FILES[1])}.")
  sigmas = index.get("sample_sigmas")
  try:
    encoder = qwen3_vl_names.config(configs["qwen3_vl"], dtype=dtype)
    folder = PipelineFolder(
        path=path,
        model=mmdit_names.config(configs["mmdit"], dtype=dtype, remat=remat),
        encoder=encoder,
        vae=vae_names.config(configs["vae"], dtype=dtype),
        schedule=read_schedule(read_json(path / "scheduler" / "scheduler_config.json")),
        sample_sigmas=None if sigmas is None else tuple(float(sigma) for sigma in sigmas),
        processor=processor,
        image_pixels=read_image_pixels(processor, encoder.vision),
        transformer=pathlib.Path(transformer) if transformer else None)
  except (TypeError, AttributeError) as error:
    raise ValueError(f"A config in {path} holds a value of the wrong type ({error}): fetch the folder again.") from error
  if folder.transformer is not None:
    _check_transformer(folder)
  return folder


def _check_transformer(folder: PipelineFolder) -> None:
  """A file that says its config, as those that we write, must say the folder's; of others the shapes are compared when they are read."""
  try:
    published = json.loads(open_file(folder.transformer).metadata.get("config", "{}"))
  except json.JSONDecodeError as error:
    raise ValueError(f"The config in the metadata of {folder.transformer} is no JSON ({error}): fetch the file again.") from error
  if isinstance(published, dict) and published.get("_class_name") == mmdit_names.CLASS:
    for path, mine, theirs in _differences(mmdit_names.config(published), folder.model, "model"):
      raise ValueError(f"{folder.transformer} is of a generator with {path} {mine!r}, but the folder {folder.path} is of one with {theirs!r}: name "
                       "the folder that it belongs to.")


def _check_index(index: dict[str, Any], path: pathlib.Path) -> None:
  if index.get("_class_name") != PIPELINE_CLASS:
    raise ValueError(f"{path} is a pipeline of class {index.get('_class_name')!r}: it must be {PIPELINE_CLASS!r}.")
  for network, part in COMPONENTS.items():
    headless = [[part.library, qwen3_vl_names.HEADLESS_CLASS]] if network == "qwen3_vl" else []
    if index.get(part.folder) not in [[part.library, part.name], *headless]:
      raise ValueError(f"{path / 'model_index.json'} says that the {part.folder} is {index.get(part.folder)!r}: it must be {part.name} of "
                       f"{part.library}.")


def read_image_pixels(folder: pathlib.Path, vision: VisionConfig) -> tuple[int, int]:
  """(fewest, most) px of an image for a processor that does to pixels what `qwen3_vl_vision` does: scale to [-1, 1], cut into the encoder's patches.

  Raises:
    ValueError: no settings of a processor, no bounds, or something else that it would do to pixels.
  """
  files = {folder / name: read_json(folder / name) for name in PROCESSOR_FILES if (folder / name).is_file()}
  if not files:
    raise ValueError(f"The folder {folder} has neither {' nor '.join(PROCESSOR_FILES)}.")
  found = {path: file.get("image_processor", file) for path, file in files.items()}
  path = next((path for path, settings in found.items() if "image_mean" in settings), next(iter(found)))
  settings = found[path]
  wanted = {"image_mean": IMAGE_NORM, "image_std": IMAGE_NORM}  # what a file must say; the rest has these values when it says nothing
  wanted |= {name: value for name, value in {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "patch_size": vision.patch_px,
                                             "merge_size": vision.merge, "temporal_patch_size": vision.num_frames}.items() if name in settings}
  for name, value in wanted.items():
    if settings.get(name) != value:
      raise ValueError(f"{path} has {name} {settings.get(name)!r}: only {value!r} is supported.")
  size = settings.get("size") or {}
  try:
    return int(settings.get("min_pixels") or size["shortest_edge"]), int(settings.get("max_pixels") or size["longest_edge"])
  except KeyError as error:
    raise ValueError(f"{path} does not bound the size of images: it lacks {error} under 'size'.") from error


# Sampling times.


def read_schedule(published: dict[str, Any]) -> flow.Schedule:
  """The schedule of a scheduler_config.json (its dict).

  Raises:
    ValueError: another scheduler, a missing field, or a form of the sampling times that `flow.Schedule` does not have.
  """
  if published.get("_class_name") != SCHEDULER_CLASS:
    raise ValueError(f"The scheduler is of class {published.get('_class_name')!r}: it must be {SCHEDULER_CLASS!r}.")
  for name, value in SCHEDULER_FIXED.items():
    if published.get(name, value) != value:
      raise ValueError(f"The scheduler's {name} is {published[name]!r}: only {value!r} is supported.")
  terminal = published.get("shift_terminal") or None
  try:
    if not published["use_dynamic_shifting"]:
      return flow.Schedule(shift="static", static_shift=published["shift"], terminal=terminal)
    if published["time_shift_type"] != "exponential":
      raise ValueError(f"The scheduler's time_shift_type is {published['time_shift_type']!r}: only 'exponential' is supported.")
    return flow.Schedule(shift="resolution", terminal=terminal, **{ours: published[name] for ours, name in SCHEDULE_FIELDS.items()})
  except KeyError as error:
    raise ValueError(f"The scheduler's config lacks the field {error}.") from error


def published_schedule(schedule: flow.Schedule) -> dict[str, Any]:
  """The scheduler_config.json of `schedule`, as a dict; the inverse of `read_schedule`, with "none" as a static shift of 1."""
  return {"_class_name": SCHEDULER_CLASS, **SCHEDULER_FIXED, "use_dynamic_shifting": schedule.shift == "resolution",
          "time_shift_type": "exponential", "shift": schedule.static_shift if schedule.shift == "static" else 1.0,
          **{name: getattr(schedule, ours) for ours, name in SCHEDULE_FIELDS.items()}, "shift_terminal": schedule.terminal}


# Weights.


def stored_dtypes(folder: PipelineFolder) -> dict[str, str]:
  """{network: type that most numbers of its files have, see `TensorFiles.main_dtype`}, such as "bfloat16". Reads headers only.

  Raises:
    ValueError: no or damaged files.
  """
  return {network: component_files(folder, network).main_dtype() for network in COMPONENTS}


def load_weights(folder: PipelineFolder, network: str, specs: dict, shardings: dict | None = None, read: bool = True) -> dict:
  """The weights of a network, read tensor by tensor onto the devices.

  The autoencoder's tree also has "statistics", filled from its config. Its published weights over time, which no image uses, are left unread
  where `specs` does not declare them, and so is the encoder's head.

  Args:
    folder: the opened folder.
    network: "mmdit", "qwen3_vl" or "vae".
    specs: its declared weights, as `networks.Networks.specs`.
    shardings: a tree of shardings for `specs`; None puts everything on the first device.
    read: False only checks, and gives nothing.

  Raises:
    ValueError: no or damaged files, or tensors that differ from `specs`; checked before the first one is read.
  """
  files = component_files(folder, network)
  if network == "vae":
    return _load_vae(folder, files, specs, shardings, read)
  table = mmdit_names.table(folder.model) if network == "mmdit" else qwen3_vl_names.table(folder.encoder)
  if network == "qwen3_vl" and "head" not in specs:  # tied to the embedding, or not asked for: then it is no matter whether the files have it
    files, table = files.without({qwen3_vl_names.HEAD}), {path: entry for path, entry in table.items() if path != "head"}
  _check_paths(specs, table, files.folder)
  return tensors.load_tensors(files, specs, table, shardings, network, read)


def load_vision(folder: PipelineFolder, specs: dict, shardings: dict | None = None) -> dict:
  """The weights of the encoder's vision tower, and no other tensor of the encoder's files.

  Args: the opened folder; what `networks.Networks.specs` declares of the encoder as "vision"; a tree of shardings for it, None for the first device.

  Raises:
    ValueError: no or damaged files, or tensors of the tower that differ from `specs`; checked before the first one is read.
  """
  files = component_files(folder, "qwen3_vl")
  files = files.without({name for name in files.tensors if not name.startswith(qwen3_vl_names.VISION_ROOT)})
  table = {path: entry for path, entry in qwen3_vl_names.table(folder.encoder).items() if path.split(P.SEPARATOR)[0] == "vision"}
  _check_paths({"vision": specs}, table, files.folder)
  return tensors.load_tensors(files, {"vision": specs}, table, None if shardings is None else {"vision": shardings}, "vision")["vision"]


def component_files(folder: PipelineFolder, network: str) -> TensorFiles:
  """The tensors of a network under the names and with the values of the published class, whatever form their files have.

  Raises:
    ValueError: no or damaged files, or files of something else.
  """
  part = COMPONENTS[network]
  alone = network == "mmdit" and folder.transformer is not None
  files = quantised.plain(open_file(folder.transformer) if alone else open_tensors(folder.path / part.folder, part.stem))
  return {"mmdit": mmdit_names.published_tensors, "qwen3_vl": qwen3_vl_names.published_tensors}.get(network, lambda files: files)(files)


def has_head(folder: PipelineFolder) -> bool:
  """Whether the files of the encoder hold its head. Nothing that draws reads it, nor what trains a generator."""
  return qwen3_vl_names.HEAD in component_files(folder, "qwen3_vl").tensors


def _load_vae(folder: PipelineFolder, files: TensorFiles, specs: dict, shardings: dict | None, read: bool) -> dict:
  network = {half: specs[half] for half in ("encoder", "decoder")}
  declared = any("time" in path.split(P.SEPARATOR) for path in P.flatten(network))
  whole, table = (vae_names.table(dataclasses.replace(folder.vae, temporal_weights=temporal)) for temporal in (True, declared))
  _check_paths(network, table, files.folder)
  files = files.without({whole[path].name for path in set(whole) - set(table)})
  weights = tensors.load_tensors(files, network, table, None if shardings is None else {half: shardings[half] for half in network}, "vae", read)
  return {**weights, "statistics": _statistics(folder.vae, specs["statistics"], shardings)}


def _check_paths(specs: dict, table: tensors.Table, folder: pathlib.Path) -> None:
  odd = sorted(set(P.flatten(specs)) ^ set(table))
  if odd:
    raise ValueError(f"The config and {folder / 'config.json'} are of different networks: only one of them has the weight {odd[0]}.")


def _statistics(cfg: vae.Config, specs: dict, shardings: dict | None) -> dict:
  values = {"mean": np.float32(cfg.latents_mean), "std": np.float32(cfg.latents_std)}
  for name, x in values.items():
    if x.shape != specs[name].shape:
      raise ValueError(f"The autoencoder's config.json has {x.size} latents_{name}, but the config asks for {specs[name].size}.")
  where = dict.fromkeys(values, tensors.one_device()) if shardings is None else shardings["statistics"]
  return {name: tensors.place(x.astype(specs[name].dtype), where[name]) for name, x in values.items()}


def check_configs(folder: PipelineFolder, mmdit: mmdit.Config | None = None, qwen3_vl: qwen3_vl.Config | None = None,
                  vae: vae.Config | None = None) -> None:
  """Does nothing when networks of these configs can take the folder's weights and compute what the published ones do.

  A config that is None is not compared: that network takes nothing from the folder.

  Raises:
    ValueError: a field of the architecture differs; the first one is named with both values.
  """
  for section, ours, theirs in (("model", mmdit, folder.model), ("encoder", qwen3_vl, folder.encoder), ("vae", vae, folder.vae)):
    for path, mine, published in _differences(ours, theirs, section) if ours is not None else ():
      raise ValueError(f"config.{path} is {mine!r}, but the pipeline in {folder.path} has {published!r}: make them equal to start from it.")


def check_sampling(folder: PipelineFolder, schedule: flow.Schedule, sample_sigmas: Sequence[float]) -> None:
  """Does nothing when a run's sampling times are the folder's: a generator that starts from it was made for these.

  Raises:
    ValueError: the schedule or the given times differ; all keys to set are named with their values.
  """
  ours, theirs = (_sampling_fields(one) for one in (schedule, folder.schedule))
  wanted = [f"config.schedule.{name}={value!r}" for name, value in theirs.items() if ours.get(name) != value]
  if tuple(sample_sigmas) != (folder.sample_sigmas or ()):
    wanted.append(f"config.sampling.sigmas={folder.sample_sigmas or ()}")
  if wanted:
    raise ValueError(f"The pipeline in {folder.path} was made for other sampling times than this run's: to start from it set {', '.join(wanted)}.")


def _sampling_fields(schedule: flow.Schedule) -> dict[str, Any]:
  """What decides on the sampling times; no shift is a static one of 1."""
  static = {} if schedule.shift == "resolution" else {"static_shift": schedule.static_shift if schedule.shift == "static" else 1.0}
  fields = static or {name: getattr(schedule, name) for name in SCHEDULE_FIELDS}
  return {"shift": "static" if static else "resolution", **fields, "terminal": schedule.terminal}


def _differences(ours: Any, theirs: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
  if dataclasses.is_dataclass(ours) and dataclasses.is_dataclass(theirs):
    for field in dataclasses.fields(ours):
      if field.name not in NOT_ARCHITECTURE:
        yield from _differences(getattr(ours, field.name), getattr(theirs, field.name), f"{path}.{field.name}")
  elif (tuple(ours) if isinstance(ours, list) else ours) != theirs:
    yield path, ours, theirs
