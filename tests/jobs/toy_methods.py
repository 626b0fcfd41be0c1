"""Eight training methods on toy data, for tests of the contract in `qimg2.algorithms`: each uses another part of it.

  supervised   one role and an average; weights that are set after the last step
  dpo          a frozen reference that starts as the model; pairs                                                    (arXiv 2311.12908)
  grpo         rollouts by an SDE, rewards from the host, several minibatches, a ratio of probabilities              (arXiv 2505.05470)
  nft          rollouts by an average of the model, whose decay is a function of the step                            (arXiv 2509.16117)
  dmd          three roles, two updates with optimizers of their own, one of them at every second step               (arXiv 2405.14867)
  adapter      any method with a low-rank adapter on a frozen base, here one whose judge is a frozen role on the device  (arXiv 2106.09685)
  language     next tokens after a prompt; the mean over tokens, not over rows
  rewarded     grpo in two chunks, whose rewards come from a process of their own and from a judge on the device, one of them in one category

The network of all but `language` is an MLP from (point, time, label) to a velocity. Their batch has points `x` [B, 2] in four heaps, `label` [B]
and `null_label` [B], which is none of the labels, and no pictures. That of `language` has `tokens` [B, M], `loss_mask` [B, M], true for what is to be
learned, and as `weight` [B] how many tokens that is.
"""

import atexit
import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np

from qimg2 import adapters, layers, sampler
from qimg2 import params as P
from qimg2.algorithms import Algorithm, Average, Rewards, Role, Rollout, Update
from qimg2.algorithms.adapter import with_adapter
from qimg2.rewards.own import own
from qimg2.rewards.scoring import Scorer
from qimg2.training import optim

WIDTH, RANK, LABELS, VOCABULARY = 16, 2, 4, 7
HEAPS = 2.0 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.float32)
SIGMAS = np.linspace(1, 0, 5)
SDE_NOISE = 0.7  # a of the SDE, arXiv 2505.05470


@dataclasses.dataclass(frozen=True)
class Nets:
  """The toy networks: a velocity, a judge, a language model."""

  def specs(self):
    normal = lambda scale: lambda rng, shape, dtype: (scale * rng.normal(size=shape)).astype(dtype)  # drawn by numpy, which compiles nothing
    constant = lambda value: lambda rng, shape, dtype: np.full(shape, value, dtype)
    dense = lambda n, m: P.Param((n, m), ("embed", "mlp"), normal(n**-0.5), num_inputs=1)
    mlp = {"in": dense(3 + LABELS, WIDTH), "hidden": dense(WIDTH, WIDTH), "out": P.Param((WIDTH, 2), (None, None), normal(0.1))}
    language = {"embed": P.Param((VOCABULARY, WIDTH), (None, "embed"), normal(1.0)), "mix": dense(2 * WIDTH, WIDTH),
                "out": P.Param((WIDTH, VOCABULARY), (None, None), normal(0.1))}
    one = {"one": P.Param((1,), (None,), constant(1.0))}
    return {"mlp": mlp, "judge": {"centre": P.Param((2,), (None,), constant(1.0))}, "language": language, "mmdit": mlp, "qwen3_vl": one, "vae": one}

  def velocity(self, params, x, t, label):
    inputs = jnp.concatenate([x.reshape(-1, 2), t[:, None], jax.nn.one_hot(label, LABELS)], axis=1)
    return (jnp.tanh(layers.linear(jnp.tanh(inputs @ params["in"]), params["hidden"])) @ params["out"]).reshape(x.shape)

  # As `qimg2.networks.Networks`, for methods that draw pictures: latents [B, 1, 1, 2] are the points, and a label is all that a prompt says.

  def compute_dtypes(self):
    return {"mmdit": "float32"}

  def target_latents(self, params, batch):
    return batch["latents"] if "latents" in batch else batch["x"][:, None, None]

  def encoded(self, params, batch):
    return {"label": batch["label"]}

  def condition(self, params, batch):
    return batch["label"]

  def shared(self, params, cond, num=1):
    return jnp.repeat(cond, num, axis=0)

  def decode(self, params, latents):
    """Two by two px whose red and green are the coordinates, from -4 to 4."""
    shade = jnp.clip(jnp.round(255 * (latents / 8 + 0.5)), 0, 255)
    return jnp.broadcast_to(jnp.concatenate([shade, shade[..., :1]], axis=3), (latents.shape[0], 2, 2, 3)).astype(jnp.uint8)

  def logits(self, params, tokens):
    """[B, M, vocabulary]: what follows each token, of which only that token and the one before are seen."""
    embedded = params["embed"][tokens]
    before = jnp.pad(embedded, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return jnp.tanh(jnp.concatenate([embedded, before], axis=2) @ params["mix"]) @ params["out"]


def die_at(place, number):
  """Kills this process, as the machine would, where TOY_DIES_AT names this place and number; the file DIED keeps it from dying twice."""
  wanted, _, mark = os.environ.get("TOY_DIES_AT", "").partition("@")
  if wanted == f"{place}:{int(number)}" and not os.path.exists(mark):
    with open(mark, "w", encoding="utf-8"):
      pass
    os.kill(os.getpid(), signal.SIGKILL)


def watch(look, *arrays):
  """Shows arrays to the host inside a program; only where TOY_DIES_AT is set, so that programs of runs to be compared are the same."""
  if "TOY_DIES_AT" in os.environ:
    jax.debug.callback(look, *arrays)


def squared_error(nets, params, x_0, label, key):
  """[B] error of the velocity at random times."""
  key_time, key_noise = jax.random.split(key)
  t, noise = jax.random.uniform(key_time, x_0.shape[:1]), jax.random.normal(key_noise, x_0.shape)
  v = nets.velocity(params, x_0 + t[:, None] * (noise - x_0), t, label)
  return jnp.mean(jnp.square(v - (noise - x_0)), axis=1)


def validation(params, nets, batch, key):
  del key
  error = squared_error(nets, params["model"], batch["x"], batch["label"], jax.random.key(3))
  return {"loss": error}, batch["label"] % 2


def supervised(decay=0.9):
  def loss(trained, params, nets, batch, key):
    return squared_error(nets, trained["model"], batch["x"], batch["label"], key), {"spread": jnp.std(batch["x"])}
  def finalize(params, nets, batches):
    scale = sum(jnp.mean(jnp.square(batch["x"])) for batch in batches) / (4.0 * len(batches))  # about 1: the heaps are 2 from the axes
    return {**params, "model": {**params["model"], "out": scale * params["model"]["out"]}}
  deploy = lambda weights: {"mlp": weights["ema"]}
  return Algorithm({"model": Role("mlp")}, (Update(("model",), loss),), {"ema": Average("model", decay)}, validation=validation, num_bins=2,
                   finalize=finalize, deploy=deploy)


def dpo(beta=5.0):
  def loss(trained, params, nets, batch, key):
    error = lambda weights, x: squared_error(nets, weights, x, batch["label"], key)  # one time and one noise for both
    better, worse = batch["x"], -batch["x"]
    margin = (error(trained["model"], better) - error(trained["model"], worse)
              - jax.lax.stop_gradient(error(params["ref"], better) - error(params["ref"], worse)))
    return -jax.nn.log_sigmoid(-beta * margin), {"accuracy": (margin < 0).astype(jnp.float32)}
  roles = {"model": Role("mlp"), "ref": Role("mlp", start="model")}
  return Algorithm(roles, (Update(("model",), loss),), validation=validation, num_bins=2, deploy=lambda weights: {"mlp": weights["model"]})


def near(points, labels):
  """[B] reward: minus the distance to the heap of the label."""
  return -np.sqrt(np.square(points - HEAPS[labels]).sum(axis=1) + 1e-6)


def grpo(group=4, num_minibatches=2, clip=0.2):
  def gaussian(nets, params, x, pair, label):
    """(mean, deviation) of an Euler-Maruyama step of the SDE with the marginals of the ODE."""
    sigma, sigma_next = pair
    dt, s = sigma_next - sigma, SDE_NOISE * jnp.sqrt(sigma / (1 - jnp.minimum(sigma, SIGMAS[1])))
    v = nets.velocity(params, x, jnp.full(x.shape[:1], sigma), label)
    return x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt, s * jnp.sqrt(-dt)

  def log_probability(nets, params, path, label):
    """[B, T] mean log density of each step of a path [B, T + 1, 2]."""
    def one(pair, here, there):
      mean, deviation = gaussian(nets, params, here, pair, label)
      return jnp.mean(-jnp.square(there - mean) / (2 * deviation**2) - jnp.log(deviation), axis=1)
    pairs = list(zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist()))
    return jnp.stack([one(pair, path[:, i], path[:, i + 1]) for i, pair in enumerate(pairs)], axis=1)

  def generate(params, nets, batch, key):
    watch(lambda ids: die_at("rollout", ids[0]), batch["sample_id"])
    label = jnp.repeat(batch["label"], group)
    ids = jnp.repeat(batch["sample_id"], group) * group + jnp.tile(jnp.arange(group), batch["label"].shape[0])
    x, path = sampler.sample_noise(jax.random.fold_in(key, 0), ids, (2,)), []
    for i, pair in enumerate(zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist())):
      path.append(x)
      mean, deviation = gaussian(nets, params["model"], x, pair, label)
      x = mean + deviation * sampler.sample_noise(jax.random.fold_in(key, i + 1), ids, (2,))
    path = jnp.stack([*path, x], axis=1)
    return {"path": path, "label": label, "old": log_probability(nets, params["model"], path, label), "group": jnp.repeat(batch["sample_id"], group)}

  def score(samples, batch):
    die_at("score", batch["sample_id"][0])
    reward = near(samples["path"][:, -1], samples["label"])
    reward[samples["group"] % 16 == 5] = np.nan  # a judge that fails now and then
    return {"near": reward}

  def minibatches(samples, key):
    del key
    reward, weight = samples["rewards"]["near"].reshape(-1, group), samples["weight"].reshape(-1, group)
    num = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1)
    mean = jnp.sum(reward * weight, axis=1, keepdims=True) / num
    deviation = jnp.sqrt(jnp.sum(weight * jnp.square(reward - mean), axis=1, keepdims=True) / num)
    advantage = ((reward - mean) / (deviation + 1e-4) * weight).reshape(-1)
    data = {name: samples[name] for name in ("path", "label", "old", "weight", "group")} | {"advantage": advantage}
    number = jnp.repeat(jnp.arange(num_minibatches), advantage.shape[0] // num_minibatches)
    split = lambda x: x.reshape(-1, num_minibatches, *x.shape[1:]).swapaxes(0, 1)
    return {name: split(x) for name, x in data.items()} | {"number": number.reshape(num_minibatches, -1)}

  def loss(trained, params, nets, batch, key):
    del key
    watch(lambda ids, number: die_at(f"minibatch{number[0]}", ids[0]), batch["group"], batch["number"])
    log_ratio = log_probability(nets, trained["model"], batch["path"], batch["label"]) - batch["old"]  # B T
    ratio, advantage = jnp.exp(log_ratio), batch["advantage"][:, None]
    return (jnp.mean(jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip)), axis=1),
            {"ratio_off": jnp.max(jnp.where(batch["number"][:, None] == 0, jnp.abs(ratio - 1), 0.0))})

  return Algorithm({"model": Role("mlp")}, (Update(("model",), loss),), rollout=Rollout(generate, score, ("near",), minibatches, num_minibatches),
                   validation=validation, num_bins=2)


def nft(beta=0.5):
  def generate(params, nets, batch, key):
    x = sampler.sample_noise(key, batch["sample_id"], (2,))
    net = lambda weights, x, t, label: nets.velocity(weights, x, t, label)
    return {"x_0": sampler.sample(net, params["old"], x, batch["label"], SIGMAS), "label": batch["label"]}

  def score(samples, batch):
    return {"near": near(samples["x_0"], samples["label"])}

  def minibatches(samples, key):
    reward = samples["rewards"]["near"]
    r = jnp.clip((reward - jnp.mean(reward)) / (jnp.std(reward) + 1e-4) / 10 + 0.5, 0, 1)
    order = jax.random.permutation(key, reward.shape[0])
    return {name: x[order].reshape(2, -1, *x.shape[1:]) for name, x in {"x_0": samples["x_0"], "label": samples["label"], "r": r}.items()}

  def loss(trained, params, nets, batch, key):
    key_time, key_noise = jax.random.split(key)
    x_0, t = batch["x_0"], jax.random.uniform(key_time, batch["r"].shape)[:, None]
    noise = jax.random.normal(key_noise, x_0.shape)
    x_t = (1 - t) * x_0 + t * noise
    new, old = (nets.velocity(weights, x_t, t[:, 0], batch["label"]) for weights in (trained["model"], params["old"]))
    error = lambda v: jnp.mean(jnp.square(v - (noise - x_0)), axis=1)
    good, bad = beta * new + (1 - beta) * old, (1 + beta) * old - beta * new
    return batch["r"] * error(good) + (1 - batch["r"]) * error(bad), {}

  old = Average("model", lambda step: jnp.minimum(0.001 * step, 0.5), ramp=False)
  return Algorithm({"model": Role("mlp")}, (Update(("model",), loss),), {"old": old}, Rollout(generate, score, ("near",), minibatches, 2),
                   validation=validation, num_bins=2)


def dmd(every=2):
  def student(weights, nets, batch, key):
    z = jax.random.normal(key, batch["x"].shape)
    return z - nets.velocity(weights, z, jnp.ones(z.shape[0]), batch["label"])

  def fake_loss(trained, params, nets, batch, key):
    x = jax.lax.stop_gradient(student(params["model"], nets, batch, jax.random.fold_in(key, 0)))
    return squared_error(nets, trained["fake"], x, batch["label"], jax.random.fold_in(key, 1)), {}

  def student_loss(trained, params, nets, batch, key):
    x = student(trained["model"], nets, batch, jax.random.fold_in(key, 0))
    t = jax.random.uniform(jax.random.fold_in(key, 1), x.shape[:1], minval=0.02, maxval=0.98)
    x_t = (1 - t)[:, None] * x + t[:, None] * jax.random.normal(jax.random.fold_in(key, 2), x.shape)
    clean = lambda role: x_t - t[:, None] * nets.velocity(params[role], x_t, t, batch["label"])
    gradient = (clean("fake") - clean("teacher")) / (jnp.mean(jnp.abs(x - clean("teacher")), axis=1, keepdims=True) + 1e-4)
    return 0.5 * jnp.mean(jnp.square(x - jax.lax.stop_gradient(x - gradient)), axis=1), {}

  roles = {"model": Role("mlp"), "teacher": Role("mlp", start="model"), "fake": Role("mlp", start="model")}
  updates = (Update(("fake",), fake_loss, optimizer=optim.Config(learning_rate=2e-3, warmup_steps=0)),
             Update(("model",), student_loss, every=every, optimizer=optim.Config(learning_rate=1e-3, schedule="linear", warmup_steps=2)))
  return Algorithm(roles, updates, {"ema": Average("model", 0.9)}, validation=validation, num_bins=2, deploy=lambda weights: {"mlp": weights["ema"]})


def adapter():
  def generate(params, nets, batch, key):
    x = sampler.sample_noise(key, batch["sample_id"], (2,))
    return {"x_0": sampler.sample(nets.velocity, params["model"], x, batch["label"], SIGMAS), "label": batch["label"]}

  def score(params, nets, samples, batch):
    return {"near": -jnp.sum(jnp.square(samples["x_0"] - params["judge"]["centre"].astype(jnp.float32)[None]), axis=1)}

  def minibatches(samples, key):
    return jax.tree.map(lambda x: x[None], {"x_0": samples["x_0"], "label": samples["label"],
                                            "weight": samples["weight"] * jnp.exp(samples["rewards"]["near"])})

  def loss(trained, params, nets, batch, key):
    velocity = lambda weights: nets.velocity(weights, batch["x_0"], jnp.full_like(batch["weight"], 0.5), batch["label"])
    away = jnp.mean(jnp.square(velocity(trained["model"]) - velocity(params["ref"])), axis=1)
    return squared_error(nets, trained["model"], batch["x_0"], batch["label"], key), {"away": away}

  roles = {"model": Role("mlp"), "ref": Role("mlp", start="model"), "judge": Role("judge", dtype="bfloat16")}
  whole = Algorithm(roles, (Update(("model",), loss),), {"ema": Average("model", 0.9)},
                    Rollout(generate, score, ("near",), minibatches, on_device=True), validation=validation, num_bins=2,
                    deploy=lambda weights: {"mlp": weights["ema"]})
  return with_adapter(whole, adapters.Settings(RANK, 2 * RANK, "hidden"))


def language():
  def per_row(params, nets, batch):
    """(mean over a row's tokens of what it costs to say them [B], share of them that are the likeliest [B])."""
    logits, following = nets.logits(params["model"], batch["tokens"])[:, :-1], batch["tokens"][:, 1:]
    mask = batch["loss_mask"][:, 1:].astype(jnp.float32)
    cost = -jnp.take_along_axis(jax.nn.log_softmax(logits), following[:, :, None], axis=2)[:, :, 0]
    mean = lambda x: jnp.sum(x * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
    return mean(cost), mean((jnp.argmax(logits, axis=2) == following).astype(jnp.float32))

  def loss(trained, params, nets, batch, key):
    del params, key
    cost, right = per_row(trained, nets, batch)
    return cost, {"accuracy": right}

  def held_out(params, nets, batch, key):
    del key
    cost, right = per_row(params, nets, batch)
    return {"loss": cost, "accuracy": right}, jnp.zeros(cost.shape, jnp.int32)

  return Algorithm({"model": Role("language")}, (Update(("model",), loss),), {"ema": Average("model", 0.9)}, validation=held_out,
                   deploy=lambda weights: {"language": weights["ema"]})


@functools.cache
def scorer():
  """What scores the pictures of `rewarded`, for as long as this process is there."""
  functions = {name: own(f"tests.jobs.toy_rewards:{name}") for name in ("near", "odd")}
  made = Scorer(functions, dict.fromkeys(functions, 60.0), lambda name, task: name == "near" or task["category"] == "odd", 1)
  atexit.register(made.__exit__, None, None, None)
  return made


def rewarded(chunks=2):
  base = grpo()

  def generate(params, nets, batch, key):
    samples = base.rollout.generate(params, nets, batch, key)
    place = jnp.clip((samples["path"][:, -1] + 4) / 8, 0, 1)
    return {**samples, "pictures": jnp.pad(jnp.round(255 * place), ((0, 0), (0, 1))).astype(jnp.uint8)[:, None, None]}

  def judge(params, nets, samples, batch):
    del batch
    return {"judge": -jnp.sum(jnp.square(samples["path"][:, -1] - params["judge"]["centre"].astype(jnp.float32)[None]), axis=1)}

  def minibatches(samples, key):
    weights = jnp.asarray(rewards.weights)[samples["category"]]  # B, rewards
    total = sum(weights[:, place] * samples["rewards"][name] for place, name in enumerate(rewards.names))
    return base.rollout.minibatches({**samples, "rewards": {"near": total}}, key)

  score, weights = lambda pictures, tasks: scorer()(pictures, tasks), ((0.1, 1.0, 0.0), (0.1, 1.0, 0.5))
  rewards = Rewards(("judge", "near", "odd"), score, weights, ("even", "other"), judge, ("judge",))
  roles = {**base.roles, "judge": Role("judge", dtype="bfloat16")}
  return dataclasses.replace(base, roles=roles, rollout=rewards.rollout(generate, minibatches, 2, chunks))


METHODS = {"supervised": supervised, "dpo": dpo, "grpo": grpo, "nft": nft, "dmd": dmd, "adapter": adapter,
           "language": language, "rewarded": rewarded}
