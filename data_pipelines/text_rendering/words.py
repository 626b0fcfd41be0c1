"""What is written: words, headings, sentences and paragraphs of a language, with names, numbers, dates and prices of CLDR, and texts of `corpora`.

Everything is drawn from a random generator. Grammars stay clear of inflection: a slot of a pattern stands where the plain form of a name is right.
"""

import dataclasses
import datetime
import functools
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence

import numpy as np
from babel import Locale, dates, numbers

from data_pipelines.text_rendering.languages import Language

_COUNTRIES = "AR AU BR CA CL CN DE EG ES FI FR GR ID IE IL IN IT JP KE KR MX NG NO NZ PE PL PT SE TH TR UA US VN ZA".split()
_LANGUAGES = "ar bn de el en es fi fr he hi id it ja ko nl pl pt ru sv sw th tr uk vi zh".split()
_CURRENCIES = {"en_US": "USD", "vi_VN": "VND", "pl_PL": "PLN", "ru_RU": "RUB", "ar_EG": "EGP", "he_IL": "ILS", "hi_IN": "INR", "th_TH": "THB",
               "zh_Hans_CN": "CNY", "zh_Hant_TW": "TWD", "ja_JP": "JPY", "ko_KR": "KRW"}
_UNITS = {"VND": 5000, "KRW": 500, "JPY": 50, "RUB": 20, "INR": 15, "EGP": 10, "THB": 10, "TWD": 10, "CNY": 2}  # of what little things cost
_FIRST_DAY = datetime.date(1990, 1, 1)
_NUM_DAYS = 20000
_JOINERS = "\u200c\u200d"  # which Indic and Arabic spelling needs
_TRANSLATED = ("country", "language", "weekday", "month", "date")
_SLOT = re.compile(r"\{(\w+)\}")
_SPACED = {"cjk": "", "thai": " "}  # between sentences, where it is not a space


def clean(text: str) -> str:
  """Returns a text in composed form (NFC) without what is not drawn: control characters, direction marks, variation selectors, soft hyphens. Each run
  of spaces becomes one, but for no-break spaces; lines stay lines."""
  kept = (" " if c == "\t" else c for c in unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\u2028", "\n").replace("\u2029", "\n")))
  drawn = "".join(c for c in kept if c in "\n" + _JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs") and not _is_variation(c))
  return "\n".join(re.sub(r"[ \u2000-\u200a\u205f]+", " ", line).strip(" " + _JOINERS) for line in drawn.split("\n")).strip("\n")


def _is_variation(character: str) -> bool:
  return 0xFE00 <= ord(character) <= 0xFE0F or 0xE0100 <= ord(character) <= 0xE01EF


@functools.cache
def _locale(code: str) -> Locale:
  return Locale.parse(code)


@functools.cache
def _names(code: str) -> dict[str, tuple[str, ...]]:
  """Kind of name -> names in the language of a locale."""
  locale = _locale(code)
  found = {"country": [locale.territories.get(one) for one in _COUNTRIES], "language": [locale.languages.get(one) for one in _LANGUAGES],
           "weekday": locale.days["format"]["wide"].values(), "month": locale.months["format"]["wide"].values()}
  return {kind: tuple(clean(name) for name in some if name) for kind, some in found.items()}


@functools.cache
def in_order(kind: str, code: str, width: str = "abbreviated") -> tuple[str, ...]:
  """The names of weekdays or months in the language of a locale, from the first to the last; `width` is "abbreviated" or "wide"."""
  names = getattr(_locale(code), {"weekday": "days", "month": "months"}[kind])["stand-alone"][width]
  return tuple(clean(names[key]) for key in sorted(names))


def _date(rng: np.random.Generator, locale: str) -> str:
  return dates.format_date(_FIRST_DAY + datetime.timedelta(days=int(rng.integers(_NUM_DAYS))), format="long", locale=locale)


def _time(rng: np.random.Generator, locale: str) -> str:
  return write_time(60 * int(rng.integers(6, 23)) + 5 * int(rng.integers(12)), locale)


def _number(rng: np.random.Generator, locale: str) -> str:
  return numbers.format_decimal(int(10 ** rng.uniform(1, 6)), locale=locale, numbering_system="default")


def _percent(rng: np.random.Generator, locale: str) -> str:
  return numbers.format_percent(int(rng.integers(1, 100)) / 100, locale=locale, numbering_system="default")


def _price(rng: np.random.Generator, locale: str) -> str:
  return numbers.format_currency(int(10 ** rng.uniform(2, 4.5)) / 4, _currency(locale), locale=locale, numbering_system="default")


def draw_cost(rng: np.random.Generator, locale: str) -> float:
  """Returns what something small costs, in the currency of a locale."""
  return _UNITS.get(_currency(locale), 0.5) * int(rng.integers(3, 60))


def write_cost(amount: float, locale: str) -> str:
  """Returns an amount in the currency of a locale, as it is written there."""
  return clean(numbers.format_currency(amount, _currency(locale), locale=locale, numbering_system="default"))


def _currency(locale: str) -> str:
  return _CURRENCIES.get(locale, "EUR")


def write_time(minutes: int, locale: str) -> str:
  """Returns the time that is so many minutes after midnight."""
  return clean(dates.format_time(datetime.time(minutes // 60 % 24, minutes % 60), format="short", locale=locale))


_SLOTS: dict[str, Callable[[np.random.Generator, str], str]] = {"date": _date, "time": _time, "number": _number, "percent": _percent, "price": _price}


def fill_slot(rng: np.random.Generator, slot: str, language: Language) -> str:
  """Returns what stands for a {slot}: date, time, number, percent, price, or a name: country, language, weekday, month."""
  if slot in _SLOTS:
    return clean(_SLOTS[slot](rng, language.locale))
  some = _names(language.locale)[slot.rstrip("2")]
  return some[rng.integers(len(some))]


@functools.cache
def _titles(code: str) -> dict[str, tuple[str, ...]]:
  """Kind of name -> names as they stand alone, in the same order in every language."""
  locale = _locale(code)
  alone = {"weekday": locale.days["stand-alone"]["wide"].values(), "month": locale.months["stand-alone"]["wide"].values()}
  return _names(code) | {kind: tuple(map(clean, some)) for kind, some in alone.items()}


def names_of(language: Language, code: str) -> str:
  """The name of another language, such as "zh-Hans", in a language."""
  return clean(_locale(language.locale).languages[code.replace("-", "_")])


def translations(rng: np.random.Generator, language: Language, other: Language) -> tuple[str, str]:
  """Returns a name or a date in two languages."""
  kind = _TRANSLATED[rng.integers(len(_TRANSLATED))]
  if kind == "date":
    day = _FIRST_DAY + datetime.timedelta(days=int(rng.integers(_NUM_DAYS)))
    return tuple(clean(dates.format_date(day, format="long", locale=one.locale)) for one in (language, other))
  pairs = list(zip(*(_titles(one.locale)[kind] for one in (language, other)), strict=True))
  return pairs[rng.integers(len(pairs))]


def cldr_characters(language: Language) -> frozenset[str]:
  """All characters of what `fill_slot` gives."""
  rng = np.random.default_rng(0)
  drawn = [fill_slot(rng, slot, language) for slot in _SLOTS for _ in range(40)]
  ordered = (in_order(kind, language.locale, width) for kind in ("weekday", "month") for width in ("abbreviated", "wide"))
  names = [*_names(language.locale).values(), *ordered]
  return frozenset("".join([*drawn, *(name for some in names for name in some)]))


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What texts of a language are made of; `own` are a user's paragraphs, which half of the texts are then taken from."""

  language: Language
  own: tuple[str, ...] = ()

  def word(self, rng: np.random.Generator) -> str:
    """A word, sometimes with a capital or in capitals where there are such."""
    word, look = _pick(rng, self.language.words), rng.random()
    if not self.language.has_capitals or look > 0.5:
      return word
    return _capitals(word) if look < 0.2 else word[0].upper() + word[1:]

  def heading(self, rng: np.random.Generator) -> str:
    """A few words as they stand on a sign or above a text."""
    return _pick(rng, self.language.headings)

  def figures(self, rng: np.random.Generator) -> str:
    """A sentence with numbers or names."""
    text = _SLOT.sub(lambda found: fill_slot(rng, found[1], self.language), _pick(rng, self.language.patterns))
    return re.sub(r"\.\.$", ".", text)  # what fills a slot may be an abbreviation

  def line(self, rng: np.random.Generator) -> str:
    """A short text: words, a heading, or a sentence with numbers or names."""
    kind = rng.random()
    if kind < 0.25:
      return self.word(rng)
    return self.heading(rng) if kind < 0.65 else self.figures(rng)

  def paragraphs(self, rng: np.random.Generator, num: int, num_characters: int, figures: bool = True,
                 known: Collection[str] = ()) -> list[str]:
    """At most `num` paragraphs of sentences, at least one, each of at most `num_characters` or of one sentence; none comes twice, and none of the
    `known` ones while there are others. `figures` allows sentences with numbers and names. Half of them are the user's where there are such."""
    if self.own and rng.random() < 0.5:
      return list(dict.fromkeys(self._own(rng, num_characters) for _ in range(num)))
    between, order, found = _SPACED.get(self.language.breaking, " "), rng.permutation(len(self.language.sentences)).tolist(), []
    left = [i for i in order if self.language.sentences[i] not in known] or order
    while left and len(found) < num:
      text = ""
      while left:
        chosen = self.figures(rng) if figures and rng.random() < 0.2 else self.language.sentences[left[-1]]
        if text and len(text) + len(chosen) > num_characters:
          break
        text += (between if text else "") + chosen
        left.pop()
      found.append(text)
    return found

  def _own(self, rng: np.random.Generator, num_characters: int) -> str:
    """One of the user's paragraphs, or its beginning."""
    return shortened(_pick(rng, self.own), num_characters)


def shortened(text: str, num_characters: int) -> str:
  """A text of at most so many characters, or its beginning up to the end of a sentence or word."""
  if len(text) <= num_characters:
    return text
  ends = [found.end() for found in re.finditer(r"[.!?。！？।]+\s*", text) if found.end() <= num_characters]
  ends = ends or [found.start() for found in re.finditer(r"\s", text) if found.start() <= num_characters]
  return text[:ends[-1] if ends else num_characters].strip()


def _capitals(word: str) -> str:
  """A word in capitals, which have no accents in Greek."""
  if any("\u0370" <= c <= "\u03ff" for c in word):
    word = unicodedata.normalize("NFC", unicodedata.normalize("NFD", word).replace("\u0301", ""))
  return word.upper()


def like(word: str, old: str) -> str:
  """A word with capitals where another one has them."""
  if len(old) > 1 and old.isupper():
    return _capitals(word)
  return word[0].upper() + word[1:] if old[0].isupper() else word


def word_tokens(text: str, language: Language) -> list[tuple[int, int]]:
  """Returns (begin, end) of the words of a text that another could stand for: of at least three letters, or words of the language's list where
  no spaces tell them apart."""
  if language.breaking != "space":
    return [(found.start(), found.end()) for word in language.words for found in re.finditer(re.escape(word), text)]
  letters = "".join("x" if unicodedata.category(c)[0] in "LM" or c in _JOINERS else " " for c in text)
  return [found.span() for found in re.finditer("x{3,}", letters)]


def number_tokens(text: str) -> list[tuple[int, int]]:
  """Returns (begin, end) of the numbers of a text: digits, with the points, commas and colons between them, at least two in a row."""
  return [found.span() for found in re.finditer(r"\d+(?:[.,:٫٬]\d+)*", text) if re.search(r"\d\d", found[0])]


def lesser_number(rng: np.random.Generator, number: str) -> str | None:
  """Returns a number of as many of the same digits in which one group of digits is less, so that a date stays one; None where there is none."""
  groups = [one for one in re.finditer(r"\d{2,}", number) if int(one[0]) > 10 ** (len(one[0]) - 1)]
  if not groups:
    return None
  one = groups[rng.integers(len(groups))]
  value = str(rng.integers(10 ** (len(one[0]) - 1), int(one[0])))
  zero = ord(one[0][0]) - int(one[0][0])
  return number[:one.start()] + "".join(chr(zero + int(digit)) for digit in value) + number[one.end():]


def _pick(rng: np.random.Generator, some: Sequence[str]) -> str:
  return some[rng.integers(len(some))]
