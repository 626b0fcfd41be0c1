"""A rigged reward is caught: figures of pictures, rewards that are only watched, rules that end a stage, and what a restart does then."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qimg2 import sampler
from qimg2.algorithms import Algorithm, Role, Rollout, Update
from qimg2.training import pictures, watch
from qimg2.training.checkpoint import newest_step
from qimg2.training.metrics import read_rows
from tests.jobs import toy
from tests.jobs.toy_methods import SIGMAS, near, squared_error

BAND = watch.Settings(2, 2, {"pictures/dark": (0.0, 0.6)})
FALL = watch.Settings(2, 2, {}, {"reward/near": watch.Fall(0.5, "reward/dark")})


def rigged(group=4):
  """A method that learns from its own pictures by how dark they are, and never hears of `near`, which judges the points that they are drawn from."""
  def generate(params, nets, batch, key):
    label, ids = jnp.repeat(batch["label"], group), jnp.repeat(batch["sample_id"], group) * group
    noise = sampler.sample_noise(key, ids + jnp.tile(jnp.arange(group), batch["label"].shape[0]), (2,))
    x = sampler.sample(nets.velocity, params["model"], noise, label, SIGMAS)
    shade = jnp.round(255 * jax.nn.sigmoid(2 * x[:, 0]))
    return {"x": x, "label": label, "pictures": jnp.broadcast_to(shade[:, None, None, None], (*shade.shape, 4, 4, 3)).astype(jnp.uint8)}

  def score(samples, batch):
    gold = near(samples["x"], samples["label"])
    gold[:5] = np.nan  # a judge that fails now and then
    return {"dark": 1 - samples["pictures"].mean(axis=(1, 2, 3), dtype=np.float32) / 255, "near": gold}

  def minibatches(samples, key):
    del key
    weight = samples["weight"] * jnp.exp(8 * (samples["rewards"]["dark"] - 1))
    return jax.tree.map(lambda x: x[None], {"x": samples["x"], "label": samples["label"], "weight": weight})

  def loss(trained, params, nets, batch, key):
    return squared_error(nets, trained["model"], batch["x"], batch["label"], key), {}

  def validation(params, nets, batch, key):
    del key
    return {"loss": squared_error(nets, params["model"], batch["x"], batch["label"], jax.random.key(3))}, batch["label"] * 0

  rollout = Rollout(generate, score, ("dark", "near"), minibatches, weights=((1.0, 0.0),))
  return Algorithm({"model": Role("mlp")}, (Update(("model",), loss),), rollout=rollout, validation=validation)


def job(rules, **changes):
  settings = dataclasses.replace(toy.SETTINGS, learning_rate=0.03, schedule="constant")
  return toy.Job("rigged", 24, algorithm=rigged(), watch=rules, num_devices=1, settings=settings, save_every=3, **changes)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
  """(folder of a run that its watch ended, its sentence)."""
  folder = tmp_path_factory.mktemp("ended")
  with pytest.raises(watch.Ended) as error:
    toy.run(job(BAND), folder)
  return folder, str(error.value)


def rows(folder):
  return [row for row in read_rows(folder / "toy" / "metrics.jsonl") if "skipped" in row]


def test_a_rigged_reward_ends_the_stage_which_is_saved_and_stays_ended(ended):
  folder, sentence = ended
  step = newest_step(folder / "toy" / "checkpoints")
  dark = [row["pictures/dark"] for row in rows(folder)]
  assert step == len(dark) < 24 and step % 2 == 0
  looks = [(dark[i] + dark[i + 1]) / 2 > 0.6 for i in range(0, step, 2)]
  assert looks[-2:] == [True, True] and not any(one and two for one, two in zip(looks[:-2], looks[1:-1]))
  assert f"ended by its watch after step {step}, where it is saved: pictures/dark was" in sentence and sentence.count(".") < 6
  fault, = read_rows(folder / "toy" / "faults.jsonl")
  assert fault["step"] == step and fault["fault"] == "watch" and fault["sentence"] in sentence
  with pytest.raises(watch.Ended) as again:
    toy.run(job(BAND), folder)
  assert str(again.value) == sentence


def test_a_gold_reward_that_fails_leaves_nothing_out(ended):
  for row in rows(ended[0]):
    assert row["reward/left_out"] == 0 and row["skipped"] == 0 and math.isfinite(row["reward/near"])


def test_a_run_that_was_killed_ends_at_the_same_step(ended, tmp_path):
  with pytest.raises(toy.Killed):
    toy.run(job(BAND), tmp_path, wrap=toy.die_before(4))
  toy.let_threads_end(tmp_path)
  with pytest.raises(watch.Ended) as error:
    toy.run(job(BAND), tmp_path)
  assert str(error.value) == ended[1]
  assert (tmp_path / "toy" / "metrics.jsonl").read_bytes() == (ended[0] / "toy" / "metrics.jsonl").read_bytes()


def test_a_gold_reward_that_falls_while_the_reward_rises_ends_the_stage_and_other_rules_let_it_go_on(tmp_path):
  with pytest.raises(watch.Ended, match=r"reward/near fell to -[\d.]+ from -[\d.]+ at step \d+ while reward/dark rose from"):
    toy.run(job(FALL), tmp_path)
  step = newest_step(tmp_path / "toy" / "checkpoints")
  state = toy.run(job(watch.Settings()), tmp_path)
  assert step < int(state.step) == 24


# ---- the rules by hand ----


def follow(settings, rows, saved=None):
  """(watch, the step after which a rule ended it or None) of rows of metrics."""
  one = watch.Watch(settings, saved)
  for step, row in enumerate(rows, 1):
    one = watch.Watch(settings, json.loads(json.dumps(one.saved())))  # a kill after every step
    one.observe(row)
    if one.is_due(step) and one.look(step, row):
      return one, step
  return one, None


def test_a_fall_counts_from_the_best_look_and_only_while_the_other_rises():
  settings = watch.Settings(1, 2, {}, {"gold": watch.Fall(0.2, "reward")})
  row = lambda gold, reward: {"gold": gold, "reward": reward}
  assert follow(settings, [row(0.5, 0.1), row(0.8, 0.2), row(0.5, 0.3), row(0.55, 0.4)])[1] == 4
  assert follow(settings, [row(0.5, 0.1), row(0.8, 0.2), row(0.5, 0.2), row(0.5, 0.1)])[1] is None  # both fall
  assert follow(settings, [row(0.8, 0.2), row(0.5, 0.3), row(0.7, 0.4), row(0.5, 0.5), row(0.61, 0.5)])[1] is None  # not twice in a row


def test_a_number_that_is_missing_neither_counts_nor_resets_and_one_that_stays_away_ends_the_stage():
  settings = watch.Settings(1, 2, {"x": (0.0, 1.0)}, {"gold": watch.Fall(0.2, "reward")})
  row = lambda gold, x=0.5: {"gold": gold, "reward": 1 - gold, "x": x}
  some = lambda *gold: [{"gold": one, "reward": number, "x": 0.5} for number, one in enumerate(gold)]
  nan = math.nan
  assert follow(settings, some(0.8, 0.5, nan, 0.5))[1] == 4 and follow(settings, some(0.8, 0.5, nan, 0.8, 0.5))[1] is None
  assert follow(settings, [row(0.8, x) for x in (2.0, nan, nan, 0.5, 2.0)])[1] is None
  assert follow(settings, [row(0.8, x) for x in (2.0, nan, 2.0)])[1] == 3
  assert follow(settings, some(0.8, *[nan] * 5, 0.8, *[nan] * 5))[1] is None
  one, step = follow(settings, some(0.8, *[nan] * 6, 0.8))
  assert step == 7 and one.ended == "gold had no finite number, at 6 looks in a row, 1 steps apart, so that its rules say nothing"


def test_a_band_is_about_means_over_steps():
  settings = watch.Settings(2, 1, {"x": (0.0, 1.0)})
  assert follow(settings, [{"x": 1.5}, {"x": 0.5}, {"x": 1.5}, {"x": 0.6}])[1] == 4
  assert follow(settings, [{"x": 1.0}, {"x": math.nan}, {"x": 9.0}])[1] is None  # the third has no look
  with pytest.raises(ValueError, match="a rule about 'x', which none of the first 2 steps logged: their metrics are loss, y"):
    follow(settings, [{"loss": 1.0}, {"loss": 1.0, "y": 2.0}])


def test_settings_that_make_no_rule_are_refused():
  for make, sentence in ((lambda: watch.Settings(every_steps=0), "every_steps is 0"),
                         (lambda: watch.Settings(bands={"x": (1.0, 0.0)}), "lower number"), (lambda: watch.Fall(0.0), "by is 0.0")):
    with pytest.raises(ValueError, match=sentence):
      make()


# ---- figures of pictures ----


def test_figures_of_pictures_are_those_by_hand_and_the_entropy_is_that_of_numpy():
  black, white, red = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8), np.zeros((8, 8, 3), np.uint8)
  red[..., 0] = 255
  halves = black.copy()
  halves[:, 4:] = 255
  noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
  find = jax.jit(pictures.statistics)
  some = {name: np.asarray(x) for name, x in find(np.stack([black, white, red, halves, noise])).items()}
  np.testing.assert_allclose(some["dark"][:4], [1, 0, 0, 0.5])  # red has Y = 0.2126
  np.testing.assert_allclose(some["saturation"][:4], [0, 0, 1, 0])
  np.testing.assert_allclose(some["edges"][:4], [0, 0, 0, 8 / 112])
  luma = noise.astype(np.float32) / 255 @ np.array(pictures.LUMA, np.float32)
  share = np.histogram(luma, 64, (0, 1))[0] / luma.size
  np.testing.assert_allclose(some["entropy"], [0, 0, 0, 1, -(share[share > 0] * np.log2(share[share > 0])).sum()], atol=0.04)  # one on a border
  clear = np.concatenate([black, np.zeros((8, 8, 1), np.uint8)], axis=-1)
  assert float(find(clear[None])["dark"][0]) == 0  # transparent: white paper
