"""A trace of a few steps: what the host and the devices did, for XProf (`xplane.pb`) and for Perfetto (`perfetto_trace.json.gz`)."""

from typing import Any

import jax
from absl import logging

from qimg2.places import Growing, Place


class Profiler:
  """Traces steps `window[0]` to `window[1]` of a stage, counted from 1, once, into a folder, on the first process. A step before which training
  resumed is not traced."""

  def __init__(self, folder: Place, window: tuple[int, int] | None):
    """Args: folder to write; first and last step, None for no trace."""
    self._folder, self._window, self._running, self._growing = folder, window, False, None

  def before(self, step: int) -> None:
    """Begins where `step` is the first to trace."""
    if self._window and step == self._window[0] and jax.process_index() == 0:  # several would write into one folder
      self._growing = Growing(self._folder)
      jax.profiler.start_trace(str(self._growing.local), create_perfetto_trace=True)
      self._running = True

  def after(self, step: int, result: Any) -> None:
    """Ends where `step`, whose `result` is waited for, is the last to trace."""
    if self._running and step >= self._window[1]:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Ends a trace that is running, such as that of a stage with fewer steps."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
      self._growing.close()
      logging.info("The trace of steps %d to %d is in %s.", *self._window, self._folder)
