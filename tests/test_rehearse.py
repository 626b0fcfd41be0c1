"""FLOP counts against counts by hand and XLA's, and rehearsals on simulated devices and, where its compiler is installed, for a TPU."""

import collections
import dataclasses
import importlib.util
import json
import math
import os

import commands
import jax
import jax.numpy as jnp
import pytest
from many import ends, start

from configs import pretrain, pretrain_1b, quickstart
from data_pipelines.buckets import Bucket, bucket_size
from data_pipelines.tokenizer import train_tokenizer
from qimg2 import networks
from qimg2 import params as P
from qimg2.analysis import flops
from qimg2.layout import make_layout
from qimg2.models import mmdit, qwen3_vl, vae
from qimg2.models.qwen3_vl_vision import VisionConfig
from qimg2.runtime import micro_batches
from qimg2.runtime.config import parse
from qimg2.runtime.rehearsal import measure, search, steps, table, topology
from qimg2.runtime.rehearsal.shapes import Choice, find_tokenizer
from qimg2.runtime.rehearsal.steps import Rehearsal
from qimg2.runtime.run import Run

ROW = table.Row(stage="one", task="t2i", height=64, width=64, num_sources=0, num_tokens=64, batch_size=16, accumulate=2, num_devices=8,
                         mesh={"data": 1, "fsdp": 8}, rules="fsdp_tensor", remat="dots", model_flops={"model": 3e12, "vae": 1e12},
                         peak_bytes=20 * 2**30, limit_bytes=15.75 * 2**30, compile_s=1.0)


def counted(function, *trees):
  """XLA's FLOPs of a function that has no loop of more than one round."""
  analysis = jax.jit(function).lower(*trees).cost_analysis()
  return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def test_the_generator_by_hand():
  cfg = mmdit.Config(latent_channels=3, width=8, num_layers=2, num_heads=2, head_dim=4, mlp_ratio=3, context_width=5, rope_dims=(0, 2, 2), time_dim=6)
  # 7 text tokens of which one is an image slot of 4 latents: a prefix of 10, with 16 target tokens a sequence of 26.
  block = 2 * 26 * (4 * 8 * 8 + 3 * 8 * 24) + 2 * (10 * 10 + 16 * 26) * 4 * 2 * 2
  borders = 2 * (16 + 4) * 3 * 8 + 2 * 7 * (5 * 8 + 8 * 8) + 2 * 16 * 8 * 3
  times = 2 * 2 * (6 * 8 + 8 * 8 + 5 * 8 * 8)
  assert flops.generator_forward(cfg, 7, 16, 4) == 2 * block + borders + times
  full = 2 * (26 * 26 - 10 * 10 - 16 * 26) * 4 * 2 * 2
  assert flops.generator_forward(dataclasses.replace(cfg, attention="full"), 7, 16, 4) == 2 * (block + full) + borders + times


def test_the_published_generator_costs_two_flops_per_weight_and_token():
  cfg = mmdit.Config()
  per_token = flops.generator_forward(cfg, 0, 1) - 4 * cfg.num_layers * cfg.width
  assert per_token == pytest.approx(2 * P.count(mmdit.specs(cfg)), rel=0.05)


def test_the_generator_by_xla():
  cfg = mmdit.Config(latent_channels=16, width=256, num_layers=1, num_heads=4, head_dim=64, context_width=128, rope_dims=(16, 24, 24),
                     attention="full")  # on a CPU whatever the mask hides is multiplied, too
  tokens, count = jax.ShapeDtypeStruct((1, 96), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
  layout = jax.eval_shape(lambda tokens, count: make_layout(tokens, count, 3, [(8, 8)], (16, 16)), tokens, count)
  float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  found = counted(lambda *a: mmdit.apply(cfg, *a), P.abstract(mmdit.specs(cfg)), float32(1, 256, 16), float32(1), float32(1, 96, 128),
                  float32(1, 64, 16), layout)
  assert found == pytest.approx(flops.generator_forward(cfg, 96, 256, 64), rel=0.05)


def test_the_encoder_by_xla():
  vision = VisionConfig(width=128, num_layers=1, num_heads=2, mlp_width=256, num_positions=64, out_width=256, deepstack_layers=(0,))
  cfg = qwen3_vl.Config(vocab_size=512, width=256, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=512, mrope_sections=(12, 10, 10),
                        image_token_id=6, vision=vision)
  weights, tokens = P.abstract(qwen3_vl.specs(cfg)), jax.ShapeDtypeStruct((1, 128), jnp.int32)
  count, picture = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1, 128, 256, 3), jnp.uint8)
  assert counted(lambda *a: qwen3_vl.apply(cfg, *a), weights, tokens, count) == pytest.approx(flops.encoder_forward(cfg, 128), rel=0.05)
  found = counted(lambda w, t, c, p: qwen3_vl.apply(cfg, w, t, c, [p]), weights, tokens, count, picture)
  assert found == pytest.approx(flops.encoder_forward(cfg, 128, ((128, 256),)), rel=0.05)


def test_the_vae_by_xla():
  cfg = vae.Config(base_dim=16, decoder_base_dim=24, latent_channels=8, num_res_blocks=1, latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8)
  weights, picture = P.abstract(vae.specs(cfg)), jax.ShapeDtypeStruct((1, 256, 512, 4), jnp.float32)
  latents = jax.ShapeDtypeStruct((1, 16, 32, 8), jnp.float32)
  assert counted(lambda *a: vae.encode(cfg, *a), weights, picture) == pytest.approx(flops.vae_encode(cfg, 256, 512), rel=0.1)
  assert counted(lambda *a: vae.decode(cfg, *a), weights, latents) == pytest.approx(flops.vae_decode(cfg, 256, 512), rel=0.1)


TRAINED, FROZEN = {"model": "mmdit"}, {"encoder": "qwen3_vl", "vae": "vae"}  # role -> network


def test_a_step_counts_training_three_times_and_caches_not_at_all():
  nets = networks.Networks(mmdit.Config(), qwen3_vl.Config(), vae.Config(), 12)
  pixels = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.uint8)
  batch = {"tokens": pixels(4, 76), "target": pixels(4, 256, 256, 3), "sources": (pixels(4, 64, 64, 3),)}
  counts = flops.step_flops(nets, TRAINED, FROZEN, batch)
  assert counts["model"] == 3 * 4 * flops.generator_forward(nets.model, 64, 256, 16)
  assert counts["encoder"] == 4 * flops.encoder_forward(nets.encoder, 76, ((64, 64),))
  assert counts["vae"] == 4 * (flops.vae_encode(nets.vae, 256, 256) + flops.vae_encode(nets.vae, 64, 64))
  cached = {"tokens": pixels(4, 76), "latents": pixels(4, 16, 16, 64), "source_latents": (pixels(4, 4, 4, 64),), "features": pixels(4, 64, 4096)}
  assert flops.step_flops(nets, TRAINED, FROZEN, cached) == {"model": counts["model"], "encoder": 0, "vae": 0}
  adapted = flops.step_flops(nets, {"adapter": "lora/mmdit"}, {"model": "mmdit"}, batch)  # forward, and backward through the frozen weights
  assert adapted == {"adapter": counts["model"] // 3, "model": counts["model"] // 3}
  counts = flops.step_flops(nets, {"vae": "vae"}, {}, batch)
  assert counts["vae"] == 3 * 4 * (flops.vae_encode(nets.vae, 256, 256) + flops.vae_decode(nets.vae, 256, 256))
  with pytest.raises(ValueError, match="no FLOP count for network 'judge' of role 'reward'"):
    flops.step_flops(nets, {"reward": "judge"}, {}, batch)


def test_buckets_of_the_published_curriculum():
  cfg = pretrain.get_config()
  cfg.mesh.fsdp, cfg.mesh.tensor, cfg.micro_batches = 4, 2, ()
  steps = Rehearsal(cfg, jax.devices()[:8])
  section = steps.cfg.stages[-1]
  shapes = [(one.task, one.height, one.width, one.source_sizes, one.num_tokens) for one in steps.buckets(section, Choice(base_px=(512,)))]
  assert shapes == [("t2i", 512, 512, (), 1024), ("t2i", 288, 896, (), 1024), ("ti2i", 512, 512, ((512, 512),), 1024 + 256 + 6),
                    ("ti2i", 288, 896, ((288, 896),), 1024 + 9 * 28 + 6)]
  assert len(steps.buckets(section, Choice(squares=True))) == 2 * 3
  assert len(steps.buckets(section, Choice(tasks=("t2i",), base_px=(2048,), all_buckets=True))) == 9
  with pytest.raises(ValueError, match="16384 cannot be divided over 4 devices of the axes data and fsdp in 3 micro-batches"):
    section = dataclasses.replace(section, optimizer=dataclasses.replace(section.optimizer, accumulate=3))
    steps.row(section, steps.buckets(section)[0])


def test_what_is_beside_a_program_by_hand():
  """Two batches on their way and of each task the held-out one that stays, each the largest of the stage: 1,024 of 4,096 rows on each device."""
  cfg = pretrain.get_config()
  cfg.mesh.fsdp, cfg.mesh.tensor = 4, 2
  rehearsal = Rehearsal(cfg, jax.devices()[:8])
  stage = rehearsal.cfg.stages[-1]
  # Tokens and their number, id and pixels, of which the widest bucket has most.
  picture = lambda tokens: 4 * tokens + 4 + 8 + 3 * 1184 * 3552
  edit = picture(1024 + 37 * 111 + 6) + 3 * 1184 * 3552
  assert rehearsal.beside_bytes(stage, Choice(), table.STEP) == 2 * 1024 * edit + 2 * picture(1024) + edit  # micro-batches of two rows, and of one
  assert rehearsal.beside_bytes(stage, Choice(), table.SAMPLES) == 1024 * edit + 2 * picture(1024) + edit
  chosen = rehearsal.beside_the_step(stage, rehearsal.buckets(stage, Choice(squares=True, tasks=("t2i",))))
  assert [(program, one.height, one.batch_size) for program, one in chosen] == [("evaluation", 2048, 8), ("samples", 2048, 16)]
  row = dataclasses.replace(ROW, peak_bytes=14 * 2**30, beside_bytes=2**30)
  assert row.fits and not row.has_headroom and not dataclasses.replace(row, beside_bytes=2 * 2**30).fits


def test_a_stage_counts_its_programs():
  cfg = pretrain.get_config()
  cfg.mesh.fsdp, cfg.mesh.tensor = 4, 2
  rehearsal = Rehearsal(cfg, jax.devices())
  counts = {stage.name: rehearsal.num_programs(stage, Choice()) for stage in rehearsal.cfg.stages}
  assert counts["vae"] == (9, False) and counts["pretrain_256_t2i"] == (36, False)  # nine ratios, four classes of prompts
  assert counts["pretrain_256"] == counts["sft"] == (64, False)
  row = dataclasses.replace(ROW, peak_bytes=10 * 2**30, beside_bytes=2**30)
  rows = [row, dataclasses.replace(row, compile_s=5.0, height=32), dataclasses.replace(row, program="evaluation", peak_bytes=0.0, compile_s=2.0)]
  text = table.summary(rehearsal.cfg.stages[-1], rows, 64, False, False)
  assert text.startswith("sft: most memory takes t2i 64x64 64t, 11.00 GiB, 70% of the memory. Programs at most: 64 of step in 3 s each, 64 of "
                         "evaluation in 2 s each, 5 min one after the other, machine code not counted")
  with pytest.raises(ValueError, match="--index needs the tokenizer that the data were prepared with"):
    rehearsal.buckets(rehearsal.cfg.stages[-1], Choice(index=True))


@pytest.mark.slow
def test_buckets_of_an_index(smoke_config, tmp_path):
  """Those of the run, and of them the longest of each task."""
  run = Run(smoke_config, tmp_path, trained=True)
  rehearsal = Rehearsal(smoke_config, jax.devices())
  stage = rehearsal.cfg.stages[-1]
  buckets = run.loader(stage).buckets
  assert rehearsal.num_programs(stage, Choice(index=True)) == (len(buckets), True)
  assert set(rehearsal.buckets(stage, Choice(index=True, all_buckets=True))) == set(buckets)
  length = lambda one: micro_batches.num_tokens(one, rehearsal.cfg.vae.spatial_factor)
  chosen = rehearsal.buckets(stage, Choice(index=True))
  assert {one.task: length(one) for one in chosen} == {task: max(length(one) for one in buckets if one.task == task) for task in ("t2i", "ti2i")}


def test_a_published_folder_s_tokenizer_counts_where_it_is_there(tmp_path):
  cfg = parse(pretrain.get_config(f"v5p-128:diffusers:{tmp_path}"))
  assert find_tokenizer(cfg) is None
  (tmp_path / "processor").mkdir()
  (tmp_path / "processor" / "tokenizer.json").write_bytes(train_tokenizer(["a cat"], 300).to_bytes())
  assert find_tokenizer(cfg).vocab_size == 300


def test_plans_of_the_published_curriculum():
  """Each pod's mesh has its chips, or cores for tpu7x, and every batch divides into the micro-batches."""
  devices = {"v5p-128": 64, "v5p-256": 128, "v5p-1024": 512, "v5p-8192": 4096, "v5p-128x2": 128, "v6e-256": 256, "tpu7x-128": 128}
  assert devices.keys() == pretrain.PLANS.keys()
  for name, num in devices.items():
    cfg = pretrain.get_config(name)
    assert math.prod(cfg.mesh.values()) == num
    run = parse(cfg)
    assert cfg.stages[0].resolutions[0].batch_size % (cfg.mesh.data * cfg.mesh.fsdp) == 0, name
    assert {stage.faults.stop_after for stage in run.stages[1:]} == {"micro_batch"}
    for stage in cfg.stages[1:]:
      for resolution in stage.resolutions:
        square = Bucket("t2i", resolution.base_px, resolution.base_px, num_tokens=1024, batch_size=resolution.batch_size)
        _, num = micro_batches.choose(run, run.stages[-1], square, cfg.mesh.data * cfg.mesh.fsdp)
        assert resolution.batch_size % (cfg.mesh.data * cfg.mesh.fsdp * num) == 0 and (num > 1 or name == "v5p-8192")
    # The longest row has room, so none goes alone with a warning.
    longest = Bucket("ti2i", 1184, 3552, ((1184, 3552),), num_tokens=1024 + 37 * 111 + 6, batch_size=4096)
    assert micro_batches.num_tokens(longest, 16) <= cfg.micro_batches[-1].tokens
  with pytest.raises(ValueError, match="knows no 'v4-8': choose one of smoke, v5p-128,"):
    pretrain.get_config("v4-8")


def test_the_plan_of_the_small_curriculum():
  run = parse(pretrain_1b.get_config())
  assert math.prod(dataclasses.asdict(run.mesh).values()) == 64 and run.model.context_width == run.encoder.width == 2048
  for stage in run.stages[1:]:
    for one in stage.resolutions:
      square = Bucket("t2i", one.base_px, one.base_px, num_tokens=512, batch_size=one.batch_size)
      assert one.batch_size % (64 * micro_batches.choose(run, stage, square, 64)[1]) == 0
  longest = Bucket("ti2i", 1760, 576, ((1760, 576),), num_tokens=512 + 55 * 18 + 6, batch_size=1024)
  assert 2 * micro_batches.num_tokens(longest, 16) <= run.micro_batches[-1].tokens
  assert bucket_size(1024, "1:3") == (longest.height, longest.width) and run.num_tokens == 512
  assert [stage.name for stage in parse(pretrain_1b.get_config("vae:diffusers:a")).stages][0] == "pretrain_256"


def test_the_table_says_what_does_not_fit():
  text = table.table([ROW, dataclasses.replace(ROW, stage="two", limit_bytes=None), dataclasses.replace(ROW, peak_bytes=2**30)])
  first, second, third = text.splitlines()[1:4]
  assert "4.2 over" in first and "t2i 64x64 64t" in first and "no limit" in second and "fits" in third
  assert ROW.fits is False and ROW.per_chip == 1
  assert json.loads(json.dumps(table.as_json(ROW)))["fits"] is False
  assert "--config.mesh.fsdp=8" in table.advice(ROW, 3)
  assert "--config.stages[3].optimizer.accumulate=2" in table.advice(ROW, 3) and "micro_batches" not in table.advice(ROW, 3)
  assert " --config.micro_batches='()' " in table.advice(ROW, 3, True)


def test_mistakes(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install libtpu"):
    topology.find_devices("v5p:4x4x8")
  for wrong in ("v9:2x2", "v5e", "v5e:", "v5e:2x", "v5e:0x1", "v5e:2x2 ", "cpu", "cpu:0", "cpu:2x2"):
    for ask in (topology.find_devices, topology.num_chips):
      with pytest.raises(ValueError, match=f"'{wrong}' is not understood: give one of v5e, .* and a shape, such as v5e:1x1"):
        ask(wrong)
  assert topology.num_chips("v5p:4x4x8", 2) == 256 and topology.num_chips("cpu:8") == 8
  with pytest.raises(ValueError, match="has no stage 'nothing'"):
    search.rehearse(quickstart.get_config("smoke"), jax.devices()[:8], None, Choice(stages=("nothing",)))


def searched(monkeypatch, batch_size, peak, **options):
  """The rows of a search for stage sft on 8 devices, where a row takes `peak(rules, remat, rows per chip)` of 10 bytes."""
  def row(self, section, bucket, **_):
    accumulate, remat = section.optimizer.accumulate, self.nets.model.remat
    per_chip = bucket.batch_size / accumulate / 8
    mfu = {"none": 0.2, "dots": 0.4, "attention": 0.35}.get(remat, 0.3) + 0.01 * per_chip
    return dataclasses.replace(ROW, stage=section.name, rules=self.cfg.rules, remat=remat, batch_size=bucket.batch_size, accumulate=accumulate,
                               num_devices=8, peak_bytes=peak(self.cfg.rules, remat, per_chip), limit_bytes=10.0,
                               bound={"mfu": mfu, "serial_mfu": 0.5 - mfu})
  monkeypatch.setattr(Rehearsal, "row", row)
  cfg = quickstart.get_config("smoke")
  for resolution in cfg.stages[3].resolutions:
    resolution.batch_size = batch_size
  before = cfg.stages[3].optimizer.accumulate
  rows = search.search(cfg, jax.devices()[:8], None, Choice(stages=("sft",)), **options)
  assert cfg.stages[3].optimizer.accumulate == before
  return rows


def test_search_takes_the_best_bound_that_fits(monkeypatch):
  sizes = {"none": 12, "dots": 4, "attention": 3, "full": 1, "offload": 1}
  rows = searched(monkeypatch, 32, lambda rules, remat, per_chip: per_chip * sizes[remat] + (rules == "replicated") * 20)
  tried = [(one.remat, one.accumulate) for one in rows if one.rules == "fsdp_tensor"]
  assert tried == [("none", 4), ("dots", 4), ("dots", 2), ("dots", 1), ("attention", 1), ("full", 1)]
  best = {rank: search.best(rows, rank)["sft"] for rank in search.RANKS}
  assert (best["overlapped"].rules, best["overlapped"].remat, best["overlapped"].accumulate) == ("fsdp", "dots", 2)
  assert best["serial"].bound["serial_mfu"] == max(row.bound["serial_mfu"] for row in rows if row.has_headroom)
  assert search.best(rows)["sft"] is best["serial"] is not best["overlapped"]
  assert not [one for one in rows if one.rules == "replicated" and one.fits]


def test_search_leaps_to_what_should_fit_and_back_if_it_does_not(monkeypatch):
  leaps = lambda peak: [one.accumulate for one in searched(monkeypatch, 8 * 64, peak, rules=("fsdp",))]
  assert leaps(lambda rules, remat, per_chip: 1 + per_chip / 8) == [64, 32, 1]
  assert leaps(lambda rules, remat, per_chip: 1 + per_chip / 1e4) == [64, 32, 1]  # room for more than there are
  # From two rows to 64 in one leap; it is more than it looked like from there, and 16 are the most that fit.
  bent = lambda rules, remat, per_chip: 1 + per_chip / 8 + (per_chip > 16) * 5 if remat == "none" else 11
  assert leaps(bent)[:5] == [64, 32, 1, 2, 4]
  nothing = searched(monkeypatch, 8, lambda *_: 9.5, rules=("fsdp",))
  assert not search.best(nothing) and all(one.fits for one in nothing)  # nine tenths are the limit of a plan


def test_a_rule_set_is_tried_on_a_mesh_without_idle_axes():
  sizes = {"data": 2, "fsdp": 8, "context": 1, "tensor": 4}
  assert search.fitting_mesh("fsdp_tensor", sizes) == sizes
  assert search.fitting_mesh("fsdp", sizes) == {"data": 2, "fsdp": 32}
  assert search.fitting_mesh("fsdp_context", sizes) == {"data": 2, "fsdp": 8, "context": 4}
  assert search.fitting_mesh("replicated", sizes) == {"data": 2, "fsdp": 32, "context": 1}


def test_what_the_compiler_wrote_down(tmp_path, monkeypatch):
  """It makes folders of the same names beside the files, and begins with texts that are not the whole program."""
  monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path} --xla_other=1")
  name = "module_0000.jit_step.cl_1"
  (tmp_path / name).mkdir()
  (tmp_path / f"{name}.debug_options").write_text("")
  (tmp_path / f"{name}.before_optimizations.txt").write_text("HloModule before")
  assert len(topology.dumped()) == 2 and not topology.is_assigned() and topology.program_text() is None and topology.reserved_bytes() is None
  sizes = ((70, ", page 0, parameter 2"), (7, ", page 0, preallocated-temp"), (5, ", color 1, page 0, constant"), (900, ", page 0, thread-local"))
  lines = [f"allocation {i}: size {size}{what}:\n value: <1 x @0> (size={size},offset=0): u8[]" for i, (size, what) in enumerate(sizes)]
  (tmp_path / f"{name}.after_optimizations-buffer-assignment.txt").write_text("\n".join(["BufferAssignment:", *lines]))
  (tmp_path / f"{name}.{topology.ASSIGNED}").write_text("HloModule")
  os.utime(tmp_path / f"{name}.debug_options", ns=(0, 1))
  assert not topology.is_assigned()  # it may still write
  (tmp_path / f"{name}.debug_options").touch()
  assert topology.is_assigned() and topology.program_text() == "HloModule" and topology.reserved_bytes() == 77


@pytest.mark.slow
def test_a_compiler_that_ends_is_named():
  with pytest.raises(ChildProcessError, match="compiles stage 'none' ended with code 1: "):
    measure._measure_in_child(measure.Child(measure.ChildProcess("cpu:1"), "stage 'none'", steps._answer, (quickstart.get_config("smoke"), "none",
                                                                                                       None, "step", 0)))


def test_what_a_program_does_not_read_takes_memory_all_the_same():
  shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  arguments = {"read": shape(3, 5), "not": [shape(7, 11), shape(2)]}, shape(4)
  text = jax.jit(lambda one, other: one["read"] + one["not"][1].sum() + other.sum()).lower(*arguments).compile().as_text()
  assert measure.unread_bytes(arguments, text) == 4 * 7 * 11


def launch(*arguments):
  """For a TPU, whose compiler does not know the CPU's flags."""
  result, = ends(start(1, "-m", "launch.rehearse", *arguments, XLA_FLAGS=""), timeout=1800)
  return commands.Result(*result)


@pytest.mark.slow
def test_simulated_devices(tmp_path):
  file = tmp_path / "rows.json"
  result = commands.process("launch.rehearse", "--config=configs/quickstart.py:smoke", "--topology=cpu:8", "--stage=vae", "--task=t2i",
                            "--squares", "--base_px=32", "--whole", f"--json={file}")
  assert result.returncode == 0, result.stderr
  row, evaluation = json.loads(file.read_text())["rows"]
  assert evaluation["program"] == "evaluation" and 0 < evaluation["traffic"]["flops"] < row["traffic"]["flops"] and not evaluation["model_flops"]
  assert evaluation["beside_bytes"] > row["beside_bytes"] > 0  # the optimizer's moments
  assert "vae: most memory takes " in result.stdout and " of step in " in result.stdout and " of evaluation in " in result.stdout
  assert row["stage"] == "vae" and row["fits"] is None and row["traffic"]["hbm_bytes"] > 0 and row["per_chip"] == 1
  assert {one["axes"] for one in row["collectives"]} == {"fsdp"}
  assert 0.4 < row["traffic"]["flops"] / row["model_flops"]["vae"] < 1.2  # at 2 x 2 latents most taps of a convolution lie outside
  assert "no limit" in result.stdout and "all-reduce" in result.stdout


SMALL_AND_LARGE = """
import copy
from configs import quickstart

def get_config(arg=""):
  cfg = quickstart.get_config("smoke")
  cfg.model.dtype, cfg.stages[3].offload_frozen = "bfloat16", True
  large = copy.deepcopy(cfg.stages[3])
  large.name, large.resolutions[0].batch_size, large.resolutions[0].base_px = "large", 4194304, 64
  cfg.stages = *cfg.stages, large
  return cfg
"""


@pytest.mark.slow
def test_a_tpu(tmp_path):
  """A stage that fits, compiled up to its machine code and to the end, and one that does not. Their data are cached, so that the generator alone is
  compiled; the other networks are in the plan below."""
  file, config = tmp_path / "rows.json", tmp_path / "two.py"
  config.write_text(SMALL_AND_LARGE)
  common = (f"--config={config}", "--topology=v5e:2x2", "--stage=sft", "--task=t2i", "--squares", f"--json={file}")
  result = launch(*common, "--stage=large")
  assert result.returncode == 1 and " over" in result.stdout and "Does not fit: large." in result.stderr, result.stderr
  row, large = json.loads(file.read_text())["rows"]
  assert large["stage"] == "large" and large["fits"] is False
  result = launch(*common, "--machine_code")
  assert result.returncode == 0, result.stderr
  whole, = json.loads(file.read_text())["rows"]
  assert whole == row | {"compile_s": whole["compile_s"]}
  assert row["fits"] and 0 < row["peak_bytes"] < 2**30 and row["limit_bytes"] == 15.75 * 2**30
  assert 0 < row["bound"]["mfu"] < 1 and row["bound"]["ici_s"] > 0 and not row["traffic"]["unknown_loops"]
  assert any(one["axes"] == "fsdp" and one["calls"] >= 2 for one in row["collectives"])
  # Gradients are added in float32. What is added in bfloat16 are activations, behind weights that stay divided along what a product sums over.
  sums = collections.Counter()
  for one in row["collectives"]:
    sums[one["dtype"]] += one["bytes"] * (one["kind"] in ("all-reduce", "reduce-scatter"))
  assert sums["f32"] > 4 * sums["bf16"]


@pytest.mark.slow
def test_a_published_plan_at_its_heaviest(tmp_path):
  """All layers, an edit at 2048 px on the smallest pod, which has room for it and the batches beside it where tokens are divided over tensor.
  Without its compile options the bound is 63 %: products are cut in as many parts as devices, and each part reads and writes the whole sum."""
  file = tmp_path / "rows.json"
  result = launch("--config=configs/pretrain.py:v5p-128", "--topology=v5p:4x4x4", "--stage=sft", "--squares", "--base_px=2048", "--task=ti2i",
                  f"--json={file}")
  assert result.returncode == 0, result.stderr
  row, = json.loads(file.read_text())["rows"]
  assert 0.5 < row["total_bytes"] / row["limit_bytes"] < table.HEADROOM and row["remat"] == "dots" and row["accumulate"] == 128
  # Splash kernels count, or the program would do less than the model asks for.
  assert 1 < row["traffic"]["flops"] / sum(row["model_flops"].values()) < 1.12 and not row["traffic"]["unknown_loops"]
  assert 0.89 < row["bound"]["mfu"] < 1 and row["bound"]["step_s"] == row["bound"]["compute_s"]
  assert {"all-gather fsdp", "all-gather tensor", "reduce-scatter tensor"} <= {f"{one['kind']} {one['axes']}" for one in row["collectives"]}
