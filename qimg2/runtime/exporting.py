"""The networks of a trained run as a folder that diffusers loads, or the generator alone as one file. See `launch.export`."""

import importlib.metadata
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from data_pipelines.folders import local_folder
from data_pipelines.tokenizer import PromptTokenizer
from qimg2.published.export import CHAT_TEMPLATES, DIFFUSERS_VERSION, export_pipeline, export_transformer
from qimg2.published.folder import open_folder
from qimg2.published.lora import export_lora
from qimg2.runtime.config import StageConfig
from qimg2.runtime.config.sources import parse_source
from qimg2.runtime.evaluating.of_run import describe
from qimg2.runtime.run import Run
from qimg2.runtime.sampling import first_size, sampling_stage, sampling_weights
from qimg2.runtime.weights import DEPLOYED, NONE
from qimg2.training.metrics import read_rows

OF_PICTURES_AND_CHATS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", *CHAT_TEMPLATES)
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def export(run: Run, out: str | pathlib.Path, stage_name: str = "", average: str = DEPLOYED, dtype: str = "bfloat16", max_shard_bytes: float = 5e9,
           transformer_only: bool = False, comfyui: bool = False, step: int | None = None, lora: bool = False) -> pathlib.Path:
  """Writes `out` and returns its path.

  Args:
    run: the run.
    out: folder to write, or with `transformer_only`, `comfyui` or `lora` a .safetensors file; must not exist.
    stage_name: stage whose generator is written; empty for the last trained one.
    average: name of the averaged weights to write, "none" for the weights themselves, "deployed" for what the method would draw with.
    dtype: of the files, "float32" or "bfloat16".
    max_shard_bytes: largest size of one file's tensors.
    transformer_only: leaves out encoder, VAE and tokenizer.
    comfyui: does so too, and writes the generator in the form of ComfyUI's single files.
    step: of the checkpoint to take, None for the newest.
    lora: writes the adapter alone, with `comfyui` under the names there.

  Raises:
    ValueError: no such stage or step, `out` exists, networks that the published pipeline cannot express, or no adapter that could be written alone.
  """
  if lora:
    return _export_adapter(run, out, sampling_stage(run, stage_name), average, dtype, transformer_only, comfyui, step)
  name, weights = sampling_weights(run, stage_name, average, step)
  nets = run.nets
  if transformer_only or comfyui:
    return export_transformer(out, nets.model, weights["mmdit"], dtype, comfyui)
  card = model_card(run, name, average, dtype, local_folder(out, "--out").name, step)
  return export_pipeline(out, nets.model, nets.encoder, nets.vae, weights, run.schedule, run.tokenizer.to_bytes().decode(), dtype, max_shard_bytes,
                         card, run.cfg.sampling.sigmas or None, _processor_files(run, name))


def _export_adapter(run: Run, out: str | pathlib.Path, name: str, average: str, dtype: str, transformer_only: bool, comfyui: bool,
                    step: int | None) -> pathlib.Path:
  """Writes the adapter of a stage. Of its base no weight is read."""
  settings = run.stages[name].adapter
  if not settings.rank:
    raise ValueError(f"Stage {name!r} trained all weights of its generator, not an adapter: leave --lora out.")
  if transformer_only:
    raise ValueError("--transformer_only writes the whole generator: leave it out to write the adapter alone.")
  return export_lora(out, run.nets.model, run.deployed_adapter(name, average, step), settings.scale, dtype, comfyui)


def _processor_files(run: Run, stage_name: str) -> dict[str, bytes]:
  """What the published folder of the encoder says of pictures and chats, and of the tokenizer if that is the run's: name in processor/ -> content."""
  if not run.encoder_folder(stage_name):
    return {}
  folder = open_folder(run.encoder_folder(stage_name)).processor
  is_ours = PromptTokenizer.load(folder).fingerprint == run.tokenizer.fingerprint
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and (is_ours or path.name in OF_PICTURES_AND_CHATS)}


def model_card(run: Run, stage_name: str, average: str, dtype: str, title: str, step: int | None = None) -> str:
  """The README.md of an exported folder, in Markdown: what it is, how it was trained and measured, how to load it; `step` is that of its checkpoint,
  None for the newest."""
  which = {DEPLOYED: "what its method deploys", NONE: "the weights"}.get(average, f"the averaged weights `{average}`")
  start = "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n"
  return "\n".join([
      start, f"# {title}\n",
      f"An image model of the Qwen-Image-2.0 kind, trained with qimg2: {which} of stage `{stage_name}`, as {dtype}.\n",
      "## Training\n",
      _table(("stage", "algorithm", "starts from", "step", "resolutions", "data"),
             [_stage_row(run, stage, step if stage.name == stage_name else None) for stage in _lineage(run, stage_name)]),
      "## Figures\n", _figures(run, stage_name, step),
      "## Loading\n", _loading(run, stage_name, dtype, title),
      "## Versions\n", ", ".join(f"{name} {version}" for name, version in _versions(run).items())
      + f"; laid out as by diffusers {DIFFUSERS_VERSION}.\n"])


def _lineage(run: Run, stage_name: str) -> list[StageConfig]:
  """The stages that made the exported weights, in the order of the config: the named one and those that it, or they, took weights from."""
  found, open_names = set(), [stage_name]
  while open_names:
    name = open_names.pop()
    if name in run.stages and name not in found:
      found.add(name)
      stage = run.stages[name]
      sources = [parse_source(text) for text in (stage.start_from, *stage.frozen.values())]
      open_names += [source.name for source in sources if source.kind == "stage"]
  return [stage for stage in run.cfg.stages if stage.name in found]


def _rows(run: Run, stage_name: str, step: int | None) -> list[dict]:
  """The metrics of a stage, up to a step where one is given."""
  return [row for row in read_rows(run.workdir / stage_name / "metrics.jsonl") if step is None or row["step"] <= step]


def _stage_row(run: Run, stage: StageConfig, step: int | None) -> Sequence[Any]:
  rows = _rows(run, stage.name, step)
  resolutions = ", ".join(f"{r.base_px} px ({', '.join(map(str, r.ratios))}) x {r.batch_size}" for r in stage.resolutions)
  mixture = ", ".join(f"{part.name}/{part.split} {part.task} x {part.weight:g}" for part in stage.mixture)
  method = stage.algorithm.name + (f", LoRA of rank {stage.adapter.rank}" if stage.adapter.rank else "")
  return stage.name, method, stage.start_from, step or (rows[-1]["step"] if rows else 0), resolutions, mixture


def _figures(run: Run, stage_name: str, at: int | None) -> str:
  last: dict[str, float] = {}
  for row in _rows(run, stage_name, at):
    last |= row
  step = last.pop("step", 0)
  table = _table(("metric", "value"), [(name, f"{value:.5g}") for name, value in sorted(last.items()) if "_bin" not in name])
  text = f"Last values of stage `{stage_name}`, step {step:g}:\n\n{table}"
  path = run.workdir / f"{stage_name}/evaluation_{at}.json"
  path = path if path.is_file() else run.workdir / "evaluation.json"
  result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
  return text + (f"\n{describe(result)}\n" if result.get("stage") == stage_name and at in (None, result.get("step")) else "")


def _loading(run: Run, stage_name: str, dtype: str, title: str) -> str:
  """Both snippets draw in the type of the files: left to themselves, parts of the published pipeline take theirs and others float32."""
  (height, width), sampling = first_size(run.stages[stage_name]), run.cfg.sampling
  guidance = max(1.0, sampling.guidance)
  steps = "" if sampling.sigmas else f", num_inference_steps={sampling.num_steps}"
  return f"""With diffusers:

```python
import torch
from diffusers import QwenImage21Pipeline
pipe = QwenImage21Pipeline.from_pretrained("{title}", torch_dtype=torch.{dtype})
image = pipe("a prompt", negative_prompt=" ", true_cfg_scale={guidance:g}, height={height}, width={width}{steps}).images[0]
```

With qimg2, on all devices; pictures are [n, height, width, channels] of 8 bits:

```python
from qimg2.runtime.pretrained import Pretrained
from qimg2.runtime.sampling import Request, pretrained_defaults, sample
source = Pretrained("{title}", dtype="{dtype}")
request = Request(("a prompt",), height={height}, width={width}, guidance={guidance:g}{steps.replace("inference_", "")})
latents, pictures, prompts = sample(source, source.load, request, pretrained_defaults(source))
```
"""


def _versions(run: Run) -> dict[str, str]:
  """Versions that the run was trained with, as its config.json records them; those of this program where it has no record."""
  path = run.workdir / "config.json"
  recorded = json.loads(path.read_text(encoding="utf-8"))["versions"] if path.is_file() else {}
  return {name: recorded.get(name) or importlib.metadata.version(name) for name in PACKAGES}


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)
