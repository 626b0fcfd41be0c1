"""A train step beside what a user would take instead: ours, and the published PyTorch class, eager and compiled, with AdamW and clipping.

  python -m benchmarks.step [--size=20M,100M,quickstart] [--batch=1,4] [--task=t2i,ti2i] [--rounds=5] [--dtype=float32] [--forward] [--json=F]

Latents and text states are given, as a latent cache does, so that only the generator and the optimizer run. Both sides have the same sizes, the same
number of weights, tokens and rows, and fresh inputs in every round; torch has fused AdamW. `--forward` times the forward pass alone as well. The
ways take turns in one process, with the largest matrix rate of both libraries (`benchmarks.timing`). "of limit" is model FLOPs
(`qimg2.analysis.flops`) per second over XLA's matrix rate. Needs torch and diffusers (requirements-dev.txt).
"""

import dataclasses
import logging as python_logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags

from benchmarks import timing
from configs import base
from launch import cli
from qimg2 import attention, flow
from qimg2 import params as P
from qimg2.algorithms.flow_matching import flow_matching
from qimg2.analysis import flops
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.networks import Networks
from qimg2.training import optim
from qimg2.training.state import init_state, make_optimizers, make_step
from tests import reference

SLOT = 9  # token of an image slot
SYSTEM = 0  # tokens of the system turn: the features of a cache are without it
SETTINGS = optim.Config(learning_rate=1e-4)


@dataclasses.dataclass(frozen=True)
class Size:
  """A generator, and what it is trained on: latents along each side of target and condition image, and words of the prompt."""
  model: mmdit.Config
  side: int
  words: int


def _sized(width: int, num_layers: int, head_dim: int = 64, **other) -> mmdit.Config:
  rope = (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8)
  return mmdit.Config(latent_channels=64, width=width, num_layers=num_layers, num_heads=width // head_dim, head_dim=head_dim, context_width=width,
                      rope_dims=rope, **other)


def _quickstart() -> Size:
  cfg = base.base()
  return Size(mmdit.Config(**{field.name: cfg.model[field.name] for field in dataclasses.fields(mmdit.Config) if field.name in cfg.model}), 4, 31)


SIZES = {
    "20M": lambda: Size(_sized(384, 8), 32, 128),
    "100M": lambda: Size(_sized(768, 10), 32, 128),
    "7B": lambda: Size(mmdit.Config(), 64, 256),
    "quickstart": _quickstart,
}


def make_batch(size: Size, batch: int, edit: bool, seed: int) -> dict[str, np.ndarray]:
  """A batch as a latent cache gives it."""
  rng, side, model = np.random.default_rng(seed), size.side, size.model
  tokens = np.ones((batch, size.words + (side * side // 4 if edit else 0)), np.int32)
  if edit:
    tokens[:, 4:4 + side * side // 4] = SLOT
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  made = {"tokens": tokens, "token_count": np.full(batch, tokens.shape[1], np.int32), "sample_id": np.arange(batch, dtype=np.int32),
          "latents": normal(batch, side, side, model.latent_channels), "features": normal(batch, tokens.shape[1], model.context_width)}
  return made | ({"source_latents": (normal(batch, side, side, model.latent_channels),), "sources": ()} if edit else {})


@dataclasses.dataclass(frozen=True)
class Program:
  """Our train step, compiled: what it begins with and takes, the number of weights, model FLOPs, and seconds of compiling."""
  step: Any
  state: Any
  frozen: dict
  num_weights: int
  flops: float
  compile_s: float

  def way(self, batch: dict):
    """A function of a round that trains a step; the first one uses up `state`."""
    state = [self.state]

    def train(_):
      state[0], metrics = self.step(state[0], self.frozen, batch)
      jax.block_until_ready((state[0], metrics))
    return train


def compiled_step(size: Size, batch: dict) -> Program:
  """Our train step for a batch."""
  nets = Networks(size.model, qwen3_vl.Config(image_token_id=SLOT), vae.Config(), SYSTEM)
  algorithm = flow_matching(flow.Schedule(), ema_decay=0.0)
  specs = {"model": mmdit.specs(size.model)}
  optimizers = make_optimizers(algorithm, specs, SETTINGS, 1000)
  state = jax.jit(lambda: init_state(algorithm, optimizers, P.init(specs, jax.random.key(0)), {}, jax.random.key(0)))()
  frozen = {"encoder": {}, "vae": {}}
  begin = time.perf_counter()
  step = jax.jit(make_step(algorithm, optimizers, nets), donate_argnums=0).lower(state, frozen, batch).compile()
  return Program(step, state, frozen, P.count(specs), flops.TRAINED * _forward_flops(size, batch), time.perf_counter() - begin)


def _forward_flops(size: Size, batch: dict) -> float:
  edit = "source_latents" in batch
  return len(batch["tokens"]) * flops.generator_forward(size.model, batch["tokens"].shape[1], size.side**2, size.side**2 if edit else 0)


def ours(size: Size, batch: dict, forward: bool):
  """(function of a round that trains a step, or runs forward alone; number of weights; model FLOPs of it)."""
  if not forward:
    program = compiled_step(size, batch)
    return program.way(batch), program.num_weights, program.flops
  nets = Networks(size.model, qwen3_vl.Config(image_token_id=SLOT), vae.Config(), SYSTEM)
  specs = {"model": mmdit.specs(size.model)}
  params = jax.jit(lambda: P.init(specs, jax.random.key(0)))()

  @jax.jit
  def run(model, batch, t):
    cond = nets.condition({"qwen3_vl": {}, "vae": {}}, batch)
    return nets.velocity(model, nets.target_latents({}, batch), t, cond)
  half = jnp.full(len(batch["tokens"]), 0.5)
  return lambda _: jax.block_until_ready(run(params["model"], batch, half)), P.count(specs), _forward_flops(size, batch)


def theirs(size: Size, batch: dict, forward: bool, compiled: bool):
  """(function of a round as in `ours`, number of weights) for the published class."""
  cfg = size.model
  device = "cuda" if torch.cuda.is_available() else "cpu"
  with torch.device(device):  # to draw billions of weights on the host takes minutes
    module = reference.qwen_image_transformer()(
        in_channels=cfg.latent_channels, out_channels=cfg.latent_channels, num_layers=cfg.num_layers, attention_head_dim=cfg.head_dim,
        num_attention_heads=cfg.num_heads, context_in_dim=cfg.context_width, axes_dims_rope=cfg.rope_dims)
  num = sum(x.numel() for x in module.parameters())
  put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device)
  flat = lambda x: x.reshape(len(x), -1, x.shape[-1])
  x_0, text = put(flat(batch["latents"])), put(batch["features"])
  sources = [put(flat(x)) for x in batch.get("source_latents", ())]
  slots = torch.from_numpy(np.concatenate([batch["tokens"] == SLOT, np.ones((len(x_0), size.side**2 // 4), bool)], axis=1)).to(device)
  shapes = [[(1, size.side, size.side)] * (1 + len(sources))] * len(x_0)
  autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=cfg.dtype == "bfloat16")

  def velocity(x_t, t):
    return module(torch.cat([*sources, x_t], dim=1), text, t, shapes, slots).sample[:, -x_t.shape[1]:]
  velocity = torch.compile(velocity) if compiled else velocity
  if forward:
    def run(_):
      with torch.no_grad(), autocast:
        timing.synchronize(torch, velocity(x_0, torch.full((len(x_0),), 0.5, device=device)))
    return run, num
  optimizer = torch.optim.AdamW(module.parameters(), lr=SETTINGS.learning_rate, betas=(SETTINGS.b1, SETTINGS.b2), eps=SETTINGS.eps,
                                weight_decay=SETTINGS.weight_decay, fused=True)

  def run(_):
    t, noise = torch.sigmoid(torch.randn(len(x_0), device=device)), torch.randn_like(x_0)
    at = t[:, None, None]
    with autocast:
      v = velocity((1 - at) * x_0 + at * noise, t)
    loss = (v.float() - (noise - x_0)).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), SETTINGS.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    timing.synchronize(torch, loss.item())
  return run, num


def measure(name: str, size: Size, batch_size: int, task: str, forward: bool, rounds: int, rate: float, peers: list[str]) -> dict:
  """A row of the table."""
  batch = make_batch(size, batch_size, task == "ti2i", 0)
  run, num, counts = ours(size, jax.device_put(batch), forward)
  ways = {"ours": run}
  for peer in peers:
    ways[peer], their_num = theirs(size, batch, forward, peer == "compiled")
    if their_num != num:
      raise ValueError(f"The published class has {their_num} weights and ours {num}: the sizes differ.")
  times = timing.take_turns(ways, rounds)
  return {"size": name, "task": task, "batch": batch_size, "what": "forward" if forward else "step", "num_weights": num, **timing.columns(times),
          "of_limit": counts / times["ours"].median / rate}


def describe(row: dict) -> str:
  """A row as a line."""
  return f"{row['size']:11}{row['task']:5}{row['batch']:>6}  {row['what']:8}{timing.cells(row)}{row['of_limit']:>10.0%}"


def define_flags() -> None:
  """The flags of this benchmark."""
  flags.DEFINE_list("size", ["20M", "quickstart"], f"Any of {', '.join(SIZES)}.")
  flags.DEFINE_list("batch", ["1", "4"], "Rows of a batch.")
  flags.DEFINE_list("task", ["t2i", "ti2i"], "t2i, ti2i.")
  flags.DEFINE_list("peer", list(timing.PEERS), "What of torch to time; empty for ours alone.")
  flags.DEFINE_integer("rounds", 5, "Timed calls of each way.", lower_bound=1)
  flags.DEFINE_integer("num_layers", 0, "Layers in place of the size's, for one that does not fit.", lower_bound=0)
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type; master weights are float32.")
  flags.DEFINE_string("remat", "none", "Rematerialisation policy of ours.")
  flags.DEFINE_enum("attention", "auto", attention.BACKENDS, "Back end of ours.")
  flags.DEFINE_bool("forward", False, "Time the forward pass too.")
  flags.DEFINE_string("json", "", "File for the rows.")


def main(_) -> None:
  """Prints the table."""
  args = flags.FLAGS
  python_logging.getLogger("torch").setLevel(python_logging.ERROR)
  timing.check_choices(size=(args.size, SIZES), task=(args.task, ("t2i", "ti2i")), peer=(args.peer, timing.PEERS))
  rates = timing.matrix_rates(dtype=args.dtype, torch=torch)
  print(timing.limits(args.dtype, rates))
  print(f"{'size':11}{'task':5}{'batch':>6}  {'what':8}{timing.heads()}{'of limit':>10}")
  rows = []
  for name in args.size:
    size = SIZES[name]()
    model = dataclasses.replace(size.model, dtype=args.dtype, remat=args.remat, attention_backend=args.attention,
                                **({"num_layers": args.num_layers} if args.num_layers else {}))
    size = dataclasses.replace(size, model=model)
    for task in args.task:
      for batch in timing.numbers("batch", args.batch):
        for forward in ((True, False) if args.forward else (False,)):
          rows.append(measure(name, size, batch, task, forward, args.rounds, rates["xla"], args.peer))
          print(describe(rows[-1]), flush=True)
          torch.compiler.reset()
  timing.summary(rows, args.json, matrix_rates=rates, dtype=args.dtype)


if __name__ == "__main__":
  cli.run(main, define_flags)
