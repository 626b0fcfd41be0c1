"""Automatic checks: prompts whose right answer is known are drawn, and the pictures are compared with clean renders.

  glyphs   200 held-out (glyph, ink, paper) triples: is the nearest of all clean renders the prompted one, in glyph, ink and paper?
  emoji    is the picture nearest, by pixel correlation, to the prompted emoji among 100 candidates?

  python -m launch.check --workdir=runs/quickstart
"""

import json

import numpy as np
from absl import flags

from data_pipelines import emoji, glyphs
from launch import cli
from launch.pictures import grid, save_png
from launch.run import Run, load_run
from launch.sample import Generator, sampling_weights

SEED = 7
NUM_SHOWN = 48


def check(run: Run, stage_name: str = "") -> dict:
  """{"stage", "check", "num_prompts", a share in 0..1 per question}; also written to check.json and check.png in the run's folder.

  Raises:
    ValueError: the config names no check.
  """
  checks = {"glyphs": check_glyphs, "emoji": check_emoji}
  if run.cfg.check.name not in checks:
    raise ValueError(f"config.check.name is {run.cfg.check.name!r}: choose one of {', '.join(checks)}.")
  name, weights = sampling_weights(run, stage_name)
  shares, images, captions = checks[run.cfg.check.name](run, name, weights)
  result = {"stage": name, "check": run.cfg.check.name, "num_prompts": len(images), **shares}
  (run.workdir / "check.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
  save_png(grid(images[:NUM_SHOWN], 8, captions[:NUM_SHOWN]), run.workdir / "check.png")
  return result


def describe(result: dict) -> str:
  """One line that states a check's result."""
  shares = ", ".join(f"{name} right in {share:.1%}" for name, share in result.items() if isinstance(share, float))
  return f"Check of stage {result['stage']} on {result['num_prompts']} held-out prompts ({result['check']}): {shares}."


def draw(run: Run, stage_name: str, weights: dict, prompts: list[tuple[str, int, int]]) -> list[np.ndarray]:
  """One picture per (prompt, height, width); each shape is one compiled program. Sizes are those of the stage's nearest bucket."""
  buckets = run.loader(run.stages[stage_name]).buckets
  nearest = [min(range(len(buckets)), key=lambda b: abs(np.log(w / h) - np.log(buckets[b].width / buckets[b].height))) for _, h, w in prompts]
  images: list = [None] * len(prompts)
  for number, bucket in enumerate(buckets):
    mine = [i for i, b in enumerate(nearest) if b == number]
    if not mine:
      continue
    generator = Generator(run, bucket.height, bucket.width, run.cfg.sampling.num_steps, run.cfg.sampling.guidance, batch_size=min(50, len(mine)))
    for i, image in zip(mine, generator(weights, [prompts[i][0] for i in mine], SEED)):
      images[i] = image
  return images


def check_glyphs(run: Run, stage_name: str, weights: dict) -> tuple[dict, list[np.ndarray], list[str]]:
  """(shares right of glyph, ink, paper and all three, pictures, captions)."""
  prompts = glyphs.held_out_prompts(run.cfg.check.num_prompts, SEED)
  images = draw(run, stage_name, weights, [(caption, height, width) for caption, _, height, width in prompts])
  scores = [glyphs.score(image, attributes) for image, (_, attributes, _, _) in zip(images, prompts)]
  shares = {name: float(np.mean([score[name] for score in scores])) for name in ("glyph", "ink", "paper")}
  shares["all three"] = float(np.mean([all(score.values()) for score in scores]))
  marks = ["" if all(score.values()) else " [wrong: " + ", ".join(k for k, right in score.items() if not right) + "]" for score in scores]
  return shares, images, [prompt[0] + mark for prompt, mark in zip(prompts, marks)]


def check_emoji(run: Run, stage_name: str, weights: dict) -> tuple[dict, list[np.ndarray], list[str]]:
  """(share of pictures nearest to the prompted emoji among `num_candidates`, pictures, captions).

  Raises:
    ValueError: more prompts than candidates.
  """
  num, num_candidates = run.cfg.check.num_prompts, run.cfg.check.num_candidates
  if num > num_candidates:
    raise ValueError(f"config.check asks {num} prompts among {num_candidates} candidates: every prompt needs its own candidate.")
  prompts = emoji.held_out_prompts(num_candidates, SEED)
  candidates = tuple(character for _, character, _ in prompts)
  images = draw(run, stage_name, weights, [(caption, emoji.SIDE_PX, emoji.SIDE_PX) for caption, _, _ in prompts[:num]])
  found = [emoji.nearest_emoji(image, candidates, paper) for image, (_, _, paper) in zip(images, prompts)]
  marks = ["" if place == right else f" [nearest: {prompts[place][0].rpartition(', on ')[0]}]" for right, place in enumerate(found)]
  return {"emoji": float(np.mean(np.equal(found, np.arange(num))))}, images, [prompt[0] + mark for prompt, mark in zip(prompts, marks)]


def define_flags() -> None:
  """The flags of this launcher."""
  flags.DEFINE_string("workdir", None, "Folder of the run, as given to launch.train.", required=True)
  flags.DEFINE_string("stage", "", "Stage to check; the last trained one when empty.")


def main(_) -> None:
  """Checks as the flags say and prints the result."""
  print(describe(check(load_run(flags.FLAGS.workdir), flags.FLAGS.stage)))


if __name__ == "__main__":
  cli.run(main, define_flags)
