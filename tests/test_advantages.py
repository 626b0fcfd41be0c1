"""Advantages by hand and against numpy: per prompt and reward, over a batch, with samples that are left out and groups without spread."""

import jax
import jax.numpy as jnp
import numpy as np

from qimg2.algorithms import advantages

REWARD = np.array([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0], [0.0, 4.0, 9.0, 0.0]], np.float32)
WEIGHT = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], np.float32)


def test_each_group_is_normalised_by_itself_and_what_is_left_out_is_in_no_mean():
  found = np.asarray(advantages.normalise(jnp.array(REWARD), jnp.array(WEIGHT), eps=0.0 + 1e-6))
  np.testing.assert_allclose(found[0], np.array([-2, -1, 0, 3]) / np.sqrt(3.5), rtol=1e-5)
  np.testing.assert_array_equal(found[1], 0)
  np.testing.assert_allclose(found[2], [-1, 1, 0, 0], atol=1e-5)


def test_the_deviation_may_be_that_of_the_batch():
  found = np.asarray(advantages.normalise(jnp.array(REWARD), jnp.array(WEIGHT), "batch", 1e-4))
  deviation = REWARD[WEIGHT > 0].std() + 1e-4
  np.testing.assert_allclose(found[0], np.array([-2, -1, 0, 3]) / deviation, rtol=1e-5)
  np.testing.assert_allclose(found[2], np.array([-2, 2, 0, 0]) / deviation, rtol=1e-5)


def test_groups_of_nothing_or_of_one_sample_give_zero_and_have_no_spread():
  weight = jnp.array([[0.0, 0, 0, 0], [0, 1, 0, 0]])
  reward = jnp.array([[0.0, 0, 0, 0], [0, 7, 0, 0]])
  for over in advantages.OVER:
    np.testing.assert_array_equal(advantages.normalise(reward, weight, over), 0)
  np.testing.assert_array_equal(advantages.has_spread(reward, weight), False)
  np.testing.assert_array_equal(advantages.has_spread(jnp.array(REWARD), jnp.array(WEIGHT), 4.0), [True, False, False])
  np.testing.assert_array_equal(advantages.has_spread(jnp.array(REWARD), jnp.array(WEIGHT), 3.9), [True, False, True])


def test_several_rewards_count_by_category_and_gold_does_not():
  rng = np.random.default_rng(0)
  weight = (rng.uniform(size=(6, 8)) > 0.2).astype(np.float32)
  rewards = {name: (rng.normal(size=(6, 8)) * scale).astype(np.float32) * weight for name, scale in (("ocr", 1), ("style", 100), ("gold", 1))}
  rewards["style"][5], rewards["ocr"][5] = weight[5] * 3, weight[5]  # no spread but that of gold
  weights, category = ((3.0, 1.0, 0.0), (0.0, 2.0, 0.0)), np.array([0, 1, 0, 1, 1, 0], np.int32)
  counts = advantages.weigh(weights, 3, jnp.array(category), 6)
  np.testing.assert_allclose(counts, np.array([[0.75, 0.25, 0], [0, 1, 0]])[category])
  found, spread = jax.jit(lambda: advantages.combine(rewards, jnp.array(weight), counts, limit=1.5))()
  np.testing.assert_array_equal(spread, [True] * 5 + [False])
  for p in range(6):
    there, total = weight[p] > 0, np.zeros(8)
    for name, share in zip(rewards, np.asarray(counts)[p]):
      values = rewards[name][p, there]
      total[there] += share * (values - values.mean()) / (values.std() + 1e-4)
    np.testing.assert_allclose(found[p], np.clip(total, -1.5, 1.5), atol=1e-5)
  assert np.abs(found).max() == 1.5


def test_where_a_reward_does_not_count_its_zeros_are_in_no_deviation():
  text = np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], np.float32)  # not computed for the second prompt
  taste = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 5.0, 1.0, 5.0]], np.float32)
  found, spread = advantages.combine({"text": text, "taste": taste}, jnp.ones((2, 4)), jnp.eye(2), over="batch", eps=1e-6)
  np.testing.assert_allclose(found, [[-1, 1, -1, 1]] * 2, rtol=1e-5)  # by 0.5 and by 2, each over its own prompt
  assert spread.all()


def test_rewards_count_alike_without_weights():
  np.testing.assert_allclose(advantages.weigh((), 4, None, 2), 0.25)
  np.testing.assert_allclose(advantages.weigh(((0.0, 0.0),), 2, None, 1), 0.0)  # a category that learns nothing


def test_groups_without_spread_are_replaced_by_later_ones():
  spread = jnp.array([True, False, True, False, True, True])
  for num, groups, replaced in ((3, [0, 2, 4], 1), (4, [0, 2, 4, 5], 2), (5, [0, 2, 4, 5, 1], 1), (6, [0, 2, 4, 5, 1, 3], 0)):
    found, count = advantages.choose_groups(spread, num)
    assert found.tolist() == groups and int(count) == replaced
