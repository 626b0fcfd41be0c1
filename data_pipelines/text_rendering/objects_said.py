"""What is said of a picture of the compositional kind: in English from several templates, and in the texts' own language.

A user's caption of the picture comes first, whole, in the captions of its language. Every text is quoted to the letter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import records
from data_pipelines.text_rendering.captions import KINDS, at_place, capital, letters_of, own_block, own_stop, pick
from data_pipelines.text_rendering.languages import Language
from data_pipelines.text_rendering.surfaces import SURFACES

_NAMES = {"wall": "writing on the wall", "picture": "lettering across the picture"}
_OPENINGS = ("A photo of {ground}.", "{Ground}.", "A picture that shows {ground}.")
_SAYS = ("{Object} {at} says \"{text}\" in {letters}.", "{At} there is {object} that says \"{text}\", in {letters}.",
         "{At}, {object} reads \"{text}\" in {letters}.", "{Object} {at} with \"{text}\" written on it in {letters}.")
_MORE = ("Below that it says \"{text}\" in {letters}.", "Further down, in {letters}: \"{text}\".")
_GENERAL = ("{Objects} with {language} text.", "{Objects}, with writing in {language}.", "{Language} text on {objects}.")
_COMMA = {"cjk": "，", "ja": "、", "ar": "، "}  # between the name of an object and what it says


def captions(rng: np.random.Generator, truth: Mapping[str, Any], language: Language) -> dict[str, list[str]]:
  """Returns the captions of a picture as columns of a record: captions, languages, kinds. Always three: in English without the words, in English with
  all words, and in the language with all words."""
  ground, blocks = truth["ground"], truth["blocks"]
  known, objects = ground["captions"], _by_object(blocks)
  before = [_ended(known["en"])] if "en" in known else []
  if not before and ground["name"]:
    name = f"{'an' if ground['name'][0] in 'aeiou' else 'a'} {ground['name']}"
    before = [pick(rng, _OPENINGS).format(ground=name, Ground=capital(name))]
  named = " and ".join(dict.fromkeys(_object(some[0]) for some in objects))
  general = pick(rng, _GENERAL).format(objects=named, Objects=capital(named), language=language.name, Language=language.name)
  text = [_said(rng, block, _SAYS if place == 0 else _MORE) for some in objects for place, block in enumerate(some)]
  own = [_ended(known[language.code])] if language.code in known else []
  return {"captions": [" ".join([*before, general]), " ".join([*before, *text]), " ".join([*own, _own(blocks, language)])],
          "languages": ["en", "en", language.code], "kinds": [records.KINDS[kind] for kind in KINDS]}


def _by_object(blocks: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
  """The blocks of each object, in the order in which they are read."""
  found: dict[str, list] = {}
  for block in blocks:
    found.setdefault(str(block["object_quad"]), []).append(block)
  return list(found.values())


def _object(block: Mapping[str, Any]) -> str:
  name, colour = block["object"], block["object_colour"]
  if name not in SURFACES:
    return _NAMES[name]
  if name == "label":
    return f"a can with {_a(colour)} label"
  if name == "sheet of paper":
    return f"a sheet of {colour} paper"
  return _a(name) if name in ("whiteboard", "wooden sign") else _a(f"{colour} {name}")


def _a(words: str) -> str:
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _said(rng: np.random.Generator, block: Mapping[str, Any], templates: Sequence[str]) -> str:
  at, what, letters = at_place(block["place"]), _object(block), letters_of(block)
  return pick(rng, templates).format(text=block["text"], object=what, Object=capital(what), at=at, At=capital(at), letters=letters)


def _own(blocks: Sequence[Mapping[str, Any]], language: Language) -> str:
  comma = _COMMA.get(language.code, _COMMA.get(language.breaking, ", "))
  said = [language.objects[block["object"]] + comma + own_block(block, language) for block in blocks]
  stop = own_stop(language)
  return stop.join(map(capital, said)) + stop.strip()


def _ended(caption: str) -> str:
  """A user's caption with a stop behind it where it has none."""
  text = caption.strip()
  return text if text[-1] in ".!?。！？…" else text + "."
