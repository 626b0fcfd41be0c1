"""What an evaluation would take: programs of suites, compiled for simulated devices, and cores of the host, by hand-made numbers."""

import dataclasses

import jax
import pytest

from configs import quickstart
from qimg2.analysis import roofline
from qimg2.runtime.config import parse
from qimg2.runtime.evaluating import registry
from qimg2.runtime.rehearsal import evaluation, scoring
from qimg2.runtime.rehearsal.evaluation import Line, Wanted, describe, rehearse_evaluation
from qimg2.runtime.rehearsal.measure import bytes_of

SMALL = Wanted(10, 2, 64, 64, num_steps=2, batch_size=8, num_questions=3, suites=("glyphs", "glyph_edits", "judge", "pairwise", "fidelity"))


def test_programs_of_suites(monkeypatch):
  """Traced alone: that such programs compile is shown where they run."""
  compiled = []

  def measure(part, num_devices, limit, child):
    compiled.append(jax.eval_shape(part.function, *part.arguments))
    return {"peak_bytes": bytes_of(part.arguments), "limit_bytes": limit, "compile_s": 0.0}
  monkeypatch.setattr(evaluation, "measure", measure)
  lines = rehearse_evaluation(parse(quickstart.get_config("smoke")), SMALL, jax.devices(), None)
  names = {suite: [line.name for line in lines if line.suite == suite] for suite in SMALL.suites}
  drawing = names["glyphs"]
  assert names == {"glyphs": drawing, "glyph_edits": names["glyph_edits"], "judge": [*drawing, "judge"], "pairwise": [*drawing, "judge"],
                   "fidelity": [*drawing, "vision"]}
  assert len(compiled) == len(drawing) + len(names["glyph_edits"]) + 3  # drawing without a source is compiled once, and the judge of one and of two
  of = {(line.suite, line.name): line for line in lines}
  assert of["judge", "judge"].calls == 8 and of["pairwise", "judge"].calls == 5 and of["fidelity", "vision"].calls == 3  # 60, 40, 20 in eights
  assert {line.calls for line in lines if line.name in drawing} == {3}
  draws = [of[suite, drawing[0]] for suite in ("glyphs", "judge", "fidelity")]
  assert draws[0].peak_bytes == draws[1].peak_bytes and draws[1].beside_bytes > draws[2].beside_bytes > draws[0].beside_bytes
  assert of["pairwise", "judge"].peak_bytes > of["judge", "judge"].peak_bytes  # two pictures in a question


def line(suite, name, calls, seconds, peak=1 * roofline.GIB):
  return Line(suite, name, 8, peak, 2 * roofline.GIB, 4 * roofline.GIB, calls,
              {"step_s": seconds, "compute_s": seconds, "hbm_s": seconds, "ici_s": 0.0, "dcn_s": 0.0}, 0.0)


def test_cores_that_keep_the_devices_busy():
  wanted = Wanted(100, 4, suites=("text", "judge"))
  lines = [line("text", "draw", 40, 3.0), line("text", "decode", 40, 0.6), line("judge", "draw", 40, 9.0), line("judge", "judge", 100, 1.8)]
  text = describe(lines, wanted, {"text": 0.5}).split("\n")
  # 40 calls of 3.6 s: 400 pictures in 144 s at least and 288 s at most, while a core needs 800 s.
  assert text[-2] == ("text: 400 pictures: 0.04 h at least, 0.08 h if nothing overlaps; a core of this machine scores 0.5 pictures/s, so that 3 to 6 "
                      "cores keep the devices busy, and one takes 0.22 h")
  assert text[-1] == "judge: 400 pictures: 0.15 h at least, 0.30 h if nothing overlaps"
  assert text[1].split() == ["text", "draw", "8", "1.00", "2.00", "4.00", "fits", "40", "3.000", "6.000"]
  unknown = [dataclasses.replace(one, bound={}, limit_bytes=None) for one in lines[:2]]
  assert describe(unknown, Wanted(100, 4, suites=("text",)), {"text": 0.5}).split("\n")[-1] == (
      "text: 400 pictures; a core of this machine scores 0.5 pictures/s")
  assert dataclasses.replace(lines[0], peak_bytes=3 * roofline.GIB).fits is False


def test_every_suite_can_be_rehearsed_and_no_other():
  assert {*scoring.SCORINGS, *scoring.NOT_REHEARSED} == set(registry.SUITES)
  assert all(how.on_host or how.by in evaluation._SCORERS for how in scoring.SCORINGS.values())
  with pytest.raises(ValueError, match="no suite 'texts' to rehearse: choose among glyphs"):
    Wanted(10, suites=("texts",))
  with pytest.raises(ValueError, match="names a suite twice"):
    Wanted(10, suites=("text", "text"))
  cfg = parse(quickstart.get_config("smoke"))
  blind = dataclasses.replace(cfg, encoder=dataclasses.replace(cfg.encoder, vision=None))
  with pytest.raises(ValueError, match="no vision tower, so that it neither judges"):
    evaluation._tower(blind)


def test_a_rate_is_pictures_per_second_of_one_core(monkeypatch):
  now, calls = iter([10.0, 14.0]), []
  suite, tasks, pictures = scoring._samples("glyphs", 64)
  assert len(tasks) == len(pictures) == 1 + scoring.NUM_MEASURED and pictures[0].shape[:2] == tuple(tasks[0].size)
  slow = dataclasses.replace(suite, score=lambda task, picture: calls.append(task))
  monkeypatch.setattr(scoring, "_samples", lambda name, side_px: (slow, tasks, pictures))
  monkeypatch.setattr(scoring.time, "process_time", lambda: next(now))
  assert scoring.host_rate("glyphs", 64) == 1.0 and len(calls) == 5  # the first one loads what scores, and does not count
  monkeypatch.undo()
  for name in ("cvtg", "text_edits"):
    _, tasks, pictures = scoring._samples(name, 256)
    assert len(pictures) == 5 and all(picture.shape == (*task.size, 3) and picture.min() < 128 for task, picture in zip(tasks, pictures))
