"""A score that processes of a pool can import in a moment."""

import os
import signal


def score(task, picture):
  """How bright a picture is, of a task whose truth may be a mistake of some kind."""
  if task.truth == "refuse":
    raise ValueError("nothing can be read\nin it")
  if task.truth == "nan":
    return {"bright": float("nan"), "words": 2}
  if task.truth == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
  return {"bright": float(picture.mean() / 255), "words": len(task.prompt), "recognised": f"{task.prompt} ☃\u2028"}
