"""Texts set in type: order, breaks, layout and contrast on hand-made cases; properties of whatever is set."""

import functools
import gzip
import itertools
import unicodedata

import hypothesis
import numpy as np
import pytest
from bidi import get_display
from hypothesis import strategies as st

from benchmarks import text_rendering
from data_pipelines.text_rendering import breaking, colours, corpora, drawing, fonts, languages, layout, shaping, words

LANGUAGES = ("en", "de", "ru", "el", "ar", "he")  # Matplotlib's DejaVu has all of their letters
MONO_EM = 1233 / 2048  # how wide each letter of DejaVu Sans Mono is
NASTY = ("e\u0301\u0323\u0302", "👩‍👩‍👧‍👦", "🇩🇪", "a\u200bb\u200dc", "\u202eabc\u202c", "\x00\x07", "W" * 300, "", " \u00a0 ",
         "\ufeffx", "1\u0660\u06f0", "שלום abc 123",
         "ffi\u00adffl", "\u0301", "\U000e0001", "\ud83d", "ا\u0654\u0651", "क्\u200dष", "x\u2028y", "\u115f\u1160", "０", "…—–‐")
nasty = st.lists(st.sampled_from(NASTY) | st.text(max_size=12), min_size=1, max_size=5).map(" ".join)


@functools.cache
def faces():
  return {face.name: face for face in fonts.find_faces(())}


def typeface(*names):
  return fonts.Typeface(tuple(faces()[name] for name in names or ("DejaVu Sans Book",)))


def style(code="en", name="DejaVu Sans Book", **options):
  return layout.Style(typeface(name, "DejaVu Sans Book"), languages.load(code), options.pop("leading", 1.3), **options)


def overlap(first, second):
  return min(first[2], second[2]) - max(first[0], second[0]) > 0 and min(first[3], second[3]) - max(first[1], second[1]) > 0


# ---- colours ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second, ratio", [
    ((0, 0, 0), (255, 255, 255), 21.0), ((9, 9, 9), (9, 9, 9), 1.0), ((255, 255, 255), (119, 119, 119), 4.48),
    ((255, 0, 0), (255, 255, 255), 4.0), ((0, 0, 255), (255, 255, 255), 8.59)])
def test_contrast_is_that_of_wcag(first, second, ratio):
  assert colours.contrast(first, second) == colours.contrast(second, first) == pytest.approx(ratio, abs=0.005)


def test_inks_can_be_read_on_their_paper():
  for number in range(300):
    rng = np.random.default_rng(number)
    paper = drawing.make_paper(rng, 16, 24)
    _, rgb, ratio = colours.draw_ink(rng, paper.extremes)
    pixels = np.asarray(paper.picture).reshape(-1, 3)
    ends = pixels[pixels.sum(1).argmin()], pixels[pixels.sum(1).argmax()]
    assert ratio >= colours.CONTRAST and min(colours.contrast(rgb, pixel) for pixel in ends) > ratio - 0.35


# ---- order and breaks ---------------------------------------------------------------------------------


def test_levels_of_mixed_text():
  assert shaping.levels("abc", False) == [0, 0, 0]
  assert shaping.levels("אב 12 ab", True) == [1, 1, 1, 2, 2, 1, 2, 2]
  assert shaping.levels("ab אב", False) == [0, 0, 0, 1, 1]


def test_right_to_left_text_is_drawn_in_the_order_of_the_bidirectional_algorithm():
  face = faces()["DejaVu Sans Book"]
  for text in ("אבג 123 דה", "שלום abc עולם", "מחיר: 45% ל־3"):
    line = shaping.set_line(text, typeface(), "he", True)
    assert [glyph.number for glyph in line.glyphs] == [face.font.get_nominal_glyph(ord(c)) for c in get_display(text, base_dir="R")]
    assert all(a.x <= b.x for a, b in itertools.pairwise(line.glyphs))
  brackets = shaping.set_line("(אב)", typeface(), "he", True).glyphs  # which open towards what they hold
  assert [brackets[0].number, brackets[-1].number] == [face.font.get_nominal_glyph(ord(c)) for c in "()"]


def parts(text, code, breaks="anywhere"):
  return [text[piece.begin:piece.end] + "-" * piece.hyphen for piece in breaking.pieces(text, languages.load(code), breaks)]


@pytest.mark.parametrize("code, text, breaks, expected", [
    ("en", "a well-known 10-12 case", "anywhere", ["a", "well-", "known", "10-12", "case"]),
    ("de", "Leuchtturmwärter", "hyphenated", ["Leucht-", "turm-", "wär-", "ter"]),
    ("de", "DAMPFSCHIFF Öl", "hyphenated", ["DAMPFSCHIFF", "Öl"]),
    ("fr", "rouge\u00a0; bleu", "anywhere", ["rouge\u00a0;", "bleu"]),
    ("ja", "「あ」、っい。ABC", "anywhere", ["「あ」、っ", "い。", "ABC"]),
    ("zh-Hans", "价格¥25，好", "anywhere", ["价", "格", "¥25，", "好"]),
    ("ja", "焼きたてのパン", "phrases", ["焼きたての", "パン"]), ("zh-Hant", "會議：1993年", "phrases", ["會議：", "1993年"]),
    ("th", "คนทำขนมปังรู้เวลา", "anywhere", ["คน", "ทำ", "ขนมปัง", "รู้", "เวลา"]),
    ("en", "no break here", "never", ["no break here"])])
def test_lines_may_end_where_the_language_allows(code, text, breaks, expected):
  assert parts(text, code, breaks) == expected


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(nasty, st.sampled_from(languages.codes()), st.sampled_from(("anywhere", "hyphenated")))
def test_pieces_and_spaces_are_the_text(text, code, breaks):
  text = words.clean(text).replace("\n", " ").strip()
  pieces = breaking.pieces(text, languages.load(code), breaks)
  assert "".join(text[one.begin:one.next] for one in pieces) == text
  assert not any(text[one.end:one.next].strip(" ") for one in pieces)


# ---- layout -------------------------------------------------------------------------------------------


def lines(setting):
  return [one.line.text for one in setting.placed]


def test_lines_are_as_full_as_they_can_be_and_the_size_as_large():
  mono = style(name="DejaVu Sans Mono Book", align="justified")
  found = layout.fit(["aaaa bbbb cc dddd"], mono, 9.05 * MONO_EM * 20, 1000, (20, 20.001))
  assert lines(found) == ["aaaa bbbb", "cc dddd"]
  stretched, last = (one.line.advance for one in found.placed)
  assert stretched == pytest.approx(9.05 * MONO_EM, rel=1e-3) and last == pytest.approx(7 * MONO_EM)
  grown = layout.fit(["aaaa"], style(name="DejaVu Sans Mono Book"), 100, 1000, (5, 500))
  assert grown.size == pytest.approx(100 / (4 * MONO_EM), rel=0.02)
  assert layout.fit(["aaaa"], mono, 30, 1000, (20, 40)) is None


def test_ragged_lines_are_balanced():
  mono = style(name="DejaVu Sans Mono Book")
  assert lines(layout.fit(["aa bb cc d eee f"], mono, 10.1 * MONO_EM * 20, 1000, (20, 20.001))) == ["aa bb cc", "d eee f"]


@pytest.mark.parametrize("align, rtl, share", [
    ("start", False, 0.0), ("middle", False, 0.5), ("end", False, 1.0), ("start", True, 1.0), ("end", True, 0.0)])
def test_lines_begin_where_their_language_says(align, rtl, share):
  found = layout.fit(["אב" if rtl else "ab"], style("he" if rtl else "en", align=align), 200, 100, (20, 20.001))
  assert found.placed[0].x == pytest.approx(share * (200 - found.placed[0].line.advance * found.size), abs=0.01)


def test_columns_share_their_base_lines():
  found = layout.fit(["one two three four five six seven eight nine ten " * 2], style(columns=2), 300, 400, (12, 18))
  middle = len(found.placed) - len(found.placed) // 2
  assert [one.y for one in found.placed[middle:]] == [one.y for one in found.placed[:len(found.placed) - middle]]
  assert max(found.box(one)[2] for one in found.placed[:middle]) < min(found.box(one)[0] for one in found.placed[middle:])


texts = st.sampled_from(LANGUAGES).flatmap(lambda code: st.tuples(st.just(code), st.lists(
    st.sampled_from(languages.load(code).sentences) | st.sampled_from(languages.load(code).words), min_size=1, max_size=3)))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(texts, st.sampled_from(("DejaVu Sans Book", "DejaVu Serif Bold Italic", "DejaVu Sans Mono Book")),
                  st.sampled_from(layout.ALIGNMENTS), st.integers(1, 2), st.integers(120, 500), st.integers(60, 400),
                  st.floats(1.0, 1.7), st.sampled_from(("anywhere", "hyphenated")))
def test_whatever_is_set_lies_in_its_frame_and_no_lines_overlap(text, face, align, columns, width, height, leading, breaks):
  code, paragraphs = text
  found = layout.fit(paragraphs, style(code, face, align=align, columns=columns, leading=leading, breaks=breaks), width, height, (8, 40))
  if found is None:
    return
  boxes = [found.box(one) for one in found.placed]
  slack = 0.26 * found.size  # of slanted letters, which reach into the margin
  assert all(b[0] >= -slack and b[1] >= -1e-6 - slack and b[2] <= width + slack and b[3] <= height + slack for b in boxes)
  assert not any(overlap(*pair) for pair in itertools.combinations(boxes, 2))
  assert 8 <= found.size <= 40
  assert "".join("".join(lines(found)).replace("-", "").split()) == "".join("".join(paragraphs).replace("-", "").split())


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(texts, st.floats(9, 40))
def test_ink_boxes_are_those_of_the_pixels(text, size):
  code, paragraphs = text
  found = layout.fit(paragraphs[:1], style(code, breaks="never"), 3900, 100, (size, size + 0.01)).moved(20.3, 10.7)
  rows, columns = np.nonzero(drawing.coverage(found, (0, 0, 4000, 120)))
  seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
  assert np.abs(np.array(seen) - found.ink).max() <= 1.0
  assert all(np.floor(found.ink[:2]) <= seen[:2]) and all(np.ceil(found.ink[2:]) >= seen[2:])


# ---- what can go wrong --------------------------------------------------------------------------------


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(nasty, st.sampled_from(LANGUAGES))
def test_no_text_is_drawn_with_a_missing_glyph(text, code):
  text = words.clean(text).replace("\n", " ").strip()
  assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in text)
  own = style(code)
  if not text or not own.typeface.covers(text):
    return
  found = layout.fit([text], own, 400, 300, (6, 30))
  assert found is None or all(glyph.number for one in found.placed for glyph in one.line.glyphs)


def test_what_no_one_would_write_is_set_or_left_out():
  outcomes = text_rendering.survey(150, LANGUAGES, ())
  assert outcomes.total() == 150 and set(outcomes) == {"empty", "left out", "too long", "set"} and min(outcomes.values()) > 3


def test_joiners_have_the_level_of_what_is_before_them():
  assert shaping.levels("می\u200cخواهم ab\u200d", True) == [1] * 9 + [2] * 3
  assert shaping.levels("\u200cاب", True) == [1, 1, 1]


def test_a_language_without_a_font_is_one_sentence_with_the_package():
  bundled = fonts.find_faces(())
  with pytest.raises(ValueError, match=r"No font of this machine has all characters of Thai \(th\): apt-get install fonts-noto-core"):
    fonts.typefaces(bundled, languages.load("th"))
  assert {one.main.family for one in fonts.typefaces(bundled, languages.load("ru"))} >= {"DejaVu Sans", "DejaVu Serif"}


def test_a_character_that_no_face_has_is_refused():
  with pytest.raises(ValueError, match=r"has the character U\+4E2D"):
    shaping.set_line("中", typeface(), "en")


def test_a_users_texts_are_kept_or_counted(tmp_path):
  path = tmp_path / "own.txt"
  path.write_text("One line\nand another.\n\nA second \"paragraph\".\n\n\n中文 among Latin.\n", encoding="utf-8")
  kept, left_out = corpora.read_texts(str(path), typeface().covers)
  assert kept == ("One line and another.", "A second ”paragraph”.") and left_out == 1
  with pytest.raises(ValueError, match="Cannot read the texts"):
    corpora.read_texts(str(tmp_path / "none.txt"), typeface().covers)


MANUAL = r""".\" A comment
.TH glob 7 2023
.SH NAME
glob \- short
.PP
Long ago, in UNIX\ V6, there was
.BR sh (1)
and a \[aq]program\[aq] \(em with \fIpatterns\fP.
.nf
int main(void) of an example that is long enough;
.fi
.PP
What has \[zz] is not understood by anyone here.
.PP
See http://example.org/a/very/long/address/that/no/line/holds now.
"""
FORTUNES = """A first one
of two lines.
\t\t-- N. N.
%
%
/\\__/\\ ~~~ === +++ *** ||| ### a cat
%
_\bUnder_\blined \x1b[32mwords\x07\x1b[m are plain here.
%
中文的
  第二行没有空格，而且不太短也不太长。
%
A first one
of two lines.
\t\t-- N. N.
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
  files = {"usr/share/games/fortunes/de/x": FORTUNES.encode(), "usr/share/games/fortunes/de/off/y": b"Something that is not shown to all.",
           "usr/share/games/fortunes/de/x.dat": b"\0\1 no text at all, but an index",
           "usr/share/games/fortunes/de/z": "Größe in einem alten Satz".encode("latin1"),
           "usr/share/man/man7/glob.7.gz": gzip.compress(MANUAL.encode()), "usr/share/doc/x/README": b"Of no kind that is read by anyone."}
  for name, data in files.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  info = tmp_path / "var/lib/dpkg/info"
  info.mkdir(parents=True)
  (info / "some-texts.list").write_text("/.\n" + "".join(f"/{name}\n" for name in files))
  (info / "stripped:amd64.list").write_text("/usr/share/man/man7/gone.7.gz\n")
  monkeypatch.setattr(corpora, "ROOT", tmp_path)
  return tmp_path


def test_texts_of_a_package_are_cleaned(packages):
  kept, left_out = corpora.read_texts("debian:some-texts", typeface().covers)
  assert kept == ("A first one of two lines. — N. N.", "Underlined words are plain here.",
                  "Long ago, in UNIX\u00a0V6, there was sh(1) and a 'program' — with patterns.") and left_out == 1
  assert "中文的第二行没有空格，而且不太短也不太长。" in corpora.read_texts("debian:some-texts", len)[0]
  (packages / "own.txt").write_text("Mine.", encoding="utf-8")
  assert corpora.read_texts(("debian:some-texts", str(packages / "own.txt")), typeface().covers)[0] == (*kept, "Mine.")


@pytest.mark.parametrize("name, sentence", [
    ("none", "is not on this machine: apt-get install none"), ("../x", "is not on this machine"), ("stripped", "has no fortunes, manual pages or")])
def test_a_package_without_texts_is_refused(packages, name, sentence):
  with pytest.raises(ValueError, match=sentence):
    corpora.read_texts(f"debian:{name}", typeface().covers)


@pytest.mark.parametrize("code", languages.codes())
def test_every_language_says_all_there_is_to_say(code):
  language = languages.load(code)
  assert set(language.colours) == set(colours.RGB) and len(language.places) == 9
  rng = np.random.default_rng(0)
  for pattern in language.patterns:
    assert words.Corpus(language).figures(rng) and "{}" not in pattern
  assert not any('"' in text for text in (*language.words, *language.headings, *language.sentences, *language.patterns))


def test_texts_are_spelt_as_they_are_set():
  greek = words.Corpus(languages.load("el"))
  drawn = {greek.word(np.random.default_rng(number)) for number in range(200)}
  assert "ΒΙΒΛΙΟΘΗΚΗ" in drawn and "Βιβλιοθήκη" in drawn
  assert not any("\u0301" in unicodedata.normalize("NFD", word) for word in drawn if word.isupper())
  for number in range(50):
    found = words.Corpus(languages.load("pl")).paragraphs(np.random.default_rng(number), 3, 90, figures=False)
    sentences = [text + "." for paragraph in found for text in paragraph.rstrip(".").split(". ")]
    assert len(set(sentences)) == len(sentences) and set(sentences) <= set(languages.load("pl").sentences) and len(found) == 3
  assert words.clean("a\u00adb\u200f  c\x07\r\nd\u2009e") == "ab c\nd e"
