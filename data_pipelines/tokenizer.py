"""Prompts to token ids, in the templates of the Qwen-Image-2.x pipelines (diffusers 0.42.1).

A prompt is wrapped in three chat turns. The first, the system turn, is the same for every prompt: the network sees it,
and its `num_system_tokens` features are dropped after encoding. The wrapped string is tokenised as it stands, special
tokens included; the same words inside a user's prompt are plain text, so that no caption can close its own turn or
open an image slot.
"""

import collections
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                  "<|image_pad|>", "<|video_pad|>")
SYSTEM_PROMPT = "Comprehend and analyze the provided prompt."

_PAD, _START, _END, _VISION_START, _VISION_END, _, _IMAGE, _ = SPECIAL_TOKENS
_SYSTEM_TURN = (_START, f"system\n{SYSTEM_PROMPT}", _END, "\n")
_REPLY = (_END, "\n", _START, "assistant\n")

_PAIR = ("vocab.json", "merges.txt")  # the older form of a tokenizer.json
# Where words are cut before merging, as in Qwen's tokenizer.json.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
          r"|\s+")


def format_prompt(prompt: str, num_images: int = 0) -> str:
  """Returns the literal string that is tokenised: text to image, or editing with `num_images` condition images.

  An empty prompt becomes one space, because Qwen has no begin-of-text token to stand in for it.
  """
  return "".join(_SYSTEM_TURN + tuple(_user_turn(prompt, num_images)) + _REPLY)


def _user_turn(prompt: str, num_images: int) -> list[str]:
  """Returns the parts of the user turn: plain text at odd places, special tokens at even ones."""
  parts, text = [_START], "user\n"
  for number in range(1, num_images + 1):
    # One space between image groups, none before the instruction.
    text += f"<image{number}>" if number == 1 else f" <image{number}>"
    parts += [text, _VISION_START, "", _IMAGE, "", _VISION_END]
    text = ""
  return parts + [text + (prompt or " ")]


# How often the template counts in training, enough to rank its words among the first thousands of merges.
_TEMPLATE_COUNT = 10000


class PromptTokenizer:
  """Qwen's byte-level BPE with the templates around it. Loses no text: every byte has a token."""

  def __init__(self, tokenizer: tokenizers.Tokenizer, name: str = "tokenizer"):
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
      raise ValueError(f"{name} has no token {missing[0]}: take the tokenizer.json of a Qwen-VL model or train one.")
    # From here on special tokens inside a text are text; ours are looked up by name.
    tokenizer.encode_special_tokens = True
    self._tokenizer = tokenizer
    self._special = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    self._system = self._encode_parts(_SYSTEM_TURN, ())
    self._reply = self._encode_parts(_REPLY, ())
    self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    self.pad_id = self._special[_PAD]
    self.image_token_id = self._special[_IMAGE]
    self.num_system_tokens = len(self._system)

  @classmethod
  def load(cls, path: str) -> "PromptTokenizer":
    """Returns the tokenizer of a tokenizer.json, or of a folder that holds one, or vocab.json and merges.txt; `ValueError` if there is none."""
    path = os.fspath(path)
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(file) and all(os.path.isfile(os.path.join(path, name)) for name in _PAIR):
      return cls(_from_pair(path), path)
    if not os.path.isfile(file):
      raise ValueError(f"No tokenizer at {file}: give a tokenizer.json, or the folder of a prepared data set.")
    with open(file, "rb") as opened:
      return cls.from_bytes(opened.read(), file)

  @classmethod
  def from_bytes(cls, data: bytes, name: str = "tokenizer.json") -> "PromptTokenizer":
    """Returns the tokenizer that a tokenizer.json's bytes describe; `ValueError` if they describe none."""
    try:
      tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # The Rust library raises this bare type for every kind of broken file.
      raise ValueError(f"{name} is not a tokenizer.json ({error}): fetch it again.") from error
    return cls(tokenizer, name)

  def save(self, path: str) -> None:
    """Writes a tokenizer.json to `path`, which other libraries read too."""
    with open(path, "wb") as file:
      file.write(self.to_bytes())

  def to_bytes(self) -> bytes:
    """The content of a tokenizer.json."""
    return self._tokenizer.to_str(pretty=True).encode()

  def decode(self, tokens: Sequence[int]) -> str:
    """Returns the text of the ids, special tokens included; padding is not removed."""
    return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

  def decode_prompt(self, tokens: Sequence[int]) -> str:
    """Returns the user's text out of the ids of a whole template, padded or not, without the groups of condition images."""
    turn = [int(token) for token in tokens[self.num_system_tokens:]]
    turn = turn[:turn.index(self._special[_END])]
    images = [place for place, token in enumerate(turn) if token == self._special[_VISION_END]]
    return self.decode(turn[images[-1] + 1:]) if images else self.decode(turn[1:]).removeprefix("user\n")

  def encode(self, prompt: str, source_grids: Sequence[tuple[int, int]] = ()) -> list[int]:
    """Returns the ids of the whole template, system turn included.

    `source_grids` holds one (h, w) per condition image, in slots of the vision encoder: its image token stands h * w
    times.
    """
    return self._system + self._encode_parts(_user_turn(prompt, len(source_grids)), source_grids) + self._reply

  def encode_chat(self, user: Sequence[str | tuple[int, int]], system: str = "") -> list[int]:
    """Returns the ids of a chat in the template of Qwen3-VL's Instruct models, up to where the reply begins.

    `user` holds the parts of the user's turn in order: texts, and for each picture its (h, w) in slots of the vision encoder. There is a system turn
    unless `system` is empty.
    """
    parts, text = [], "user\n"
    for part in user:
      if isinstance(part, str):
        text += part
      else:
        parts += [text, _VISION_START, "", _IMAGE, "", _VISION_END]
        text = ""
    turns = (_START, f"system\n{system}", _END, "\n") if system else ()
    grids = [part for part in user if not isinstance(part, str)]
    return self._encode_parts((*turns, _START, *parts, text), grids) + self._reply

  def find_token(self, text: str) -> int | None:
    """Returns the id of a text that is one token by itself, None for other texts."""
    ids = self._tokenizer.encode(text, add_special_tokens=False).ids
    return ids[0] if len(ids) == 1 else None

  def count(self, prompts: Sequence[str], edit: bool = False) -> np.ndarray:
    """Returns the length of each prompt's template, int32, without what condition images add (`num_image_tokens`).

    `edit` says whether there are any: the text then stands behind them and not behind the word "user".
    """
    texts = [prompt or " " for prompt in prompts] if edit else ["user\n" + (prompt or " ") for prompt in prompts]
    empty = " " if edit else "user\n "
    around = len(self.encode("")) - len(self._tokenizer.encode(empty, add_special_tokens=False).ids)
    encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.array([around + len(one.ids) for one in encoded], np.int32)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Names the tokenizer: equal for equal files."""
    return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

  def num_image_tokens(self, source_grids: Sequence[tuple[int, int]]) -> int:
    """Returns how many tokens condition images of (h, w) slots add to a prompt, with the words around them."""
    return len(self.encode("", source_grids)) - len(self.encode(""))

  def encode_batch(self, prompts: Sequence[str], length: int,
                   source_grids: Sequence[tuple[int, int]] = (), truncate: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens B length int32, right-padded with `pad_id`; token_count B int32).

    All prompts share the source grids. A prompt that does not fit is a `ValueError`, unless `truncate` says that the end of its text is cut off; what
    stands around the text stays whole.
    """
    tokens = np.full((len(prompts), length), self.pad_id, np.int32)
    token_count = np.zeros(len(prompts), np.int32)
    for row, prompt in enumerate(prompts):
      ids = self.encode(prompt, source_grids)
      excess = len(ids) - length
      if truncate and 0 < excess < len(ids) - len(self.encode("", source_grids)):
        end = len(ids) - len(self._reply)  # the text stands before what asks for the reply
        ids = ids[:end - excess] + self._reply
      if len(ids) > length:
        raise ValueError(f"The prompt {_shorten(prompt)!r} has {len(ids)} tokens with its template, more than the "
                         f"{length} of the bucket: raise num_tokens or shorten the prompt.")
      tokens[row, :len(ids)], token_count[row] = ids, len(ids)
    return tokens, token_count

  def _encode_parts(self, parts, source_grids) -> list[int]:
    ids, grids = [], iter(source_grids)
    for place, part in enumerate(parts):
      if place % 2:
        ids += self._tokenizer.encode(part, add_special_tokens=False).ids if part else []
      else:
        height, width = next(grids) if part == _IMAGE else (1, 1)
        ids += [self._special[part]] * (height * width)
    return ids

  def __getstate__(self):
    return self._tokenizer.to_str()

  def __setstate__(self, state):
    self.__init__(tokenizers.Tokenizer.from_str(state))


def _from_pair(folder: str) -> tokenizers.Tokenizer:
  """Qwen's tokenizer from vocab.json and merges.txt, with the added tokens that tokenizer_config.json or added_tokens.json lists."""
  vocab, merges = (os.path.join(folder, name) for name in _PAIR)
  try:
    tokenizer = tokenizers.Tokenizer(models.BPE.from_file(vocab, merges))
  except Exception as error:  # The Rust library raises this bare type for every kind of broken file.
    raise ValueError(f"{vocab} and {merges} are no vocabulary and merges ({error}): fetch them again.") from error
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer, tokenizer.decoder = _splitter(), decoders.ByteLevel()
  for token, number in sorted(_added_tokens(folder).items(), key=lambda item: item[1]):
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
    if tokenizer.token_to_id(token) != number:
      raise ValueError(f"{folder} gives the added token {token} the id {number}, but after {_PAIR[0]} it would be {tokenizer.token_to_id(token)}: "
                       "the files are of different tokenizers, so fetch them again.")
  return tokenizer


def _added_tokens(folder: str) -> dict[str, int]:
  found: dict[str, int] = {}
  for name in ("added_tokens.json", "tokenizer_config.json"):
    file = os.path.join(folder, name)
    try:
      with open(file, encoding="utf-8") as opened:
        content = json.load(opened)
      if name == "tokenizer_config.json":
        content = {token["content"]: number for number, token in content.get("added_tokens_decoder", {}).items()}
      found |= {token: int(number) for token, number in content.items()}
    except FileNotFoundError:
      continue
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(f"{file} lists no added tokens ({error!r}): fetch it again.") from error
  return found


def _splitter() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PromptTokenizer:
  """Returns a byte-level BPE tokenizer with at most `vocab_size` ids, the same for the same captions in any order.

  The template is counted along with the captions, so that its words become one token each.
  """
  smallest = len(SPECIAL_TOKENS) + 256
  if vocab_size < smallest:
    raise ValueError(f"vocab_size={vocab_size} is below {smallest}, the special tokens and one id per byte: raise it.")
  counts = collections.Counter(iter(captions))  # a dict would be taken for counts
  times = min(max(2, sum(counts.values())), _TEMPLATE_COUNT)
  template = [part for part in _SYSTEM_TURN[1::2] + _REPLY[1::2] + ("user\n",) for _ in range(times)]
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = _splitter()
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  tokenizer.train_from_iterator(template + sorted(counts.elements()), trainer)
  return PromptTokenizer(tokenizer)


def _shorten(text: str, length: int = 60) -> str:
  return text if len(text) <= length else text[:length] + "..."
