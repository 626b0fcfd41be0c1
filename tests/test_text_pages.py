"""Complex pages of rendered text: every template in every language, truths that are what is drawn, and templates that are refused."""

import itertools
import json

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.text_rendering import building, complex, fonts, formulas, languages, regions, schemes, stored, templates, words
from data_pipelines.text_rendering.drawing import make_paper
from data_pipelines.text_rendering.pages import Page
from data_pipelines.text_rendering.settings import Settings

BUNDLED = ("de", "ar")  # Matplotlib's DejaVu has all of their letters
SIDE = 320


def typefaces(code, folders=fonts.FOLDERS):
  return fonts.typefaces(fonts.find_faces(folders), languages.load(code))


def page_of(code, name, num_characters=600, **settings):
  own = Settings(templates={name: 1.0}, **settings)
  return Page(words.Corpus(languages.load(code)), typefaces(code, ()), SIDE, SIDE, own, num_characters)


def drawn(code, name, seed=0, **settings):
  image, truth = complex.render(np.random.default_rng(seed), page_of(code, name, **settings))
  return image, truth, complex.captions(np.random.default_rng(seed), truth, languages.load(code))


# ---- all templates ------------------------------------------------------------------------------------


def installed():
  faces = fonts.find_faces()
  for code in languages.codes():
    try:
      yield code, fonts.typefaces(faces, languages.load(code))
    except ValueError:  # this machine has no font of the language
      pass


@pytest.mark.parametrize("name", templates.load())
def test_every_template_is_set_in_every_language(name):
  template = templates.load()[name]
  for code, some in installed():
    page = Page(words.Corpus(languages.load(code)), some, 640, 480 if template.aspect[1] < 1 else 640, Settings(min_px=6.0), 10**6)
    found = building.Builder(np.random.default_rng(0), page, 0.0).build(template.page)
    assert all(text.style.typeface.covers(one) for text in found.texts() for one in text.paragraphs), code
    assert found.height(560.0, regions.Sizes(8.0, 6.0, dict.fromkeys(building.ROLES, 0.6))) < 640, code


def overlap(first, second):
  return min(first[2], second[2]) - max(first[0], second[0]) > 1 and min(first[3], second[3]) - max(first[1], second[1]) > 1


@pytest.mark.parametrize("code", BUNDLED)
def test_truth_is_what_is_drawn(code):
  for seed, name in enumerate(templates.load()):
    image, truth, said = drawn(code, name, seed)
    if truth["layout"] == "title":  # no template of that shape
      continue
    boxes = [block["box"] for block in truth["blocks"]]
    assert all(0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE for left, top, right, bottom in boxes)
    assert not any(overlap(*pair) for pair in itertools.combinations(boxes, 2)), name
    for block in truth["blocks"]:
      left, top, right, bottom = block["box"]
      ink = np.abs(image[top:bottom, left:right].astype(int) - block["rgb"]).sum(2)
      assert block["size_px"] < 14 or ink.min() < 60, (name, block)  # smaller letters have no pixel that is wholly covered
      assert block["contrast"] >= 4.5 and all(block["text"] in caption for caption in said["captions"][1:]), (name, block)
    assert said["languages"] == ["en", "en", code]
    parts = [one for one in truth["structures"] if one["type"] == "table"]
    assert all(len({len(row) for row in one["rows"]}) == 1 for one in parts)


def test_a_page_is_a_function_of_its_generator():
  first, again, other = (drawn("en", "menu", seed)[0] for seed in (3, 3, 4))
  assert (first == again).all() and (first != other).any()


# ---- values -------------------------------------------------------------------------------------------


def chart(kind, code="en", seed=0):
  """A chart alone, its picture, and its scheme's paper."""
  rng = np.random.default_rng(seed)
  page = page_of(code, "chart")
  region = building.Builder(rng, page, 0.6).build({"chart": kind, "labels": "month", "count": [4, 4], "grow": 1})
  paper = make_paper(rng, SIDE, SIDE)
  sheet = regions.Sheet(schemes.Scheme(rng, paper), languages.load(code).is_rtl)
  sizes = complex.sizes_of(region, (20, 20, 300, 300), 8.0, 14.0)
  region.place((20, 20, 300, 300), sizes, sheet, sheet.scheme.paper)
  complex.draw(paper.picture, sheet.shapes, sheet.blocks)
  return region, np.asarray(paper.picture), sheet


def test_bars_are_as_long_as_their_values():
  for kind in ("bars", "rows"):
    boxes = []
    region, _, sheet = chart(kind)
    sheet.shapes.clear()
    sheet.draw = lambda shape, box, *_, **__: boxes.append(box)
    region.place((20, 20, 300, 300), complex.sizes_of(region, (20, 20, 300, 300), 8.0, 14.0), sheet, sheet.scheme.paper)
    bars = [box for box in boxes if len(box) == 4]
    lengths = [box[3] - box[1] if kind == "bars" else box[2] - box[0] for box in bars]
    np.testing.assert_allclose(np.array(lengths) / lengths[0], np.array(region.numbers) / region.numbers[0], rtol=1e-6)


def test_labels_of_a_chart_have_one_base_line():
  for kind, is_same in (("bars", True), ("lines", True), ("rows", False)):
    _, _, sheet = chart(kind, "ar")
    bases = [block.setting.placed[0].y for block in sheet.blocks]
    if is_same:
      assert len(set(bases[::2])) == 1  # whatever stands above their letters
    else:
      assert bases[::2] == pytest.approx(bases[1::2])  # of a label and its value


def test_no_sentence_comes_twice():
  for seed in range(6):
    _, truth, _ = drawn("de", "newspaper", seed)
    for sentence in languages.load("de").sentences:
      assert "\n".join(truth["texts"]).count(sentence) <= 1, (seed, sentence)


def test_a_title_that_does_not_fit_is_drawn_again(monkeypatch):
  titles, place = [], complex._place

  def placed(rng, page, template, *rest):
    titles.append(template is complex._LAST)
    return place(rng, page, template, *rest) if sum(titles) > 3 else None

  monkeypatch.setattr(complex, "_place", placed)
  assert complex.render(np.random.default_rng(0), page_of("de", "menu"))[1]["layout"] == "title" and sum(titles) == 4


def test_a_pie_is_cut_by_its_shares():
  _, image, sheet = chart("pie")
  (one,) = sheet.structures
  assert sum(one["values"]) == 100 and [text.rstrip("%") for text in one["texts"]] == [str(value) for value in one["values"]]
  pixels = image[20:300, 20:180].reshape(-1, 3)
  found, counts = np.unique(pixels, axis=0, return_counts=True)
  largest = sorted(counts[np.argsort(-counts)][1:1 + len(one["values"])].tolist(), reverse=True)
  shares = np.array(largest) / sum(largest)
  np.testing.assert_allclose(shares, np.sort(one["values"])[::-1] / 100, atol=0.04)


def test_right_to_left_pages_are_mirrored():
  for code, first_is_left in (("en", True), ("he", False)):
    _, truth, _ = drawn(code, "table", 1)
    (table,) = (one for one in truth["structures"] if one["type"] == "table")
    first, second = (next(block for block in truth["blocks"] if block["text"] == text) for text in table["rows"][0][:2])
    assert (first["box"][0] < second["box"][0]) == first_is_left


def test_a_receipt_adds_up():
  _, truth, _ = drawn("en", "receipt")
  (table,) = truth["structures"]
  costs = [float(row[1].lstrip("$").replace(",", "")) for row in table["rows"]]
  total = float(truth["texts"][-1].lstrip("$").replace(",", ""))
  assert total == pytest.approx(sum(costs))


def test_code_keeps_its_indentation():
  _, truth, said = drawn("en", "code", 3)
  (code,) = truth["structures"]
  block = next(block for block in truth["blocks"] if block["what"] == "code")
  assert block["letters"] == "monospaced" and block["text"] == "\n".join(code["lines"]) and f"\"{block['text']}\"" in said["captions"][1]
  assert [line["text"] for line in block["lines"]] == code["lines"]


def test_fractions_have_bars_and_scripts_are_raised():
  style = regions.Text(["x"], None, "formula").style
  setting = formulas.FormulaSetting(r"\dfrac{a}{b}", 40.0, 10.0, 50.0, style)
  left, top, right, bottom = setting.ink
  canvas = make_paper(np.random.default_rng(0), 100, 100).picture
  canvas.paste((255, 255, 255), (0, 0, 100, 100))
  setting.draw(canvas, (0, 0, 0))
  rows, columns = np.nonzero(np.asarray(canvas)[..., 0] < 200)
  assert abs(rows.min() - top) <= 1 and abs(rows.max() + 1 - bottom) <= 1 and abs(columns.min() - left) <= 1 and abs(columns.max() + 1 - right) <= 1
  inked = (np.asarray(canvas)[..., 0] < 128).sum(1)
  assert inked.max() >= 0.9 * (right - left)  # the bar
  plain, raised = (formulas.FormulaSetting(tex, 40.0, 10.0, 50.0, style).ink for tex in ("x", "x^{2}"))
  assert raised[1] < plain[1] - 5 and raised[3] == pytest.approx(plain[3], abs=0.5)  # mathtext rounds heights to hundredths of an em


# ---- templates of users -------------------------------------------------------------------------------


GOOD = {"about": "a sign", "page": {"rows": [{"text": {"en": ["Bakery"], "else": "word"}, "role": "title"}]}}


def test_a_users_template_is_drawn(tmp_path):
  (tmp_path / "sign.json").write_text(json.dumps(GOOD), encoding="utf-8")
  _, truth, said = drawn("en", "sign", template_folders=(str(tmp_path),))
  assert truth["texts"] == ["Bakery"] and truth["layout"] == "sign" and "a sign" in said["captions"][1].lower()


def test_a_template_that_changed_is_another_data_set(tmp_path, monkeypatch):
  monkeypatch.setattr(stored, "NUM_SLOTS", {"train": 16, "validation": 4})
  monkeypatch.setattr(stored, "_TRAINED_ON", 12)
  folder = tmp_path / "own"
  folder.mkdir()
  (folder / "sign.json").write_text(json.dumps(GOOD), encoding="utf-8")
  settings = Settings(base_px=64, ratios=("1:1",), languages={"en": 1.0}, kinds={"complex": 1.0}, templates={"sign": 1.0}, edits={},
                      template_folders=(str(folder),), font_folders=("/none",))
  stored.prepare(settings, tmp_path, vocab_size=400)
  records.open_split(tmp_path, "rendered_text", "train")
  (folder / "sign.json").write_text(json.dumps(GOOD | {"about": "a board"}), encoding="utf-8")
  templates._load.cache_clear()  # as in another process
  with pytest.raises(ValueError, match="was prepared with other templates than .*own now has: put those back"):
    records.open_split(tmp_path, "rendered_text", "train")


@pytest.mark.parametrize("change, sentence", [
    ({"about": ""}, "has \"\" in about: it must be a text"), ({"size": 1}, "the unknown field size: choose among about, page"),
    ({"page": {"rows": []}}, r"has \[\] in page.rows: it must be a list of regions"),
    ({"page": {"rows": [{"text": "poem"}]}}, r"\"poem\" in page.rows\[0\].text: it must be one of date"),
    ({"page": {"text": "{wort}"}}, "in page.text: it must be one of date"), ({"page": {"text": "word", "aline": "end"}}, "unknown field page.aline"),
    ({"page": {"text": "word", "rule": "thin"}}, "has the contents text, rule in page: give one of rows"), ({"page": {}}, "has no content in page"),
    ({"page": {"text": "word", "box": {"round": -1}}}, "in page.box.round: it must be a number of at least 0"),
    ({"page": {"table": [{"text": "word", "head": "word"}, {"text": "number"}]}}, "has a head in some columns of page.table alone"),
    ({"aspect": [2, 1]}, r"in aspect: it must be \[least, most\]")])
def test_a_bad_template_is_one_sentence(tmp_path, change, sentence):
  (tmp_path / "sign.json").write_text(json.dumps(GOOD | change), encoding="utf-8")
  with pytest.raises(ValueError, match=sentence) as error:
    Settings(template_folders=(str(tmp_path),))
  assert "sign.json" in str(error.value) and "\n" not in str(error.value)


def test_templates_that_are_not_there_are_refused(tmp_path):
  with pytest.raises(ValueError, match="has no template: give one with .json files"):
    Settings(template_folders=(str(tmp_path),))
  with pytest.raises(ValueError, match="templates has 'poem': choose among book, chart"):
    Settings(templates={"poem": 1.0})
  (tmp_path / "sign.json").write_text("{", encoding="utf-8")
  with pytest.raises(ValueError, match="Cannot read the template .*sign.json"):
    Settings(template_folders=(str(tmp_path),))
