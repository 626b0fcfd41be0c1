"""How many pictures a core scores with each reward of the host, and how many cores the pictures of a rollout take.

  python -m benchmarks.rewards [--side_px=256,1024] [--num_pictures=8] [--rollout=1152] [--within_s=60]

Each reward scores pictures of the kind that it is for, in this process: texts set in type, glyphs, edits of glyphs. "per CPU s" is pictures per
second of processor time, so of one core that does nothing else. "to a process and back" is what the pool adds, on both sides together, measured with
a function that does nothing; "PNG" is what a picture costs here that goes to a service. "cores" are those that score a rollout's pictures within a
number of seconds, what the pool adds counted in. The first picture, which loads models, is left out.
"""

import dataclasses
import math
import os
import resource
import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

from data_pipelines.embedded import glyph_edits, glyphs
from data_pipelines.transforms import encode_png
from launch import cli
from qimg2.evaluation import text_rendering
from qimg2.rewards import Task
from qimg2.rewards.edits import kept
from qimg2.rewards.glyphs import glyph
from qimg2.rewards.own import own
from qimg2.rewards.pool import Pool
from qimg2.rewards.text import read_text

WORDS = "OPEN DAILY FROM NINE TO FIVE"
Examples = Callable[[int, int], tuple[np.ndarray, Task]]  # (number, side in px) -> a picture and its task


def text_example(number: int, side_px: int) -> tuple[np.ndarray, Task]:
  """A picture of one to six words."""
  text = " ".join(WORDS.split()[:1 + number % 6])
  return text_rendering.render([text], side_px, side_px), {"prompt": f'a sign "{text}"'}


def glyph_example(number: int, side_px: int) -> tuple[np.ndarray, Task]:
  """A clean render of a held-out prompt."""
  (prompt, asked, *_), = glyphs.held_out_prompts(1, number)
  return glyphs.render(asked, side_px, side_px), {**dataclasses.asdict(asked), "prompt": prompt}


def edit_example(number: int, side_px: int) -> tuple[np.ndarray, Task]:
  """A clean render of a held-out edit of the ink."""
  edits = (one for seed in range(number, 10**6, 97) for one in glyph_edits.held_out_edits(4, seed))
  prompt, source, target, *_ = next(one for one in edits if one[1].ink != one[2].ink)
  clean = [glyphs.render(one, side_px, side_px) for one in (source, target)]
  return clean[1], {"prompt": prompt, "sources": (clean[0],), "reference": clean[1]}


REWARDS = {"ocr": (read_text().score, text_example), "glyph": (glyph().score, glyph_example), "kept": (kept().score, edit_example),
           "PNG for a service": (lambda picture, task: len(encode_png(picture)), text_example)}


def nothing(picture: np.ndarray, task: Task) -> float:
  """A reward that costs nothing but its way."""
  return 0.0


def seconds(score: Callable[[np.ndarray, Task], float], make: Examples, side_px: int, num: int) -> float:
  """Processor time of one picture, but for the first."""
  examples = [make(number, side_px) for number in range(num + 1)]
  score(*examples[0])
  begin = time.process_time()
  for one in examples[1:]:
    score(*one)
  return (time.process_time() - begin) / num


def seconds_of_the_way(side_px: int, num: int) -> float:
  """Processor time that a picture's way to a process and back takes, in this process and in that one; what 3 `num` pictures take more than `num`."""
  pictures = np.random.default_rng(0).integers(0, 256, (3 * num, side_px, side_px, 3), np.uint8)

  def spent(some: np.ndarray) -> float:
    begin = sum(os.times()[:4])  # of ended children, too
    with Pool({"nothing": own("benchmarks.rewards:nothing").score}, {"nothing": 60.0}, 1) as pool:
      for future in pool.begin(some, [{}] * len(some), [["nothing"]] * len(some)):
        future.result()
    return sum(os.times()[:4]) - begin
  few = spent(pictures[:num])
  return max(0.0, spent(pictures) - few) / (2 * num)


def main(_: Sequence[str]) -> None:
  """The command; see the module docstring."""
  f, sides = flags.FLAGS, [int(side) for side in flags.FLAGS.side_px]
  way = {side: seconds_of_the_way(side, 16 * f.num_pictures) for side in sides}
  print("| reward | " + " | ".join(f"{side} px, per CPU s | cores for {f.rollout:,} pictures in {f.within_s:g} s" for side in sides) + " |\n"
        + "|---" * (1 + 2 * len(sides)) + "|")
  for name, (score, make) in REWARDS.items():
    found = {side: seconds(score, make, side, f.num_pictures) for side in sides}
    cores = lambda side: math.ceil(f.rollout * (found[side] + way[side]) / f.within_s)
    print(f"| {name} | " + " | ".join(f"{1 / found[side]:,.1f} | {cores(side)}" for side in sides) + " |", flush=True)
  alone = [f"{1 / max(way[side], 1e-6):,.0f} | {math.ceil(f.rollout * way[side] / f.within_s)}" for side in sides]
  print(f"| to a process and back | {' | '.join(alone)} |")
  print(f"\nMemory of the process at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB")


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_list("side_px", ["256", "1024"], "Sides of the pictures in px.")
  flags.DEFINE_integer("num_pictures", 8, "Pictures of each reward and size.", lower_bound=1)
  flags.DEFINE_integer("rollout", 48 * 24, "Pictures of a rollout.", lower_bound=1)
  flags.DEFINE_float("within_s", 60.0, "Seconds in which they are to be scored.", lower_bound=0.1)


if __name__ == "__main__":
  cli.run(main, define_flags)
