"""Every weight of a config's networks, listed without allocating one. See `launch.describe`."""

import dataclasses
import math
from typing import Any

from jax.sharding import AbstractMesh

from qimg2 import networks, sharding
from qimg2 import params as P
from qimg2.runtime.config import MeshConfig, parse

TEMPORAL = "/time/"
SECTIONS = {"model": "mmdit", "encoder": "qwen3_vl", "vae": "vae"}  # section of the config -> network


def describe(cfg: Any, num_devices: int = 0) -> dict:
  """{"mesh", "weights": rows of path, shape, axes, dtype, count, bytes per device, "totals": per model and per part}.

  Args:
    cfg: a `RunConfig`, or what a config file returns; only its networks, mesh and rules are read.
    num_devices: devices to spread the weights over; 0 takes the product of the mesh sizes, with 1 for a size of -1.

  Raises:
    ValueError: sizes that do not fit together, a mesh that does not fit the devices, or rules that leave one of its axes unused.
  """
  cfg = parse(cfg)
  mesh = abstract_mesh(cfg.mesh, num_devices)
  rules = sharding.find_rules(cfg.rules, mesh)
  specs = networks.Networks(cfg.model, cfg.encoder, cfg.vae, num_system_tokens=0).specs()
  trees = {section: specs[network] for section, network in SECTIONS.items()}
  rows = [weight_row(f"{section}/{path}", p, mesh, rules) for section, specs in trees.items() for path, p in P.flatten(specs).items()]
  return {"mesh": dict(mesh.shape), "weights": rows, "totals": totals(trees)}


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
  """The config's mesh without devices; 0 devices are as many as its sizes say.

  Raises:
    ValueError: sizes that do not multiply to the number of devices.
  """
  sizes = dataclasses.asdict(config)
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if -1 in sizes.values() and num_devices % fixed:
    raise ValueError(f"config.mesh {sizes} leaves one axis open, but {num_devices} devices cannot be divided by the {fixed} of the others: change "
                     "--num_devices or the sizes.")
  if -1 not in sizes.values() and num_devices not in (0, fixed):
    raise ValueError(f"config.mesh {sizes} asks for {fixed} devices, but there are {num_devices}: set one axis to -1 or change the sizes.")
  shape = {axis: max(1, num_devices // fixed) if sizes[axis] == -1 else sizes[axis] for axis in sharding.MESH_AXES}
  return AbstractMesh(tuple(shape.values()), tuple(shape))


def weight_row(path: str, p: P.Param, mesh: AbstractMesh, rules: sharding.Rules) -> dict:
  """One line of the table."""
  placed = sharding.array_sharding(mesh, p.axes, rules, p.shape, path)
  local = math.prod(placed.shard_shape(p.shape))
  dtype = P.jnp.dtype(p.dtype)
  return {"path": path, "shape": list(p.shape), "axes": list(p.axes), "dtype": dtype.name, "count": p.size,
          "bytes_per_device": local * dtype.itemsize}


def totals(trees: dict[str, dict]) -> dict[str, int]:
  """Number of weights per model, per part of the VAE, and of the VAE's temporal weights, which images never use."""
  counts = {section: P.count(specs) for section, specs in trees.items()}
  counts |= {f"vae/{part}": P.count(specs) for part, specs in trees["vae"].items()}
  counts["vae/temporal"] = sum(p.size for path, p in P.flatten(trees["vae"]).items() if TEMPORAL in path)
  return counts


def table(description: dict) -> str:
  """The description as text."""
  lines = [f"{'weight':<58} {'shape':<22} {'axes':<34} {'dtype':<9} {'count':>15} {'bytes/device':>15}"]
  for row in description["weights"]:
    axes = ", ".join(axis or "-" for axis in row["axes"])
    shape = " x ".join(map(str, row["shape"]))
    lines.append(f"{row['path']:<58} {shape:<22} {axes:<34} {row['dtype']:<9} {row['count']:>15,} {row['bytes_per_device']:>15,}")
  per_device = sum(row["bytes_per_device"] for row in description["weights"])
  lines += ["", f"mesh: {', '.join(f'{axis} {size}' for axis, size in description['mesh'].items())}"]
  lines += [f"{name + ' weights:':<24} {count:>15,}" for name, count in description["totals"].items()]
  return "\n".join([*lines, f"{'bytes per device:':<24} {per_device:>15,}"])
