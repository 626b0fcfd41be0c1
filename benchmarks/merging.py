"""What it takes to merge the parts of a large evaluation into its files: seconds and peak memory of the process that does.

  python -m benchmarks.merging [--num_prompts=25000 --num_seeds=4 --dim=1024] [--out=DIR]

The folder is as many jobs leave it that have scored all pictures: made-up scores and features, in chunks of 32. Then `evaluate_into` finds nothing
left to score, and writes scores.jsonl, the features in one file, the summary with its intervals, Fréchet's distance to a made-up reference from
features that stream, and the page. Every picture is the same small file. The peak is that of the process, which wrote the parts before.
"""

import functools
import pathlib
import resource
import tempfile
import time
from collections.abc import Iterable, Sequence

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines.transforms import encode_png
from launch import cli
from qimg2.evaluation import Figure, Suite, Task, fidelity
from qimg2.evaluation.moments import Moments
from qimg2.runtime.evaluating.folder import Folder
from qimg2.runtime.evaluating.job import IMAGES_AT_ONCE, Work, evaluate_into
from qimg2.runtime.evaluating.summary import row_of

REQUEST = {"format": 1, "model": {"run": "made up"}, "suites": {"made_up": {}}}


def made_up(out: Folder, num_prompts: int, num_seeds: int, dim: int) -> Work:
  """A suite whose pictures are all scored, with its parts in a folder; features only where `dim` is not 0."""
  picture = out.place / "picture.png"
  out.begin(REQUEST)
  picture.write_bytes(encode_png(np.full((64, 64, 3), 128, np.uint8)))
  tasks = [Task(f"prompt {number}", (64, 64), name=f"{number:06d}", category=f"kind {number % 4}") for number in range(num_prompts)]
  keys = [(task, seed) for task in range(num_prompts) for seed in range(num_seeds)]
  chunks = [keys[start:start + IMAGES_AT_ONCE] for start in range(0, len(keys), IMAGES_AT_ONCE)]
  suite = Suite(lambda num, seed: tasks[:num], lambda task, picture: {}, figures={
      "right": Figure("right"), "words": Figure("found", "words"), "psnr": Figure("psnr", is_share=False)},
      features=(lambda tasks, pictures: np.zeros((len(tasks), dim), np.float32)) if dim else None,
      of_set=functools.partial(_distance, dim) if dim else None)
  work = Work("made_up", suite, tasks, chunks, None, lambda task, seed: picture)
  rng = np.random.default_rng(0)
  for number, chunk in enumerate(tqdm(chunks, "parts", disable=None)):
    rows = [row_of("made_up", tasks[task].name, tasks[task], seed, "picture.png", _scores(rng)) for task, seed in chunk]
    out.write_part("made_up", number, rows, rng.standard_normal((len(chunk), dim), np.float32) if dim else None)
  return work


def _scores(rng: np.random.Generator) -> dict[str, float | list[str]]:
  return {"right": float(rng.random() < 0.7), "found": float(rng.integers(9)), "words": 8.0, "psnr": rng.normal(30, 5), "recognised": ["a line"] * 4}


def _distance(dim: int, blocks: Iterable[tuple[Sequence[str], np.ndarray]]) -> dict[str, float]:
  """Fréchet's distance to a normal distribution with another mean, whose moments are exact."""
  reference = Moments(2, np.full(dim, 0.1), np.eye(dim))
  return {"fid": fidelity.fid(Moments.of_blocks(features for _, features in blocks), reference)}


def merge(out: Folder, work: Work) -> tuple[dict, float, float, float]:
  """(summary, seconds, seconds of processor time, peak memory of this process in GiB) of writing all files of an evaluation that is scored."""
  begin = time.perf_counter(), time.process_time()
  summary = evaluate_into(out, REQUEST, [work])
  return summary, time.perf_counter() - begin[0], time.process_time() - begin[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(_: Sequence[str]) -> None:
  """The command; see the module docstring."""
  f = flags.FLAGS
  with tempfile.TemporaryDirectory() as scratch:
    out = Folder(pathlib.Path(f.out or scratch) / "evaluation")
    work = made_up(out, f.num_prompts, f.num_seeds, f.dim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    summary, seconds, processor, peak = merge(out, work)
    found = summary["suites"]["made_up"]
    print(f"{found['num_pictures']} pictures of {found['num_prompts']} prompts, features of {f.dim} numbers: {seconds:.1f} s, {processor:.1f} s of "
          f"processor time, peak {peak:.2f} GiB ({before:.2f} GiB before)")


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_integer("num_prompts", 25_000, "Prompts.", lower_bound=2)
  flags.DEFINE_integer("num_seeds", 4, "Pictures of each.", lower_bound=1)
  flags.DEFINE_integer("dim", 1024, "Numbers of a feature vector; 0 for no features.", lower_bound=0)
  flags.DEFINE_string("out", "", "Folder on the disk that is measured; a temporary one when empty.")


if __name__ == "__main__":
  cli.run(main, define_flags)
