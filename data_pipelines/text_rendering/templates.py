"""Templates of complex pages: one JSON file each in `templates/` and in the folders that a setting names, so that another is added without code.

A file holds
  about     what the page is, in English, such as "a menu"
  aspect    [least, most] width to height that it is drawn for; any where there is none
  largest   size of running text at most, as a share of the page's shorter side; 0.05 where there is none
  page      a region

A region is an object with one content, and more. Contents:
  rows      regions below each other; gap: ems between them
  columns   regions beside each other, from the right on right-to-left pages; gap
  text      a filling (see `filling`); role, align (start, middle, end), lines: at most, characters: of "paragraphs", about
  table     columns, each with text, and role, align, head (a filling for the first row; all or none have one), folds (takes several lines);
            count: [least, most] rows; lines: one or several of rows, grid, zebra, leaders, none
  chart     one or several of bars, rows (lying bars), lines, pie; labels: a filling, count: [least, most], tall: ems
  code      the word "lines"; count: [least, most] pieces
  formula   the word "tex"
  scene     a filling that people say in balloons; count: [least, most] balloons, of 1 and 2
  arrow     down or next
  rule      thin, strong or dashed; upright: true for one that stands between columns
  barcode   number of bars
  space     ems

More, of any region:
  repeat    [least, most] times that it stands in its rows or columns
  optional  true: left out where a page should hold little
  grow      its share of the height that is left over in rows
  share     its share of the width in columns; wide: its width in ems
  spread    what is left over stands below (top), on both sides (middle) or in the gaps (even)
  box       what is behind it: fill (panel, accent or ""), line, bar, round (ems), pad (ems)
A *filling* is one of `FILLINGS`; a pattern with slots of them in braces, such as "{weekday}, {time}"; or texts for each language, {"en": [...],
"de": [...], "else": filling}. word, heading, line, sentence and paragraphs are the language's own texts; cost is the price of something small
and total the sum of those before; later is a time after the one before, opening and closing are times of the morning and of the evening; page is
the number of a page; day is the weekday, and index the number, of a repeated region or of a table's row.

Roles are those of `building.ROLES`, any other is set like body.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SLOTS = ("date", "time", "number", "percent", "price", "cost", "total", "country", "language", "weekday", "month", "later", "opening",
         "closing", "day", "page", "word", "heading", "index")
FILLINGS = (*SLOTS, "line", "sentence", "paragraphs")
AS_DRAWN = ("index", "weekday", "month", "cost", "total", "later", "opening", "closing", "day", "page")  # which may come twice
IN_ORDER = ("weekday", "month")  # of which labels are taken one after another
SLOT = re.compile(r"\{(\w*)\}")
FOLDER = pathlib.Path(__file__).parent / "templates"
CHARTS, LINES = ("bars", "rows", "lines", "pie"), ("rows", "grid", "zebra", "leaders", "none")
_LARGEST = 0.05

Check = Callable[[Any], str]  # what a value must be, where it is not; "" where it is


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
  """What a file says, see the module docstring; `name` is the file's, without its suffix."""
  name: str
  about: str
  page: Mapping[str, Any]
  aspect: tuple[float, float] = (0.0, 1e9)
  largest: float = _LARGEST


def load(folders: Sequence[str] = ()) -> dict[str, Template]:
  """Returns the templates of `FOLDER` and of further folders by name, in order; a later folder's stands for an earlier one's of the same name.

  Raises:
    ValueError: a folder cannot be read, or a file is no template; names the file, the field, and what it must be.
  """
  return dict(sorted(_load(tuple(folders)).items()))


def digest(folders: Sequence[str]) -> str:
  """Sixteen hexadecimal digits that differ where templates of further folders do; "" without such folders."""
  own = load(())
  some = {name: dataclasses.asdict(one) for name, one in load(folders).items() if one != own.get(name)}
  return hashlib.sha256(json.dumps(some, sort_keys=True).encode()).hexdigest()[:16] if folders else ""


@functools.cache
def _load(folders: tuple[str, ...]) -> dict[str, Template]:
  found = {}
  for folder in (FOLDER, *(pathlib.Path(os.path.expanduser(one)) for one in folders)):
    paths = sorted(folder.glob("*.json"))
    if not paths:
      raise ValueError(f"The folder {folder} has no template: give one with .json files, or leave it out of template_folders.")
    found |= {path.stem: _read(path) for path in paths}
  return found


def _read(path: pathlib.Path) -> Template:
  try:
    read = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"Cannot read the template {path} ({error}): give a file of JSON.") from error
  _check_fields(path, "", read, {"about": _is_text, "page": _is_object}, {"aspect": _is_range, "largest": _is_positive})
  _check_region(path, "page", read["page"])
  return Template(path.stem, **{key: tuple(value) if isinstance(value, list) else value for key, value in read.items()})


# ---- what values must be ------------------------------------------------------------------------------


def _is_text(value: Any) -> str:
  return "" if isinstance(value, str) and value.strip() else "a text"


def _is_object(value: Any) -> str:
  return "" if isinstance(value, dict) else "an object"


def _is_flag(value: Any) -> str:
  return "" if isinstance(value, bool) else "true or false"


def _is_number(value: Any) -> str:
  return "" if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else "a number of at least 0"


def _is_positive(value: Any) -> str:
  return "" if not _is_number(value) and value > 0 else "a number above 0"


def _is_count(value: Any) -> str:
  return "" if isinstance(value, int) and not isinstance(value, bool) and value > 0 else "a whole number above 0"


def _is_range(value: Any) -> str:
  return "" if isinstance(value, list) and len(value) == 2 and not any(map(_is_positive, value)) and value[0] <= value[1] else (
      "[least, most], two numbers above 0 in order")


def _is_counts(value: Any) -> str:
  return _is_range(value) or ("" if not any(map(_is_count, value)) else "[least, most], two whole numbers above 0")


def _one_of(*known: str) -> Check:
  return lambda value: "" if value in known else f"one of {', '.join(map(repr, known))}"


def _some_of(*known: str) -> Check:
  return lambda value: "" if value and set(value if isinstance(value, list) else [value]) <= set(known) else f"one or several of {', '.join(known)}"


def _is_filling(value: Any) -> str:
  if isinstance(value, dict):
    texts = [one for key, some in value.items() if key != "else" for one in (some if isinstance(some, list) else [None])]
    return "texts for each language, such as {\"en\": [\"Menu\"], \"else\": \"heading\"}" if not texts or any(map(_is_text, texts)) else (
        _is_filling(value.get("else", "heading")))
  odd = [slot for slot in SLOT.findall(value) if slot not in SLOTS] if isinstance(value, str) and "{" in value else []
  if isinstance(value, str) and (value in FILLINGS or "{" in value and not odd):
    return ""
  return f"one of {', '.join(FILLINGS)}, a pattern of them in braces, or texts by language"


def _is_regions(value: Any) -> str:
  return "" if isinstance(value, list) and value and not any(map(_is_object, value)) else "a list of regions"


_ALIGN = _one_of("start", "middle", "end")
_MORE: dict[str, Check] = {
    "repeat": _is_counts, "optional": _is_flag, "grow": _is_number, "share": _is_positive, "wide": _is_positive, "box": _is_object,
    "spread": _one_of("top", "middle", "even")}
_BOX: dict[str, Check] = {"fill": _one_of("panel", "accent", ""), "line": _is_flag, "bar": _is_flag, "round": _is_number, "pad": _is_number}
_COLUMN: dict[str, Check] = {"role": _is_text, "align": _ALIGN, "head": _is_filling, "folds": _is_flag}
CONTENTS: dict[str, tuple[Check, dict[str, Check]]] = {
    "rows": (_is_regions, {"gap": _is_number}), "columns": (_is_regions, {"gap": _is_number}),
    "text": (_is_filling, {"role": _is_text, "align": _ALIGN, "lines": _is_count, "characters": _is_count}),
    "table": (_is_regions, {"count": _is_counts, "lines": _some_of(*LINES)}),
    "chart": (_some_of(*CHARTS), {"labels": _is_filling, "count": _is_counts, "tall": _is_positive}),
    "code": (_one_of("lines"), {"count": _is_counts}), "formula": (_one_of("tex"), {}), "scene": (_is_filling, {"count": _is_counts}),
    "arrow": (_one_of("down", "next"), {}), "rule": (_one_of("thin", "strong", "dashed"), {"upright": _is_flag}), "barcode": (_is_count, {}),
    "space": (_is_number, {})}


def _check_region(path: pathlib.Path, place: str, region: Mapping[str, Any]) -> None:
  contents = [name for name in CONTENTS if name in region]
  if len(contents) != 1:
    has = f"the contents {', '.join(contents)}" if contents else "no content"
    raise ValueError(f"The template {path} has {has} in {place}: give one of {', '.join(CONTENTS)}.")
  (name,) = contents
  check, options = CONTENTS[name]
  _check_fields(path, place, region, {name: check}, options | _MORE)
  if "box" in region:
    _check_fields(path, f"{place}.box", region["box"], {}, _BOX)
  for number, part in enumerate(region[name] if name in ("rows", "columns", "table") else ()):
    inner = f"{place}.{name}[{number}]"
    if name == "table":
      _check_fields(path, inner, part, {"text": _is_filling}, _COLUMN)
    else:
      _check_region(path, inner, part)
  if name == "table" and len({"head" in column for column in region[name]}) == 2:
    raise ValueError(f"The template {path} has a head in some columns of {place}.table alone: give one in all of them, or in none.")


def _check_fields(path: pathlib.Path, place: str, given: Any, needed: Mapping[str, Check], others: Mapping[str, Check]) -> None:
  if not isinstance(given, dict):
    raise ValueError(f"The template {path} is no object: give about and page.")
  prefix = f"{place}." if place else ""
  for name, check in {**needed, **others}.items():
    if name not in given:
      if name in needed:
        raise ValueError(f"The template {path} has no {prefix}{name}: it must be {check(None)}.")
      continue
    wrong = check(given[name])
    if wrong:
      raise ValueError(f"The template {path} has {json.dumps(given[name], ensure_ascii=False)[:60]} in {prefix}{name}: it must be {wrong}.")
  for name in given:
    if name not in needed and name not in others:
      raise ValueError(f"The template {path} has the unknown field {prefix}{name}: choose among {', '.join([*needed, *others])}.")
