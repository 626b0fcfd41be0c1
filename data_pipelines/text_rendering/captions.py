"""What is said of a picture with texts: in English from many templates, and in the texts' own language. Every text is quoted to the letter.

A block is described by what it says, its colour, its place in thirds of the picture, its weight, the kind of its letters and how it is set.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import records
from data_pipelines.text_rendering.languages import Language

KINDS = (0, 1, 1)  # of the captions of a picture, places in `records.KINDS`
PLACES = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
_AT = {"center": "in the center", "left": "on the left", "right": "on the right"}
_SET = {"start": "ragged", "middle": "centered", "end": "flush with the far edge", "justified": "justified"}
_PAPERS = {"plain": "plain {0} paper", "grainy": "grainy {0} paper", "shaded": "{0} paper with a soft shade"}
_OPENINGS = ("Text on {paper}.", "A picture of text on {paper}.", "{Paper} with {language} text.", "Typography in {language} on {paper}.",
             "A sheet of {paper} carries {number} in {language}.", "{language} text, set on {paper}.")
_BLOCKS = ("{At}, in {letters}: \"{text}\".", "{At} it says \"{text}\" in {letters}.", "\"{text}\" is written {at} in {letters}.",
           "The {what} {at} reads \"{text}\", in {letters}.", "{Letters} {at}: \"{text}\".")
_GENERAL = ("{number} of {language} text on {paper}, in {letters}.", "{Paper} with {number} of {language} text in {letters}.",
            "A typeset page in {language}: {number} in {letters} on {paper}.")
_WHAT = {"word": "word", "heading": "heading", "line": "line", "paragraph": "paragraph", "list": "list"}


def place_of(box: Sequence[float], height: int, width: int) -> str:
  """Name of the ninth of a picture in which the middle of a box (left, top, right, bottom) lies."""
  left, top, right, bottom = box
  thirds = (min(2, int(3 * (a + b) / 2 / side)) for a, b, side in ((top, bottom, height), (left, right, width)))
  row, column = thirds
  return PLACES[row][column]


def captions(rng: np.random.Generator, truth: Mapping[str, Any], language: Language) -> dict[str, list[str]]:
  """Returns the captions of a picture as columns of a record: captions, languages, kinds. Always three: in English without the words, in English with
  all words, and in the language with all words."""
  paper = paper_of(truth)
  blocks = truth["blocks"]
  words = {"paper": paper, "Paper": capital(paper), "language": language.name, "number": _count(blocks), "letters": letters_of(blocks[-1])}
  general = pick(rng, _GENERAL).format(**words)
  text = " ".join([pick(rng, _OPENINGS).format(**words), *(_block(rng, block) for block in blocks)])
  return {"captions": [capital(general), capital(text), _own(truth, language)], "languages": ["en", "en", language.code],
          "kinds": [records.KINDS[kind] for kind in KINDS]}


def _block(rng: np.random.Generator, block: Mapping[str, Any]) -> str:
  at = at_place(block["place"])
  letters = letters_of(block)
  return pick(rng, _BLOCKS).format(text=block["text"], at=at, At=capital(at), letters=letters, Letters=capital(letters), what=_WHAT[block["what"]])


def paper_of(truth: Mapping[str, Any]) -> str:
  """What the paper of a picture is, such as "grainy cream paper"."""
  return _PAPERS[truth["paper"]["texture"]].format(truth["paper"]["colour"])


def at_place(place: str) -> str:
  """A place of `PLACES` as it stands in a sentence."""
  return _AT.get(place, f"at the {place}")


def own_stop(language: Language) -> str:
  """What stands between sentences of a language."""
  return {"cjk": "。", "thai": " "}.get(language.breaking, "। " if language.code == "hi" else ". ")


def letters_of(block: Mapping[str, Any]) -> str:
  """What the letters of a block look like."""
  weight = "" if block["weight"] == "regular" else block["weight"]
  looks = [weight, "slanted" if block["slanted"] else "", block["colour"], block["letters"], "letters"]
  setting = "in vertical columns" if block["direction"] == "ttb" else _SET[block["align"]] if len(block["lines"]) > 1 else ""
  return " ".join(filter(None, looks)) + (f", {setting}" if setting else "")


def _count(blocks: Sequence[Mapping[str, Any]]) -> str:
  kinds = [block["what"] for block in blocks]
  named = [f"{kinds.count(kind)} {kind}s" if kinds.count(kind) > 1 else f"a {kind}" for kind in dict.fromkeys(kinds)]
  return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def _own(truth: Mapping[str, Any], language: Language) -> str:
  stop = own_stop(language)
  said = [language.captions["paper"][0].format(paper=language.colours[truth["paper"]["colour"]])]
  said += [own_block(block, language) for block in truth["blocks"]]
  return stop.join(map(capital, said)) + stop.strip()


def own_block(block: Mapping[str, Any], language: Language) -> str:
  """What is said of a block in its language."""
  return language.captions["block"][0].format(place=language.places[block["place"]], colour=language.colours[block["colour"]], text=block["text"])


def capital(text: str) -> str:
  """A text that begins with a capital."""
  return text[:1].upper() + text[1:]


def pick(rng: np.random.Generator, some: Sequence[str]) -> str:
  """One of some texts."""
  return some[rng.integers(len(some))]
