"""Joins config, data and networks: what the launchers call, and what a notebook can call, too. Nothing here reads a flag."""
