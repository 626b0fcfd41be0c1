"""Joins config, data and networks: what the launchers call, and what a notebook can call, too. Nothing here reads a flag.

The names in `__all__` are the public Python API (docs/api.md). Each is imported from its module at first use, so that whoever needs one module
of this package does not load all of them.
"""

import importlib

# Name -> (module, its name there).
_PUBLIC = {
    "Run": ("run", "Run"), "load_run": ("run", "load_run"),
    "Generator": ("generator", "Generator"), "Size": ("generator", "Size"), "sampling_weights": ("sampling", "sampling_weights"),
    "Pretrained": ("pretrained", "Pretrained"),
    "device_at_hand": ("notebook", "device_at_hand"), "curves": ("notebook", "curves"), "watching": ("notebook", "watching"),
    "grid": ("sheets", "grid"),
    "train": ("curriculum", "train"), "evaluate": ("evaluating.of_run", "evaluate"), "export": ("exporting", "export"),
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, attribute = _PUBLIC[name]
  return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
