"""A folder for rendered text, so that a mixture names it like any other data set.

Two kinds. With a number of pictures these are stored, as those of other data sets are. Without one nothing is: the folder holds an index of slots, a
tokenizer, the settings and the user's texts, a few megabytes, and pictures are drawn when they are read (`data_pipelines.text_rendering.source`).
`dataset.json` says with which fonts; on a machine with others the folder is refused, because its pictures would be others.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import embedded, records
from data_pipelines.buckets import bucket_size
from data_pipelines.text_rendering import languages, templates
from data_pipelines.text_rendering.compositional import LEAST_EMS
from data_pipelines.text_rendering.corpora import read_texts
from data_pipelines.text_rendering.fonts import find_faces, typefaces
from data_pipelines.text_rendering.pictures import Pictures, survey
from data_pipelines.text_rendering.settings import Settings
from data_pipelines.text_rendering.source import RenderedText, WithEdits
from data_pipelines.tokenizer import PromptTokenizer, train_tokenizer
from data_pipelines.transforms import encode_png

NAME = "rendered_text"
NUM_SLOTS = {"train": 2**17, "validation": 2**10}
NUM_EDITS = {"train": 2**16, "validation": 2**10}
VOCAB_SIZE = 8192
_TRAINED_ON = 2500  # pictures whose captions a tokenizer is trained on, and half as many edits
_HELD_OUT = 25  # of stored pictures one in so many is for validation, and as many more
_TEXTS = "texts.json"
_BEFORE = {"kinds": {"pure": 1.0}, "edit_kinds": {"pure": 1.0}}  # of a folder that was prepared when there were no others


def read_settings(seed: int, texts: Mapping[str, str | Sequence[str]], **settings: Any) -> tuple[Settings, dict[str, int]]:
  """Returns (settings with the paragraphs of texts, code -> one or several names that `corpora` knows; code -> how many paragraphs no font can set).

  Raises:
    ValueError: a file or package cannot be read, or settings that make no sense.
  """
  plain = Settings(seed, texts=dict.fromkeys(texts, ()), **settings)
  faces = find_faces(plain.font_folders) if plain.font_folders else find_faces()
  kept, left_out = {}, {}
  for code, names in texts.items():
    fit = typefaces(faces, languages.load(code))
    kept[code], left_out[code] = read_texts(names, lambda text, fit=fit: all(one.covers(text) for one in fit))
  return dataclasses.replace(plain, texts=kept), left_out


def prepare(settings: Settings, out: str | os.PathLike, name: str = NAME, num_examples: int | None = None, vocab_size: int | None = None,
            tokenizer: str = "", left_out: Mapping[str, int] = {}) -> dict:
  """Returns the facts of the data set <out>/<name>, which is made unless the same one is there already.

  Args: settings; folder; name; how many training pictures to store, None for none; tokens of the tokenizer that is trained on captions, None for
  `VOCAB_SIZE`; path of one that exists, "" to train one; paragraphs that were left out, to be told.

  Raises:
    ValueError: a language has no font here, or what is there was made otherwise.
  """
  if num_examples is not None and num_examples < 1:
    raise ValueError(f"num_examples={num_examples} must be at least 1, or not given: then no pictures are stored.")
  fonts = RenderedText(settings, "train", 1).fonts
  request = {"dataset": NAME, "num_examples": num_examples, "seed": settings.seed, "vocab_size": None if tokenizer else vocab_size or VOCAB_SIZE,
             "tokenizer": PromptTokenizer.load(tokenizer).fingerprint if tokenizer else "", "settings": settings.plain(), "fonts": fonts,
             "texts": {code: [len(some), hashlib.sha256("\n".join(some).encode()).hexdigest()] for code, some in settings.texts.items()}}
  given = PromptTokenizer.load(tokenizer) if tokenizer else None
  if settings.pictures:
    request["pictures"] = Pictures.open(settings.pictures).digest
  if settings.template_folders:
    request["templates"] = templates.digest(settings.template_folders)
  facts = {"fonts": fonts, **survey_pictures(settings), **{f"left_out_{code}": number for code, number in left_out.items()}}
  if num_examples is not None:
    source = embedded.Source(lambda split, num, _: _stored(settings, split, num), request["vocab_size"] or 0, lambda: facts)
    return embedded.make(name, request, out, lambda partial: embedded.build(name, source, request, partial, given))
  return embedded.make(name, request, out, lambda partial: _endless(settings, name, request, os.path.join(partial, name), facts, given))


def survey_pictures(settings: Settings) -> dict[str, int]:
  """How many of the user's pictures can be drawn on, see `pictures.survey`; {} where there are none."""
  if not settings.pictures:
    return {}
  height, width = bucket_size(settings.base_px, settings.ratios[0])
  em = settings.min_px * min(languages.load(code).min_em for code in settings.shares)
  return survey(Pictures.open(settings.pictures), height, width, tuple(side * em for side in LEAST_EMS))


def _stored(settings: Settings, split: str, num_examples: int) -> Iterator[dict]:
  num = num_examples if split == "train" else max(1, num_examples // _HELD_OUT)
  edits = num // (2 if split == "train" else 1) if settings.edits else 0  # as in other data sets
  for source in (RenderedText(settings, split, num), RenderedText(settings, split, edits, are_edits=True)):
    for number in range(len(source)):
      record = source.record(number)
      yield record | {"image": encode_png(record["image"]), "sources": list(map(encode_png, record["sources"]))}


def _endless(settings: Settings, name: str, request: dict, folder: str, facts: dict, tokenizer: PromptTokenizer | None) -> dict:
  """Writes a data set without pictures."""
  if tokenizer is None:
    sources = RenderedText(settings, "train", _TRAINED_ON), RenderedText(settings, "train", _TRAINED_ON // 2 * bool(settings.edits), are_edits=True)
    tokenizer = train_tokenizer((text for source in sources for number in range(len(source)) for text in source.record(number)["captions"]),
                                request["vocab_size"])
  os.makedirs(folder)
  with open(os.path.join(folder, _TEXTS), "w", encoding="utf-8") as file:
    json.dump(settings.texts, file, ensure_ascii=False)
  edits = NUM_EDITS if settings.edits else dict.fromkeys(NUM_EDITS, 0)
  index = {split: _source(settings, split, num, edits[split], tokenizer).index() for split, num in NUM_SLOTS.items()}
  return records.finish(folder, name, {split: () for split in records.SPLITS}, index, tokenizer, request, facts, **{records.RENDERED: {
      "settings": settings.plain(), "edits": edits, "texts": records.checksum(os.path.join(folder, _TEXTS)), "fonts": facts["fonts"],
      **{key: request[key] for key in ("pictures", "templates") if key in request}}})


def _source(settings: Settings, split: str, num_slots: int, num_edits: int, tokenizer: PromptTokenizer) -> RenderedText | WithEdits:
  pictures = RenderedText(settings, split, num_slots, tokenizer)
  return WithEdits(pictures, RenderedText(settings, split, num_edits, tokenizer, are_edits=True)) if num_edits else pictures


def open_source(folder: str, split: str, meta: Mapping[str, Any], num_slots: int) -> RenderedText | WithEdits:
  """Returns the pictures of a split of a folder that stores none.

  Raises:
    ValueError: fonts or texts are not those that it was made with.
  """
  said = meta[records.RENDERED]
  if records.checksum(os.path.join(folder, _TEXTS)) != said["texts"]:
    raise ValueError(f"{folder}/{_TEXTS} is not the one that dataset.json beside it was written with: copy both again, or prepare the data set anew.")
  with open(os.path.join(folder, _TEXTS), encoding="utf-8") as file:
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in said["settings"].items()}
    num_edits = said.get("edits", {}).get(split, 0)  # none in a folder that was prepared when there were none
    settings = _BEFORE | settings
    settings["edit_kinds"] = settings["edit_kinds"] if settings.get("edits") else {}
    source = _source(Settings(**settings, texts=json.load(file)), split, num_slots - num_edits, num_edits, PromptTokenizer.load(folder))
  if source.fonts != said["fonts"]:
    raise ValueError(f"{folder} was prepared with other fonts than this machine has ({said['fonts']}, here {source.fonts}): install the same "
                     "packages in the same versions, or remove that folder and prepare it anew.")
  if templates.digest(source.settings.template_folders) != said.get("templates", ""):
    raise ValueError(f"{folder} was prepared with other templates than {', '.join(source.settings.template_folders)} now has: put those back, or "
                     "remove that folder and prepare it anew.")
  folder_of = source.settings.pictures
  if folder_of and Pictures.open(folder_of).digest != said["pictures"]:
    raise ValueError(f"{folder} was prepared with other pictures than {folder_of} now has: put those back, or remove {folder} and prepare it anew.")
  return source
