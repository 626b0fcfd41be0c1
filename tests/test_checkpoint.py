"""What is saved comes back to the bit, and what does not fit is an error."""

import contextlib
import errno
import os
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qimg2 import params as P
from qimg2 import sharding
from qimg2.algorithms import Algorithm, Average, Role, Update
from qimg2.training import checkpoint, manifest, optim, state

RULES = sharding.RULES["fsdp_tensor"]
ALGORITHM = Algorithm({"model": Role("linear")}, (Update(("model",), lambda *_: None),), {"ema": Average("model", 0.5)})


def specs(width=8):
  return {"model": {"w": P.Param((width, 4), ("embed", "mlp"), P.normal(1.0)), "b": P.Param((4,), (None,), P.normal(1.0))}}


def make(sizes, declared):
  """(abstract state, real state) on a mesh of `sizes`."""
  mesh = sharding.make_mesh(sizes)
  optimizers = state.make_optimizers(ALGORITHM, declared, optim.Config(), 10)
  abstract = state.abstract_state(ALGORITHM, optimizers, declared, mesh, RULES)
  real = state.init_state(ALGORITHM, optimizers, {"model": P.init(declared["model"], jax.random.key(0))}, {}, jax.random.key(3))
  real = real.replace(step=jnp.int32(5), averages=jax.tree.map(lambda x: x + 1, real.averages))
  return abstract, jax.device_put(real, jax.tree.map(lambda x: x.sharding, abstract))


def assert_equal(a, b):
  raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def test_round_trip_onto_another_mesh(tmp_path):
  _, saved = make({"fsdp": 8}, specs())
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  checkpoints.save(saved, {"loader_step": 5, "stage": {"name": "x"}})
  checkpoints.close()
  abstract, _ = make({"fsdp": 2, "tensor": 4}, specs())
  again = checkpoint.Checkpoints(tmp_path)
  assert again.latest_step() == 5
  restored, meta = again.restore(abstract, 5)
  assert_equal(restored, saved)
  assert meta == {"loader_step": 5, "stage": {"name": "x"}}
  assert restored.params["model"]["w"].sharding == abstract.params["model"]["w"].sharding
  assert_equal(again.restore_item("average.ema", abstract.params["model"]), saved.averages["ema"])


def test_only_the_newest_are_kept(tmp_path):
  _, saved = make({"fsdp": 8}, specs())
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(saved.replace(step=jnp.int32(step)), {})
  checkpoints.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_checkpoints_by_time_push_out_none_that_are_due_by_number(tmp_path):
  _, saved = make({"fsdp": 8}, specs())
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, every=10, keep_every=15)  # one at step 30 stays for good
  for step, kept in ((5, "5"), (7, "5 7"), (9, "7 9"), (10, "9 10"), (13, "10 13"), (16, "10 13 16"), (20, "10 16 20"), (21, "10 20 21"),
                     (22, "10 20 21 22"), (30, "20 22 30"), (40, "30 40"), (50, "30 40 50"), (60, "30 50 60")):
    checkpoints.save(saved.replace(step=jnp.int32(step)), {})
    checkpoints.wait()
    assert sorted(map(int, (path.name for path in tmp_path.iterdir()))) == sorted(map(int, kept.split()))
  checkpoints.close()


def test_what_does_not_fit_is_an_error(tmp_path):
  abstract, saved = make({"fsdp": 8}, specs())
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  with pytest.raises(FileNotFoundError, match="no checkpoint in"):
    checkpoints.restore_item("params.model", abstract.params["model"])
  checkpoints.save(saved, {})
  checkpoints.wait()
  wider, _ = make({"fsdp": 8}, specs(width=16))
  with pytest.raises(ValueError, match="does not fit the config"):
    checkpoints.restore(wider, 5)
  with pytest.raises(ValueError, match="does not fit the config"):
    checkpoints.restore_item("params.model", {**abstract.params["model"], "c": abstract.step})
  with pytest.raises(ValueError, match="holds no 'params.vae': it has average.ema, params.model"):
    checkpoints.restore_item("params.vae", abstract.params["model"])
  checkpoints.save(saved.replace(step=jnp.int32(6), average_states={}, averages={}), {})  # as before these were kept
  checkpoints.wait()
  with pytest.raises(ValueError, match="If an older version of this program left the stage unfinished, it cannot go on"):
    checkpoints.restore(abstract, 6)


def test_frozen_weights_round_trip(tmp_path):
  abstract, saved = make({"fsdp": 8}, specs())
  checkpoint.save_weights(tmp_path / "w", saved.params["model"])
  assert_equal(checkpoint.restore_weights(tmp_path / "w", abstract.params["model"]), saved.params["model"])
  wider, _ = make({"fsdp": 8}, specs(width=16))
  with pytest.raises(ValueError, match="do not fit the config"):
    checkpoint.restore_weights(tmp_path / "w", wider.params["model"])


# What is damaged is recognised, named, and never read.


@pytest.fixture
def two(tmp_path):
  """(folder with the checkpoints of steps 5 and 6, what step 5 holds, what step 6 holds, abstract state)."""
  abstract, five = make({"fsdp": 8}, specs())
  six = five.replace(step=jnp.int32(6), params=jax.tree.map(lambda x: x + 1, five.params))
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=2)
  for each in (five, six):
    checkpoints.save(each, {"loader_step": int(each.step)})
  checkpoints.close()
  return tmp_path / "c", five, six, abstract


def files_of(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, offset):
  content = bytearray(path.read_bytes())
  content[offset // 8] ^= 1 << offset % 8
  path.write_bytes(content)


def flips(folder, num, seed):
  """`num` places (file, bit) in the files of a folder, every file equally often."""
  rng = np.random.default_rng(seed)
  filled = [path for path in files_of(folder) if path.stat().st_size]
  for number in range(num):
    path = filled[number % len(filled)]
    yield path, int(rng.integers(8 * path.stat().st_size))


@pytest.mark.slow
def test_no_flipped_bit_is_restored(two, caplog):
  folder, five, six, abstract = two
  used = []
  for path, offset in flips(folder / "6", 50, 0):
    whole = path.read_bytes()
    flip(path, offset)
    reader = checkpoint.Checkpoints(folder)
    step = reader.latest_step()
    assert checkpoint.is_done(folder, 6) == (step == 6) and not checkpoint.is_done(folder, 7)
    assert_equal(reader.restore(abstract, step)[0], {5: five, 6: six}[step])  # to the bit, from whichever it says
    assert_equal(reader.restore_item("params.model", abstract.params["model"]), {5: five, 6: six}[step].params["model"])
    if path.name not in ("commit_success.txt", "_CHECKPOINT_METADATA", "manifest.json") or path.parent.name != "6":
      assert step == 5 and path.relative_to(folder / "6").as_posix() in caplog.text
    used.append(step)
    caplog.clear()
    path.write_bytes(whole)
  assert used.count(5) > 40
  assert checkpoint.Checkpoints(folder).latest_step() == 6


@pytest.mark.parametrize("harm, said", [
    (lambda step: (step / "manifest.json").unlink(), "it has no manifest.json"),
    (lambda step: (step / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    (lambda step: (step / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    (lambda step: (step / "optimizer" / "_METADATA").unlink(), "optimizer/_METADATA is missing"),
    (lambda step: shutil.rmtree(step / "average.ema"), "average.ema/.* is missing"),
    (lambda step: os.truncate(max(files_of(step / "optimizer"), key=lambda path: path.stat().st_size), 100), "has 100 bytes and had"),
    (lambda step: [os.truncate(path, 0) for path in files_of(step)], "manifest.json cannot be read"),
])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(two, caplog, harm, said):
  folder, five, _, abstract = two
  harm(folder / "6")
  assert checkpoint.Checkpoints(folder).latest_step() == 5
  assert re.search(f"checkpoint {folder / '6'} is damaged: .*{said}.* of step 5, is used instead", caplog.text)
  with pytest.raises(ValueError, match="6 is damaged: "):
    checkpoint.Checkpoints(folder).restore_item("params.model", abstract.params["model"], 6)
  writer = checkpoint.Checkpoints(folder, keep=2)  # a run that goes on from step 5
  assert sorted(path.name for path in folder.iterdir()) == ["5", "6.damaged"]
  writer.save(five.replace(step=jnp.int32(6)), {})
  writer.close()
  assert sorted(path.name for path in folder.iterdir()) == ["5", "6", "6.damaged"] and checkpoint.Checkpoints(folder).latest_step() == 6


def test_a_disk_that_fails_for_a_moment_says_nothing_of_a_checkpoint(two, monkeypatch):
  folder, _, six, abstract = two

  def fail(*_):
    raise OSError(errno.EIO, "Input/output error")
  with monkeypatch.context() as patch:
    patch.setattr(manifest.hashlib, "file_digest", fail)
    with pytest.raises(OSError, match="Input/output error"):
      checkpoint.Checkpoints(folder, keep=2)
  reader = checkpoint.Checkpoints(folder, keep=2)
  assert_equal(reader.restore(abstract, reader.latest_step())[0], six)
  reader.close()
  assert sorted(path.name for path in folder.iterdir()) == ["5", "6"]


def test_where_none_is_whole_nothing_is_read_and_nothing_begun(two):
  folder, _, _, abstract = two
  for step in "56":
    (folder / step / "manifest.json").unlink()
  for keep in (None, 2, 2):  # again: the first time must not hide it from the second
    with pytest.raises(ValueError, match="6 is damaged.*5 is damaged.*No other in .* is intact: put back a copy"):
      checkpoint.Checkpoints(folder, keep).restore_item("params.model", abstract.params["model"])
  manifest.write_manifest(folder / "5")
  assert checkpoint.Checkpoints(folder).latest_step() == 5


def test_a_file_that_changed_after_its_process_measured_it(tmp_path):
  """Another length is measured again; other content of the same length is what the checksum is there to find. What other processes write meanwhile is
  not looked at: it may be gone before it is."""
  folder = tmp_path / "item" / "ocdbt.process_1" / "d"
  folder.mkdir(parents=True)
  for name in "abc":
    (folder / name).write_bytes(b"12345678")
  others = tmp_path / "item" / "ocdbt.process_0"
  others.mkdir()
  (others / "gone").symlink_to(tmp_path / "nowhere")
  manifest.write_part(tmp_path, 1)
  (others / "gone").unlink()
  (folder / "a").write_bytes(b"123456789")
  (folder / "b").write_bytes(b"12345679")
  manifest.write_manifest(tmp_path)
  assert "b was changed" in manifest.find_fault(tmp_path)
  (folder / "b").write_bytes(b"12345678")
  assert not manifest.find_fault(tmp_path)


def test_damage_to_an_older_step_harms_no_run(two):
  folder, _, six, abstract = two
  for path in files_of(folder / "5"):
    os.truncate(path, 0)
  writer = checkpoint.Checkpoints(folder, keep=2)
  assert_equal(writer.restore(abstract, writer.latest_step())[0], six)
  writer.save(six.replace(step=jnp.int32(7)), {})
  writer.close()
  assert sorted(path.name for path in folder.iterdir()) == ["6", "7"]


def test_a_save_that_was_cut_off_does_not_count(two):
  folder, five, _, _ = two
  (folder / "6").rename(folder / "7.orbax-checkpoint-tmp")
  assert checkpoint.Checkpoints(folder).latest_step() == 5
  assert (folder / "7.orbax-checkpoint-tmp").is_dir()  # perhaps a run is at it
  writer = checkpoint.Checkpoints(folder, keep=2)
  assert writer.latest_step() == 5
  writer.save(five.replace(step=jnp.int32(7)), {})
  writer.close()
  assert sorted(path.name for path in folder.iterdir()) == ["5", "7"]


def test_damaged_weights_of_a_frozen_role_are_refused(tmp_path):
  abstract, saved = make({"fsdp": 8}, specs())
  folder, places = tmp_path / "w", 0
  checkpoint.save_weights(folder, saved.params["model"])
  for path, offset in flips(folder, 20, 1):
    whole = path.read_bytes()
    flip(path, offset)
    try:
      assert_equal(checkpoint.restore_weights(folder, abstract.params["model"]), saved.params["model"])
    except ValueError as error:
      assert "are damaged: " in str(error)
      places += 1
    path.write_bytes(whole)
  assert places > 15
  assert_equal(checkpoint.restore_weights(folder, abstract.params["model"]), saved.params["model"])


@contextlib.contextmanager
def no_room(where):
  """A disk that is full when a save begins, when its manifest is written, or after the first 64 bytes of any file."""
  def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
  if where == "files":
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  else:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(*((manifest, "write_manifest") if where == "manifest" else (ocp.CheckpointManager, "save")), full)
      yield


@pytest.mark.parametrize("where", ["begin", "files", "manifest"])
def test_a_full_disk_leaves_the_last_good_one(two, where):
  folder, _, six, abstract = two
  seven = six.replace(step=jnp.int32(7))
  writer = checkpoint.Checkpoints(folder, keep=2)
  with no_room(where):
    with pytest.raises(checkpoint.SaveError, match="checkpoint .*/7 could not be written .*; those before it are kept"):
      writer.save(seven, {})
      writer.wait()
  assert sorted(path.name for path in folder.iterdir()) == ["5", "6"]
  assert_equal(writer.restore(abstract, writer.latest_step())[0], six)
  writer.save(seven, {})  # there is room again
  writer.close()
  assert sorted(path.name for path in folder.iterdir()) == ["6", "7"]
