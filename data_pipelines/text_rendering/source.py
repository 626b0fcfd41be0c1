"""Rendered text as a data set: any picture by its number, drawn when it is asked for.

A *slot* is what the loader's index must know beforehand: the size of the picture, its language, and how long its captions may be. Picture p has slot
p mod n of the n slots of the index, and draws everything else from (seed, split, p). So a few megabytes of index name 2^40 pictures: in epoch e the
loader reads slot s as picture s + e n, and no picture comes twice. Edits have slots and numbers of their own, behind those of pictures.
"""

import dataclasses
import functools
import importlib
import io
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.buckets import bucket_size
from data_pipelines.records import FIXED, SPLITS, complete
from data_pipelines.text_rendering import languages
from data_pipelines.text_rendering.captions import KINDS
from data_pipelines.text_rendering.edits import KINDS as EDIT_KINDS
from data_pipelines.text_rendering.fonts import Face, Typeface, find_faces, fingerprint, monospaced, typefaces
from data_pipelines.text_rendering.pages import Page
from data_pipelines.text_rendering.settings import BUDGETS, Settings, draw_key
from data_pipelines.text_rendering.words import Corpus
from data_pipelines.tokenizer import PromptTokenizer

FIRST_ID = {"train": 0, "validation": 2**30}  # those of edits begin 2^29 later
_FIRST_EDIT = 2**29
NUM_PICTURES = 2**40
_CHARACTERS = {"cjk": 0.6, "thai": 0.8}  # per token, at least about; of other languages _OTHER
_OTHER = 2.2
_OVERHEAD = 70  # tokens of a caption beside the text
_ROOM = ((0.55, 1.0), (0.85, 1.0))  # powers of the most characters that a picture of other kinds, or of the complex kind, has
_TRIES = 10
_SHORTER = 0.6
_EDITS = "edits"  # the kind of pictures that have a source
_EDIT_BUDGETS = BUDGETS[:2]


class Slot(NamedTuple):
  """What is known of a picture before it is drawn: sides in px, language, tokens of its captions, the template not counted, and its kind."""
  height: int
  width: int
  language: str
  tokens: int
  kind: str


class RenderedText(Sequence):
  """The pictures of a split, as records like those of `records.open_split`. Positions from `len` on are further pictures, see the module's text."""

  endless = True

  def __init__(self, settings: Settings, split: str, num_slots: int, tokenizer: PromptTokenizer | None = None, are_edits: bool = False):
    """Args: settings; "train" or "validation"; slots, n; what counts the tokens of captions, without which they may have any number; whether these
    are edits, each with a source, in place of pictures.

    Raises:
      ValueError: a language has no font on this machine; names the package.
    """
    self.settings, self._split, self._num, self._tokenizer = settings, split, num_slots, tokenizer
    self._are_edits = are_edits
    self._keys = [(settings.seed, SPLITS.index(split), which + 2 * are_edits) for which in (1, 2)]  # of a slot, of a picture
    self._sizes = [bucket_size(settings.base_px, ratio) for ratio in settings.ratios]
    self._shares = settings.shares
    self._first_id, self._kinds = FIRST_ID[split] + _FIRST_EDIT * are_edits, {_EDITS: 1.0} if are_edits else settings.kinds
    most = settings.max_tokens or max(BUDGETS[0], settings.base_px)
    self._budgets = [budget for budget in (_EDIT_BUDGETS if are_edits else BUDGETS) if budget <= most] or [most]

  def __getstate__(self) -> tuple:
    return self.settings, self._split, self._num, self._tokenizer, self._are_edits  # fonts are opened anew in another process

  def __setstate__(self, state: tuple) -> None:
    self.__init__(*state)

  def __len__(self) -> int:
    return self._num

  def __getitem__(self, position: int) -> dict:
    number = operator.index(position)
    if not 0 <= number < NUM_PICTURES:
      raise IndexError(f"Picture {position} is not one of 2^40.")
    record = self.record(number)
    texts = {key: [one.encode() for one in record[key]] for key in ("captions", "languages", "kinds")}  # as TFDS gives them
    return record | texts | {"image": _ppm(record["image"]), "sources": list(map(_ppm, record["sources"])),
                             "attributes": record["attributes"].encode()}

  def __getitems__(self, positions: Sequence[int]) -> list[dict]:
    return [self[position] for position in positions]

  def slot(self, number: int) -> Slot:
    """Returns the slot of a picture."""
    rng = np.random.default_rng((*self._keys[0], number % self._num))
    height, width = self._sizes[rng.integers(len(self._sizes))]
    language, share = draw_key(rng, self._shares), rng.random()
    kind = draw_key(rng, self._kinds)
    budgets = self._budgets[len(self._budgets) // 2 if kind == "complex" else 0:]
    return Slot(height, width, language, budgets[int(share * len(budgets))], kind)

  def record(self, number: int) -> dict:
    """Returns a picture as a record of `records`, but that `image` and what is in `sources` are arrays H W 3 uint8; its truth is in `attributes`.

    Raises:
      ValueError: the tokenizer needs so many tokens that no caption of the language is short enough.
    """
    slot, plain, rng = self.slot(number), self.page(number), np.random.default_rng((*self._keys[1], number))
    corpus = plain.corpus
    per_token = _CHARACTERS.get(corpus.language.breaking, _OTHER)
    most = max(12.0, (slot.tokens - _OVERHEAD) * per_token)
    room = most ** rng.uniform(*_ROOM[slot.kind == "complex"])
    kind = importlib.import_module(f"{__package__}.{slot.kind}")
    for trial in range(_TRIES):
      page = dataclasses.replace(plain, num_characters=int(room * _SHORTER**trial), is_simple=trial >= _TRIES // 2)
      image, truth, *sources = kind.render(rng, page)
      said = kind.captions(rng, truth, corpus.language)
      if self._fit(said["captions"], slot.tokens):
        sides = {"height": slot.height, "width": slot.width}
        size = sides | {f"source_{side}": [px] * len(sources) for side, px in sides.items()}
        return complete(said | size | {"image": image, "sources": sources, "has_text": True, "attributes": json.dumps(
            {**truth, "picture": number}, ensure_ascii=False), "sample_id": self._first_id + number % self._num})
    raise ValueError(f"No caption of picture {number} ({corpus.language.name}) has at most {slot.tokens} tokens: give a tokenizer that knows the "
                     "language, with a larger vocabulary.")

  def page(self, number: int) -> Page:
    """Returns what a picture is set on, with room for no text as yet."""
    slot = self.slot(number)
    return Page(self._corpus(slot.language), self._typefaces[slot.language], slot.height, slot.width, self.settings, 0, self._typefaces)

  @staticmethod
  def truth(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a record says that its picture shows, see `pages.truth_of`, and "picture", its number."""
    return json.loads(record["attributes"])

  def index(self) -> dict[str, np.ndarray]:
    """Returns the index of all slots, see `records.open_split`; caption_tokens says how many there are at most, with the template.

    Raises:
      ValueError: there is no tokenizer.
    """
    if self._tokenizer is None:
      raise ValueError("An index needs a tokenizer: it says how long prompts are.")
    slots, names = [self.slot(number) for number in range(self._num)], sorted({"en", *self.settings.shares})
    kinds = EDIT_KINDS if self._are_edits else KINDS
    places, each = {name: i for i, name in enumerate(names)}, len(kinds)
    said = [[places["en"]] * (each - 1) + [places[slot.language]] for slot in slots]
    tokens = self._template + np.array([slot.tokens for slot in slots], np.int32)
    ones = np.ones(self._num, np.int32)
    sizes = np.array([(slot.height, slot.width) for slot in slots], np.int32)
    return {"height": sizes[:, 0].copy(), "width": sizes[:, 1].copy(),
            "quality": ones.astype(np.float32), "sample_id": self._first_id + np.arange(self._num, dtype=np.int64),
            "stage": np.full(self._num, complete({"captions": []})["stage"], np.uint8), "has_text": ones.astype(bool),
            "has_rejected": np.zeros(self._num, bool), "source_sizes": sizes[:, None][:, :int(self._are_edits)], "num_captions": each * ones,
            "caption_language": np.array(said, np.uint16).ravel(), "language_names": np.array(names, str),
            "caption_kind": np.tile(np.array(kinds, np.uint8), self._num), "caption_tokens": np.repeat(tokens, each),
            "tokenizer": np.array(self._tokenizer.fingerprint)}

  @functools.cached_property
  def fonts(self) -> str:
    """What tells the fonts of this machine from others, as far as they are used."""
    some = dict(self._typefaces)
    if "complex" in {*self.settings.kinds, *self.settings.edit_shares}:
      some["code"] = tuple(monospaced(one) for one in next(iter(some.values()))[:1])
      from data_pipelines.text_rendering import formulas  # with Matplotlib, which takes a while
      some["formulas"] = (formulas.typeface(),)
    return fingerprint(some)

  def _fit(self, texts: Sequence[str], tokens: int) -> bool:
    return self._tokenizer is None or int(self._tokenizer.count(texts).max()) <= tokens + self._template

  @functools.cached_property
  def _template(self) -> int:
    return int(self._tokenizer.count([""])[0])

  @functools.cached_property
  def _typefaces(self) -> dict[str, tuple[Typeface, ...]]:
    faces = _faces(self.settings.font_folders)
    found = {code: typefaces(faces, languages.load(code)) for code in self.settings.shares}
    return {code: _named(self.settings.fonts, some, code) for code, some in found.items()}

  def _corpus(self, code: str) -> Corpus:
    return Corpus(languages.load(code), tuple(self.settings.texts.get(code, ())))


def _named(names: Sequence[str], some: tuple[Typeface, ...], code: str) -> tuple[Typeface, ...]:
  """Those of some typefaces that have one of the names; all where there is no name."""
  found = tuple(one for one in some if not names or one.main.name in names)
  if not found:
    raise ValueError(f"fonts={tuple(names)} has none that sets {code}: choose among {', '.join(one.main.name for one in some)}.")
  return found


class WithEdits(Sequence):
  """Pictures, and behind them edits: the slots of both, one after the other, in an index and a mixture."""

  endless = True

  def __init__(self, pictures: RenderedText, edits: RenderedText):
    self._pictures, self._edits = pictures, edits
    self.settings, self.fonts = pictures.settings, pictures.fonts

  def __len__(self) -> int:
    return len(self._pictures) + len(self._edits)

  def __getitem__(self, position: int) -> dict:
    epoch, slot = divmod(operator.index(position), len(self))
    part, slot = (self._edits, slot - len(self._pictures)) if slot >= len(self._pictures) else (self._pictures, slot)
    return part[slot + epoch * len(part)]

  def __getitems__(self, positions: Sequence[int]) -> list[dict]:
    return [self[position] for position in positions]

  def page(self, number: int) -> Page:
    """What a picture without a source is set on, see `RenderedText.page`."""
    return self._pictures.page(number)

  def index(self) -> dict[str, np.ndarray]:
    """The index of all slots, see `RenderedText.index`."""
    pictures, edits = self._pictures.index(), self._edits.index()
    pictures["source_sizes"] = np.zeros((len(self._pictures), *edits["source_sizes"].shape[1:]), np.int32)
    return {name: pictures[name] if name in FIXED else np.concatenate([pictures[name], edits[name]]) for name in pictures}


@functools.cache
def _faces(folders: tuple[str, ...]) -> tuple[Face, ...]:
  return find_faces(folders) if folders else find_faces()


def _ppm(image: np.ndarray) -> bytes:
  """The file of a picture that takes no time to write or read."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PPM")
  return buffer.getvalue()
