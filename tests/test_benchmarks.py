"""The benchmarks measure what they say: both sides have the same weights and tokens, and ways take turns."""

import concurrent.futures
import functools
import json
import time
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import everything, growth, kernels, merging, mixture, networks, sampler, scoring, start, step, timing
from configs import pretrain
from qimg2 import params as P
from qimg2.models import mmdit
from qimg2.runtime.config import parse
from qimg2.runtime.evaluating import scoring as pool
from qimg2.runtime.evaluating.folder import Folder

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


@pytest.mark.slow
def test_growth_is_that_of_seconds_over_that_of_flops(monkeypatch):
  monkeypatch.setitem(step.SIZES, "tiny", lambda: TINY)
  monkeypatch.setitem(growth.SERIES, "batch", [dict(batch=rows, side=4, num_layers=1) for rows in (1, 4)])
  first, second = growth.measure("tiny", "batch", 1)
  assert (first["key"], first["value"], second["value"]) == ("batch", 1, 4) and second["flops"] == 4 * first["flops"]
  assert second["of_flops"] == pytest.approx(second["seconds"] / first["seconds"] / 4) and 0 < second["of_size"] <= 1.1
  assert "of_flops" not in first and "batch" in growth.describe(first)


def test_ways_take_turns_and_begin_in_another_order_each_round(monkeypatch):
  called = []
  monkeypatch.setattr(timing, "REST_S", 0.0)
  times = timing.take_turns({name: lambda number, name=name: called.append((number, name)) for name in "ab"}, rounds=2, warm_up=1)
  assert called == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
  assert all(len(one.seconds) == 2 and one.spread >= 0 for one in times.values())


@pytest.mark.slow
def test_drawing_beside_the_published_pipeline():
  row = sampler.measure("tiny", 64, 1, 4.0, True, 2, 1, "float32", ["eager"])
  assert row["off_by"] <= 1 and row["speed"] == row["eager_s"] / row["ours_s"] and "yes" in sampler.describe(row)


@pytest.mark.slow
@pytest.mark.parametrize("what", networks.WHATS)
def test_networks_beside_the_published_classes(what):
  row = networks.measure("tiny", what, 32, 2, 8, 1, "float32", 1e9, ["eager"])
  assert row["off_by"] < 1e-4 and row["of_limit"] > 0 and what in networks.describe(row)


@pytest.mark.slow
def test_every_command_is_timed_and_mistakes_are_named():
  assert {"launch.train", "launch.sample", "launch.evaluate"} < set(start.launchers()) and "launch.cli" not in start.launchers()
  with pytest.raises(ValueError, match="--stage=low, but configs/quickstart.py has the stages vae, low_resolution"):
    timing.read_stage("configs/quickstart.py:smoke", "low")
  with pytest.raises(ChildProcessError, match="-c exit.3. ended with code 3"):
    start.command("-c", "exit(3)")
  start.command("-m", "launch.describe", "--help")
  with pytest.raises(ChildProcessError, match="ended with code 1: .*No module named launch.descripe"):
    start.command("-m", "launch.descripe", "--help")
  with pytest.raises(ValueError, match="--what=sing is unknown: choose among help, train."):
    timing.check_choices(what=(["help", "sing"], ("help", "train")))


def test_kernels_are_those_of_the_program():
  product = jax.jit(jnp.matmul)
  x = jnp.ones((256, 256))
  product(x, x).block_until_ready()
  begin = time.perf_counter()
  rows = kernels.trace(lambda _: product(x, x).block_until_ready(), 3)
  took_ms = 1e3 * (time.perf_counter() - begin)
  assert [row["calls"] for row in rows] == [1.0] and 0 < 3 * rows[0]["ms"] < took_ms  # one product, once in each call


def test_as_many_layers_as_fit():
  assert everything.layers_that_fit(1e9) == 1 and everything.layers_that_fit(1e13) == 32
  num = everything.layers_that_fit(56e9)
  needed = lambda num: 16 * P.count(mmdit.specs(mmdit.Config(num_layers=num)))
  assert 10 < num < 32 and needed(num) <= 56e9 < needed(num + 1)
  gpu = everything.commands("gpu", 140e9, False)
  assert set(gpu) == set(everything.NAMES)
  layers = {name: int(gpu[name][1].removeprefix("--num_layers=")) for name in ("step", "step.alone")}
  assert 2 * needed(layers["step"]) <= everything.SHARE * 140e9 and layers["step.alone"] == 32
  for platform, tiny in (("cpu", False), ("cpu", True), ("gpu", True)):
    assert set(everything.commands(platform, 140e9, tiny)) == set(everything.NAMES) - {"step.alone"}


@pytest.mark.slow
def test_everything_is_written_down_whatever_becomes_of_it():
  arguments = everything.commands("cpu", 0, tiny=True)["attention"]
  done = everything.run("attention", arguments, 300)
  assert "ended" not in done and {row["name"] for row in done["rows"]} >= {"xla", "chunked"} and "back end" in done["printed"]
  assert everything.run("attention", ["--length=2"], 300)["ended"].startswith("code 2: ")
  assert everything.run("attention", arguments, 0)["ended"] == "stopped after 0 s"


def test_what_a_save_costs():
  """Steps of 0.5 s; the call takes one second, and the two steps beside the writing a tenth more each."""
  wall = {number: 0.5 for number in range(4, start.LONGER)} | {start.SAVED: 1.5, start.SAVED + 1: 0.6, start.SAVED + 2: 0.6}
  rows = [{"step": number, "wall_s": seconds} for number, seconds in wall.items()] + [{"step": start.LONGER, "wall_s": 9.0}, {"step": 9}]
  assert start.save_costs(rows) == pytest.approx((0.5, 1.2))


@pytest.mark.slow
def test_a_made_up_index_is_dealt_as_the_config_asks(tmp_path):
  row = mixture.measure(parse(pretrain.get_config()), "pretrain_512", 3000, 600, 1000, str(tmp_path))
  assert 0 <= row["more_gb"] < 1 and row["bytes_per_worker"] < 10**6
  assert row["share_off_by"] < 0.01 and row["rarest_to_most"] < 1.001 and row["shapes"] > 100 and row["programs"] <= 64
  assert 0 < row["distinct"] < 1 and 0 <= row["left_out"] <= 0.02 and 0 < row["plan_ms"] <= row["slowest_plan_ms"]


def test_scores_beside_a_device_that_draws(monkeypatch):
  """A score of 20 ms of a core: 50 pictures a second."""
  def busy(task, picture):
    end = time.thread_time() + 0.02
    while time.thread_time() < end:
      pass
    return {"toy": 1.0}
  monkeypatch.setattr(pool, "_start", concurrent.futures.ThreadPoolExecutor)
  monkeypatch.setitem(scoring.METRICS, "toy", busy)
  tasks, pictures = scoring.samples(24, 64)
  assert len({task.prompt for task in tasks}) > 12 and (pictures[0] != tasks[0].truth).any()
  row = scoring.measure("toy", tasks, pictures, 2, scoring.Device(side=64))
  assert 40 < row.in_pool <= 50 and 40 < row.alone <= 50 and row.device > 0 and 0 <= row.waits < 1
  assert scoring.of_device(64, 4) > 0


@pytest.mark.parametrize("chunk_s, share", [(1.25, 0.0), (0.5, 2.5 / 8.5), (0.0, 1.0)])
def test_how_long_a_device_waits(monkeypatch, chunk_s, share):
  """By a clock of our own: the pool takes a second for each of twelve chunks, four of which may be ahead. At half a second for a drawing the fourth
  is ready at 4.5 s, and the eighth drawn at 4.0: that one waits half a second, as does each after it."""
  assert scoring.AHEAD == 4
  clock = types.SimpleNamespace(now=0.0)
  free = [0.0]  # when the pool is

  def advance(seconds):
    clock.now += seconds

  def begin(tasks, pictures):
    free[0] = max(free[0], clock.now) + 1.0
    return types.SimpleNamespace(finish=functools.partial(lambda ready: advance(max(0.0, ready - clock.now)), free[0]))
  monkeypatch.setattr(scoring, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
  device, scorer = types.SimpleNamespace(work=advance), types.SimpleNamespace(begin=begin)
  assert scoring._waits(scorer, range(48), range(48), device, chunk_s) == pytest.approx(share)


def test_a_made_up_evaluation_is_merged(tmp_path):
  out = Folder(tmp_path / "out")
  work = merging.made_up(out, 40, 2, 5)
  assert len(out.done_parts("made_up")) == 3 and not (out.place / "summary.json").exists()
  summary, seconds, processor, peak = merging.merge(out, work)
  found = summary["suites"]["made_up"]
  assert (found["num_prompts"], found["num_pictures"], len(out.rows())) == (40, 80, 80) and min(seconds, processor) > 0 and peak > 0.05
  assert found["figures"]["right"]["n"] == 40 and 0 < found["of_set"]["fid"] < 5 and not out.done_parts("made_up")
