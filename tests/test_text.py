"""Scores of text: hand-made cases whose value is known, and rapidfuzz, jiwer and the published definitions computed in another way."""

import difflib
import random
from collections import Counter

import jiwer
import pytest
from rapidfuzz.distance import Indel
from rapidfuzz.distance import Levenshtein as Reference

from qimg2.evaluation import text as T
from qimg2.evaluation import text_benchmarks as B

ALPHABETS = ["abcde ", "aäßÅ é", "你好世界和平", "абвг ", "مرحبا ب"]


def random_texts(alphabet, num=40):
  rng = random.Random(0)
  some = lambda least, most: "".join(rng.choices(alphabet, k=rng.randint(least, most))).strip()
  return [(some(1, 12) or "x", some(0, 14)) for _ in range(num)]


@pytest.mark.parametrize("one, other", [
    ("e\u0301te\u0301", "été"), ("ＡＢＣ１２３！", "abc123!"), ("Straße", "STRASSE"), ("it’s", "it's"), ("“a” – b", '"a" - b'), ("ﬁne", "fine"),
    ("a\u00adb\u200dc", "abc"),
    ("a \n\t b", "a b"), ("\ufee3\ufeae\ufea3\ufe92\ufe8e", "مرحبا"), ("مـرحبا", "مرحبا"),
    ("你好。", "你好."), ("\u0928\u0940", "नी"), ("『山』", '"山"'), ("x²", "x2"), ("你 好， 世界 a b", "你好,世界a b")])
def test_forms_that_look_alike_are_one(one, other):
  assert T.normalise(one) == T.normalise(other)
  assert T.two_sided([one], [other]) == 1 and T.character_error_rate(one, other) == 0


def test_marks_that_make_another_letter_stay():
  assert T.normalise("é") != T.normalise("e") and T.normalise("नी") != T.normalise("न") and T.normalise("й") != T.normalise("и")


@pytest.mark.parametrize("text, expected", [
    ("Hello, World!", ["hello", "world"]), ("it's 50% off — now", ["it's", "50%", "off", "now"]), ("你好，世界 abc", ["你", "好", "世", "界", "abc"]),
    ("", []), ("... !", []), ("カフェ open", ["カ", "フ", "ェ", "open"]), ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]), ("(5.50 €)", ["5.50", "€"])])
def test_words(text, expected):
  assert T.words(text) == expected


@pytest.mark.parametrize("expected, lines, score", [
    (["abcd"], ["abcd"], 1), (["abcd"], [], 0), ([], [], 1), ([""], ["x"], 0), (["abcd"], ["ab"], 4 / 6), (["abcd"], ["abcd", "abcd"], 8 / 12),
    (["abcd"], ["abcdwxyz"], 8 / 12), (["abcd"], ["abcx"], 6 / 8), (["ab", "cd"], ["cd", "ab"], 1), (["ab cd"], ["abcd"], 1),
    (["你好"], ["你好你好"], 4 / 6), (["one two"], ["two", "one"], 1), (["long sentence here"], ["long", "sentence here"], 1)])
def test_the_two_sided_score_of_hand_made_cases(expected, lines, score):
  assert T.two_sided(expected, lines) == pytest.approx(score)


@pytest.mark.parametrize("lines", [["مرحبا بالعالم"], ["ملاعلاب ابحرم"], ["بالعالم", "مرحبا"], ["ملاعلاب", "ابحرم"]])
def test_right_to_left_text_counts_in_the_order_of_reading_and_of_place(lines):
  assert T.two_sided(["مرحبا بالعالم"], lines) == 1
  assert T.score_text(["مرحبا بالعالم"], lines)["word accuracy"] == 1


def test_turning_keeps_numbers_and_left_to_right_words_and_leaves_other_lines():
  assert T.turn("abc 12") == "abc 12" and T.turn(T.turn("السعر 25 ريال USB")) == "السعر 25 ريال USB"
  assert T.turn("שלום 12.50 abc") == "abc 12.50 םולש"
  assert T.turn("اَب") == "باَ"  # the mark stays behind its letter


def test_only_texts_with_right_to_left_letters_are_turned():
  assert T.two_sided(["abc"], ["cba"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_against_rapidfuzz_and_jiwer(alphabet):
  for expected, recognised in random_texts(alphabet):
    t, o = T.normalise(expected), T.normalise(recognised)
    assert T.ned(expected, recognised) == pytest.approx(1 - Reference.distance(t, o) / max(len(t), len(o)))
    assert T.character_error_rate(expected, recognised) == pytest.approx(jiwer.cer(t, o))
    assert T.character_match(expected, recognised).score == pytest.approx(Indel.normalized_similarity(t.replace(" ", ""), o.replace(" ", "")))
    asked, drawn = " ".join(T.words(expected)), " ".join(T.words(recognised))
    assert T.word_accuracy(expected, recognised) == pytest.approx(max(0, 1 - jiwer.wer(asked, drawn)))


def test_repeated_words_count_as_often_as_they_are_asked_for():
  assert T.word_match("the cat the", "the the the dog") == (2, 3, 4)
  assert T.word_match("", "a").score == 0 and T.word_match("", "").score == 1 and T.word_accuracy("", "") == 1 and T.word_accuracy("", "a") == 0
  assert T.word_accuracy("a", "a b c d") == 0 and T.character_error_rate("", "abc") == 3


def test_all_scores_of_a_picture_and_their_counts():
  found = T.score_text(["Open daily", "50% off"], ["50% off", "open dally", "open"])
  assert found["asked and drawn"] == 15 + 19 and found["matched twice"] == 28 and found["two-sided"] == pytest.approx(28 / 34)
  assert (found["words found"], found["words"]) == (3, 4) and found["two-sided words"] == pytest.approx(6 / 9)
  assert found["errors"] / found["characters"] == pytest.approx(found["character error rate"]) and found["errors"] == 6
  blank = T.score_text(["Open"], [])
  assert blank["two-sided"] == blank["NED"] == blank["words found"] == 0 and blank["character error rate"] == 1


# Published scores.


def test_longtext_keeps_some_characters_and_no_order():
  assert B.longtext_normalise("It's  50% “Crème”, Grüße\nПривет!", "en") == "its 50 crème grüe"
  assert B.longtext_normalise("你好， ABC 世 界!", "zh") == "你好ABC世界"
  assert B.longtext_recall(["The cat", "the dog"], "dog THE the the extra", "en") == (3, 4)  # extra and repeated words cost nothing
  assert B.longtext_recall(["你好你"], "你你你 x", "zh") == (2, 3)
  assert B.longtext_recall(["a"], "No text recognized.", "en") == (0, 1) and B.longtext_recall(["Привет"], "Привет", "en") == (0, 0)
  with pytest.raises(ValueError, match="one of the languages en, zh, not 'de'"):
    B.longtext_recall(["a"], "a", "de")


def test_longtext_is_the_sum_of_the_smaller_counts():
  for expected, recognised in random_texts("ab c", 20):
    one, other = (Counter(B.longtext_normalise(text, "en").split()) for text in (expected, recognised))
    assert B.longtext_recall([expected], recognised, "en") == (sum(min(other[word], num) for word, num in one.items()), sum(one.values()))


def test_an_apostrophe_shifts_the_quotes_of_cvtg():
  assert B.cvtg_words("A sign 'Open Late' and 'Café'") == ["open", "late", "café"]
  assert B.cvtg_words("It's a sign 'Open' here") == ["s", "a", "sign"]
  assert B.cvtg_words("no quotes") == []


def test_cvtg_takes_a_word_as_often_as_it_likes_and_the_closest_word():
  found = B.cvtg_match(["open", "open", "late"], ["OPEN lste", "more open"])
  assert (found.found, found.asked) == (2, 3)
  assert found.similarity == pytest.approx(2 * (1 - 0 / 4.00001) + 1 - 1 / 4.00001)
  assert B.cvtg_match(["open"], []) == (0, 1, pytest.approx(1 - 4 / 4.00001)) and B.cvtg_match([], ["x"]) == (0, 0, 0)


def test_the_closest_word_is_difflibs_and_not_that_of_fewest_edits():
  word, drawn = "abcd", ["bcda", "axcx"]
  assert Reference.distance(word, drawn[1]) <= Reference.distance(word, drawn[0])
  assert difflib.SequenceMatcher(None, word, drawn[0]).ratio() > difflib.SequenceMatcher(None, word, drawn[1]).ratio()
  assert B.cvtg_match([word], drawn).similarity == pytest.approx(1 - Reference.distance(word, "bcda") / 4.00001)


def test_omnidoc_counts_case_and_leaves_out_what_has_no_text():
  assert B.omnidoc_ned("Abc.", "abc.") == 0.75 and B.omnidoc_ned("abc", "") == 0 and B.omnidoc_ned("abc", "abc") == 1
  with pytest.raises(ValueError, match="no text in the original"):
    B.omnidoc_ned("", "x")


def test_the_reward_of_flow_grpo_pays_for_extra_text_and_ours_does_not():
  assert B.flow_grpo_target("a sign \"Open Late\" and \"Cafe\" 'x'") == "Open Late" and B.flow_grpo_target("a sign 'Open'") == "Open"
  assert B.flow_grpo_target("no quotes") == "no quotes"
  assert B.flow_grpo_reward("Open Late", "xx openlate openlate yy") == 1 and B.flow_grpo_reward("abcd", "abxd") == 0.75
  assert B.flow_grpo_reward("ab", "vwxyz") == 0 and B.flow_grpo_reward("ab", "") == 0
  with pytest.raises(ValueError, match="no text to look for"):
    B.flow_grpo_reward("  ", "a")
  assert T.two_sided(["Open Late"], ["xx openlate openlate yy"]) == pytest.approx(16 / 28)
