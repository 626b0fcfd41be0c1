"""The section `rewards` of a stage: what it says, what it refuses, and what a method sees of it."""

import dataclasses
import functools

import pytest

from configs import quickstart
from qimg2.algorithms import Rewards
from qimg2.algorithms.flow_matching import flow_matching
from qimg2.runtime import methods
from qimg2.runtime.config import parse, plain
from qimg2.runtime.config.rewards import declare, parse_rewards
from qimg2.runtime.methods import Method

WHERE = "config.stages[rl].rewards"


@pytest.mark.parametrize("sections, message", [
    ({"glyf": {}}, r"rewards.glyf has the kind 'glyf', which there is not: did you mean 'glyph'\?"),
    ({"mine": {}}, "rewards.mine has the kind 'mine', which there is not: give kind, one of glyph, ocr, "),
    ({"glyph": {"weigth": 1.0}}, r"rewards.glyph has no key 'weigth': did you mean 'weight'\?"),
    ({"glyph": {"weight": "high"}}, "rewards.glyph.weight is 'high': give a number or a section"),
    ({"glyph": {"weight": float("nan")}}, "weight is nan: give finite numbers"),
    ({"glyph": {"timeout_s": 0}}, "timeout_s is 0.0: give seconds above 0"),
    ({"glyph": {"weight": 0.0}}, "has weight 0 everywhere, so that nothing is learned: give one of glyph another"),
    ({"glyph": {"parts": ("shape",)}}, r"rewards.glyph: parts is \('shape',\)"),
    ({"own": {"kind": "function"}}, "rewards.own lacks 'function': give it a text"),
    ({"a/b": {"kind": "glyph"}}, "rewards has the name 'a/b': give one of letters, digits and _"),
    ({"left_out": {"kind": "glyph"}}, "rewards has the name 'left_out'"),
    ({"glyph": 1.0}, r"rewards.glyph is 1.0: give a section"), (3, "rewards is 3: give a section")])
def test_a_mistake_is_named_with_its_place(sections, message):
  with pytest.raises(ValueError, match=message):
    parse_rewards(sections, WHERE)


def test_weights_by_category_become_rows():
  found = parse_rewards({"text": {"kind": "ocr", "weight": {"posters": 1, "other": 0.25}}, "glyph": {"weight": {"letters": 2.0}},
                         "seen": {"kind": "function", "function": "a:b", "weight": 0}, "all": {"kind": "glyph"}}, WHERE)
  declared = declare(found)
  assert declared.names == ("all", "glyph", "seen", "text") and declared.categories == ("letters", "posters", "other") and declared.gold == ("seen",)
  assert declared.weights == ((1.0, 2.0, 0.0, 0.25), (1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.25))
  assert declare(parse_rewards({"glyph": {}}, WHERE)).weights == ((1.0,),) and declare({}) is None
  with pytest.raises(RuntimeError, match="nothing was started that scores them"):
    declared.score(None, None)


def test_a_section_survives_its_record():
  sections = {"text": {"kind": "ocr", "weight": {"a": 1.0}, "units": "words"}, "web": {"kind": "http", "url": "http://a/b", "timeout_s": 5.0}}
  found = parse_rewards(sections, WHERE)
  assert found["web"].settings["timeout_s"] == found["web"].timeout_s == 5.0
  assert parse_rewards(plain(found), WHERE) == found


@pytest.fixture
def learner(monkeypatch):
  """A method that learns from rewards, and one that may."""
  def make(schedule, rewards: Rewards, decay: float = 0.9):
    assert isinstance(rewards, Rewards)
    return flow_matching(schedule, ema_decay=decay)
  monkeypatch.setitem(methods.METHODS, "learner", Method("generator", make))
  monkeypatch.setitem(methods.METHODS, "either", Method("generator", lambda schedule, rewards=None: flow_matching(schedule)))


def stage_with(method, **changes):
  """The last stage of the quickstart with another method."""
  cfg = plain(quickstart.get_config("smoke"))
  last = {**cfg["stages"][-1], "algorithm": {"name": method}, "caption_dropout": 0.0, **changes}
  return functools.partial(parse, {**cfg, "stages": (*cfg["stages"][:-1], last)})


def test_a_stage_has_rewards_where_its_method_learns_from_some(learner):
  stage = stage_with("learner", rewards={"glyph": {}})().stages[-1]
  assert stage.rewards["glyph"].settings == {"parts": ("glyph", "ink", "paper")}
  assert stage_with("either")().stages[-1].rewards == {}
  for method, changes, message in (
      ("learner", {}, r"rewards is empty, but the method 'learner' learns from rewards: give at least one"),
      ("flow_matching", {"rewards": {"glyph": {}}}, "names glyph, but the method 'flow_matching' learns from no rewards"),
      ("learner", {"rewards": {"glyph": {}}, "caption_dropout": 0.1}, "caption_dropout is 0.1, but pictures are drawn .* set it to 0.0"),
      ("learner", {"rewards": {"glyph": {}}, "reward_workers": -1}, "reward_workers is -1")):
    with pytest.raises(ValueError, match=message):
      stage_with(method, **changes)()


def test_the_contract_refuses_weights_that_do_not_fit():
  good = Rewards(("a", "b"), None, ((1.0, 0.0),))
  assert good.gold == ("b",) and good.find_category({"category": "any"}) == 0
  for changes, message in (({"names": ()}, "there must be one"), ({"weights": ((1.0,),)}, "each category needs 2 weights"),
                           ({"categories": ("x", "other")}, "2 categories need as many rows")):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(good, **changes)
