"""A reward behind an HTTP endpoint of the user's: a model that needs a machine of its own.

A request is a POST of JSON, for at most `batch_size` pictures,

  {"tasks": [{"prompt": ..., "category": ..., field of the truth: ...}, ...], "pictures": [PNG in base64, ...]}

where with `send_sources` each task has "sources" too, a list of PNGs in base64. The reply is JSON, a number for each picture in their order, or null
for one that cannot be scored:

  {"rewards": [0.25, null, ...]}

A request that fails (no connection, no reply in time, status 429 or 500 to 599) is made again, after 1, 2, 4 ... times `backoff_s`; any other status
or reply is a mistake that repeating does not mend. Pictures without a number in the end have none, and the log says why.
"""

import base64
import concurrent.futures
import dataclasses
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from data_pipelines.transforms import encode_png
from qimg2.rewards import Reward, Scored, Task, missing, scored, without_pictures

SHOWN = 200  # signs of a reply that a message quotes


def service(url: str, batch_size: int = 16, parallel: int = 4, timeout_s: float = 60.0, retries: int = 3, backoff_s: float = 1.0,
            send_sources: bool = False) -> Reward:
  """What an HTTP endpoint says.

  Args:
    url: of the endpoint.
    batch_size: most pictures of a request.
    parallel: requests at a time, from each process of the run.
    timeout_s: seconds that a request may take.
    retries: how often a failed request is made again.
    backoff_s: seconds before the first time; each time twice as many.
    send_sources: whether the condition images of edits are sent, too.

  Raises:
    ValueError: no such address, or numbers out of range.
  """
  parts = urlsplit(url)
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise ValueError(f"url is {url!r}: give an address such as http://127.0.0.1:8000/score.")
  if min(batch_size, parallel) < 1 or retries < 0 or min(timeout_s, backoff_s) <= 0:
    raise ValueError(f"batch_size={batch_size}, parallel={parallel}, retries={retries}, timeout_s={timeout_s} and backoff_s={backoff_s}: give at "
                     "least 1, 1, 0, and seconds above 0.")
  return Reward(score_batch=Service(url, batch_size, parallel, timeout_s, retries, backoff_s, send_sources), sees_pictures=send_sources)


@dataclasses.dataclass(frozen=True)
class Service:
  """An endpoint; the attributes are the arguments of `service`."""
  url: str
  batch_size: int
  parallel: int
  timeout_s: float
  retries: int
  backoff_s: float
  send_sources: bool

  def __call__(self, pictures: np.ndarray, tasks: Sequence[Task]) -> list[Scored]:
    """(number, "") or (NaN, why) for each of the pictures [B, H, W, C] uint8."""
    with concurrent.futures.ThreadPoolExecutor(self.parallel, "requests") as threads:
      starts = range(0, len(tasks), self.batch_size)
      parts = threads.map(lambda i: self._ask(pictures[i:i + self.batch_size], tasks[i:i + self.batch_size]), starts)
      return [one for part in parts for one in part]

  def _ask(self, pictures: np.ndarray, tasks: Sequence[Task]) -> list[Scored]:
    request = urllib.request.Request(self.url, self._body(pictures, tasks), {"Content-Type": "application/json"})
    for attempt in range(self.retries + 1):
      if attempt:
        time.sleep(self.backoff_s * 2 ** (attempt - 1))
      try:
        with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
          return _numbers(reply.read(), len(tasks))
      except urllib.error.HTTPError as error:
        why = f"it answered {error.code}: {error.read(SHOWN).decode(errors='replace')}"
        if error.code != 429 and error.code < 500:
          return self._missing(why, len(tasks))
      except (OSError, http.client.HTTPException) as error:  # no connection, none that lasts, or no reply in time
        why = f"{type(error).__name__}: {error}"
      except ValueError as error:
        return self._missing(str(error), len(tasks))
    return self._missing(f"{why}; it was asked {self.retries + 1} times", len(tasks))

  def _missing(self, why: str, num: int) -> list[Scored]:
    return [missing(f"{self.url}: {' '.join(why.split())}")] * num

  def _body(self, pictures: np.ndarray, tasks: Sequence[Task]) -> bytes:
    told = [without_pictures(task) | ({"sources": [_png(source) for source in task["sources"]]} if self.send_sources else {}) for task in tasks]
    return json.dumps({"tasks": told, "pictures": [_png(picture) for picture in pictures]}).encode()


def _png(picture: np.ndarray) -> str:
  return base64.b64encode(encode_png(picture)).decode()


def _numbers(reply: bytes, num: int) -> list[Scored]:
  """What a reply says of `num` pictures; `ValueError` for one that is none."""
  try:
    found: Any = json.loads(reply)["rewards"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"its reply {reply[:SHOWN]!r} is no JSON object with rewards") from error
  if not isinstance(found, list) or len(found) != num or not all(one is None or type(one) in (int, float) for one in found):
    raise ValueError(f"its reply {reply[:SHOWN]!r} has not {num} rewards, numbers or null")
  return [missing("it gave null") if one is None else scored(float(one)) for one in found]
