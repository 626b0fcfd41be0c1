"""A vision-language model as a judge, with its weights, tokenizer and mesh: from questions with pictures to probabilities of answers.

The pure part is `qimg2.evaluation.judge`. One program is compiled per sizes of the pictures and padded length; rows of it are filled with questions
of any kind, because an answer is a token id and a number.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from data_pipelines.tokenizer import PromptTokenizer
from qimg2 import networks, sharding
from qimg2 import params as P
from qimg2.evaluation import judge
from qimg2.models import qwen3_vl
from qimg2.published.language import load_language, main_dtype, open_language
from qimg2.runtime.pretrained import COMPUTE, narrower

TOKEN_STEP, ANSWER_STEP = 128, 64  # numbers of tokens are rounded up to these, so that few programs are compiled
MAX_CHOICES = 16
MAX_ASPECT = 200  # of the published image processor


@dataclasses.dataclass(frozen=True)
class Question:
  """What the judge is asked.

  Attributes:
    user: the user's turn in parts: texts, and pictures as `Judge.fit` gives them.
    answers: for each choice, the ways to write it.
    system: the system turn, "" for none.
  """
  user: tuple[str | np.ndarray, ...]
  answers: tuple[tuple[str, ...], ...]
  system: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
  """A question in numbers: ids of the chat, pictures in order, for each choice the ids of its tokens."""
  tokens: tuple[int, ...]
  pictures: tuple[np.ndarray, ...]
  answers: tuple[tuple[int, ...], ...]


class Judge:
  """Answers questions about pictures. Weights are read at the first answer, and kept until `release`.

  Attributes:
    folder, cfg, tokenizer, specs: what was opened.
    pixels: (fewest, most) px of a picture that it sees as it is, see `fit_size`.
  """

  def __init__(self, folder: str | pathlib.Path, side_px: int = 1024, batch_size: int = 8, max_tokens: int = 8192, dtype: str | None = None,
               rules: str = "fsdp_tensor", devices: Sequence[Any] | None = None):
    """Args:
      folder: of a Qwen3-VL Instruct model, see `qimg2.published.language`.
      side_px: a picture of more than side_px² px is made smaller before the judge sees it.
      batch_size: questions at a time, rounded up to a multiple of the devices.
      max_tokens: of a question with its pictures.
      dtype: compute type, in which the weights are also kept; None as in `qimg2.runtime.pretrained.Pretrained`.
      rules: sharding rules.
      devices: over which weights and rows are spread; None for those of this process, so that each process judges for itself.

    Raises:
      ValueError: the folder holds no such model, or tokenizer and model are of different ones.
    """
    self.folder = open_language(folder, dtype or "float32")
    stored = main_dtype(self.folder) if dtype is None else None
    self.cfg = dataclasses.replace(self.folder.config, dtype=dtype or COMPUTE.get(stored, "float32"))
    self.mesh, self.rules = sharding.make_mesh({"fsdp": -1}, devices or jax.local_devices()), sharding.RULES[rules]
    self.tokenizer = PromptTokenizer.load(self.folder.processor)
    if self.tokenizer.image_token_id != self.cfg.image_token_id:
      raise ValueError(f"The tokenizer in {folder} gives pictures the id {self.tokenizer.image_token_id}, its model {self.cfg.image_token_id}: "
                       "they are of different models.")
    fewest, most = self.folder.image_pixels
    self.pixels, self._max_tokens = (min(fewest, side_px ** 2), min(most, side_px ** 2)), max_tokens
    parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    self._rows = math.ceil(batch_size / parts) * parts
    self.specs = P.with_dtype(qwen3_vl.specs(self.cfg), narrower(stored, self.cfg.dtype))
    self._weights: dict | None = None
    self._program = make_program(self.cfg, sharding.make_shard(self.mesh, self.rules))

  @property
  def weights(self) -> dict:
    """The weights on the devices."""
    if self._weights is None:
      self._weights = load_language(self.folder, self.specs, sharding.param_shardings(self.specs, self.mesh, self.rules))
    return self._weights

  def release(self) -> None:
    """Takes the weights from the devices."""
    self._weights = None

  @functools.cached_property
  def name(self) -> str:
    """Folder and weights in words: equal for equal weights and tokenizers."""
    return f"{self.folder.path.name}, weights {networks.fingerprint(self.weights)}, tokenizer {self.tokenizer.fingerprint}"

  def fit(self, picture: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """A picture [h, w, 3] uint8 as the judge sees it, resized whole (bicubic) as the published processor does, see `fit_size`.

    Args: the picture; another one at whose size it is seen.

    Raises:
      ValueError: no such array, or one too long and thin.
    """
    if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
      raise ValueError(f"A picture for the judge is uint8 [h, w, 3], but this one is {picture.dtype} {list(picture.shape)}: composite it on white.")
    height, width = fit_size(*(picture if like is None else like).shape[:2], self.cfg.vision.token_px, *self.pixels)
    if picture.shape[:2] == (height, width):
      return picture
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))

  def find_answers(self, answers: Sequence[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
    """For each choice, the ids of those ways to write it that are one token.

    Digits are among them only where every number that is written in digits is one token: where "10" begins with the token of "1", that token speaks
    for both, and digits for no choice.

    Raises:
      ValueError: a choice that is not one token in any way, a token of two choices, or more than `MAX_CHOICES`.
    """
    if len(answers) > MAX_CHOICES:
      raise ValueError(f"A question has {len(answers)} answers to choose from: {MAX_CHOICES} is the most.")
    tokens = {text: self.tokenizer.find_token(text) for ways in answers for text in ways}
    cut = [text for text, token in tokens.items() if token is None and text.isdigit()]
    found = [{tokens[text] for text in ways if tokens[text] is not None and not (cut and text.isdigit())} for ways in answers]
    if not all(found):
      whole = [ways[0] for ways in answers if all(tokens[text] is None for text in ways)]
      raise ValueError(f"The tokenizer in {self.folder.processor} cuts the answer {(whole or cut)[0]!r} into several tokens, and a judge answers "
                       "with one: choose other answers.")
    if sum(map(len, found)) != len(set().union(*found)):
      raise ValueError(f"Two of the answers {[ways[0] for ways in answers]} begin with the same token: choose others.")
    return tuple(tuple(sorted(ids)) for ids in found)

  def prepare(self, question: Question) -> Row:
    """The question in numbers.

    Raises:
      ValueError: it is longer than `max_tokens`, or as `find_answers`.
    """
    px = self.cfg.vision.token_px
    slots = [part if isinstance(part, str) else (part.shape[0] // px, part.shape[1] // px) for part in question.user]
    tokens = self.tokenizer.encode_chat(slots, question.system)
    if len(tokens) > self._max_tokens:
      raise ValueError(f"the question has {len(tokens)} tokens with its pictures, more than max_tokens {self._max_tokens}: raise it or lower side_px")
    return Row(tuple(tokens), tuple(part for part in question.user if not isinstance(part, str)), self.find_answers(question.answers))

  def ask(self, rows: Sequence[Row]) -> list[np.ndarray]:
    """Of each row the probabilities [C] float32 of its choices, which sum to 1; NaN where the judge's logits are not finite."""
    groups: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
      groups.setdefault((tuple(x.shape for x in row.pictures), _round_up(len(row.tokens), TOKEN_STEP)), []).append(number)
    answers = sorted({token for row in rows for tokens in row.answers for token in tokens})
    answers += [0] * (_round_up(len(answers), ANSWER_STEP) - len(answers))
    ids = jax.device_put(np.asarray(answers, np.int32), sharding.replicated(self.mesh))
    found: dict[int, np.ndarray] = {}
    pending: tuple[list[int], Any] = [], None  # the device works on one batch while the host makes the next

    def keep(some: list[int], result: Any) -> None:
      if some:
        p = sharding.to_host(result)
        found.update({i: p[place, :len(rows[i].answers)] for place, i in enumerate(some)})

    for (_, length), numbers in groups.items():
      for start in range(0, len(numbers), self._rows):
        some = numbers[start:start + self._rows]
        filled = [rows[i] for i in some + some[-1:] * (self._rows - len(some))]  # the last one fills what is left
        batch = sharding.put_global_batch(self._batch(filled, length, answers), self.mesh, self.rules)
        last, pending = pending, (some, self._program(self.weights, batch, ids))
        keep(*last)
    keep(*pending)
    return [found[i] for i in range(len(rows))]

  def _batch(self, rows: Sequence[Row], length: int, answers: Sequence[int]) -> dict:
    """The arguments of the program, numpy arrays with the rows first."""
    tokens = np.full((len(rows), length), self.tokenizer.pad_id, np.int32)
    choices = np.full((len(rows), len(answers)), judge.NO_CHOICE, np.int32)
    place = {token: i for i, token in reversed(list(enumerate(answers)))}  # the first place of a token: what fills up comes last
    for i, row in enumerate(rows):
      tokens[i, :len(row.tokens)] = row.tokens
      for choice, ids in enumerate(row.answers):
        choices[i, [place[token] for token in ids]] = choice
    return {"tokens": tokens, "token_count": np.array([len(row.tokens) for row in rows], np.int32), "choices": choices,
            "images": tuple(np.stack(pictures) for pictures in zip(*(row.pictures for row in rows)))}


def make_program(cfg: qwen3_vl.Config, shard: sharding.Shard) -> Any:
  """The jitted function (weights, batch, answers [n]) -> [B, `MAX_CHOICES`] of `Judge`; batch has `tokens` [B, M], `token_count` [B], `images` and
  `choices` [B, n]."""
  def judge_pictures(weights, batch, answers):
    logits = judge.answer_logits(cfg, weights, batch["tokens"], batch["token_count"], batch["images"], answers, shard)
    return judge.choice_probabilities(logits, batch["choices"], MAX_CHOICES)
  return jax.jit(judge_pictures)


def fit_size(height: int, width: int, multiple: int, min_px: int, max_px: int) -> tuple[int, int]:
  """(height, width) in px, the nearest multiples of `multiple` where their area lies between `min_px` and `max_px`, else sides of about the same
  ratio with an area just inside. The rule of the published image processor.

  Raises:
    ValueError: one side is more than 200 times the other.
  """
  if max(height, width) > MAX_ASPECT * min(height, width):
    raise ValueError(f"a picture of {width} x {height} px is too long and thin for the judge: one side is more than {MAX_ASPECT} times the other")
  sides = tuple(round(px / multiple) * multiple for px in (height, width))
  area = sides[0] * sides[1]
  if area > max_px:
    scale = math.sqrt(height * width / max_px)
    return tuple(max(multiple, math.floor(px / scale / multiple) * multiple) for px in (height, width))
  if area < min_px:
    scale = math.sqrt(min_px / (height * width))
    return tuple(math.ceil(px * scale / multiple) * multiple for px in (height, width))
  return tuple(max(multiple, px) for px in sides)


def _round_up(num: int, multiple: int) -> int:
  return max(1, math.ceil(num / multiple)) * multiple
