"""Latents and encoder states of a data set, computed once and stored as a data set."""
