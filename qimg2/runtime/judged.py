"""The judges of a stage, a frozen role with one set of weights: what they are asked about the rows of a batch, and their scores on the device.

The host writes the questions, without pictures, because it has the prompts; they are arrays of a batch, `judge_NAME_tokens` [B, M] and
`judge_NAME_count` [B], 0 where none is asked: it is too long, or the reward counts nothing in the prompt's category. The device puts the pictures in.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qimg2 import params as P
from qimg2.evaluation import judge as pure
from qimg2.evaluation.rubrics import PICTURES, find_rubric
from qimg2.models import qwen3_vl
from qimg2.networks import on_white
from qimg2.published.language import load_language
from qimg2.rewards import vlm
from qimg2.runtime.judge import Judge, Question, fit_size
from qimg2.sharding import Shard

PUBLISHED_PIXELS = (256 ** 2, 4096 ** 2)  # (fewest, most) of Qwen3-VL's published processors
NETWORK, ROLE = "judge/qwen3_vl", "judge"
Size = tuple[int, int]  # (height, width) in px


@dataclasses.dataclass(frozen=True)
class AssumedJudge:
  """A judge whose folder is not on this machine, of which a rehearsal needs sizes alone. Attributes as of `qimg2.runtime.judge.Judge`."""
  cfg: qwen3_vl.Config
  side_px: int

  @property
  def pixels(self) -> tuple[int, int]:
    """(fewest, most) px of a picture that it sees as it is; those of the published processor."""
    return tuple(min(bound, self.side_px ** 2) for bound in PUBLISHED_PIXELS)

  @property
  def specs(self) -> dict:
    """The declared weights, in the type that computes."""
    return P.with_dtype(qwen3_vl.specs(self.cfg), self.cfg.dtype)

  def find_answers(self, answers: Sequence[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
    """A token for each choice, whichever."""
    return tuple((number,) for number in range(len(answers)))


class JudgedReward:
  """One reward of the judge: a rubric, for pictures of any size."""

  def __init__(self, name: str, settings: vlm.Judge, assumed: qwen3_vl.Config | None = None):
    """Args: of the reward; what it is asked; sizes of a judge without a folder, for a rehearsal.

    Raises:
      ValueError: as `Judge`, or a rubric whose answers are no tokens of the judge.
    """
    if assumed is not None and assumed.vision is None:
      raise ValueError(f"its folder {settings.pretrained} is not here, and config.encoder, whose sizes are assumed for it, sees no pictures.")
    read = lambda: Judge(settings.pretrained, settings.side_px, max_tokens=sys.maxsize, devices=jax.local_devices()[:1])  # but no weights
    self.judge = read() if assumed is None else AssumedJudge(assumed, settings.side_px)
    self._name, self._rubric, self._num_tokens = name, find_rubric(settings.rubric), settings.num_tokens
    self._choices = tuple((answer,) for answer in self._rubric.answers)
    self._answers = tuple(ids[0] for ids in self.judge.find_answers(self._choices))

  def arrays(self, tasks: Sequence[Mapping[str, Any] | None], size: Size, sources: Sequence[Size]) -> dict[str, np.ndarray]:
    """The questions about rows whose pictures have this size, and whose condition images have these; None for a row that it is not asked about."""
    pictures, length = self._pictures(size, sources), self._length(size, sources)
    tokens, count = np.full((len(tasks), length), self.judge.tokenizer.pad_id, np.int32), np.zeros(len(tasks), np.int32)
    for row, task in ((row, task) for row, task in enumerate(tasks) if task is not None):
      ids = self.judge.prepare(Question(self._rubric.fill({"prompt": task["prompt"]}, pictures), self._choices, self._rubric.system)).tokens
      if len(ids) > length:
        logging.warning("The judge of the reward %s is not asked about sample %s: rubric and prompt have %d tokens more than num_tokens=%d.",
                        self._name, task.get("sample_id", "unknown"), len(ids) - length, self._num_tokens)
        continue
      tokens[row, :len(ids)], count[row] = ids, len(ids)
    return {f"judge_{self._name}_tokens": tokens, f"judge_{self._name}_count": count}

  def shapes(self, num_rows: int, size: Size, sources: Sequence[Size]) -> dict[str, np.ndarray]:
    """What `arrays` gives, with no meaning."""
    return {f"judge_{self._name}_tokens": np.zeros((num_rows, self._length(size, sources)), np.int32),
            f"judge_{self._name}_count": np.zeros(num_rows, np.int32)}

  def score(self, params: dict, samples: dict, batch: dict, shard: Shard) -> jax.Array:
    """[B] float32: the expected score of samples["pictures"], NaN where the question was too long; inside jit."""
    pictures = samples["pictures"]
    repeat = lambda x: jnp.repeat(x, pictures.shape[0] // x.shape[0], axis=0)
    size = lambda x: tuple(x.shape[1:3])
    sources = batch.get("sources", ())
    like = size(sources[0]) if sources else size(pictures)
    seen = {"picture": [self._resized(pictures, like)], "sources": [self._resized(repeat(source), size(source)) for source in sources]}
    images = [image for mark in self._rubric.marks if mark in PICTURES for image in seen[mark]]
    tokens, count = (repeat(batch[f"judge_{self._name}_{part}"]) for part in ("tokens", "count"))
    values = jnp.asarray(self._rubric.values, jnp.float32)
    found = pure.score(self.judge.cfg, params, tokens, jnp.maximum(count, 1), images, jnp.asarray(self._answers, jnp.int32), values, shard)
    return jnp.where(count > 0, found, jnp.nan)

  def _fit(self, size: Size) -> Size:
    return fit_size(*size, self.judge.cfg.vision.token_px, *self.judge.pixels)

  def _pictures(self, size: Size, sources: Sequence[Size]) -> dict[str, list[np.ndarray]]:
    """Stand-ins of what each mark of the rubric shows, at the size that the judge sees it; an edited picture is seen like its first source."""
    blank = lambda one: np.broadcast_to(np.uint8(0), (*self._fit(one), 3))
    return {"picture": [blank(sources[0] if sources else size)], "sources": [blank(one) for one in sources]}

  def _length(self, size: Size, sources: Sequence[Size]) -> int:
    """M: `num_tokens`, and a token for each slot of the pictures that the rubric shows."""
    shown = [picture for mark in self._rubric.marks if mark in PICTURES for picture in self._pictures(size, sources)[mark]]
    return self._num_tokens + sum(x.shape[0] * x.shape[1] for x in shown) // self.judge.cfg.vision.token_px ** 2

  def _resized(self, pictures: jax.Array, like: Size) -> jax.Array:
    """Pictures [B, H, W, C] uint8 as the judge sees them, of a picture's size, of RGBA on white."""
    return resize(on_white(pictures), self._fit(like))


def resize(pictures: jax.Array, size: Size) -> jax.Array:
  """Pictures [B, H, W, C] uint8 at another size, by bicubic interpolation inside jit: what `Judge.fit` gives on the host, to a level of 255. As
  there, rows are resized first, and levels rounded between."""
  for height, width in ((pictures.shape[1], size[1]), size):
    if pictures.shape[1:3] != (height, width):
      resized = jax.image.resize(pictures.astype(jnp.float32), (pictures.shape[0], height, width, pictures.shape[3]), "cubic")
      pictures = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
  return pictures


class StageJudge:
  """All rewards of a stage that the judge gives."""

  def __init__(self, settings: Mapping[str, vlm.Judge], assumed: qwen3_vl.Config | None = None,
               is_asked: Callable[[str, Mapping[str, Any]], bool] = lambda name, task: True):
    """Args: name -> what is asked, at least one; as in `JudgedReward`; whether the reward of a name is asked for a task.

    Raises:
      ValueError: two folders, or as `JudgedReward`.
    """
    folders = sorted({one.pretrained for one in settings.values()})
    if len(folders) > 1:
      raise ValueError(f"the rewards {', '.join(settings)} have the judges {' and '.join(folders)}: a stage has one judge, so name one folder.")
    self.rewards = {name: JudgedReward(name, one, assumed) for name, one in settings.items()}
    self._is_asked = is_asked
    self._first = next(iter(self.rewards.values())).judge
    self.specs = self._first.specs

  @property
  def folders(self) -> tuple[pathlib.Path, ...]:
    """Those of the weights and of the tokenizer, which may be one."""
    return tuple(dict.fromkeys((self._first.folder.weights, self._first.folder.processor)))

  def load(self, shardings: dict) -> dict:
    """The weights on the devices."""
    return load_language(self._first.folder, self.specs, shardings)

  def arrays(self, tasks: Sequence[Mapping[str, Any]], size: Size, sources: Sequence[Size]) -> dict[str, np.ndarray]:
    """What the judge is asked about the rows of a batch."""
    asked = lambda name: [task if self._is_asked(name, task) else None for task in tasks]
    return {key: x for name, one in self.rewards.items() for key, x in one.arrays(asked(name), size, sources).items()}

  def shapes(self, num_rows: int, size: Size, sources: Sequence[Size]) -> dict[str, np.ndarray]:
    """What `arrays` gives, with no meaning."""
    return {key: x for one in self.rewards.values() for key, x in one.shapes(num_rows, size, sources).items()}

  def score(self, params: dict, nets: Any, samples: dict, batch: dict) -> dict[str, jax.Array]:
    """{name: [B] float32}, see `qimg2.algorithms.Rollout.judge`."""
    return {name: one.score(params[ROLE], samples, batch, nets.shard) for name, one in self.rewards.items()}
