"""What tests/test_processes.py runs as several processes where a whole training run would only take longer.

  python tests/worker.py --do=batches --workdir=... (one JSON list of sample ids per batch, by process 0)
  python tests/worker.py --do=stop --workdir=... (two stages that are asked to stop; prints where they stopped, the ids of all processes, and what
      a wait for a program says)
  python tests/worker.py --do=save --workdir=... (one checkpoint; each process writes to hashed<i>.json which files it read to compute checksums; then
      the same is to be saved again, and one more, while process 0 does not see a step 9 that there is, and the others do not see step 3)
  python tests/worker.py --do=wait --workdir=... [--victim=1 --mistake] (collectives for ten minutes; the victim raises)
"""

import json
import os
import pathlib
import shutil
import sys
import threading
import time

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from launch import cli
from qimg2.runtime import processes
from qimg2.runtime.run import Run
from qimg2.sharding import gather_ids, put_global_batch, to_host
from qimg2.training import checkpoint, faults, manifest
from qimg2.training.programs import StepPrograms
from qimg2.training.state import TrainState

NUM_BATCHES = 6


def batches(args):
  run = Run(args.config, args.workdir)
  loader = run.loader(run.cfg.stages[-1])
  for k in range(NUM_BATCHES):
    ids = to_host(run.put(loader.batch(k)[1])["sample_id"])
    if processes.is_first():
      print(json.dumps(ids.tolist()), flush=True)


def save(args):
  folder, hashed, digest = pathlib.Path(args.workdir), [], manifest._digest
  manifest._digest = lambda file, *like: hashed.append(file.path.as_posix()) or digest(file, *like)
  mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
  params = put_global_batch({"w": jnp.arange(64.0 * jax.device_count())}, mesh, {"batch": ("fsdp",)})
  step, key = jax.jit(lambda: (jnp.int32(3), jax.random.key(0)), out_shardings=NamedSharding(mesh, PartitionSpec()))()
  state = TrainState(step, {"model": params}, {}, {}, {}, key)
  writer = checkpoint.Checkpoints(folder / "checkpoints", keep=2)
  writer.save(state, {})
  writer.close()
  (folder / f"hashed{jax.process_index()}.json").write_text(json.dumps(hashed), encoding="utf-8")
  if processes.is_first():
    shutil.copytree(folder / "checkpoints" / "3", folder / "checkpoints" / "9")
  multihost_utils.sync_global_devices("9 is there")
  listdir, hidden = os.listdir, "9" if processes.is_first() else "3"
  os.listdir = lambda path=".": [name for name in listdir(path) if not (name == hidden and os.fspath(path).endswith("checkpoints"))]
  writer = checkpoint.Checkpoints(folder / "checkpoints", keep=2)
  for one in (state, state.replace(step=step + 1)):
    writer.save(one, {})
  writer.close()


def wait(args):
  mesh, rules = jax.make_mesh((jax.device_count(),), ("fsdp",)), {"batch": ("fsdp",)}
  total = jax.jit(lambda x: jnp.sum(x["x"]))
  start = time.monotonic()
  while time.monotonic() - start < 600:
    to_host(total(put_global_batch({"x": jnp.ones(jax.device_count())}, mesh, rules)))
    pathlib.Path(args.workdir, f"started{jax.process_index()}").touch()
    if args.mistake and jax.process_index() == args.victim:
      raise ValueError("This process alone\nmade a mistake.")
    time.sleep(0.05)


def stop(args):
  """Goes on from step 500 of a stage, once this process knows that one was asked to stop; a second stage begins at 0."""
  folder = pathlib.Path(args.workdir)
  with faults.PreemptionNotice() as asked:
    (folder / f"started{jax.process_index()}").touch()
    while not asked(None):
      time.sleep(0.02)
    multihost_utils.sync_global_devices("all know")  # by themselves or, those that were not asked, by the agreement
    stopped = next((f"{stage} {step}" for stage, first in (("one", 500), ("two", 0)) for step in range(first, first + 20) if asked(step)), "never")
    # One of two has its program, the other never: neither goes on. Then both have another one.
    end = threading.Event()
    programs = StepPrograms(lambda bucket: bucket or not jax.process_index() or end.wait(600), (1, 0))
    words = [programs.wait_for(1), programs.wait_for(0, lambda: "stop" if jax.process_index() and asked(None) else ""), programs.is_there(0)]
    words.append(processes.from_first("number", str(jax.process_index())))
    end.set()
  print(json.dumps([stopped, gather_ids([2**40 + jax.process_index(), 7]).tolist(), words]), flush=True)


def define_flags():
  config_flags.DEFINE_config_file("config", None, "Config.")
  flags.DEFINE_string("workdir", None, "Folder.", required=True)
  flags.DEFINE_string("do", None, "What.", required=True)
  flags.DEFINE_integer("victim", 0, "Which process fails.")
  flags.DEFINE_bool("mistake", False, "Whether it raises.")
  cli.define_process_flags()


def main(_):
  {"batches": batches, "save": save, "stop": stop, "wait": wait}[flags.FLAGS.do](flags.FLAGS)


if __name__ == "__main__":
  cli.run(cli.together(main), define_flags)
