"""The rewards of a stage joined with its data: batches that carry what rewards need, truths that are there, and what scores."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
from absl import logging

from data_pipelines.buckets import Bucket
from data_pipelines.loader import Loader, read_records
from data_pipelines.records import open_split
from data_pipelines.specs import DatasetSpec
from data_pipelines.transforms import composite_on_white
from data_pipelines.truths import make_task
from qimg2.algorithms import Algorithm, Rewards, Role
from qimg2.models import qwen3_vl
from qimg2.rewards.scoring import Scorer
from qimg2.runtime.config import StageConfig
from qimg2.runtime.config.rewards import declare
from qimg2.runtime.evaluating.scoring import num_cores
from qimg2.runtime.judged import NETWORK, ROLE, StageJudge

NUM_LOOKED_AT = 32  # records of a data set whose truth is looked at before a stage begins


def make_scorer(stage: StageConfig) -> Scorer:
  """What scores the pictures of a stage with rewards, to be closed."""
  made = {name: one.make() for name, one in stage.rewards.items() if not one.make().judge}
  return Scorer(made, {name: one.timeout_s for name, one in stage.rewards.items()}, asks(stage), stage.reward_workers or max(1, num_cores() - 1))


def asks(stage: StageConfig) -> Callable[[str, Mapping[str, Any]], bool]:
  """Whether the reward of a name is asked for a task: one that counts for its category, or for none and is watched."""
  declared = declare(stage.rewards)

  def is_asked(name: str, task: Mapping[str, Any]) -> bool:
    return name in declared.gold or stage.rewards[name].weight_in(task["category"]) != 0
  return is_asked


@dataclasses.dataclass(frozen=True)
class RewardedLoader:
  """A stage's loader, made with `tasks`, whose batches have what its rewards need: "tasks" with their pictures, "category" where these have weights
  of their own, and what the judge is asked."""
  loader: Loader
  rewards: Rewards
  judge: StageJudge | None

  def iterate(self, start: int = 0) -> Generator[tuple[int, dict], None, None]:
    """As `Loader.iterate`."""
    with contextlib.closing(self.loader.iterate(start)) as batches:
      for bucket, batch in batches:
        shape = self.loader.buckets[bucket]
        asked = self.judge.arrays(batch["tasks"], (shape.height, shape.width), shape.source_sizes) if self.judge else {}
        yield bucket, with_tasks(batch, self.rewards) | asked


def with_tasks(batch: dict, rewards: Rewards) -> dict:
  """A batch with its tasks completed, see `RewardedLoader`."""
  reference = [{"reference": picture} for picture in on_paper(batch["target"])] if "target" in batch else [{}] * len(batch["tasks"])
  sources = [on_paper(source) for source in batch["sources"]]
  tasks = tuple({**task, "sources": tuple(source[row] for source in sources), **reference[row]} for row, task in enumerate(batch["tasks"]))
  category = {"category": np.array([rewards.find_category(task) for task in tasks], np.int32)} if rewards.categories else {}
  return {**batch, "tasks": tasks, **category}


def on_paper(pictures: np.ndarray) -> np.ndarray:
  """RGB [B, H, W, 3] uint8 of RGB or RGBA pictures: what rewards see of transparency is white paper, as everybody else does."""
  return pictures if pictures.shape[-1] == 3 else np.stack([composite_on_white(picture) for picture in pictures])


def added_shapes(rewards: Rewards | None, judge: StageJudge | None, bucket: Bucket) -> dict[str, np.ndarray]:
  """What `RewardedLoader` adds to a global batch of a bucket for the device, with no meaning."""
  category = {"category": np.zeros(bucket.batch_size, np.int32)} if rewards is not None and rewards.categories else {}
  return category | (judge.shapes(bucket.batch_size, (bucket.height, bucket.width), bucket.source_sizes) if judge else {})


def open_judge(stage: StageConfig, assumed: qwen3_vl.Config | None = None) -> StageJudge | None:
  """The judge of a stage, None where it has none; its weights are not read. With `assumed`, the sizes of one whose folder is not here.

  Raises:
    ValueError: its folder or a rubric is not what it should be.
  """
  asked = {name: one.make().judge for name, one in stage.rewards.items() if one.make().judge}
  try:
    here = assumed is None or any(pathlib.Path(one.pretrained).is_dir() for one in asked.values())
    return StageJudge(asked, None if here else assumed, asks(stage)) if asked else None
  except ValueError as error:
    raise ValueError(f"Stage {stage.name!r} has a judge, but {error}") from error


def with_judge(algorithm: Algorithm) -> Algorithm:
  """The algorithm with the judge's weights as one more frozen role, which nothing draws with."""
  return dataclasses.replace(algorithm, roles={**algorithm.roles, ROLE: Role(NETWORK)}, deploy=algorithm.deployed)


def check_rewards(stage: StageConfig) -> None:
  """Finds rewards that this machine cannot compute, and data sets whose records do not say what they need to know; a few of these are read.

  Raises:
    ValueError: a package or module is missing, or no record that was looked at says it. The log warns where some do not.
  """
  made, is_asked = {name: one.make() for name, one in stage.rewards.items()}, asks(stage)
  for name, reward in made.items():
    try:
      reward.check_machine()
    except ValueError as error:
      raise ValueError(f"Stage {stage.name!r} has the reward {name}, but {error}") from error
  for part in stage.mixture if made else ():
    tasks = _some_tasks(part)
    for name, reward in made.items():
      asked = [task for task in tasks if is_asked(name, task)]
      wrong = [found for task in asked if (found := _complaint(reward.check, task))]
      if wrong and len(wrong) == len(asked):
        raise ValueError(f"Stage {stage.name!r} has the reward {name}, but the data set {part.name!r} has no truth for it: of sample "
                         f"{asked[0]['sample_id']}, {wrong[0]}; take another data set, or write its records with that (docs/rewards.md).")
      if wrong:
        logging.warning("Stage %s: %d of %d records of the data set %r that were looked at have no truth for the reward %s; their pictures will be "
                        "left out. Of the first, %s.", stage.name, len(wrong), len(asked), part.name, name, wrong[0])


def _complaint(check: Callable[[Mapping[str, Any]], None], task: Mapping[str, Any]) -> str:
  try:
    check(task)
  except ValueError as error:
    return str(error)
  return ""


def _spread(places: np.ndarray, num: int) -> np.ndarray:
  """At most `num` of these places, evenly."""
  return places[np.unique(np.linspace(0, len(places) - 1, num).round().astype(np.int64))] if len(places) else places


def _some_tasks(part: DatasetSpec) -> list[dict]:
  """The tasks of a few records of a data set, from all over it, as its part of the mixture uses them."""
  records, index = open_split(part.data_dir, part.name, part.split)
  places = _spread(np.arange(len(index["sample_id"])), 100 * NUM_LOOKED_AT)
  some = _spread(places[index["source_sizes"][places].any(axis=(1, 2)) == (part.task == "ti2i")], NUM_LOOKED_AT)
  tasks, sources = [], {"sources": ("a picture",)} if part.task == "ti2i" else {}
  for record in read_records(records, some.tolist()):
    if not isinstance(record, Exception):  # the loader says what is wrong with it
      prompt = record["captions"][0].decode(errors="replace") if len(record["captions"]) else ""
      tasks.append(make_task(record, prompt, part.name, f"sample {record['sample_id']} of data set {part.name!r}") | sources)
  return tasks
