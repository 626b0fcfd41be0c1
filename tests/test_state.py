"""The one train step, on a linear regression whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear import LINEAR, MEAN, ONE, SETTINGS, algorithm, batch, make, squared, update

from qimg2 import params as P
from qimg2 import sharding
from qimg2.algorithms import COMPUTE, Algorithm, Average, Role, Rollout, Update
from qimg2.training import state
from qimg2.training.state import due_metrics


def run(method, num, **options):
  """[(state before, state after, metrics)] of the first steps."""
  (now, step), found = make(method, **options), []
  for k in range(num):
    before, (now, metrics) = now, step(now, {}, batch(seed=k))
    found.append((before, now, metrics))
  return found


def moved(before, after, role="model"):
  return bool((after.params[role]["w"] != before.params[role]["w"]).any())


def test_loss_falls_and_noise_is_a_function_of_the_step():
  now, step = make(ONE)
  losses, noises = [], []
  for _ in range(50):
    now, metrics = step(now, {}, batch())
    losses.append(float(metrics["loss"]))
    noises.append(float(metrics["noise"]))
  assert losses[-1] < 0.7 * losses[0] and int(now.step) == 50
  assert len(set(noises)) == 50
  assert float(step(make(ONE)[0].replace(step=jnp.int32(7)), {}, batch())[1]["noise"]) == noises[7]


def test_metrics_say_rate_and_norms():
  (before, after, metrics), = run(ONE, 1, settings=dataclasses.replace(SETTINGS, warmup_steps=4))
  norm = lambda tree: np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(tree)))
  assert metrics["learning_rate"] == np.float32(1e-2 / 4)
  np.testing.assert_allclose(metrics["param_norm"], norm(after.params), rtol=1e-6)
  np.testing.assert_allclose(metrics["update_norm"], norm(jax.tree.map(jnp.subtract, after.params, before.params)), rtol=1e-3)
  first = batch()
  error = first["x"] @ before.params["model"]["w"] + before.params["model"]["b"][None] - first["y"]
  np.testing.assert_allclose(metrics["loss"], np.square(error).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["largest"], np.abs(error).max(axis=1).mean(), rtol=1e-5)  # [B] metrics are averaged, too


@pytest.mark.parametrize("accumulate, cut", [(2, False), (4, False), (4, True)])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_equals_the_whole_batch(accumulate, cut, weighted):
  now, step = make(ONE)
  split, split_step = make(ONE, dataclasses.replace(SETTINGS, accumulate=accumulate), split=cut)
  for k in range(3):
    data = batch(seed=k) | ({"weight": np.array([0, 3, 1, 0, 0, 0, 2, 1], np.float32)} if weighted else {})
    now, whole = step(now, {}, data)
    split, parts = split_step(split, {}, data)
    for name in ("loss", "grad_norm", "largest"):
      np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), split.params, now.params)


def test_an_example_of_weight_zero_is_as_if_it_were_not_there():
  data = batch()
  weight = np.array([1, 1, 0, 1, 0, 1, 1, 1], np.float32)
  few, step = {name: x[weight > 0] for name, x in data.items()}, make(ONE)[1]
  data["x"][2] = np.nan  # whatever it holds
  data["y"][4] = 1e6
  expected, _ = step(make(ONE)[0], {}, few)
  found, metrics = step(make(ONE)[0], {}, {**data, "weight": weight})
  assert metrics["skipped"] == 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found.params, expected.params)
  after, metrics = step(make(ONE)[0], {}, {**batch(), "weight": np.zeros(8, np.float32)})
  assert metrics["skipped"] == 1  # nothing to learn from


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_weight_of_the_loss_scales_it_and_its_gradient(accumulate):
  """It is no weight of a mean: a batch whose rows all have 1/4 learns a quarter."""
  now, step = make(ONE, dataclasses.replace(SETTINGS, accumulate=accumulate))
  plain, own = step(now, {}, batch())[1], np.array([1, 0, 2, 1, 0.5, 0, 1, 3], np.float32)
  quarter = step(now, {}, {**batch(), "loss_weight": np.full(8, 0.25, np.float32)})[1]
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(quarter[name], 0.25 * plain[name], rtol=1e-6)
  assert quarter["largest"] == plain["largest"]
  data = batch()
  each = np.square(data["x"] @ now.params["model"]["w"] + now.params["model"]["b"][None] - data["y"]).mean(axis=1)
  np.testing.assert_allclose(step(now, {}, {**data, "loss_weight": own})[1]["loss"], (own * each).mean(), rtol=1e-5)


def test_a_negative_weight_skips_the_update():
  now, step = make(ONE)
  after, metrics = step(now, {}, {**batch(), "weight": np.array([1, 1, 1, -1, 1, 1, 1, 1], np.float32)})
  assert metrics["skipped"] == 1 and not moved(now, after)


@pytest.mark.parametrize("value", [lambda per_example: jnp.mean(per_example), lambda per_example: jnp.stack([per_example] * 2, axis=1)])
def test_a_loss_is_one_number_for_each_example(value):
  method = algorithm(Update(("model",), lambda *arguments: (value(squared("model")(*arguments)[0]), {})))
  now, step = make(method)
  with pytest.raises(ValueError, match="it must be one number for each of the 8 examples"):
    step(now, {}, batch())


def test_micro_batches_divide_the_rows():
  now, step = make(ONE, dataclasses.replace(SETTINGS, accumulate=3))
  with pytest.raises(ValueError, match="A batch of 8 rows cannot be divided into 3 micro-batches"):
    step(now, {}, batch())


def test_a_step_that_is_cut_draws_what_one_program_draws():
  """The metric "noise" is a draw of each micro-batch; losses and averages agree, too."""
  settings = dataclasses.replace(SETTINGS, accumulate=4)
  (one, step), (cut, cut_step) = make(MEAN, settings), make(MEAN, settings, split=True)
  for k in range(3):
    (one, expected), (cut, found) = step(one, {}, batch(seed=k)), cut_step(cut, {}, batch(seed=k))
    assert found.keys() == expected.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
  assert int(cut.step) == 3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (cut.params, cut.averages), (one.params, one.averages))


@pytest.mark.parametrize("method", [
    algorithm(update("model"), update("critic")), algorithm(update("model", every=2)),
    algorithm(update("model"), rollout=Rollout(None, None, ("reward",), None))])
def test_only_steps_of_one_update_are_cut(method):
  with pytest.raises(ValueError, match="stop_after is 'micro_batch', which is for methods without a rollout and with one update, due at every step"):
    state.make_split_step(method, {}, None, 4)


def test_a_loss_mask_over_tokens_is_a_weight():
  """As a language stage has it: no pictures, the mean over the tokens that count, however they divide over examples and micro-batches."""
  tokens, mask = np.arange(24, dtype=np.float32).reshape(8, 3) / 10, np.tri(8, 3, -2, dtype=np.float32)
  mask[0, 0] = 1
  def loss(trained, params, nets, batch, key):
    error = jnp.square(batch["tokens"] - trained["model"]["b"][None])
    return jnp.sum(error * batch["mask"], axis=1) / jnp.maximum(jnp.sum(batch["mask"], axis=1), 1), {}
  method = algorithm(Update(("model",), loss))
  for accumulate in (1, 4):
    now, step = make(method, dataclasses.replace(SETTINGS, accumulate=accumulate))
    _, metrics = step(now, {}, {"tokens": tokens, "mask": mask, "weight": mask.sum(axis=1)})
    expected = (np.square(tokens - np.asarray(now.params["model"]["b"])) * mask).sum() / mask.sum()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


# Averages.


def test_an_average_follows_with_its_decay():
  for k, (before, after, _) in enumerate(run(MEAN, 100)):
    decay = min(0.9, (1 + k) / (10 + k))
    expected = decay * before.averages["ema"]["w"] + (1 - decay) * after.params["model"]["w"]
    np.testing.assert_allclose(after.averages["ema"]["w"], expected, rtol=1e-4, atol=1e-6)


def test_a_restored_average_goes_on_without_a_ramp():
  taken_over = P.init(LINEAR, jax.random.key(9))
  (before, after, _), *_ = run(MEAN, 1, averages={"ema": taken_over})
  np.testing.assert_array_equal(before.averages["ema"]["w"], taken_over["w"])
  np.testing.assert_allclose(after.averages["ema"]["w"], 0.9 * taken_over["w"] + 0.1 * after.params["model"]["w"], rtol=1e-5)


def test_the_average_of_a_role_that_rests_rests_too():
  method = algorithm(update("critic"), update("model", every=3), averages={"m": Average("model", 0.5), "c": Average("critic", 0.5)})
  for k, (before, after, _) in enumerate(run(method, 7)):
    changed = lambda name: bool((after.averages[name]["w"] != before.averages[name]["w"]).any())
    assert changed("c") and changed("m") == (k % 3 == 2), k
  assert int(after.average_states["m"].num_updates) == 2


def test_an_average_can_be_a_hard_copy_at_every_few_steps_or_have_a_decay_of_its_own():
  averages = {"old": Average("model", 0.0, every=3, ramp=False), "slow": Average("model", lambda step: 0.5 + 0.1 * step, ramp=False)}
  for k, (before, after, _) in enumerate(run(algorithm(update("model"), averages=averages), 6)):
    source = after.params if (k + 1) % 3 == 0 else {"model": before.averages["old"]}
    np.testing.assert_array_equal(after.averages["old"]["w"], source["model"]["w"])
    d = 0.5 + 0.1 * k
    expected = d * before.averages["slow"]["w"] + (1 - d) * after.params["model"]["w"]
    np.testing.assert_allclose(after.averages["slow"]["w"], expected, rtol=1e-4, atol=1e-6)


# Several updates.


def test_a_rare_update_is_logged_where_it_is_due_and_sees_its_whole_schedule():
  method = algorithm(update("critic"), update("model", every=4))
  settings = dataclasses.replace(SETTINGS, schedule="linear", final_ratio=0.0)
  found = run(method, 12, settings=settings, num_steps=12)
  rates = []
  for step, (before, after, metrics) in enumerate(found, 1):
    logged = due_metrics(method, step, metrics)
    assert moved(before, after) == (step % 4 == 0) and moved(before, after, "critic")
    assert ("model/loss" in logged) == (step % 4 == 0) and all(np.isfinite(x) for x in logged.values())
    rates += [float(logged["model/learning_rate"])] if step % 4 == 0 else []
  np.testing.assert_allclose(rates, [1e-2, 1e-2 * 2 / 3, 1e-2 / 3], rtol=1e-5)  # three updates, a third of the way each
  assert int(after.opt["model"].count) == 3 and int(after.opt["critic"].count) == 12


def test_updates_have_settings_of_their_own():
  method = algorithm(update("critic", optimizer=dataclasses.replace(SETTINGS, learning_rate=0.5)), update("model"))
  (_, _, metrics), = run(method, 1)
  assert metrics["critic/learning_rate"] == 0.5 and metrics["model/learning_rate"] == np.float32(1e-2)
  (_, _, metrics), = run(method, 1, own={"critic": dataclasses.replace(SETTINGS, learning_rate=0.25)})
  assert metrics["critic/learning_rate"] == 0.25
  with pytest.raises(ValueError, match="optimizers names the update 'crtic', which the algorithm does not have: it has critic, model"):
    run(method, 1, own={"crtic": SETTINGS})


def test_updates_run_in_their_order_and_names_change_nothing():
  """The second one learns the first one's new weights."""
  def following(first, second):
    def loss(trained, params, nets, batch, key):
      del nets, batch
      return jnp.broadcast_to(jnp.mean(jnp.square(trained[second]["w"] - params[first]["w"])), 8), {"draw": jax.random.normal(key, ())}
    return algorithm(update(first), Update((second,), loss))

  def last(first, second):
    method = dataclasses.replace(following(first, second), deploy=lambda weights: {})
    return [(after.params[first], after.params[second], metrics[f"{second}/loss"], metrics[f"{second}/draw"]) for _, after, metrics in run(method, 3)]
  one, other = last("alpha", "beta"), last("zeta", "beta")
  jax.tree.map(np.testing.assert_array_equal, one, other)
  (before, after, metrics), = run(dataclasses.replace(following("zeta", "beta"), deploy=lambda weights: {}), 1)
  expected = np.square(np.asarray(before.params["beta"]["w"] - after.params["zeta"]["w"])).mean()
  np.testing.assert_allclose(metrics["beta/loss"], expected, rtol=1e-5)


def test_an_update_moves_its_roles_together():
  def loss(trained, params, nets, batch, key):
    del nets, key
    assert set(trained) == {"model", "head"} and set(params) == {"model", "head"}
    first = batch["x"] @ trained["model"]["w"] + trained["head"]["b"][None]
    return jnp.mean(jnp.square(first - batch["y"]), axis=1), {}
  method = algorithm(Update(("model", "head"), loss))
  (before, after, metrics), = run(method, 1)
  assert moved(before, after) and bool((after.params["head"]["b"] != before.params["head"]["b"]).any()) and set(after.opt) == {"model+head"}
  clipped = run(method, 1, settings=dataclasses.replace(SETTINGS, clip_norm=1e-3))[0][1]
  momentum = sum(np.square(x).sum() for x in jax.tree.leaves(clipped.opt["model+head"].adam[1].mu))
  np.testing.assert_allclose(np.sqrt(momentum), 1e-3 * 0.1, rtol=1e-4)  # one norm for both


@pytest.mark.parametrize("accumulate, cut", [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])  # the last one overflows in the loss
def test_an_update_that_is_not_finite_changes_nothing_but_the_step(accumulate, cut, value):
  now, step = make(MEAN, dataclasses.replace(SETTINGS, accumulate=accumulate), split=cut)
  now, metrics = step(now, {}, batch())
  assert metrics["skipped"] == 0
  bad = batch(seed=1)
  bad["x"][3, 1] = value
  after, metrics = step(now, {}, bad)
  assert metrics["skipped"] == 1 and int(after.step) == 2
  raw = lambda x: np.asarray(x).tobytes()
  for part in ("params", "opt", "averages", "average_states"):
    assert jax.tree.map(raw, getattr(after, part)) == jax.tree.map(raw, getattr(now, part))
  again, metrics = step(after, {}, batch(seed=2))
  assert metrics["skipped"] == 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(again.params))


def test_a_role_that_is_not_finite_holds_up_no_other():
  def broken(trained, params, nets, data, key):
    loss, metrics = squared("critic")(trained, params, nets, data, key)
    return jnp.where(jnp.any(data["y"] > 90), jnp.nan, 1.0) * loss, metrics
  method = algorithm(Update(("critic",), broken), update("model", every=2), averages={"m": Average("model", 0.5), "c": Average("critic", 0.5)})
  now, step = make(method)
  for k, bad in enumerate((False, True, True, False)):
    data = batch(seed=k)
    data["y"][0, 0] = 99 if bad else 0
    before, (now, metrics) = now, step(now, {}, data)
    assert [moved(before, now, role) for role in ("model", "critic")] == [k % 2 == 1, not bad]
    assert metrics["skipped"] == bad and int(now.step) == k + 1
    assert bool((now.averages["c"]["w"] != before.averages["c"]["w"]).any()) == (not bad)


# Minibatches of a rollout.


def test_minibatches_are_optimizer_steps_in_their_order():
  rollout = Rollout(None, None, ("reward",), None, num_minibatches=3)
  now, step = make(algorithm(update("model"), rollout=rollout), dataclasses.replace(SETTINGS, schedule="linear"), num_steps=2)
  parts = [batch(seed=k) for k in range(3)]
  after, metrics = step(now, {}, jax.tree.map(lambda *x: np.stack(x), *parts))
  single, single_step = make(ONE, dataclasses.replace(SETTINGS, schedule="linear"), num_steps=6)
  losses = []
  for part in parts:
    single, one = single_step(single, {}, part)
    losses.append(one["loss"])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.params, single.params)
  np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
  assert int(after.step) == 1 and int(after.opt["model"].count) == 3


# The state's arrays.


def test_frozen_roles_are_seen():
  def loss(trained, params, nets, batch, key):
    return squared("model")(trained, params, nets, {**batch, "y": params["teacher"][None] + jnp.zeros_like(batch["y"])}, key)
  method = Algorithm({"model": Role("linear"), "teacher": Role("vector")}, (Update(("model",), loss),))
  assert method.trained == ("model",) and method.frozen == ("teacher",)
  optimizers = state.make_optimizers(method, {"model": LINEAR}, SETTINGS, 400)
  now = state.init_state(method, optimizers, {"model": P.init(LINEAR, jax.random.key(0))}, {}, jax.random.key(7))
  step = jax.jit(state.make_step(method, optimizers, None))
  for k in range(400):
    now, metrics = step(now, {"teacher": jnp.array([1.0, 2.0, 3.0])}, batch(seed=k))
  assert float(metrics["loss"]) < 0.05
  np.testing.assert_allclose(now.params["model"]["b"], [1, 2, 3], atol=0.2)


def test_frozen_roles_can_be_stored_in_half_the_bytes():
  kinds = {"model": COMPUTE, "ref": COMPUTE, "judge": "bfloat16", "vae": "float32"}
  roles = {name: Role("linear", dtype=dtype) for name, dtype in kinds.items()}
  method = Algorithm(roles, (update("model"),), deploy=lambda weights: {})
  exact = {**LINEAR, "statistics": P.Param((3,), (None,), P.ones, exact=True)}
  specs = method.specs({"linear": exact}, {"linear": "bfloat16"})
  types = {role: [P.jnp.dtype(p.dtype).name for p in P.flatten(tree).values()] for role, tree in specs.items()}
  assert types["model"] == types["vae"] == ["float32"] * 3 and types["ref"] == types["judge"] == ["bfloat16", "float32", "bfloat16"]
  whole, half = (P.init(specs[role], jax.random.key(0)) for role in ("vae", "ref"))
  np.testing.assert_array_equal(half["w"], whole["w"].astype(jnp.bfloat16))  # the same draw


def test_abstract_state_has_the_shapes_of_the_real_one():
  mesh, rules = sharding.make_mesh({"fsdp": 4, "data": 2}), sharding.RULES["fsdp_tensor"]
  specs = {"model": LINEAR}
  optimizers = state.make_optimizers(MEAN, specs, SETTINGS, 10)
  abstract = state.abstract_state(MEAN, optimizers, specs, mesh, rules)
  real, _ = make(MEAN)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
  weights = abstract.params["model"]["w"].sharding
  moments = [x for x in jax.tree.leaves(abstract.opt) if x.shape == (4, 3)]
  assert len(moments) == 2 and all(x.sharding == weights for x in moments) and "fsdp" in weights.spec


def test_methods_that_do_not_fit_together_are_refused():
  with pytest.raises(ValueError, match="'critic' is none"):
    Algorithm({"model": Role("linear")}, (update("model"), update("critic")))
  with pytest.raises(ValueError, match="each with a name of its own"):
    algorithm(update("model"), update("model"))
  with pytest.raises(ValueError, match="Average 'ema' of 'critic'"):
    algorithm(update("model"), averages={"ema": Average("critic", 0.9)})
  for name in ("a/b", "reward"):
    with pytest.raises(ValueError, match="cannot be named"):
      update("model", name=name)
  with pytest.raises(ValueError, match="Update 'model' is due at every 9 steps, but the stage has 8: it would never run"):
    make(algorithm(update("critic"), update("model", every=9)), num_steps=8)
  with pytest.raises(ValueError, match="metric 'learning_rate', which is the step's own"):
    run(algorithm(Update(("model",), lambda *_: (jnp.zeros(8), {"learning_rate": 0.0}))), 1)
  for rewards in ((), ("near", "left_out")):
    with pytest.raises(ValueError, match="needs the names of its rewards"):
      Rollout(None, None, rewards, None)
  with pytest.raises(ValueError, match="Role 'model' names the network 'linear': there are mmdit, vae"):
    ONE.specs({"mmdit": {}, "vae": {}}, {})
  with pytest.raises(ValueError, match="needs a `deploy`"):
    Algorithm({"model": Role("linear"), "ref": Role("linear")}, (update("model"),))
