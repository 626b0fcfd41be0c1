"""The evaluation suite of spelling: words that training never drew, told without OCR.

A letter is right if the picture is nearer to the word that was asked for than to any with another letter in its place, or none, all set in the same
typeface and colours (`data_pipelines.text_rendering.letters`); a word is right if all of its letters are. By chance a letter is right in one case of
the alphabet's letters and one more, but for words of one letter.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.records import RENDERED, read_meta
from qimg2.evaluation import Figure, Suite, Task

FIGURES = {"words right": Figure("words"), "letters right": Figure("letters right", "letters"), "letters right, chance": Figure("chance", "letters")}


def words_suite(folder: str) -> Suite:
  """Words of the letters kind, as many as are asked for; categories are numbers of letters.

  Args: the folder of a data set of rendered text, which says of how many letters words are, in which typefaces, and how large.

  Raises:
    ValueError: it is none, or one without the letters kind.
  """
  meta = read_meta(folder)
  if "letters" not in meta.get(RENDERED, {}).get("settings", {}).get("kinds", {}):
    raise ValueError(f"{folder} has no words that are spelt: prepare it with --dataset=rendered_text --config=configs/rendered_text.py:word.")
  found = functools.cache(lambda: _opened(folder))  # not before it is needed: fonts take a second to be found
  return Suite(lambda num, seed: _tasks(found(), num, seed), lambda task, picture: _score(found(), task, picture), show, FIGURES)


def _opened(folder: str) -> Any:
  """The page on which words are set."""
  from data_pipelines.text_rendering import stored  # with a shaper and dictionaries, which no other suite needs
  meta = read_meta(folder)
  num_slots = 1 + meta[RENDERED].get("edits", {}).get("validation", 0)
  return stored.open_source(os.fspath(folder), "validation", meta, num_slots).page(0)


def _tasks(page: Any, num: int, seed: int) -> list[Task]:
  from data_pipelines.text_rendering import letters
  tasks = []
  for number in range(num):
    rng = np.random.default_rng((seed, number))
    word = letters.draw_word(rng, page, held_out=True)
    tasks.append(Task(letters.say(rng, word), (page.height, page.width), truth=word, name=f"{number:05d}", category=f"{len(word.text)} letters"))
  return tasks


def _score(page: Any, task: Task, picture: np.ndarray) -> dict[str, Any]:
  from data_pipelines.text_rendering import letters
  right = letters.spelt(picture, task.truth, page.typefaces, page)
  return {"words": float(all(right)), "letters right": sum(right), "letters": len(right), "chance": len(right) / (len(page.settings.alphabet) + 1),
          "expected": task.truth.text, "right": "".join(one if is_right else "·" for one, is_right in zip(task.truth.text, right))}


def show(task: Task, picture: np.ndarray, scores: Mapping[str, Any]) -> list[tuple[np.ndarray, str]]:
  """The picture with its prompt, and which letters are right where not all are."""
  return [(picture, task.prompt + ("" if scores["words"] else f" [right: {scores['right']}]"))]
