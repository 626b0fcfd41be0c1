"""Scores of text in a picture: pure functions of (expected, recognised), after normalisation, in the same way for all scripts.

  t, o                 the expected and the recognised text, normalised
  Lev, LCS             Levenshtein's edit distance; length of the longest common subsequence
  character error rate Lev(t, o) / |t|, above 1 where much is added
  NED                  1 - Lev(t, o) / max(|t|, |o|), a similarity in spite of its name, as the publications have it
  word accuracy        1 - (edits that turn the expected words into the recognised) / (expected words), at least 0
  two-sided score      2 LCS(t, o) / (|t| + |o|) over characters without spaces
  two-sided words      2 |T and O| / (|T| + |O|) of the multisets of words, weighed by nothing

The published scores, with their own normalisations, are in `qimg2.evaluation.text_benchmarks`. They count what is found; a picture that says a word
five times, or fills its borders with more words, loses nothing. The two-sided score divides by both lengths: text of n characters drawn twice has
2n / 3n, with n more characters the same, half of it n / 1.5n. Over characters it forgives a space that the recogniser lost and gives part for a part,
which a reward needs, but unrelated texts share letters by chance: 39 % of two English paragraphs, 13 % of two Chinese ones. The score over words has
a much lower floor, 15 % and 12 %, and a letter that is wrong costs the word.

Normalisation: NFKC, so that composed and combining marks, full-width and half-width forms, ligatures and Arabic presentation forms are one;
case is folded (ß becomes ss), because a recogniser cannot tell a large from a small C, O, S or Z; typographic quotes and dashes become plain ones;
characters that draw nothing (joiners, directional marks, soft hyphens) and the Arabic tatweel go; white space becomes one space, and none beside
Chinese and Japanese characters, whose lines are broken without one. So ² is 2, and … is three dots.

Order: a picture has no one reading order, and recognisers give right-to-left text in the order of reading or of place. `arrange` takes the recognised
lines in the given order or in that of their best matches in the expected text, and right-to-left lines as they are or turned, whichever is nearest.
"""

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq, Levenshtein

_PLAIN = str.maketrans({**dict.fromkeys("‘’‚‛′`´", "'"), **dict.fromkeys("“”„‟«»″「」『』《》〈〉‹›", '"'), **dict.fromkeys("‐‑‒–—―−", "-"),
                        "。": ".", "、": ",", "ـ": None})
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_BESIDE = re.compile(f" (?=[{_IDEOGRAPH}])|(?<=[{_IDEOGRAPH}]) ")
_WORD = re.compile(f"[{_IDEOGRAPH}]|[^\\s{_IDEOGRAPH}]+")
_SIGNS = "%&@#*"  # punctuation to Unicode, but part of a word


class Match(NamedTuple):
  """What two texts share: units (characters or words) that match, that were asked for, and that were drawn."""
  matched: int
  asked: int
  drawn: int

  @property
  def score(self) -> float:
    """2 matched / (asked + drawn) in 0..1; 1 where nothing was asked for and nothing drawn."""
    return 2 * self.matched / (self.asked + self.drawn) if self.asked + self.drawn else 1.0


def normalise(text: str) -> str:
  """The text as all scores of this module compare it; see above."""
  text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_PLAIN)
  return _BESIDE.sub("", " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split()))


def words(text: str) -> list[str]:
  """The words of a text, normalised, without punctuation at their ends; each Chinese character, hiragana and katakana is one.

  Thai and other scripts without spaces have words as long as their lines.
  """
  return [word for word in map(_bare, _WORD.findall(normalise(text))) if word]


def _bare(word: str) -> str:
  first, last = 0, len(word)
  while first < last and _is_punctuation(word[first]):
    first += 1
  while last > first and _is_punctuation(word[last - 1]):
    last -= 1
  return word[first:last]


def _is_punctuation(character: str) -> bool:
  return unicodedata.category(character).startswith("P") and character not in _SIGNS


def character_error_rate(expected: str, recognised: str) -> float:
  """Lev / |expected| over normalised characters, spaces included; for an empty expected text the number of recognised characters."""
  expected, recognised = normalise(expected), normalise(recognised)
  return Levenshtein.distance(expected, recognised) / max(1, len(expected))


def ned(expected: str, recognised: str) -> float:
  """1 - Lev / max(lengths) over normalised characters, in 0..1; 1 for two empty texts."""
  return Levenshtein.normalized_similarity(normalise(expected), normalise(recognised))


def word_accuracy(expected: str, recognised: str) -> float:
  """max(0, 1 - word error rate) of `words`; where none is expected, 1 if none was recognised, else 0."""
  asked, drawn = words(expected), words(recognised)
  return max(0.0, 1 - Levenshtein.distance(asked, drawn) / len(asked)) if asked else float(not drawn)


def word_match(expected: str, recognised: str) -> Match:
  """What is shared by the multisets of words: without order, every word as often as it stands there."""
  asked, drawn = words(expected), words(recognised)
  return Match((Counter(asked) & Counter(drawn)).total(), len(asked), len(drawn))


def character_match(expected: str, recognised: str) -> Match:
  """The longest common subsequence of the normalised characters without spaces."""
  asked, drawn = _spaceless(expected), _spaceless(recognised)
  return Match(LCSseq.similarity(asked, drawn), len(asked), len(drawn))


def _spaceless(text: str) -> str:
  return normalise(text).replace(" ", "")


def two_sided(expected: Sequence[str], lines: Sequence[str]) -> float:
  """The two-sided score in 0..1 of all the texts that a prompt asks for and the lines of a picture: 1 for all of it and nothing else."""
  return character_match(" ".join(expected), arrange(expected, lines)).score


def arrange(expected: Sequence[str], lines: Sequence[str]) -> str:
  """The recognised lines as one text, in the order and direction that matches most characters of the expected texts, the given one first."""
  target = " ".join(expected)
  directions = [list(lines), [turn(line) for line in lines]] if any(map(_is_right_to_left, target)) else [list(lines)]
  orders = itertools.chain.from_iterable((one, _in_order_of_matches(target, one)) for one in directions)
  return max(map(" ".join, orders), key=lambda text: character_match(target, text).matched)


def _in_order_of_matches(target: str, lines: Sequence[str]) -> list[str]:
  target = normalise(target)
  return sorted(lines, key=lambda line: _place(normalise(line), target))


def _place(line: str, target: str) -> int:
  """Where in the target the part that is most like the line begins."""
  found = fuzz.partial_ratio_alignment(line, target) if line and target else None
  return found.dest_start if found else 0


def turn(line: str) -> str:
  """A line with right-to-left letters from the order of place (left to right) to that of reading, or back; others as they are.

  The runs of left-to-right letters and numbers within it keep their own order, and combining marks stay behind their letters.
  """
  if not any(map(_is_right_to_left, line)):
    return line
  clusters = re.findall(r"[A-Za-z0-9À-ɏ]+(?:[.,:/'-][A-Za-z0-9À-ɏ]+)*|[\u0660-\u0669]+|.", line)
  joined: list[str] = []
  for cluster in clusters:
    if joined and unicodedata.combining(cluster[0]):
      joined[-1] += cluster
    else:
      joined.append(cluster)
  return "".join(reversed(joined))


def _is_right_to_left(character: str) -> bool:
  return unicodedata.bidirectional(character) in ("R", "AL")


def score_text(expected: Sequence[str], lines: Sequence[str]) -> dict[str, float]:
  """All scores of this module for one picture, and the counts that give them over many.

  Args: expected, the texts that a prompt asks for; lines of text that were recognised in the picture.

  Returns: "two-sided", "two-sided words", "NED" and "word accuracy" in 0..1, "character error rate" from 0 on; "matched twice" and "asked and drawn"
  (characters of the two-sided score: numerator and denominator), "errors" and "characters" (of the character error rate), "words found" and "words".
  """
  target, drawn = " ".join(expected), arrange(expected, lines)
  characters, found = character_match(target, drawn), word_match(target, drawn)
  rate, length = character_error_rate(target, drawn), len(normalise(target))
  return {"two-sided": characters.score, "two-sided words": found.score, "NED": ned(target, drawn), "word accuracy": word_accuracy(target, drawn),
          "character error rate": rate, "matched twice": 2 * characters.matched, "asked and drawn": characters.asked + characters.drawn,
          "errors": round(rate * max(1, length)), "characters": length, "words found": found.matched, "words": found.asked}
