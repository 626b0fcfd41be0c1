"""How many pictures a core scores in a pool while the device draws, and whether the device waits for the pool.

  python -m benchmarks.scoring [--metrics=ocr --metrics=ssim] [--num_pictures=32] [--side_px=512] [--num_workers=0] [--network=FILE.onnx --lpips]

Scores run in the pool of an evaluation (`qimg2.runtime.evaluating.scoring`), one process per core, on texts set in type. For each metric:

  alone       pictures per second of one core's time, in this process, with nothing beside it
  in a pool   the same of the pool's processes, while this process keeps the device at products of matrices all the time
  device      speed of these products beside the pool, over that without it: what scoring takes from drawing
  waits       share of the time in which the device waits, where chunks are drawn as `qimg2.runtime.evaluating.job` does, with as many ahead, and a
              chunk takes the device a quarter longer than the pool; 0 where the pool keeps up

A core's time is that which a process had, so that others on the machine change it little. Where the device is the CPU, its products take the cores
that score, and "device" is a lower bound. Features of a network in an ONNX file (`--network`) and LPIPS (`--lpips`, AlexNet with random weights) are
computed by the process that draws, so that the device waits for them; they have pictures per second and core, or per second of the device, alone.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import cli
from qimg2 import params as P
from qimg2.evaluation import Suite, Task, editing, images, text_pages, text_suites
from qimg2.evaluation.features import OnnxConfig, OnnxFeatures
from qimg2.evaluation.text import score_text
from qimg2.models import lpips
from qimg2.runtime.evaluating.job import AHEAD
from qimg2.runtime.evaluating.scoring import Scorer, num_cores

CHUNK = 4  # pictures that are drawn together
SLOWER = 1.25  # time of the device for a chunk over that of the pool


def _ssim(task: Task, picture: np.ndarray) -> dict[str, float]:
  return images.compare(picture, task.truth)


def _kept(task: Task, picture: np.ndarray) -> dict[str, float]:
  return editing.kept_scores(picture, task.truth, np.ones(picture.shape[:2], bool))


def _ocr(task: Task, picture: np.ndarray) -> dict[str, object]:
  return text_suites.read_and_score(dataclasses.replace(task, truth=(task.prompt,)), picture, score_text)


def _timed(score: Callable[[Task, np.ndarray], dict], task: Task, picture: np.ndarray) -> dict[str, float]:
  """Seconds of this thread's processor time that a score takes."""
  begin = time.thread_time()
  score(task, picture)
  return {"seconds": time.thread_time() - begin}


METRICS: dict[str, Callable[[Task, np.ndarray], dict]] = {"ocr": _ocr, "ssim": _ssim, "kept": _kept}


class Device:
  """Something that keeps the device at work for as long as is wanted."""

  def __init__(self, side: int = 512):
    self._x = jnp.ones((side, side)) / side
    self._run = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, y: y @ x, x))
    self.work(0.2)

  def work(self, seconds: float, until: Callable[[], bool] = lambda: False) -> float:
    """Calls per second of a program that is run for so long, or until something is done; at least one."""
    begin, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - begin < seconds and not until():
      self._run(self._x).block_until_ready()
      calls += 1
    return calls / (time.perf_counter() - begin)


@dataclasses.dataclass(frozen=True)
class Row:
  """Figures of a metric, as the module's docstring names them."""
  name: str
  alone: float
  in_pool: float
  device: float
  waits: float


def samples(num: int, side_px: int) -> tuple[list[Task], list[np.ndarray]]:
  """(tasks, pictures) of English menus set in type; the truth is another picture, of the same menu with another word."""
  edits = [text_pages.make_edit("en", "menu", "word", np.random.default_rng(number)) for number in range(num)]
  both = [text_pages.render(edit, [edit.source, edit.target], side_px, side_px) for edit in edits]
  tasks = [Task(" ".join(edit.source.texts), (side_px, side_px), truth=target) for edit, (_, target) in zip(edits, both)]
  return tasks, [source for source, _ in both]


def measure(name: str, tasks: Sequence[Task], pictures: Sequence[np.ndarray], num_workers: int, device: Device) -> Row:
  """The figures of one metric on these pictures, at least one of them."""
  score, num = METRICS[name], len(tasks)
  score(tasks[0], pictures[0])
  rate = lambda scores: num / max(sum(one["seconds"] for one in scores), 1e-9)
  alone, usual = rate([_timed(score, task, picture) for task, picture in zip(tasks, pictures)]), device.work(1.0)
  with Scorer(Suite(lambda num, seed: [], score=functools.partial(_timed, score), is_slow=True), num_workers) as scorer:
    scorer.begin(tasks[:1] * num_workers, pictures[:1] * num_workers).finish()  # its processes start and load
    begin, pending = time.perf_counter(), scorer.begin(tasks, pictures)
    beside = device.work(float("inf"), until=lambda: all(one.done() for one in pending.futures))
    in_pool, _ = pending.finish()
    seconds = (time.perf_counter() - begin) / num
    waits = _waits(scorer, tasks, pictures, device, SLOWER * CHUNK * seconds)
  return Row(name, alone, rate(in_pool), beside / usual, waits)


def _waits(scorer: Scorer, tasks: Sequence[Task], pictures: Sequence[np.ndarray], device: Device, chunk_s: float) -> float:
  """The share of the time for which the device waits, from the first chunk to the last one's drawing."""
  pending, waited, begin = [], 0.0, time.perf_counter()
  for start in range(0, len(tasks), CHUNK):
    device.work(chunk_s)
    pending.append(scorer.begin(tasks[start:start + CHUNK], pictures[start:start + CHUNK]))
    paused = time.perf_counter()
    while len(pending) > AHEAD:
      pending.pop(0).finish()
    waited += time.perf_counter() - paused
  share = waited / (time.perf_counter() - begin)
  for one in pending:
    one.finish()
  return share


def of_device(side_px: int, num: int) -> float:
  """Pairs of pictures per second whose LPIPS (AlexNet, random weights) this device computes, `CHUNK` at a time."""
  cfg = lpips.Config()
  params = jax.jit(lambda key: P.init(lpips.specs(cfg), key))(jax.random.key(0))
  run = jax.jit(functools.partial(lpips.distances, cfg))
  one, other = (jnp.full((CHUNK, side_px, side_px, 3), level, jnp.uint8) for level in (40, 200))
  run(params, one, other).block_until_ready()
  begin = time.perf_counter()
  for _ in range(-(-num // CHUNK)):
    run(params, one, other).block_until_ready()
  return -(-num // CHUNK) * CHUNK / (time.perf_counter() - begin)


def main(_: Sequence[str]) -> None:
  """The command; see the module docstring."""
  f = flags.FLAGS
  num_workers = f.num_workers or max(1, num_cores() - 1)
  tasks, pictures = samples(f.num_pictures, f.side_px)
  device = Device()
  print(f"{jax.devices()[0].device_kind}, {num_cores()} cores, {num_workers} processes, pictures of {f.side_px} px\n\n"
        "| metric | alone, pictures/s of a core | in a pool | device | waits |\n|---|---|---|---|---|")
  for name in f.metrics:
    row = measure(name, tasks, pictures, num_workers, device)
    print(f"| {row.name} | {row.alone:.2f} | {row.in_pool:.2f} | {row.device:.0%} | {row.waits:.1%} |", flush=True)
  if f.network:
    features = OnnxFeatures(OnnxConfig(f.network))
    features(tasks[:1], pictures[:1])
    begin = time.process_time()
    features(tasks, pictures)
    print(f"\nFeatures of {f.network}: {len(tasks) / (time.process_time() - begin):.2f} pictures/s of a core.")
  if f.lpips:
    print(f"\nLPIPS: {of_device(f.side_px, f.num_pictures):.2f} pairs/s of the device.")


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_multi_enum("metrics", list(METRICS), list(METRICS), "Metrics on the host; repeat the flag for more.")
  flags.DEFINE_integer("num_pictures", 32, "Pictures that are scored, by each metric; with fewer than the pool is ahead by nothing could wait.",
                       lower_bound=CHUNK * (AHEAD + 1))
  flags.DEFINE_integer("side_px", 512, "Side of a picture.", lower_bound=64)
  flags.DEFINE_integer("num_workers", 0, "Processes; 0: one less than there are cores, as an evaluation has.", lower_bound=0)
  flags.DEFINE_string("network", "", "A feature network of 299 px in an ONNX file, as `fidelity` takes it.")
  flags.DEFINE_bool("lpips", False, "LPIPS on the device, too.")


if __name__ == "__main__":
  cli.run(main, define_flags)
