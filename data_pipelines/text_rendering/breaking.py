"""Where a line may end: at spaces and dashes, between the characters of Chinese and Japanese (JIS X 4051's kinsoku), between Thai words, and inside
words by a dictionary of hyphenation. Headings in Chinese and Japanese are broken between phrases alone.

pythainlp finds the words of Thai, budoux phrases, pyphen syllables; the rules for signs are those of UAX 14 that matter to the languages here.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

import budoux
import pyphen

from data_pipelines.text_rendering.languages import Language

# Signs that begin no line, and that end none.
_STUCK = frozenset("\u00a0\u202f")  # no-break spaces
_SIGNS = frozenset("、。，．・：；？！）］｝〕〉》」』】〙〗,.:;?!)]}»›؟،؛।॥ๆฯ")
NOT_FIRST = _STUCK | _SIGNS | frozenset("ーぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶ々〻…‥–—”’%％℃°")
NOT_LAST = _STUCK | frozenset("（［｛〔〈《「『【〘〖“‘([{«‹¿¡¥￥$＄£€#＃")
_PARTICLES = frozenset("的了着著过過吗嗎呢吧们們得")  # Chinese ones, which belong to what is before them; budoux may tell them apart
_DASHES = "-–—/"
_CJK = re.compile(r"[\u2e80-\u303f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")
_LEAST_HYPHENATED = 6  # letters of a word, and 3 on each side of the hyphen
BREAKS = ("anywhere", "hyphenated", "phrases", "never")  # where the language allows it, inside words too, between phrases, and at the ends of texts
HYPHEN = "-"


@dataclasses.dataclass(frozen=True)
class Piece:
  """What is not broken: text[begin:end], then spaces up to `next`, which a line's end swallows; `hyphen` if it ends inside a word."""
  begin: int
  end: int
  next: int
  hyphen: bool = False


@functools.lru_cache(maxsize=4096)
def pieces(text: str, language: Language, breaks: str = "anywhere") -> tuple[Piece, ...]:
  """Returns the pieces of a paragraph; a line may end behind each of them. `breaks` is one of `BREAKS`."""
  if breaks == "never":
    return (Piece(0, len(text), len(text)),)
  found = []
  for word in re.finditer(r"[^ ]+", text):
    ends = _ends(word[0], language, breaks)
    begin = word.start()
    for place, hyphen in ends:
      found.append(Piece(begin, word.start() + place, word.start() + place, hyphen))
      begin = word.start() + place
    spaces = len(text) - len(text[word.end():].lstrip(" ")) - word.end()
    found.append(Piece(begin, word.end(), word.end() + spaces))
  return tuple(found)


def _ends(word: str, language: Language, breaks: str) -> list[tuple[int, bool]]:
  """Places inside a text without spaces where a line may end, and whether a hyphen is put there."""
  found = dict.fromkeys((i for i in range(1, len(word)) if _between(word[i - 1], word[i])), False)
  if language.breaking == "thai":
    found |= dict.fromkeys(_allowed(word, _thai_words(word)), False)
  if language.breaking == "cjk" and breaks == "phrases":
    ends = _allowed(word, _phrases(language.code).parse(word))
    found = {end: False for end in ends if end in found and not (word[end] in _PARTICLES and language.code.startswith("zh"))}
  if language.hyphenation and breaks == "hyphenated":
    for letters in re.finditer(r"[^\W\d_]{%d,}" % _LEAST_HYPHENATED, word):
      if not letters[0].isupper():
        found |= {letters.start() + i: True for i in _dictionary(language.hyphenation).positions(letters[0]) if 3 <= i <= len(letters[0]) - 3}
  return sorted(found.items())


def _allowed(word: str, parts: Sequence[str]) -> list[int]:
  """Places between the parts of a text, but for those that signs do not allow."""
  ends = itertools.accumulate(map(len, parts[:-1]))
  return [end for end in ends if word[end] not in NOT_FIRST and word[end - 1] not in NOT_LAST]


def _between(before: str, after: str) -> bool:
  if after in NOT_FIRST or before in NOT_LAST or after in "\u200c\u200d":
    return False
  if _CJK.match(before) or _CJK.match(after):
    return True
  return before in _DASHES and after not in _DASHES and not after.isdigit()


@functools.cache
def _phrases(code: str) -> budoux.Parser:
  load = {"ja": budoux.load_default_japanese_parser, "zh-Hans": budoux.load_default_simplified_chinese_parser,
          "zh-Hant": budoux.load_default_traditional_chinese_parser}
  return load.get(code, budoux.load_default_simplified_chinese_parser)()


def _thai_words(text: str) -> list[str]:
  from pythainlp.tokenize import word_tokenize  # which reads its dictionary
  return word_tokenize(text, engine="newmm")


@functools.cache
def _dictionary(name: str) -> pyphen.Pyphen:
  return pyphen.Pyphen(lang=name)
