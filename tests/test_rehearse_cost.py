"""What a curriculum would take, from made-up rows, against numbers worked by hand."""

import dataclasses
import json

import pytest
from commands import launch

from configs import pretrain, quickstart
from qimg2.runtime.config import parse
from qimg2.runtime.rehearsal import cost, table, topology


def row(task, px, batch_size, compute_s, stage="sft", num_tokens=1024, **bound):
  """A row as --json writes it, as far as costs look at it; what takes longest is the compute."""
  times = dict(compute_s=float(compute_s), hbm_s=1.0, ici_s=0.5, dcn_s=0.0) | bound
  times["step_s"] = max(times.values())
  return dict(stage=stage, task=task, height=px, width=px, num_tokens=num_tokens, batch_size=batch_size, bound=times)


MADE = table.Row(stage="grpo", task="t2i", height=512, width=512, num_sources=0, num_tokens=64, batch_size=48, accumulate=1, num_devices=8,
                 mesh={"fsdp": 8}, rules="fsdp_tensor", remat="dots", model_flops={}, peak_bytes=2.0**30, limit_bytes=None, compile_s=1.0)
ROWS = [row("t2i", 256, 32768, 10, "pretrain_256"), row("ti2i", 256, 32768, 20, "pretrain_256"),
        row("t2i", 512, 16384, 4), row("ti2i", 512, 16384, 8), row("t2i", 1024, 8192, 6), row("ti2i", 1024, 8192, 12),
        row("t2i", 2048, 4096, 20), row("ti2i", 2048, 4096, 50)]


def test_steps_times_the_mean_over_resolutions_and_tasks_is_the_cost():
  """By hand: nine tenths pictures and one tenth edits in pre-training, 0.7 and 0.3 later, resolutions alike; 1.5 s more where nothing overlaps."""
  cfg = parse(pretrain.get_config())
  found, missing = cost.costs(cfg, ROWS)
  assert {one.stage: one.num_steps for one in found} == {stage.name: stage.num_steps for stage in cfg.stages[1:]}
  by_hand = {"pretrain_256_t2i": 10, "pretrain_256": 11, "pretrain_512": 4.4, "cpt_1024": 0.7 * 5 + 0.3 * 10, "cpt_2048": 0.7 * 10 + 0.3 * 70 / 3,
             "sft": 14}
  assert {one.stage: one.overlapped_s for one in found} == pytest.approx(by_hand)
  assert {one.stage: one.serial_s for one in found} == pytest.approx({name: seconds + 1.5 for name, seconds in by_hand.items()})
  assert found[0].days() == pytest.approx((250_000 * 10 / 86_400, 250_000 * 11.5 / 86_400)) and missing == {"vae": "t2i 256x256, batch 1,024"}
  lines = cost.table(found, missing, 8).splitlines()
  assert lines[1].split() == ["pretrain_256_t2i", "250,000", "10.00", "11.50", "28.9", "33.3", "5,556", "6,389"]
  days = (2.5e6 + 2.2e6 + 1.1e6 + 0.8125e6 + 1.75e6 + 0.14e6) / 86_400
  serial = days + 1.5 * 960_000 / 86_400
  assert lines[-2].split() == ["total", "960,000", f"{days:.1f}", f"{serial:.1f}", f"{192 * days:,.0f}", f"{192 * serial:,.0f}"]
  assert lines[-1] == "Not counted: vae, because no row is of t2i 256x256, batch 1,024."


def test_weights_of_resolutions_count_and_the_longest_prompts():
  cfg = parse(pretrain.get_config())
  heavy = dataclasses.replace(cfg.stages[4], resolutions=tuple(
      dataclasses.replace(one, weight=weight) for one, weight in zip(cfg.stages[4].resolutions, (3.0, 1.0), strict=True)))
  cfg = dataclasses.replace(cfg, stages=(heavy, cfg.stages[-1]))
  short = row("t2i", 512, 16384, 100, num_tokens=128)  # the shortest prompts, in whichever order
  for rows in ([short, *ROWS[2:]], [*ROWS[2:], short]):
    found, missing = cost.costs(cfg, rows)
    assert [one.overlapped_s for one in found] == pytest.approx([0.7 * (3 * 4 + 6) / 4 + 0.3 * (3 * 8 + 12) / 4, 14]) and not missing
  assert cost.costs(cfg, [row("t2i", 512, 16384, 4, hbm_s=9.0), *ROWS[3:]])[0][0].overlapped_s == pytest.approx(0.7 * (3 * 9 + 6) / 4 + 0.3 * 9)


def test_a_rollout_is_a_part_of_the_step():
  programs = [dict(row("t2i", 512, 16384, seconds), program=program) for program, seconds in (("rollout", 30), ("minibatches", 2), ("step", 8))]
  cfg = parse(pretrain.get_config())
  cfg = dataclasses.replace(cfg, stages=(dataclasses.replace(
      cfg.stages[-1], resolutions=cfg.stages[-1].resolutions[:1], mixture=cfg.stages[-1].mixture[:1]),))
  (one,), _ = cost.costs(cfg, [*programs, dict(row("t2i", 512, 16384, 99), program="samples")])
  assert (one.overlapped_s, one.serial_s) == pytest.approx((40, 40 + 3 * 1.5))
  rows = [dataclasses.replace(MADE, program=one["program"], num_samples=1152, bound=one["bound"]) for one in programs]
  assert table.phases(rows) == (
      "grpo t2i 512x512 64t: a step of 1,152 pictures takes at least 40.0 s, serial 44.5 s: rollout 31.5 s (71%), minibatches 3.5 s (8%), step 9.5 s "
      "(21%). Rewards on the host come on top: at 25.9 pictures/s they take as long again.")
  assert table.phases([MADE]) == ""


@pytest.mark.parametrize("rows, message", [
    ([row("t2i", 256, 32768, 1, "early")], "The rows have a stage 'early', which the config has not"),
    ([dict(ROWS[0], bound={})], "The row of stage 'pretrain_256', t2i 256x256, has no times, because it does not fit"),
    ([row("t2i", 256, 32768, 1, "vae")], "The rows are for no whole stage: vae lacks t2i 256x256, batch 1,024; rehearse"),  # of another batch
])
def test_rows_that_say_nothing_are_refused(rows, message):
  with pytest.raises(ValueError, match=message):
    cost.costs(parse(pretrain.get_config()), rows)


def test_rows_of_an_earlier_call(tmp_path):
  stages = parse(quickstart.get_config("smoke")).stages
  rows = [row(task, one.base_px, 8, 3.0, stages[1].name) for task in ("t2i", "ti2i") for stage in stages[1:] for one in stage.resolutions]
  for one in rows:
    one["height"] = one["width"] = round(one["width"] / 32) * 32
  file = tmp_path / "rows.json"
  file.write_text(json.dumps({"topology": "cpu:8", "num_slices": 1, "rows": rows}))
  flags = ("--config=configs/quickstart.py:smoke", f"--rows={file}", "--topology=cpu:8")
  result = launch("launch.rehearse", *flags, "--cost")
  assert result.returncode == 0 and result.stdout.splitlines()[1].split()[:4] == ["low_resolution", "2", "3.00", "4.50"], result.stderr
  assert "Not counted: vae" in result.stdout
  for changed, message in ((flags, "--rows with nothing but --cost"), ((*flags, "--cost", "--search"), "not with --search"),
                           ((*flags, "--cost", "--num_slices=2"), "is of --topology=cpu:8 --num_slices=1: say so here too")):
    result = launch("launch.rehearse", *changed)
    assert result.returncode == 1 and message in result.stderr, result.stderr
  file.write_text("[]")
  with pytest.raises(ValueError, match="is no file that launch.rehearse --json wrote"):
    cost.read_rows(str(file), "cpu:8", 1)
  for nothing in (tmp_path / "nowhere.json", tmp_path):
    with pytest.raises(ValueError, match=f"--rows={nothing} is no file that launch.rehearse --json wrote .*: rehearse again"):
      cost.read_rows(str(nothing), "cpu:8", 1)
  assert [topology.num_chips(*one) for one in (("v5p:4x4x8",), ("v6e:8x8", 2), ("cpu:8",))] == [128, 128, 8]
