"""Training methods, one file each. A method is an `Algorithm` value; the trainer knows nothing else about it.

A *network* is a kind of weights with functions (mmdit, qwen3_vl, vae ...); a *role* is one set of weights in a method (model, encoder, ref,
teacher, fake ...), and names its network. A step runs the `updates` in the order of their tuple: each is one backward pass and one optimizer
step over the roles that it moves together, and sees the new weights of those before it. `averages` follow the roles. A method that learns
from its own samples has a `rollout`, which makes the data of a step before it.

Everything here is declared; `qimg2.training` runs it. Left out on purpose: when to save, log, evaluate or stop, which is the same for all methods.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qimg2 import adapters
from qimg2 import params as P

Weights = dict[str, Any]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Weights, Weights, Any, dict, jax.Array], tuple[jax.Array, Metrics]]
ValidationFn = Callable[[Weights, Any, dict, jax.Array], tuple[Metrics, jax.Array]]
FinalizeFn = Callable[[Weights, Any, list[dict]], Weights]
DeployFn = Callable[[Weights], Weights]

RESERVED = {"left_out", "learned"}  # names of no reward
COMPUTE = "compute"  # a role's dtype: the one that its network computes in


@dataclasses.dataclass(frozen=True)
class Role:
  """One set of weights.

  Attributes:
    network: which network's specs and functions: "mmdit", "qwen3_vl", "vae" ...; "lora/mmdit" for an adapter of the generator.
    start: role to read from the source that a stage starts from, such as "model" for "ref", "teacher" and "fake"; "" for its own name.
    dtype: storage of a frozen role: a type, or `COMPUTE`, which halves a network that computes in bfloat16. Trained roles are kept as declared,
      in float32.
    adapter: rank and targets of an adapter, whose specs follow from those of its network; None for whole networks.
  """
  network: str
  start: str = ""
  dtype: str = "float32"
  adapter: adapters.Settings | None = None


@dataclasses.dataclass(frozen=True)
class Update:
  """One backward pass and one optimizer step.

  Attributes:
    roles: moved together, under one norm of the gradient: a VAE and a projector, an adapter and a head.
    loss: `loss(trained, params, nets, batch, key) -> (per example [B], metrics)`. `trained` maps `roles` to the weights to differentiate by;
      `params` maps every role and average to its weights. Metrics are scalars or [B]. The mean is taken over examples, weighted by
      batch["weight"] [B] where there is one: 0 leaves an example out, a negative one skips the update (advantages belong in the loss). Before that
      it is multiplied by batch["loss_weight"] [B] where there is one, and no mean is divided by that. Rows that
      are left out hold a copy of another row, so anything but a per-example result must look at `weight` itself.
    every: due at the end of every `every` steps, so that a row logged at a multiple sees it. Its schedule counts its own updates.
    optimizer: settings of its own (`qimg2.training.optim.Config`); None takes the stage's.
    name: of its metrics and optimizer state; "" for its roles, joined by "+".
    limits: metric -> its largest value, for what the method promises of itself: a step with more ends the stage, and is never saved.
  """
  roles: tuple[str, ...]
  loss: LossFn
  every: int = 1
  optimizer: Any = None
  name: str = ""
  limits: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not self.roles or self.every < 1:
      raise ValueError(f"Update of roles {self.roles}: it needs a role, and every={self.every} must be at least 1.")
    object.__setattr__(self, "name", self.name or "+".join(self.roles))
    if "/" in self.name or self.name in ("reward", "pictures"):
      raise ValueError(f"An update cannot be named {self.name!r}: its name and a / stand before its metrics, and reward/ and pictures/ before those "
                       "of rollouts.")


@dataclasses.dataclass(frozen=True)
class Average:
  """Averaged weights (EMA) of a role, such as the model's, or the old policy of DiffusionNFT.

  average <- d average + (1 - d) weights,   d = min(decay, (1 + n)/(10 + n)) after n updates of the average

  Attributes:
    role: a trained role.
    decay: d, or a function of the number of steps done that gives it. 0 is a hard copy.
    every: it moves at every `every`-th step; at 1, at the steps where its role moves.
    ramp: whether d rises as above, so that an early average follows closely. An average that was restored from an earlier stage never ramps.
  """
  role: str
  decay: float | Callable[[jax.Array], jax.Array]
  every: int = 1
  ramp: bool = True


@dataclasses.dataclass(frozen=True)
class Rollout:
  """What happens between two steps of a method that learns from its own samples: device, host, device.

  Attributes:
    generate: jitted `generate(params, nets, batch, key) -> samples`, a dict of [B, ...]; B may be a multiple of the batch's rows, those of one row
      then side by side (`jnp.repeat`, not `jnp.tile`), because each process scores the samples of its own rows. Where samples
      have "pictures" [B, H, W, C] uint8, figures of them are logged (`qimg2.training.pictures`).
    score: on the host `score(samples, batch) -> {reward: [B] float32}` over this process's rows, as numpy arrays; any exception ends the stage.
      With `on_device`, when the judge is a frozen role, jitted `score(params, nets, samples, batch)`. A reward that is not finite leaves its
      sample out, unless its weight is 0.
    rewards: names of what `score` gives.
    minibatches: jitted `minibatches(samples, key) -> dict of [K, B', ...]` with K = `num_minibatches`, where `samples` has got "rewards",
      {reward: [B]} with 0 for what is not finite, and "weight" [B], 0 for what is left out. The compiled step scans over K,
      with every update that is due in each.
    num_minibatches: K, optimizer steps per update and step.
    on_device: see `score`.
    weights: those of `Rewards`. A reward of weight 0 in a sample's category, samples["category"] [B], may be missing and leaves nothing out.
    chunks: how often `generate` runs, each time on every `chunks`-th row of the batch and with a key of its own. The host scores the samples of one
      run, as a batch of its own and in a thread, while the device generates the next.
    judge: with a `score` on the host, the rewards that a frozen role gives, of names `judged`: jitted `judge(params, nets, samples, batch)`. The
      device judges while the host scores.
    judged: see `judge`.
    scored: names of the samples that a `score` on the host reads, which alone go there; () for all.
  """
  generate: Callable[[Weights, Any, dict, jax.Array], dict]
  score: Callable[..., Mapping[str, Any]]
  rewards: tuple[str, ...]
  minibatches: Callable[[dict, jax.Array], dict]
  num_minibatches: int = 1
  on_device: bool = False
  weights: tuple[tuple[float, ...], ...] = ()
  chunks: int = 1
  judge: Callable[[Weights, Any, dict, dict], Mapping[str, jax.Array]] | None = None
  judged: tuple[str, ...] = ()
  scored: tuple[str, ...] = ()

  def __post_init__(self):
    if not self.rewards or RESERVED & set(self.rewards):
      raise ValueError("A rollout needs the names of its rewards, and reward/left_out is the share of samples without a finite one, reward/learned "
                       "of those that are learned from: choose other names.")
    if self.chunks < 1 or set(self.judged) - set(self.rewards) or (self.judge is None) == bool(self.judged):
      raise ValueError(f"A rollout in {self.chunks} chunks whose judge gives {', '.join(self.judged) or 'nothing'}: give at least one chunk, and a "
                       "judge with the names, among the rewards, of what it gives.")

  @property
  def by_device(self) -> tuple[str, ...]:
    """Names of the rewards that the device gives."""
    return self.rewards if self.on_device else self.judged

  @property
  def by_host(self) -> tuple[str, ...]:
    """Names of the rewards that the host gives."""
    return tuple(name for name in self.rewards if name not in self.by_device)


@dataclasses.dataclass(frozen=True)
class Rewards:
  """The rewards of a stage, as a method sees them: it does not know what is behind them.

  Attributes:
    names: of all of them.
    score: on the host, `score(pictures [B, H, W, C] uint8, tasks)` -> {name: [B] float32}, NaN for what could not be scored, never 0. `tasks` has one
      mapping per picture: "prompt", "category" and what the record's truth holds. It gives all names but those of `judged`.
    judge, judged: what a frozen role gives on the device, as in `Rollout`.
    weights: one row for each prompt category, one number for each name: what its normalised reward counts in the advantage. A reward of weight
      0 in all of them is watched and not learned from ("gold"). () counts all alike in one category.
    categories: the names of the rows of `weights`, the last of them for every category that has no row of its own; () for one row for all, and then
      batches have no "category".

  Raises:
    ValueError: no names, or weights of another shape.
  """
  names: tuple[str, ...]
  score: Callable[[Any, Sequence[Mapping[str, Any]]], Mapping[str, Any]]
  weights: tuple[tuple[float, ...], ...] = ()
  categories: tuple[str, ...] = ()
  judge: Callable[[Weights, Any, dict, dict], Mapping[str, jax.Array]] | None = None
  judged: tuple[str, ...] = ()

  def __post_init__(self):
    if not self.names or len(set(self.names)) < len(self.names):
      raise ValueError(f"Rewards {', '.join(self.names)}: there must be one, each with a name of its own.")
    if any(len(row) != len(self.names) for row in self.weights):
      raise ValueError(f"Rewards {', '.join(self.names)}: each category needs {len(self.names)} weights, one for each of them.")
    if self.categories and len(self.categories) != len(self.weights):
      raise ValueError(f"Rewards {', '.join(self.names)}: {len(self.categories)} categories need as many rows of weights, not {len(self.weights)}.")

  @property
  def gold(self) -> tuple[str, ...]:
    """Names of the rewards that are watched and not learned from."""
    return tuple(name for place, name in enumerate(self.names) if self.weights and not any(row[place] for row in self.weights))

  def find_category(self, task: Mapping[str, Any]) -> int:
    """The row of `weights` that a task's prompt has: of its category, or else the last one."""
    return self.categories.index(task["category"]) if task["category"] in self.categories else max(0, len(self.categories) - 1)

  def rollout(self, generate: Callable[[Weights, Any, dict, jax.Array], dict], minibatches: Callable[[dict, jax.Array], dict],
              num_minibatches: int = 1, chunks: int = 1) -> Rollout:
    """A rollout whose pictures, samples["pictures"] [B, H, W, C] uint8, get these rewards; the arguments are those of `Rollout`.

    Each row's pictures are side by side and have its task. Samples have "category" [B] int32 where the batch has.
    """
    def generate_with_category(params, nets, batch, key):
      samples = generate(params, nets, batch, key)
      if "category" not in batch:
        return samples
      return {**samples, "category": jnp.repeat(batch["category"], samples["pictures"].shape[0] // batch["category"].shape[0])}

    def score(samples, batch):
      group = len(samples["pictures"]) // len(batch["tasks"])
      return self.score(samples["pictures"], [task for task in batch["tasks"] for _ in range(group)])

    return Rollout(generate_with_category, score, self.names, minibatches, num_minibatches, weights=self.weights, chunks=chunks, judge=self.judge,
                   judged=self.judged, scored=("pictures",))


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """A training method as a value.

  Attributes:
    roles: name -> role, the frozen ones too. A role is trained if an update moves it.
    updates: run in this order.
    averages: name -> averaged weights of a role; a name is no role's.
    rollout: None where a step learns from the loader's batch itself.
    validation: `validation(params, nets, batch, key) -> (metrics, bins)`: per-example metrics [B] and the bin [B] int32 of each example. The
      evaluator averages inside each bin, then over bins. None: no held-out metrics.
    num_bins: number of bins; 1 for a plain mean.
    finalize: `finalize(params, nets, batches) -> params`, once after the last step over the evaluation batches; also applied to averages.
    deploy: `deploy(weights) -> {network: weights}` of all roles and averages: which weights draw, are judged and are exported; None for each
      role's own network, where no two roles share one.
    unconditional: whether batches carry the unconditional prompt, "null_tokens" and "null_token_count", for guidance inside the method.
    pairs: whether batches carry "rejected", or "rejected_latents", the worse picture of each row's prompt.
    tasks: whether batches carry "tasks" for a score of the method's own; where the stage has rewards they do anyway.
    switched_off: of a method with an adapter, the roles that are its base with the adapter off.

  Raises:
    ValueError: names that do not fit each other.
  """
  roles: Mapping[str, Role]
  updates: tuple[Update, ...]
  averages: Mapping[str, Average] = dataclasses.field(default_factory=dict)
  rollout: Rollout | None = None
  validation: ValidationFn | None = None
  num_bins: int = 1
  finalize: FinalizeFn | None = None
  deploy: DeployFn | None = None
  unconditional: bool = False
  tasks: bool = False
  switched_off: tuple[str, ...] = ()
  pairs: bool = False

  def __post_init__(self):
    names = [update.name for update in self.updates]
    moved = [role for update in self.updates for role in update.roles]
    unknown = [role for role in moved if role not in self.roles]
    if not names or len(set(names)) < len(names) or unknown:
      raise ValueError(f"Updates {', '.join(names)}: there must be one, each with a name of its own, over declared roles"
                       + (f"; {unknown[0]!r} is none." if unknown else "."))
    for name, average in self.averages.items():
      if name in self.roles or average.role not in moved:
        raise ValueError(f"Average {name!r} of {average.role!r}: its name must be no role's, and its role must be trained.")
    if self.deploy is None and len({role.network for role in self.roles.values()}) < len(self.roles):
      raise ValueError("Two roles share a network: the algorithm needs a `deploy` that says which of them draws.")

  @property
  def trained(self) -> tuple[str, ...]:
    """Names of the roles that an update moves, in the order of the updates."""
    return tuple(dict.fromkeys(role for update in self.updates for role in update.roles))

  @property
  def frozen(self) -> tuple[str, ...]:
    """Names of the roles that are read and never updated."""
    return tuple(role for role in self.roles if role not in self.trained)

  @property
  def limits(self) -> dict[str, float]:
    """Name of a metric, as a step gives it -> its largest value."""
    return {name if len(self.updates) == 1 else f"{update.name}/{name}": limit for update in self.updates for name, limit in update.limits.items()}

  def deployed(self, weights: Weights) -> Weights:
    """{network: weights} that draw, are judged and are exported, from the weights of all roles and averages."""
    return self.deploy(weights) if self.deploy else {role.network: weights[name] for name, role in self.roles.items()}

  def specs(self, networks: Mapping[str, dict], compute: Mapping[str, str]) -> dict[str, dict]:
    """{role: declared weights}, those of a frozen role in the type that it is stored in.

    Args:
      networks: network -> specs.
      compute: network -> the type that it computes in, for roles of dtype `COMPUTE`.

    Raises:
      ValueError: a role of a network that there is not, or an adapter of weights that there are not.
    """
    specs = {}
    for name, role in self.roles.items():
      network = role.network.removeprefix(adapters.PREFIX) if role.adapter else role.network
      if network not in networks:
        raise ValueError(f"Role {name!r} names the network {network!r}: there are {', '.join(networks)}.")
      declared = adapters.specs(networks[network], role.adapter) if role.adapter else networks[network]
      dtype = compute.get(network, "float32") if role.dtype == COMPUTE else role.dtype
      specs[name] = declared if name in self.trained or dtype == "float32" else P.with_dtype(declared, dtype)
    return specs

  def due(self, step: int) -> Iterator[Update]:
    """The updates that run in the `step`-th step, counted from 1."""
    return (update for update in self.updates if step % update.every == 0)
