"""Suites of text: what the OCR reads of texts set in type, what it says of others, and prompt sets with and without mistakes."""

import json
import pickle
import sys

import numpy as np
import pytest

from qimg2.evaluation import Task, metrics_of, ocr, prompts, text_rendering, text_suites
from qimg2.evaluation.ocr import Line
from qimg2.evaluation.text import score_text

TEXTS = ["Open daily", "it's 50% off!", "Grüße"]


@pytest.fixture(scope="module")
def suite():
  return text_suites.text_suite(languages="en,de,ru", kinds="words,lines")


@pytest.fixture(scope="module")
def picture():
  return text_rendering.render(TEXTS, 384, 512)


def line(left, top, text, width=100, height=20):
  return Line(text, ((left, top), (left + width, top), (left + width, top + height), (left, top + height)), 1.0)


def test_the_ocr_reads_what_is_set_in_type(picture):
  lines = ocr.read(picture)
  assert [one.text for one in lines] == TEXTS and all(0.9 < one.confidence <= 1 for one in lines)
  left, top, right, bottom = lines[0].sides
  dark = np.argwhere(picture[:round(bottom)].min(-1) < 128)
  assert abs(left - dark[:, 1].min()) < 20 and abs(right - dark[:, 1].max()) < 20 and abs(top - dark[:, 0].min()) < 20


def test_a_blank_picture_has_no_text_and_one_of_another_kind_is_refused():
  assert ocr.read(np.full((64, 96, 3), 255, np.uint8)) == []
  with pytest.raises(ValueError, match=r"of uint8, not \[64, 96\] of float64"):
    ocr.read(np.zeros((64, 96)))


def test_what_it_cannot_read_is_known():
  assert ocr.unreadable("„Grüße“ ẞ €5 你好 œuvre žluťoučký") == "" and ocr.unreadable("Привет, Ж") == "приветж"
  assert ocr.unreadable("नी") == "नी" and ocr.unreadable("") == ""


def test_rows_and_columns_are_read_in_order():
  slide = [line(0, 0, "title", 400), line(0, 50, "a1"), line(200, 53, "b1"), line(0, 80, "a2"), line(200, 82, "b2"), line(0, 150, "foot", 400)]
  assert [one.text for one in ocr.in_reading_order(slide[::-1])] == ["title", "a1", "a2", "b1", "b2", "foot"]
  row = [line(110, 0, "two"), line(0, 4, "one"), line(0, 40, "three"), line(105, 41, "four")]  # a word space apart: no columns
  assert [one.text for one in ocr.in_reading_order(row)] == ["one", "two", "three", "four"]
  three = [line(x, y, f"{x}.{y}", 60) for y in (0, 30) for x in (200, 100, 0)]
  assert [one.text for one in ocr.in_reading_order(three)] == ["0.0", "0.30", "100.0", "100.30", "200.0", "200.30"]
  assert ocr.in_reading_order([]) == []


def test_models_that_cannot_be_used_are_named(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="OCR model nowhere.onnx is no file: give the path"):
    text_suites.text_suite(model="nowhere.onnx")
  (tmp_path / "broken.onnx").write_bytes(b"no model")
  with pytest.raises(ValueError, match="broken.onnx cannot be loaded .* give an ONNX file that is whole"):
    ocr.unreadable("a", str(tmp_path / "broken.onnx"))
  monkeypatch.setattr(ocr, "RECOGNISER", ocr.DETECTOR)  # a model without characters
  ocr.alphabet.cache_clear()
  with pytest.raises(ValueError, match="names no characters in its metadata"):
    ocr.unreadable("a")
  monkeypatch.setattr(ocr, "RECOGNISER", "gone.onnx")
  with pytest.raises(ValueError, match="OCR model gone.onnx is missing in .*: pip install --force-reinstall"):
    ocr.unreadable("a")
  monkeypatch.setitem(sys.modules, "rapidocr", None)
  with pytest.raises(ValueError, match="OCR needs the package rapidocr, .*: pip install -r requirements.txt"):
    text_suites.text_suite()


def test_a_recogniser_may_have_its_dictionary_beside_it(tmp_path, picture):
  """The one that comes with the package, without its metadata: it reads the same."""
  data = ocr._bundled(ocr.RECOGNISER).read_bytes()
  assert data.count(b"\x09character\x12") == 1
  model = tmp_path / "mine.onnx"
  model.write_bytes(data.replace(b"\x09character\x12", b"\x09something\x12"))
  with pytest.raises(ValueError, match="put PaddleOCR's dictionary beside it, a character a line, as mine.txt"):
    ocr.alphabet(str(model))
  metadata = ocr._imported("onnxruntime").InferenceSession(data, providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
  (tmp_path / "mine.txt").write_text("\n".join(metadata["character"].splitlines()[:-1]) + "\n", encoding="utf-8")
  with pytest.raises(ValueError, match="tells 18708 characters from each other, but 18707 are named: give it its own dictionary"):
    ocr.alphabet(str(model))
  (tmp_path / "mine.txt").write_text("\n".join(metadata["character"].splitlines()) + "\n", encoding="utf-8")
  assert ocr.alphabet(str(model)) == ocr.alphabet()
  assert ocr.read(picture, str(model)) == ocr.read(picture)


def test_the_first_recogniser_that_has_all_characters_reads(suite, monkeypatch):
  alphabets = {"": "open", "ru.onnx": "открытоopn", "ar.onnx": "مفتوح"}
  monkeypatch.setattr(ocr, "alphabet", lambda model="": alphabets[model])
  assert ocr.recogniser_for("open") == ("", "") and ocr.recogniser_for("открыто") == ("", "откры")
  both = "bundled+ru.onnx+ar.onnx"
  assert [ocr.recogniser_for(text, both) for text in ("open", "открыто", "مفتوح", "открыто x")] == [
      ("", ""), ("ru.onnx", ""), ("ar.onnx", ""), ("ru.onnx", "x")]
  assert ocr.recogniser_for("open", "ru.onnx") == ("ru.onnx", "e")  # without the name the package's is not asked
  read = []
  monkeypatch.setattr(ocr, "read", lambda picture, model="": read.append(model) or [line(0, 0, "открыто")])
  task = Task("", (64, 64), truth=("открыто",))
  found = text_suites.read_and_score(task, np.zeros((64, 64, 3), np.uint8), score_text, both)
  assert read == ["ru.onnx"] and found["two-sided"] == 1
  left_out = text_suites.read_and_score(task, np.zeros((64, 64, 3), np.uint8), score_text)
  assert left_out == {"error": "The OCR cannot read the characters откры of the text: give a recogniser for this script, model=bundled+FILE.onnx."}
  with pytest.raises(ValueError, match="have an empty name: give paths with"):
    ocr.recognisers("bundled+")


# The suite of our own prompts.


def test_type_is_scored_near_one_and_a_blank_picture_zero(suite, picture):
  task = next(task for task in suite.tasks(52, 0) if task.category == "en")
  perfect = suite.score(task, text_rendering.render(task.truth, *(side // 2 for side in task.size)))
  assert perfect["two-sided"] > 0.97 and perfect["two-sided words"] > 0.97 and perfect["expected"] == list(task.truth)
  blank = suite.score(task, np.full((64, 64, 3), 200, np.uint8))
  assert blank["two-sided"] == blank["words found"] == blank["matched twice"] == 0 and blank["recognised"] == [] and "error" not in blank
  assert set(metrics_of(blank)) == set(metrics_of(perfect)) == {
      one for figure in suite.figures.values() for one in (figure.numerator, figure.denominator) if one} | {"character error rate"}
  wrong = suite.score(task, picture)
  assert 0 < wrong["two-sided"] < 0.7 and wrong["recognised"] == TEXTS


def test_chinese_in_type_is_scored_near_one():
  task, = text_suites.text_suite(languages="zh", kinds="lines").tasks(1, 0)
  try:
    picture = text_rendering.render(task.truth, 512, 512)
  except ValueError as error:
    pytest.skip(str(error))
  assert text_suites.text_suite(languages="zh").score(task, picture)["two-sided"] > 0.95


def test_a_script_that_cannot_be_read_is_left_out(suite):
  task = next(task for task in suite.tasks(52, 0) if task.category == "ru")
  found = suite.score(task, np.zeros((64, 64, 3), np.uint8))
  assert list(found) == ["error"] and "give a recogniser for this script" in found["error"]


def test_the_first_tasks_of_many_are_those_of_few_and_scores_travel_to_other_processes(suite):
  many = suite.tasks(50, 3)
  assert many[:8] == suite.tasks(8, 3) != suite.tasks(8, 4) and len({task.name for task in many}) == 50
  assert suite.is_slow and pickle.loads(pickle.dumps(suite.score)).keywords == suite.score.keywords
  with pytest.raises(ValueError, match="500 prompts are asked for, but the suite has 52"):
    suite.tasks(500, 0)


def test_sizes_have_the_area_of_the_square_and_the_ratio_of_the_kind():
  for kind, (wide, high) in text_suites.RATIOS.items():
    task, = text_suites.text_suite(kinds=kind, side_px=512, by="kind").tasks(1, 0)
    height, width = task.size
    assert task.category == kind and height % 16 == width % 16 == 0
    assert width / height == pytest.approx(wide / high, rel=0.05) and height * width == pytest.approx(512 ** 2, rel=0.05)


def test_our_prompts_are_many_and_each_asks_for_its_texts():
  ours = prompts.written()
  assert len(ours) >= 200 and len({one.name for one in ours}) == len({one.prompt for one in ours}) == len(ours)
  for language in prompts.LANGUAGES:
    for kind in prompts.KINDS:
      assert len(prompts.written([language], [kind])) >= 8
  for one in ours:
    assert one.texts and all(f'"{text}"' in one.prompt for text in one.texts) and "{}" not in one.prompt
    assert all(text == text.strip() for text in one.texts)
  assert not [one.name for one in prompts.written(["en", "zh", "mixed", "de"]) if ocr.unreadable(" ".join(one.texts))]
  assert all(ocr.unreadable(" ".join(one.texts)) for one in prompts.written(["ru", "ar", "hi"]))


def test_the_digest_is_that_of_the_prompts():
  ours = prompts.written(["de"])
  assert prompts.digest(ours) == prompts.digest(prompts.written(["de"])) and len(prompts.digest(ours)) == 64
  assert prompts.digest(ours) not in (prompts.digest(ours[1:]), prompts.digest([ours[0]._replace(texts=("x",)), *ours[1:]]))


@pytest.mark.parametrize("settings, message", [
    (dict(languages="en,fr"), "no language 'fr': choose among en, zh, mixed"), (dict(kinds=""), "No kind of text prompts is chosen"),
    (dict(by="size"), "by language or by kind, not by 'size'")])
def test_settings_that_do_not_exist_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    text_suites.text_suite(**settings)


# Published sets.


def test_longtext_bench_is_read_and_scored(tmp_path, picture):
  path = tmp_path / "text_prompts.jsonl"
  rows = [{"prompt_id": 0, "prompt": "a sign", "text": ["Open DAILY its 50 Grüße", "off off"], "category": "sign", "length": "short"},
          {"prompt_id": 1, "prompt": "a label\u2028on\u0085top", "text": "x"}]
  path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8-sig", newline="")
  suite = text_suites.longtext_bench_suite(str(path))
  first, second = sorted(suite.tasks(2, 0), key=lambda task: task.name)
  assert (first.name, first.category, second.truth) == ("longtext-en-0", "sign", ("x",)) and second.prompt == rows[1]["prompt"]
  found = suite.score(first, picture)
  assert (found["units found"], found["units"]) == (6, 7)  # "off" is in the picture once
  assert suite.figures["LongText-Bench recall"].denominator == "units"


def test_cvtg_is_read_and_scored(tmp_path, picture):
  for part in prompts.CVTG_PARTS:
    (tmp_path / part).mkdir()
    for area in prompts.CVTG_AREAS:
      content = {"data_list": [{"index": index, "prompt": f"A sign 'Open daily' and 'missing {index}'"} for index in range(2)]}
      (tmp_path / part / f"{area}.json").write_text(json.dumps(content), encoding="utf-8")
  suite = text_suites.cvtg_suite(str(tmp_path))
  tasks = sorted(suite.tasks(16, 0), key=lambda task: task.name)
  assert tasks[-1].name == "CVTG-Style-5-1" and tasks[-1].category == "CVTG-Style 5" and tasks[-1].truth == ("open", "daily", "missing", "1")
  found = suite.score(tasks[-1], picture)
  assert (found["words found"], found["words"]) == (2, 4) and 2 < found["similarity"] < 3
  assert len(text_suites.cvtg_suite(str(tmp_path / "CVTG" / "3.json")).tasks(2, 0)) == 2
  (tmp_path / "CVTG" / "3.json").unlink()
  with pytest.raises(ValueError, match=r"no file of prompts .*CVTG/3.json: give CVTG-2K's folder"):
    prompts.cvtg(str(tmp_path))


@pytest.mark.parametrize("content, message", [
    ('{"prompt_id": 0, "prompt": "a"}', r"lacks the field 'text' \(.*, line 1\)"), ("{", ", line 1 is no JSON"), ("", "is empty"),
    ("[1]", "lacks the field"), ('\n{"prompt_id": 0, "prompt": "a", "text": null}', r"'text' is null \(.*, line 2\): give a file in the published"),
    ('{"prompt_id": 0, "prompt": "a", "text": [1, 2]}', r"'text' is \[1, 2\] \(.*, line 1\): it must be a text, or a list of texts"),
    ('{"prompt_id": 0, "prompt": 7, "text": "a"}', "'prompt' is 7"), (b'{"a":\n"\xfc"}', "line 2, is not UTF-8 .*: save the file as UTF-8"),
    ('{"prompt_id": 0, "prompt": "a", "text": "b"}\n' * 2, "two prompts longtext-en-0: give each its own number")])
def test_a_prompt_set_with_a_mistake_is_refused(content, message, tmp_path):
  path = tmp_path / "text_prompts.jsonl"
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match=message):
    prompts.longtext_bench(str(path), "en")
  with pytest.raises(ValueError, match="has the languages en, zh, not 'de'"):
    prompts.longtext_bench(str(path), "de")


def test_a_document_keeps_the_text_that_its_reconstruction_keeps(picture):
  half = picture.copy()
  half[:130] = 255  # without the first line
  found, kept = text_suites.document_ned(picture, half), " ".join(TEXTS[1:])
  assert found["reconstruction"] == kept and found["NED"] == pytest.approx(len(kept) / len(" ".join(TEXTS)))
  assert "no text in the original" in text_suites.document_ned(np.full((64, 64, 3), 255, np.uint8), picture)["error"]


# Type.


def test_type_says_what_it_cannot_set(tmp_path):
  with pytest.raises(ValueError, match="No font has the characters \U00010900: give a folder of fonts"):
    text_rendering.find_font("abc\U00010900", str(tmp_path))
  with pytest.raises(ValueError, match="characters do not fit on 64 x 64 px at 16 px"):
    text_rendering.render(["a long text " * 20], 64, 64)
  assert text_rendering.find_font("abc Привет").endswith("DejaVuSans.ttf")


def test_type_fills_the_picture_within_its_margins():
  for texts in (["Hi"], ["A longer text that has to be broken into several lines of type", "and a second one"]):
    picture = text_rendering.render(texts, 256, 384)
    rows, columns = np.nonzero(picture.min(-1) < 128)
    assert picture.shape == (256, 384, 3) and picture.dtype == np.uint8
    assert rows.min() >= 12 and columns.min() >= 12 and rows.max() < 244 and columns.max() < 372
