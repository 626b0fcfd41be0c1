"""The rewards that a config can name, each by the function that makes it; the function's typed arguments are its settings."""

from collections.abc import Callable

from qimg2.rewards import Reward
from qimg2.rewards.glyphs import glyph

KINDS: dict[str, Callable[..., Reward]] = {"glyph": glyph}
