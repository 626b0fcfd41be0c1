"""What fills a template: texts by rule, from a language's words and CLDR, code, and the numbers of charts.

Fillings are described in `templates`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from babel import numbers

from data_pipelines.text_rendering import languages
from data_pipelines.text_rendering.pages import Page, draw_new
from data_pipelines.text_rendering.templates import AS_DRAWN, IN_ORDER, SLOT
from data_pipelines.text_rendering.words import clean, draw_cost, fill_slot, in_order, write_cost, write_time

_PYTHON = (
    ("def {a}_{b}({c}, {d}={n}):", "  {e} = []", "  for {f} in {c}:", "    if {f} > {d}:", "      {e}.append({f})", "  return {e}"),
    ("class {A}:", "  def __init__(self, {b}):", "    self.{b} = {b}", "    self.{c} = {n}", "  def {d}(self):", "    return self.{b} * self.{c}"),
    ("# {text}", "{a} = {{'{s}': {n}, '{t}': {m}}}", "for {b}, {c} in {a}.items():", "  print({b}, {c} + {n})"),
    ("with open('{a}.txt') as {b}:", "  {c} = [{d}.strip() for {d} in {b}]", "print(len({c}))  # {s}"))
_SCRIPT = (
    ("function {a}({b}, {c}) {{", "  let {d} = {n};", "  for (const {e} of {b}) {{", "    {d} += {e} * {c};", "  }}", "  return {d};", "}}"),
    ("const {a} = [{n}, {m}, {k}];", "const {b} = {a}.map(({c}) => {{", "  return {c} + {m};", "}});", "console.log('{s}', {b});"),
    ("// {text}", "if ({a} < {n}) {{", "  {b}({a}, '{s}');", "}} else {{", "  {c}('{t}');", "}}"))
_QUERY = (("SELECT {a}, COUNT(*) AS {b}", "FROM {c}", "WHERE {d} > {n}", "GROUP BY {a}", "ORDER BY {b} DESC", "LIMIT {m};"),)
CODE = {"Python": _PYTHON, "JavaScript": _SCRIPT, "SQL": _QUERY}


class Filler:
  """Draws the texts of one page, none twice where there are enough."""

  def __init__(self, rng: np.random.Generator, page: Page):
    self._rng, self._corpus, self._known = rng, page.corpus, []
    self._said: set[str] = set()
    self._total, self._minutes = 0.0, int(rng.integers(60, 100)) * 5

  @property
  def _language(self) -> languages.Language:
    return self._corpus.language

  def paragraphs(self, filling: Any, index: int, num_characters: int) -> list[str]:
    """Returns the paragraphs of a filling; `num_characters` bounds those of "paragraphs", which has one sentence at least."""
    if filling == "paragraphs":
      return self._sentences(1 + (num_characters > 240), num_characters)
    return [self.text(filling, index)]

  def _sentences(self, num: int, num_characters: int) -> list[str]:
    """Paragraphs of sentences that do not stand on the page yet."""
    found = self._corpus.paragraphs(self._rng, num, num_characters, figures=False, known=self._said)
    self._said |= {one for one in self._language.sentences if any(one in text for text in found)}
    return found

  def text(self, filling: Any, index: int) -> str:
    """Returns a text of a filling other than "paragraphs"."""
    if filling in AS_DRAWN or isinstance(filling, str) and "{" in filling:
      return self._draw(filling, index)
    text = draw_new(lambda _: self._draw(filling, index), self._rng, self._known)
    self._known.append(text)
    return text

  def _draw(self, filling: Any, index: int) -> str:
    if isinstance(filling, Mapping):
      some = filling.get(self._language.code)
      left = [one for one in some or () if one not in self._known] or some
      return left[self._rng.integers(len(left))] if left else self._draw(filling.get("else", "heading"), index)
    if "{" in filling:
      return clean(SLOT.sub(lambda found: self._draw(found[1], index), filling))
    if filling in _OWN:
      return _OWN[filling](self, index)
    return fill_slot(self._rng, filling, self._language)

  def _word(self, index: int) -> str:
    word = self._language.words[self._rng.integers(len(self._language.words))]
    return word[0].upper() + word[1:] if self._language.has_capitals else word

  def _cost(self, index: int) -> str:
    amount = draw_cost(self._rng, self._language.locale)
    self._total += amount
    return write_cost(amount, self._language.locale)

  def _later(self, index: int) -> str:
    self._minutes += 5 * int(self._rng.integers(2, 19))
    return write_time(self._minutes, self._language.locale)

  def _between(self, first: int, last: int) -> str:
    return write_time(60 * first + 30 * int(self._rng.integers(2 * (last - first))), self._language.locale)

  def _day(self, index: int) -> str:
    days = in_order("weekday", self._language.locale, "wide")
    return days[(index - 1) % len(days)]

  def labels(self, filling: Any, num: int) -> list[str]:
    """Returns `num` labels, or fewer; names of the calendar follow each other."""
    if filling in IN_ORDER:
      some = in_order(filling, self._language.locale)
      first = int(self._rng.integers(max(1, len(some) - num + 1)))
      return list(some[first:first + num])
    return list(dict.fromkeys(self.text(filling, i + 1) for i in range(num)))

  def number(self, value: float) -> str:
    """A number as the language writes it."""
    return clean(numbers.format_decimal(value, locale=self._language.locale, numbering_system="default"))

  def values(self, num: int, of_whole: bool) -> tuple[list[int], list[str]]:
    """Returns (numbers, how they are written): per cent of a whole, each at least 5, or counts of one order."""
    if of_whole:
      values = 5 + self._rng.multinomial(100 - 5 * num, self._rng.dirichlet(np.full(num, 1.5)))
      written = [numbers.format_percent(one / 100, locale=self._language.locale, numbering_system="default") for one in values.tolist()]
      return values.tolist(), [clean(one) for one in written]
    step = int(self._rng.choice((1, 5, 10, 100)))
    values = [int(one) * step for one in self._rng.integers(12, 100, num)]
    return values, [self.number(one) for one in values]

  def code(self, num_parts: int) -> tuple[str, list[str]]:
    """Returns (language of the code, its lines): `num_parts` pieces, indented by two spaces a step. Names are English, texts are the page's."""
    name = str(self._rng.choice(list(CODE)))
    parts = CODE[name]
    chosen = self._rng.permutation(len(parts))[:num_parts]
    lines = []
    for number in chosen:
      names = [str(one) for one in self._rng.permutation([word for word in languages.load("en").words if word.isascii()])]
      values = dict(zip("abcdef", names)) | {"A": names[0].capitalize(), "text": self.text("heading", 1)}
      values |= {name: self.text("word", 1).replace("'", "’") for name in "st"} | {name: int(self._rng.integers(2, 90)) for name in "nmk"}
      lines += [line.format(**values) for line in parts[number]]
    return name, lines


_OWN: dict[str, Callable[[Filler, int], str]] = {
    "word": Filler._word, "cost": Filler._cost, "later": Filler._later, "day": Filler._day,
    "index": lambda filler, index: filler.number(index), "heading": lambda filler, _: filler._corpus.heading(filler._rng),
    "line": lambda filler, _: filler._corpus.figures(filler._rng), "total": lambda filler, _: write_cost(filler._total, filler._language.locale),
    "sentence": lambda filler, _: filler._sentences(1, 1)[0],
    "page": lambda filler, _: filler.number(int(filler._rng.integers(2, 400))),
    "opening": lambda filler, _: filler._between(7, 12), "closing": lambda filler, _: filler._between(14, 22)}
