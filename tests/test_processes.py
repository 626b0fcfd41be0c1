"""Several real processes on this machine: the numbers of one, whatever they are, and one clear end for all when one of them fails or is lost."""

import json
import os
import re
import shutil
import signal
import time
import types

import numpy as np
import pytest
from kill_points import Job, kill_and_compare
from many import PATIENCE_S, ends, error_lines, start, together, train

from data_pipelines.loader import Loader
from qimg2.runtime import processes
from qimg2.training import manifest
from qimg2.training.metrics import read_rows

STEPS = 6
CONFIG = """
from configs import quickstart

def get_config(arg=""):
  cfg = quickstart.get_config("smoke")
  cfg.data_dir = {data_dir!r}
  cfg.stages = cfg.stages[0], cfg.stages[2]  # the second one mixes drawing and editing
  cfg.stages[1].start_from, cfg.check.name, cfg.sampling.guidance = "scratch", "none", 1.0
  cfg.stages[0].resolutions = cfg.stages[0].resolutions[:1]
  cfg.stages[1].num_steps, cfg.stages[1].save_every_steps, cfg.stages[1].eval_every_steps, cfg.stages[1].sample_every_steps = {steps}, 2, 3, 6
  cfg.stages[1].optimizer.schedule, cfg.stages[1].optimizer.warmup_steps = "constant", 2
  return cfg
"""
# Each process adds up its rows, and then the sums are added: another order than one device's, so the losses differ in the last bits. Measured
# is at most 1e-6; a wrong row or a wrong noise moves them by more than 1e-3.
RTOL = 1e-5


def assert_same_numbers(one, other):
  for stage in ("vae", "high_resolution"):
    ours, theirs = (read_rows(workdir / stage / "metrics.jsonl") for workdir in (one, other))
    assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
    for mine, its in zip(ours, theirs):
      np.testing.assert_allclose([mine[key] for key in sorted(mine)], [its[key] for key in sorted(mine)], rtol=RTOL)


@pytest.fixture(scope="module")
def config_file(data_dir, tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "short.py"
  path.write_text(CONFIG.format(data_dir=str(data_dir), steps=STEPS))
  return path


@pytest.fixture(scope="module")
def alone(config_file, compilation_cache, tmp_path_factory):
  """Folder of the run of one process."""
  workdir = tmp_path_factory.mktemp("alone")
  together(1, *train(config_file, workdir, compilation_cache))
  return workdir


@pytest.fixture(scope="module")
def half(config_file, compilation_cache, tmp_path_factory):
  """Folder of a run that four processes stopped at half of the second stage."""
  workdir = tmp_path_factory.mktemp("half")
  together(4, *train(config_file, workdir, compilation_cache, f"--config.stages[1].num_steps={STEPS // 2}"))
  return workdir


def test_each_process_reads_back_what_it_wrote(tmp_path):
  """So that the checksums of a large checkpoint are there within a notice of preemption."""
  together(2, "tests/worker.py", "--do=save", f"--workdir={tmp_path}")
  hashed = [json.loads((tmp_path / f"hashed{i}.json").read_text().replace(manifest.TEMPORARY, "")) for i in range(2)]
  step = tmp_path / "checkpoints" / "3"
  hashed = [[os.path.relpath(path, step) for path in paths] for paths in hashed]
  owned = [{path.relative_to(step).as_posix() for path in step.rglob(f"ocdbt.process_{i}/**/*") if path.is_file()} for i in range(2)]
  assert any("/d/" in name for name in owned[1]) and set(hashed[1]) == owned[1]
  assert not owned[1] & set(hashed[0]) and owned[0] < set(hashed[0]) and len(hashed[0]) == len(set(hashed[0]))
  assert set(json.loads((step / manifest.NAME).read_text())["content"]["files"]) == owned[1] | set(hashed[0])
  assert not manifest.find_fault(step) and not list(step.glob("digests*"))


# The numbers of one.


@pytest.mark.slow
def test_four_processes_train_evaluate_and_draw_as_one_does(alone, half, config_file, compilation_cache, tmp_path):
  """In two parts."""
  workdir = shutil.copytree(half, tmp_path / "run")
  printed = together(4, *train(config_file, workdir, compilation_cache))
  assert_same_numbers(workdir, alone)
  names = lambda folder: sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts
                                and "frozen" not in path.parts and not path.name.startswith("events."))
  of_half = {f"high_resolution/samples/{STEPS // 2:08d}{task}.png" for task in ("", "_ti2i")}  # after the last step of the half
  assert set(names(workdir)) - set(names(alone)) == of_half
  assert set(names(alone)) <= set(names(workdir)) and (workdir / "high_resolution" / "samples" / f"{STEPS:08d}.png").is_file()
  assert len(list((workdir / "vae").glob("events.*"))) == 1
  assert "Report:" in printed[0] and not any(printed[1:])


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(alone, tmp_path):
  for num in (1, 2):
    arguments = (f"--workdir={alone}", "--prompt=red star on white", "--prompt=blue A", "--prompt=a green K", "--num_steps=2", "--guidance=2",
                 f"--out={tmp_path}/{num}.png", f"--save_latents={tmp_path}/{num}.npy", f"--pictures={tmp_path}/{num}")
    printed = together(num, "-m", "launch.sample", *arguments)
    assert "3 pictures" in printed[0] and not any(printed[1:])
  one, two = (np.load(tmp_path / f"{num}.npy") for num in (1, 2))
  np.testing.assert_allclose(two, one, atol=1e-4)
  assert len(list((tmp_path / "2").iterdir())) == 3


@pytest.mark.slow
def test_two_processes_check_what_one_checks(alone, tmp_path):
  results = {}
  for num in (1, 2):
    workdir = shutil.copytree(alone, tmp_path / str(num))
    record = json.loads((workdir / "config.json").read_text())
    record["config"]["check"].update(name="glyphs", num_prompts=8)
    (workdir / "config.json").write_text(json.dumps(record))
    printed = together(num, "-m", "launch.check", f"--workdir={workdir}")
    assert printed[0].startswith("Check of stage high_resolution") and not any(printed[1:])
    results[num] = json.loads((workdir / "check.json").read_text())
  assert results[1] == results[2]


@pytest.mark.slow
def test_every_division_gives_the_same_batches(config_file, tmp_path):
  """Over rows, over weights alone, and with rows that are shared by two processes of four."""
  say = lambda num, *more: [json.loads(line) for line in together(
      num, "tests/worker.py", "--do=batches", f"--config={config_file}", f"--workdir={tmp_path}", *more)[0].splitlines()]
  one = say(1)
  assert len(one) == 6 and all(len(ids) == 8 for ids in one)
  assert say(2, "--config.mesh.fsdp=1", "--config.mesh.tensor=2") == one
  assert say(4, "--config.mesh.fsdp=2", "--config.mesh.tensor=2") == one
  assert say(4) == one


@pytest.mark.slow
@pytest.mark.parametrize("num, more", [(1, ()), (2, ("--config.mesh.fsdp=1", "--config.mesh.tensor=2"))])
def test_what_four_saved_others_take_up(alone, half, config_file, compilation_cache, tmp_path, num, more):
  """Saved by four processes at fsdp 4, taken up by one, and by two that divide the weights by tensor."""
  workdir = shutil.copytree(half, tmp_path / "run")
  together(num, *train(config_file, workdir, compilation_cache, *more))
  assert_same_numbers(workdir, alone)
  assert [row["step"] for row in read_rows(workdir / "high_resolution" / "metrics.jsonl") if "loss" in row] == list(range(1, STEPS + 1))


# One of them fails.


def wait_for(path, started):
  limit = time.monotonic() + 300
  while not path.exists():
    assert all(one.poll() is None for one in started), [one.communicate() for one in started if one.poll() is not None]
    assert time.monotonic() < limit
    time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("num, victim", [(4, 2), (2, 0)])
def test_when_one_is_killed_the_others_end(tmp_path, num, victim):
  """Also when it is process 0, which holds the coordination service."""
  started = start(num, "tests/worker.py", "--do=wait", f"--workdir={tmp_path}")
  for i in range(num):
    wait_for(tmp_path / f"started{i}", started)
  started[victim].send_signal(signal.SIGKILL)
  begin = time.monotonic()
  results = ends(started, PATIENCE_S)
  assert time.monotonic() - begin < PATIENCE_S
  for i, (code, _, stderr) in enumerate(results):
    if i != victim:
      assert code == processes.EXIT_CODE, stderr[-3000:]
      assert len(error_lines(stderr)) == 1 and "start all processes again" in error_lines(stderr)[0], stderr
      assert f"Process {victim}" in error_lines(stderr)[0] and "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_mistake_of_one_ends_all(tmp_path, victim):
  begin = time.monotonic()
  results = ends(start(3, "tests/worker.py", "--do=wait", f"--workdir={tmp_path}", f"--victim={victim}", "--mistake"), PATIENCE_S)
  assert time.monotonic() - begin < PATIENCE_S
  for i, (code, _, stderr) in enumerate(results):
    whose = "" if i == victim else f"Process {victim} failed: "
    assert code == 1 and error_lines(stderr) == [f"error: {whose}This process alone made a mistake."], stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_another_config_on_one_process_is_refused(config_file, compilation_cache, tmp_path):
  results = ends(start(2, *train(config_file, tmp_path, compilation_cache), extra=lambda i: (f"--config.seed={i}",)), 300)
  for code, _, stderr in results:
    assert code == 1 and len(error_lines(stderr)) == 1 and "The config of process 1 is not that of process 0" in stderr, stderr
  assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_a_process_that_never_starts_is_waited_for_in_vain(tmp_path):
  started = start(2, "tests/worker.py", "--do=wait", f"--workdir={tmp_path}", "--connect_timeout=5")
  started[1].kill()
  (code, _, stderr), _ = ends(started, PATIENCE_S)
  assert code == processes.EXIT_CODE and len(error_lines(stderr)) == 1 and "did not meet" in stderr, stderr


@pytest.mark.slow
def test_a_killed_job_goes_on_from_its_last_checkpoint(alone, config_file, compilation_cache, tmp_path):
  command = train(config_file, tmp_path / "run", compilation_cache)
  started = start(2, *command)
  wait_for(tmp_path / "run" / "high_resolution" / "checkpoints" / "2" / "meta", started)
  started[1].send_signal(signal.SIGKILL)
  (code, _, stderr), _ = ends(started, PATIENCE_S)
  assert code == processes.EXIT_CODE and len(error_lines(stderr)) == 1, stderr[-3000:]
  together(2, *command)
  assert_same_numbers(tmp_path / "run", alone)


@pytest.mark.slow
def test_killed_again_and_again_a_job_ends_bit_identical(config_file, compilation_cache, tmp_path):
  """A few of the kill points of which tests/kill_points.py makes more."""
  assert kill_and_compare(Job(str(config_file), 2, compilation_cache), tmp_path, num_kills=2, seed=0) >= 1


@pytest.mark.slow
def test_whichever_is_asked_all_stop_after_one_step(tmp_path):
  """Asked before the first step of a stage that goes on from 500."""
  started = start(2, "tests/worker.py", "--do=stop", f"--workdir={tmp_path}")
  for i in range(2):
    wait_for(tmp_path / f"started{i}", started)
  started[1].send_signal(signal.SIGTERM)
  time.sleep(2)
  (tmp_path / "go").touch()
  said = [json.loads(stdout.splitlines()[-1]) for code, stdout, stderr in ends(started, PATIENCE_S) if code == 0 or pytest.fail(stderr[-2000:])]
  assert said[0] == said[1] and said[0][0] in ("one 500", "one 501", "one 502")
  assert said[0][1] == [7, 2**40, 2**40 + 1]


@pytest.mark.slow
def test_a_notice_ends_a_process_that_does_not_stop_by_itself(tmp_path):
  started = start(2, "tests/worker.py", "--do=wait", f"--workdir={tmp_path}")
  wait_for(tmp_path / "started1", started)
  started[1].send_signal(signal.SIGTERM)
  results = ends(started, PATIENCE_S)
  assert results[1][0] == -signal.SIGTERM and results[0][0] == processes.EXIT_CODE, results


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_goes_on_where_it_was(alone, config_file, compilation_cache, tmp_path):
  command = train(config_file, tmp_path / "run", compilation_cache)
  started = start(2, *command)
  wait_for(tmp_path / "run" / "high_resolution" / "metrics.jsonl", started)
  started[1].send_signal(signal.SIGTERM)
  for code, _, stderr in ends(started, 300):
    assert code == processes.EXIT_CODE and "was asked to stop" in stderr and "Traceback" not in stderr, stderr[-3000:]
  together(2, *command)
  assert_same_numbers(tmp_path / "run", alone)


# Flags.


@pytest.mark.parametrize("given, message", [
    (dict(num_processes=2), "need --coordinator"),
    (dict(coordinator="host:1"), "needs --num_processes and --process_id"),
    (dict(coordinator="host:1", num_processes=2, process_id=2), "--process_id=2 must be below --num_processes=2"),
    (dict(coordinator="host", num_processes=2, process_id=1), "names no port"),
    (dict(coordinator="host:1", distributed="auto"), "finds the coordinator by itself"),
])
def test_flags_that_do_not_go_together(given, message):
  args = types.SimpleNamespace(**{"coordinator": "", "num_processes": None, "process_id": None, "distributed": "off", **given})
  with pytest.raises(ValueError, match=re.escape(message)):
    processes.start(args)


# Parts.


def test_a_process_is_lost_when_it_says_nothing_new(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
  beats, found = processes._Beats(12), lambda second: [(f"qimg2/beat/{i}", f"{second}") for i in range(12) if i != 11 or second < 3]
  for clock[0] in range(1, 6):
    assert beats.lost(found(clock[0]), 2.5) == ([11] if clock[0] == 5 else [])


def test_rows_need_not_lie_together():
  """As on a TPU slice, where the devices of a machine are a square of the grid."""
  loader = object.__new__(Loader)
  loader._process = (0, 1, 4, 5), 8
  assert loader.own_rows(16).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
