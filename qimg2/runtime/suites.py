"""The evaluation suites of the embedded data sets, and what draws and scores them: held-out prompts, pictures, clean renders to compare with.

  glyphs        is the nearest of all clean renders the prompted one, in glyph, ink and paper?
  glyph_edits   the same for edits; and is the picture nearer to what was asked than to its source?
  emoji         is the picture nearest, by pixel correlation, to the prompted emoji among all candidates?
  emoji_edits   is the edited picture nearest to what was asked, among its source and everything that the source could be turned into?

A config names suites in `config.evals`, such as {"glyphs": {"num_prompts": 200}}; the run evaluates its last stage, and `python -m launch.evaluate`
any other.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from data_pipelines.buckets import Bucket, crop_fraction, nearest_bucket
from data_pipelines.embedded import emoji, emoji_pairs, glyph_edits, glyphs
from data_pipelines.transforms import composite_on_white, fit_source, resize_crop
from qimg2.evaluation import Suite, Task, mean_scores
from qimg2.places import write_file
from qimg2.runtime import processes
from qimg2.runtime.config import PrepareConfig, plain
from qimg2.runtime.generator import Generator, Size
from qimg2.runtime.run import Run
from qimg2.runtime.sampling import sampling_weights
from qimg2.runtime.sheets import grid, save_picture
from qimg2.sharding import broadcast_from_first
from qimg2.training.checkpoint import Checkpoints, newest_step

SEED = 7
NUM_SHOWN = 48


def evaluate(run: Run, stage_name: str = "", suites: Mapping[str, tuple[Suite, int]] | None = None,
             step: int | None = None) -> dict[str, Any]:
  """{"stage", "step", "config", "suites": {name: {"num_prompts", "shares": {metric: mean}}}}: results, and of what they are.

  "config" is a digest of the run's, None for suites that are not the config's. All of it is also in evaluation.json, and the pictures are in
  evaluation.png, of the run's folder.

  Suites whose number of condition images the stage did not learn are left out, with a line in the log. Each is drawn for itself, so its figures
  do not depend on the others.

  Args: run; stage, the last trained one when empty; {name: (suite, number of prompts)} in place of those of the config; step of the checkpoint, whose
  result is in `<stage>/evaluation_<step>.json` and `.png`, None for the newest.

  Raises:
    ValueError: no suite, none that the stage learned, or no such stage.
  """
  digest, suites = (_digest(run), configured(run)) if suites is None else (None, suites)
  if not suites:
    raise ValueError(f"config.evals is empty, so there is nothing to evaluate: add a suite, one of {', '.join(SUITES)}.")
  name, weights = sampling_weights(run, stage_name, step=step)
  place = run.workdir / ("evaluation" if step is None else f"{name}/evaluation_{step}")
  step = Checkpoints(run.workdir / name / "checkpoints").latest_step() if step is None else step
  buckets, results, shown = run.loader(run.stages[name]).buckets, {}, []
  for suite_name, (suite, num) in suites.items():
    tasks = suite.tasks(num, SEED)
    if not any(len(bucket.source_sizes) == len(tasks[0].sources) for bucket in buckets):
      logging.warning("Suite %s is left out: stage %s has no batches with %d condition images.", suite_name, name, len(tasks[0].sources))
      continue
    pictures = draw(run, buckets, weights, tasks, run.stages[name].max_crop)
    scores = [suite.score(task, picture) for task, picture in zip(tasks, pictures)]
    results[suite_name] = {"num_prompts": num, "shares": mean_scores(scores)}
    shown.append([cell for parts in zip(tasks, pictures, scores) for cell in suite.show(*parts)])
  if not results:
    raise ValueError(f"Stage {name!r} learned no task of the suites {', '.join(suites)}: evaluate another stage or add a suite.")
  result = {"stage": name, "step": step, "config": digest, "suites": results}
  if processes.is_first():
    images, captions = zip(*[cell for cells in shown for cell in cells[:NUM_SHOWN // len(shown)]])
    save_picture(grid(images, 8, captions), place.with_name(f"{place.name}.png"))
    write_file(place.with_name(f"{place.name}.json"), json.dumps(result, indent=1))
  return result


def evaluation(run: Run) -> dict[str, Any]:
  """What `evaluate` gives for a run whose stages are trained: read where it was done before."""
  found = recorded_evaluation(run)
  return evaluate(run) if found is None else found


def recorded_evaluation(run: Run) -> dict[str, Any] | None:
  """What evaluation.json says where it is of the run's last generator, its newest checkpoint, and the same config, which the first process sees for
  all; else None. No checkpoint is read."""
  path, name = run.workdir / "evaluation.json", last_generator(run)
  wanted = {"stage": name, "step": newest_step(run.workdir / name / "checkpoints"), "config": _digest(run)}
  found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  return found if broadcast_from_first(np.int32({key: found.get(key) for key in wanted} == wanted)) else None


def last_generator(run: Run) -> str:
  """Name of the last stage that trains the generator, which is evaluated when all are trained; "" where there is none."""
  return next((stage.name for stage in reversed(run.cfg.stages) if stage.kind == "generator"), "")


def _digest(run: Run) -> str:
  return hashlib.sha256(json.dumps(plain(run.cfg), sort_keys=True).encode()).hexdigest()


def configured(run: Run) -> dict[str, tuple[Suite, int]]:
  """Name -> (suite, number of prompts) of the run's config."""
  made = {}
  for name, make in SUITES.items():
    if name in run.cfg.evals:
      settings = dict(run.cfg.evals[name])
      num = settings.pop("num_prompts")
      made[name] = make(run.cfg.prepare, **settings), num
  return made


def draw(run: Run, buckets: Sequence[Bucket], weights: dict, tasks: Sequence[Task], max_crop: float) -> list[np.ndarray]:
  """One picture [H, W, 3] uint8 per task, at the size of the nearest bucket of the same kind; each shape is one compiled program."""
  nearest = [_nearest(buckets, task) for task in tasks]
  images: list = [None] * len(tasks)
  for number, bucket in enumerate(buckets):
    mine = [i for i, b in enumerate(nearest) if b == number]
    if not mine:
      continue
    size = Size(bucket.height, bucket.width, bucket.num_tokens, bucket.source_sizes, min(50, len(mine)))
    generator = Generator(run, size, **run.sampler_settings())
    sources = [np.stack([_fit(tasks[i].sources[slot], size, max_crop) for i in mine]) for slot, size in enumerate(bucket.source_sizes)]
    for i, image in zip(mine, generator(weights, [tasks[i].prompt for i in mine], SEED, images=sources)):
      images[i] = image if image.shape[-1] == 3 else composite_on_white(image)
  return images


def _fit(image: np.ndarray, size: tuple[int, int], max_crop: float) -> np.ndarray:
  """A condition image as training sees it."""
  return fit_source(functools.partial(resize_crop, image), image.shape[:2], size, max_crop)


def _nearest(buckets: Sequence[Bucket], task: Task) -> int:
  """Index of the bucket nearest in aspect ratio among those with as many condition images, and of such the one that cuts least of these."""
  own = [i for i, bucket in enumerate(buckets) if len(bucket.source_sizes) == len(task.sources)]
  nearest = buckets[own[int(nearest_bucket(*task.size, tuple(buckets[i] for i in own)))]]
  same = [i for i in own if (buckets[i].height, buckets[i].width) == (nearest.height, nearest.width)]
  lost = lambda i: sum(round(float(crop_fraction(*image.shape[:2], *size)), 9) for image, size in zip(task.sources, buckets[i].source_sizes))
  return min(same, key=lost)


# In words.


def shares_of(result: dict) -> list[tuple[str, float]]:
  """(what it is, share in 0..1) of each share of a result."""
  shares = [share for suite in result["suites"].values() for share in suite["shares"].items()]
  return [(name if name.endswith("chance") else f"{name} right", share) for name, share in shares]


def counts_of(result: dict) -> str:
  """How many prompts of which suites were drawn."""
  return " and ".join(f"{suite['num_prompts']} held-out prompts of {name}" for name, suite in result["suites"].items())


def describe(result: dict) -> str:
  """One line that states the result of `evaluate`."""
  shares = ", ".join(f"{name} {share:.1%}" for name, share in shares_of(result))
  return f"Evaluation of stage {result['stage']} on {counts_of(result)}: {shares}."


# Glyphs.


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
    scores = _with_everything({**glyphs.score(picture, target), "change": _is_nearer(picture, target, source)})
    return {f"edit: {name}": value for name, value in scores.items()}
  return Suite(tasks, score, _show_glyphs("edit: "))


def _is_nearer(image: np.ndarray, target: glyphs.Attributes, source: glyphs.Attributes) -> bool:
  """Whether a picture is nearer to the clean render of the target than to that of the source: something was done."""
  far = [np.square(image.astype(float) - glyphs.render(one, *image.shape[:2])).sum() for one in (target, source)]
  return bool(far[0] < far[1])


def _with_everything(right: Mapping[str, bool]) -> dict[str, float]:
  return {name: float(value) for name, value in {**right, "everything": all(right.values())}.items()}


def _show_glyphs(prefix: str) -> Callable[[Task, np.ndarray, Mapping[str, float]], list[tuple[np.ndarray, str]]]:
  """As `qimg2.evaluation.show`, with a prefix before captions that the names of metrics have too."""
  def show(task: Task, picture: np.ndarray, scores: Mapping[str, float]) -> list[tuple[np.ndarray, str]]:
    wrong = [name.removeprefix(prefix) for name, value in scores.items() if not value and name != f"{prefix}everything"]
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


def emoji_suite(prepare: PrepareConfig, num_candidates: int) -> Suite:
  """Emoji of the prepared data set on papers that training never showed with them, among `num_candidates` of them."""
  def tasks(num: int, seed: int) -> list[Task]:
    if num > num_candidates:
      raise ValueError(f"config.evals.emoji asks {num} prompts among {num_candidates} candidates: every prompt needs its own candidate.")
    prompts = emoji.held_out_prompts(num_candidates, seed, prepare.num_examples, prepare.seed)
    candidates = tuple(character for _, character, _ in prompts)
    return [Task(text, (emoji.SIDE_PX, emoji.SIDE_PX), truth=EmojiTruth(character, paper, candidates)) for text, character, paper in prompts[:num]]

  def show(task: Task, picture: np.ndarray, scores: Mapping[str, float]) -> list[tuple[np.ndarray, str]]:
    found = task.truth.nearest(picture)
    return [(picture, task.prompt if found == task.truth.asked else f"{task.prompt} [nearest: {emoji.annotations()['en'][found][0]}]")]
  return Suite(tasks, lambda task, picture: {"emoji": float(task.truth.nearest(picture) == task.truth.asked)}, show)


def emoji_edit_suite(prepare: PrepareConfig) -> Suite:
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


# Name in config.evals -> the suite of (how data sets are prepared, its other settings).
SUITES: dict[str, Callable[..., Suite]] = {
    "glyphs": glyph_suite, "glyph_edits": glyph_edit_suite, "emoji": emoji_suite, "emoji_edits": emoji_edit_suite}
