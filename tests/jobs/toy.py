"""The toy job: the real `train_stage`, checkpoints, processes and stops, with one of the methods of `toy_methods` on points in the plane or on a
few tokens. It compiles in a second.

  python -m tests.jobs.toy --method=grpo --workdir=DIR [--num_steps=12] [--coordinator=... as every launcher]
"""

import dataclasses
import itertools
import json
import os
import signal
import sys
import time
import zlib

import jax
import numpy as np
from absl import flags

from launch import cli
from qimg2 import params as P
from qimg2 import sharding
from qimg2.batch import for_device
from qimg2.places import find_place
from qimg2.runtime import processes
from qimg2.training import faults, optim, trainer
from qimg2.training.state import make_optimizers
from qimg2.training.validation import Evaluator
from qimg2.training.watch import Settings as WatchSettings
from tests.jobs.toy_methods import HEAPS, LABELS, METHODS, VOCABULARY, Nets

ROWS = 16
SETTINGS = optim.Config(learning_rate=3e-3, warmup_steps=3, schedule="cosine", weight_decay=0.01)


def points(rng):
  """A batch of points around four heaps."""
  label = rng.integers(0, LABELS, ROWS).astype(np.int32)
  return {"x": (HEAPS[label] + 0.3 * rng.normal(size=(ROWS, 2))).astype(np.float32), "label": label, "null_label": np.full_like(label, LABELS)}


def sentences(rng):
  """A batch of tokens, each the sum of the two before it; the first two are the prompt, and a row has 1 to 6 tokens more, then padding of 0."""
  tokens, length = rng.integers(0, VOCABULARY, (ROWS, 8)).astype(np.int32), rng.integers(3, 9, ROWS)
  for place in range(2, 8):
    tokens[:, place] = (tokens[:, place - 1] + tokens[:, place - 2]) % VOCABULARY
  place = np.arange(8)[None]
  mask = (place >= 2) & (place < length[:, None])
  return {"tokens": np.where(place < length[:, None], tokens, 0), "loss_mask": mask, "weight": mask.sum(axis=1).astype(np.float32)}


class Loader:
  """Points, or sentences for a language model: batch k is a function of k, and its ids begin at ROWS k. With `tasks` rewards are told of each row."""

  def __init__(self, mesh, rules, slow_s=0.0, make=points, tasks=False):
    self._parts, self._num = sharding.local_parts(mesh, rules)
    self._slow_s, self._make, self._tasks = slow_s, make, tasks

  def batch(self, k):
    """This process's rows of batch k."""
    whole = self._make(np.random.default_rng(k)) | {"sample_id": ROWS * k + np.arange(ROWS, dtype=np.int64)}
    size = ROWS // self._num
    own = {name: np.concatenate([x[part * size:(part + 1) * size] for part in self._parts]) for name, x in whole.items()}
    if not self._tasks:
      return own
    tasks = [{"label": label, "sample_id": sample_id, "category": ("even", "odd")[label % 2]}
             for label, sample_id in zip(own["label"].tolist(), own["sample_id"].tolist())]
    return {**own, "category": own["label"] % 2, "tasks": tuple(tasks)}

  def iterate(self, start):
    """(bucket, batch) from `start` on."""
    for k in range(start, 2**30):
      time.sleep(self._slow_s)
      yield 0, self.batch(k)


@dataclasses.dataclass(frozen=True)
class Job:
  """A toy run. `loader` wraps the loader; the other fields are those of `trainer.Stage`, or settings of the mesh."""
  method: str
  num_steps: int = 12
  mesh: dict = dataclasses.field(default_factory=lambda: {"fsdp": -1})
  num_devices: int | None = None
  settings: optim.Config = SETTINGS
  own: dict = dataclasses.field(default_factory=dict)
  algorithm: object = None
  log_every: int = 1
  save_every: int = 4
  eval_every: int = 6
  slow_s: float = 0.0
  tolerance: faults.Settings = faults.Settings()
  restored: dict = dataclasses.field(default_factory=dict)
  profile: tuple | None = None
  description: dict = dataclasses.field(default_factory=lambda: {"seed": 0})
  save_every_s: float = 0.0
  may_change: bool = False
  local_copies: tuple = ("", 0.0)
  watch: WatchSettings = WatchSettings()

  def loader(self, mesh, rules):
    """The loader of the method's data."""
    return Loader(mesh, rules, self.slow_s, sentences if self.method == "language" else points, self.method in ("rewarded", "pictures"))


def weights(job, role, algorithm, mesh, rules):
  """Random weights of a role: those of the role that it starts as."""
  specs = algorithm.specs(Nets().specs(), {})[role]
  places, seed = sharding.param_shardings(specs, mesh, rules), zlib.crc32((algorithm.roles[role].start or role).encode())
  if algorithm.roles[role].network.startswith("lora/"):  # as runs draw them
    return jax.jit(lambda: P.init(specs, jax.random.key(seed)), out_shardings=places)()
  return jax.tree.map(lambda x, where: jax.make_array_from_callback(x.shape, where, x.__getitem__), drawn(specs, seed), places)


def drawn(specs, seed):
  """Random weights of a toy network, as numpy arrays."""
  rng = np.random.default_rng(seed)
  return P.map_with_path(lambda path, p: p.init(rng, p.shape, p.dtype), specs)


class Killed(BaseException):
  """Ends a run where it is, as a kill does: nothing catches it."""


def die_before(batch, reason=Killed):
  """Wraps a loader: the process ends, or fails, when it asks for this batch."""
  def wrap(loader):
    class Dying:
      def iterate(self, first):
        for bucket_and_rows in loader.iterate(first):
          if bucket_and_rows[1]["sample_id"][0] == ROWS * batch:
            raise reason
          yield bucket_and_rows
    return Dying()
  return wrap


def let_threads_end(folder):
  """Waits for the save that a real kill would have ended: its threads live on in this process."""
  limit = time.monotonic() + 300
  while list((folder / "toy" / "checkpoints").glob("*tmp*")) and time.monotonic() < limit:
    time.sleep(0.05)


def stage_of(job):
  """(stage without hooks, specs) of a job, its mesh and rules."""
  devices = jax.devices()[:job.num_devices] if job.num_devices else None
  mesh, rules = sharding.make_mesh(job.mesh, devices), sharding.RULES["fsdp_tensor"]
  algorithm = job.algorithm or METHODS[job.method]()
  specs = algorithm.specs(Nets().specs(), {})
  example = for_device(job.loader(mesh, rules).batch(0))
  rows = sharding.batch_sharding(mesh, rules)
  shapes = {name: jax.ShapeDtypeStruct((ROWS, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype), sharding=rows) for name, x in example.items()}
  optimizers = make_optimizers(algorithm, specs, job.settings, job.num_steps, job.own)
  return trainer.Stage("toy", algorithm, optimizers, specs, job.num_steps, (shapes,), (), job.settings.accumulate, job.log_every, job.save_every, 2,
                       job.tolerance, job.description, job.profile, save_every_s=job.save_every_s, local_copies=job.local_copies,
                       watch=job.watch, may_change=job.may_change), mesh, rules


def run(job, workdir, stop=lambda step: False, wrap=lambda loader: loader):
  """Trains a job in a folder, or goes on with it; returns the last state."""
  stage, mesh, rules = stage_of(job)
  algorithm, loader = stage.algorithm, job.loader(mesh, rules)
  frozen = {role: weights(job, role, algorithm, mesh, rules) for role in algorithm.frozen}
  held_out = {"weight": np.ones(ROWS // loader._num * len(loader._parts), np.float32), **for_device(loader.batch(2**20))}
  batches = [sharding.put_batch(held_out, mesh, rules)]
  evaluator = Evaluator(algorithm, Nets(), batches)
  stage = dataclasses.replace(stage, hooks=((job.eval_every, lambda params, step, writer: evaluator(params)),))
  start = lambda: ({role: weights(job, role, algorithm, mesh, rules) for role in algorithm.trained}, job.restored)
  place = find_place(workdir, "--workdir")
  return trainer.train_stage(stage, Nets(), wrap(loader), mesh, rules, place, jax.random.key(5), start, frozen, lambda: batches, stop)


def biased(method):
  """A method whose judge adds the number of the process to every reward, by row."""
  score = method.rollout.score
  def other(samples, batch):
    return {name: x * (1 + jax.process_index() * np.arange(len(x))) for name, x in score(samples, batch).items()}
  return dataclasses.replace(method, rollout=dataclasses.replace(method.rollout, score=other))


def define_flags():
  """The flags of this job."""
  flags.DEFINE_enum("method", "supervised", sorted(METHODS), "Which.")
  flags.DEFINE_string("workdir", None, "Folder.", required=True)
  flags.DEFINE_integer("num_steps", 12, "Steps.")
  flags.DEFINE_integer("save_every", 4, "Steps between saves.")
  flags.DEFINE_float("save_every_s", 0.0, "Seconds between saves by time.")
  flags.DEFINE_float("slow_s", 0.0, "Seconds that each batch takes.")
  flags.DEFINE_integer("accumulate", 1, "Micro-batches.")
  flags.DEFINE_enum("stop_after", "step", faults.STOP_AFTER, "What a stop waits for.")
  flags.DEFINE_integer("ask_at", 0, "At which of its questions whether to stop the last process asks for it; 0 for none.")
  flags.DEFINE_string("local_copies", "", "Folder of copies on this machine.")
  flags.DEFINE_bool("biased_judge", False, "Whether the judge says something else on every process but the first.")
  flags.DEFINE_string("mesh", '{"fsdp": -1}', "Mesh, as JSON.")
  cli.define_process_flags()


def asking(stop, at):
  """`stop` as the last process calls it: there the `at`-th question comes with a notice, and lets the others hear of it."""
  numbers = itertools.count(1)
  def ask(step):
    if step is not None and next(numbers) == at and jax.process_index() == jax.process_count() - 1:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1)
    return stop(step)
  return ask


def main(_):
  """Trains as the flags say."""
  args = flags.FLAGS
  job = Job(args.method, args.num_steps, json.loads(args.mesh), save_every=args.save_every, slow_s=args.slow_s,
            save_every_s=args.save_every_s, settings=dataclasses.replace(SETTINGS, accumulate=args.accumulate),
            tolerance=faults.Settings(stop_after=args.stop_after), local_copies=(args.local_copies, 0.01))
  if args.biased_judge:
    job = dataclasses.replace(job, algorithm=biased(METHODS[args.method]()))
  try:
    with faults.PreemptionNotice() as stop:
      state = run(job, args.workdir, asking(stop, args.ask_at))
  except faults.Preempted as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(faults.EXIT_CODE)
  if processes.is_first():
    print("it was done before" if state is None else f"done at {int(state.step)}")


if __name__ == "__main__":
  cli.run(cli.together(main), define_flags)
