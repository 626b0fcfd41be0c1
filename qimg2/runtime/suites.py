"""Automatic checks: prompts whose right answer is known are drawn, and the pictures are compared with clean renders.

  glyphs   200 held-out (glyph, ink, paper) triples: is the nearest of all clean renders the prompted one, in glyph, ink and paper? And the
           same for 100 held-out edits, where the stage learns them, and whether the picture is nearer to what was asked than to its source.
  emoji    is the picture nearest, by pixel correlation, to the prompted emoji among 100 candidates? And is an edited one nearest to what was
           asked, among its source and everything that the source could be turned into?

  python -m launch.check --workdir=runs/quickstart
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.buckets import Bucket, nearest_bucket
from data_pipelines.embedded import emoji, emoji_pairs, glyph_edits, glyphs
from data_pipelines.transforms import composite_on_white, resize_crop
from qimg2.runtime import processes
from qimg2.runtime.generator import Generator, Size
from qimg2.runtime.run import Run
from qimg2.runtime.sampling import sampling_weights
from qimg2.runtime.sheets import grid, save_png

SEED = 7
NUM_SHOWN = 48


def check(run: Run, stage_name: str = "") -> dict:
  """{"stage", "check", "num_prompts", a share in 0..1 per question}; also written to check.json and check.png in the run's folder.

  Raises:
    ValueError: the config names no check.
  """
  if run.cfg.check.name not in CHECKS:
    raise ValueError(f"config.check.name is {run.cfg.check.name!r}, so there is nothing to check: choose one of {', '.join(CHECKS)}.")
  name, weights = sampling_weights(run, stage_name)
  shares, images, captions = CHECKS[run.cfg.check.name](run, name, weights)
  result = {"stage": name, "check": run.cfg.check.name, "num_prompts": run.cfg.check.num_prompts, **shares}
  if processes.is_first():
    (run.workdir / "check.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    save_png(grid(images[:NUM_SHOWN], 8, captions[:NUM_SHOWN]), run.workdir / "check.png")
  return result


def shares_of(result: dict) -> list[tuple[str, float]]:
  """(what it is, share in 0..1) of each share of a result."""
  return [(name if name.endswith("chance") else f"{name} right", share) for name, share in result.items() if isinstance(share, float)]


def describe(result: dict) -> str:
  """One line that states a check's result."""
  shares = ", ".join(f"{name} {share:.1%}" for name, share in shares_of(result))
  return f"Check of stage {result['stage']} on {counts_of(result)} ({result['check']}): {shares}."


def counts_of(result: dict) -> str:
  """How much was checked, in words."""
  return f"{result['num_prompts']} held-out prompts" + (f" and {result['num_edits']} held-out edits" if "num_edits" in result else "")


@dataclasses.dataclass(frozen=True)
class Task:
  """One picture to draw: a prompt, the canvas in px, and the condition images [h, w, 3] uint8."""
  prompt: str
  height: int
  width: int
  sources: tuple[np.ndarray, ...] = ()


def draw(run: Run, stage_name: str, weights: dict, tasks: Sequence[Task]) -> list[np.ndarray]:
  """One picture [H, W, 3] uint8 per task; each shape is one compiled program. Sizes are those of the stage's nearest bucket of the same kind."""
  buckets = run.loader(run.stages[stage_name]).buckets
  nearest = [_nearest(buckets, task) for task in tasks]
  images: list = [None] * len(tasks)
  for number, bucket in enumerate(buckets):
    mine = [i for i, b in enumerate(nearest) if b == number]
    if not mine:
      continue
    size = Size(bucket.height, bucket.width, bucket.num_tokens, bucket.source_sizes, min(50, len(mine)))
    generator = Generator(run, size, **run.sampler_settings())
    sources = [np.stack([resize_crop(tasks[i].sources[slot], *shape) for i in mine]) for slot, shape in enumerate(bucket.source_sizes)]
    for i, image in zip(mine, generator(weights, [tasks[i].prompt for i in mine], SEED, images=sources)):
      images[i] = image if image.shape[-1] == 3 else composite_on_white(image)
  return images


def _nearest(buckets: Sequence[Bucket], task: Task) -> int:
  """Index of the bucket nearest in aspect ratio among those with as many condition images."""
  own = [i for i, bucket in enumerate(buckets) if len(bucket.source_sizes) == len(task.sources)]
  return own[int(nearest_bucket(task.height, task.width, tuple(buckets[i] for i in own)))]


def check_glyphs(run: Run, stage_name: str, weights: dict) -> tuple[dict, list[np.ndarray], list[str]]:
  """(shares right of glyph, ink, paper and everything, and of edits where the stage learns them; pictures, captions)."""
  num, tasks = run.cfg.check.num_prompts, {part.task for part in run.stages[stage_name].mixture}
  prompts = glyphs.held_out_prompts(num, SEED) if "t2i" in tasks else []
  images = draw(run, stage_name, weights, [Task(text, height, width) for text, _, height, width in prompts])
  shares, captions = _score(images, [attributes for _, attributes, _, _ in prompts], [text for text, *_ in prompts], "")
  if "ti2i" not in tasks:
    return shares, images, captions
  edits = glyph_edits.held_out_edits(num // 2, SEED)
  edited = draw(run, stage_name, weights, [Task(text, h, w, (glyphs.render(source, h, w),)) for text, source, _, h, w in edits])
  moved = [_is_nearer(image, target, source) for image, (_, source, target, _, _) in zip(edited, edits)]
  more, texts = _score(edited, [target for _, _, target, _, _ in edits], [text for text, *_ in edits], "edit: ", {"change": moved})
  pairs = [image for (_, source, _, h, w), image in zip(edits, edited) for image in (glyphs.render(source, h, w), image)]
  texts = [caption for text in texts for caption in ("(source)", text)]
  return {**shares, **more, "num_edits": len(edits)}, images[:NUM_SHOWN // 2] + pairs, captions[:NUM_SHOWN // 2] + texts


def _is_nearer(image: np.ndarray, target: glyphs.Attributes, source: glyphs.Attributes) -> bool:
  """Whether a picture is nearer to the clean render of the target than to that of the source: something was done."""
  far = [np.square(image.astype(float) - glyphs.render(one, *image.shape[:2])).sum() for one in (target, source)]
  return bool(far[0] < far[1])


def _score(images: list[np.ndarray], asked: list[glyphs.Attributes], texts: list[str], prefix: str,
           more: Mapping[str, Sequence[bool]] = {}) -> tuple[dict, list[str]]:
  """(share right of each attribute, of the questions in `more`, and of everything; captions that name what is wrong)."""
  if not images:
    return {}, []
  scores = [glyphs.score(image, attributes) | {name: right[i] for name, right in more.items()}
            for i, (image, attributes) in enumerate(zip(images, asked))]
  shares = {prefix + name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
  shares[f"{prefix}everything"] = float(np.mean([all(score.values()) for score in scores]))
  marks = ["" if all(score.values()) else " [wrong: " + ", ".join(k for k, right in score.items() if not right) + "]" for score in scores]
  return shares, [prefix + text + mark for text, mark in zip(texts, marks)]


def check_emoji(run: Run, stage_name: str, weights: dict) -> tuple[dict, list[np.ndarray], list[str]]:
  """(share of pictures nearest to the prompted emoji among `num_candidates`, pictures, captions).

  Raises:
    ValueError: more prompts than candidates.
  """
  num, num_candidates = run.cfg.check.num_prompts, run.cfg.check.num_candidates
  if num > num_candidates:
    raise ValueError(f"config.check asks {num} prompts among {num_candidates} candidates: every prompt needs its own candidate.")
  prompts = emoji.held_out_prompts(num_candidates, SEED, run.cfg.prepare.num_examples, run.cfg.prepare.seed)
  candidates = tuple(character for _, character, _ in prompts)
  images = draw(run, stage_name, weights, [Task(caption, emoji.SIDE_PX, emoji.SIDE_PX) for caption, _, _ in prompts[:num]])
  found = [emoji.nearest_emoji(image, candidates, paper) for image, (_, _, paper) in zip(images, prompts)]
  marks = ["" if place == right else f" [nearest: {prompts[place][0].rpartition(', on ')[0]}]" for right, place in enumerate(found)]
  shares, captions = {"emoji": float(np.mean(np.equal(found, np.arange(num))))}, [prompt[0] + mark for prompt, mark in zip(prompts, marks)]
  if "ti2i" not in {part.task for part in run.stages[stage_name].mixture}:
    return shares, images, captions
  more, pairs, texts = _check_emoji_edits(run, stage_name, weights, num)
  return {**shares, **more}, images[:NUM_SHOWN // 2] + pairs, captions[:NUM_SHOWN // 2] + texts


def _check_emoji_edits(run: Run, stage_name: str, weights: dict, num: int) -> tuple[dict, list[np.ndarray], list[str]]:
  """(share of edits nearest to the target among the source and all its variants, and chance; sources and edits, captions)."""
  edits = emoji_pairs.held_out_edits(num, SEED)
  side = emoji.SIDE_PX
  edited = draw(run, stage_name, weights, [Task(text, side, side, (emoji.render(source, paper),)) for text, source, _, paper, _ in edits])
  right = [others[emoji.nearest_emoji(image, others, paper)] == target for image, (_, _, target, paper, others) in zip(edited, edits)]
  shares = {"edit": float(np.mean(right)), "edit by chance": float(np.mean([1 / len(others) for *_, others in edits])), "num_edits": num}
  pairs = [image for (_, source, _, paper, _), image in zip(edits, edited) for image in (emoji.render(source, paper, image.shape[0]), image)]
  return shares, pairs, [caption for (text, *_), good in zip(edits, right) for caption in ("(source)", text if good else f"{text} [wrong]")]


CHECKS = {"glyphs": check_glyphs, "emoji": check_emoji}
