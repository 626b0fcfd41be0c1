"""The gradient of a convolution's kernel on a CPU: XLA's way beside the sum of products over strips (`qimg2.products`, equation 1).

  python -m benchmarks.convolutions [--rounds=5] [--px=256]

Of single convolutions in milliseconds, and of the forward and backward pass of a VAE with the widths of the 20M size on two pictures of `--px` in
seconds, where the strips are taken from `products.LARGE` positions on. The ways take turns; "gain" is the old time over the new one, by medians.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from benchmarks import networks, published, timing
from launch import cli
from qimg2 import products

SHAPES = ((4, 256, 24, 24, 1), (4, 128, 48, 48, 1), (4, 256, 24, 24, 2), (1, 128, 96, 96, 1), (1, 256, 24, 24, 1), (4, 64, 96, 96, 1),
          (8, 64, 16, 8, 1))  # pictures, px, channels in and out, stride


def single(shape: Sequence[int], rounds: int) -> dict[str, timing.Times]:
  """Times of both ways for one convolution."""
  num, px, inner, outer, stride = shape
  x = jax.random.normal(jax.random.key(0), (num, px, px, inner))
  g = jax.random.normal(jax.random.key(1), (num, px // stride, px // stride, outer))
  return timing.take_turns({name: _way(gradient, g, x, stride) for name, gradient in (
      ("before", products._gradient_by_window), ("strips", products._gradient_by_taps))}, rounds)


def _way(gradient: Callable, g: jax.Array, x: jax.Array, stride: int) -> Callable[[int], Any]:
  run = jax.jit(lambda g, x: gradient(g, x, stride=stride, precision=None))
  return lambda _: run(g, x).block_until_ready()


def whole(px: int, rounds: int) -> dict[str, timing.Times]:
  """Times of a VAE's forward and backward pass both ways."""
  source, weights = published.ours("20M", "float32")
  x = networks.inputs(source, "autoencode", px, 2, 0)
  ways, large = {}, products.LARGE
  for name, limit in (("before", 2**62), ("strips", large)):
    products.LARGE = limit
    ways[name], _ = networks.our_way(source, weights, "autoencode", x)
    ways[name](0)  # it is traced now
  products.LARGE = large
  return timing.take_turns(ways, rounds, warm_up=0)


def row(name: str, times: dict[str, timing.Times], unit: float) -> str:
  """A line of the table."""
  before, strips = times["before"], times["strips"]
  cell = lambda one: f"{one.median * unit:.3g} ±{one.spread / 2:.0%}"
  return f"| {name} | {cell(before)} | {cell(strips)} | {before.median / strips.median:.2f} |"


def main(_: Sequence[str]) -> None:
  """The command; see the module docstring."""
  f = flags.FLAGS
  print("| pictures, channels in and out | before | in strips | gain |\n|---|---|---|---|")
  for shape in SHAPES:
    num, px, inner, outer, stride = shape
    print(row(f"{num} of {px} px{f' to {px // stride}' * (stride > 1)}, {inner} and {outer}, ms", single(shape, f.rounds), 1000), flush=True)
  print(row(f"VAE of the 20M size, 2 of {f.px} px, forward and backward, s", whole(f.px, f.rounds), 1), flush=True)


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_integer("rounds", 5, "Rounds in which the ways take turns.", lower_bound=1)
  flags.DEFINE_integer("px", 256, "Side of the VAE's pictures.", lower_bound=32)


if __name__ == "__main__":
  cli.run(main, define_flags)
