"""Where the time of our train step goes: the kernels of the first device, or on a CPU its fused loops, costliest first, by a trace.

  python -m benchmarks.kernels [--size=7B] [--num_layers=12] [--batch=1] [--task=t2i] [--remat=dots] [--most=40] [--json=F]

On a GPU in bfloat16 with cuDNN attention, else in float32. What overlaps on several streams or threads counts each time.
"""

import collections
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterable

import jax
from absl import flags

from benchmarks import step, timing
from launch import cli

STEPS = 2  # that are traced


def trace(run: Callable[[int], object], steps: int) -> list[dict]:
  """Kernels of `steps` calls of `run`: name, calls and milliseconds per step, costliest first."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for number in range(steps):
        run(number)
    file, = pathlib.Path(folder).rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    found = collections.defaultdict(lambda: [0, 0.0])
    for name, nanoseconds in _kernels(planes, jax.default_backend()):
      found[name][0] += 1
      found[name][1] += nanoseconds
  rows = [{"name": name, "calls": calls / steps, "ms": nanoseconds / 1e6 / steps} for name, (calls, nanoseconds) in found.items()]
  return sorted(rows, key=lambda row: -row["ms"])


def _kernels(planes: Iterable, platform: str) -> Iterable[tuple[str, float]]:
  """(name, nanoseconds) of what ran on the device: the streams of a GPU's plane, what a CPU's threads say of operations of the program."""
  for plane in planes:
    on_gpu = plane.name.startswith("/device:GPU:0")
    for line in plane.lines:
      if on_gpu and line.name.startswith("Stream"):
        yield from ((event.name, event.duration_ns) for event in line.events)
      elif platform == "cpu" and plane.name == "/host:CPU":
        yield from ((event.name, event.duration_ns) for event in line.events if any(name == "hlo_op" for name, _ in event.stats))


def define_flags() -> None:
  """The flags of this benchmark."""
  flags.DEFINE_enum("size", "7B", list(step.SIZES), "Generator.")
  flags.DEFINE_integer("num_layers", 0, "Layers in place of the size's.", lower_bound=0)
  flags.DEFINE_integer("batch", 1, "Rows.", lower_bound=1)
  flags.DEFINE_enum("task", "t2i", ["t2i", "ti2i"], "Task.")
  flags.DEFINE_string("remat", "dots", "Rematerialisation policy.")
  flags.DEFINE_integer("most", 40, "Rows of the table.", lower_bound=1)
  flags.DEFINE_string("json", "", "File for all rows.")


def main(_) -> None:
  """Prints the table."""
  args, on_gpu = flags.FLAGS, jax.default_backend() == "gpu"
  size = step.SIZES[args.size]()
  model = dataclasses.replace(size.model, remat=args.remat, **({"dtype": "bfloat16", "attention_backend": "cudnn"} if on_gpu else {}),
                              **({"num_layers": args.num_layers} if args.num_layers else {}))
  size = dataclasses.replace(size, model=model)
  batch = jax.device_put(step.make_batch(size, args.batch, args.task == "ti2i", 0))
  run = step.compiled_step(size, batch).way(batch)
  run(0)
  rows = trace(run, STEPS)
  print(f"{jax.devices()[0].device_kind}: {sum(row['ms'] for row in rows):.1f} ms of a step in {len(rows)} kernels")
  for row in rows[:args.most]:
    print(f"{row['ms']:10.3f} ms {row['calls']:8.1f} x  {row['name']}")
  timing.write_json(args.json, rows)


if __name__ == "__main__":
  cli.run(main, define_flags)
