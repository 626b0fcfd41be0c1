"""One rollout of a policy gradient on the toy job, over all devices of some processes.

  python -m tests.jobs.rollout --workdir=DIR [--coordinator=... as every launcher]
      the first process writes rollout.npz, what `rolled` gives; each writes scored<i>.json, the ids that it was asked to score
"""

import json
import pathlib

import jax
import numpy as np
from absl import flags

from launch import cli
from qimg2.algorithms import Rewards
from qimg2.algorithms.flow_grpo import flow_grpo
from qimg2.batch import for_device
from qimg2.flow import Schedule
from qimg2.runtime import processes
from qimg2.sharding import put_batch, to_host
from qimg2.training.stage import compile_rollouts
from qimg2.training.state import abstract_state, init_state
from tests.jobs import toy
from tests.jobs.toy_methods import Nets

SETTINGS = dict(group=4, num_steps=4, guidance=2.0, window=2, window_end=3, num_train_steps=1, chunks=2, oversample=2.0)
ROWS, BATCH = 128, 3  # rows for 64 devices in two chunks; number of the batch


def rolled(num_devices=None):
  """({path: array} of the data of a step, of its metrics and of each sample's values, sample ids in the order in which this process scored them)."""
  toy.ROWS, scored = ROWS, []

  def score(pictures, tasks):
    scored.extend(task["sample_id"] for task in tasks)
    ids = np.array([task["sample_id"] for task in tasks])
    return {"near": np.where(ids % 5 == 0, np.nan, ids % 7 + pictures[:, 0, 0, 0] / 255).astype(np.float32)}  # some groups have none

  method = flow_grpo(Schedule(shift="none", terminal=None), Rewards(("near",), score), **SETTINGS)
  job = toy.Job("pictures", num_devices=num_devices, algorithm=method)
  stage, mesh, rules = toy.stage_of(job)
  algorithm, loader = stage.algorithm, job.loader(mesh, rules)
  weights = {role: toy.weights(job, role, algorithm, mesh, rules) for role in algorithm.roles}
  frozen, trained = ({role: weights[role] for role in some} for some in (algorithm.frozen, algorithm.trained))
  abstract = abstract_state(algorithm, stage.optimizers, stage.specs, mesh, rules)
  begin = jax.jit(lambda params: init_state(algorithm, stage.optimizers, params, {}, jax.random.key(5)),
                  out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
  rollout, = compile_rollouts(stage, Nets(), abstract, frozen, mesh, rules)
  rows = loader.batch(BATCH)
  found = to_host(rollout(begin(trained), frozen, put_batch(for_device(rows), mesh, rules), rows))
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(found)}, scored


def define_flags():
  """The flags of this job."""
  flags.DEFINE_string("workdir", None, "Folder.", required=True)
  cli.define_process_flags()


def main(_):
  """Writes what `rolled` gives."""
  found, scored = rolled()
  folder = pathlib.Path(flags.FLAGS.workdir)
  (folder / f"scored{jax.process_index()}.json").write_text(json.dumps([int(one) for one in scored]), encoding="utf-8")
  if processes.is_first():
    np.savez(folder / "rollout.npz", **found)


if __name__ == "__main__":
  cli.run(cli.together(main), define_flags)
