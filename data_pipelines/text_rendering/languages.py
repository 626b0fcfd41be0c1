"""The languages that texts are set in: one JSON file each in `language_files/`, so that another is added without code.

  name          in English, such as "German"
  scripts       ISO 15924 codes of its own letters, such as ["Latn"]; fonts are chosen by them
  package       the Debian package that has fonts for it
  locale        of CLDR, for names, numbers and dates
  breaking      where a line may end: "space", "cjk" (between any two characters but for kinsoku) or "thai" (between words)
  hyphenation   a dictionary of pyphen, "" for none
  indent        of the first lines of paragraphs, in ems
  leading       [least, most] from line to line, in ems
  min_em        what is readable at least, as a multiple of what Latin letters need
  vertical      how many of ten texts are set in columns from right to left
  words, headings, sentences   what texts are made of, without straight double quotes
  patterns      sentences with {slots}: weekday, date, time, number, percent, price, country, language, month
  objects       what texts stand on, `compositional.OBJECTS`, as its captions call it
  edits         {"word": [...], ...}: instructions, with {old} and {new}; {text} and {colour}, {looks}, {place} or {language}; see `edits`
  looks         names of what a font may look like, as an instruction says them
  colours, places   names as they are said in its captions
  captions      {"paper": [...], "block": [...]} with {paper}, or {text}, {colour} and {place}: what is said of the sheet and of each text
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

FOLDER = pathlib.Path(__file__).parent / "language_files"
_TEXT = ("words", "headings", "sentences")


@dataclasses.dataclass(frozen=True)
class Language:
  """What a file says, see the module docstring; `code` is its name, such as "zh-Hans"."""

  code: str
  name: str
  scripts: tuple[str, ...]
  package: str
  locale: str
  breaking: str
  hyphenation: str
  indent: float
  leading: tuple[float, float]
  min_em: float
  vertical: int
  words: tuple[str, ...]
  headings: tuple[str, ...]
  sentences: tuple[str, ...]
  patterns: tuple[str, ...]
  objects: Mapping[str, str]
  edits: Mapping[str, tuple[str, ...]]
  looks: Mapping[str, str]
  colours: Mapping[str, str]
  places: Mapping[str, str]
  captions: Mapping[str, tuple[str, ...]]

  def __hash__(self) -> int:
    return hash(self.code)

  @property
  def is_rtl(self) -> bool:
    """Whether lines run from right to left."""
    return bool({"Arab", "Hebr"} & set(self.scripts))

  @property
  def has_italics(self) -> bool:
    """Whether slanted letters are usual."""
    return self.scripts[0] in ("Latn", "Cyrl", "Grek")

  @property
  def has_capitals(self) -> bool:
    return self.has_italics

  @property
  def with_dejavu(self) -> bool:
    """Whether DejaVu's letters are as good as others'; its Arabic and Hebrew are for want of better ones."""
    return self.has_italics

  @functools.cached_property
  def characters(self) -> frozenset[str]:
    """All characters of its texts, numbers and dates."""
    from data_pipelines.text_rendering.words import cldr_characters  # which needs a language
    return frozenset("".join(text for name in _TEXT for text in getattr(self, name))) | cldr_characters(self)


def codes() -> tuple[str, ...]:
  """The codes of all languages that there are files of."""
  return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


@functools.cache
def load(code: str) -> Language:
  """Returns a language.

  Raises:
    ValueError: there is no file of it, or it lacks a key.
  """
  path = FOLDER / f"{code}.json"
  if code not in codes():
    raise ValueError(f"There is no language {code!r}: choose among {', '.join(codes())}, or add {path}.")
  read = json.loads(path.read_text(encoding="utf-8"))
  try:
    return Language(code, **{key: _frozen(value) for key, value in read.items()})
  except TypeError as error:
    raise ValueError(f"{path} is no description of a language: {error}.") from error


def _frozen(value):
  if isinstance(value, list):
    return tuple(value)
  return {key: _frozen(one) for key, one in value.items()} if isinstance(value, dict) else value
