"""The configs of post-training: what they name, what they refuse, and a method that learns from rewards in a real run."""

import numpy as np
import pytest

from benchmarks import post_training as gains
from configs import post_training, rl_7b
from qimg2.runtime.config import parse
from qimg2.runtime.curriculum import train
from qimg2.training.metrics import read_rows


@pytest.mark.parametrize("name", [*post_training.METHODS, "half", "grpo+lora", "nft+lora"])
def test_every_method_is_a_run(name):
  cfg = parse(post_training.get_config(f"{name}:smoke"))
  stage, = cfg.stages
  assert bool(stage.rewards) == (name.split("+")[0] in post_training.REWARDED) and bool(stage.adapter.rank) == name.endswith("+lora")
  assert cfg.sampling.guidance == 1.0  # as pictures are drawn for rewards


@pytest.mark.parametrize("arg, message", [
    ("ppo", "post_training.py:ppo is not understood: say METHOD"), ("half+lora", "post_training.py:half.lora is not understood"),
    ("grpo:nowhere", "There is no run in nowhere: train it first by launch.train --config=configs/post_training.py:half"),
    ("half:nowhere", "There is no run in nowhere: train it first by make quickstart"),
    ("distill:a:b", "post_training.py:distill:a:b is not understood: say .* distill:RUN:T2I:TI2I"), ("nft:a:b:c", "is not understood")])
def test_what_is_no_run_is_refused(arg, message):
  with pytest.raises(ValueError, match=message):
    post_training.get_config(arg)


def test_the_recipe_of_the_published_size_names_each_of_its_parts():
  cfg = parse(rl_7b.get_config("diffusers:nowhere:judges"))
  first, second, last = cfg.stages
  assert {one.settings["pretrained"] for stage in (first, second) for one in stage.rewards.values() if one.kind == "judge"} == {"judges"}
  assert first.algorithm.settings["deviation"] == "group" and first.rewards["text"].weight_in("text") == 0.5
  assert {name: fall.rising for stage in (first, second) for name, fall in stage.watch.falls.items()} == {
      "reward/beauty": "reward/follow", "reward/kept": "reward/follow"}
  assert last.frozen == {"encoder": "diffusers:nowhere", "vae": "diffusers:nowhere", "teacher_t2i": "stage:rl_t2i", "teacher_ti2i": "stage:rl_edit"}
  assert len(parse(rl_7b.get_config("smoke")).stages) == 2
  with pytest.raises(ValueError, match="rl_7b.py:diffusers:DIR is not understood: say diffusers:DIR:JUDGE"):
    rl_7b.get_config("diffusers:DIR")


@pytest.mark.slow
def test_a_policy_gradient_run_learns_from_scored_pictures(smoke_config, tmp_path, one_device):
  cfg = post_training.get_config("smoke")
  cfg.data_dir, cfg.evals = smoke_config.data_dir, {}
  cfg.stages[0].rewards.bright = dict(kind="function", function="tests.jobs.toy_rewards:bright")  # random networks draw no glyph, but no two alike
  train(cfg, tmp_path)
  rows = [row for row in read_rows(tmp_path / "grpo" / "metrics.jsonl") if "loss" in row]
  assert len(rows) == 2 and all(np.isfinite(value) for row in rows for value in row.values())
  for row in rows:
    assert row["skipped"] == 0.0 and row["reward/learned"] == 1.0 and 0.0 < row["reward/bright"] < 1.0
    assert row["ratio_off"] == 0.0 and row["float32_off"] < 1e-3 and row["reward/left_out"] == 0.0
    assert all(0.0 <= row[f"reward/{part}"] <= 1.0 for part in ("glyph", "ink", "paper"))
    np.testing.assert_allclose(8 * 2 * row["reward/paper"] % 1, 0, atol=1e-5)  # each of 16 pictures is right or not


@pytest.mark.slow
def test_a_command_that_fails_is_one_sentence(tmp_path):
  with pytest.raises(ValueError, match=f"launch.evaluate --workdir={tmp_path} .* ended with code 1: error: There is no run in {tmp_path}: [^\n]*$"):
    gains.evaluate(tmp_path, 2)


def test_gains_are_those_of_the_same_prompts():
  """Three prompts drawn twice each; of two seeds the first mends the third prompt's pictures, the second none and spoils one ink."""
  def scores(glyph, ink):
    return [{"cluster": str(i // 2), "metrics": {"glyph": float(a), "ink": float(b), "paper": 1.0}} for i, (a, b) in enumerate(zip(glyph, ink))]
  before = scores([1, 1, 1, 0, 0, 0], [1] * 6)
  row = gains.table_row("nft", [scores([1, 1, 1, 0, 1, 1], [1] * 6), scores([1, 1, 1, 0, 0, 0], [1] * 5 + [0])], before, [1.0, 2.0])
  cells = [cell.strip() for cell in row.strip("|").split("|")]
  assert cells[:3] == ["nft", "83.3, 50.0", "66.7 %"] and cells[-1] == "2.0"
  assert [float(cell.split()[0]) for cell in cells[3:6]] == [16.7, -8.3, 0.0]
  curve = gains.smoothed([{"step": 5, "a": 1.0}, {"step": 7}, {"step": 10, "a": 3.0}], "a")
  assert curve == ((5.0, 10.0), (1.0, 2.0)) and gains.figure_png({"nft": curve}, "a", False).startswith(b"\x89PNG")
