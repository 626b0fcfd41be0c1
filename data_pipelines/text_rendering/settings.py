"""What rendered text is made of, as one value."""

import bisect
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.text_rendering import languages, templates

RATIOS = ("1:1", "1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")
KINDS = ("pure", "complex", "compositional", "letters")  # of pictures: each is the module of its name, see `pages`
DEFAULT_KINDS = {"pure": 0.5, "complex": 0.5}  # and how often
LAYOUTS = {"single": 0.25, "lines": 0.2, "paragraph": 0.3, "columns": 0.1, "list": 0.15}  # of the pure kind, and how often
EDITED = {"pure": ("word", "number", "colour", "font", "move", "remove", "add", "translate"),  # kind -> changes that there are of it
          "complex": ("word", "number", "colour", "font", "remove", "add", "translate"),
          "compositional": ("word", "number", "colour", "font", "remove", "add", "translate")}
EDITS = {"word": 2.0, "number": 1.0, "colour": 1.0, "font": 1.0, "move": 1.0, "remove": 1.0, "add": 1.0, "translate": 1.0}  # and how often
LEAST_TOKENS = 16  # of a caption of the letters kind
_LEAST_PX = (64, 32)  # of base_px, and of that of the letters kind alone
BUDGETS = (128, 192, 320, 512, 1024)  # tokens that captions may have, the template not counted


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is drawn.

  Attributes:
    seed: of everything.
    base_px: pictures have about the area of a square of this side, and sides as batches at that resolution have.
    ratios: width to height of the pictures, each as often as it is listed.
    languages: code -> how often, relative to the others; empty for all languages that there are, alike.
    kinds: those of `KINDS` -> how often.
    layouts: those of `LAYOUTS`, of the pure kind -> how often.
    edits: those of `EDITS` -> how often; empty for a data set without edits.
    edit_kinds: those of `EDITED`, of which edits are made -> how often; empty for those of `kinds`.
    templates: those of the complex kind -> how often; empty for all that there are, alike.
    template_folders: where further ones are, see `templates`.
    min_px: least size of Latin letters in px; other scripts are as much larger as they need to be.
    max_tokens: captions have at most so many tokens, the template not counted; 0 for one per px of `base_px`, 1024 at most. Below 128 there is
      room for the letters kind alone, without edits.
    texts: code -> further paragraphs, cleaned.
    font_folders: where fonts are looked for, beside Matplotlib's; empty for the usual places.
    fonts: names of faces, such as "DejaVu Sans Mono Bold", that texts are set in; empty for all that have a language's letters.
    letters: least and most letters of a word, of the letters kind.
    alphabet: what they are drawn from.
    pictures: folder of pictures that the compositional kind puts text on, see `pictures.Pictures`; "" for scenes that are drawn here.
  """
  seed: int = 0
  base_px: int = 256
  ratios: tuple[str, ...] = RATIOS
  languages: Mapping[str, float] = dataclasses.field(default_factory=dict)
  kinds: Mapping[str, float] = dataclasses.field(default_factory=lambda: DEFAULT_KINDS)
  layouts: Mapping[str, float] = dataclasses.field(default_factory=lambda: LAYOUTS)
  edits: Mapping[str, float] = dataclasses.field(default_factory=lambda: EDITS)
  edit_kinds: Mapping[str, float] = dataclasses.field(default_factory=dict)
  templates: Mapping[str, float] = dataclasses.field(default_factory=dict)
  template_folders: tuple[str, ...] = ()
  min_px: float = 10.0
  max_tokens: int = 0
  texts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  font_folders: tuple[str, ...] = ()
  fonts: tuple[str, ...] = ()
  letters: tuple[int, int] = (2, 5)
  alphabet: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
  pictures: str = ""

  def __post_init__(self):
    is_small = set(self.kinds) == {"letters"} and not self.edits
    least_px, least_tokens = _LEAST_PX[is_small], LEAST_TOKENS if is_small else BUDGETS[0]
    if self.seed < 0 or self.base_px < least_px or self.min_px < 5 or 0 != self.max_tokens < least_tokens:
      raise ValueError(f"seed={self.seed}, base_px={self.base_px}, min_px={self.min_px} and max_tokens={self.max_tokens} must be at least 0, "
                       f"{least_px}, 5 and {least_tokens} (or 0); less than 64 px and 128 tokens are for the letters kind alone, without edits.")
    if not 1 <= self.letters[0] <= self.letters[-1] or len(self.letters) != 2 or len(set(self.alphabet)) < 2 or '"' in self.alphabet:
      raise ValueError(f"letters={self.letters} and alphabet={self.alphabet!r}: give two numbers from 1 on in order, and at least two letters.")
    for name, known in (("languages", languages.codes()), ("kinds", KINDS), ("layouts", LAYOUTS), ("edits", EDITS), ("edit_kinds", EDITED),
                        ("templates", templates.load(self.template_folders)), ("texts", self.languages or languages.codes())):
      odd = [one for one in getattr(self, name) if one not in known]
      if odd:
        raise ValueError(f"{name} has {odd[0]!r}: choose among {', '.join(known)}.")
    for name in ("languages", "kinds", "layouts", "edits", "edit_kinds", "templates"):
      some = getattr(self, name)
      if not all(map(_is_share, some.values())) or not some and name in ("kinds", "layouts"):
        raise ValueError(f"{name}={dict(some)}: give numbers above 0, and leave out what is not wanted.")
    if self.edits and not any(change in EDITED[kind] for kind in self.edit_shares for change in self.edits):
      raise ValueError(f"edits={dict(self.edits)} cannot be made of the kinds {', '.join(self.edit_shares or self.kinds)}: give edit_kinds among "
                       f"{', '.join(EDITED)}, other edits, or edits={{}} for none.")
    if set(self.edits) == {"translate"} and len(self.shares) < 2:
      raise ValueError(f"edits={dict(self.edits)} needs two languages, but languages={dict(self.languages)}: add one, or other edits.")
    if self.edit_kinds and not self.edits:
      raise ValueError(f"edit_kinds={dict(self.edit_kinds)} says of what edits are made, but edits is empty: give both, or neither.")
    if self.pictures and "compositional" not in {*self.kinds, *self.edit_shares}:
      raise ValueError(f"pictures={self.pictures} is for the compositional kind: add it to kinds={dict(self.kinds)}.")
    if not self.ratios:
      raise ValueError("ratios is empty: give at least one, such as \"1:1\".")

  @property
  def shares(self) -> dict[str, float]:
    """Language -> how often."""
    return dict(self.languages) or dict.fromkeys(languages.codes(), 1.0)

  @property
  def edit_shares(self) -> dict[str, float]:
    """Kind of which edits are made -> how often."""
    return dict(self.edit_kinds) or {kind: share for kind, share in self.kinds.items() if kind in EDITED and self.edits}

  def plain(self) -> dict[str, Any]:
    """The settings as JSON, without the user's texts."""
    return {key: json.loads(json.dumps(value)) for key, value in dataclasses.asdict(self).items() if key != "texts"}


def _is_share(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def draw_key(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
  """Returns a key by its share, whatever the order in which they are given."""
  keys = sorted(shares)
  ends = list(itertools.accumulate(shares[key] for key in keys))
  return keys[bisect.bisect_right(ends, rng.random() * ends[-1])]
