"""What a run keeps of its data: the tokenizer, in its own folder, and what identifies each data set, in config.json.

  workdir/
    tokenizer.json   the one that the run began with; who draws or exports reads no other, and no data
    config.json      "datasets": name -> see data_pipelines.identity

So a data set that was made anew under its old name is noticed when the run goes on, and what was trained draws the same pictures whatever becomes of
the data. Runs of earlier versions kept neither.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from data_pipelines.identity import differences, differences_from_cached, identify
from data_pipelines.records import read_meta
from data_pipelines.tokenizer import PromptTokenizer
from qimg2.places import Place
from qimg2.published.folder import PROCESSOR, open_folder
from qimg2.runtime.config import RunConfig
from qimg2.runtime.config.records import read_record
from qimg2.runtime.config.sources import DIFFUSERS

KEPT = "tokenizer.json"


def tokenizer_path(cfg: RunConfig) -> pathlib.Path:
  """Where the tokenizer that a config names is, a tokenizer.json or a folder: that of the first stage's first data set where it names none."""
  if cfg.tokenizer.startswith(DIFFUSERS):
    return pathlib.Path(cfg.tokenizer.removeprefix(DIFFUSERS)) / PROCESSOR
  return pathlib.Path(cfg.data_dir) / cfg.stages[0].mixture[0].name if cfg.tokenizer == "default" else pathlib.Path(cfg.tokenizer)


def run_tokenizer(cfg: RunConfig, workdir: Place | None, trained: bool) -> PromptTokenizer:
  """The tokenizer of a run: the one that it keeps, unless its config names another one since; that of the config where it keeps none yet.

  Args: config; folder of the run, None for one without; whether it is only read.

  Raises:
    ValueError: there is none, or it cannot be read.
  """
  record = workdir / "config.json" if workdir else None
  has_begun = record is not None and record.is_file()
  if has_begun and (workdir / KEPT).is_file() and (trained or read_record(record).tokenizer == cfg.tokenizer):
    return PromptTokenizer.from_bytes((workdir / KEPT).read_bytes(), os.fspath(workdir / KEPT))
  if trained and has_begun:
    where = tokenizer_path(cfg)
    if not where.exists():
      raise ValueError(f"The run in {workdir} is of an earlier version, which kept no tokenizer, and that of its data is gone ({where}): put the "
                       f"data set back, or its tokenizer.json to {workdir / KEPT}.")
    logging.warning("The run in %s is of an earlier version, which kept no tokenizer: it is read from %s, where it must be the one that the run was "
                    "trained with.", workdir, where)
  if cfg.tokenizer.startswith(DIFFUSERS):
    open_folder(cfg.tokenizer.removeprefix(DIFFUSERS))  # which says what is wrong with it
  return PromptTokenizer.load(tokenizer_path(cfg))


def identify_data(cfg: RunConfig) -> dict[str, Any]:
  """{name: what identifies it} of all data sets of a config.

  Raises:
    ValueError: one is not there.
  """
  folders = {part.name: part.data_dir for stage in cfg.stages for part in stage.mixture}
  return {name: identify(data_dir, name) for name, data_dir in sorted(folders.items())}


def data_changes(cfg: RunConfig, kept: PromptTokenizer, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
  """Yields a phrase for each data set that is not what the run began with, for each latent cache that is not of the data set of that name, and for a
  tokenizer that the config names by its path.

  Args: config; the tokenizer that the run keeps; what `identify_data` said when the run began, and says now.
  """
  for name in now:
    found = differences(before[name], now[name]) if name in before else ""
    if found:
      yield f"data set {name!r} has {found}"
    meta = read_meta(os.path.join(cfg.data_dir, name))
    found = differences_from_cached(cfg.data_dir, meta["request"]) if "cache" in meta else ""
    if found:
      yield f"data set {name!r} holds latents of data set {meta['request']['dataset']!r} as it was when they were cached, and this has {found} now"
  if cfg.tokenizer != "default" and PromptTokenizer.load(tokenizer_path(cfg)).fingerprint != kept.fingerprint:
    yield f"{tokenizer_path(cfg)} is another tokenizer than the run keeps"
