"""Files of prompts that a judge scores pictures for, with questions about the pictures where there are any.

A file is a JSON list, or JSON lines, of objects with these fields; others are ignored.

  prompt       text, the only field that must be there
  name         unique, of letters, digits, - and _; its number in the file where it is missing; `id` is another word for it
  category     figures are given for each, too; `atom_count`, as in GenEval 2, is another way to give one
  height, width  of the picture in px, 1024 where they are missing
  sources      paths of the condition images, from the file's folder, in the order of the prompt
  questions    [[question, expected answer], ...], answers yes, no or a number from zero to ten; `vqa_list`, as in GenEval 2, is another word for it
  skills       what each question is about, such as "count"

So `geneval2_data.jsonl` of GenEval 2 (arXiv 2512.16853) is read as it is.
"""

import dataclasses
import pathlib
import re
from typing import Any

from qimg2.evaluation.prompt_files import numbered_lines, parse_json, read_text

DEFAULT_PX = 1024
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
YES_NO = ("yes", "no")
_NAME = re.compile(r"[A-Za-z0-9_-]+")

Choices = tuple[tuple[str, ...], ...]  # for each choice, the ways to write it


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about a picture: its text, the answers that it could have, the index of the expected one, and what it is about."""
  text: str
  choices: Choices
  expected: int
  skill: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One line of a file; see the module's docstring."""
  prompt: str
  name: str
  category: str
  size: tuple[int, int]
  sources: tuple[pathlib.Path, ...]
  questions: tuple[Question, ...]


def ways_to_write(word: str) -> tuple[str, ...]:
  """A word in small letters and with a capital one, each with and without a space before it."""
  return tuple(space + form for space in ("", " ") for form in dict.fromkeys((word.lower(), word.capitalize())))


def answer_choices(answer: str) -> tuple[Choices, int]:
  """(choices, index of `answer` among them): yes and no, or the numbers from zero to ten as words and as digits.

  Raises:
    ValueError: another answer.
  """
  plain = answer.strip().lower()
  if plain in YES_NO:
    return tuple(map(ways_to_write, YES_NO)), YES_NO.index(plain)
  number = NUMBERS.index(plain) if plain in NUMBERS else int(plain) if plain.isascii() and plain.isdigit() else len(NUMBERS)
  if number >= len(NUMBERS):
    raise ValueError(f"the expected answer {answer!r} is neither yes nor no nor a number from zero to ten")
  return tuple((*ways_to_write(word), str(i)) for i, word in enumerate(NUMBERS)), number


def read_prompts(path: str | pathlib.Path) -> list[Prompt]:
  """The prompts of a file, in its order.

  Raises:
    ValueError: no such file, not UTF-8, no JSON, no prompts, a field of the wrong kind, or a name that is there twice. It names file and entry.
  """
  path = pathlib.Path(path)
  prompts, seen = [], set()
  for number, entry in enumerate(_entries(path)):
    try:
      prompt = _prompt(entry, number, path.parent)
      if prompt.name in seen:
        raise ValueError(f"the name {prompt.name!r} is there twice")
    except ValueError as error:
      raise ValueError(f"Entry {number + 1} of {path}: {error}; mend or remove it.") from error
    prompts.append(prompt)
    seen.add(prompt.name)
  if not prompts:
    raise ValueError(f"{path} holds no prompts: write at least one object with the field 'prompt'.")
  return prompts


def _entries(path: pathlib.Path) -> list[Any]:
  text = read_text(path, "a JSON list, or JSON lines, of objects with the field 'prompt'")
  if text.lstrip().startswith("["):
    return parse_json(text, str(path))
  return [parse_json(line, f"{path}, line {number},") for number, line in numbered_lines(text)]


def _prompt(entry: Any, number: int, folder: pathlib.Path) -> Prompt:
  if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
    raise ValueError("it is no object with a text in the field 'prompt'")
  name = str(entry.get("name", entry.get("id", number)))
  if not _NAME.fullmatch(name):
    raise ValueError(f"the name {name!r} has signs other than letters, digits, - and _")
  size = tuple(entry.get(side, DEFAULT_PX) for side in ("height", "width"))
  if not all(type(px) is int and px > 0 for px in size):
    raise ValueError(f"height and width are {size[0]!r} and {size[1]!r}, and must be whole numbers of px")
  sources = entry.get("sources", [])
  if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
    raise ValueError("the field 'sources' is no list of paths")
  category = entry.get("category", f"{entry['atom_count']} atoms" if "atom_count" in entry else "")
  return Prompt(entry["prompt"], name, str(category), size, tuple(folder / source for source in sources), _questions(entry))


def _questions(entry: dict[str, Any]) -> tuple[Question, ...]:
  found = entry.get("questions", entry.get("vqa_list", []))
  is_pair = lambda one: isinstance(one, list) and len(one) == 2 and all(isinstance(text, str) for text in one)
  if not isinstance(found, list) or not all(map(is_pair, found)):
    raise ValueError("the field 'questions' is no list of [question, expected answer]")
  skills = entry.get("skills", [""] * len(found))
  if not isinstance(skills, list) or len(skills) != len(found):
    raise ValueError(f"there must be a skill for each of the {len(found)} questions")
  return tuple(Question(text, *answer_choices(answer), str(skill)) for (text, answer), skill in zip(found, skills))
