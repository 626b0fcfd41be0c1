"""What a notebook needs beside the launchers' functions: which device there is, and the curves of a run, also while it trains."""

import contextlib
import dataclasses
import io
import json
import threading
from collections.abc import Callable, Iterator

import jax
from absl import logging
from PIL import Image

from qimg2.analysis.roofline import GIB, device_memory
from qimg2.places import Place, find_place
from qimg2.runtime.report import figure_png, loss_curves
from qimg2.training.metrics import read_rows


@dataclasses.dataclass(frozen=True)
class Device:
  """The devices of this process, which are alike.

  Attributes:
    backend: "cpu", "gpu" or "tpu".
    kind: what JAX calls one, such as "TPU v5 lite".
    num: how many there are.
    memory_bytes: what JAX may use of one's memory; 0 where it does not say, as on a CPU.
    bfloat16: whether its products of bfloat16 are faster than those of float32.
  """
  backend: str
  kind: str
  num: int
  memory_bytes: int
  bfloat16: bool

  def __str__(self) -> str:
    memory = f", {self.memory_bytes / GIB:.1f} GiB of memory for JAX" if self.memory_bytes else ""
    return f"{self.num} x {self.kind} ({self.backend}){memory}"


def device_at_hand() -> Device:
  """The devices that JAX finds. From then on this process holds them: on a TPU no other one can have them."""
  first = jax.devices()[0]
  # NVIDIA's have tensor cores for bfloat16 from compute capability 8.0 on; a T4 has 7.5.
  bfloat16 = first.platform == "tpu" or first.platform == "gpu" and float(getattr(first, "compute_capability", None) or 0) >= 8
  return Device(first.platform, first.device_kind, jax.device_count(), device_memory(first) or 0, bfloat16)


def curves(workdir: str | Place) -> Image.Image:
  """The losses of each stage of a run, one above the other in the order of its config, as far as it has come.

  Raises:
    ValueError: no stage has a row in its metrics.jsonl yet.
  """
  if (sheet := _curves(find_place(workdir, "workdir"))) is None:
    raise ValueError(f"There are no losses in {workdir} yet: they come with the first steps of a stage.")
  return sheet


def _curves(folder: Place) -> Image.Image | None:
  pictures, config = [], folder / "config.json"
  for stage in json.loads(config.read_text(encoding="utf-8"))["config"]["stages"] if config.exists() else ():
    if found := loss_curves(read_rows(folder / stage["name"] / "metrics.jsonl")):
      pictures.append(Image.open(io.BytesIO(figure_png(found, f"loss of {stage['name']}", log=True))).convert("RGB"))
  if not pictures:
    return None
  sheet = Image.new("RGB", (pictures[0].width, sum(one.height for one in pictures)), "white")
  for number, one in enumerate(pictures):  # all of one size
    sheet.paste(one, (0, number * one.height))
  return sheet


@contextlib.contextmanager
def watching(workdir: str | Place, show: Callable[[Image.Image], None], every_s: float = 20.0) -> Iterator[None]:
  """While its body runs, `show` gets the run's `curves` every `every_s` seconds, from a thread, and once more at the end:

    with watching("runs/mine", display(display_id=True).update):
      train(config, "runs/mine")

  Nothing is shown before there are losses. If `show` raises, the log says so, nothing more is shown, and the body goes on.
  """
  folder, ended, works = find_place(workdir, "workdir"), threading.Event(), True

  def is_shown() -> bool:
    try:
      if (sheet := _curves(folder)) is not None:
        show(sheet)
      return True
    except Exception as error:  # whatever it is: what cannot be shown takes nothing from what is trained
      logging.warning("The curves cannot be shown any more (%s: %s): training goes on.", type(error).__name__, " ".join(str(error).split())[:200])
      return False

  def keep_showing() -> None:
    nonlocal works
    while works and not ended.wait(every_s):
      works = is_shown()

  thread = threading.Thread(target=keep_showing, name="watching", daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    if works:
      is_shown()
