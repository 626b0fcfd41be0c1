"""The frozen networks beside the published classes, with the same weights: the VAE of diffusers and the condition encoder of transformers.

  python -m benchmarks.networks [--size=20M] [--what=encode,decode,autoencode,prompts] [--px=256] [--batch=4] [--tokens=256] [--rounds=5] [--json=F]

  encode      pixels to latents                      decode    latents to pixels
  autoencode  a mean squared error and its gradient by every weight of the VAE
  prompts     states of `--batch` prompts of `--tokens` tokens

Before anything is timed the results are compared: "off by" is the largest difference over the largest value (of the loss, for autoencode). "of
limit" is model FLOPs (`qimg2.analysis.flops`) per second over XLA's matrix rate. Needs requirements-dev.txt.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags

from benchmarks import published, timing
from launch import cli
from qimg2.analysis import flops
from qimg2.models import qwen3_vl, vae
from tests import reference

WHATS = ("encode", "decode", "autoencode", "prompts")


def inputs(source, what: str, px: int, batch: int, num_tokens: int) -> np.ndarray:
  """What a way is given: pixels in about [-1, 1], latents or tokens."""
  rng, cfg = np.random.default_rng(0), source.nets.vae
  if what == "prompts":
    return rng.integers(0, 200, (batch, num_tokens)).astype(np.int32)
  side = px // cfg.spatial_factor
  shape = (batch, side, side, cfg.latent_channels) if what == "decode" else (batch, px, px, cfg.image_channels)
  return rng.uniform(-1, 1, shape).astype(np.float32)


def our_way(source, weights, what: str, x: np.ndarray) -> tuple[Callable[[int], Any], float]:
  """(a function whose result is on the device, model FLOPs of it)."""
  nets, num = source.nets, len(x)
  cfg, x = nets.vae, jnp.asarray(x)
  autoencoder = {name: p for name, p in weights["vae"].items() if name != "statistics"}
  if what == "prompts":
    run = jax.jit(lambda p, x: qwen3_vl.apply(nets.encoder, p, x, jnp.full(num, x.shape[1])))
    return lambda _: jax.block_until_ready(run(weights["qwen3_vl"], x)), num * flops.encoder_forward(nets.encoder, x.shape[1])
  if what == "encode":
    run, count = jax.jit(lambda p, x: vae.encode(cfg, p, x).mode), flops.vae_encode(cfg, *x.shape[1:3])
  elif what == "decode":
    run = jax.jit(lambda p, z: vae.decode(cfg, p, z, clamp=False))
    count = flops.vae_decode(cfg, *(side * cfg.spatial_factor for side in x.shape[1:3]))
  else:
    loss = lambda p, x: jnp.mean(jnp.square(vae.decode(cfg, p, vae.encode(cfg, p, x).mode, clamp=False) - x))
    run, count = jax.jit(jax.value_and_grad(loss)), flops.TRAINED * (flops.vae_encode(cfg, *x.shape[1:3]) + flops.vae_decode(cfg, *x.shape[1:3]))
  return lambda _: jax.block_until_ready(run(autoencoder, x)), num * count


def their_way(pipe, what: str, x: np.ndarray, compiled: bool) -> Callable[[int], Any]:
  """The same by the published class."""
  x = torch.from_numpy(x).to(published.device())
  if what == "prompts":
    model, seen = pipe.text_encoder.model, torch.ones_like(x, dtype=torch.long)
    states = []
    model.language_model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))

    def run(_):
      states.clear()
      with torch.no_grad():
        model(input_ids=x.long(), attention_mask=seen)
      return timing.synchronize(torch, states[0])
    return run
  network, x = pipe.vae, x.permute(0, 3, 1, 2)[:, :, None].to(pipe.vae.dtype)
  encode, decode = lambda x: network.encode(x).latent_dist.mode(), lambda z: network.decode(z).sample
  autoencode = lambda x: (network._decode(network.encode(x).latent_dist.mode()).sample - x).float().square().mean()
  call = {"encode": encode, "decode": decode, "autoencode": autoencode}[what]
  call = torch.compile(call) if compiled and what == "autoencode" else call  # it goes around `encode` and `decode`

  def run(_):
    if what == "autoencode":
      network.zero_grad(set_to_none=True)
      loss = call(x)
      loss.backward()
      return timing.synchronize(torch, loss.detach())
    with torch.no_grad():
      return timing.synchronize(torch, call(x))
  return run


def difference(what: str, ours: Any, theirs: Any) -> float:
  """How far the results are apart, over the largest value."""
  theirs = theirs.float().cpu().numpy()
  if what == "prompts":
    return reference.relative_error(np.asarray(ours, np.float32), theirs)
  if what == "autoencode":
    return abs(float(ours[0]) - float(theirs)) / float(theirs)
  ours = np.asarray(ours, np.float32).transpose(0, 3, 1, 2)[:, :, None]
  return reference.relative_error(np.clip(ours, -1, 1) if what == "decode" else ours, theirs)


def measure(size: str, what: str, px: int, batch: int, num_tokens: int, rounds: int, dtype: str, rate: float, peers: list[str]) -> dict:
  """A row of the table."""
  source, weights = published.ours(size, dtype)
  x = inputs(source, what, px, batch, num_tokens)
  run, count = our_way(source, weights, what, x)
  ways = {"ours": run, **{peer: their_way(published.theirs(size, dtype, peer == "compiled"), what, x, peer == "compiled") for peer in peers}}
  first = run(0)
  off = max((difference(what, first, way(0)) for name, way in ways.items() if name != "ours"), default=0.0)
  if dtype == "float32" and off > 1e-2:
    raise ValueError(f"The results of {what} differ by {off:.1e} of the largest: the two sides do not compute the same, so their times say nothing.")
  times = timing.take_turns(ways, rounds)
  return {"size": size, "what": what, "px": px, "batch": batch, "tokens": num_tokens, "off_by": off, **timing.columns(times),
          "of_limit": count / times["ours"].median / rate}


def describe(row: dict) -> str:
  """A row as a line."""
  return f"{row['size']:6}{row['what']:12}{row['batch']:>6}{timing.cells(row)}{row['of_limit']:>10.0%}{row['off_by']:>10.1e}"


def define_flags() -> None:
  """The flags of this benchmark."""
  flags.DEFINE_list("size", ["20M"], f"Any of {', '.join(published.SIZES)}.")
  flags.DEFINE_list("what", list(WHATS), f"Any of {', '.join(WHATS)}.")
  flags.DEFINE_list("batch", ["4"], "Pictures or prompts.")
  flags.DEFINE_list("peer", ["eager"], "What of torch to time: eager, compiled; empty for ours alone.")
  flags.DEFINE_integer("px", 256, "Side of the pictures.", lower_bound=16)
  flags.DEFINE_integer("tokens", 256, "Tokens of a prompt.", lower_bound=1)
  flags.DEFINE_integer("rounds", 5, "Timed calls of each way.", lower_bound=1)
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of weights and computation.")
  flags.DEFINE_string("json", "", "File for the rows.")


def main(_) -> None:
  """Prints the table."""
  args = flags.FLAGS
  timing.check_choices(size=(args.size, published.SIZES), what=(args.what, WHATS), peer=(args.peer, timing.PEERS))
  rates = timing.matrix_rates(dtype=args.dtype, torch=torch)
  print(timing.limits(args.dtype, rates))
  print(f"{'size':6}{'what':12}{'batch':>6}{timing.heads()}{'of limit':>10}{'off by':>10}")
  rows = []
  for size in args.size:
    for what in args.what:
      for batch in timing.numbers("batch", args.batch):
        rows.append(measure(size, what, args.px, batch, args.tokens, args.rounds, args.dtype, rates["xla"], args.peer))
        print(describe(rows[-1]), flush=True)
        torch.compiler.reset()
  timing.summary(rows, args.json, dtype=args.dtype, matrix_rates=rates)


if __name__ == "__main__":
  cli.run(main, define_flags)
