"""The benchmarks measure what they say: both sides have the same weights and tokens, and ways take turns."""

import json

import pytest

from benchmarks import step, timing

TINY = step.Size(step._sized(32, 2, head_dim=16), 4, 12)


@pytest.mark.slow
@pytest.mark.parametrize("task, forward", [("t2i", True), ("ti2i", False)])
def test_a_step_beside_the_published_class(task, forward, tmp_path):
  row = step.measure("tiny", TINY, 2, task, forward, 2, 1e9, ["eager"])
  assert row["what"] == ("forward" if forward else "step") and row["speed"] == pytest.approx(row["eager_s"] / row["ours_s"])
  assert row["num_weights"] > 10_000 and row["of_limit"] > 0
  assert row["task"] in step.describe(row)
  timing.write_json(str(tmp_path / "rows.json"), [row], dtype="float32")
  assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [row]


def test_ways_take_turns_and_begin_in_another_order_each_round(monkeypatch):
  called = []
  monkeypatch.setattr(timing, "REST_S", 0.0)
  times = timing.take_turns({name: lambda number, name=name: called.append((number, name)) for name in "ab"}, rounds=2, warm_up=1)
  assert called == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
  assert all(len(one.seconds) == 2 and one.spread >= 0 for one in times.values())
