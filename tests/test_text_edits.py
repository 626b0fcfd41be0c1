"""Edits of rendered text: pages whose right result is known, and scores of right, undone, wrong and careless edits."""

import json
import pickle

import numpy as np
import pytest

from qimg2.evaluation import Task, editing, ocr, text_edits, text_pages
from qimg2.evaluation.text_pages import Edit, Line, Page
from qimg2.runtime.evaluating.registry import parse_suites

MENU = Page((Line("Menu"), Line("Soup  3.50"), Line("Bread  2.00"), Line("Soup  4.10")))
SIZE = (192, 224)


def edit(change, row, *values):
  """An edit of one line of the menu into the first value; the others are what it may be taken for."""
  pages = [MENU.with_line(row, value) for value in values]
  return Edit("", "en", "menu", change, MENU, pages[0], tuple(pages[1:]))


WORD = edit("word", 1, Line("Rice  3.50"), Line("Milk  3.50"))
COLOUR = edit("colour", 2, Line("Bread  2.00", "red"), Line("Bread  2.00", "blue"))
ALL = Edit("", "en", "sign", "removal", Page((Line("Open"),)), Page((Line(""),)), ())
REMOVAL = edit("removal", 3, Line(""), Line("Milk  4.10"))


@pytest.fixture
def reading(monkeypatch):
  """What the OCR would read."""
  lines = []
  monkeypatch.setattr(ocr, "read", lambda picture, model="": [ocr.Line(text, ((0, 0),) * 4, 1.0) for text in lines])
  return lines


def scores(one, page, lines, reading):
  reading[:] = lines
  return text_edits.score_edit(Task("", SIZE, truth=one), text_pages.render(one, [page], *SIZE)[0])


def test_a_right_edit_an_undone_one_and_another_one(reading):
  right = scores(WORD, WORD.target, WORD.target.texts, reading)
  names = ("nearest", "read as asked", "can be read", "other words read", "other words")
  assert [right[name] for name in names] == [1, 1, 1, 6, 6] and right["nearest by chance"] == 1 / 3
  assert right["kept_psnr"] == 100 and right["kept_ssim"] == 1 and right["drift_px"] < 0.02
  undone = scores(WORD, MENU, MENU.texts, reading)
  assert [undone[name] for name in names] == [0, 0, 1, 6, 6] and undone["kept_psnr"] == 100
  other = scores(WORD, WORD.others[0], WORD.others[0].texts, reading)
  assert [other[name] for name in names] == [0, 0, 1, 6, 6]


def test_words_count_as_often_as_they_stand_there(reading):
  # soup stands twice: one is to become rice, and the other stays.
  for lines, asked, kept in ((["MENU", "Rice 3.50", "Bread 2.00", "Soup 4.10"], 1, 6), (["Menu", "Rice 3.50", "Bread 2.00", "Rice 4.10"], 0, 5),
                             (["Menu Soup Rice 3.50", "Bread 2.00", "Soup 4.10"], 0, 6), (["Rice 3.50 Soup"], 1, 2), ([], 0, 0)):
    found = scores(WORD, WORD.target, lines, reading)
    assert (found["read as asked"], found["other words read"]) == (asked, kept), lines


def test_a_line_that_is_gone_and_a_colour(reading):
  gone = scores(REMOVAL, REMOVAL.target, ["Menu", "Soup 3.50", "Bread 2.00"], reading)
  assert gone["nearest"] == 1 and gone["read as asked"] == 1 and gone["other words"] == 5
  assert scores(REMOVAL, MENU, MENU.texts, reading)["read as asked"] == 0
  assert scores(REMOVAL, REMOVAL.target, ["S0up ..."], reading)["read as asked"] == 0  # all is gone, not the line
  assert scores(ALL, ALL.target, [], reading)["read as asked"] == 1
  red, blue = (scores(COLOUR, page, MENU.texts, reading) for page in (COLOUR.target, COLOUR.others[0]))
  assert (red["nearest"], red["read as asked"], red["can be read"]) == (1, 0, 0) and blue["nearest"] == 0  # no OCR sees a colour
  assert red["other words read"] == red["other words"] == 7


def test_what_is_outside_of_the_box_should_stay(reading):
  target, source = text_pages.render(WORD, [WORD.target, MENU], *SIZE)
  region = editing.outside_of_box(source, target)
  rows, columns = np.nonzero((source != target).any(-1))
  assert not region[rows.min() - 4:rows.max() + 5, columns.min() - 4:columns.max() + 5].any()
  assert region.sum() == SIZE[0] * SIZE[1] - (np.ptp(rows) + 9) * (np.ptp(columns) + 9)
  inside, outside = target.copy(), target.copy()
  inside[~region] = 99
  outside[region] = np.clip(outside[region].astype(int) - 10, 0, 255)
  score = lambda picture: text_edits.score_edit(Task("", SIZE, truth=WORD), picture)["kept_psnr"]
  assert score(inside) == 100 and score(outside) < 29
  with pytest.raises(ValueError, match="are equal: nothing is asked to change"):
    editing.outside_of_box(source, source)
  with pytest.raises(ValueError, match="nothing is left that it should keep"):
    editing.outside_of_box(np.zeros((8, 8, 3)), np.ones((8, 8, 3)))


def test_edits_that_are_made_change_one_line_and_say_which():
  suite = text_edits.text_edits_suite(side_px=256)
  tasks = suite.tasks(96, 3)
  assert [task.truth for task in suite.tasks(5, 3)] == [task.truth for task in tasks[:5]]
  assert len({(task.truth.language, task.truth.kind, task.truth.change) for task in tasks[:16]}) == 16
  for task in tasks:
    one = task.truth
    assert len(set(one.pages)) == len(one.pages) <= 6 and task.category == one.change
    changed = [(old, new) for old, new in zip(one.source.lines, one.target.lines, strict=True) if old != new]
    (old, new), = changed
    if one.change == "colour":
      assert old.text == new.text and text_pages.wordings()[one.language]["inks"][new.ink] in task.prompt
    elif one.change == "removal":
      assert new.text == "" and " ".join(old.text.split()) in task.prompt
    else:
      parts = zip(*(line.text.split("  " if one.kind == "menu" else " ") for line in (old, new)), strict=True)
      (was, is_now), = [pair for pair in parts if pair[0] != pair[1]]
      assert was in task.prompt and is_now in task.prompt
  source, = tasks[7].sources
  np.testing.assert_array_equal(source, text_pages.render(tasks[7].truth, [tasks[7].truth.source], *tasks[7].size)[0])
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(tasks[7])).sources[0], source)  # as it goes to a process that scores
  with pytest.raises(IndexError, match="one condition image, not number 1"):
    tasks[7].sources[1]


def test_the_ocr_reads_a_right_edit_as_right():
  suite = text_edits.text_edits_suite(languages="en", changes="word", side_px=320)
  task, = suite.tasks(1, 0)
  target, source = text_pages.render(task.truth, [task.truth.target, task.truth.source], *task.size)
  right, undone = (suite.score(task, picture) for picture in (target, source))
  assert right["nearest"] == right["read as asked"] == 1 and right["other words read"] == right["other words"]
  assert undone["nearest"] == undone["read as asked"] == 0
  assert {name for figure in suite.figures.values() for name in (figure.numerator, figure.denominator)} - {""} <= set(right)
  assert suite.show(task, source, undone)[1][1].endswith("[wrong by rendering and OCR]") and suite.show(task, target, right)[1][1] == task.prompt


def test_settings_that_cannot_be_are_one_sentence(monkeypatch):
  assert parse_suites(["text_edits:languages=en+de,changes=removal,num_prompts=4"])["text_edits"] == {
      "num_prompts": 4, "languages": "en,de", "changes": "removal"}
  for settings, message in (({"languages": "fr"}, "no language 'fr': choose among en, de, zh"), ({"changes": ""}, "No change of edits"),
                            ({"by": "size"}, "by change, language or kind, not by 'size'")):
    with pytest.raises(ValueError, match=message):
      text_edits.text_edits_suite(**settings)
  monkeypatch.setattr(ocr, "unreadable", lambda text, model="": "ü")
  with pytest.raises(ValueError, match="cannot read the characters ü of edits in de: give a recogniser"):
    text_edits.text_edits_suite(languages="de")
  with pytest.raises(ValueError, match="no change 'size'"):
    text_pages.make_edit("en", "menu", "size", np.random.default_rng(0))
  with pytest.raises(ValueError, match="holds no line"):
    text_pages.render(WORD, [MENU], 4, 4)


def test_wordings_have_all_that_edits_need():
  assert set(text_pages.wordings()) == set(text_pages.LANGUAGES)
  for words in text_pages.wordings().values():
    assert set(words["inks"]) == set(text_pages.INKS) and set(words["instructions"]) == set(text_pages.CHANGES)
    assert not set(words["titles"]) & set(words["items"]) and json.dumps(words["signs"]).count("number") >= 2
