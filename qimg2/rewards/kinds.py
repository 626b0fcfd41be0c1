"""The rewards that a config can name, each by the function that makes it; the function's typed arguments are its settings."""

from collections.abc import Callable

from qimg2.rewards import Reward
from qimg2.rewards.edits import kept
from qimg2.rewards.glyphs import glyph
from qimg2.rewards.own import own
from qimg2.rewards.service import service
from qimg2.rewards.text import read_text
from qimg2.rewards.vlm import judge

KINDS: dict[str, Callable[..., Reward]] = {"glyph": glyph, "ocr": read_text, "kept": kept, "function": own, "http": service,
                                            "judge": judge}
