"""What a summary says of scores, beside what `test_statistics.py` shows of the numbers."""

from qimg2.evaluation import Figure, Suite, Task
from qimg2.places import find_place
from qimg2.runtime.evaluating.folder import Folder
from qimg2.runtime.evaluating.page import write_page
from qimg2.runtime.evaluating.summary import describe, row_of, summarise


def test_a_figure_with_a_null_has_a_p_value_wherever_it_is_printed(tmp_path):
  figures = {"win": Figure("win", null=0.5), "contradiction": Figure("contradiction", lower_is_better=True)}
  suite = Suite(lambda num, seed: [], figures=figures, show=lambda task, picture, scores: [])
  wins = {"a": (0.9, 0.6), "b": (0.8, 0.8), "c": (0.7, 0.2), "d": (0.6, 0.6), "e": (0.51, 0.9), "f": (0.1, 0.3), "g": (0.5, 0.5)}
  rows = [row_of("pairwise", name, Task(name, (8, 8)), seed, "", {"win": win, "contradiction": 0.0})
          for name, some in wins.items() for seed, win in enumerate(some)]
  found = summarise(suite, rows)
  test = found["figures"]["win"]["test"]
  assert (test["n"], test["note"]) == (6, "4 prompts above 0.5, 2 below; 1 ties left out") and abs(test["p_value"] - 44 / 64) < 1e-12
  assert "test" not in found["figures"]["contradiction"]
  assert "], p 0.688 (sign test, exact: 4 prompts above 0.5, 2 below; 1 ties left out)" in describe({"suites": {"pairwise": found}})
  out = Folder(find_place(tmp_path, "--out"))
  write_page(out, {"request": {}, "suites": {"pairwise": found}}, [], {"pairwise": (suite, [])})
  assert "p 0.688" in (tmp_path / "report.html").read_text()
