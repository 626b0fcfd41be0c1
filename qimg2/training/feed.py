"""Batches on their way from the loader to the device, while a step runs."""

import time
from collections.abc import Callable, Iterator

import jax


class Feed:
  """A loader's batches, in its order, each on the device before its step is due, and how long the steps had to wait for them.

  `prefetch`, called when a step has just been dispatched, reads the batch of the next one and sends it to the device while the step runs.
  What the loader raises there is raised by the `get` that asks for this batch, after the step before it was logged and saved.
  """

  def __init__(self, batches: Iterator[tuple[int, dict]], put: Callable[[dict], dict]):
    """Args: (bucket number, this process's rows) for each step; what sends the rows to the device."""
    self._batches, self._put = batches, put
    self._next: tuple | None = None
    self._error: Exception | None = None
    self._num = 0
    self._blocked_s = self._waited_s = 0.0

  def prefetch(self, running: jax.Array | None = None) -> None:
    """Reads the next batch and starts to send it. `running` is a result of the step that was dispatched last, None when there is none."""
    start = time.monotonic()
    try:
      bucket, batch = next(self._batches)
      self._blocked_s += time.monotonic() - start
      self._next = bucket, batch, self._put(batch)
    except Exception as error:  # whatever it is, it belongs to the next step
      self._error = error
    self._num += 1
    if running is None or running.is_ready():
      self._waited_s += time.monotonic() - start

  def get(self) -> tuple[int, dict, dict]:
    """(bucket number, this process's rows, global arrays) of the batch that was prefetched, which is then forgotten here.

    Raises:
      Exception: what the loader raised for this batch.
    """
    if self._error is not None:
      raise self._error
    batch, self._next = self._next, None
    return batch

  def timing(self, elapsed_s: float) -> dict[str, float]:
    """What to log of the time since the last call, `elapsed_s` seconds.

    `data_wait_share`: the share of it, 0 to 1, in which the loop waited for a batch although no dispatched step was running any more. An upper
    bound of the time that the device stood idle for want of data, because a wait counts from its beginning even if the step ended within it; a
    wait that ends while a step is still running costs nothing and does not count.
    `loader_batches_per_second`: batches per second of waiting for the loader. Its throughput where it is what limits; far more than the steps
    need where batches are ready when they are asked for.
    """
    timing = {"data_wait_share": min(1.0, self._waited_s / elapsed_s), "loader_batches_per_second": self._num / max(self._blocked_s, 1e-9)}
    self._num, self._blocked_s, self._waited_s = 0, 0.0, 0.0
    return timing
