"""What the settings of these tests catch, which any mistake of this kind would meet in a test of training."""

import jax
import jax.numpy as jnp
import pytest

from configs import quickstart
from qimg2.runtime.rehearsal.shapes import Choice
from qimg2.runtime.rehearsal.steps import Rehearsal
from qimg2.training import trainer
from tests.jobs import toy


def test_what_nobody_put_on_the_device_stops_the_loop(tmp_path, monkeypatch):
  monkeypatch.setattr(trainer, "put_batch", lambda batch, mesh, rules: batch)
  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    toy.run(toy.Job("supervised", num_steps=2, num_devices=1), tmp_path)


def test_arrays_of_different_ranks_do_not_meet_unasked():
  with pytest.raises(ValueError, match="rank_promotion"):
    jnp.ones((2, 3)) + jnp.ones(3)


@pytest.mark.slow
def test_the_quickstarts_step_computes_what_its_networks_ask_for():
  """Products and memory of the whole config's step, which no machine's speed changes: nothing is computed twice, or kept that need not be."""
  rehearsal = Rehearsal(quickstart.get_config(), jax.devices()[:1])
  stage = rehearsal.cfg.stages[2]
  bucket, = rehearsal.buckets(stage, Choice(tasks=("t2i",), squares=True))
  row = rehearsal.row(stage, bucket)
  assert 1 < row.traffic.flops / sum(row.model_flops.values()) < 1.03
  assert row.peak_bytes < 42e6


def test_a_run_compiles_its_programs_once(smoke_run):
  """Four stages with seven buckets: their steps, validations and pictures, and what is around them. A step that was compiled anew for each batch, or
  an eager sum in a loop over weights, would be many more."""
  assert 20 < smoke_run.num_compilations < 130
