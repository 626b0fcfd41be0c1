"""The evaluation suites of the embedded data sets: held-out prompts, and clean renders to compare with.

  glyphs        is the nearest of all clean renders the prompted one, in glyph, ink and paper?
  glyph_edits   the same for edits; and is the picture nearer to what was asked than to its source? How well is kept what should not change?
  emoji         is the picture nearest, by pixel correlation, to the prompted emoji among all candidates?
  emoji_edits   is the edited picture nearest to what was asked, among its source and everything that the source could be turned into?
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from data_pipelines.embedded import emoji, emoji_pairs, glyph_edits, glyphs
from qimg2.evaluation import Figure, Suite, Task, editing
from qimg2.rewards.glyphs import PARTS, right_parts
from qimg2.runtime.config import PrepareConfig


def glyph_suite(prepare: PrepareConfig) -> Suite:
  """Pictures of glyphs for held-out (glyph, ink, paper) triples."""
  tasks = lambda num, seed: [Task(text, (height, width), truth=asked) for text, asked, height, width in glyphs.held_out_prompts(num, seed)]
  return Suite(tasks, lambda task, picture: _with_everything(glyphs.score(picture, task.truth)), _show_glyphs(""))


def glyph_edit_suite(prepare: PrepareConfig) -> Suite:
  """Edits of glyphs whose result is a held-out triple; the truth is (attributes asked for, attributes of the source)."""
  def tasks(num: int, seed: int) -> list[Task]:
    return [Task(text, (height, width), (glyphs.render(source, height, width),), (target, source))
            for text, source, target, height, width in glyph_edits.held_out_edits(num, seed)]

  def score(task: Task, picture: np.ndarray) -> dict[str, float]:
    target, source = task.truth
    clean = [glyphs.render(one, *picture.shape[:2]) for one in (source, target)]
    scores = _with_everything(right_parts(picture, target, source))
    return {f"edit: {name}": value for name, value in {**scores, **editing.scores_where_kept(picture, *clean)}.items()}
  figures = {name: Figure(name) for name in (*PARTS, "everything")} | editing.FIGURES
  return Suite(tasks, score, _show_glyphs("edit: "), {f"edit: {name}": _prefixed(figure) for name, figure in figures.items()})


def _prefixed(figure: Figure) -> Figure:
  prefixed = lambda name: name and f"edit: {name}"
  return dataclasses.replace(figure, numerator=prefixed(figure.numerator), denominator=prefixed(figure.denominator))



def _with_everything(right: Mapping[str, bool]) -> dict[str, float]:
  return {name: float(value) for name, value in {**right, "everything": all(right.values())}.items()}


def _show_glyphs(prefix: str) -> Callable[[Task, np.ndarray, Mapping[str, float]], list[tuple[np.ndarray, str]]]:
  """As `qimg2.evaluation.show`, with a prefix before captions that the names of metrics have too."""
  def show(task: Task, picture: np.ndarray, scores: Mapping[str, float]) -> list[tuple[np.ndarray, str]]:
    wrong = [name.removeprefix(prefix) for name in (f"{prefix}{one}" for one in PARTS) if scores.get(name) == 0]
    caption = prefix + task.prompt + (f" [wrong: {', '.join(wrong)}]" if wrong else "")
    return [(source, "(source)") for source in task.sources] + [(picture, caption)]
  return show


# Emoji.


class EmojiTruth(NamedTuple):
  """What a picture of an emoji is compared with: clean renders of `candidates` on `paper`."""
  asked: str
  paper: str
  candidates: tuple[str, ...]
  source: str = ""

  def nearest(self, picture: np.ndarray) -> str:
    """The candidate nearest to a picture."""
    return self.candidates[emoji.nearest_emoji(picture, self.candidates, self.paper)]


def emoji_suite(prepare: PrepareConfig | None, num_candidates: int, num_examples: int | None = None) -> Suite:
  """Emoji of the prepared data set on papers that training never showed with them, among `num_candidates` of them.

  Args: how a run prepared the data set, None where no run draws; candidates; what training had as config.prepare.num_examples, 0 for all, where no
  run can say it: a model knows no other emoji.

  Raises:
    ValueError: nothing says which emoji were learned, or a run says something else.
  """
  if prepare is None and num_examples is None:
    raise ValueError("The suite emoji must know which emoji were learned: give num_examples, which is config.prepare.num_examples of the training, "
                     "0 for all.")
  if prepare is None:
    prepare = PrepareConfig(num_examples or None, 0)
  elif num_examples is not None and (num_examples or None) != prepare.num_examples:
    raise ValueError(f"The suite emoji has num_examples={num_examples}, but the run was trained on {prepare.num_examples or 'all'}: leave it out.")

  def tasks(num: int, seed: int) -> list[Task]:
    if num > num_candidates:
      raise ValueError(f"The suite emoji asks {num} prompts among {num_candidates} candidates: every prompt needs one, so lower num_prompts.")
    prompts = emoji.held_out_prompts(num_candidates, seed, prepare.num_examples, prepare.seed)
    candidates = tuple(character for _, character, _ in prompts)
    return [Task(text, (emoji.SIDE_PX, emoji.SIDE_PX), truth=EmojiTruth(character, paper, candidates)) for text, character, paper in prompts[:num]]

  def show(task: Task, picture: np.ndarray, scores: Mapping[str, float]) -> list[tuple[np.ndarray, str]]:
    found = task.truth.nearest(picture)
    return [(picture, task.prompt if found == task.truth.asked else f"{task.prompt} [nearest: {emoji.annotations()['en'][found][0]}]")]
  return Suite(tasks, lambda task, picture: {"emoji": float(task.truth.nearest(picture) == task.truth.asked)}, show)


def emoji_edit_suite(prepare: PrepareConfig | None) -> Suite:
  """Held-out edits of skin tone, gender and direction, and the share that chance would get right."""
  def tasks(num: int, seed: int) -> list[Task]:
    return [Task(text, (emoji.SIDE_PX, emoji.SIDE_PX), (emoji.render(source, paper),), EmojiTruth(target, paper, candidates, source))
            for text, source, target, paper, candidates in emoji_pairs.held_out_edits(num, seed)]

  def score(task: Task, picture: np.ndarray) -> dict[str, float]:
    return {"edit": float(task.truth.nearest(picture) == task.truth.asked), "edit by chance": 1 / len(task.truth.candidates)}

  def show(task: Task, picture: np.ndarray, scores: Mapping[str, float]) -> list[tuple[np.ndarray, str]]:
    return [(emoji.render(task.truth.source, task.truth.paper, picture.shape[0]), "(source)"),
            (picture, task.prompt if scores["edit"] else f"{task.prompt} [wrong]")]
  return Suite(tasks, score, show)
