"""From a template to regions with texts: each content of `templates.CONTENTS` has a function here.

*Richness*, 0 to 1, says how much a page holds: repeated regions and rows are as many as it says between their least and most, and optional regions
are left out below a half.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.text_rendering import scenes
from data_pipelines.text_rendering.charts import Chart
from data_pipelines.text_rendering.filling import Filler
from data_pipelines.text_rendering.fonts import Typeface, monospaced
from data_pipelines.text_rendering.languages import load
from data_pipelines.text_rendering.layout import Style
from data_pipelines.text_rendering.pages import Page, draw_typeface, short_style
from data_pipelines.text_rendering.regions import Box, Columns, Region, Rows, Text
from data_pipelines.text_rendering.tables import Table

_OPTIONAL = 0.5  # richness from which optional regions are there
_CODE_LEADING = 1.45
_LARGE = 1.5  # factor of letters from which their lines may be nearer to each other than those of running text
_SENTENCE = 60  # characters of Chinese and Japanese up to which a text is set ragged, in lines that are about equally long


class Role(NamedTuple):
  """How large letters are, as a multiple of running text; whether they are bold; in at most how many lines; whether in the accents' colour."""
  factor: float
  is_bold: bool = False
  most_lines: int = 99
  accent: bool = False


ROLES = {
    "title": Role(2.6, True, 3, True), "subtitle": Role(1.3, False, 2), "heading": Role(1.5, True, 3, True), "big": Role(2.8, True, 1, True),
    "body": Role(1.0), "quote": Role(1.6, False, 6), "label": Role(0.9, False, 2), "note": Role(0.8, False, 3), "cell": Role(1.0, False, 3),
    "head": Role(1.0, True, 2), "price": Role(1.0), "button": Role(1.0, True, 1), "balloon": Role(1.0, False, 8), "code": Role(0.9),
    "number": Role(1.0, True, 1, True)}


class Builder:
  """Builds the regions of one page."""

  def __init__(self, rng: np.random.Generator, page: Page, richness: float):
    self._rng, self._page, self._richness = rng, page, richness
    self._filler = Filler(rng, page)
    self._faces = _faces(rng, page)
    self._leading = float(rng.uniform(*page.corpus.language.leading))

  def build(self, node: Mapping[str, Any], index: int = 1) -> Region:
    """Returns the region of a node of a template; `index` is its place among repeated ones."""
    content = next(name for name in _CONTENTS if name in node)
    region = _CONTENTS[content](self, node, index)
    if "box" in node:
      region.spread = node.get("spread", "top")
      region = Box(region, **node["box"])
    for key in ("grow", "share", "wide", "spread"):
      if key in node:
        setattr(region, key, node[key])
    return region

  def count(self, least: int, most: int) -> int:
    """A number between two, by the richness."""
    return int(round(least + self._richness * (most - least) * self._rng.uniform(0.6, 1.0)))

  def parts(self, nodes: Sequence[Mapping[str, Any]], index: int) -> list[Region]:
    """The regions of a list, those that are repeated as often as it is drawn; `index` is the place of what holds them."""
    found = []
    for node in nodes:
      if node.get("optional") and self._richness < _OPTIONAL:
        continue
      for place in range(self.count(*node["repeat"]) if "repeat" in node else 1):
        found.append(self.build(node, place + 1 if "repeat" in node else index))
    return found

  def text(self, filling: Any, role: str, align: str, index: int = 1, lines: int = 0, num_characters: int = 0) -> Text:
    """Returns a text of a role."""
    paragraphs = self._filler.paragraphs(filling, index, num_characters)
    return self.letters(paragraphs, role, align, lines)

  def letters(self, paragraphs: list[str], role: str, align: str, lines: int = 0) -> Text:
    """Returns texts that are given, in a role's letters."""
    own = ROLES.get(role, ROLES["body"])
    language, running = self._page.corpus.language, role == "body"
    style = Style(self._faces[own.is_bold], language, self._leading, align)
    if running and language.breaking == "cjk":
      is_long = sum(map(len, paragraphs)) > _SENTENCE and align == "start"
      style = dataclasses.replace(style, align="justified") if is_long else dataclasses.replace(style, breaks="phrases")
    if running and len(paragraphs) > 1:
      style = dataclasses.replace(style, indent=language.indent)
    if not running:
      style = short_style(style, align, paragraphs[0])
      if own.factor < _LARGE:
        style = dataclasses.replace(style, leading=language.leading[0])
    return Text(paragraphs, style, role, own.factor, lines or own.most_lines, accent=own.accent)

  # ---- contents

  def _rows(self, node: Mapping[str, Any], index: int) -> Region:
    return Rows(self.parts(node["rows"], index), node.get("gap", 0.8))

  def _columns(self, node: Mapping[str, Any], index: int) -> Region:
    return Columns(self.parts(node["columns"], index), node.get("gap", 1.5))

  def _text(self, node: Mapping[str, Any], index: int) -> Region:
    room = int(node.get("characters", 160) * (0.4 + 0.6 * self._richness) * (0.45 if self._page.corpus.language.breaking == "cjk" else 1.0))
    return self.text(node["text"], node.get("role", "body"), node.get("align", "start"), index, node.get("lines", 0), room)

  def _table(self, node: Mapping[str, Any], index: int) -> Region:
    columns = node["table"]
    lines = node.get("lines", "rows")
    lines = lines if isinstance(lines, str) else lines[self._rng.integers(len(lines))]
    head = all("head" in one for one in columns)
    rows = [[self.text(one["head"], "head", self._align(one)) for one in columns]] if head else []
    for number in range(1, self.count(*node.get("count", (3, 7))) + 1):
      rows.append([self.text(one["text"], one.get("role", "cell"), self._align(one), number) for one in columns])
    folds = [one.get("folds", False) for one in columns]
    for row in rows:
      for cell, fold in zip(row, folds):
        cell.style = dataclasses.replace(cell.style, breaks="phrases" if fold else "never")
    return Table(rows, folds, lines, head)

  def _align(self, column: Mapping[str, Any]) -> str:
    """How a column is aligned; the last digits of numbers stand below each other in right-to-left tables too."""
    is_mirrored = self._page.corpus.language.is_rtl and column["text"] in ("number", "percent")
    return "start" if is_mirrored else column.get("align", "start")

  def _chart(self, node: Mapping[str, Any], index: int) -> Region:
    kinds = node["chart"] if isinstance(node["chart"], list) else [node["chart"]]
    kind = kinds[self._rng.integers(len(kinds))]
    labels = self._filler.labels(node.get("labels", "word"), self.count(*node.get("count", (3, 6))))
    numbers, written = self._filler.values(len(labels), kind == "pie")
    align = "middle" if kind in ("bars", "lines") else "start"
    texts = [self.letters([one], "label", align, 1) for one in labels], [self.letters([one], "label", align, 1) for one in written]
    for one in (*texts[0], *texts[1]):
      one.style = dataclasses.replace(one.style, breaks="never")
    return Chart(kind, *texts, numbers, node.get("tall", 9.0))

  def _code(self, node: Mapping[str, Any], index: int) -> Region:
    name, lines = self._filler.code(self.count(*node.get("count", (1, 2))))
    style = Style(monospaced(self._faces[False]), load("en"), _CODE_LEADING, breaks="never")
    return scenes.Code(Text(lines, style, "code", ROLES["code"].factor), name)

  def _formula(self, node: Mapping[str, Any], index: int) -> Region:
    from data_pipelines.text_rendering import formulas  # with Matplotlib's mathtext, which takes a while to import
    return formulas.Formula(formulas.draw_formula(self._rng))

  def _scene(self, node: Mapping[str, Any], index: int) -> Region:
    texts = [self.text(node["scene"], "balloon", "middle") for _ in range(self.count(*node.get("count", (1, 2))))]
    return scenes.Scene(texts, self._rng.integers(12, size=2).tolist())

  def _arrow(self, node: Mapping[str, Any], index: int) -> Region:
    return scenes.Arrow(node["arrow"])

  def _rule(self, node: Mapping[str, Any], index: int) -> Region:
    return scenes.Rule(node["rule"] == "dashed", node.get("upright", False), node["rule"] == "strong")

  def _bar_code(self, node: Mapping[str, Any], index: int) -> Region:
    return scenes.BarCode(self._rng.integers(1, 5, 2 * node["barcode"] + 1).tolist())

  def _space(self, node: Mapping[str, Any], index: int) -> Region:
    return scenes.Space(node["space"])


def _faces(rng: np.random.Generator, page: Page) -> dict[bool, Typeface]:
  """An upright typeface for running text, and a bold one: of the same family, or of another one."""
  some = [one for one in page.typefaces if not one.main.is_italic and one.main.kind != "monospaced" 
          and not any(word in one.main.style for word in ("Condensed", "Light"))]
  found = {}
  for is_bold in (False, True):
    fit = [one for one in some if one.main.is_bold == is_bold] or some or page.typefaces
    same = [one for one in fit if found and one.main.family == found[False].main.family]
    found[is_bold] = draw_typeface(rng, dataclasses.replace(page, typefaces=same if same and rng.random() < 0.6 else fit))
  return found


_CONTENTS: dict[str, Callable[[Builder, Mapping[str, Any], int], Region]] = {
    "rows": Builder._rows, "columns": Builder._columns, "text": Builder._text, "table": Builder._table, "chart": Builder._chart,
    "code": Builder._code, "formula": Builder._formula, "scene": Builder._scene, "arrow": Builder._arrow, "rule": Builder._rule,
    "barcode": Builder._bar_code, "space": Builder._space}
