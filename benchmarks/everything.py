"""All benchmarks of this device with one command, each in a process of its own, within a time limit, into one JSON file.

  python -m benchmarks.everything --out=benchmarks.json [--minutes=9] [--only=step,step.alone,sampler,networks,attention,start] [--tiny]

On a GPU: bfloat16 with float32 master weights and cuDNN attention; the published 7B generator at 1,024 px, with as many of its layers as fit twice
with AdamW's state, ours beside torch's compiled class ("step"), then with all that fit alone ("step.alone"). On a CPU: float32 and 20M weights. What
would run past the limit is stopped, and the file says so; so it does of what failed. `--tiny` runs everything at sizes that only show that it runs.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags

from benchmarks import timing
from launch import cli
from qimg2 import params as P
from qimg2.models import mmdit

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ("step", "step.alone", "attention", "networks", "sampler", "start")  # NAME or NAME.CASE of `benchmarks.NAME`, in the order of running
BYTES_PER_WEIGHT = 16  # a float32 weight, its gradient and two moments
ENVIRONMENT = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # torch shares the device
SHARE = 0.7  # of the device's memory, where two train; the rest is for activations
SHARE_ALONE = 0.85  # where one does, with the inputs of its layers alone kept


def find_device() -> tuple[str, str, float]:
  """(platform, kind, bytes of memory) of the first device; asked in another process, so that this one holds none of its memory."""
  code = ("import json, jax; d = jax.devices()[0]; "
          "print(json.dumps([d.platform, d.device_kind, (d.memory_stats() or {}).get('bytes_limit', 0)]))")
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
  return tuple(json.loads(done.stdout))


def layers_that_fit(memory_bytes: float) -> int:
  """How many layers of the published generator have weights, gradients and moments in `memory_bytes`, at most all."""
  count = lambda num: P.count(mmdit.specs(mmdit.Config(num_layers=num)))
  rest, layer = count(1) - (count(2) - count(1)), count(2) - count(1)
  return max(1, min(mmdit.Config().num_layers, int((memory_bytes / BYTES_PER_WEIGHT - rest) // layer)))


def commands(platform: str, memory_bytes: float, tiny: bool) -> dict[str, list[str]]:
  """Name -> arguments of each benchmark."""
  if tiny:
    return {"step": ["--size=quickstart", "--batch=1", "--task=t2i", "--peer=eager", "--rounds=1"],
            "sampler": ["--size=tiny", "--px=64", "--images=0", "--guidance=1", "--steps=2", "--rounds=1"],
            "networks": ["--size=tiny", "--px=32", "--batch=1", "--tokens=8", "--rounds=1"],
            "attention": ["--length=64", "--prefix=32", "--heads=2", "--head_dim=8", "--dtype=float32", "--rounds=1"],
            "start": ["--what=help", "--rounds=1"]}
  if platform == "gpu":
    step = lambda share: ["--size=7B", f"--num_layers={layers_that_fit(share * memory_bytes)}", "--dtype=bfloat16", "--attention=cudnn", "--task=t2i"]
    return {"step": [*step(SHARE / 2), "--remat=dots", "--batch=1,2", "--peer=compiled", "--forward"],
            "step.alone": [*step(SHARE_ALONE), "--remat=attention", "--batch=1", "--peer="],
            "networks": ["--size=100M", "--dtype=bfloat16", "--px=512", "--batch=8", "--peer=eager,compiled"],
            "sampler": ["--size=100M", "--dtype=bfloat16", "--px=512", "--images=0,1", "--peer=eager,compiled"],
            "attention": ["--length=4352", "--prefix=256", "--heads=32", "--head_dim=128", "--dtype=bfloat16"],
            "start": ["--rounds=1"]}
  return {"step": ["--size=20M,quickstart", "--batch=1", "--forward", "--rounds=3"],
          "networks": ["--rounds=3"], "sampler": ["--rounds=1", "--cache=true"],
          "attention": ["--length=1152", "--prefix=128", "--heads=6", "--head_dim=64", "--dtype=float32", "--rounds=3"],
          "start": ["--what=help", "--rounds=2"]}


def run(name: str, arguments: list[str], limit_s: float) -> dict:
  """What one benchmark wrote and printed, with its seconds and, where it did not end well, how."""
  with tempfile.TemporaryDirectory() as folder:
    file, begin = pathlib.Path(folder) / "rows.json", time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.{name.partition('.')[0]}", *arguments, f"--json={file}"]
    try:
      done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=max(limit_s, 1))
      ended, printed = f"code {done.returncode}: {done.stderr[-2000:]}" if done.returncode else "", done.stdout
    except subprocess.TimeoutExpired as late:
      ended, printed = f"stopped after {limit_s:.0f} s", (late.stdout or b"").decode()
    found = {"arguments": arguments, "seconds": time.monotonic() - begin, "printed": printed}
    return found | ({"ended": ended} if ended else {}) | (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})


def define_flags() -> None:
  """The flags of this benchmark."""
  flags.DEFINE_string("out", None, "JSON file to write.", required=True)
  flags.DEFINE_list("only", list(NAMES), f"Any of {', '.join(NAMES)}.")
  flags.DEFINE_float("minutes", 9.0, "For all of them.", lower_bound=0.0)
  flags.DEFINE_bool("tiny", False, "The smallest sizes.")


def main(_) -> None:
  """Writes the file, again after each benchmark, and exits with 1 if one did not end well."""
  args = flags.FLAGS
  timing.check_choices(only=(args.only, NAMES))
  end, (platform, kind, memory) = time.monotonic() + 60 * args.minutes, find_device()
  found = {"device": kind, "memory_bytes": memory}
  for name, arguments in commands(platform, memory, args.tiny).items():
    if name in args.only:
      found[name] = run(name, arguments, end - time.monotonic())
      print(f"benchmarks.{name} {' '.join(arguments)}: {found[name]['seconds']:.0f} s {found[name].get('ended', '')}\n{found[name]['printed']}",
            flush=True)
      pathlib.Path(args.out).write_text(json.dumps(found, indent=1), encoding="utf-8")
  if odd := [name for name in args.only if "ended" in found.get(name, {})]:
    raise ValueError(f"{', '.join(odd)} did not end well: {args.out} says how.")


if __name__ == "__main__":
  cli.run(main, define_flags)
