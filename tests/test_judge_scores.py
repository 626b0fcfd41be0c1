"""What the judge's answers become, by hand, and rubrics."""

import numpy as np
import pytest

from qimg2.evaluation import judge as pure
from qimg2.evaluation import judge_scores, rubrics
from qimg2.evaluation.judge_scores import Preference


def test_expected_score_and_choices_by_hand():
  logits = np.log(np.array([[1, 2, 3, 4], [1, 1, 2, 4]], np.float32))
  p = pure.choice_probabilities(logits, np.array([[0, 1, 0, 1], [-1, 0, 1, -1]]), 3)
  np.testing.assert_allclose(p, [[0.4, 0.6, 0], [1 / 3, 2 / 3, 0]], rtol=1e-6)
  np.testing.assert_allclose(pure.expected_score(p, np.array([1.0, 5.0, 9.0])), [3.4, 11 / 3], rtol=1e-6)


def test_soft_tifa_by_hand():
  assert judge_scores.soft_tifa([0.9, 0.4]) == pytest.approx((0.65, 0.6))
  assert judge_scores.soft_tifa([1.0, 0.0, 0.5]) == (0.5, 0.0) and judge_scores.soft_tifa([0.25]) == pytest.approx((0.25, 0.25))
  assert judge_scores.soft_tifa([1e-30] * 40)[1] == pytest.approx(1e-30)  # the product would be 0
  for bad in ([], [1.2], [float("nan")]):
    with pytest.raises(ValueError, match="at least one probability"):
      judge_scores.soft_tifa(bad)


def test_edit_scores_by_hand():
  scores = {"instruction": 4.0, "over_editing": 2.0, "naturalness": 5.0, "artefacts": 4.5}
  assert judge_scores.edit_scores(scores) == {"SC": 2.0, "PQ": 4.5, "O": 3.0}
  assert judge_scores.edit_scores({"instruction": 4.0}) == {}


def test_pairs_by_hand():
  pairs = [Preference(0.9, 0.2), Preference(0.8, 0.8), Preference(0.3, 0.1), Preference(0.5, 0.9), Preference(0.6, 0.4)]
  assert [one.win for one in pairs] == pytest.approx([0.85, 0.5, 0.6, 0.3, 0.6])
  assert [one.contradicts for one in pairs] == [False, True, True, False, False]
  assert judge_scores.pairwise_figures(pairs) == pytest.approx(
      {"win": 0.57, "preferred": 0.6, "tied": 0.2, "contradictions": 0.4, "first place": 0.55})
  with pytest.raises(ValueError, match="at least one pair"):
    judge_scores.pairwise_figures([])


def test_rubrics_say_what_they_need_and_show_pictures_in_order():
  found = {path.stem: path.stem for path in rubrics.FOLDER.glob("*.toml")}
  kinds = {"pairwise": rubrics.PAIRWISE, "question": rubrics.QUESTION}
  found = {name: rubrics.find_rubric(name, kinds.get(name, rubrics.POINTWISE)) for name in found}
  assert len(found) == 10 and {name for names in judge_scores.EDIT.values() for name in names} < set(found)
  for name in judge_scores.EDIT["SC"]:  # the source first, then what was made of it
    assert [part for part in found[name].fill({"prompt": "{picture}"}, {"sources": [1, 2], "picture": [3]}) if part in (1, 2, 3)] == [1, 2, 3]
  for name in judge_scores.EDIT["PQ"]:
    assert found[name].marks == ("picture",)
  assert found["text"].values == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("text,message", [
    ("user = 'x'", r"lacks the mark \{picture\}"), ("user = '{picture}{picture}'", "twice"), ("user = '{picture} {pict}'", r"unknown mark \{pict\}"),
    ("user = '{picture}{first}'", r"has the mark \{first\}"), ("system = 'x'", "no field 'user'"), ("user = 3", "the field 'user'"),
    ("user =", "no TOML"), ("user = '{picture}'\nscale = 3", "the field 'scale'"), ("user = '{picture}'\nanswers = ['1']", "two or more"),
    ("user = '{picture}'\nanswers = ['good', 'bad']", "two or more"), ("user = '{picture}'\nanswers = [1, 2]", "two or more")])
def test_a_wrong_rubric_is_one_sentence(tmp_path, text, message):
  (tmp_path / "mine.toml").write_text(text)
  with pytest.raises(ValueError, match=message):
    rubrics.find_rubric(str(tmp_path / "mine.toml"))
  with pytest.raises(ValueError, match="no rubric 'beauty': choose one of aesthetics"):
    rubrics.find_rubric("beauty")
