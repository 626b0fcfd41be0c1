"""What a stage reads from outside its run: noticed where it is not what the stage began with."""

import types

import pytest

from qimg2 import adapters
from qimg2.algorithms import Algorithm, Role, Update
from qimg2.algorithms.adapter import with_adapter
from qimg2.runtime.config.rewards import parse_rewards
from qimg2.runtime.weights import StageWeights
from qimg2.training import manifest
from qimg2.training.changes import check_frozen


class Outside(StageWeights):
  """A run in `folder` whose stage has a reference and a VAE of published folders, a judge and a reward of the user's."""

  def __init__(self, folder, adapter=adapters.Settings(), **frozen):
    self.workdir, self.stages, self._folder_of_judge = folder / "run", {}, folder / "judge"
    rewards = parse_rewards(dict(judge=dict(pretrained="judge"), own=dict(kind="function", function="outside_reward:f")), "rewards")
    source = f"diffusers:{folder}/published,lora={folder}/lora.safetensors"
    self.stage = types.SimpleNamespace(name="s", start_from=source, frozen=frozen, adapter=adapter, rewards=rewards)

  def algorithm(self, stage):
    roles = {"model": Role("mmdit"), "ref": Role("mmdit", start="model"), "vae": Role("vae"), "judge": Role("judge/qwen3_vl")}
    method = Algorithm(roles, (Update(("model",), None),), deploy=dict)
    return with_adapter(method, stage.adapter, stage.frozen) if stage.adapter.rank else method

  def judge(self, stage):
    return types.SimpleNamespace(folders=(self._folder_of_judge,))

  def contents(self):
    return super().contents(self.stage, self.frozen_steps(self.stage, intact=False))


@pytest.mark.parametrize("adapter, changed, what", [
    (0, "published/vae/config.json", {"vae"}), (0, "published/transformer/a.safetensors", {"ref"}), (0, "lora.safetensors", {"ref"}),
    (0, "judge/tokenizer.json", {"judge"}), (0, "judge/README.md", set()), (0, "outside_reward.py", {"reward own"}),
    (2, "published/transformer/a.safetensors", {"model"}), (2, "lora.safetensors", set())])
def test_what_changes_outside_a_run_is_noticed(adapter, changed, what, tmp_path, monkeypatch):
  """By its content. An adapter that a stage began with is its own from then on; the base under it is read at each start."""
  monkeypatch.syspath_prepend(tmp_path)
  names = ("published/vae/config.json", "published/transformer/a.safetensors", "published/text_encoder/a.safetensors", "lora.safetensors",
           "judge/tokenizer.json", "judge/a.safetensors", "judge/README.md", "outside_reward.py")
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"# as it was" * 200_000)
  run = Outside(tmp_path, adapters.Settings(adapter, 1.0) if adapter else adapters.Settings())
  before = run.contents()
  assert set(before) == {"model" if adapter else "ref", "vae", "judge", "reward own", "reward judge"}  # the last is the rubric
  (tmp_path / changed).write_bytes(b"# as it is!" * 200_000)
  after = run.contents()
  assert {key for key in before if before[key] != after[key]} == what
  for one in what:
    with pytest.raises(ValueError, match=f"Stage s was trained with another {one}: .* does not hold what it held when the stage began"):
      check_frozen("s", {"contents": after}, {"contents": before})


def test_a_lora_that_an_earlier_stage_went_on_with_is_not_read_again(tmp_path):
  """It is in the adapter of that stage; what is read at each start is the base under it."""
  for name in ("published/transformer/a.safetensors", "lora.safetensors"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("as it was")
  run = Outside(tmp_path)
  run.stages = {"earlier": types.SimpleNamespace(start_from=run.stage.start_from, adapter=adapters.Settings(2, 1.0))}
  run.stage.start_from, run.stage.rewards, run.stage.frozen = "stage:earlier", {}, {"vae": "scratch", "judge": "scratch"}
  before = run.contents()["ref"]
  (tmp_path / "lora.safetensors").unlink()
  assert run.contents()["ref"] == before
  (tmp_path / "published/transformer/a.safetensors").write_text("as it is!")
  assert run.contents()["ref"] != before


def test_a_stage_of_another_run_that_was_trained_anew_is_noticed(tmp_path):
  """Its newest checkpoint has the same step and other weights."""
  for name in ("a", "b"):
    step = tmp_path / name / "vae" / "checkpoints" / "12"
    step.mkdir(parents=True)
    (step / "weights").write_text("as they were")
    (step / manifest.METADATA).write_text("{}")
    manifest.write_manifest(step)
  run = Outside(tmp_path, vae=str(tmp_path / "a" / "vae"))
  run.stage.rewards = {}
  before = run.contents()["vae"]
  assert before[0] == str(tmp_path / "a" / "vae" / "checkpoints" / "12") and before[1]
  run.stage.frozen["vae"] = str(tmp_path / "b" / "vae")
  assert run.contents()["vae"][1] == before[1], "a copy is the same"
  (step / "weights").write_text("as they are")
  manifest.write_manifest(step)
  assert run.contents()["vae"][1] != before[1]


def test_what_is_not_there_is_said_elsewhere(tmp_path):
  run = Outside(tmp_path, vae=f"diffusers:{tmp_path}/nowhere")
  run.stage.rewards = {}
  assert not run.contents()
