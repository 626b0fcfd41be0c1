"""Rules that end a stage before its last step, for methods that learn from rewards.

A policy learns what a reward pays for, which is not always what it was meant to pay for: the reward rises while pictures get worse (arXiv 2210.10760
measures it for language). A reward that is not trained on, and figures of the pictures (`qimg2.training.pictures`), show it. At every
`every_steps`-th step the means of the metrics over the steps since the last such look are compared:

  fall   the mean of a metric is below its best look by more than `by`, while that of another metric, where one is named, is above what it was then
  band   the mean of a metric is not between two numbers

A rule that holds at `patience` looks in a row ends the stage: it is saved, and a start with the same rules ends in the same sentence, so that no
later stage learns from it. With other rules, or none, it goes on. A look without a finite number, such as that of a gold reward whose service is
down, says nothing: a rule that held holds on, and none begins to. After `SILENT` times `patience` such looks in a row nobody watches any more, which
ends the stage, too. Metrics are the same on all processes, and the sums are saved with each checkpoint,
so that a run that was killed ends at the same step as one that was not. Looking reads the results of all steps until then: the device waits for it
once in `every_steps`. Metrics are those of steps and rollouts; those of validation and of evaluation suites are not looked at. At the last step of a
stage there is nothing left to end: what holds there is only logged.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from absl import logging

SILENT = 3  # times `patience` looks that a metric may have no finite number


class Ended(ValueError):
  """A rule of the watch ended the stage, which is saved; the same command ends here again."""


@dataclasses.dataclass(frozen=True)
class Fall:
  """How far a metric may fall below its best look.

  Attributes:
    by: in the metric's own unit, above 0.
    rising: name of another metric, such as that of the trained reward, that must be higher than at that look; "" for none.

  Raises:
    ValueError: `by` is not above 0.
  """
  by: float
  rising: str = ""

  def __post_init__(self):
    if not self.by > 0:
      raise ValueError(f"by is {self.by}: say by how much, above 0, the metric may fall below its best.")


@dataclasses.dataclass(frozen=True)
class Settings:
  """The rules of a stage; without `bands` and `falls` there are none, and nothing waits.

  Attributes:
    every_steps: steps from one look to the next.
    patience: looks in a row at which a rule must hold.
    bands: metric -> (least, most) of its mean, such as {"pictures/dark": (0.0, 0.5)}.
    falls: metric -> `Fall`, such as {"reward/ocr": Fall(0.1, "reward/glyph")}.

  Raises:
    ValueError: a number below 1, or a band without an inside.
  """
  every_steps: int = 10
  patience: int = 3
  bands: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
  falls: Mapping[str, Fall] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if min(self.every_steps, self.patience) < 1:
      raise ValueError(f"watch.every_steps is {self.every_steps} and watch.patience {self.patience}: give at least 1.")
    for name, (least, most) in self.bands.items():
      if not least < most:
        raise ValueError(f"watch.bands.{name} is ({least}, {most}): give the lower number first.")

  @property
  def metrics(self) -> tuple[str, ...]:
    """Names of all metrics that the rules speak of."""
    return tuple(dict.fromkeys([*self.bands, *self.falls, *(fall.rising for fall in self.falls.values() if fall.rising)]))


class Watch:
  """Follows the metrics of a stage, in order, and says when a rule ends it.

  Attributes:
    ended: the sentence of the rule that ended the stage, "" for none.
  """

  def __init__(self, settings: Settings, saved: Mapping[str, Any] | None = None):
    """Args: rules; what `saved` gave earlier, which counts where it is of the same rules."""
    self._settings, self._metrics = settings, settings.metrics
    own = self._rules()
    saved = saved if saved and saved["settings"] == own else {}
    self.ended: str = saved.get("ended", "")
    self._sums = {name: tuple(pair) for name, pair in saved.get("sums", {}).items()}  # metric -> (sum, number of steps) since the last look
    self._best = dict(saved.get("best", {}))  # metric that may not fall -> its mean, that of the one that rises, and the step, at its best look
    self._held = dict(saved.get("held", {}))  # rule -> looks in a row at which it held
    self._silent = dict(saved.get("silent", {}))  # metric -> looks in a row without a finite number
    self._seen = set(saved.get("seen", ()))

  def saved(self) -> dict[str, Any]:
    """All that it remembers, JSON-serialisable."""
    return {"settings": self._rules(), "ended": self.ended, "sums": {name: list(pair) for name, pair in self._sums.items()}, "best": self._best,
            "held": self._held, "silent": self._silent, "seen": sorted(self._seen)}

  def observe(self, metrics: Mapping[str, Any]) -> None:
    """Takes the metrics of a step. A number that is not finite is left out of the mean."""
    for name in self._metrics:
      value = float(metrics.get(name, math.nan))
      self._seen |= {name} & set(metrics)
      if math.isfinite(value):
        total, num = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value, num + 1)

  def reason(self, stage: str, step: int) -> Ended:
    """What to raise when a rule has ended a stage after `step`, and it is saved."""
    return Ended(f"Stage {stage} was ended by its watch after step {step}, where it is saved: {self.ended}. Look at its samples; the same command "
                 "ends here again, and goes on with other rules in the stage's section watch, or none.")

  def is_due(self, step: int) -> bool:
    """Whether there is a look after `step`."""
    return bool(self._metrics) and step % self._settings.every_steps == 0

  def look(self, step: int, known: Mapping[str, Any]) -> str:
    """Compares the means since the last look, and returns the sentence that ends the stage after `step`, "" for none.

    A rule about a metric without a finite number since then stays as it was. `known` are the metrics of this step, for a message.

    Raises:
      ValueError: a rule is about a metric that no step had until now.
    """
    unknown = [name for name in self._metrics if name not in self._seen]
    if unknown:
      raise ValueError(f"watch has a rule about {unknown[0]!r}, which none of the first {step} steps logged: their metrics are "
                       f"{', '.join(sorted(known))}.")
    means, self._sums = {name: total / num for name, (total, num) in self._sums.items()}, {}
    self._silent = {name: self._silent.get(name, 0) + 1 for name in self._metrics if name not in means}
    said = {f"band {name}": self._off_band(name, means) for name in self._settings.bands}
    said |= {f"fall {name}": self._fallen(name, means, step) for name in self._settings.falls}
    self._held = {rule: self._held.get(rule, 0) + bool(sentence) for rule, sentence in said.items() if sentence != ""}
    looks = lambda num: f"at {num} looks in a row, {self._settings.every_steps} steps apart"
    patience, most = self._settings.patience, self._settings.patience * SILENT
    over = [f"{sentence}, {looks(patience)}" for rule, sentence in said.items() if sentence and self._held[rule] >= patience]
    over += [f"{name} had no finite number, {looks(most)}, so that its rules say nothing" for name, num in self._silent.items() if num >= most]
    if over:
      self.ended = over[0]
      logging.warning("The watch at step %d: %s.", step, self.ended)
    return self.ended

  def _off_band(self, name: str, means: Mapping[str, float]) -> str | None:
    """What the rule says, "" where it does not hold, None where there is no number."""
    least, most = self._settings.bands[name]
    if name not in means:
      return None
    if least <= means[name] <= most:
      return ""
    return f"{name} was {means[name]:.4g}, outside its band from {least:g} to {most:g}"

  def _fallen(self, name: str, means: Mapping[str, float], step: int) -> str | None:
    """As `_off_band`."""
    fall = self._settings.falls[name]
    if name not in means or (fall.rising and fall.rising not in means):
      return None
    mean, other = means[name], means.get(fall.rising, 0.0)
    best = self._best.get(name)
    if best is None or mean > best["mean"]:
      self._best[name] = {"mean": mean, "rising": other, "step": step}
      return ""
    if best["mean"] - mean <= fall.by or (fall.rising and other <= best["rising"]):
      return ""
    rose = f" while {fall.rising} rose from {best['rising']:.4g} to {other:.4g}" if fall.rising else ""
    return f"{name} fell to {mean:.4g} from {best['mean']:.4g} at step {best['step']}{rose}"

  def _rules(self) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    rules = dataclasses.asdict(self._settings)
    return rules | {"bands": {name: list(band) for name, band in self._settings.bands.items()}}
