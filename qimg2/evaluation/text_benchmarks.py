"""Published scores of text in pictures, each with the normalisation and the quirks of its publication.

**LongText-Bench** (X-Omni, arXiv:2507.22058): sum |gt and ocr| / sum |gt| over multisets, of words in English and of characters in Chinese, summed
over all pictures. Recall alone: no order, and no loss by added text. Kept are a-z, A-Z, 0-9, some French letters with accents and the Chinese
characters U+4E00 to U+9FA5; so "it's" is "its", "Grüße" is "Grüe", and other scripts vanish. Its OCR is Qwen2.5-VL-7B.

**CVTG-2K** (TextCrafter, arXiv:2503.23461): the words are those between single quotes in the prompt, in lower case, so an apostrophe inside ends a
quote and what follows is shifted. Word accuracy: the share that stands among the recognised words, however often. NED: the mean over the expected
words of 1 - Lev / (longer length + 1e-5) to the word that difflib finds closest, so an exact word has 1 within 1e-5. Both are summed over the words
of all pictures. Its OCR is PaddleOCR for English, with turned text.

**OmniDoc-TokenBench** (Qwen-Image-VAE-2.0, arXiv:2605.13565): the mean over pictures of 1 - Lev / longer length between what the OCR reads in the
original and in the reconstruction, case and punctuation counted. What the OCR gets wrong in both costs nothing.

**Flow-GRPO** (arXiv:2505.05470): the reward 1 - min(Lev, |t|) / |t| without spaces and in lower case, t the text in the first quotes of the prompt.
Lev is 0 where t stands anywhere within the recognised text, so repeated and added text is paid in full, and all quotes but the first are ignored.

`qimg2.evaluation.text.two_sided` has none of these holes.
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

_KEPT = "\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"
_NO_TEXT = ("addCriterion", "No text recognized.")  # what its OCR says in place of text
LANGUAGES = ("en", "zh")


class Count(NamedTuple):
  """Words or characters that were found, and all that were asked for; over many pictures both are summed, then divided."""
  found: int
  asked: int


class WordCount(NamedTuple):
  """CVTG-2K: expected words found, all of them, and the sum of their similarities to the closest recognised words."""
  found: int
  asked: int
  similarity: float


def longtext_normalise(text: str, language: str) -> str:
  """What LongText-Bench keeps of a text: English in lower case with single spaces, Chinese without any.

  Raises:
    ValueError: a language other than "en" and "zh".
  """
  if language not in LANGUAGES:
    raise ValueError(f"LongText-Bench is scored in one of the languages {', '.join(LANGUAGES)}, not {language!r}.")
  if language == "zh":
    return re.sub(f"[^{_KEPT}]", "", text)
  return " ".join(re.sub(rf"[^{_KEPT}\s]", "", text).lower().split())


def longtext_recall(expected: Sequence[str], recognised: str, language: str) -> Count:
  """LongText-Bench's count of one picture.

  The phrases that its OCR says where there is no text are taken out of the recognised text; in the published code the second replaces the work of the
  first, which changes nothing unless both occur.
  """
  for phrase in _NO_TEXT:
    recognised = recognised.replace(phrase, "")
  units = str.split if language == "en" else list
  asked, drawn = (Counter(units(longtext_normalise(text, language))) for text in (" ".join(expected), recognised))
  return Count((asked & drawn).total(), asked.total())


def cvtg_words(prompt: str) -> list[str]:
  """The words between single quotes of a prompt of CVTG-2K, in lower case."""
  return [word for quoted in re.findall(r"'(.*?)'", prompt) for word in quoted.lower().split()]


def cvtg_match(asked: Sequence[str], lines: Sequence[str]) -> WordCount:
  """CVTG-2K's count of one picture: of words in lower case, and the recognised lines."""
  drawn = [word for line in lines for word in line.lower().split()] or [""]
  return WordCount(sum(word in drawn for word in asked), len(asked), sum(_similarity(word, _closest(word, drawn)) for word in asked))


def _closest(word: str, drawn: Sequence[str]) -> str:
  return difflib.get_close_matches(word, drawn, n=1, cutoff=0)[0]


def _similarity(one: str, other: str) -> float:
  return 1 - Levenshtein.distance(one, other) / (max(len(one), len(other)) + 1e-5)


def omnidoc_ned(original: str, reconstruction: str) -> float:
  """OmniDoc-TokenBench's NED in 0..1 of the text read in one picture and in its reconstruction.

  Raises:
    ValueError: nothing was read in the original, which is then no document to score on.
  """
  if not original:
    raise ValueError("The OCR read no text in the original picture: leave it out of NED on documents.")
  return Levenshtein.normalized_similarity(original, reconstruction)


def flow_grpo_target(prompt: str) -> str:
  """The text that Flow-GRPO's reward looks for: within the first double quotes, else the first single quotes, else the whole prompt."""
  found = re.search(r'"([^"]*)"', prompt) or re.search(r"'([^']*)'", prompt)
  return found.group(1) if found else prompt


def flow_grpo_reward(target: str, recognised: str) -> float:
  """Flow-GRPO's OCR reward in 0..1.

  Raises:
    ValueError: the target has no characters but spaces.
  """
  target, recognised = ("".join(text.lower().split()) for text in (target, recognised))
  if not target:
    raise ValueError("Flow-GRPO's OCR reward has no text to look for: the first quotes of the prompt are empty.")
  distance = 0 if target in recognised else Levenshtein.distance(target, recognised)
  return 1 - min(distance, len(target)) / len(target)
