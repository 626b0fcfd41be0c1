"""What one record of a source says about a picture: a row of a table, the JSON file beside a picture, or a member of a tar.

The keys of a record; all but a picture and a text may be left out:

  image        a path, or bytes, or {"bytes": ..., "path": ...}, where bytes are base64 text in JSON; see `IMAGES` for its other names
  caption      text, or a list of texts; also called text, prompt. Where there is none, `tags` (a text, or a list of them) is the caption, too
  captions     a list of texts or of {"text", "language", "kind"}
  language     of the captions that name none, "en"
  kind         of the captions that name none, "general"
  sources      the condition images of an edit in prompt order, each like `image`; or one of them. Also called control_image(s), edit_image(s) and
               so on, see `_CONDITION`, or numbered: control_image_1, control_image_2
  rejected     the worse picture of a pair, like `image`, which is then the better one, also called chosen or chosen_image; also called
               rejected_image, rejected_path; or both as two pictures and what they are worth, see `_PAIRS`
  instruction  the text of an edit; also called edit_prompt, edit_instruction
  quality      0 to 1
  attributes   an object; keys that are not in this list are added to it

A caption that is an object without `text` is structured (its kind, unless it says another), and is flattened: `key: value`, in the order of the
record, joined by "; ". Underscores of keys are spaces, the values of a list are joined by ", ", an inner object stands in brackets, and what is empty
is left out: {"subject": "a cat", "colours": ["red", "white"], "light": {"from": "left"}} is

  subject: a cat; colours: red, white; light: (from: left)
"""

import base64
import contextlib
import json
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from data_pipelines.curation.reading import NeedsAnswer, Reading
from data_pipelines.curation.sample import Caption, Sample
from data_pipelines.records import KINDS

CHOSEN = ("chosen", "chosen_image", "chosen_path")
IMAGES = ("image", "target", "image_bytes", "bytes", "image_path", "file_name", "image_file_name", "path", "target_image", "target_img",
          "edited_image", "output_image", *CHOSEN)
REJECTED = ("rejected", "rejected_image", "rejected_path")
TEXTS = ("caption", "text", "prompt")
INSTRUCTIONS = ("instruction", "edit_prompt", "edit_instruction")
# (two pictures, what each is worth) in the columns of data sets of preferences: Pick-a-Pic, HPDv2 (both in lists), HPDv3 (the first is the better)
_PAIRS = ((("jpg_0", "jpg_1"), ("label_0", "label_1")), (("image_path",), ("human_preference",)), (("path1", "path2"), ()))
PICTURES_OF_PAIRS = tuple(name for names, _ in _PAIRS for name in names)
_BYTES_COLUMNS = ("image_bytes", "bytes")
# Not `source` or `source_path`: they tell where a picture comes from.
_CONDITION = re.compile(r"sources|(?:(?:source|control|edit|condition|conditioning|input|original|reference|ref)_(?:image|img)s?|"
                        r"control_paths?|(?:source|control)_file_names?)(?P<number>_?[0-9]+)?")


def is_condition(name: str) -> bool:
  """Whether a key names condition images."""
  return bool(_CONDITION.fullmatch(name))


def guarded(key: str, make: Callable[..., Sample], *arguments) -> Sample:
  """Returns make(key, *arguments), or a sample with the reason if that is a `ValueError`: one bad record must not stop the others.

  Raises:
    NeedsAnswer: the user has to say how the source is read.
  """
  try:
    return make(key, *arguments)
  except NeedsAnswer:
    raise
  except RecursionError:
    return Sample(key, error="The record is nested too deeply to be read: flatten it or remove it.")
  except ValueError as error:
    return Sample(key, error=" ".join(str(error).split()))


def parse_object(data: bytes, name: str) -> dict[str, Any]:
  """Returns the JSON object in a file or a line; `ValueError` that names it unless it holds one, in UTF-8."""
  try:
    value = json.loads(parse_text(data, name))
  except json.JSONDecodeError as error:
    raise ValueError(f"{name} is not valid JSON ({error}): mend it or remove it.") from error
  if not isinstance(value, dict):
    raise ValueError(f"{name} holds a {type(value).__name__} instead of a JSON object: write {{\"image\": ..., \"caption\": ...}}.")
  return value


def parse_text(data: bytes, name: str) -> str:
  """Returns the text in a file; `ValueError` that names it unless it is UTF-8."""
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{name} is not UTF-8: save it in that encoding.") from error


def in_prompt_order(numbered: Iterable[tuple[str, Any]]) -> list:
  """Returns the values by number; "" counts as 0, and the first is 0 or 1. `ValueError` if a number is there twice or missing."""
  places = {}
  for digits, value in numbered:
    number = int(digits or 0)
    if number in places:
      raise ValueError(f"There are two condition images number {number}: number them 1, 2 and so on.")
    places[number] = value
  for number in range(1, max(places, default=0)):
    if number not in places:
      raise ValueError(f"Condition image number {max(places)} is there and number {number} is not: add it, or number them 1, 2 and so on.")
  return [places[number] for number in sorted(places)]


def record_sample(key: str, record: dict[str, Any], read: Callable[[str], bytes], reading: Reading, image: bytes | None = None, name: str = "",
                  sources: Sequence[bytes] = (), texts: Iterable[str] = (), rejected: bytes = b"") -> Sample:
  """Returns the sample that a record describes; `ValueError` in one sentence if it does not describe one.

  `read` opens the paths in the record. `image` with its file name, `sources`, `texts` and `rejected` come from files beside the record: the picture,
  the condition images, further captions, and the rejected picture.
  """
  record = in_order({name: value for name, value in record.items() if value is not None and value != ""})
  is_pair = any(name in record for name in CHOSEN)
  if image is None:
    image, name = _image(record, read)
  rejected = _rejected(record, read, rejected)
  if is_pair and not rejected:
    raise ValueError(f"The pair has no rejected picture: name it in `{REJECTED[0]}`, or call the chosen one `image` if it is no pair.")
  if rejected and image == rejected:
    raise ValueError("The chosen and the rejected picture of the pair are the same: name two pictures, or remove the record.")
  conditions = _conditions(record)
  if conditions and sources:
    raise ValueError("The condition images are given twice, in the record and as files beside the picture: remove one of the two.")
  instruction = next((name for name in INSTRUCTIONS if name in record), "")
  if not conditions and not sources and (instruction or conditions is not None):
    raise ValueError("The edit has no condition image: " + (f"name it in `sources`, or call the text `caption` in place of `{instruction}`."
                     if instruction else "its list is empty; name them, or leave the key out if it is no edit."))
  sources = [_filled(data) for data in sources] or [_payload(value, read)[0] for value in conditions or ()]
  captions = _captions(record, texts, instruction if sources else "")
  if not captions:
    captions = _captions_otherwise(record, name, reading)
  quality, attributes = _quality(record.pop("quality", 1.0)), record.pop("attributes", {})
  if not isinstance(attributes, dict):
    raise ValueError(f"`attributes` is {short(attributes)} instead of an object: write {{\"name\": value}}.")
  twice = [name for name in attributes if name in record and attributes[name] != record[name]]
  if twice:
    raise ValueError(f"`{twice[0]}` is given twice, in the record and in its `attributes`: rename one of them.")
  return Sample(key, _filled(image), captions, sources, _plain(attributes | record), quality, rejected=rejected)


def in_order(record: dict[str, Any]) -> dict[str, Any]:
  """Returns a record in which two pictures and what they are worth (`_PAIRS`) have become `chosen` and `rejected`; any other as it is.

  Raises:
    ValueError: not two pictures with a number each, two that are worth the same, or a further picture beside them.
  """
  for names, labels in _PAIRS:
    if not all(name in record for name in (*names, *labels)):
      continue
    what = f"`{'`, `'.join((*names, *labels))}`"
    if more := next((name for name in (*IMAGES, *REJECTED) if name in record and name not in names), ""):
      raise ValueError(f"The record names `{more}` beside the pair of {what}: remove the one or the other.")
    values, worth = ([record[name] for name in some] for some in (names, labels or names))
    if len(names) == 1:
      values, worth = values[0], worth[0]
    if not labels:
      worth = [1, 0]
    if not isinstance(values, list) or not isinstance(worth, list) or len(values) != 2 or len(worth) != 2:
      raise ValueError(f"A pair of {what} is two pictures and two numbers: of more pictures write the best and the worst as `chosen` and `rejected`.")
    try:
      worth = [float(one) for one in worth]  # texts in a CSV file
    except (TypeError, ValueError):
      worth = [math.nan] * 2
    if not all(map(math.isfinite, worth)):
      raise ValueError(f"The pictures of a pair of {what} are worth what is no number: write two, of which the larger is the better picture's.")
    if worth[0] == worth[1]:
      raise ValueError(f"The two pictures of the pair are worth the same, {worth[0]:g}: nothing says which is better, so remove the record.")
    better = int(worth[1] > worth[0])
    left = {name: value for name, value in record.items() if name not in (*names, *labels)}
    return left | {CHOSEN[0]: values[better], REJECTED[0]: values[1 - better]}
  return record


def picture_paths(record: dict[str, Any]) -> tuple[list[str], list[str]]:
  """Returns the paths of the picture, and of the condition images and the rejected picture, that a record names; none for what it does not name by a
  path."""
  with contextlib.suppress(ValueError):  # its own sample will say why
    record = in_order(record)
  name = next((name for name in IMAGES if record.get(name)), None)
  images = [] if name is None or name in _BYTES_COLUMNS else [record[name]]
  conditions = [*(_conditions(dict(record)) or []), *(record[name] for name in REJECTED if name in record)]
  return tuple([one for one in map(_path, some) if isinstance(one, str)] for some in (images, conditions))


def _path(value: Any) -> Any:
  return value.get("path") if isinstance(value, dict) and not value.get("bytes") else value


def _image(record: dict, read: Callable) -> tuple[bytes, str]:
  """The picture and its file name, "" if it has none; its key leaves the record."""
  if "image" in record and "target" in record:
    raise ValueError("The record has both `image` and `target`: name the edited picture `target` and the others `sources`.")
  name = next((name for name in IMAGES if name in record), None)
  if name is None:
    raise ValueError(f"The record names no picture: add one of {', '.join(IMAGES)}.")
  value = record.pop(name)
  return _payload({"bytes": value} if name in _BYTES_COLUMNS else value, read)


def _rejected(record: dict, read: Callable, beside: bytes) -> bytes:
  """The rejected picture of a pair, b"" if it is none; its key leaves the record."""
  names = [name for name in REJECTED if isinstance(record.get(name), (str, bytes, dict))]
  if len(names) + bool(beside) > 1:
    raise ValueError("The rejected picture is given twice: remove one of them.")
  return _payload(record.pop(names[0]), read)[0] if names else beside


def _conditions(record: dict) -> list | None:
  """The condition images, in prompt order, whose keys leave the record; None if it has no such key."""
  found: dict[str, list[tuple[str, Any]]] = {}
  for name in list(record):
    match = _CONDITION.fullmatch(name)
    if match and record[name] is not None and record[name] != "":
      number = (match["number"] or "").lstrip("_")
      found.setdefault(name.removesuffix(match["number"] or ""), []).append((number, record.pop(name)))
  if len(found) > 1:
    raise ValueError(f"The condition images are given twice, as {' and '.join(sorted(found))}: name all of them in one list.")
  if not found:
    return None
  (name, numbered), = found.items()
  values = in_prompt_order(numbered)
  if len(values) == 1:
    values = values[0] if isinstance(values[0], list) else values
  for value in values:
    if not isinstance(value, (str, bytes, dict)):
      raise ValueError(f"`{name}` has {short(value)} where a condition image belongs: write the paths of the condition images in brackets.")
  return values


def _payload(value: Any, read: Callable[[str], bytes]) -> tuple[bytes, str]:
  """An encoded image, given as a path, as bytes, or as {"bytes", "path"}, and its path."""
  name = value if isinstance(value, str) else value.get("path") if isinstance(value, dict) else ""
  if isinstance(value, dict):
    value = value["path"] if not value.get("bytes") and value.get("path") else _decoded(value.get("bytes"))
  if isinstance(value, str):
    value = read(value)
  if not isinstance(value, bytes):
    raise ValueError(f"A picture is given as {short(value)}: write a path, bytes, or {{\"bytes\": ..., \"path\": ...}}.")
  return _filled(value), name if isinstance(name, str) else ""


def _decoded(value: Any) -> Any:
  if not isinstance(value, str):
    return value
  try:
    return base64.b64decode(value, validate=True)
  except ValueError as error:
    raise ValueError(f"The bytes of a picture are not base64 ({error}): encode them again.") from error


def _filled(data: bytes) -> bytes:
  if not data:
    raise ValueError("A picture has 0 bytes: replace the file or remove the record.")
  return data


def _captions(record: dict, texts: Iterable[str], instruction: str) -> list[Caption]:
  """The texts, each once. Of an edit that has an instruction only that: a caption beside it describes the result, not the change."""
  language, kind = record.pop("language", "en"), record.pop("kind", "")
  names = (instruction,) if instruction else TEXTS
  entries = [entry for name in [name for name in names if name in record][:1] for entry in _list(record.pop(name))]
  entries += [] if instruction else _list(record.pop("captions", []))
  unique = {}
  for caption in (_caption(entry, language, kind) for entry in [*entries, *texts]):
    if caption.text.strip():
      unique.setdefault(caption.text, caption)
  return list(unique.values())


def _captions_otherwise(record: dict, name: str, reading: Reading) -> list[Caption]:
  """The captions of a record without any."""
  tags = record.get("tags", [])
  if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
    tags = ", ".join(tag.strip() for tag in tags if tag.strip())
  if isinstance(tags, str) and tags.strip():
    return [_caption(tags, "en", "")]
  if reading.uncaptioned == "keep":
    return []
  words = posixpath.splitext(posixpath.basename(name))[0].replace("_", " ").strip()
  if reading.uncaptioned == "file_name" and words:
    return [_caption(words, "en", "")]
  raise ValueError("The picture has no caption" + (" and no file name" if reading.uncaptioned == "file_name" else "") + ": write one or remove the "
                   "picture; --uncaptioned=file_name takes the file names, --uncaptioned=keep keeps such pictures for a VAE.")


def _list(value: Any) -> list:
  return value if isinstance(value, list) else [value]


def _caption(entry: Any, language: Any, kind: Any) -> Caption:
  entry = {"text": entry} if isinstance(entry, str) else entry
  if not isinstance(entry, dict):
    raise ValueError(f"A caption is {short(entry)}: write a text or {{\"text\": ..., \"language\": ..., \"kind\": ...}}.")
  text, usual = entry.get("text", entry), "general"
  if isinstance(text, dict):
    text, usual = _flat(text), "structured"
  if not isinstance(text, str):
    raise ValueError(f"The text of a caption is {short(text)}: write a text.")
  own = entry if "text" in entry else {}
  caption = Caption(text, own.get("language") or language, own.get("kind") or kind or usual)
  if caption.kind not in KINDS:
    raise ValueError(f"The kind of a caption is {short(caption.kind)}: choose one of {', '.join(KINDS)}.")
  if not isinstance(caption.language, str):
    raise ValueError(f"The language of a caption is {short(caption.language)}: write a code such as \"en\".")
  if "\0" in caption.text:
    raise ValueError(f"The caption {short(caption.text)} has a NUL character: remove it.")
  if any("\ud800" <= letter <= "\udfff" for letter in caption.text + caption.language):
    raise ValueError(f"The caption {short(caption.text)} is not UTF-8: save the file in that encoding.")
  return caption


def _flat(value: Any) -> str:
  """A structured caption as a text, by the rule in the module docstring."""
  if isinstance(value, dict):
    parts = [(str(name).replace("_", " "), _flat(one), isinstance(one, dict)) for name, one in value.items()]
    return "; ".join(f"{name}: ({text})" if inner else f"{name}: {text}" for name, text, inner in parts if text)
  if isinstance(value, list):
    parts = [(_flat(one), isinstance(one, dict)) for one in value]
    return ", ".join(f"({text})" if inner else text for text, inner in parts if text)
  if isinstance(value, str):
    return value.strip()
  return "" if value is None else json.dumps(value)


def _quality(value: Any) -> float:
  try:
    quality = float(value)
  except (TypeError, ValueError):
    quality = math.nan
  if not 0 <= quality <= 1:
    raise ValueError(f"`quality` is {short(value)}: write a number from 0 to 1.")
  return quality


def short(value: Any) -> str:
  """Returns a value as a sentence can show it, in ASCII and at most 80 letters."""
  text = ascii(value)
  return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: Any) -> Any:
  """The nearest thing that JSON in UTF-8 can hold."""
  match value:
    case None | bool() | int():
      return value
    case float():
      return value if math.isfinite(value) else None
    case str():
      return value.encode("utf-8", "backslashreplace").decode()
    case bytes():
      return f"{len(value)} bytes"
    case dict():
      return {_plain(str(name)): _plain(entry) for name, entry in value.items()}
    case list() | tuple():
      return [_plain(entry) for entry in value]
  return str(value)
