"""The contract of methods carries: eight toy methods through the real `train_stage`, killed wherever it hurts, on several devices and processes."""

import dataclasses
import itertools
import json
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kill_points import last_arrays
from many import UNHURRIED_S, ends, start, together
from many import toy as toy_command

from qimg2.training import faults, optim
from qimg2.training.checkpoint import newest_step
from qimg2.training.metrics import read_rows
from tests.jobs import toy
from tests.jobs.toy_methods import METHODS, grpo

ONE = {"num_devices": 1}


def all_but_one_slow(methods):
  """The first of these methods for every day, the others with all tests."""
  first, *others = methods
  return [first, *(pytest.param(method, marks=pytest.mark.slow) for method in others)]


def test_a_mistake_in_a_batch_does_not_cut_off_the_save_before(tmp_path):
  with pytest.raises(ValueError, match="a broken record"):
    toy.run(toy.Job("supervised", save_every=1, **ONE), tmp_path, wrap=toy.die_before(6, ValueError("a broken record")))
  assert newest_step(tmp_path / "toy" / "checkpoints") == 6 and not list(tmp_path.rglob("*tmp*"))


def rows(folder):
  return read_rows(folder / "toy" / "metrics.jsonl")


def assert_same(one, other):
  assert (one / "toy" / "metrics.jsonl").read_bytes() == (other / "toy" / "metrics.jsonl").read_bytes()
  jax.tree.map(np.testing.assert_array_equal, last_arrays(one / "toy"), last_arrays(other / "toy"))


def test_saves_by_time_change_no_number(whole, tmp_path, monkeypatch):
  """Saved after every third step, which is no multiple of what is due by number, and killed between."""
  monkeypatch.setattr(faults, "time", types.SimpleNamespace(monotonic=itertools.count().__next__))
  job = toy.Job("supervised", save_every=1000, save_every_s=3, **ONE)
  with pytest.raises(toy.Killed):
    toy.run(job, tmp_path, wrap=toy.die_before(10))
  toy.let_threads_end(tmp_path)
  assert max(int(path.name) for path in (tmp_path / "toy" / "checkpoints").iterdir() if path.name.isdigit()) == 9
  toy.run(job, tmp_path)
  assert_same(tmp_path, whole("supervised"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """method -> folder of a run that nothing stopped."""
  folders = {}

  def train(method):
    if method not in folders:
      folders[method] = tmp_path_factory.mktemp(method)
      toy.run(toy.Job(method, **ONE), folders[method])
    return folders[method]
  return train


@pytest.mark.slow
@pytest.mark.parametrize("method", all_but_one_slow(METHODS))
def test_a_killed_run_ends_with_the_same_bits(whole, method, tmp_path):
  """Killed between two saves."""
  with pytest.raises(toy.Killed):
    toy.run(toy.Job(method, **ONE), tmp_path, wrap=toy.die_before(6))
  toy.let_threads_end(tmp_path)
  toy.run(toy.Job(method, **ONE), tmp_path)
  assert_same(tmp_path, whole(method))
  written = rows(tmp_path)
  assert [row["step"] for row in written if "skipped" in row] == list(range(1, 13))
  assert all(np.isfinite(value) for row in written for value in row.values())


@pytest.mark.parametrize("at", [pytest.param(5, marks=pytest.mark.slow), 6])  # at step 6 an evaluation is due, which the run that goes on owes
def test_a_run_that_is_asked_to_stop_ends_with_the_same_bits(whole, at, tmp_path):
  with pytest.raises(faults.Preempted, match=f"is saved at step {at} of 12"):
    toy.run(toy.Job("supervised", **ONE), tmp_path, stop=lambda step: step == at)
  toy.run(toy.Job("supervised", **ONE), tmp_path)
  assert_same(tmp_path, whole("supervised"))


@pytest.mark.slow
def test_a_run_that_is_killed_before_any_checkpoint_goes_on_from_its_copies(whole, tmp_path, caplog):
  job = toy.Job("supervised", save_every=1000, local_copies=(str(tmp_path / "disk"), 1e-6), **ONE)
  with pytest.raises(toy.Killed):
    toy.run(job, tmp_path / "run", wrap=toy.die_before(8))
  toy.run(job, tmp_path / "run")
  assert "Stage toy goes on at step 7 from copies on the machines' own disks: the newest checkpoint is of step None" in caplog.text
  assert_same(tmp_path / "run", whole("supervised"))


@pytest.mark.slow
def test_a_step_that_is_dropped_between_micro_batches_ends_with_the_same_bits(tmp_path):
  """The third, and the same again after a restart. One program for all micro-batches gives the same numbers, nearly: the compiler
  may order operations otherwise."""
  make = lambda stop_after: toy.Job("supervised", settings=dataclasses.replace(toy.SETTINGS, accumulate=4),
                                    tolerance=faults.Settings(stop_after=stop_after), **ONE)
  for name, stop_after in (("one", "step"), ("whole", "micro_batch")):
    toy.run(make(stop_after), tmp_path / name)
  for at in (13, 3):
    asked = itertools.count(1)
    with pytest.raises(faults.Preempted):
      toy.run(make("micro_batch"), tmp_path / "cut", stop=lambda step, at=at, asked=asked: step is not None and next(asked) >= at)
    assert [path.name for path in (tmp_path / "cut" / "toy" / "checkpoints").glob("?")] == ["2"]
  toy.run(make("micro_batch"), tmp_path / "cut")
  assert_same(tmp_path / "cut", tmp_path / "whole")
  for mine, its in zip(rows(tmp_path / "whole"), rows(tmp_path / "one"), strict=True):
    np.testing.assert_allclose([mine[key] for key in sorted(mine)], [its[key] for key in sorted(its)], rtol=1e-5)


def test_frozen_weights_that_changed_meanwhile_are_refused(tmp_path, caplog):
  job = lambda step: toy.Job("supervised", description={"frozen_steps": {"judge": ("runs/a/judge", step)}}, **ONE)
  with pytest.raises(faults.Preempted):
    toy.run(job(100), tmp_path, stop=lambda step: step == 5)
  with pytest.raises(ValueError, match="Stage toy was trained with judge of step 100 of runs/a/judge, which has step 200 now: put that checkpoint"):
    toy.run(job(200), tmp_path)
  with pytest.raises(faults.Preempted):
    toy.run(dataclasses.replace(job(200), may_change=True), tmp_path, stop=lambda step: step == 9)
  assert "Stage toy goes on all the same, but was trained with judge of step 100 of runs/a/judge, which has step 200 now" in caplog.text
  with pytest.raises(ValueError, match="judge of step 200 of runs/a/judge, which has step 100 now"):
    toy.run(job(100), tmp_path)


def test_what_is_not_due_is_left_out_of_the_row(whole):
  written = [row for row in rows(whole("dmd")) if "skipped" in row]
  assert all(("model/loss" in row) == (row["step"] % 2 == 0) and "fake/loss" in row for row in written)
  assert written[1]["model/learning_rate"] == np.float32(5e-4) and written[3]["model/learning_rate"] == np.float32(1e-3)  # of its own updates


def test_the_first_minibatch_is_on_policy_and_failed_rewards_are_left_out(whole):
  written = [row for row in rows(whole("grpo")) if "skipped" in row]
  # The probabilities of the rollout are those of the update, but for the rounding of programs of other shapes.
  assert max(row["ratio_off"] for row in written) <= 16 * np.finfo(np.float32).eps
  assert all(row["reward/left_out"] == 1 / 16 for row in written)  # one prompt of sixteen
  assert all(row["reward/near"] < 0 for row in written)


@pytest.mark.slow
def test_methods_learn(tmp_path):
  settings = optim.Config(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0)
  quick = dict(settings=settings, log_every=10, save_every=1000, eval_every=150, **ONE)
  toy.run(toy.Job("supervised", 150, **quick), tmp_path / "supervised")
  error = [row["val_loss"] for row in rows(tmp_path / "supervised") if "val_loss" in row]
  assert error[-1] < 2.5  # 5 before; the variance of heap and noise is left
  toy.run(toy.Job("grpo", 150, **quick), tmp_path / "grpo")
  reward = [row["reward/near"] for row in rows(tmp_path / "grpo") if "reward/near" in row]
  assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.5
  toy.run(toy.Job("language", 150, **quick), tmp_path / "language")
  right = [row["val_accuracy"] for row in rows(tmp_path / "language") if "val_accuracy" in row]
  assert right[-1] > 0.5  # 1/7 by chance


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_language_model_learns_each_token_alike(whole, accumulate, tmp_path):
  """The loss is the mean over all tokens that are not prompt or padding, however they lie in rows and micro-batches."""
  job = toy.Job("language", 1, settings=dataclasses.replace(toy.SETTINGS, accumulate=accumulate), eval_every=100, **ONE)
  toy.run(job, tmp_path)
  stage, mesh, rules = toy.stage_of(job)
  weights, batch = toy.weights(job, "model", stage.algorithm, mesh, rules), job.loader(mesh, rules).batch(0)
  log_p = np.asarray(jax.nn.log_softmax(toy.Nets().logits(weights, batch["tokens"])))
  costs = [-log_p[row, place - 1, batch["tokens"][row, place]] for row, place in zip(*np.nonzero(batch["loss_mask"]))]
  assert len(set(batch["weight"])) > 3 and len(costs) == batch["weight"].sum()
  np.testing.assert_allclose(rows(tmp_path)[0]["loss"], np.mean(costs), rtol=1e-6)


def test_an_adapter_starts_as_its_base_and_leaves_it(whole):
  away = [row["away"] for row in rows(whole("adapter")) if "away" in row]
  assert away[0] == 0 and away[-1] > 0  # "ref" is the base, to the bit
  assert {path.name for path in (whole("adapter") / "toy" / "checkpoints" / "12").iterdir()} >= {"params.adapter", "average.ema"}


@pytest.mark.slow
@pytest.mark.parametrize("method", all_but_one_slow(["grpo", "adapter", "dmd", "language"]))
def test_eight_devices_give_the_numbers_of_one(whole, method, tmp_path):
  toy.run(toy.Job(method, mesh={"fsdp": 4, "tensor": 2}), tmp_path)
  for mine, its in zip(rows(tmp_path), rows(whole(method)), strict=True):
    assert mine.keys() == its.keys()
    np.testing.assert_allclose([mine[name] for name in its], list(its.values()), rtol=2e-4, atol=2e-5)


# Bad scores.


def scored_by(score, **fields):
  method = grpo()
  return dataclasses.replace(method, rollout=dataclasses.replace(method.rollout, score=score, **fields))


@pytest.mark.parametrize("score, message", [
    (lambda samples, batch: {"near": np.zeros(3)}, r"Reward 'near' has shape \(3,\): it must give one number for each of the 64 samples"),
    (lambda samples, batch: {"far": np.zeros(64)}, "The score gives the rewards far, but the method declares near"),
])
def test_a_score_that_does_not_fit_is_named(tmp_path, score, message):
  with pytest.raises(ValueError, match=message):
    toy.run(toy.Job("grpo", algorithm=scored_by(score), **ONE), tmp_path)


def test_rows_that_the_mesh_does_not_divide_are_named(tmp_path):
  method = grpo(num_minibatches=16)  # four samples each
  with pytest.raises(ValueError, match="The rollout's minibatches have 4 rows, which the 8 parts of the mesh's batch axes do not divide"):
    toy.run(toy.Job("grpo", algorithm=method), tmp_path)


def test_a_finished_stage_is_left_alone(whole):
  before = (whole("supervised") / "toy" / "metrics.jsonl").read_bytes()
  assert toy.run(toy.Job("supervised", **ONE), whole("supervised"), wrap=toy.die_before(0)) is None
  assert (whole("supervised") / "toy" / "metrics.jsonl").read_bytes() == before


def test_each_step_draws_samples_of_its_own(tmp_path):
  """Of the same batch."""
  class Same:
    def __init__(self, loader):
      self.batch = loader.batch(0)

    def iterate(self, first):
      yield from itertools.repeat((0, self.batch))
  drawn = []
  def score(samples, batch):
    drawn.append(samples["path"][:, 0])
    return {"near": np.zeros(len(samples["label"]))}
  toy.run(toy.Job("grpo", 3, algorithm=scored_by(score), **ONE), tmp_path, wrap=Same)
  assert len(drawn) == 3 and all((one != other).all() for one, other in itertools.combinations(drawn, 2))


def test_chunks_keep_samples_rewards_and_rows_together(tmp_path):
  """With noise that is a function of the rows alone, a rollout in four chunks is the rollout in one; each is scored with its own rows."""
  base, seen = grpo().rollout, []

  def score(samples, batch):
    np.testing.assert_array_equal(samples["group"], np.repeat(batch["sample_id"], 4))
    seen.append(batch["sample_id"].tolist())
    return base.score(samples, batch)
  generate = lambda params, nets, batch, key: base.generate(params, nets, batch, jax.random.key(0))
  place = np.arange(64) / 64  # so that it matters where a sample stands
  minibatches = lambda samples, key: base.minibatches({**samples, "rewards": {"near": samples["rewards"]["near"] * place}}, key)
  for chunks in (1, 4):
    algorithm = scored_by(score, generate=generate, minibatches=minibatches, chunks=chunks)
    toy.run(toy.Job("grpo", 1, algorithm=algorithm, eval_every=100, **ONE), tmp_path / str(chunks))
  assert seen == [list(range(16)), *(list(range(first, 16, 4)) for first in range(4))]
  one, four = (next(row for row in rows(tmp_path / chunks) if "skipped" in row) for chunks in ("1", "4"))
  np.testing.assert_allclose([four[name] for name in one], list(one.values()), rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="divides 16 rows into 3 chunks over 1 parts"):
    toy.run(toy.Job("grpo", 1, algorithm=scored_by(score, chunks=3), **ONE), tmp_path / "3")


@pytest.mark.slow
def test_each_minibatch_has_a_key_of_its_own(tmp_path):
  method = grpo()
  update, = method.updates
  def loss(*arguments):
    draw = jax.random.normal(arguments[-1], ())
    return update.loss(*arguments)[0], {"draw": draw, "square": draw**2}
  toy.run(toy.Job("grpo", 2, algorithm=dataclasses.replace(method, updates=(dataclasses.replace(update, loss=loss),)), **ONE), tmp_path)
  variances = [row["square"] - row["draw"] ** 2 for row in rows(tmp_path) if "square" in row]  # of the draws of one step's minibatches
  assert len(variances) == 2 and min(variances) > 1e-4


def test_when_every_reward_fails_the_update_is_skipped(tmp_path):
  nothing = lambda samples, batch: {"near": np.full(len(samples["label"]), np.nan)}
  toy.run(toy.Job("grpo", 3, algorithm=scored_by(nothing), eval_every=100, **ONE), tmp_path)
  written = [row for row in rows(tmp_path) if "skipped" in row]
  assert [row["skipped"] for row in written] == [1, 2, 3]
  assert written[0]["loss"] is None and written[0]["reward/near"] is None  # valid JSON: no NaN


def test_figures_of_a_reward_are_those_of_samples_that_are_asked_for_it(tmp_path):
  """Whatever the device says of the others: here of rows 4 to 15, of a category where it counts nothing, and of one that it fails at."""
  rollout = grpo().rollout

  def generate(params, nets, batch, key):
    return {**rollout.generate(params, nets, batch, key), "category": jnp.repeat((jnp.arange(16) >= 4).astype(jnp.int32), 4)}

  def score(params, nets, samples, batch):
    number = jnp.arange(64.0)
    return {"near": jnp.zeros(64), "one": jnp.where(number == 3, jnp.nan, number), "gold": number}
  algorithm = scored_by(score, generate=generate, rewards=("near", "one", "gold"), on_device=True, weights=((1.0, 0.5, 0.0), (1.0, 0.0, 0.0)))
  toy.run(toy.Job("grpo", 1, algorithm=algorithm, eval_every=100, **ONE), tmp_path)
  row = next(row for row in rows(tmp_path) if "skipped" in row)
  assert row["reward/one"] == np.float32(117 / 15) and row["reward/one/scored"] == 15 / 16 and row["reward/left_out"] == 1 / 64
  assert row["reward/gold"] == 31.5 and row["reward/gold/scored"] == 1


def test_the_number_of_minibatches_is_as_declared(tmp_path):
  with pytest.raises(ValueError, match="gives arrays of 2 minibatches, but declares 3"):
    toy.run(toy.Job("grpo", algorithm=scored_by(grpo().rollout.score, num_minibatches=3), **ONE), tmp_path)


def test_a_trace_is_written_where_it_is_asked_for(tmp_path):
  toy.run(toy.Job("supervised", 6, profile=(3, 4), **ONE), tmp_path)
  names = [path.name for path in (tmp_path / "toy" / "profile").rglob("*") if path.is_file()]
  assert any(name.endswith(".xplane.pb") for name in names) and any("perfetto_trace" in name for name in names), names


# Real processes.


@pytest.mark.slow
def test_killed_in_the_rollout_in_scoring_and_between_minibatches(tmp_path):
  command = lambda name: toy_command(tmp_path / name, "--method=grpo")
  together(1, *command("whole"), TOY_DIES_AT="never:0@")
  for number, place in enumerate(("rollout:96", "score:112", "minibatch1:160")):  # ids begin at 16 k: steps 7, 8 and 11
    (code, _, stderr), = ends(start(1, *command("cut"), TOY_DIES_AT=f"{place}@{tmp_path}/died{number}"), 300)
    assert code == -signal.SIGKILL, stderr[-2000:]
  together(1, *command("cut"), TOY_DIES_AT="never:0@")
  assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_processes_that_hold_the_same_rows_take_the_same_rewards(whole, tmp_path):
  """Two processes divide the weights alone; the judge of the second one says something else."""
  together(2, *toy_command(tmp_path, "--method=grpo", '--mesh={"fsdp": 1, "tensor": 2}', "--biased_judge"), heartbeat_s=UNHURRIED_S)
  for mine, its in zip(rows(tmp_path), rows(whole("grpo")), strict=True):
    np.testing.assert_allclose([mine[name] for name in its], list(its.values()), rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rewarded"])
def test_two_processes_of_two_devices_give_the_numbers_of_one(whole, method, tmp_path):
  """Samples are divided over the processes, which score each its own, and weights over them and over the devices of each."""
  together(2, *toy_command(tmp_path, f"--method={method}", '--mesh={"fsdp": 2, "tensor": 2}'), num_devices=2, heartbeat_s=UNHURRIED_S)
  for mine, its in zip(rows(tmp_path), rows(whole(method)), strict=True):
    np.testing.assert_allclose([mine[name] for name in its], list(its.values()), rtol=2e-4, atol=2e-5)
  assert json.loads((tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
