"""How many pictures a core reads by OCR and scores, for the pool that evaluates suites of text.

  python -m benchmarks.ocr [--num_pictures=12] [--side_px=512,1024]

English prompts of each kind are set in type at the area of a square of each size, read by `qimg2.evaluation.ocr` in this process with one thread,
and scored. "per CPU s" is pictures per second of processor time, so of one core that does nothing else; "two-sided" says that what was read is right.
Then every score alone, on texts as long as those of the kind, with an added line. The first picture, which loads the models, is left out.
"""

import resource
import time
from collections.abc import Callable, Sequence

from absl import flags
from tqdm import tqdm

from launch import cli
from qimg2.evaluation import Task, prompts, text_rendering, text_suites
from qimg2.evaluation.text import score_text
from qimg2.evaluation.text_benchmarks import cvtg_match, flow_grpo_reward, longtext_recall, omnidoc_ned

SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], object]] = {
    "ours, all": score_text,
    "LongText-Bench": lambda texts, lines: longtext_recall(texts, " ".join(lines), "en"),
    "CVTG-2K": lambda texts, lines: cvtg_match(" ".join(texts).lower().split(), lines),
    "OmniDoc-TokenBench": lambda texts, lines: omnidoc_ned(" ".join(texts), " ".join(lines)),
    "Flow-GRPO": lambda texts, lines: flow_grpo_reward(" ".join(texts), " ".join(lines))}
MIN_S = 0.3  # how long a score is repeated


def tasks_of(kind: str, side_px: int, num: int) -> list[Task]:
  """English prompts of a kind, at most `num`."""
  suite = text_suites.text_suite(languages="en", kinds=kind, side_px=side_px)
  return suite.tasks(min(num, len(prompts.written(["en"], [kind]))), 0)


def read_speed(tasks: Sequence[Task]) -> tuple[float, float]:
  """(pictures per second of processor time from pixels to scores, mean two-sided score) of texts set in type."""
  pictures = [text_rendering.render(task.truth, *task.size) for task in tasks]
  begin = time.process_time()
  scores = [text_suites.read_and_score(task, picture, score_text) for task, picture in zip(tasks, pictures)]
  return len(tasks) / (time.process_time() - begin), sum(one["two-sided"] for one in scores) / len(tasks)


def score_speed(score: Callable[[Sequence[str], Sequence[str]], object], tasks: Sequence[Task]) -> float:
  """Pictures per second of processor time of one score of texts that are there already."""
  read, rounds, begin = [[*task.truth[::-1], "two more words"] for task in tasks], 0, time.process_time()
  while time.process_time() - begin < MIN_S:
    for task, lines in zip(tasks, read):
      score(task.truth, lines)
    rounds += 1
  return rounds * len(tasks) / (time.process_time() - begin)


def main(_: Sequence[str]) -> None:
  """The command; see the module docstring."""
  f = flags.FLAGS
  read_speed(tasks_of("words", 256, 1))
  sides = [int(side_px) for side_px in f.side_px]
  print("| kind | " + " | ".join(f"{side_px} px, per CPU s | two-sided" for side_px in sides) + " |\n" + "|---" * (1 + 2 * len(sides)) + "|")
  for kind in tqdm(prompts.KINDS, "kinds", disable=None):
    found = [read_speed(tasks_of(kind, side_px, f.num_pictures)) for side_px in sides]
    print(f"| {kind} | " + " | ".join(f"{speed:.2f} | {right:.1%}" for speed, right in found) + " |")
  print(f"\nMemory of the process at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB\n")
  print("| score, pictures per CPU s | " + " | ".join(prompts.KINDS) + " |\n" + "|---" * (1 + len(prompts.KINDS)) + "|")
  for name, score in SCORES.items():
    print(f"| {name} | " + " | ".join(f"{score_speed(score, tasks_of(kind, 1024, 100)):,.0f}" for kind in prompts.KINDS) + " |")


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_integer("num_pictures", 12, "pictures of each kind and size, at most as many as there are prompts", lower_bound=1)
  flags.DEFINE_list("side_px", ["512", "1024"], "areas of the pictures, as sides of a square in px")


if __name__ == "__main__":
  cli.run(main, define_flags)
