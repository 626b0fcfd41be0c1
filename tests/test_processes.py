"""Several real processes on this machine: the numbers of one, whatever they are, and one clear end for all when one of them fails or is lost.

What trains here is the toy job: the real training loop, checkpoints and launcher around a regression that compiles in a second.
"""

import itertools
import json
import os
import re
import shutil
import signal
import time
import types

import numpy as np
import pytest
from kill_points import Job, assert_same_bits, kill_and_compare
from many import PATIENCE_S, UNHURRIED_S, ends, error_lines, free_port, start, together, toy, wait_for

from configs import quickstart
from data_pipelines.loader import Loader
from qimg2.runtime import processes
from qimg2.runtime.run import Run
from qimg2.sharding import to_host
from qimg2.training import faults, manifest, metrics
from qimg2.training.metrics import read_rows

STEPS = 12  # saved every 4th, evaluated every 6th
CONFIG = """
from configs import quickstart

def get_config(arg=""):
  cfg = quickstart.get_config("smoke")
  cfg.data_dir = {data_dir!r}
  return cfg
"""
# Each process adds up its rows, and then the sums are added: another order than one device's, so the losses differ in the last bits.
RTOL = 1e-5
SLOW = "--slow_s=0.5"  # a batch, so that a signal finds a run that is still training, also on a busy machine


def assert_same_numbers(one, other):
  ours, theirs = (read_rows(workdir / "toy" / "metrics.jsonl") for workdir in (one, other))
  assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
  assert [row["step"] for row in ours if "loss" in row] == list(range(1, STEPS + 1)) and any("val_loss" in row for row in ours)
  for mine, its in zip(ours, theirs):
    np.testing.assert_allclose([mine[key] for key in sorted(mine)], [its[key] for key in sorted(mine)], rtol=RTOL)


def rows_of(workdir):
  path = workdir / "toy" / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def saved_steps(workdir):
  """Steps of the whole checkpoints."""
  return [int(path.parent.name) for path in (workdir / "toy" / "checkpoints").glob("*/manifest.json") if path.parent.name.isdigit()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """Folder of the run of one process."""
  workdir = tmp_path_factory.mktemp("alone")
  together(1, *toy(workdir))
  return workdir


@pytest.fixture(scope="module")
def half(tmp_path_factory):
  """Folder of a run that four processes were asked to stop in the middle, after a step that another number of them did not save at."""
  workdir = tmp_path_factory.mktemp("half")
  started = start(4, *toy(workdir, SLOW), heartbeat_s=UNHURRIED_S)
  wait_for(lambda: rows_of(workdir) >= 5, started)
  started[2].send_signal(signal.SIGTERM)
  for code, _, stderr in ends(started, PATIENCE_S):
    assert code == processes.EXIT_CODE and "was asked to stop" in stderr and "Traceback" not in stderr, stderr[-3000:]
  return workdir


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
  """name -> results of the processes of jobs of which one process is lost. They are lost at once: the others wait for as long as a process may be
  silent."""
  folder = tmp_path_factory.mktemp("lost")
  victims = {"toy": (2, 1, signal.SIGKILL), "4 wait": (4, 2, signal.SIGKILL), "2 wait": (2, 0, signal.SIGKILL), "noticed": (2, 1, signal.SIGTERM)}
  started = {}
  try:
    for name, (num, _, _) in victims.items():
      (folder / name).mkdir()
      waits = ["tests/worker.py", "--do=wait", f"--workdir={folder / name}"]
      started[name] = start(num, *(toy(folder / name, "--slow_s=1") if name == "toy" else waits))
    for name, (num, victim, number) in victims.items():
      if name == "toy":
        wait_for((folder / name / "toy" / "checkpoints" / "4" / "meta").exists, started[name])
      else:
        wait_for(lambda name=name, num=num: all((folder / name / f"started{i}").exists() for i in range(num)), started[name])
      assert started[name][victim].poll() is None
      started[name][victim].send_signal(number)
    return {name: ends(jobs, PATIENCE_S) for name, jobs in started.items()} | {"toy's folder": folder / "toy"}
  finally:
    for one in itertools.chain(*started.values()):
      one.kill()


# One process.


@pytest.mark.slow
def test_killed_runs_end_bit_identical(alone, tmp_path):
  """Killed before, at and after a save and an evaluation, at the first step and the last, and while a save is being written."""
  rng = np.random.default_rng(0)
  for num_rows in (1, 4, 7, STEPS + 1):
    process, = start(1, *toy(tmp_path / "cut", "--slow_s=0.02"))
    wait_for(lambda num_rows=num_rows: rows_of(tmp_path / "cut") >= num_rows, [process])
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    (code, _, stderr), = ends([process], PATIENCE_S)
    assert code in (-signal.SIGKILL, 0), f"it ended with {code} before row {num_rows}: {stderr[-2000:]}"
  together(1, *toy(tmp_path / "cut"))
  assert_same_bits(alone, tmp_path / "cut")


@pytest.mark.slow
def test_runs_that_are_asked_to_stop_end_bit_identical(alone, tmp_path):
  """Asked at the first step and later, by both signals."""
  for num_rows, number in ((0, signal.SIGTERM), (3, signal.SIGINT), (6, signal.SIGTERM)):
    timing = tmp_path / "cut" / "toy" / "timing.jsonl"
    size = timing.stat().st_size if timing.exists() else 0  # it grows when the process has come to its loop
    process, = start(1, *toy(tmp_path / "cut", SLOW))
    began = lambda size=size: timing.exists() and timing.stat().st_size > size
    wait_for(lambda num_rows=num_rows, began=began: began() and rows_of(tmp_path / "cut") >= num_rows, [process])
    process.send_signal(number)
    (code, _, message), = ends([process], PATIENCE_S)
    assert code == faults.EXIT_CODE == 75, message
    assert "Stage toy was asked to stop" in message and "the same command goes on" in message
  together(1, *toy(tmp_path / "cut"))
  assert_same_bits(alone, tmp_path / "cut")
  total = metrics.goodput(read_rows(tmp_path / "cut" / "toy" / "timing.jsonl"))
  assert total["starts"] >= 3 and total["lost_s"] == 0 and 0 < total["step_s"] < total["wall_s"]


@pytest.mark.slow
def test_each_process_reads_back_what_it_wrote_and_all_save_whatever_each_of_them_lists(tmp_path):
  """So that the checksums of a large checkpoint are there within a notice of preemption."""
  together(2, "tests/worker.py", "--do=save", f"--workdir={tmp_path}", heartbeat_s=UNHURRIED_S, timeout=PATIENCE_S)
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4", "9"]
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
def test_four_processes_train_and_evaluate_as_one_does(alone, half, tmp_path):
  """In two parts."""
  workdir = shutil.copytree(half, tmp_path / "run")
  printed = together(4, *toy(workdir), heartbeat_s=UNHURRIED_S)
  assert_same_numbers(workdir, alone)
  assert len(list((workdir / "toy").glob("events.*"))) == len(list((half / "toy").glob("events.*"))) + 1
  assert "done at" in printed[0] and not any(printed[1:])


@pytest.mark.slow
@pytest.mark.parametrize("num, more", [(1, ()), (2, ('--mesh={"tensor": 2}',))])
def test_what_four_saved_others_take_up(alone, half, tmp_path, num, more):
  """Saved by four processes that divide rows, taken up by one, and by two that divide the weights alone."""
  workdir = shutil.copytree(half, tmp_path / "run")
  together(num, *toy(workdir, *more), heartbeat_s=UNHURRIED_S)
  assert_same_numbers(workdir, alone)
  before = (workdir / "toy" / "metrics.jsonl").read_bytes()
  again = together(num, *toy(workdir, *more), heartbeat_s=UNHURRIED_S)
  assert "it was done before" in again[0] and not any(again[1:]) and (workdir / "toy" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_every_division_gives_the_same_batches(data_dir, compilation_cache, tmp_path):
  """With rows that are shared by two processes of four, as by one."""
  path = tmp_path / "short.py"
  path.write_text(CONFIG.format(data_dir=str(data_dir)))
  cfg = quickstart.get_config("smoke")
  cfg.data_dir = str(data_dir)
  run = Run(cfg, tmp_path)
  loader = run.loader(run.cfg.stages[-1])
  one = [to_host(run.put(loader.batch(k)[1])["sample_id"]).tolist() for k in range(6)]
  assert all(len(ids) == 8 for ids in one)
  printed = together(4, "tests/worker.py", "--do=batches", f"--config={path}", f"--workdir={tmp_path}", "--config.mesh.fsdp=2",
                     "--config.mesh.tensor=2", heartbeat_s=UNHURRIED_S)
  assert [json.loads(line) for line in printed[0].splitlines()] == one


# One of them fails.


@pytest.mark.slow
@pytest.mark.parametrize("num, victim", [(4, 2), (2, 0)])
def test_when_one_is_killed_the_others_end(lost, num, victim):
  """Also when it is process 0, which holds the coordination service."""
  for i, (code, _, stderr) in enumerate(lost[f"{num} wait"]):
    if i != victim:
      assert code == processes.EXIT_CODE, stderr[-3000:]
      assert len(error_lines(stderr)) == 1 and "start all processes again" in error_lines(stderr)[0], stderr
      assert f"Process {victim}" in error_lines(stderr)[0] and "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_mistake_of_one_ends_all(tmp_path, victim):
  results = ends(start(3, "tests/worker.py", "--do=wait", f"--workdir={tmp_path}", f"--victim={victim}", "--mistake",
                       heartbeat_s=UNHURRIED_S), PATIENCE_S)
  for i, (code, _, stderr) in enumerate(results):
    whose = "" if i == victim else f"Process {victim} failed: "
    assert code == 1 and error_lines(stderr) == [f"error: {whose}This process alone made a mistake."], stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_process_that_never_starts_is_waited_for_in_vain(tmp_path):
  (code, _, stderr), = ends(start(1, "tests/worker.py", "--do=wait", f"--workdir={tmp_path}", f"--coordinator=127.0.0.1:{free_port()}",
                                  "--num_processes=2", "--process_id=0", "--connect_timeout=5"), PATIENCE_S)
  assert code == processes.EXIT_CODE and len(error_lines(stderr)) == 1 and "did not meet" in stderr, stderr


@pytest.mark.slow
def test_a_killed_job_goes_on_from_its_last_checkpoint(alone, lost, tmp_path):
  (code, _, stderr), _ = lost["toy"]
  assert code == processes.EXIT_CODE and len(error_lines(stderr)) == 1, stderr[-3000:]
  workdir = shutil.copytree(lost["toy's folder"], tmp_path / "run")
  together(2, *toy(workdir), heartbeat_s=UNHURRIED_S)
  assert_same_numbers(workdir, alone)


@pytest.mark.slow
def test_killed_at_a_random_moment_a_job_ends_bit_identical(tmp_path):
  """Some of the kill points of which tests/kill_points.py makes more."""
  assert kill_and_compare(Job(toy, 2), tmp_path, num_kills=1, seed=1) >= 1


@pytest.mark.slow
def test_whichever_is_asked_all_stop_after_one_step(tmp_path):
  """Asked before the first step of a stage that goes on from 500."""
  started = start(2, "tests/worker.py", "--do=stop", f"--workdir={tmp_path}", heartbeat_s=UNHURRIED_S)
  for i in range(2):
    wait_for((tmp_path / f"started{i}").exists, started)
  started[1].send_signal(signal.SIGTERM)
  said = [json.loads(stdout.splitlines()[-1]) for code, stdout, stderr in ends(started, PATIENCE_S) if code == 0 or pytest.fail(stderr[-2000:])]
  assert said[0] == said[1] and said[0][0] == "one 500"
  assert said[0][1:] == [[7, 2**40, 2**40 + 1], ["", "stop", False, "0"]]


@pytest.mark.slow
def test_a_notice_ends_a_process_that_does_not_stop_by_itself(lost):
  assert [code for code, _, _ in lost["noticed"]] == [processes.EXIT_CODE, -signal.SIGTERM], lost["noticed"]


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_between_micro_batches_goes_on_where_it_was(tmp_path):
  """Eight questions in a step and one after it: the 22nd is within the third, and so is the one that both agree on."""
  job = ("--accumulate=8", "--stop_after=micro_batch")
  together(1, *toy(tmp_path / "alone", *job))
  for code, _, stderr in ends(start(2, *toy(tmp_path / "cut", *job, "--ask_at=22"), heartbeat_s=UNHURRIED_S), PATIENCE_S):
    assert code == processes.EXIT_CODE and "is saved at step 2 of 12" in stderr and "Traceback" not in stderr, stderr[-3000:]
  together(2, *toy(tmp_path / "cut", *job), heartbeat_s=UNHURRIED_S)
  assert_same_numbers(tmp_path / "cut", tmp_path / "alone")


@pytest.mark.slow
def test_processes_agree_on_saves_by_time(alone, tmp_path):
  """Whose clock it is, is killed between two of them."""
  job = toy(tmp_path, "--save_every=1000", "--save_every_s=0.5")
  started = start(2, *job, SLOW, heartbeat_s=UNHURRIED_S)
  saved = lambda: saved_steps(tmp_path)
  wait_for(saved, started)
  for one in started:
    one.send_signal(signal.SIGKILL)
  ends(started, PATIENCE_S)
  step = max(saved())
  together(2, *job, heartbeat_s=UNHURRIED_S)
  assert 0 < step < STEPS and [row["step"] for row in read_rows(tmp_path / "toy" / "timing.jsonl") if "wall_s" in row].count(step) >= 1
  assert_same_numbers(tmp_path, alone)


@pytest.mark.slow
def test_a_machine_whose_disk_is_new_takes_its_shards_from_a_replica(alone, tmp_path):
  """All are killed without a notice, before any checkpoint. Weights are divided in two, and each half is on two disks."""
  disk = lambda i: tmp_path / f"disk{i}"
  job = toy(tmp_path / "run", "--save_every=1000", '--mesh={"data": 2, "fsdp": 2}')
  options = {"extra": lambda i: (f"--local_copies={disk(i)}",), "heartbeat_s": UNHURRIED_S}
  started = start(4, *job, SLOW, **options)
  wait_for(lambda: all(list(disk(i).glob(f"*/*/{i}")) for i in range(4)), started)
  for one in started:
    one.send_signal(signal.SIGKILL)
  ends(started, PATIENCE_S)
  shutil.rmtree(disk(3))
  results = ends(start(4, *job, **options), PATIENCE_S)
  for code, _, stderr in results:
    assert code == 0, stderr[-3000:]
  step = int(re.search(r"goes on at step (\d+) from copies .* newest checkpoint is of step None", results[0][2])[1])
  assert step in saved_steps(tmp_path / "run") and not list(tmp_path.glob("disk*/*"))
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


@pytest.mark.parametrize("num", [1, 2])
def test_a_lost_worker_is_told_with_one_advice(num, monkeypatch, capsys):
  told = []
  monkeypatch.setattr(processes.jax, "process_count", lambda: num)
  monkeypatch.setattr(processes, "_fail_all", lambda sentence, code: told.append((sentence, code)))
  for sentence in ("A worker ended. The same command goes on.", "A worker ended."):
    with pytest.raises(SystemExit, match="75"):
      processes.fail_for_now(sentence)
  again = "A worker ended. Start all processes again, and training goes on from the last checkpoint."
  assert told == [(again, 75)] * 2 * (num > 1)
  assert num > 1 or capsys.readouterr().err == "error: A worker ended. The same command goes on.\n" * 2


def test_a_process_is_lost_when_it_says_nothing_new(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
  beats, found = processes._Heartbeats(12), lambda second: [(f"qimg2/beat/{i}", f"{second}") for i in range(12) if i != 11 or second < 3]
  for clock[0] in range(1, 6):
    assert beats.lost(found(clock[0]), 2.5) == ([11] if clock[0] == 5 else [])


def test_rows_need_not_lie_together():
  """As on a TPU slice, where the devices of a machine are a square of the grid."""
  loader = object.__new__(Loader)
  loader._process = (0, 1, 4, 5), 8
  assert loader.own_rows(16).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
