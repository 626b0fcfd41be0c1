"""Preference optimisation: its gradient against a numpy derivation, one noise for both sides, and what it logs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_flow import SCHEDULE, Linear, draw

from qimg2.algorithms import Rewards
from qimg2.algorithms.dpo import best_and_worst, dpo, online_dpo, preference
from qimg2.training.metrics import read_rows
from tests.jobs import toy

BETA = 50.0


def by_hand(model, reference, x_w, x_l, t, noise):
  """(loss [B], margin [B], gradient of the mean loss by a, b and c) in float64."""
  wide = t[:, None, None, None]

  def side(x_0):
    x_t = (1 - wide) * x_0 + wide * noise
    off = lambda p: x_t * p["a"] + p["b"] + wide * p["c"] - (noise - x_0)
    own, other = off(model), off(reference)
    num = own[0].size
    slopes = {"a": (2 * own * x_t / num).sum(axis=(1, 2)), "b": (2 * own / num).sum(axis=(1, 2)), "c": (2 * own * wide / num).sum(axis=(1, 2, 3))}
    return (own**2).mean(axis=(1, 2, 3)) - (other**2).mean(axis=(1, 2, 3)), slopes

  (away_w, slope_w), (away_l, slope_l) = side(x_w), side(x_l)
  margin = -BETA / 2 * (away_w - away_l)
  outer = -1 / (1 + np.exp(margin)) * -BETA / 2 / len(t)  # derivative of -log sigmoid, then of the margin by the difference of errors
  gradient = {name: ((outer if name == "c" else outer[:, None]) * (slope_w[name] - slope_l[name])).sum(axis=0) for name in model}
  return np.log1p(np.exp(-margin)), margin, gradient


def mean(model, reference, x_w, x_l, t, noise):
  loss, metrics = preference(Linear(), model, reference, x_w, x_l, jnp.zeros((6, 1, 1, 1)), t, noise, BETA)
  return jnp.mean(loss), (loss, metrics)


MEAN = jax.jit(jax.value_and_grad(mean, has_aux=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_and_its_gradient_are_those_by_hand(seed):
  model, reference, x_w, x_l, t, noise = draw(seed)
  arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (model, reference, x_w, x_l, t, noise))
  (_, (loss, metrics)), gradient = MEAN(*arguments)
  wanted, margin, slopes = by_hand(model, reference, x_w, x_l, t, noise)
  np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(metrics["margin"], margin, rtol=1e-5, atol=1e-4)  # of numbers of some hundreds
  np.testing.assert_array_equal(metrics["accuracy"], margin > 0)
  np.testing.assert_allclose(metrics["reward_chosen"] - metrics["reward_rejected"], metrics["margin"], rtol=1e-4, atol=1e-4)
  for name, slope in slopes.items():
    np.testing.assert_allclose(gradient[name], slope, rtol=1e-5, atol=1e-5 * np.abs(slope).max())


def batch_of(seed=0, **changes):
  _, _, x_w, x_l, _, _ = draw(seed)
  return {"latents": jnp.float32(x_w), "rejected_latents": jnp.float32(x_l), "prompt": jnp.arange(6.0), "sample_id": jnp.arange(6)} | changes


def weights_of(seed=0):
  model, reference, *_ = draw(seed)
  some = lambda tree: jax.tree.map(jnp.float32, tree)
  return {"model": some(model), "ref": some(reference), "encoder": {}, "vae": {}}


def test_at_the_start_the_loss_is_log_2_and_equal_pictures_are_no_pair():
  update, = dpo(SCHEDULE).updates
  params = weights_of()
  params["ref"] = params["model"]
  find = jax.jit(lambda params, batch: update.loss({"model": params["model"]}, params, Linear(), batch, jax.random.key(0)))
  loss, metrics = find(params, batch_of())
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  assert not np.any(metrics["margin"]) and not np.any(metrics["reward_chosen"])
  batch = batch_of()
  same = find(weights_of(), batch | {"rejected_latents": batch["latents"]})
  np.testing.assert_array_equal(same[1]["error_chosen"], same[1]["error_rejected"])  # one time and one noise for both
  np.testing.assert_allclose(same[0], np.log(2), rtol=1e-6)


def test_pictures_are_encoded_where_there_are_no_latents():
  update, params = dpo(SCHEDULE).updates[0], weights_of()
  cached, key = batch_of(), jax.random.key(1)
  pixels = {"target": cached["latents"], "rejected": cached["rejected_latents"], "prompt": cached["prompt"]}
  find = jax.jit(lambda batch: update.loss({"model": params["model"]}, params, Linear(), batch, key))
  for one, other in zip(*(jax.tree.leaves(find(batch)) for batch in (cached, pixels))):
    np.testing.assert_array_equal(one, other)


def test_validation_depends_on_the_sample_alone():
  batch, order = batch_of(), np.array([4, 0, 5, 1, 3, 2])
  find = jax.jit(lambda batch, key: dpo(SCHEDULE).validation(weights_of(), Linear(), batch, key))
  whole, bins = find(batch, jax.random.key(0))
  some, some_bins = find({name: x[order] for name, x in batch.items()}, jax.random.key(7))
  np.testing.assert_array_equal(some_bins, bins[order])
  for name in ("loss", "accuracy", "margin", "error_chosen"):
    np.testing.assert_allclose(some[name], whole[name][order], rtol=1e-6)


def test_the_algorithm_asks_for_pairs_and_for_a_reference():
  algorithm = dpo(SCHEDULE, ema_decay=0.0)
  assert algorithm.pairs and algorithm.frozen == ("ref", "encoder", "vae") and not algorithm.averages
  assert dataclasses.replace(algorithm.roles["ref"], dtype="float32") == dataclasses.replace(algorithm.roles["model"], start="model")
  with pytest.raises(ValueError, match="algorithm.beta is -1.0: give a number above 0"):
    dpo(SCHEDULE, beta=-1.0)


# ---- pairs of the model's own pictures ----


def samples_of(rewards, weight=None):
  """Samples of three prompts with four pictures each, whose latents are their numbers."""
  number = jnp.arange(12.0)
  weight = jnp.ones(12) if weight is None else jnp.asarray(weight, jnp.float32)
  return {"prompts": {"label": number // 4}, "latents": number[:, None, None, None], "weight": weight,
          "rewards": {name: jnp.asarray(x, jnp.float32) for name, x in rewards.items()}}


def test_a_pair_is_the_best_and_the_worst_of_a_prompt_by_hand():
  some = samples_of({"good": [1, 3, 2, 0, 5, 5, 5, 5, 9, 0, 4, 4]}, [1] * 8 + [0, 0, 1, 1])  # the second and third prompt show no difference
  choose = jax.jit(lambda some, least: best_and_worst(Rewards(("good",), None), some, 4, least))
  pairs = choose(some, 0.0)
  np.testing.assert_array_equal(pairs["weight"], [1, 0, 0])
  assert (pairs["latents"][0].item(), pairs["rejected_latents"][0].item()) == (1, 3)
  np.testing.assert_array_equal(pairs["prompts"]["label"], [0, 1, 2])
  np.testing.assert_array_equal(choose(some, 3.0)["weight"], [0, 0, 0])


def test_what_is_only_watched_chooses_nothing_and_rewards_are_weighed_after_they_are_normalised():
  rewards = {"one": [0, 1, 2, 3] * 3, "wide": [0, -100, -300, -900] * 3, "gold": [7, 0, 0, 0] * 3}
  choose = jax.jit(lambda *weights: best_and_worst(Rewards(tuple(rewards), None, (weights,)), samples_of(rewards), 4), static_argnums=(0, 1, 2))
  assert (choose(1.0, 0.0, 0.0)["latents"][0].item(), choose(1.0, 0.0, 0.0)["rejected_latents"][0].item()) == (3, 0)
  assert choose(0.0, 1.0, 0.0)["latents"][0].item() == 0
  z = [(np.asarray(x[:4]) - np.mean(x[:4])) / np.std(x[:4]) for x in rewards.values()]
  both = choose(2.0, 1.0, 0.0)
  assert both["latents"][0].item() == np.argmax(2 * z[0] + z[1]) and both["rejected_latents"][0].item() == np.argmin(2 * z[0] + z[1])


def left(pictures, tasks):
  """How far to the left the point of a picture is; a judge that fails now and then."""
  reward = 1 - pictures[:, 0, 0, 0].astype(np.float32) / 255
  reward[pictures[:, 0, 0, 1] % 16 == 5] = np.nan
  return {"left": reward}


def test_a_run_learns_from_its_own_pairs(tmp_path):
  """Points move to where the reward is, while the reference holds them."""
  algorithm = online_dpo(SCHEDULE, Rewards(("left",), left), group=4, num_steps=4, guidance=1.0, beta=5.0, num_minibatches=2, ema_decay=0.0)
  settings = dataclasses.replace(toy.SETTINGS, learning_rate=0.01, schedule="constant")
  toy.run(toy.Job("pictures", 30, algorithm=algorithm, num_devices=1, settings=settings, save_every=100, eval_every=100), tmp_path)
  rows = [row for row in read_rows(tmp_path / "toy" / "metrics.jsonl") if "margin" in row]
  mean = lambda name, some: np.mean([row[name] for row in some])
  assert mean("reward/left", rows[-5:]) > mean("reward/left", rows[:5]) + 0.1
  assert mean("accuracy", rows[-10:]) > 0.6 and mean("margin", rows[-10:]) > 0
  assert all(0 <= row["without_spread"] < 1 and row["skipped"] == 0 for row in rows)


def test_a_minibatch_without_a_pair_has_no_say_in_the_metrics(tmp_path):
  """Every second prompt, which makes the second minibatch, is rewarded for nothing: the loss is the first one's, log 2."""
  some = lambda pictures, tasks: {"left": np.where(np.arange(len(tasks)) // 4 % 2, 1.0, left(pictures, tasks)["left"])}
  algorithm = online_dpo(SCHEDULE, Rewards(("left",), some), group=4, num_steps=4, guidance=1.0, beta=5.0, num_minibatches=2, ema_decay=0.0)
  toy.run(toy.Job("pictures", 1, algorithm=algorithm, num_devices=1, save_every=100, eval_every=100), tmp_path)
  row = next(row for row in read_rows(tmp_path / "toy" / "metrics.jsonl") if "margin" in row)
  assert row["loss"] == np.float32(np.log(2)) and row["skipped"] == 0 and row["without_spread"] < 0.2 and row["grad_norm"] > 0


def test_numbers_that_make_no_pairs_are_refused():
  with pytest.raises(ValueError, match="algorithm.group is 1"):
    online_dpo(SCHEDULE, Rewards(("left",), left), group=1)
