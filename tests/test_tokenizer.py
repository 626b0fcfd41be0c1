"""Templates as published, ids that lose nothing, errors that name the prompt."""

import pickle

import numpy as np
import pytest
import tokenizers

from data_pipelines.tokenizer import SPECIAL_TOKENS, PromptTokenizer, format_prompt, train_tokenizer

CAPTIONS = ["a small red letter A on white paper", "the blue star, large, yellow background"] * 3
PROMPTS = ["", " ", 'a sign that says "OPEN"', "two\nlines", "\n\nstarts with newlines", "红色的字母 A",
           "🦊 on 🟦 paper 👩‍🚀",
           "trailing  spaces  ", "e\u0301 is not é", "tab\tand\r\nreturn", "<image1> as <vision>"]
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer(CAPTIONS, 400)


def test_text_template_is_the_published_one():
  assert format_prompt("a fox") == SYSTEM + "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n"
  assert format_prompt("") == format_prompt(" ")


def test_edit_template_is_the_published_one():
  slot = "<|vision_start|><|image_pad|><|vision_end|>"
  assert format_prompt("swap", 2) == (
      SYSTEM + f"<|im_start|>user\n<image1>{slot} <image2>{slot}swap<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_no_text_is_lost(tokenizer, prompt):
  assert tokenizer.decode(tokenizer.encode(prompt)) == format_prompt(prompt)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_ids_equal_those_of_the_raw_string(tokenizer, tmp_path, prompt, num_images):
  tokenizer.save(tmp_path / "tokenizer.json")
  plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  assert tokenizer.encode(prompt, [(1, 1)] * num_images) == plain.encode(format_prompt(prompt, num_images)).ids


@pytest.mark.parametrize("prompt", [text for text in PROMPTS if text] + ["<|vision_end|> in words <|im_end|>"])
@pytest.mark.parametrize("grids", [(), ((1, 1),), ((1, 2), (2, 1))])
def test_a_prompt_comes_back_without_its_images(tokenizer, prompt, grids):
  tokens, _ = tokenizer.encode_batch([prompt], 200, grids)
  assert tokenizer.decode_prompt(tokens[0]) == prompt
  assert len(tokenizer.encode(prompt, grids)) >= len(tokenizer.encode(prompt)) + 3 * len(grids)
  assert tokenizer.num_image_tokens(grids) == len(tokenizer.encode("", grids)) - len(tokenizer.encode(""))


def test_system_turn_is_a_prefix_of_known_length(tokenizer):
  prefix = tokenizer.encode("x")[:tokenizer.num_system_tokens]
  assert tokenizer.decode(prefix) == SYSTEM
  # im_start, system, newline, six words, full stop, im_end, newline.
  assert tokenizer.num_system_tokens == 12


def test_image_slots_hold_one_token_per_patch(tokenizer):
  ids = tokenizer.encode("swap", [(2, 3), (4, 1)])
  assert ids.count(tokenizer.image_token_id) == 10
  assert len(ids) == len(tokenizer.encode("swap", [(1, 1), (1, 1)])) + 8


def test_special_words_in_a_prompt_are_plain_text(tokenizer):
  prompt = "<|im_end|> and <|image_pad|>"
  ids = tokenizer.encode(prompt)
  assert tokenizer.image_token_id not in ids
  assert ids.count(tokenizer.encode("x")[0]) == 3  # the template's own turns
  assert tokenizer.decode(ids) == format_prompt(prompt)


def test_batch_is_padded_on_the_right(tokenizer):
  tokens, token_count = tokenizer.encode_batch(["", "a red star"], 40)
  assert tokens.dtype == token_count.dtype == np.int32 and tokens.shape == (2, 40)
  for row, prompt in enumerate(["", "a red star"]):
    assert tokens[row, :token_count[row]].tolist() == tokenizer.encode(prompt)
    assert (tokens[row, token_count[row]:] == tokenizer.pad_id).all()


def test_too_long_prompt_is_named_with_both_lengths(tokenizer):
  with pytest.raises(ValueError, match=r"'a red star' has \d+ tokens .* 12 of the bucket"):
    tokenizer.encode_batch(["a red star"], 12)


@pytest.mark.parametrize("grids", [(), ((2, 1),)])
def test_too_long_a_text_is_cut_at_its_end_and_nothing_around_it(tokenizer, grids):
  whole, empty, reply = tokenizer.encode("a red star on white", grids), tokenizer.encode("", grids), tokenizer.encode("")[-3:]
  length = len(whole) - 2
  (tokens,), (count,) = tokenizer.encode_batch(["a red star on white"], length, grids, truncate=True)
  end = len(whole) - len(tokenizer._reply)
  assert count == length and tokens.tolist() == whole[:end - 2] + whole[end:] and tokens[-3:].tolist() == reply
  assert "a red star on white".startswith(tokenizer.decode_prompt(tokens)) and 5 < len(tokenizer.decode_prompt(tokens)) < 19
  with pytest.raises(ValueError, match="more than the"):  # the template does not fit
    tokenizer.encode_batch(["a red star"], len(empty) - 2, grids, truncate=True)


def test_training_is_deterministic_and_bounded():
  first, second = train_tokenizer(CAPTIONS, 300), train_tokenizer(CAPTIONS[::-1], 300)
  assert pickle.dumps(first) == pickle.dumps(second)
  assert first.vocab_size <= 300
  with pytest.raises(ValueError, match="vocab_size=100 is below 264"):
    train_tokenizer(CAPTIONS, 100)


def test_special_tokens_have_ids_and_files_round_trip(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "tokenizer.json")
  for path in (tmp_path, tmp_path / "tokenizer.json"):
    loaded = PromptTokenizer.load(path)
    assert loaded.encode("a red star") == tokenizer.encode("a red star")
  assert tokenizer.decode([tokenizer.pad_id]) == SPECIAL_TOKENS[0]
  assert pickle.loads(pickle.dumps(tokenizer)).encode("猫") == tokenizer.encode("猫")


def test_bad_files_are_named(tmp_path):
  with pytest.raises(ValueError, match="No tokenizer at .*nowhere"):
    PromptTokenizer.load(tmp_path / "nowhere")
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="is not a tokenizer.json"):
    PromptTokenizer.load(tmp_path)
  tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match=r"has no token <\|endoftext\|>"):
    PromptTokenizer.load(tmp_path)
