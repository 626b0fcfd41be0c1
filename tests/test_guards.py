"""What the settings of these tests catch, which any mistake of this kind would meet in a test of training."""

import jax.numpy as jnp
import pytest

from qimg2.training import trainer
from tests.jobs import toy


def test_what_nobody_put_on_the_device_stops_the_loop(tmp_path, monkeypatch):
  monkeypatch.setattr(trainer, "put_batch", lambda batch, mesh, rules: batch)
  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    toy.run(toy.Job("supervised", num_steps=2, num_devices=1), tmp_path)


def test_arrays_of_different_ranks_do_not_meet_unasked():
  with pytest.raises(ValueError, match="rank_promotion"):
    jnp.ones((2, 3)) + jnp.ones(3)
