"""Programs that are compiled while a stage trains."""

import dataclasses
import pathlib
import subprocess
import sys
import threading

import pytest

from qimg2.runtime.rehearsal import measure
from qimg2.training.faults import Settings
from qimg2.training.programs import StepPrograms, num_threads
from qimg2.training.stage import step_parts
from qimg2.training.state import abstract_state
from tests.jobs import toy, toy_methods


class Compiler:
  """Compiles a bucket's program when the test says so."""

  def __init__(self):
    self.begun, self._may = [], [threading.Event() for _ in range(4)]

  def __call__(self, bucket):
    self.begun.append(bucket)
    assert self._may[bucket].wait(30)
    if bucket == 1:
      raise ValueError("no room")
    return f"program {bucket}"

  def finish(self, *buckets):
    for bucket in buckets:
      self._may[bucket].set()


@pytest.fixture
def compiler(monkeypatch):
  monkeypatch.setattr("os.cpu_count", lambda: 4)  # one thread
  compiler = Compiler()
  yield compiler
  compiler.finish(0, 1, 2, 3)


def test_a_program_is_there_when_it_is_asked_for_whatever_the_others_do(compiler):
  programs = StepPrograms(compiler, [2, 0, 3, 1])
  assert not programs.is_there(2)
  compiler.finish(2)
  programs.wait("", 1)
  assert programs.is_there(2) and programs[2] == "program 2" and not programs.is_there(0)
  compiler.finish(0, 3)
  assert programs[3] == "program 3" and compiler.begun[:3] == [2, 0, 3]
  compiler.finish(1)
  with pytest.raises(ValueError, match="no room"):
    programs[1]  # pylint: disable=pointless-statement
  with pytest.raises(ValueError, match="no room"):
    programs.wait("", 4)
  programs.close()


def test_what_is_not_begun_is_given_up_at_the_end(compiler):
  programs = StepPrograms(compiler, [2, 0, 3, 1])
  compiler.finish(2)
  programs.wait("", 1)
  while len(compiler.begun) < 2:
    pass
  programs.close()
  compiler.finish(0, 1, 3)
  assert programs[0] == "program 0" and compiler.begun == [2, 0]


STOPPED = """
import sys, time
from qimg2.runtime import processes
from qimg2.training.programs import StepPrograms

def act():
  programs = StepPrograms(lambda bucket: time.sleep(600), range(3))
  programs.close()
  print("saved")
  sys.exit(75)
processes.together(act, processes.Rendezvous(), ())
"""


def test_a_process_that_is_asked_to_stop_does_not_wait_for_a_compiler():
  """Python joins threads at its end."""
  result = subprocess.run([sys.executable, "-c", STOPPED], cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True, timeout=300)
  assert (result.returncode, result.stdout) == (75, "saved\n"), result.stderr


def test_threads():
  assert [num_threads(num) for num in (1, 2, 31, 32, 208)] == [1, 1, 1, 2, 8]


def test_what_adds_a_micro_batch_keeps_no_argument_that_it_does_not_read():
  """The compiler for TPUs crashes where it is told to keep them, on steps of pictures, which leave the vision tower aside."""
  job = toy.Job("supervised", settings=dataclasses.replace(toy.SETTINGS, accumulate=2), tolerance=Settings(stop_after="micro_batch"))
  stage, mesh, rules = toy.stage_of(job)
  state = abstract_state(stage.algorithm, stage.optimizers, stage.specs, mesh, rules)
  _, add, _ = step_parts(stage, toy_methods.Nets(), state, {}, mesh)(0)
  moments = sum(measure.bytes_of(own) for own in state.opt.values())
  assert moments >= 2 * measure.bytes_of(state.params)
  assert measure.unread_bytes(add.arguments, add.compile({}).as_text()) >= moments
