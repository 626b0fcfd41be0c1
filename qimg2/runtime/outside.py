"""What a stage reads from outside its run at each start, and what computes with it: frozen weights, the judge's folder, and rewards of the user's.

All of it may change while the run is stopped. What a stage began with is in its checkpoints, as digests (`qimg2.runtime.contents`), and a start that
finds something else is refused. What is read once, where a stage begins, such as the weights that it trains, may change or go.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from qimg2.algorithms.adapter import BASE
from qimg2.published.folder import COMPONENTS
from qimg2.runtime.config import StageConfig
from qimg2.runtime.config.sources import Source, parse_source
from qimg2.runtime.contents import digest_of_file, digest_of_model
from qimg2.training import manifest
from qimg2.training.changes import check_frozen, saved_description
from qimg2.training.checkpoint import Checkpoints, newest_step

LANGUAGE = "language"  # source of the judge's weights: the folder that its rewards name


class OutsideWeights:
  """What `qimg2.runtime.weights.StageWeights` knows of what is read from outside a run; see there for its attributes."""

  def read_outside(self, stage: StageConfig, intact: bool = True) -> dict[str, dict[str, Any]]:
    """{"frozen_steps": see there, "contents": see there} of a stage, as its checkpoints keep them."""
    steps = self.frozen_steps(stage, intact)
    return {"frozen_steps": steps, "contents": self.contents(stage, steps)}

  def frozen_steps(self, stage: StageConfig, intact: bool = True) -> dict[str, tuple[str, int]]:
    """{frozen role: (folder, newest intact step)} of those that are read from a stage of another run, which may train on meanwhile. Where it need not
    be `intact`, no byte of a checkpoint is read."""
    sources = {role: self._frozen_source(stage, role) for role in self.algorithm(stage).frozen}
    sources |= {role: list(self.adapter_chain(source))[-1] for role, source in sources.items() if self._is_base(stage, role)}
    folders = {role: self._folder(source) / "checkpoints" for role, source in sources.items() if source.kind == "folder"}
    newest = lambda folder: Checkpoints(folder).latest_step() if intact else newest_step(folder)
    return {role: (str(folder.parent), newest(folder)) for role, folder in folders.items() if folder.is_dir()}

  def contents(self, stage: StageConfig, steps: Mapping[str, tuple[str, int]]) -> dict[str, tuple[str, str]]:
    """{frozen role or "reward NAME": (places, digest of what they hold)} of all that a stage reads at each start from outside this run: published
    folders, files of a generator or a LoRA, the judge's folder, stages and weights of other runs; and of rewards' own files. No weight is read.

    Args: stage; its `frozen_steps`.
    """
    read = {role: [self._content(source, role, stage, steps) for source in self._all_sources(stage, role)] for role in self.algorithm(stage).frozen}
    for name, one in stage.rewards.items():
      read[f"reward {name}"] = [(path, digest_of_file(pathlib.Path(path))) for path in one.make().files() if pathlib.Path(path).is_file()]
    known = {what: [part for part in parts if part] for what, parts in read.items()}
    return {what: tuple(" and ".join(column) for column in zip(*parts)) for what, parts in known.items() if parts}

  def _all_sources(self, stage: StageConfig, role: str) -> list[Source]:
    """The sources of a frozen role: of a generator with an adapter, both."""
    source = self._frozen_source(stage, role)
    if BASE not in (role, self.algorithm(stage).roles[role].start):
      return [source]
    *_, root = self.adapter_chain(source)
    base = dataclasses.replace(root, lora="")  # an adapter that began as a LoRA's holds it
    return [base] if self._is_base(stage, role) else [source] if root == source else [source, base]

  def _content(self, source: Source, role: str, stage: StageConfig, steps: Mapping[str, tuple[str, int]]) -> tuple[str, str] | None:
    """(place, digest) of a source; None where it belongs to this run, or is not there."""
    network = self.algorithm(stage).roles[role].network
    if source.kind == LANGUAGE:
      folders = self.judge(stage).folders
      return (os.fspath(folders[0]), digest_of_model(folders)) if all(folder.is_dir() for folder in folders) else None
    if source.kind == "diffusers":
      folder, own = pathlib.Path(source.name) / COMPONENTS[network].folder, network == "mmdit"
      files = [pathlib.Path(path) for path in (source.transformer, source.lora) if path and own]
      if not folder.is_dir() or not all(path.is_file() for path in files):
        return None
      digests = [digest_of_file(path) for path in files] + ([] if source.transformer and own else [digest_of_model([folder])])
      return " and ".join(map(os.fspath, [*files, folder])), " ".join(digests)
    if source.kind != "folder":
      return None
    folder = self._folder(source)
    begun, step = steps.get(role, ("", None))
    step = step if begun == str(folder) else newest_step(folder / "checkpoints")
    place = folder if (folder / "_METADATA").is_file() else folder / "checkpoints" / str(step)
    return os.fspath(place), manifest.identity(place)

  def check_others(self, stage: StageConfig, allow_change: bool = False) -> None:
    """Looks at the stages of other runs from which the weights of a stage come: whether they hold any, and, unless a change is allowed, whether
    all that it reads at each start is what it began with. No weight is read.

    Raises:
      ValueError: a folder without weights, or what has changed.
    """
    own = self.workdir / stage.name / "checkpoints"
    begun, sources = newest_step(own), [self._frozen_source(stage, role) for role in self.algorithm(stage).frozen]
    for source in sources if begun is not None else [*sources, parse_source(stage.start_from)]:
      folder = self._folder(source) if source.kind == "folder" else None
      if folder is not None and folder.is_dir() and not (folder / "_METADATA").is_file() and newest_step(folder / "checkpoints") is None:
        raise self._no_checkpoint(source)
    if begun is not None and not allow_change:
      check_frozen(stage.name, self.read_outside(stage, intact=False), saved_description(own / str(begun)))
