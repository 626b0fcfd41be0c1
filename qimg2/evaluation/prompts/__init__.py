"""Prompts that ask for text: a set of our own, in the JSON files of this folder, and the published sets where the user has their files.

Our set has a file for each of the languages en, zh, mixed (English and Chinese), de, ru, ar and hi, and in each the kinds words (a sign of one to
three words), lines (one sentence or several short texts), paragraphs (running text) and slides (a title with points or columns). An entry is
[prompt with {} in place of each text, [texts]]; a prompt as a model sees it has the texts in double quotes. It was written for this project.
edits.json is not one of them: it is what `qimg2.evaluation.text_pages` makes edits of.

Published: LongText-Bench is a JSON file by lines for each language, with "prompt_id", "prompt", "text" (a list of texts, or one) and "category".
CVTG-2K is a folder with CVTG/2.json to CVTG/5.json and CVTG-Style/2.json to CVTG-Style/5.json, each with "data_list", a list of "index" and "prompt".
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qimg2.evaluation.prompt_files import first_repeated, numbered_lines, parse_json, read_text
from qimg2.evaluation.text_benchmarks import LANGUAGES as LONGTEXT_LANGUAGES
from qimg2.evaluation.text_benchmarks import cvtg_words

LANGUAGES = ("en", "zh", "mixed", "de", "ru", "ar", "hi")
KINDS = ("words", "lines", "paragraphs", "slides")
CVTG_PARTS, CVTG_AREAS = ("CVTG", "CVTG-Style"), (2, 3, 4, 5)


class TextPrompt(NamedTuple):
  """A prompt and what the picture must say.

  Attributes:
    name: unique in its set, of letters, digits, - and _.
    prompt: what the model draws.
    texts: what must stand in the picture, in the order of the prompt; of CVTG-2K the single words in lower case.
    language: that of the texts.
    category: the kind of our set; LongText-Bench's class; part and number of areas of CVTG-2K.
  """
  name: str
  prompt: str
  texts: tuple[str, ...]
  language: str
  category: str


def written(languages: Sequence[str] = LANGUAGES, kinds: Sequence[str] = KINDS) -> list[TextPrompt]:
  """Our own prompts in these languages and of these kinds.

  Raises:
    ValueError: an unknown language or kind, or none.
  """
  _check("language", languages, LANGUAGES)
  _check("kind", kinds, KINDS)
  return [prompt for language in languages for prompt in _read_own(language) if prompt.category in kinds]


def _check(what: str, asked: Sequence[str], known: Sequence[str]) -> None:
  odd = [one for one in asked if one not in known]
  if odd or not asked:
    raise ValueError(f"The text prompts have no {what} {odd[0]!r}: choose among {', '.join(known)}." if odd else
                     f"No {what} of text prompts is chosen: choose among {', '.join(known)}.")


def _read_own(language: str) -> list[TextPrompt]:
  kinds = json.loads((pathlib.Path(__file__).parent / f"{language}.json").read_text(encoding="utf-8"))
  return [TextPrompt(f"{language}-{kind}-{number:02d}", _filled(prompt, texts), tuple(texts), language, kind)
          for kind, entries in kinds.items() for number, (prompt, texts) in enumerate(entries, 1)]


def _filled(prompt: str, texts: Sequence[str]) -> str:
  parts = prompt.split("{}")
  return parts[0] + "".join(f'"{text}"{part}' for text, part in zip(texts, parts[1:], strict=True))


def digest(prompts: Iterable[TextPrompt]) -> str:
  """SHA-256 of a prompt set, in hexadecimal: the same for the same prompts in the same order, however they were stored."""
  return hashlib.sha256(json.dumps(list(prompts), ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def longtext_bench(path: str, language: str) -> list[TextPrompt]:
  """The prompts of LongText-Bench in "en" or "zh", from its file text_prompts.jsonl or text_prompts_zh.jsonl.

  Raises:
    ValueError: another language, no such file, one that is not UTF-8, a line that is no JSON object or lacks a field or has one of another kind, or a
      prompt id that occurs twice.
  """
  if language not in LONGTEXT_LANGUAGES:
    raise ValueError(f"LongText-Bench has the languages {', '.join(LONGTEXT_LANGUAGES)}, not {language!r}.")
  prompts = []
  for number, line in numbered_lines(read_text(path, "LongText-Bench's text_prompts.jsonl or text_prompts_zh.jsonl")):
    where = f"{path}, line {number}"
    fields = _fields(parse_json(line, where), {"prompt_id": (str, int), "prompt": str, "text": (str, list)}, where)
    texts = [fields["text"]] if isinstance(fields["text"], str) else fields["text"]
    if not texts or not all(isinstance(text, str) for text in texts):
      raise ValueError(f"The field 'text' is {texts!r} ({where}): it must be a text, or a list of texts.")
    name = f"longtext-{language}-{_plain(fields['prompt_id'])}"
    prompts.append(TextPrompt(name, fields["prompt"], tuple(texts), language, str(fields.get("category", ""))))
  return _checked(prompts, path)


def cvtg(path: str) -> list[TextPrompt]:
  """The prompts of CVTG-2K from its folder, or from one of its files.

  Raises:
    ValueError: no such folder or file, one that is not UTF-8 or no JSON, or lacks a field or has one of another kind, or an index that occurs twice.
  """
  root = pathlib.Path(path)
  files = [root] if root.is_file() else [root / part / f"{area}.json" for part in CVTG_PARTS for area in CVTG_AREAS]
  return _checked([prompt for file in files for prompt in _read_cvtg(file)], path)


def _read_cvtg(file: pathlib.Path) -> list[TextPrompt]:
  content = parse_json(read_text(file, "CVTG-2K's folder with CVTG/2.json to CVTG-Style/5.json, or one of these files"), str(file))
  part, area, prompts = file.parent.name, file.stem, []
  for number, entry in enumerate(_fields(content, {"data_list": list}, str(file))["data_list"]):
    fields = _fields(entry, {"index": (str, int), "prompt": str}, f"{file}, entry {number} of data_list")
    name = "-".join(map(_plain, (part, area, fields["index"])))
    prompts.append(TextPrompt(name, fields["prompt"], tuple(cvtg_words(fields["prompt"])), "en", f"{part} {area}"))
  return prompts


def _fields(entry: Any, kinds: Mapping[str, type | tuple[type, ...]], where: str) -> Mapping[str, Any]:
  """An entry that is an object with fields of these kinds."""
  for name, kind in kinds.items():
    if not isinstance(entry, dict) or name not in entry:
      raise ValueError(f"The prompt set lacks the field {name!r} ({where}): give a file in the published format.")
    if not isinstance(entry[name], kind):
      raise ValueError(f"The field {name!r} is {json.dumps(entry[name])[:60]} ({where}): give a file in the published format.")
  return entry


def _plain(name: Any) -> str:
  """A name for files."""
  return re.sub(r"[^A-Za-z0-9_-]", "_", str(name))


def _checked(prompts: list[TextPrompt], path: str) -> list[TextPrompt]:
  twice = first_repeated(prompt.name for prompt in prompts)
  if twice or not prompts:
    raise ValueError(f"The prompt set {path} has two prompts {twice}: give each its own number." if twice else f"The prompt set {path} is empty.")
  return prompts
