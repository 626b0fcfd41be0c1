"""What `launch.evaluate --suite` does: suites on a run, on a published folder, or on pictures that something else made."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from qimg2.evaluation import Suite, Task
from qimg2.places import Place, as_absolute, find_place, is_remote, list_files
from qimg2.runtime.config import plain
from qimg2.runtime.contents import digest_of_file, digest_of_folder
from qimg2.runtime.evaluating.drawing import Painter, groups_of_sizes, learned, painter_of_run
from qimg2.runtime.evaluating.folder import Folder
from qimg2.runtime.evaluating.job import Share, Work, evaluate_into, versions, work_of_images, work_of_painter
from qimg2.runtime.evaluating.registry import SEED, make_suite
from qimg2.runtime.evaluating.summary import missing_in_words, prompt_set
from qimg2.runtime.loras import parse_lora
from qimg2.runtime.processes import from_first
from qimg2.runtime.rehearsal.drawing import Drawer, Opened
from qimg2.runtime.run import Run, load_run
from qimg2.runtime.sampling import sampling_stage
from qimg2.training import manifest
from qimg2.training.checkpoint import Checkpoints

SCORERS = ("network", "model", "pretrained", "rubrics", "rubric", "reference")  # settings that name files which score


@dataclasses.dataclass(frozen=True)
class Asked:
  """What to evaluate: the flags of `launch.evaluate`, see its `--help`. Zero or None takes the default of the run or folder."""
  suites: Mapping[str, Mapping[str, Any]]
  seeds: tuple[int, ...] = (0,)
  num_steps: int = 0
  guidance: float | None = None
  output_resolution: int = 0
  batch_size: int = 0
  offload: bool = False


def evaluate_model(out: str, drawer: Drawer, asked: Asked, share: Share = Share(), num_workers: int = 0) -> dict[str, Any] | None:
  """Draws and scores; returns the summary, None while other shares are not done. See `job.evaluate_into`.

  Raises:
    ValueError: no such run, stage, folder or suite, a suite that the stage did not learn, or a folder with another evaluation.
  """
  drawer, folder = _at_one_step(drawer), Folder(out)
  opened = drawer.open()
  sampling = _sampling(opened.defaults, asked)
  weights = functools.cache(opened.offloaded if asked.offload else opened.load)  # once, when the first chunk is drawn
  works, facts = [], {}
  for name, settings in asked.suites.items():
    suite, tasks = _tasks(name, settings, opened.source)
    painter = _painter(opened, drawer, weights, tasks, sampling, asked)
    if painter is None:
      raise ValueError(f"Suite {name} has {len(tasks[0].sources)} condition image(s) for each prompt, which {opened.where} did not learn: leave it "
                       "out.")
    works.append(work_of_painter(folder, name, suite, tasks, painter, asked.seeds))
    facts[name] = {**settings, "num_tasks": len(tasks), "prompt_set": prompt_set(tasks), "files": _scored_with(settings, suite),
                   "batch_size": painter.batch_size}
  request = {"format": 1, "model": _model(drawer, opened), "suites": facts, "seeds": list(asked.seeds), "sampling": plain(sampling),
             "output_resolution": asked.output_resolution, "versions": versions()}
  return evaluate_into(folder, request, works, share, num_workers)


def _at_one_step(drawer: Drawer) -> Drawer:
  """With the stage and the step of the checkpoint that is the newest now: a run may go on meanwhile, and all suites are to draw with one."""
  if drawer.pretrained:
    return drawer
  run = load_run(drawer.workdir)
  stage = sampling_stage(run, drawer.stage)
  step = drawer.step
  if step is None:
    step = json.loads(from_first("step", json.dumps(Checkpoints(run.workdir / stage / "checkpoints").latest_step())))
  return dataclasses.replace(drawer, stage=stage, step=step)


def evaluate_images(out: str, images: str, suites: Mapping[str, Mapping[str, Any]], share: Share = Share(), num_workers: int = 0,
                    seeds: Sequence[int] = ()) -> dict[str, Any] | None:
  """Scores pictures that something else made, by the manifest.jsonl of their folder; see `evaluate_model`. Of `seeds` each prompt should have one;
  none for all that are there.

  Raises:
    ValueError: no manifest, one that does not fit a suite, no such suite, or a folder with another evaluation.
  """
  folder, place, works, facts = Folder(out), as_absolute(find_place(images, "--images")), [], {}
  for name, settings in suites.items():
    suite, tasks = _tasks(name, settings, None)
    work = work_of_images(place, name, suite, tasks, seeds)
    for note in work.notes[:5]:
      logging.warning("Left out of %s: %s.", place, note)
    for note in missing_in_words(work.missing._asdict()):
      logging.warning("Suite %s, in %s: of %d prompts %s; figures are of what is there.", name, place, len(tasks), note)
    works.append(work)
    facts[name] = {**settings, "num_tasks": len(tasks), "prompt_set": prompt_set(tasks), "files": _scored_with(settings, suite),
                   "pictures": _digest_of_pictures(place, work)}
  request = {"format": 1, "model": {"images": os.fspath(place)}, "suites": facts, **({"seeds": list(seeds)} if seeds else {}), "versions": versions()}
  return evaluate_into(folder, request, works, share, num_workers)


def _tasks(name: str, settings: Mapping[str, Any], source: Any) -> tuple[Suite, Sequence[Task]]:
  suite, num = make_suite(name, settings, source)
  return suite, suite.tasks(num, SEED)


def _sampling(defaults: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
  """Arguments of the generator beside its size."""
  times = () if asked.num_steps and not defaults["only_sigmas"] else defaults["sigmas"]
  if times and asked.num_steps and asked.num_steps != len(times):
    raise ValueError(f"--num_steps={asked.num_steps} does not go with the {len(times)} sampling times that the folder brings: leave it out.")
  return {"num_steps": len(times) or asked.num_steps or defaults["num_steps"],
          "guidance": defaults["guidance"] if asked.guidance is None else asked.guidance, "base_times": tuple(times) or None}


def _painter(opened: Opened, drawer: Drawer, weights: Callable[[], Mapping], tasks: Sequence[Task], sampling: Mapping[str, Any],
             asked: Asked) -> Painter | None:
  """What draws the tasks; None where a run did not learn them."""
  source = opened.source
  if isinstance(source, Run):
    stage = opened.where.removeprefix("stage ")
    if not learned(source.loader(source.stages[stage]).buckets, tasks):
      return None
    return painter_of_run(source, stage, weights, tasks, sampling, asked.batch_size)
  groups = groups_of_sizes(tasks, source.tokenizer, opened.defaults["multiple"], asked.output_resolution)
  return Painter(source, weights, tasks, groups, sampling, asked.batch_size)


def _model(drawer: Drawer, opened: Opened) -> dict[str, Any]:
  """What tells a model from another one; loras, (name, scale, content), where it has some."""
  loras = [[pathlib.Path(path).name, scale, digest_of_file(pathlib.Path(path))] for path, scale in map(parse_lora, drawer.loras)]
  return _weights(drawer, opened) | ({"loras": loras} if loras else {})


def _weights(drawer: Drawer, opened: Opened) -> dict[str, Any]:
  if not drawer.pretrained:
    run, stage = opened.source, opened.where.removeprefix("stage ")
    checkpoints = run.workdir / stage / "checkpoints"
    return {"run": run.workdir.name, "stage": stage, "step": drawer.step, "average": drawer.average, "dtype": drawer.dtype,
            "weights": manifest.identity(checkpoints / str(drawer.step))}
  found = {"pretrained": pathlib.Path(drawer.pretrained).resolve().name, "files": digest_of_folder(pathlib.Path(drawer.pretrained))}
  if drawer.transformer:
    path = pathlib.Path(drawer.transformer)
    found |= {"transformer": path.name, "transformer_content": digest_of_file(path)}
  return found | {"dtype": drawer.dtype}


def _scored_with(settings: Mapping[str, Any], suite: Suite) -> dict[str, list[str]]:
  """{setting: digests of the files and folders that it names}: what they hold may change while their names stay. A reference that is a folder has a
  name of its own."""
  found = {}
  for key in SCORERS:
    text = settings.get(key, "")
    names = [text] if pathlib.Path(text).exists() else map(str.strip, re.split("[+,]", text))  # a path may have these signs
    paths = [pathlib.Path(name) for name in names if name]
    paths += [path.with_suffix(".txt") for path in paths if key == "model"]  # characters of an OCR
    digests = [digest_of_file(path) for path in paths if path.is_file()]
    digests += [digest_of_folder(path) for path in paths if path.is_dir() and key in ("network", "pretrained")]
    if key == "reference" and suite.reference is not None:
      digests = [suite.reference.name]
    if digests:
      found[key] = digests
  return found


def _digest_of_pictures(images: Place, work: Work) -> str:
  """Of which file belongs to which task and seed, and of sizes and times of the files: they must stay while they are scored."""
  found, listed = hashlib.sha256(), {}

  def list_once(folder: Place) -> None:  # one answer for a thousand files, in place of two for each
    listed[os.fspath(folder)] = ()
    listed.update((os.fspath(file.path), (file.size, file.mark)) for file in list_files(folder).values())
  if is_remote(images):
    list_once(images)
  for chunk in work.chunks:
    for task, seed in chunk:
      place = work.path(task, seed)
      path = os.fspath(place)
      if is_remote(place) and not path.startswith(f"{os.fspath(images)}/") and os.fspath(place.parent) not in listed:
        list_once(place.parent)
      found.update(repr((task, seed, path, listed.get(path) or _size_and_time(path))).encode())
  return found.hexdigest()


def _size_and_time(path: str) -> tuple[Any, ...]:
  """What tells that a file changed; nothing where this machine has none."""
  if not os.path.isfile(path):
    return ()
  stat = os.stat(path)
  return stat.st_size, stat.st_mtime_ns
