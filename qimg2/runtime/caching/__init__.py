"""Latents and encoder states of a data set, computed once and stored as a data set."""

MADE_BY = {"vae": "vae", "encoder": "qwen3_vl"}  # who made a cache, as its dataset.json names them -> network
