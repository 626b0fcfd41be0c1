"""What is said of a complex page: what it is, its texts in the order in which they are read, and its tables and charts by rows and values.

Texts are quoted to the letter. The caption in the page's own language quotes them too, with the colour and place of those that stand alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import records
from data_pipelines.text_rendering.captions import KINDS, at_place, capital, letters_of, own_stop, paper_of, pick
from data_pipelines.text_rendering.languages import Language

_OPENINGS = ("{About} in {language} on {paper}.", "{About}, typeset in {language}, on {paper}.",
             "A designed page: {about} in {language}, on {paper}.", "{Paper} with {about} in {language}.")
_GENERAL = ("{About} in {language}, set in {letters} on {paper}{parts}.", "A picture of {about} in {language} on {paper}{parts}.",
            "{Paper} with {about} in {language}{parts}.")
_TEXTS = ("The {what} {at} reads \"{text}\"{colour}.", "{At}, the {what} \"{text}\"{colour}.", "A {what} {at} says \"{text}\"{colour}.")
_NEXT = ("{What}: \"{text}\".", "Then the {what} \"{text}\".", "The {what} \"{text}\".")
_WHAT = {"body": "text", "big": "large figure", "balloon": "speech balloon", "cell": "entry", "head": "column head"}
_CHARTS = {"bars": "bar chart", "rows": "bar chart with horizontal bars", "lines": "line chart", "pie": "pie chart"}


def captions(rng: np.random.Generator, truth: Mapping[str, Any], language: Language) -> dict[str, list[str]]:
  """Returns the captions of a complex page as columns of a record, of the same kinds and languages as `captions.captions` gives."""
  paper = paper_of(truth)
  kinds = list(dict.fromkeys(_named(one) for one in truth["structures"]))
  words = {"about": truth["about"], "About": capital(truth["about"]), "language": language.name, "paper": paper, "Paper": capital(paper),
           "letters": letters_of(truth["blocks"][-1]), "parts": f", with {' and '.join(kinds)}" if kinds else ""}
  said = " ".join([pick(rng, _OPENINGS).format(**words), *_english(rng, truth)])
  return {"captions": [pick(rng, _GENERAL).format(**words), said, _own(truth, language)], "languages": ["en", "en", language.code],
          "kinds": [records.KINDS[kind] for kind in KINDS]}


def _named(structure: Mapping[str, Any]) -> str:
  kind = structure["type"]
  return f"a {_CHARTS[structure['chart']]}" if kind == "chart" else f"{structure['language']} code" if kind == "code" else f"a {kind}"


def _groups(truth: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Blocks that stand alone, and structures where their first block is."""
  found, seen = [], set()
  for block in truth["blocks"]:
    number = block.get("structure")
    if number is None:
      found.append(block)
    elif number not in seen:
      seen.add(number)
      found.append(truth["structures"][number])
  return found


def _english(rng: np.random.Generator, truth: Mapping[str, Any]) -> list[str]:
  said, before = [], None
  for one in _groups(truth):
    if "type" in one:
      said.append(_structure(one))
      before = None
      continue
    what, at = _WHAT.get(one["what"], one["what"]), at_place(one["place"])
    ground = f" on {one['ground']}" if one.get("ground", truth["paper"]["colour"]) != truth["paper"]["colour"] else ""
    values = {"what": what, "What": capital(what), "at": at, "At": capital(at), "text": one["text"],
              "colour": f", in {one['colour']} letters{ground}"}
    said.append(pick(rng, _NEXT if before == (one["what"], one["place"]) else _TEXTS).format(**values))
    before = one["what"], one["place"]
  return said


def _structure(one: Mapping[str, Any]) -> str:
  if one["type"] == "table":
    head = f" with the columns {_row(one['head'], ', ')}" if one["head"] else ""
    return f"A table{head}, row by row: {'; '.join(_row(row, ', ') for row in one['rows'])}."
  if one["type"] == "chart":
    colours = one["colours"] if one["chart"] == "pie" else [""] * len(one["labels"])
    pairs = (f"\"{label}\" \"{text}\"" + (f" in {colour}" if colour else "") for label, text, colour in zip(one["labels"], one["texts"], colours))
    own = "" if one["chart"] == "pie" else f" in {one['colours'][0]}"
    return f"A {_CHARTS[one['chart']]}{own}: {', '.join(pairs)}."
  if one["type"] == "code":
    return f"{one['language']} code in a monospaced font: \"{_lines(one)}\"."
  return f"The formula \"{one['tex']}\"."


def _row(texts: Sequence[str], between: str) -> str:
  return between.join(f"\"{text}\"" for text in texts)


def _lines(code: Mapping[str, Any]) -> str:
  return "\n".join(code["lines"])


def _own(truth: Mapping[str, Any], language: Language) -> str:
  block = language.captions["block"][0]
  quote = block[block.index("{text}") - 1], block[block.index("{text}") + len("{text}")]
  quoted = lambda texts: ", ".join(quote[0] + text + quote[1] for text in texts)
  said = [language.captions["paper"][0].format(paper=language.colours[truth["paper"]["colour"]])]
  for one in _groups(truth):
    if "type" not in one:
      said.append(block.format(place=language.places[one["place"]], colour=language.colours[one["colour"]], text=one["text"]))
    elif one["type"] == "table":
      said.append("; ".join(quoted(row) for row in [one["head"], *one["rows"]] if row))
    elif one["type"] == "chart":
      said.append("; ".join(quoted(pair) for pair in zip(one["labels"], one["texts"])))
    else:
      said.append(quoted([_lines(one) if one["type"] == "code" else one["tex"]]))
  stop = own_stop(language)
  return stop.join(map(capital, said)) + stop.strip()
