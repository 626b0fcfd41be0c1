"""Methods that learn from their own pictures, on the toy job: on-policy where they say so, killed, on eight devices, and better after it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kill_points import last_arrays
from many import UNHURRIED_S, together
from small_networks import FEATURES, NETS, PIXELS, abstract_batch

from qimg2 import params as P
from qimg2.algorithms import Rewards
from qimg2.algorithms.diffusion_nft import diffusion_nft
from qimg2.algorithms.flow_grpo import flow_grpo
from qimg2.flow import Schedule
from qimg2.training import optim
from qimg2.training.metrics import read_rows
from tests.jobs import rollout, toy
from tests.jobs.toy_methods import HEAPS, Nets

SCHEDULE = Schedule(shift="none", terminal=None)
GRPO = dict(group=4, num_steps=6, guidance=2.0, window=3, window_end=5, num_train_steps=2, clip=0.1, kl=0.1, chunks=2, oversample=2.0, min_spread=1.8)


def near(pictures, tasks):
  """How near the point that a picture shows is to the heap of its label; a judge that fails now and then."""
  points = 8 * (pictures[:, 0, 0, :2] / 255 - 0.5)
  reward = -np.linalg.norm(points - HEAPS[[task["label"] for task in tasks]], axis=1).astype(np.float32)
  reward[pictures[:, 0, 0, 0] % 16 == 5] = np.nan
  return {"near": reward}


def train(folder, algorithm, num_steps=3, num_devices=1):
  """The rows of a run."""
  settings = optim.Config(learning_rate=0.01, warmup_steps=0)
  toy.run(toy.Job("pictures", num_steps, algorithm=algorithm, num_devices=num_devices, settings=settings, save_every=2), folder)
  return [row for row in read_rows(folder / "toy" / "metrics.jsonl") if "reward/near" in row]


def grpo(score=near, **settings):
  return flow_grpo(SCHEDULE, Rewards(("near",), score), **GRPO | settings)


def nft(**settings):
  return diffusion_nft(SCHEDULE, Rewards(("near",), near), **dict(group=4, num_steps=4, num_train_times=2, num_minibatches=2) | settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(folder, rows) of a run of `grpo` that nothing stopped."""
  folder = tmp_path_factory.mktemp("whole")
  return folder, train(folder, grpo())


def test_the_first_minibatch_is_on_policy_and_groups_without_spread_are_replaced(whole):
  assert len(whole[1]) == 3 and all(np.isfinite(value) for row in whole[1] for value in row.values())
  for row in whole[1]:
    assert row["ratio_off"] == 0.0 and 0.0 <= row["float32_off"] < 1e-5 and row["divergence"] > 0 and row["skipped"] == 0
    assert 0 <= row["ratio_by_rounding"] < 1e-4 and row["clipped_by_rounding"] == 0
    assert row["reward/left_out"] > 0 and row["ratio"] != 1.0 and 0 < row["advantage"] < 5
  assert max(row["replaced"] for row in whole[1]) > 0 and whole[1][0]["kl"] < whole[1][2]["kl"]


def test_the_guided_policy_may_learn_and_starts_at_its_reference(tmp_path):
  row, = train(tmp_path, grpo(guidance_in_loss=True, objective="guard", num_minibatches=1), num_steps=1)
  assert row["ratio_off"] == 0.0 and row["ratio"] == 1.0 and row["kl"] == 0.0 and row["grad_norm"] > 0


def test_a_rollout_of_another_policy_than_the_update_s_ends_the_stage(tmp_path):
  method = grpo()
  other = lambda params, *rest: method.rollout.generate({**params, "model": jax.tree.map(lambda x: 1.02 * x, params["model"])}, *rest)
  with pytest.raises(FloatingPointError, match="Stage toy, step 1: float32_off is 0.0[0-9]+, and must not be above 0.001: "):
    train(tmp_path, dataclasses.replace(method, rollout=dataclasses.replace(method.rollout, generate=other)))
  assert not list((tmp_path / "toy" / "checkpoints").glob("[0-9]*"))


def test_what_rounding_clips_is_told_also_where_the_second_minibatch_has_no_row(tmp_path):
  """Here 3e-4 of all weights stand for rounding."""
  found = []
  for name, every in (("whole", 1), ("half", 2)):
    def score(pictures, tasks, every=every):
      return {"near": np.where(np.arange(len(tasks)) % every == 0, near(pictures, tasks)["near"], np.nan)}
    method = grpo(score, clip=1e-5, kl=0.0, chunks=1, oversample=1.0, min_spread=0.0)
    rounded = lambda params: {**params, "model": jax.tree.map(lambda x: 1.0003 * x, params["model"])}
    other = lambda params, *rest, method=method: method.rollout.generate(rounded(params), *rest)
    found += train(tmp_path / name, dataclasses.replace(method, rollout=dataclasses.replace(method.rollout, generate=other)), num_steps=1)
  assert all(0 < row["clipped_by_rounding"] < 1 and row["ratio_by_rounding"] > 1e-5 and row["ratio_off"] == 0 for row in found)
  assert found[1]["skipped"] == 0 and abs(found[1]["float32_off"] / found[0]["float32_off"] - 1) < 0.3  # nearly the same rows


def test_a_run_that_is_killed_while_it_scores_ends_with_the_same_bits(whole, tmp_path):
  asked = []
  def dying(pictures, tasks):
    asked.append(len(tasks))
    if len(asked) == 5:
      raise KeyboardInterrupt
    return near(pictures, tasks)
  with pytest.raises(KeyboardInterrupt):
    train(tmp_path, grpo(dying))
  toy.let_threads_end(tmp_path)
  assert train(tmp_path, grpo()) == whole[1] and set(asked) == {32}
  jax.tree.map(np.testing.assert_array_equal, last_arrays(tmp_path / "toy"), last_arrays(whole[0] / "toy"))


def test_eight_devices_give_the_numbers_of_one(whole, tmp_path):
  for mine, its in zip(train(tmp_path, grpo(), num_devices=8), whole[1], strict=True):
    np.testing.assert_allclose([mine[key] for key in sorted(mine)], [its[key] for key in sorted(its)], rtol=2e-3, atol=1e-5)


def test_a_group_begins_with_one_noise_where_it_is_shared():
  """Then the SDE alone tells its pictures apart."""
  params = {role: jax.tree.map(lambda p: np.full(p.shape, 0.1, np.float32), Nets().specs()[network], is_leaf=P.is_param) for role, network in (
      ("model", "mmdit"), ("encoder", "qwen3_vl"), ("vae", "vae"))}
  batch = {"x": jnp.zeros((2, 2)), "label": jnp.array([1, 2])}

  def begins(shared):
    settings = dict(shared_noise=shared, window=5, num_train_steps=5, guidance=1.0)
    samples = grpo(**settings).rollout.generate(params, Nets(), batch, jax.random.key(0))
    return np.asarray(samples["path"].x[:, 0, 0, 0]).reshape(2, 4, 2), np.asarray(samples["path"].x[:, 1, 0, 0])
  (one, after), (own, _) = begins(True), begins(False)
  assert (one == one[:, :1]).all() and (one[0] != one[1]).all() and len(np.unique(after[:, 0])) == 8 == len(np.unique(own[..., 0]))


def test_what_learns_by_contrast_gets_nearer(tmp_path):
  rows = train(tmp_path, nft(), num_steps=20)
  assert np.mean([row["reward/near"] for row in rows[-3:]]) > np.mean([row["reward/near"] for row in rows[:3]]) + 0.3
  assert rows[0]["away_from_reference"] < rows[-1]["away_from_reference"] and 0.4 < rows[0]["good"] < 0.6


@pytest.mark.parametrize("make, settings, fields", [(grpo, dict(guidance_in_loss=True), FEATURES), (nft, dict(guidance=2.0), PIXELS)])
def test_the_networks_of_a_run_take_part_from_prompt_to_loss(make, settings, fields):
  """Edits, from pixels and from a cache, as far as shapes tell."""
  method = make(**settings)
  fields = fields | {f"null_{name}": fields[name] for name in ("tokens", "token_count", "features") if name in fields}
  params = {name: P.abstract(NETS.specs()[role.network]) for name, role in method.roles.items()}
  params |= {name: params[average.role] for name, average in method.averages.items()}

  def step(params, batch, key):
    samples = method.rollout.generate(params, NETS, batch, key)
    scores = {"rewards": {"near": jnp.zeros(32)}, "weight": jnp.ones(32)}
    data = method.rollout.minibatches({**samples, **scores}, key)
    return samples["pictures"], *method.updates[0].loss(params, params, NETS, jax.tree.map(lambda x: x[0], data), key)

  pictures, loss, metrics = jax.eval_shape(step, params, abstract_batch(fields, 8), jax.random.key(0))
  assert pictures.shape == (32, 64, 32, 4) and pictures.dtype == jnp.uint8 and loss.shape == (8 if make is grpo else 16,)
  assert "pictures" in method.rollout.scored and {x.shape for x in metrics.values()} == {loss.shape}


@pytest.mark.parametrize("make, settings, message", [
    (grpo, dict(window=7), "window=7, window_end=5 and num_steps=6 must rise"), (grpo, dict(objective="ppo"), "choose one of grpo, guard, dppo"),
    (grpo, dict(kl_form="k3"), "choose one of gaussian, flow_grpo"), (grpo, dict(group=1), "group is 1: an advantage needs at least 2"),
    (grpo, dict(deviation="prompt"), "choose one of group, batch"), (grpo, dict(clip=0.0), "clip=0.0 must be above 0"),
    (nft, dict(num_train_times=5), "must be from 1 to num_steps=4"), (nft, dict(old_cap=1.0), r"old_cap=1.0 must be in \[0, 1\)"),
    (nft, dict(beta=0.0), "beta=0.0 must be above 0"), (nft, dict(num_steps=1), "num_steps=1 at least 2")])
def test_settings_that_do_not_fit_are_one_sentence(make, settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)


@pytest.mark.parametrize("settings, message", [
    (dict(chunks=3), "divides 16 rows into 3 chunks"), (dict(num_minibatches=5), "32 samples cannot be divided into num_minib"),
    (dict(oversample=20.0), "Of 16 prompts in a batch oversample=20.0 leaves none")])
def test_numbers_that_do_not_divide_the_batch_are_one_sentence(settings, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    train(tmp_path, grpo(**settings))


@pytest.mark.slow
def test_four_processes_of_sixteen_devices_make_the_rollout_of_one(tmp_path, monkeypatch):
  """Prompts, noise, what is drawn, rewards, which groups are trained, and the order of the minibatches. Each process scores its own samples alone."""
  monkeypatch.setattr(toy, "ROWS", toy.ROWS)  # which the job changes
  alone, order = rollout.rolled(1)
  together(4, "-m", "tests.jobs.rollout", f"--workdir={tmp_path}", num_devices=16, heartbeat_s=UNHURRIED_S)
  with np.load(tmp_path / "rollout.npz") as found:
    assert set(found) == set(alone) and len(alone) > 10
    for name, x in alone.items():
      exact = x.dtype.kind in "iub" or "noise" in name or name.endswith("['weight']")
      np.testing.assert_allclose(found[name], x, err_msg=name, **(dict(rtol=0) if exact else dict(rtol=2e-4, atol=2e-5)))
  parts = [json.loads((tmp_path / f"scored{i}.json").read_text()) for i in range(4)]
  assert sorted(one for part in parts for one in part) == sorted(order) and len({*order}) == rollout.ROWS
  assert [len({*part}) for part in parts] == [rollout.ROWS // 4] * 4
