"""What figures of pictures cost on this machine: pictures per second of processor time, time and peak memory of distances between sets.

  python -m benchmarks.picture_metrics [--side_px=512,1024] [--num=30000 --dim=2048 --figures=FID,KID]
"""

import resource
import time

import numpy as np
from absl import flags

from launch import cli
from qimg2.evaluation import editing, fidelity, images
from qimg2.evaluation.moments import Moments


def pictures(side_px: int, num: int = 4) -> None:
  """Prints pictures per second of processor time, all threads together, of each metric of two pictures."""
  rng = np.random.default_rng(0)
  one, other = (rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8) for _ in range(2))
  region = np.ones((side_px, side_px), bool)
  for name, run in {"psnr": lambda: images.psnr(one, other), "ssim": lambda: images.ssim(one, other),
                    "psnr and ssim, RGB and luma": lambda: images.compare(one, other), "drift": lambda: editing.drift(one, other),
                    "kept region": lambda: editing.kept_scores(one, other, region)}.items():
    run()
    begin = time.process_time()
    for _ in range(num):
      run()
    print(f"{side_px} px, {name}: {num / (time.process_time() - begin):.1f} pictures/s", flush=True)


def sets(num: int, dim: int, figures: list[str]) -> None:
  """Prints seconds and the process's peak memory after each of these distances between two sets of `num` vectors of `dim` numbers."""
  rng = np.random.default_rng(0)
  one, other = (rng.standard_normal((num, dim), np.float32) + np.float32(shift) for shift in (0.5, 0.55))

  def fid() -> float:
    return fidelity.fid(*(Moments.of_blocks(x[start:start + 256] for start in range(0, num, 256)) for x in (one, other)))
  names = [str(row // 4) for row in range(num)]
  all_of_them = {"FID": fid, "KID": lambda: fidelity.kid(one, other), "diversity": lambda: fidelity.diversities(names, one),
                 "CMMD": lambda: fidelity.cmmd(one, other), "support": lambda: fidelity.support(one, other)}
  for name in figures:
    begin = time.perf_counter(), time.process_time()
    all_of_them[name]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{num} x {dim}, {name}: {time.perf_counter() - begin[0]:.1f} s, {time.process_time() - begin[1]:.1f} s of processor time, peak {peak:.2f} "
          "GiB", flush=True)


def define_flags() -> None:
  """The flags of this benchmark."""
  flags.DEFINE_list("side_px", ["512", "1024"], "Sides of pictures.")
  flags.DEFINE_integer("num", 0, "Pictures of a set; 0 leaves sets out.", lower_bound=0)
  flags.DEFINE_list("figures", ["FID", "KID", "diversity", "CMMD", "support"], "Distances between sets.")
  flags.DEFINE_integer("dim", 2048, "Numbers of a feature vector.", lower_bound=1)


def main(_) -> None:
  """Prints all of it."""
  for side in flags.FLAGS.side_px:
    pictures(int(side))
  if flags.FLAGS.num:
    sets(flags.FLAGS.num, flags.FLAGS.dim, flags.FLAGS.figures)


if __name__ == "__main__":
  cli.run(main, define_flags)
