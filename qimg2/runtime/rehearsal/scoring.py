"""How each evaluation suite scores, for a rehearsal: on the devices by which program, or on the host at which rate.

The rate of a suite on the host is measured on the machine that rehearses: its own tasks with pictures that take it as long as real ones do. So it is
that of this machine's cores, with one thread and all of a core; cores of the machine at the devices may be others.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from qimg2.evaluation import Suite, Task, text_pages, text_rendering
from qimg2.runtime.config.suites import check_settings
from qimg2.runtime.evaluating.registry import SEED, make_suite

NUM_MEASURED = 4  # pictures, after one that loads what scores


@dataclasses.dataclass(frozen=True)
class Scoring:
  """What scores the pictures of a suite.

  Attributes:
    by: "judge", "vision" (the encoder's tower alone), "ocr" or "pixels".
    num_sources: condition images of a prompt.
    num_seen: pictures that a question to the judge shows.
    num_questions: to the judge about a picture; 0 for as many as are wanted.
  """
  by: str
  num_sources: int = 0
  num_seen: int = 1
  num_questions: int = 0

  @property
  def on_host(self) -> bool:
    """Whether cores of the host score."""
    return self.by in ("ocr", "pixels")


SCORINGS = {
    "glyphs": Scoring("pixels"), "glyph_edits": Scoring("pixels", 1), "emoji": Scoring("pixels"), "emoji_edits": Scoring("pixels", 1),
    "text": Scoring("ocr"), "text_edits": Scoring("ocr", 1), "longtext_bench": Scoring("ocr"), "cvtg": Scoring("ocr"),
    "fidelity": Scoring("vision"), "judge": Scoring("judge"), "tifa": Scoring("judge"), "pairwise": Scoring("judge", 0, 2, 2)}

NOT_REHEARSED = ("words",)  # of a prepared data set whose pictures are small


def host_rate(name: str, side_px: int) -> float:
  """Pictures that one core scores in a second with a suite that scores on the host; of the published sets of texts with our own texts.

  Raises:
    ValueError: what the suite needs is not there, such as a font.
  """
  suite, tasks, pictures = _samples(name, side_px)
  suite.score(tasks[0], pictures[0])
  begin = time.process_time()
  for task, picture in zip(tasks[1:], pictures[1:]):
    suite.score(task, picture)
  return (len(tasks) - 1) / max(time.process_time() - begin, 1e-9)


def _samples(name: str, side_px: int) -> tuple[Suite, Sequence[Task], list[np.ndarray]]:
  """(suite, tasks, pictures) that score as slowly as what a model draws: text set in type, or noise where no text is read."""
  settings = {"text_edits": {"side_px": side_px}, "emoji": {"num_examples": 0}}.get(name, {})
  if SCORINGS[name].by == "ocr" and name != "text_edits":
    name, settings = "text", {"languages": "en", "side_px": side_px}
  suite, _ = make_suite(name, check_settings(name, settings, "--suite"))
  tasks = suite.tasks(1 + NUM_MEASURED, SEED)
  if name == "text":
    return suite, tasks, [text_rendering.render(task.truth, *task.size) for task in tasks]
  if name == "text_edits":
    return suite, tasks, [text_pages.render(task.truth, [task.truth.target], *task.size)[0] for task in tasks]
  return suite, tasks, [np.random.default_rng(SEED).integers(0, 256, (*task.size, 3), dtype=np.uint8) for task in tasks]
