"""Eight simulated devices on the CPU, and small things that several tests share."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_num_cpu_devices", 8)
