"""How fast the loader makes batches, beside a torch DataLoader that does the same with Pillow, and beside the decoding alone.

  python -m benchmarks.data [--num_images=2048] [--seconds=6] [--rounds=3] [--workers=1,2] [--base_px=512,1024]

Photograph-like JPEGs of 1 to 2 megapixels, near 1:1, 4:3, 3:2 and 16:9, are made in a temporary folder, as files and as a data set. Then, for
each size and number of worker processes, four ways take turns, so that whatever else the machine does hits all, and medians are printed:

  loader      batches of data_pipelines.loader.Loader from records; without workers it has threads
  DataLoader  torch, default collate, files of one bucket per batch: Image.open, convert, resize (Lanczos), crop; without workers it has none
  limit       load_picture over files in memory, one thread, no batches
  decode      the JPEG decoder alone, at the scale that load_picture asks for

"per CPU s" counts the processor time of all processes and threads of that way, so it is images per second and core.
"""

import contextlib
import dataclasses
import gc
import io
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psutil
from absl import flags
from PIL import Image
from tqdm import tqdm

from data_pipelines import records
from data_pipelines.buckets import Bucket, nearest_bucket
from data_pipelines.loader import Loader
from data_pipelines.specs import DatasetSpec, Resolution
from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.transforms import load_picture
from launch import cli

NAME = "photographs"
RATIOS = ("1:1", "4:3", "3:2", "16:9")
BATCH_SIZE = 8
NUM_SCENES = 24  # the pictures are cut-outs of so many
NUM_IN_MEMORY = 64


@dataclasses.dataclass(frozen=True)
class Picture:
  """A file in the folder and its sides in px."""
  path: str
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class Speed:
  """Images per second of wall-clock time, and of processor time of all processes."""
  per_second: float
  per_cpu_second: float


# ---- pictures ------------------------------------------------------------------------------------


def scene(seed: int, side: int = 2048) -> np.ndarray:
  """A photograph-like square, uint8 side side 3: octaves of smooth noise, things with edges, and a sensor's grain."""
  random, pixels = np.random.default_rng(seed), np.full((side, side, 3), 128, np.float32)
  for octave in range(1, 10):
    for channel in range(3):
      coarse = Image.fromarray(random.normal(size=(2**octave + 1, 2**octave + 1)).astype(np.float32))
      pixels[..., channel] += 60 * 1.5**-octave * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
  y, x = np.ogrid[:side, :side]
  for _ in range(30):
    inside = (y - random.integers(side)) ** 2 + (x - random.integers(side)) ** 2 < random.integers(20, side // 6) ** 2
    pixels[inside] += random.normal(size=3).astype(np.float32) * 40
  pixels += random.normal(size=(side, side, 1)).astype(np.float32) * 4
  return np.clip(pixels, 0, 255).astype(np.uint8)


def make_pictures(folder: pathlib.Path, num: int) -> list[Picture]:
  """Writes JPEGs (quality 90, 4:2:0) into a folder."""
  scenes, pictures, random = [scene(seed) for seed in range(min(num, NUM_SCENES))], [], np.random.default_rng(0)
  for number in tqdm(range(num), "pictures", disable=None):
    across, down = map(int, RATIOS[number % len(RATIOS)].split(":"))
    area, ratio = random.uniform(1e6, 2e6), across / down * random.uniform(0.97, 1.03)
    height, width = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
    top, left = random.integers(2048 - height), random.integers(2048 - width)
    image = Image.fromarray(scenes[number % len(scenes)][top:top + height, left:left + width])
    path = folder / f"{number:06d}.jpg"
    image.save(path, quality=90, subsampling="4:2:0")
    pictures.append(Picture(str(path), height, width))
  return pictures


def make_dataset(folder: pathlib.Path, pictures: Sequence[Picture]) -> None:
  """Writes the data set <folder>/<NAME> with the same pictures."""
  columns = {split: records.Columns() for split in records.SPLITS}
  examples = ({"image": pathlib.Path(one.path).read_bytes(), "height": one.height, "width": one.width, "captions": [f"scene {i % NUM_SCENES}"],
               "languages": ["en"], "sample_id": i} for i, one in enumerate(pictures))
  shard = records.write_shard(folder / "train", columns["train"].watch(examples))
  tokenizer = train_tokenizer([f"scene {i}" for i in range(NUM_SCENES)], 300)
  index = {split: columns[split].arrays(tokenizer) for split in records.SPLITS}
  records.finish(folder / NAME, NAME, {"train": [shard], "validation": []}, index, tokenizer, {}, {})


# ---- the four ways: each yields how many images it has made --------------------------------------


def make_loader(folder: pathlib.Path, base_px: int, num_workers: int) -> Loader:
  """The loader that is measured."""
  resolution = Resolution(base_px, BATCH_SIZE, RATIOS)
  return Loader([DatasetSpec(str(folder), NAME)], [resolution], 64, records.load_tokenizer(folder, NAME), 0, num_workers=num_workers)


class Files:
  """What a torch DataLoader asks for pictures, the plain way."""

  def __init__(self, pictures: Sequence[Picture], sizes: Sequence[tuple[int, int]]):
    self._pictures, self._sizes = pictures, sizes

  def __len__(self) -> int:
    return len(self._pictures)

  def __getitem__(self, number: int):
    import torch
    height, width = self._sizes[number]
    with Image.open(self._pictures[number].path) as file:
      image = file.convert("RGB")
    scale = max(height / image.height, width / image.width)
    image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))


class OneBucket:
  """Endless batches of numbers of pictures of one bucket, in random order."""

  def __init__(self, nearest: np.ndarray):
    self._nearest = nearest

  def __iter__(self) -> Iterator[list[int]]:
    random, members = np.random.default_rng(0), [np.flatnonzero(self._nearest == bucket) for bucket in np.unique(self._nearest)]
    while True:
      yield random.choice(members[random.integers(len(members))], BATCH_SIZE).tolist()


def torch_batches(pictures: Sequence[Picture], sizes: Sequence[tuple[int, int]], nearest: np.ndarray, num_workers: int) -> Iterator[int]:
  """Endless batches of a DataLoader. Workers are spawned, as the loader's are: forking a process with threads may hang."""
  from torch.utils.data import DataLoader
  context = "spawn" if num_workers else None
  for batch in DataLoader(Files(pictures, sizes), batch_sampler=OneBucket(nearest), num_workers=num_workers, multiprocessing_context=context):
    yield len(batch)


def one_by_one(function: Callable, files: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> Iterator[int]:
  """Endless calls of function(file, height, width)."""
  for file, size in itertools.cycle(zip(files, sizes)):
    function(file, *size)
    yield 1


def decode_only(data: bytes, height: int, width: int) -> None:
  """The JPEG decoder's part of `load_picture`."""
  image = Image.open(io.BytesIO(data))
  image.draft(None, (width, height))
  image.load()


def start_ways(folder: pathlib.Path, pictures: Sequence[Picture], base_px: int, num_workers: int) -> dict[str, Iterator[int]]:
  """All four ways at one size, each set up and not yet running."""
  loader = make_loader(folder, base_px, num_workers)
  nearest = nearest_bucket([one.height for one in pictures], [one.width for one in pictures], loader.buckets)
  sizes = [_size(loader.buckets[bucket]) for bucket in nearest]
  files = [pathlib.Path(one.path).read_bytes() for one in pictures[:NUM_IN_MEMORY]]
  return {"loader": (len(batch["target"]) for _, batch in loader.iterate()), "DataLoader": torch_batches(pictures, sizes, nearest, num_workers),
          "limit": one_by_one(load_picture, files, sizes), "decode": one_by_one(decode_only, files, sizes)}


def _size(bucket: Bucket) -> tuple[int, int]:
  return bucket.height, bucket.width


# ---- the clock -----------------------------------------------------------------------------------


def measure(way: Iterator[int], seconds: float, num_lead: int) -> Speed:
  """Runs one way for about so many seconds, after `num_lead` steps that use up what it had read ahead, and waits until it rests."""
  for _ in range(num_lead):
    next(way)
  start, cpu, num = time.perf_counter(), cpu_seconds(), 0
  while time.perf_counter() - start < seconds:
    num += next(way)
  speed = Speed(num / (time.perf_counter() - start), num / (cpu_seconds() - cpu))
  rest()
  return speed


def cpu_seconds() -> float:
  """Processor time of this process and all that it has started and that still run."""
  total = 0.0
  for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    with contextlib.suppress(psutil.NoSuchProcess):
      total += sum(process.cpu_times()[:2])
  return total


def rest() -> None:
  """Returns when all that is being read ahead has been, so that the next way has the machine."""
  for _ in range(100):
    before = cpu_seconds()
    time.sleep(0.2)
    if cpu_seconds() - before < 0.03:
      return


def compare(folder: pathlib.Path, pictures: Sequence[Picture], base_px: int, num_workers: int, seconds: float, rounds: int) -> dict[str, Speed]:
  """The median speed of each way at one size."""
  ways, speeds = start_ways(folder, pictures, base_px, num_workers), {}
  for number in range(rounds + 1):  # the first one starts processes and is not counted
    for name, way in ways.items():
      num_lead = 1 if name in ("limit", "decode") else 4 * num_workers + 9
      speed = measure(way, seconds if number else 0.5, num_lead)
      speeds.setdefault(name, []).extend([speed] if number else [])
  for way in ways.values():
    way.close()
  del ways, way
  gc.collect()
  return {name: Speed(statistics.median(s.per_second for s in some), statistics.median(s.per_cpu_second for s in some))
          for name, some in speeds.items()}


# ---- the table -----------------------------------------------------------------------------------


def table(results: dict[tuple[int, int], dict[str, Speed]]) -> str:
  """Lines of text for {(base_px, workers): speed of each way}."""
  lines = [f"{'base_px':>7} {'workers':>7}  {'way':<10} {'images/s':>9} {'per CPU s':>10}"]
  for (base_px, workers), speeds in results.items():
    lines += [f"{base_px:7} {workers:7}  {name:<10} {speed.per_second:9.1f} {speed.per_cpu_second:10.1f}" for name, speed in speeds.items()]
  lines.append("\nratios of images per CPU second (of images per second)")
  for (base_px, workers), speeds in results.items():
    for other in ("DataLoader", "limit"):
      lines.append(f"  {base_px} px, {workers} workers: loader / {other} {_ratios(speeds['loader'], speeds[other])}")
  for base_px in dict.fromkeys(base_px for base_px, _ in results):
    if {(base_px, 1), (base_px, 2)} <= results.keys():
      two, one = results[base_px, 2]["loader"], results[base_px, 1]["loader"]
      lines.append(f"  {base_px} px: loader with 2 workers / with 1 {_ratios(two, one)}")
  return "\n".join(lines)


def _ratios(first: Speed, second: Speed) -> str:
  return f"{first.per_cpu_second / second.per_cpu_second:.2f} ({first.per_second / second.per_second:.2f})"


def main(_: Sequence[str]) -> None:
  """The command; see the module docstring."""
  f = flags.FLAGS
  try:
    import torch
  except ImportError as error:
    raise ValueError("The comparison needs torch, which is not installed: pip install -r requirements-dev.txt.") from error
  torch.set_num_threads(1)
  if f.num_images < BATCH_SIZE * len(RATIOS):
    raise ValueError(f"--num_images={f.num_images} must be at least {BATCH_SIZE * len(RATIOS)}, a batch of each ratio.")
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    pictures = make_pictures(folder, f.num_images)
    make_dataset(folder, pictures)
    cases = [(int(base_px), int(workers)) for base_px in f.base_px for workers in f.workers]
    results = {case: compare(folder, pictures, *case, f.seconds, f.rounds) for case in tqdm(cases, "cases", disable=None)}
  print(table(results))


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_integer("num_images", 2048, "JPEGs to make; 2048 take about 1.5 GB for a while", lower_bound=1)
  flags.DEFINE_float("seconds", 6.0, "how long each way runs per round", lower_bound=0.1)
  flags.DEFINE_integer("rounds", 3, "how often each way runs; medians are printed", lower_bound=1)
  flags.DEFINE_list("base_px", ["512", "1024"], "areas of the buckets, as sides of a square in px")
  flags.DEFINE_list("workers", ["1", "2"], "numbers of worker processes; 0 for none")


if __name__ == "__main__":
  cli.run(main, define_flags)
