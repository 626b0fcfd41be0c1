"""Training as a user starts it, in processes of its own: what kills, stops and other processes leave as it was. That it holds at every moment is
shown on the toy job, in tests/test_processes.py, by the same code in a hundredth of the time; here each happens once."""

import json
import shutil
import signal

import commands
import numpy as np
import pytest
from kill_points import assert_same_bits
from many import UNHURRIED_S, ends, error_lines, start, together, train, wait_for

from qimg2.training import faults, metrics
from qimg2.training.metrics import read_rows

STAGES, STEPS = ("high_resolution", "sft"), 6
CONFIG = """
from configs import quickstart

def get_config(arg=""):
  cfg = quickstart.get_config("smoke")
  cfg.data_dir = {data_dir!r}
  cfg.stages = cfg.stages[2:]  # the second one starts from the first
  del cfg.evals["glyphs"], cfg.evals["glyph_edits"]
  cfg.stages[0].start_from, cfg.sampling.guidance = "scratch", 1.0
  cfg.stages[0].frozen.vae = cfg.stages[1].frozen.vae = "default"
  for stage in cfg.stages:
    stage.mixture = stage.mixture[1:]  # editing, which is drawing and more
  cfg.stages[0].num_steps, cfg.stages[0].save_every_steps, cfg.stages[0].eval_every_steps, cfg.stages[0].sample_every_steps = {steps}, 2, 3, 6
  cfg.stages[0].optimizer.schedule, cfg.stages[0].optimizer.warmup_steps = "constant", 2
  cfg.stages[1].optimizer, cfg.stages[1].algorithm = cfg.stages[0].optimizer, cfg.stages[0].algorithm  # so that their programs are the same
  cfg.stages[0].evaluation.num_samples = cfg.stages[1].evaluation.num_samples = 16
  cfg.sampling.num_images = 2
  return cfg
"""
# Each device adds up its rows, and then the sums are added: another order than one device's, so the losses differ in the last bits. Measured
# is at most 1e-6; a wrong row or a wrong noise moves them by more than 1e-3.
RTOL = 1e-5


@pytest.fixture(scope="module")
def config_file(data_dir, tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "short.py"
  path.write_text(CONFIG.format(data_dir=str(data_dir), steps=STEPS))
  return path


@pytest.fixture(scope="module")
def alone(config_file, compilation_cache, tmp_path_factory):
  """Folder of the run of one process on one device, which nothing stopped."""
  workdir = tmp_path_factory.mktemp("alone")
  ended = commands.process(*train(config_file, workdir, compilation_cache)[1:])
  assert ended.returncode == 0, ended.stderr[-3000:]
  return workdir


def interrupt(command, path, num_rows, number):
  """(exit code, stderr) of one process that gets a signal when `path` holds `num_rows` rows."""
  process, = start(1, *command)
  wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= num_rows, [process])
  process.send_signal(number)
  (code, _, stderr), = ends([process], 300)
  return code, stderr


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_and_then_killed_ends_bit_identical(alone, config_file, compilation_cache, tmp_path):
  run = tmp_path / "run"
  command, written = train(config_file, run, compilation_cache), run / "high_resolution" / "metrics.jsonl"
  code, message = interrupt(command, written, 1, signal.SIGTERM)
  assert code == faults.EXIT_CODE == 75, message
  assert "Stage high_resolution was asked to stop" in message and "the same command goes on" in message and "Traceback" not in message
  code, _ = interrupt(command, run / "sft" / "metrics.jsonl", 1, signal.SIGKILL)  # the stage before it is done
  assert code == -signal.SIGKILL
  together(1, *command)
  assert_same_bits(alone, run)
  total = metrics.goodput(read_rows(run / "high_resolution" / "timing.jsonl"))
  assert total["starts"] == 2 and 0 < total["step_s"] < total["wall_s"]
  assert "Goodput" in (run / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_train_evaluate_and_draw_as_one_does(alone, config_file, compilation_cache, tmp_path):
  """Rows and weights are divided over them; several devices of each, and other divisions, are the toy job's (tests/test_processes.py)."""
  printed = together(2, *train(config_file, tmp_path, compilation_cache), heartbeat_s=UNHURRIED_S)
  for stage in STAGES:
    ours, theirs = (read_rows(workdir / stage / "metrics.jsonl") for workdir in (alone, tmp_path))
    assert [sorted(row) for row in ours] == [sorted(row) for row in theirs] and any("loss" in row for row in ours)
    for mine, its in zip(ours, theirs):
      np.testing.assert_allclose([mine[key] for key in sorted(mine)], [its[key] for key in sorted(mine)], rtol=RTOL)
  names = lambda folder: sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts
                                and "frozen" not in path.parts and not path.name.startswith("events."))
  assert names(tmp_path) == names(alone) and (tmp_path / "high_resolution" / "samples" / f"{STEPS:08d}_ti2i.png").is_file()
  assert len(list((tmp_path / "high_resolution").glob("events.*"))) == 1
  assert "Report:" in printed[0] and not any(printed[1:])


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(alone, tmp_path, one_device):
  arguments = lambda num: (f"--workdir={alone}", "--prompt=red star on white", "--prompt=blue A", "--prompt=a green K", "--num_steps=2",
                           "--guidance=2", f"--out={tmp_path}/{num}.png", f"--save_latents={tmp_path}/{num}.npy", f"--pictures={tmp_path}/{num}")
  printed = [commands.launch("launch.sample", *arguments(1)).stdout, *together(2, "-m", "launch.sample", *arguments(2), heartbeat_s=UNHURRIED_S)]
  assert "3 pictures" in printed[0] and "3 pictures" in printed[1] and not printed[2]
  one, two = (np.load(tmp_path / f"{num}.npy") for num in (1, 2))
  np.testing.assert_allclose(two, one, atol=1e-4)
  assert len(list((tmp_path / "2").iterdir())) == 3


@pytest.mark.slow
def test_two_processes_evaluate_as_one(alone, tmp_path, one_device):
  results = []
  for num in (1, 2):
    workdir = shutil.copytree(alone, tmp_path / str(num))
    record = json.loads((workdir / "config.json").read_text())
    record["config"]["evals"] = {"glyph_edits": {"num_prompts": 4}}  # which draws, from more
    (workdir / "config.json").write_text(json.dumps(record))
    if num == 1:
      printed = [commands.launch("launch.evaluate", f"--workdir={workdir}").stdout]
    else:
      printed = together(num, "-m", "launch.evaluate", f"--workdir={workdir}", heartbeat_s=UNHURRIED_S)
    assert printed[0].startswith("Evaluation of stage sft") and not any(printed[1:])
    results.append(json.loads((workdir / "evaluation.json").read_text()))
  assert results[0] == results[1]


@pytest.mark.slow
def test_another_config_on_one_process_is_refused(config_file, compilation_cache, tmp_path):
  results = ends(start(2, *train(config_file, tmp_path, compilation_cache), extra=lambda i: (f"--config.seed={i}",), heartbeat_s=UNHURRIED_S), 300)
  for code, _, stderr in results:
    assert code == 1 and len(error_lines(stderr)) == 1 and "The config of process 1 is not that of process 0" in stderr, stderr
  assert not (tmp_path / "config.json").exists()
