"""Evaluation suites of text in pictures: our own prompts, LongText-Bench and CVTG-2K, read by `qimg2.evaluation.ocr`.

The OCR is ours for all three, so figures of the published benchmarks are comparable with each other here, but not with papers whose OCR was
Qwen2.5-VL-7B or PaddleOCR: say so beside them. A prompt in a script that the recogniser cannot read is left out with the reason.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qimg2.evaluation import ERROR, Figure, Suite, Task, ocr, prompts
from qimg2.evaluation.prompts import KINDS, LANGUAGES, TextPrompt
from qimg2.evaluation.text import score_text
from qimg2.evaluation.text_benchmarks import cvtg_match, longtext_recall, omnidoc_ned

RATIOS = {"words": (1, 1), "lines": (1, 1), "paragraphs": (3, 4), "slides": (16, 9)}  # width and height of a kind of our prompts
FIGURES = {
    "two-sided": Figure("two-sided"), "two-sided, all characters": Figure("matched twice", "asked and drawn"),
    "two-sided words": Figure("two-sided words"), "words found": Figure("words found", "words"), "word accuracy": Figure("word accuracy"),
    "NED": Figure("NED"), "character error rate": Figure("errors", "characters", lower_is_better=True)}
Score = Callable[[Sequence[str], Sequence[str]], Mapping[str, float]]


def text_suite(languages: str = ",".join(LANGUAGES), kinds: str = ",".join(KINDS), model: str = "", side_px: int = 1024,
               by: str = "language") -> Suite:
  """Our own prompts.

  Args: languages and kinds of `qimg2.evaluation.prompts`, separated by commas; recognisers, see `ocr.recogniser_for`;
  side of a square of a picture's area; whether categories are those of "language" or "kind".

  Raises:
    ValueError: an unknown language, kind or category, or no OCR.
  """
  if by not in ("language", "kind"):
    raise ValueError(f"The figures of the text suite are given by language or by kind, not by {by!r}.")
  chosen = prompts.written(listed(languages), listed(kinds))
  sizes = [size_of_ratio(side_px, *RATIOS[prompt.category]) for prompt in chosen]
  chosen = [prompt._replace(category=prompt.language) for prompt in chosen] if by == "language" else chosen
  return _suite(chosen, sizes, score_text, model, FIGURES)


def longtext_bench_suite(path: str, language: str = "en", model: str = "", side_px: int = 1024) -> Suite:
  """LongText-Bench in one language, from its file; figures are of its order-free recall, summed over pictures.

  Raises:
    ValueError: the file or a field of it is missing, or no OCR.
  """
  chosen = prompts.longtext_bench(path, language)
  figures = {"LongText-Bench recall": Figure("units found", "units")}
  return _suite(chosen, [(side_px, side_px)] * len(chosen), functools.partial(_longtext, language=language), model, figures)


def cvtg_suite(path: str, model: str = "", side_px: int = 1024) -> Suite:
  """CVTG-2K from its folder or one of its files; figures are of its word accuracy and closest-word NED, summed over words.

  Raises:
    ValueError: a file or a field is missing, or no OCR.
  """
  chosen = prompts.cvtg(path)
  figures = {"CVTG-2K word accuracy": Figure("words found", "words"), "CVTG-2K NED": Figure("similarity", "words")}
  return _suite(chosen, [(side_px, side_px)] * len(chosen), _cvtg, model, figures)


def listed(text: str) -> list[str]:
  """The names in a text, between commas."""
  return [part.strip() for part in text.split(",") if part.strip()]


def size_of_ratio(side_px: int, width: int, height: int) -> tuple[int, int]:
  """(height, width) in px of a ratio, multiples of 16, of the area of a square."""
  return tuple(round(side_px * (one / other) ** 0.5 / 16) * 16 for one, other in ((height, width), (width, height)))


def _suite(chosen: Sequence[TextPrompt], sizes: Sequence[tuple[int, int]], score: Score, model: str, figures: Mapping[str, Figure]) -> Suite:
  for one in ocr.recognisers(model):
    ocr.alphabet(one)  # a missing package or model is said before anything is drawn
  made = [Task(one.prompt, size, truth=one.texts, name=one.name, category=one.category) for one, size in zip(chosen, sizes)]
  return Suite(functools.partial(_some, made), functools.partial(read_and_score, score=score, model=model), figures=figures, is_slow=True)


def _some(tasks: Sequence[Task], num: int, seed: int) -> list[Task]:
  """The first of all in an order that the seed gives; all of them for 0."""
  if num > len(tasks):
    raise ValueError(f"{num} prompts are asked for, but the suite has {len(tasks)}: ask for fewer, or for more languages and kinds.")
  return [tasks[i] for i in np.random.default_rng(seed).permutation(len(tasks))[:num or None]]


def read_and_score(task: Task, picture: np.ndarray, score: Score, model: str = "") -> dict[str, Any]:
  """The score of a task's texts in a picture [H, W, 3] uint8, and beside it "expected" texts, "recognised" lines and their "confidence".

  {"error": why} for a script that the recogniser cannot read; a picture without text has its recall of 0.
  """
  recogniser, missing = ocr.recogniser_for(" ".join(task.truth), model)
  if missing:
    return {ERROR: f"The OCR cannot read the characters {missing[:10]} of the text: give a recogniser for this script, model=bundled+FILE.onnx."}
  lines = ocr.read(picture, recogniser)
  texts = [line.text for line in lines]
  return {**score(task.truth, texts), "expected": list(task.truth), "recognised": texts,
          "confidence": [round(line.confidence, 3) for line in lines]}


def document_ned(original: np.ndarray, reconstruction: np.ndarray, model: str = "") -> dict[str, Any]:
  """{"NED": OmniDoc-TokenBench's, in 0..1} of a picture [H, W, 3] uint8 of a document and its reconstruction; lines are joined by spaces.

  {"error": why} where nothing is read in the original.
  """
  read = [" ".join(line.text for line in ocr.read(picture, model)) for picture in (original, reconstruction)]
  try:
    return {"NED": omnidoc_ned(*read), "original": read[0], "reconstruction": read[1]}
  except ValueError as error:
    return {ERROR: str(error)}


def _longtext(texts: Sequence[str], lines: Sequence[str], language: str) -> dict[str, float]:
  count = longtext_recall(texts, "\n".join(lines), language)
  return {"units found": count.found, "units": count.asked}


def _cvtg(texts: Sequence[str], lines: Sequence[str]) -> dict[str, float]:
  count = cvtg_match(texts, lines)
  return {"words found": count.found, "words": count.asked, "similarity": count.similarity}
