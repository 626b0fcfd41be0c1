"""The section `rewards` of a stage: name -> what it is and what it counts.

  rewards=dict(glyph=dict(weight=1.0), text=dict(kind="ocr", weight=dict(posters=1.0, other=0.2)), dark=dict(kind="function", ..., weight=0.0))

`kind` is a name of `qimg2.rewards.kinds`, by default that of the reward, and its settings stand beside it. `weight` is a number for all prompts, or
one for each prompt category; those that it does not name have that of "other", 0 unless it is given. A reward of weight 0 is watched and not learned
from.
"""

import dataclasses
import difflib
import inspect
import math
import typing
from collections.abc import Mapping
from typing import Any

from qimg2.algorithms import RESERVED, Rewards
from qimg2.rewards import Reward
from qimg2.rewards.kinds import KINDS
from qimg2.runtime.config.sections import checked, placed

OTHER = "other"


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """One reward of a stage.

  Attributes:
    kind: which of `KINDS`.
    weight: what it counts, or category -> what it counts there.
    timeout_s: seconds after which a picture has none.
    settings: all of the kind's.
  """
  kind: str
  weight: float | Mapping[str, float] = 1.0
  timeout_s: float = 60.0
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    weights = self.weight.values() if isinstance(self.weight, Mapping) else [self.weight]
    if not all(0 <= one < math.inf for one in weights):
      raise ValueError(f"weight is {self.weight!r}: give finite numbers of at least 0; 0 is a reward that is watched and not learned from, and one "
                       "that is to be low must itself be turned round.")
    if not 0 < self.timeout_s < math.inf:
      raise ValueError(f"timeout_s is {self.timeout_s}: give seconds above 0.")

  def section(self) -> dict[str, Any]:
    """As it stands in a config."""
    weight = dict(self.weight) if isinstance(self.weight, Mapping) else self.weight
    return {"kind": self.kind, "weight": weight, "timeout_s": self.timeout_s, **self.settings}

  def weight_in(self, category: str) -> float:
    """What it counts for prompts of a category."""
    return self.weight.get(category, self.weight.get(OTHER, 0.0)) if isinstance(self.weight, Mapping) else self.weight

  def make(self) -> Reward:
    """The reward."""
    return KINDS[self.kind](**self.settings)


def parse_rewards(sections: Any, where: str) -> dict[str, RewardConfig]:
  """Name -> reward of a stage's section, in the order of the names.

  Raises:
    ValueError: an unknown kind or key, with the nearest that there is; a value of another type, or one that the kind refuses; none that counts.
  """
  if not isinstance(sections, Mapping):
    raise ValueError(f"{where} is {sections!r}: give a section, such as dict(glyph=dict(weight=1.0)).")
  odd = [name for name in sections if not str(name).isidentifier() or name in RESERVED]
  if odd:
    raise ValueError(f"{where} has the name {odd[0]!r}: give one of letters, digits and _, other than {' and '.join(sorted(RESERVED))}.")
  found = {name: _reward(name, sections[name], f"{where}.{name}") for name in sorted(sections)}
  if found and not any(any(row) for row in declare(found).weights):
    raise ValueError(f"{where} has weight 0 everywhere, so that nothing is learned: give one of {', '.join(found)} another.")
  return found


def _reward(name: str, section: Any, where: str) -> RewardConfig:
  if not isinstance(section, Mapping):
    raise ValueError(f"{where} is {section!r}: give a section, such as dict(weight=1.0).")
  kind = section.get("kind", name)
  if kind not in KINDS:
    near = difflib.get_close_matches(str(kind), KINDS, 1)
    raise ValueError(f"{where} has the kind {kind!r}, which there is not: " + (f"did you mean {near[0]!r}?" if near else
                     f"give kind, one of {', '.join(KINDS)}."))
  own = {field.name: field for field in dataclasses.fields(RewardConfig) if field.name != "settings"}
  hints, parameters = typing.get_type_hints(KINDS[kind]), inspect.signature(KINDS[kind]).parameters
  hints = {key: hints[key] for key in parameters} | {key: typing.get_type_hints(RewardConfig)[key] for key in own}
  needed = [key for key, one in parameters.items() if one.default is one.empty]
  values = {key: one.default for key, one in parameters.items() if one.default is not one.empty} | checked(section, hints, needed, where)
  values["kind"] = kind
  made = placed(where, RewardConfig, **{key: values[key] for key in own if key in values}, settings={key: values[key] for key in parameters})
  placed(where, made.make)
  return made


def declare(rewards: Mapping[str, RewardConfig], score: Any = None, judge: Any = None) -> Rewards | None:
  """The rewards of a stage as its method sees them, None where it has none.

  Args: name -> reward; what scores them on the host, and what on the device, as in `Rewards`; None where nothing will be scored.
  """
  if not rewards:
    return None
  named = sorted({category for one in rewards.values() if isinstance(one.weight, Mapping) for category in one.weight} - {OTHER})
  rows = tuple(tuple(one.weight_in(category) for one in rewards.values()) for category in (*named, OTHER))
  judged = tuple(name for name, one in rewards.items() if one.make().judge)
  return Rewards(tuple(rewards), score or _never, rows, (*named, OTHER) if named else (), judge or _never if judged else None, judged)


def _never(*_: Any) -> Any:
  raise RuntimeError("These rewards are declared, and nothing was started that scores them.")
