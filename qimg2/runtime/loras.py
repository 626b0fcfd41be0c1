"""LoRA files on the generator of whatever draws: a run or a published folder.

They are applied as they are trained, x W + s (x A) B: the generator's weights are neither copied nor changed, and drawing takes the few operations
more that A and B cost. Several files are added one after the other.
"""

from collections.abc import Mapping, Sequence

from qimg2 import adapters, sharding
from qimg2 import params as P
from qimg2.published.lora import open_lora
from qimg2.runtime.generator import Source
from qimg2.runtime.offload import Offloaded


def parse_lora(text: str) -> tuple[str, float]:
  """(path, scale) of FILE or FILE,SCALE; a scale of 1 where none is given, of 0 for none of it, below 0 for the opposite."""
  path, comma, scale = text.rpartition(",")
  try:
    return (path, float(scale)) if comma else (text, 1.0)
  except ValueError:
    return text, 1.0  # the comma is part of a name


class Loras:
  """Opened LoRA files for the generator of a source."""

  def __init__(self, source: Source, texts: Sequence[str]):
    """Args: networks and mesh; FILE or FILE,SCALE of each.

    Raises:
      ValueError: as `qimg2.published.lora.open_lora`.
    """
    self._files = [(open_lora(path, source.nets.model), scale) for path, scale in map(parse_lora, texts)]
    self._place = lambda specs: sharding.param_shardings(specs, source.mesh, source.rules)

  def on(self, weights: Mapping, abstract: bool = False) -> dict:
    """{network: weights} with the adapters on the generator; of `abstract` weights no file is read."""
    return {**weights, "mmdit": self._adapted(weights["mmdit"], abstract)}

  def on_offloaded(self, weights: Offloaded) -> Offloaded:
    """The same for weights that are on the devices only while their network runs."""
    own = {name: lambda name=name: weights[name] for name in weights}
    return Offloaded(own | {"mmdit": lambda: self._adapted(weights["mmdit"])})

  def _adapted(self, weights: dict, abstract: bool = False) -> dict:
    for file, scale in self._files:
      specs = file.specs()
      where = self._place(specs)
      weights = adapters.adapt(weights, P.abstract(specs, where) if abstract else file.load(where), scale)
    return weights
